"""Trains the demo's network and writes `saved_models/digits/`: every format, golden numbers, card.

    python saved_models/build_digits.py

Later versions of the package must open these files and give the golden outputs, so rebuild them
only to add a format, and keep the old ones."""

import json
import platform
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_frn
from keras_frn import demo

FOLDER = Path(__file__).parent / "digits"


def main():
    FOLDER.mkdir(exist_ok=True)
    x_train, y_train, x_test, y_test = demo.digits()
    keras.utils.set_random_seed(0)
    trained = demo.build_model()
    demo.train(trained, x_train, y_train, verbose=2)
    # Without optimizer: the files are for inference and fine-tuning.
    model = demo.build_model()
    model.set_weights(trained.get_weights())

    model.save(FOLDER / "model.keras")
    model.save_weights(FOLDER / "model.weights.h5")
    model.save(FOLDER / "model.h5")
    model.export(FOLDER / "saved_model", verbose=False)
    model.export(FOLDER / "model.tflite", format="litert", verbose=False)
    logits = model.predict(x_test, verbose=0)
    model.export(FOLDER / "model.onnx", format="onnx", verbose=False)
    np.savez_compressed(FOLDER / "golden.npz", x=x_test[:32], logits=logits[:32])
    about = {
        "network": "three 3x3 convolutions, each with FilterResponseNormalizationTLU",
        "parameters": model.count_params(),
        "data": "scikit-learn load_digits, 1,797 images of 8x8, every fifth one held out",
        "held_out_accuracy": round(float(np.mean(logits.argmax(-1) == y_test)), 4),
        "input": "float32 (batch, 8, 8, 1) in [0, 1]",
        "output": "float32 (batch, 10), logits",
        "rebuild": "python saved_models/build_digits.py",
        "made_with": {
            "keras_frn": keras_frn.__version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "python": platform.python_version(),
        },
    }
    (FOLDER / "about.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
