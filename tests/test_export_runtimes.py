"""Exports beyond TensorFlow's own formats, and what a SavedModel can do after it is reloaded."""

import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND
from exporting import run_vela

import keras_frn
from keras_frn.export.presets import PRESETS
from keras_frn.export.runtime import LiteRT

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
def test_reloaded_saved_model_has_gradients_and_a_serving_signature(tmp_path):
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
def test_tensorflow_c_api(unknown, tmp_path):
    import tensorflow_c

    model = make((None, None, 3) if unknown else (9, 9, 3))
    model.export(tmp_path / "saved", verbose=False)
    batches = inputs(unknown)
    for x, output in zip(batches, tensorflow_c.serve(tmp_path / "saved", batches), strict=True):
        expected = model.predict(x, verbose=0)
        assert output.shape == expected.shape
        assert_close(output, expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="exported from TensorFlow here")
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="OpenVINO relies on exec() setting locals")
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


@pytest.mark.skipif(BACKEND != "torch", reason="exported from PyTorch here")
# What PyTorch's tracer says of sizes that Keras and our layers read.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning" if BACKEND == "torch" else "default")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_openvino_from_pytorch(tmp_path):
    openvino = pytest.importorskip("openvino")
    model = make((9, 9, 3))
    path = str(tmp_path / "model.xml")
    model.export(path, format="openvino", verbose=False)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x in inputs(unknown=False):
        assert_close(compiled(x)[0], model.predict(x, verbose=0))


@pytest.mark.skipif(BACKEND != "jax", reason="exported from JAX here")
# Keras 3.15 passes it to JAX's converter.
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter is deprecated")
@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("format_", ["tf_saved_model", "onnx"])
def test_jax_exports(format_, unknown, tmp_path):
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


# Steps of the output's integer between two runtimes that round on their own: 3 in 8 bits, where 1
# was seen, and 8 in 16 bits, where 3 to 4 were. None: the runtime refuses the file.
MICRO = {
    None: 0,
    "float16": None,
    "dynamic": None,
    "int8": 3,
    "int8_float_statistics": 3,
    "int16x8": 8,
}
# Operators that Vela leaves on the CPU beside an Ethos-U55.
VELA = {
    ("int8", True): 0,
    ("int8", False): 2,
    ("int16x8", True): 0,
    ("int8_float_statistics", True): 13,
    ("dynamic", False): 11,
}
on_tensorflow = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="files of TensorFlow's converter"
)


def quantized(preset, path, integer_io):
    """A file of a network whose weights are enough for the converter to store in 8 bits."""
    pytest.importorskip("ai_edge_quantizer", reason="of the [export] extra")
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            layers.Conv2D(16, 3),
            keras_frn.FilterResponseNormalizationTLU(),
            layers.Conv2D(32, 3),
            layers.GlobalAveragePooling2D(),
        ]
    )
    rng = np.random.default_rng(1)
    model.set_weights([w + 0.1 * rng.normal(size=w.shape) for w in model.get_weights()])
    x = rng.normal(size=(64, 9, 9, 3)).astype("float32")
    return (
        model,
        x,
        keras_frn.export_tflite(
            model, path, quantization=preset, calibration_data=x, integer_io=integer_io
        ),
    )


@on_tensorflow
@pytest.mark.parametrize("preset", MICRO)
def test_each_preset_in_litert_and_tflite_micro(preset, tmp_path):
    is_integer = PRESETS[preset].is_calibrated
    model, x, report = quantized(preset, tmp_path / "m.tflite", is_integer)
    litert, expected = LiteRT(report.path), model.predict(x, verbose=0)
    outputs = litert(x)[0]
    assert np.max(np.abs(outputs - expected)) <= PRESETS[preset].bound * np.ptp(expected)

    micro = pytest.importorskip("tflite_micro").runtime.Interpreter
    content = Path(report.path).read_bytes()
    if MICRO[preset] is None:
        with pytest.raises(RuntimeError, match="failed to allocate"):
            micro.from_bytes(content, arena_size=2**20)
        return
    interpreter = micro.from_bytes(content, arena_size=2**20)
    (given,) = litert.interpreter.get_input_details()
    (taken,) = litert.interpreter.get_output_details()
    for row, output in zip(x[:16], outputs):
        if is_integer:
            scale, zero = given["quantization"]
            ends = np.iinfo(given["dtype"])
            row = np.clip(np.round(row / scale) + zero, ends.min, ends.max).astype(given["dtype"])
        interpreter.set_input(row[None], 0)
        interpreter.invoke()
        found = interpreter.get_output(0)[0]
        if is_integer:
            scale, zero = taken["quantization"]
            steps = found.astype(int) - zero - np.round(output / scale)
            assert np.max(np.abs(steps)) <= MICRO[preset]
        else:
            assert_close(found, output)


