"""The scripts in `examples/`, each at toy size: `main` with small numbers."""

import runpy

import numpy as np
import pytest
from backends import BACKEND
from markdown_blocks import ROOT

# It compiles the networks of each for a minute.
pytestmark = [pytest.mark.slow] * (BACKEND == "jax")


def run(name, **options):
    return runpy.run_path(str(ROOT / "examples" / name))["main"](**options)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def image_classification():
    pytest.importorskip("sklearn")
    accuracy = run("image_classification.py", data="none", images=64, epochs=1, width=4)
    assert 0 <= accuracy <= 1


def segmentation_3d():
    dice = run("segmentation_3d.py", count=4, size=8, epochs=1, width=2)
    assert 0 < dice < 1


def microcontroller():
    pytest.importorskip("tflite_micro", reason="of the [examples] extra")
    _, steps = run("microcontroller.py", images=64, epochs=1)
    # The two interpreters round alike but for a few operators.
    assert steps <= 3


def private_training():
    pytest.importorskip("jax_privacy", reason="of the [examples] extra")
    epsilon, accuracies = run(
        "private_training.py", data="digits", steps=3, batch=64, width=8, noise=1.0
    )
    # The moments bound of Abadi et al., sqrt(2 steps ln(1 / delta)) q / noise, is 0.5; the tight
    # accountant stays in its neighbourhood.
    assert 0.1 < epsilon < 2
    assert set(accuracies) == {"FRN + TLU", "GroupNormalization + ReLU"}
    for values in accuracies.values():
        assert 0.02 < values[0] <= 1


def bayesian():
    pytest.importorskip("blackjax", reason="of the [examples] extra")
    results, accepted, diverged = run(
        "bayesian.py",
        images=60,
        depth=8,
        width=2,
        train_steps=40,
        samples=3,
        burn_in=2,
        leapfrog=3,
        step=1e-3,
    )
    assert diverged == 0
    assert accepted > 0.5
    assert results["one trained network"]["accuracy"] > 0.2  # a guess has 0.1
    for result in results.values():
        assert np.isfinite(list(result.values())).all()


# The backends of each. JAX takes a minute to compile and run convolutions of volumes on a CPU.
CHECKS = {
    bayesian: ("jax",),
    image_classification: ("tensorflow", "jax", "torch"),
    microcontroller: ("tensorflow",),
    private_training: ("jax",),
    segmentation_3d: ("tensorflow", "torch"),
}


# jax-privacy's own.
@pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_example_runs(check):
    if BACKEND not in CHECKS[check]:
        pytest.skip(f"runs on {', '.join(CHECKS[check])}")
    check()


def test_every_example_has_a_check():
    examples = {path.stem for path in ROOT.glob("examples/*.py")}
    assert examples == {check.__name__ for check in CHECKS}
