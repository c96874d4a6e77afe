import contextlib
import functools

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy
from keras import layers

from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU
from keras_frn.callbacks import EpsilonScheduler, FRNMonitor
from keras_frn.conversion import replace_batch_normalization
from keras_frn.monitor import measure_layers
from keras_frn.samples import Samples


@functools.cache
def _conversion(ratio):
    block = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(name="inner")]
    )
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            block,
            layers.GlobalAveragePooling2D(),
            layers.BatchNormalization(name="single"),
            layers.Dense(2),
        ]
    )
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    return replace_batch_normalization(model, calibration_data=x, epsilon_ratio=ratio), x


def _converted(ratio=3.0):
    converted, x = _conversion(ratio)
    model = keras.models.clone_model(converted)
    model.set_weights(converted.get_weights())
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model, x, np.zeros((16, 2))


def _layers(model):
    return model.layers[0].get_layer("inner"), model.get_layer("single")


def _ratio(model):
    return float(numpy(_layers(model)[0].epsilon_ratio)[0])


def test_scheduler_changes_only_the_ratio():
    model, x, y = _converted(ratio=2.0)
    weights = [w.copy() for w in model.get_weights()]
    schedule = EpsilonScheduler(steps=4, initial_ratio=2.0, final_ratio=0.5)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[schedule])
    # Two of four steps, on a geometric path: half of 2 to 0.5.
    assert (schedule.ratio, _ratio(model)) == (pytest.approx(1.0), pytest.approx(1.0))
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[schedule])
    assert _ratio(model) == 0.5
    after = {w.path: numpy(w) for w in model.weights}
    for (path, value), before in zip(after.items(), weights, strict=True):
        if "inner/epsilon_ratio" not in path:
            np.testing.assert_array_equal(value, before)


def test_scheduler_keeps_the_size_of_a_typical_output():
    model, x, y = _converted()
    inner, _ = _layers(model)
    typical = np.sqrt(numpy(inner.mean_square))[None, None, None]
    before = numpy(inner(typical))
    model.fit(x, y, verbose=0, callbacks=[EpsilonScheduler(steps=1, final_ratio=0.01)])
    assert _ratio(model) == pytest.approx(0.01)
    # The constant 1e-6 beside a mean square of about 1, and float32.
    np.testing.assert_allclose(numpy(inner(typical)), before, rtol=1e-5, atol=1e-6)


STEPS = {"steps": 40, "initial_ratio": 3.0, "final_ratio": 0.1}


def _expected(batches):
    return pytest.approx(3.0 * (0.1 / 3.0) ** (min(batches, 40) / 40), rel=1e-5)


class Kill(keras.callbacks.Callback):
    """Ends the process, as far as a test can."""

    def __init__(self, batch):
        super().__init__()
        self.batches = batch

    def on_train_batch_end(self, batch, logs=None):
        self.batches -= 1
        if self.batches == 0:
            raise KeyboardInterrupt


def _fit(model, x, y, callbacks, epochs=3, batch_size=2):
    # 8 batches an epoch, in the same order in each.
    options = {"epochs": epochs, "shuffle": False, "verbose": 0}
    model.fit(x, y, batch_size=batch_size, callbacks=list(callbacks), **options)


@functools.cache
def _uninterrupted():
    model, x, y = _converted()
    start = model.get_weights()
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    _fit(model, x, y, [EpsilonScheduler(**STEPS)])
    return model, start, x, y


@pytest.mark.parametrize("saves_first", [False, True])
@pytest.mark.parametrize("save_freq", ["epoch", 4])
def test_scheduler_resumes_a_killed_training_run(save_freq, saves_first, tmp_path):
    whole, start, x, y = _uninterrupted()
    model = keras.models.clone_model(whole)
    for callbacks in ([Kill(12)], []):
        model.set_weights(start)
        model.compile(keras.optimizers.Adam(1e-3), "mse")
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq)
        used = [EpsilonScheduler(**STEPS), backup]
        with contextlib.suppress(KeyboardInterrupt):
            _fit(model, x, y, [*(used[::-1] if saves_first else used), *callbacks])
    if save_freq == "epoch":
        for actual, expected in zip(model.get_weights(), whole.get_weights()):
            np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)
    else:
        # Keras begins the epoch anew, so that 4 batches come twice.
        assert _ratio(model) == _expected(28)


