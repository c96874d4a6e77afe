"""Serves a SavedModel and a LiteRT file from many threads, with batches and images of every size.

    python benchmarks/serving.py --calls 100000

Each call takes one of 24 inputs, from 1 to 8 images of 8x8 to 32x20 pixels. Its result is compared
with that of the same input alone, before the threads started. The SavedModel is one object for all
threads; a LiteRT interpreter belongs to one thread, so each thread opens the file. Prints the
largest difference and the memory of the process after a tenth of the calls and at the end."""

import argparse
import concurrent.futures
import os
import tempfile
import threading
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import psutil
import tensorflow as tf

import keras_frn


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Conv2D(8, 3, strides=2, use_bias=False),
            keras_frn.FilterResponseNormalization(learned_epsilon=True),
            keras_frn.TLU(),
            keras.layers.Conv2D(8, 3, use_bias=False),
            keras_frn.FilterResponseNormalizationTLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )


def inputs():
    rng = np.random.default_rng(0)
    sizes = [(8, 8), (9, 15), (16, 16), (17, 8), (24, 24), (32, 20)]
    return [
        rng.normal(size=(batch, *size, 3)).astype("float32")
        for batch in (1, 2, 5, 8)
        for size in sizes
    ]


def saved_model(path):
    loaded = tf.saved_model.load(path)  # its functions do not keep it alive
    return lambda: lambda x: loaded.serve(tf.constant(x)).numpy()


def litert(path):
    """Opens the file once for each thread."""
    from ai_edge_litert.interpreter import Interpreter

    def open_file():
        interpreter = Interpreter(str(path), num_threads=1)
        (given,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()

        def call(x):
            if tuple(interpreter.get_input_details()[0]["shape"]) != x.shape:
                interpreter.resize_tensor_input(given["index"], x.shape)
                interpreter.allocate_tensors()
            interpreter.set_tensor(given["index"], x)
            interpreter.invoke()
            return interpreter.get_tensor(result["index"])

        return call

    return open_file


def load(make, calls, threads):
    """The largest difference, and megabytes after a tenth of the calls and at the end."""
    data = inputs()
    alone = make()
    expected = [alone(x) for x in data]
    own = threading.local()

    def work(seed, count):
        if not hasattr(own, "call"):
            own.call = make()
        worst = 0.0
        for i in np.random.default_rng(seed).integers(0, len(data), count):
            worst = max(worst, float(np.max(np.abs(own.call(data[i]) - expected[i]))))
        return worst

    megabytes, worst = [], 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for part in range(10):
            counts = [calls // 10 // threads] * threads
            seeds = range(part * threads, (part + 1) * threads)
            worst = max(worst, *pool.map(work, seeds, counts))
            megabytes.append(psutil.Process().memory_info().rss / 2**20)
    return worst, megabytes[0], megabytes[-1]


def main(calls=100_000, threads=8):
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = network()
        model.export(Path(folder, "saved"), verbose=False)
        model.export(Path(folder, "model.tflite"), format="litert", verbose=False)
        for name, make in (
            ("SavedModel", saved_model(Path(folder, "saved"))),
            ("LiteRT", litert(Path(folder, "model.tflite"))),
        ):
            start = time.perf_counter()
            worst, before, after = results[name] = load(make, calls, threads)
            seconds = time.perf_counter() - start
            print(
                f"{name:10} {calls} calls from {threads} threads in {seconds:.0f} s: largest "
                f"difference {worst:.2g}, {before:.0f} MB after a tenth, {after:.0f} MB at the end",
                flush=True,
            )
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    main(**vars(parser.parse_args()))
