"""Which array of a file belongs to which weight of a model.

Both are trees of names: the layers, lists and dicts of the model, and what the file has of them.
They are walked together. If a file has a list instead, or other names, arrays go by order.
"""

import collections
import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from .. import graph
from ..errors import ArgumentError, ArgumentWarning
from ..layers import TLU, FilterResponseNormalization
from . import files

Members = Mapping[int, list[Any]]  # as in `config.Builder`


@dataclasses.dataclass
class Pair:
    """A weight of the model and its array in the file, with the array's name there."""

    layer: keras.Layer
    weight: keras.Variable
    array: Any = None
    source: str = ""

    def value(self, tau: str = "auto") -> Any:
        """The array in the shape of the weight."""
        array, shape = np.asarray(self.array), tuple(self.weight.shape)
        is_ours = isinstance(self.layer, FilterResponseNormalization)
        if array.shape == shape or (is_ours and array.shape == (1, 1, 1, *shape)):
            return array.reshape(shape)
        if not isinstance(self.layer, TLU) or array.shape[-1:] != shape:
            raise ValueError(f"weight {self.weight.path!r} has shape {shape}, not {array.shape}")
        rows = array.reshape(-1, *shape)
        if is_uniform(array):
            return rows[0]
        if tau == "per_channel_mean":
            return rows.mean(axis=0, dtype="float64").astype(array.dtype)
        raise ArgumentError(
            "tau",
            f"must be 'per_channel_mean' or 'per_position' for {self.weight.path!r}, of which the "
            f"file has one value per position, and they differ. Received: {tau!r}, which keeps one "
            "per channel. Average them, or keep them (in a model of your own, TLU(axis=...)).",
        )


def is_uniform(array: Any) -> bool:
    """Whether an array `(*positions, channels)` is the same at every position."""
    rows = np.asarray(array).reshape(-1, array.shape[-1])
    return np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape), equal_nan=True)


@dataclasses.dataclass
class Node:
    """A layer, list or dict of a model: the weights that are its own, and what is inside by name.

    The weights are pairs without an array. Both are in the order of Keras 2.
    """

    value: Any
    own: list[Pair]
    inside: dict[str, "Node"]

    def list_pairs(self) -> list[Pair]:
        """Every weight once, those of a layer before those inside."""
        pairs = self.own + [pair for node in self.inside.values() for pair in node.list_pairs()]
        return list({id(pair.weight): pair for pair in pairs}.values())


def _list_layers(nodes: Iterable[Node]) -> list[Node]:
    """The layers among nodes, and those in their lists and dicts, once."""
    found: dict[int, Node] = {}
    for node in nodes:
        is_layer = isinstance(node.value, keras.Layer)
        layers = [node] if is_layer else _list_layers(node.inside.values())
        found |= {id(layer.value): layer for layer in layers}
    return list(found.values())


def _read_model(value: Any, members: Members) -> Node:
    modules: dict[str, Any] = {}
    if graph.is_graph(value):
        items = {layer.name: layer for layer in members.get(id(value), value.layers)}
    elif isinstance(value, keras.Layer):
        # Under PyTorch a layer is a torch.nn.Module, which keeps the layers in it apart.
        modules = vars(value).get("_modules", {})
        # Keras and TensorFlow list what is in attributes again, under such names.
        again = ("_layers", "_modules", "_self_")
        items = {k: v for k, v in (vars(value) | modules).items() if not k.startswith(again)}
    else:
        items = value if isinstance(value, dict) else dict(enumerate(value))
    kinds = (keras.Layer, list, tuple, dict)
    nodes = {str(k): _read_model(v, members) for k, v in items.items() if isinstance(v, kinds)}
    inside = {name: node for name, node in nodes.items() if _list_layers([node])}
    if modules:
        order = [id(layer) for layer in value._layers]
        first = {name: _list_layers([node])[0].value for name, node in inside.items()}
        inside = dict(sorted(inside.items(), key=lambda item: order.index(id(first[item[0]]))))
    inner = {id(w) for layer in _list_layers(inside.values()) for w in layer.value.weights}
    own = [w for w in getattr(value, "weights", ()) if id(w) not in inner]  # a list has none
    if isinstance(value, FilterResponseNormalization):
        own.sort(key=lambda weight: weight is not value.learned_epsilon)
    return Node(value, [Pair(value, weight) for weight in own], inside)


