import contextlib
import errno
import json
import math
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from backends import BACKEND, float64_enabled, gradients, numpy
from keras import ops
from reference import close

from keras_frn import TLU, FilterResponseNormalization, load_addons_model, load_addons_weights
from keras_frn.addons.config import Builder
from keras_frn.addons.operators import call_operator

pytestmark = pytest.mark.once
MODELS = Path(__file__).parent / "addons_models"
CHECKPOINT = ("ckpt", "ckpt/ckpt", "ckpt/ckpt.index")  # one, named in three ways
FILES = ("model.h5", "model.keras", "saved_model.zip", "legacy_weights.h5", "v3.weights.h5", "ckpt")
CASES = sorted(
    f"{folder.name}/{name}"
    for folder in MODELS.iterdir()
    for name in FILES
    if (folder / name).exists()
)
# The models were trained and saved by other programs, and numbered after them.
TRAINED = sorted(c for c in CASES if "loss_next" in np.load(MODELS / c.split("/")[0] / "io.npz"))
COMPILED = [c for c in TRAINED if c.endswith(("model.h5", "model.keras", "saved_model.zip"))]


def load(case, **options):
    path = MODELS / case
    if path.name.startswith("model") or path.suffix == ".zip":
        return load_addons_model(path, **options)
    return load_addons_model(path.with_name("model.json"), weights=path, **options)


