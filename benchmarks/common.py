"""What the benchmarks share: the layers compared, interleaved timing, tables in CSV."""

import csv
import os
import platform
import re
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers, ops

import keras_frn

BACKEND = keras.backend.backend()
RESULTS = Path(__file__).parent / "results"
BN = "BatchNormalization + ReLU"


class AsWritten(keras_frn.FilterResponseNormalizationTLU):
    """max(gamma * (x * r) + beta, tau), as in the paper."""

    def call(self, x):
        axes = tuple(range(1, len(x.shape) - 1))
        x = ops.cast(x, "float32")
        nu2 = ops.mean(ops.square(x), axis=axes, keepdims=True)
        y = self.gamma * (x * ops.rsqrt(nu2 + 1e-6)) + self.beta
        return ops.cast(ops.maximum(y, self.tau), self.compute_dtype)


class Plain(keras_frn.FilterResponseNormalizationTLU):
    """The fewest operators: relu(x * (gamma * r) + (beta - tau)) + tau, not exact for large tau."""

    def call(self, x):
        axes = tuple(range(1, len(x.shape) - 1))
        x = ops.cast(x, "float32")
        scale = self.gamma * ops.rsqrt(ops.mean(x * x, axis=axes, keepdims=True) + 1e-6)
        y = ops.relu(x * scale + (self.beta - self.tau)) + self.tau
        return ops.cast(y, self.compute_dtype)


def normalizations(groups=8):
    """Dict from names to functions that make the layers."""
    return {
        BN: lambda: [layers.BatchNormalization(), layers.ReLU()],
        "GroupNormalization + ReLU": lambda: [layers.GroupNormalization(groups), layers.ReLU()],
        "LayerNormalization + ReLU": lambda: [layers.LayerNormalization(), layers.ReLU()],
        "FRN as written": lambda: [AsWritten()],
        "plain formula": lambda: [Plain()],
        "FRN + TLU": lambda: [keras_frn.FilterResponseNormalizationTLU()],
        "FRN, then TLU": lambda: [keras_frn.FilterResponseNormalization(), keras_frn.TLU()],
    }


def accelerator():
    """The name of the GPU or TPU that the backend computes on, or None."""
    if BACKEND == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    if BACKEND == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0])["device_name"] if gpus else None


DEVICE = accelerator()
# Results of a processor and of an accelerator lie side by side.
SUFFIX = "_" + re.sub(r"\W+", "_", DEVICE) if DEVICE else ""


def wait(result):
    """Until what was started has ended."""
    if BACKEND == "jax":
        import jax

        jax.block_until_ready(result)
    elif DEVICE and BACKEND == "torch":
        import torch

        torch.cuda.synchronize()
    elif DEVICE:
        import tensorflow as tf

        tf.test.experimental.sync_devices()


def seconds(function):
    start = time.perf_counter()
    wait(function())
    return time.perf_counter() - start


def interleaved(functions, repeats):
    """Dict of lists of seconds: every function once, then every function again, ..."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return times


def ratio(times, name, other=BN):
    """The median over the rounds, of which each has the same load on the machine."""
    return float(np.median(np.array(times[name]) / np.array(times[other])))


def write(rows, path):
    version = __import__(BACKEND).__version__
    versions = f"keras {keras.__version__}, {BACKEND} {version}, keras_frn {keras_frn.__version__}"
    device = DEVICE or f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "device", "versions"])
        writer.writeheader()
        for row in rows:
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**row, "device": device, "versions": versions})
