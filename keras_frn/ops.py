"""The formulas, on `keras.ops`: pure functions of their arguments, on any backend."""

from typing import Any

import keras
import numpy as np
from keras import ops

from .gradients import maximum, mean_square, where
from .typing import Shape, Tensor, is_int

__all__ = ["filter_response_normalization", "filter_response_normalization_tlu", "tlu"]


def filter_response_normalization(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    axis: int = -1,
    epsilon: Tensor = 1e-6,
    mask: Tensor | None = None,
    dtype: str | None = None,
) -> Tensor:
    """Normalizes each channel of each sample by its root mean square.

    ```
    nu2 = mean(x * x)                              over the spatial positions
    y   = gamma * x / sqrt(nu2 + epsilon) + beta
    ```

    Half precision is computed in float32, in which the sum of the squares of N positions overflows
    above `|x| = 1.8e19 / sqrt(N)`.

    Args:
        x: Float or integer tensor of rank 2 or more: `(batch, *spatial, channels)` or, with
            `axis=1`, `(batch, channels, *spatial)`.
        gamma: Scale, `(channels,)`, or None for 1. Defaults to None.
        beta: Offset, `(channels,)`, or None for 0. Defaults to None.
        axis: Int, the channel axis. Defaults to -1.
        epsilon: Added to the mean square: a float, or a sequence or tensor of one element or of one
            per channel. Defaults to 1e-6.
        mask: True at the positions that count in the mean; its shape is that of `x` without the
            channel axis, or a leading part of it. Other positions are normalized as well.
            Defaults to None.
        dtype: Dtype of the result. Defaults to None, x's dtype (`keras.config.floatx()` for
            integers).

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: if there is no spatial position, `axis` is the batch axis or not an axis of `x`,
            or the shape of a parameter or of `mask` does not fit that of `x`.

    Example:

    ```python
    x = np.array([[[3.0], [4.0]]])  # one sample, two positions, one channel
    y = keras_frn.ops.filter_response_normalization(x)  # x / sqrt(12.5)
    ```

    Reference:
        [Singh & Krishnan, CVPR 2020](https://arxiv.org/abs/1911.09737)
    """
    x, dtype = _widen(x, dtype)
    (axis,) = canonicalize_axis(axis, x.shape)
    return cast(_normalize(x, gamma, beta, axis, epsilon, mask), dtype)


def tlu(
    x: Tensor,
    tau: Tensor,
    alpha: Tensor | None = None,
    axis: int | tuple[int, ...] = -1,
    dtype: str | None = None,
) -> Tensor:
    """Applies the Thresholded Linear Unit, an exact maximum for every tau, infinities included.

    ```
    z = max(x, tau)            or, with alpha,    z = max(x, alpha * x + tau)
    ```

    Args:
        x: Float or integer tensor of rank 2 or more.
        tau: Threshold: the sizes of `x` along `axis`, axes in ascending order.
        alpha: Slope below the threshold, of tau's shape, or None for 0. Defaults to None.
        axis: The axes along which tau varies, an int or a tuple. Defaults to -1.
        dtype: Dtype of the result. Defaults to None, x's dtype (`keras.config.floatx()` for
            integers).

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: if `axis` names the batch axis, an axis twice or one that `x` does not have, or
            the shape of `tau` or `alpha` does not fit that of `x`.

    Example:

    ```python
    z = keras_frn.ops.tlu(np.array([[-2.0, 3.0]]), tau=np.array([-1.0, 0.0]))  # [[-1, 3]]
    ```

    Reference:
        [Singh & Krishnan, CVPR 2020](https://arxiv.org/abs/1911.09737)
    """
    x, dtype = _widen(x, dtype)
    axes = canonicalize_axis(axis, x.shape, several=True)
    return cast(_threshold(x, tau, alpha, axes), dtype)


def filter_response_normalization_tlu(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    tau: Tensor = 0.0,
    alpha: Tensor | None = None,
    axis: int = -1,
    epsilon: Tensor = 1e-6,
    mask: Tensor | None = None,
    dtype: str | None = None,
) -> Tensor:
    """Applies Filter Response Normalization and the Thresholded Linear Unit in one step.

    ```
    y = gamma * x / sqrt(mean(x * x) + epsilon) + beta
    z = max(y, tau)            or, with alpha,    z = max(y, alpha * y + tau)
    ```

    Equivalent to the two operations in sequence, but half precision is rounded once, not twice.

    Args:
        x: As in `filter_response_normalization`.
        gamma: As in `filter_response_normalization`.
        beta: As in `filter_response_normalization`.
        tau: Threshold, `(channels,)` or a float. Defaults to 0, a ReLU.
        alpha: Slope below the threshold, `(channels,)`, or None for 0. Defaults to None.
        axis: As in `filter_response_normalization`.
        epsilon: As in `filter_response_normalization`.
        mask: As in `filter_response_normalization`.
        dtype: As in `filter_response_normalization`.

    Returns:
        A tensor of x's shape.

    Raises:
        ValueError: as in `filter_response_normalization` and `tlu`.

    Example:

    ```python
    x = np.array([[[3.0], [-4.0]]])
    z = keras_frn.ops.filter_response_normalization_tlu(x, tau=-0.5)  # [[[0.849], [-0.5]]]
    ```

    Reference:
        [Singh & Krishnan, CVPR 2020](https://arxiv.org/abs/1911.09737)
    """
    x, dtype = _widen(x, dtype)
    (axis,) = canonicalize_axis(axis, x.shape)
    y = _normalize(x, gamma, beta, axis, epsilon, mask)
    return cast(_threshold(y, tau, alpha, (axis,)), dtype)


