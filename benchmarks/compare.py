"""FRN beside BatchNormalization, GroupNormalization and LayerNormalization: what each costs.

    pip install -e ".[test]"
    python benchmarks/compare.py [--parts counts runtimes keras] [--networks ...]

The same networks with each normalization, random weights, batch 1 in deployment, and everything in
one process, in turns. `counts`: a LiteRT int8 file's operators, those in float, and the pieces that
XNNPACK runs it in; what Vela leaves on the CPU beside an Ethos-U55, and its estimate of cycles; the
kinds of operators to register in TensorFlow Lite Micro, and its arena. `runtimes`: latency in
LiteRT, onnxruntime and OpenVINO, one thread, BatchNormalization folded into the convolutions as
each of them does it. `keras`: a training step and inference of 32 samples on the backend. Appends
rows to results/compare.csv, a number each; a second call goes on where the first one stopped, and
`--show` prints the table alone. An hour of two cores."""

import argparse
import csv
import functools
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import BACKEND, BN, RESULTS, interleaved, normalizations
from keras import layers
from network import apply, conv, resnet20, unet3d

import keras_frn

PATH = RESULTS / "compare.csv"
FIELDS = ["network", "normalization", "what", "value"]
CHOSEN = (BN, "GroupNormalization + ReLU", "LayerNormalization + ReLU", "FRN + TLU")
ROUNDS = 15


def resnet18(normalize):
    """Eight blocks of two 3x3 convolutions, 64 to 512 channels, on 96x96 images."""
    inputs = keras.Input((96, 96, 3))
    x = layers.MaxPooling2D(3, 2, "same")(apply(conv(inputs, 64, 7, 2), normalize))
    for filters in (64, 128, 256, 512):
        for block in range(2):
            strides = 2 if filters > 64 and block == 0 else 1
            y = apply(conv(x, filters, 3, strides), normalize)
            y = apply(conv(y, filters, 3), normalize)
            x = conv(x, filters, 1, strides) if strides > 1 else x
            x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def mobilenet(normalize):
    """Inverted residuals as in MobileNetV2, 17 blocks at half of its width, on 96x96 images."""
    inputs = keras.Input((96, 96, 3))
    x = apply(conv(inputs, 16, 3, 2), normalize)
    stages = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1))
    for expansion, filters, blocks, first in (*stages, (6, 80, 3, 2), (6, 160, 1, 1)):
        for block in range(blocks):
            strides = first if block == 0 else 1
            y = apply(conv(x, expansion * x.shape[-1], 1), normalize)
            y = layers.DepthwiseConv2D(3, strides, "same", use_bias=False)(y)
            y = conv(apply(y, normalize), filters, 1)
            x = layers.Add()([x, y]) if strides == 1 and x.shape[-1] == filters else y
    x = apply(conv(x, 640, 1), normalize)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


NETWORKS = {
    "ResNet-20": resnet20,
    "ResNet-18": resnet18,
    "MobileNetV2": mobilenet,
    "3D U-Net": functools.partial(unet3d, size=32, width=16),
}


def build(network):
    """Dict from normalizations to models, with statistics that are not those of the start."""
    models = {}
    for name in CHOSEN:
        keras.utils.set_random_seed(0)
        model, rng = NETWORKS[network](normalizations()[name]), np.random.default_rng(0)
        for weight in model.weights:
            kind = weight.path.rsplit("/", 1)[-1]
            if kind in ("gamma", "beta", "tau", "moving_mean", "moving_variance"):
                center = 1 if kind in ("gamma", "moving_variance") else 0
                weight.assign(center + rng.uniform(-0.4, 0.4, weight.shape))
        models[name] = model
    return models


def samples(model, count):
    return np.random.default_rng(1).normal(size=(count, *model.input_shape[1:])).astype("float32")


