"""The command `keras-frn`."""

import argparse
import os
import sys


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
    demo = commands.add_parser(
        "demo", help="train, save, reload, export and compare on real digits"
    )
    demo.add_argument(
        "--output", default="keras-frn-demo", metavar="DIR", help="new or empty folder"
    )
    demo.set_defaults(run=_demo)
    inspect = commands.add_parser("inspect", help="list a model's FRN and TLU layers and weights")
    inspect.add_argument("model", help=".keras or .h5 file")
    inspect.set_defaults(run=_inspect)
    return parser


def _demo(arguments):
    from .demo import run

    run(arguments.output)


def _inspect(arguments):
    import keras

    from .layers import TLU, FilterResponseNormalization

    model = keras.models.load_model(arguments.model, compile=False)
    layers = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, (FilterResponseNormalization, TLU))
    ]
    print(f"{model.name}: {len(layers)} FRN and TLU layers, {model.count_params():,} parameters")
    for layer in layers:
        print(f"{layer.name} ({type(layer).__name__}, axis={layer.axis})")
        for weight in layer.weights:
            values = keras.ops.convert_to_numpy(weight)
            print(
                f"  {weight.name:16}{str(values.shape):16}"
                f"min {values.min():9.4g}  mean {values.mean():9.4g}  max {values.max():9.4g}"
            )
