import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND

from keras_frn import TLU, FilterResponseNormalizationTLU, cli

pytestmark = pytest.mark.once
ADDONS = Path(__file__).with_name("addons_models")


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
    np.save(tmp_path / "x.npy", rng.normal(size=(64, 8, 8, 3)).astype("float32"))
    return tmp_path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.each_backend
def test_inspect_prints_a_table(files, capsys):
    assert run("inspect", files / "frn.keras") == 0
    printed = capsys.readouterr().out
    assert "1 FRN or TLU layer," in printed
    assert "-0.25" in printed


@pytest.mark.each_backend
def test_inspect_with_data_prints_statistics(files, capsys):
    pytest.importorskip("matplotlib", reason="of the [demo] extra")
    options = ("--data", files / "x.npy", "--plot", files / "layers.png")
    assert run("inspect", files / "frn.keras", *options) == 0
    printed = capsys.readouterr().out
    assert "spread" in printed
    assert "layers.png" in printed
    assert (files / "layers.png").stat().st_size > 5_000


@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT is exported with TensorFlow")
def test_export_writes_a_file_and_prints_the_report(files, capsys):
    target = files / "m.tflite"
    options = ("--quantization", "int8", "--calibration", files / "x.npy")
    assert run("export", files / "frn.keras", target, *options) == 0
    assert target.stat().st_size > 1000
    assert "int8" in capsys.readouterr().out
    target.unlink()
    assert run("export", files / "frn.keras", target, "--input-shape", "1,8,8,3") == 0
    from keras_frn.export.runtime import LiteRT

    (details,) = LiteRT(target).interpreter.get_input_details()
    assert details["shape_signature"].tolist() == [1, 8, 8, 3]
    target.unlink()
    assert run("export", files / "frn.keras", target, "--input-shape", "1,9,8,3") == 2
    assert "`--input-shape` must fit" in capsys.readouterr().err
    assert run("export", files / "frn.keras", target, "--quantization", "int8") == 2
    assert "`--calibration` must be given with the preset 'int8'" in capsys.readouterr().err
    assert run("export", files / "frn.keras", target, "--integer-io") == 2
    assert "`--integer-io` must be False unless" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.each_backend
def test_convert_writes_a_model(files, capsys):
    target = files / "converted.keras"
    assert run("convert", files / "bn.keras", target, "--calibration", files / "x.npy") == 0
    assert "1 BatchNormalization" in capsys.readouterr().out
    layers = keras.models.load_model(target).layers
    assert any(isinstance(layer, TLU) for layer in layers)
    assert not any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    assert run("convert", files / "bn.keras", files / "converted.h5") == 2
    assert "must end in .keras" in capsys.readouterr().err
    assert len(list(files.iterdir())) == 4, "no temporary file is left"


def test_migrate_option_tau(tmp_path):
    old = ADDONS / "uniform_tau" / "model.keras"
    ranks = []
    for number, choice in enumerate([(), ("--tau", "per_position")]):
        target = tmp_path / f"{number}.keras"
        assert run("migrate", old, target, *choice) == 0
        model = keras.models.load_model(target, compile=False)
        ranks.append({len(layer.tau.shape) for layer in model.layers if hasattr(layer, "tau")})
    assert ranks == [{1, 3}, {3}]  # one of two layers has a threshold that varies


def test_failed_check_leaves_no_output_file(files, capsys, monkeypatch):
    old = ADDONS / "frn_default" / "model.h5"
    before = sorted(files.iterdir())
    other = keras.models.load_model(files / "bn.keras")
    monkeypatch.setattr(keras.models, "load_model", lambda *_, **__: other)
    assert run("migrate", old, files / "new.keras") == 2
    assert "a saved weight differs" in capsys.readouterr().err
    assert sorted(files.iterdir()) == before


@pytest.mark.each_backend
def test_migrate_prints_layers_and_outputs(tmp_path, capsys):
    folder = ADDONS / "frn_default"
    with np.load(folder / "io.npz") as io:
        np.save(tmp_path / "x.npy", io["x"])
        expected = io["y"]
    check = ("--check", tmp_path / "x.npy")
    assert run("migrate", folder / "model.keras", tmp_path / "new.keras", *check) == 0
    printed = capsys.readouterr().out
    assert "FilterResponseNormalization, axis=-1" in printed
    assert f"{expected.ravel()[0]:.4f}"[:5] in printed


def test_migrate_refuses_other_files(files, capsys):
    assert run("migrate", files / "x.npy", files / "new.keras") == 2
    assert "x.npy" in capsys.readouterr().err
    assert not (files / "new.keras").exists()


def test_migrate_errors_name_its_own_options(tmp_path, capsys):
    old = ADDONS / "uniform_tau" / "model.keras"
    assert run("migrate", old, tmp_path / "new.keras", "--tau", "per_channel") == 2
    assert "`--tau` must be 'per_channel_mean' for " in capsys.readouterr().err
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    with pytest.raises(SystemExit):
        run("migrate", old, tmp_path / "new.keras", "--tau", "per_chanel")
    assert run("migrate", old, tmp_path / "new.keras", "--check", tmp_path / "x.npy") == 2
    printed = capsys.readouterr()
    assert "`--check` must have the shape" in printed.err
    assert not printed.out
    assert not (tmp_path / "new.keras").exists()


