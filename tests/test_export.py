import errno
import os
import re

import keras
import numpy as np
import pytest
from exporting import (
    FLOAT,
    PRESETS,
    exports,
    frn,
    frn_tlu_layer,
    images,
    run_vela,
    shuffled_weights,
    small_model,
)
from keras import layers
from reference import close

from keras_frn.export import ExportReport, export_tflite
from keras_frn.export.runtime import LiteRT, LiteRTError

pytestmark = exports
pytest.importorskip("ai_edge_litert")


@pytest.mark.parametrize("preset", PRESETS)
def test_file_outputs_equal_model_outputs(preset, tmp_path, rng):
    model, x = small_model(), images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    expected = model.predict(x, verbose=0)
    (actual,) = LiteRT(report.path)(x)
    close(actual, expected, PRESETS[preset])
    assert report.max_error == pytest.approx(np.abs(actual - expected).max(), rel=0.05, abs=1e-6)
    assert report.agreement == (actual.argmax(-1) == expected.argmax(-1)).mean()
    assert report.size == os.path.getsize(report.path)
    assert report.samples == 64
    assert report.quantization == preset
    assert report.equalized == ("first", "second")
    # Unresized, a model of unknown batch size runs on one sample.
    interpreter = LiteRT(report.path).interpreter
    assert interpreter.get_input_details()[0]["shape"].tolist() == [1, 12, 12, 3]


@pytest.mark.parametrize("preset", [None, "float16", "dynamic"])
def test_float_file_has_one_partition_and_eight_operators_per_frn_tlu(preset, tmp_path, rng):
    report = export_tflite(
        small_model(), tmp_path / "m.tflite", quantization=preset, calibration_data=images(rng)
    )
    # 2 convolutions, 2 * 8 (MUL MEAN ADD RSQRT MUL MUL ADD MAXIMUM), pooling, dense.
    count = sum(n for name, n in report.operators.items() if name != "DEQUANTIZE")
    assert count == 20
    assert report.partitions == 1
    assert report.delegated == sum(report.operators.values())


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics", "int16x8"])
def test_extreme_inputs_stay_in_the_calibrated_range(preset, tmp_path, rng):
    x = images(rng)
    model = small_model()
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    seen = model.predict(x, verbose=0)
    # 16-bit integers reach as far on both sides of zero, and four times as far as the data. One
    # step of 255 may be added, as the range is rounded outwards.
    low, high = seen.min(), seen.max()
    if preset == "int16x8":
        low, high = -4 * np.abs(seen).max(), 4 * np.abs(seen).max()
    step = 1.01 * (high - low) / 255
    for extreme in (0 * x, 0.01 * x, 1e6 * x, np.full_like(x, 1e3)):
        (outputs,) = LiteRT(report.path)(extreme)
        assert np.isfinite(outputs).all()
        assert outputs.min() >= low - step
        assert outputs.max() <= high + step


@pytest.mark.parametrize("preset", [None, "int8"])
def test_multiple_inputs_and_named_outputs(preset, tmp_path, rng):
    image, extra = keras.Input((8, 8, 3), name="z_image"), keras.Input((4,), name="a_extra")
    x = layers.GlobalAveragePooling2D()(frn_tlu_layer()(layers.Conv2D(6, 3)(image)))
    x = layers.Concatenate()([x, extra])
    outputs = {"scores": layers.Dense(3)(x), "amount": layers.Dense(1)(x)}
    model = shuffled_weights(keras.Model([image, extra], outputs))
    data = {"z_image": images(rng, 64, (8, 8, 3)), "a_extra": images(rng, 64, (4,))}
    as_list = [data["z_image"], data["a_extra"]]
    for calibration_data in (data, as_list, [(as_list, None)]):
        report = export_tflite(
            model, tmp_path / "m.tflite", quantization=preset, calibration_data=calibration_data
        )
        assert report.max_error < (1e-5 if preset is None else 0.1)
        assert report.samples == 64


@keras.saving.register_keras_serializable(package="test_export")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolution = layers.Conv2D(4, 3)
        self.normalization = frn_tlu_layer(name="within")
        self.pooling = layers.GlobalAveragePooling2D()

    def call(self, inputs):
        return self.pooling(self.normalization(self.convolution(inputs)))


def test_subclassed_model_is_exported_without_changes(tmp_path, rng):
    x, model = images(rng), Subclassed()
    model(x)
    with pytest.warns(UserWarning, match="nothing is quantized: .* as a float32 file"):
        report = export_tflite(
            model, tmp_path / "m.tflite", quantization="dynamic", calibration_data=x
        )
    assert "dynamic, nothing quantized" in str(report).splitlines()[0]
    assert report.max_error < FLOAT
    report = export_tflite(model, tmp_path / "m.tflite", quantization="int8", calibration_data=x)
    assert report.not_equalized == {"within": "it is part of a subclassed model"}
    assert "within" in report.warnings[0]
    mixed = Subclassed(dtype="mixed_float16")
    mixed(x)
    with pytest.raises(ValueError, match=r"subclassed model with dtypes .*'float16'"):
        export_tflite(mixed, tmp_path / "mixed.tflite")


