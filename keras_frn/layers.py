"""The three layers: weights and config. The mathematics is in `ops`."""

import math
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import constraints, initializers, ops, regularizers

from .compilation import run
from .ops import (
    canonicalize_axis,
    filter_response_normalization,
    filter_response_normalization_tlu,
    tlu,
)
from .typing import (
    Constraint,
    Epsilon,
    Initializer,
    LearnedEpsilon,
    Regularizer,
    Shape,
    Tensor,
    is_number,
)

__all__ = ["TLU", "FilterResponseNormalization", "FilterResponseNormalizationTLU"]

# The learned epsilon starts here, as in the paper.
_START_OF_EPSILON = 1e-4


@keras.saving.register_keras_serializable(package="keras_frn")
class FilterResponseNormalization(keras.layers.Layer):
    """Filter Response Normalization (FRN), a replacement for BatchNormalization.

    ```
    nu2 = mean(x * x)          over the spatial positions of one sample and channel
    y   = gamma * x / sqrt(nu2 + epsilon + |learned_epsilon|) + beta
    ```

    With `epsilon_ratio`, k, each channel's mean square is mixed with a typical one, m, stored in
    the weight `mean_square`:

    ```
    y   = gamma * x * sqrt((1 + k) / (nu2 + epsilon + |learned_epsilon| + k * m)) + beta
    ```

    There are no batch statistics: training and inference compute the same function, and a sample's
    output does not depend on the others. Follow it with `TLU`: the mean is not subtracted, so the
    threshold has to be learned. If there is one spatial position (dense features, 1x1 maps), use
    `learned_epsilon=True`; with a small constant epsilon the output is close to sign(x).

    The weights are, in this order, `gamma (channels,)`, `beta (channels,)`, `learned_epsilon (1,)`
    or `(channels,)`, and, not trained, `mean_square (channels,)` and `epsilon_ratio (1,)`; an
    attribute is None if the layer has no such weight.

    Args:
        axis: Int, the channel axis, as in `keras.layers.BatchNormalization`. Defaults to -1.
        epsilon: Float, or one float per channel, in units of x squared; finite and positive (0 is
            allowed with a learned epsilon). Defaults to 1e-6.
        learned_epsilon: False, True (one learned epsilon per layer, as in the paper), or
            `"per_channel"`. Defaults to False.
        epsilon_ratio: Float of 0 or more, the initial value of the weight of that name, or None. A
            large one is close to BatchNormalization's fixed scale; 0 and None mean FRN.
            `replace_batch_normalization` makes such layers, and
            `keras_frn.callbacks.EpsilonScheduler` lowers the weight. Defaults to None.
        center: Whether to add the offset `beta`. Defaults to True.
        scale: Whether to multiply by the scale `gamma`. Defaults to True.
        beta_initializer: Initializer of the offset. Defaults to `"zeros"`.
        gamma_initializer: Initializer of the scale. Defaults to `"ones"`.
        learned_epsilon_initializer: Initializer of the learned epsilon. Must not return 0: the
            gradient of |x| is 0 there. Defaults to None, `Constant(1e-4)`.
        beta_regularizer: Regularizer of the offset. Defaults to None.
        gamma_regularizer: Regularizer of the scale. Defaults to None.
        learned_epsilon_regularizer: Regularizer of the learned epsilon. Defaults to None.
        beta_constraint: Constraint of the offset. Defaults to None.
        gamma_constraint: Constraint of the scale. Defaults to None.
        learned_epsilon_constraint: Constraint of the learned epsilon. Defaults to None.
        jit_compile: None and False add nothing: `model.compile(jit_compile=...)` covers the layer.
            True compiles this layer alone, by XLA or, on PyTorch, by `torch.compile`; in eager mode
            all layers of the same shape and options share a program. Defaults to None.
        **kwargs: `name`, `dtype`, `trainable`. With a half-precision dtype the layer computes in
            float32; under mixed precision its weights are float32.

    Call arguments:
        inputs: Float or integer tensor.

        mask: Booleans, of the shape of the input without the channel axis or a leading part of it.
            Positions with False do not count in the mean. The mask is passed on.

    Input shape:
        `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` with `axis=1`. Spatial sizes
        may be unknown and may change from call to call.

    Output shape:
        The same as the input.

    Raises:
        ValueError: if an argument is out of its range, or, when the layer is built, if the input
            has rank 1, an unknown channel size or not as many channels as `epsilon`.

    Example:

    ```python
    layer = keras_frn.FilterResponseNormalization()
    y = layer(np.ones((2, 32, 32, 16)))
    ```

    Reference:
        [Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the
        Training of Deep Neural Networks", CVPR 2020](https://arxiv.org/abs/1911.09737)
    """

    def __init__(
        self,
        axis: int = -1,
        *,
        epsilon: Epsilon = 1e-6,
        learned_epsilon: LearnedEpsilon = False,
        epsilon_ratio: float | None = None,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        learned_epsilon_initializer: Initializer | None = None,
        beta_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        learned_epsilon_regularizer: Regularizer = None,
        beta_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        learned_epsilon_constraint: Constraint = None,
        jit_compile: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Inputs above the largest half-precision number must reach `call` unharmed.
        self.autocast = False
        self.supports_masking = True
        (self.axis,) = canonicalize_axis(axis, None)
        self.use_learned_epsilon = _check_flag("learned_epsilon", learned_epsilon, "per_channel")
        self.epsilon = _check_epsilon(epsilon, bool(self.use_learned_epsilon))
        self.initial_epsilon_ratio = _check_ratio(epsilon_ratio)
        self.center = _check_flag("center", center)
        self.scale = _check_flag("scale", scale)
        self.jit_compile = _check_flag("jit_compile", jit_compile, None)
        if learned_epsilon_initializer is None:
            learned_epsilon_initializer = initializers.Constant(_START_OF_EPSILON)
        _describe_weight(self, "beta", beta_initializer, beta_regularizer, beta_constraint)
        _describe_weight(self, "gamma", gamma_initializer, gamma_regularizer, gamma_constraint)
        _describe_weight(
            self,
            "learned_epsilon",
            learned_epsilon_initializer,
            learned_epsilon_regularizer,
            learned_epsilon_constraint,
        )
        self.mean_square = None
        self.epsilon_ratio = None

    def build(self, input_shape: Shape) -> None:
        (axis,), channels = _find_sizes(self, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels[0]})
        _check_epsilon_fits(self, input_shape)
        if self.scale:
            self.gamma = _add_weight(self, "gamma", channels)
        if self.center:
            self.beta = _add_weight(self, "beta", channels)
        if self.use_learned_epsilon:
            shape = channels if self.use_learned_epsilon == "per_channel" else (1,)
            self.learned_epsilon = _add_weight(self, "learned_epsilon", shape)
        if self.initial_epsilon_ratio is not None:
            options = {"trainable": False, "autocast": False}
            self.mean_square = self.add_weight(
                name="mean_square", shape=channels, initializer="ones", **options
            )
            start = initializers.Constant(self.initial_epsilon_ratio)
            self.epsilon_ratio = self.add_weight(
                name="epsilon_ratio", shape=(1,), initializer=start, **options
            )

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return _call(
            self,
            filter_response_normalization,
            inputs,
            mask=mask,
            beta=self.beta,
            **self._find_scale(),
        )

    def _find_scale(self) -> dict[str, Tensor]:
        """The gamma and the epsilon of the formula."""
        gamma, epsilon = self.gamma, self.epsilon
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        if self.learned_epsilon is not None or self.epsilon_ratio is not None:
            epsilon = ops.convert_to_tensor(epsilon, dtype)
        if self.learned_epsilon is not None:
            epsilon = ops.abs(ops.cast(self.learned_epsilon, dtype)) + epsilon
        if self.epsilon_ratio is not None:
            ratio = ops.cast(self.epsilon_ratio, dtype)
            mean_square = ops.cast(self.mean_square, dtype)
            epsilon = epsilon + ratio * mean_square
            gamma = ops.ones_like(mean_square) if gamma is None else ops.cast(gamma, dtype)
            gamma = gamma * ops.sqrt(1 + ratio)
        return {"gamma": gamma, "epsilon": epsilon}

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        config = {
            "axis": self.axis,
            "epsilon": list(self.epsilon) if isinstance(self.epsilon, tuple) else self.epsilon,
            "learned_epsilon": self.use_learned_epsilon,
            "epsilon_ratio": self.initial_epsilon_ratio,
            "center": self.center,
            "scale": self.scale,
            **_serialize_weights(self, ("beta", "gamma", "learned_epsilon")),
            "jit_compile": self.jit_compile,
        }
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="keras_frn")
class TLU(keras.layers.Layer):
    """Thresholded Linear Unit (TLU), a ReLU with a learned threshold, to follow FRN.

    ```
    z = max(x, tau)            or, with affine=True,    z = max(x, alpha * x + tau)
    ```

    The result is the exact maximum for every tau.

    The weights are, in this order, `tau` and `alpha`, of the input's sizes along `axis`, axes in
    ascending order; `alpha` is None without `affine`.

    Args:
        axis: Int or tuple, the axes along which tau varies (`keras.layers.PReLU(shared_axes=...)`
            names the others). -1 gives one threshold per channel, as in the paper; `(1, 2, 3)` one
            per position of an image. Defaults to -1.
        affine: Whether to learn a slope `alpha` below the threshold. Defaults to False.
        tau_initializer: Initializer of the threshold. Defaults to `"zeros"`.
        alpha_initializer: Initializer of the slope. Defaults to `"zeros"`.
        tau_regularizer: Regularizer of the threshold. Defaults to None.
        alpha_regularizer: Regularizer of the slope. Defaults to None.
        tau_constraint: Constraint of the threshold. Defaults to None.
        alpha_constraint: Constraint of the slope. Defaults to None.
        jit_compile: As in `FilterResponseNormalization`. Defaults to None.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Float or integer tensor.

    Input shape:
        Any shape of rank 2 or more. Sizes along `axis` must be known.

    Output shape:
        The same as the input.

    Raises:
        ValueError: if an argument is out of its range, or, when the layer is built, if `axis` names
            an axis that the input does not have, or one of unknown size.

    Example:

    ```python
    layer = keras_frn.TLU(tau_initializer=keras.initializers.Constant(-1.0))
    z = layer(np.array([[-2.0, 3.0]]))  # [[-1.0, 3.0]]
    ```

    Reference:
        [Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the
        Training of Deep Neural Networks", CVPR 2020](https://arxiv.org/abs/1911.09737)
    """

    def __init__(
        self,
        axis: int | tuple[int, ...] = -1,
        *,
        affine: bool = False,
        tau_initializer: Initializer = "zeros",
        alpha_initializer: Initializer = "zeros",
        tau_regularizer: Regularizer = None,
        alpha_regularizer: Regularizer = None,
        tau_constraint: Constraint = None,
        alpha_constraint: Constraint = None,
        jit_compile: bool | None = None,
        **kwargs: Any,
    ) -> None:
        axis = kwargs.pop(_AXES, axis)
        super().__init__(**kwargs)
        self.autocast = False
        self.supports_masking = True
        axes = canonicalize_axis(axis, None, several=True)
        self.axis = axes if isinstance(axis, (list, tuple)) else axes[0]
        self.affine = _check_flag("affine", affine)
        self.jit_compile = _check_flag("jit_compile", jit_compile, None)
        _describe_weight(self, "tau", tau_initializer, tau_regularizer, tau_constraint)
        _describe_weight(self, "alpha", alpha_initializer, alpha_regularizer, alpha_constraint)

    def build(self, input_shape: Shape) -> None:
        axes, sizes = _find_sizes(self, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes=dict(zip(axes, sizes)))
        self.tau = _add_weight(self, "tau", sizes)
        if self.affine:
            self.alpha = _add_weight(self, "alpha", sizes)

    def call(self, inputs: Tensor) -> Tensor:
        return _call(self, tlu, inputs, tau=self.tau, alpha=self.alpha)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        config = {
            "axis": self.axis,
            "affine": self.affine,
            **_serialize_weights(self, ("tau", "alpha")),
            "jit_compile": self.jit_compile,
        }
        if isinstance(self.axis, tuple):
            config[_AXES] = self.axis
        return {**super().get_config(), **config}


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

    Equivalent to `FilterResponseNormalization` followed by `TLU`. The weights are, in
    this order, `gamma`, `beta`, `learned_epsilon`, `tau (channels,)`, `alpha (channels,)`, and, not
    trained, `mean_square` and `epsilon_ratio`; an attribute is None if the layer has no such
    weight.

    Args:
        axis: Int, the channel axis. Defaults to -1.
        epsilon: As in `FilterResponseNormalization`. Defaults to 1e-6.
        learned_epsilon: As in `FilterResponseNormalization`. Defaults to False.
        epsilon_ratio: As in `FilterResponseNormalization`. Defaults to None.
        center: Whether to add the offset `beta`. Defaults to True.
        scale: Whether to multiply by the scale `gamma`. Defaults to True.
        affine: Whether to learn a slope `alpha` below the threshold. Defaults to False.
        beta_initializer: Initializer of the offset. Defaults to `"zeros"`.
        gamma_initializer: Initializer of the scale. Defaults to `"ones"`.
        learned_epsilon_initializer: Initializer of the learned epsilon. Defaults to None,
            `Constant(1e-4)`.
        tau_initializer: Initializer of the threshold. Defaults to `"zeros"`.
        alpha_initializer: Initializer of the slope. Defaults to `"zeros"`.
        beta_regularizer: Regularizer of the offset. Defaults to None.
        gamma_regularizer: Regularizer of the scale. Defaults to None.
        learned_epsilon_regularizer: Regularizer of the learned epsilon. Defaults to None.
        tau_regularizer: Regularizer of the threshold. Defaults to None.
        alpha_regularizer: Regularizer of the slope. Defaults to None.
        beta_constraint: Constraint of the offset. Defaults to None.
        gamma_constraint: Constraint of the scale. Defaults to None.
        learned_epsilon_constraint: Constraint of the learned epsilon. Defaults to None.
        tau_constraint: Constraint of the threshold. Defaults to None.
        alpha_constraint: Constraint of the slope. Defaults to None.
        jit_compile: As in `FilterResponseNormalization`. Defaults to None.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Float or integer tensor.

        mask: As in `FilterResponseNormalization`.

    Input shape:
        As in `FilterResponseNormalization`.

    Output shape:
        The same as the input.

    Raises:
        ValueError: as in `FilterResponseNormalization`.

    Example:

    ```python
    layer = keras_frn.FilterResponseNormalizationTLU(learned_epsilon=True)
    z = layer(np.ones((2, 32, 32, 16)))
    ```

    Reference:
        [Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence in the
        Training of Deep Neural Networks", CVPR 2020](https://arxiv.org/abs/1911.09737)
    """

    def __init__(
        self,
        axis: int = -1,
        *,
        epsilon: Epsilon = 1e-6,
        learned_epsilon: LearnedEpsilon = False,
        epsilon_ratio: float | None = None,
        center: bool = True,
        scale: bool = True,
        affine: bool = False,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        learned_epsilon_initializer: Initializer | None = None,
        tau_initializer: Initializer = "zeros",
        alpha_initializer: Initializer = "zeros",
        beta_regularizer: Regularizer = None,
        gamma_regularizer: Regularizer = None,
        learned_epsilon_regularizer: Regularizer = None,
        tau_regularizer: Regularizer = None,
        alpha_regularizer: Regularizer = None,
        beta_constraint: Constraint = None,
        gamma_constraint: Constraint = None,
        learned_epsilon_constraint: Constraint = None,
        tau_constraint: Constraint = None,
        alpha_constraint: Constraint = None,
        jit_compile: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            axis,
            epsilon=epsilon,
            learned_epsilon=learned_epsilon,
            epsilon_ratio=epsilon_ratio,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            learned_epsilon_initializer=learned_epsilon_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            learned_epsilon_regularizer=learned_epsilon_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            learned_epsilon_constraint=learned_epsilon_constraint,
            jit_compile=jit_compile,
            **kwargs,
        )
        self.affine = _check_flag("affine", affine)
        _describe_weight(self, "tau", tau_initializer, tau_regularizer, tau_constraint)
        _describe_weight(self, "alpha", alpha_initializer, alpha_regularizer, alpha_constraint)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        channels = (input_shape[self.axis],)
        self.tau = _add_weight(self, "tau", channels)
        if self.affine:
            self.alpha = _add_weight(self, "alpha", channels)

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return _call(
            self,
            filter_response_normalization_tlu,
            inputs,
            mask=mask,
            beta=self.beta,
            **self._find_scale(),
            tau=self.tau,
            alpha=self.alpha,
        )

    def get_config(self) -> dict[str, Any]:
        config = {"affine": self.affine, **_serialize_weights(self, ("tau", "alpha"))}
        return {**super().get_config(), **config}


def read_epsilon(layer: FilterResponseNormalization) -> Any:
    """All that an FRN layer adds to the mean square, an array in float64."""
    epsilon = np.asarray(layer.epsilon, "float64")
    if layer.learned_epsilon is not None:
        epsilon = epsilon + np.abs(read_weight(layer.learned_epsilon))
    if layer.epsilon_ratio is not None:
        epsilon = epsilon + read_weight(layer.epsilon_ratio) * read_weight(layer.mean_square)
    return epsilon


def read_gamma(layer: FilterResponseNormalization) -> Any:
    """All that an FRN layer multiplies with, an array in float64, or None for 1."""
    gamma = None if layer.gamma is None else read_weight(layer.gamma)
    if layer.epsilon_ratio is None:
        return gamma
    ones = np.ones(layer.mean_square.shape) if gamma is None else gamma
    return ones * np.sqrt(1 + read_weight(layer.epsilon_ratio))


def read_weight(weight: Any) -> Any:
    """A weight as an array in float64."""
    return ops.convert_to_numpy(weight).astype("float64")


def _call(
    layer: Any, op: Callable[..., Tensor], inputs: Tensor, **arguments: Tensor | None
) -> Tensor:
    """Calls an op on the inputs and the layer's weights, under the layer's settings."""
    if not layer.built:
        raise ValueError(
            f"Layer {layer.name!r} must be built before `call`. Received: a call without weights. "
            "Call the layer itself, `layer(inputs)`, which builds it."
        )
    if isinstance(arguments.get("mask"), (list, tuple)):
        arguments["mask"] = np.asarray(arguments["mask"])
    arguments |= {"x": inputs, "axis": layer.axis, "dtype": layer.compute_dtype}
    return run(op, arguments) if layer.jit_compile else op(**arguments)


# How a weight is described, with Keras' module of each.
_KINDS = {"initializer": initializers, "regularizer": regularizers, "constraint": constraints}


def _describe_weight(layer: Any, name: str, *options: Any) -> None:
    """Sets what describes a weight, in the order of `_KINDS`; it is None until it is added."""
    for (kind, module), option in zip(_KINDS.items(), options, strict=True):
        setattr(layer, f"{name}_{kind}", module.get(option))
    setattr(layer, name, None)


def _add_weight(layer: Any, name: str, shape: Shape) -> Any:
    options = {kind: getattr(layer, f"{name}_{kind}") for kind in _KINDS}
    return layer.add_weight(name=name, shape=shape, autocast=False, **options)


def _serialize_weights(layer: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        f"{name}_{kind}": module.serialize(getattr(layer, f"{name}_{kind}"))
        for kind, module in _KINDS.items()
        for name in names
    }


def _check_flag(name: str, value: Any, *others: str | None) -> Any:
    """A bool, of NumPy too, or one of some other values."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if (value is None or isinstance(value, str)) and value in others:
        return value
    raise ValueError(
        f"`{name}` must be one of {(False, True, *others)}. Received: {name}={value!r}. Pass a "
        "bool."
    )


def _check_epsilon(epsilon: Any, learned: bool) -> float | tuple[float, ...]:
    """A float or a tuple of floats."""
    try:
        values = np.asarray(epsilon)
    except (TypeError, ValueError):
        values = np.asarray(None)
    values = values.astype("float64") if values.dtype.kind in "iuf" else np.asarray(math.nan)
    in_range = np.isfinite(values) & ((values >= 0) if learned else (values > 0))
    if values.ndim > 1 or values.size == 0 or not in_range.all():
        raise ValueError(
            "`epsilon` must be a finite float above 0 (or 0 with a learned epsilon), or a sequence "
            f"of one such float per channel. Received: epsilon={epsilon!r}. The paper uses 1e-6."
        )
    return tuple(values.tolist()) if values.ndim else float(values)


def _check_ratio(ratio: Any) -> float | None:
    if ratio is None:
        return None
    if is_number(ratio) and 0 <= ratio < math.inf:
        return float(ratio)
    raise ValueError(
        "`epsilon_ratio` must be a finite float of 0 or more, or None. Received: "
        f"epsilon_ratio={ratio!r}. 3 normalizes mildly, and 0 or None is FRN."
    )


def _find_sizes(layer: Any, input_shape: Shape) -> tuple[tuple[int, ...], Shape]:
    """The layer's axes, ascending and not negative, and the input's sizes along them."""
    axes = canonicalize_axis(layer.axis, input_shape, several=True)
    sizes = tuple(input_shape[axis] for axis in axes)
    if None in sizes:
        raise ValueError(
            f"The input of layer {layer.name!r} must have a known size along axis {layer.axis}, "
            f"for its weights. Received: input_shape={tuple(input_shape)}. Set it in `keras.Input` "
            "or in the layer before."
        )
    return axes, sizes


def _check_epsilon_fits(layer: Any, input_shape: Shape) -> None:
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
    dtype = "float64" if layer.compute_dtype == "float64" else "float32"
    # What XLA makes of a gradient has epsilon ** -1.5, which must not be infinite.
    least = float(np.finfo(dtype).tiny) ** (2 / 3)
    if np.min(layer.epsilon) < least:
        raise ValueError(
            f"`epsilon` must be {least:.1e} or more in {dtype}. Received: epsilon={layer.epsilon!r}"
            ", with which a channel of zeros gives NaN. The paper uses 1e-6."
        )
    spatial = [size for i, size in enumerate(input_shape) if i not in (0, channel)]
    has_small = not layer.initial_epsilon_ratio and np.min(layer.epsilon) < _START_OF_EPSILON
    if all(size == 1 for size in spatial) and has_small:
        warnings.warn(
            f"Layer {layer.name!r} normalizes single positions with a constant epsilon of "
            f"{layer.epsilon}: its output is close to the sign of its input and its gradient "
            "close to 0. Use `learned_epsilon=True`, as the paper does, or a larger epsilon.",
            stacklevel=_find_user_level(),
        )


def _find_user_level() -> int:
    """How many calls above the caller the first line outside of Keras and this package is."""
    inside = tuple(os.path.dirname(file) + os.sep for file in (keras.__file__, __file__))
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
