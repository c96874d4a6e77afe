"""What the files of Keras 2 hold: a config, arrays, and the tree that says which array is whose.

Reading is JSON, HDF5, zip and protocol buffers. Nothing is unpickled, imported by name or run, no
link leads out of the file, and nothing is read that is out of proportion to its size.
"""

import contextlib
import json
import os
import re
import tempfile
import zipfile

import numpy as np

from . import _addons_hdf5 as hdf5
from ._addons_checkpoint import Checkpoint, fields, protobuf

# A compressed file may grow this much. Trained weights hardly compress; zeros compress without end.
_GROWTH, _FREE = 100, 2**26
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")
_REMEDY = "Pass a complete file that TensorFlow 2.8 to 2.15 saved."


class Saved:
    """A file, opened: `config` and `training` are None where it has none, and so is `weights`."""

    def __init__(self, kind, config=None, training=None, weights=None):
        self.kind = kind
        self.config = config
        self.training = training
        self.weights = weights


class Budget:
    """How many bytes may still be read from a file of this size."""

    def __init__(self, size):
        self.size = size
        self.left = _FREE + _GROWTH * size

    def spend(self, size, what):
        self.left -= size
        if self.left < 0:
            raise ValueError(f"{what} claims {size} bytes, in a file of {self.size} bytes")


@contextlib.contextmanager
def opened(path, name="path"):
    """The file at `path` as a `Saved`, whose arrays can be read inside the `with`."""
    path = os.fspath(path)
    with contextlib.ExitStack() as stack:
        try:
            saved = _open(path, stack)
        except Exception as error:  # whatever a broken file makes a parser raise
            raise unreadable(path, error, name, f" {_REMEDY}") from error
        yield saved


def unreadable(path, error, name="path", remedy=""):
    """The error for a file that cannot be read."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    return ValueError(
        f"`{name}` must be a model or weights saved by Keras 2. Received: {name}={path!r}, "
        f"which cannot be read: {said.rstrip('.')}.{remedy}"
    )


def _open(path, stack):
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "saved_model.pb")):
            return _saved_model(path)
        return _checkpoint(_checkpoint_in(path))
    if not os.path.exists(path):
        if os.path.isfile(path + ".index"):
            return _checkpoint(path)
        raise ValueError("there is no such file")
    budget = Budget(os.path.getsize(path))
    with open(path, "rb") as file:
        start = file.read(8)
    if start == b"\x89HDF\r\n\x1a\n":
        return _hdf5(path, budget)
    if start[:2] == b"PK":
        return _zip(path, budget, stack)
    if path.endswith(".index"):
        return _checkpoint(path[: -len(".index")])
    if start.lstrip()[:1] == b"{":
        with open(path, "rb") as file:
            return Saved("JSON config", config=_json(file.read()))
    raise ValueError("it is neither HDF5, zip, JSON, a SavedModel nor a checkpoint")


def _json(data):
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("its JSON config is not an object")
    return value


# HDF5


def _hdf5(file, budget, **found):
    root = hdf5.read(file, budget.left)
    budget.spend(sum(array.nbytes for array in root.arrays()), "it")
    group, optimizer, kind = root, None, "file of weights"
    if "model_config" in root.attrs or root.get("model_weights") is not None:
        kind, group, optimizer = (
            "model",
            _group(root, "model_weights"),
            root.get("optimizer_weights"),
        )
        for name, attribute in (("config", "model_config"), ("training", "training_config")):
            if attribute in root.attrs:
                found[name] = _json(root.attrs[attribute])
    if "layer_names" in group.attrs or "layer_names0" in group.attrs:
        weights = _flat(group, optimizer)
        if "config" in found:
            _check_version(group.attrs.get("keras_version"))
    elif any(group.get(name) is not None for name in _CONTAINERS):
        weights = TreeWeights(GroupNode(group))
    else:
        raise ValueError("it is an HDF5 file without the layer names that Keras writes")
    return Saved(kind, weights=weights, **found)


def _check_version(version):
    if str(version).startswith("3"):
        raise ValueError(f"Keras {version} saved it: open it with keras.saving.load_model")


def _names(group, attribute):
    """A list of names, which Keras splits over several attributes where it is long."""
    names, count = list(group.attrs.get(attribute, ())), 0
    while f"{attribute}{count}" in group.attrs:
        names += group.attrs[f"{attribute}{count}"]
        count += 1
    return names


def _group(group, name):
    found = group.get(name)
    if not isinstance(found, hdf5.Group):
        raise ValueError(f"it has no group {name!r}")
    return found


class FlatWeights:
    """The .h5 layout: a list of arrays for every layer of the outermost model.

    An exported SavedModel has one list for all layers, here a single group without a name.
    """

    def __init__(self, groups, optimizer=None):
        self.groups = groups
        self.optimizer = optimizer

    def elements(self):
        """How many numbers the file's weights have."""
        return sum(array.size for _, arrays in self.groups for _, array in arrays)