@contextlib.contextmanager
def expecting(*messages):
    """The warnings that hold these words, and no other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found = [str(w.message) for w in caught if "__array__" not in str(w.message)]
    assert len(found) == len(messages), found
    for message in messages:
        assert any(message in text for text in found), (message, found)


def expected_of(case):
    io = dict(np.load(MODELS / case.split("/")[0] / "io.npz", allow_pickle=False))

    def all_of(name):
        return (
            [io[name]] if name in io else [io[f"{name}{i}"] for i in range(9) if f"{name}{i}" in io]
        )

    return io, all_of("x"), all_of("y"), all_of("gx")


def flat(y, dtype):
    parts = keras.tree.flatten(y)
    return ops.concatenate([ops.reshape(ops.cast(v, dtype), (-1,)) for v in parts])


def tolerance_of(folder):
    if folder == "float64":  # which Keras' own pooling rounds to float32 under PyTorch and JAX
        return 1e-12 if BACKEND == "tensorflow" else 2e-7
    # float16 has 11 bits: 5e-4 of the largest number, and some roundings in a row.
    return 2e-3 if folder in ("mixed_float16", "half") else 2e-5


# Which file a model comes from is the same on every backend.
@pytest.mark.each_backend
@pytest.mark.parametrize(
    "case", CASES if BACKEND == "tensorflow" else {c.split("/")[0]: c for c in CASES}.values()
)
def test_outputs_gradients_losses_and_names_are_those_of_addons(case):
    folder = case.split("/")[0]
    io, xs, ys, gxs = expected_of(case)
    with float64_enabled() if folder == "float64" else contextlib.nullcontext():
        model = load(case, compile=False)
        dtype = "float64" if folder == "float64" else "float32"
        expected = np.concatenate([np.ravel(y) for y in ys]).astype(dtype)

        def call(**arrays):
            inputs = list(arrays.values())
            return flat(model(inputs[0] if len(inputs) == 1 else inputs), dtype)

        arrays = {f"x{i}": x for i, x in enumerate(xs)}
        y, found = gradients(call, arrays, 2 * expected)
        close(y, expected, tolerance_of(folder))
        for gradient, given in zip(found.values(), gxs, strict=True):
            close(gradient, given, tolerance_of(folder))
        # The sum of a few float32 terms.
        losses = sum(float(numpy(loss)) for loss in model.losses)
        assert losses == pytest.approx(float(io["reg_loss"]), rel=1e-5, abs=1e-7)
    if "names" in io:
        # Functions of TensorFlow became operations of Keras where Keras has no layer for them.
        names = [n for n in io["names"].tolist() if not n.startswith("tf.")]
        found = [layer.name for layer in model.layers if not layer.name.startswith("tf.")]
        assert sorted(found) == sorted(names)
        thresholds = [v for v in model.layers if isinstance(v, TLU)]
        if folder != "shared_across" and all(v.axis != -1 for v in thresholds):
            trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
            assert trainable == int(io["trainable"])


@pytest.mark.parametrize("case", COMPILED)
def test_the_model_is_compiled_as_it_was_with_an_optimizer_that_starts_fresh(case):
    io, xs, _, _ = expected_of(case)
    if "addons_lamb" in case:
        with expecting(
            "not compiled, as Keras 3 cannot restore the compile arguments: Addons>LAMB"
        ):
            assert not load(case).compiled
        return
    with expecting("starts fresh"):
        model = load(case)
    assert int(numpy(model.optimizer.iterations)) == 0
    model.run_eagerly = True  # to compile a step takes seconds
    # The loss before the step has nothing to do with the state of the optimizer.
    loss = model.train_on_batch(io.get("xb", xs[0]), io["yb"], return_dict=True)["loss"]
    tolerance = 2e-3 if case.startswith("half") else 2e-5
    assert float(loss) == pytest.approx(float(io["loss_next"]), abs=tolerance)


def compiled(tmp_path, source, objects=None, **training):
    """A file whose model was compiled so, opened again."""
    path = tmp_path / "compiled.h5"
    shutil.copy(MODELS / source / "model.h5", path)
    path.chmod(0o600)
    with h5py.File(path, "r+") as file:
        optimizer = {"class_name": "SGD", "config": {"learning_rate": 0.1}}
        file.attrs["training_config"] = json.dumps({"optimizer_config": optimizer, **training})
    return load_addons_model(path, custom_objects=objects)


def wrapped(function, name):
    return {"class_name": "MeanMetricWrapper", "config": {"name": name, "fn": function}}


@pytest.mark.filterwarnings("ignore:The optimizer .* starts fresh")
@pytest.mark.parametrize(
    ("training", "losses", "metrics"),
    [
        ({"loss": "mse", "loss_weights": {"d1": 3.0}}, [1.0, 3.0], []),
        ({"loss": ["mse", "mse"], "loss_weights": {"d1": 3.0}}, [1.0, 3.0], []),
        ({"loss": {"d1": "mse"}, "metrics": {"d1": ["mae"]}}, [0.0, 1.0], ["d1_mae"]),
        ({"loss": ["mse", None], "metrics": [[None], ["mae"]]}, [1.0, 0.0], ["d1_mae"]),
        ({"loss": "mse", "metrics": ["mae"]}, [1.0, 1.0], ["global_max_pooling2d_mae", "d1_mae"]),
        (
            {"loss": "mse", "metrics": [[], [wrapped("mean_absolute_error", "d1_mae")]]},
            [1.0, 1.0],
            ["d1_mae"],
        ),
    ],
)
def test_losses_and_metrics_of_several_outputs(tmp_path, rng, training, losses, metrics):
    model = compiled(tmp_path, "two_in_two_out", **training)
    xs = [rng.normal(size=(2, 4, 4, 2)).astype("float32") for _ in range(2)]
    errors = [numpy(y) for y in model(xs)]
    found = model.evaluate(xs, [0 * y for y in errors], verbose=0, return_dict=True)
    expected = sum(w * np.mean(y * y) for w, y in zip(losses, errors, strict=True))
    assert found["loss"] == pytest.approx(expected, rel=1e-5)  # some roundings of float32
    values = dict(
        zip(["global_max_pooling2d_mae", "d1_mae"], [np.mean(abs(y)) for y in errors], strict=True)
    )
    assert {key: v for key, v in found.items() if key.endswith("mae")} == {
        key: pytest.approx(values[key], rel=1e-5) for key in metrics
    }


def own_error(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred), -1)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"loss": "own_error"}, "loss identifier: own_error"),
        ({"loss": "mse", "metrics": ["own_error"]}, "metric identifier: own_error"),
        ({"loss": "mse", "metrics": [wrapped("own_error", "own")]}, "{'own_error': its function}"),
    ],
)
def test_own_losses_and_metrics_are_wanted_when_the_model_is_opened(tmp_path, training, words):
    with expecting(words):
        assert not compiled(tmp_path, "frn_tlu", **training).compiled
    with expecting("starts fresh"):
        model = compiled(tmp_path, "frn_tlu", {"own_error": own_error}, **training)
    model.evaluate(np.zeros((1, 6, 6, 3)), np.zeros((1, 3)), verbose=0)


@pytest.mark.filterwarnings("ignore:The optimizer .* starts fresh")
@pytest.mark.parametrize("loss", ["logcosh", {"dense": "kullback_leibler_divergence"}])
def test_losses_whose_names_keras_3_changed(tmp_path, loss):
    model = compiled(tmp_path, "frn_tlu", loss=loss)
    found = model.evaluate(np.zeros((1, 6, 6, 3)), np.ones((1, 3)), verbose=0)
    y = numpy(model(np.zeros((1, 6, 6, 3))))
    is_logcosh = loss == "logcosh"
    expected = np.mean(np.log(np.cosh(y - 1))) if is_logcosh else -np.sum(np.log(y))
    assert found == pytest.approx(expected, rel=1e-5)  # some roundings of float32


@pytest.mark.filterwarnings("ignore:The optimizer .* starts fresh")
def test_optimizers_keep_their_kind_rates_and_options():
    adam = load("adam/model.h5").optimizer
    assert isinstance(adam, keras.optimizers.Adam)
    assert isinstance(adam._learning_rate, keras.optimizers.schedules.ExponentialDecay)
    assert (adam.amsgrad, adam.use_ema, adam.ema_momentum) == (True, True, 0.9)
    old = load("old_sgd/saved_model.zip").optimizer
    assert (old.momentum, old.nesterov) == (pytest.approx(0.9), True)
    # `decay` of Keras 2 divides the rate by 1 + decay * steps.
    assert float(numpy(old._learning_rate(10))) == pytest.approx(0.05 / (1 + 0.1 * 10))
    rmsprop = load("rmsprop/model.keras").optimizer
    assert (rmsprop.momentum, rmsprop.centered) == (0.5, True)
    assert float(numpy(rmsprop.learning_rate)) == pytest.approx(0.01)
    half = load("half/model.h5")
    assert isinstance(half.optimizer, keras.optimizers.LossScaleOptimizer)


@pytest.mark.each_backend
# Keras 3.10's own, for a reloaded model whose one input was in a list.
@pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match:UserWarning")
@pytest.mark.filterwarnings("ignore:The optimizer .* starts fresh")
def test_a_loaded_model_is_saved_and_reloaded_without_anything_special(tmp_path):
    _, xs, _, _ = expected_of("nested_frozen")
    model = load("nested_frozen/model.keras")
    model.save(tmp_path / "new.keras")
    with expecting():
        reloaded = keras.saving.load_model(tmp_path / "new.keras")
    assert np.array_equal(numpy(model(xs[0])), numpy(reloaded(xs[0])))
    assert [w.path for w in reloaded.weights] == [w.path for w in model.weights]


def test_frozen_weights_stay_frozen():
    model = load("nested_frozen/ckpt", compile=False)
    frozen = {v.path for v in model.non_trainable_weights}
    assert any("frozen_frn/gamma" in path for path in frozen)
    assert any("second_frn/learned_epsilon" in path for path in frozen)
    second = model.get_layer("second")
    assert not second.get_layer("second_bn").trainable
    assert second.get_layer("second_tlu").trainable
    assert model.get_layer("shared").get_layer("shared_frn").trainable


# Thresholds


def test_uniform_thresholds_become_one_per_channel_and_others_stay():
    model = load("uniform_tau/model.h5")
    uniform, varies = model.get_layer("uniform"), model.get_layer("varies")
    assert uniform.axis == -1
    assert uniform.tau.shape == uniform.alpha.shape == (3,)
    assert varies.axis == (1, 2, 3)
    assert varies.tau.shape == (2, 2, 2)
    with h5py.File(MODELS / "uniform_tau/model.h5") as file:
        stored = file["model_weights/uniform/uniform/tau:0"][()]
    assert np.array_equal(numpy(uniform.tau), stored[0, 0])


def test_thresholds_can_be_kept_per_position():
    model = load("uniform_tau/model.keras", tau="per_position")
    assert model.get_layer("uniform").tau.shape == (4, 4, 3)


def test_forcing_one_per_channel_refuses_to_lose_information_unless_told():
    with pytest.raises(ValueError, match=r"`tau` must be .*varies.*pass 'per_position'"):
        load("uniform_tau/model.h5", tau="per_channel")
    model = load("uniform_tau/model.h5", tau="per_channel_mean")
    with h5py.File(MODELS / "uniform_tau/model.h5") as file:
        stored = file["model_weights/varies/varies/tau:0"][()]
    close(numpy(model.get_layer("varies").tau), stored.mean((0, 1), dtype="float64"), 1e-7)


def test_a_regularizer_counts_every_position_that_shares_a_threshold():
    model = load("regularized_tau/model.h5")
    layer = model.get_layer("uniform_l2")
    assert layer.axis == -1
    assert float(layer.tau_regularizer.l2) == pytest.approx(0.1 * 16)
    # max_norm along the height cannot be that of one value per channel.
    assert model.get_layer("uniform_norm").axis == (1, 2, 3)
    with pytest.raises(ValueError, match=r"`tau` must be 'auto' or .*uniform_norm.*constraint"):
        load("regularized_tau/model.h5", tau="per_channel_mean")


@pytest.mark.each_backend
def test_constraints_act_on_the_new_shapes_as_on_the_old(rng):
    model = load("regularized_tau/model.h5")
    (layer,) = [v for v in model.layers if isinstance(v, FilterResponseNormalization)]
    w = 3.0 * rng.normal(size=3)  # beyond the norm, together and one by one
    # The old weights were (1, 1, 1, 3): along axis 0 there is one of each, along 3 all of them.
    one_by_one = w * np.clip(np.abs(w), 0, 0.7) / (1e-7 + np.abs(w))
    close(numpy(layer.gamma_constraint(ops.convert_to_tensor(w))), one_by_one, 1e-6)
    together = w / (1e-7 + np.sqrt(np.sum(w * w)))
    close(numpy(layer.beta_constraint(ops.convert_to_tensor(w))), together, 1e-6)


# Weights into a model of one's own


def own_model(axis=(1, 2, 3)):
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, padding="same", use_bias=False),
            FilterResponseNormalization(),
            TLU(axis=axis),
            keras.layers.Conv2D(5, 3, 2, padding="same", use_bias=False),
            FilterResponseNormalization(),
            TLU(axis=axis),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, "softmax"),
        ]
    )


@pytest.mark.each_backend
@pytest.mark.parametrize("name", ["model.h5", "model.keras", "saved_model.zip", *CHECKPOINT])
def test_weights_load_into_a_model_built_in_code(name):
    _, xs, ys, _ = expected_of("frn_tlu")
    model = own_model()
    load_addons_weights(model, str(MODELS / "frn_tlu" / name))
    close(numpy(model(xs[0])), ys[0], 2e-5)


@pytest.mark.parametrize("name", ["model.h5", "model.keras", "saved_model.zip", "ckpt"])
def test_a_file_with_more_layers_than_the_model_is_refused(name):
    model = keras.Sequential(own_model().layers[:-1])
    model.build((None, 6, 6, 3))
    with pytest.raises(ValueError, match="layers"):
        load_addons_weights(model, MODELS / "frn_tlu" / name)


def weights_file(path, **layers):
    """An .h5 file of weights (3,), full of 0, 1, 2, ... in the order of their names."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        number = 0
        for layer, names in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [f"{name}:0".encode() for name in names.split()]
            for name in names.split():
                group[f"{name}:0"] = np.full(3, number, "f4")
                number += 1
    return path


