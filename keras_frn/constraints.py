"""Constraints for the kernels before the layers."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from .typing import Tensor, is_int

__all__ = ["ZeroMean"]


@keras.saving.register_keras_serializable(package="keras_frn")
class ZeroMean(keras.constraints.Constraint):
    """Constrains each filter to zero mean.

    ```
    w = w - mean(w)            over the axes that belong to one filter
    ```

    Filter Response Normalization does not subtract the mean of its input. A zero-mean filter
    removes most of it: an offset that its inputs share does not pass. Like every constraint it is
    applied after each update, here to kernels of rank 2 or more. Inference costs nothing extra.

    Args:
        axis: Int, tuple of ints, or None for all axes but the last, the filters: convolutions
            `(*spatial, in, out)`, with groups too, and dense kernels `(in, out)`. Pass (0, 1) for
            `DepthwiseConv2D`, whose kernel is `(height, width, in, multiplier)`, and (0, 1, 3) for
            `Conv2DTranspose`, `(height, width, out, in)`. Defaults to None.

    Raises:
        ValueError: if `axis` is invalid, or a filter would have one weight, which would stay 0.

    Example:

    ```python
    conv = keras.layers.Conv2D(
        16, 3, use_bias=False, kernel_constraint=keras_frn.constraints.ZeroMean()
    )
    ```

    Reference:
        Huang et al., "Centered Weight Normalization in Accelerating Training of Deep Neural
        Networks", ICCV 2017

        Qiao et al., "Weight Standardization", https://arxiv.org/abs/1903.10520

        Yong et al., "Gradient Centralization", ECCV 2020, https://arxiv.org/abs/2004.01461
    """

    def __init__(self, axis: int | Sequence[int] | None = None) -> None:
        axes = tuple(axis) if isinstance(axis, (list, tuple)) else (axis,)
        integers = all(map(is_int, axes))
        if axis is not None and not (axes and integers and len(set(axes)) == len(axes)):
            raise ValueError(
                "`axis` must be an int, a tuple of different ints, or None. Received: "
                f"axis={axis!r}. None takes all axes but the last, as convolutions need."
            )
        self.axis = None if axis is None else tuple(map(int, axes))

    def __call__(self, value: Tensor) -> Tensor:
        shape, rank = tuple(value.shape), len(value.shape)
        given = tuple(range(rank - 1)) if self.axis is None else self.axis
        axes = {a % rank for a in given if -rank <= a < rank}
        count = math.prod(shape[a] for a in axes)
        if count < 2 or len(axes) == rank or not all(-rank <= a < rank for a in given):
            raise ValueError(
                "`axis` must name axes of the kernel that have more than one weight together and "
                f"leave one for the filters. Received: axis={self.axis} for a kernel of shape "
                f"{shape}. Use (0, 1) for `DepthwiseConv2D`, and no constraint if a filter is one "
                "weight."
            )
        dtype = keras.backend.standardize_dtype(value.dtype)
        # Half precision is computed in float32. A sum, as `ops.mean` is float32 on JAX.
        wide = ops.cast(value, "float64" if dtype == "float64" else "float32")
        return ops.cast(wide - ops.sum(wide, axis=tuple(axes), keepdims=True) / count, dtype)

    def get_config(self) -> dict[str, Any]:
        return {"axis": self.axis}
