"""Time of the gradients of each example: FRN in one vectorized call, BatchNormalization one by one.

    KERAS_BACKEND=jax python benchmarks/per_example.py          or tensorflow, or torch

Four 3x3 convolutions of 16 to 32 channels, each with a normalization, on 16x16 images. "one by one"
is a call for each example, a batch of one, which is all that BatchNormalization has: a gradient
beside other examples is not one of the example alone. "batch" is the usual gradient of the mean,
which no method undercuts. Interleaved; milliseconds per example, the median, and the median over
the rounds of the ratio to BatchNormalization one by one. Writes CSV to `benchmarks/results/`."""

import argparse

import keras
import numpy as np
from common import BACKEND, BN, RESULTS, SUFFIX, interleaved, ratio, write
from keras import layers

import keras_frn

# PyTorch's `vmap` does not run Keras' channels-last convolutions.
FIRST = BACKEND == "torch"
FORMAT = {"data_format": "channels_first" if FIRST else "channels_last"}
AXIS = 1 if FIRST else -1


def network(normalize):
    model = keras.Sequential([keras.Input((3, 16, 16) if FIRST else (16, 16, 3))])
    for filters, strides in ((16, 1), (16, 1), (32, 2), (32, 1)):
        model.add(layers.Conv2D(filters, 3, strides, padding="same", use_bias=False, **FORMAT))
        for layer in normalize():
            model.add(layer)
    model.add(layers.GlobalAveragePooling2D(**FORMAT))
    model.add(layers.Dense(10))
    return model


def jax_functions(model):
    """The gradient of a batch, and the gradients of each example."""
    import jax

    weights, state = (
        [v.value for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )

    def loss(weights, x, y):
        logits, _ = model.stateless_call(weights, state, x, training=True)
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    gradient = jax.grad(loss)
    each = jax.vmap(lambda w, x, y: gradient(w, x[None], y[None]), (None, 0, 0))
    batch, each = jax.jit(gradient), jax.jit(each)
    return lambda x, y: batch(weights, x, y), lambda x, y: each(weights, x, y)


def torch_functions(model):
    import torch

    def loss(weights, x, y):
        with keras.StatelessScope(list(zip(model.trainable_variables, weights))):
            logits = model(x, training=True)
        return torch.nn.functional.cross_entropy(logits, y)

    weights = [v.value.detach() for v in model.trainable_variables]
    gradient = torch.func.grad(loss)
    each = torch.func.vmap(lambda w, x, y: gradient(w, x[None], y[None]), (None, 0, 0))
    return lambda x, y: gradient(weights, x, y), lambda x, y: each(weights, x, y)


def tensorflow_functions(model):
    import tensorflow as tf

    losses = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    weights = model.trainable_variables

    @tf.function(reduce_retracing=True)
    def batch(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(losses(y, model(x, training=True)))
        return tape.gradient(loss, weights)

    @tf.function
    def each(x, y):
        with tf.GradientTape() as tape:
            loss = losses(y, model(x, training=True))
        return tape.jacobian(loss, weights)

    return batch, each


def measure(batch_size, repeats):
    functions = {"jax": jax_functions, "torch": torch_functions, "tensorflow": tensorflow_functions}
    ours, each = functions[BACKEND](
        network(lambda: [keras_frn.FilterResponseNormalizationTLU(AXIS)])
    )
    theirs, _ = functions[BACKEND](
        network(lambda: [layers.BatchNormalization(AXIS), layers.ReLU()])
    )
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch_size, *((3, 16, 16) if FIRST else (16, 16, 3)))).astype("float32")
    y = rng.integers(0, 10, batch_size)
    if BACKEND != "jax":
        x, y = keras.ops.convert_to_tensor(x), keras.ops.convert_to_tensor(y)

    def one_by_one(gradient):
        return [gradient(x[i : i + 1], y[i : i + 1]) for i in range(batch_size)]

    calls = {
        "FRN + TLU, vectorized": lambda: each(x, y),
        "FRN + TLU, one by one": lambda: one_by_one(ours),
        BN: lambda: one_by_one(theirs),
        "FRN + TLU, batch": lambda: ours(x, y),
    }
    interleaved(calls, 2)
    times = interleaved(calls, repeats)
    for name in calls:
        yield {
            "backend": BACKEND,
            "batch": batch_size,
            "gradients": f"{name}, one by one" if name == BN else name,
            "ms_per_example": 1e3 * float(np.median(times[name])) / batch_size,
            "of_bn_one_by_one": ratio(times, name),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    for batch_size in arguments.batches:
        for row in measure(batch_size, arguments.repeats):
            rows.append(row)
            print("{backend} {batch:4} {gradients:40}".format(**row), end="")
            print("{ms_per_example:8.3f} ms {of_bn_one_by_one:6.3f}".format(**row), flush=True)
    write(rows, RESULTS / f"per_example_{BACKEND}{SUFFIX}.csv")


if __name__ == "__main__":
    main()
