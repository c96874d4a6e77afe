"""Layers that hold BatchNormalization inside, as nested models whose layers can be replaced."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from .. import graph

__all__ = [
    "Use",
    "copy_model",
    "is_batch_normalization",
    "is_distributed",
    "list_uses",
    "open_layers",
]


def is_batch_normalization(layer: Any) -> bool:
    """Whether a layer is BatchNormalization, or another's layer with the same statistics."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return True
    names = [weight.name for weight in getattr(layer, "weights", ())]
    return "moving_variance" in names and not graph.list_layers(layer)


def _holds_batch_normalization(layer: Any) -> bool:
    """Whether a layer that is no model of known wiring has BatchNormalization inside."""
    return not graph.is_graph(layer) and any(map(is_batch_normalization, graph.list_layers(layer)))


def is_distributed(layer: Any) -> bool:
    """Whether a layer is `TimeDistributed`, which calls the layer inside it."""
    return type(layer) is keras.layers.TimeDistributed


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A layer where it is used: in a call of its own, or of `depth` `TimeDistributed` around it."""

    layer: Any
    call: graph.Call
    wiring: graph.Wiring
    depth: int = 0


def list_uses(model: keras.Model) -> list[Use]:
    """All uses of all layers in a model, with those inside of `TimeDistributed` layers."""
    found: dict[keras.Model, list[Use]] = {}

    def follow(inner: keras.Model) -> None:
        if inner not in found:
            wiring = graph.Wiring(inner)
            found[inner] = [use for call in wiring.calls for use in split(call, wiring)]

    def split(call: graph.Call, wiring: graph.Wiring) -> Iterator[Use]:
        use = Use(call.layer, call, wiring)
        yield use
        while is_distributed(use.layer):
            use = dataclasses.replace(use, layer=use.layer.layer, depth=use.depth + 1)
            yield use
        if use.depth and graph.is_graph(use.layer):
            follow(use.layer)

    follow(model)
    return [use for uses in found.values() for use in uses]


def copy_model(
    model: keras.Model,
    copy_one: Callable[[Any], Any],
    changes: Callable[[keras.Model], bool] = lambda model: True,
) -> tuple[keras.Model, dict[Any, Any]]:
    """Copies a model as `graph.copy` does, and the layers inside of `TimeDistributed` as others."""
    copies: dict[Any, Any] = {}

    def copy_inside(layer: Any) -> Any:
        if not is_distributed(layer):
            return copy_one(layer)
        inner, _ = graph.copy(layer.layer, copy_inside, changes=changes, copies=copies)
        options = {"name": layer.name, "trainable": layer.trainable}
        return keras.layers.TimeDistributed(inner, dtype=layer.dtype_policy, **options)

    return graph.copy(model, copy_inside, changes=changes, copies=copies)


def open_layers(model: keras.Model) -> tuple[keras.Model, dict[str, str]]:
    """Copies a model, with nested models in place of layers that hold BatchNormalization.

    Layers that hold others and that no file could give back, as their constructors do not take
    their config, are opened, too.

    A layer is opened by tracing the `call` of a copy, and only if the result has the same weights
    and gives the same. Returns the model itself if there is nothing to open, and a dict from the
    names of the layers that stay closed to the reason.
    """
    uses = list_uses(model)
    opened: dict[Any, keras.Model] = {}
    closed: dict[str, str] = {}
    for layer in dict.fromkeys(use.layer for use in uses):
        if is_distributed(layer) or (not _holds_batch_normalization(layer) and _is_readable(layer)):
            continue
        try:
            opened[layer] = _open(layer, [use for use in uses if use.layer is layer])
        except _StaysClosedError as reason:
            closed[layer.name] = str(reason)
    if not opened:
        return model, closed
    result, copies = copy_model(model, lambda x: opened.get(x) or graph.copy_layer(x))
    for layer, copy in copies.items():
        if layer not in opened and not is_distributed(layer):
            graph.copy_weights(layer, copy)
    graph.copy_trainable(copies)
    # What was inside may hold more of them.
    result, more = open_layers(result)
    return result, closed | more


def _is_readable(layer: Any) -> bool:
    """Whether a layer can be made from its config, as a file does it."""
    if graph.is_graph(layer) or not graph.list_layers(layer):
        return True
    try:
        type(layer).from_config(layer.get_config())
    except TypeError:
        return False
    return True


class _StaysClosedError(Exception):
    """Says why a layer cannot be opened."""


def _open(layer: keras.Layer, uses: list[Use]) -> keras.Model:
    """A functional model of what a layer computes, with layers and weights of its own."""
    if any(len(use.call.inputs) != 1 or set(use.call.options) - {"training"} for use in uses):
        raise _StaysClosedError("it is called with more than one tensor")
    (symbolic,), depth = uses[0].call.inputs, uses[0].depth
    dtype, shape = symbolic.dtype, list(symbolic.shape)
    del shape[1 : 1 + depth]

    def make_input() -> keras.KerasTensor:
        return keras.Input(batch_shape=shape, dtype=dtype)

    has_training = "training" in inspect.signature(layer.call).parameters
    traces = []
    try:
        copy = graph.copy_layer(layer)
        copy(make_input())  # builds it
        copy.set_weights(layer.get_weights())
        for inside, inner_copy in zip(graph.list_layers(layer), graph.list_layers(copy)):
            inner_copy.name = inside.name
        for options in [{"training": True}, {"training": False}, {}] if has_training else [{}]:
            inputs = make_input()
            traces.append(keras.Model(inputs, copy.call(inputs, **options), name=layer.name))
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise _StaysClosedError(f"its `call` cannot be traced: {text[0]}") from error
    opened = traces[-1]
    orders = [[type(step.layer) for step in graph.unroll(trace)[0]] for trace in traces]
    if any(order != orders[-1] for order in orders):
        raise _StaysClosedError("its `call` differs in training")
    own = [{id(weight) for weight in x.weights} for x in (copy, opened)]
    if own[0] != own[1] or len(copy.losses) != len(opened.losses):
        raise _StaysClosedError("it has weights or losses outside of the layers inside it")
    opened.trainable = layer.trainable
    graph.copy_trainable({layer: copy})
    sizes = [size or 8 for size in shape[1:]]
    x = np.random.default_rng(0).normal(size=(shape[0] or 2, *sizes)).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [keras.tree.flatten(f(x, training=False)) for f in (layer, opened)]
    for expected, actual in zip(*(map(keras.ops.convert_to_numpy, r) for r in results)):
        # The same operations in the same order, up to how kernels round.
        if not np.allclose(expected, actual, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise _StaysClosedError("its `call`, traced, gives something else")
    return opened
