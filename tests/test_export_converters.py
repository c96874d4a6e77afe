import keras
import numpy as np
import pytest
from exporting import (
    FLOAT,
    exports,
    frn,
    frn_tlu_layer,
    images,
    shuffled_weights,
    small_model,
)
from keras import layers
from reference import close

from keras_frn.export import export_tflite
from keras_frn.export.runtime import LiteRT

pytestmark = exports
pytest.importorskip("ai_edge_litert")


def test_every_tensor_of_an_int8_file_with_integer_io_is_an_integer(tmp_path, rng):
    x = images(rng)
    model = small_model()
    report = export_tflite(
        model, tmp_path / "m.tflite", quantization="int8", calibration_data=x, integer_io=True
    )
    tensors = LiteRT(report.path).interpreter.get_tensor_details()
    assert {np.dtype(t["dtype"]).name for t in tensors} <= {"int8", "int32"}
    assert "QUANTIZE" not in report.operators
    assert "DEQUANTIZE" not in report.operators
    # The comparison goes through the scales of input and output.
    assert report.max_error < 0.1 * np.abs(model.predict(x, verbose=0)).max()


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics", "int16x8"])
def test_each_channel_of_a_convolution_has_its_own_scale(preset, tmp_path, rng):
    report = export_tflite(
        small_model(), tmp_path / "m.tflite", quantization=preset, calibration_data=images(rng, 16)
    )
    details = LiteRT(report.path).interpreter
    found = {
        tuple(detail["shape"]): len(detail["quantization_parameters"]["scales"])
        for detail in details.get_tensor_details()
        if detail["dtype"] is np.int8 and len(detail["shape"]) == 4 and detail["shape"][1] == 3
    }
    assert found == {(8, 3, 3, 3): 8, (16, 3, 3, 8): 16}


@pytest.mark.filterwarnings("ignore:the outputs differ from the model")  # an outlier of 100 times
def test_rare_values_saturate_before_a_normalization(tmp_path, rng):
    """One position in 36,864 has 100 times the scale of the others, and they keep their steps."""
    model, x = small_model(), images(rng, 256)
    outlier = x.copy()
    outlier[0, 5, 5] *= 100
    scales = []
    for data in (x, outlier):
        report = export_tflite(
            model,
            tmp_path / "m.tflite",
            quantization="int8_float_statistics",
            calibration_data=data,
        )
        found = {(1, 12, 12, 3): [], (1, 10, 10, 8): []}
        for detail in LiteRT(report.path).interpreter.get_tensor_details():
            if detail["dtype"] is np.int8 and (shape := tuple(detail["shape"])) in found:
                found[shape].append(detail["quantization"][0])
        scales.append([np.sort(values) for values in found.values()])
    (given, features), (given_outlier, features_outlier) = scales
    assert given_outlier > 20 * given, "an input keeps its range"
    # Mean squares, and so the scales of the filters, feel the outlier a little.
    np.testing.assert_array_less(features_outlier, 1.5 * features)


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics"])
def test_rare_peaks_of_an_output_are_kept(preset, tmp_path, rng):
    """A detector's map, of a few values that stand out. Saturated like those before a
    normalization, the largest would be 0.77 of what it is."""
    inputs = keras.Input((12, 12, 3))
    features = frn_tlu_layer()(layers.Conv2D(8, 3, use_bias=False)(inputs))
    outputs = layers.Conv2D(1, 1)(features)
    for _ in range(2):
        outputs = layers.Multiply()([outputs, outputs])
    model, x = keras.Model(inputs, outputs), images(rng, 256)
    with pytest.warns(UserWarning, match="should stay within 0.2"):  # a fourth power in 8 bits
        report = export_tflite(
            model, tmp_path / "m.tflite", quantization=preset, calibration_data=x
        )
    (actual,) = LiteRT(report.path)(x)
    assert actual.max() > 0.85 * model.predict(x, verbose=0).max()


