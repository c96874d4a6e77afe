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
    shuffled_weights,
    slow_cases,
    small_model,
    stack,
)
from keras import layers
from reference import close

from keras_frn.export import export_tflite
from keras_frn.export.inference_layers import REPLACED
from keras_frn.export.runtime import LiteRT

pytestmark = exports
pytest.importorskip("ai_edge_litert")


def test_int8_file_with_integer_io_has_only_integer_tensors(tmp_path, rng):
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
def test_convolution_weights_have_a_scale_per_channel(preset, tmp_path, rng):
    report = export_tflite(
        small_model(), tmp_path / "m.tflite", quantization=preset, calibration_data=images(rng)
    )
    details = LiteRT(report.path).interpreter
    found = {
        tuple(detail["shape"]): len(detail["quantization_parameters"]["scales"])
        for detail in details.get_tensor_details()
        if detail["dtype"] is np.int8 and len(detail["shape"]) == 4 and detail["shape"][1] == 3
    }
    assert found == {(8, 3, 3, 3): 8, (16, 3, 3, 8): 16}


@pytest.mark.filterwarnings("ignore:the outputs differ from the model")  # an outlier of 100 times
def test_rare_values_before_a_normalization_saturate(tmp_path, rng):
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
def test_rare_output_peaks_are_kept(preset, tmp_path, rng):
    """A detector's map, with a few large values. If they saturated as before a normalization, the
    largest would be 0.77 of what it is."""
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


def test_layer_unknown_to_the_quantizer_falls_back_to_the_converter(tmp_path, rng):
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
    "layer",
    [
        layers.PReLU("glorot_uniform", shared_axes=[1, 2]),
        layers.ELU(0.7),
        layers.Activation("selu"),
        layers.Activation("mish"),
    ],
    ids=lambda layer: layer.name,
)
def test_activations_that_the_quantizer_lacks_are_written_in_others(layer, tmp_path, rng):
    """The converter's files take twice as long, leave ELU in float, or give chance for mish."""
    model = stack(frn_tlu_layer(), type(layer).from_config(layer.get_config()))
    path, x = tmp_path / "m.tflite", images(rng)
    report = export_tflite(model, path, quantization="int8", calibration_data=x)
    assert not report.warnings
    assert not report.in_float
    close(LiteRT(path)(x)[0], model.predict(x, verbose=0), PRESETS["int8"])


@pytest.mark.parametrize("preset", [None, "int8", "int16x8"])
@pytest.mark.parametrize("name", ["softplus", "log_sigmoid"])
def test_large_numbers_do_not_overflow_in_a_softplus(name, preset, tmp_path):
    """The converter's own takes exp(x), which is infinite at 89."""
    inputs = keras.Input((6,))
    model = keras.Model(inputs, getattr(keras.ops, name)(inputs))
    x = np.linspace(-120, 120, 384, dtype="float32").reshape(64, 6)
    path = tmp_path / "m.tflite"
    export_tflite(model, path, quantization=preset, calibration_data=x)
    close(LiteRT(path)(x)[0], model.predict(x, verbose=0), PRESETS[preset])


@pytest.mark.parametrize(
    ("preset", "dtype"), [("int16x8", np.int16), ("int8_float_statistics", np.int8)]
)
def test_integer_io_sets_the_input_and_output_types(preset, dtype, tmp_path, rng):
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
def test_file_uses_the_inference_behavior_of_layers(preset, tolerance, tmp_path, rng):
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


def test_advice_for_recurrent_layers_works(tmp_path, rng):
    x, path = images(rng, 64, (5, 4)), tmp_path / "m.tflite"
    with pytest.raises(ValueError, match=r"fix the batch size .*Pass .*\(1, 5, 4\)"):
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


def volumes(x):
    """A 3D U-Net in small: what LiteRT has no integer operators for, or none at all."""
    x = frn_tlu_layer()(layers.Conv3D(16, 3, padding="same")(x))
    y = layers.MaxPooling3D()(x)
    y = layers.Conv3DTranspose(16, 3, 2, padding="same")(layers.Conv3D(16, 3)(y))
    y = layers.AveragePooling3D(2, 1)(layers.Concatenate()([y, x[:, :4, :4, :4]]))
    return layers.Conv3D(3, 1)(y)


@pytest.mark.parametrize(
    "preset",
    [None, "dynamic", "int8", "int16x8", *slow_cases("float16", "int8_float_statistics")],
)
def test_3d_model_is_quantized(preset, tmp_path, rng):
    inputs = keras.Input((8, 8, 8, 2))
    model, x = keras.Model(inputs, volumes(inputs)), images(rng, 64, (8, 8, 8, 2))
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    close(LiteRT(report.path)(x)[0], model.predict(x, verbose=0), PRESETS[preset])
    assert not report.in_float
    assert not any("3D" in name for name in report.operators)
    # 18 thousand weights: half of them or a quarter, and some 20 kB of operators.
    parts = {None: 5, "float16": 3}
    assert report.size < 18e3 * parts.get(preset, 2) + 8e3