def test_scheduler_continues_after_saving_and_loading(tmp_path):
    whole, start, x, y = _uninterrupted()
    model = keras.models.clone_model(whole)
    model.set_weights(start)
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    for epoch in range(3):
        _fit(model, x, y, [EpsilonScheduler(**STEPS)], epochs=1)
        model.save(tmp_path / f"{epoch}.keras")
        model = keras.models.load_model(tmp_path / f"{epoch}.keras")
    for actual, expected in zip(model.get_weights(), whole.get_weights()):
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-7)


def test_scheduler_continues_after_a_second_compile():
    model, x, y = _converted()
    schedule = EpsilonScheduler(**STEPS)
    for epochs, expected in ((2, 16), (1, 24), (3, 40)):
        model.compile(keras.optimizers.SGD(0.0), "mse")
        _fit(model, x, y, [schedule], epochs=epochs)
        assert _ratio(model) == _expected(expected)
    # What is beyond the end of another schedule stays.
    _fit(model, x, y, [EpsilonScheduler(steps=5, final_ratio=1.0)], epochs=1)
    assert _ratio(model) == _expected(40)


OPTIMIZERS = {
    "held against the optimizer": {"learning_rate": 0.1},
    "gradient accumulation": {"gradient_accumulation_steps": 4},
    "averages": {"use_ema": True, "ema_momentum": 0.5},
    "averages that overwrite": {"use_ema": True, "ema_overwrite_frequency": 3},
    "averages that are swapped": {"use_ema": True},
}


