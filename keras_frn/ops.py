"""The formulas, on `keras.ops`: pure functions of their arguments, on any backend."""

import keras
import numpy as np
from keras import ops

from .gradients import maximum, mean_square, where


def filter_response_normalization(x, gamma=None, beta=None, axis=-1, epsilon=1e-6, mask=None):
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
        gamma: Scale, `(channels,)`, or None for 1. Defaults to None.
        beta: Offset, `(channels,)`, or None for 0. Defaults to None.
        axis: Int, the channel axis. Defaults to -1.
        epsilon: Added to the mean square: a float, or a sequence or tensor of one element or of one
            per channel. Defaults to 1e-6.
        mask: True where a position counts in the mean; its shape is that of `x` without the channel
            axis, or a leading part of it. Other positions are normalized, too. Defaults to None.

    Returns:
        A tensor of x's shape and dtype (`keras.config.floatx()` for integers).

    Raises:
        ValueError: if there is no spatial position, `axis` is the batch axis or none of `x`, or the
            shape of a parameter or of `mask` does not fit that of `x`.

    Example:

    >>> x = np.array([[[3.0], [4.0]]])  # one sample, two positions, one channel
    >>> y = keras_frn.ops.filter_response_normalization(x)  # x / sqrt(12.5)

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""
    x, dtype = _in_statistics_dtype(x)
    axis = _channel_axis(axis, x.shape)
    return cast(_normalized(x, gamma, beta, axis, epsilon, mask), dtype)


def tlu(x, tau, alpha=None, axis=-1):
    """Thresholded Linear Unit, the maximum to the last bit, for every tau, infinities included.

    ```
    z = max(x, tau)            or, with alpha,    z = max(x, alpha * x + tau)
    ```

    Shape: `x` has rank 2 or more. The output has the same shape.

    Args:
        x: Float or integer tensor.
        tau: Threshold: the sizes of `x` along `axis`, axes in ascending order.
        alpha: Slope below the threshold, of tau's shape, or None for 0. Defaults to None.
        axis: The axes along which tau varies, an int or a tuple. Defaults to -1.

    Returns:
        A tensor of x's shape and dtype (`keras.config.floatx()` for integers).

    Raises:
        ValueError: if `axis` names the batch axis, an axis twice or none of `x`, or the shape of
            `tau` or `alpha` does not fit that of `x`.

    Example:

    >>> z = keras_frn.ops.tlu(np.array([[-2.0, 3.0]]), tau=np.array([-1.0, 0.0]))  # [[-1, 3]]

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""
    x, dtype = _in_statistics_dtype(x)
    axes = sorted_axes(axis, x.shape)
    return cast(_thresholded(x, tau, alpha, axes), dtype)


def filter_response_normalization_tlu(
    x, gamma=None, beta=None, tau=0.0, alpha=None, axis=-1, epsilon=1e-6, mask=None
):
    """Filter Response Normalization and Thresholded Linear Unit in one step.

    ```
    z = max(y, tau)            or, with alpha,    z = max(y, alpha * y + tau)
    ```

    where y is `filter_response_normalization(x, gamma, beta, axis, epsilon, mask)`. Equal to the
    two operations one after the other; in half precision it rounds once and not twice.

    Shape: as in `filter_response_normalization`.

    Args:
        x, gamma, beta, axis, epsilon, mask: As in `filter_response_normalization`.
        tau: Threshold, `(channels,)` or a float. Defaults to 0, a ReLU.
        alpha: Slope below the threshold, `(channels,)`, or None for 0. Defaults to None.

    Returns:
        A tensor of x's shape and dtype (`keras.config.floatx()` for integers).

    Raises:
        ValueError: as in `filter_response_normalization` and `tlu`.

    Example:

    >>> x = np.array([[[3.0], [-4.0]]])
    >>> z = keras_frn.ops.filter_response_normalization_tlu(x, tau=-0.5)  # [[[0.849], [-0.5]]]

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""
    x, dtype = _in_statistics_dtype(x)
    axis = _channel_axis(axis, x.shape)
    y = _normalized(x, gamma, beta, axis, epsilon, mask)
    return cast(_thresholded(y, tau, alpha, (axis,)), dtype)


