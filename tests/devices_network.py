"""A small network and its data, for the programs that test_devices.py runs."""

import keras
import numpy as np
from keras import layers

from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

BATCH, STEPS = 8, 4


def frn():
    return [FilterResponseNormalization(learned_epsilon=True), TLU()]


def frn_tlu():
    return [FilterResponseNormalizationTLU()]


def group_normalization():
    return [layers.GroupNormalization(4), layers.ReLU()]


def batch_normalization():
    return [layers.BatchNormalization(), layers.ReLU()]


def network(*normalizations):
    """Two convolutions, each with a normalization, and a linear head. Always the same weights."""
    keras.utils.set_random_seed(0)
    first, second = normalizations
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, name="conv1"),
            *first(),
            layers.Conv2D(8, 3, name="conv2"),
            *second(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )


def compiled(model):
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH * STEPS, 8, 8, 3)).astype("float32")
    return x, rng.integers(0, 3, BATCH * STEPS)


def fit(model):
    model.fit(*data(), batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
    return model


def difference(model, other):
    """The largest one of all weights after the steps."""
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


def moved(model, other):
    """The smallest, over the weights, of the largest change: 0 if a weight did not learn."""
    pairs = zip(model.get_weights(), other.get_weights(), strict=True)
    return min(float(np.max(np.abs(a - b))) for a, b in pairs)