@pytest.mark.parametrize(
    "kind",
    # The two after it average, too.
    [pytest.param(k, marks=[pytest.mark.slow] * (k == "averages")) for k in OPTIMIZERS],
)
def test_scheduler_is_unaffected_by_the_optimizer(kind):
    model, x, y = _converted()
    mean_square = numpy(_layers(model)[0].mean_square)
    model.compile(keras.optimizers.Adam(**{"learning_rate": 1e-3, **OPTIMIZERS[kind]}), "mse")
    callbacks = [EpsilonScheduler(**STEPS)]
    if "swapped" in kind:
        callbacks.append(keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    _fit(model, x, y, callbacks)
    assert _ratio(model) == _expected(24)
    np.testing.assert_array_equal(numpy(_layers(model)[0].mean_square), mean_square)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras refuses it there")
@pytest.mark.parametrize("number", [3, 8])
def test_scheduler_counts_batches_with_steps_per_execution(number):
    model, x, y = _converted()
    model.compile(keras.optimizers.SGD(0.0), "mse", steps_per_execution=number)
    _fit(model, x, y, [EpsilonScheduler(**STEPS)], epochs=2)
    assert _ratio(model) == _expected(16)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only there a batch begins that never ends")
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_scheduler_counts_batches_of_data_of_unknown_length():
    model, x, y = _converted()
    scheduler = EpsilonScheduler(**STEPS)
    for _ in range(2):
        batches = ((x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4))
        model.fit(batches, verbose=0, shuffle=False, callbacks=[scheduler])
    assert _ratio(model) == _expected(7)  # the last one that begins is the next one's first


def test_callbacks_in_a_training_loop_of_the_user():
    model, x, _ = _converted()
    monitor = FRNMonitor(x)
    callbacks = keras.callbacks.CallbackList([EpsilonScheduler(**STEPS), monitor], model=model)
    for batch in range(3):
        callbacks.on_train_batch_begin(batch)
        callbacks.on_train_batch_end(batch)
    callbacks.on_epoch_end(0, {})
    assert _ratio(model) == _expected(3)
    assert {row["layer"] for row in monitor.records} == {"inner", "single"}


def test_scheduler_applies_to_frozen_layers():
    model, x, y = _converted()
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    _fit(model, x, y, [EpsilonScheduler(**STEPS)], epochs=1)
    assert _ratio(model) == _expected(8)


@pytest.mark.parametrize("is_late", [None, False, True])
def test_scheduler_with_a_model_built_by_fit(is_late, rng):
    frn = FilterResponseNormalizationTLU(epsilon_ratio=2.0, name="frn")
    model = keras.Sequential([frn, layers.Flatten(), layers.Dense(2)])
    if is_late is not None:
        model = Subclass(is_late, epsilon_ratio=2.0)
    model.compile("sgd", "mse")
    x = rng.normal(size=(12, 4, 3))
    schedule = EpsilonScheduler(steps=4, final_ratio=0.125)
    model.fit(x, np.zeros((12, 2)), batch_size=4, verbose=0, callbacks=[schedule])
    frn = model.frn if is_late is not None else frn
    assert float(numpy(frn.epsilon_ratio)[0]) == pytest.approx(2.0 / 8)  # 3 of 4 halvings


def test_scheduler_refuses_a_model_without_a_ratio(rng):
    model, x, y = _converted(ratio=0.0)
    with pytest.raises(ValueError, match="`model` must have FRN layers with an `epsilon_ratio`"):
        model.fit(x, y, verbose=0, callbacks=[EpsilonScheduler(steps=2)])
    frn = FilterResponseNormalization(learned_epsilon="per_channel")
    model = keras.Sequential([keras.Input((4, 3)), frn])
    model.compile("sgd", "mse")
    x = rng.normal(size=(4, 4, 3))
    with pytest.raises(ValueError, match="again if it was converted when epsilon was kept"):
        model.fit(x, x, verbose=0, callbacks=[EpsilonScheduler(steps=2)])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 0}, r"`steps` must be .*Received: steps=0"),
        ({"steps": True}, r"`steps` must be .*Received: steps=True"),
        ({"steps": 2, "initial_ratio": 0}, r"`initial_ratio` must be .*initial_ratio=0"),
        ({"steps": 2, "final_ratio": float("inf")}, r"`final_ratio` must be .*final_ratio=inf"),
        ({"steps": 2, "final_ratio": None}, r"`final_ratio` must be .*final_ratio=None"),
    ],
)
def test_scheduler_checks_its_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        EpsilonScheduler(**arguments)


def _monitored(rng):
    """A model whose FRN layers see the inputs themselves, and one of whose channels is dead."""
    inner = keras.Sequential([keras.Input((4, 4, 3)), TLU(axis=(1, 3), name="tlu")])
    fused = FilterResponseNormalizationTLU(epsilon=0.5, learned_epsilon="per_channel", name="fused")
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.TimeDistributed(layers.Identity()),
            fused,
            FilterResponseNormalization(epsilon=[1.0, 2.0, 3.0], name="frn"),
            inner,
            layers.GlobalAveragePooling2D(),
        ]
    )
    fused.learned_epsilon.assign([0.1, -0.2, 0.3])
    fused.tau.assign([-0.5, 0.25, 9.0])
    x = rng.normal(size=(5, 4, 4, 3)).astype("float32") * np.array([1.0, 10.0, 0.1], "float32")
    model.compile("sgd", "mse")
    return model, x


