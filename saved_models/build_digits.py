"""Trains the demo's network on scikit-learn's digits and writes it in every format to `digits/`.

    python saved_models/build_digits.py

It takes about a minute on one CPU core.
"""

import argparse
from pathlib import Path

import keras
from formats import write

from keras_frn import demo

CARD = {
    "task": "handwritten digits, 10 classes; input (8, 8, 1) in [0, 1], output logits",
    "network": "three 3x3 convolutions, each with FilterResponseNormalizationTLU",
    "data": "scikit-learn load_digits, 1,797 images, every fifth one held out for the accuracies; "
    "300 of the others for calibration",
}


def train():
    """Returns the trained model, without its optimizer."""
    x, y, _, _ = demo.digits()
    keras.utils.set_random_seed(0)
    trained, model = demo.build_model(), demo.build_model()
    demo.train(trained, x, y, verbose=2)
    model.set_weights(trained.get_weights())
    return model


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="a .keras file to write again instead of training")
    arguments = parser.parse_args()
    if arguments.weights:
        model = keras.saving.load_model(arguments.weights, compile=False)
    else:
        model = train()
    x, _, *test = demo.digits()
    write(model, Path(__file__).parent / "digits", x[:300], *test, 16, CARD)


if __name__ == "__main__":
    main()