def test_a_layer_without_an_integer_form_in_the_quantizer_goes_to_the_converter(tmp_path, rng):
    model = keras.Sequential([keras.Input((12, 12, 3)), frn_tlu_layer(), layers.LeakyReLU()])
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization="int8",
        calibration_data=images(rng),
        integer_io=True,
    )
    tensors = LiteRT(report.path).interpreter.get_tensor_details()
    assert {np.dtype(t["dtype"]).name for t in tensors} <= {"int8", "int32"}
    assert "ai-edge-quantizer leaves LEAKY_RELU in float" in report.warnings[-1]


@pytest.mark.parametrize(
    ("preset", "dtype"), [("int16x8", np.int16), ("int8_float_statistics", np.int8)]
)
def test_integer_io(preset, dtype, tmp_path, rng):
    report = export_tflite(
        small_model(),
        tmp_path / "m.tflite",
        quantization=preset,
        calibration_data=images(rng),
        integer_io=True,
    )
    interpreter = LiteRT(report.path).interpreter
    assert interpreter.get_input_details()[0]["dtype"] is dtype
    assert interpreter.get_output_details()[0]["dtype"] is dtype
    assert report.agreement > 0.9


def traced_as_in_training():
    """Layers that Keras' SavedModel traces in their training form, or with random numbers."""
    return [
        *(layers.RandomFlip(), layers.RandomRotation(0.2), layers.RandomZoom(0.2)),
        *(layers.RandomTranslation(0.2, 0.2), layers.Resizing(11, 11), layers.CenterCrop(10, 10)),
    ]


# Unequalized, behind a BatchNormalization, 8 bits leave 0.15 here.
@pytest.mark.filterwarnings("ignore:the outputs differ")  # of int8, beyond half of its bound
@pytest.mark.parametrize(("preset", "tolerance"), [(None, FLOAT), ("int8", 0.2)])
def test_the_file_computes_inference_where_layers_differ_in_training(
    preset, tolerance, tmp_path, rng
):
    model = keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            *traced_as_in_training(),
            layers.Conv2D(6, 3),
            layers.BatchNormalization(),
            frn_tlu_layer(),
            layers.GlobalAveragePooling2D(),
        ]
    )
    shuffled_weights(model).layers[-3].moving_mean.assign(np.arange(6.0))
    x = images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    close(LiteRT(report.path)(x)[0], model(x, training=False), tolerance)


def recurrent(layer_class, **kwargs):
    after = [layer_class(5, **kwargs), layers.Dense(3)]
    return keras.Sequential([keras.Input((5, 4)), layers.Conv1D(6, 3), frn(), *after])


@pytest.mark.parametrize("layer_class", [layers.LSTM, layers.GRU])
def test_recurrent_layers_convert_with_a_fixed_batch(layer_class, tmp_path):
    fixed = [keras.InputSpec(shape=(1, 5, 4))]
    model = recurrent(layer_class)
    report = export_tflite(model, tmp_path / "m.tflite", input_signature=fixed)
    assert report.operators["WHILE"] == 1
    assert report.max_error < FLOAT


def test_the_advice_for_recurrent_layers_is_true(tmp_path, rng):
    x, path = images(rng, 16, (5, 4)), tmp_path / "m.tflite"
    with pytest.raises(ValueError, match=r"fixed batch, such as .*shape=\(1, 5, 4\)"):
        export_tflite(recurrent(layers.GRU), path, quantization=None, calibration_data=x)
    fixed = [keras.InputSpec(shape=(1, 5, 4))]
    with pytest.raises(ValueError, match=r"no integer form.*unroll=True"):
        export_tflite(
            recurrent(layers.GRU),
            path,
            quantization="int16x8",
            calibration_data=x,
            input_signature=fixed,
        )
    assert not list(tmp_path.iterdir())
    model = recurrent(layers.GRU, unroll=True)
    assert export_tflite(model, path, quantization="int16x8", calibration_data=x).agreement > 0.8
