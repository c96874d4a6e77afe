"""Title: Differentially private training of a network with FRN
Description: DP-SGD with jax-privacy: accuracy and epsilon, beside GroupNormalization.
Accelerator: none, 50 minutes on two CPU cores

## Introduction

A model trained on private data must not reveal any single person. DP-SGD (Abadi et al., 2016,
https://arxiv.org/abs/1607.00133) bounds the effect of one example on the weights: it clips the
gradient *of each example*, sums the clipped gradients, and adds Gaussian noise.

With BatchNormalization the gradient "of one example" depends on all examples in the batch, so
clipping it bounds nothing. FRN normalizes each example by itself. So does GroupNormalization, the
usual replacement, which we train for comparison.

## Setup

    pip install ".[examples]"
    python examples/private_training.py

Fashion-MNIST is in the Debian package `dataset-fashion-mnist`. Elsewhere, pass the folder of its
four files as `--data`. `--data digits` uses the 8x8 digits of scikit-learn instead, for a minute.

## What to expect

At epsilon 1.9, about 67% of the test images right with FRN and 69.5% with GroupNormalization.
"""

import argparse
import gzip
import os
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import dp_accounting
import jax
import jax_privacy
import keras
import numpy as np
import optax
from jax_privacy.batch_selection import CyclicPoissonSampling, pad_to_multiple_of
from keras import layers

import keras_frn

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"

"""
## The data
"""


def load(data):
    """Training images in [0, 1] and labels, then those for the accuracy."""
    if data == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, held_out = digits.images[..., None].astype("float32") / 16, np.arange(1797) % 5 == 0
        return (
            images[~held_out],
            digits.target[~held_out],
            images[held_out],
            digits.target[held_out],
        )

    def read(name, header):
        with gzip.open(Path(data, f"{name}.gz")) as file:
            return np.frombuffer(file.read(), "uint8", offset=header)

    parts = []
    for name in ("train", "t10k"):
        images = read(f"{name}-images-idx3-ubyte", 16).reshape(-1, 28, 28, 1)
        parts += [images.astype("float32") / 255, read(f"{name}-labels-idx1-ubyte", 8)]
    return parts


"""
## The network

Three small convolutions: the noise grows with the number of weights, the gradient does not. The
networks differ only in the two layers after each convolution.
"""

NORMALIZATIONS = {
    "FRN + TLU": lambda: [keras_frn.FilterResponseNormalizationTLU()],
    "GroupNormalization + ReLU": lambda: [layers.GroupNormalization(8), layers.ReLU()],
}


def network(normalization, input_shape, width):
    model = keras.Sequential([keras.Input(input_shape)])
    for filters, strides in ((width, 2), (2 * width, 2), (2 * width, 1)):
        model.add(layers.Conv2D(filters, 3, strides, padding="same"))
        for layer in NORMALIZATIONS[normalization]():
            model.add(layer)
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    return model


"""
## A private step

`jax_privacy.clipped_grad` turns the loss of one example into the sum of the clipped gradients of a
batch, by `vmap` of `grad`. `stateless_call` makes the network a function of its weights.

Sampling is Poisson, as the accounting assumes: each example is in a batch with the same
probability, independently of the others. Batches differ in size; examples of weight 0 pad them to a
multiple of 128, so that few sizes are compiled.
"""


def private_step(model, optimizer, clip, noise, batch):
    def loss(weights, image, label, counts):
        logits, _ = model.stateless_call(weights, [], image)
        return counts[0] * optax.softmax_cross_entropy_with_integer_labels(logits, label)[0]

    summed_gradient = jax_privacy.clipped_grad(loss, l2_clip_norm=clip, batch_argnums=(1, 2, 3))

    @jax.jit
    def step(weights, state, key, images, labels, counts):
        gradients = summed_gradient(weights, images, labels, counts)
        keys = jax.random.split(key, len(gradients))
        gradients = [
            (g + noise * clip * jax.random.normal(k, g.shape)) / batch
            for g, k in zip(gradients, keys)
        ]
        updates, state = optimizer.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    return step


"""
## Training and accounting

Epsilon bounds what the output reveals about one example, except with probability `delta`: lower is
more private. `dp_accounting` composes the steps. It needs neither the network nor the data.
"""


def epsilon(noise, sampling, steps, delta):
    step = dp_accounting.PoissonSampledDpEvent(sampling, dp_accounting.GaussianDpEvent(noise))
    accountant = dp_accounting.pld.PLDAccountant()
    accountant.compose(step, steps)
    return accountant.get_epsilon(delta)


def train(model, data, steps, batch, clip, noise, rate, seed=0):
    """Trains the model and returns its accuracy on the held-out images."""
    images, labels, test_images, test_labels = data
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    step = private_step(model, optimizer, clip, noise, batch)
    weights = [v.value for v in model.trainable_variables]
    state = optimizer.init(weights)
    sampling = CyclicPoissonSampling(sampling_prob=batch / len(images), iterations=steps)
    keys = jax.random.split(jax.random.key(seed), steps)
    batches = sampling.batch_iterator(len(images), rng=seed)
    for i, (key, chosen) in enumerate(zip(keys, batches), 1):
        chosen = pad_to_multiple_of(chosen, 128)  # with -1
        counts = (chosen >= 0).astype("float32")
        weights, state = step(weights, state, key, images[chosen], labels[chosen], counts)
        if i % 20 == 0:
            print(f"step {i} of {steps}", flush=True)
    for variable, value in zip(model.trainable_variables, weights):
        variable.assign(value)
    return float((model.predict(test_images, verbose=0).argmax(-1) == test_labels).mean())


def main(
    data=FASHION_MNIST,
    steps=400,
    batch=512,
    width=16,
    clip=1.0,
    noise=0.8,
    rate=0.01,
    delta=1e-5,
    seeds=1,
):
    data = load(data)
    spent = epsilon(noise, batch / len(data[0]), steps, delta)
    print(f"epsilon {spent:.2f} at delta {delta} after {steps} steps of {batch} images on average")
    results = {}
    for name in NORMALIZATIONS:
        start = time.perf_counter()
        accuracies = []
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            model = network(name, data[0].shape[1:], width)
            accuracies.append(train(model, data, steps, batch, clip, noise, rate, seed))
        results[name] = accuracies
        seconds = (time.perf_counter() - start) / seeds
        shown = ", ".join(f"{100 * accuracy:.1f}%" for accuracy in accuracies)
        print(f"{name:26} {model.count_params()} weights  {shown}  {seconds:.0f} s", flush=True)
    return spent, results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=FASHION_MNIST)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=0.8)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=1)
    main(**vars(parser.parse_args()))
