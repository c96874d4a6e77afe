import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND

from keras_frn import TLU, FilterResponseNormalizationTLU, cli


@pytest.fixture
def files(tmp_path, rng):
    """A small FRN model, one with BatchNormalization, and inputs for both."""

    def small(*normalization):
        return keras.Sequential(
            [
                keras.Input((8, 8, 3), name="image"),
                keras.layers.Conv2D(4, 3, use_bias=False),
                *normalization,
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(5),
            ]
        )

    frn = small(FilterResponseNormalizationTLU(tau_initializer=keras.initializers.Constant(-0.25)))
    frn.save(tmp_path / "frn.keras")
    small(keras.layers.BatchNormalization(), keras.layers.ReLU()).save(tmp_path / "bn.keras")
    np.save(tmp_path / "x.npy", rng.normal(size=(40, 8, 8, 3)).astype("float32"))
    return tmp_path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_inspect(files, capsys):
    assert run("inspect", files / "frn.keras") == 0
    printed = capsys.readouterr().out
    assert "1 FRN and TLU layers" in printed
    assert "-0.25" in printed


@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT is exported with TensorFlow")
def test_export(files, capsys):
    target = files / "m.tflite"
    options = ("--quantization", "int8", "--calibration", files / "x.npy")
    assert run("export", files / "frn.keras", target, *options) == 0
    assert target.stat().st_size > 1000
    assert "int8" in capsys.readouterr().out
    target.unlink()
    assert run("export", files / "frn.keras", target, "--quantization", "int8") == 2
    assert "calibration_data" in capsys.readouterr().err
    assert not target.exists()


def test_convert(files, capsys):
    target = files / "converted.keras"
    assert run("convert", files / "bn.keras", target, "--calibration", files / "x.npy") == 0
    assert "1 BatchNormalization" in capsys.readouterr().out
    layers = keras.models.load_model(target).layers
    assert any(isinstance(layer, TLU) for layer in layers)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    assert run("convert", files / "bn.keras", files / "converted.h5") == 2
    assert "must end in .keras" in capsys.readouterr().err
    assert len(list(files.iterdir())) == 4, "no temporary file is left"


def test_migrate_takes_the_choice_of_thresholds(tmp_path):
    old = Path(__file__).with_name("addons_models") / "uniform_tau" / "model.keras"
    ranks = []
    for number, choice in enumerate([(), ("--tau", "per_position")]):
        target = tmp_path / f"{number}.keras"
        assert run("migrate", old, target, *choice) == 0
        model = keras.models.load_model(target, compile=False)
        ranks.append({len(layer.tau.shape) for layer in model.layers if hasattr(layer, "tau")})
    assert ranks == [{1, 3}, {3}]  # one of two layers has a threshold that varies


def test_nothing_is_left_where_a_written_weight_is_another(files, capsys, monkeypatch):
    old = Path(__file__).with_name("addons_models") / "frn_default" / "model.h5"
    before = sorted(files.iterdir())
    other = keras.models.load_model(files / "bn.keras")
    monkeypatch.setattr(cli, "_load", lambda path: other)
    assert run("migrate", old, files / "new.keras") == 2
    assert "was not written as it is" in capsys.readouterr().err
    assert sorted(files.iterdir()) == before


def test_migrate_prints_the_layers_and_the_outputs_for_a_check(tmp_path, capsys):
    folder = Path(__file__).with_name("addons_models") / "frn_default"
    with np.load(folder / "io.npz") as io:
        np.save(tmp_path / "x.npy", io["x"])
        expected = io["y"]
    check = ("--check", tmp_path / "x.npy")
    assert run("migrate", folder / "model.keras", tmp_path / "new.keras", *check) == 0
    printed = capsys.readouterr().out
    assert "FilterResponseNormalization, axis=-1" in printed
    assert f"{expected.ravel()[0]:.4f}"[:5] in printed


def test_migrate_refuses_what_is_no_such_file(files, capsys):
    assert run("migrate", files / "x.npy", files / "new.keras") == 2
    assert "x.npy" in capsys.readouterr().err
    assert not (files / "new.keras").exists()


@pytest.mark.parametrize("command", ["inspect", "export", "convert", "migrate"])
def test_a_missing_file_is_an_error_without_traceback(command, tmp_path, capsys):
    outputs = {"inspect": [], "export": [tmp_path / "o.tflite"]}.get(
        command, [tmp_path / "o.keras"]
    )
    assert run(command, tmp_path / "none.keras", *outputs) == 2
    assert "none.keras" in capsys.readouterr().err


def test_the_command_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "keras_frn", "--help"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0
    for command in ("demo", "inspect", "export", "convert", "migrate"):
        assert command in result.stdout
