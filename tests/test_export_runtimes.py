"""Exports beyond TensorFlow's own formats, and what a SavedModel can do after it is reloaded."""

import sys

import keras
import numpy as np
import pytest
from backends import BACKEND

import keras_frn

# Other kernels with other orders of sums, relative to the largest output.
PARITY = 1e-5


def make(shape):
    model = keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(6, 3),
            keras_frn.FilterResponseNormalization(learned_epsilon=True),
            keras_frn.TLU(),
            keras.layers.Conv2D(4, 3),
            keras_frn.FilterResponseNormalizationTLU(affine=True),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    rng = np.random.default_rng(1)
    model.set_weights([w + 0.2 * rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def inputs(unknown):
    shapes = [(1, 9, 9, 3), (4, 7, 12, 3) if unknown else (4, 9, 9, 3)]
    rng = np.random.default_rng(2)
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


def assert_close(actual, expected):
    assert np.max(np.abs(actual - expected)) <= PARITY * np.max(np.abs(expected))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="exported from TensorFlow here")
def test_a_reloaded_saved_model_is_differentiable_and_has_a_serving_signature(tmp_path):
    import tensorflow as tf

    model = make((None, None, 3))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    for x in inputs(unknown=True):
        gradients = []
        for function in (model, loaded.serve):
            with tf.GradientTape() as tape:
                tape.watch(tensor := tf.constant(x))
                loss = tf.reduce_sum(function(tensor) ** 2)
            gradients.append(tape.gradient(loss, tensor).numpy())
        # TensorFlow optimizes the loaded graph, which then rounds in another order.
        assert_close(gradients[1], gradients[0])
        # What TensorFlow Serving calls: the signature, by name.
        signature = loaded.signatures["serving_default"]
        ((name, _),) = signature.structured_input_signature[1].items()
        (output,) = signature(**{name: tf.constant(x)}).values()
        assert_close(output.numpy(), model.predict(x, verbose=0))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="exported from TensorFlow here")
@pytest.mark.skipif(sys.platform != "linux", reason="the library has other names elsewhere")
@pytest.mark.parametrize("unknown", [False, True])
def test_tensorflows_c_api(unknown, tmp_path):
    import tensorflow_c

    model = make((None, None, 3) if unknown else (9, 9, 3))
    model.export(tmp_path / "saved", verbose=False)
    batches = inputs(unknown)
    for x, output in zip(batches, tensorflow_c.serve(tmp_path / "saved", batches), strict=True):
        expected = model.predict(x, verbose=0)
        assert output.shape == expected.shape
        assert_close(output, expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="exported from TensorFlow here")
@pytest.mark.parametrize("unknown", [False, True])
def test_openvino(unknown, tmp_path):
    openvino = pytest.importorskip("openvino")
    model = make((None, None, 3) if unknown else (9, 9, 3))
    path = str(tmp_path / "model.xml")
    model.export(path, format="openvino", verbose=False)
    # On processors with bfloat16 OpenVINO computes in it unless told otherwise.
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x in inputs(unknown):
        assert_close(compiled(x)[0], model.predict(x, verbose=0))


@pytest.mark.skipif(BACKEND != "jax", reason="exported from JAX here")
# Keras 3.15 passes it to JAX's converter.
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter is deprecated")
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("format_", ["tf_saved_model", "onnx"])
def test_exports_of_the_jax_backend(format_, unknown, tmp_path):
    if unknown and format_ != "onnx":  # JAX does not write such convolutions of unknown height
        model = keras.Sequential(
            [
                keras.Input((None, None, 3)),
                keras_frn.FilterResponseNormalization(),
                keras_frn.TLU(),
                keras_frn.FilterResponseNormalizationTLU(),
                keras.layers.GlobalAveragePooling2D(),
            ]
        )
    else:
        model = make((None, None, 3) if unknown else (9, 9, 3))
    batches = inputs(unknown)
    model(batches[0])  # Keras' ONNX export asks for a call
    path = str(tmp_path / "model")
    if format_ == "onnx":
        pytest.importorskip("jax2onnx", reason="of the [onnx-jax] extra")
        import onnxruntime

        model.export(path, format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        outputs = [session.run(None, {given.name: x})[0] for x in batches]
    else:
        tf = pytest.importorskip("tensorflow")
        model.export(path, verbose=False)
        loaded = tf.saved_model.load(path)
        outputs = [loaded.serve(x).numpy() for x in batches]
    for x, output in zip(batches, outputs, strict=True):
        assert_close(output, model.predict(x, verbose=0))
