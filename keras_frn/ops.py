"""The formulas, on `keras.ops`: pure functions of their arguments, on any backend.

Each has two forms with the same values. The *gradient form* keeps no full-size tensor but its input
for the backward pass, and is what XLA compiles best; the *inference form* has the fewest operators
in an exported graph. `training` chooses."""

import math

import keras
import numpy as np
from keras import ops

from .compilation import (
    adds_in_trees,
    divides_gradients_of_means,
    folds_sums,
    maximum,
    maximum_plus,
    outside_cluster,
    square,
    summed_apart,
    use_gradient_form,
    where,
)

# TensorFlow's kernels add in sequence: the root mean square of 3,136 numbers is off by 3e-7 to
# 9e-7, that of 885 thousand by 2e-5, and by 1e-7 where it is the mean of means.
_LONGEST_SUM = 4096


def filter_response_normalization(
    x, gamma=None, beta=None, axis=-1, epsilon=1e-6, mask=None, training=False
):
    """Filter Response Normalization of each channel of each sample.

    ```
    nu2 = mean(x * x)                              over the spatial positions
    y   = gamma * x / sqrt(nu2 + epsilon) + beta
    ```

    Half precision is computed in float32. Squares overflow float32 above `|x| = 1.8e19`.

    Shape: `x` is `(batch, *spatial, channels)` or, with `axis=1`, `(batch, channels, *spatial)`, of
    rank 2 or more. The output has the same shape.

    Args:
        x: Float or integer tensor.
        gamma: Scale, `(channels,)`, or None. Defaults to None.
        beta: Offset, `(channels,)`, or None. Defaults to None.
        axis: The channel axis. Defaults to -1.
        epsilon: Added to the mean square: a float, a sequence of one float per channel, or a tensor
            of one element or of one per channel. Defaults to 1e-6.
        mask: True where a position counts in the mean; its shape is that of `x` without the channel
            axis, or a leading part of it. Positions that do not count are normalized with the same
            statistics. Defaults to None.
        training: True for the form with the cheapest gradient, False for the one with the fewest
            operators; they agree to rounding. Defaults to False.

    Returns:
        A tensor of x's shape and dtype (`keras.config.floatx()` for integers).

    Raises:
        ValueError: if the rank is below 2, there is no spatial position, or `axis` or `mask` do not
            fit.

    Example:

    >>> x = np.array([[[3.0], [4.0]]])  # one sample, two positions, one channel
    >>> y = keras_frn.ops.filter_response_normalization(x)  # x / sqrt(12.5)

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""
    x, dtype = _in_statistics_dtype(x)
    axis = _channel_axis(axis, x.shape)
    gradient_form = _use_gradient_form(x, training)
    gamma = _checked("gamma", gamma, x, (axis,))
    beta = _checked("beta", beta, x, (axis,))
    epsilon = _checked("epsilon", epsilon, x, (axis,))
    shape = ops.shape(x)
    x, axis, partial = _folded(x, axis, mask, gradient_form)
    y = _scaled(x, gamma, axis, epsilon, mask, gradient_form, partial)
    if beta is not None:
        beta = _aligned(beta, x, (axis,))
        y = y + (_spread(_per_sample(beta, x), x, partial) if gradient_form else beta)
    return _unfolded(y, dtype, shape, partial)


def tlu(x, tau, alpha=None, axis=-1, training=False):
    """Thresholded Linear Unit.

    ```
    z = max(x, tau)            or, with alpha,    z = max(x, alpha * x + tau)
    ```

    The result is the maximum to the last bit, for every tau, infinities included. Half precision is
    computed in float32.

    Shape: `x` has rank 2 or more; the output has the same shape.

    Args:
        x: Float or integer tensor.
        tau: Threshold: the sizes of `x` along `axis`, axes in ascending order.
        alpha: Slope below the threshold, of tau's shape, or None. Defaults to None.
        axis: The axes along which tau varies, an int or a tuple without the batch axis. Defaults to
            -1.
        training: True for the form with the cheapest gradient, False for the one with the fewest
            operators; the values are the same. Defaults to False.

    Returns:
        A tensor of x's shape and dtype (`keras.config.floatx()` for integers).

    Raises:
        ValueError: if the rank is below 2 or `axis` does not fit.

    Example:

    >>> z = keras_frn.ops.tlu(np.array([[-2.0, 3.0]]), tau=np.array([-1.0, 0.0]))  # [[-1.0, 3.0]]

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""
    x, dtype = _in_statistics_dtype(x)
    axes = _threshold_axes(axis, x.shape)
    gradient_form = _use_gradient_form(x, training)
    tau = _aligned(_checked("tau", tau, x, axes), x, axes)
    if alpha is not None:
        alpha = _aligned(_checked("alpha", alpha, x, axes), x, axes)
        z = _affine_tlu(x, tau, alpha, gradient_form)
    elif gradient_form:
        detour = _detour(tau)
        if len(axes) == 1:
            detour = _per_sample(detour, x)
        z = maximum(x - detour, ops.stop_gradient(tau)) + detour
    else:
        z = ops.maximum(x, tau)
    return ops.cast(z, dtype)


