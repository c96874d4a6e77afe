"""A float32 copy of a model that computes the same function in a form that quantizes well.

Filter Response Normalization does not see a positive factor of an input channel: `x -> k * x` with
`epsilon -> k**2 * epsilon` leaves its output as it is. So the layer before it may scale its filters
until each channel has a root mean square of one, and one integer scale fits all channels.
"""

import collections

import keras
import numpy as np
from keras import layers, ops

from .. import graph
from .. import ops as frn_ops
from ..layers import (
    TLU,
    FilterResponseNormalization,
    FilterResponseNormalizationTLU,
    epsilon_of,
)

# Below this share of a layer's largest mean square 8 bits leave fewer than 4 steps, and LiteRT's
# 16-bit RSQRT, a table, is off by 1 % and more. A layer of which more than the second share of the
# mean squares is there normalizes twice.
_RESOLVED, _UNRESOLVED = 1 / 64, 0.01
# What the first of two normalizations adds. Mean squares spread over a factor of 100 become spread
# over about 10 in each of the two.
_FIRST_EPSILON = 1 / 16


class _MaxPooling(layers.Layer):
    """Max-pooling, unless the normalization before it has done it already."""

    def __init__(self, pooling):
        super().__init__(name=pooling.name, dtype="float32")
        self.pooling = pooling
        self.data_format = pooling.data_format
        self.is_done = False

    def call(self, inputs):
        return inputs if self.is_done else self.pooling(inputs)


class _KnownSizes:
    """Reshapes to sizes that are known without asking for the batch size at run time, which takes
    four operators that no NPU has."""

    def call(self, inputs):
        shape = self.compute_output_shape(inputs.shape)
        if None in shape[1:] or not _is_channels_last(self):
            return super().call(inputs)
        return ops.reshape(inputs, (-1, *shape[1:]))


class _Flatten(_KnownSizes, layers.Flatten):
    pass


class _Reshape(_KnownSizes, layers.Reshape):
    pass


def _of_ranks(ranks, *names):
    return tuple(getattr(layers, name.replace("N", rank, 1)) for name in names for rank in ranks)


_MAX_POOLING = _of_ranks("123", "MaxPoolingND")
_RESHAPING = {layers.Flatten: _Flatten, layers.Reshape: _Reshape}
# A dense layer is a convolution of size 1.
_CONVOLUTIONS = (layers.Dense, *_of_ranks("123", "ConvND"))
_SEPARABLE = _of_ranks("12", "SeparableConvND")
_DEPTHWISE = _of_ranks("12", "DepthwiseConvND")
_TRANSPOSED = _of_ranks("123", "ConvNDTranspose")
# They map a scaled channel to their output, scaled alike.
_COMMUTING = (
    layers.Identity,
    layers.Dropout,
    layers.LeakyReLU,
    _MaxPooling,
    *_of_ranks("123", "CroppingND", "AveragePoolingND", "SpatialDropoutND", "ZeroPaddingND"),
    *_of_ranks("123", "UpSamplingND", "GlobalMaxPoolingND", "GlobalAveragePoolingND"),
)
# f(k * x) = k * f(x) for k > 0.
_HOMOGENEOUS = (keras.activations.linear, keras.activations.relu, keras.activations.leaky_relu)
_OTHER_FLOATS = ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")


