"""Two functions whose automatic gradient is slow, with a gradient written by hand where it helps.

`maximum` has the values of `max(y, tau)`, to the bit. `benchmarks/FINDINGS.md` has what each
gradient gains in a network."""

import functools
import math

import keras
from keras import ops

# TensorFlow's CPU kernels add in sequence: the root mean square of 3,136 numbers is off by 3e-7 to
# 9e-7, that of 885 thousand by 2e-5, and by 1e-7 where it is the mean of means.
_LONGEST_SUM = 4096


def mean_square(x, axes):
    """The mean of `x * x` over some axes, which stay with size 1."""
    if keras.backend.backend() == "tensorflow" and not keras.backend.is_keras_tensor(x):
        return _tensorflow_mean_square(x, axes)
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        # `ops.mean` has an error of 6e-8 in float64 on JAX, as it computes in float32.
        return ops.sum(x * x, axes, keepdims=True) / _count(x, axes)
    return ops.mean(x * x, axes, keepdims=True)


def maximum(y, tau):
    """The larger of `y` and `tau`, which has y's rank. A NaN in either gives NaN. Where the two are
    equal the gradient is tau's, as the gradient of a ReLU is 0 at 0."""
    backend = keras.backend.backend()
    if backend == "tensorflow" and not keras.backend.is_keras_tensor(y):
        return _tensorflow_maximum(y, tau)
    if backend == "torch" and not keras.backend.is_keras_tensor(y):
        return _torch_maximum(y, tau)
    return _selected(y, tau)


def where(condition, a, b):
    """`a` where the condition holds and `b` elsewhere, in the dtype of both."""
    if keras.backend.backend() == "torch" and not keras.backend.is_keras_tensor(condition):
        import torch

        return torch.where(condition, a, b)  # Keras 3.15's brings float64 to float32 here
    return ops.where(condition, a, b)


def _selected(y, tau):
    # Not `ops.maximum`, whose gradient on JAX counts ties: 4 to 10 % of a network's step. A tau
    # that is not equal to itself is NaN.
    return where((y <= tau) | (tau != tau), tau, y)


def _count(x, axes):
    """The number of positions along some axes, or None where it is not known."""
    sizes = [x.shape[axis] for axis in axes]
    return None if None in sizes else math.prod(sizes)


def _tensorflow_mean_square(x, axes):
    import tensorflow as tf

    @tf.custom_gradient
    def mean_square(x):
        count = _count(x, axes)
        if count is None:
            count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)), x.dtype)
        # The gradient of a mean is spread and divided at full size, that of x * x is two products.
        return _tensorflow_mean(x * x, axes), lambda upstream: x * (upstream * 2.0 / count)

    return mean_square(x)


def _tensorflow_mean(x, axes):
    import tensorflow as tf

    count, channels = _count(x, axes), x.shape[-1]
    is_channels_last = axes == tuple(range(1, len(x.shape) - 1))
    is_short = count is None or count <= _LONGEST_SUM
    if is_short or channels is None or not is_channels_last or _has_accelerator():
        return tf.reduce_mean(x, axes, keepdims=True)
    parts = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    x = tf.reshape(x, (-1, parts, count // parts, channels))
    means = tf.reduce_mean(tf.reduce_mean(x, 2), 1)
    return tf.reshape(means, (-1, *(1 for _ in axes), channels))


@functools.cache
def _has_accelerator():
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU") or tf.config.list_physical_devices("TPU"))


def _tensorflow_maximum(y, tau):
    import tensorflow as tf

    @tf.custom_gradient
    def maximum(y, tau):
        z = tf.maximum(y, tau)

        def gradient(upstream):
            # One kernel, where the gradient of `tf.maximum` compares and selects.
            above = tf.raw_ops.ReluGrad(gradients=upstream, features=z - tau)
            # The sum of `upstream - above` within each sample, then over the batch. A difference
            # of sums loses digits where few positions are below tau; the sum of differences is one
            # more pass, 5 % of a network's step.
            shared = [axis for axis, size in enumerate(tau.shape) if size == 1]
            within = [axis for axis in shared if axis > 0]
            over_batch = [axis for axis in shared if axis == 0]
            total, kept = (tf.reduce_sum(g, within, keepdims=True) for g in (upstream, above))
            return above, tf.reduce_sum(total - kept, over_batch, keepdims=True)

        return z, gradient

    return maximum(y, tau)


def _torch_maximum(y, tau):
    import torch

    # Compilers and tracers do not look into a function of our own.
    if torch.compiler.is_compiling():
        return _selected(y, tau)
    if torch.jit.is_tracing():
        return torch.clamp(y, min=tau)
    return _torch_maximum_function().apply(y, tau)


@functools.cache
def _torch_maximum_function():
    import torch

    class Maximum(torch.autograd.Function):
        """`torch.maximum` with the gradient of a ReLU, one kernel instead of four."""

        generate_vmap_rule = True

        @staticmethod
        def forward(y, tau):
            return torch.maximum(y, tau)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output, inputs[1])
            ctx.save_for_forward(output, inputs[1])

        @staticmethod
        def backward(ctx, upstream):
            z, tau = ctx.saved_tensors
            above = torch.ops.aten.threshold_backward(upstream, z - tau, 0)
            return above, (upstream - above).sum_to_size(tau.shape)

        @staticmethod
        def jvp(ctx, y, tau):
            z, threshold = ctx.saved_tensors
            return torch.where(z > threshold, y, tau)

    return Maximum
