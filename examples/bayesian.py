"""Title: Sampling the posterior of ResNet-20-FRN with HMC
Description: Accuracy and calibration of samples by blackjax against one trained network.
Accelerator: none, half an hour on one CPU core

## Introduction

A Bayesian network predicts with the mean over many networks, each weighted by how well it explains
the training data. To sample them, Hamiltonian Monte Carlo (HMC) needs the exact value and gradient
of the log-density, a function of the weights alone. Batch statistics break that: with
BatchNormalization the likelihood of one image depends on the images beside it, and the moving
averages are not weights. So Izmailov et al., "What Are Bayesian Neural Network Posteriors Really
Like?" (ICML 2021, https://arxiv.org/abs/2104.14421) used FRN and a smooth activation.
`keras_frn.models.resnet_cifar` is their network; here it is narrow, on 8x8 digits.

## Setup

    pip install ".[examples]"
    python examples/bayesian.py

The digits come with scikit-learn.

## What to expect

No divergent trajectories, and about 85% of the held-out digits right with the mean of 40 samples,
75% with one sample, and 88% with one trained network.
"""

import argparse
import os
import time

os.environ["KERAS_BACKEND"] = "jax"

import blackjax
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from blackjax.adaptation.step_size import dual_averaging_adaptation
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import keras_frn

"""
## The data

A few hundred training images, so that uncertainty matters. The other digits are for testing.
"""


def load(count):
    digits = load_digits()
    images, labels = digits.images[..., None].astype("float32") / 16, digits.target
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:count], order[count:]
    return images[train], labels[train], images[test], labels[test]


"""
## The posterior

`stateless_call` makes the network a function of its weights; FRN has no other state. The
log-density is the sum of the log-likelihoods of all images and of a Gaussian prior with the
variance of the paper, 1/5.
"""


def posterior(model, images, labels, variance=0.2):
    """The log-density of a flat vector of weights, the network as a function of it, and a start."""
    start, unravel = ravel_pytree([v.value for v in model.trainable_variables])

    def logits(weights, x):
        return model.stateless_call(unravel(weights), [], x)[0]

    def log_density(weights):
        errors = optax.softmax_cross_entropy_with_integer_labels(logits(weights, images), labels)
        return -jnp.sum(errors) - jnp.sum(weights**2) / (2 * variance)

    return log_density, jax.jit(logits), start


"""
## One trained network

The maximum of the same log-density, found by Adam: ordinary training with weight decay. The chain
starts there.
"""


def maximum(log_density, weights, steps, rate=0.01):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(weights, state):
        gradient = jax.grad(lambda w: -log_density(w))(weights)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    for _ in range(steps):
        weights, state = step(weights, state)
    return weights


"""
## The chain

A sample is the end of a trajectory of leapfrog steps, which follows the gradient of the log-density
over all images. The burn-in adapts the step size until 80% of the trajectories are accepted; its
samples are discarded.
"""


def sample(log_density, start, samples, burn_in, leapfrog, step_size):
    """Yields the weights, the acceptance and the divergence of each sample after the burn-in."""
    kernel = blackjax.hmc.build_kernel()

    @jax.jit
    def step(key, state, step_size):
        return kernel(key, state, log_density, step_size, jnp.ones_like(start), leapfrog)

    initialize, update, final = dual_averaging_adaptation(0.8)
    adaptation, state = initialize(step_size), blackjax.hmc.init(start, log_density)
    for i, key in enumerate(jax.random.split(jax.random.key(0), burn_in + samples)):
        if i == burn_in and burn_in:
            step_size = final(adaptation)
        state, info = step(key, state, step_size)
        if (i + 1) % 10 == 0:
            print(f"trajectory {i + 1} of {burn_in + samples}", flush=True)
        if i < burn_in:
            adaptation = update(adaptation, info.acceptance_rate)
            step_size = jnp.exp(adaptation.log_step_size)
        else:
            yield state.position, float(info.acceptance_rate), bool(info.is_divergent)


"""
## Accuracy and calibration

The predictive distribution is the mean of the samples' probabilities. Negative log-likelihood and
expected calibration error, the mean distance between confidence and accuracy, show how far its
probabilities can be trusted; lower is better.
"""


def scores(probabilities, labels, bins=15):
    sure, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [
        abs(np.mean(sure[bin_of == b]) - np.mean(right[bin_of == b])) * np.mean(bin_of == b)
        for b in range(bins)
        if np.any(bin_of == b)
    ]
    likelihood = np.mean(np.log(probabilities[np.arange(len(labels)), labels] + 1e-30))
    return {
        "accuracy": float(np.mean(right)),
        "negative log-likelihood": float(-likelihood),
        "calibration error": float(np.sum(gaps)),
    }


def main(
    images=300, depth=20, width=4, train_steps=300, samples=40, burn_in=20, leapfrog=20, step=3e-3
):
    train_images, train_labels, test_images, test_labels = load(images)
    keras.utils.set_random_seed(0)
    model = keras_frn.models.resnet_cifar((8, 8, 1), 10, depth, width, activation="swish")
    log_density, logits, weights = posterior(model, train_images, train_labels)
    print(f"{len(weights)} weights, {images} images, {len(test_images)} held out", flush=True)

    def probabilities(weights):
        return np.asarray(jax.nn.softmax(logits(weights, test_images)))

    start = time.perf_counter()
    weights = maximum(log_density, weights, train_steps)
    trained = probabilities(weights)
    results = {"one trained network": scores(trained, test_labels)}
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    sampled, accepted, diverged = [], [], []
    for position, acceptance, divergent in sample(
        log_density, weights, samples, burn_in, leapfrog, step
    ):
        sampled.append(probabilities(position))
        accepted.append(acceptance)
        diverged.append(divergent)
    seconds = time.perf_counter() - start
    results["mean of the samples"] = scores(np.mean(sampled, 0), test_labels)
    results["last sample alone"] = scores(sampled[-1], test_labels)
    print(
        f"{samples} samples in {seconds:.0f} s: {100 * np.mean(accepted):.0f}% accepted, "
        f"{sum(diverged)} diverged"
    )
    for name, result in results.items():
        print(f"{name:20}", *(f"{measure} {value:.4f}" for measure, value in result.items()))
    return results, float(np.mean(accepted)), sum(diverged)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--burn-in", type=int, default=20)
    parser.add_argument("--leapfrog", type=int, default=20)
    parser.add_argument("--step", type=float, default=3e-3)
    main(**vars(parser.parse_args()))
