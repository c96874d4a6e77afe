"""A float32 copy of a model that computes the same function in a form that quantizes well.

Filter Response Normalization does not see a positive factor of an input channel: `x -> k * x` with
`epsilon -> k**2 * epsilon` leaves its output as it is. So the layer before it may scale its filters
until each channel has a root mean square of one, and one integer scale fits all channels.
"""

import collections
import contextlib
import functools
import math
from collections.abc import Container, Iterable
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from .. import graph
from ..errors import ArgumentError
from ..layers import TLU, FilterResponseNormalization
from ..typing import Array, Batch, Tensor
from .inference_layers import (
    REPLACED,
    Activation,
    ActivationLayer,
    Kept,
    MaxPooling,
    Normalization,
    is_channels_last,
    list_classes,
    rank_of,
)

__all__ = ["InferenceCopy"]

# Below this share of a layer's largest mean square 8 bits leave fewer than 4 steps, and LiteRT's
# 16-bit RSQRT, a table, is off by 1% and more. A layer of which more than the second share of the
# mean squares is there normalizes twice.
_RESOLVED, _UNRESOLVED = 1 / 64, 0.01
# A quarter of the largest number of half precision: other samples may have larger sums.
_LARGEST_SUM = 2.0**14
# What the first of two normalizations adds. Mean squares spread over a factor of 100 become spread
# over about 10 in each of the two.
_FIRST_EPSILON = 1 / 16


_MAX_POOLING = list_classes("123", "MaxPoolingND")
# A dense layer is a convolution of size 1.
_CONVOLUTIONS = (layers.Dense, *list_classes("123", "ConvND"))
_SEPARABLE = list_classes("12", "SeparableConvND")
_DEPTHWISE = list_classes("12", "DepthwiseConvND")
_TRANSPOSED = list_classes("123", "ConvNDTranspose")
_SCALABLE = (*_CONVOLUTIONS, *_SEPARABLE, *_DEPTHWISE, *_TRANSPOSED)
_WITH_ACTIVATION = (*_SCALABLE, layers.EinsumDense)
# Their operators take in an activation that follows.
_FUSING = (*_CONVOLUTIONS, *_SEPARABLE, *_DEPTHWISE, layers.Add)
# They map a scaled channel to their output, scaled alike.
_COMMUTING = (
    layers.Identity,
    layers.Dropout,
    layers.LeakyReLU,
    layers.PReLU,
    MaxPooling,
    *list_classes("123", "CroppingND", "AveragePoolingND", "SpatialDropoutND", "ZeroPaddingND"),
    *list_classes("123", "UpSamplingND", "GlobalMaxPoolingND", "GlobalAveragePoolingND"),
)
_OTHER_FLOATS = ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")


