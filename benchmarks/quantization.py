"""Accuracy, size and speed of the LiteRT presets, and what an NPU takes of the integer ones.

    python benchmarks/quantization.py [--data FOLDER] [--models FOLDER] [--quick]

Accuracy: networks trained on Fashion-MNIST, against the float model, on clean images, on images
whose contrast is scaled by 10**U(-1, 0) (calibrated on such), and with convolution channels scaled
by 10**U(-2, 0), which Filter Response Normalization does not notice in float. The export was tuned
on `resnet`; `separable` and `valid` are others. Latency: one thread, median, with FRN and with
folded BatchNormalization in turn, the smallest of ten medians. Vela: operators on an Ethos-U.
Prints tables and writes results/quantization.csv and results/quantization_latency.csv.
"""

import argparse
import csv
import os
import pathlib
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
from keras_frn.export.presets import PRESETS
from keras_frn.export.runtime import LiteRT

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "saved_models"))
from build import FASHION_MNIST, fashion_mnist, run_litert


def frn():
    return keras_frn.FilterResponseNormalizationTLU()


def batch_norm():
    return keras.Sequential([layers.BatchNormalization(), layers.ReLU()])


def separable():
    """Depthwise and pointwise convolutions."""
    inputs = keras.Input((28, 28, 1), name="image")
    x = frn()(layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(inputs))
    for filters, strides in ((32, 1), (64, 2), (64, 1), (96, 2)):
        x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(x)
        x = frn()(layers.Conv2D(filters, 1, use_bias=False)(frn()(x)))
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


if __name__ == "__main__":
    main()
