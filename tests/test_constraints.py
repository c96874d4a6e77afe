import keras
import numpy as np
import pytest
from backends import float64_enabled, numpy
from keras import layers

from keras_frn.constraints import ZeroMean

# (layer, shape of its input, axis, the axes of a filter)
KERNELS = {
    "dense": (lambda c: layers.Dense(5, kernel_constraint=c), (4, 6), None, (0,)),
    "conv1d": (lambda c: layers.Conv1D(5, 3, kernel_constraint=c), (4, 8, 6), None, (0, 1)),
    "conv3d": (
        lambda c: layers.Conv3D(2, 2, kernel_constraint=c),
        (2, 4, 4, 4, 3),
        None,
        (0, 1, 2, 3),
    ),
    "grouped": (
        lambda c: layers.Conv2D(4, 3, groups=2, kernel_constraint=c),
        (2, 6, 6, 4),
        None,
        (0, 1, 2),
    ),
    "depthwise": (
        lambda c: layers.DepthwiseConv2D(3, depth_multiplier=2, depthwise_constraint=c),
        (2, 6, 6, 4),
        (0, 1),
        (0, 1),
    ),
    "transposed": (
        lambda c: layers.Conv2DTranspose(5, 3, kernel_constraint=c),
        (2, 6, 6, 4),
        (0, 1, -1),
        (0, 1, 3),
    ),
}


def trained(layer, x, dtype="float32"):
    """The kernel after one step of SGD, as `fit` does it."""
    # Keras' grouped convolution has no gradient on TensorFlow's CPU outside of XLA.
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=dtype), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=keras.backend.backend() != "torch")
    model.fit(x, np.ones((len(x), *model.output_shape[1:]), dtype), verbose=0)
    return numpy(layer.kernel)


@pytest.mark.parametrize("kind", KERNELS)
def test_every_kernel_has_zero_mean_after_a_step(kind, rng):
    make, shape, axis, axes = KERNELS[kind]
    kernel = trained(make(ZeroMean(axis)), rng.normal(size=shape).astype("float32"))
    # The sum of some tens of numbers below 1, each rounded in float32.
    assert np.abs(kernel.mean(axes)).max() < 1e-7
    assert kernel.std(axes).min() > 1e-3, "a filter is more than its mean"


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1), [0, 1, 3]])
def test_value_matches_numpy(axis, rng):
    kernel = rng.normal(1.0, size=(3, 3, 4, 5)).astype("float32")
    axes = (0, 1, 2) if axis is None else axis
    expected = kernel - np.mean(kernel, axis=tuple(np.atleast_1d(axes)), keepdims=True)
    # Two roundings of float32 in numbers up to 4.
    np.testing.assert_allclose(numpy(ZeroMean(axis)(kernel)), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sums_in_float32(dtype, rng):
    kernel = keras.ops.cast(rng.normal(100.0, size=(64, 64, 8)).astype("float32"), dtype)
    z = ZeroMean()(kernel)
    assert keras.backend.standardize_dtype(z.dtype) == dtype
    exact = numpy(keras.ops.cast(kernel, "float32")).astype("float64")
    exact -= exact.mean((0, 1))
    # Half of the last digit of the result, which is up to 5: a sum in half precision is off by 1.
    error = np.abs(numpy(keras.ops.cast(z, "float32")) - exact)
    assert error.max() < {"float16": 2e-3, "bfloat16": 2e-2}[dtype]


def test_float64_keeps_its_precision(rng):
    with float64_enabled():
        kernel = keras.Variable(rng.normal(1.0, size=(3, 3, 4, 5)), dtype="float64")
        z = ZeroMean()(kernel)
        assert keras.backend.standardize_dtype(z.dtype) == "float64"
        assert np.abs(numpy(z).mean((0, 1, 2))).max() < 1e-15


def test_constraint_survives_save_and_load(tmp_path, rng):
    x = rng.normal(size=(4, 6, 6, 3)).astype("float32")
    model = keras.Sequential([keras.Input((6, 6, 3))])
    model.add(layers.DepthwiseConv2D(3, depthwise_constraint=ZeroMean((0, 1))))
    model.add(layers.Conv2D(2, 3, kernel_constraint=ZeroMean()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    first, second = (loaded.layers[i].get_config() for i in (0, 1))
    assert first["depthwise_constraint"]["registered_name"] == "keras_frn>ZeroMean"
    assert tuple(loaded.layers[0].depthwise_constraint.axis) == (0, 1)
    assert second["kernel_constraint"]["config"] == {"axis": None}
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


@pytest.mark.parametrize("axis", [True, 1.0, "channels", (), (0, 0), (0, None)])
def test_axis_is_checked(axis):
    with pytest.raises(ValueError, match=r"`axis` must be an int, .*Received: axis=.*None takes"):
        ZeroMean(axis)


@pytest.mark.parametrize(
    ("axis", "shape"),
    [
        (None, (5,)),
        (None, (1, 1, 1, 8)),
        (4, (3, 3, 4, 5)),
        ((0, 1), (1, 1, 4, 2)),
        ((0, 1), (3, 4)),
    ],
)
def test_axis_is_checked_against_the_kernel(axis, shape):
    with pytest.raises(ValueError, match=r"`axis` must name .*Received: axis=.*kernel of shape"):
        ZeroMean(axis)(np.ones(shape, "float32"))
