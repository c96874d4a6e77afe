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
from .opening import is_batch_normalization, is_distributed, list_uses
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
        self._uses = list_uses(model)
        self._layers = dict.fromkeys(use.layer for use in self._uses)
        self.ratios: dict[Any, Any] = {}
        for layer in self._layers:
            if type(layer) is keras.layers.BatchNormalization:
                least = _SINGLE_POSITION_RATIO if count_positions(layer) == 1 else 0.0
                self.ratios[layer] = max(epsilon_ratio, least)
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
        return graph.copy_layer(layer)

    def keeps_weights(self, layer: Any) -> bool:
        """Whether a layer and its copy have the same weights."""
        return not (layer in self.ratios or layer in self._tlus or is_distributed(layer))

    def _find_sources(self, layer: Any) -> set[Any]:
        """The layers that a layer reads; None is an input."""
        uses = [use for use in self._uses if use.layer is layer]
        producers = [use.wiring.producer(tensor) for use in uses for tensor in use.call.inputs]
        return {_unwrap(producer and producer.layer) for producer in producers}

    def _find_norm(self, layer: Any) -> Any:
        """A layer to replace that the layer reads, or None."""
        return next((x for x in self._find_sources(layer) if x in self.ratios), None)

    def _make_frn(self, bn: Any) -> FilterResponseNormalization:
        config = graph.read_config(bn)
        names = ["name", "trainable", "dtype", "axis", "activity_regularizer"]
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
        return FilterResponseNormalization.from_config(
            {n: config[n] for n in names if n in config} | options
        )

    def describe(self, ratios: Mapping[Any, Any]) -> Iterator[Replacement]:
        """The rows of the report."""
        for layer in filter(lambda x: not is_distributed(x), self._layers):
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


def _unwrap(layer: Any) -> Any:
    """The layer inside of `TimeDistributed` ones."""
    return _unwrap(layer.layer) if is_distributed(layer) else layer


def _make_tlu(activation: Any, bn: Any) -> TLU:
    trainable = getattr(activation, "trainable", True)
    dtype = getattr(activation, "dtype_policy", bn.dtype_policy)
    axis = bn.axis - len(bn.get_build_config()["input_shape"]) if bn.axis > 0 else bn.axis
    tlu = TLU(axis, name=activation.name, trainable=trainable, dtype=dtype)
    tlu.activity_regularizer = getattr(activation, "activity_regularizer", None)
    return tlu


def _is_relu(layer: Any) -> bool:
    if type(layer) is keras.layers.Activation:
        return graph.is_relu(layer.activation)
    kinds = (keras.ops.relu, keras.activations.relu)
    options = [getattr(layer, x, None) for x in ("max_value", "negative_slope", "threshold")]
    is_relu = type(layer) is keras.layers.ReLU or any(graph.is_operation(layer, x) for x in kinds)
    return is_relu and options[0] is None and not any(options)


def count_positions(norm: keras.Layer) -> int | None:
    """The number of spatial positions that a normalization sees, or None if it may change."""
    shape = list(norm.get_build_config()["input_shape"])
    del shape[norm.axis], shape[0]
    return None if None in shape else math.prod(shape)
