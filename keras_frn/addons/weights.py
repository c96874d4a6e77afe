"""Which array of a file belongs to which weight of a model.

Both are trees of names: the layers, lists and dicts of the model, and what the file has of them.
They are walked together. If a file has a list instead, or other names, arrays go by order.
"""

import collections
import dataclasses
import itertools
import operator
import re
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from .. import graph
from ..errors import ArgumentError, format_count
from ..layers import TLU, FilterResponseNormalization
from . import files

_ORDER = "its layers in another way, so an array may be another layer's: {}. Check an output, or "
_ORDER += "give the layers the names and the order that they have there."
_NESTED, _NUMBERED = f"nests {_ORDER}", f"numbers {_ORDER}"
_FOREIGN = "has arrays of FRN layers that are not those of Addons, (1, 1, 1, channels): {}. Check "
_FOREIGN += "an output: their names may mean something else."


@dataclasses.dataclass
class Pair:
    """A weight of the model and its array in the file, with the array's name there.

    The `doubt` says why it may be another weight's."""

    layer: keras.Layer
    weight: keras.Variable
    array: Any = None
    source: str = ""
    doubt: str = ""

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
        axes = tuple(range(1, 1 + array.ndim))
        # Only into a model of the user does "auto" have one per channel to fill.
        keep = f"write TLU(axis={axes}) in the model" if tau == "auto" else "pass 'per_position'"
        raise ArgumentError(
            "tau",
            f"must be 'per_channel_mean' for {self.weight.path!r}, of which the file has one value "
            f"per position, and they differ. Received: {tau!r}, which keeps one per channel. This "
            f"averages them. To keep all, {keep}.",
        )


def is_uniform(array: Any) -> bool:
    """Whether an array `(*positions, channels)` is the same at every position."""
    rows = np.asarray(array).reshape(-1, array.shape[-1])
    return np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape), equal_nan=True)


def explain_doubts(pairs: list[Pair]) -> list[str]:
    """What is not certain about the pairs, and which array went where."""
    doubts = collections.defaultdict(list)
    for pair in pairs:
        way = f"{pair.source} {pair.array.shape} -> {pair.weight.path}"
        is_ours = isinstance(pair.layer, FilterResponseNormalization)
        if is_ours and pair.weight.name in ("gamma", "beta") and pair.array.ndim == 1:
            doubts[_FOREIGN].append(way)
        doubts[pair.doubt].append(way)
    return [doubt.format(", ".join(ways)) for doubt, ways in doubts.items() if doubt]