def model_of(*layers, **options):
    return keras.Sequential([keras.Input((2, 2, 3)), *layers], **options)


def firsts(*layers):
    return [float(numpy(weight)[0]) for layer in layers for weight in layer.weights]


@pytest.mark.filterwarnings("ignore:`path` has arrays of FRN layers that are not those of Addons")
def test_weights_of_one_shape_are_never_swapped(tmp_path):
    """Keras 2 wrote the weights of frozen layers last, here those of `a`."""
    path = weights_file(tmp_path / "w.h5", inner="b/gamma b/beta a/gamma a/beta")
    a, b, c = (FilterResponseNormalization(name=name) for name in "abc")
    load_addons_weights(model_of(model_of(a, b, name="inner")), path)
    assert firsts(b, a) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"'inner' has the weights .*the names and the order"):
        load_addons_weights(model_of(model_of(b, c, name="inner")), path)
    path = weights_file(tmp_path / "w.h5", b="b/gamma b/beta", a="a/beta a/gamma")
    with pytest.warns(UserWarning, match="`path` numbers its layers in another way"):
        load_addons_weights(model_of(a, b), path)
    assert firsts(b, a) == [0, 1, 3, 2]
    with pytest.raises(ValueError, match=r"'c' has the weights .*the names and the order"):
        load_addons_weights(model_of(b, c), path)


