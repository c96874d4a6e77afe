import inspect
import pickle
import warnings

import keras
import numpy as np
import pytest
from backends import float64_enabled, layer_gradients, numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from keras.src.testing import TestCase
from reference import INPUT_GRADIENT, PARAMETER_GRADIENT, VALUE, close, frn_tlu

import keras_frn
from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU
from keras_frn.layers import read_epsilon, read_gamma

FRN_LAYERS = [FilterResponseNormalization, FilterResponseNormalizationTLU]
LAYERS = [*FRN_LAYERS, TLU]

FRN_OPTIONS = [
    pytest.param({}, 2, id="defaults"),
    pytest.param({"learned_epsilon": True}, 3, id="learned epsilon"),
    pytest.param({"learned_epsilon": "per_channel", "epsilon": 0.0}, 3, id="one per channel"),
    pytest.param({"epsilon": [1e-6, 1e-3, 0.1, 1.0]}, 2, id="constant epsilon per channel"),
    pytest.param({"center": False, "scale": False}, 0, id="no gamma, no beta"),
    pytest.param({"jit_compile": True}, 2, id="compiled"),
    pytest.param({"jit_compile": False}, 2, id="not compiled"),
    pytest.param({"gamma_regularizer": "l2", "beta_constraint": "non_neg"}, 2, id="regularized"),
]
TLU_OPTIONS = [
    pytest.param({}, 1, id="defaults"),
    pytest.param({"affine": True}, 2, id="affine"),
    pytest.param({"axis": (1, -1)}, 1, id="per position"),
    pytest.param({"jit_compile": True}, 1, id="compiled"),
    pytest.param({"tau_regularizer": "l2", "tau_constraint": "non_neg"}, 1, id="regularized"),
]
# Each option for images; series and volumes with the first.
IMAGE, OTHERS = (2, 5, 3, 4), {"series": (2, 5, 4), "volume": (2, 3, 5, 3, 4)}


def with_shapes(options):
    first = options[0].values
    return pytest.mark.parametrize(
        ("options", "weights", "shape"),
        [pytest.param(*o.values, IMAGE, id=o.id) for o in options]
        + [pytest.param(*first, shape, id=name) for name, shape in OTHERS.items()],
    )


# Keras' own test feeds `fit` from a generator.
keras_layer_test = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")


@keras_layer_test
@pytest.mark.parametrize("cls", FRN_LAYERS)
@with_shapes(FRN_OPTIONS)
def test_frn_passes_the_layer_test_of_keras(cls, options, weights, shape):
    TestCase().run_layer_test(
        cls,
        options,
        input_shape=shape,
        expected_output_shape=shape,
        expected_num_trainable_weights=weights + (cls is FilterResponseNormalizationTLU),
        expected_num_non_trainable_weights=0,
        expected_num_losses="gamma_regularizer" in options,
        supports_masking=True,
        run_training_check=weights > 0,
    )


@keras_layer_test
@with_shapes(TLU_OPTIONS)
def test_tlu_passes_the_layer_test_of_keras(options, weights, shape):
    TestCase().run_layer_test(
        TLU,
        options,
        input_shape=shape,
        expected_output_shape=shape,
        expected_num_trainable_weights=weights,
        expected_num_non_trainable_weights=0,
        expected_num_losses="tau_regularizer" in options,
        supports_masking=True,
    )


@keras_layer_test
def test_frn_tlu_on_dense_features_passes_the_layer_test_of_keras():
    for cls in FRN_LAYERS:
        TestCase().run_layer_test(
            cls, {"learned_epsilon": True}, input_shape=(3, 4), expected_output_shape=(3, 4)
        )


def random_weights(layer, rng):
    """Sets every weight to random numbers and returns them by name."""
    layer.set_weights([0.5 + 0.3 * rng.normal(size=w.shape) for w in layer.weights])
    return {w.name: numpy(w) for w in layer.weights}


