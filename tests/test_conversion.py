import json

import keras
import numpy as np
import pytest
from keras import layers
from reference import close

from keras_frn.conversion import calibration, replace_batch_normalization
from keras_frn.export.inference_form import InferenceCopy
from keras_frn.layers import TLU, FilterResponseNormalization, read_epsilon

pytestmark = pytest.mark.once
# What is not there in the oldest versions that are promised.
IS_OLD = tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15)
# With epsilon this many times the mean square, FRN is BatchNormalization's fixed scale: whatever
# the structure, the converted model must then give what the original gives.
FIXED_SCALE = 1e8
# A sum of float32 terms in another order, through the few layers of these models.
ROUNDING = 2e-4


@pytest.fixture(autouse=True)
def _outputs_without_gradients(request):
    """So that NumPy reads what a model returns on PyTorch, too; the guide's examples train."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.no_grad():
        yield


def _convert(model, data=None, **kwargs):
    kwargs = {"calibration_data": data, "verbose": False, **kwargs}
    return replace_batch_normalization(model, **kwargs)


def _report(model, **kwargs):
    return _convert(model, return_report=True, **kwargs)[1]


def _trained(model, rng):
    """Gives every BatchNormalization and bias weights that a trained model could have."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            _trained(layer, rng)
        elif isinstance(layer, layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(size=shape))
            layer.moving_variance.assign(rng.uniform(0.3, 3.0, size=shape))
            if layer.scale:
                layer.gamma.assign(rng.uniform(0.5, 1.5, size=shape) * rng.choice([-1, 1], shape))
            if layer.center:
                layer.beta.assign(rng.normal(size=shape))
    return model


def _input(model, rng, size=5):
    return keras.tree.map_structure(
        lambda x: rng.normal(size=(size, *(s or 7 for s in x.shape[1:]))).astype("float32"),
        model.inputs[0] if isinstance(model, keras.Sequential) else model.input,
    )


def _residual():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, use_bias=False, padding="same")(x)
    x = layers.ReLU(name="relu1")(layers.BatchNormalization(name="bn1")(x))
    y = layers.BatchNormalization(name="bn2")(layers.DepthwiseConv2D(3, padding="same")(x))
    y = layers.Activation("relu", name="relu2")(y)
    y = layers.BatchNormalization(name="bn3")(layers.SeparableConv2D(4, 3, padding="same")(y))
    x = layers.Activation("relu", name="relu3")(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(x)), name="residual")


def _concatenated():
    x = inputs = keras.Input((6, 6, 2))
    for _ in range(3):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Concatenate()([x, layers.Conv2D(3, 3, padding="same", use_bias=False)(y)])
    return keras.Model(inputs, layers.Flatten()(x))


def _mobile():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.ReLU(6.0, name="relu6")(layers.BatchNormalization()(layers.Conv2D(4, 3)(x)))
    x = layers.Activation("swish", name="swish")(layers.BatchNormalization()(x))
    y = layers.Conv2D(4, 3, padding="same")(x)
    x = layers.Add()([y, layers.BatchNormalization()(y)])  # y itself must keep its mean
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(4, 1, activation="sigmoid")(gate)
    return keras.Model(inputs, layers.Multiply()([x, gate]))


def _shared():
    conv, bn = layers.Conv2D(3, 3, padding="same"), layers.BatchNormalization(name="bn")
    relu, both = layers.ReLU(name="relu"), layers.ReLU(name="both")
    other = layers.BatchNormalization(name="other")
    a, b = keras.Input((5, 5, 3), name="a"), keras.Input((6, 4, 3), name="b")
    x, y = (relu(bn(conv(i))) for i in (a, b))
    outputs = {"x": both(bn(x)), "y": both(other(y))}
    return keras.Model({"a": a, "b": b}, outputs)


def _nested():
    inner = keras.Sequential(
        [layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()]
    )
    inside = keras.Input((None, None, 4))
    block = keras.Model(inside, layers.BatchNormalization()(layers.Add()([inside, inside])))
    x = inputs = keras.Input((6, 6, 4))
    x = block(inner(block(inner(x))))
    return keras.Sequential([inputs, keras.Model(inputs, x), layers.Flatten()])


def _dense():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.BatchNormalization(name="first"),
            layers.Dense(5, use_bias=False),
            layers.BatchNormalization(scale=False),
            layers.ReLU(),
            layers.Dense(5, activation="relu"),
            layers.BatchNormalization(center=False),
            layers.Dense(3),
        ]
    )


def _channels_first():
    x = inputs = keras.Input((3, 20))
    x = layers.ReLU()(layers.BatchNormalization(axis=1)(x))
    return keras.Model(inputs, layers.BatchNormalization(axis=1)(x + 1.0) * 2.0)