@pytest.mark.parametrize("layer", [layers.Conv3D, layers.Conv3DTranspose])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(
    ("size", "strides", "dilation"),
    [
        ((3, 3, 3), 1, 1),
        ((1, 2, 3), 2, 1),
        ((4, 3, 2), (3, 1, 2), 1),
        ((2, 2, 2), 1, 2),
        (1, 3, 1),  # TensorFlow's padding is negative here
    ],
)
def test_3d_convolution_equals_its_2d_form(layer, padding, size, strides, dilation, rng):
    if layer is layers.Conv3DTranspose and dilation > 1:
        pytest.skip("TensorFlow does not have it")
    original = layer(6, size, strides, padding, dilation_rate=dilation, use_bias=dilation == 1)
    x = images(rng, 2, (9, 8, 7, 2))
    expected = original(x)
    copy = REPLACED[layer].from_config(original.get_config())
    copy.build(x.shape)
    copy.set_weights(original.get_weights())
    close(copy(x), expected, FLOAT)


@pytest.mark.parametrize("layer", [layers.MaxPooling3D, layers.AveragePooling3D])
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("size", "strides"), [(2, 2), ((3, 2, 1), (2, 1, 1)), (1, 3)])
def test_3d_pooling_equals_its_2d_form(layer, padding, size, strides, rng):
    original, x = layer(size, strides, padding), images(rng, 2, (9, 8, 7, 2))
    close(REPLACED[layer].from_config(original.get_config())(x), original(x), FLOAT)


def pyramid(x):
    a = frn_tlu_layer()(layers.Conv2D(16, 3, padding="same")(x))
    b = layers.Conv2D(16, 3, 2, padding="same")(a)
    c = layers.Conv2D(8, 3, padding="same")(frn_tlu_layer()(b))
    return {"p1": a, "p2": b, "p3": c}


def repeat(x):
    x = layers.Conv2D(16, 3)(frn_tlu_layer()(layers.Conv2D(8, 3)(x)))
    return [x, layers.Dropout(0.1)(x), layers.Identity()(x), layers.GlobalAveragePooling2D()(x)]


@pytest.mark.parametrize(
    ("build", "preset", "integer_io"),
    [
        (pyramid, "int8_float_statistics", False),
        (pyramid, "int8", True),
        (repeat, "int8", False),
        (repeat, "int8", True),
        (repeat, "int16x8", False),
        *slow_cases(
            (pyramid, "int8", False),
            (pyramid, "int16x8", False),
            (repeat, "int8_float_statistics", False),
        ),
    ],
)
def test_outputs_may_be_shared_or_used_inside(build, preset, integer_io, tmp_path, rng):
    inputs = keras.Input((12, 12, 3))
    model, x = keras.Model(inputs, build(inputs)), images(rng)
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization=preset,
        calibration_data=x,
        integer_io=integer_io,
    )
    expected = keras.tree.flatten(model.predict(x, verbose=0))
    for actual, output in zip(LiteRT(report.path)(x), expected, strict=True):
        close(actual, output, PRESETS[preset])
    assert not report.in_float


@pytest.mark.parametrize("form", ["in a dict", "in a list"])
def test_outputs_may_be_nested(form, tmp_path, rng):
    inputs = keras.Input((6, 6, 3))
    x = layers.GlobalAveragePooling2D()(frn_tlu_layer()(layers.Conv2D(4, 1)(inputs)))
    a, b, c = (layers.Dense(n)(x) for n in (2, 3, 4))
    outputs = {"z": a, "a": (b, c)} if form == "in a dict" else [a, {"z": b, "a": c}]
    model, x = shuffled_weights(keras.Model(inputs, outputs)), images(rng, 8, (6, 6, 3))
    report = export_tflite(model, tmp_path / "m.tflite")
    expected = keras.tree.flatten(model.predict(x, verbose=0))
    for actual, output in zip(LiteRT(report.path)(x), expected, strict=True):
        close(actual, output, FLOAT)


@pytest.mark.parametrize("preset", [None, "int8"])
def test_index_of_the_largest_or_least_is_an_operator(preset, tmp_path, rng):
    inputs = keras.Input((6, 6, 3))
    x = keras.ops.relu(frn()(layers.Conv2D(4, 1)(inputs)))
    found = [keras.ops.argmax(x, -1), keras.ops.argmin(x, axis=1, keepdims=True)]
    model, x = shuffled_weights(keras.Model(inputs, found)), images(rng, 64, (6, 6, 3))
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization=preset,
        calibration_data=x,
        integer_io=bool(preset),
    )
    assert {"ARG_MAX", "ARG_MIN"} <= set(report.operators)
    for actual, expected in zip(LiteRT(report.path)(x), model.predict(x, verbose=0), strict=True):
        assert np.mean(actual == expected) > (0.9 if preset else 0.999)  # but for ties


