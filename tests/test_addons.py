import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
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

from keras_frn import TLU, FilterResponseNormalization
from keras_frn import load_addons_model, load_addons_weights
from keras_frn.addons.config import Builder
from keras_frn.addons.migration import migrate

MODELS = Path(__file__).parent / "addons_models"
FILES = ("model.h5", "model.keras", "saved_model.zip", "legacy_weights.h5", "v3.weights.h5", "ckpt")
CASES = sorted(
    f"{folder.name}/{name}"
    for folder in MODELS.iterdir()
    for name in FILES
    if (folder / name).exists()
)
# The models were trained and saved by other programs, and numbered after them.
TRAINED = sorted(c for c in CASES if "loss_next" in np.load(MODELS / c.split("/")[0] / "io.npz"))
WITH_STATE = [c for c in TRAINED if c.endswith(("model.h5", "model.keras", "saved_model.zip"))]


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


@pytest.mark.filterwarnings("ignore:The optimizer state in the file was not loaded")
@pytest.mark.filterwarnings("ignore:The model is not compiled")
@pytest.mark.filterwarnings("ignore:Layers ..sc., .sf., .st.. were shared between models")
@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_losses_and_names_are_those_of_addons(case):
    folder = case.split("/")[0]
    io, xs, ys, gxs = expected_of(case)
    with float64_enabled() if folder == "float64" else contextlib.nullcontext():
        model = load(case)
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


@pytest.mark.parametrize("case", WITH_STATE)
def test_training_goes_on_with_the_next_step(case):
    io, xs, _, _ = expected_of(case)
    if "addons_lamb" in case:
        with expecting("optimizer 'Addons>LAMB' is not one that Keras 3 has"):
            assert not load(case).compiled
        return
    with expecting():
        model = load(case)
    x = io.get("xb", xs[0])
    # The rounding of a forward pass, and of a step: Adam's m / sqrt(v) is of the size of 1.
    tolerance = 2e-3 if case.startswith("half") else 2e-5
    loss = model.train_on_batch(x, io["yb"], return_dict=True)["loss"]
    assert float(loss) == pytest.approx(float(io["loss_next"]), abs=tolerance)
    close(numpy(model(xs[0])), io["y_next"], tolerance)


def test_the_optimizer_state_is_what_decides_the_next_step():
    io, xs, _, _ = expected_of("adam")
    model = load("adam/model.h5")
    for variable in model.optimizer.variables:
        if "velocity" in variable.path:
            variable.assign(variable * 4.0)
    model.train_on_batch(xs[0], io["yb"])
    assert np.max(np.abs(numpy(model(xs[0])) - io["y_next"])) > 1e-3


def test_a_loaded_model_is_saved_and_reloaded_without_anything_special(tmp_path):
    _, xs, _, _ = expected_of("nested_frozen")
    model = load("nested_frozen/model.keras")
    model.save(tmp_path / "new.keras")
    with expecting():
        reloaded = keras.saving.load_model(tmp_path / "new.keras")
    assert np.array_equal(numpy(model(xs[0])), numpy(reloaded(xs[0])))
    assert [w.path for w in reloaded.weights] == [w.path for w in model.weights]
    assert int(numpy(reloaded.optimizer.iterations)) == 3


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
    with pytest.raises(ValueError, match=r"'?varies.*tau='per_channel_mean'"):
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
    with pytest.raises(ValueError, match=r"uniform_norm.*constraint"):
        load("regularized_tau/model.h5", tau="per_channel_mean")


def test_constraints_act_on_the_new_shapes_as_on_the_old(rng):
    model = load("regularized_tau/model.h5")
    (layer,) = [v for v in model.layers if isinstance(v, FilterResponseNormalization)]
    w = 3.0 * rng.normal(size=3)  # beyond the norm, together and one by one
    # The old weights were (1, 1, 1, 3): along axis 0 there is one of each, along 3 all of them.
    one_by_one = w * np.clip(np.abs(w), 0, 0.7) / (1e-7 + np.abs(w))
    close(numpy(layer.gamma_constraint(ops.convert_to_tensor(w))), one_by_one, 1e-6)
    together = w / (1e-7 + np.sqrt(np.sum(w * w)))
    close(numpy(layer.beta_constraint(ops.convert_to_tensor(w))), together, 1e-6)


