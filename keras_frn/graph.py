"""The layers of a model and how they are wired: read, run step by step, and copied.

This is the one module that touches what is private in Keras: `_flatten_layers`, the nodes of a
functional model, and the mask of a tensor.
"""

import collections
import contextlib
import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import keras

from .errors import ArgumentError
from .typing import Tensor

__all__ = [
    "Call",
    "Step",
    "Value",
    "Wiring",
    "check_built",
    "copy",
    "copy_layer",
    "copy_trainable",
    "copy_weights",
    "has_inputs",
    "has_own_code",
    "inputs_like",
    "is_built",
    "is_graph",
    "is_operation",
    "is_relu",
    "list_layers",
    "read_config",
    "replace_call",
    "unroll",
    "watch_calls",
]


# What constructors raise that are given other arguments than theirs.
_NOT_MADE = (AttributeError, KeyError, NotImplementedError, TypeError, ValueError)
# The classes of a library have no code that a user wrote.
_LIBRARIES = ("keras", "keras_frn")


def has_inputs(layer: Any) -> TypeGuard[keras.Model]:
    """Whether a layer is a functional or Sequential model, whose inputs are known."""
    return isinstance(layer, keras.Model) and isinstance(layer, (keras.Sequential, keras.Function))


def is_graph(layer: Any) -> TypeGuard[keras.Model]:
    """Whether a layer is a model whose wiring is known, and is all that it computes."""
    return has_inputs(layer) and _find_library(type(layer).call) == "keras"


def list_layers(layer: Any) -> list[keras.Layer]:
    """Lists every layer in a model or layer once, at any depth, each before what is inside of it.

    An operation has none.
    """
    found: dict[keras.Layer, None] = {}

    def visit(outer: Any) -> None:
        # Not recursively, as Keras lists what is inside from back to front.
        for inner in outer._flatten_layers(include_self=False, recursive=False):
            if inner not in found:
                found[inner] = None
                visit(inner)

    if isinstance(layer, keras.Layer):
        visit(layer)
    return list(found)


def is_built(model: keras.Layer) -> bool:
    """Whether a model and all layers in it have their weights."""
    return model.built and all(layer.built for layer in list_layers(model))


def check_built(model: Any) -> None:
    """Refuses what is no model, and a model that has no weights yet.

    Raises:
        ArgumentError: about `model`.
    """
    if not isinstance(model, keras.Model):
        raise ArgumentError(
            "model",
            f"must be a model of Keras 3. Received: model={model!r} of class "
            f"{type(model).__module__}.{type(model).__name__}. Pass what `keras.models.load_model` "
            "returns.",
        )
    if not model.built:
        raise ArgumentError(
            "model",
            f"must be a built Keras model. Received: model={model!r}. Call it on data, or begin it "
            "with `keras.Input`.",
        )


def replace_call(layer: keras.Layer, call: Callable[..., Any]) -> None:
    """Gives this one layer another `call`."""
    vars(layer)["call"] = call  # past Keras' and PyTorch's own ways of setting an attribute