def check_layer(shape, axis=-1, learned=False, mask=None, **options):
    """A fused layer with random weights against the reference, with the gradients of each."""
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(2, *shape)).astype("float32")
    layer = FilterResponseNormalizationTLU(
        axis=axis, epsilon=0.01, learned_epsilon=learned, **options
    )
    layer.build(shape)
    weights = random_weights(layer, rng)
    learned_epsilon = weights.pop("learned_epsilon", np.zeros(1))
    z, found = layer_gradients(layer, x, upstream, mask=mask)
    epsilon = 0.01 + np.abs(learned_epsilon)
    expected, expected_gradients = frn_tlu(
        x, **weights, epsilon=epsilon, axis=axis, mask=mask, upstream=upstream
    )
    close(z, expected, VALUE)
    close(found["x"], expected_gradients["x"], INPUT_GRADIENT)
    for name in weights:
        close(found[name], expected_gradients[name], PARAMETER_GRADIENT)
    if learned:
        expected_epsilon = expected_gradients["epsilon"] * np.sign(learned_epsilon)
        if learned is True:
            expected_epsilon = expected_epsilon.sum(keepdims=True)
        close(found["learned_epsilon"], expected_epsilon, PARAMETER_GRADIENT)


@settings(max_examples=10)
@given(
    st.lists(st.integers(2, 7), min_size=3, max_size=5),
    st.integers(1, 4),
    st.sampled_from([False, True, "per_channel"]),
    st.fixed_dictionaries({name: st.booleans() for name in ("center", "scale", "affine")}),
    st.booleans(),
)
def test_layer_matches_the_reference(shape, axis, learned, options, is_masked):
    axis = axis if axis < len(shape) else -1
    mask = None
    if is_masked:
        sizes = [size for i, size in enumerate(shape) if i != axis % len(shape)]
        mask = np.ones(sizes[:2], bool)
        mask[0, 0] = mask[-1] = False  # a row of one sample, and all of the last one
    check_layer(shape, axis, learned, mask, **options)


@pytest.mark.parametrize(("learned", "axis"), [(False, -1), (True, 1), ("per_channel", -1)])
def test_compiled_layer_matches_the_reference(learned, axis):
    check_layer((2, 6, 7, 3), axis, learned, affine=True, jit_compile=True)


def test_fused_layer_equals_the_two_layers(rng):
    x = rng.normal(size=(2, 6, 7, 3)).astype("float32")
    fused, frn, tlu = FilterResponseNormalizationTLU(), FilterResponseNormalization(), TLU()
    for layer in (fused, frn, tlu):
        layer.build(x.shape)
    weights = random_weights(fused, rng)
    frn.set_weights([weights["gamma"], weights["beta"]])
    tlu.set_weights([weights["tau"]])
    close(numpy(fused(x)), numpy(tlu(frn(x))), VALUE)


def test_weights_and_their_order():
    layer = FilterResponseNormalizationTLU(learned_epsilon=True, affine=True)
    layer.build((None, None, None, 5))
    assert [w.name for w in layer.weights] == ["gamma", "beta", "learned_epsilon", "tau", "alpha"]
    assert [tuple(w.shape) for w in layer.weights] == [(5,), (5,), (1,), (5,), (5,)]
    assert not layer.non_trainable_weights
    for weight, value in zip(layer.weights, (1, 0, 1e-4, 0, 0), strict=True):
        close(numpy(weight), np.full(weight.shape, value), 1e-11)
        assert getattr(layer, weight.name) is weight
    bare = FilterResponseNormalizationTLU(center=False, scale=False)
    bare.build((None, 4, 5))
    assert bare.gamma is bare.beta is bare.learned_epsilon is bare.alpha is None


def test_tau_has_the_sizes_of_its_axes_in_ascending_order():
    layer = TLU(axis=(-1, 1), affine=True)
    layer.build((None, 4, None, 6))
    assert tuple(layer.tau.shape) == tuple(layer.alpha.shape) == (4, 6)
    assert layer.axis == (-1, 1), "get_config must return what the user passed"
    assert layer(np.zeros((1, 4, 9, 6), "float32")).shape == (1, 4, 9, 6)


@pytest.mark.parametrize("learned", [True, "per_channel"])
def test_learned_epsilon_is_trained(learned, rng):
    """Training from 1e-4 finds the epsilon of 0.2 that made the target."""
    x = (0.7 * rng.normal(size=(6400, 6))).astype("float32")
    target = frn_tlu(x, epsilon=0.2).astype("float32")
    model = keras.Sequential(
        [keras.Input((6,)), FilterResponseNormalization(scale=False, learned_epsilon=learned)]
    )
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(x, target, batch_size=64, epochs=12, verbose=0)
    np.testing.assert_allclose(np.abs(numpy(model.layers[0].learned_epsilon)), 0.2, rtol=0.05)


