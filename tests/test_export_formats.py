"""`model.export` of Keras, through the runtime of each format."""

import keras
import numpy as np
import pytest
from backends import BACKEND

import keras_frn
from keras_frn.export.runtime import LiteRT

pytestmark = pytest.mark.skipif(BACKEND != "tensorflow", reason="exports of the TensorFlow backend")

# Kernels of three runtimes, each with its own order of sums: relative to the output's size.
PARITY = 1e-5

SIZES = pytest.mark.parametrize(
    "shape", [(8, 8, 3), (None, None, 3)], ids=["fixed size", "unknown size"]
)
JIT = pytest.mark.parametrize("jit_compile", [None, True], ids=["jit_compile=None", "=True"])


def make(shape, jit_compile, rng):
    model = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(6, 3, padding="same", use_bias=False),
            keras_frn.FilterResponseNormalization(jit_compile=jit_compile),
            keras_frn.TLU(jit_compile=jit_compile, affine=True),
            keras.layers.Conv2D(4, 3, padding="same", use_bias=False),
            keras_frn.FilterResponseNormalizationTLU(
                learned_epsilon="per_channel", jit_compile=jit_compile
            ),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5),
        ]
    )
    model.set_weights([w + 0.2 * rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def check(model, predict, shape, rng):
    sizes = [(8, 8)] if shape[0] else [(8, 8), (11, 5)]
    for batch in (1, 3):
        for height, width in sizes:
            x = rng.normal(size=(batch, height, width, 3)).astype("float32")
            expected = model.predict(x, verbose=0)
            error = np.max(np.abs(predict(x) - expected)) / np.max(np.abs(expected))
            assert error <= PARITY


@JIT
@SIZES
def test_saved_model_equals_the_model(shape, jit_compile, rng, tmp_path):
    import tensorflow as tf

    model = make(shape, jit_compile, rng)
    model.export(tmp_path / "saved", verbose=False)
    reloaded = tf.saved_model.load(tmp_path / "saved")
    check(model, lambda x: reloaded.serve(tf.constant(x)).numpy(), shape, rng)


@JIT
@SIZES
def test_litert_file_has_built_in_operators_only(shape, jit_compile, rng, tmp_path):
    model = make(shape, jit_compile, rng)
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False)
    # Without Flex, so that a file that needs TensorFlow's own operators is refused.
    runtime = LiteRT(path, is_plain=True)
    check(model, lambda x: runtime(x)[0], shape, rng)
    operators = runtime.count_operators()
    assert "CUSTOM" not in operators
    assert operators["MEAN"] == 3, "two layers and the pooling"
    assert operators["MAXIMUM"] == 2


# tf2onnx asks NumPy 2 for names that it has given up.
@pytest.mark.filterwarnings("ignore:In the future `np.:FutureWarning")
@JIT
@SIZES
def test_onnx_equals_the_model(shape, jit_compile, rng, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="of the [onnx] extra")
    pytest.importorskip("tf2onnx", reason="of the [onnx] extra")
    model = make(shape, jit_compile, rng)
    path = str(tmp_path / "model.onnx")
    model.predict(
        np.zeros((1, 8, 8, 3), "float32"), verbose=0
    )  # Keras' ONNX export asks for a call
    model.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    check(model, lambda x: session.run(None, {name: x})[0], shape, rng)
