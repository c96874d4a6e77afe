"""Damaged files give a model or an error that names its argument, and leave nothing behind."""

import io
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import h5py
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_frn import load_addons_model
from keras_frn.errors import ArgumentError

pytestmark = pytest.mark.once
MODELS = Path(__file__).parent / "addons_models"
FILES = ("model.h5", "model.keras", "saved_model.zip", "ckpt")
VALUES = (None, True, 0, -1, 3, 0.5, "", "x", "../../etc/passwd", [], {}, [None], [[]])
# A file takes some hundredths of a second, and a model that opens some tenths.
few = settings(max_examples=25, deadline=None, derandomize=True)
fractions = st.floats(0, 1, exclude_max=True)


def is_refused(path):
    weights = {"weights": path} if path.is_dir() else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_addons_model(MODELS / "frn_tlu" / "model.json" if weights else path, **weights)
        except ArgumentError:
            return True
    return False


def open_changed(name, change):
    """Opens a copy of a file, or of a checkpoint and its index, whose bytes were changed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        copy = shutil.copytree if (MODELS / "frn_tlu" / name).is_dir() else shutil.copyfile
        copy(MODELS / "frn_tlu" / name, path)
        names = ("ckpt.index", "ckpt.data-00000-of-00001")
        for victim in [path / name for name in names] if path.is_dir() else [path]:
            data = change(victim.read_bytes())
            victim.unlink()  # a copy is as read-only as its original
            victim.write_bytes(data)
        before = set(os.listdir(tempfile.gettempdir()))
        refused = is_refused(path)
        assert set(os.listdir(tempfile.gettempdir())) <= before
        return refused


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.98])
def test_files_that_are_cut_short_are_refused(name, part):
    assert open_changed(name, lambda data: data[: int(len(data) * part)])


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_do_no_harm(name):
    @few
    @given(st.lists(st.tuples(fractions, st.integers(1, 255)), min_size=1, max_size=64))
    def check(changes):
        def change(data):
            data = bytearray(data)
            for place, bits in dict(changes).items():
                data[int(place * len(data))] ^= bits
            return bytes(data)

        refused = open_changed(name, change)
        # A checkpoint has checksums; HDF5 has none, and a zip file may hold more than what is read.
        assert refused or name != "ckpt"

    check()


def list_places(config):
    """The containers in a config, each with one of its keys."""
    is_dict = isinstance(config, dict)
    for key, value in config.items() if is_dict else enumerate(config):
        yield config, key
        if isinstance(value, (dict, list)):
            yield from list_places(value)


@few
@given(
    st.sampled_from(["frn_tlu", "nested_functional", "tlu_affine"]),
    st.lists(st.tuples(fractions, st.sampled_from([*VALUES, "removed"])), min_size=1, max_size=3),
)
def test_changed_configs_do_no_harm(model, changes):
    def change(text):
        config = json.loads(text)
        for place, value in changes:
            if places := list(list_places(config)):
                container, key = places[int(place * len(places))]
                container[key] = value
                if value == "removed":
                    del container[key]
        return json.dumps(config).encode()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copyfile(MODELS / model / "model.h5", Path(folder, "model.h5")))
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = change(file.attrs["model_config"])
        is_refused(path)
        target = io.BytesIO()
        old = zipfile.ZipFile(MODELS / model / "model.keras")
        with old, zipfile.ZipFile(target, "w") as new:
            for member in old.namelist():
                data = old.read(member)
                new.writestr(member, change(data) if member == "config.json" else data)
        path.with_suffix(".keras").write_bytes(target.getvalue())
        is_refused(path.with_suffix(".keras"))
