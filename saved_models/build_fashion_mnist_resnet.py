"""Trains a small ResNet on Fashion-MNIST and writes it in every format to `fashion_mnist_resnet/`.

    python saved_models/build_fashion_mnist_resnet.py

It reads the four files of Fashion-MNIST from `--data`, by default where the Debian package
`dataset-fashion-mnist` puts them, and takes about 8 minutes on one CPU core.
"""

import argparse
import gzip
import json
import pathlib
import platform
import shutil

import keras
import numpy as np
from keras import layers

import keras_frn

NAME = "fashion_mnist_resnet"
PRESETS = {
    "float32": None,
    "float16": "float16",
    "dynamic": "dynamic",
    "int8": "int8",
    "int8_float_statistics": "int8_float_statistics",
    "int16x8": "int16x8",
}


def fashion_mnist(folder):
    """Returns ((images, labels), (images, labels)) for training and test, images in [0, 1]."""

    def read(name, offset):
        with gzip.open(pathlib.Path(folder, name)) as file:
            return np.frombuffer(file.read(), "uint8", offset=offset)

    def part(name):
        images = read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
        return images.astype("float32") / 255, read(f"{name}-labels-idx1-ubyte.gz", 8)

    return part("train"), part("t10k")


def resnet(widths=(16, 32, 64)):
    """Six convolutions in three residual blocks behind a stem: 77,802 weights."""

    def convolution(x, filters, strides=1, size=3):
        return layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x)

    inputs = keras.Input((28, 28, 1), name="image")
    x = keras_frn.FilterResponseNormalizationTLU()(convolution(inputs, widths[0]))
    for block, filters in enumerate(widths):
        y = convolution(x, filters, strides=1 if block == 0 else 2)
        y = convolution(keras_frn.FilterResponseNormalizationTLU()(y), filters)
        if block > 0:
            x = convolution(layers.AveragePooling2D(2)(x), filters, size=1)
        x = keras_frn.FilterResponseNormalizationTLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name=NAME)


def train(images, labels, epochs=5, batch_size=128, seed=7):
    """Returns the trained model, without its optimizer."""
    keras.utils.set_random_seed(seed)
    model = resnet()
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-5, epochs * len(images) // batch_size, warmup_target=4e-3, warmup_steps=150
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(images, labels, batch_size=batch_size, epochs=epochs, verbose=2)
    return keras.Model(model.input, model.output, name=NAME)


def run_litert(path, images):
    """Logits of a .tflite file."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=1).get_signature_runner()
    return np.concatenate(
        [runner(image=images[i : i + 100])["output_0"] for i in range(0, len(images), 100)]
    )


def run_onnx(path, images):
    """Logits of an .onnx file."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path)).run(None, {"image": images})[0]


def run_saved_model(path, images):
    """Logits of a SavedModel folder."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))  # it owns the variables
    return loaded.serve(images).numpy()


def build(model, folder, calibration_data, images, labels):
    """Writes the model in every format, what each gives for 64 test images, and a card."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outputs, files = {}, {}

    def keep(name, file, logits):
        accuracy = float((logits.argmax(-1) == labels).mean())
        path = folder / file
        parts = path.rglob("*") if path.is_dir() else [path]
        size = sum(part.stat().st_size for part in parts if part.is_file())
        files[name] = {"file": file, "bytes": size, "test_accuracy": round(accuracy, 4)}
        outputs[name] = logits[:64]
        print(f"{name:24}{size:>10,} bytes   accuracy {accuracy:.4f}", flush=True)

    model.save(folder / "model.keras")
    keep("keras", "model.keras", model.predict(images, batch_size=500, verbose=0))
    model.export(folder / "saved_model", format="tf_saved_model", verbose=False)
    keep("saved_model", "saved_model", run_saved_model(folder / "saved_model", images))
    model.export(folder / "model.onnx", format="onnx", verbose=False)
    keep("onnx", "model.onnx", run_onnx(folder / "model.onnx", images))
    for name, preset in PRESETS.items():
        path = folder / f"{name}.tflite"
        keras_frn.export_tflite(model, path, preset, calibration_data)
        keep(name, path.name, run_litert(path, images))

    np.savez_compressed(
        folder / "golden.npz",
        images=np.round(images[:64] * 255).astype("uint8"),
        labels=labels[:64],
        **outputs,
    )
    about = {
        "name": NAME,
        "task": "Fashion-MNIST, 10 classes; input (28, 28, 1) in [0, 1], output logits",
        "weights": model.count_params(),
        "golden": "golden.npz: 64 test images (divide by 255), labels, and the logits of each file",
        "files": files,
        "made_with": {
            "keras_frn": keras_frn.__version__,
            "keras": keras.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("tensorflow", "ai-edge-litert", "onnxruntime")},
        },
        "rebuild": f"python saved_models/build_{NAME}.py",
        "data": "Fashion-MNIST by Zalando Research, MIT licence; 60,000 images for training, the "
        "first 300 of them for calibration, 10,000 for the accuracies",
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")


def _version(name):
    from importlib.metadata import version

    return version(name)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--weights", help="a .keras file to write again instead of training")
    arguments = parser.parse_args()
    (images, labels), test = fashion_mnist(arguments.data)
    if arguments.weights:
        model = keras.saving.load_model(arguments.weights, compile=False)
    else:
        model = train(images, labels)
    build(model, pathlib.Path(__file__).parent / NAME, images[:300], *test)


if __name__ == "__main__":
    main()
