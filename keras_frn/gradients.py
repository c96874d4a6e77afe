"""The mean square and the maximum, in the form that each backend runs best.

What XLA compiles, on JAX and on TensorFlow, has one form, chosen by what XLA makes of it on a GPU
and a TPU (`benchmarks/accelerators.py`). TensorFlow's own kernels and PyTorch's have gradients
written by hand, each for at least 5% of a network's step (`benchmarks/README.md`)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from .typing import Tensor

# TensorFlow's CPU kernels add in sequence: the root mean square of 3,136 numbers is off by 3e-7 to
# 9e-7, that of 885 thousand by 2e-5, and by 1e-7 where it is the mean of means.
_LONGEST_SUM = 4096


def mean_square(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The mean of `x * x` over some axes, which stay with size 1."""
    if _runs_in_tensorflow_kernels(x):
        return _tensorflow_mean_square(x, axes)
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        # `ops.mean` has an error of 6e-8 in float64 on JAX, as it computes in float32.
        return ops.sum(x * x, axes, keepdims=True) / _count(x, axes)
    return ops.mean(x * x, axes, keepdims=True)


def maximum(y: Tensor, tau: Tensor) -> Tensor:
    """The larger of `y` and `tau`, which has y's rank. A NaN in either gives NaN. If the two are
    equal the gradient is tau's, as the gradient of a ReLU is 0 at 0."""
    backend = keras.backend.backend()
    if keras.backend.is_keras_tensor(y):
        return _select(y, tau)
    if backend == "jax":
        return _jax_maximum()(y, tau)
    if backend == "tensorflow":
        return _tensorflow_maximum(y, tau)
    if backend == "torch":
        return _torch_maximum(y, tau)
    return _select(y, tau)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a` if the condition holds, else `b`, in the dtype of both."""
    if keras.backend.backend() == "torch" and not keras.backend.is_keras_tensor(condition):
        import torch

        return torch.where(condition, a, b)  # Keras 3.15's brings float64 to float32 here
    return ops.where(condition, a, b)


def _select(y: Tensor, tau: Tensor) -> Tensor:
    # Not `ops.maximum`, whose gradient is half at a tie. A tau that is not equal to itself is NaN.
    return where((y <= tau) | (tau != tau), tau, y)


def _count(x: Tensor, axes: tuple[int, ...]) -> int | None:
    """The number of positions along some axes, or None if it is not known."""
    sizes = [x.shape[axis] for axis in axes]
    return None if None in sizes else math.prod(sizes)


@functools.cache
def _jax_maximum() -> Callable[[Tensor, Tensor], Tensor]:
    import jax
    import jax.numpy as jnp

    @jax.custom_jvp
    def maximum(y: Tensor, tau: Tensor) -> Tensor:
        return jnp.maximum(y, tau)

    @maximum.defjvp
    def tangent(primals: Any, tangents: Any) -> Any:
        (y, tau), (dy, dtau) = primals, tangents
        # Two comparisons: XLA would keep the result of a single one, as it has two uses, and write
        # and read it as an array of bytes.
        return maximum(y, tau), jnp.where(y <= tau, 0, dy) + jnp.where(y > tau, 0, dtau)

    return maximum


def _runs_in_tensorflow_kernels(x: Tensor) -> bool:
    """Whether TensorFlow computes `x` operator by operator, and not in a program of XLA."""
    if keras.backend.backend() != "tensorflow" or keras.backend.is_keras_tensor(x):
        return False
    import tensorflow as tf

    # There is no public way to ask whether what is traced is for `jit_compile=True`.
    from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

    if isinstance(x, tf.RaggedTensor):
        return False  # the gradients by hand are those of dense tensors
    is_graph = not tf.executing_eagerly()
    return not (is_graph and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def _tensorflow_mean_square(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    import tensorflow as tf

    @tf.custom_gradient
    def mean_square(x: Tensor) -> Any:
        count = _count(x, axes)
        if count is None:
            count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), axes)), x.dtype)
        # The gradient of a mean is spread and divided at full size, that of x * x is two products.
        return _tensorflow_mean(x * x, axes), lambda upstream: x * (upstream * 2.0 / count)

    return mean_square(x)


def _tensorflow_mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    import tensorflow as tf

    count, channels = _count(x, axes), x.shape[-1]
    is_channels_last = axes == tuple(range(1, len(x.shape) - 1))
    if count is None or count <= _LONGEST_SUM or channels is None or not is_channels_last:
        return tf.reduce_mean(x, axes, keepdims=True)
    parts = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    x = tf.reshape(x, (-1, parts, count // parts, channels))
    means = tf.reduce_mean(tf.reduce_mean(x, 2), 1)
    return tf.reshape(means, (-1, *(1 for _ in axes), channels))


def _tensorflow_maximum(y: Tensor, tau: Tensor) -> Tensor:
    import tensorflow as tf

    runs_in_kernels = _runs_in_tensorflow_kernels(y)

    @tf.custom_gradient
    def maximum(y: Tensor, tau: Tensor) -> Any:
        z = tf.maximum(y, tau)
        shared = [axis for axis, size in enumerate(tau.shape) if size == 1]

        def gradient_in_xla(upstream: Tensor) -> Any:
            # Two comparisons, as on JAX.
            zeros = tf.zeros_like(upstream)
            below = tf.where(y > tau, zeros, upstream)
            return tf.where(y <= tau, zeros, upstream), tf.reduce_sum(below, shared, keepdims=True)

        def gradient_in_kernels(upstream: Tensor) -> Any:
            # One kernel, where the gradient of `tf.maximum` compares and selects.
            above = tf.raw_ops.ReluGrad(gradients=upstream, features=z - tau)
            # The sum of `upstream - above` within each sample, then over the batch. A difference
            # of sums loses digits where few positions are below tau; the sum of differences is one
            # more pass, 5% of a network's step.
            within = [axis for axis in shared if axis > 0]
            over_batch = [axis for axis in shared if axis == 0]
            total, kept = (tf.reduce_sum(g, within, keepdims=True) for g in (upstream, above))
            return above, tf.reduce_sum(total - kept, over_batch, keepdims=True)

        return z, gradient_in_kernels if runs_in_kernels else gradient_in_xla

    return maximum(y, tau)


def _torch_maximum(y: Tensor, tau: Tensor) -> Tensor:
    import torch

    # Compilers and tracers do not look into a function of our own.
    if torch.compiler.is_compiling():
        return _select(y, tau)
    jit: Any = torch.jit  # whose types do not list what it documents
    if jit.is_tracing():
        return torch.maximum(y, tau)
    return _torch_maximum_function().apply(y, tau)


@functools.cache
def _torch_maximum_function() -> Any:
    import torch

    class Maximum(torch.autograd.Function):
        """`torch.maximum` with the gradient of a ReLU, one kernel instead of four."""

        generate_vmap_rule = True

        @staticmethod
        def forward(y: Tensor, tau: Tensor) -> Tensor:
            return torch.maximum(y, tau)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            ctx.save_for_backward(output, inputs[1])
            ctx.save_for_forward(output, inputs[1])

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
            z, tau = ctx.saved_tensors
            above = torch.ops.aten.threshold_backward(upstream, z - tau, 0)
            return above, (upstream - above).sum_to_size(tau.shape)

        @staticmethod
        def jvp(ctx: Any, y: Tensor, tau: Tensor) -> Tensor:
            z, threshold = ctx.saved_tensors
            return torch.where(z > threshold, y, tau)

    return Maximum
