import ast
import inspect
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from backends import BACKEND

import keras_frn

ROOT = Path(__file__).parents[1]
SOURCES = sorted(Path(keras_frn.__file__).parent.rglob("*.py"))
HEAVY = {"tensorflow", "jax", "torch", "sklearn", "matplotlib", "ai_edge_litert"}


def test_public_names():
    assert set(keras_frn.__all__) <= set(dir(keras_frn))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        keras_frn.nothing  # noqa: B018
    for name in keras_frn.__all__:
        value = getattr(keras_frn, name)
        if not inspect.ismodule(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


@pytest.mark.parametrize("name", ["filter_response_normalization", "tlu"])
def test_docstrings_say_what_a_user_must_know(name):
    for part in ("```", "Shape:", "Args:", "Defaults to", "Raises:", "Example", "arxiv.org"):
        assert part in getattr(keras_frn.ops, name).__doc__


@pytest.mark.parametrize(
    "layer",
    [
        keras_frn.FilterResponseNormalization,
        keras_frn.TLU,
        keras_frn.FilterResponseNormalizationTLU,
    ],
)
def test_layer_docstrings(layer):
    doc = inspect.getdoc(layer)
    for part in ("```", "Shape:", "Args:", "Example", "Raises:", "Reference:"):
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
def test_imports_of_the_package(path):
    tree = ast.parse(path.read_text())
    assert not [n for n in imports(tree, True) if n.startswith("keras.src")]
    at_top = {n.split(".")[0] for n in imports(tree, False)}
    assert not at_top & HEAVY, "heavy packages are imported where they are used"


def test_imports_run_downward():
    def level(name):
        order = [["compilation", "arguments"], ["ops"], ["layers"]]
        return next((i for i, names in enumerate(order) if name in names), len(order))

    for path in SOURCES:
        if path.stem != "__init__" and level(path.stem) < 3:
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level == 1:
                    names = [node.module] if node.module else [a.name for a in node.names]
                    for name in names:
                        assert level(name) < level(path.stem), f"{path.name} imports {name}"


def test_import_loads_no_other_backend_and_is_quick():
    code = (
        "import sys, time, keras; before = set(sys.modules); start = time.perf_counter()\n"
        "import keras_frn\n"
        "print(time.perf_counter() - start, *sorted(set(sys.modules) - before))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    seconds, *modules = output.stdout.split()
    assert "keras_frn.layers" in modules
    assert not {m.split(".")[0] for m in modules} & HEAVY
    assert "keras_frn.export" not in modules, "tools load when they are used"
    # A few milliseconds on a quiet machine; the bound catches an import that does not belong.
    assert float(seconds) < 0.25


def test_version_is_in_the_changelog():
    assert f"## {keras_frn.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def code_blocks(path):
    blocks, inside = [], None
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            if inside is not None:
                blocks.append("\n".join(inside))
                inside = None
            elif line == "```python":
                inside = []
            else:
                inside = None
        elif inside is not None:
            inside.append(line)
    return blocks


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the README's code exports with TensorFlow")
def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    blocks = code_blocks(ROOT / "README.md")
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_nothing_names_this_machine():
    words = ("/work" + "/", "/tmp" + "/v", "py" + "pi.org", "helper" + "-")
    for path in [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/*.py")]:
        text = path.read_text()
        assert not [w for w in words if w in text], path.name


def test_keras_is_new_enough():
    assert tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 0)