@pytest.mark.parametrize("preset", ["int8", "int16x8"])
def test_negations_have_integers_and_squares_those_of_16_bits(preset, tmp_path, rng):
    inputs = keras.Input((12, 12, 3))
    x = frn_tlu_layer()(layers.Conv2D(6, 3)(inputs))
    x = -x if preset == "int8" else keras.ops.square(-x)
    model, x = shuffled_weights(keras.Model(inputs, layers.Conv2D(4, 1)(x))), images(rng)
    options = {"quantization": preset, "calibration_data": x, "integer_io": True}
    report = export_tflite(model, tmp_path / "m.tflite", **options)
    assert not report.in_float
    assert not {"SQUARE", "NEG"} & set(report.operators)
    assert report.max_error_fraction < PRESETS[preset]


def test_integer_io_refuses_float_operators_between(tmp_path, rng):
    inputs = keras.Input((12, 12, 3))
    model = keras.Model(inputs, layers.UnitNormalization()(layers.Conv2D(6, 3)(inputs)))
    with pytest.raises(ValueError, match=r"`integer_io` must be False .*1 SQUARE in float"):
        export_tflite(
            model,
            tmp_path / "m.tflite",
            quantization="int8",
            calibration_data=images(rng),
            integer_io=True,
        )
    assert not list(tmp_path.iterdir())


def test_weights_left_in_float_are_named(tmp_path, rng):
    """A 3D convolution of unknown sizes has no 2D form."""
    inputs = keras.Input((None, None, None, 2))
    x = layers.Conv3D(32, 3)(inputs)
    model = keras.Model(inputs, layers.Dense(80)(layers.GlobalAveragePooling3D()(x)))
    with pytest.warns(UserWarning, match="weights stay in float: those of . CONV_3D"):
        report = export_tflite(model, tmp_path / "m.tflite", quantization="dynamic")
    assert set(report.in_float) == {"CONV_3D"}


def test_grouped_3d_convolution_equals_its_2d_form(rng):
    original, x = layers.Conv3D(8, 3, groups=2, padding="same"), images(rng, 2, (6, 5, 4, 4))
    expected = original(x)
    copy = REPLACED[layers.Conv3D].from_config(original.get_config())
    copy.build(x.shape)
    copy.set_weights(original.get_weights())
    close(copy(x), expected, FLOAT)


DILATED = [
    (layers.Conv2D(4, 3, dilation_rate=2), (12, 12, 4)),
    (layers.DepthwiseConv2D(3, 1, "same", 2, dilation_rate=3, activation="relu"), (7, 12, 4)),
    (layers.SeparableConv2D(6, 3, dilation_rate=2), (12, 12, 4)),
    (layers.Conv1D(4, 3, padding="causal", dilation_rate=4, use_bias=False), (12, 4)),
    (layers.DepthwiseConv1D(3, dilation_rate=2), (12, 4)),
    (layers.SeparableConv1D(6, 3, 1, "same", dilation_rate=2, activation="relu"), (12, 4)),
    (layers.Conv3D(4, 3, padding="same", dilation_rate=2), (6, 7, 8, 2)),
]
UNKNOWN_SIZES = [
    (layers.Conv2D(4, 3, padding="same", dilation_rate=(3, 2)), (None, None, 4)),
    (layers.UpSampling2D((2, 3), interpolation="bilinear"), (None, None, 4)),
]
# TensorFlow's converter writes reshapes of other names, or sizes that are computed at run time.
SEQUENCES = [
    (layers.Conv1D(4, 3, 2, activation="relu"), (12, 4)),
    (layers.MaxPooling1D(2), (12, 4)),
    (layers.AveragePooling1D(3, 1, "same"), (12, 4)),
    (layers.Conv1DTranspose(4, 3, 2), (12, 4)),
    (layers.Dense(5), (12, 4)),
    (layers.Dense(5, activation="relu"), (3, 4, 6)),
    (layers.Conv2DTranspose(4, 3, 2, "same"), (6, 6, 4)),
    (layers.Reshape((-1, 6)), (12, 4)),
    (layers.GlobalMaxPooling1D(), (12, 4)),
    (layers.GlobalMaxPooling2D(keepdims=True), (9, 8, 4)),
    (layers.GlobalMaxPooling3D(), (6, 7, 8, 2)),
]
UPSAMPLING = [
    (layers.UpSampling1D(3), (7, 4)),
    (layers.UpSampling2D((3, 2)), (5, 6, 4)),
    (layers.UpSampling2D(2, interpolation="bilinear"), (5, 6, 4)),
    (layers.UpSampling3D((2, 3, 1)), (3, 4, 5, 2)),
]