def test_output_path_is_checked_first(files, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_load", None)
    for command, suffix in (("export", ".tflite"), ("convert", ".keras"), ("migrate", ".keras")):
        old = files / f"old{suffix}"
        old.write_text("old")
        assert run(command, files / "bn.keras", old) == 2
        assert "must be a new file" in capsys.readouterr().err
        assert old.read_text() == "old"
        assert run(command, files / "bn.keras", files / "none" / f"new{suffix}") == 2
        assert f"Make {files / 'none'}" in capsys.readouterr().err
        assert run(command, files / "bn.keras", files / "new.h5") == 2
        assert f"must end in {suffix}" in capsys.readouterr().err


@pytest.mark.each_backend
def test_existing_output_needs_overwrite(files):
    target = files / "old.keras"
    target.write_text("old")
    assert (
        run("convert", files / "bn.keras", target, "--calibration", files / "x.npy", "--overwrite")
        == 0
    )
    assert keras.models.load_model(target).count_params() > 0


def test_file_of_the_wrong_kind_is_named(files, capsys):
    np.savez(files / "x.npz", images=np.zeros(3), labels=np.zeros(3))
    np.save(files / "text.npy", np.array(["a"]))
    np.save(files / "complex.npy", np.zeros((9, 8, 8, 3), "complex64"))
    (files / "images").mkdir()
    (files / "empty.npy").write_bytes(b"")
    (files / "x.txt").write_text("1 2 3")
    np.save(files / "objects.npy", np.array([{}]), allow_pickle=True)
    messages = {
        "x.npz": "must be a .npy file of numbers. Received: {}, which has images, labels.",
        "text.npy": "an array of <U1",
        "complex.npy": "an array of complex64",
        "images": "which is a folder",
        "empty.npy": "must be a .npy file of numbers",
        "x.txt": "must be a .npy file of numbers",
        "objects.npy": "must be a .npy file of numbers",
        "none.npy": "none.npy",
    }
    for name, message in messages.items():
        options = ("--calibration", files / name)
        assert run("convert", files / "bn.keras", files / "new.keras", *options) == 2
        assert message.format(files / name) in (printed := capsys.readouterr().err)
        assert "pickle" not in printed
    (files / "text.keras").write_text("not a zip file")
    (files / "folder.keras").mkdir()
    shutil.copy(files / "frn.keras", files / "frn.zip")
    keras.models.load_model(files / "frn.keras").save(files / "frn.h5")
    shutil.copy(files / "frn.h5", files / "of_hdf5.keras")
    for name in ("text.keras", "x.npz", "folder.keras", "frn.zip", "of_hdf5.keras"):
        assert run("inspect", files / name) == 2
        assert "`model` must be a .keras or .h5 file" in capsys.readouterr().err


@pytest.mark.each_backend
def test_data_of_several_inputs_are_arrays_of_their_names(files, capsys, rng):
    image, meta = keras.Input((8, 8, 3), name="image"), keras.Input((4,), name="a_meta")
    x = FilterResponseNormalizationTLU()(keras.layers.Conv2D(4, 3)(image))
    x = keras.layers.Concatenate()([keras.layers.GlobalAveragePooling2D()(x), meta])
    keras.Model([image, meta], keras.layers.Dense(2)(x)).save(files / "two.keras")
    images = np.load(files / "x.npy")
    np.savez(files / "two.npz", image=images, a_meta=rng.normal(size=(64, 4)))
    np.savez(files / "one.npz", images=images)
    assert run("inspect", files / "two.keras", "--data", files / "two.npz") == 0
    assert "spread" in capsys.readouterr().out
    assert run("inspect", files / "frn.keras", "--data", files / "one.npz") == 0
    for name, found in (("x.npy", "has one array"), ("one.npz", "has one array")):
        assert run("inspect", files / "two.keras", "--data", files / name) == 2
        rule = "`--data` must be an .npz file of numbers with the arrays image, a_meta"
        assert f"{rule}. Received: {files / name}, which {found}" in capsys.readouterr().err


def test_migrate_says_which_of_its_two_files_is_wrong(tmp_path, capsys):
    json, target = ADDONS / "frn_tlu" / "model.json", tmp_path / "new.keras"
    messages = {
        tmp_path / "none.h5": "must be a file",
        ADDONS / "tlu_dense" / "model.h5": "must hold the weights of the model",
        json: "must hold weights",
    }
    for path, message in messages.items():
        assert run("migrate", json, target, "--weights", path) == 2
        assert f"`--weights` {message}. Received: " in capsys.readouterr().err
    assert run("migrate", ADDONS / "frn_tlu" / "ckpt" / "ckpt", target) == 2
    assert "which has no config" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["inspect", "export", "convert", "migrate"])