def _normalized(x, gamma, beta, axis, epsilon, mask):
    gamma, beta = _aligned("gamma", gamma, x, (axis,)), _aligned("beta", beta, x, (axis,))
    epsilon = _aligned("epsilon", epsilon, x, (axis,))
    # Quantization tools address the statistics by this name.
    with keras.name_scope("frn_statistics"):
        scale = ops.rsqrt(_mean_square(x, axis, mask) + epsilon)
        if gamma is not None:
            scale = scale * gamma
    y = x * scale
    return y if beta is None else y + beta


def _thresholded(y, tau, alpha, axes):
    tau = _aligned("tau", tau, y, axes)
    if alpha is not None:
        tau = y * _aligned("alpha", alpha, y, axes) + tau
    return maximum(y, tau)


def _mean_square(x, axis, mask):
    spatial = tuple(i for i in range(1, len(x.shape)) if i != axis)
    if any(x.shape[i] == 0 for i in spatial):
        raise ValueError(
            f"`x` must have at least one spatial position. Received: x.shape={tuple(x.shape)}. "
            "The mean square of no values is undefined."
        )
    if mask is None:
        return mean_square(x, spatial)
    kept = _aligned_mask(mask, x, axis)
    # Zeros go in before the square, so that neither the value nor the gradient of what is masked
    # can spoil the mean.
    nu2 = mean_square(where(kept, x, ops.zeros_like(x)), spatial)
    # The mean of a mask is that of its square. Axes that it does not span have size 1 in it.
    share = mean_square(ops.cast(kept, x.dtype), spatial)
    return nu2 / where(share > 0, share, ops.ones_like(share))


def cast(x, dtype):
    """`x` in a dtype. In eager mode `ops.cast` takes 20 microseconds, even for nothing."""
    return x if keras.backend.standardize_dtype(x.dtype) == dtype else ops.cast(x, dtype)


def _in_statistics_dtype(x):
    """x in float32 or wider, and the dtype of the result."""
    if not keras.backend.is_keras_tensor(x):
        x = ops.convert_to_tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if not keras.backend.is_float_dtype(dtype):
        dtype = keras.config.floatx()
    return cast(x, "float64" if dtype == "float64" else "float32"), dtype


def sorted_axes(axis, shape):
    """One axis or several, ascending and not negative, of an input of this shape."""
    shape = tuple(shape)
    rank = len(shape)
    if rank < 2 or any(isinstance(size, (list, tuple, dict)) for size in shape):
        raise ValueError(
            "The input must be one tensor of rank 2 or more, (batch, ..., channels). Received: "
            f"shape={shape}. Pass tensors one by one, and add missing axes."
        )
    axes = axis if isinstance(axis, (list, tuple)) else (axis,)
    exist = all(-rank < a < rank and a != 0 for a in axes)
    if not exist or len({a % rank for a in axes}) != len(axes):
        raise ValueError(
            f"`axis` must name different axes of an input of rank {rank}, and not the batch axis. "
            f"Received: axis={axis}, shape={shape}. Use -1 for channels-last data, 1 for "
            "channels-first."
        )
    return tuple(sorted(a % rank for a in axes))


def _channel_axis(axis, shape):
    if isinstance(axis, (list, tuple)):
        raise ValueError(
            f"`axis` must be one int, the channel axis. Received: axis={axis!r}. Use -1 for "
            "channels-last data. (TensorFlow Addons' `axis=[1, 2]` named the spatial axes.)"
        )
    return sorted_axes(axis, shape)[0]


def _aligned(name, parameter, x, axes):
    """A parameter in x's dtype and rank (converters want constants of the full rank), with one
    element or x's sizes at `axes`."""
    if parameter is None or (name == "epsilon" and isinstance(parameter, (int, float))):
        return parameter
    if isinstance(parameter, (int, float, list, tuple, np.ndarray)):
        # Through NumPy, as some backends bring Python floats to float64 by way of float32.
        parameter = np.asarray(parameter, keras.backend.standardize_dtype(x.dtype))
    parameter = cast(parameter, keras.backend.standardize_dtype(x.dtype))
    sizes = tuple(x.shape[axis] for axis in axes)
    received = tuple(parameter.shape)
    shape = [1] * len(x.shape)
    if received not in ((), (1,)):
        if len(received) != len(sizes) or any(s not in (r, None) for s, r in zip(sizes, received)):
            raise ValueError(
                f"`{name}` must have the sizes of `x` along axis {axes}, {sizes}. Received: "
                f"{name}.shape={received}, x.shape={tuple(x.shape)}. Reshape it, or name the axes "
                "along which it varies."
            )
        for axis, size in zip(axes, received):
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