def test_trainable_weights_come_first_where_names_do_not_tell(tmp_path):
    names = "td/gamma td/beta td/alpha td/moving_mean td/moving_variance"
    layers = [keras.layers.BatchNormalization(name="n"), keras.layers.PReLU(name="p")]
    inner = keras.Sequential([keras.Input((3,)), *layers])
    model = keras.Sequential([keras.Input((2, 3)), keras.layers.TimeDistributed(inner, name="td")])
    load_addons_weights(model, weights_file(tmp_path / "w.h5", td=names))
    assert firsts(*layers) == [0, 1, 3, 4, 2]


def test_arrays_of_other_packages_are_reported(tmp_path):
    """Another package has layers and arrays of these names, and of this shape."""
    path = weights_file(tmp_path / "w.h5", a="a/beta a/gamma")
    model = model_of(FilterResponseNormalization(name="a"))
    with expecting("`path` has arrays of FRN layers that are not those of Addons"):
        load_addons_weights(model, path)


@pytest.mark.filterwarnings("ignore:`path` has arrays of FRN layers that are not those of Addons")
def test_weights_outside_of_layers_are_refused(tmp_path):
    path = weights_file(tmp_path / "w.h5", n="n/gamma n/beta")
    model = model_of(FilterResponseNormalization(name="n"))
    model.scale = model.add_weight(shape=(), name="scale")
    with pytest.raises(ValueError, match=r"it holds no array for '.*/scale'"):
        load_addons_weights(model, path)