def _rank_5():
    return keras.Sequential(
        [
            keras.Input((4, 4, 4, 2)),
            layers.Conv3D(3, 3, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
        ]
    )


def _functions():
    inputs = keras.Input(batch_shape=(5, 4, 4, 2), name="fixed")
    x = layers.Lambda(lambda t: np.float32(2) * t)(inputs)
    a, b = keras.ops.split(layers.BatchNormalization()(x), 2, axis=-1)
    return keras.Model(inputs, [a + 1.0, layers.BatchNormalization()(b)])


BUILDERS = [
    _residual,
    _concatenated,
    _mobile,
    _shared,
    _nested,
    _dense,
    _channels_first,
    _rank_5,
    _functions,
]


def _all_layers(model):
    for layer in model.layers:
        yield layer
        if hasattr(layer, "layers"):
            yield from _all_layers(layer)


@pytest.mark.each_backend
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_every_structure_keeps_its_outputs(build, rng):
    model = _trained(build(), rng)
    x = _input(model, rng)
    before, weights = model(x), [w.copy() for w in model.get_weights()]
    converted = _convert(model, epsilon_ratio=FIXED_SCALE)
    for actual, expected in zip(keras.tree.flatten(converted(x)), keras.tree.flatten(before)):
        close(actual, expected, ROUNDING)
    names = [sorted(x.name for x in _all_layers(m)) for m in (converted, model)]
    assert names[0] == names[1]
    assert not any(isinstance(x, layers.BatchNormalization) for x in _all_layers(converted))
    for actual, expected in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(actual, expected)
    for actual, expected in zip(keras.tree.flatten(model(x)), keras.tree.flatten(before)):
        np.testing.assert_array_equal(actual, expected)


def test_activation_after_one_normalization_becomes_tlu(rng):
    model = _residual()
    tlus = [x.name for x in _convert(model).layers if isinstance(x, TLU)]
    assert tlus == ["relu1", "relu2"]
    assert not [x for x in _convert(model, replace_activations=False).layers if type(x) is TLU]
    tlus = [x.name for x in _convert(_shared()).layers if isinstance(x, TLU)]
    assert tlus == ["relu"]
    assert not [x for x in _convert(_mobile()).layers if isinstance(x, TLU)]


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(("scale", "center"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0])
def test_closed_form_is_exact_for_a_sample_of_typical_energy(ratio, scale, center, axis, rng):
    shape = (8, 3) if axis == -1 else (3, 8)
    model = keras.Sequential(
        [keras.Input(shape), layers.BatchNormalization(axis, scale=scale, center=center)]
    )
    bn = _trained(model, rng).layers[0]
    mean, variance = np.asarray(bn.moving_mean), np.asarray(bn.moving_variance)
    # Half of the positions one standard deviation above the mean, half below:
    # nu2 = mean^2 + variance.
    x = mean + np.sqrt(variance) * np.tile([1.0, -1.0], 4)[:, None]
    x = (x if axis == -1 else x.T)[None].astype("float32")
    # float32; epsilon 1e-6 beside a mean square of 0.3 or more.
    close(_convert(model, epsilon_ratio=ratio)(x), model(x), 1e-5)


@pytest.mark.parametrize("learned", ["per_channel", False])
def test_epsilon_is_in_proportion_to_the_mean_square(learned, rng):
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            layers.BatchNormalization(name="several"),
            layers.GlobalAveragePooling1D(),
            layers.BatchNormalization(name="single"),
        ]
    )
    converted = _convert(_trained(model, rng), epsilon_ratio=2.0, learned_epsilon=learned)
    for name in ("several", "single"):
        bn, frn = model.get_layer(name), converted.get_layer(name)
        expected = 2.0 * (np.asarray(bn.moving_mean) ** 2 + np.asarray(bn.moving_variance))
        np.testing.assert_allclose(read_epsilon(frn), expected + 1e-6, rtol=1e-5)
        trained = {w.name for w in frn.trainable_weights} - {"gamma", "beta"}
        assert trained == ({"learned_epsilon"} if name == "single" and learned else set())
    frn = converted.get_layer("several")
    assert [w.name for w in frn.non_trainable_weights] == ["mean_square", "epsilon_ratio"]
    assert float(np.asarray(frn.epsilon_ratio)[0]) == 2.0


def test_single_position_outputs_vary(rng):
    model = _trained(_dense(), rng)
    x = rng.normal(size=(30, 6)).astype("float32")
    for converted in (_convert(model, epsilon_ratio=0.0), _convert(model, x, epsilon_ratio=0.0)):
        first = converted.get_layer("first")
        y = np.abs(keras.ops.convert_to_numpy(first(x)) - keras.ops.convert_to_numpy(first.beta))
        # With a small epsilon all would be equal.
        assert (y.max(0) > 3 * y.min(0)).all()


@pytest.mark.each_backend
def test_calibrated_layers_have_the_mean_and_deviation_of_the_original(rng):
    model = _trained(_residual(), rng)
    x = rng.normal(1.0, 2.0, size=(40, 8, 8, 3)).astype("float32")
    converted = _convert(model, x, epsilon_ratio=1.0)
    for name in ("bn1", "bn2", "bn3"):
        actual, expected = (
            np.asarray(keras.Model(m.input, m.get_layer(name).output)(x), "float64").reshape(-1, 4)
            for m in (converted, model)
        )
        # Both are means over 2,560 float32 values.
        close(actual.mean(0), expected.mean(0), 1e-4)
        close(actual.std(0), expected.std(0), 1e-4)
        assert (np.diag(np.corrcoef(actual.T, expected.T)[:4, 4:]) > 0.5).all()