def test_a_model_that_was_compiled_and_not_trained_has_no_state_to_keep(tmp_path):
    path = tmp_path / "untrained.h5"
    shutil.copy(MODELS / "frn_tlu" / "model.h5", path)
    with h5py.File(path, "r+") as file:
        tau = file["model_weights/tlu/tlu/tau:0"]
        tau[...] = np.zeros(tau.shape)
        state = file["optimizer_weights"]
        state.attrs["weight_names"] = np.array([b"iteration:0"])
    with expecting("only its"):
        model = load_addons_model(path)
    assert model.get_layer("tlu").axis == -1
    assert model.get_layer("tlu_1").axis == (1, 2, 3)


def test_state_of_a_threshold_keeps_its_positions():
    model = load("frn_tlu/model.h5")
    path = MODELS / "frn_tlu" / "model.h5"
    with h5py.File(path) as file:
        m = file["optimizer_weights/Adam/m/tlu/tau:0"][()]
    (mine,) = [v for v in model.optimizer.variables if v.path.endswith("tlu_tau_momentum")]
    assert np.array_equal(numpy(mine), m)
    with expecting("starts anew for"):
        forced = load("frn_tlu/model.h5", tau="per_channel_mean")
    assert forced.get_layer("tlu").tau.shape == (4,)


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


@pytest.mark.parametrize("name", ["model.h5", "model.keras", "saved_model.zip", "ckpt"])
@pytest.mark.filterwarnings("ignore:The optimizer state in the file was not loaded")
def test_weights_load_into_a_model_built_in_code(name):
    io, xs, ys, _ = expected_of("frn_tlu")
    model = own_model()
    load_addons_weights(model, MODELS / "frn_tlu" / name)
    close(numpy(model(xs[0])), ys[0], 2e-5)
    compiled = own_model()
    compiled.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy")
    load_addons_weights(compiled, MODELS / "frn_tlu" / name)
    compiled.train_on_batch(io.get("xb", xs[0]), io["yb"])
    if name != "ckpt":  # written before training
        close(numpy(compiled(xs[0])), io["y_next"], 2e-5)


@pytest.mark.filterwarnings("ignore:The optimizer state in the file was not loaded")
def test_weights_that_do_not_fit_change_nothing():
    model = own_model(axis=-1)
    before = [numpy(w).copy() for w in model.weights]
    path = MODELS / "frn_tlu" / "model.h5"
    with pytest.raises(ValueError, match=r"tau.*one value per channel.*per_channel_mean"):
        load_addons_weights(model, path)
    with pytest.raises(ValueError, match="layers"):
        load_addons_weights(model, MODELS / "tlu_dense" / "model.h5")
    for weight, value in zip(model.weights, before, strict=True):
        assert np.array_equal(numpy(weight), value)
    load_addons_weights(model, path, tau="per_channel_mean")
    with h5py.File(path) as file:
        stored = file["model_weights/tlu/tlu/tau:0"][()]
    close(numpy(model.layers[2].tau), stored.mean((0, 1), dtype="float64"), 1e-7)


def test_state_of_another_optimizer_is_not_taken():
    model = own_model()
    model.compile("rmsprop", "sparse_categorical_crossentropy")
    with expecting("state of Adam was not loaded, as the model has RMSprop"):
        load_addons_weights(model, MODELS / "frn_tlu" / "model.h5")
    assert int(numpy(model.optimizer.iterations)) == 0
    with expecting("was not loaded, as the model is not compiled"):
        load_addons_weights(own_model(), MODELS / "frn_tlu" / "model.h5")


def test_state_from_before_keras_2_11_loads_into_a_model_built_in_code():
    io, xs, _, _ = expected_of("old_adam_tf28")
    for name in ("model.h5", "saved_model.zip"):
        model = load(f"old_adam_tf28/{name}", compile=False)
        model.compile(keras.optimizers.Adam(0.01, amsgrad=True), "mse")
        with expecting():
            load_addons_weights(model, MODELS / "old_adam_tf28" / name)
        model.train_on_batch(xs[0], io["yb"])
        close(numpy(model(xs[0])), io["y_next"], 2e-5)


