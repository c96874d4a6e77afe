"""The three layers: weights and config. The mathematics is in `ops`."""

import keras
from keras import constraints, initializers, ops, regularizers

from . import arguments
from . import ops as frn_ops
from .compilation import run


@keras.saving.register_keras_serializable(package="keras_frn")
class FilterResponseNormalization(keras.layers.Layer):
    """Filter Response Normalization (FRN).

    ```
    nu2 = mean(x * x)          over the spatial positions of one sample and channel
    y   = gamma * x / sqrt(nu2 + epsilon + |learned_epsilon|) + beta
    ```

    Each channel of each sample is divided by its own root mean square. There are no batch
    statistics: training and inference compute the same function, and a sample's result does not
    depend on the others. Follow it with `TLU`, not ReLU (the mean is not subtracted, so the
    threshold has to be learned), or use `FilterResponseNormalizationTLU`. Where there is one
    spatial position (dense features, 1x1 maps), use `learned_epsilon=True`: with a small constant
    epsilon, `x / sqrt(x * x)` is the sign of x, and its gradient is zero.

    Shape:
        Input and output: `(batch, *spatial, channels)`, or `(batch, channels, *spatial)` with
        `axis=1`. Rank 2 or more; spatial sizes may be unknown and may change from call to call, the
        channel size must be known.

    Args:
        axis: Int, the channel axis, as in `keras.layers.BatchNormalization`. Defaults to -1.
        epsilon: Float, or one float per channel, in units of x squared; finite and positive (0 is
            allowed with a learned epsilon). Defaults to 1e-6.
        learned_epsilon: False, True (one learned epsilon per layer, as in the paper), or
            `"per_channel"`. Defaults to False.
        center: Whether to add `beta`. Defaults to True.
        scale: Whether to multiply by `gamma`. Defaults to True.
        beta_initializer: Defaults to `"zeros"`.
        gamma_initializer: Defaults to `"ones"`.
        learned_epsilon_initializer: Defaults to `Constant(1e-4)`. At exactly 0 it would stay there.
        beta_regularizer, gamma_regularizer, learned_epsilon_regularizer: Default to None.
        beta_constraint, gamma_constraint, learned_epsilon_constraint: Default to None.
        jit_compile: True makes the layer one XLA cluster of its own (`torch.compile` on PyTorch),
            eager or in a graph that is not compiled as a whole; when training, its gradient is one,
            too. False adds no compilation. None chooses what measures best: a cluster in TensorFlow
            graphs that train, unless the input is known to be small. Defaults to None.
        **kwargs: `name`, `dtype`, `trainable`. With a half-precision dtype the layer computes in
            float32; under mixed precision its weights are float32.

    Call arguments:
        inputs: Float or integer tensor.
        training: Chooses between two forms of the same function: the one with the cheaper gradient
            when True.
        mask: Booleans, the shape of the input without the channel axis or a leading part of it.
            Positions where it is False do not count in the mean. The mask passes on to the next
            layer.

    Weights, in this order: `gamma (channels,)`, `beta (channels,)`, `learned_epsilon (1,)` or
    `(channels,)`; an attribute is None where the layer has no such weight.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((32, 32, 3)),
    ...     keras.layers.Conv2D(16, 3, use_bias=False),
    ...     keras_frn.FilterResponseNormalization(),
    ...     keras_frn.TLU(),
    ... ])

    Raises:
        ValueError: if an argument, the rank or the channel size does not fit.

    Reference: Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(
        self,
        axis=-1,
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
        self.axis = arguments.channel_axis(axis)
        self.use_learned_epsilon = arguments.learned_epsilon(learned_epsilon)
        self.epsilon = arguments.epsilon(epsilon, learned_epsilon)
        self.center = center
        self.scale = scale
        self.jit_compile = arguments.jit_compile(jit_compile)
        if learned_epsilon_initializer is None:
            learned_epsilon_initializer = initializers.Constant(1e-4)
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
        (axis,), channels = arguments.sizes(self, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes={axis: channels[0]})
        arguments.check_epsilon(self, input_shape, _statistics_dtype(self))
        if self.scale:
            self.gamma = _add_weight(self, "gamma", channels)
        if self.center:
            self.beta = _add_weight(self, "beta", channels)
        if self.use_learned_epsilon:
            shape = channels if self.use_learned_epsilon == "per_channel" else (1,)
            self.learned_epsilon = _add_weight(self, "learned_epsilon", shape)

    def call(self, inputs, training=None, mask=None):
        weights = ("gamma", "beta")
        return self._run(frn_ops.filter_response_normalization, weights, inputs, training, mask)

    def _run(self, function, weights, inputs, training, mask):
        arrays, options = {"mask": mask}, {"epsilon": self.epsilon}
        if self.use_learned_epsilon:
            dtype = _statistics_dtype(self)
            learned = ops.abs(ops.cast(self.learned_epsilon, dtype))
            # An array: a schedule that assigns the weight reaches a traced program.
            arrays["epsilon"] = learned + ops.convert_to_tensor(options.pop("epsilon"), dtype)
        return _run(self, function, weights, inputs, training, arrays, options)

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
    """Thresholded Linear Unit (TLU).

    ```
    z = max(x, tau)            or, with affine=True,    z = max(x, alpha * x + tau)
    ```

    A ReLU whose threshold is learned, for use after Filter Response Normalization, which does not
    subtract the mean. The result is the maximum to the last bit, for every tau.

    Shape:
        Input and output: any shape of rank 2 or more. Sizes along `axis` must be known, others may
        be unknown and may change from call to call.

    Args:
        axis: Int or tuple, the axes along which tau varies (`keras.layers.PReLU(shared_axes=...)`
            names the others). -1 gives one threshold per channel, as in the paper; `(1, 2, 3)` one
            per position of an image. Defaults to -1.
        affine: Whether to learn a slope `alpha` below the threshold. Defaults to False.
        tau_initializer: Defaults to `"zeros"`.
        alpha_initializer: Defaults to `"zeros"`.
        tau_regularizer, alpha_regularizer: Default to None.
        tau_constraint, alpha_constraint: Default to None.
        jit_compile: As in `FilterResponseNormalization`. Defaults to None.
        **kwargs: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: Float or integer tensor.
        training: Chooses between two forms of the same function: the one with the cheaper gradient
            when True.

    Weights, in this order: `tau`, `alpha`, of the input's sizes along `axis`, axes in ascending
    order; `alpha` is None without `affine`.

    Example:

    >>> layer = keras_frn.TLU(tau_initializer=keras.initializers.Constant(-1.0))
    >>> z = layer(np.array([[-2.0, 3.0]]))  # [[-1.0, 3.0]]

    Raises:
        ValueError: if an argument, the rank or a size does not fit.

    Reference: Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(
        self,
        axis=-1,
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
        self.axis = arguments.threshold_axis(axis)
        self.affine = affine
        self.jit_compile = arguments.jit_compile(jit_compile)
        self.tau_initializer = initializers.get(tau_initializer)
        self.alpha_initializer = initializers.get(alpha_initializer)
        self.tau_regularizer = regularizers.get(tau_regularizer)
        self.alpha_regularizer = regularizers.get(alpha_regularizer)
        self.tau_constraint = constraints.get(tau_constraint)
        self.alpha_constraint = constraints.get(alpha_constraint)
        self.tau = None
        self.alpha = None

    def build(self, input_shape):
        axes, sizes = arguments.sizes(self, input_shape)
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape), axes=dict(zip(axes, sizes)))
        self.tau = _add_weight(self, "tau", sizes)
        if self.affine:
            self.alpha = _add_weight(self, "alpha", sizes)

    def call(self, inputs, training=None):
        return _run(self, frn_ops.tlu, ("tau", "alpha"), inputs, training, {}, {})

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

    Equal to `FilterResponseNormalization` followed by `TLU`, and the fastest way to have both: one
    XLA cluster, one pass for all sums of the backward step, and no full-size tensor kept for it but
    the input.

    Shape:
        Input and output: as in `FilterResponseNormalization`.

    Args:
        affine: Whether to learn a slope `alpha` below the threshold. Defaults to False.
        tau_initializer, alpha_initializer: Default to `"zeros"`.
        tau_regularizer, alpha_regularizer: Default to None.
        tau_constraint, alpha_constraint: Default to None.
        axis, epsilon, learned_epsilon, center, scale, jit_compile, beta_*, gamma_*,
            learned_epsilon_*, **kwargs: As in `FilterResponseNormalization`.

    Call arguments: as in `FilterResponseNormalization`.

    Weights, in this order: `gamma (channels,)`, `beta (channels,)`, `learned_epsilon (1,)` or
    `(channels,)`, `tau (channels,)`, `alpha (channels,)`; an attribute is None where the layer has
    no such weight.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((32, 32, 3)),
    ...     keras.layers.Conv2D(16, 3, use_bias=False),
    ...     keras_frn.FilterResponseNormalizationTLU(),
    ... ])

    Raises:
        ValueError: if an argument, the rank or the channel size does not fit.

    Reference: Singh & Krishnan, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(
        self,
        axis=-1,
        epsilon=1e-6,
        learned_epsilon=False,
        center=True,
        scale=True,
        affine=False,
        beta_initializer="zeros",
        gamma_initializer="ones",
        learned_epsilon_initializer=None,
        tau_initializer="zeros",
        alpha_initializer="zeros",
        beta_regularizer=None,
        gamma_regularizer=None,
        learned_epsilon_regularizer=None,
        tau_regularizer=None,
        alpha_regularizer=None,
        beta_constraint=None,
        gamma_constraint=None,
        learned_epsilon_constraint=None,
        tau_constraint=None,
        alpha_constraint=None,
        jit_compile=None,
        **kwargs,
    ):
        super().__init__(
            axis=axis,
            epsilon=epsilon,
            learned_epsilon=learned_epsilon,
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

    def call(self, inputs, training=None, mask=None):
        weights = ("gamma", "beta", "tau", "alpha")
        return self._run(frn_ops.filter_response_normalization_tlu, weights, inputs, training, mask)

    def get_config(self):
        config = {"affine": self.affine, **_weight_config(self, ("tau", "alpha"))}
        return {**super().get_config(), **config}


def _run(layer, function, weights, inputs, training, arrays, options):
    """Calls the op on the inputs and the weights of these names, and returns the layer's compute
    dtype."""
    dtype = _statistics_dtype(layer)
    if keras.backend.standardize_dtype(inputs.dtype) != layer.compute_dtype:
        inputs = ops.cast(inputs, dtype)
    # In half precision the op casts, where a compiler keeps what it casts out of memory.
    arrays = {"x": inputs, **arrays}
    for name in weights:
        weight = getattr(layer, name)
        arrays[name] = None if weight is None else ops.cast(weight, dtype)
    options = {"axis": layer.axis, "training": bool(training), **options}
    return ops.cast(run(function, arrays, options, layer.jit_compile), layer.compute_dtype)


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
