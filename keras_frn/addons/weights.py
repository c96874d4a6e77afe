"""Which array of a file belongs to which weight of a model."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import h5py
import keras
import numpy as np

from .. import graph
from ..errors import ArgumentError
from ..layers import TLU, FilterResponseNormalization
from . import files

Members = Mapping[int, list[Any]]  # as in `config.Builder`


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a layer among those of its class and among those with weights, and its name.

    `key` is its own in a list or dict of a layer or a subclassed model; None in other models."""

    kind: str
    number_in_kind: int
    number: int
    total: int
    name: str
    key: str | None = None


@dataclasses.dataclass
class Pair:
    """A weight of the model, the way to it in the tree of objects, and its array in the file, with
    the array's name there."""

    layer: keras.Layer
    weight: keras.Variable
    path: tuple[Any, ...]
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
        return _match_graph(_list_pairs(model, members), stored, part)
    if part is not None:
        raise ArgumentError("part", f"must be None for a file without parts. Received: {part!r}.")
    if isinstance(stored, dict):
        return _match_lists(model, members, stored)
    pairs = _list_pairs(model, members)
    for pair in pairs:
        try:
            pair.array = _find_in_hdf5(stored, pair)
            pair.source = pair.array.name
        except LookupError as error:
            raise ValueError(f"it holds no array for {pair.weight.path!r}") from error
    paths: list[str] = []
    stored.visit(paths.append)
    count = sum(bool(re.match(r"(?!optimizer|metrics).*vars/\d+$", path)) for path in paths)
    if count != len(pairs):
        raise ValueError(f"it has {count} weights in its layers, the model {len(pairs)}")
    return pairs


def _list_pairs(layer: Any, members: Members, path: tuple[Any, ...] = ()) -> list[Pair]:
    """A `Pair` without an array for each weight of a layer, in the order of Keras 2."""
    if graph.is_graph(layer):
        items = enumerate(members.get(id(layer), layer.layers))
        found = [_list_inside(items, members, path, in_graph=True)]
    else:
        # Under PyTorch a layer is a torch.nn.Module, which keeps the modules in it apart.
        values = {**vars(layer), **vars(layer).get("_modules", {})}
        for private in ("_layers", "_modules"):
            values.pop(private, None)
        found = [_list_value(value, members, (*path, name)) for name, value in values.items()]
    inside = {id(pair.weight): pair for pairs in found for pair in pairs}
    own = [weight for weight in layer.weights if id(weight) not in inside]
    if isinstance(layer, FilterResponseNormalization):
        own.sort(key=lambda weight: weight is not layer.learned_epsilon)
    return [Pair(layer, w, (*path, i)) for i, w in enumerate(own)] + list(inside.values())


def _list_value(value: Any, members: Members, path: tuple[Any, ...]) -> list[Pair]:
    """The `Pair`s in an attribute: a layer, or lists and dicts of layers."""
    if isinstance(value, keras.Layer):
        return _list_pairs(value, members, path)
    if isinstance(value, dict):
        return _list_inside(value.items(), members, path)
    return _list_inside(enumerate(value if isinstance(value, (list, tuple)) else ()), members, path)


def _list_inside(
    items: Iterable[tuple[Any, Any]],
    members: Members,
    path: tuple[Any, ...],
    in_graph: bool = False,
) -> list[Pair]:
    pairs: list[Pair] = []
    counts: collections.Counter[str] = collections.Counter()
    items = list(items)
    total = sum(isinstance(v, keras.Layer) and bool(v.weights) for _, v in items)
    for key, value in items:
        if isinstance(value, keras.Layer):
            kind = type(value).__name__
            place = Place(kind, counts[kind], counts["with weights"], total, value.name)
            place = place if in_graph else dataclasses.replace(place, key=str(key))
            pairs += _list_pairs(value, members, (*path, place))
            counts.update([kind, "with weights"] if value.weights else [kind])
        elif isinstance(value, (list, tuple, dict)):
            pairs += _list_value(value, members, (*path, str(key)))
    return pairs


# Lists: the .h5 layout