def export(model, path, quantization, **options):
    x = samples(model, 16 if len(model.input_shape) == 5 else 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about accuracy, and these weights are random
        return keras_frn.export_tflite(
            model, path, quantization=quantization, calibration_data=x, **options
        )


def count(network, models, folder):
    """Rows about an int8 file."""
    for name, model in models.items():
        path = folder / "int8.tflite"
        # Compilers for NPUs need every size.
        one = [keras.InputSpec(shape=(1, *model.input_shape[1:]), dtype="float32")]
        report = export(model, path, "int8", input_signature=one)
        yield name, "int8 operators", sum(report.operators.values())
        yield name, "int8 operators in float", sum(report.in_float.values())
        yield name, "int8 pieces in XNNPACK", report.partitions
        yield name, "kinds of operators", len(report.operators)
        yield from ((name, *row) for row in ask_vela(path, folder))
        # Its interpreter takes no integer volume of five dimensions as an input.
        if network != "3D U-Net":
            yield name, "arena in TFLite Micro, kB", measure_arena(path)


def ask_vela(path, folder):
    """The operators on the CPU and the cycles, by Vela's own estimate, on an Ethos-U55."""
    command = [sys.executable, "-c", "from ethosu.vela.vela import main; main()", path]
    command += ["--accelerator-config", "ethos-u55-128", "--output-dir", folder]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    left = re.search(r"CPU operators = (\d+) ", done.stdout)
    if left is None:
        print("Vela:", (done.stderr or done.stdout).strip().splitlines()[-1:])
        return
    yield "Ethos-U55: operators on the CPU", int(left[1])
    (summary,) = folder.glob("int8_summary_*.csv")
    with summary.open(newline="") as file:
        (row,) = csv.DictReader(file)
    summary.unlink()
    yield "Ethos-U55: cycles of the NPU, millions", float(row["cycles_total"]) / 1e6


ARENA = """
import sys
from tflite_micro import runtime

interpreter = runtime.Interpreter.from_file(sys.argv[1], arena_size=1 << 28)
interpreter.print_allocations()
"""


def measure_arena(path):
    done = subprocess.run([sys.executable, "-c", ARENA, path], capture_output=True, text=True)
    text = done.stdout + done.stderr
    return round(int(re.search(r"Arena allocation total (\d+) bytes", text)[1]) / 1024)


def time_runtimes(network, models, folder):
    """Rows of latencies in milliseconds."""
    for quantization in (None, "dynamic", "int8"):
        runs = {}
        for number, (name, model) in enumerate(models.items()):
            path = folder / f"{number}.tflite"
            export(model, path, quantization)
            runs[name] = litert(path, samples(model, 1))
        yield from medians(f"LiteRT {quantization or 'float32'}, ms", runs)
    for runtime, load in (("onnxruntime", onnxruntime), ("OpenVINO", openvino)):
        runs = {}
        for number, (name, model) in enumerate(models.items()):
            path = folder / f"{number}.onnx"
            if not path.exists():
                shape = (1, *model.input_shape[1:])
                signature = [keras.InputSpec(shape=shape, dtype="float32")]
                model.export(str(path), format="onnx", verbose=False, input_signature=signature)
            runs[name] = load(path, samples(model, 1))
        yield from medians(f"{runtime} float32, ms", runs)


def medians(what, runs):
    for run in runs.values():
        run()
    once = max(run_time(run) for run in runs.values())
    repeats = max(1, int(0.05 / once))
    functions = {
        name: lambda run=run: [run() for _ in range(repeats)] and None for name, run in runs.items()
    }
    times = interleaved(functions, ROUNDS)
    for name, seconds in times.items():
        yield name, what, 1e3 * float(np.median(seconds)) / repeats


def run_time(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def litert(path, x):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    return interpreter.invoke


def onnxruntime(path, x):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, inputs)


def openvino(path, x):
    import openvino as ov

    compiled = ov.compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    request = compiled.create_infer_request()
    return lambda: request.infer([x])


def time_keras(network, models, folder):
    """Rows of the time of a training step and of inference, with 32 samples (4 volumes)."""
    size = 4 if network == "3D U-Net" else 32
    steps, calls = {}, {}
    for name, model in models.items():
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        x, y = samples(model, size), np.zeros((size, *model.output_shape[1:-1]), "int32")
        steps[name] = lambda model=model, x=x, y=y: model.train_on_batch(x, y)
        calls[name] = lambda model=model, x=x: model.predict_on_batch(x)
    for what, runs in (("training step", steps), ("inference", calls)):
        yield from medians(f"Keras on {BACKEND}, {what}, ms", runs)


PARTS = {"counts": count, "runtimes": time_runtimes, "keras": time_keras}
# A part is done when it has this row for the last normalization.
LAST = {
    "counts": "kinds of operators",
    "runtimes": "OpenVINO float32, ms",
    "keras": f"Keras on {BACKEND}, inference, ms",
}


def read():
    if not PATH.exists():
        return {}
    with PATH.open(newline="") as file:
        rows = csv.DictReader(file)
        return {(r["network"], r["normalization"], r["what"]): float(r["value"]) for r in rows}


def append(rows):
    is_new = not PATH.exists()
    with PATH.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(FIELDS)
        writer.writerows((*row[:-1], f"{row[-1]:.6g}") for row in rows)


def show(values):
    """A table; times as ratios to BatchNormalization."""
    for network in NETWORKS:
        whats = dict.fromkeys(what for n, _, what in values if n == network)
        print(f"\n{network:44}" + "".join(f"{name.split()[0]:>22}" for name in CHOSEN))
        for what in whats:
            found = [values.get((network, name, what)) for name in CHOSEN]
            texts = ["" if value is None else f"{value:.6g}" for value in found]
            if what.endswith(", ms") and found[0]:
                first = f"{found[0]:.3g} ms"
                texts = [first, *(f"{v / found[0]:.2f}" if v else "" for v in found[1:])]
            print(f"{what:44}" + "".join(f"{text:>22}" for text in texts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--show", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    for network in [] if arguments.show else arguments.networks:
        left = [p for p in arguments.parts if (network, CHOSEN[-1], LAST[p]) not in read()]
        models = build(network) if left else {}
        for part in left:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                append((network, *row) for row in list(PARTS[part](network, models, Path(folder))))
            print(f"{network}, {part}: {time.perf_counter() - start:.0f} s", flush=True)
        gc.collect()
    show(read())


if __name__ == "__main__":
    main()