def test_weights_that_do_not_fit_change_nothing():
    model = own_model(axis=-1)
    before = [numpy(w).copy() for w in model.weights]
    path = MODELS / "frn_tlu" / "model.h5"
    with pytest.raises(
        ValueError, match=r"`tau` must be 'per_channel_mean' .*write TLU\(axis=\(1, 2, 3\)\)"
    ):
        load_addons_weights(model, path)
    with pytest.raises(ValueError, match="layers"):
        load_addons_weights(model, MODELS / "tlu_dense" / "model.h5")
    for weight, value in zip(model.weights, before, strict=True):
        assert np.array_equal(numpy(weight), value)
    load_addons_weights(model, path, tau="per_channel_mean")
    with h5py.File(path) as file:
        stored = file["model_weights/tlu/tlu/tau:0"][()]
    close(numpy(model.layers[2].tau), stored.mean((0, 1), dtype="float64"), 1e-7)


def test_gamma_and_beta_of_one_shape_are_not_confused():
    """The h5 layout goes by order, and gamma, beta and their state have one shape."""
    for name in ("model.h5", "legacy_weights.h5", "v3.weights.h5", "ckpt", "export.zip"):
        model = load("frn_learned_eps/model.keras", compile=False)
        given = {w.path: numpy(w).copy() for w in model.weights}
        for weight in model.weights:
            weight.assign(np.zeros(weight.shape, "float32"))
        load_addons_weights(model, MODELS / "frn_learned_eps" / name)
        for weight in model.weights:
            assert np.array_equal(numpy(weight), given[weight.path]), (name, weight.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": keras.Sequential([keras.layers.Dense(2)])}, "`model` must be a built"),
        ({"model": "no model"}, "`model` must be a model of Keras 3"),
        ({"tau": "per_channel"}, "`tau` must be one of"),
    ],
)
def test_bad_arguments_of_load_addons_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_addons_weights(**{"model": own_model(), "path": "x", **arguments})


# Configs


