"""What the files of Keras 2 hold: a config, arrays, and the tree that says which array is whose.

Reading is JSON, HDF5, zip and TensorFlow's own reader of checkpoints. Nothing is unpickled or run.
"""

import contextlib
import dataclasses
import io
import json
import lzma
import os
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import h5py

from ..errors import ArgumentError
from ..typing import PathLike

MODEL = "top_level_model_weights"  # the list of what a model has outside of its layers
NamedArray: TypeAlias = tuple[str, Any]  # its name in the file, and the array
Lists: TypeAlias = dict[str | None, list[NamedArray]]


@dataclasses.dataclass
class Tree:
    """The objects in a file by number, from the root 0, as a checkpoint and HDF5 have them."""

    names: list[dict[str, int]]  # of what is in each object, with its number
    arrays: dict[int, NamedArray]
    is_checkpoint: bool  # which has the order of creation; HDF5 has that of the alphabet

    def find(self, path: Iterable[str], root: int = 0) -> int | None:
        """The object under these names, each in the one before it, if there is one."""
        node: int | None = root
        for name in path:
            node = None if node is None else self.names[node].get(name)
        return node

    def walk(self, root: int = 0) -> dict[int, str]:
        """The objects in one and their paths, as `gan/generator`, but no optimizers or metrics."""
        found: dict[int, str] = {}
        pending = [(root, "")]
        while pending:
            node, path = pending.pop()
            names = self.names[node]
            if node not in found and not _OF_TRAINING & names.keys():
                found[node] = path[1:]
                inside = [(n, f"{path}/{name}") for name, n in names.items() if name not in _APART]
                pending += reversed(inside)
        return found

    def list_arrays(self, root: int) -> list[NamedArray]:
        """The arrays of floats in an object, in its order."""
        found = [self.arrays[node] for node in self.walk(root) if node in self.arrays]
        return [(name, a) for name, a in found if a.shape and a.dtype.kind == "f"]


# What an optimizer or a metric with vectors has, and no layer.
_OF_TRAINING = {"iter", "_iterations", "accumulator", "total_cm", "true_positives"}
ALL_LAYERS = ("layers", "_layer_checkpoint_dependencies")  # lists of HDF5, by classes
_APART = ("keras_api", "metrics", "optimizer", "variables")
Weights: TypeAlias = Tree | Lists


@dataclasses.dataclass
class Saved:
    """A file: its config and how the model was compiled, None where it has none, and its weights.

    Weights are a tree, or lists of arrays by layer: the old .h5 layout. An exported model has one
    list, of None.
    """

    config: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    weights: Weights = dataclasses.field(default_factory=dict)