def filter_response_normalization_tlu(
    x, gamma, beta, tau, alpha=None, axis=-1, epsilon=1e-6, mask=None, training=False
):
    """Filter Response Normalization and Thresholded Linear Unit in one step.

    ```
    nu2 = mean(x * x)                              over the spatial positions
    y   = gamma * x / sqrt(nu2 + epsilon) + beta
    z   = max(y, tau)                              or, with alpha,    z = max(y, alpha * y + tau)
    ```

    Equal to `tlu(filter_response_normalization(x, ...), tau)` and cheaper where a compiler does not
    fuse the two.

    Shape: `x` is `(batch, *spatial, channels)` or, with `axis=1`, `(batch, channels, *spatial)`, of
    rank 2 or more. The output has the same shape.

    Args:
        x: Float or integer tensor.
        gamma: Scale, `(channels,)`, or None.
        beta: Offset, `(channels,)`, or None.
        tau: Threshold, `(channels,)`.
        alpha: Slope below the threshold, `(channels,)`, or None. Defaults to None.
        axis, epsilon, mask, training: As in `filter_response_normalization`.

    Returns:
        A tensor of x's shape and dtype (`keras.config.floatx()` for integers).

    Raises:
        ValueError: if the rank is below 2, there is no spatial position, or `axis` or `mask` do not
            fit.

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""
    x, dtype = _in_statistics_dtype(x)
    axis = _channel_axis(axis, x.shape)
    gradient_form = _use_gradient_form(x, training)
    gamma = _checked("gamma", gamma, x, (axis,))
    beta = _checked("beta", beta, x, (axis,))
    tau = _checked("tau", tau, x, (axis,))
    alpha = _checked("alpha", alpha, x, (axis,))
    epsilon = _checked("epsilon", epsilon, x, (axis,))
    shape = ops.shape(x)
    x, axis, partial = _folded(x, axis, mask, gradient_form)
    y = _scaled(x, gamma, axis, epsilon, mask, gradient_form, partial)
    tau, offset = _aligned(tau, x, (axis,)), _aligned(beta, x, (axis,))
    if gradient_form and offset is not None:
        offset = _per_sample(offset, x)
    detour = None
    if gradient_form and alpha is None:
        detour = _per_sample(_detour(tau), x)
        offset = -detour if offset is None else offset - detour
    if offset is not None:
        y = y + (_spread(offset, x, partial) if gradient_form else offset)
    if alpha is not None:
        z = _affine_tlu(y, tau, _aligned(alpha, x, (axis,)), gradient_form)
    elif detour is not None:
        z = maximum_plus(y, ops.stop_gradient(tau), detour)
    else:
        z = ops.maximum(y, tau)
    return _unfolded(z, dtype, shape, partial)


def _folded(x, axis, mask, gradient_form):
    """x as (batch, few, rest, channels), its channel axis, and the axis of the few positions.

    Where few terms are summed first, XLA sums products without writing them: under TensorFlow's
    XLA, forward + backward at 32x56x56x64 take 12 ms instead of 19, forward 3 instead of 5. (It
    cuts a sum over more than 32 positions in two, and writes what the first part sums.) JAX's XLA
    and PyTorch sum the axes of x best: then x and None, as where a size is not known."""
    positions = x.shape[1:-1]
    if not folds_sums(gradient_form) or mask is not None:
        return x, axis, None
    if axis != len(x.shape) - 1 or None in positions:
        return x, axis, None
    # More than eight, at distances that are powers of two, do not fit in a cache side by side.
    few = _largest_divisor(math.prod(positions), 8)
    if few == 1:
        return x, axis, None
    shape = (ops.shape(x)[0], few, math.prod(positions) // few, x.shape[-1])
    with outside_cluster():
        return ops.reshape(x, shape), 3, 1


def _unfolded(x, dtype, shape, partial):
    x = ops.cast(x, dtype)  # first, so that a cluster, which ends here, returns this dtype
    if partial is None:
        return x
    with outside_cluster():
        return ops.reshape(x, shape)


def _spread(parameter, x, axis):
    """The parameter repeated over all positions but those of `axis`, so that the sums of its
    gradient are made over `axis` first. The factors, exact powers of two, keep XLA from making
    one sum of the two."""
    if axis is None:
        return parameter
    shape = list(ops.shape(x))
    shape[axis] = 1
    return ops.broadcast_to(parameter * 0.5, shape) * 2.0


def _scaled(x, gamma, axis, epsilon, mask, gradient_form, partial):
    """gamma * x / sqrt(nu2 + epsilon), with one number per sample and channel, so that x is
    multiplied once."""
    spatial = tuple(i for i in range(1, len(x.shape)) if i != axis)
    if any(x.shape[i] == 0 for i in spatial):
        raise ValueError(
            f"`x` must have at least one spatial position. Received: x.shape={tuple(x.shape)}. "
            "The mean square of no values is undefined."
        )
    if partial is None:
        # The last one first: at 1x64x64x64x16 JAX's XLA sums the squares in 0.8 ms so, and in 18 ms
        # the other way round.
        spatial = spatial[::-1]
    in_parts = gradient_form or partial is not None
    # Quantization tools address the statistics by this name.
    with keras.name_scope("frn_statistics"):
        if mask is None:
            squares = square(x) if gradient_form else x * x
            nu2 = _mean(squares, spatial, in_parts)
        else:
            kept = _aligned_mask(mask, x, axis)
            # Zeros go in before the square, so that neither the value nor the gradient of
            # what is masked can spoil the mean.
            kept_x = where(kept, x, ops.zeros_like(x))
            share = _mean(ops.cast(kept, x.dtype), spatial, in_parts)
            share = where(share > 0, share, ops.ones_like(share))
            nu2 = _mean(kept_x * kept_x, spatial, in_parts) / share
        scale = ops.rsqrt(nu2 + _aligned(epsilon, x, (axis,)))
        if gradient_form:
            scale = _spread(scale, x, partial)
        if gamma is not None:
            # After the spreading: a partial sum that has two uses is not computed in each.
            gamma = _aligned(gamma, x, (axis,))
            alone = gradient_form and partial is None
            scale = scale * (_per_sample(gamma, x) if alone else gamma)
    return x * scale


def _mean(x, axes, in_parts):
    sizes = [x.shape[axis] for axis in axes]
    if adds_in_trees() or (not in_parts and (None in sizes or math.prod(sizes) <= _LONGEST_SUM)):
        return _mean_over(x, axes)
    # One axis at a time: partial sums keep the rounding error small.
    for axis in axes:
        parts = _parts(x.shape[axis])
        if parts > 1 and sum(size is None for size in x.shape) <= 1:
            shape = [-1 if size is None else size for size in x.shape]
            shape[axis : axis + 1] = [parts, shape[axis] // parts]
            x = ops.squeeze(_mean_over(ops.reshape(x, shape), (axis + 1,)), axis + 1)
        x = _mean_over(x, (axis,))
    return x


def _mean_over(x, axes):
    sizes = [x.shape[axis] for axis in axes]
    is_float64 = keras.backend.standardize_dtype(x.dtype) == "float64"
    # `ops.mean` has an error of 6e-8 in float64 on JAX, as it computes in float32.
    if None not in sizes and (is_float64 or divides_gradients_of_means()):
        return ops.sum(x, axis=axes, keepdims=True) / math.prod(sizes)
    return ops.mean(x, axis=axes, keepdims=True)


def _parts(size):
    """How many parts to sum a long axis in."""
    if not isinstance(size, int) or size <= _LONGEST_SUM:  # JAX exports have symbols for sizes
        return 1
    return _largest_divisor(size, math.isqrt(size))


def _largest_divisor(size, limit):
    """The largest divisor up to a limit; 1 of a size of 0."""
    return next((n for n in range(min(limit, size), 1, -1) if size % n == 0), 1)


def _affine_tlu(y, tau, alpha, gradient_form):
    line = alpha * y + tau
    return maximum(y, line) if gradient_form else ops.maximum(y, line)


def _detour(tau):
    """Zeros that carry tau's gradient.

    With d = tau - constant(tau), max(y, tau) = max(y - d, constant(tau)) + d, to the bit, as d is
    zero. The gradient of tau becomes the sum of all gradients less the sum of those that reach y,
    which beta needs anyway: no mask and no second selection are kept for it."""
    limit = float(np.finfo(keras.backend.standardize_dtype(tau.dtype)).max)
    finite = ops.clip(tau, -limit, limit)  # inf - inf is not zero
    return finite - ops.stop_gradient(finite)


def _per_sample(parameter, x):
    """The parameter repeated over the batch, so that its gradient is summed within each sample
    first, in one pass with the other sums over the sample, and with less rounding."""
    if adds_in_trees():
        return parameter
    return summed_apart(ops.broadcast_to(parameter, (ops.shape(x)[0], *parameter.shape[1:])))


def _use_gradient_form(x, training):
    # The batch size, which the gradient form needs, is not known of a symbolic tensor.
    return use_gradient_form(training) and not keras.backend.is_keras_tensor(x)


def _in_statistics_dtype(x):
    """x in float32 or wider, and the dtype of the result."""
    if not keras.backend.is_keras_tensor(x):
        x = ops.convert_to_tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if not keras.backend.is_float_dtype(dtype):
        dtype = keras.config.floatx()
    with outside_cluster():  # as the reshape that may follow
        return ops.cast(x, "float64" if dtype == "float64" else "float32"), dtype


def _checked(name, parameter, x, axes):
    """A parameter as a tensor of x's dtype that has one element, or x's sizes along `axes`."""
    if parameter is None or (name == "epsilon" and isinstance(parameter, (int, float))):
        return parameter
    if isinstance(parameter, (int, float, list, tuple, np.ndarray)):
        # Through NumPy, as some backends bring Python floats to float64 by way of float32.
        parameter = np.asarray(parameter, keras.backend.standardize_dtype(x.dtype))
    parameter = ops.cast(parameter, x.dtype)
    sizes = tuple(x.shape[axis] for axis in axes)
    received = tuple(parameter.shape)
    if received in ((), (1,)):
        return parameter
    if len(received) != len(sizes) or any(s not in (r, None) for s, r in zip(sizes, received)):
        raise ValueError(
            f"`{name}` must have the sizes of `x` along axis {axes}, {sizes}. Received: "
            f"{name}.shape={received}, x.shape={tuple(x.shape)}. Reshape it, or name the axes "
            "along which it varies."
        )
    return parameter


def _aligned(parameter, x, axes):
    """A checked parameter in x's rank, with its sizes at `axes`: converters want constants of the
    full rank."""
    if parameter is None or isinstance(parameter, (int, float)):
        return parameter
    shape = [1] * len(x.shape)
    if tuple(parameter.shape) not in ((), (1,)):
        for axis, size in zip(axes, parameter.shape):
            shape[axis] = size
    return ops.reshape(parameter, shape)


def _aligned_mask(mask, x, axis):
    """The mask as booleans of x's rank, 1 along the channel axis and wherever it does not reach."""
    mask = ops.cast(mask, "bool")
    shape = tuple(x.shape)
    masked = shape[:axis] + shape[axis + 1 :]
    received = tuple(mask.shape)
    if not 1 <= len(received) <= len(masked) or any(
        None not in (m, s) and m != s for m, s in zip(received, masked)
    ):
        raise ValueError(
            "`mask` must have the shape of `x` without the channel axis, or a leading part of it. "
            f"Received: mask.shape={received}, x.shape={shape}, channel axis={axis}. Use one "
            "boolean per position."
        )
    for _ in range(len(masked) - len(received)):
        mask = ops.expand_dims(mask, -1)
    return ops.expand_dims(mask, axis)


def _channel_axis(axis, shape):
    rank = len(shape)
    if rank < 2:
        raise ValueError(
            "`x` must have rank 2 or more, (batch, ..., channels). Received: "
            f"x.shape={tuple(shape)}. Add the missing axis."
        )
    channel = axis + rank if axis < 0 else axis
    if not 0 < channel < rank:
        raise ValueError(
            f"`axis` must be an axis of an input of rank {rank}, and not the batch axis. Received: "
            f"axis={axis}. Use -1 for channels-last and 1 for channels-first data."
        )
    return channel


def _threshold_axes(axis, shape):
    axes = axis if isinstance(axis, (list, tuple)) else (axis,)
    axes = tuple(sorted(_channel_axis(a, shape) for a in axes))
    if len(set(axes)) != len(axes) or not axes:
        raise ValueError(
            f"`axis` must name different axes. Received: axis={axis}. Name each axis once."
        )
    return axes