def _flat(group, optimizer):
    def arrays(group):
        found = [(name, group.get(name)) for name in _names(group, "weight_names")]
        missing = [name for name, array in found if not isinstance(array, np.ndarray)]
        if missing:
            raise ValueError(f"it has no array {missing[0]!r}")
        return found

    groups = [(name, arrays(_group(group, name))) for name in _names(group, "layer_names")]
    own = group.get("top_level_model_weights")
    if own is not None and arrays(own):
        raise ValueError("its outermost model has weights of its own, outside its layers")
    state = None if optimizer is None else _state([array for _, array in arrays(optimizer)])
    return FlatWeights(groups, state)


def _state(arrays):
    """An optimizer's arrays in order of creation. The first is the number of steps."""
    return {"iterations": arrays[0], "arrays": arrays} if arrays else None


# Zip files: .keras, and a SavedModel folder that was zipped


def _zip(path, budget, stack):
    archive = stack.enter_context(zipfile.ZipFile(path))
    members = {info.filename: info for info in archive.infolist()}

    def read(name):
        info = members[name]
        budget.spend(info.file_size, repr(name))
        with archive.open(info) as file:
            return file.read(info.file_size)

    if "config.json" in members:
        config = _json(read("config.json"))
        found = {"config": config, "training": config.get("compile_config")}
        if "metadata.json" in members:
            _check_version(_json(read("metadata.json")).get("keras_version"))
        saved = _hdf5(read("model.weights.h5"), budget, **found)
        saved.kind = ".keras file"
        return saved
    roots = [name[: -len("saved_model.pb")] for name in members if name.endswith("saved_model.pb")]
    if len(roots) != 1:
        raise ValueError("it is a zip file with neither config.json nor one saved_model.pb")
    # The names that are written are ours, never those of the archive.
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    os.mkdir(os.path.join(folder, "variables"))
    for name in members:
        inside = name[len(roots[0]) :] if name.startswith(roots[0]) else ""
        if re.fullmatch(
            r"keras_metadata\.pb|variables/variables\.(index|data-\d{5}-of-\d{5})", inside
        ):
            with open(os.path.join(folder, inside), "wb") as file:
                file.write(read(name))
    return _saved_model(folder)


# SavedModel folders and checkpoints


def _saved_model(folder):
    saved = _checkpoint(os.path.join(folder, "variables", "variables"))
    saved.kind = "SavedModel" if saved.kind == "checkpoint" else saved.kind
    metadata = os.path.join(folder, "keras_metadata.pb")
    if os.path.isfile(metadata):
        with open(metadata, "rb") as file:
            root = _root_metadata(file.read())
        saved.config = root.get("model_config") or root
        saved.training = root.get("training_config")
    return saved


def _root_metadata(data):
    for number, node in protobuf(data):
        entries = fields(node) if number == 1 else {}
        if entries.get(3) == b"root":
            return _json(entries.get(5, b""))
    raise ValueError("its keras_metadata.pb names no root")


def _checkpoint_in(folder):
    """The newest checkpoint of a folder. Its `checkpoint` file may name only neighbours."""
    state = os.path.join(folder, "checkpoint")
    if os.path.isfile(state):
        with open(state, encoding="utf-8") as file:
            latest = re.search(r'^model_checkpoint_path: "(.*)"', file.read(2**16), re.M)
        if latest:
            return os.path.join(folder, os.path.basename(latest[1]))
    names = [n for n in sorted(os.listdir(folder)) if n.endswith(".index")]
    if len(names) != 1:
        raise ValueError("it is a folder with neither a saved_model.pb nor one checkpoint")
    return os.path.join(folder, names[0][: -len(".index")])


def _checkpoint(prefix):
    if not os.path.isfile(prefix + ".index"):
        raise ValueError(f"there is no {os.path.basename(prefix)}.index")
    checkpoint = Checkpoint(prefix)
    root = GraphNode(0, checkpoint.graph(), checkpoint, {})
    if root.child("_endpoint_names") is not None and root.child("variables") is not None:
        arrays = root.child("variables").list()
        return Saved("exported SavedModel", weights=FlatWeights([(None, arrays)]))
    return Saved("checkpoint", weights=TreeWeights(root))


# The two layouts that are trees


class TreeWeights:
    """The layouts of .keras files and of checkpoints: a tree of objects, each with its arrays."""

    def __init__(self, root):
        self.root = root
        self.optimizer = root.optimizer()

    def elements(self):
        """How many numbers the file's weights have."""
        return self.root.elements()