def match(
    model: keras.Model, members: Members, stored: files.Weights, part: str | None = None
) -> list[Pair]:
    """A `Pair` for every weight of a model; `part` is what a checkpoint calls it."""
    tree = _read_model(model, members)
    if isinstance(stored, files.Tree):
        return _match_part(tree, stored, part)
    if part is not None:
        raise ArgumentError("part", f"must be None for a file without parts. Received: {part!r}.")
    return _check_pairs(tree, _match_lists(tree, stored, has_config=bool(members)))


def _check_pairs(
    tree: Node, pairs: list[Pair], arrays: Iterable[files.NamedArray] = ()
) -> list[Pair]:
    """Checks that no weight and none of the arrays is left over, and that shapes agree."""
    found = {id(pair.weight) for pair in pairs}
    for pair in tree.list_pairs():
        if id(pair.weight) not in found:
            raise ValueError(f"it holds no array for {pair.weight.path!r}")
    read = {id(pair.array) for pair in pairs}
    unread = sorted(name for name, array in arrays if id(array) not in read)
    if unread:
        problem = f"it has {len(unread)} arrays that the model has not, such as {unread[:5]}"
        raise ValueError(f"{problem}: its layers must be those of the file")
    for pair in pairs:
        pair.value("per_channel_mean")
    return pairs


# Trees


def _match_part(tree: Node, stored: files.Tree, part: str | None) -> list[Pair]:
    """Matches a file, or the one of its parts that fits, as `Checkpoint(generator=...)`."""
    parts = {name: n for name, n in stored.names[0].items() if stored.list_arrays(n)}
    if part is not None and part not in parts:
        raise ArgumentError("part", f"must be one of {sorted(parts)}. Received: {part!r}.")
    roots = {0: "", **{n: name for name, n in parts.items()}} if part is None else {parts[part]: ""}
    reason: Exception | None = None
    for by_name in (True, False) if stored.is_checkpoint else (True,):
        fits = {}
        for root, name in roots.items():
            arrays = stored.list_arrays(root)
            try:
                pairs = _match_names(tree, stored, root) if by_name else _match_flat(tree, arrays)
                fits[name] = _check_pairs(tree, pairs, arrays)
            except ValueError as error:
                reason = reason or error  # the first: of the whole, by name
        if "" in fits or len(fits) == 1:
            return next(iter(fits.values()))
        if fits:
            found = f"{sorted(fits)}, which all fit"
            raise ArgumentError("part", f"must be one of {found}. Received: None.")
    raise ValueError(f"{reason}. Its parts: {sorted(parts)[:9]}")


def _match_names(tree: Node, stored: files.Tree, root: int) -> list[Pair]:
    """Matches what has the same name in both, each layer once; HDF5 has some by their classes."""
    pairs: dict[int, list[Pair]] = {}

    def visit(node: Node, number: int) -> None:
        if id(node.value) in pairs:
            return
        names = stored.names[number]
        own = pairs[id(node.value)] = []
        for place, pair in enumerate(node.own):
            # A checkpoint may say more, as depthwise_kernel; HDF5 says the place alone.
            ends = (pair.weight.name, f"vars/{place}")
            found = [key for key, n in names.items() if key.endswith(ends) and n in stored.arrays]
            if found:
                source, array = stored.arrays[names[min(found, key=len)]]
                own.append(dataclasses.replace(pair, array=array, source=source))
        inside = node.inside
        if graph.is_graph(node.value) and "layer_with_weights-0" in names:
            weighted = [child for child in inside.values() if child.list_pairs()]
            inside = {f"layer_with_weights-{i}": child for i, child in enumerate(weighted)}
        for name in sorted(inside.keys() & names.keys(), reverse=True):  # as HDF5 was written
            if stored.is_checkpoint or isinstance(inside[name].value, keras.Layer):
                visit(inside[name], names[name])
            else:
                visit_classes([inside[name]], names[name])
        for name in ("layers", "_layer_checkpoint_dependencies"):
            if name in names and not stored.is_checkpoint:
                visit_classes([*inside.values()], names[name])

    def visit_classes(nodes: list[Node], number: int) -> None:
        # Layers of a class are counted, with gaps: conv2d, conv2d_2, ...
        names = sorted(stored.names[number], key=lambda name: (len(name), name))
        for layer in _list_layers(nodes):
            kind = re.compile(_snake_case(type(layer.value).__name__) + r"(_\d+)?")
            found = next(filter(kind.fullmatch, names), None)
            if found and id(layer.value) not in pairs:
                names.remove(found)
                visit(layer, stored.names[number][found])

    visit(tree, root)
    return [pair for own in pairs.values() for pair in own]