class InferenceCopy:
    """A float32 copy of a functional or Sequential model, with new layers and weights.

    Attributes:
        model: The copy.
        normalizations: The layers of this package in it.
        equalized: Names of those that `equalize` served.
        not_equalized: Dict from the names of the others to the reason.
    """

    def __init__(self, model: keras.Model) -> None:
        kept: set[keras.layers.Layer] = set()
        count = -1
        while len(kept) > count:  # again, if copies had other weights
            count = len(kept)
            make = functools.partial(_copy_layer, kept=kept)
            self.model, copies = graph.copy(model, make, _to_float32)
            for layer, copy in copies.items():
                if not isinstance(copy, (ActivationLayer, Kept, Normalization)):
                    try:
                        graph.copy_weights(layer, copy)
                    except ArgumentError:
                        kept.add(layer)
        self._kinds = {copy: type(layer).__name__ for layer, copy in copies.items()}
        self._wiring = graph.Wiring(self.model)
        inside = dict.fromkeys(call.layer for call in self._wiring.calls)
        self.normalizations = [layer for layer in inside if isinstance(layer, Normalization)]
        self.equalized: list[str] = []
        self._positions: dict[Normalization, int] = {}
        self.not_equalized = {
            f"{layer.name}/{norm.name}": f"it is inside of {layer.name} ({self._kinds[layer]})"
            for layer in inside
            for norm in graph.list_layers(layer)
            if isinstance(norm, FilterResponseNormalization)
        }
        for layer in inside:
            if isinstance(layer, FilterResponseNormalization):
                self.not_equalized[layer.name] = f"{self._kinds[layer]} has code of its own"

    def pool_first(self) -> None:
        """Takes maxima before the scale where that is exact, as it leaves fewer positions to scale.

        `max(s * x + beta) = s * max(x) + beta` for s > 0, and TLU comes through any maximum. The
        mean squares are those of all positions.
        """
        for layer in self.normalizations:
            rises = layer.gamma is None or np.all(layer.gamma > 0)
            if not rises or layer.alpha is not None or not layer.is_channels_last or layer.rank > 4:
                continue
            pooling = self._next_pooling(layer)
            if pooling is not None:
                # Its method, as a layer that is built takes no new layers.
                layer.pooling, pooling.is_done = pooling.pooling.call, True

    def _next_pooling(self, layer: keras.layers.Layer) -> MaxPooling | None:
        """The `MaxPooling` behind the layer, or behind its TLU, if nothing else reads either."""
        calls = self._wiring.calls_of(layer)
        if len(calls) != 1:
            return None
        if isinstance(layer, MaxPooling):
            return layer
        (tensor,) = calls[0].outputs
        consumers = self._wiring.consumers(tensor)
        if len(consumers) != 1 or consumers[0] is None or self._wiring.is_checked(tensor):
            return None
        consumer = consumers[0].layer
        passes_on = isinstance(consumer, MaxPooling) or _is_threshold(consumer)
        return self._next_pooling(consumer) if passes_on else None

    def equalize(
        self, batches: Iterable[Batch], least_epsilon: float = 0.0, *, to_peaks: bool = False
    ) -> None:
        """Scales each input channel of a normalization to unit root mean square on the batches.

        With `to_peaks` the root of its mean 8th power is one, a smooth peak: channels of equal
        peaks lose least on a grid of integers that they share. On maps so large that a sum of
        squares would come near the largest number of half precision, to less.
        """
        self._mean_squares, peaks = self._record(batches, to_peaks)
        for layer in self.normalizations:
            values, others = self._mean_squares[layer], _other_axes(layer)
            size = np.sqrt(values.mean(others) + layer.epsilon)
            factor = 1 / np.maximum(size, peaks.get(layer, 0.0))
            sums = self._positions[layer] * values * np.expand_dims(factor, others) ** 2
            factor = factor * np.sqrt(_LARGEST_SUM / max(sums.max(), _LARGEST_SUM))
            try:
                scaled = self._find_scalable(self._input_of(layer), factor)
            except _NotPossibleError as reason:
                self.not_equalized[layer.name] = str(reason)
                continue
            for target, part in scaled:
                target.set_weights(_scale_weights(target, part))
            layer.epsilon = np.maximum(layer.epsilon * factor**2, least_epsilon)
            self._mean_squares[layer] = values * np.expand_dims(factor, others) ** 2
            self.equalized.append(layer.name)

    def use_integer_form(self, floor: float, bits: int) -> None:
        """Gives layers the form that integers of so many bits need, once equalized.

        That of a normalization fits its mean squares. `floor` is the least of them as a share of
        the layer's largest.
        """
        for layer in self.normalizations:
            values = self._mean_squares[layer]
            values = values + layer.align(layer.epsilon, values)
            largest = values.max()
            if np.quantile(values, _UNRESOLVED) < _RESOLVED * largest:
                layer.first_epsilon = np.maximum(_FIRST_EPSILON * largest, 2 * layer.epsilon)
                largest = 1.0
            layer.floor = floor * largest
        for call in self._wiring.calls:
            activation = getattr(call.layer, "activation", None)
            if isinstance(activation, Activation):
                is_fused = activation.is_fusible and self._fuses_activation(call)
                activation.in_steps = not is_fused and (bits == 16 or activation.wants_steps)

    def _fuses_activation(self, call: graph.Call) -> bool:
        """Whether the activation of a call becomes part of the operator before it."""
        if not isinstance(call.layer, ActivationLayer):
            return isinstance(call.layer, _FUSING)
        (tensor,) = call.inputs
        producer = self._wiring.producer(tensor)
        is_alone = len(self._wiring.consumers(tensor)) == 1
        return is_alone and producer is not None and isinstance(producer.layer, _FUSING)

    def _record(
        self, batches: Iterable[Batch], with_peaks: bool
    ) -> tuple[dict[Normalization, Array], dict[Normalization, Array]]:
        """Dicts from each normalization to the mean squares of its inputs, and, if asked for, to
        the peak of each channel: the 8th root of the mean 8th power."""
        recorded: dict[Normalization, Batch] = collections.defaultdict(list)
        powers: dict[Normalization, Batch] = collections.defaultdict(list)

        def record(layer: Normalization, x: Tensor, *_: Any) -> None:
            nu2 = ops.convert_to_numpy(layer.mean_square(x)).astype("float64")
            positions = math.prod(x.shape) // max(nu2.size, 1)
            self._positions[layer] = max(positions, self._positions.get(layer, 1))
            recorded[layer].append(nu2)
            if with_peaks:
                values = ops.convert_to_numpy(x).astype("float64")
                powers[layer].append(len(x) * np.mean(values**8, _other_axes(layer)))

        with graph.watch_calls(self.normalizations, record):
            for batch in batches:
                self.model(graph.inputs_like(self.model, batch), training=False)
        found = {x: np.concatenate(values) for x, values in recorded.items()}
        for layer, values in found.items():
            if not np.isfinite(values).all():
                raise ArgumentError(
                    "calibration_data",
                    "must have finite squares in every layer. Received: an infinite mean square at "
                    f"the input of {layer.name}. Scale the data down.",
                )
        return found, {x: (sum(p) / len(found[x])) ** 0.125 for x, p in powers.items()}

    def _is_shared(self, layer: keras.layers.Layer) -> bool:
        return len(self._wiring.calls_of(layer)) != 1

    def _input_of(self, layer: Normalization) -> Tensor:
        if self._is_shared(layer):
            raise _NotPossibleError("it is used in several places")
        if not layer.is_channels_last:
            raise _NotPossibleError("its channels are not the last axis")
        return self._wiring.calls_of(layer)[0].inputs[0]

    def _find_scalable(
        self, tensor: Tensor, factor: Array
    ) -> list[tuple[keras.layers.Layer, Array]]:
        """Pairs of a layer and its factor that scale a tensor, and nothing else."""
        consumers = self._wiring.consumers(tensor)
        if len(consumers) > 1:
            last = "the model's output" if consumers[-1] is None else consumers[-1].layer.name
            raise _NotPossibleError(f"what feeds it also feeds {last}")
        call = self._wiring.producer(tensor)
        if call is None:
            raise _NotPossibleError("it is fed by the model's input")
        layer, inputs = call.layer, call.inputs
        if self._is_shared(layer):
            raise _NotPossibleError(f"{layer.name} is used in several places")
        kind = self._kinds.get(layer, type(layer).__name__)
        refusal = _NotPossibleError(f"{layer.name} ({kind}) cannot be scaled")
        if graph.has_own_code(layer):
            raise refusal
        if isinstance(layer, layers.Add) and all(t.shape[-1] == factor.size for t in inputs):
            parts = [factor] * len(inputs)
        elif isinstance(layer, layers.Concatenate) and layer.axis in (-1, len(tensor.shape) - 1):
            parts = np.split(factor, np.cumsum([t.shape[-1] for t in inputs])[:-1])
        elif _commutes(layer):
            parts = [factor]
        elif _is_scalable(layer):
            return [(layer, factor)]
        else:
            raise refusal
        return [pair for t, part in zip(inputs, parts) for pair in self._find_scalable(t, part)]


