"""The one way to read and to copy the wiring of a functional or Sequential model."""

import collections
import contextlib
import dataclasses
import math

import keras


def is_graph(layer):
    """Whether a layer is a model whose wiring is known."""
    return isinstance(layer, keras.Model) and isinstance(layer, (keras.Sequential, keras.Function))


def layers(model):
    """Lists every layer of a model once, those inside of other layers and models included."""
    return model._flatten_layers(include_self=False)


def positions(layer):
    """The number of spatial positions that a normalization sees, or None where it may change."""
    shape = list(layer.get_build_config()["input_shape"])
    del shape[layer.axis], shape[0]
    return None if None in shape else math.prod(shape)


@contextlib.contextmanager
def watched(layers, watch):
    """While it lasts, each eager call of these layers ends in `watch(layer, x, outputs, mask)`."""

    def watching(layer, call):
        def watched_call(x, *args, mask=None, **kwargs):
            options = kwargs if mask is None else {**kwargs, "mask": mask}
            outputs = call(x, *args, **options)
            watch(layer, x, outputs, mask)
            return outputs

        return watched_call

    layers = list(layers)
    try:
        for layer in layers:  # past Keras' and PyTorch's own ways of setting an attribute
            vars(layer)["call"] = watching(layer, layer.call)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def inputs_like(model, arrays):
    """Arrays in the order of `model.inputs`, nested as the model takes them."""
    return keras.tree.pack_sequence_as(_ends(model)[0], arrays)


def _ends(model):
    """The symbolic inputs and outputs, nested as they are."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def _plain(model):
    """The same wiring as a plain functional model, without a compiled state or a config."""
    return keras.Model(*_ends(model), name=model.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: the symbolic tensors that it reads and those that it gives."""

    layer: object
    inputs: list
    outputs: list


class Wiring:
    """The calls of all layers of a model, with nested models replaced by what is inside.

    A tensor is the same on both sides of the border of a nested model. A nested model that is
    called more than once stays one layer: its own wiring begins at its inputs and ends at its
    outputs. `calls` is in the order of execution, and `inputs` are those of the model.
    """

    def __init__(self, model):
        scopes = {}
        calls = list(_calls(model, scopes))
        count = collections.Counter(call.layer for call in calls)
        opened = [c for c in calls if is_graph(c.layer) and count[c.layer] == 1]
        self._same, crossing = {}, []
        for call in opened:
            inputs, outputs = scopes[call.layer]
            self._same |= {id(inside): outside for inside, outside in zip(inputs, call.inputs)}
            self._same |= {id(outside): inside for inside, outside in zip(outputs, call.outputs)}
            if not isinstance(call.layer, keras.Sequential):
                crossing += call.inputs + call.outputs
        self.inputs = [self._tensor(tensor) for tensor in scopes[model][0]]
        self._checked = {id(self._tensor(tensor)) for tensor in crossing}
        self._makers, self._readers = {}, collections.defaultdict(list)
        self.calls = []
        for call in calls:
            if call in opened:
                continue
            tensors = ([self._tensor(t) for t in ts] for ts in (call.inputs, call.outputs))
            call = Call(call.layer, *tensors)
            self.calls.append(call)
            for tensor in call.inputs:
                self._readers[id(tensor)].append(call)
            for tensor in call.outputs:
                self._makers[id(tensor)] = call
        closed = {call.layer for call in self.calls if is_graph(call.layer)}
        for graph in (model, *closed):
            for tensor in scopes[graph][1]:
                self._readers[id(self._tensor(tensor))].append(None)

    def _tensor(self, tensor):
        """The one tensor that stands for all that are the same across borders."""
        while id(tensor) in self._same:
            tensor = self._same[id(tensor)]
        return tensor

    def calls_of(self, layer):
        """The calls of one layer."""
        return [call for call in self.calls if call.layer is layer]

    def maker(self, tensor):
        """The call that gives a tensor, or None for an input."""
        return self._makers.get(id(tensor))

    def readers(self, tensor):
        """The calls that read a tensor, and a None for each time that it is an output."""
        return self._readers[id(tensor)]

    def is_checked(self, tensor):
        """Whether a functional model compares the sizes of the tensor with what it was built on."""
        return id(tensor) in self._checked


def _calls(model, scopes):
    """The calls in a model and in those inside it. `scopes` gets the inputs and outputs of each."""
    plain, own = _plain(model), {}

    def tensors(symbolic):
        # Two models may have been built on the same symbolic tensor, which is not the same in both.
        return [own.setdefault(id(t), keras.KerasTensor(t.shape, t.dtype)) for t in symbolic]

    scopes[model] = tensors(plain.inputs), tensors(plain.outputs)
    for depth in sorted(plain._nodes_by_depth, reverse=True):
        for node in plain._nodes_by_depth[depth]:
            if node.is_input:
                continue
            yield Call(node.operation, tensors(node.input_tensors), tensors(node.outputs))
            if is_graph(node.operation) and node.operation not in scopes:
                yield from _calls(node.operation, scopes)


def copy(model, copy_one, input_dtype=str):
    """Copies a model, with new layers in the old wiring.

    `copy_one` gives the layer in the place of each layer that is no model, and `input_dtype` the
    dtype in the place of that of an input. Returns the copy, and a dict from each layer to its
    copy, outer models first.
    """
    copies = {}

    def input_like(x):
        # `clone_model` itself would name the inputs after the tensors.
        name = x._keras_history.operation.name
        dtype = input_dtype(x.dtype)
        return keras.Input(batch_shape=x.shape, dtype=dtype, sparse=x.sparse, name=name)

    def copied(layer):
        if layer not in copies:
            copies[layer] = copied_graph(layer) if is_graph(layer) else copy_one(layer)
        return copies[layer]

    def copied_graph(graph):
        if isinstance(graph, keras.Sequential):
            stack = [input_like(graph.inputs[0]), *map(copied, graph.layers)]
            return keras.Sequential(stack, name=graph.name)
        inputs = keras.tree.map_structure(input_like, graph.input)
        return keras.models.clone_model(_plain(graph), inputs, clone_function=copied)

    result = copied(model)
    return result, dict(reversed(copies.items()))


def copy_layer(layer, config=None, layer_class=None):
    """A new layer, of this layer's config and class unless others are given."""
    config = layer.get_config() if config is None else config
    if type(layer) is keras.layers.Lambda:
        # Its config is for files: a function that is read back has lost its module.
        options = {name: config[name] for name in ("name", "dtype", "trainable")}
        return keras.layers.Lambda(
            layer.function, mask=layer.mask, arguments=layer.arguments, **options
        )
    return (layer_class or type(layer)).from_config(config)


def copy_weights(layer, copy):
    """Gives a copy its layer's weights."""
    if not isinstance(layer, keras.Layer) or is_graph(layer):
        return
    copy.set_weights(layer.get_weights())
    if hasattr(copy, "finalize_state"):
        copy.finalize_state()  # of a layer that was adapted to data


def copy_trainable(copies):
    """Gives copies the trainable flags of their layers."""
    # A model hands its flag to its layers, so that the inner ones come last.
    for layer, copy in copies.items():
        if isinstance(layer, keras.Layer) and copy.trainable != layer.trainable:
            copy.trainable = layer.trainable
