import warnings

import keras
import numpy as np
import pytest
from backends import BACKEND, float64_enabled, gradients, numpy
from hypothesis import given
from hypothesis import strategies as st
from reference import INPUT_GRADIENT, PARAMETER_GRADIENT, VALUE, close, frn_tlu

import keras_frn

frn = keras_frn.ops.filter_response_normalization
tlu = keras_frn.ops.tlu
frn_tlu_op = keras_frn.ops.filter_response_normalization_tlu


def parameters(rng, channels):
    """gamma, beta, tau, alpha with a sign of each and about half of the positions above tau."""
    return {
        "gamma": rng.normal(1.0, 0.5, channels).astype("float32"),
        "beta": rng.normal(0.0, 0.5, channels).astype("float32"),
        "tau": rng.normal(0.0, 0.5, channels).astype("float32"),
        "alpha": rng.normal(0.0, 0.3, channels).astype("float32"),
    }


def only(weights, *names):
    return {name: weights[name] for name in names}


@st.composite
def cases(draw):
    """An input of any rank and size, its channel axis, an epsilon, and a mask or none."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=5)))
    rank = len(shape)
    axis = draw(st.integers(1, rank - 1))
    # What is masked throughout has r = 1 / sqrt(epsilon), which is about 1 here to keep the scale.
    is_masked = draw(st.booleans())
    epsilons = st.sampled_from([0.5, 2.0] if is_masked else [1e-6, 1e-3, 0.5, 2.0])
    channels = shape[axis]
    epsilon = draw(epsilons | st.lists(epsilons, min_size=channels, max_size=channels))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    sizes = [size for i, size in enumerate(shape) if i != axis]
    sizes = sizes[: draw(st.integers(1, rank - 1))]  # of each position, of each row, of a sample
    mask = rng.random(sizes) < draw(st.sampled_from([0.0, 0.6, 1.0])) if is_masked else None
    # About 1, so that r is, too: in the gradient of x numbers of this size cancel.
    x = rng.uniform(0.5, 2.0, shape) * rng.choice([-1, 1], shape)
    axis -= rank * draw(st.booleans())
    return x.astype("float32"), {"axis": axis, "epsilon": epsilon, "mask": mask}, rng


WEIGHTS = [(), ("gamma",), ("beta",), ("gamma", "beta")]
THRESHOLDS = [(), ("tau",), ("tau", "alpha")]


@given(cases(), st.sampled_from(WEIGHTS), st.sampled_from(THRESHOLDS))
def test_values_and_gradients_match_the_reference(case, names, thresholds):
    x, options, rng = case
    weights = only(parameters(rng, x.shape[options["axis"]]), *names, *thresholds)
    upstream = rng.normal(size=x.shape).astype("float32")
    missing = {} if not thresholds else {"gamma": None, "beta": None}
    op = frn_tlu_op if thresholds else frn
    z, found = gradients(
        lambda x, **weights: op(x, **{**missing, **weights}, **options),
        {"x": x, **weights},
        upstream,
    )
    expected, expected_gradients = frn_tlu(x, **weights, **options, upstream=upstream)
    close(z, expected, VALUE)
    close(found["x"], expected_gradients["x"], INPUT_GRADIENT)
    for name in weights:
        close(found[name], expected_gradients[name], PARAMETER_GRADIENT)


def test_epsilon_as_number_sequence_and_tensor(rng):
    x, upstream = (0.1 * rng.normal(size=(2, 2, 6, 5, 3))).astype("float32")
    for epsilon in (0.3, [0.1, 1e-6, 3.0], (0.1, 1e-6, 3.0), np.array([0.1, 1e-6, 3.0])):
        close(numpy(frn(x, epsilon=epsilon)), frn_tlu(x, epsilon=epsilon), VALUE)
    for epsilon in (np.array([0.3], "float32"), np.array([0.1, 1e-6, 3.0], "float32")):
        _, found = gradients(
            lambda x, epsilon: frn(x, epsilon=epsilon),
            {"x": x, "epsilon": epsilon},
            upstream,
        )
        _, expected = frn_tlu(x, epsilon=epsilon, upstream=upstream)
        per_channel = expected["epsilon"]
        expected_epsilon = per_channel if epsilon.size == 3 else per_channel.sum(keepdims=True)
        close(found["epsilon"], expected_epsilon, PARAMETER_GRADIENT)


def test_masked_values_are_ignored(rng):
    x, upstream = rng.normal(size=(2, 2, 9, 4)).astype("float32")
    lengths = (5, 7)
    mask = np.arange(9) < np.array(lengths)[:, None]
    upstream = np.where(mask[..., None], upstream, 0).astype("float32")
    for padding in (0.0, 1e6, np.nan):
        padded = np.where(mask[..., None], x, padding).astype("float32")
        z, found = gradients(lambda x: frn(x, mask=mask), {"x": padded}, upstream)
        # Each sample without its padding is the same; a NaN spoils its own position and, through
        # gamma's place in the formula, gradients, but no value that counts.
        for i, length in enumerate(lengths):
            part = slice(i, i + 1), slice(0, length)
            expected, expected_gradients = frn_tlu(x[part], upstream=upstream[part])
            close(z[part], expected, VALUE)
            if not np.isnan(padding):
                close(found["x"][part], expected_gradients["x"], INPUT_GRADIENT)


def test_fully_masked_sample_is_finite(rng):
    x = rng.normal(size=(2, 9, 4)).astype("float32")
    z, found = gradients(lambda x: frn(x, mask=np.zeros((2, 9), bool)), {"x": x}, np.ones_like(x))
    close(z, x / np.sqrt(1e-6), VALUE)
    close(found["x"], np.full(x.shape, 1e3), INPUT_GRADIENT)


# A tau far from the inputs, and one among them; the largest float32 and the infinities.
TAUS = [-np.inf, -3e38, -1e20, -1e4, -20.0, -1.0, -1e-30, 0.0, 1e-30, 0.7, 1e4, 3e38, np.inf]


@pytest.mark.parametrize("tau", TAUS)
def test_tlu_is_bitwise_the_maximum(tau, rng):
    scales = 10.0 ** rng.uniform(-6, 6, (4, 50, 3))
    x = (rng.normal(size=(4, 50, 3)) * scales).astype("float32")
    x[0, :4] = [0.3], [-0.3], [np.inf], [-np.inf]
    taus = np.array([tau, tau / 2, 0.1], "float32")
    np.testing.assert_array_equal(numpy(tlu(x, taus)), np.maximum(x, taus))


@pytest.mark.parametrize("tau", TAUS)
def test_fused_tlu_is_exact_for_every_tau(tau, rng):
    x = rng.normal(size=(2, 30, 30, 3)).astype("float32")
    taus = np.array([tau, tau / 2, 0.1], "float32")
    z = numpy(frn_tlu_op(x, None, None, taus))
    y = np.asarray(frn_tlu(x))
    # Float32 roundings of y, at the size of y and not at the size of tau.
    expected = np.maximum(y, taus.astype("float64"))
    np.testing.assert_allclose(z, expected, rtol=1e-6, atol=1e-6)


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=5),
    st.sets(st.integers(1, 4), min_size=1),
    st.sampled_from([tuple, list, lambda axes: axes[0]]),
    st.booleans(),
    st.booleans(),
)
def test_tlu_axes(shape, axes, kind, is_negative, affine):
    """In any order, positive or negative, as an int, a tuple or a list."""
    rank = len(shape)
    axes = [axis for axis in axes if axis < rank][::-1] or [1]
    axis = kind([a - rank * is_negative for a in axes])
    axes = sorted(axes) if isinstance(axis, (tuple, list)) else axes[:1]
    rng = np.random.default_rng(0)
    x, upstream = rng.normal(size=(2, *shape)).astype("float32")
    names = ("tau", "alpha") if affine else ("tau",)
    sizes = [shape[a] for a in axes]
    weights = {name: rng.normal(size=sizes).astype("float32") for name in names}
    z, found = gradients(lambda x, **w: tlu(x, **w, axis=axis), {"x": x, **weights}, upstream)
    along = [size if a in axes else 1 for a, size in enumerate(shape)]
    tau, slope = (
        np.reshape(weights.get(name, 0.0 * weights["tau"]), along) for name in ("tau", "alpha")
    )
    line = slope * x.astype("float64") + tau
    below = line > x
    close(z, np.where(below, line, x), VALUE)
    close(found["x"], np.where(below, slope * upstream, upstream), VALUE)
    others = tuple(a for a in range(rank) if a not in axes)
    expected = np.where(below, upstream.astype("float64"), 0)
    close(found["tau"], expected.sum(others), PARAMETER_GRADIENT)
    if affine:
        close(found["alpha"], (expected * x).sum(others), PARAMETER_GRADIENT)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_gradient_at_a_tie_goes_to_tau(alpha):
    """As the gradient of ReLU is 0 at 0. Black borders and dead channels start as ties."""
    x, zeros = np.zeros((2, 3), "float32"), np.zeros(3, "float32")
    options = {} if alpha is None else {"alpha": zeros}
    _, found = gradients(lambda x, tau: tlu(x, tau, **options), {"x": x, "tau": zeros}, x + 1)
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["tau"], [2, 2, 2])


def test_gradient_of_a_rarely_used_tau_is_accurate(rng):
    """100 of 1.6 million positions are below it."""
    x = np.ones((128, 112, 112, 1), "float32")
    upstream = rng.uniform(0.5, 1.0, x.shape).astype("float32")
    below = rng.choice(x.size, 100, replace=False)
    x.reshape(-1)[below] = -1
    _, found = gradients(tlu, {"x": x, "tau": np.zeros(1, "float32")}, upstream)
    expected = upstream.astype("float64").reshape(-1)[below].sum()
    # TensorFlow subtracts two sums: a rounding of all that arrives, not of the result.
    scale = upstream.sum(dtype="float64") if BACKEND == "tensorflow" else expected
    assert abs(found["tau"][0] - expected) <= {"tensorflow": 1e-7}.get(BACKEND, 2e-5) * scale


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype, rng):
    largest = 65504.0
    x = np.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3) * largest
    x = keras.ops.cast(x.astype("float32"), dtype)
    z = frn(x)
    assert keras.backend.standardize_dtype(z.dtype) == dtype
    expected = frn_tlu(numpy(keras.ops.cast(x, "float32")))
    # One rounding to 11 bits (float16) or 8 bits (bfloat16).
    rounding = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    np.testing.assert_allclose(numpy(keras.ops.cast(z, "float32")), expected, rtol=1.01 * rounding)


@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_float64_keeps_its_precision(masked, alpha, rng):
    with float64_enabled():
        mask = rng.random((2, 30, 31)) < 0.7 if masked else None
        x, upstream = rng.normal(size=(2, 2, 30, 31, 3))
        weights = {n: rng.normal(size=3) for n in ("gamma", "beta", "tau")}
        if alpha is not None:
            weights["alpha"] = np.full(3, alpha)
        options = {"epsilon": 0.1, "mask": mask}
        z, found = gradients(
            lambda x, **w: frn_tlu_op(x, **w, **options),
            {"x": x, **weights},
            upstream,
        )
        assert z.dtype == "float64"
        expected, expected_gradients = frn_tlu(x, **weights, **options, upstream=upstream)
        close(z, expected, 1e-14)  # 0.1 in float32 would be off by 1.5e-9
        for name in found:
            close(found[name], expected_gradients[name], 1e-13)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool"])
def test_integers_become_float(dtype, rng):
    x = rng.integers(0, 2, (2, 4, 4, 3)).astype(dtype)
    z = frn(x)
    assert keras.backend.standardize_dtype(z.dtype) == keras.config.floatx()
    close(numpy(z), frn_tlu(x.astype("float64")), VALUE)
    close(numpy(tlu(x, np.zeros(3, "float32"))), x.astype("float64"), 0)


def test_sparse_input_becomes_dense(rng):
    x = rng.normal(size=(4, 6)).astype("float32") * (rng.random((4, 6)) > 0.5)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        sparse = tf.sparse.from_dense(x)
    elif BACKEND == "jax":
        from jax.experimental.sparse import BCOO

        sparse = BCOO.fromdense(x)
    else:
        pytest.skip("Keras has none on PyTorch")
    close(numpy(frn_tlu_op(sparse, epsilon=0.1)), frn_tlu(x, tau=0.0, epsilon=0.1), VALUE)
    close(numpy(tlu(sparse, 0.5)), np.maximum(x, 0.5), 0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="on JAX a gradient is that of an array")
def test_gradient_of_a_keras_variable(rng):
    import tensorflow as tf

    x = rng.normal(size=(2, 5, 3)).astype("float32")
    variable = keras.Variable(x)
    with tf.GradientTape() as tape:
        z = frn_tlu_op(variable)
    expected, gradients = frn_tlu(x, tau=0.0, upstream=np.ones_like(x))
    close(z, expected, VALUE)
    close(tape.gradient(z, variable.value), gradients["x"], INPUT_GRADIENT)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the only backend with ragged tensors")
def test_ragged_input_is_normalized_over_its_own_length(rng):
    import tensorflow as tf

    rows = [rng.normal(size=(1, size, 3)).astype("float32") for size in (2, 5)]
    values = tf.constant(np.concatenate(rows, 1)[0])
    with tf.GradientTape() as tape:
        tape.watch(values)
        z = frn_tlu_op(tf.RaggedTensor.from_row_lengths(values, [2, 5]))
    expected = [frn_tlu(x, tau=0.0, upstream=np.ones_like(x)) for x in rows]
    close(z.flat_values, np.concatenate([z[0] for z, _ in expected]), VALUE)
    found = tape.gradient(z.flat_values, values)
    close(found, np.concatenate([g["x"][0] for _, g in expected]), INPUT_GRADIENT)


def test_zeros_and_tiny_numbers_have_finite_gradients():
    for x in (np.zeros((2, 4, 4, 3)), np.full((2, 4, 4, 3), 1e-30), np.full((2, 4, 4, 3), 1e-22)):
        x = x.astype("float32")
        weights = {"gamma": np.ones(3), "beta": np.zeros(3), "tau": np.full(3, -1.0)}
        weights = {n: w.astype("float32") for n, w in weights.items()}
        z, found = gradients(
            lambda x, **w: frn_tlu_op(x, **w),
            {"x": x, **weights},
            np.ones_like(x),
        )
        # x is far below sqrt(epsilon): y = x * 1e3, gradient 1e3; backends may flush 1e-30 to 0.
        close(z, x * 1e3, 1e-18)
        close(found["x"], np.full(x.shape, 1e3), INPUT_GRADIENT)
        assert all(np.isfinite(g).all() for g in found.values())


def test_empty_batch():
    x = np.zeros((0, 4, 4, 3), "float32")
    weights = {n: np.ones(3, "float32") for n in ("gamma", "beta", "tau")}
    z, found = gradients(lambda x, **w: frn_tlu_op(x, **w), {"x": x, **weights}, x)
    assert z.shape == found["x"].shape == x.shape
    for name in weights:
        np.testing.assert_array_equal(found[name], np.zeros(3))


def test_nan_and_infinity_stay_in_their_sample_and_channel(rng):
    x, upstream = rng.normal(size=(2, 3, 8, 8, 4)).astype("float32")
    spoiled = x.copy()
    spoiled[0, 1, 2, 3], spoiled[2, 5, 5, 1] = np.nan, np.inf
    tau = np.full(4, -0.5, "float32")
    z, found = gradients(lambda x: frn_tlu_op(x, None, None, tau), {"x": x}, upstream)
    z_spoiled, found_spoiled = gradients(
        lambda x: frn_tlu_op(x, None, None, tau), {"x": spoiled}, upstream
    )
    untouched = np.ones((3, 4), bool)
    untouched[0, 3] = untouched[2, 1] = False
    for clean, dirty in ((z, z_spoiled), (found["x"], found_spoiled["x"])):
        clean, dirty = np.moveaxis(clean, -1, 1), np.moveaxis(dirty, -1, 1)
        np.testing.assert_array_equal(clean[untouched], dirty[untouched])
    assert np.isnan(z_spoiled[0, 1, 2, 3]), "a NaN must show"


def test_nan_in_tau_is_passed_on():
    z = numpy(tlu(np.ones((1, 2), "float32"), np.array([np.nan, 0.0], "float32")))
    assert np.isnan(z[0, 0])
    assert z[0, 1] == 1


def test_samples_are_independent(rng):
    x, upstream = rng.normal(size=(2, 5, 13, 7, 6)).astype("float32")
    weights = only(parameters(rng, 6), "gamma", "beta", "tau")

    def run(x):
        return gradients(lambda x: frn_tlu_op(x, **weights), {"x": x}, upstream)

    z, found = run(x)
    other = x.copy()
    other[[0, 1, 3, 4]] = 1e3 * rng.normal(size=(4, 13, 7, 6))
    z_other, found_other = run(other)
    np.testing.assert_array_equal(z[2], z_other[2])
    np.testing.assert_array_equal(found["x"][2], found_other["x"][2])


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 200_000, 2), id="series"),
        pytest.param((1, 4099, 2), id="series of prime length"),
        pytest.param((1, 224, 224, 3), id="image"),
        pytest.param((1, 96, 96, 96, 2), id="volume"),
    ],
)
def test_large_means_are_accurate(shape, rng):
    x = rng.uniform(0.5, 1.0, shape).astype("float32")  # all of one sign: errors do not cancel
    close(numpy(frn(x)), frn_tlu(x), VALUE)


def test_gradient_matches_finite_differences(rng):
    with float64_enabled():
        x, upstream, direction = rng.normal(size=(3, 2, 5, 6, 3))
        tau = np.array([-0.5, 0.2, -2.0])

        def loss(x):
            return np.sum(numpy(frn_tlu_op(x, None, None, tau)) * upstream)

        _, found = gradients(lambda x: frn_tlu_op(x, None, None, tau), {"x": x}, upstream)
        step = 1e-6
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        # Second-order error of the central difference, 1e-12, over rounding, 1e-16 / 1e-6.
        np.testing.assert_allclose(np.sum(found["x"] * direction), slope, rtol=1e-7)


@pytest.mark.skipif(BACKEND != "jax", reason="forward mode and vmap are written for JAX here")
def test_forward_mode_second_order_and_vmap(rng):
    import jax

    x, direction = rng.normal(size=(2, 2, 5, 6, 3)).astype("float32")
    weights = only(parameters(rng, 3), "gamma", "beta", "tau")

    def loss(x):
        return jax.numpy.sum(frn_tlu_op(x, **weights) ** 2)

    _, forward = jax.jvp(loss, (x,), (direction,))
    backward = jax.numpy.vdot(jax.grad(loss)(x), direction)
    np.testing.assert_allclose(forward, backward, rtol=1e-5)
    hessian_vector = jax.jvp(jax.grad(loss), (x,), (direction,))[1]
    step = 1e-3
    difference = (jax.grad(loss)(x + step * direction) - jax.grad(loss)(x - step * direction)) / (
        2 * step
    )
    kinked = np.abs(hessian_vector - difference) > 0.05 * (1 + np.abs(difference))
    assert kinked.mean() < 0.02, "only elements that cross tau within the step may differ"
    per_sample = jax.vmap(lambda x: frn_tlu_op(x[None], **weights)[0])(x)
    close(per_sample, numpy(frn_tlu_op(x, **weights)), VALUE)


@pytest.mark.skipif(BACKEND != "torch", reason="written for PyTorch here")
# PyTorch's own, where forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_pytorch_forward_mode_second_order_and_vmap(rng):
    import torch
    from torch.autograd import forward_ad

    x, direction = (torch.tensor(a) for a in rng.normal(size=(2, 2, 5, 6, 3)).astype("float32"))
    gamma, beta, tau = only(parameters(rng, 3), "gamma", "beta", "tau").values()

    def as_written(x):
        scale = torch.rsqrt((x * x).mean((1, 2), keepdim=True) + 1e-6)
        gamma_, beta_, tau_ = (torch.tensor(w, dtype=x.dtype) for w in (gamma, beta, tau))
        return torch.maximum(gamma_ * (x * scale) + beta_, tau_)

    def derivatives(function):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad((function(leaf) ** 2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), leaf)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), direction)
            forward = forward_ad.unpack_dual(function(dual)).tangent
        per_sample = torch.func.vmap(lambda x: function(x[None])[0])(x)
        per_sample_gradient = torch.func.vmap(
            torch.func.grad(lambda x: (function(x[None]) ** 2).sum())
        )(x)
        return [
            t.detach().numpy() for t in (first, second, forward, per_sample, per_sample_gradient)
        ]

    ours = derivatives(lambda x: frn_tlu_op(x, gamma, beta, tau))
    for actual, expected in zip(ours, derivatives(as_written), strict=True):
        close(actual, expected, INPUT_GRADIENT)


def test_per_example_gradients(rng):
    """The gradients of single samples, as in differential privacy, add up to that of the batch."""
    x, upstream = rng.normal(size=(2, 4, 6, 5, 3)).astype("float32")
    weights = only(parameters(rng, 3), "gamma", "beta", "tau")

    def run(x, upstream):
        return gradients(lambda **w: frn_tlu_op(x, **w), weights, upstream)[1]

    whole = run(x, upstream)
    singles = [run(x[i : i + 1], upstream[i : i + 1]) for i in range(4)]
    for name in weights:
        close(sum(s[name].astype("float64") for s in singles), whole[name], PARAMETER_GRADIENT)


@pytest.mark.parametrize("alpha", [None, np.zeros(3, "float32")], ids=["plain", "affine"])
def test_symbolic_tensors(alpha):
    x = keras.Input((None, None, 3))
    y = keras_frn.ops.filter_response_normalization(x)
    y = keras_frn.ops.tlu(y, np.zeros(3, "float32"), alpha)
    model = keras.Model(x, y)
    assert model.output_shape == (None, None, None, 3)
    data = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype("float32")
    close(numpy(model(data)), frn_tlu(data, tau=0.0), VALUE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frn(np.zeros(3, "float32")), r"rank 2 or more.*shape=\(3,\)"),
        (lambda: frn(np.zeros((2, 3, 4), "float32"), axis=0), r"not the batch axis.*axis=0"),
        (lambda: frn(np.zeros((2, 3, 4), "float32"), axis=3), r"rank 3.*axis=3"),
        (lambda: frn(np.zeros((2, 0, 4), "float32")), r"spatial position.*x.shape=\(2, 0, 4\)"),
        (lambda: frn(np.zeros((2, 3, 4), "float32"), np.zeros(3)), r"`gamma`.*gamma.shape=\(3,\)"),
        (
            lambda: frn(np.zeros((2, 3, 4), "float32"), mask=np.ones((2, 4), bool)),
            r"mask.shape=\(2, 4\)",
        ),
        (lambda: frn(np.zeros((2, 3, 4), "float32"), epsilon=[1, 2]), r"`epsilon`.*shape=\(2,\)"),
        (
            lambda: tlu(np.zeros((2, 3, 4), "float32"), np.zeros(4), axis=(1, -2)),
            r"different axes.*\(1, -2\)",
        ),
        (
            lambda: frn(np.zeros((2, 3, 3, 4), "float32"), axis=[1, 2]),
            r"`axis` must be one int, the channel axis\. Received: axis=\[1, 2\]",
        ),
        (
            lambda: tlu(np.zeros((2, 3, 4), "float32"), np.zeros(4), axis=(1, 2)),
            r"tau.shape=\(4,\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_warnings_on_ordinary_input():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frn(np.ones((1, 2, 2, 1), "float32"))


def autodiff_case(rng):
    """A smooth place: no position is within 0.01 of its threshold. In float64."""
    x, direction, other = rng.normal(size=(3, 2, 5, 6, 3))
    weights = {"gamma": rng.normal(1.0, 0.3, 3), "beta": rng.normal(size=3)}
    weights["tau"] = np.array([-0.5, 0.2, -0.1])
    distance = frn_tlu(x, weights["gamma"], weights["beta"]) - weights["tau"]
    assert np.min(np.abs(distance)) > 1e-3
    return x, direction, other, weights


def differences(function, x, direction, step=1e-5):
    return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


# A central difference with a step of 1e-5 is off by some 1e-10, squared step, and 1e-16 / 1e-5.
DIFFERENCE = 1e-8


@pytest.mark.skipif(BACKEND != "jax", reason="JAX's transformations")
def test_jax_derivatives_match_finite_differences(rng):
    import jax

    with float64_enabled():
        x, _, other, weights = autodiff_case(rng)
        arguments = {"x": x, **weights}
        along = {name: rng.normal(size=a.shape) for name, a in arguments.items()}

        def loss(arguments):
            return jax.numpy.sum(jax.numpy.sin(frn_tlu_op(**arguments, epsilon=0.1)) * other)

        def shifted(step):
            return {name: a + step * along[name] for name, a in arguments.items()}

        def dot(tree):
            return sum(np.vdot(tree[name], along[name]) for name in tree)

        step = 1e-5
        slope = (loss(shifted(step)) - loss(shifted(-step))) / (2 * step)
        value, tangent = jax.jvp(loss, (arguments,), (along,))
        linear_value, linear = jax.linearize(loss, arguments)
        assert value == linear_value
        for name, found in (
            ("forward mode", tangent),
            ("linearize", linear(along)),
            ("reverse mode", dot(jax.grad(loss)(arguments))),
            ("checkpoint", dot(jax.grad(jax.checkpoint(loss))(arguments))),
        ):
            np.testing.assert_allclose(found, slope, rtol=DIFFERENCE, err_msg=name)

        gradient = jax.grad(loss)
        plus, minus = gradient(shifted(step)), gradient(shifted(-step))
        expected = {name: (plus[name] - minus[name]) / (2 * step) for name in arguments}
        for found in (
            jax.jvp(gradient, (arguments,), (along,))[1],  # forward over reverse
            jax.grad(lambda a: jax.jvp(loss, (a,), (along,))[1])(arguments),  # reverse over forward
            jax.grad(lambda a: dot_traced(gradient(a), along))(arguments),  # reverse over reverse
            jax.linearize(gradient, arguments)[1](along),
            jax.jvp(jax.grad(jax.checkpoint(loss)), (arguments,), (along,))[1],
        ):
            for name in arguments:
                close(found[name], expected[name], DIFFERENCE)


def dot_traced(tree, other):
    return sum((tree[name] * other[name]).sum() for name in tree)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's tapes and accumulators")
def test_tensorflow_derivatives_match_finite_differences(rng):
    import tensorflow as tf

    x, direction, other, weights = autodiff_case(rng)

    def loss(x):
        return tf.reduce_sum(tf.sin(frn_tlu_op(x, **weights, epsilon=0.1)) * other)

    def gradient(x):
        x = tf.convert_to_tensor(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x)
        return tape.gradient(value, x)

    slope = differences(loss, x, direction)
    np.testing.assert_allclose(np.vdot(gradient(x), direction), slope, rtol=DIFFERENCE)
    plus, minus = gradient(x + 1e-5 * direction), gradient(x - 1e-5 * direction)
    expected = (plus - minus) / 2e-5
    primal, tangent = tf.constant(x), tf.constant(direction)
    with tf.autodiff.ForwardAccumulator(primal, tangent) as accumulator:
        value, first = loss(primal), gradient(primal)
    np.testing.assert_allclose(accumulator.jvp(value), slope, rtol=DIFFERENCE)
    close(accumulator.jvp(first), expected, DIFFERENCE)  # forward over reverse
    with tf.GradientTape() as tape:
        tape.watch(primal)
        with tf.autodiff.ForwardAccumulator(primal, tangent) as accumulator:
            value = loss(primal)
        along = accumulator.jvp(value)
    close(tape.gradient(along, primal), expected, DIFFERENCE)  # reverse over forward
    with tf.GradientTape() as tape:
        tape.watch(primal)
        along = tf.reduce_sum(gradient(primal) * tangent)
    close(tape.gradient(along, primal), expected, DIFFERENCE)  # reverse over reverse


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's transformations")
# PyTorch's own, in forward mode and in `linearize`.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_pytorch_derivatives_match_finite_differences(rng):
    import torch
    from torch.func import grad, jvp, linearize

    x, direction, other, weights = autodiff_case(rng)
    x, direction, other = (torch.tensor(a) for a in (x, direction, other))

    def loss(x):
        return torch.sum(torch.sin(frn_tlu_op(x, **weights, epsilon=0.1)) * other)

    def dot(found):
        return float(torch.sum(found * direction))

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)

    slope = float(differences(loss, x, direction))
    leaf = x.clone().requires_grad_()
    (recomputed,) = torch.autograd.grad(checkpointed(leaf), leaf)
    for found in (
        dot(grad(loss)(x)),
        jvp(loss, (x,), (direction,))[1],
        linearize(loss, x)[1](direction),
        dot(recomputed),
    ):
        np.testing.assert_allclose(float(found), slope, rtol=DIFFERENCE)
    expected = differences(grad(loss), x, direction)
    for found in (
        jvp(grad(loss), (x,), (direction,))[1],  # forward over reverse
        grad(lambda x: jvp(loss, (x,), (direction,))[1])(x),  # reverse over forward
        grad(lambda x: torch.sum(grad(loss)(x) * direction))(x),  # reverse over reverse
    ):
        close(found, expected, DIFFERENCE)
