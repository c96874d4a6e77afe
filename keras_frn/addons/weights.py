"""Which array of a file belongs to which weight of a model."""

import collections
import dataclasses
import re
import warnings
from collections.abc import Mapping
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


def match(model: keras.Model, members: Members, stored: Any, part: str | None = None) -> list[Pair]:
    """A `Pair` for every weight of a model; `part` is what a checkpoint calls it."""
    if isinstance(stored, files.Graph):
        return _match_graph(model, members, stored, part)
    if part is not None:
        raise ArgumentError("part", f"must be None for a file without parts. Received: {part!r}.")
    if isinstance(stored, dict):
        return _match_lists(model, members, stored)
    pairs = _match_group(model, members, stored, stored)
    paths: list[str] = []
    stored.visit(paths.append)
    count = sum(bool(re.match(r"(?!optimizer|metrics).*vars/\d+$", path)) for path in paths)
    if count != len(pairs):
        raise ValueError(f"it has {count} weights in its layers, the model {len(pairs)}")
    return pairs


def _flatten(value: Any) -> list[Any]:
    """The layers in lists and dicts."""
    if isinstance(value, keras.Layer):
        return [value]
    items = list(value.values()) if isinstance(value, dict) else value
    is_list = isinstance(items, (list, tuple))
    return [layer for item in items for layer in _flatten(item)] if is_list else []


def _list_children(value: Any, members: Members) -> dict[str, Any]:
    """What has layers in a layer, list or dict, by its name there, in the order of Keras 2."""
    if graph.is_graph(value):
        return {layer.name: layer for layer in members.get(id(value), value.layers)}
    if not isinstance(value, keras.Layer):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {str(key): item for key, item in items}
    # Under PyTorch a layer is a torch.nn.Module, which keeps the layers in it apart.
    modules = vars(value).get("_modules", {})
    attributes = [(k, v) for k, v in {**vars(value), **modules}.items() if _flatten(v)]
    tracked = [id(layer) for layer in vars(value)["_layers"]]
    if modules:
        attributes.sort(key=lambda item: tracked.index(id(_flatten(item[1])[0])))
    # TensorFlow tracks what it finds in attributes named _self_.
    lists = ("_layers", "_modules", "_self_")
    return {name: item for name, item in attributes if not name.startswith(lists)}


def _list_pairs(value: Any, members: Members) -> list[Pair]:
    """A `Pair` without an array for each weight, those of a layer before those inside."""
    layers = _flatten(_list_children(value, members))
    inside = {id(pair.weight): pair for layer in layers for pair in _list_pairs(layer, members)}
    own = [w for w in getattr(value, "weights", ()) if id(w) not in inside]  # a list has none
    if isinstance(value, FilterResponseNormalization):
        own.sort(key=lambda weight: weight is not value.learned_epsilon)
    return [Pair(value, weight) for weight in own] + list(inside.values())


# Lists: the .h5 layout


def _match_lists(model: Any, members: Members, lists: dict[Any, list[Any]]) -> list[Pair]:
    found = dict.fromkeys(_flatten(_list_children(model, members)))  # each of them once
    layers = [layer for layer in found if layer.weights]
    lists = {name: arrays for name, arrays in lists.items() if arrays}
    if set(lists) == {None}:
        return _match_list(model, _list_pairs(model, members), lists[None], by_order=True)
    if len(layers) != len(lists):
        arrays = [item for items in lists.values() for item in items]
        if len(arrays) == len(model.weights):
            return _match_flat(model, members, arrays)
        raise ValueError(f"it has {len(lists)} layers with weights, the model {len(layers)}")
    if {layer.name for layer in layers} == set(lists):
        layers.sort(key=lambda layer: list(lists).index(layer.name))
    pairs = []
    for layer, arrays in zip(layers, lists.values(), strict=True):
        own = _list_pairs(layer, members)
        own.sort(key=lambda pair: not pair.weight.trainable)  # as Keras 2 wrote them
        # Without a config nobody knows what was frozen, on which the order inside a model depends.
        by_order = bool(members) or not (isinstance(layer, keras.Model) and _are_alike(own))
        pairs += _match_list(layer, own, arrays, by_order)
    if len({id(pair.weight) for pair in pairs}) != len(model.weights):
        raise ValueError("the model has weights outside of its layers")
    return pairs


def _match_list(layer: Any, pairs: list[Pair], arrays: list[Any], by_order: bool) -> list[Pair]:
    """Matches by the names of weights and their layers, or by order where they are others."""
    ours = [(pair.layer.name, pair.weight.name) for pair in pairs]
    theirs: list[tuple[str, str]] = []
    for path, _ in reversed(arrays):  # such as block/frn/gamma:0
        *parents, name = path.partition(":")[0].split("/")
        # Only a learned epsilon has no layer in its name. It comes before the gamma of its layer.
        theirs.insert(0, (parents[-1] if parents or not theirs else theirs[0][0], name))
    names, given = [name for _, name in ours], [name for _, name in theirs]
    if len(set(theirs)) == len(theirs) and set(ours) == set(theirs):
        arrays = [arrays[theirs.index(key)] for key in ours]
    # Keras 3 has given some weights other names. Where it has not, another order is a mistake.
    elif not by_order or len(ours) != len(theirs) or (names != given and set(names) == set(given)):
        raise ValueError(
            f"layer {layer.name!r} has the weights {ours}, the file {theirs}: give the layers the "
            "names and the order that they have in the file"
        )
    rows = zip(pairs, arrays, strict=True)
    return [dataclasses.replace(pair, array=array, source=name) for pair, (name, array) in rows]