class _Normalization(layers.Layer):
    """One of our normalizations with its weights as constants, in a float or an integer form.

    The integer form takes `rsqrt(max(nu2, floor))`, as the rare large values of
    `rsqrt(nu2 + epsilon)` would stretch the integer range of all others. Where the mean squares
    span more than integers resolve, it normalizes twice: with a large epsilon, which brings the
    samples to similar scales, and then exactly. Above the floor both equal the float form.

    Attributes:
        gamma, beta, tau, alpha: The weights as arrays, or None.
        epsilon: All that is added to the mean square.
        floor: The least mean square of the integer form, or None for the float form.
        first_epsilon: The epsilon of the first of two normalizations, or None for one.
        pooling: The max-pooling that follows, as a function, where it comes before the scale.
    """

    def __init__(self, source):
        super().__init__(name=source.name, dtype="float32")
        self.supports_masking = True
        self.axis = source.axis
        self.rank = _rank(source)
        self.epsilon = epsilon_of(source)
        for name in ("gamma", "beta", "tau", "alpha"):
            weight = getattr(source, name, None)
            value = None if weight is None else ops.convert_to_numpy(weight).astype("float32")
            setattr(self, name, value)
        self.floor = self.first_epsilon = self.pooling = None

    @property
    def is_channels_last(self):
        """Whether the channels are the last axis."""
        return self.axis in (-1, self.rank - 1)

    def call(self, inputs, training=None, mask=None):
        if mask is None and (self.floor is not None or self.pooling is not None):
            return self._in_steps(inputs)
        options = {"axis": self.axis, "epsilon": self.epsilon.astype("float32"), "mask": mask}
        y = frn_ops.filter_response_normalization(inputs, self.gamma, self.beta, **options)
        y = self._threshold(y)
        return y if self.pooling is None else self.pooling(y)

    def _in_steps(self, x):
        epsilon, gamma = self.epsilon, self.gamma
        if self.first_epsilon is not None:
            # With e1 and then e2 the result is x / sqrt((1 + e2) * nu2 + e1 * e2).
            x = x * ops.rsqrt(self.mean_square(x) + self.aligned(self.first_epsilon))
            epsilon = epsilon / (self.first_epsilon - epsilon)
            gamma = (1.0 if gamma is None else gamma) * np.sqrt(1 + epsilon)
        nu2 = self.mean_square(x)
        # An eighth of the floor is half a step of 8 bits.
        if self.floor is None or np.max(epsilon) > self.floor / 8:
            nu2 = nu2 + self.aligned(epsilon)
        if self.floor is not None:
            nu2 = ops.maximum(nu2, self.aligned(self.floor))
        scale = ops.rsqrt(nu2)
        scale = scale if gamma is None else scale * self.aligned(gamma)
        y = (x if self.pooling is None else self.pooling(x)) * scale
        return self._threshold(y if self.beta is None else y + self.aligned(self.beta))

    def _threshold(self, y):
        return y if self.tau is None else frn_ops.tlu(y, self.tau, self.alpha, axis=self.axis)

    def mean_square(self, x):
        """The mean square of an input per sample and channel, of the input's rank."""
        axes = [axis for axis in range(1, self.rank) if axis != self.axis % self.rank]
        return ops.mean(x * x, axis=axes, keepdims=True) if axes else x * x

    def aligned(self, value):
        """A constant of the input's rank, as converters want it."""
        value = np.asarray(value, "float32").reshape(-1)
        shape = [1] * self.rank
        shape[self.axis] = value.size
        return value.reshape(shape)