def _match_lists(model: Any, members: Members, lists: dict[Any, list[Any]]) -> list[Pair]:
    layers = [v for v in members.get(id(model), model.layers) if v.weights]
    lists = {name: arrays for name, arrays in lists.items() if arrays}
    if set(lists) == {None}:
        return _match_list(model, _list_pairs(model, members), lists[None], by_order=True)
    if len(layers) != len(lists):
        raise ValueError(f"it has {len(lists)} layers with weights, the model {len(layers)}")
    if {layer.name for layer in layers} == set(lists):
        layers.sort(key=lambda layer: list(lists).index(layer.name))
    pairs = []
    for layer, arrays in zip(layers, lists.values(), strict=True):
        own = _list_pairs(layer, members)
        own.sort(key=lambda pair: not pair.weight.trainable)  # as Keras 2 wrote them
        # Without a config nobody knows what was frozen, on which the order inside a model depends.
        by_order = bool(members) or not isinstance(layer, keras.Model)
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


# Trees: the layouts of .keras files and of checkpoints


def _find_in_hdf5(root: h5py.Group, pair: Pair) -> Any:
    group = root
    for part in pair.path[:-1]:
        name = part
        if isinstance(part, Place):
            group = group.get("layers") or group.get("_layer_checkpoint_dependencies") or group
            # Groups are named by class, as conv2d, conv2d_2, ...: counted, with gaps.
            kind = _snake_case(part.kind)
            matches = filter(None, (re.fullmatch(rf"{kind}(?:_(\d+))?", name) for name in group))
            groups = sorted((int(match[1] or 0), match[0]) for match in matches)
            name = groups[part.number_in_kind][1]
        group = group[name]
    return files.read_dataset(root, f"{group.name}/vars/{pair.path[-1]}")


def _snake_case(name: str) -> str:
    """How Keras names a class in the files."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _match_graph(pairs: list[Pair], saved: files.Graph, part: str | None) -> list[Pair]:
    """Matches a checkpoint, or the one of its parts that fits, as `Checkpoint(generator=...)`."""
    parts = {k: node for k, node in saved.attributes[0].items() if saved.list_arrays(node)}
    if part is not None and part not in parts:
        raise ArgumentError("part", f"must be one of {sorted(parts)}. Received: {part!r}.")
    fits: dict[int, list[Pair]] = {}
    reasons: dict[str, str] = {}
    for name, node in {part: parts[part]}.items() if part else {"": 0, **parts}.items():
        try:
            fits[node] = _match_node(pairs, saved, node)
        except (LookupError, ValueError) as error:
            reasons[name] = str(error)
        if 0 in fits:
            break
    if len(fits) == 1:
        return fits[next(iter(fits))]
    if fits:
        names = sorted(name for name, node in parts.items() if node in fits)
        raise ArgumentError("part", f"must be one of {names}, which all fit. Received: None.")
    raise ValueError(reasons[part or ""])


def _match_node(pairs: list[Pair], saved: files.Graph, root: int) -> list[Pair]:
    found, numbers = [], set()
    for pair in pairs:
        number = _find_in_graph(saved, root, pair)
        numbers.add(number)
        name, array = saved.arrays[number]
        found.append(dataclasses.replace(pair, array=array, source=name))
        found[-1].value("per_channel_mean")  # has the right size
    unread = saved.list_arrays(root).keys() - numbers
    if unread:
        names = sorted(saved.arrays[number][0] for number in unread)[:5]
        raise ValueError(f"it has {len(unread)} arrays that the model has not, such as {names}")
    return found


def _find_in_graph(saved: files.Graph, root: int, pair: Pair) -> int:
    """The number of the variable that belongs to a weight."""
    node = root
    for part in pair.path[:-1]:
        attributes, name = saved.attributes[node], part
        if isinstance(part, Place):
            is_numbered = part.key is None and "layer_with_weights-0" in attributes
            name = f"layer_with_weights-{part.number}" if is_numbered else part.key or part.name
            if is_numbered and f"layer_with_weights-{part.total}" in attributes:
                raise ValueError("it has more layers with weights than the model")
        if name not in attributes:
            there = [key for key in attributes if not key.startswith("_")][:9]
            raise LookupError(f"it holds no {name!r} for {pair.weight.path!r}, but {there}")
        node = attributes[name]
    # Keras 2 may have said more, as depthwise_kernel.
    names = [name for name in saved.attributes[node] if name.endswith(pair.weight.name)]
    if not names:
        raise LookupError(f"it holds no array for {pair.weight.path!r}")
    return saved.attributes[node][sorted(names, key=len)[0]]
