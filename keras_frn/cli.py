"""The command `keras-frn`."""

import argparse
import os
import sys
from pathlib import Path


def main(argv=None):
    """Runs a subcommand; returns 0, or 2 after an error of the user's that it has printed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"keras-frn: {error}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-frn", description="Filter Response Normalization for Keras 3."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function, name, help, **positional):
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=function)
        for argument, text in positional.items():
            command.add_argument(argument, help=text)
        return command

    demo = add(_demo, "demo", "train, save, reload, export and compare on real digits")
    demo.add_argument("--output", default="keras-frn-demo", metavar="DIR", help="an empty folder")
    add(_inspect, "inspect", "list a model's FRN and TLU layers and weights", model=".keras or .h5")

    help = "write a LiteRT file and compare it with the model"
    export = add(_export, "export", help, model=".keras or .h5", output=".tflite to write")
    presets = ["float16", "dynamic", "int8", "int8_float_statistics", "int16x8"]
    export.add_argument("--quantization", choices=presets, help="default: float32")
    export.add_argument("--calibration", metavar="NPY", help="inputs like those at inference")
    export.add_argument("--integer-io", action="store_true", help="integer inputs and outputs")

    help = "turn a trained BatchNormalization model into an FRN model"
    convert = add(_convert, "convert", help, model=".keras or .h5", output=".keras to write")
    convert.add_argument("--calibration", metavar="NPY", help="inputs, some hundreds, no labels")
    convert.add_argument(
        "--epsilon-ratio", type=float, default=3.0, help="epsilon / mean square (default 3)"
    )

    migrate = add(
        _migrate,
        "migrate",
        "open a model that TensorFlow Addons saved and write it for Keras 3",
        model=".h5, .keras, SavedModel folder, .zip of one, or .json config",
        output=".keras to write",
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


def _demo(arguments):
    from .demo import run

    run(arguments.output)


def _inspect(arguments):
    _print_layers(_load(arguments.model))


def _print_layers(model):
    import keras

    from . import graph
    from .layers import TLU, FilterResponseNormalization

    kinds = (FilterResponseNormalization, TLU)
    layers = [layer for layer in graph.layers(model) if isinstance(layer, kinds)]
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
    from .export import export_tflite

    report = export_tflite(
        _load(arguments.model),
        arguments.output,
        quantization=arguments.quantization,
        calibration_data=_array(arguments.calibration),
        integer_io=arguments.integer_io,
        verbose=True,
    )
    print(report)


def _convert(arguments):
    from .conversion import replace_batch_normalization

    output = _new_keras_file(arguments.output)
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

    output, inputs = _new_keras_file(arguments.output), _array(arguments.check)
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
    print(f"wrote {output}")


def _new_keras_file(path):
    if not path.endswith(".keras"):
        raise ValueError(
            f"`output` must end in .keras. Received: output={path!r}. Call it frn.keras."
        )
    return Path(path)


def _load(path):
    import keras

    return keras.models.load_model(path, compile=False)


def _array(path):
    """The array in a .npy file, read as it is used; never a pickle."""
    import numpy as np

    return None if path is None else np.load(path, mmap_mode="r", allow_pickle=False)