class InferenceCopy:
    """A float32 copy of a functional or Sequential model, with new layers and weights.

    Attributes:
        model: The copy.
        normalizations: The layers of this package in it.
        equalized: Names of those that `equalize` served.
        not_equalized: Dict from the names of the others to the reason.
    """

    def __init__(self, model):
        self.model, copies = graph.copy(model, _copy_layer, _float32)
        for layer, copy in copies.items():
            if not isinstance(copy, _Normalization):
                graph.copy_weights(layer, copy)
        self._wiring = graph.Wiring(self.model)
        inside = dict.fromkeys(call.layer for call in self._wiring.calls)
        self.normalizations = [layer for layer in inside if isinstance(layer, _Normalization)]
        self.equalized, self.not_equalized = [], {}

    def pool_first(self):
        """Takes maxima before the scale where that is exact, as it leaves fewer positions to scale.

        `max(s * x + beta) = s * max(x) + beta` for s > 0, and TLU comes through any maximum. The
        mean squares are those of all positions.
        """
        for layer in self.normalizations:
            rises = layer.gamma is None or np.all(layer.gamma > 0)
            if not rises or layer.alpha is not None or not layer.is_channels_last:
                continue
            pooling = self._next_pooling(layer)
            if pooling is not None:
                # Its method, as a layer that is built takes no new layers.
                layer.pooling, pooling.is_done = pooling.pooling.call, True

    def _next_pooling(self, layer):
        """The `_MaxPooling` behind the layer, or behind its TLU, if nothing else reads either."""
        calls = self._wiring.calls_of(layer)
        if len(calls) != 1:
            return None
        if isinstance(layer, _MaxPooling):
            return layer
        (tensor,) = calls[0].outputs
        readers = self._wiring.readers(tensor)
        if len(readers) != 1 or readers[0] is None or self._wiring.is_checked(tensor):
            return None
        reader = readers[0].layer
        passes_on = isinstance(reader, _MaxPooling) or _is_threshold(reader)
        return self._next_pooling(reader) if passes_on else None

    def equalize(self, batches):
        """Scales each input channel of a normalization to unit root mean square on the batches."""
        self._mean_squares = self._recorded(batches)
        for layer in self.normalizations:
            values = self._mean_squares[layer]
            others = tuple(i for i in range(layer.rank) if i != layer.axis % layer.rank)
            factor = 1 / np.sqrt(values.mean(others) + layer.epsilon)
            try:
                scaled = self._scalable(self._input_of(layer), factor)
            except _NotPossibleError as reason:
                self.not_equalized[layer.name] = str(reason)
                continue
            for target, part in scaled:
                target.set_weights(_scaled_weights(target, part))
            layer.epsilon = layer.epsilon * factor**2
            self._mean_squares[layer] = values * np.expand_dims(factor, others) ** 2
            self.equalized.append(layer.name)

    def use_integer_form(self, floor):
        """Gives each normalization the integer form that fits its mean squares, once equalized.

        `floor` is the least mean square as a share of the layer's largest.
        """
        for layer in self.normalizations:
            values = self._mean_squares[layer] + layer.aligned(layer.epsilon)
            largest = values.max()
            if np.quantile(values, _UNRESOLVED) < _RESOLVED * largest:
                layer.first_epsilon = np.maximum(_FIRST_EPSILON * largest, 2 * layer.epsilon)
                largest = 1.0
            layer.floor = floor * largest
        for call in self._wiring.calls:
            if _is_relu6(call.layer) and not self._fuses(call.inputs[0]):
                # As an operator of its own, TensorFlow Lite Micro computes it in the scale of its
                # input, without an error.
                call.layer.call = lambda x: 6.0 - ops.relu(6.0 - ops.relu(x))

    def _fuses(self, tensor):
        """Whether the operator that gives a tensor takes in an activation that follows."""
        maker, products = self._wiring.maker(tensor), (*_CONVOLUTIONS, *_SEPARABLE, *_DEPTHWISE)
        is_alone = len(self._wiring.readers(tensor)) == 1
        return is_alone and maker is not None and isinstance(maker.layer, (*products, layers.Add))

    def _recorded(self, batches):
        """Dict from each normalization to the mean squares of its inputs."""
        recorded = collections.defaultdict(list)

        def record(layer, x, *_):
            recorded[layer].append(ops.convert_to_numpy(layer.mean_square(x)))

        with graph.watched(self.normalizations, record):
            for batch in batches:
                self.model(graph.inputs_like(self.model, batch), training=False)
        return {x: np.concatenate(values).astype("float64") for x, values in recorded.items()}

    def _is_shared(self, layer):
        return len(self._wiring.calls_of(layer)) != 1

    def _input_of(self, layer):
        if self._is_shared(layer):
            raise _NotPossibleError("it is used in several places")
        if not layer.is_channels_last:
            raise _NotPossibleError("its channels are not the last axis")
        return self._wiring.calls_of(layer)[0].inputs[0]

    def _scalable(self, tensor, factor):
        """Pairs of a layer and its factor that scale a tensor, and nothing else."""
        readers = self._wiring.readers(tensor)
        if len(readers) > 1:
            last = "the model's output" if readers[-1] is None else readers[-1].layer.name
            raise _NotPossibleError(f"what feeds it also feeds {last}")
        call = self._wiring.maker(tensor)
        if call is None:
            raise _NotPossibleError("it is fed by the model's input")
        layer, inputs = call.layer, call.inputs
        if self._is_shared(layer):
            raise _NotPossibleError(f"{layer.name} is used in several places")
        if isinstance(layer, layers.Add) and all(t.shape[-1] == factor.size for t in inputs):
            parts = [factor] * len(inputs)
        elif isinstance(layer, layers.Concatenate) and layer.axis in (-1, len(tensor.shape) - 1):
            parts = np.split(factor, np.cumsum([t.shape[-1] for t in inputs])[:-1])
        elif _commutes(layer):
            parts = [factor]
        elif _is_scalable(layer):
            return [(layer, factor)]
        else:
            raise _NotPossibleError(f"{layer.name} ({type(layer).__name__}) cannot be scaled")
        return [pair for t, part in zip(inputs, parts) for pair in self._scalable(t, part)]


