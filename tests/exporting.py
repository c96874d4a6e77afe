"""Models and tolerances of the tests of the export."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import keras_frn
from keras_frn.export.runtime import LiteRT

exports = [
    pytest.mark.export,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="LiteRT files are written from TensorFlow"
    ),
]


# A float graph sums in another order than Keras: some ten roundings of 6e-8 per layer, relative to
# the largest output.
FLOAT = 1e-5


# How far outputs may be off, relative to the largest: rounding in half precision, 8-bit weights,
# 8-bit everything, 16-bit activations with 8-bit weights. Measured: 2e-4, 9e-3, 2e-2, 1e-2, 5e-3.
PRESETS = {
    None: FLOAT,
    "float16": 2e-3,
    "dynamic": 0.05,
    "int8": 0.1,
    "int8_float_statistics": 0.1,
    "int16x8": 0.03,
}


def run_vela(path, folder, accelerator="ethos-u55-128"):
    """What Vela says of a file: how many operators run on the CPU, and how many on the NPU."""
    code = "from ethosu.vela.vela import main; main()"
    command = [sys.executable, "-c", code, str(path), "--output-dir", str(folder)]
    command += ["--accelerator-config", accelerator]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def slow_cases(*cases):
    """Parameters of a test that run with `-m slow` alone."""
    arguments = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*values, marks=pytest.mark.slow) for values in arguments]


def frn(**kwargs):
    return keras_frn.FilterResponseNormalization(**kwargs)


def frn_tlu_layer(**kwargs):
    return keras_frn.FilterResponseNormalizationTLU(**kwargs)


def shuffled_weights(model, seed=0):
    """Gives gamma, beta, tau and epsilon values that show."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers(include_self=False):
        for name, low, high in (
            ("gamma", 0.5, 1.5),
            ("beta", -0.5, 0.5),
            ("tau", -0.6, 0.3),
            ("alpha", -0.2, 0.2),
            ("bias", -0.1, 0.1),
        ):
            weight = getattr(layer, name, None)
            if weight is not None:
                weight.assign(rng.uniform(low, high, weight.shape))
    return model


def small_model(**kwargs):
    inputs = keras.Input((12, 12, 3), name="image", **kwargs)
    x = layers.Conv2D(8, 3, use_bias=False)(inputs)
    x = frn_tlu_layer(name="first")(x)
    # TensorFlow's converter quantizes no weights of fewer than 1,024 numbers.
    x = layers.Conv2D(16, 3, strides=2, use_bias=False)(x)
    x = keras_frn.TLU()(frn(learned_epsilon=True, name="second")(x))
    x = layers.GlobalAveragePooling2D()(x)
    return shuffled_weights(keras.Model(inputs, layers.Dense(5)(x)))


def images(rng, n=64, shape=(12, 12, 3)):
    return rng.normal(size=(n, *shape)).astype("float32")


def stored_shapes(path):
    details = LiteRT(path, is_plain=True).interpreter.get_tensor_details()
    return {tuple(detail["shape_signature"]) for detail in details}


def stack(*after):
    return keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(6, 3, use_bias=False), *after])
