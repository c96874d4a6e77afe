"""Title: Image classification at batch size 2
Description: A residual network with FRN, TLU and zero-mean filters, two images at a time.
Accelerator: none, two minutes on two CPU cores

## Introduction

Large images, volumes and small devices leave room for few samples in a batch. BatchNormalization
then estimates mean and deviation from two or three samples, and its output for one image depends on
the images beside it. FRN divides each channel of each image by its own root mean square.

FRN does not subtract a mean. A zero-mean filter removes the offset that its inputs share, which
comes close. `keras_frn.constraints.ZeroMean` keeps filters at zero mean; inference costs nothing
extra.

## Setup

    pip install ".[examples]"
    KERAS_BACKEND=jax python examples/image_classification.py

JAX compiles the whole step, which helps most if steps are short.

Fashion-MNIST is in the Debian package `dataset-fashion-mnist`. Elsewhere, pass the folder of its
four files as `--data`. Without them the example uses the 8x8 digits of scikit-learn.

## What to expect

About 81% of the test images right, after two passes over 6,000 images.
"""

import argparse
import gzip
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_frn

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"

"""
## The data

Gray images in [0, 1], 28x28 pixels, ten kinds of clothes. An .idx file is a header of a few bytes,
then the numbers.
"""


def load(folder):
    """Training images and labels, then those for the test."""
    if not Path(folder, "train-images-idx3-ubyte.gz").exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, test = digits.images[..., None].astype("float32") / 16, np.arange(1797) % 5 == 0
        return images[~test], digits.target[~test], images[test], digits.target[test]

    def read(name, header, shape):
        with gzip.open(Path(folder, name)) as file:
            return np.frombuffer(file.read(), "uint8", offset=header).reshape(shape)

    arrays = []
    for part in ("train", "t10k"):
        images = read(f"{part}-images-idx3-ubyte.gz", 16, (-1, 28, 28, 1))
        arrays += [images.astype("float32") / 255, read(f"{part}-labels-idx1-ubyte.gz", 8, -1)]
    return arrays


"""
## The network

In a pre-activation residual block FRN and TLU come before each convolution, and nothing follows the
addition. Convolutions have no bias, as FRN has an offset, and zero-mean filters.
"""


def convolution(filters, size=3, strides=1):
    """A convolution whose filters have a mean of zero."""
    return layers.Conv2D(
        filters,
        size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        kernel_constraint=keras_frn.constraints.ZeroMean(),
    )


def block(x, filters, strides):
    """A pre-activation residual block."""
    y = keras_frn.FilterResponseNormalizationTLU()(x)
    if strides > 1 or x.shape[-1] != filters:
        x = convolution(filters, 1, strides)(y)
    y = convolution(filters, 3, strides)(y)
    y = keras_frn.FilterResponseNormalizationTLU()(y)
    y = convolution(filters)(y)
    return layers.Add()([x, y])


def build(shape, classes, width):
    """A residual network of three blocks."""
    inputs = keras.Input(shape)
    x = layers.RandomFlip("horizontal")(inputs) if shape[0] > 8 else inputs
    x = convolution(width)(x)
    for filters, strides in ((width, 1), (2 * width, 2), (4 * width, 2)):
        x = block(x, filters, strides)
    x = keras_frn.FilterResponseNormalizationTLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


"""
## The training

The learning rate is proportional to the batch size: 0.1 at 32 is 0.00625 at 2. It warms up over the
first twentieth of the steps and falls in a cosine.
"""


def main(data=FASHION_MNIST, images=6000, epochs=2, batch_size=2, width=16, output="classes.keras"):
    """Trains and tests the network; returns its accuracy."""
    keras.utils.set_random_seed(0)
    x, y, x_test, y_test = load(data)
    x, y = x[:images], y[:images]
    model = build(x.shape[1:], 10, width)
    steps = epochs * -(-len(x) // batch_size)
    warm_up = max(1, steps // 20)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=0.1 * batch_size / 32, warmup_steps=warm_up
    )
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=2)

    """
    ## The test

    The output for an image does not depend on the batch, so any batch size will do.
    """
    _, accuracy = model.evaluate(x_test, y_test, batch_size=256, verbose=0)
    model.save(output)
    print(f"{accuracy:.1%} of {len(x_test)} test images; wrote {output}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Image classification at batch size 2.")
    parser.add_argument("--data", default=FASHION_MNIST)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=2)
    main(**vars(parser.parse_args()))
