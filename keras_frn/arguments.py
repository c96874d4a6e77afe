"""What the layers accept: each check returns the value to keep or raises a `ValueError`."""

import math
import numbers
import warnings

import numpy as np

# The paper's learned epsilon starts from it.
_SMALL_EPSILON = 1e-4


def channel_axis(axis):
    """One axis, not the batch axis."""
    if isinstance(axis, (list, tuple)):
        raise ValueError(
            f"`axis` must be one int, the channel axis. Received: axis={axis}. TensorFlow Addons "
            "named the spatial axes, `axis=[1, 2]`. Use -1 (the default): the mean is over every "
            "axis but this one and the batch."
        )
    if not _is_axis(axis):
        raise ValueError(
            "`axis` must be an int, the channel axis, and not 0, the batch axis. Received: "
            f"axis={axis!r}. Use -1 for channels-last and 1 for channels-first data."
        )
    return int(axis)


def threshold_axis(axis):
    """One axis or a tuple of axes, not the batch axis."""
    axes = axis if isinstance(axis, (list, tuple)) else (axis,)
    if not axes or not all(map(_is_axis, axes)) or len(set(axes)) != len(axes):
        raise ValueError(
            "`axis` must be an int or a tuple of different ints, the axes along which tau varies, "
            f"without 0, the batch axis. Received: axis={axis!r}. Use -1 for one threshold per "
            "channel, (1, 2, 3) for one per position of an image."
        )
    return tuple(map(int, axes)) if isinstance(axis, (list, tuple)) else int(axis)


def _is_axis(axis):
    return isinstance(axis, numbers.Integral) and not isinstance(axis, bool) and axis != 0


def learned_epsilon(learned):
    """False, True or "per_channel"."""
    if not isinstance(learned, (bool, np.bool_)) and learned != "per_channel":
        raise ValueError(
            "`learned_epsilon` must be False, True (one per layer) or 'per_channel'. Received: "
            f"learned_epsilon={learned!r}. Pass a start value as `learned_epsilon_initializer`."
        )
    return learned if learned == "per_channel" else bool(learned)


def epsilon(value, learned):
    """A float or a tuple of floats, finite and positive, or zero if more is learned."""
    try:
        values = np.asarray(value, "float64")
    except (TypeError, ValueError):
        values = np.asarray(math.nan)
    in_range = np.isfinite(values) & ((values >= 0) if learned else (values > 0))
    if values.ndim > 1 or values.size == 0 or not in_range.all():
        raise ValueError(
            "`epsilon` must be a finite float above 0 (or 0 with a learned epsilon), or a sequence "
            f"of one such float per channel. Received: epsilon={value!r}. The paper uses 1e-6."
        )
    return tuple(values.tolist()) if values.ndim else float(values)


def jit_compile(value):
    """None, True or False."""
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise ValueError(
            f"`jit_compile` must be None, True or False. Received: jit_compile={value!r}. None "
            "lets the layer choose."
        )
    return value if value is None else bool(value)


def sizes(layer, input_shape):
    """The layer's axes, ascending and not negative, and the input's sizes along them."""
    rank = len(input_shape)
    if rank < 2:
        raise ValueError(
            f"The input of layer {layer.name!r} must have rank 2 or more, (batch, ..., channels). "
            f"Received: input_shape={tuple(input_shape)}. Add the missing axis."
        )
    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    if not all(-rank < axis < rank for axis in axes) or len({a % rank for a in axes}) != len(axes):
        raise ValueError(
            "`axis` must name different axes of the input, and not the batch axis. Received: "
            f"axis={layer.axis}, input_shape={tuple(input_shape)}. Use -1 for channels-last data."
        )
    axes = tuple(sorted(axis % rank for axis in axes))
    along = tuple(input_shape[axis] for axis in axes)
    if None in along:
        raise ValueError(
            f"The input of layer {layer.name!r} must have a known size along axis {layer.axis}, "
            f"for its weights. Received: input_shape={tuple(input_shape)}. Set it in `keras.Input` "
            "or in the layer before."
        )
    return axes, along


def check_epsilon(layer, input_shape, dtype):
    """The layer's constant epsilon against an input shape and the dtype of the statistics."""
    channel = layer.axis % len(input_shape)
    channels = input_shape[channel]
    if isinstance(layer.epsilon, tuple) and len(layer.epsilon) != channels:
        raise ValueError(
            "`epsilon` must be one float, or one per channel. Received: "
            f"{len(layer.epsilon)} values for {channels} channels. Pass as many as channels."
        )
    if layer.use_learned_epsilon:
        return
    if np.any(np.asarray(layer.epsilon, dtype) == 0):
        raise ValueError(
            f"`epsilon` must be above 0 in {dtype}. Received: epsilon={layer.epsilon!r}, which "
            "rounds to 0 there, so that a channel of zeros gives NaN. The paper uses 1e-6."
        )
    spatial = [size for i, size in enumerate(input_shape) if i not in (0, channel)]
    if all(size == 1 for size in spatial) and np.min(layer.epsilon) < _SMALL_EPSILON:
        warnings.warn(
            f"Layer {layer.name!r} normalizes single positions with a constant epsilon of "
            f"{layer.epsilon}: its output is close to the sign of its input and its gradient "
            "close to 0. Use `learned_epsilon=True`, as the paper does, or a larger epsilon.",
            stacklevel=2,
        )