@on_tensorflow
def test_tflite_micro_reads_the_weights_of_a_large_file(tmp_path):
    """ai-edge-quantizer puts weights of more than 256 kB after the FlatBuffer."""
    micro = pytest.importorskip("tflite_micro").runtime.Interpreter
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((5, 5, 64)),
            keras.layers.Conv2D(512, 3, use_bias=False),
            keras_frn.FilterResponseNormalizationTLU(),
            keras.layers.Conv2D(4, 1),
        ]
    )
    x = rng.normal(size=(64, 5, 5, 64)).astype("float32")
    path = tmp_path / "m.tflite"
    report = keras_frn.export_tflite(
        model, path, quantization="int8", calibration_data=x, integer_io=True
    )
    assert report.size > 300_000
    litert = LiteRT(path)
    (given,) = litert.interpreter.get_input_details()
    (taken,) = litert.interpreter.get_output_details()
    interpreter = micro.from_bytes(path.read_bytes(), arena_size=2**20)
    scale, zero = given["quantization"]
    interpreter.set_input(np.clip(np.round(x[:1] / scale) + zero, -128, 127).astype("int8"), 0)
    interpreter.invoke()
    scale, zero = taken["quantization"]
    steps = interpreter.get_output(0).astype(int) - zero - np.round(litert(x[:1])[0] / scale)
    # Its kernels round some halves the other way; with wrong weights it was 100 steps and more.
    assert np.max(np.abs(steps)) <= 3


def count_on_cpu(report, folder):
    """How many operators Vela leaves on the CPU."""
    (left,) = re.findall(r"CPU operators = (\d+) ", run_vela(report.path, folder))
    return int(left)


@on_tensorflow
@pytest.mark.parametrize(("preset", "integer_io"), VELA)
def test_each_preset_in_vela(preset, integer_io, tmp_path):
    pytest.importorskip("ethosu")
    _, _, report = quantized(preset, tmp_path / "m.tflite", integer_io)
    assert count_on_cpu(report, tmp_path) == VELA[preset, integer_io]


@on_tensorflow
@pytest.mark.filterwarnings("ignore:.*different sample")
@pytest.mark.parametrize("shape", [(6000, 2), (32, 32, 32, 1), (2, 80, 80, 1)])
def test_large_means_run_on_the_npu(shape, tmp_path, rng):
    """Of sequences and volumes, whose positions in one row would be too many for it."""
    pytest.importorskip("ai_edge_quantizer", reason="of the [export] extra")
    pytest.importorskip("ethosu")
    layers = keras.layers
    convolution = layers.Conv1D if len(shape) == 2 else layers.Conv3D
    model = keras.Sequential(
        [
            keras.Input(shape),
            convolution(4, 1),
            keras_frn.FilterResponseNormalizationTLU(),
            convolution(4, 1),
        ]
    )
    report = keras_frn.export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization="int8",
        calibration_data=rng.uniform(-1, 1, (2, *shape)).astype("float32"),
        integer_io=True,
        input_signature=[keras.InputSpec(shape=(1, *shape))],
    )
    assert count_on_cpu(report, tmp_path) == 0
    assert report.max_error_fraction < 0.1, "a few steps of 8 bits"


@on_tensorflow
# tf2onnx asks NumPy 2 for names that it has given up.
@pytest.mark.filterwarnings("ignore:In the future `np.:FutureWarning")
def test_onnxruntime_static_int8_needs_the_list_of_products(tmp_path):
    """By default it also quantizes the mean squares, which fails if channels differ in scale."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="of the [onnx] extra")
    pytest.importorskip("tf2onnx", reason="of the [onnx] extra")
    from onnxruntime import quantization

    model, rng = make((9, 9, 3)), np.random.default_rng(3)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.set_weights(
                [w * 10 ** np.linspace(-2, 0, w.shape[-1]) for w in layer.get_weights()]
            )
    x = rng.normal(size=(64, 9, 9, 3)).astype("float32")
    expected = model.predict(x, verbose=0)
    path, result = str(tmp_path / "model.onnx"), str(tmp_path / "int8.onnx")
    model.export(path, format="onnx", verbose=False)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, name):
            self.rows = iter([{name: x[i : i + 1]} for i in range(64)])

        def get_next(self):
            return next(self.rows, None)

    def share(**options):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        quantization.quantize_static(path, result, Reader(name), **options)
        session = onnxruntime.InferenceSession(result, providers=["CPUExecutionProvider"])
        return np.abs(session.run(None, {name: x})[0] - expected).max() / np.ptp(expected)

    with_products = share(op_types_to_quantize=["Conv", "MatMul", "Gemm"])
    assert with_products < 0.2 < share()
