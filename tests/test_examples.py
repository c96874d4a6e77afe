"""Every example runs, at the size of a toy."""

import runpy

import pytest
from backends import BACKEND
from markdown import ROOT

EXAMPLES = sorted(path.name for path in ROOT.glob("examples/*.py"))
# For each example: the backends it runs on, a package that it needs, the arguments of `main`, and
# what the result must satisfy.
TOYS = {
    "bayesian.py": (
        ("jax",),
        "blackjax",
        {
            "images": 20,
            "depth": 8,
            "width": 2,
            "train_steps": 2,
            "samples": 2,
            "burn_in": 2,
            "leapfrog": 2,
        },
        lambda result: 0 <= result[1] <= 1,
    ),
    "image_classification.py": (
        ("tensorflow", "jax", "torch"),
        "sklearn",
        {"data": "none", "images": 64, "epochs": 1, "width": 4, "output": "model.keras"},
        lambda accuracy: 0 <= accuracy <= 1,
    ),
    "microcontroller.py": (
        ("tensorflow",),
        "tflite_micro",
        {"images": 64, "epochs": 1},
        # Both interpreters round alike but for a few operators.
        lambda result: result[1] <= 3,
    ),
    "private_training.py": (
        ("jax",),
        "jax_privacy",
        {"data": "digits", "steps": 2, "batch": 32, "width": 4},
        # Epsilon, and accuracies by network.
        lambda result: result[0] > 0 and len(result[1]) > 1,
    ),
    "segmentation_3d.py": (
        # JAX takes a minute to compile and run convolutions of volumes on a CPU.
        ("tensorflow", "torch"),
        "keras",
        {"count": 4, "size": 8, "epochs": 1, "width": 2},
        lambda dice: 0 <= dice <= 1,
    ),
}


# jax-privacy's own.
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path, monkeypatch):
    assert name in TOYS, "a new example needs a row in TOYS"
    backends, needs, arguments, is_right = TOYS[name]
    if BACKEND not in backends:
        pytest.skip(f"runs on {', '.join(backends)}")
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    result = runpy.run_path(str(ROOT / "examples" / name))["main"](**arguments)
    assert is_right(result), result