def test_regularizers_constraints_and_initializers():
    names = ("gamma", "beta", "learned_epsilon", "tau", "alpha")
    layer = FilterResponseNormalizationTLU(
        learned_epsilon="per_channel",
        affine=True,
        **{f"{n}_initializer": keras.initializers.Constant(2.0) for n in names},
        **{f"{n}_regularizer": keras.regularizers.L2(0.5) for n in names},
        **{f"{n}_constraint": keras.constraints.MaxNorm(1.0) for n in names},
    )
    layer.build((None, 4, 3))
    assert [float(numpy(loss)) for loss in layer.losses] == [6.0] * 5  # 0.5 * 3 * 2^2
    for weight in layer.weights:
        np.testing.assert_array_equal(numpy(weight), np.full(3, 2.0))
        np.testing.assert_allclose(np.linalg.norm(numpy(weight.constraint(weight))), 1, rtol=1e-6)


@pytest.mark.parametrize("cls", LAYERS)
def test_config_round_trip(cls):
    for options in (p.values[0] for p in (TLU_OPTIONS if cls is TLU else FRN_OPTIONS)):
        layer = cls(**options, name="n")
        config = layer.get_config()
        layer.build((None, 5, 4))
        assert layer.get_config() == config, "build must not change the config"
        for copy in (cls.from_config(config), cls(**config)):
            assert copy.get_config() == config
        for name, value in options.items():
            if not name.endswith(("regularizer", "constraint")):
                assert config[name] == value


FLAGS = {
    FilterResponseNormalization: ("learned_epsilon", "center", "scale", "jit_compile"),
    TLU: ("affine", "jit_compile"),
}


@pytest.mark.parametrize(("cls", "flag"), [(c, flag) for c in FLAGS for flag in FLAGS[c]])
def test_flags_accept_numpy_bools_and_nothing_else(cls, flag):
    for value in (np.True_, np.False_):
        config = cls(**{flag: value}).get_config()
        assert config[flag] is bool(value)  # a file takes no bool of NumPy
    for wrong in ("no", 1, 0.0):
        with pytest.raises(ValueError, match=f"`{flag}` must be one of .*Received: {flag}="):
            cls(**{flag: wrong})


@pytest.mark.parametrize("cls", LAYERS)
def test_config_has_every_constructor_argument(cls):
    arguments = set(inspect.signature(cls).parameters) - {"kwargs"}
    assert arguments <= set(cls().get_config())


def test_fused_layer_takes_the_arguments_of_both():
    union = {**FilterResponseNormalization().get_config(), **TLU().get_config(), "name": "fused"}
    assert FilterResponseNormalizationTLU.from_config(union).get_config() == union


def test_arguments_after_axis_are_keyword_only():
    """The second argument of BatchNormalization is its momentum."""
    for cls in LAYERS:
        with pytest.raises(TypeError, match="positional"):
            cls(-1, 0.99)


def test_batch_normalization_arguments_keep_their_names():
    shared = {"axis", "epsilon", "center", "scale"} | {
        f"{w}_{k}" for w in ("beta", "gamma") for k in ("initializer", "regularizer", "constraint")
    }
    for cls in (keras.layers.BatchNormalization, FilterResponseNormalization):
        assert shared <= set(inspect.signature(cls).parameters)


@pytest.mark.parametrize("cls", LAYERS)
def test_pickle_clone_summary_and_repr(cls, rng, capsys):
    model = keras.Sequential([keras.Input((5, 5, 3)), cls(name="mine")])
    x = rng.normal(size=(2, 5, 5, 3)).astype("float32")
    random_weights(model, rng)
    expected = numpy(model(x))
    np.testing.assert_array_equal(numpy(pickle.loads(pickle.dumps(model))(x)), expected)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(numpy(clone(x)), expected)
    model.summary()
    assert "mine" in capsys.readouterr().out
    assert "mine" in repr(model.layers[0])
    assert model.layers[0].compute_output_shape((2, None, 5, 3)) == (2, None, 5, 3)


