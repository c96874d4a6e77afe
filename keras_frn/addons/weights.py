"""Which array of a file belongs to which weight of a model."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import h5py
import keras
import numpy as np

from ..errors import ArgumentError
from ..layers import TLU, FilterResponseNormalization
from . import files

Members = Mapping[int, list[Any]]  # as in `config.Builder`


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a layer in a list: among those of its class, and among those with weights."""

    kind: str
    number_in_kind: int
    number: int
    total: int


@dataclasses.dataclass
class Pair:
    """A weight of the model, the way to it in the tree of objects, and its array in the file."""

    layer: keras.Layer
    weight: keras.Variable
    path: tuple[Any, ...]
    array: Any = None

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


def match(model: keras.Model, members: Members, stored: Any) -> list[Pair]:
    """A `Pair` for every weight of a model."""
    if isinstance(stored, dict):
        return _match_lists(model, members, stored)
    pairs = _list_pairs(model, members)
    is_graph = isinstance(stored, files.Graph)
    find = _find_in_graph if is_graph else _find_in_hdf5
    for pair in pairs:
        try:
            pair.array = find(stored, pair)
        except LookupError as error:
            raise ValueError(f"it holds no array for {pair.weight.path!r}") from error
    if not is_graph:
        paths: list[str] = []
        stored.visit(paths.append)
        count = sum(bool(re.match(r"_?layer.*/vars/\d+$", path)) for path in paths)
        if count != len(pairs):
            raise ValueError(f"it has {count} weights in its layers, the model {len(pairs)}")
    return pairs


def _list_pairs(layer: Any, members: Members, path: tuple[Any, ...] = ()) -> list[Pair]:
    """A `Pair` without an array for each weight of a layer, in the order of Keras 2."""
    if isinstance(layer, keras.Model):
        found = [_list_inside(members.get(id(layer), layer.layers), members, path)]
    else:
        # Under PyTorch a layer is a torch.nn.Module, which keeps the modules in it apart.
        values = {**vars(layer), **vars(layer).get("_modules", {})}
        found = [_list_inside(v, members, (*path, k)) for k, v in values.items() if k != "_layers"]
    inside = {id(pair.weight): pair for pairs in found for pair in pairs}
    own = [weight for weight in layer.weights if id(weight) not in inside]
    if isinstance(layer, FilterResponseNormalization):
        own.sort(key=lambda weight: weight is not layer.learned_epsilon)
    return [Pair(layer, w, (*path, i)) for i, w in enumerate(own)] + list(inside.values())


def _list_inside(value: Any, members: Members, path: tuple[Any, ...]) -> list[Pair]:
    """The `Pair`s in a value that is a layer or a list of layers."""
    if isinstance(value, keras.Layer):
        return _list_pairs(value, members, path)
    values = value if isinstance(value, (list, tuple)) else ()
    layers = [layer for layer in values if isinstance(layer, keras.Layer)]
    pairs: list[Pair] = []
    counts: collections.Counter[str] = collections.Counter()
    total = sum(bool(v.weights) for v in layers)
    for layer in layers:
        kind = type(layer).__name__
        place = Place(kind, counts[kind], counts["with weights"], total)
        pairs += _list_pairs(layer, members, (*path, place))
        counts.update([kind, "with weights"] if layer.weights else [kind])
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
    return [dataclasses.replace(p, array=a) for p, (_, a) in zip(pairs, arrays, strict=True)]


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


def _find_in_graph(graph: files.Graph, pair: Pair) -> Any:
    node = 0
    for part in pair.path[:-1]:
        attributes, name = graph.attributes[node], part
        if isinstance(part, Place):
            prefix = "layer_with_weights-" if "layer_with_weights-0" in attributes else ""
            name = f"{prefix}{part.number}"
            if f"{prefix}{part.total}" in attributes:
                raise ValueError("it has more layers with weights than the model")
        node = attributes[name]
    # Keras 2 may have said more, as depthwise_kernel.
    names = [name for name in graph.attributes[node] if name.endswith(pair.weight.name)]
    return graph.arrays[graph.attributes[node][sorted(names, key=len)[0]]][1]
