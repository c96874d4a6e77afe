"""What a normalization adds to a network: ResNet-20 on 32x32 images, training steps and inference.

    python benchmarks/network.py --batches 32 128
    KERAS_BACKEND=jax python benchmarks/network.py

Each step is `train_on_batch` of the compiled model, of one mode at a time (`jit_compile` of the
model off and on), all networks interleaved in one process. "adds" is a network's least time less
that of the same network with ReLU alone; inference is `predict_on_batch`. Prints a table and writes
CSV to `benchmarks/results/`."""

import argparse
import gc
import time

import keras
import numpy as np
from keras import layers
from layer import BACKEND, RESULTS, SUFFIX, AsWritten, write

import keras_frn

NORMALIZATIONS = {
    "ReLU alone": lambda: [layers.ReLU()],
    "FRN + TLU": lambda: [keras_frn.FilterResponseNormalizationTLU()],
    "FRN + TLU, jit_compile=True": lambda: [
        keras_frn.FilterResponseNormalizationTLU(jit_compile=True)
    ],
    "FRN + TLU, jit_compile=False": lambda: [
        keras_frn.FilterResponseNormalizationTLU(jit_compile=False)
    ],
    "FRN as written": lambda: [AsWritten()],
    "BatchNormalization + ReLU": lambda: [layers.BatchNormalization(), layers.ReLU()],
    "GroupNormalization + ReLU": lambda: [layers.GroupNormalization(16), layers.ReLU()],
}


def resnet20(normalize):
    """Three stages of three blocks of two 3x3 convolutions, 16 to 64 channels."""

    def block(x, filters, strides):
        y = apply(layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x))
        y = apply(layers.Conv2D(filters, 3, 1, "same", use_bias=False)(y))
        if strides > 1:
            x = layers.Conv2D(filters, 1, strides, use_bias=False)(x)
        return layers.Add()([x, y])

    def apply(x):
        for layer in normalize():
            x = layer(x)
        return x

    inputs = keras.Input((32, 32, 3))
    x = apply(layers.Conv2D(16, 3, 1, "same", use_bias=False)(inputs))
    for filters in (16, 32, 64):
        for number in range(3):
            x = block(x, filters, 2 if filters > 16 and number == 0 else 1)
    x = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, x)


def measure(batch, jit_compile, repeats):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, batch)
    train, infer = {}, {}
    for name, normalize in NORMALIZATIONS.items():
        model = resnet20(normalize)
        model.compile(
            keras.optimizers.SGD(1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=jit_compile,
        )
        train[name] = lambda model=model: model.train_on_batch(x, y)
        infer[name] = lambda model=model: model.predict_on_batch(x)
    rows = []
    for direction, functions in (("training step", train), ("inference", infer)):
        times = {name: [] for name in functions}
        for function in functions.values():
            for _ in range(3):
                function()
        for _ in range(repeats):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                times[name].append(1e3 * (time.perf_counter() - start))
        base = min(times["ReLU alone"])
        bn = min(times["BatchNormalization + ReLU"])
        for name, t in times.items():
            rows.append(
                {
                    "backend": BACKEND,
                    "model_jit_compile": jit_compile,
                    "batch": batch,
                    "direction": direction,
                    "network": name,
                    "min_ms": min(t),
                    "median_ms": float(np.median(t)),
                    "max_ms": max(t),
                    "adds_ms": min(t) - base,
                    "added_of_bn": (min(t) - base) / (bn - base),
                    "of_bn": min(t) / bn,
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 32, 128])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--modes", nargs="+", default=["off", "on"], choices=["off", "on"])
    arguments = parser.parse_args()
    rows = []
    for jit_compile in (mode == "on" for mode in arguments.modes):
        if jit_compile and BACKEND == "torch":
            continue  # Keras' torch.compile of a whole training step takes minutes per network
        for batch in arguments.batches:
            found = measure(batch, jit_compile, arguments.repeats)
            rows += found
            for direction in ("training step", "inference"):
                print(f"\n{BACKEND}, jit_compile={jit_compile}, batch {batch}, {direction}")
                print(f"  {'':29}{'min':>9}{'median':>9}{'adds':>9}{'of BN':>8}{'total':>8}")
                for r in (r for r in found if r["direction"] == direction):
                    print(
                        f"  {r['network']:29}{r['min_ms']:9.1f}{r['median_ms']:9.1f}"
                        f"{r['adds_ms']:9.1f}{r['added_of_bn']:8.2f}{r['of_bn']:8.2f}",
                        flush=True,
                    )
            keras.backend.clear_session()
            gc.collect()
    RESULTS.mkdir(exist_ok=True)
    write(rows, RESULTS / f"network_{BACKEND}{SUFFIX}.csv")


if __name__ == "__main__":
    main()