class _NotPossibleError(Exception):
    """Says why a change would not be exact."""


def _copy_layer(layer):
    if type(layer) in (FilterResponseNormalization, FilterResponseNormalizationTLU):
        return _Normalization(layer)
    config = _float32(layer.get_config())
    copy = graph.copy_layer(layer, config, _RESHAPING.get(type(layer)))
    is_pooling = type(layer) in _MAX_POOLING and _is_channels_last(layer)
    return _MaxPooling(copy) if is_pooling else copy


def _rank(layer):
    return len(layer.get_build_config()["input_shape"])


def _commutes(layer):
    """Whether the layer maps a scaled channel to its output, scaled alike."""
    if isinstance(layer, layers.ReLU):
        return layer.max_value is None and not np.any(layer.threshold)
    if isinstance(layer, layers.Activation):
        return layer.activation in _HOMOGENEOUS
    return isinstance(layer, _COMMUTING) and _is_channels_last(layer)


def _is_relu6(layer):
    if isinstance(layer, layers.ReLU):
        return layer.max_value == 6 and not layer.negative_slope and not layer.threshold
    return isinstance(layer, layers.Activation) and layer.activation is keras.activations.relu6


def _is_scalable(layer):
    return (
        isinstance(layer, (*_CONVOLUTIONS, *_SEPARABLE, *_DEPTHWISE, *_TRANSPOSED))
        and layer.activation in _HOMOGENEOUS
        and _is_channels_last(layer)
        and _has_plain_kernel(layer)
    )


def _has_plain_kernel(layer):
    return not (getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None))


def _is_threshold(layer):
    """Whether the layer is `max(y, tau)` with one tau per channel."""
    if not isinstance(layer, TLU) or layer.affine:
        return False
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return [axis % _rank(layer) for axis in axes] == [_rank(layer) - 1]


def _is_channels_last(layer):
    return getattr(layer, "data_format", "channels_last") == "channels_last"


def _scaled_weights(layer, factor):
    weights = layer.get_weights()
    kernel = 1 if isinstance(layer, _SEPARABLE) else 0
    shaped = factor
    if isinstance(layer, _DEPTHWISE):
        shaped = factor.reshape(weights[0].shape[-2:])
    elif isinstance(layer, _TRANSPOSED):
        shaped = factor[:, None]
    weights[kernel] = weights[kernel] * shaped
    if layer.use_bias:
        weights[-1] = weights[-1] * factor
    return weights


def _float32(config):
    """A config whose layers compute in float32."""
    if isinstance(config, dict) and config.get("class_name") == "DTypePolicy":
        config = config["config"]["name"]
    if isinstance(config, dict):
        return {k: _float32(v) if k == "dtype" else _inside(v) for k, v in config.items()}
    return "float32" if isinstance(config, str) and config in _OTHER_FLOATS else _inside(config)


def _inside(config):
    if isinstance(config, (list, tuple)):
        return type(config)(map(_inside, config))
    return _float32(config) if isinstance(config, dict) else config