def test_calibration_does_not_depend_on_the_batch_size(rng):
    model = _trained(_nested(), rng)
    x = rng.normal(size=(23, 6, 6, 4)).astype("float32")
    results = [
        _convert(model, [x[i : i + size] for i in range(0, 23, size)]).get_weights()
        for size in (1, 7, 23)
    ]
    for result in results[1:]:
        for actual, expected in zip(result, results[0]):
            close(actual, expected, 1e-4)  # kernels of other batch sizes round differently


@pytest.mark.each_backend
def test_calibration_follows_shared_layers_and_several_inputs(rng):
    model = _trained(_shared(), rng)
    x = {"a": rng.normal(size=(9, 5, 5, 3)), "b": rng.normal(size=(9, 6, 4, 3))}
    x = keras.tree.map_structure(lambda v: v.astype("float32"), x)
    plain, calibrated = _convert(model), _convert(model, x)
    assert any(
        np.abs(a - b).max() > 1e-3
        for a, b in zip(plain.get_weights(), calibrated.get_weights())
        if a.size
    )
    assert all(np.isfinite(v).all() for v in keras.tree.flatten(calibrated.predict(x, verbose=0)))
    # With a fixed scale there is nothing to correct.
    exact = _convert(model, x, epsilon_ratio=FIXED_SCALE)
    for actual, expected in zip(keras.tree.flatten(exact(x)), keras.tree.flatten(model(x))):
        close(actual, expected, 1e-3)  # a variance is a difference of float32 means


def test_calibration_takes_an_array_for_an_input_in_a_list(rng):
    model = _residual()
    model = keras.Model(model.inputs, model.output)
    assert isinstance(model.input, list)
    x = rng.normal(size=(4, 8, 8, 3)).astype("float32")
    for actual, expected in zip(
        _convert(model, x).get_weights(), _convert(model, [x]).get_weights()
    ):
        np.testing.assert_array_equal(actual, expected)


def test_calibration_reads_a_batch_at_a_time(rng, tmp_path):
    np.save(tmp_path / "x.npy", rng.normal(size=(100, 6)).astype("float32"))
    read = []

    class Recorded:
        data = np.load(tmp_path / "x.npy", mmap_mode="r")

        shape = data.shape

        def __getitem__(self, index):
            read.append(len(self.data[index]))
            return self.data[index]

    _convert(_trained(_dense(), rng), Recorded())
    assert max(read) == 32


class Counted(layers.Layer):
    calls = 0

    def call(self, x):
        Counted.calls += 1
        return x


@pytest.mark.parametrize("is_shared", [False, True])
def test_calibration_runs_each_layer_once_at_any_depth(is_shared, rng):
    x = rng.normal(size=(40, 6, 3)).astype("float32")
    counts = []
    for depth in (2, 6):
        stack = [keras.Input((6, 3)), Counted()]
        for _ in range(depth):
            stack += [layers.Conv1D(3, 1), layers.BatchNormalization()]
        model = keras.Sequential(stack)
        if is_shared:
            inputs = [keras.Input((6, 3)), keras.Input((6, 3))]
            model = keras.Model(inputs, layers.Add()([model(inputs[0]), model(inputs[1])]))
        Counted.calls = 0
        _convert(model, [x, x] if is_shared else x)
        counts.append(Counted.calls)
    assert counts[0] == counts[1]


@pytest.mark.each_backend
def test_activations_on_disk_equal_those_in_memory(rng, monkeypatch):
    model = _trained(_shared(), rng)
    x = _input(model, rng, size=40)
    expected = _convert(model, x).get_weights()
    monkeypatch.setattr(calibration, "_BYTES_IN_MEMORY", 100)
    for actual, value in zip(_convert(model, x).get_weights(), expected, strict=True):
        np.testing.assert_array_equal(actual, value)


@pytest.mark.each_backend
def test_masked_positions_are_ignored_in_calibration(rng):
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, layers.BatchNormalization()(x))
    short = rng.integers(1, 9, size=(12, 5))
    padded = np.concatenate([short, np.zeros((12, 6), int)], 1)
    a, b = (_convert(model, x).get_weights() for x in (short, padded))
    for actual, expected in zip(a, b):
        close(actual, expected, 1e-5)


class SpoilsZeros(layers.Layer):
    supports_masking = True

    def call(self, x):
        return x * x / x


@pytest.mark.each_backend
def test_nan_under_a_mask_is_ignored_in_calibration(rng):
    inputs = keras.Input((None, 4))
    x = SpoilsZeros()(layers.Masking(-1.0)(inputs))  # what is masked becomes 0
    model = keras.Model(inputs, layers.BatchNormalization()(x))
    short = rng.normal(size=(12, 5, 4)).astype("float32")
    padded = np.concatenate([short, np.full((12, 6, 4), -1.0, "float32")], 1)
    a, b = (_convert(model, x).get_weights() for x in (short, padded))
    for actual, expected in zip(a, b):
        close(actual, expected, 1e-5)