def test_a_training_config_that_makes_no_sense_leaves_the_model_uncompiled(tmp_path):
    path = tmp_path / "changed.h5"
    shutil.copy(MODELS / "frn_tlu" / "model.h5", path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["training_config"])
        config["optimizer_config"]["config"]["learning_rate"] = "fast"
        config["metrics"] = [{"class_name": "AUC", "config": {"num_thresholds": 10**9}}]
        file.attrs["training_config"] = json.dumps(config)
    with expecting("metrics are left out: 'AUC' is larger", "model is not compiled"):
        model = load_addons_model(path)
    _, xs, ys, _ = expected_of("frn_tlu")
    close(numpy(model(xs[0])), ys[0], 2e-5)


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
        ((keras.Sequential([keras.layers.Dense(2)]), "x"), "`model` must be a built"),
        (("no model", "x"), "`model` must be a built"),
        ((own_model(), "x", "per_channel"), "`tau` must be 'auto' or"),
        ((own_model(), "/nowhere"), "no such file"),
    ],
)
def test_bad_arguments_of_load_addons_weights(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_addons_weights(*arguments)


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


def test_an_epsilon_of_zero_becomes_the_smallest_with_a_warning(tmp_path):
    def change(layers):
        our_layer(layers)["config"].update(epsilon=0, learned_epsilon=False)

    path = h5_with(tmp_path, change, "frn_tlu")
    with expecting("has epsilon=0"):
        model = load_addons_model(path)
    (layer,) = [v for v in model.layers if isinstance(v, FilterResponseNormalization)][:1]
    assert layer.epsilon == float(np.finfo("float32").tiny)


def test_every_layer_of_keras_2_is_made_or_refused():
    """The configs that Keras 2.15 gives its own layers."""
    refused = set()
    for kind, config in json.loads((MODELS / "layer_configs.json").read_text()).items():
        layer = {"class_name": kind, "config": config}
        model = {"class_name": "Sequential", "config": {"name": "m", "layers": [layer]}}
        message = ""
        try:
            configs.build(model, 10**6)
        except ValueError as error:
            message = str(error)
        # Without an input shape nothing is built, so this is how far a known layer comes.
        if message and "before it was built" not in message and kind != "InputLayer":
            assert f"({kind}) " in message
            assert "load_addons_weights" in message
            refused.add(kind)
    bases = {"AbstractRNNCell", "Wrapper"}
    tables = {"StringLookup", "IntegerLookup", "TextVectorization", "Hashing", "HashedCrossing"}
    gone = {"LocallyConnected1D", "LocallyConnected2D", "RandomHeight", "RandomWidth"}
    assert refused == bases | tables | gone


def test_what_two_models_share_is_copied_with_a_warning():
    with expecting("['sc', 'sf', 'st'] were shared between models, which have copies now"):
        model = load("shared_across/ckpt")
    a, b = (model.get_layer(name).get_layer("sf") for name in "ab")
    assert a is not b
    assert np.array_equal(numpy(a.gamma), numpy(b.gamma))


def test_statistics_of_normalization_are_used_at_once():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Normalization(name="n")])
    groups = [
        np.array([1.0, -2.0], "f4"),
        np.array([4.0, 0.25], "f4"),
        np.array(9, "i8"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.h5"
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = np.array([b"n"])
            group = file.create_group("n")
            names = [b"n/mean:0", b"n/variance:0", b"n/count:0"]
            group.attrs["weight_names"] = np.array(names)
            for name, array in zip(names, groups, strict=True):
                group[name.decode()] = array
        load_addons_weights(model, path)
    close(numpy(model(np.array([[3.0, -2.5]], "f4"))), np.array([[1.0, -1.0]]), 1e-6)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Lambda", ["holds Python code", "load_addons_weights"]),
        ("Addons>WeightNormalization", ["TensorFlow Addons", "custom_objects"]),
        ("LocallyConnected2D", ["Keras 3 has not", "load_addons_weights"]),
        ("Mystery", ["is not known", "custom_objects={'Mystery': its class}"]),
        ("TFSMLayer", ["is not known"]),
        ("StringLookup", ["has a table"]),
        ("os.system", ["is not known"]),
    ],
)
def test_other_layers_are_refused_with_their_name_and_a_remedy(tmp_path, kind, words):
    def change(layers):
        our_layer(layers).update(class_name=kind)

    with pytest.raises(ValueError, match="layer '") as error:
        load_addons_model(h5_with(tmp_path, change))
    for word in [*words, kind.rpartition(">")[2], "filter_response_normalization"]:
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
    with pytest.raises(ValueError, match=r"'mine' .Twice. is not known"):
        load_addons_model(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": MODELS / "frn_default" / "model.json"}, "`weights` must be given"),
        ({"path": MODELS / "frn_default" / "ckpt"}, "`path` must hold a model"),
        ({"path": MODELS / "frn_learned_eps" / "export.zip"}, "`path` must hold a model"),
        ({"path": MODELS / "frn_default" / "model.h5", "tau": "mean"}, "`tau` must be one of"),
        ({"path": "/nowhere/model.h5"}, "no such file"),
        ({"path": MODELS / "make.py"}, "neither HDF5, zip, JSON"),
        ({"path": MODELS}, "neither a saved_model.pb nor one checkpoint"),
    ],
)
def test_bad_arguments_of_load_addons_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_addons_model(**arguments)