@pytest.mark.parametrize("cls", LAYERS)
def test_unknown_and_changing_spatial_sizes(cls, rng):
    layer = cls()
    model = keras.Sequential([keras.Input((None, None, 3)), layer])
    assert model.output_shape == (None, None, None, 3)
    for size in ((2, 4, 5, 3), (1, 9, 2, 3)):
        x = rng.normal(size=size).astype("float32")
        options = {} if cls is FilterResponseNormalization else {"tau": 0.0}
        expected = np.maximum(x, 0) if cls is TLU else frn_tlu(x, **options)
        close(model.predict(x, verbose=0), expected, VALUE)
    with pytest.raises(ValueError, match="incompatible with the layer"):
        layer(np.zeros((2, 4, 5, 4), "float32"))


@pytest.mark.parametrize("cls", LAYERS)
def test_time_distributed(cls, rng):
    x = rng.normal(size=(2, 3, 5, 5, 4)).astype("float32")
    wrapped = keras.layers.TimeDistributed(cls())
    options = {} if cls is FilterResponseNormalization else {"tau": 0.0}
    expected = np.maximum(x, 0) if cls is TLU else [frn_tlu(sample, **options) for sample in x]
    close(numpy(wrapped(x)), np.stack(expected), VALUE)


@pytest.mark.parametrize("cls", FRN_LAYERS)
def test_mask_reaches_the_layer_and_is_passed_on(cls, rng):
    x = rng.normal(1.0, 1.0, (3, 6, 4)).astype("float32")
    x[0, 4:], x[1, 2:] = 0, 0
    inputs = keras.Input((6, 4))
    outputs = cls()(keras.layers.Masking()(inputs))
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    mask = np.any(x != 0, -1)
    tau = None if cls is FilterResponseNormalization else 0.0
    expected = frn_tlu(x, mask=mask, tau=tau)
    actual, actual_pooled = keras.Model(inputs, [outputs, pooled]).predict(x, verbose=0)
    close(actual, expected, VALUE)
    mean = (expected * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    close(actual_pooled, mean, VALUE)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(
    ("policy", "output", "weights"),
    [
        ("mixed_float16", "float16", "float32"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_half_precision_policies(cls, policy, output, weights, rng):
    layer = cls(dtype=policy)
    # Above the largest float16, from a layer before that computes in float32.
    x = (1e5 * rng.normal(size=(2, 8, 8, 3))).astype("float32")
    # Two programs are enough; PyTorch takes some seconds for each.
    for jit_compile in (False, True) if policy.startswith("mixed") else (False,):
        layer.jit_compile = jit_compile
        z = layer(x)
        assert keras.backend.standardize_dtype(z.dtype) == output
        assert {w.dtype for w in layer.weights} == {weights}
        if cls is not TLU:
            tau = None if cls is FilterResponseNormalization else 0.0
            rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[output]
            np.testing.assert_allclose(
                numpy(keras.ops.cast(z, "float32")),
                frn_tlu(x, tau=tau),
                rtol=1.01 * rounding,
                atol=1e-7,
            )
    largest = keras.ops.cast(np.full((2, 8, 8, 3), 65504.0, "float32"), "float16")
    z = numpy(keras.ops.cast(FilterResponseNormalization(dtype=policy)(largest), "float32"))
    np.testing.assert_array_equal(z, np.ones_like(z))


@pytest.mark.parametrize("cls", LAYERS)
def test_gradients_of_half_precision(cls, rng):
    x = rng.normal(size=(2, 8, 8, 3)).astype("float16")
    upstream = rng.normal(size=x.shape).astype("float16")
    layer = cls(dtype="mixed_float16")
    layer.build(x.shape)
    _, found = layer_gradients(layer, x, upstream)
    layer32 = cls()
    layer32.build(x.shape)
    _, expected = layer_gradients(layer32, x.astype("float32"), upstream.astype("float32"))
    for name, gradient in found.items():
        # The gradient of x is rounded to float16 once; that of the weights stays in float32.
        close(gradient, expected[name], 1e-3 if name == "x" else PARAMETER_GRADIENT)


@pytest.mark.parametrize("cls", LAYERS)
def test_float64_policy(cls, rng):
    with float64_enabled():
        x = rng.normal(size=(2, 30, 31, 3))
        options = {} if cls is TLU else {"epsilon": 0.1, "learned_epsilon": True}
        layer = cls(dtype="float64", **options)
        layer.build(x.shape)
        assert {w.dtype for w in layer.weights} == {"float64"}
        z = numpy(layer(x))
        assert z.dtype == "float64"
        if cls is TLU:
            np.testing.assert_array_equal(z, np.maximum(x, 0))
        else:
            learned = numpy(layer.learned_epsilon)
            tau = None if cls is FilterResponseNormalization else 0.0
            close(z, frn_tlu(x, epsilon=0.1 + learned, tau=tau), 1e-14)


def test_integer_input(rng):
    x = rng.integers(0, 255, (2, 8, 8, 3)).astype("uint8")
    close(numpy(FilterResponseNormalization()(x)), frn_tlu(x), VALUE)


@pytest.mark.parametrize("cls", FRN_LAYERS)
def test_single_position_with_a_tiny_epsilon_warns_once(cls):
    for shape in ((None, 4), (None, 1, 1, 4)):
        layer = cls()
        with pytest.warns(UserWarning, match="single positions.*learned_epsilon=True") as record:
            layer(np.ones([size or 2 for size in shape], "float32"))
        assert record[0].filename == __file__, "the line of the user"
        layer(np.ones([size or 2 for size in shape], "float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options, shape in (
            ({"learned_epsilon": True}, (None, 4)),
            ({"epsilon": 0.1}, (None, 4)),
            ({}, (None, None, 4)),
            ({}, (None, 2, 1, 4)),
        ):
            cls(**options).build(shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: c(axis=[1, 2]), r"`axis`.*axis=\[1, 2\].*Use -1"),
        (lambda c: c(axis=[3]), r"`axis` must be one int.*axis=\[3\]"),
        (lambda c: c(axis=0), r"`axis`.*axis=0"),
        (lambda c: c(axis=1.5), r"`axis`.*axis=1.5"),
        (lambda c: c(axis=True), r"`axis`.*axis=True"),
        (lambda c: c(epsilon=0.0), r"`epsilon`.*epsilon=0.0"),
        (lambda c: c(epsilon=-1e-6), r"`epsilon`.*epsilon=-1e-06"),
        (lambda c: c(epsilon=-1e-6, learned_epsilon=True), r"`epsilon`.*epsilon=-1e-06"),
        (lambda c: c(epsilon=float("nan")), r"`epsilon`.*epsilon=nan"),
        (lambda c: c(epsilon=float("inf")), r"`epsilon`.*epsilon=inf"),
        (lambda c: c(epsilon="1e-6"), r"`epsilon`.*epsilon='1e-6'"),
        (lambda c: c(epsilon=True), r"`epsilon`.*epsilon=True"),
        (lambda c: c(epsilon=[1e-6, None]), r"`epsilon`.*epsilon=\[1e-06, None\]"),
        (lambda c: c(epsilon=[]), r"`epsilon`.*epsilon=\[\]"),
        (lambda c: c(epsilon=[1e-6, 0.0]), r"`epsilon`.*epsilon=\[1e-06, 0.0\]"),
        (lambda c: c(epsilon=[[1e-6]]), r"`epsilon`.*epsilon=\[\[1e-06\]\]"),
        (lambda c: c(learned_epsilon="yes"), r"`learned_epsilon`.*'yes'"),
        (lambda c: c(learned_epsilon=1e-4), r"`learned_epsilon`.*0.0001"),
        (lambda c: c(jit_compile="auto"), r"`jit_compile`.*'auto'"),
        (lambda c: c().build((3,)), r"rank 2 or more.*shape=\(3,\)"),
        (lambda c: c(axis=3).build((2, 5, 4)), r"axis=3, shape=\(2, 5, 4\)"),
        (lambda c: c(axis=-3).build((2, 5, 4)), r"axis=-3, shape=\(2, 5, 4\)"),
        (lambda c: c().build((2, 5, None)), r"known size along axis -1.*\(2, 5, None\)"),
        (lambda c: c(epsilon=[1e-6] * 3).build((2, 5, 4)), r"3 values for 4 channels"),
        (lambda c: c(epsilon=1e-26).build((2, 5, 4)), r"5.2e-26 or more in float32.*1e-26"),
        (lambda c: c()([np.zeros((2, 5, 4), "float32")]), r"one tensor.*\(\(2, 5, 4\),\)"),
        (lambda c: c().call(np.zeros((2, 5, 4), "float32")), r"must be built before `call`"),
        (lambda c: c()(np.zeros((2, 0, 4), "float32")), r"spatial position.*\(2, 0, 4\)"),
    ],
)
@pytest.mark.parametrize("cls", FRN_LAYERS)
def test_frn_errors(cls, make, message):
    with pytest.raises(ValueError, match=message):
        make(cls)


@pytest.mark.parametrize("cls", FRN_LAYERS)
def test_zeros_have_finite_gradients_at_the_least_epsilon(cls):
    layer, x = cls(epsilon=6e-26), np.zeros((2, 5, 4), "float32")
    layer.build(x.shape)
    z, found = layer_gradients(layer, x, np.ones_like(x))
    assert all(np.isfinite(array).all() for array in (z, *found.values()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TLU(axis=0), r"`axis`.*axis=0"),
        (lambda: TLU(axis=(0, 1)), r"`axis`.*axis=\(0, 1\)"),
        (lambda: TLU(axis=()), r"`axis`.*axis=\(\)"),
        (lambda: TLU(axis=(1, 1)), r"`axis`.*axis=\(1, 1\)"),
        (lambda: TLU(axis="channels"), r"`axis`.*axis='channels'"),
        (lambda: TLU(axis=(1, -2)).build((2, 5, 4)), r"different axes.*axis=\(1, -2\)"),
        (lambda: TLU(axis=(1, 2)).build((2, None, 4)), r"known size.*\(2, None, 4\)"),
        (lambda: TLU().build((2,)), r"rank 2 or more.*\(2,\)"),
        (lambda: TLU(jit_compile=1), r"`jit_compile`.*jit_compile=1"),
    ],
)
def test_tlu_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cls", LAYERS)
def test_training_and_inference_are_equal(cls, rng):
    x = rng.normal(size=(2, 9, 7, 3)).astype("float32")
    layer = cls()
    np.testing.assert_array_equal(numpy(layer(x, training=True)), numpy(layer(x, training=False)))


def test_subclassed_model_trains(rng):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Conv1D(8, 3)
            self.norm = keras_frn.FilterResponseNormalization()
            self.act = keras_frn.TLU()
            self.head = keras.layers.Dense(1)

        def call(self, x):
            x = self.act(self.norm(self.dense(x)))
            return self.head(keras.ops.mean(x, axis=1))

    x = rng.normal(size=(64, 12, 2)).astype("float32")
    y = x.std((1, 2))[:, None]
    net = Net()
    net.compile(keras.optimizers.Adam(0.01), "mse")
    history = net.fit(x, y, epochs=30, verbose=0).history["loss"]
    assert history[-1] < 0.2 * history[0]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    "layer_class", [FilterResponseNormalization, FilterResponseNormalizationTLU]
)
def test_epsilon_ratio_mixes_in_the_typical_mean_square(layer_class, scale, rng, tmp_path):
    layer = layer_class(epsilon_ratio=2.0, learned_epsilon=True, scale=scale)
    model = keras.Sequential([keras.Input((5, 3)), layer])
    names = [weight.name for weight in layer.weights]
    own = ["gamma"] * scale + ["beta", "learned_epsilon"] + ["tau"] * hasattr(layer, "tau")
    assert names == [*own, "mean_square", "epsilon_ratio"]
    assert [weight.name for weight in layer.trainable_weights] == own
    assert float(np.ravel(keras.ops.convert_to_numpy(layer.epsilon_ratio))[0]) == 2.0
    mean_square = np.array([0.5, 1.0, 4.0])
    layer.mean_square.assign(mean_square)
    layer.epsilon_ratio.assign([0.7])
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    y = keras.ops.convert_to_numpy(model(x))
    options = {"tau": 0.0} if hasattr(layer, "tau") else {}
    epsilon = 1e-6 + 1e-4 + 0.7 * mean_square
    close(y, frn_tlu(x, gamma=np.sqrt(1.7), epsilon=epsilon, **options), VALUE)
    np.testing.assert_allclose(read_epsilon(layer), epsilon, rtol=1e-6)  # float32
    np.testing.assert_allclose(read_gamma(layer), np.full(3, np.sqrt(1.7)), rtol=1e-6)
    for name in ("model.keras", "model.h5"):
        model.save(tmp_path / name)
        loaded = keras.models.load_model(tmp_path / name)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(loaded(x)), y)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "3", True])
def test_epsilon_ratio_is_checked(value):
    with pytest.raises(ValueError, match=r"`epsilon_ratio` must be .*Received: epsilon_ratio="):
        FilterResponseNormalization(epsilon_ratio=value)