def _snake_case(name: str) -> str:
    """How Keras names a class in the files."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


# Lists: the .h5 layout


def _match_lists(tree: Node, lists: files.Lists, has_config: bool) -> list[Pair]:
    layers = [layer for layer in _list_layers(tree.inside.values()) if layer.value.weights]
    lists = {name: arrays for name, arrays in lists.items() if arrays}
    if set(lists) == {None}:
        return _match_list(tree, tree.list_pairs(), lists[None])
    own = _match_list(tree, tree.own, lists.pop(files.MODEL)) if files.MODEL in lists else []
    if len(layers) != len(lists):
        arrays = [(pair.source, pair.array) for pair in own]
        arrays += [item for items in lists.values() for item in items]
        if len(arrays) == len(tree.value.weights):
            return _match_flat(tree, arrays)
        raise ValueError(f"it has {len(lists)} layers with weights, the model {len(layers)}")
    if {layer.value.name for layer in layers} == set(lists):
        layers.sort(key=lambda layer: list(lists).index(layer.value.name))
    for layer, arrays in zip(layers, lists.values(), strict=True):
        pairs = sorted(layer.list_pairs(), key=lambda pair: not pair.weight.trainable)  # as Keras 2
        # Without a config nobody knows what was frozen, on which the order inside a model depends.
        by_order = has_config or not (isinstance(layer.value, keras.Model) and _are_alike(pairs))
        own += _match_list(layer, pairs, arrays, by_order)
    return own


def _match_list(
    node: Node, pairs: list[Pair], arrays: list[files.NamedArray], by_order: bool = True
) -> list[Pair]:
    """Matches by the names of weights and their layers, or by order where they are others."""
    ours = [(pair.layer.name, pair.weight.name) for pair in pairs]
    theirs: list[tuple[str, str]] = []
    for path, _ in reversed(arrays):  # such as block/frn/gamma:0
        *parents, name = path.partition(":")[0].split("/")
        # Only a learned epsilon has no layer in its name. It comes before the gamma of its layer.
        theirs.insert(0, (parents[-1] if parents else theirs[0][0] if theirs else "", name))
    # Keras 3 has given some weights other names. If it has not, another order is a mistake.
    names, given = [name for _, name in ours], [name for _, name in theirs]
    in_order = len(ours) == len(theirs) and (names == given or set(names) != set(given))
    reason = None
    if _are_names(ours, theirs):
        arrays = [arrays[theirs.index(key)] for key in ours]
    elif not (by_order and in_order):
        ranks, ranks_there = _rank(ours), _rank(theirs)
        if not _are_names(ranks, ranks_there):
            raise ValueError(
                f"layer {node.value.name!r} has the weights {ours}, the file {theirs}: give the "
                "layers the names and the order that they have in the file"
            )
        arrays = [arrays[ranks_there.index(key)] for key in ranks]
        reason = "numbers its layers in another way"
    rows = zip(pairs, arrays, strict=True)
    found = [dataclasses.replace(pair, array=array, source=name) for pair, (name, array) in rows]
    return _warn_of_order(found, reason) if reason else found


def _are_names(ours: list[Any], theirs: list[Any]) -> bool:
    return len(set(theirs)) == len(theirs) and set(ours) == set(theirs)


def _rank(keys: list[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """Names that Keras has numbered, as dense_3: the first of a kind is 0."""
    parts = [(*re.findall(r"^(.*?)(?:_(\d+))?$", layer)[0], name) for layer, name in keys]
    numbers = {kind: sorted({int(n or 0) for k, n, _ in parts if k == kind}) for kind, *_ in parts}
    return [(kind, numbers[kind].index(int(n or 0)), name) for kind, n, name in parts]


def _match_flat(tree: Node, arrays: list[files.NamedArray]) -> list[Pair]:
    """Matches all arrays of a file that nests its layers in another way, by order."""
    pairs = _match_list(tree, tree.list_pairs(), arrays)
    return _warn_of_order(pairs, "nests its layers in another way") if _are_alike(pairs) else pairs


def _warn_of_order(pairs: list[Pair], reason: str) -> list[Pair]:
    ways = ", ".join(f"{pair.source} -> {pair.weight.path}" for pair in pairs)
    problem = f"{reason}, so they were taken in order: {ways}. Check an output, or give the layers "
    warnings.warn(
        ArgumentWarning("path", f"{problem}the names that they have there."), stacklevel=6
    )
    return pairs


def _are_alike(pairs: list[Pair]) -> bool:
    """Whether two layers have weights of the same names and shapes: only the order tells."""
    shapes = collections.defaultdict(list)
    for pair in pairs:
        shapes[id(pair.layer)].append((pair.weight.name, *pair.weight.shape))
    return len({tuple(found) for found in shapes.values()}) < len(shapes)
