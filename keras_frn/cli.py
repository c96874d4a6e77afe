"""The command `keras-frn`."""

import argparse
import contextlib
import dataclasses
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from . import __version__, graph
from .addons.loading import load_addons_model
from .conversion import replace_batch_normalization
from .demo import run
from .errors import ArgumentError, ArgumentWarning, format_count
from .export import export_tflite
from .export.presets import PRESETS
from .monitor import list_frn_layers, measure_layers, plot_layers
from .samples import Samples

__all__ = ["main"]

_MODEL, _NEW = "a .keras or .h5 file", "{} file to write"
_DATA = "in .npy, or .npz by the names of the model's inputs"
_QUIET = "TF_CPP_MIN_LOG_LEVEL=3 in the environment keeps most of TensorFlow's log lines away."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: The arguments of the command line. Defaults to those of the process.

    Returns:
        The exit code: 0, 1 if the reader of the output has gone, 2 after an error that was
        printed, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in arguments.shown:
            arguments.shown.add(str(message))
            print(f"keras-frn: warning: {_renamed(message, arguments.names)}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `keras-frn inspect model.keras | head -1`
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()  # else Python tries again at its end
        return 1
    except (ValueError, ImportError, OSError) as error:
        print(f"keras-frn: {_renamed(error, arguments.names)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nkeras-frn: interrupted", file=sys.stderr)
        return 130
    return 0


def _renamed(message: object, names: Mapping[str, str]) -> object:
    if isinstance(message, (ArgumentError, ArgumentWarning)):
        message.argument = names.get(message.argument, message.argument)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keras-frn", description="Filter Response Normalization for Keras 3.", epilog=_QUIET
    )
    parser.add_argument("--version", action="version", version=f"keras-frn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        function: Callable[[argparse.Namespace], object],
        name: str,
        help: str,
        names: Mapping[str, str],
        **positional: str,
    ) -> argparse.ArgumentParser:
        """Adds a subcommand; `names` is what it calls the arguments of the functions it uses."""
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=function, names=names, shown=set())
        for argument, text in positional.items():
            command.add_argument(argument, help=text)
        if "output" in positional:
            command.add_argument("--overwrite", action="store_true", help="replace a file")
        return command

    help = "train, save, reload, export and compare on real digits"
    demo = add(lambda given: run(given.output), "demo", help, {"output": "--output"})
    demo.add_argument("--output", default="keras-frn-demo", metavar="DIR", help="an empty folder")

    help = "list a model's FRN and TLU layers; with data, show dead channels and epsilons"
    inspect = add(_inspect, "inspect", help, {"calibration_data": "--data"}, model=_MODEL)
    inspect.add_argument(
        "--data", metavar="FILE", help=f"some tens of inputs like those of training, {_DATA}"
    )
    inspect.add_argument("--plot", metavar="PNG", help="draw what the data show")

    names = {
        "calibration_data": "--calibration",
        "input_signature": "--input-shape",
        "integer_io": "--integer-io",
        "quantization": "--quantization",
    }
    help = "write a LiteRT file and compare it with the model"
    export = add(_export, "export", help, names, model=_MODEL, output=_NEW.format(".tflite"))
    presets = [name for name in PRESETS if name]
    export.add_argument("--quantization", choices=presets, help="default: float32")
    export.add_argument(
        "--calibration", metavar="FILE", help=f"inputs like those at inference, {_DATA}"
    )
    export.add_argument("--integer-io", action="store_true", help="integer inputs and outputs")
    help = "a fixed size, such as 1,32,32,3, with the batch; once for each input"
    export.add_argument("--input-shape", type=_shape, action="append", metavar="N,...", help=help)

    names = {"calibration_data": "--calibration", "epsilon_ratio": "--epsilon-ratio"}
    help = "turn a trained BatchNormalization model into an FRN model"
    convert = add(_convert, "convert", help, names, model=_MODEL, output=_NEW.format(".keras"))
    convert.add_argument(
        "--calibration", metavar="FILE", help=f"some hundreds of inputs, no labels, {_DATA}"
    )
    help = "epsilon / mean square (default 3)"
    convert.add_argument("--epsilon-ratio", type=float, default=3.0, metavar="R", help=help)

    migrate = add(
        _migrate,
        "migrate",
        "open a model that TensorFlow Addons saved and write it for Keras 3",
        {"path": "model", "weights": "--weights", "tau": "--tau", "calibration_data": "--check"},
        model=".h5, .keras, SavedModel folder, .zip of one, or .json config",
        output=_NEW.format(".keras"),
    )
    migrate.add_argument("--weights", metavar="FILE", help="weights or checkpoint for a config")
    migrate.add_argument(
        "--tau",
        default="auto",
        choices=["auto", "per_channel", "per_position", "per_channel_mean"],
        help="how to keep thresholds stored per position (default auto)",
    )
    migrate.add_argument("--check", metavar="FILE", help="print the outputs for these inputs")
    return parser