def h5_with(tmp_path, change, source="frn_default"):
    """A copy of a model.h5 with another config."""
    path = tmp_path / "changed.h5"
    shutil.copy(MODELS / source / "model.h5", path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        change(config["config"]["layers"])
        file.attrs["model_config"] = json.dumps(config)
    return path


def our_layer(layers):
    return next(v for v in layers if v["class_name"].startswith("Addons>"))


def test_every_layer_of_keras_2_is_built_or_refused():
    """The configs that Keras 2.15 gives its own layers."""
    refused = set()
    for kind, config in json.loads((MODELS / "layer_configs.json").read_text()).items():
        layer = None
        with contextlib.suppress(ValueError):
            layer = Builder().revive({"class_name": kind, "config": config})
        if not isinstance(layer, keras.Layer):
            refused.add(kind)
    tables = {"StringLookup", "IntegerLookup", "TextVectorization"}
    gone = {"LocallyConnected1D", "LocallyConnected2D", "RandomHeight", "RandomWidth"}
    # Keras 3 crops in training only, and returns the whole image at inference.
    assert refused == {"AbstractRNNCell", "RandomCrop"} | tables | gone


def test_names_with_slashes_and_layers_that_keras_3_calls_otherwise(tmp_path):
    def change(layers):
        config = {"name": "block/sync", "scale": False, "center": False}
        layers.insert(1, {"class_name": "SyncBatchNormalization", "config": config})
        config = {"name": "flip", "mode": "horizontal", "rng_type": "stateful"}
        layers.insert(2, {"class_name": "RandomFlip", "config": config})

    with h5py.File(path := h5_with(tmp_path, change), "r+") as file:
        weights = file["model_weights"]
        names = ["moving_mean:0", "moving_variance:0"]
        weights.attrs["layer_names"] = ["block/sync", *weights.attrs["layer_names"]]
        weights.create_group("block/sync").attrs["weight_names"] = [
            f"block/sync/{n}" for n in names
        ]
        for name, value in zip(names, (0.5, 4.0 - 1e-3), strict=True):
            weights[f"block/sync/block/sync/{name}"] = np.full(3, value, "f4")
    _, xs, _, _ = expected_of("frn_default")
    model = load_addons_model(path, compile=False)
    plain = load_addons_model(MODELS / "frn_default" / "model.h5", compile=False)
    assert [layer.name for layer in model.layers[:2]] == ["block_sync", "flip"]
    close(numpy(model(xs[0], training=False)), numpy(plain((xs[0] - 0.5) / 2)), 2e-5)


@pytest.mark.parametrize(
    ("source", "base"), [("frn_tlu", keras.Sequential), ("frozen_block", keras.Model)]
)
def test_own_classes_of_models_with_layers_in_their_config(tmp_path, source, base):
    class Own(base):
        pass

    shutil.copy(MODELS / source / "model.h5", path := tmp_path / "own.h5")
    path.chmod(0o600)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        file.attrs["model_config"] = json.dumps({**config, "class_name": "Own"})
    _, xs, ys, _ = expected_of(source)
    model = load_addons_model(path, custom_objects={"Own": Own}, compile=False)
    assert isinstance(model, Own)
    close(numpy(model(xs[0])), ys[0], 2e-5)


def test_an_initializer_is_not_a_layer_of_its_name():
    config = {"units": 3, "kernel_initializer": {"class_name": "Identity", "config": {"gain": 2.0}}}
    layer = Builder().revive({"class_name": "Dense", "config": config})
    assert np.array_equal(numpy(layer.kernel_initializer((2, 2))), 2 * np.eye(2))


def test_an_argument_unknown_to_keras_3_is_refused_if_it_matters(tmp_path):
    def change(layers):
        config = {"name": "d", "kernel_size": [1, 1], "groups": 2}
        layers.insert(1, {"class_name": "DepthwiseConv2D", "config": config})

    with pytest.raises(ValueError, match="DepthwiseConv2D 'd' has groups=2"):
        load_addons_model(h5_with(tmp_path, change))


@pytest.mark.parametrize(("given", "expected"), [(-1e-3, 1e-3), (0, 1e-25), (1e-30, 1e-25)])
def test_epsilon_becomes_positive(tmp_path, given, expected):
    def change(layers):
        our_layer(layers)["config"].update(epsilon=given, learned_epsilon=False)

    model = load_addons_model(h5_with(tmp_path, change, "frn_tlu"), compile=False)
    ours = next(v for v in model.layers if isinstance(v, FilterResponseNormalization))
    assert ours.epsilon == expected


def test_a_cyclic_graph_is_refused():
    node = {"class_name": "ReLU", "config": {"name": "a"}, "inbound_nodes": [[["a", 0, 0, {}]]]}
    config = {"layers": [node], "input_layers": ["a", 0, 0], "output_layers": ["a", 0, 0]}
    with pytest.raises(ValueError, match=r"Functional 'm' .*recursion.*load_addons_weights"):
        Builder().revive({"class_name": "Functional", "config": {"name": "m", **config}})


def padded(x):
    return np.pad(x, [(0, 0), (1, 1), (0, 2), (0, 0)])


@pytest.mark.each_backend
@pytest.mark.parametrize(
    ("function", "options", "expected"),
    [
        ("nn.silu", {"beta": 2.0}, lambda x: x / (1 + np.exp(-2 * x))),
        ("nn.relu", {}, lambda x: np.maximum(x, 0)),
        ("math.pow", {"y": 2.0}, lambda x: x**2),
        (
            "clip_by_value",
            {"clip_value_min": -1.0, "clip_value_max": 0.5},
            lambda x: x.clip(-1, 0.5),
        ),
        ("nn.gelu", {}, lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2),
        (
            "math.reduce_max",
            {"axis": [1, 2], "keepdims": True},
            lambda x: x.max((1, 2), keepdims=True),
        ),
        (
            "compat.v1.transpose",
            {"perm": [0, 3, 1, 2], "conjugate": False},
            lambda x: x.transpose(0, 3, 1, 2),
        ),
        ("math.multiply", {"y": [1.0, 2, 3, 4]}, lambda x: x * np.arange(1, 5)),
        ("compat.v1.pad", {"paddings": [[0, 0], [1, 1], [0, 2], [0, 0]]}, lambda x: padded(x)),
        (
            "image.resize",
            {"size": [4, 6], "method": "nearest"},
            lambda x: x.repeat(2, 1).repeat(2, 2),
        ),
        ("split", {"num_or_size_splits": [1, 3], "axis": -1}, lambda x: x[..., 1:]),
        ("math.greater", {"y": 0.5}, lambda x: x > 0.5),
    ],
)
def test_functions_of_tensorflow(function, options, expected, rng):
    x = keras.Input((2, 3, 4))
    model = keras.Model(x, keras.tree.flatten(call_operator(function, "name", x, options))[-1])
    value = rng.normal(size=(2, 2, 3, 4)).astype("float32")
    close(numpy(model(value)), expected(value), 1e-5)


@pytest.mark.each_backend
def test_functions_of_two_tensors(rng):
    x, y = (rng.normal(size=(2, 3, 4)).astype("float32") for _ in range(2))
    a, b = keras.Input((3, 4)), keras.Input((3, 4))
    product = call_operator("linalg.matmul", None, a, {"b": b, "transpose_b": True})
    chosen = call_operator(
        "where", None, call_operator("less", None, a, {"y": b}), {"x": a, "y": b}
    )
    found = keras.Model([a, b], [product, chosen])([x, y])
    close(numpy(found[0]), x @ y.swapaxes(1, 2), 1e-5)
    assert np.array_equal(numpy(found[1]), np.minimum(x, y))


def test_other_functions_of_tensorflow_are_refused():
    with pytest.raises(ValueError, match="calls 'add' with mystery, which is not read"):
        call_operator("add", None, keras.Input((2,)), {"y": 1.0, "mystery": 2})
    for function in ("math.cumsum", "sparse.add", "io.read_file"):
        with pytest.raises(ValueError, match=f"calls '{function}', which .*load_addons_w"):
            call_operator(function, None, keras.Input((2,)), {"y": 1.0})


def test_statistics_of_normalization_are_used_at_once(tmp_path):
    path = weights_file(tmp_path / "w.h5", first="first/gamma", n="n/mean n/variance n/count")
    with h5py.File(path, "r+") as file:
        del file["n/n/count:0"]
        file["n/n/count:0"] = 9
    layer = keras.layers.Normalization(name="n")
    load_addons_weights(
        model_of(keras.layers.LayerNormalization(center=False, name="first"), layer), path
    )
    x = np.full((1, 2, 2, 3), 3.0, "f4")  # the mean is 1 and the variance 2
    close(numpy(layer(x)), (x - 1) / 2**0.5, 1e-6)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"type": "ndarray", "value": [1, 2], "dtype": "float32"}, [1, 2]),
        ({"class_name": "__numpy__", "config": {"value": [1, 2], "dtype": "float32"}}, [1, 2]),
        ({"class_name": "__tuple__", "items": [1, 2]}, (1, 2)),
        ({"class_name": "function", "config": "own"}, close),
    ],
)
def test_values_in_configs(value, expected):
    with keras.saving.custom_object_scope({"own": close}):
        found = Builder().revive({"key": value})["key"]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Lambda", ["holds code, which is never run", "load_addons_weights"]),
        ("Addons>WeightNormalization", ["is not in Keras 3", "custom_objects"]),
        ("LocallyConnected2D", ["is not in Keras 3", "load_addons_weights"]),
        ("Mystery", ["is not in Keras 3", "custom_objects={'Mystery': its class}"]),
        ("TFSMLayer", ["holds code", "load_addons_weights"]),
        ("StringLookup", ["is not read"]),
        ("os.system", ["is not in Keras 3"]),
    ],
)
def test_other_layers_are_refused_with_their_name_and_a_remedy(tmp_path, kind, words):
    def change(layers):
        our_layer(layers).update(class_name=kind)

    with pytest.raises(ValueError, match=f"{kind} 'filter_response_normalization' ") as error:
        load_addons_model(h5_with(tmp_path, change))
    for word in words:
        assert word in str(error.value)


