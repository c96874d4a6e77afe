"""Writes a trained model in every format, with the logits that each gives, and a card."""

import json
import platform
import shutil
from importlib.metadata import version

import numpy as np

import keras_frn

PACKAGES = ("keras", "tensorflow", "ai-edge-litert", "ai-edge-quantizer", "onnxruntime")
PRESETS = {
    "float32": None,
    "float16": "float16",
    "dynamic": "dynamic",
    "int8": "int8",
    "int8_float_statistics": "int8_float_statistics",
    "int16x8": "int16x8",
}


def run_litert(path, images):
    """Logits of a .tflite file."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path), num_threads=1).get_signature_runner()
    (given,), (result,) = runner.get_input_details(), runner.get_output_details()
    return np.concatenate(
        [runner(**{given: images[i : i + 100]})[result] for i in range(0, len(images), 100)]
    )


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


def write(model, folder, calibration_data, images, labels, scale, card):
    """Writes a model without optimizer, anew.

    Args:
        model: The trained model, from images to logits.
        folder: Where to; what is there is deleted.
        calibration_data: For the integer presets.
        images, labels: What the accuracies and the golden outputs are measured on.
        scale: What turns the images into the whole numbers that `golden.npz` holds.
        card: Dict of what to say about model and data.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outputs, files = {}, {}

    def keep(name, file, logits):
        path = folder / file
        parts = path.rglob("*") if path.is_dir() else [path]
        accuracy = float((logits.argmax(-1) == labels).mean())
        size = sum(part.stat().st_size for part in parts if part.is_file())
        files[name] = {"file": file, "bytes": size, "accuracy": round(accuracy, 4)}
        outputs[name] = logits[:64]
        print(f"{name:24}{size:>10,} bytes   accuracy {accuracy:.4f}", flush=True)

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
    for name, preset in PRESETS.items():
        path = folder / f"{name}.tflite"
        keras_frn.export_tflite(model, path, preset, calibration_data)
        keep(name, path.name, run_litert(path, images))

    whole = np.round(images[:64] * scale).astype("uint8")
    np.savez_compressed(
        folder / "golden.npz", images=whole, scale=scale, labels=labels[:64], **outputs
    )
    about = {
        "name": folder.name,
        **card,
        "weights": model.count_params(),
        "golden": "golden.npz: images (divide by scale), labels, and the logits of each file",
        "files": files,
        "made_with": {
            "keras_frn": keras_frn.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "rebuild": f"python saved_models/build_{folder.name}.py",
    }
    (folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