@dataclasses.dataclass
class Origin:
    """What the config of a file says of the layers that it became."""

    # The layers of each model by its id, in the order of the config. That is the order of the
    # weights in a file, which Keras 3 may not keep.
    members: dict[int, list[Any]] = dataclasses.field(default_factory=dict)
    # The name of the class that each layer had, by which HDF5 counts the layers in a list.
    kinds: dict[keras.Layer, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Node:
    """A layer or model: the weights that are its own, and the layers in it by their names.

    The layers in a list have two names, as `blocks` and `0`. The weights are pairs without an
    array. Both are in the order of Keras 2.
    """

    layer: keras.Layer
    kind: str
    own: list[Pair]
    inside: dict[tuple[str, ...], "Node"]

    def list_pairs(self) -> list[Pair]:
        """Every weight once, those of a layer before those inside."""
        pairs = self.own + [pair for node in self.inside.values() for pair in node.list_pairs()]
        return list({id(pair.weight): pair for pair in pairs}.values())


def _list_layers(value: Any, *path: str) -> Iterator[tuple[tuple[str, ...], keras.Layer]]:
    """The layers in lists and dicts, each with its names."""
    if isinstance(value, keras.Layer):
        yield path, value
    elif isinstance(value, (list, tuple, dict)):
        # Keras 2 sorts what is in a dict.
        for key, item in sorted(value.items()) if isinstance(value, dict) else enumerate(value):
            yield from _list_layers(item, *path, str(key))


def _read_layer(layer: keras.Layer, origin: Origin) -> Node:
    if graph.is_graph(layer):
        found = {inner.name: inner for inner in origin.members.get(id(layer), layer.layers)}
    else:
        # Under PyTorch a layer is a torch.nn.Module, which keeps the layers in it apart.
        modules = vars(layer).get("_modules", {})
        # Keras and TensorFlow list what is in attributes again, under such names.
        again = re.compile("_layers|_modules|_self_.*")
        found = {k: v for k, v in (vars(layer) | modules).items() if not again.fullmatch(k)}
        if modules:
            order = [id(inner) for inner in layer._layers]
            places = {k: [order.index(id(v)) for _, v in _list_layers(found[k])] for k in found}
            found = {k: found[k] for k in sorted(found, key=places.__getitem__)}
    layers = itertools.chain.from_iterable(_list_layers(v, k) for k, v in found.items())
    inside = {path: _read_layer(inner, origin) for path, inner in layers}
    inner_weights = {id(w) for node in inside.values() for w in node.layer.weights}
    own = [w for w in layer.weights if id(w) not in inner_weights]
    if isinstance(layer, FilterResponseNormalization):
        own.sort(key=lambda weight: weight is not layer.learned_epsilon)
    kind = origin.kinds.get(layer, type(layer).__name__)
    return Node(layer, kind, [Pair(layer, weight) for weight in own], inside)


def match(
    model: keras.Model, origin: Origin | None, stored: files.Weights, part: str | None = None
) -> list[Pair]:
    """A `Pair` for every weight of a model; `part` is what a checkpoint calls it."""
    tree, has_config = _read_layer(model, origin or Origin()), origin is not None
    if isinstance(stored, files.Tree):
        return _match_part(tree, stored, part, has_config)
    if part is not None:
        raise ArgumentError("part", f"must be None for a file without parts. Received: {part!r}.")
    pairs = _match_lists(tree, stored, has_config)
    _check_pairs(tree, pairs, [])
    return pairs


def _check_pairs(tree: Node, pairs: list[Pair], arrays: list[files.NamedArray]) -> None:
    """Checks that no weight and none of the arrays is left over, and that shapes agree."""
    found = {id(pair.weight) for pair in pairs}
    for pair in tree.list_pairs():
        if id(pair.weight) not in found:
            raise ValueError(f"it holds no array for {pair.weight.path!r}")
    read = {id(pair.array): pair for pair in pairs}
    for pair in pairs:
        other = read[id(pair.array)]
        # A checkpoint of Keras 2 lacks one of two weights of a name.
        if other.layer is pair.layer and other.weight is not pair.weight:
            raise ValueError(f"it holds one array for two weights: {pair.weight.path!r}")
    unread = sorted(name for name, array in arrays if id(array) not in read)
    if unread:
        count = format_count(len(unread), "array")
        problem = f"it has {count} that the model has not, such as {unread[:5]}"
        raise ValueError(f"{problem}: its layers must be those of the file")
    for pair in pairs:
        pair.value("per_channel_mean")


def _match_part(tree: Node, stored: files.Tree, part: str | None, has_config: bool) -> list[Pair]:
    """Matches a file, or the one of its parts that fits, as `Checkpoint(generator=...)`."""
    parts = {n: p for n, p in stored.walk().items() if stored.names[n] and stored.list_arrays(n)}
    if not stored.is_checkpoint:  # there layers are counted by class, so a name is another layer's
        parts = {n: p for n, p in parts.items() if p.split("/")[-1] not in files.ALL_LAYERS}
    if part is not None:
        given = stored.find(part.split("/"))
        if given is None:
            beside = sorted(p for p in parts.values() if p and p.count("/") == part.count("/"))
            raise ArgumentError("part", f"must be one of {beside}. Received: {part!r}.")
        parts = {given: part}
    weights = tree.list_pairs()
    likeness, reason = -1, ""
    for by_name in (True, False) if stored.is_checkpoint else (True,):
        fits: dict[str, list[Pair]] = {}
        for root, path in parts.items():
            arrays = stored.list_arrays(root)
            # What is not named by the caller, but found, and that by order, is always in doubt.
            doubt = "" if path in ("", part) and not _are_alike(weights) else _NESTED
            pairs: list[Pair] = []
            try:
                if by_name:
                    pairs = _match_names(tree, stored, root)
                    is_ordered = stored.is_checkpoint and graph.is_graph(tree.layer)
                    if is_ordered and not has_config and _are_permuted(pairs):
                        pairs = [dataclasses.replace(pair, doubt=_NUMBERED) for pair in pairs]
                else:
                    pairs = _match_list(tree, weights, arrays, doubt)
                _check_pairs(tree, pairs, arrays)
                fits[path] = pairs
            except ValueError as error:
                # What the part that is most like the model lacks; of the whole, if none is.
                if len(pairs) > likeness:
                    likeness, reason = len(pairs), str(error)
            if "" in fits:
                return fits[""]
        # A part that has another one and nothing else fits like it.
        answers = {tuple(id(pair.array) for pair in pairs) for pairs in fits.values()}
        if len(answers) > 1:
            problem = f"must be one of {sorted(fits)}, which all fit. Received: None."
            raise ArgumentError("part", problem)
        if fits:
            return next(iter(fits.values()))
    raise ValueError(f"{reason}. Its parts: {[*parts.values()][1:10]}")


def _match_names(tree: Node, stored: files.Tree, root: int) -> list[Pair]:
    """Matches what has the same name in both, each layer once; HDF5 has some by their classes."""
    pairs: list[Pair] = []
    seen: set[int] = set()

    def visit(node: Node, number: int | None) -> None:
        if number is None or id(node.layer) in seen:
            return
        seen.add(id(node.layer))
        names = stored.names[number]
        for place, pair in enumerate(node.own):
            # HDF5 says the place alone; a checkpoint may say more, as depthwise_kernel.
            ends = [(key,) for key in sorted(names, key=len) if key.endswith(pair.weight.name)]
            keys = ends if stored.is_checkpoint else [("vars", str(place))]
            found = [n for key in keys if (n := stored.find(key, number)) in stored.arrays]
            if found:
                source, array = stored.arrays[found[0]]
                pairs.append(dataclasses.replace(pair, array=array, source=source))
        inside = node.inside
        if graph.is_graph(node.layer) and "layer_with_weights-0" in names:
            weighted = [child for child in inside.values() if child.list_pairs()]
            inside = {(f"layer_with_weights-{i}",): child for i, child in enumerate(weighted)}
        if stored.is_checkpoint:
            for path, child in inside.items():
                visit(child, stored.find(path, number))
            return
        for name in sorted(names, reverse=True):  # as it was written
            is_all = name in files.ALL_LAYERS
            if (name,) in inside:
                visit(inside[name,], names[name])
            else:
                among = [n for path, n in inside.items() if is_all or path[0] == name]
                visit_classes(among, names[name])

    def visit_classes(nodes: list[Node], number: int) -> None:
        # Layers of a class are counted, with gaps: conv2d, conv2d_2, ...
        names = sorted(stored.names[number], key=lambda name: (len(name), name))
        for node in nodes:
            words = re.sub(r"\B(?=[A-Z])", "_?", node.kind)
            kind = re.compile(rf"{words.lower()}(_\d+)?")
            found = next(filter(kind.fullmatch, names), None)
            if found and id(node.layer) not in seen:
                names.remove(found)
                visit(node, stored.names[number][found])

    visit(tree, root)
    return pairs


def _match_lists(tree: Node, lists: files.Lists, has_config: bool) -> list[Pair]:
    """Matches the lists of an .h5 file by layer, or all as one if it nests them in another way."""
    layers = [*{id(n.layer): n for n in tree.inside.values() if n.layer.weights}.values()]
    lists = {name: arrays for name, arrays in lists.items() if arrays}
    if set(lists) == {None}:
        return _match_list(tree, tree.list_pairs(), lists[None])
    own = lists.pop(files.MODEL, [])
    if len(layers) != len(lists):
        arrays = [*own, *itertools.chain(*lists.values())]
        pairs = tree.list_pairs()
        if len(arrays) == len(pairs):
            return _match_list(tree, pairs, arrays, _NESTED if _are_alike(pairs) else "")
        count = format_count(len(lists), "layer")
        raise ValueError(f"it has {count} with weights, the model {len(layers)}")
    ours, theirs = [layer.layer.name for layer in layers], [*map(str, lists)]
    if set(ours) == set(theirs):
        layers.sort(key=lambda layer: theirs.index(layer.layer.name))
    is_certain = has_config or _is_same_order(ours, theirs) or not _are_alike(tree.list_pairs())
    found = _match_list(tree, tree.own, own) if own else []
    for layer, arrays in zip(layers, lists.values(), strict=True):
        pairs = sorted(layer.list_pairs(), key=lambda pair: not pair.weight.trainable)  # as Keras 2
        # Without a config nobody knows what was frozen, on which the order inside a model depends.
        is_model = isinstance(layer.layer, keras.Model) and not has_config
        doubt = None if is_model and _are_alike(pairs) else ""
        found += _match_list(layer, pairs, arrays, doubt)
    return found if is_certain else [dataclasses.replace(pair, doubt=_NUMBERED) for pair in found]


def _match_list(
    node: Node, pairs: list[Pair], arrays: list[files.NamedArray], doubt: str | None = ""
) -> list[Pair]:
    """Matches by the names of weights and their layers, by order, or by how layers are numbered.

    The order is not used if `doubt` is None.
    """
    ours = [(pair.layer.name, pair.weight.name) for pair in pairs]
    theirs: list[tuple[str, str]] = []
    for path, _ in reversed(arrays):  # such as block/frn/gamma:0
        *parents, name = path.partition(":")[0].split("/")
        # Only a learned epsilon has no layer in its name. It comes before the gamma of its layer.
        theirs.insert(0, (parents[-1] if parents else theirs[0][0] if theirs else "", name))
    kinds, kinds_there = [layer for layer, _ in ours], [layer for layer, _ in theirs]
    is_certain = doubt == "" or _is_same_order(kinds, kinds_there, by_kind=True)
    ways: list[tuple[Any, Any, str]] = [(ours, theirs, doubt or ("" if is_certain else _NUMBERED))]
    # Keras 3 has given some weights other names. If it has not, another order is a mistake.
    names, given = [name for _, name in ours], [name for _, name in theirs]
    if doubt is not None and (names == given or set(names) != set(given)):
        ways.append((range(len(ours)), range(len(theirs)), doubt))
    if len(ours) == len(theirs):  # as for few of the many parts of a file
        ways.append((_rank(ours), _rank(theirs), doubt or _NUMBERED))
    for keys, keys_there, reason in ways:
        found = dict(zip(keys_there, arrays, strict=True))
        if set(keys) == found.keys() and len(keys) == len(found) == len(arrays):
            rows = [(pair, *found[key]) for pair, key in zip(pairs, keys, strict=True)]
            return [Pair(pair.layer, pair.weight, a, source, reason) for pair, source, a in rows]
    raise ValueError(
        f"layer {node.layer.name!r} has the weights {ours}, the file {theirs}: give the "
        "layers the names and the order that they have in the file"
    )


def _rank(keys: list[tuple[str, str]]) -> list[tuple[str, int, str]]:
    """Names that Keras has numbered, as dense_3: the first of a kind is 0."""
    parts = [(*re.findall(r"^(.*?)(?:_(\d+))?$", layer)[0], name) for layer, name in keys]
    numbers = collections.defaultdict(set)
    for kind, number, _ in parts:
        numbers[kind].add(int(number or 0))
    ranks = {kind: {n: rank for rank, n in enumerate(sorted(numbers[kind]))} for kind in numbers}
    return [(kind, ranks[kind][int(number or 0)], name) for kind, number, name in parts]


def _is_same_order(ours: list[str], theirs: list[str], by_kind: bool = False) -> bool:
    """Whether layers have the same names in the same order, but for the numbers in them.

    By kind, such as dense, of which others may come in between."""
    # What Keras 2 called model, Keras 3 calls functional.
    names = [[(re.sub("^functional", "model", name), "") for name in x] for x in (ours, theirs)]
    first, second = (_rank([*dict.fromkeys(keys)]) for keys in names)
    kind = operator.itemgetter(0)
    return sorted(first, key=kind) == sorted(second, key=kind) if by_kind else first == second


def _are_permuted(pairs: list[Pair]) -> bool:
    """Whether layers that are alike have names of the file, but in another order."""
    rows = {id(p.layer): (p.layer.name, p.source.split("/")[-2]) for p in pairs if "/" in p.source}
    ours, theirs = ([row[i] for row in rows.values()] for i in (0, 1))
    is_same_set = _is_same_order(sorted(ours), sorted(theirs))
    return is_same_set and not _is_same_order(ours, theirs) and _are_alike(pairs)


def _are_alike(pairs: list[Pair]) -> bool:
    """Whether two layers have weights of the same names and shapes: only the order tells."""
    shapes = collections.defaultdict(list)
    for pair in pairs:
        shapes[id(pair.layer)].append((pair.weight.name, *pair.weight.shape))
    return len({tuple(found) for found in shapes.values()}) < len(shapes)