@pytest.mark.each_backend
def test_channel_without_signal_stays_finite(rng):
    model = keras.Sequential([keras.Input((4, 4, 2)), layers.BatchNormalization()])
    model.layers[0].moving_variance.assign([0.0, 1.0])
    x = rng.normal(size=(8, 4, 4, 2)).astype("float32")
    x[..., 0] = 0.0
    for converted in (_convert(model), _convert(model, x), _convert(model, x, epsilon_ratio=0)):
        y = keras.ops.convert_to_numpy(converted(x))
        assert np.isfinite(y).all()
        close(y[..., 0], np.zeros((8, 4, 4)), 1e-6)


def test_converted_functional_model_is_uncompiled():
    model = _residual()
    model.compile("sgd", "mse")
    assert not _convert(model).compiled


@pytest.mark.each_backend
def test_frozen_layers_stay_frozen_and_the_result_is_uncompiled(rng):
    model = _nested()
    model.layers[0].trainable = False
    list(_all_layers(model))[3].trainable = True
    model.compile("sgd", lambda a, b: a)
    converted = _convert(model)
    flags = [{x.name: x.trainable for x in _all_layers(m)} for m in (converted, model)]
    assert flags[0] == flags[1]
    assert not converted.compiled
    assert model.compiled


@pytest.mark.each_backend
def test_regularizers_constraints_and_dtype_are_kept():
    bn = layers.BatchNormalization(
        gamma_regularizer="l2",
        beta_constraint="non_neg",
        activity_regularizer="l2",
        dtype="mixed_float16",
        axis=1,
    )
    model = keras.Sequential([keras.Input((3, 9)), bn, layers.ReLU(activity_regularizer="l1")])
    converted = _convert(model)
    frn = converted.layers[0]
    assert [type(x.activity_regularizer).__name__ for x in converted.layers] == ["L2", "L1"]
    assert isinstance(frn.gamma_regularizer, keras.regularizers.L2)
    assert isinstance(frn.beta_constraint, keras.constraints.NonNeg)
    assert (frn.compute_dtype, frn.axis) == ("float16", 1)


@pytest.mark.skipif(IS_OLD, reason="Keras takes no function there")
def test_a_function_as_a_regularizer_is_kept():
    bn = layers.BatchNormalization(beta_regularizer=lambda beta: keras.ops.sum(beta))
    converted = _convert(keras.Sequential([keras.Input((3, 9)), bn]))
    assert converted.layers[0].beta_regularizer is bn.beta_regularizer


def test_relu_after_a_nested_model_becomes_tlu(rng):
    def block(name):
        stack = [layers.Conv2D(4, 3, padding="same"), layers.BatchNormalization(name=name)]
        return keras.Sequential([keras.Input((6, 6, 4)), *stack])

    once, twice = block("once"), block("twice")
    x = inputs = keras.Input((6, 6, 4))
    x = layers.ReLU(name="after_once")(once(x))
    x = layers.ReLU(name="after_twice")(twice(twice(x)))
    model = _trained(keras.Model(inputs, x), rng)
    tlus = [layer.name for layer in _convert(model).layers if isinstance(layer, TLU)]
    assert tlus == ["after_once"]
    x = _input(model, rng)
    close(_convert(model, epsilon_ratio=FIXED_SCALE)(x), model(x), ROUNDING)


def test_adapted_layers_keep_their_statistics(rng):
    x = rng.normal(3.0, 2.0, size=(20, 6)).astype("float32")
    normalization = layers.Normalization()
    normalization.adapt(x)
    model = keras.Sequential([keras.Input((6,)), normalization, layers.BatchNormalization()])
    close(_convert(model, epsilon_ratio=FIXED_SCALE)(x), model(x), ROUNDING)


@pytest.mark.each_backend
def test_converted_model_survives_save_and_load(rng, tmp_path):
    model = _trained(_residual(), rng)
    x = _input(model, rng)
    converted = _convert(model, x)
    converted.save(tmp_path / "frn.keras")
    loaded = keras.models.load_model(tmp_path / "frn.keras")
    np.testing.assert_array_equal(loaded(x), converted(x))
    json.loads(converted.to_json())


def test_report_lists_replacements_and_reasons(rng):
    x = inputs = keras.Input((6, 4, 3))
    x = layers.Conv2D(3, 1, name="conv")(x)
    x = layers.ReLU(6.0, name="relu6")(layers.BatchNormalization(name="bn")(x))
    x = layers.TimeDistributed(
        layers.BatchNormalization(name="batch_normalization"), name="hidden"
    )(x)
    model = keras.Model(inputs, x)
    converted, report = _convert(model, return_report=True)
    text = str(report)
    assert "2 BatchNormalization layers became FRN, 0 left; " in text
    assert "; 0 activations became TLU, 1 kept." in text
    assert (report.replaced, report.left) == (2, 0)
    rows = {entry.layer: entry for entry in report.entries}
    assert rows["bn"].positions == 24
    assert rows["bn"].epsilon_ratio == pytest.approx(3.0, rel=1e-4)
    assert (rows["bn"].action, rows["relu6"].action) == ("replaced", "kept")
    assert rows["relu6"].reason == "not a ReLU"
    assert rows["batch_normalization"].positions == 4
    assert isinstance(converted.get_layer("hidden").layer, FilterResponseNormalization)
    assert all(entry.layer in text for entry in report.entries)
    report = _report(_shared())
    rows = {entry.layer: entry for entry in report.entries}
    assert rows["both"].reason == "other layers come before it too"