def _shape(text: str) -> tuple[int | None, ...]:
    try:
        sizes = tuple(None if size in ("", "None") else int(size) for size in text.split(","))
        if not all(size is None or size > 0 for size in sizes):
            raise ValueError
        return sizes
    except ValueError:
        rule = "must be sizes of 1 or more, or None, with commas between, such as 1,32,32,3"
        raise argparse.ArgumentTypeError(f"{rule}. Received: {text}") from None


def _inspect(arguments: argparse.Namespace) -> None:
    plot = arguments.plot and _target(arguments.plot, ".png", overwrite=True, argument="--plot")
    if plot and not arguments.data:
        raise ArgumentError("--plot", "must have data to draw. Received: no `--data`. Pass it.")
    model = _load(arguments.model)
    data = _read_data(arguments.data, "--data", model)
    if data is None:
        _print_layers(model)
        return
    if not list_frn_layers(model):
        found = f"Received: {arguments.model}, which has none."
        raise ArgumentError("model", f"must have FRN or TLU layers to show with `--data`. {found}")
    rows = measure_layers(model, Samples(model, data))
    _print_layers(model)
    width = max(len(row["layer"]) for row in rows)
    columns = ("at_tau", "dead", "epsilon_ratio", "spread")
    print(f"\n{'':{width}}", *(f"{name:>13}" for name in columns))
    for row in rows:
        values = (format(row[key], ".3g") if key in row else "" for key in columns)
        print(f"{row['layer']:{width}}", *(f"{value:>13}" for value in values))
    if plot:
        plot_layers(rows, plot)
        print(f"wrote {plot}")


def _print_layers(model: keras.Model) -> None:
    layers = list_frn_layers(model)
    found = format_count(len(layers), "FRN or TLU layer")
    print(f"{model.name}: {found}, {model.count_params():,} parameters")
    if count := _count_batch_normalizations(model):
        found = format_count(count, "BatchNormalization layer")
        print(f"{found}, which `keras-frn convert` turns into FRN")
    for layer in layers:
        print(f"{layer.name} ({type(layer).__name__}, axis={layer.axis})")
        for weight in layer.weights:
            values = keras.ops.convert_to_numpy(weight)
            print(
                f"  {weight.name:16}{values.shape!s:16}"
                f"min {values.min():9.4g}  mean {values.mean():9.4g}  max {values.max():9.4g}"
            )


def _count_batch_normalizations(model: keras.Model) -> int:
    layers = graph.list_layers(model)
    return sum(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)


def _export(arguments: argparse.Namespace) -> None:
    shapes = arguments.input_shape
    output = _target(arguments.output, ".tflite", arguments.overwrite)
    model = _load(arguments.model)
    report = export_tflite(
        model,
        output,
        quantization=arguments.quantization,
        calibration_data=_read_data(arguments.calibration, "--calibration", model),
        integer_io=arguments.integer_io,
        verbose=True,
        input_signature=shapes and [keras.InputSpec(shape=shape) for shape in shapes],
    )
    others = tuple(text for text in report.warnings if text not in arguments.shown)
    print(dataclasses.replace(report, warnings=others))


def _convert(arguments: argparse.Namespace) -> None:
    output = _target(arguments.output, ".keras", arguments.overwrite)
    model = _load(arguments.model)
    data = _read_data(arguments.calibration, "--calibration", model)
    if not _count_batch_normalizations(model):
        problem = f"Received: {arguments.model}, which has none. Nothing was written."
        raise ArgumentError("model", f"must have BatchNormalization layers. {problem}")
    if data is None:
        missing = "was not given, so the result computes less of what the model did. Pass inputs."
        warnings.warn(ArgumentWarning("--calibration", missing), stacklevel=2)
    model, report = replace_batch_normalization(
        model,
        calibration_data=data,
        epsilon_ratio=arguments.epsilon_ratio,
        verbose=True,
        return_report=True,
    )
    print(report)
    _write(model, output)


def _migrate(arguments: argparse.Namespace) -> None:
    output = _target(arguments.output, ".keras", arguments.overwrite)
    for name, argument in ((arguments.model, "model"), (arguments.weights, "--weights")):
        if name and not Path(f"{name}.index").exists():  # as a checkpoint has
            _existing(name, argument)
    if arguments.check:
        _existing(arguments.check, "--check")
    model = load_addons_model(arguments.model, weights=arguments.weights, tau=arguments.tau)
    inputs = _read_data(arguments.check, "--check", model)
    Samples(model, inputs)  # says what does not fit
    _print_layers(model)
    if inputs is not None:
        print(model.predict(inputs, verbose=0))
    _write(model, output)