class GroupNode:
    """One object of a .keras file: `vars/0`, `vars/1`, ..., groups named by attribute or class."""

    named = False

    def __init__(self, group):
        self._group = group

    def child(self, name):
        """The object in this attribute, or None."""
        found = self._group.members.get(name)
        return GroupNode(found) if isinstance(found, hdf5.Group) else None

    def layers(self, classes):
        """The layers inside, in the order of `classes`, which has the class name of each."""
        container = next(filter(None, map(self.child, _CONTAINERS)), None)
        return [] if container is None else container.items(classes)

    def items(self, classes):
        """The objects of a list. A group is named by its class and counted, sometimes twice."""
        groups = {}
        for name in self._group.members:
            base, number = re.fullmatch(r"(.*?)(?:_(\d+))?", name, re.S).groups()
            groups.setdefault(base, []).append((int(number or 0), name))
        queues = {base: iter(sorted(found)) for base, found in groups.items()}
        nodes = []
        for name in map(_snake_case, classes):
            _, group = next(queues.get(name, iter(())), (0, None))
            nodes.append(None if group is None else self.child(group))
        return nodes

    def arrays(self):
        """The object's own arrays, in order: (name or None, key, array)."""
        values = self.child("vars")
        found = [] if values is None else values._group.members
        arrays = [found.get(str(i)) for i in range(len(found))]
        if not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("its variables are not numbered")
        return [(None, None, array) for array in arrays]

    def optimizer(self):
        """The optimizer's arrays in order of creation, or None."""
        node = self.child("optimizer")
        return None if node is None else _state([array for _, _, array in node.arrays()])

    def elements(self):
        """How many numbers are stored below."""
        return sum(array.size for array in self._group.arrays())


def _snake_case(name):
    """How Keras names a class in the files."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


class GraphNode:
    """One object of a checkpoint's graph, found by its edges: the keys of arrays are not stable."""

    named = True

    def __init__(self, number, nodes, checkpoint, cache):
        self._number, self._nodes = number, nodes
        self._checkpoint, self._cache = checkpoint, cache
        if number >= len(nodes):
            raise ValueError("its object graph has an edge to nowhere")
        self._edges = nodes[number].edges

    def _node(self, number):
        return GraphNode(number, self._nodes, self._checkpoint, self._cache)

    def child(self, name):
        """The object in this attribute, or None."""
        return self._node(self._edges[name]) if name in self._edges else None

    def layers(self, classes):
        """The layers inside that have weights, as many as `classes`."""
        nodes = [self.child(f"layer_with_weights-{i}") for i in range(len(classes))]
        return nodes if self.child(f"layer_with_weights-{len(classes)}") is None else []

    def items(self, classes):
        """The objects of a list."""
        return [self.child(str(i)) for i in range(len(classes))]

    def arrays(self):
        """The object's own arrays: (name, key, array)."""
        found, seen = [], set()
        for name, number in self._edges.items():
            array = self._node(number).value()
            if array is not None and number not in seen:
                seen.add(number)
                found.append((name, number, array))
        return found

    def value(self):
        """The array of this object itself, or None."""
        if not self._nodes[self._number].values:
            return None
        key, _ = self._nodes[self._number].values[0]
        if key not in self._cache:
            self._cache[key] = self._checkpoint.array(key)
        return self._cache[key]

    def list(self):
        """The arrays of a list, with the full names of the weights."""
        nodes = [self.child(str(i)) for i in range(len(self._edges))]
        nodes = [node for node in nodes if node is not None and node.value() is not None]
        return [(self._nodes[n._number].values[0][1], n.value()) for n in nodes]

    def optimizer(self):
        """The optimizer's arrays, in order of creation or by (slot, key of the weight), or None."""
        node = self.child("optimizer")
        if node is None:
            return None
        state = {
            name: node.child(edge).value()
            for name, edge in (("iterations", "_iterations"), ("learning_rate", "_learning_rate"))
            if node.child(edge) is not None
        }
        variables = node.child("_variables")
        if variables is not None:
            count = len(variables._edges)
            numbers = [n for n in map(variables.child, map(str, range(count))) if n is not None]
            state["arrays"] = [n.value() for n in numbers]
        else:
            for name, edge in (("iterations", "iter"), ("learning_rate", "learning_rate")):
                if node.child(edge) is not None:
                    state[name] = node.child(edge).value()
            state["slots"] = {
                (slot, weight): self._node(number).value()
                for slot, weight, number in self._nodes[node._number].slots
            }
        scale = node.child("loss_scale")
        if scale is not None:
            state["loss_scale"] = [scale.child("good_steps"), scale.child("current_loss_scale")]
            state["loss_scale"] = [n and n.value() for n in state["loss_scale"]]
        return state if "iterations" in state else None

    def elements(self):
        """How many numbers the checkpoint holds."""
        return self._checkpoint.elements()