def test_custom_objects_are_used(tmp_path):
    class Twice(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    def change(layers):
        config = {"name": "mine", "trainable": True, "dtype": "float32"}
        layers.append({"class_name": "Twice", "config": config})

    path = h5_with(tmp_path, change)
    _, xs, ys, _ = expected_of("frn_default")
    model = load_addons_model(path, custom_objects={"Twice": Twice})
    close(numpy(model(xs[0])), 2 * ys[0], 2e-5)
    with pytest.raises(ValueError, match="Twice 'mine' is not in Keras 3"):
        load_addons_model(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": MODELS / "frn_default" / "model.json"}, "its config and its weights"),
        ({"path": MODELS / "frn_default" / "ckpt"}, "its config and its weights"),
        ({"path": MODELS / "frn_learned_eps" / "export.zip"}, "its config and its weights"),
        ({"path": MODELS / "frn_default" / "model.h5", "tau": "mean"}, "`tau` must be one of"),
        ({"path": MODELS / "make.py"}, "neither HDF5, zip, JSON"),
        ({"path": MODELS}, "find 'checkpoint' file or checkpoints"),
    ],
)
def test_bad_arguments_of_load_addons_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_addons_model(**arguments)


def test_a_missing_package_is_not_reported_as_a_bad_file(tmp_path, monkeypatch):
    for path in ("/nowhere/model.h5", "/nowhere/saved_model.zip"):
        with pytest.raises(FileNotFoundError):
            load_addons_model(path)
        with pytest.raises(FileNotFoundError):
            load_addons_weights(own_model(), path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", None)
        with pytest.raises(
            ImportError, match=r"SavedModels and checkpoints .*: pip install tensorflow"
        ):
            load("frn_tlu/ckpt")

    def is_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", is_full)
    with pytest.raises(OSError, match="No space left"):
        load("frn_tlu/saved_model.zip")


def test_files_of_keras_3_are_left_to_keras(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save(tmp_path / "new.keras")
    with pytest.raises(ValueError, match=r"saved by Keras 2\. .*There is nothing to migrate"):
        load_addons_model(tmp_path / "new.keras")


# Safety


def test_links_out_of_an_h5_file_are_refused(tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((1, 1, 1, 4), "f4")

    def link(file, name):
        file[name] = h5py.ExternalLink(str(secret), "/x")

    def outside(file, name):
        file.create_dataset(name, (1, 1, 1, 4), "f4", external=[(str(secret), 0, 16)])

    name = "model_weights/filter_response_normalization/filter_response_normalization/gamma:0"
    for way in (link, outside):
        path = tmp_path / "linked.h5"
        shutil.copy(MODELS / "frn_tlu" / "model.h5", path)
        path.chmod(0o600)
        with h5py.File(path, "r+") as file:
            del file[name]
            way(file, name)
        with pytest.raises(ValueError, match="gamma:0' is not an array of this file"):
            load_addons_model(path)


def test_links_out_of_a_weights_file_are_refused(tmp_path):
    source = MODELS / "frn_learned_eps" / "v3.weights.h5"
    path = tmp_path / "linked.weights.h5"
    shutil.copy(source, path)
    path.chmod(0o600)
    with h5py.File(path, "r+") as file:
        for name in ["layers", "_layer_checkpoint_dependencies"]:
            if name in file:
                del file[name]
                file[name] = h5py.ExternalLink(str(source), f"/{name}")
    model = load("frn_learned_eps/model.keras", compile=False)
    with pytest.raises(ValueError, match="is not an array of this file"):
        load_addons_weights(model, path)


def test_code_in_a_file_does_not_run(tmp_path):
    """A `Lambda` with marshalled code, a pickled array: neither is touched."""
    import base64
    import marshal

    touched = tmp_path / "touched"
    code = compile(f"open({str(touched)!r}, 'w')", "x", "eval")
    packed = base64.b64encode(marshal.dumps(code)).decode()

    def change(layers):
        config = {"name": "evil", "function": [packed, None, None], "function_type": "lambda"}
        layers.append({"class_name": "Lambda", "config": config})

    with pytest.raises(ValueError, match="Lambda 'evil' holds code"):
        load_addons_model(h5_with(tmp_path, change))

    def activation(layers):
        function = {"class_name": "__lambda__", "config": {"value": packed}}
        layers.append(
            {"class_name": "Activation", "config": {"name": "evil", "activation": function}}
        )

    with pytest.raises(ValueError, match="__lambda__ is not in Keras 3"):
        load_addons_model(h5_with(tmp_path, activation))
    assert not touched.exists()


def test_the_models_in_a_zip_and_in_its_folder_are_one(tmp_path):
    with zipfile.ZipFile(MODELS / "frn_default" / "saved_model.zip") as archive:
        archive.extractall(tmp_path)
    _, xs, ys, _ = expected_of("frn_default")
    close(numpy(load_addons_model(str(tmp_path / "saved_model"))(xs[0])), ys[0], 2e-5)
