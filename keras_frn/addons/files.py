"""What the files of Keras 2 hold: a config, arrays, and the tree that says which array is whose.

Reading is JSON, HDF5, zip and TensorFlow's own reader of checkpoints. Nothing is unpickled or run.
"""

import contextlib
import dataclasses
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import h5py


@dataclasses.dataclass
class Saved:
    """A file: its config, how the model was compiled, and its weights; None where it has none.

    The weights are a dict from the names of layers to lists of `Named` arrays (the .h5 layout; an
    exported model has one list, of None), the root group of a .keras file, or a `Graph`.
    """

    config: dict | None = None
    training: dict | None = None
    weights: object = None


@dataclasses.dataclass
class Named:
    """An array with the name of its layer and its own."""

    layer: str | None
    name: str
    array: object


@dataclasses.dataclass
class Graph:
    """The objects of a checkpoint, from the root 0: the keys of its arrays are not stable."""

    nodes: list
    reader: object

    def attributes(self, number):
        """Dict from the name of an attribute to the number of its object."""
        return {child.local_name: child.node_id for child in self.nodes[number].children}

    def array(self, number):
        """The array of a variable."""
        return self.reader.get_tensor(self.nodes[number].attributes[0].checkpoint_key)


@contextlib.contextmanager
def opened(path, name="path"):
    """The file at `path` as a `Saved`, whose arrays can be read inside the `with`."""
    with contextlib.ExitStack() as stack:
        with explained(path, name, " Pass a complete file that TensorFlow 2.8 to 2.15 saved."):
            saved = _open(Path(path), stack)
        yield saved


@contextlib.contextmanager
def explained(path, name="path", remedy=""):
    """Whatever a broken file raises becomes one kind of error, which says which file it is."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:600].rstrip(".") or type(error).__name__
        raise ValueError(
            f"`{name}` must be a model or weights saved by Keras 2. Received: {name}="
            f"{os.fspath(path)!r}, which cannot be read: {reason}.{remedy}"
        ) from error


def _open(path, stack):
    if path.is_dir():
        is_model = (path / "saved_model.pb").is_file()
        return _saved_model(path) if is_model else _checkpoint(path)
    if path.suffix == ".index" or path.with_name(path.name + ".index").is_file():
        return _checkpoint(os.fspath(path).removesuffix(".index"))
    if not path.exists():
        raise ValueError("there is no such file")
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"\x89HDF":
        return _hdf5(path, stack)
    if start[:2] == b"PK":
        return _zip(path, stack)
    if start[:1] == b"{":
        return Saved(json.loads(path.read_bytes()))
    raise ValueError("it is neither HDF5, zip, JSON, a SavedModel nor a checkpoint")


def _zip(path, stack):
    archive = stack.enter_context(zipfile.ZipFile(path))
    if "config.json" in archive.namelist():
        _check_version(json.loads(archive.read("metadata.json")).get("keras_version"))
        config = json.loads(archive.read("config.json"))
        weights = io.BytesIO(archive.read("model.weights.h5"))
        return Saved(config, config.get("compile_config"), _hdf5(weights, stack).weights)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    archive.extractall(folder)  # which writes nothing outside of the folder
    models = list(folder.rglob("saved_model.pb"))
    if len(models) != 1:
        raise ValueError("it is a zip file with neither config.json nor one saved_model.pb")
    return _saved_model(models[0].parent)


def _check_version(version):
    if str(version).startswith("3"):
        raise ValueError(f"Keras {version} saved it: open it with keras.saving.load_model")


# HDF5


def _hdf5(file, stack):
    root = stack.enter_context(h5py.File(file, "r"))
    group = member(root, "model_weights", h5py.Group) if "model_weights" in root else root
    layers = _names(group, "layer_names")
    if not layers:
        return Saved(weights=root)
    groups = [member(group, name, h5py.Group) for name in layers]
    saved = Saved(weights=dict(zip(layers, map(_arrays, groups), strict=True)))
    if "model_config" in root.attrs:
        _check_version(group.attrs.get("keras_version"))
        saved.config = json.loads(root.attrs["model_config"])
        saved.training = json.loads(root.attrs.get("training_config", "null"))
    return saved


def member(group, name, kind):
    """A member of a group, with data of its own: a file must not show what another has."""
    found = group.get(name)
    if not isinstance(found, kind) or found.file.filename != group.file.filename:
        raise LookupError(f"it has no {kind.__name__.lower()} {name!r} of its own")
    if kind is h5py.Dataset and (found.external or found.is_virtual):
        raise LookupError(f"{name!r} keeps its data in another file")
    return found


def _names(group, attribute):
    """A list of names, which Keras splits over several attributes where it is long."""
    parts = [attribute, *(f"{attribute}{i}" for i in range(len(group.attrs)))]
    names = [name for part in parts for name in group.attrs.get(part, ())]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _arrays(group):
    names = _names(group, "weight_names")
    return _named((name, member(group, name, h5py.Dataset)) for name in names)


def _named(arrays):
    """A list of `Named` from pairs of a full name, such as `block/frn/gamma:0`, and an array."""
    named, layer = [], None
    for path, array in reversed(list(arrays)):
        *parents, name = path.partition(":")[0].split("/")
        # Only a learned epsilon has no layer in its name. It comes before the gamma of its layer.
        layer = parents[-1] if parents else layer
        named.append(Named(layer, name, array))
    return named[::-1]


# SavedModel folders and checkpoints


def _saved_model(folder):
    saved = _checkpoint(folder / "variables" / "variables")
    if (folder / "keras_metadata.pb").is_file():
        # A message of nodes; each has its path, which is "root" for the model, and its JSON.
        data = (folder / "keras_metadata.pb").read_bytes()
        data = data[data.index(b"\x1a\x04root") :]
        text = data[data.index(b'{"') :].decode("utf-8", "replace")
        root, _ = json.JSONDecoder().raw_decode(text)
        saved.config = root.get("model_config") or root
        saved.training = root.get("training_config")
    return saved


def _checkpoint(prefix_or_folder):
    import tensorflow as tf
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    reader = tf.train.load_checkpoint(os.fspath(prefix_or_folder))
    message = reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    graph = Graph(TrackableObjectGraph.FromString(message).nodes, reader)
    root = graph.attributes(0)
    if not {"_endpoint_names", "variables"} <= root.keys():
        return Saved(weights=graph)
    numbers = graph.attributes(root["variables"]).values()
    names = [graph.nodes[number].attributes[0].full_name for number in numbers]
    return Saved(weights={None: _named(zip(names, map(graph.array, numbers), strict=True))})
