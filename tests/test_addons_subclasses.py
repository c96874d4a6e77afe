"""Checkpoints and SavedModels of subclassed models, which Keras 2 writes here."""

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import numpy
from keras import layers, ops
from reference import close

from keras_frn import TLU, FilterResponseNormalization, load_addons_model, load_addons_weights

pytestmark = pytest.mark.once
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
    def __init__(self, filters=6):
        super().__init__()
        self.stem = layers.Conv2D(4, 3)
        self.frn = FilterResponseNormalization(learned_epsilon=True)
        self.tlu = TLU(axis=(1, 2, 3))
        self.blocks = [Block(4), Block(filters)]
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
    with np.load(folder / "io.npz") as file:
        io = dict(file)
    model = Net() if model is None else model
    model(io["x"])
    load_addons_weights(model, folder / name, **options)
    return numpy(model(io["x"])), io


DEEP = ["deep/ckpt", "gan.weights.h5"]  # a model in a model
FILES = ["net", "net.h5", "net.weights.h5", "net.keras", "saved_model"]


@pytest.mark.each_backend
@pytest.mark.parametrize("name", [*FILES, "gan", "gan/ckpt-1", "model/ckpt", *DEEP])
def test_a_subclassed_model_gets_its_weights(folder, name):
    y, io = load(folder, name)
    close(y, io["net"], 2e-5)  # roundings of float32, in sums of some hundreds


def test_a_subclassed_model_is_not_opened_and_the_error_says_what_to_do(folder):
    for options in ({}, {"custom_objects": {"Net": Net}}):
        for name in ("net.keras", "saved_model"):
            with pytest.raises(ValueError, match="load_addons_weights") as error:
                load_addons_model(folder / name, **options)
            assert "custom_objects" not in str(error.value)


class Both(keras.Model):
    def __init__(self):
        super().__init__()
        self.second = layers.Dense(4)
        self.all = []
        self.all += [layers.Dense(4), self.second]
        self._last = layers.Dense(4)
        self.generator = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        self.discriminator = keras.Sequential([keras.Input((3,)), layers.Dense(4)])

    def call(self, x):
        for layer in (*self.all, self._last, self.generator, self.discriminator):
            x = layer(x)
        return x


class Mixed(keras.Model):
    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(name="scale", shape=(4,))
        norms = [layers.BatchNormalization() for _ in range(2)]
        frns = [FilterResponseNormalization() for _ in range(2)]
        self.body = keras.Sequential([layers.Conv2D(4, 3), frns[0], norms[0], frns[1], norms[1]])
        self.pair = (layers.Dense(4), [layers.Dense(4), [layers.Dense(4)]])

    def call(self, x):
        x = ops.mean(self.body(x) * self.scale, [1, 2])
        return self.pair[1][1][0](self.pair[1][0](self.pair[0](x)))


@pytest.mark.each_backend
@pytest.mark.parametrize("name", ["mixed", "mixed.weights.h5", "mixed.h5"])
def test_own_weights_frozen_layers_lists_in_tuples_and_the_state_of_training(folder, name):
    layers.Dense(1), layers.BatchNormalization()  # so that Keras has other numbers here
    told = pytest.warns(UserWarning, match=r"`path` numbers its layers .* -> mixed")
    with told if name == "mixed.h5" else contextlib.nullcontext():
        y, io = load(folder, name, Mixed())
    close(y, io["mixed"], 2e-5)


class Heads(keras.Model):
    def __init__(self):
        super().__init__()
        self.heads = {"b": layers.Dense(3), "a": layers.Dense(3), "inner": {"d": layers.Dense(3)}}
        self._layers_after = [layers.Dense(3)]

    def call(self, x):
        a, b = self.heads["a"](x), self.heads["b"](x)
        return self._layers_after[0](self.heads["inner"]["d"](a - 2.0 * b))


@pytest.mark.each_backend
@pytest.mark.parametrize("ending", ["", ".weights.h5", ".h5"])
@pytest.mark.parametrize(("name", "build"), [("both", Both), ("heads", Heads)])
def test_attributes_of_all_kinds_get_their_own_weights(folder, name, build, ending):
    """Layers of two names, private attributes, two models, equal shapes in a dict."""
    with np.load(folder / "io.npz") as io:
        x, expected = io["x"][:, 0, 0], io[name]
    model = build()
    model(x)
    load_addons_weights(model, folder / f"{name}{ending}")
    close(numpy(model(x)), expected, 2e-5)


class Lost(keras.Model):
    def __init__(self):
        super().__init__()
        self.w = self.add_weight(name="w", shape=(3,))
        self.b = self.add_weight(name="w", shape=(3,))

    def call(self, x):
        return x * self.w + self.b


def test_one_array_is_not_taken_for_two_weights(folder):
    with pytest.raises(ValueError, match=r"it holds one array for two weights: 'lost\S*/w'"):
        load(folder, "lost", Lost())


def two(*names):
    inputs = keras.Input((8, 8, 3))
    found = [layers.Conv2D(3, 3, name=name)(inputs) for name in names]
    return keras.Model(inputs, layers.Subtract()(found))


@pytest.mark.parametrize("names", ["ab", "ba", "bc", (None, None)])
@pytest.mark.parametrize("name", ["two", "two.h5"])
def test_layers_of_equal_shapes_in_another_order_are_reported(folder, name, names):
    is_certain = names == "ab" or (name == "two" and names != "ba")  # which goes by order
    told = pytest.warns(UserWarning, match=r"`path` numbers .*a/kernel.* \(3, 3, 3, 3\) -> ")
    with contextlib.nullcontext() if is_certain else told:
        load_addons_weights(two(*names), folder / name)