def reading_errors() -> tuple[type[Exception], ...]:
    """What a damaged file makes its readers raise; an `OSError` has no `errno` then."""
    kinds = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    of_readers = (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
    tensorflow: Any = sys.modules.get("tensorflow")
    return (*kinds, *of_readers, tensorflow.errors.OpError if tensorflow else EOFError)


def read(path: PathLike, name: str = "path") -> Saved:
    """Reads a file; errors call its argument `name`."""
    remedy = " Pass a complete file that TensorFlow 2.8 to 2.15 saved."
    with explain_errors(path, name, "must be a model or weights saved by Keras 2", remedy):
        return _read(Path(path))


@contextlib.contextmanager
def explain_errors(path: PathLike, name: str, rule: str, remedy: str = "") -> Iterator[None]:
    """Turns whatever a broken file raises into one kind of error, which says what it broke."""
    try:
        yield
    except ArgumentError:
        raise
    except reading_errors() as error:
        if isinstance(error, OSError) and error.errno:
            raise
        reason = " ".join(str(error).split())[:600].rstrip(".") or type(error).__name__
        raise ArgumentError(
            name, f"{rule}. Received: {os.fspath(path)!r}: {reason}.{remedy}"
        ) from error


def _read(path: Path) -> Saved:
    if (path / "saved_model.pb").is_file():
        return _read_saved_model(path)
    if path.is_dir() or path.suffix == ".index" or Path(f"{path}.index").is_file():
        return _read_checkpoint(os.fspath(path).removesuffix(".index"))
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"\x89HDF":
        return _read_hdf5(path)
    if start[:2] == b"PK":
        return _read_zip(path)
    if start[:1] == b"{":
        return Saved(json.loads(path.read_bytes()))
    raise ValueError("it is neither HDF5, zip, JSON, a SavedModel nor a checkpoint")


def _read_zip(path: Path) -> Saved:
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        if "config.json" in archive.namelist():
            metadata = json.loads(archive.read("metadata.json"))
            _check_version(metadata.get("keras_version"))
            config = json.loads(archive.read("config.json"))
            weights = _read_hdf5(io.BytesIO(archive.read("model.weights.h5"))).weights
            return Saved(config, config.get("compile_config"), weights)
        archive.extractall(folder)  # which writes nothing outside of the folder
        models = list(Path(folder).rglob("saved_model.pb"))
        if len(models) != 1:
            raise ValueError("it is a zip file with neither config.json nor one saved_model.pb")
        return _read_saved_model(models[0].parent)


def _check_version(version: Any) -> None:
    if str(version).startswith("3"):
        remedy = "There is nothing to migrate: `keras.saving.load_model` opens it"
        raise ValueError(f"Keras {version} saved it. {remedy}")


def _read_hdf5(file: Any) -> Saved:
    with h5py.File(file, "r") as root:
        group = root.get("model_weights", root)
        lists: Lists = {}
        for layer in filter(group.__contains__, [MODEL, *_read_names(group, "layer_names")]):
            names = _read_names(group[layer], "weight_names")
            lists[layer] = [(n, _read_array(root, group[layer], n)) for n in names]
        if "model_config" not in root.attrs:
            return Saved(weights=lists or _read_groups(root))
        _check_version(group.attrs.get("keras_version"))
        config, training = root.attrs["model_config"], root.attrs.get("training_config", "null")
        return Saved(json.loads(config), json.loads(training), lists)


def _read_groups(root: h5py.Group) -> Tree:
    tree = Tree([], {}, is_checkpoint=False)

    def add(group: Any, key: str) -> int:
        number, item = len(tree.names), group[key]
        tree.names.append({})
        if isinstance(item, h5py.Group):
            tree.names[number] = names = {name: add(item, name) for name in item}
            # An optimizer begins with its steps, under this name in checkpoints.
            first = tree.arrays.get(names.get("0", 0))  # 0 is the whole file
            if first and first[1].dtype.kind in "iu":
                names["iter"] = names.pop("0")
        else:
            tree.arrays[number] = f"{group.name}/{key}", _read_array(root, group, key)
        return number

    add(root, "/")
    return tree


def _read_array(root: h5py.Group, group: h5py.Group, name: str) -> Any:
    """An array of a file, with data of its own: a file must not show what another has."""
    found = group[name]
    is_own = isinstance(found, h5py.Dataset) and found.file.filename == root.file.filename
    if not is_own or found.external or found.is_virtual:
        raise ValueError(f"'{group.name}/{name}' is not an array of this file")
    return found[()]


def _read_names(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names, which Keras splits over several attributes where it is long."""
    parts = [attribute, *(f"{attribute}{i}" for i in range(len(group.attrs)))]
    names = [name for part in parts for name in group.attrs.get(part, ())]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _read_saved_model(folder: Path) -> Saved:
    saved = _read_checkpoint(folder / "variables" / "variables")
    if (folder / "keras_metadata.pb").is_file():
        # A message of nodes; each has its path, which is "root" for the model, and its JSON.
        data = (folder / "keras_metadata.pb").read_bytes().partition(b"\x1a\x04root")[2]
        text = data[data.index(b'{"') :].decode("utf-8", "replace")
        root, _ = json.JSONDecoder().raw_decode(text)
        saved.config = root.get("model_config") or root
        saved.training = root.get("training_config")
    return saved


def _read_checkpoint(prefix_or_folder: PathLike) -> Saved:
    try:
        import tensorflow as tf
        from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
    except ImportError as error:
        needed = "SavedModels and checkpoints are read by TensorFlow: pip install tensorflow"
        raise ImportError(needed) from error
    reader = tf.train.load_checkpoint(os.fspath(prefix_or_folder))
    message = reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    nodes = TrackableObjectGraph.FromString(message).nodes
    names = [{edge.local_name: edge.node_id for edge in node.children} for node in nodes]
    tree = Tree(names, {}, is_checkpoint=True)
    for number, node in enumerate(nodes):
        for array in node.attributes:
            tree.arrays[number] = array.full_name, reader.get_tensor(array.checkpoint_key)
    root = names[0]
    if not {"_endpoint_names", "variables"} <= root.keys():
        return Saved(weights=tree)
    return Saved(weights={None: [tree.arrays[n] for n in names[root["variables"]].values()]})