def _match_flat(model: keras.Model, members: Members, arrays: list[Any]) -> list[Pair]:
    """Matches all arrays of a file that nests its layers in another way, by order."""
    pairs = _match_list(model, _list_pairs(model, members), arrays, by_order=True)
    if _are_alike(pairs):
        ways = ", ".join(f"{pair.source} -> {pair.weight.path}" for pair in pairs)
        problem = f"nests its layers in another way, so they were taken in order: {ways}. Check an "
        problem += "output, or give the layers the names of the attributes there."
        warnings.warn(ArgumentWarning("path", problem), stacklevel=5)
    return pairs


def _are_alike(pairs: list[Pair]) -> bool:
    """Whether two layers have weights of the same names and shapes: only the order tells."""
    shapes = collections.defaultdict(list)
    for pair in pairs:
        shapes[id(pair.layer)].append((pair.weight.name, *pair.weight.shape))
    return len({tuple(found) for found in shapes.values()}) < len(shapes)


# Trees: the layouts of .keras and .weights.h5 files, and of checkpoints


def _match_group(layer: Any, members: Members, root: Any, group: Any) -> list[Pair]:
    own = [pair for pair in _list_pairs(layer, members) if pair.layer is layer]
    for number, pair in enumerate(own):
        if f"vars/{number}" not in group:
            raise ValueError(f"it holds no array for {pair.weight.path!r}")
        pair.array = files.read_dataset(root, f"{group.name}/vars/{number}")
        pair.source = pair.array.name
    places = _find_groups(_list_children(layer, members), group).items()
    return own + [p for inner, place in places for p in _match_group(inner, members, root, place)]


def _find_groups(children: dict[str, Any], group: Any) -> dict[Any, Any]:
    """The groups of layers: by attribute, or by class among those of a list or of the model."""
    named = {name: child for name, child in children.items() if name in group}
    places = {v: group[name] for name, v in named.items() if isinstance(v, keras.Layer)}
    lists = [(v, group[name]) for name, v in named.items() if not isinstance(v, keras.Layer)]
    rest = [child for name, child in children.items() if name not in named]
    lists.append((rest, group.get("layers") or group.get("_layer_checkpoint_dependencies") or {}))
    for value, container in lists:
        counts: collections.Counter[str] = collections.Counter()
        for layer in filter(lambda layer: layer not in places, _flatten(value)):
            # Groups are named by class, as conv2d, conv2d_2, ...: counted, with gaps.
            kind = _snake_case(type(layer).__name__)
            names = filter(re.compile(rf"{kind}(_\d+)?").fullmatch, container)
            found = sorted(names, key=lambda name: (len(name), name))
            if layer.weights:
                if counts[kind] >= len(found):
                    raise ValueError(f"it holds no array for {layer.weights[0].path!r}")
                places[layer] = container[found[counts[kind]]]
            counts[kind] += 1
    return places


def _snake_case(name: str) -> str:
    """How Keras names a class in the files."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _match_graph(
    model: keras.Model, members: Members, saved: files.Graph, part: str | None
) -> list[Pair]:
    """Matches a checkpoint, or the one of its parts that fits, as `Checkpoint(generator=...)`."""
    parts = {k: node for k, node in saved.attributes[0].items() if saved.list_arrays(node)}
    if part is not None and part not in parts:
        raise ArgumentError("part", f"must be one of {sorted(parts)}. Received: {part!r}.")
    roots = {0, *parts.values()} if part is None else {parts[part]}
    reason: Exception | None = None
    for by_name in (True, False):
        fits = {}
        for root in sorted(roots):
            arrays = saved.list_arrays(root)
            try:
                if by_name:
                    pairs = _match_node(model, members, saved, root)
                else:
                    pairs = _match_flat(model, members, arrays)
                read = {id(pair.array) for pair in pairs}
                unread = sorted(name for name, array in arrays if id(array) not in read)
                if unread:
                    problem = f"it has {len(unread)} arrays that the model has not, such as "
                    raise ValueError(f"{problem}{unread[:5]}")
                for pair in pairs:
                    pair.value("per_channel_mean")  # has the right size
            except (LookupError, ValueError) as error:
                reason = reason or error  # the first: of the whole, by name
                continue
            fits[root] = pairs
            if root == 0:
                break
        if len(fits) == 1:
            return fits.popitem()[1]
        if fits:
            names = sorted(name for name, node in parts.items() if node in fits)
            raise ArgumentError("part", f"must be one of {names}, which all fit. Received: None.")
    raise ValueError(str(reason))


def _match_node(value: Any, members: Members, saved: files.Graph, node: int) -> list[Pair]:
    """Matches a layer, list or dict with an object of a checkpoint."""
    attributes = saved.attributes[node]
    children = {
        name: child
        for name, child in _list_children(value, members).items()
        if any(layer.weights for layer in _flatten(child))
    }
    if graph.is_graph(value) and "layer_with_weights-0" in attributes:
        if f"layer_with_weights-{len(children)}" in attributes:
            raise ValueError("it has more layers with weights than the model")
        children = {f"layer_with_weights-{i}": v for i, v in enumerate(children.values())}
    pairs = [pair for pair in _list_pairs(value, members) if pair.layer is value]
    for pair in pairs:
        # Keras 2 may have said more, as depthwise_kernel.
        names = [name for name in attributes if name.endswith(pair.weight.name)]
        if not names:
            raise LookupError(f"it holds no array for {pair.weight.path!r}")
        pair.source, pair.array = saved.arrays[attributes[min(names, key=len)]]
    for name, child in children.items():
        if name not in attributes:
            there = [key for key in attributes if not key.startswith("_")][:9]
            raise LookupError(f"it holds no {name!r}, but {there}")
        pairs += _match_node(child, members, saved, attributes[name])
    return pairs
