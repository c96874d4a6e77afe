"""The code in README and in the guides runs, in a folder with the files that a page begins with."""

import ast
import os
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy
from exporting import stored_shapes
from markdown_blocks import ROOT, programs, run_code
from reference import close

import keras_frn
from keras_frn import cli

# Their blocks are whole programs, each of which names its backend.
OF_PROGRAMS = ("devices.md", "per-example-gradients.md")
# test_weights_from_elsewhere.py runs the page of this name.
OTHERS = ("weights-from-elsewhere.md", *OF_PROGRAMS)
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    if "```python" in path.read_text() and path.name not in OTHERS
)
ADDONS = ROOT / "tests" / "addons_models" / "frn_tlu"


def _model_and_images(path, *normalization):
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)]
    layers = [keras.layers.Conv2D(4, 3, padding="same"), *normalization, *head]
    keras.Sequential([keras.Input((8, 8, 3)), *layers]).save(path)
    np.save("images.npy", np.random.default_rng(0).normal(size=(264, 8, 8, 3)).astype("float32"))


def _bn_model_and_images():
    _model_and_images("bn.keras", keras.layers.BatchNormalization(), keras.layers.ReLU())


def _frn_model_and_images():
    _model_and_images("model.keras", keras_frn.FilterResponseNormalizationTLU())


def _frn_model_and_images_and_micro():
    pytest.importorskip("tflite_micro")
    _frn_model_and_images()


def _addons_files():
    shutil.copy(ADDONS / "model.h5", "old.h5")
    shutil.copy(ADDONS / "model.h5", "weights.h5")
    np.save("inputs.npy", np.load(ADDONS / "io.npz")["x"])
    shutil.copy(ADDONS / "io.npz", "io.npz")


def _is_converted(names):
    assert "1 BatchNormalization layer became FRN" in str(names["report"])
    assert len(names["functional"].layers) == len(names["model"].layers) + 1
    assert names["scheduler"].ratio == pytest.approx(0.1)


def _is_migrated(names):
    expected = np.load(ADDONS / "io.npz")
    for model in (names["model"], keras.saving.load_model("from-shell.keras")):
        close(numpy(model(expected["x"])), expected["y"], 2e-5)
    assert names["small"].get_layer("tlu").tau.shape == (4,)


def _has_a_fixed_batch(names):
    assert "XNNPACK" in str(names["report"])
    assert (1, 8, 8, 3) in stored_shapes("model.tflite")


def _has_a_block(names):
    assert names["block"].output_shape == (None, 32, 32, 16)


def _is_accurate(names):
    # 0.989 was seen.
    assert names["accuracy"] > 0.97


BEFORE = {
    "docs/converting-batch-normalization.md": _bn_model_and_images,
    "docs/export.md": _frn_model_and_images,
    "docs/microcontrollers.md": _frn_model_and_images_and_micro,
    "docs/migrating-from-addons.md": _addons_files,
    "docs/other-formats.md": _frn_model_and_images,
}
AFTER = {
    "docs/converting-batch-normalization.md": _is_converted,
    "docs/migrating-from-addons.md": _is_migrated,
    "docs/export.md": _has_a_fixed_batch,
    "docs/getting-started.md": _is_accurate,
    "docs/microcontrollers.md": _has_a_fixed_batch,
    "docs/small-batches.md": _has_a_block,
}
# They export LiteRT files, which TensorFlow writes.
OF_TENSORFLOW = ("README", "docs/getting-started", "docs/export", "docs/microcontrollers")


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation():
    """The code is run, not measured, and XLA's optimizations take most of the time on JAX."""
    if BACKEND != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.filterwarnings("ignore:The optimizer .* starts fresh")
@pytest.mark.filterwarnings("ignore:In the future `np.:FutureWarning")  # Keras' ONNX export
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")  # of coremltools
@pytest.mark.parametrize(
    "page",
    # The layers on every backend; the tools have tests of their own there.
    [pytest.param(p, marks=[pytest.mark.once] * (p != "docs/layers.md")) for p in PAGES],
)
def test_page_code_runs(page, tmp_path, monkeypatch):
    if page.removesuffix(".md") in OF_TENSORFLOW and BACKEND != "tensorflow":
        pytest.skip("it exports with TensorFlow")
    monkeypatch.chdir(tmp_path)
    BEFORE.get(page, lambda: None)()
    names = {}
    run_code(page, names)
    AFTER.get(page, lambda names: None)(names)


PROGRAMS = [
    pytest.param(block, id=f"{page} {number}")
    for page in OF_PROGRAMS
    for number, (backend, block) in enumerate(programs(f"docs/{page}"), 1)
    if backend == BACKEND
]


@pytest.mark.parametrize("block", PROGRAMS)
def test_guide_programs_run(block, tmp_path):
    (tmp_path / "program.py").write_text(block)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 0
    assert result.stdout, "each program prints what it found"


@pytest.mark.once
def test_figure_script_draws_every_picture(tmp_path):
    script = ROOT / "docs" / "figures.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    pictures = {path.name for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert pictures == {path.name for path in tmp_path.iterdir()}


@pytest.mark.once
@pytest.mark.parametrize(
    "page", sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")}), ids=lambda p: p.name
)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def _messages():
    """The texts in the package, with `...` for what is filled in."""
    for path in ROOT.glob("keras_frn/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "..." for v in node.values]
                yield "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_the_messages_of_the_package():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    export = (ROOT / "docs" / "export.md").read_text()
    table = export.partition("## If the report warns")[2].partition("##")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    cells = [f"**{quote}**" for cell in cells for quote in re.findall("`[^`]+`", cell)]
    # What others say names its source, or is a word of a tool.
    titles = [line for line in page.splitlines() if line.startswith("**`")] + cells
    quotes = [
        quote
        for line in titles
        if not re.search(r"\(\w+[^)`]*\)\*\*|distribution|torch.compile", line)
        for quote in re.findall(r"\*\*(`+ ?.+? ?`+)\*\*", line)
    ]
    assert len(quotes) > 15
    texts = list(_messages())
    for quote in quotes:
        pieces = quote.strip("` ").split("...") if "`` " not in quote else [quote[3:-3]]
        assert any(all(piece in text for piece in pieces) for text in texts), quote


def test_command_line_page_has_every_option():
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    _, *sections = re.split(r"^## `keras-frn (\w+)`$", page, flags=re.MULTILINE)
    documented = {
        name: set(re.findall(r"^\| `([\w-]+)`", section, re.MULTILINE))
        for name, section in zip(sections[::2], sections[1::2])
    }
    commands = cli._parser()._subparsers._group_actions[0].choices
    expected = {
        name: {(action.option_strings or [action.dest])[-1] for action in command._actions[1:]}
        for name, command in commands.items()
    }
    assert documented == expected