def _normalize(
    x: Tensor, gamma: Tensor, beta: Tensor, axis: int, epsilon: Tensor, mask: Tensor
) -> Tensor:
    gamma, beta = _align("gamma", gamma, x, (axis,)), _align("beta", beta, x, (axis,))
    epsilon = _align("epsilon", epsilon, x, (axis,))
    # Quantization tools address the statistics by this name.
    with keras.name_scope("frn_statistics"):
        scale = ops.rsqrt(_mean_square(x, axis, mask) + epsilon)
        if gamma is not None:
            scale = scale * gamma
    y = x * scale
    return y if beta is None else y + beta


def _threshold(y: Tensor, tau: Tensor, alpha: Tensor, axes: tuple[int, ...]) -> Tensor:
    tau = _align("tau", tau, y, axes)
    if alpha is not None:
        tau = y * _align("alpha", alpha, y, axes) + tau
    return maximum(y, tau)


def _mean_square(x: Tensor, axis: int, mask: Tensor) -> Tensor:
    spatial = tuple(i for i in range(1, len(x.shape)) if i != axis)
    if any(x.shape[i] == 0 for i in spatial):
        raise ValueError(
            f"`x` must have at least one spatial position. Received: x.shape={tuple(x.shape)}. "
            "The mean square of no values is undefined."
        )
    if mask is None:
        return mean_square(x, spatial)
    kept = _align_mask(mask, x, axis)
    # Zeros go in before the square, so that neither the value nor the gradient of what is masked
    # can spoil the mean.
    nu2 = mean_square(where(kept, x, ops.zeros_like(x)), spatial)
    # The mean of a mask is that of its square. Axes that it does not span have size 1 in it.
    share = mean_square(ops.cast(kept, x.dtype), spatial)
    return nu2 / where(share > 0, share, ops.ones_like(share))


def cast(x: Tensor, dtype: str) -> Tensor:
    """`x` in a dtype. In eager mode `ops.cast` takes 20 microseconds, even for nothing."""
    return x if keras.backend.standardize_dtype(x.dtype) == dtype else ops.cast(x, dtype)


def _widen(x: Tensor, dtype: str | None) -> tuple[Tensor, str]:
    """x in the dtype to compute in, float32 or float64, and the dtype of the result."""
    if isinstance(x, keras.Variable):
        x = x.value  # TensorFlow's custom gradients take no variables
    elif not keras.backend.is_keras_tensor(x):
        x = ops.convert_to_tensor(x, sparse=False)
    if dtype is None:
        dtype = keras.backend.standardize_dtype(x.dtype)
        dtype = dtype if keras.backend.is_float_dtype(dtype) else keras.config.floatx()
    return cast(x, "float64" if dtype == "float64" else "float32"), dtype


def canonicalize_axis(axis: Any, shape: Shape | None, several: bool = False) -> tuple[int, ...]:
    """The axes as ints; of an input of a known shape, ascending and not negative."""
    axes = tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
    if not axes or not all(map(is_int, axes)) or (isinstance(axis, (list, tuple)) and not several):
        kinds = "an int or a tuple of different ints" if several else "one int, the channel axis"
        raise ValueError(
            f"`axis` must be {kinds}. Received: axis={axis!r}. Use -1 for the channels of "
            "channels-last data and 1 for channels-first. (TensorFlow Addons' `axis=[1, 2]` named "
            "the spatial axes.)"
        )
    axes = tuple(map(int, axes))
    of, received, rank = "the input", f"axis={axis}", 0
    if shape is not None:
        rank = len(shape)
        if rank < 2 or any(isinstance(size, (list, tuple, dict)) for size in shape):
            raise ValueError(
                "The input must be one tensor of rank 2 or more, (batch, ..., channels). Received: "
                f"shape={tuple(shape)}. Pass tensors one by one, and add missing axes."
            )
        of, received = f"an input of rank {rank}", f"{received}, shape={tuple(shape)}"
        if all(-rank <= a < rank for a in axes):
            axes = tuple(sorted(a % rank for a in axes))
            rank = 0
    if rank or 0 in axes or len(set(axes)) != len(axes):
        raise ValueError(
            f"`axis` must name different axes of {of}, and not the batch axis. Received: "
            f"{received}. Use -1 for channels-last data, 1 for channels-first."
        )
    return axes


def _align(name: str, parameter: Any, x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A parameter in x's dtype and rank, as converters want constants of the full rank. It has one
    element, or x's sizes at `axes`."""
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
                f"`{name}` must have the sizes of `x` along `axis`, {sizes}. Received: "
                f"{name}.shape={received}, x.shape={tuple(x.shape)}, axis={axes}. Reshape it, or "
                "name the axes along which it varies."
            )
        for axis, size in zip(axes, received):
            # Not the size, which a trace of PyTorch, as coremltools reads it, would compute.
            shape[axis] = -1 if len(axes) == 1 else size
    return ops.reshape(parameter, shape)


def _align_mask(mask: Tensor, x: Tensor, axis: int) -> Tensor:
    """The mask as booleans of x's rank, of size 1 along the channel axis and where it ends."""
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
