"""The trained models that ship with the repository: every later version must open every file."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND

import keras_frn  # noqa: F401  (registers the layers)
from keras_frn import demo
from keras_frn.export.runtime import LiteRT

FOLDER = Path(__file__).parents[1] / "saved_models"
NAMES = ["digits", "fashion_mnist_resnet"]
# Logits of about 20: five to ten float32 roundings, on other backends and processors too.
FLOAT = 2e-4
# Integer kernels of another processor may round a value to the next step, which in the 8-bit files
# spreads to some percent of the largest logit.
LITERT = {
    "float32": FLOAT,
    "float16": 2e-3,
    "int16x8": 0.2,
    "dynamic": 1.0,
    "int8": 1.0,
    "int8_float_statistics": 1.0,
}


@pytest.fixture(scope="module", params=NAMES)
def folder(request):
    return FOLDER / request.param


@pytest.fixture(scope="module")
def about(folder):
    return json.loads((folder / "about.json").read_text())


@pytest.fixture(scope="module")
def golden(folder):
    with np.load(folder / "golden.npz") as data:
        return dict(data) | {"x": data["images"] / np.float32(data["scale"])}


def check(logits, golden, name, tolerance=FLOAT):
    np.testing.assert_allclose(logits, golden[name], atol=tolerance)
    # 64 images, each of 1.6%: at most 3 on the border of two classes.
    assert (logits.argmax(-1) == golden["keras"].argmax(-1)).mean() > 0.95


@pytest.mark.once
def test_card_lists_every_file_with_its_size(folder, about):
    found = {path.name for path in folder.iterdir()} - {"about.json", "golden.npz"}
    assert {entry["file"] for entry in about["files"].values()} == found
    for entry in about["files"].values():
        path = folder / entry["file"]
        parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        assert sum(part.stat().st_size for part in parts) == entry["bytes"]
        assert entry["accuracy"] > 0.90
        # The integer presets may lose half a point, and 360 digits have steps of 0.3.
        assert entry["accuracy"] > about["files"]["keras"]["accuracy"] - 0.006


@pytest.mark.parametrize("name", ["keras", pytest.param("h5", marks=pytest.mark.once)])
def test_whole_models_give_the_golden_outputs(name, folder, about, golden):
    model = keras.saving.load_model(folder / f"model.{name}", compile=False)
    check(model.predict(golden["x"], verbose=0), golden, name)
    assert model.count_params() == about["weights"] < 200_000


@pytest.mark.once
def test_weights_give_the_golden_outputs(folder, golden):
    model = keras.saving.load_model(folder / "model.keras", compile=False)
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    model.load_weights(folder / "model.weights.h5")
    check(model.predict(golden["x"], verbose=0), golden, "weights")


@pytest.mark.once
def test_weights_load_into_a_newly_built_network():
    model = demo.build_model()
    model.load_weights(FOLDER / "digits" / "model.weights.h5")
    with np.load(FOLDER / "digits" / "golden.npz") as golden:
        x = golden["images"] / np.float32(golden["scale"])
        check(model.predict(x, verbose=0), golden, "weights")


@pytest.mark.once
def test_files_have_no_optimizer(folder):
    model = keras.saving.load_model(folder / "model.keras")
    assert getattr(model, "optimizer", None) is None


@pytest.mark.skipif(BACKEND != "tensorflow", reason="loaded by TensorFlow")
def test_saved_model_gives_the_golden_outputs(folder, golden):
    import tensorflow as tf

    loaded = tf.saved_model.load(folder / "saved_model")
    check(loaded.serve(tf.constant(golden["x"])).numpy(), golden, "saved_model")


@pytest.mark.once
@pytest.mark.parametrize("name", LITERT)
def test_litert_gives_the_golden_outputs(name, folder, golden):
    pytest.importorskip("ai_edge_litert", reason="of the [export] extra")
    (logits,) = LiteRT(folder / f"{name}.tflite")(golden["x"])
    check(logits, golden, name, LITERT[name])


@pytest.mark.once
def test_onnx_gives_the_golden_outputs(folder, golden):
    onnxruntime = pytest.importorskip("onnxruntime", reason="of the [onnx] extra")
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"image": golden["x"]})
    check(logits, golden, "onnx")


@pytest.mark.once
def test_accuracy_of_the_digits_card():
    pytest.importorskip("sklearn", reason="of the [demo] extra")
    _, _, x, y = demo.digits()
    model = keras.models.load_model(FOLDER / "digits" / "model.keras", compile=False)
    accuracy = np.mean(model.predict(x, verbose=0).argmax(-1) == y)
    about = json.loads((FOLDER / "digits" / "about.json").read_text())
    # One image of 360 may fall on the other side on another processor.
    assert accuracy == pytest.approx(about["files"]["keras"]["accuracy"], abs=1.5 / len(y))
    assert accuracy > 0.97


@pytest.mark.once
def test_files_are_small():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert max(p.stat().st_size for p in files) < 1e6
    assert sum(p.stat().st_size for p in files) < 8e6