@pytest.mark.parametrize("preset", [None, "int8", "int16x8"])
@pytest.mark.parametrize(
    "parts",
    [DILATED, UNKNOWN_SIZES, SEQUENCES, UPSAMPLING],
    ids=["dilated", "unknown sizes", "sequences", "upsampling"],
)
def test_operators_that_the_quantizer_lacks_are_written_in_others(parts, preset, tmp_path, rng):
    """Else TensorFlow's converter writes the file, by ranges without any headroom."""
    inputs = [keras.Input(shape, name=f"x{i}") for i, (_, shape) in enumerate(parts)]
    copies = [type(layer).from_config(layer.get_config()) for layer, _ in parts]
    model = shuffled_weights(keras.Model(inputs, [f(x) for f, x in zip(copies, inputs)]))
    x = [images(rng, 64, [size or 9 for size in shape]) for _, shape in parts]
    options = {"quantization": preset, "calibration_data": x[0] if len(x) == 1 else x}
    report = export_tflite(model, tmp_path / "m.tflite", **options)
    expected = model.predict(x, verbose=0)
    actual = LiteRT(report.path, [i.name for i in inputs])(*x)
    for y, output in zip(actual, keras.tree.flatten(expected), strict=True):
        close(y, output, PRESETS[preset])
    lacking = {"SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND", "EXPAND_DIMS", "TILE"}
    lacking |= {"REDUCE_MAX", "REDUCE_PROD"}
    assert not lacking & set(report.operators)
    assert not report.in_float
    assert not any("TensorFlow's converter" in text for text in report.warnings)


@pytest.mark.parametrize(
    "layer",
    [
        layers.DepthwiseConv2D(3, 2, dilation_rate=2),
        layers.Conv2D(4, 3, groups=2, dilation_rate=2),
    ],
    ids=["strided depthwise", "grouped"],
)
def test_dilated_convolution_of_a_form_that_keras_writes_itself(layer, tmp_path, rng):
    model, x = stack(layer), images(rng, 4)
    report = export_tflite(model, tmp_path / "m.tflite")
    close(LiteRT(report.path)(x)[0], model.predict(x, verbose=0), FLOAT)


@pytest.mark.parametrize("preset", ["int8", "int16x8"])
def test_padding_with_minus_infinity_does_not_stretch_a_range(preset, tmp_path, rng):
    """As in front of a maximum, where TensorFlow's converter writes the least float32 number."""
    inputs = keras.Input((12, 12, 3))
    x = frn_tlu_layer()(layers.Conv2D(16, 3)(inputs))
    x = keras.ops.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=float("-inf"))
    model = keras.Model(inputs, layers.Conv2D(8, 1)(layers.MaxPooling2D(3, 2)(x)))
    x = images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    close(LiteRT(report.path)(x)[0], model.predict(x, verbose=0), PRESETS[preset])


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("ADD", "int8"),
        ("ADD", "int16x8"),
        ("SUB", "int8"),
        ("SUB", "int16x8"),
        ("SQUARED_DIFFERENCE", "int8"),
    ],
)
def test_scales_that_would_end_the_process_are_refused(name, preset, tmp_path, rng):
    """Runtimes do not survive an addition whose result is tiny beside what it reads."""
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3)(inputs)
    other = layers.Rescaling(-1.0 if name == "ADD" else 1.0, offset=1.0)(x)
    combine = {
        "ADD": layers.Add(),
        "SUB": layers.Subtract(),
        "SQUARED_DIFFERENCE": layers.Lambda(lambda pair: keras.ops.square(pair[0] - pair[1])),
    }
    y = combine[name]([x, other])
    model = keras.Model(inputs, layers.Conv2D(8, 3)(y))
    options = {"quantization": preset, "calibration_data": 2e5 * images(rng)}
    with pytest.raises(ValueError, match=f"{name} gives numbers so small"):
        export_tflite(model, tmp_path / "m.tflite", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics", "int16x8"])
def test_tiny_filter_keeps_its_large_bias(preset, tmp_path, rng):
    """The scale of a bias follows from that of its filter, and it has 32 bits."""
    kernels = [layers.Conv2D(8, 3), layers.Conv2D(16, 3)]
    after = [layers.GlobalAveragePooling2D(), layers.Dense(5)]
    model = shuffled_weights(
        stack(frn_tlu_layer(), kernels[0], frn_tlu_layer(), kernels[1], *after)
    )
    for layer in kernels:
        kernel, bias = layer.get_weights()
        kernel[..., :3] *= np.array([0, 1e-12, 1e-6])
        bias[:3] = [1, -1, 1]
        layer.set_weights([kernel, bias])
    x = images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    # Measured: 0.02; 0.3 without their bias.
    assert report.max_error_fraction < 0.06