class _NotPossibleError(Exception):
    """Says why a change would not be exact."""


def _copy_layer(
    layer: keras.layers.Layer, kept: Container[keras.layers.Layer]
) -> keras.layers.Layer:
    if isinstance(layer, FilterResponseNormalization) and not graph.has_own_code(layer):
        return Normalization(layer)
    activation = Activation.of(layer)
    if activation is not None:
        return ActivationLayer(layer.name, activation)
    if layer not in kept:
        with contextlib.suppress(ArgumentError):
            copy = graph.copy_layer(layer, _to_float32, REPLACED.get(type(layer)))
            if isinstance(copy, _WITH_ACTIVATION):
                copy.activation = Activation.of(copy.activation) or copy.activation
            is_pooling = type(layer) in _MAX_POOLING and is_channels_last(layer)
            return MaxPooling(copy) if is_pooling else copy
    if layer.compute_dtype != "float32":
        raise ArgumentError(
            "model",
            "must have layers in float32, or that `get_config` describes. Received: "
            f"{layer.name} in {layer.compute_dtype}. Load it in float32.",
        )
    return Kept(layer)


def _commutes(layer: Any) -> bool:
    """Whether the layer maps a scaled channel to its output, scaled alike."""
    if isinstance(layer, layers.ReLU):
        return layer.max_value is None and not np.any(layer.threshold)
    if isinstance(layer, (layers.Activation, ActivationLayer)):
        return _is_homogeneous(layer.activation)
    return isinstance(layer, _COMMUTING) and is_channels_last(layer)


def _is_homogeneous(activation: Any) -> bool:
    """Whether f(k * x) = k * f(x) for k > 0."""
    if isinstance(activation, Activation):
        return activation.is_homogeneous
    return activation in (keras.activations.linear, keras.activations.relu)


def _is_scalable(layer: keras.layers.Layer) -> bool:
    return (
        isinstance(layer, _SCALABLE)
        and _is_homogeneous(getattr(layer, "activation", None))
        and is_channels_last(layer)
        and not getattr(layer, "lora_enabled", False)
        and not getattr(layer, "quantization_mode", None)
    )


def _other_axes(layer: Normalization) -> tuple[int, ...]:
    """All axes but the channels."""
    return tuple(i for i in range(layer.rank) if i != layer.axis % layer.rank)


def _is_threshold(layer: keras.layers.Layer) -> bool:
    """Whether the layer is `max(y, tau)` with one tau per channel."""
    if not isinstance(layer, TLU) or graph.has_own_code(layer) or layer.affine:
        return False
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    return [axis % rank_of(layer) for axis in axes] == [rank_of(layer) - 1]


def _scale_weights(layer: keras.layers.Layer, factor: Array) -> Batch:
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


def _to_float32(value: Any, key: str = "dtype") -> Any:
    """A config, or what it has under a key, with float32 for every other float that computes."""
    if isinstance(value, dict):
        if value.get("class_name") == "DTypePolicy":
            return _to_float32(value["config"]["name"])
        return {inner: _to_float32(item, inner) for inner, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_float32(item, "") for item in value)
    return "float32" if key == "dtype" and value in _OTHER_FLOATS else value
