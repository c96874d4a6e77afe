"""Layers that hold BatchNormalization inside, as nested models whose layers can be replaced."""

import inspect
import warnings
from typing import Any

import keras
import numpy as np

from .. import graph

__all__ = ["holds_batch_normalization", "is_batch_normalization", "open_layers"]


def is_batch_normalization(layer: Any) -> bool:
    """Whether a layer is BatchNormalization, or another's layer with the same statistics."""
    if isinstance(layer, keras.layers.BatchNormalization):
        return True
    names = [weight.name for weight in getattr(layer, "weights", ())]
    return "moving_variance" in names and not graph.list_layers(layer)


def holds_batch_normalization(layer: Any) -> bool:
    """Whether a layer that is no model of known wiring has BatchNormalization inside."""
    return not graph.is_graph(layer) and any(map(is_batch_normalization, graph.list_layers(layer)))


def open_layers(model: keras.Model) -> tuple[keras.Model, dict[str, str]]:
    """Copies a model, with nested models in place of layers that hold BatchNormalization.

    Layers that hold others and that no file could give back, as their constructors do not take
    their config, are opened, too.

    A layer is opened by tracing the `call` of a copy, and only if the result has the same weights
    and gives the same. Returns the model itself if there is nothing to open, and a dict from the
    names of the layers that stay closed to the reason.
    """
    wiring = graph.Wiring(model)
    opened: dict[Any, keras.Model] = {}
    closed: dict[str, str] = {}
    for layer in dict.fromkeys(call.layer for call in wiring.calls):
        holds = holds_batch_normalization(layer)
        is_distributed = isinstance(layer, keras.layers.TimeDistributed)
        if is_distributed or (not holds and _is_readable(layer)):
            continue
        try:
            opened[layer] = _open(layer, wiring.calls_of(layer))
        except _StaysClosedError as reason:
            closed[layer.name] = str(reason)
    if not opened:
        return model, closed
    result, copies = graph.copy(model, lambda x: opened.get(x) or graph.copy_layer(x))
    for layer, copy in copies.items():
        if layer not in opened:
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


def _open(layer: keras.Layer, calls: list[graph.Call]) -> keras.Model:
    """A functional model of what a layer computes, with layers and weights of its own."""
    if any(len(call.inputs) != 1 or set(call.options) - {"training"} for call in calls):
        raise _StaysClosedError("it is called with more than one tensor")
    symbolic = calls[0].inputs[0]

    def make_input() -> keras.KerasTensor:
        return keras.Input(batch_shape=symbolic.shape, dtype=symbolic.dtype)

    has_training = "training" in inspect.signature(layer.call).parameters
    traces = []
    try:
        copy = graph.copy_layer(layer)
        copy(make_input())  # builds it
        copy.set_weights(layer.get_weights())
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
    shape = [size or 8 for size in symbolic.shape[1:]]
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(symbolic.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [keras.tree.flatten(f(x, training=False)) for f in (layer, opened)]
    for expected, actual in zip(*(map(keras.ops.convert_to_numpy, r) for r in results)):
        # The same operations in the same order, up to how kernels round.
        if not np.allclose(expected, actual, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise _StaysClosedError("its `call`, traced, gives something else")
    return opened
