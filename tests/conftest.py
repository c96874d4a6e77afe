import gc
import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import keras
import numpy as np
import pytest

# A sixth of the time went into looking for garbage among the objects of TensorFlow and Keras.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# The same few examples in each run, however long they take: the first ones compile programs.
hypothesis.settings.register_profile(
    "few",
    max_examples=10 if keras.backend.backend() == "jax" else 20,  # which compiles each new shape
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("few")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one process, where they share fixtures and compiled programs."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _same_random_numbers():
    keras.utils.set_random_seed(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