ERRORS = {
    "preset": (dict(quantization="int4"), r"`quantization` must be one of .* Received: .*'int4'"),
    "no data": (dict(quantization="int8"), r"`calibration_data` must be given .*100 to 500"),
    "empty": (
        dict(quantization="int16x8", calibration_data=iter([])),
        "`calibration_data` must hold at least one sample",
    ),
    "shape": (
        dict(calibration_data=np.zeros((2, 5, 5, 3))),
        r"`calibration_data` must have the shape .*\(2, 5, 5, 3\)",
    ),
    "infinite": (
        dict(calibration_data=np.full((1, 12, 12, 3), np.inf)),
        "`calibration_data` must be finite",
    ),
    "two inputs": (
        dict(calibration_data=[([np.zeros((1, 12, 12, 3))] * 2, None)]),
        "`calibration_data` must hold 1 inputs per sample. Received: 2",
    ),
    "integer_io": (dict(integer_io=True), "`integer_io` must be False unless .*Received: True"),
    "ending": (
        dict(path="model.lite"),
        r"`path` must end with .tflite. Received: path='model.lite'",
    ),
    "folder": (dict(path="absent/m.tflite"), "`path` must be in a folder that exists"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        export_tflite(small_model(), **{"path": "m.tflite", **arguments})
    assert not list(tmp_path.iterdir())


def test_file_refused_by_the_runtime_is_not_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise LiteRTError("XNNPACK takes no output that is so much smaller than its products")

    monkeypatch.setattr("keras_frn.export.LiteRT", refuse)
    with pytest.raises(ValueError, match=r"`model` must become a file that LiteRT runs.*XNNP"):
        export_tflite(small_model(), tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["temporary folder", "file"])
def test_unwritable_disk_raises_os_error(what, tmp_path, monkeypatch):
    """The temporary folder is absent or full, or the disk becomes full with the file."""
    (tmp_path / "m.tflite").write_bytes(b"before")
    if what == "file":
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: (_ for _ in ()).throw(full))
    else:
        monkeypatch.setattr("tempfile.tempdir", "/proc/none")
    with pytest.raises(OSError, match=r"No (space|usable|such)") as caught:
        export_tflite(small_model(), tmp_path / "m.tflite")
    assert not isinstance(caught.value, ValueError)
    assert (tmp_path / "m.tflite").read_bytes() == b"before"


def test_full_disk_inside_tensorflow_raises_os_error(tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow.saved_model as saved_model  # which Keras imports so, in place of the other

    def fill(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(saved_model, "save", fill)
    with pytest.raises(OSError, match=r"cannot be written to .*No space left"):
        export_tflite(small_model(), tmp_path / "m.tflite")


class InNumPy(layers.Layer):
    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, inputs):
        return keras.ops.convert_to_tensor(np.sort(np.asarray(inputs)))


REFUSED = {
    "no operator": (lambda x: keras.ops.erfinv(x), None, "LiteRT has no operator for Erfinv"),
    "several": (lambda x: keras.ops.fft2((x, x))[0], "int8", "no operator for Complex, FFT2D"),
    "no integer form": (keras.ops.floor, "int16x8", "no integer form of FLOOR. 'int8_float_stat"),
    "integers of the model's own": (
        lambda x: keras.ops.matmul(keras.ops.cast(x, "int8"), np.ones((3, 2), "int8")),
        None,
        r"converter says: (?!.*loc\()",  # places in a graph; what is said depends on the version
    ),
    "not traced": (InNumPy(), "dynamic", r"cannot trace it: .*InNumPy.call\(\).*NumPy call"),
    "ConvLSTM": (
        lambda x: layers.ConvLSTM2D(2, 3)(x[:, None]),
        None,
        r"`input_signature` must fix the batch .*Received: \(None, 8, 8, 3\)\. Pass .*\(1, 8, 8, 3",
    ),
    "loop": (
        lambda x: layers.ConvLSTM2D(2, 3)(x[:, None]),
        "int8",
        r"`input_signature` must fix the batch size of recurrent layers, as LiteRT has no",
    ),
}


def test_layers_in_3d_of_unknown_sizes_are_told_to_fix_them(tmp_path, rng):
    inputs = keras.Input((None, None, 8, 2))
    model = keras.Model(inputs, layers.Conv3D(3, 3)(layers.MaxPooling3D()(inputs)))
    with pytest.raises(ValueError, match=r"must fix .* MaxPool3D\. .*Pass .*\(1, 32, 32, 8, 2\)"):
        export_tflite(model, tmp_path / "m.tflite")
    signature = [keras.InputSpec(shape=(1, 32, 32, 8, 2))]
    report = export_tflite(model, tmp_path / "m.tflite", input_signature=signature)
    assert "MAX_POOL_2D" in report.operators


@pytest.mark.parametrize("name", REFUSED)
def test_refused_operator_is_named_in_a_short_error(name, tmp_path, rng):
    function, preset, message = REFUSED[name]
    inputs = keras.Input((8, 8, 3))
    model, path = keras.Model(inputs, function(inputs)), tmp_path / "m.tflite"
    path.write_bytes(b"before")
    data = images(rng, 64, (8, 8, 3))
    with pytest.raises(ValueError, match=message) as caught:
        export_tflite(model, path, quantization=preset, calibration_data=data)
    assert len(str(caught.value)) < 600, "not the pages that the converter prints"
    assert ("recurrent" in str(caught.value)) == (name in ("ConvLSTM", "loop"))
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("preset", [None, "int8"])
def test_model_that_keras_has_quantized_is_refused_with_a_remedy(preset, tmp_path, rng):
    model, data = small_model(), images(rng)
    model.quantize("int8")
    with pytest.raises(ValueError, match=r"Export the model as it was before `model\.quantize`$"):
        export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=data)


def test_model_compiled_with_a_custom_loss_is_exported(tmp_path, rng):
    model = small_model()
    model.compile("sgd", loss=lambda y, z: keras.ops.mean(z - y))
    weights = [w.numpy() for w in model.weights]
    export_tflite(model, tmp_path / "m.tflite", quantization="int8", calibration_data=images(rng))
    for before, after in zip(weights, model.weights):
        np.testing.assert_array_equal(before, after.numpy())
    assert model.get_layer("first").epsilon == 1e-6


def test_report_describes_the_file(tmp_path, rng, capsys):
    """Errors as shares of the range with their limit, and what stayed in float."""
    inputs = keras.Input((12, 12, 3))
    x = layers.UnitNormalization()(layers.Conv2D(6, 3)(frn(name="first")(inputs)))
    model, x = shuffled_weights(keras.Model(inputs, layers.Dense(3)(x))), images(rng)
    with pytest.warns(UserWarning, match="operators stay in float.*: 1 SQUARE"):
        report = export_tflite(
            model, tmp_path / "m.tflite", quantization="int8", calibration_data=x, verbose=True
        )
    assert "converting to int8" in capsys.readouterr().out
    expected = model.predict(x, verbose=0)
    fraction = report.max_error / (max(expected.max(), 0) - min(expected.min(), 0))
    assert report.max_error_fraction == pytest.approx(fraction, rel=1e-4)
    text = str(report)
    assert f"{report.max_error:.3g}, {fraction:.2%} of the output's range, limit 20%" in text
    assert "in float       1 SQUARE" in text
    assert "equalized      0 of 1 normalization\n" in text
    assert "not first: it is fed by the model's input" in text
    assert "'dynamic' less" in text  # what the warning recommends
    assert "no calibration data" in str(export_tflite(model, tmp_path / "m.tflite"))


@pytest.mark.parametrize(
    ("number", "lines"),
    [
        (0, ["runs 0 of 0 operators in 0 pieces\n"]),
        (1, ["runs 1 of 1 operator in 1 piece\n", " 1 sample, ", " 0 of 1 normalization\n"]),
        (2, ["runs 2 of 2 operators in 2 pieces: ", " 2 samples, ", " 0 of 2 normalizations\n"]),
    ],
)
def test_report_counts_in_singular_and_plural(number, lines):
    kept = {str(i): "reason" for i in range(number)}
    counts = {"operators": {"RELU": number}, "delegated": number, "partitions": number}
    errors = {"max_error": 0.0, "max_error_fraction": 0.0, "bound": 0.2, "agreement": None}
    seen = {"samples": number, "ranges": {"image": (0, 1)}}
    file = {"path": "m.tflite", "quantization": "int8", "size": 1, "is_quantized": True}
    report = ExportReport(in_float={}, not_equalized=kept, **file, **counts, **errors, **seen)
    assert all(line in str(report) for line in lines)


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u85-256"])
def test_npu_runs_every_operator(accelerator, tmp_path, rng):
    pytest.importorskip("ethosu")
    # Samples of different scale, so that the form with two normalizations is among them.
    x = images(rng) * (10 ** rng.uniform(-1, 0, (64, 1, 1, 1))).astype("float32")
    report = export_tflite(
        small_model(),
        tmp_path / "m.tflite",
        quantization="int8",
        calibration_data=x,
        integer_io=True,
    )
    assert report.operators["RSQRT"] == 3
    said = run_vela(report.path, tmp_path, accelerator)
    assert re.search(r"CPU operators = 0 \(0.0%\)", said)
    assert re.search(r"NPU operators = [1-9]\d* \(100.0%\)", said)


def test_useless_calibration_data_warns(tmp_path, rng):
    x = images(rng)
    useless = (0 * x, "hardly varies"), (x[:1], "1 different sample."), (x[:63], "63 different")
    for data, message in useless:
        with pytest.warns(UserWarning, match=message):
            report = export_tflite(
                small_model(), tmp_path / "m.tflite", quantization="int8", calibration_data=data
            )
        assert any(message in text for text in report.warnings)
    for preset in ("int8", None):
        report = export_tflite(
            small_model(), tmp_path / "m.tflite", quantization=preset, calibration_data=x
        )
        assert not report.warnings
    assert f"image {x.min():.4g} to {x.max():.4g}" in str(report)
