"""The trained models that ship with the repository: later versions must keep opening them."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND

import keras_frn  # noqa: F401  (registers the layers)
from keras_frn import demo

FOLDER = Path(__file__).parents[1] / "saved_models" / "digits"
# Logits of about 20: five to ten float32 roundings, on other backends and processors too.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def golden():
    with np.load(FOLDER / "golden.npz") as data:
        return data["x"], data["logits"]


def check(predict, golden):
    x, logits = golden
    np.testing.assert_allclose(predict(x), logits, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_whole_models(name, golden):
    model = keras.models.load_model(FOLDER / name, compile=False)
    check(lambda x: model.predict(x, verbose=0), golden)


def test_weights(golden):
    model = demo.build_model()
    model.load_weights(FOLDER / "model.weights.h5")
    check(lambda x: model.predict(x, verbose=0), golden)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="loaded by TensorFlow")
def test_saved_model(golden):
    import tensorflow as tf

    reloaded = tf.saved_model.load(FOLDER / "saved_model")
    check(lambda x: reloaded.serve(tf.constant(x)).numpy(), golden)


def test_litert(golden):
    pytest.importorskip("ai_edge_litert", reason="of the [export] extra")
    check(demo._litert(FOLDER / "model.tflite"), golden)


def test_onnx(golden):
    onnxruntime = pytest.importorskip("onnxruntime", reason="of the [onnx] extra")
    session = onnxruntime.InferenceSession(
        str(FOLDER / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    check(lambda x: session.run(None, {name: x})[0], golden)


def test_accuracy_of_the_card():
    pytest.importorskip("sklearn", reason="of the [demo] extra")
    _, _, x, y = demo.digits()
    model = keras.models.load_model(FOLDER / "model.keras", compile=False)
    accuracy = np.mean(model.predict(x, verbose=0).argmax(-1) == y)
    about = json.loads((FOLDER / "about.json").read_text())
    # One image of 360 may fall on the other side on another processor.
    assert accuracy == pytest.approx(about["held_out_accuracy"], abs=1.5 / len(y))
    assert accuracy > 0.97


def test_sizes():
    files = [p for p in FOLDER.parent.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) < 1e6
    assert sum(p.stat().st_size for p in files) < 8e6
