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

    The weights are a dict from layers to lists of names and arrays (the .h5 layout; an exported
    model has one list, of None), the root group of a .keras file, or the `Graph` of a checkpoint.
    """

    config: dict | None = None
    training: dict | None = None
    weights: object = None


@dataclasses.dataclass
class Graph:
    """The objects of a checkpoint by number, from the root 0: the keys of arrays are not stable."""

    attributes: list  # of dicts from names to the numbers of objects
    arrays: dict  # from the numbers of variables to pairs of their old name and array


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
    if (path / "saved_model.pb").is_file():
        return _saved_model(path)
    if path.is_dir() or path.suffix == ".index" or Path(f"{path}.index").is_file():
        return _checkpoint(os.fspath(path).removesuffix(".index"))
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


def _hdf5(file, stack):
    root = stack.enter_context(h5py.File(file, "r"))
    group = root.get("model_weights", root)
    layers = _names(group, "layer_names")
    if not layers:
        return Saved(weights=root)
    saved = Saved(weights={})
    for layer in layers:
        names = _names(group[layer], "weight_names")
        saved.weights[layer] = [(n, dataset(root, f"{group.name}/{layer}/{n}")) for n in names]
    if "model_config" in root.attrs:
        _check_version(group.attrs.get("keras_version"))
        saved.config = json.loads(root.attrs["model_config"])
        saved.training = json.loads(root.attrs.get("training_config", "null"))
    return saved


def dataset(root, path):
    """An array of a file, with data of its own: a file must not show what another has."""
    found = root[path]
    is_own = isinstance(found, h5py.Dataset) and found.file.filename == root.file.filename
    if not is_own or found.external or found.is_virtual:
        raise ValueError(f"{path!r} is no array in this file")
    return found


def _names(group, attribute):
    """A list of names, which Keras splits over several attributes where it is long."""
    parts = [attribute, *(f"{attribute}{i}" for i in range(len(group.attrs)))]
    names = [name for part in parts for name in group.attrs.get(part, ())]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _saved_model(folder):
    saved = _checkpoint(folder / "variables" / "variables")
    if (folder / "keras_metadata.pb").is_file():
        # A message of nodes; each has its path, which is "root" for the model, and its JSON.
        data = (folder / "keras_metadata.pb").read_bytes().partition(b"\x1a\x04root")[2]
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
    nodes = TrackableObjectGraph.FromString(message).nodes
    graph = Graph([{edge.local_name: edge.node_id for edge in n.children} for n in nodes], {})
    for number, node in enumerate(nodes):
        for array in node.attributes:
            graph.arrays[number] = array.full_name, reader.get_tensor(array.checkpoint_key)
    root = graph.attributes[0]
    if not {"_endpoint_names", "variables"} <= root.keys():
        return Saved(weights=graph)
    numbers = graph.attributes[root["variables"]].values()
    return Saved(weights={None: [graph.arrays[number] for number in numbers]})