def test_model_without_batch_normalization_is_copied_with_a_warning():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    with pytest.warns(UserWarning, match="no BatchNormalization"):
        converted, report = _convert(model, return_report=True)
    x = np.ones((1, 3), "float32")
    np.testing.assert_array_equal(converted(x), model(x))
    assert "No BatchNormalization" in str(report)


class _Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="mine")
        self.dense, self.bn = layers.Dense(2), layers.BatchNormalization()

    def call(self, inputs, training=None):
        return self.bn(self.dense(inputs), training=training)


def test_subclassed_model_is_refused_with_a_remedy(rng):
    model = _Subclassed()
    model(np.ones((1, 3), "float32"))
    with pytest.raises(
        ValueError, match=r"`model` must be .*Received: .*mine.*_Subclassed.*model\.call"
    ):
        _convert(model)
    inputs = keras.Input((3,))
    converted = _convert(keras.Model(inputs, model.call(inputs)))
    assert any(isinstance(x, FilterResponseNormalization) for x in converted.layers)


@pytest.mark.parametrize("model", ["bn.keras", None, layers.BatchNormalization()])
def test_what_is_no_model_is_refused_with_a_remedy(model):
    match = (
        r"^`model` must be a model of Keras 3\. Received: model=.* of class .*load_model` returns"
    )
    with pytest.raises(ValueError, match=match):
        _convert(model)


# What is not finite in a layer is unlike what the model was made for, too.
@pytest.mark.filterwarnings("ignore:`calibration_data` is from")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"epsilon_ratio": -1}, r"`epsilon_ratio` must be .*Received: -1"),
        ({"epsilon_ratio": float("nan")}, r"Received: nan"),
        ({"learned_epsilon": True}, r"`learned_epsilon` must be .*Received: learned_epsilon=True"),
        ({"calibration_data": np.zeros((0, 6))}, r"`calibration_data` must hold at least one"),
        ({"calibration_data": np.full((2, 6), np.nan)}, r"`calibration_data` must be finite"),
        ({"calibration_data": np.full((2, 6), 3e38) * [[1], [0.5]]}, r"must give finite values"),
    ],
)
def test_arguments_are_checked(arguments, match):
    with pytest.raises(ValueError, match=match):
        _convert(_dense(), **arguments)


