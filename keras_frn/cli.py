"""The command `keras-frn`."""

import argparse
import os
import re
import sys
import zipfile
from pathlib import Path

from . import __version__
from .export.quantization import PRESETS

_MODEL, _NEW = "a .keras or .h5 file", "{} file to write"
# How the command line names what the functions' errors name in Python.
_WORDS = {
    r"`calibration_data`": "`--calibration`",
    r"`epsilon_ratio`": "`--epsilon-ratio`",
    r"\btau='(\w+)'": r"--tau \1",
    r"\binteger_io=True": "--integer-io",
    r"`input_signature`": "`--input-shape`",
    r"\bquantization='(\w+)'": r"--quantization \1",
}


def main(argv=None):
    """Runs a subcommand; returns 0, or 2 after an error of the user's that it has printed."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, ImportError, OSError) as error:
        message = str(error)
        if arguments.run is _inspect:
            message = message.replace("`calibration_data`", "`--data`")
        for pattern, word in _WORDS.items():
            message = re.sub(pattern, word, message)
        print(f"keras-frn: {message}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-frn", description="Filter Response Normalization for Keras 3."
    )
    parser.add_argument("--version", action="version", version=f"keras-frn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function, name, help, **positional):
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=function)
        for argument, text in positional.items():
            command.add_argument(argument, help=text)
        if "output" in positional:
            command.add_argument("--overwrite", action="store_true", help="replace a file")
        return command

    demo = add(_demo, "demo", "train, save, reload, export and compare on real digits")
    demo.add_argument("--output", default="keras-frn-demo", metavar="DIR", help="an empty folder")

    help = "list a model's FRN and TLU layers; with data, show whether they are well"
    inspect = add(_inspect, "inspect", help, model=_MODEL)
    inspect.add_argument("--data", metavar="NPY", help="inputs like those of training, some tens")
    inspect.add_argument("--plot", metavar="PNG", help="draw what the data show")

    help = "write a LiteRT file and compare it with the model"
    export = add(_export, "export", help, model=_MODEL, output=_NEW.format(".tflite"))
    presets = [name for name in PRESETS if name]
    export.add_argument("--quantization", choices=presets, help="default: float32")
    export.add_argument("--calibration", metavar="NPY", help="inputs like those at inference")
    export.add_argument("--integer-io", action="store_true", help="integer inputs and outputs")
    help = "a fixed size, such as 1,32,32,3, with the batch; once for each input"
    export.add_argument("--input-shape", type=_shape, action="append", metavar="N,...", help=help)

    help = "turn a trained BatchNormalization model into an FRN model"
    convert = add(_convert, "convert", help, model=_MODEL, output=_NEW.format(".keras"))
    convert.add_argument("--calibration", metavar="NPY", help="inputs, some hundreds, no labels")
    convert.add_argument(
        "--epsilon-ratio", type=float, default=3.0, help="epsilon / mean square (default 3)"
    )

    migrate = add(
        _migrate,
        "migrate",
        "open a model that TensorFlow Addons saved and write it for Keras 3",
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
    migrate.add_argument("--check", metavar="NPY", help="print the outputs for these inputs")
    return parser


def _shape(text):
    return tuple(None if size in ("", "None") else int(size) for size in text.split(","))


def _demo(arguments):
    from .demo import run

    run(arguments.output)


def _inspect(arguments):
    plot = arguments.plot and _target(arguments.plot, ".png", True, "--plot")
    model, data = _load(arguments.model), _array(arguments.data)
    _print_layers(model)
    if data is None:
        if plot:
            raise ValueError("`--plot` must have data to draw. Received: no `--data`. Pass it.")
        return
    from .callbacks import health, plot_health
    from .samples import Samples

    rows, keys = health(model, Samples(model, data)), ("at_tau", "dead", "epsilon_ratio", "spread")
    width = max(len(row["layer"]) for row in rows) if rows else 0
    print(f"\n{'':{width}}  at tau    dead  eps/nu2   spread of nu2")
    for row in rows:
        values = [format(row[key], ".3g") if key in row else "" for key in keys]
        print("{:{}}  {:>6}  {:>6}  {:>7}  {:>14}".format(row["layer"], width, *values))
    if plot:
        plot_health(rows, plot)
        print(f"wrote {plot}")


def _print_layers(model):
    import keras

    from .callbacks import frn_layers

    layers = frn_layers(model)
    print(f"{model.name}: {len(layers)} FRN and TLU layers, {model.count_params():,} parameters")
    for layer in layers:
        print(f"{layer.name} ({type(layer).__name__}, axis={layer.axis})")
        for weight in layer.weights:
            values = keras.ops.convert_to_numpy(weight)
            print(
                f"  {weight.name:16}{values.shape!s:16}"
                f"min {values.min():9.4g}  mean {values.mean():9.4g}  max {values.max():9.4g}"
            )


def _export(arguments):
    import keras

    from .export import export_tflite

    shapes = arguments.input_shape
    signature = shapes and [keras.InputSpec(shape=shape) for shape in shapes]
    output = _target(arguments.output, ".tflite", arguments.overwrite)
    report = export_tflite(
        _load(arguments.model),
        output,
        quantization=arguments.quantization,
        calibration_data=_array(arguments.calibration),
        integer_io=arguments.integer_io,
        verbose=True,
        input_signature=signature,
    )
    print(report)


def _convert(arguments):
    from .conversion import replace_batch_normalization

    output = _target(arguments.output, ".keras", arguments.overwrite)
    model, report = replace_batch_normalization(
        _load(arguments.model),
        _array(arguments.calibration),
        epsilon_ratio=arguments.epsilon_ratio,
        verbose=True,
        return_report=True,
    )
    print(report)
    _write(model, output)


def _migrate(arguments):
    from .addons.loading import load_addons_model

    output = _target(arguments.output, ".keras", arguments.overwrite)
    inputs = _array(arguments.check)
    model = load_addons_model(arguments.model, arguments.weights, arguments.tau)
    _print_layers(model)
    if inputs is not None:
        print(model.predict(inputs, verbose=0))
    _write(model, output)


def _write(model, output):
    """Writes a model, which appears when it has been read again and its weights are the same."""
    import numpy as np

    temporary = output.with_name(f".{output.stem}.{os.getpid()}.keras")
    try:
        model.save(temporary)
        written = _load(temporary).get_weights()
        for weight, value in zip(model.get_weights(), written, strict=True):
            if not np.array_equal(weight, value, equal_nan=True):
                raise ValueError(f"{output}: a weight was not written as it is. Nothing is left.")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {output}, {output.stat().st_size:,} bytes")


def _target(path, suffix, overwrite, name="output"):
    """The path of a file to write, before the work begins."""
    path = Path(path)
    if path.suffix != suffix:
        problem, remedy = f"must end in {suffix}", f"Call it {path.with_suffix(suffix)}"
    elif not path.parent.is_dir():
        problem, remedy = "must be in a folder that exists", f"Make {path.parent}"
    elif path.exists() and not overwrite:
        problem, remedy = "must be a new file", "Choose another name, or pass --overwrite"
    else:
        return path
    raise ValueError(f"`{name}` {problem}. Received: {path}. {remedy}.")


def _load(path):
    import keras

    path = Path(path)
    if not path.exists():
        raise ValueError(f"`model` must be a file. Received: {path}, which does not exist.")
    if (
        path.is_dir()
        or path.suffix not in (".keras", ".h5")
        or (path.suffix == ".keras" and not zipfile.is_zipfile(path))
    ):
        raise ValueError(
            f"`model` must be a .keras or .h5 file. Received: {path}, which is none. Write it with "
            "`model.save`; files of TensorFlow Addons go through `keras-frn migrate`."
        )
    try:
        return keras.models.load_model(path, compile=False)
    except TypeError as error:
        raise ValueError(
            f"`model` must have layers of Keras and of this package. Received: {path}: {error} "
            "Open it in a program that registers its classes; files of TensorFlow Addons go "
            "through `keras-frn migrate`."
        ) from error


def _array(path):
    """The array in a .npy file, read as it is used; never a pickle."""
    import numpy as np

    if path is None:
        return None
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        names = ", ".join(array.files)
        raise ValueError(f"{path} is an .npz file of {names}. Write one array with `numpy.save`.")
    return array