def test_monitor_matches_numpy(rng):
    model, x = _monitored(rng)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    monitor = FRNMonitor(x, per_layer=True)
    history = model.fit(x, np.zeros((5, 3)), epochs=2, verbose=0, callbacks=[monitor]).history
    assert [(r["epoch"], r["layer"]) for r in monitor.records] == [
        (epoch, layer) for epoch in (0, 1) for layer in ("fused", "frn", "tlu")
    ]
    fused, frn, tlu = monitor.records[:3]
    x = x.astype("float64")
    nu2 = np.mean(x * x, (1, 2), keepdims=True)
    epsilon = 0.5 + np.array([0.1, 0.2, 0.3])
    y = x / np.sqrt(nu2 + epsilon)
    z = np.maximum(y, [-0.5, 0.25, 9.0])
    total = np.mean(x * x, (0, 1, 2))
    rtol = 1e-5  # sums in float32
    assert fused["epsilon_ratio"] == pytest.approx(np.median(epsilon / total), rtol)
    assert fused["spread"] == pytest.approx(total.max() / total.min(), rtol)
    assert fused["at_tau"] == pytest.approx(np.mean(y <= [-0.5, 0.25, 9.0]), rtol)
    assert fused["dead"] == pytest.approx(1 / 3)
    assert (fused["tau_min"], fused["tau_max"]) == (-0.5, 9.0)
    assert fused["learned_epsilon_min"] == pytest.approx(-0.2)
    total = np.mean(z * z, (0, 1, 2))
    assert frn["epsilon_ratio"] == pytest.approx(np.median([1.0, 2.0, 3.0] / total), rtol)
    assert "at_tau" not in frn
    y = z / np.sqrt(np.mean(z * z, (1, 2), keepdims=True) + np.array([1.0, 2.0, 3.0]))
    assert tlu["at_tau"] == pytest.approx(np.mean(y <= 0), rtol)
    assert tlu["dead"] == pytest.approx(np.mean(np.all(y <= 0, (0, 2))))
    assert history["fused/at_tau"] == pytest.approx([fused["at_tau"]] * 2)
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


def test_monitor_logs_and_plots(rng, tmp_path):
    model, x = _monitored(rng)
    log = tmp_path / "log.csv"
    monitor = FRNMonitor([x[:2], x[2:]])
    callbacks = [monitor, keras.callbacks.CSVLogger(log)]
    history = model.fit(x, np.zeros((5, 3)), verbose=0, callbacks=callbacks).history
    rows = monitor.records
    assert history["frn/spread"] == [max(row["spread"] for row in rows[:2])]
    assert history["frn/dead"] == [max(rows[0]["dead"], rows[2]["dead"])]
    assert "frn/at_tau" in log.read_text()
    pytest.importorskip("matplotlib", reason="of the [demo] extra")
    monitor.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_monitor_counts_each_sample_once(rng):
    """32 of the 40 samples are in one batch and 8 in the next."""
    frn = FilterResponseNormalization(epsilon=1.0, name="frn")
    model = keras.Sequential([keras.Input((4, 3)), frn])
    x = rng.normal(size=(40, 4, 3)).astype("float32")
    x[32:] *= 10
    (row,) = measure_layers(model, Samples(model, x))
    mean_square = np.mean(x.astype("float64") ** 2, (0, 1))
    rtol = 1e-5  # sums in float32
    assert row["epsilon_ratio"] == pytest.approx(np.median(1 / mean_square), rtol)


def test_monitor_tells_layers_of_one_name_apart(rng):
    def nested(number):
        parts = [keras.Input((4, 3)), TLU(name="tlu"), TLU(name=f"tlu{number}")]
        return keras.Sequential(parts, name="nested")

    models = [nested(0), nested(1)]
    models[1].name = "other"
    model = keras.Sequential([keras.Input((4, 3)), *models])
    x = rng.normal(size=(2, 4, 3)).astype("float32")
    rows = measure_layers(model, Samples(model, x))
    expected = ["nested/tlu (1)", "tlu0", "nested/tlu (2)", "tlu1"]
    assert [row["layer"] for row in rows] == expected


def test_monitor_with_a_model_without_frn(rng):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    x = rng.normal(size=(4, 3))
    with pytest.raises(ValueError, match=r"`model` must have FRN or TLU layers\. Received: model"):
        model.fit(x, np.zeros((4, 2)), verbose=0, callbacks=[FRNMonitor(x)])