def test_files_of_keras_3_are_left_to_keras(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.save(tmp_path / "new.keras")
    with pytest.raises(ValueError, match=r"keras\.saving\.load_model"):
        load_addons_model(tmp_path / "new.keras")


# Safety


@pytest.fixture(scope="module")
def fuzz():
    path = Path(__file__).parent.parent / "benchmarks" / "fuzz_addons.py"
    spec = importlib.util.spec_from_file_location("fuzz_addons", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, which has to be empty at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not any(folder.iterdir())


def attempt(path):
    """Loads a file, or gets a ValueError."""
    model = path.split("--")[1] if "--" in path else "frn_default"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if os.path.isdir(path):
                load_addons_model(MODELS / model / "model.json", weights=path)
            elif path.endswith("model.json"):
                load_addons_model(path, weights=MODELS / model / "ckpt")
            else:
                load_addons_model(path)
        except ValueError as error:
            return str(error)
    return None


def test_hostile_files_are_refused(fuzz, tmp_path, temporary):
    folder = tmp_path / "hostile"
    folder.mkdir()
    messages = {name: attempt(path) for _, name, path in fuzz.hostile(folder)}
    # Members outside the folder are not looked at: nothing is wrong with the rest of this file.
    assert messages.pop("path traversal.zip") is None
    assert not (tmp_path / "escaped").exists()
    assert not Path("/tmp/escaped").exists()
    for name, message in messages.items():
        assert message, name
        assert "Received: " in message
    assert "claims 268435456 bytes" in messages["zip bomb"]
    assert "larger weights than the file" in messages["wide layer"]
    assert "larger weights than the file" in messages["huge statistics"]
    assert "too deep" in messages["deep brackets"]
    assert "called more than" in messages["exponential calls"]
    assert "time steps" in messages["endless steps"]


def test_damaged_files_load_or_raise_value_error(fuzz, tmp_path, temporary):
    folder = tmp_path / "mutated"
    folder.mkdir()
    outcomes = [attempt(path) for _, _, path in fuzz.mutated(folder, 80, seed=11)]
    assert len(outcomes) == 80
    assert 20 < sum(message is not None for message in outcomes) < 80


@pytest.mark.parametrize(
    "case", ["frn_tlu/model.h5", "frn_tlu/model.keras", "frn_tlu/saved_model.zip"]
)
def test_truncated_files_are_refused(case, tmp_path, temporary):
    data = (MODELS / case).read_bytes()
    for part in (0, 1, 10, len(data) // 3, len(data) // 2, len(data) - 30):
        path = tmp_path / "cut"
        path.write_bytes(data[:part])
        with pytest.raises(ValueError, match="Received: path="):
            load_addons_model(path)


def test_a_checkpoint_with_one_changed_bit_is_refused(tmp_path):
    shutil.copytree(MODELS / "frn_tlu" / "ckpt", tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "ckpt.data-00000-of-00001"
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_addons_model(MODELS / "frn_tlu" / "model.json", weights=tmp_path / "ckpt")


def test_links_out_of_an_h5_file_are_refused(tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones((1, 1, 1, 4), "f4")
    ways = {
        "link": lambda file, name: file.__setitem__(name, h5py.ExternalLink(str(secret), "/x")),
        "another file": lambda file, name: file.create_dataset(
            name, (1, 1, 1, 4), "f4", external=[(str(secret), 0, 16)]
        ),
    }
    name = "model_weights/filter_response_normalization/filter_response_normalization/gamma:0"
    for words, way in ways.items():
        path = tmp_path / "linked.h5"
        shutil.copy(MODELS / "frn_tlu" / "model.h5", path)
        path.chmod(0o600)
        with h5py.File(path, "r+") as file:
            del file[name]
            way(file, name)
        with pytest.raises(ValueError, match=words):
            load_addons_model(path)


def test_a_file_that_sends_the_hdf5_library_in_circles_comes_to_an_end(tmp_path, monkeypatch):
    """Its strings are in a heap that one changed byte makes endless."""
    monkeypatch.setattr("keras_frn._addons_hdf5._TIMEOUT_S", 3)
    with pytest.raises(ValueError, match="does not come to an end in 3 s"):
        load_addons_model(MODELS / "endless.h5")


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

    with pytest.raises(ValueError, match=r"'evil' .Lambda. holds Python code"):
        load_addons_model(h5_with(tmp_path, change))

    def activation(layers):
        function = {"class_name": "__lambda__", "config": {"value": packed}}
        layers.append(
            {"class_name": "Activation", "config": {"name": "evil", "activation": function}}
        )

    with pytest.raises(ValueError, match=r"'evil' .Activation."):
        load_addons_model(h5_with(tmp_path, activation))
    assert not touched.exists()


# The command line's part


def test_migrate_writes_a_checked_file_and_says_what_was_in_it(tmp_path, temporary):
    target = tmp_path / "new.keras"
    model, report = migrate(MODELS / "reg_constr_init" / "model.h5", target)
    _, xs, ys, _ = expected_of("reg_constr_init")
    close(numpy(model(xs[0])), ys[0], 2e-5)
    assert sorted(os.listdir(tmp_path)) == ["new.keras", "temporary"]
    text = "\n".join(report)
    assert "reg_constr_init" in text
    assert "frn_rci: FilterResponseNormalization(epsilon=1e-05)" in text
    assert "tlu_rci: TLU() tau (3, 3, 3), alpha (3, 3, 3)" in text
    assert report == describe(keras.saving.load_model(target))


def test_migrate_leaves_nothing_behind_where_it_fails(tmp_path, monkeypatch):
    source = MODELS / "frn_default" / "model.h5"
    with pytest.raises(ValueError, match=r"must end in \.keras"):
        migrate(source, tmp_path / "new.h5")
    with pytest.raises(ValueError, match="no such file"):
        migrate(tmp_path / "missing.h5", tmp_path / "new.keras")
    read = keras.saving.load_model

    def other(*args, **kwargs):
        model = read(*args, **kwargs)
        model.weights[0].assign(model.weights[0] + 1.0)
        return model

    monkeypatch.setattr(keras.saving, "load_model", other)
    with pytest.raises(ValueError, match="was not written as it was loaded"):
        migrate(source, tmp_path / "new.keras")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(BACKEND != "jax", reason="needs another backend; once is enough")
def test_no_file_needs_tensorflow():
    code = (
        "import sys\n"
        "sys.modules['tensorflow'] = None\n"  # an import of it would fail
        "from keras_frn.addons import load_addons_model\n"
        f"folder = {str(MODELS / 'nested_functional')!r}\n"
        "for name in ('model.h5', 'model.keras', 'saved_model.zip'):\n"
        "    print(load_addons_model(f'{folder}/{name}').name)\n"
        "print(load_addons_model(f'{folder}/model.json', weights=f'{folder}/ckpt').name)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        cwd=MODELS.parent.parent,
        check=False,
    )
    assert run.stdout.split() == ["nested_functional"] * 4, run.stderr[-2000:]


def test_the_models_in_a_zip_and_in_its_folder_are_one(tmp_path):
    with zipfile.ZipFile(MODELS / "frn_default" / "saved_model.zip") as archive:
        archive.extractall(tmp_path)
    _, xs, ys, _ = expected_of("frn_default")
    close(numpy(load_addons_model(str(tmp_path / "saved_model"))(xs[0])), ys[0], 2e-5)


@pytest.mark.filterwarnings("ignore:The state of Adam starts anew")
@pytest.mark.filterwarnings("ignore:The optimizer state in the file was not loaded")
def test_the_code_of_the_guide_runs(tmp_path, monkeypatch):
    text = (MODELS.parent.parent / "docs" / "migrating-from-addons.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 3
    for name in ("old.h5", "weights.h5"):
        shutil.copy(MODELS / "frn_tlu" / "model.h5", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, "migrating-from-addons.md", "exec"), names)
    _, xs, ys, _ = expected_of("frn_tlu")
    close(numpy(names["model"](xs[0])), ys[0], 2e-5)
    close(numpy(keras.saving.load_model("new.keras")(xs[0])), ys[0], 2e-5)
    assert names["small"].get_layer("tlu").tau.shape == (4,)
