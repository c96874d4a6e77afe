"""Reading and copying the graph of layers of a functional or Sequential model."""

import keras


def is_graph(layer):
    """Whether a layer is a model whose graph of layers is known."""
    return isinstance(layer, keras.Sequential) or (
        isinstance(layer, keras.Model) and isinstance(layer, keras.Function)
    )


def _plain(model):
    """The same graph as a plain functional model, without a compiled state or an own config."""
    return keras.Model(model.input, model.output, name=model.name)


def calls(model):
    """A list of `(layer, layers it reads)`, one for each call in the model, and the layers that
    give its outputs.
    """
    if isinstance(model, keras.Sequential):
        layers = model.layers
        return [(b, [a]) for a, b in zip([None, *layers], layers)], layers[-1:]
    model = _plain(model)
    layers = {operation.name: operation for operation in model.operations}
    config = model.get_config()
    calls = [
        (layers[layer["name"]], [layers[name] for name in _sources(node)])
        for layer in config["layers"]
        for node in layer["inbound_nodes"]
    ]
    outputs = keras.tree.flatten(config["output_layers"])[0::3]  # name, call, number of the output
    return calls, [layers[name] for name in outputs]


def _sources(node):
    """The names of the layers whose outputs are arguments of a call."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            yield node["config"]["keras_history"][0]
        else:
            yield from _sources(list(node.values()))
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from _sources(item)


def clone(model, make):
    """A copy in which `make` gives each layer that is no model, and a dict from layer to copy,
    outer models first.
    """
    clones = {}

    def one(layer):
        if layer not in clones:
            clones[layer] = a_graph(layer) if is_graph(layer) else make(layer)
        return clones[layer]

    def a_graph(graph):
        if isinstance(graph, keras.Sequential):
            layers = [_input_like(graph.inputs[0]), *map(one, graph.layers)]
            return keras.Sequential(layers, name=graph.name)
        inputs = keras.tree.map_structure(_input_like, graph.input)
        return keras.models.clone_model(_plain(graph), input_tensors=inputs, clone_function=one)

    result = one(model)
    return result, dict(reversed(clones.items()))


def _input_like(x):
    # `clone_model` itself would name the inputs after the tensors.
    name = x._keras_history.operation.name
    return keras.Input(batch_shape=x.shape, dtype=x.dtype, sparse=x.sparse, name=name)


def copy_weights(layer, clone):
    """Gives a copy of a layer its weights; models and operations have none of their own."""
    if isinstance(layer, keras.layers.Layer) and not is_graph(layer):
        clone.set_weights(layer.get_weights())


def copy_layer(layer, **changes):
    """A new layer of this config, with changes."""
    if type(layer) is keras.layers.Lambda:
        # Its config is for files: a function that is read back has lost its module.
        same = {"name": layer.name, "dtype": layer.dtype_policy, "trainable": layer.trainable}
        return keras.layers.Lambda(
            layer.function, mask=layer.mask, arguments=layer.arguments, **same
        )
    return type(layer).from_config({**layer.get_config(), **changes})


def copy_trainable(clones):
    """Gives copies the trainable flags of their layers."""
    # A model hands its flag to its layers, so that the inner ones come last.
    for layer, clone in clones.items():
        if isinstance(layer, keras.layers.Layer) and clone.trainable != layer.trainable:
            clone.trainable = layer.trainable
