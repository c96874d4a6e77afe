"""Trains a small ResNet on Fashion-MNIST and writes it in every format to `fashion_mnist_resnet/`.

    python saved_models/build_fashion_mnist_resnet.py

It reads the four files of Fashion-MNIST from `--data`, by default where the Debian package
`dataset-fashion-mnist` puts them, and takes about 8 minutes on one CPU core.
"""

import argparse
import gzip
import pathlib

import keras
import numpy as np
from formats import write
from keras import layers

import keras_frn

NAME = "fashion_mnist_resnet"
CARD = {
    "task": "Fashion-MNIST, 10 classes; input (28, 28, 1) in [0, 1], output logits",
    "network": "a residual network of six 3x3 convolutions behind a stem, with "
    "FilterResponseNormalizationTLU",
    "data": "Fashion-MNIST by Zalando Research, MIT licence; 60,000 images for training, the first "
    "300 of them for calibration, 10,000 for the accuracies",
}


def fashion_mnist(folder):
    """Returns ((images, labels), (images, labels)) for training and test, images in [0, 1]."""

    def read(name, offset):
        with gzip.open(pathlib.Path(folder, name)) as file:
            return np.frombuffer(file.read(), "uint8", offset=offset)

    def part(name):
        images = read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
        return images.astype("float32") / 255, read(f"{name}-labels-idx1-ubyte.gz", 8)

    return part("train"), part("t10k")


def resnet(widths=(16, 32, 64)):
    """Six convolutions in three residual blocks behind a stem: 77,802 weights."""

    def convolution(x, filters, strides=1, size=3):
        return layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)

    inputs = keras.Input((28, 28, 1), name="image")
    x = keras_frn.FilterResponseNormalizationTLU()(convolution(inputs, widths[0]))
    for block, filters in enumerate(widths):
        y = convolution(x, filters, strides=1 if block == 0 else 2)
        y = convolution(keras_frn.FilterResponseNormalizationTLU()(y), filters)
        if block > 0:
            x = convolution(layers.AveragePooling2D(2)(x), filters, size=1)
        x = keras_frn.FilterResponseNormalizationTLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name=NAME)


def train(images, labels, epochs=5, batch_size=128, seed=7):
    """Returns the trained model, without its optimizer."""
    keras.utils.set_random_seed(seed)
    model = resnet()
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-5, epochs * len(images) // batch_size, warmup_target=4e-3, warmup_steps=150
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, labels, batch_size=batch_size, epochs=epochs, verbose=2)
    return keras.Model(model.input, model.output, name=NAME)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--weights", help="a .keras file to write again instead of training")
    arguments = parser.parse_args()
    (images, labels), test = fashion_mnist(arguments.data)
    if arguments.weights:
        model = keras.saving.load_model(arguments.weights, compile=False)
    else:
        model = train(images, labels)
    write(model, pathlib.Path(__file__).parent / NAME, images[:300], *test, 255, CARD)


if __name__ == "__main__":
    main()
