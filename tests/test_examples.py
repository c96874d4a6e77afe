"""The scripts in `examples/`, each at toy size."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from backends import BACKEND

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="the examples are written for JAX")


def run(name, **options):
    return runpy.run_path(str(EXAMPLES / name))["main"](**options)


# jax-privacy 2.0.0 calls optax by a name that is going away.
@pytest.mark.filterwarnings("ignore:optax:DeprecationWarning")
def test_private_training():
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


def test_bayesian():
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
