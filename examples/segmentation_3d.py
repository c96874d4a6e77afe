"""Title: Segmentation of volumes at batch size 1
Description: A small 3D U-Net with FRN and TLU that finds ellipsoids in noise, one volume at a time.
Accelerator: none, two minutes on two CPU cores

## Introduction

One medical or microscopic volume often fills the memory, so the batch size is one. FRN normalizes
each channel of each volume by itself, and a batch of one is a batch like any other.

Contrast differs between such volumes. Here each one is scaled by a random factor between 0.3 and 3,
which FRN after the first convolution removes.

## Setup

    pip install .
    python examples/segmentation_3d.py

The script generates the volumes. Use TensorFlow, Keras' default: convolutions of volumes are slow
under JAX on a CPU.

## What to expect

A mean Dice of about 0.91 on 20 other volumes, after five passes over 60 volumes.
"""

import argparse

import keras
import numpy as np
from keras import layers, ops

import keras_frn

"""
## The data

One to three ellipsoids in a cube, with noise as strong as the signal, and a mask of the voxels
inside.
"""


def volumes(count, size, seed):
    """Volumes `(count, size, size, size, 1)` and masks of the same shape."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*3 * [np.arange(size)], indexing="ij"), axis=-1)
    masks = np.zeros((count, size, size, size), bool)
    for mask in masks:
        for _ in range(rng.integers(1, 4)):
            center, radii = rng.uniform(0.2, 0.8, 3) * size, rng.uniform(0.12, 0.3, 3) * size
            mask |= np.sum(((grid - center) / radii) ** 2, axis=-1) < 1
    contrast = 10 ** rng.uniform(-0.5, 0.5, (count, 1, 1, 1))
    images = contrast * (masks + rng.normal(size=masks.shape))
    return images[..., None].astype("float32"), masks[..., None].astype("float32")


"""
## The network

A U-Net of three levels. FRN and TLU follow each convolution. The deepest maps of a 24x24x24 volume
have 6x6x6 positions, enough for a mean. If they had one, they would need `learned_epsilon=True`.
"""


def block(x, filters):
    """Two convolutions, each with FRN and TLU."""
    for _ in range(2):
        x = layers.Conv3D(filters, 3, padding="same", use_bias=False)(x)
        x = keras_frn.FilterResponseNormalizationTLU()(x)
    return x


def halved(x):
    """Maps of half the size."""
    return layers.Conv3D(x.shape[-1], 2, strides=2, use_bias=False)(x)


def build(width):
    """A U-Net for volumes of any size that 4 divides."""
    inputs = keras.Input((None, None, None, 1))
    first = block(inputs, width)
    second = block(halved(first), 2 * width)
    x = block(halved(second), 4 * width)
    for skip in (second, first):
        x = layers.Concatenate()([layers.UpSampling3D()(x), skip])
        x = block(x, skip.shape[-1])
    return keras.Model(inputs, layers.Conv3D(1, 1, activation="sigmoid")(x))


"""
## The loss

Dice is twice the overlap over the sum of both sizes: 1 for a perfect mask. It is not affected by
how many voxels are outside.
"""


def dice(mask, predicted):
    """The Dice coefficient of each volume."""
    axes = (1, 2, 3, 4)
    overlap = ops.sum(mask * predicted, axes)
    return (2 * overlap + 1) / (ops.sum(mask, axes) + ops.sum(predicted, axes) + 1)


def dice_loss(mask, predicted):
    """1 - Dice, for each volume."""
    return 1 - dice(mask, predicted)


"""
## Training and test

Adam with a warm-up over a tenth of the steps, then a cosine.
"""


def main(count=60, size=24, epochs=5, width=8, output="ellipsoids.keras"):
    """Trains on `count` volumes, one at a time; returns the mean Dice of 20 others."""
    keras.utils.set_random_seed(0)
    images, masks = volumes(count, size, seed=0)
    model = build(width)
    steps = count * epochs
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=3e-3, warmup_steps=steps // 10
    )
    model.compile(keras.optimizers.Adam(rate), dice_loss)
    model.fit(images, masks, batch_size=1, epochs=epochs, verbose=2)

    images, masks = volumes(20, size, seed=1)
    predicted = model.predict(images, batch_size=1, verbose=0) > 0.5
    score = float(np.mean(ops.convert_to_numpy(dice(masks, predicted.astype("float32")))))
    model.save(output)
    print(f"Dice {score:.3f} on 20 other volumes; wrote {output}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Segmentation of volumes at batch size 1.")
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--size", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=5)
    main(**vars(parser.parse_args()))