def _write(model: keras.Model, output: Path) -> None:
    """Writes a model, which appears when it has been read again and its weights are the same."""
    temporary = output.with_name(f".{output.stem}.{os.getpid()}.keras")
    try:
        model.save(temporary)
        written = keras.models.load_model(temporary, compile=False).get_weights()
        for weight, value in zip(model.get_weights(), written, strict=True):
            if not np.array_equal(weight, value, equal_nan=True):
                raise ValueError(f"{output}: a saved weight differs. The file was removed.")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {output}, {output.stat().st_size:,} bytes")


def _target(path: str, suffix: str, overwrite: bool, argument: str = "output") -> Path:
    """The path of a file to write, before the work begins."""
    target = Path(path)
    if target.suffix != suffix:
        problem, remedy = f"must end in {suffix}", f"Call it {target.with_suffix(suffix)}"
    elif not target.parent.is_dir():
        problem, remedy = "must be in a folder that exists", f"Make {target.parent}"
    elif target.exists() and not overwrite:
        problem, remedy = "must be a new file", "Choose another name, or pass --overwrite"
    else:
        return target
    raise ArgumentError(argument, f"{problem}. Received: {target}. {remedy}.")


def _load(name: str) -> keras.Model:
    path = _existing(name, "model")
    config = None if path.is_dir() else _read_config(path)
    if config is None:
        rule, which = "must be a .keras or .h5 file", "which is not one"
        remedy = "Write it with `model.save`; `keras-frn migrate` opens what TensorFlow Addons left"
    elif not config:
        rule, which = "must hold a whole model", "which has weights alone"
        remedy = "Load them into a model in Python, and write that with `model.save`"
    elif "Addons>" in config:
        rule, which = "must be a file of Keras 3", "which TensorFlow Addons saved"
        remedy = f"Turn it into one: keras-frn migrate {path} new.keras"
    else:
        try:
            return keras.models.load_model(path, compile=False)
        except (TypeError, ValueError, KeyError, zipfile.BadZipFile) as error:
            rule = "must be a model that Keras can load without other code"
            # Keras' reason comes last; the advice and the config of the layer follow it.
            which = str(error).rpartition("Exception encountered: ")[2].partition(". ")[0]
            remedy = "A program that registers your own classes opens it"
            if "Lambda" in which:
                remedy = (
                    "If you trust it, open it in Python with `safe_mode=False`, and go on there"
                )
    raise ArgumentError("model", f"{rule}. Received: {path}, {which}. {remedy}.")


def _read_config(path: Path) -> str | None:
    """The config in a file: empty if there is none, None if the file is of another kind."""
    with path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            # Keras goes by the name of the file.
            is_model = path.suffix == ".keras" and "config.json" in archive.namelist()
            return archive.read("config.json").decode() if is_model else None
    if path.suffix not in (".h5", ".hdf5") or not h5py.is_hdf5(path):
        return None
    with h5py.File(path) as file:
        return str(file.attrs.get("model_config", ""))


def _read_data(name: str | None, option: str, model: keras.Model) -> Any:
    """The array in a .npy file, read as it is used, or those of an .npz file; never a pickle."""
    if name is None:
        return None
    path = _existing(name, option)
    inputs = [tensor.name for tensor in model.inputs] if graph.is_graph(model) else []
    rule, remedy = "must be a .npy file of numbers", "Write one array with `numpy.save`."
    if len(inputs) > 1:
        rule = f"must be an .npz file of numbers with the arrays {', '.join(inputs)}"
        remedy = "Write it with `numpy.savez`."
    found = "which is a folder" if path.is_dir() else "which is not one"
    try:
        loaded = None if path.is_dir() else np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
        if all(isinstance(a, np.ndarray) and a.dtype.kind in "biuf" for a in arrays.values()):
            if len(arrays) == 1 and len(inputs) < 2:
                return next(iter(arrays.values()))
            if arrays.keys() == set(inputs):
                return arrays
            found = f"which has {', '.join(arrays)}" if len(arrays) > 1 else "which has one array"
        elif isinstance(loaded, np.ndarray):
            found = f"an array of {loaded.dtype}"
    except (ValueError, EOFError, zipfile.BadZipFile):
        pass  # what is in it cannot be said
    raise ArgumentError(option, f"{rule}. Received: {path}, {found}. {remedy}")


def _existing(name: str, argument: str) -> Path:
    if not Path(name).exists():
        found = f"Received: {name}, which does not exist."
        raise ArgumentError(argument, f"must be a file. {found}")
    return Path(name)
