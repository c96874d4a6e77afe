"""The main job, end to end: train on real digits, save, reload, export, compare."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

from .layers import FilterResponseNormalizationTLU

EPOCHS = 24

# Run in a process that imports nothing else, as a user's program would load the file.
_PREDICT = """
import sys
import numpy as np
import keras_frn
import keras
path, images, result = sys.argv[1:]
model = keras.models.load_model(path)
np.save(result, model.predict(np.load(images), verbose=0))
"""


def digits():
    """Scikit-learn's 1,797 digits, 8x8 pixels in [0, 1], every fifth one held out.

    Returns:
        `(x_train, y_train, x_test, y_test)`.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'The demo needs scikit-learn and matplotlib: pip install "keras-frn[demo]".'
        ) from error
    data = load_digits()
    x, y = (data.images[..., None] / 16.0).astype("float32"), data.target
    held_out = np.arange(len(x)) % 5 == 0
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


def build_model():
    """A small convolutional network, FRN + TLU after each convolution."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
            FilterResponseNormalizationTLU(),
            keras.layers.Conv2D(32, 3, padding="same", strides=2, use_bias=False),
            FilterResponseNormalizationTLU(),
            keras.layers.Conv2D(64, 3, padding="same", use_bias=False),
            FilterResponseNormalizationTLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(10, name="digit"),
        ],
        name="digits",
    )


def train(model, x, y, epochs=EPOCHS, verbose="auto"):
    """Trains with Adam and a cosine schedule; returns Keras' history."""
    batch = 32
    schedule = keras.optimizers.schedules.CosineDecay(
        5e-3, decay_steps=epochs * -(-len(x) // batch)
    )
    model.compile(
        keras.optimizers.Adam(schedule),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(x, y, batch_size=batch, epochs=epochs, verbose=verbose)


def run(output):
    """Runs the demo and leaves model files, `results.csv` and `training.png` in a folder.

    Args:
        output: Folder, new or empty.

    Returns:
        Dict from format to its accuracy, largest difference of logits from the trained model,
        size in bytes and milliseconds per image.

    Raises:
        ValueError: if the folder exists and is not empty.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"`output` must be a new or empty folder. Received: output={str(output)!r}, which has "
            "other files. Choose another with `--output DIR`, or empty it."
        )
    x_train, y_train, x_test, y_test = digits()
    import matplotlib  # before the work, as the extra may be missing

    matplotlib.use("Agg")
    keras.utils.set_random_seed(0)
    model = build_model()
    print(f"Training on {len(x_train)} digits, {len(x_test)} held out.")
    history = train(model, x_train, y_train).history
    output.mkdir(parents=True, exist_ok=True)

    expected = model.predict(x_test, verbose=0)
    rows = {"trained model": _row(expected, expected, y_test, model.predict_on_batch, x_test, None)}
    path = output / "digits.keras"
    model.save(path)
    reloaded = _predict_in_new_process(path, x_test)
    here = keras.models.load_model(path)
    rows[".keras, reloaded"] = _row(reloaded, expected, y_test, here.predict_on_batch, x_test, path)
    for name, path, predict in _exports(model, output):
        rows[name] = _row(predict(x_test), expected, y_test, predict, x_test, path)
    _write_table(rows, output / "results.csv")
    _plot(model, history, output / "training.png")
    print(f"Files in {output}: " + ", ".join(sorted(p.name for p in output.iterdir())))
    return rows


def _exports(model, output):
    """Exports and yields name, path and a function from images to logits."""
    if keras.backend.backend() != "tensorflow":
        print("SavedModel and LiteRT are exported under the TensorFlow backend.")
        return
    import tensorflow as tf

    path = output / "saved_model"
    model.export(path, verbose=False)
    served = tf.saved_model.load(path)
    yield "SavedModel", path, lambda x: served.serve(tf.constant(x)).numpy()
    path = output / "digits.tflite"
    model.export(path, format="litert", verbose=False)
    yield "LiteRT", path, _litert(path)


def _litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    (entry,), (exit_,) = interpreter.get_input_details(), interpreter.get_output_details()

    def predict(x):
        interpreter.resize_tensor_input(entry["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(entry["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(exit_["index"])

    return predict


def _predict_in_new_process(path, x):
    with tempfile.TemporaryDirectory() as folder:
        images, result = Path(folder, "x.npy"), Path(folder, "logits.npy")
        np.save(images, x)
        subprocess.run([sys.executable, "-c", _PREDICT, path, images, result], check=True)
        return np.load(result)


def _row(logits, expected, labels, predict, x, path):
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        predict(x)
        seconds.append(time.perf_counter() - start)
    return {
        "accuracy": float(np.mean(np.argmax(logits, -1) == labels)),
        "largest difference": float(np.max(np.abs(logits - expected))),
        "bytes": None if path is None else _size(path),
        "ms per image": 1e3 * float(np.median(seconds)) / len(x),
    }


def _size(path):
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _write_table(rows, path):
    """Prints the table and writes it as CSV."""
    print(f"\n{'':18}{'accuracy':>10}{'difference':>12}{'kB':>8}{'ms/image':>10}")
    lines = ["format,accuracy,largest_difference,bytes,ms_per_image"]
    for name, row in rows.items():
        accuracy, difference, size, ms = row.values()
        kilobytes = "" if size is None else f"{size / 1e3:.0f}"
        print(f"{name:18}{accuracy:10.2%}{difference:12.1e}{kilobytes:>8}{ms:10.4f}")
        lines.append(f'"{name}",{accuracy:.4f},{difference:.3e},{size or ""},{ms:.4f}')
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)


def _plot(model, history, path):
    """Training, and what the layers learned: gamma and tau against each other per layer."""
    from matplotlib import pyplot as plt

    layers = [x for x in model.layers if isinstance(x, FilterResponseNormalizationTLU)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(range(1, len(history["loss"]) + 1), history["loss"])
    left.set(title="Training", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    for number, layer in enumerate(layers, 1):
        gamma, tau = (keras.ops.convert_to_numpy(w) for w in (layer.gamma, layer.tau))
        right.scatter(gamma, tau, s=14, label=f"layer {number}, {len(tau)} channels")
    right.axhline(0, color="0.7", linewidth=0.8)
    right.axvline(1, color="0.7", linewidth=0.8)
    right.set(title="What the layers learned (start: 1, 0)", xlabel="gamma", ylabel="tau")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