class Subclass(keras.Model):
    """Its layers exist before it is built, or are made when it is."""

    def __init__(self, is_late, **options):
        super().__init__()
        self.is_late, self.options = is_late, options
        if not is_late:
            self.make()

    def make(self):
        self.frn = FilterResponseNormalizationTLU(epsilon=1.0, name="frn", **self.options)
        self.head = keras.Sequential([layers.Flatten(), layers.Dense(2)])

    def build(self, input_shape):
        if self.is_late:
            self.make()
        shape = input_shape["a"] if isinstance(input_shape, dict) else input_shape
        shape = shape[0] if isinstance(shape, list) else shape
        self.frn.build(shape)
        self.head.build(shape)
        self.built = True

    def call(self, inputs):
        if isinstance(inputs, dict):
            inputs = [inputs["a"], inputs["b"]]
        inputs = inputs[0] - inputs[1] if isinstance(inputs, (list, tuple)) else inputs
        return self.head(self.frn(inputs))


class Unprepared(Subclass):
    """Keras finds by itself how to build it."""

    build = keras.Model.build


class Keywords(Unprepared):
    def call(self, inputs):
        return self.head(inputs=self.frn(inputs=inputs))


class Rematerialized(Unprepared):
    """Its layers are called in what JAX traces."""

    def make(self):
        with keras.RematScope(mode="full"):
            super().make()


UNBUILT = {
    "subclass": lambda: Unprepared(is_late=False),
    "subclass with its own build": lambda: Subclass(is_late=False),
    "subclass that makes its layers in build": lambda: Subclass(is_late=True),
    "inputs by keyword": lambda: Keywords(is_late=False),
    "Sequential": lambda: keras.Sequential(
        [
            FilterResponseNormalizationTLU(epsilon=1.0, name="frn"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    ),
}
if BACKEND == "jax":  # TensorFlow's recomputation takes no keyword, such as the mask
    UNBUILT["rematerialized"] = lambda: Rematerialized(is_late=False)


@pytest.mark.parametrize("is_built", [False, True])
@pytest.mark.parametrize("kind", UNBUILT)
def test_monitor_with_models_without_symbolic_inputs(kind, is_built, rng):
    model = UNBUILT[kind]()
    x = rng.normal(size=(12, 4, 3)).astype("float32")
    if is_built:
        model(x)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    monitor = FRNMonitor(x)
    for _ in range(2):
        model.fit(x, np.zeros((12, 2)), batch_size=4, verbose=0, callbacks=[monitor])
    assert len(monitor.records) == 2
    expected = np.median(1 / np.mean(x.astype("float64") ** 2, (0, 1)))
    assert monitor.records[0]["epsilon_ratio"] == pytest.approx(expected, 1e-5)  # float32 sums


@pytest.mark.parametrize("nest", [lambda a, b: [a, b], lambda a, b: {"a": a, "b": b}])
def test_monitor_with_a_subclassed_model_of_two_inputs(nest, rng):
    a, b = rng.normal(size=(2, 12, 4, 3)).astype("float32")
    model = Unprepared(is_late=False)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    monitor = FRNMonitor(nest(a, b))
    model.fit(nest(a, b), np.zeros((12, 2)), verbose=0, callbacks=[monitor])
    expected = np.median(1 / np.mean((a - b).astype("float64") ** 2, (0, 1)))
    assert monitor.records[0]["epsilon_ratio"] == pytest.approx(expected, 1e-5)  # float32 sums


@pytest.mark.parametrize("is_built", [False, True])
def test_monitor_names_its_data_argument_in_errors(is_built, rng):
    model = UNBUILT["Sequential"]()
    x = rng.normal(size=(4, 4, 3)).astype("float32")
    if is_built:
        model(x)
    model.compile("sgd", "mse")
    for data, match in ((x[..., :2, 0], "have the shape"), (x * np.inf, "be finite"), ([], "hold")):
        with pytest.raises(ValueError, match=f"^`data` must {match}"):
            model.fit(x, np.zeros((4, 2)), verbose=0, callbacks=[FRNMonitor(data)])