def test_missing_file_prints_an_error_without_traceback(command, tmp_path, capsys):
    outputs = {"inspect": [], "export": [tmp_path / "o.tflite"]}.get(
        command, [tmp_path / "o.keras"]
    )
    assert run(command, tmp_path / "none.keras", *outputs) == 2
    assert "none.keras" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    printed = capsys.readouterr().out
    for command in ("demo", "inspect", "export", "convert", "migrate"):
        assert command in printed


@keras.saving.register_keras_serializable(package="test_cli")
class Own(keras.layers.Layer):
    pass


def test_unregistered_class_prints_a_one_sentence_error(tmp_path, capsys):
    keras.Sequential([keras.Input((3,)), Own()]).save(tmp_path / "own.keras")
    keras.saving.get_custom_objects().pop("test_cli>Own")
    assert run("inspect", tmp_path / "own.keras") == 2
    assert "Could not locate class 'Own'. A program that registers" in capsys.readouterr().err


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--version")
    assert capsys.readouterr().out.startswith("keras-frn 0.1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frn.keras", "--data", "wrong.npy"], "`--data` must have the shape"),
        (["frn.keras", "--data", "none.npy"], "`--data` must be a file. Received: none.npy"),
        (["frn.keras", "--plot", "a.png"], "`--plot` must have data"),
        (["bn.keras", "--data", "x.npy"], "`model` must have FRN or TLU layers"),
        (["junk.h5"], "`model` must be a .keras or .h5 file"),
        (["weights.weights.h5"], "which has weights alone"),
        (["cut.keras"], "`model` must be a"),
        ([ADDONS / "frn_tlu" / "model.h5"], "keras-frn migrate"),
        ([ADDONS / "frn_tlu" / "model.keras"], "keras-frn migrate"),
    ],
)
def test_inspect_errors(files, capsys, monkeypatch, arguments, message):
    np.save(files / "wrong.npy", np.zeros((3, 9, 9, 3), "float32"))
    (files / "junk.h5").write_text("junk")
    (files / "cut.keras").write_bytes((files / "frn.keras").read_bytes()[:-500])
    keras.models.load_model(files / "frn.keras").save_weights(files / "weights.weights.h5")
    monkeypatch.chdir(files)
    assert run("inspect", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out, "what is wrong is said before anything else"


def test_inspect_and_convert_refer_to_each_other(files, capsys):
    assert run("inspect", files / "bn.keras") == 0
    assert "1 BatchNormalization layer, which `keras-frn convert`" in capsys.readouterr().out
    assert run("convert", files / "frn.keras", files / "new.keras") == 2
    assert "`model` must have BatchNormalization layers" in capsys.readouterr().err
    assert not (files / "new.keras").exists()


@pytest.mark.filterwarnings("default::UserWarning")
def test_warning_is_printed_once_and_names_the_option(files, capsys):
    np.save(files / "ones.npy", np.ones((4, 8, 8, 3), "float32"))
    assert run("inspect", files / "frn.keras", "--data", files / "ones.npy") == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("keras-frn: warning: `--data` hardly varies")
    assert run("convert", files / "bn.keras", files / "new.keras") == 0
    assert "warning: `--calibration` was not given" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="LiteRT is exported with TensorFlow")
def test_export_warning_is_not_repeated_in_the_report(files, capsys):
    np.save(files / "few.npy", np.load(files / "x.npy")[:4])
    options = ("--quantization", "int8", "--calibration", files / "few.npy")
    assert run("export", files / "frn.keras", files / "m.tflite", *options) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("4 different samples") == 1
    assert "`--calibration` has 4 different samples" in printed.err


def test_shape_option_refuses_a_size_that_is_not_a_number(files, capsys):
    for shape in ("1,8,x", "0,8,8,3"):
        with pytest.raises(SystemExit):
            run("export", files / "frn.keras", files / "m.tflite", "--input-shape", shape)
        assert "--input-shape: must be sizes of 1 or more" in capsys.readouterr().err


def test_messages_at_process_exit_are_visible():
    """Also those of a crash: nothing redirects the file descriptor."""
    code = "import atexit, os, sys; atexit.register(os.write, 2, b'dead'); "
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    module, _, name = config["options.entry_points"]["console_scripts"].split()[-1].partition(":")
    code += f"from {module} import {name}; sys.exit({name}())"
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-c", code, "inspect", "none.keras"]
    result = subprocess.run(command, env=environment, capture_output=True)
    assert result.returncode == 2
    assert b"`model` must be a file" in result.stderr
    assert b"dead" in result.stderr


def test_closed_pipe_is_not_an_error(files, capsys, monkeypatch):
    """Neither while the command prints nor when Python flushes its buffer at the end."""
    read, write = os.pipe()
    os.close(read)
    for buffering in (1, -1):
        with open(os.dup(write), "w", buffering=buffering) as pipe, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", pipe)
            assert run("inspect", files / "frn.keras") == 1
    os.close(write)
    assert "keras-frn" not in capsys.readouterr().err


def test_control_c_ends_the_command_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn", reason="of the [demo] extra")

    def interrupt(*args, **kwargs):
        # Not a signal, at which TensorFlow crashes while its C++ calls Python.
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "fit", interrupt)
    assert run("demo", "--output", tmp_path / "demo") == 130
    assert "keras-frn: interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