def test_unbuilt_model_is_refused():
    refusal = r"`model` must be a built Keras model. Received: model=.* name=empty.* `keras.Input`"
    with pytest.raises(ValueError, match=refusal):
        _convert(keras.Sequential([layers.BatchNormalization()], name="empty"))


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A layer that holds others, as those of keras-hub do; `kind` is a way not to be opened."""

    def __init__(self, filters=4, kind=None, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.kind = filters, kind
        self.conv = layers.Conv2D(filters, 3, padding="same", name="conv")
        self.bn = layers.BatchNormalization(name="bn")
        self.drop = layers.Dropout(0.5, name="drop")

    def build(self, shape):
        self.conv.build(shape)
        self.bn.build((*shape[:-1], self.filters))
        if self.kind == "own weight":
            self.factor = self.add_weight(shape=(), initializer="ones", name="factor")

    def call(self, x, training=None):
        y = self.bn(self.conv(x), training=training)
        if self.kind == "own weight":
            y = y * self.factor
        if self.kind == "differs in training" and training:
            y = y + 1.0
        if self.kind == "not symbolic" and float(y[0, 0, 0, 0]) > 0:
            y = y + 1.0
        return keras.ops.relu(self.drop(y, training=training)) + x

    def compute_output_shape(self, shape):
        return shape

    def compute_output_spec(self, x, training=None):
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self):
        return {**super().get_config(), "filters": self.filters, "kind": self.kind}


def _blocks(*kinds):
    x = inputs = keras.Input((6, 6, 4))
    for number, kind in enumerate(kinds):
        x = Block(kind=kind, name=f"block{number}")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def _train_inside(model, rng):
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.3, 3.0, size=layer.moving_mean.shape))
            layer.gamma.assign(rng.uniform(0.5, 1.5, size=layer.moving_mean.shape))
    return model


def _left_in(model):
    return [x for x in model._flatten_layers() if isinstance(x, layers.BatchNormalization)]


@pytest.mark.each_backend
def test_composite_layers_are_converted(rng, tmp_path):
    model = _train_inside(_blocks(None, None), rng)
    model.get_layer("block0").conv.trainable = False
    x = _input(model, rng, size=20)
    converted, report = _convert(model, x, epsilon_ratio=FIXED_SCALE, return_report=True)
    assert (report.replaced, report.left, _left_in(converted)) == (2, 0, [])
    assert report.agreement > 0.999
    close(converted(x), model(x), ROUNDING)
    assert [layer.name for layer in converted.layers] == [layer.name for layer in model.layers]
    assert not converted.get_layer("block0").get_layer("conv").trainable
    converted.save(tmp_path / "frn.keras")
    loaded = keras.models.load_model(tmp_path / "frn.keras", custom_objects={"Block": None})
    np.testing.assert_array_equal(loaded(x), converted(x))
    assert any(isinstance(layer, layers.Dropout) for layer in loaded._flatten_layers())


class UnnamedBlock(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = [layers.Dense(4), layers.Dense(4)]
        self.rest = {"bn": layers.BatchNormalization(), "act": layers.ReLU()}

    def call(self, x):
        return self.rest["act"](self.rest["bn"](self.dense[1](self.dense[0](x))))


def test_layers_inside_of_others_keep_their_names():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, UnnamedBlock(name="block")(inputs))
    block = _convert(model).get_layer("block")
    names = {layer.name for layer in model.get_layer("block")._flatten_layers(include_self=False)}
    assert {layer.name for layer in block.layers[1:]} == names


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("own weight", "it has weights or losses outside"),
        ("differs in training", "differs in training"),
        ("not symbolic", "cannot be traced"),
    ],
)
def test_composite_layers_that_cannot_be_converted_are_named(kind, reason, rng):
    model = _train_inside(_blocks(None, kind), rng)
    model.get_layer("block1").bn.trainable = False
    match = rf"`model` keeps 1 of 2 BatchNormalization layers, .*: block1 \(1 .*layer .*{reason}"
    with pytest.warns(UserWarning, match=match):
        converted, report = _convert(model, return_report=True)
    assert (report.replaced, report.left, len(_left_in(converted))) == (1, 1, 1)
    assert "1 BatchNormalization layer became FRN, 1 left; " in str(report)
    block = converted.get_layer("block1")
    assert (block.bn.trainable, block.conv.trainable) == (False, True)


class OwnNormalization(layers.BatchNormalization):
    pass


def test_batch_normalization_subclass_is_named():
    stack = [keras.Input((4, 3)), OwnNormalization(name="own"), layers.BatchNormalization()]
    with pytest.warns(UserWarning, match=r"keeps 1 of 2 .*own \(not a plain Batch"):
        _convert(keras.Sequential(stack))


@pytest.mark.each_backend
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("steps", [3, None])
def test_time_distributed_layers_are_converted(steps, is_calibrated, rng, tmp_path):
    cnn = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.ReLU(name="relu"),
            layers.Conv2D(4, 3, name="last"),
            layers.BatchNormalization(),
        ]
    )
    cnn.get_layer("last").trainable = False
    stack = [layers.TimeDistributed(cnn), layers.TimeDistributed(layers.BatchNormalization())]
    model = keras.Sequential([keras.Input((steps, 6, 6, 3)), *stack])
    _train_inside(model, rng)
    x = rng.normal(size=(9, 3, 6, 6, 3)).astype("float32")
    converted, report = _convert(
        model, x if is_calibrated else None, epsilon_ratio=FIXED_SCALE, return_report=True
    )
    assert (report.replaced, report.left, _left_in(converted)) == (3, 0, [])
    close(converted(x), model(x), 1e-3)  # a variance is a difference of float32 means
    assert type(converted.layers[0].layer.get_layer("relu")) is TLU
    assert not converted.layers[0].layer.get_layer("last").trainable
    converted.save(tmp_path / "frn.keras")
    loaded = keras.models.load_model(tmp_path / "frn.keras")
    np.testing.assert_array_equal(loaded(x), converted(x))


def _step_layers():
    x = inputs = keras.Input((4, 5))
    for layer in (layers.Dense(3), layers.BatchNormalization(), layers.ReLU()):
        x = layers.TimeDistributed(layer)(x)
    x = layers.TimeDistributed(layers.BatchNormalization(1))(x)
    return keras.Model(inputs, layers.Activation("relu")(x))


def _several_steps():
    cnn = keras.Sequential([keras.Input((5,)), layers.Dense(5), layers.BatchNormalization()])
    inputs = keras.Input((4, 5))
    x = layers.TimeDistributed(cnn)(layers.TimeDistributed(cnn)(inputs))
    return keras.Model(inputs, [x, cnn(layers.GlobalAveragePooling1D()(inputs))])


def _steps_of_steps():
    cnn = keras.Sequential([keras.Input((5,)), layers.BatchNormalization(), layers.ReLU()])
    inputs = keras.Input((2, 4, 5))
    return keras.Model(inputs, layers.TimeDistributed(layers.TimeDistributed(cnn))(inputs))


def _steps_of_blocks():
    cnn = keras.Sequential([keras.Input((6, 6, 4)), Block(), layers.BatchNormalization()])
    x = inputs = keras.Input((3, 6, 6, 4))
    x = layers.TimeDistributed(Block(name="alone"))(layers.TimeDistributed(cnn)(x))
    return keras.Model(inputs, x)


@pytest.mark.each_backend
@pytest.mark.parametrize(
    ("build", "norms", "tlus"),
    [
        (_step_layers, 2, 2),
        (_several_steps, 1, 0),
        (_steps_of_steps, 1, 1),
        (_steps_of_blocks, 3, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_all_layers_inside_of_time_distributed_ones_are_converted(build, norms, tlus, rng):
    model = _train_inside(build(), rng)
    x = _input(model, rng)
    for data in (None, x):
        converted, report = _convert(model, data, epsilon_ratio=FIXED_SCALE, return_report=True)
        assert (report.replaced, report.left, len(report.entries)) == (norms, 0, norms + tlus)
        assert sum(isinstance(layer, TLU) for layer in converted._flatten_layers()) == tlus
        for actual, expected in zip(*(keras.tree.flatten(m(x)) for m in (converted, model))):
            close(actual, expected, 1e-3)  # a variance is a difference of float32 means


@keras.saving.register_keras_serializable("tests")
class OwnStep(keras.Model):
    def train_step(self, data):
        return {"loss": 7.0}


@keras.saving.register_keras_serializable("tests")
class OfSizes(keras.Model):
    """A class that is not made of inputs and outputs."""

    def __init__(self, size, has_bn=True, name=None):
        inputs = keras.Input((size,))
        x = layers.Dense(4)(inputs)
        super().__init__(inputs, layers.BatchNormalization()(x) if has_bn else x, name=name)
        self.size, self.has_bn = size, has_bn

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)

    def get_config(self):
        return {"size": self.size, "has_bn": self.has_bn, "name": self.name}


def test_model_classes_that_keras_can_rebuild_are_kept(rng):
    inputs = keras.Input((3,))
    inner = OwnStep(inputs, layers.BatchNormalization()(inputs), name="inner")
    model = OwnStep(inputs, inner(inputs))
    converted = _convert(model)
    assert (type(converted), type(converted.get_layer("inner"))) == (OwnStep, OwnStep)


@keras.saving.register_keras_serializable("tests")
class OfMore(keras.Model):
    """A class that is made of inputs, outputs and more."""

    def __init__(self, inputs, outputs, name=None, *, factor=1.0, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)
        self.factor, self.loss_mean = factor, keras.metrics.Mean(name="mean")

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


def test_model_classes_keep_what_else_they_are_made_of(rng, tmp_path):
    inputs = keras.Input((3,))
    inner = OfMore(inputs, layers.BatchNormalization()(inputs), name="inner", factor=2.0)
    model = OfMore(inputs, inner(inputs), factor=3.0)
    converted = _convert(model)
    converted.save(tmp_path / "frn.keras")
    # An older Keras reads no class of this kind.
    loaded = converted if IS_OLD else keras.models.load_model(tmp_path / "frn.keras")
    for copy in (converted, loaded):
        assert (type(copy), copy.factor, copy.get_layer("inner").factor) == (OfMore, 3.0, 2.0)
    x = rng.normal(size=(4, 3))
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    model.class_names = ["a"]
    end = "" if IS_OLD else "$"  # nor could it be loaded again, which the warning adds
    with pytest.warns(
        UserWarning, match=rf"of class OfMore is copied, without its own class_names\.{end}"
    ):
        _convert(model)


class OwnCall(keras.Model):
    def call(self, inputs, training=None, mask=None):
        return 3.0 * super().call(inputs, training=training) + 1.0


def test_a_model_with_its_own_call_is_more_than_its_wiring(rng):
    def block(inputs):
        return layers.ReLU()(layers.BatchNormalization()(layers.Dense(4)(inputs)))

    inputs = keras.Input((4,))
    own = OwnCall(inputs, block(inputs))
    model = _train_inside(keras.Model(inputs, block(own(inputs))), rng)
    x = _input(model, rng, size=40)
    close(_convert(model, x, epsilon_ratio=FIXED_SCALE)(x), model(x), 1e-3)  # a variance
    with pytest.raises(ValueError, match=r"`model` must be .* of class OwnCall. .*model\.call"):
        _convert(own)


class WithoutConfig(keras.Model):
    def __init__(self, units):
        inputs = keras.Input((3,))
        super().__init__(inputs, layers.Dense(units[0], name="inside")(inputs))


def test_unchanged_models_keep_flags_or_become_plain_with_a_warning(rng):
    inputs = keras.Input((3,))
    for inner in (OfSizes(3, has_bn=False), WithoutConfig([4])):
        inner.layers[1].trainable = False
        model = keras.Model(inputs, layers.BatchNormalization()(inner(inputs)))
        if isinstance(inner, OfSizes):
            converted = _convert(model)
        else:
            with pytest.warns(UserWarning, match="of class WithoutConfig becomes a plain Functi"):
                converted = _convert(model)
        assert not converted.layers[1].layers[1].trainable


def test_lost_model_class_is_named_and_unchanged_models_are_kept(rng, tmp_path):
    inputs = keras.Input((3,))
    same, changed = OfSizes(3, has_bn=False, name="same"), OfSizes(4, name="changed")
    model = _train_inside(keras.Model(inputs, changed(same(inputs))), rng)
    x = _input(model, rng)
    match = "`model` 'changed' of class OfSizes becomes a plain Functional, without .*compute_loss"
    with pytest.warns(UserWarning, match=match):
        converted = _convert(model, epsilon_ratio=FIXED_SCALE)
    assert type(converted.get_layer("same")) is OfSizes
    close(converted(x), model(x), ROUNDING)
    converted.save(tmp_path / "frn.keras")
    loaded = keras.models.load_model(tmp_path / "frn.keras")
    np.testing.assert_array_equal(loaded(x), converted(x))


@pytest.mark.each_backend
@pytest.mark.parametrize("relu", [keras.ops.relu, keras.activations.relu])
def test_relu_operation_becomes_tlu(relu, rng, tmp_path):
    inputs = keras.Input((5, 4))
    x = layers.BatchNormalization()(inputs)
    y = layers.BatchNormalization()(relu(x))
    model = _trained(keras.Model(inputs, relu(y + x)), rng)
    x = _input(model, rng)
    converted, report = _convert(model, epsilon_ratio=FIXED_SCALE, return_report=True)
    assert sum(isinstance(layer, TLU) for layer in converted.layers) == 1
    assert "; 1 activation became TLU" in str(report)
    close(converted(x), model(x), ROUNDING)
    rows = _report(model, replace_activations=False).entries
    assert [row.reason for row in rows if row.action == "kept"] == ["not asked for"]


@pytest.mark.each_backend
def test_preprocessor_is_applied_to_the_data_and_named(rng):
    model = _trained(_residual(), rng)
    model.preprocessor = lambda x: (x / 255, None)
    images = rng.integers(0, 256, size=(40, 8, 8, 3)).astype("float32")
    with pytest.warns(UserWarning, match="without its own preprocessor"):
        actual = _convert(model, images).get_weights()
    del model.preprocessor
    for weight, expected in zip(actual, _convert(model, images / 255).get_weights(), strict=True):
        close(weight, expected, 1e-6)  # one rounding of the images


def test_ratio_too_small_for_the_model_is_reported(rng):
    stack = [layers.Dense(3), layers.BatchNormalization(), layers.Flatten()]
    model = keras.Sequential([keras.Input((8, 3)), *stack])
    # Samples of very different energy, which FRN brings to one.
    data = rng.normal(size=(64, 8, 3)) * np.exp(rng.normal(0, 3, size=(64, 1, 1)))
    with pytest.warns(UserWarning, match="`epsilon_ratio` is too small for this model"):
        _, report = _convert(model, data, epsilon_ratio=0.0, return_report=True)
    assert "Correlation with the given model: 0." in str(report)
    assert _report(model, calibration_data=data, epsilon_ratio=1e3).agreement > 0.999


def test_random_model_is_not_blamed_on_the_ratio(rng):
    noise = layers.Lambda(lambda x: x + 9.0 * keras.random.normal(keras.ops.shape(x)))
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    model = keras.Model(inputs, noise(x))
    with pytest.warns(UserWarning, match="`model` is random at inference.*0.* with the result's"):
        _convert(model, rng.normal(size=(16, 8, 8, 3)))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="text is of TensorFlow")
@pytest.mark.parametrize("kind", [object, "U", "S"])
def test_text_is_calibration_data(kind, rng):
    inputs = [keras.Input((1,), dtype="string"), keras.Input((4,))]
    text = layers.StringLookup(vocabulary=["a", "bc"], output_mode="one_hot")(inputs[0])
    x = layers.Dense(8)(layers.Concatenate()([text, inputs[1]]))
    model = keras.Model(inputs, layers.BatchNormalization()(x))
    data = [np.array([["a"], ["bc"]] * 8).astype(kind), rng.normal(size=(16, 4))]
    assert _report(model, calibration_data=data, epsilon_ratio=1e3).agreement > 0.99


def test_agreement_is_measured_on_batches_of_one_sample(rng):
    model = _trained(_residual(), rng)
    data = [rng.normal(1.0, 2.0, size=(1, 8, 8, 3)).astype("float32") for _ in range(9)]
    assert _report(model, calibration_data=data, epsilon_ratio=1e3).agreement > 0.999
    assert _report(model, calibration_data=data[:7]).agreement is None


def test_exported_form_uses_the_ratio(rng):
    model = _trained(_residual(), rng)
    x = rng.normal(1.0, 2.0, size=(40, 8, 8, 3)).astype("float32")
    converted = _convert(model, x)
    for ratio in (3.0, 0.1):
        for name in ("bn1", "bn2", "bn3"):
            converted.get_layer(name).epsilon_ratio.assign([ratio])
        copy = InferenceCopy(converted)
        copy.equalize([[x]])
        assert copy.equalized
        close(copy.model(x), converted(x), ROUNDING)
