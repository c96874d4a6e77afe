"""Checkpoints and SavedModels of subclassed models, which Keras 2 writes here."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import numpy
from keras import layers, ops
from reference import close

from keras_frn import TLU, FilterResponseNormalization, load_addons_weights

pytest.importorskip("tf_keras", reason="of the [test] extra")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras2")
    script = Path(__file__).with_name("keras2_subclasses.py")
    subprocess.run([sys.executable, script], cwd=folder, check=True, capture_output=True)
    return folder


class Block(layers.Layer):
    def __init__(self, filters):
        super().__init__()
        self.conv = layers.Conv2D(filters, 3, padding="same")
        self.rest = [FilterResponseNormalization(), layers.ReLU(), TLU(axis=(1, 2, 3))]

    def call(self, x):
        x = self.conv(x)
        for layer in self.rest:
            x = layer(x)
        return x


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.stem = layers.Conv2D(4, 3)
        self.frn = FilterResponseNormalization(learned_epsilon=True)
        self.tlu = TLU(axis=(1, 2, 3))
        self.blocks = [Block(4), Block(6)]
        self.pool = layers.GlobalAveragePooling2D()
        self.tail = keras.Sequential([layers.ReLU(), layers.Dense(5, name="dense")])
        self.heads = {"a": layers.Dense(3), "b": layers.Dense(2)}

    def call(self, x):
        x = self.tlu(self.frn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = self.tail(self.pool(x))
        return ops.concatenate([self.heads["a"](x), self.heads["b"](x)], -1)


def load(folder, name, model=None, **options):
    """What the model gives with the weights of a file, and what the old models gave."""
    io = np.load(folder / "io.npz")
    model = Net() if model is None else model
    model(io["x"])
    load_addons_weights(model, folder / name, **options)
    return numpy(model(io["x"])), io


@pytest.mark.parametrize(
    "name", ["net", "net.h5", "saved_model", "gan", "gan/ckpt-1", "model/ckpt"]
)
def test_a_subclassed_model_gets_its_weights(folder, name):
    if name == "net.h5" and keras.backend.backend() == "torch":
        pytest.skip("Keras lists layers in lists first on PyTorch: an error asks for the order")
    y, io = load(folder, name)
    close(y, io["net"], 2e-5)  # roundings of float32, in sums of some hundreds


def test_a_part_is_chosen_by_name_if_several_fit(folder):
    for part, expected in (("model", "net"), ("ema", "other")):
        y, io = load(folder, "manager", part=part)
        close(y, io[expected], 2e-5)
    with pytest.raises(
        ValueError, match=r"`part` must be one of \['ema', 'model'\], which all fit"
    ):
        load(folder, "manager")
    with pytest.raises(ValueError, match=r"`part` must be one of \['discriminator', 'generator'\]"):
        load(folder, "gan", part="g")
    with pytest.raises(ValueError, match=r"`part` must be None for a file without parts"):
        load(folder, "net.h5", part="model")


def flat(**names):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name=names.get("conv", "stem")),
            FilterResponseNormalization(name="frn"),
            TLU(axis=(1, 2, 3), name="tlu"),
        ]
    )


def test_layers_that_have_the_names_of_attributes_get_their_weights(folder):
    y, io = load(folder, "flat", flat())
    close(y, io["flat"], 2e-5)
    with pytest.raises(ValueError, match=r"no 'first' for .*kernel', but \['stem', 'frn', 'tlu'"):
        load(folder, "flat", flat(conv="first"))


def test_arrays_that_the_model_has_not_are_told(folder):
    small = keras.Sequential(flat().layers[:2])
    small.build((None, 8, 8, 3))
    with pytest.raises(ValueError, match=r"it has 1 arrays that the model has not, such as .*tau"):
        load(folder, "flat", small)
