"""The three layers: weights and config. The mathematics is in `ops`."""

import math
import numbers
import os
import sys
import warnings

import keras
import numpy as np
from keras import constraints, initializers, ops, regularizers

from .compilation import run
from .ops import (
    cast,
    filter_response_normalization,
    filter_response_normalization_tlu,
    sorted_axes,
    tlu,
)

# The learned epsilon starts here, as in the paper.
_START_OF_EPSILON = 1e-4


@keras.saving.register_keras_serializable(package="keras_frn")
class FilterResponseNormalization(keras.layers.Layer):
    """Filter Response Normalization (FRN), in the place of BatchNormalization.

    ```
    nu2 = mean(x * x)          over the spatial positions of one sample and channel
    y   = gamma * x / sqrt(nu2 + epsilon + |learned_epsilon|) + beta
    ```

    There are no batch statistics: training and inference compute the same function, and a sample's
    result does not depend on the others. Follow it with `TLU`: the mean is not subtracted, so the
    threshold has to be learned. Where there is one spatial position (dense features, 1x1 maps), use
    `learned_epsilon=True`: with a small constant epsilon the output is the sign of x.

    Shape:
        Input and output: `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` with
        `axis=1`. Spatial sizes may be unknown and may change from call to call.

    Args:
        axis: Int, the channel axis, as in `keras.layers.BatchNormalization`. Defaults to -1.
        epsilon: Float, or one float per channel, in units of x squared; finite and positive (0 is
            allowed with a learned epsilon). Defaults to 1e-6.
        learned_epsilon: False, True (one learned epsilon per layer, as in the paper), or
            `"per_channel"`. Defaults to False.
        center: Whether to add the offset `beta`. Defaults to True.
        scale: Whether to multiply by the scale `gamma`. Defaults to True.
        beta_initializer: Defaults to `"zeros"`.
        gamma_initializer: Defaults to `"ones"`.
        learned_epsilon_initializer: Defaults to `Constant(1e-4)`. At exactly 0 it would stay there.
        beta_regularizer, gamma_regularizer, learned_epsilon_regularizer: Default to None.
        beta_constraint, gamma_constraint, learned_epsilon_constraint: Default to None.
        jit_compile: None and False add nothing: `model.compile(jit_compile=...)` covers the layer.
            True compiles this layer alone, by XLA or, on PyTorch, by `torch.compile`; in eager mode
            all layers of the same shape and options share a program. Defaults to None.
        **kwargs: `name`, `dtype`, `trainable`. With a half-precision dtype the layer computes in
            float32; under mixed precision its weights are float32.

    Call arguments:
        inputs: Float or integer tensor.
        mask: Booleans, the shape of the input without the channel axis or a leading part of it.
            Positions where it is False do not count in the mean. The mask passes on.

    Weights, in this order: `gamma (channels,)`, `beta (channels,)`, `learned_epsilon (1,)` or
    `(channels,)`; an attribute is None where the layer has no such weight.

    Raises:
        ValueError: if an argument is out of its range, or, when the layer is built, if the input
            has rank 1, an unknown channel size or not as many channels as `epsilon`.

    Example:

    >>> layer = keras_frn.FilterResponseNormalization()
    >>> y = layer(np.ones((2, 32, 32, 16)))

    Reference: Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(
        self,
        axis=-1,
        *,
        epsilon=1e-6,
        learned_epsilon=False,
        center=True,
        scale=True,
        beta_initializer="zeros",
        gamma_initializer="ones",
        learned_epsilon_initializer=None,
        beta_regularizer=None,
        gamma_regularizer=None,
        learned_epsilon_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        learned_epsilon_constraint=None,
        jit_compile=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        # Inputs above the largest half-precision number must reach `call` unharmed.
        self.autocast = False
        self.supports_masking = True
        self.supports_jit = True
        self.axis = _checked_axis(axis)
        self.use_learned_epsilon = _one_of(
            "learned_epsilon", learned_epsilon, (False, True, "per_channel")
        )
        self.epsilon = _checked_epsilon(epsilon, learned_epsilon)
        self.center = center
        self.scale = scale
        self.jit_compile = _one_of("jit_compile", jit_compile, (None, False, True))
        if learned_epsilon_initializer is None:
            learned_epsilon_initializer = initializers.Constant(_START_OF_EPSILON)
        self.beta_initializer = initializers.get(beta_initializer)
        self.gamma_initializer = initializers.get(gamma_initializer)
        self.learned_epsilon_initializer = initializers.get(learned_epsilon_initializer)
        self.beta_regularizer = regularizers.get(beta_regularizer)
        self.gamma_regularizer = regularizers.get(gamma_regularizer)
        self.learned_epsilon_regularizer = regularizers.get(learned_epsilon_regularizer)
        self.beta_constraint = constraints.get(beta_constraint)
        self.gamma_constraint = constraints.get(gamma_constraint)
        self.learned_epsilon_constraint = constraints.get(learned_epsilon_constraint)
        self.gamma = None
        self.beta = None
        self.learned_epsilon = None

    def build(self, input_shape):
        (axis,), channels = _axes_and_sizes(self, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels[0]})
        _check_epsilon_fits(self, input_shape)
        if self.scale:
            self.gamma = _add_weight(self, "gamma", channels)
        if self.center:
            self.beta = _add_weight(self, "beta", channels)
        if self.use_learned_epsilon:
            shape = channels if self.use_learned_epsilon == "per_channel" else (1,)
            self.learned_epsilon = _add_weight(self, "learned_epsilon", shape)

    def call(self, inputs, mask=None):
        weights = {"gamma": self.gamma, "beta": self.beta, "epsilon": self._epsilon()}
        return _apply(self, filter_response_normalization, inputs, mask=mask, **weights)

    def _epsilon(self):
        if not self.use_learned_epsilon:
            return self.epsilon
        dtype = _statistics_dtype(self)
        learned = ops.abs(ops.cast(self.learned_epsilon, dtype))
        return learned + ops.convert_to_tensor(self.epsilon, dtype)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = {
            "axis": self.axis,
            "epsilon": list(self.epsilon) if isinstance(self.epsilon, tuple) else self.epsilon,
            "learned_epsilon": self.use_learned_epsilon,
            "center": self.center,
            "scale": self.scale,
            **_weight_config(self, ("beta", "gamma", "learned_epsilon")),
            "jit_compile": self.jit_compile,
        }
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="keras_frn")
class TLU(keras.layers.Layer):
    """Thresholded Linear Unit (TLU), a ReLU with a learned threshold, to follow FRN.

    ```
    z = max(x, tau)            or, with affine=True,    z = max(x, alpha * x + tau)
    ```

    The result is the maximum to the last bit, for every tau.

    Shape:
        Input and output: any shape of rank 2 or more. Sizes along `axis` must be known.

    Args:
        axis: Int or tuple, the axes along which tau varies (`keras.layers.PReLU(shared_axes=...)`
            names the others). -1 gives one threshold per channel, as in the paper; `(1, 2, 3)` one
            per position of an image. Defaults to -1.
        affine: Whether to learn a slope `alpha` below the threshold. Defaults to False.
        tau_initializer, alpha_initializer: Default to `"zeros"`.
        tau_regularizer, alpha_regularizer, tau_constraint, alpha_constraint: Default to None.
        jit_compile: As in `FilterResponseNormalization`. Defaults to None.
        **kwargs: `name`, `dtype`, `trainable`.

    Weights, in this order: `tau`, `alpha`, of the input's sizes along `axis`, axes in ascending
    order; `alpha` is None without `affine`.

    Raises:
        ValueError: if an argument is out of its range, or, when the layer is built, if `axis` names
            an axis that the input does not have, or one of unknown size.

    Example:

    >>> layer = keras_frn.TLU(tau_initializer=keras.initializers.Constant(-1.0))
    >>> z = layer(np.array([[-2.0, 3.0]]))  # [[-1.0, 3.0]]

    Reference: Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(
        self,
        axis=-1,
        *,
        affine=False,
        tau_initializer="zeros",
        alpha_initializer="zeros",
        tau_regularizer=None,
        alpha_regularizer=None,
        tau_constraint=None,
        alpha_constraint=None,
        jit_compile=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.autocast = False
        self.supports_masking = True
        self.supports_jit = True
        self.axis = _checked_axis(axis, several=True)
        self.affine = affine
        self.jit_compile = _one_of("jit_compile", jit_compile, (None, False, True))
        self.tau_initializer = initializers.get(tau_initializer)
        self.alpha_initializer = initializers.get(alpha_initializer)
        self.tau_regularizer = regularizers.get(tau_regularizer)
        self.alpha_regularizer = regularizers.get(alpha_regularizer)
        self.tau_constraint = constraints.get(tau_constraint)
        self.alpha_constraint = constraints.get(alpha_constraint)
        self.tau = None
        self.alpha = None

    def build(self, input_shape):
        axes, sizes = _axes_and_sizes(self, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes=dict(zip(axes, sizes)))
        self.tau = _add_weight(self, "tau", sizes)
        if self.affine:
            self.alpha = _add_weight(self, "alpha", sizes)

    def call(self, inputs):
        return _apply(self, tlu, inputs, tau=self.tau, alpha=self.alpha)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = {
            "axis": self.axis,
            "affine": self.affine,
            **_weight_config(self, ("tau", "alpha")),
            "jit_compile": self.jit_compile,
        }
        if isinstance(self.axis, tuple):
            config[_AXES] = self.axis
        return {**super().get_config(), **config}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        axes = config.pop(_AXES, None)
        if axes is not None:
            config["axis"] = axes
        return super().from_config(config)


# Keras drops `axis` from the config of a layer in an .h5 file unless it is one number.
_AXES = "axes"


@keras.saving.register_keras_serializable(package="keras_frn")
class FilterResponseNormalizationTLU(FilterResponseNormalization):
    """Filter Response Normalization and Thresholded Linear Unit in one layer.

    ```
    nu2 = mean(x * x)          over the spatial positions of one sample and channel
    y   = gamma * x / sqrt(nu2 + epsilon + |learned_epsilon|) + beta
    z   = max(y, tau)          or, with affine=True, z = max(y, alpha * y + tau)
    ```

    Equal to `FilterResponseNormalization` followed by `TLU`, in half as many layers.

    Shape:
        Input and output: as in `FilterResponseNormalization`.

    Args:
        axis: Int, the channel axis. Defaults to -1.
        affine: Whether to learn a slope `alpha` below the threshold. Defaults to False.
        tau_initializer, alpha_initializer: Default to `"zeros"`.
        tau_regularizer, alpha_regularizer, tau_constraint, alpha_constraint: Default to None.
        **kwargs: As in `FilterResponseNormalization`: `epsilon`, `learned_epsilon`, `center`,
            `scale`, initializers, regularizers and constraints, `jit_compile`, `name`, `dtype`.

    Call arguments: as in `FilterResponseNormalization`.

    Weights, in this order: `gamma`, `beta`, `learned_epsilon`, `tau (channels,)`, `alpha
    (channels,)`; an attribute is None where the layer has no such weight.

    Raises:
        ValueError: as in `FilterResponseNormalization`.

    Example:

    >>> layer = keras_frn.FilterResponseNormalizationTLU(learned_epsilon=True)
    >>> z = layer(np.ones((2, 32, 32, 16)))

    Reference: Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(
        self,
        axis=-1,
        *,
        affine=False,
        tau_initializer="zeros",
        alpha_initializer="zeros",
        tau_regularizer=None,
        alpha_regularizer=None,
        tau_constraint=None,
        alpha_constraint=None,
        **kwargs,
    ):
        super().__init__(axis, **kwargs)
        self.affine = affine
        self.tau_initializer = initializers.get(tau_initializer)
        self.alpha_initializer = initializers.get(alpha_initializer)
        self.tau_regularizer = regularizers.get(tau_regularizer)
        self.alpha_regularizer = regularizers.get(alpha_regularizer)
        self.tau_constraint = constraints.get(tau_constraint)
        self.alpha_constraint = constraints.get(alpha_constraint)
        self.tau = None
        self.alpha = None

    def build(self, input_shape):
        super().build(input_shape)
        channels = (input_shape[self.axis],)
        self.tau = _add_weight(self, "tau", channels)
        if self.affine:
            self.alpha = _add_weight(self, "alpha", channels)

    def call(self, inputs, mask=None):
        weights = {"gamma": self.gamma, "beta": self.beta, "epsilon": self._epsilon()}
        weights |= {"tau": self.tau, "alpha": self.alpha}
        return _apply(self, filter_response_normalization_tlu, inputs, mask=mask, **weights)

    def get_config(self):
        config = {"affine": self.affine, **_weight_config(self, ("tau", "alpha"))}
        return {**super().get_config(), **config}


def epsilon_of(layer):
    """All that an FRN layer adds to the mean square, an array in float64."""
    epsilon = np.asarray(layer.epsilon, "float64")
    if layer.learned_epsilon is None:
        return epsilon
    return epsilon + np.abs(ops.convert_to_numpy(layer.learned_epsilon))


def _apply(layer, op, inputs, **arguments):
    """Calls an op on the inputs and the layer's weights, under the layer's settings."""
    if not layer.built:
        raise ValueError(
            f"Layer {layer.name!r} must be built before `call`. Received: a call without weights. "
            "Call the layer itself, `layer(inputs)`, which builds it."
        )
    if isinstance(arguments.get("mask"), (list, tuple)):
        arguments["mask"] = np.asarray(arguments["mask"])
    dtype = _statistics_dtype(layer)
    if keras.backend.standardize_dtype(inputs.dtype) != layer.compute_dtype:
        # Half precision is cast by the op, where a compiler keeps what it casts out of memory.
        inputs = ops.cast(inputs, dtype)
    z = run(op, {"x": inputs, "axis": layer.axis, **arguments}, layer.jit_compile)
    return cast(z, layer.compute_dtype)


def _statistics_dtype(layer):
    return "float64" if layer.compute_dtype == "float64" else "float32"


def _add_weight(layer, name, shape):
    return layer.add_weight(
        name=name,
        shape=shape,
        initializer=getattr(layer, f"{name}_initializer"),
        regularizer=getattr(layer, f"{name}_regularizer"),
        constraint=getattr(layer, f"{name}_constraint"),
        autocast=False,
    )


def _weight_config(layer, names):
    return {
        f"{name}_{kind}": module.serialize(getattr(layer, f"{name}_{kind}"))
        for kind, module in (
            ("initializer", initializers),
            ("regularizer", regularizers),
            ("constraint", constraints),
        )
        for name in names
    }


def _checked_axis(axis, several=False):
    is_several = isinstance(axis, (list, tuple))
    axes = tuple(axis) if is_several else (axis,)
    integers = all(isinstance(a, numbers.Integral) and not isinstance(a, bool) for a in axes)
    too_many = is_several and not several
    if not axes or not integers or too_many or 0 in axes or len(set(axes)) != len(axes):
        kinds = "an int or a tuple of different ints" if several else "one int, the channel axis"
        raise ValueError(
            f"`axis` must be {kinds}, without 0, the batch axis. Received: axis={axis!r}. Use -1 "
            "for the channels of channels-last data and 1 for channels-first. (TensorFlow Addons' "
            "`axis=[1, 2]` named the spatial axes.)"
        )
    return tuple(map(int, axes)) if is_several else int(axis)


def _one_of(name, value, choices):
    if not any(value is choice or choice == value == "per_channel" for choice in choices):
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}. Leave it out for "
            f"{choices[0]}."
        )
    return value


def _checked_epsilon(epsilon, learned):
    """A float or a tuple of floats."""
    try:
        values = np.asarray(epsilon, "float64")
    except (TypeError, ValueError):
        values = np.asarray(math.nan)
    in_range = np.isfinite(values) & ((values >= 0) if learned else (values > 0))
    if values.ndim > 1 or values.size == 0 or not in_range.all():
        raise ValueError(
            "`epsilon` must be a finite float above 0 (or 0 with a learned epsilon), or a sequence "
            f"of one such float per channel. Received: epsilon={epsilon!r}. The paper uses 1e-6."
        )
    return tuple(values.tolist()) if values.ndim else float(values)


def _axes_and_sizes(layer, input_shape):
    """The layer's axes, ascending and not negative, and the input's sizes along them."""
    axes = sorted_axes(layer.axis, input_shape)
    sizes = tuple(input_shape[axis] for axis in axes)
    if None in sizes:
        raise ValueError(
            f"The input of layer {layer.name!r} must have a known size along axis {layer.axis}, "
            f"for its weights. Received: input_shape={tuple(input_shape)}. Set it in `keras.Input` "
            "or in the layer before."
        )
    return axes, sizes


def _check_epsilon_fits(layer, input_shape):
    """Checks the constant epsilon against the channels, the dtype and the number of positions."""
    channel = layer.axis % len(input_shape)
    channels = input_shape[channel]
    if isinstance(layer.epsilon, tuple) and len(layer.epsilon) != channels:
        raise ValueError(
            "`epsilon` must be one float, or one per channel. Received: "
            f"{len(layer.epsilon)} values for {channels} channels. Pass as many as channels."
        )
    if layer.use_learned_epsilon:
        return
    dtype = _statistics_dtype(layer)
    if np.any(np.asarray(layer.epsilon, dtype) == 0):
        raise ValueError(
            f"`epsilon` must be above 0 in {dtype}. Received: epsilon={layer.epsilon!r}, which "
            "rounds to 0 there, so that a channel of zeros gives NaN. The paper uses 1e-6."
        )
    spatial = [size for i, size in enumerate(input_shape) if i not in (0, channel)]
    if all(size == 1 for size in spatial) and np.min(layer.epsilon) < _START_OF_EPSILON:
        warnings.warn(
            f"Layer {layer.name!r} normalizes single positions with a constant epsilon of "
            f"{layer.epsilon}: its output is close to the sign of its input and its gradient "
            "close to 0. Use `learned_epsilon=True`, as the paper does, or a larger epsilon.",
            stacklevel=_level_of_the_user(),
        )


def _level_of_the_user():
    """How many calls above the caller the first line outside of Keras and this package is."""
    inside = tuple(os.path.dirname(file) + os.sep for file in (keras.__file__, __file__))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
