"""Damaged files give a model or a ValueError, and leave nothing behind."""

import io
import json
import random
import shutil
import tempfile
import warnings
import zipfile
from pathlib import Path

import h5py
import pytest

from keras_frn import load_addons_model

MODELS = Path(__file__).parent / "addons_models"
FILES = ("model.h5", "model.keras", "saved_model.zip", "ckpt")
VALUES = (None, True, 0, -1, 3, 0.5, "", "x", "../../etc/passwd", [], {}, [None], [[]])


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder of temporary files, which has to be empty at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not any(folder.iterdir())


def is_refused(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if path.is_dir():
                load_addons_model(MODELS / "frn_tlu/model.json", weights=path)
            else:
                load_addons_model(path)
        except ValueError as error:
            if "Received: " not in str(error):
                raise AssertionError("the message does not say which file it is") from error
            return True
    return False


def damaged(name, folder, change):
    """A copy of a file, or of a checkpoint and its index, whose bytes have been changed."""
    source, target = MODELS / "frn_tlu" / name, folder / "damaged" / name
    if source.is_dir():
        shutil.copytree(source, target)
        victims = [target / "ckpt.index", target / "ckpt.data-00000-of-00001"]
    else:
        target.parent.mkdir()
        shutil.copyfile(source, target)
        victims = [target]
    for victim in victims:
        victim.chmod(0o600)
        victim.write_bytes(change(victim.read_bytes()))
    return target


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.98])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_cut_short_are_refused(name, part, tmp_path):
    assert is_refused(damaged(name, tmp_path, lambda data: data[: int(len(data) * part)]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_do_no_harm(name, seed, tmp_path):
    rng = random.Random(seed)

    def change(data):
        data = bytearray(data)
        for _ in range(rng.choice([1, 8, 64])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)

    refused = is_refused(damaged(name, tmp_path, change))
    # A checkpoint has checksums; HDF5 has none, and a zip file may hold more than what is read.
    assert refused or name != "ckpt"


def change_json(text, rng):
    """The config with some of its values exchanged or removed."""
    config = json.loads(text)
    for _ in range(rng.choice([1, 1, 3])):
        places, waiting = [], [config]
        while waiting:
            container = waiting.pop()
            is_dict = isinstance(container, dict)
            for key, value in container.items() if is_dict else enumerate(container):
                places.append((container, key))
                waiting += [value] if isinstance(value, (dict, list)) else []
        container, key = rng.choice(places)
        if rng.random() < 0.3:
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
    return json.dumps(config).encode()


@pytest.mark.parametrize("seed", range(25))
def test_changed_configs_do_no_harm(seed, tmp_path):
    rng = random.Random(seed)
    model = rng.choice(["frn_tlu", "nested_functional", "tlu_affine"])
    with h5py.File(shutil.copy(MODELS / model / "model.h5", tmp_path / "model.h5"), "r+") as file:
        file.attrs["model_config"] = change_json(file.attrs["model_config"], rng)
    is_refused(tmp_path / "model.h5")
    target = io.BytesIO()
    with (
        zipfile.ZipFile(MODELS / model / "model.keras") as old,
        zipfile.ZipFile(target, "w") as new,
    ):
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, change_json(data, rng) if member == "config.json" else data)
    (tmp_path / "model.keras").write_bytes(target.getvalue())
    is_refused(tmp_path / "model.keras")
