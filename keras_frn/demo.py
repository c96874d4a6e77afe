"""The main job, end to end: train on real digits, save, reload, export, compare."""

import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np

from .errors import ArgumentError
from .export.runtime import LiteRT
from .layers import FilterResponseNormalizationTLU
from .typing import Array, PathLike

__all__ = ["Row", "build_model", "digits", "run", "train"]

# A user's program, which imports nothing else to load the file.
_PREDICT = """
import sys
import numpy as np
import keras_frn
import keras
path, images, result = sys.argv[1:]
model = keras.models.load_model(path)
np.save(result, model.predict(np.load(images), verbose=0))
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the results: a format, and how close its file is to the trained model."""

    format: str
    accuracy: float
    largest_difference: float
    kilobytes: float


def digits() -> tuple[Array, Array, Array, Array]:
    """Scikit-learn's digits, 8x8 pixels in [0, 1], as `(x_train, y_train, x_test, y_test)`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The demo needs scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    x, y = (data.images[..., None] / 16.0).astype("float32"), data.target
    held_out = np.arange(len(x)) % 5 == 0
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def build_model() -> keras.Model:
    """A small convolutional network, FRN + TLU after each convolution."""
    model = keras.Sequential([keras.Input((8, 8, 1), name="image")], name="digits")
    for filters, strides in ((16, 1), (32, 2), (64, 1)):
        model.add(keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False))
        model.add(FilterResponseNormalizationTLU())
    model.add(keras.layers.GlobalAveragePooling2D())
    model.add(keras.layers.Dense(10, name="digit"))
    return model


def train(
    model: keras.Model, x: Array, y: Array, *, epochs: int = 24, verbose: int | str = "auto"
) -> keras.callbacks.History:
    """Trains with Adam and a cosine schedule; returns Keras' history."""
    batch_size = 32
    steps = epochs * math.ceil(len(x) / batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(5e-3, steps)
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(x, y, batch_size=batch_size, epochs=epochs, verbose=verbose)


def run(output: PathLike, *, epochs: int = 24) -> list[Row]:
    """Runs the demo, prints a table, and writes model files and `training.png` to a folder.

    Args:
        output: Path of a new or empty folder. It is filled at the end, all at once.
        epochs: Int, the epochs of training. Defaults to 24.

    Returns:
        A list of `Row`, one for the trained model and one for each format.

    Raises:
        ValueError: if the folder has files, or is a file.
        ImportError: if scikit-learn, matplotlib or LiteRT is not installed.
    """
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        problem = f"must be a new or empty folder. Received: {output}, which is or has a file."
        raise ArgumentError("output", f"{problem} Choose another, or empty it.")
    x_train, y_train, x_test, y_test = digits()
    try:
        import matplotlib  # before the work
    except ImportError as error:
        raise ImportError("The demo needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    print(
        f"Trains a network of FRN + TLU layers on {len(x_train)} images of digits, saves and "
        f"exports it,\nand compares each file with the model on {len(x_test)} other images."
    )
    keras.utils.set_random_seed(0)
    model = build_model()
    history = train(model, x_train, y_train, epochs=epochs, verbose=2).history
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".demo") as folder:
        partial = Path(folder, "files")
        partial.mkdir()
        expected, rows = model.predict(x_test, verbose=0), []
        for name, path, logits in _write_formats(model, partial, x_test, expected):
            accuracy = float(np.mean(np.argmax(logits, -1) == y_test))
            difference = float(np.max(np.abs(logits - expected)))
            rows.append(Row(name, accuracy, difference, _measure_kilobytes(path)))
        _plot(model, history, partial / "training.png")
        os.replace(partial, output)
    print(f"\n{'':18}{'accuracy':>10}{'difference':>12}{'kB':>8}")
    for row in rows:
        numbers = f"{row.accuracy:10.2%}{row.largest_difference:12.1e}{row.kilobytes:8.0f}"
        print(f"{row.format:18}{numbers}")
    print("difference: the largest one of an output (a logit) from the trained model's")
    print(f"\nWrote {output}: " + ", ".join(sorted(path.name for path in output.iterdir())))
    print(f"Next: keras-frn inspect {output / 'digits.keras'}")
    return rows


def _write_formats(
    model: keras.Model, folder: Path, x: Array, expected: Array
) -> Iterator[tuple[str, Path, Array]]:
    """Writes each format; yields its name, its file and its logits."""
    path = folder / "digits.keras"
    model.save(path)
    yield "trained model", path, expected
    yield ".keras, reloaded", path, _predict_in_new_process(path, x)
    if keras.backend.backend() != "tensorflow":
        print("SavedModel and LiteRT are exported under the TensorFlow backend.")
        return
    import tensorflow as tf

    path = folder / "saved_model"
    model.export(path, verbose=False)
    served = tf.saved_model.load(path)
    yield "SavedModel", path, served.serve(x).numpy()
    path = folder / "digits.tflite"
    model.export(str(path), format="litert", verbose=False)
    yield "LiteRT", path, LiteRT(path)(x)[0]


def _predict_in_new_process(path: Path, x: Array) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        images, result = Path(folder, "x.npy"), Path(folder, "logits.npy")
        np.save(images, x)
        subprocess.run([sys.executable, "-c", _PREDICT, path, images, result], check=True)
        return np.load(result)


def _measure_kilobytes(path: Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e3


def _plot(model: keras.Model, history: dict[str, list[float]], path: Path) -> None:
    """Training, and what the layers learned: gamma and tau against each other per layer."""
    from matplotlib import pyplot as plt

    layers = [x for x in model.layers if isinstance(x, FilterResponseNormalizationTLU)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(range(1, len(history["loss"]) + 1), history["loss"])
    left.set(title="Training", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    for number, layer in enumerate(layers, 1):
        gamma, tau = (keras.ops.convert_to_numpy(w) for w in (layer.gamma, layer.tau))
        right.scatter(gamma, tau, s=14, label=f"layer {number}, {len(tau)} channels")
    right.set(title="What the layers learned (start: 1, 0)", xlabel="gamma", ylabel="tau")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