@contextlib.contextmanager
def watch_calls(
    layers: Iterable[keras.Layer], watch: Callable[[Any, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """While it lasts, each eager call of these layers ends in `watch(layer, x, outputs, mask)`.

    What JAX traces, as in a scan or under rematerialization, is watched at the end.
    """
    late: list[tuple[Any, ...]] = []

    def watching(layer: keras.Layer, call: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(call)

        def watched_call(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            tensors = (next(iter(given.values())), outputs, given.get("mask"))
            if _is_traced_by_jax(outputs):
                import jax

                # Not to `watch` itself, whose own operations could wait for this one.
                jax.debug.callback(lambda *values: late.append((layer, *values)), *tensors)
            else:
                watch(layer, *tensors)
            return outputs

        return watched_call

    layers = list(layers)
    try:
        for layer in layers:
            replace_call(layer, watching(layer, layer.call))
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)
    if keras.backend.backend() == "jax":
        import jax

        wait: Any = jax.effects_barrier  # which has no types
        wait()
    for call in late:
        watch(*call)


def _is_traced_by_jax(x: Any) -> bool:
    if keras.backend.backend() != "jax":
        return False
    import jax

    return isinstance(x, jax.core.Tracer)


def inputs_like(model: keras.Model, arrays: Sequence[Tensor]) -> Any:
    """Arrays in the order of `model.inputs`, nested as the model takes them."""
    return keras.tree.pack_sequence_as(_ends(model)[0], arrays)


def _ends(model: keras.Model) -> tuple[Any, Any]:
    """The symbolic inputs and outputs, nested as they are."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def _plain(model: keras.Model) -> keras.Model:
    """The same wiring as a plain functional model, without a compiled state or a config."""
    return keras.Model(*_ends(model), name=model.name)


def _walk(
    model: keras.Model, inputs: Iterable[Any], visit: Callable[[Any, list[Any]], Iterable[Any]]
) -> list[Any]:
    """Follows the calls in a model in the order of execution; returns what its outputs are.

    `inputs` are what its symbolic inputs are. `visit(node, read)` gets a call as Keras keeps it,
    with what it reads, and returns what it gives. Nested models are calls.
    """
    plain = _plain(model)
    known = dict(zip(plain.inputs, inputs))
    for _, nodes in sorted(plain._nodes_by_depth.items(), reverse=True):
        for node in nodes:
            if not node.is_input:
                known |= zip(node.outputs, visit(node, [known[x] for x in node.input_tensors]))
    return [known[tensor] for tensor in plain.outputs]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer.

    Attributes:
        layer: The layer, or operation of `keras.ops`.
        inputs: The symbolic tensors that it reads.
        outputs: Those that it gives.
        options: What it is called with beside tensors.
    """

    layer: Any
    inputs: list[keras.KerasTensor]
    outputs: list[keras.KerasTensor]
    options: dict[str, Any]


class Wiring:
    """The calls of all layers of a model, with nested models replaced by what is inside.

    A tensor is the same on both sides of the border of a nested model. A nested model that is
    called more than once stays one layer: its own wiring begins at its inputs and ends at its
    outputs. `calls` is in the order of execution, and `inputs` are those of the model.
    """

    def __init__(self, model: keras.Model) -> None:
        self.calls: list[Call] = []
        self._producers: dict[keras.KerasTensor, Call] = {}
        self._consumers: dict[Any, list[Call | None]] = collections.defaultdict(list)
        self._checked: set[keras.KerasTensor] = set()
        count: collections.Counter[Any] = collections.Counter()

        def tally(node: Any, read: list[Any]) -> list[Any]:
            count[node.operation] += 1
            if is_graph(node.operation) and count[node.operation] == 1:
                _walk(node.operation, node.operation.inputs, tally)
            return node.outputs

        def visit(node: Any, read: list[keras.KerasTensor]) -> list[keras.KerasTensor]:
            layer = node.operation
            if is_graph(layer) and count[layer] == 1:
                given = _walk(layer, read, visit)
                if not isinstance(layer, keras.Sequential):
                    self._checked |= {*read, *given}
                return given
            args, kwargs = node.arguments.args[1:], node.arguments.kwargs
            options = dict(enumerate(args, 1)) | {k: v for k, v in kwargs.items() if v is not None}
            call = Call(layer, read, _make_tensors(node.outputs), options)
            self.calls.append(call)
            for tensor in call.inputs:
                self._consumers[tensor].append(call)
            self._producers |= dict.fromkeys(call.outputs, call)
            if is_graph(layer) and len(self.calls_of(layer)) == 1:
                follow(layer)
            return call.outputs

        def follow(model: keras.Model) -> list[keras.KerasTensor]:
            inputs = _make_tensors(model.inputs)
            for tensor in _walk(model, inputs, visit):
                self._consumers[tensor].append(None)
            return inputs

        _walk(model, model.inputs, tally)
        self.inputs = follow(model)

    def calls_of(self, layer: Any) -> list[Call]:
        """The calls of one layer."""
        return [call for call in self.calls if call.layer is layer]

    def producer(self, tensor: keras.KerasTensor) -> Call | None:
        """The call that gives a tensor, or None for an input."""
        return self._producers.get(tensor)

    def consumers(self, tensor: keras.KerasTensor) -> list[Call | None]:
        """The calls that read a tensor, and a None for each time that it is an output."""
        return self._consumers[tensor]

    def is_checked(self, tensor: keras.KerasTensor) -> bool:
        """Whether a functional model compares the sizes of the tensor with what it was built on."""
        return tensor in self._checked


def _make_tensors(symbolic: Iterable[keras.KerasTensor]) -> list[keras.KerasTensor]:
    # Two models may have been built on the same symbolic tensor, which is not the same in both.
    return [keras.KerasTensor(tensor.shape, tensor.dtype) for tensor in symbolic]


@dataclasses.dataclass(frozen=True)
class Value:
    """What a symbolic tensor is for one batch: arrays, with the mask that travels with a tensor."""

    array: Any
    mask: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One call of a layer in the forward pass of a model, with a key for each tensor.

    Attributes:
        layer: The layer, or operation of `keras.ops`.
        inputs: The keys of what it reads.
        outputs: The keys of what it gives.
    """

    layer: Any
    inputs: list[object]
    outputs: list[object]
    _node: Any

    def run(self, values: Iterable[Value]) -> list[Value]:
        """Calls the layer at inference on the values of `inputs`; returns those of `outputs`."""
        tensors = {}
        for symbolic, value in zip(self._node.input_tensors, values, strict=True):
            tensor = keras.ops.convert_to_tensor(value.array, dtype=symbolic.dtype)
            if value.mask is not None:
                tensor._keras_mask = keras.ops.convert_to_tensor(value.mask)
            tensors[id(symbolic)] = tensor
        args, kwargs = self._node.arguments.fill_in(tensors)
        if getattr(self.layer, "_call_has_training_arg", False):
            kwargs["training"] = False
        outputs = keras.tree.flatten(self.layer(*args, **kwargs))
        masks = [getattr(tensor, "_keras_mask", None) for tensor in outputs]
        array = keras.ops.convert_to_numpy
        return [
            Value(array(tensor), None if mask is None else array(mask))
            for tensor, mask in zip(outputs, masks)
        ]


def unroll(model: keras.Model) -> tuple[list[Step], list[object]]:
    """The forward pass of a model as steps in their order, and the keys of its inputs.

    Nested models are replaced by what is inside, at each of their calls.
    """
    steps: list[Step] = []

    def visit(node: Any, read: list[object]) -> list[object]:
        if is_graph(node.operation):
            return _walk(node.operation, read, visit)
        step = Step(node.operation, read, [object() for _ in node.outputs], node)
        steps.append(step)
        return step.outputs

    inputs: list[object] = [object() for _ in model.inputs]
    _walk(model, inputs, visit)
    return steps, inputs


def copy(
    model: keras.Model,
    copy_one: Callable[[Any], Any],
    input_dtype: Callable[[str], str] = str,
    changes: Callable[[keras.Model], bool] = lambda model: True,
    copies: dict[Any, Any] | None = None,
) -> tuple[keras.Model, dict[Any, Any]]:
    """Copies a model, with new layers in the old wiring.

    `copy_one` gives the layer in the place of each layer that is no model, and `input_dtype` the
    dtype in the place of that of an input. A class of models stays what it is if it is made of
    inputs and outputs, as `keras.Model` is, and of attributes without layers. If it is made of
    something else, a model in which nothing `changes` is copied by its config, if that is possible,
    and another becomes a `keras.Model`. What has a copy in `copies` is not copied again. Returns
    the copy, and a dict from each layer to its copy, outer models first.
    """
    copies = {} if copies is None else copies

    def input_like(x: keras.KerasTensor) -> keras.KerasTensor:
        # `clone_model` itself would name the inputs after the tensors.
        name = x._keras_history.operation.name
        dtype = input_dtype(x.dtype)
        return keras.Input(batch_shape=x.shape, dtype=dtype, sparse=x.sparse, name=name)

    def copied(layer: Any) -> Any:
        if layer not in copies:
            copies[layer] = copied_graph(layer) if is_graph(layer) else copy_one(layer)
        return copies[layer]

    def copied_graph(graph: keras.Model) -> keras.Model:
        is_sequential = isinstance(graph, keras.Sequential)
        own = _takes(type(graph), ["layers"] if is_sequential else ["inputs", "outputs"])
        if not own and not changes(graph):
            with contextlib.suppress(*_NOT_MADE):
                result = type(graph).from_config(graph.get_config())
                result.set_weights(graph.get_weights())
                return result
        parts: tuple[Any, ...]
        if is_sequential:
            parts = ([input_like(graph.inputs[0]), *map(copied, graph.layers)],)
            result = keras.Sequential(*parts, name=graph.name)
        else:
            inputs = keras.tree.map_structure(input_like, graph.input)
            result = keras.models.clone_model(_plain(graph), inputs, clone_function=copied)
            parts = _ends(result)
        if own and type(graph) is not type(result):
            with contextlib.suppress(*_NOT_MADE):
                options = _read_options(graph, result)
                result = type(graph)(*parts, **options)
                result.name = graph.name
        return result

    result = copied(model)
    return result, dict(reversed(copies.items()))


def _takes(model_class: type[keras.Model], arguments: list[str]) -> bool:
    """Whether a class of models is made of these, as Keras itself decides it."""
    spec = inspect.getfullargspec(model_class.__init__)
    given = spec.args[1 : 1 + len(arguments)] == arguments
    return given or (spec.varargs is not None and spec.varkw is not None)


def _read_options(model: keras.Model, plain: keras.Model) -> dict[str, Any]:
    """What a class of models is made of, beside what the plain class is: its attributes."""
    own, known = (_list_parameters(type(x)) for x in (model, plain))
    options = {name: vars(model)[name] for name in own - known if name in vars(model)}
    return {name: value for name, value in options.items() if not _holds_layers(value)}


def _list_parameters(layer_class: Any) -> set[str]:
    return {x for c in layer_class.__mro__ for x in inspect.signature(c.__init__).parameters}


def _holds_layers(value: Any) -> bool:
    kinds = (keras.layers.Layer, keras.Variable, keras.Metric)
    return any(isinstance(x, kinds) for x in keras.tree.flatten(value))


def is_operation(layer: Any, function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a step of a model is this function of `keras.ops`."""
    # Only for operations: to call the function takes time, and counts in the names of later ones.
    if isinstance(layer, keras.Layer) or not isinstance(layer, keras.Operation):
        return False
    return type(layer) is type(function(keras.KerasTensor((None, 1)))._keras_history.operation)


def has_own_code(layer: Any) -> bool:
    """Whether the class of a layer may compute something else than the class of Keras or of this
    package that it derives from: it has code beside what makes it."""
    own = itertools.takewhile(lambda x: _find_library(x) not in _LIBRARIES, type(layer).__mro__)
    names = {name for x in own for name in vars(x) if name == "__call__" or name[:2] != "__"}
    return not names <= {"get_config", "from_config"}


def is_relu(function: Any) -> bool:
    """Whether a function is the ReLU of Keras or of a backend, without a maximum or a slope."""
    libraries = ("keras", "tensorflow", "jax", "torch")
    return getattr(function, "__name__", "") == "relu" and _find_library(function) in libraries


def _find_library(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").split(".")[0]


def copy_layer(
    layer: Any,
    change_config: Callable[[Any], Any] = lambda config: config,
    layer_class: type[keras.Layer] | None = None,
) -> Any:
    """A new layer of this layer's config, and of its class unless another is given.

    Raises:
        ArgumentError: if the config does not make it.
    """
    made_by: Any = layer_class or type(layer)
    known = _list_parameters(made_by)
    try:
        config = change_config(read_config(layer))
        try:
            if made_by is keras.layers.Lambda:
                return made_by(**{key: config[key] for key in config if key in known})
            return made_by.from_config(config)
        except TypeError:
            # Some layers write what their constructors do not know.
            return made_by.from_config({key: config[key] for key in config if key in known})
    except _NOT_MADE as error:
        reason = " ".join(str(error).split()).split(" Example: ")[0]
        raise _lacks_config(layer, reason.split("Exception encountered: ")[-1]) from error


def _is_users_function(value: Any) -> bool:
    """Whether a value is a function that its name in a config does not stand for."""
    is_function = callable(value) and not hasattr(value, "get_config") and not is_relu(value)
    return is_function and _find_library(value) != "keras"


def _lacks_config(layer: Any, reason: str) -> ArgumentError:
    return ArgumentError(
        "model",
        f"must have layers that their config makes again. Received: {layer.name} of class "
        f"{type(layer).__name__}: {reason} Write its `get_config`.",
    )


def read_config(layer: Any) -> dict[str, Any]:
    """What makes a layer again in this process: its config, and the user's functions themselves."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*includes a `lambda`")  # nothing is saved here
            config = dict(layer.get_config())
    except NotImplementedError:
        # Keras describes no layer of its own accord that was given a dtype policy.
        own = inspect.signature(type(layer).__init__).parameters
        if not {*own} <= {"self", "args", "kwargs", "name", "dtype", "trainable"}:
            raise
        dtype = layer.dtype_policy.name
        config = {"name": layer.name, "trainable": layer.trainable, "dtype": dtype}
    # In a config, a function has only a name, or has lost its module.
    given = {key: getattr(layer, key, None) for key in config}
    return config | {key: value for key, value in given.items() if _is_users_function(value)}


def copy_weights(layer: Any, copy: Any) -> None:
    """Gives a copy its layer's weights.

    Raises:
        ArgumentError: if they do not fit, as the config lacks what decides their shapes.
    """
    if not isinstance(layer, keras.Layer) or is_graph(layer):
        return
    shapes = [[tuple(weight.shape) for weight in x.weights] for x in (layer, copy)]
    if shapes[0] != shapes[1]:
        raise _lacks_config(layer, f"the copy has weights of shapes {shapes[1]}, not {shapes[0]}.")
    copy.set_weights(layer.get_weights())
    if hasattr(copy, "finalize_state"):
        copy.finalize_state()  # of a layer that was adapted to data


def copy_trainable(copies: Mapping[Any, Any]) -> None:
    """Gives copies the trainable flags of their layers, and those of what is inside of a layer."""
    # A layer hands its flag to those inside, so that these come last.
    for layer, copy in copies.items():
        if not isinstance(layer, keras.Layer):
            continue
        if copy.trainable != layer.trainable:
            copy.trainable = layer.trainable
        inside = [list_layers(x) for x in (layer, copy)]
        if len(inside[0]) == len(inside[1]):
            copy_trainable(dict(zip(*inside)))
