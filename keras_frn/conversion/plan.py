"""What becomes of each layer of a model."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from .. import graph
from ..errors import format_count
from ..layers import TLU, FilterResponseNormalization
from .fit import CONSTANT_EPSILON, Affine
from .opening import holds_batch_normalization, is_batch_normalization
from .report import FRN, THRESHOLD, Replacement

__all__ = ["Plan", "count_positions"]

# Below this, a channel of one position would be close to its sign: unit energy whatever the input.
_SINGLE_POSITION_RATIO = 1.0
_ACTIVATIONS = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ELU,
)


class Plan:
    """What becomes of each layer of a model.

    The options are those of `replace_batch_normalization`; `closed` has the names of layers that
    cannot be opened, with the reason.

    Attributes:
        ratios: Dict from the BatchNormalization layers to replace to their epsilon / mean square.
        copies: Dict from each layer inside of a `TimeDistributed` to its copy.
    """

    def __init__(
        self,
        model: keras.Model,
        replace_activations: bool,
        epsilon_ratio: float,
        learned_epsilon: Any,
        closed: Mapping[str, str],
    ) -> None:
        self._learned_epsilon, self._closed = learned_epsilon, closed
        self.copies: dict[Any, Any] = {}
        self._wirings = [graph.Wiring(model)]
        self.ratios: dict[Any, Any] = {}
        for wiring in self._wirings:  # which grows
            for call in wiring.calls:
                inside = _list_distributed(call.layer)
                self._wirings += [graph.Wiring(x) for x in inside if graph.is_graph(x)]
                for layer in (call.layer, *inside):
                    if type(layer) is keras.layers.BatchNormalization:
                        single = count_positions(layer) == 1
                        least = _SINGLE_POSITION_RATIO if single else 0.0
                        self.ratios[layer] = max(epsilon_ratio, least)
        self._layers = dict.fromkeys(call.layer for w in self._wirings for call in w.calls)
        self._tlus = {
            layer: self._find_norm(layer)
            for layer in (self._layers if replace_activations else ())
            if _is_relu(layer) and self._find_norm(layer) and len(self._find_sources(layer)) == 1
        }

    def changes(self, model: keras.Model) -> bool:
        """Whether anything in a model is replaced."""
        return not {*self.ratios, *self._tlus}.isdisjoint(graph.list_layers(model))

    def copy_layer(self, layer: Any) -> Any:
        """The layer that takes the place of a layer."""
        if layer in self.ratios:
            return self._make_frn(layer)
        if layer in self._tlus:
            return _make_tlu(layer, self._tlus[layer])
        for inner in _list_distributed(layer):
            if graph.is_graph(inner):
                copy, copies = graph.copy(inner, self.copy_layer, changes=self.changes)
                self.copies |= copies
            else:
                copy = self.copies[inner] = self.copy_layer(inner)
            options = {"name": layer.name, "trainable": layer.trainable}
            return keras.layers.TimeDistributed(copy, dtype=layer.dtype_policy, **options)
        return graph.copy_layer(layer)

    def keeps_weights(self, layer: Any) -> bool:
        """Whether a layer and its copy have the same weights."""
        return not (layer in self.ratios or layer in self._tlus or _list_distributed(layer))

    def _find_sources(self, layer: Any) -> set[Any]:
        """The layers that a layer reads; None is an input."""
        calls = [(wiring, call) for wiring in self._wirings for call in wiring.calls_of(layer)]
        producers = [wiring.producer(tensor) for wiring, call in calls for tensor in call.inputs]
        return {producer and producer.layer for producer in producers}

    def _find_norm(self, layer: Any) -> Any:
        """A layer to replace that the layer reads, or None."""
        return next((x for x in self._find_sources(layer) if x in self.ratios), None)

    def _make_frn(self, bn: Any) -> FilterResponseNormalization:
        config = bn.get_config()
        names = ["name", "trainable", "dtype", "axis"]
        for weight in ("beta", "gamma"):
            names += [f"{weight}_{x}" for x in ("initializer", "regularizer", "constraint")]
        options: dict[str, Any] = {"epsilon": CONSTANT_EPSILON}
        if count_positions(bn) != 1:
            options["epsilon_ratio"] = self.ratios[bn] or None
        elif self._learned_epsilon:
            options["learned_epsilon"] = self._learned_epsilon
        else:
            mean_square = Affine.of(bn).mean_square
            options["epsilon"] = (CONSTANT_EPSILON + self.ratios[bn] * mean_square).tolist()
        return FilterResponseNormalization.from_config({**{n: config[n] for n in names}, **options})

    def describe(self, ratios: Mapping[Any, Any]) -> Iterator[Replacement]:
        """The rows of the report."""
        layers = dict(self._layers)
        layers |= dict.fromkeys(self.ratios)  # those inside of a `TimeDistributed`, too
        for layer in layers:
            row: dict[str, Any] = {"layer": layer.name, "kind": type(layer).__name__}
            inside = filter(is_batch_normalization, (layer, *graph.list_layers(layer)))
            left = [x for x in inside if x not in self.ratios]
            if layer in self.ratios:
                row |= {"positions": count_positions(layer)}
                row |= {"epsilon_ratio": float(np.median(ratios[layer]))}
                yield Replacement(**row, action="replaced", reason=FRN)
            elif layer in self._tlus:
                yield Replacement(**row, action="replaced", reason=THRESHOLD)
            elif left and not graph.is_graph(layer):
                reason = self._closed.get(layer.name, "not a plain BatchNormalization")
                if layer not in left:
                    count = format_count(len(left), "BatchNormalization layer")
                    reason = f"{count} inside: {reason}"
                yield Replacement(**row, action="kept", reason=reason, left=len(left))
            elif self._find_norm(layer) and (isinstance(layer, _ACTIVATIONS) or _is_relu(layer)):
                alone = len(self._find_sources(layer)) == 1
                reason = "not asked for" if alone else "other layers come before it too"
                reason = reason if _is_relu(layer) else "not a ReLU"
                yield Replacement(**row, action="kept", reason=reason)


def _list_distributed(layer: Any) -> list[Any]:
    """What a `TimeDistributed` layer applies to each step, if it holds BatchNormalization."""
    if type(layer) is not keras.layers.TimeDistributed:
        return []
    inner = layer.layer
    is_known = type(inner) is keras.layers.BatchNormalization or graph.is_graph(inner)
    return [inner] if is_known and holds_batch_normalization(layer) else []


def _make_tlu(activation: Any, bn: Any) -> TLU:
    trainable = getattr(activation, "trainable", True)
    dtype = getattr(activation, "dtype_policy", bn.dtype_policy)
    return TLU(bn.axis, name=activation.name, trainable=trainable, dtype=dtype)


def _is_relu(layer: Any) -> bool:
    if type(layer) is keras.layers.ReLU:
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    if type(layer) is keras.layers.Activation:
        return layer.activation is keras.activations.relu
    kinds = (keras.ops.relu, keras.activations.relu)
    options = [getattr(layer, x, None) for x in ("max_value", "negative_slope", "threshold")]
    is_relu = any(graph.is_operation(layer, kind) for kind in kinds)
    return is_relu and options[0] is None and not any(options)


def count_positions(norm: keras.Layer) -> int | None:
    """The number of spatial positions that a normalization sees, or None if it may change."""
    shape = list(norm.get_build_config()["input_shape"])
    del shape[norm.axis], shape[0]
    return None if None in shape else math.prod(shape)