@pytest.mark.parametrize("name", ["turned.keras", "turned"])
def test_numbers_of_layers_are_not_those_of_classes_in_a_file_with_a_config(folder, name):
    class Other(layers.Dense):
        pass

    weights = {"path": folder / "turned.json", "weights": folder / name}
    options = {"path": folder / name, "custom_objects": {"Dense": Other}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_addons_model(**weights if name == "turned" else options)
    with np.load(folder / "io.npz") as io:
        close(numpy(model(io["x"][:, 0, :, 0])), io["turned"], 2e-5)


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
    for part, expected in (("trainer/gan/generator", "net"), ("trainer/ema/generator", "other")):
        y, io = load(folder, "deeper/ckpt", part=part)
        close(y, io[expected], 2e-5)
    two = r"\['trainer/ema/generator', 'trainer/gan/generator'\]"
    with pytest.raises(ValueError, match=rf"`part` must be one of {two}, which all fit"):
        load(folder, "deeper/ckpt")
    with pytest.raises(ValueError, match=r"`part` must be one of \['trainer/ema', 'trainer/gan'\]"):
        load(folder, "deeper/ckpt", part="trainer/x")
    with pytest.raises(ValueError, match=r"`part` must be None for a file without parts"):
        load(folder, "net.h5", part="model")


def test_what_is_wrong_in_the_part_that_is_most_like_the_model_is_said(folder):
    with pytest.raises(ValueError, match=r"weight '.*conv.*' has shape \(3, 3, 4, 7\), not \(3, "):
        load(folder, "model/ckpt", Net(filters=7))


def flat(**names):
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name=names.get("conv", "stem")),
            FilterResponseNormalization(name="frn"),
            TLU(axis=(1, 2, 3), name="tlu"),
        ]
    )


@pytest.mark.parametrize("name", ["flat", "flat.h5", "flat.weights.h5", "flat_saved_model"])
def test_layers_that_have_the_names_of_attributes_get_their_weights(folder, name):
    y, io = load(folder, name, flat())
    close(y, io["flat"], 2e-5)


def test_layers_of_other_names_get_their_weights_by_order(folder):
    for name in ("flat", "flat.h5", "flat_saved_model"):
        y, io = load(folder, name, flat(conv="first"))
        close(y, io["flat"], 2e-5)


def test_a_part_that_was_found_by_order_is_reported(folder):
    with pytest.warns(UserWarning, match=r"`path` nests its layers .*flat/conv2d\S*/kernel \(3"):
        y, io = load(folder, "manager", flat(conv="first"))
    close(y, io["flat"], 2e-5)
    y, io = load(folder, "manager", flat(conv="first"), part="flat")
    close(y, io["flat"], 2e-5)


def flat_net():
    inputs = x = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3)(x)
    x = FilterResponseNormalization(learned_epsilon=True)(x)
    x = TLU(axis=(1, 2, 3))(x)
    for filters in (4, 6):
        x = FilterResponseNormalization()(layers.Conv2D(filters, 3, padding="same")(x))
        x = TLU(axis=(1, 2, 3))(layers.ReLU()(x))
    x = layers.Dense(5)(layers.ReLU()(layers.GlobalAveragePooling2D()(x)))
    outputs = layers.Concatenate()([layers.Dense(3)(x), layers.Dense(2)(x)])
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("name", ["net", "net.h5", "saved_model", "gan"])
def test_a_flat_model_gets_the_weights_of_nested_layers_by_order(folder, name):
    """Two layers have weights of the same shapes, so a warning says which way each array went."""
    model = flat_net()
    with pytest.warns(
        UserWarning, match=r"`path` nests its layers .*net/conv2d/kernel.* -> conv2d"
    ) as told:
        y, io = load(folder, name, model)
    close(y, io["net"], 2e-5)
    assert told[0].filename == __file__  # the line that calls the public function


def nested_net():
    def block(name, filters, channels):
        found = [FilterResponseNormalization(name="0"), layers.ReLU(), TLU((1, 2, 3), name="2")]
        rest = keras.Sequential([keras.Input((6, 6, filters)), *found], name="rest")
        conv = layers.Conv2D(filters, 3, padding="same", name="conv")
        return keras.Sequential([keras.Input((6, 6, channels)), conv, rest], name=name)

    stem = layers.Conv2D(4, 3, name="stem")
    frn = FilterResponseNormalization(learned_epsilon=True, name="frn")
    blocks = [keras.Input((6, 6, 4)), block("0", 4, 4), block("1", 6, 4)]
    blocks = keras.Sequential(blocks, name="blocks")
    tail = keras.Sequential([keras.Input((6,)), layers.ReLU(), layers.Dense(5)], name="tail")
    x = keras.Input((5,))
    y = layers.Concatenate()([layers.Dense(3, name="a")(x), layers.Dense(2, name="b")(x)])
    start = [stem, frn, TLU(axis=(1, 2, 3), name="tlu"), blocks, layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input((8, 8, 3)), *start, tail, keras.Model(x, y, name="heads")])


@pytest.mark.parametrize("name", ["net", "saved_model", "gan"])
def test_nested_models_get_the_weights_of_lists_and_dicts_by_name(folder, name):
    y, io = load(folder, name, nested_net())
    close(y, io["net"], 2e-5)


def test_arrays_missing_from_the_model_are_reported(folder):
    small = keras.Sequential(flat().layers[:2])
    small.build((None, 8, 8, 3))
    with pytest.raises(ValueError, match=r"it has 1 array that the model has not, such as .*tau"):
        load(folder, "flat", small)
