"""Trains the networks in this folder and writes them in every format, with golden outputs.

    python saved_models/build.py digits
    python saved_models/build.py fashion_mnist_resnet --data FOLDER

Digits take about a minute on one CPU core, Fashion-MNIST about 8. `--data` is the folder with the
four files of Fashion-MNIST, by default where the Debian package `dataset-fashion-mnist` puts them.
"""

import argparse
import dataclasses
import gzip
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
from keras import layers

import keras_frn
from keras_frn import demo
from keras_frn.export.presets import PRESETS
from keras_frn.export.runtime import LiteRT

FOLDER = Path(__file__).parent
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
PACKAGES = ("keras", "tensorflow", "ai-edge-litert", "ai-edge-quantizer", "onnxruntime")
CARDS = {
    "digits": {
        "task": "handwritten digits, 10 classes; input (8, 8, 1) in [0, 1], output logits",
        "network": "three 3x3 convolutions, each with FilterResponseNormalizationTLU",
        "data": "scikit-learn load_digits, 1,797 images, every fifth one held out for the "
        "accuracies; 300 of the others for calibration",
    },
    "fashion_mnist_resnet": {
        "task": "Fashion-MNIST, 10 classes; input (28, 28, 1) in [0, 1], output logits",
        "network": "a residual network of six 3x3 convolutions behind a stem, with "
        "FilterResponseNormalizationTLU",
        "data": "Fashion-MNIST by Zalando Research, MIT licence; 60,000 images for training, the "
        "first 300 of them for calibration, 10,000 for the accuracies",
    },
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Images in [0, 1] and labels. `scale` turns the images into whole numbers."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    scale: int


def fashion_mnist(folder=FASHION_MNIST):
    """Reads Fashion-MNIST."""

    def read(name, offset):
        with gzip.open(Path(folder, name)) as file:
            return np.frombuffer(file.read(), "uint8", offset=offset)

    def part(name):
        images = read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
        return images.astype("float32") / 255, read(f"{name}-labels-idx1-ubyte.gz", 8)

    return Data(*part("train"), *part("t10k"), scale=255)


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
    logits = layers.Dense(10, name="logits")(x)
    return keras.Model(inputs, logits, name="fashion_mnist_resnet")


def trained_digits(data):
    """Returns the demo's network, trained, without its optimizer."""
    keras.utils.set_random_seed(0)
    trained, model = demo.build_model(), demo.build_model()
    demo.train(trained, data.train_images, data.train_labels, verbose=2)
    model.set_weights(trained.get_weights())
    return model


def trained_resnet(data, epochs=5, batch_size=128, seed=7):
    """Returns the residual network, trained, without its optimizer."""
    keras.utils.set_random_seed(seed)
    model = resnet()
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-5,
        epochs * len(data.train_images) // batch_size,
        warmup_target=4e-3,
        warmup_steps=150,
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(data.train_images, data.train_labels, batch_size=batch_size, epochs=epochs, verbose=2)
    return keras.Model(model.input, model.output, name=model.name)


def run_litert(path, images):
    """Logits of a .tflite file, a hundred images at a time."""
    runtime = LiteRT(path)
    return np.concatenate([runtime(images[i : i + 100])[0] for i in range(0, len(images), 100)])


def run_onnx(path, images):
    """Logits of an .onnx file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return session.run(None, {given.name: images})[0]


def run_saved_model(path, images):
    """Logits of a SavedModel folder."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))  # it owns the variables
    return loaded.serve(images).numpy()


def write(model, name, data):
    """Writes a model without optimizer to the folder of this name, in place of what is there."""
    folder = FOLDER / f".{name}.{os.getpid()}"
    folder.mkdir()
    outputs, files = {}, {}
    images = data.test_images

    def keep(kind, file, logits):
        path = folder / file
        parts = path.rglob("*") if path.is_dir() else [path]
        accuracy = float((logits.argmax(-1) == data.test_labels).mean())
        size = sum(part.stat().st_size for part in parts if part.is_file())
        files[kind] = {"file": file, "bytes": size, "accuracy": round(accuracy, 4)}
        outputs[kind] = logits[:64]
        print(f"{kind:24}{size:>10,} bytes   accuracy {accuracy:.4f}", flush=True)

    expected = model.predict(images, batch_size=500, verbose=0)
    model.save(folder / "model.keras")
    keep("keras", "model.keras", expected)
    model.save(folder / "model.h5")
    keep("h5", "model.h5", expected)
    model.save_weights(folder / "model.weights.h5")
    keep("weights", "model.weights.h5", expected)
    model.export(folder / "saved_model", format="tf_saved_model", verbose=False)
    keep("saved_model", "saved_model", run_saved_model(folder / "saved_model", images))
    model.export(folder / "model.onnx", format="onnx", verbose=False)
    keep("onnx", "model.onnx", run_onnx(folder / "model.onnx", images))
    for preset in PRESETS:
        path = folder / f"{preset or 'float32'}.tflite"
        keras_frn.export_tflite(
            model, path, quantization=preset, calibration_data=data.train_images[:300]
        )
        keep(path.stem, path.name, run_litert(path, images))

    whole = np.round(images[:64] * data.scale).astype("uint8")
    np.savez_compressed(
        folder / "golden.npz",
        images=whole,
        scale=data.scale,
        labels=data.test_labels[:64],
        **outputs,
    )
    about = {
        "name": name,
        **CARDS[name],
        "weights": model.count_params(),
        "golden": "golden.npz: images (divide by scale), labels, and the logits of each file",
        "files": files,
        "made_with": {
            "keras_frn": keras_frn.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "rebuild": f"python saved_models/build.py {name}",
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    os.replace(folder, FOLDER / name)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CARDS)
    parser.add_argument("--data", default=FASHION_MNIST, help="the folder of Fashion-MNIST")
    parser.add_argument("--weights", help="a .keras file to write again instead of training")
    arguments = parser.parse_args()
    if arguments.name == "digits":
        data, train = Data(*demo.digits(), scale=16), trained_digits
    else:
        data, train = fashion_mnist(arguments.data), trained_resnet
    if arguments.weights:
        model = keras.saving.load_model(arguments.weights, compile=False)
    else:
        model = train(data)
    write(model, arguments.name, data)


if __name__ == "__main__":
    main()
