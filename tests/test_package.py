import ast
import configparser
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND

import keras_frn

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[1]
PACKAGE = Path(keras_frn.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"tensorflow", "jax", "torch", "sklearn", "matplotlib", "ai_edge_litert"}


def test_public_names():
    for name in keras_frn.__all__:
        value = getattr(keras_frn, name)
        if not inspect.ismodule(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


@pytest.mark.parametrize(
    "layer",
    [
        keras_frn.FilterResponseNormalization,
        keras_frn.TLU,
        keras_frn.FilterResponseNormalizationTLU,
    ],
)
def test_layer_docstrings_describe_every_argument(layer):
    doc = inspect.getdoc(layer)
    for part in ("```", "shape:", "Args:", "Example", "Raises:", "Reference:"):
        assert part in doc
    for argument in inspect.signature(layer).parameters:
        named = argument in doc or argument.split("_")[0] + "_*" in doc
        assert named or "learned_epsilon_*" in doc, f"{argument} is not documented"


def imports(tree, inside_functions):
    """Module names imported at the top level, or anywhere."""
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_package_imports_no_private_keras_and_no_heavy_module(path):
    tree = ast.parse(path.read_text())
    assert not [n for n in imports(tree, True) if n.startswith("keras.src")]
    at_top = {n.split(".")[0] for n in imports(tree, False)}
    assert not at_top & HEAVY, "heavy packages are imported where they are used"


# Each room imports from earlier rows only. `demo` and `cli` are what a user runs.
ROOMS = [
    {"errors", "typing"},
    {"compilation", "constraints", "gradients"},
    {"ops"},
    {"layers"},
    {"graph"},
    {"data_checks", "models"},
    {"samples"},
    {"monitor"},
    {"addons", "conversion", "export"},
    {"callbacks"},
    {"demo"},
    {"cli"},
    {"__main__"},
]


def room(parts):
    """A file or folder at the top of the package."""
    return parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms of this package that a file imports, also inside of functions."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = list(parts[: len(parts) - node.level])
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            modules = [node.module] if node.module else names
            yield from (room([*folder, *module.split(".")]) for module in modules)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downward(path):
    if path == PACKAGE / "__init__.py":
        return
    row = {name: number for number, names in enumerate(ROOMS) for name in names}
    own = room(path.relative_to(PACKAGE).parts)
    assert own in row, "a new file at the top needs a row in ROOMS"
    for other in imported_rooms(path):
        assert other == own or row[other] < row[own], f"{own} imports {other}"


@pytest.mark.each_backend
@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow is one of the heavy packages")
def test_import_loads_no_optional_packages():
    code = "import sys, keras; before = set(sys.modules); import keras_frn; "
    code += "print(*sorted(set(sys.modules) - before))"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "keras_frn.layers" in modules
    assert not {m.split(".")[0] for m in modules} & HEAVY


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        (
            {"TF_USE_LEGACY_KERAS": "1"},
            "",
            "UserWarning: TF_USE_LEGACY_KERAS is set, so",
        ),
        (
            {"KERAS_BACKEND": "nonsense"},
            "",
            "ImportError: keras_frn needs Keras 3.13.2 or newer, and the backend",
        ),
        (
            {"KERAS_BACKEND": "jax"},
            "sys.modules['jax'] = None",
            "ImportError: keras_frn needs Keras 3.13.2 or newer, and the backend",
        ),
        (
            {},
            "import types; sys.modules['keras'] = types.SimpleNamespace(__version__='2.15.0')",
            "ImportError: keras_frn needs Keras 3.13.2 or newer. Received: Keras 2.15.0",
        ),
    ],
)
def test_unusable_keras_raises_a_one_line_error(environment, code, message):
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nimport keras_frn"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert message in result.stderr
    assert result.stderr.count("keras_frn needs") + result.stderr.count("is Keras 2") == 1


def test_install_advice_names_packages_and_no_extras(requirements):
    """An index may have no package of this name, or a different one."""
    lines = [
        line for path in SOURCES for line in re.findall(r"pip install ([^\n\"]+)", path.read_text())
    ]
    assert lines
    for line in lines:
        assert set(line.split()) <= {*requirements, "--upgrade", "keras", "tensorflow"}, line


def test_version_is_in_the_changelog():
    assert f"## {keras_frn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def requirements():
    """The names in the extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"].values()
    return {re.match(r"[\w-]*", line)[0] for extra in extras for line in extra.split("\n")}


def examples():
    """The examples in docstrings; those of `addons` need files and are run by its own tests."""
    finder = doctest.DocTestFinder(exclude_empty=False)
    names = ("layers", "ops", "constraints", "monitor", "models", "conversion", "export")
    for name in (*names, "conversion.schedule"):
        module = importlib.import_module(f"keras_frn.{name}")
        found = finder.find(module, f"keras_frn.{name}")
        yield from (test for test in found if "```python" in test.docstring)


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_docstring_examples_run(example, rng, tmp_path, monkeypatch):
    if "export" in example.name and BACKEND != "tensorflow":
        pytest.skip("LiteRT files are written from TensorFlow")
    monkeypatch.chdir(tmp_path)
    stack = [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)]
    names = {
        "keras": keras,
        "keras_frn": keras_frn,
        "np": np,
        "images": rng.normal(size=(64, 8, 8, 3)).astype("float32"),
        "targets": np.eye(2)[np.arange(64) % 2],
        "model": keras.Sequential([*stack, keras_frn.FilterResponseNormalizationTLU(), *head]),
        "bn_model": keras.Sequential([*stack, keras.layers.BatchNormalization(), *head]),
    }
    for block in re.findall(r"```python\n(.*?)```", inspect.cleandoc(example.docstring), re.DOTALL):
        exec(block, dict(names))


def test_no_file_names_a_local_path():
    words = ("/work" + "/", "/tmp" + "/v", "py" + "pi.org", "helper" + "-")
    for path in [
        *SOURCES,
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*.py"),
        *ROOT.glob("tests/*.py"),
    ]:
        text = path.read_text()
        assert not [w for w in words if w in text], path.name
