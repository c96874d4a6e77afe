"""The ResNet in `saved_models/fashion_mnist_resnet`: every later version must open every file."""

import json
import pathlib

import keras
import numpy as np
import pytest
from backends import BACKEND

import keras_frn  # noqa: F401  (registers the layers)

FOLDER = pathlib.Path(__file__).parents[1] / "saved_models" / "fashion_mnist_resnet"
ABOUT = json.loads((FOLDER / "about.json").read_text())
# Logits of about 20: some float32 roundings, on other processors too. Integer kernels of another
# processor may round a value to the next step, which in the 8-bit files spreads to some percent of
# the largest logit.
TOLERANCE = {
    "float32": 2e-4,
    "float16": 2e-3,
    "int16x8": 0.2,
    "dynamic": 1.0,
    "int8": 1.0,
    "int8_float_statistics": 1.0,
}


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "golden.npz") as data:
        return dict(data) | {"x": data["images"].astype("float32") / 255}


def test_the_card_lists_every_file_with_its_size():
    found = {path.name for path in FOLDER.iterdir()} - {"about.json", "golden.npz"}
    assert {entry["file"] for entry in ABOUT["files"].values()} == found
    for entry in ABOUT["files"].values():
        path = FOLDER / entry["file"]
        parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        assert sum(part.stat().st_size for part in parts) == entry["bytes"]
        assert max(part.stat().st_size for part in parts) < 2**20
        # On 10,000 test images; the float model has 0.9072.
        assert entry["test_accuracy"] > 0.90


def test_keras(golden):
    model = keras.saving.load_model(FOLDER / "model.keras")
    np.testing.assert_allclose(model.predict(golden["x"], verbose=0), golden["keras"], atol=2e-4)
    assert not hasattr(model, "optimizer") or model.optimizer is None
    assert model.count_params() == ABOUT["weights"] < 200_000


@pytest.mark.skipif(BACKEND != "tensorflow", reason="loaded by TensorFlow")
def test_saved_model(golden):
    import tensorflow as tf

    loaded = tf.saved_model.load(FOLDER / "saved_model")
    logits = loaded.serve(tf.constant(golden["x"])).numpy()
    np.testing.assert_allclose(logits, golden["saved_model"], atol=2e-4)


def test_onnx(golden):
    onnxruntime = pytest.importorskip("onnxruntime", reason="of the [onnx] extra")
    session = onnxruntime.InferenceSession(
        str(FOLDER / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"image": golden["x"]})
    np.testing.assert_allclose(logits, golden["onnx"], atol=2e-4)


@pytest.mark.parametrize("name", TOLERANCE)
def test_litert(name, golden):
    litert = pytest.importorskip("ai_edge_litert.interpreter", reason="of the [export] extra")
    runner = litert.Interpreter(str(FOLDER / f"{name}.tflite")).get_signature_runner()
    logits = runner(image=golden["x"])["output_0"]
    np.testing.assert_allclose(logits, golden[name], atol=TOLERANCE[name])
    # 64 images: at most 3 on the border of two classes.
    assert (logits.argmax(-1) == golden["keras"].argmax(-1)).mean() > 0.95
