import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers
from markdown import run_code
from reference import close, frn_tlu

import keras_frn
from keras_frn.export import export_tflite
from keras_frn.export.inference_form import InferenceCopy
from keras_frn.export.runtime import LiteRT

pytest.importorskip("ai_edge_litert")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="LiteRT files are written from TensorFlow"
)

# A float graph sums in another order than Keras: some ten roundings of 6e-8 per layer, relative to
# the largest output.
FLOAT = 1e-5


def frn(**kwargs):
    return keras_frn.FilterResponseNormalization(**kwargs)


def frn_tlu_layer(**kwargs):
    return keras_frn.FilterResponseNormalizationTLU(**kwargs)


def shuffled_weights(model, seed=0):
    """Gives gamma, beta, tau and epsilon values that show."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers(include_self=False):
        for name, low, high in (
            ("gamma", 0.5, 1.5),
            ("beta", -0.5, 0.5),
            ("tau", -0.6, 0.3),
            ("alpha", -0.2, 0.2),
            ("bias", -0.1, 0.1),
        ):
            weight = getattr(layer, name, None)
            if weight is not None:
                weight.assign(rng.uniform(low, high, weight.shape))
    return model


def small_model(**kwargs):
    inputs = keras.Input((12, 12, 3), name="image", **kwargs)
    x = layers.Conv2D(8, 3, use_bias=False)(inputs)
    x = frn_tlu_layer(name="first")(x)
    x = layers.Conv2D(8, 3, strides=2, use_bias=False)(x)
    x = keras_frn.TLU()(frn(learned_epsilon=True, name="second")(x))
    x = layers.GlobalAveragePooling2D()(x)
    return shuffled_weights(keras.Model(inputs, layers.Dense(5)(x)))


def images(rng, n=64, shape=(12, 12, 3)):
    return rng.normal(size=(n, *shape)).astype("float32")


# How far outputs may be off, relative to the largest: rounding in half precision, 8-bit weights,
# 8-bit everything, 16-bit activations with 8-bit weights. Measured: 2e-4, 9e-3, 2e-2, 1e-2, 5e-3.
PRESETS = {
    None: FLOAT,
    "float16": 2e-3,
    "dynamic": 0.05,
    "int8": 0.1,
    "int8_float_statistics": 0.1,
    "int16x8": 0.03,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_file_computes_what_the_model_computes(preset, tmp_path, rng):
    model, x = small_model(), images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", preset, x)
    expected = model.predict(x, verbose=0)
    (actual,) = LiteRT(report.path)(x)
    close(actual, expected, PRESETS[preset])
    assert report.max_error == pytest.approx(np.abs(actual - expected).max(), rel=0.05, abs=1e-6)
    assert report.agreement == (actual.argmax(-1) == expected.argmax(-1)).mean()
    assert report.size == os.path.getsize(report.path)
    assert report.samples == 64
    assert report.quantization == preset
    assert report.equalized == (("first", "second") if preset and "int" in preset else ())
    # Unresized, a model of unknown batch size runs on one sample.
    interpreter = LiteRT(report.path).interpreter
    assert interpreter.get_input_details()[0]["shape"].tolist() == [1, 12, 12, 3]


@pytest.mark.parametrize("preset", [None, "float16", "dynamic"])
def test_float_files_are_one_partition_of_eight_operators_per_frn_and_tlu(preset, tmp_path, rng):
    report = export_tflite(small_model(), tmp_path / "m.tflite", preset, images(rng, 16))
    # 2 convolutions, 2 * 8 (MUL MEAN ADD RSQRT MUL MUL ADD MAXIMUM), pooling, dense.
    count = sum(n for name, n in report.operators.items() if name != "DEQUANTIZE")
    assert count == 20
    assert report.partitions == 1
    assert report.delegated == sum(report.operators.values())


def sequential(*between, shape=(10, 10, 4)):
    return keras.Sequential([keras.Input(shape), *between, frn_tlu_layer(name="frn")])


def functional(build, shape=(10, 10, 4)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, frn_tlu_layer(name="frn")(build(inputs)))


def residual(x):
    return layers.Add()([layers.Conv2D(6, 1)(x), layers.Conv2D(6, 3, padding="same")(x)])


def dense_block(x):
    return layers.Concatenate()([layers.Conv2D(2, 1)(x), layers.Conv2D(3, 1)(x)])


def nested(x):
    inner = keras.Input((10, 10, 4))
    backbone = keras.Model(inner, layers.Conv2D(6, 3)(layers.Conv2D(4, 1)(inner)))
    return layers.MaxPooling2D()(backbone(x))


def nested_sequential(x):
    return keras.Sequential([layers.Conv2D(6, 3), layers.ReLU()])(x)


def into_nested(x):
    inner = keras.Input((8, 8, 6))
    head = keras.Model(inner, frn(name="inside")(inner))
    return layers.Conv2D(5, 1)(head(layers.Conv2D(6, 3)(x)))


SCALABLE = {
    "convolution": sequential(layers.Conv2D(6, 3)),
    "with an activation": sequential(layers.Conv2D(6, 3, activation="relu")),
    "depthwise, two outputs per channel": sequential(layers.DepthwiseConv2D(3, depth_multiplier=2)),
    "transposed": sequential(layers.Conv2DTranspose(6, 3, strides=2)),
    "separable": sequential(layers.SeparableConv2D(6, 3)),
    "dense over channels": sequential(layers.Dense(6)),
    "one-dimensional": sequential(layers.Conv1D(6, 3), shape=(20, 4)),
    "three-dimensional": sequential(layers.Conv3D(6, 2), shape=(4, 5, 6, 2)),
    "one position": keras.Sequential(
        [keras.Input((12,)), layers.Dense(6), frn(learned_epsilon=True, name="frn")]
    ),
    "through layers that commute": sequential(
        layers.Conv2D(6, 3),
        layers.ZeroPadding2D(1),
        layers.Activation("relu"),
        layers.LeakyReLU(),
        layers.MaxPooling2D(2),
        layers.AveragePooling2D(2),
        layers.UpSampling2D(2),
        layers.SpatialDropout2D(0.5),
    ),
    "residual": functional(residual),
    "concatenated": functional(dense_block),
    "nested": functional(nested),
    "nested Sequential": functional(nested_sequential),
    "into a nested model": functional(into_nested),
    "channel axis by its number": keras.Sequential(
        [keras.Input((10, 10, 4)), layers.Conv2D(6, 3), frn(axis=3, name="frn")]
    ),
}


@pytest.mark.parametrize("name", SCALABLE)
def test_equalization_changes_scales_and_not_the_function(name, rng):
    model = shuffled_weights(SCALABLE[name])
    # Scales from 0.01 to 1, and a channel so small that epsilon is not.
    for weight in model.weights:
        if weight.path.endswith("kernel"):
            weight.assign(weight * 10 ** rng.uniform(-2, 0, weight.shape[-1:]))
    x = images(rng, 16, model.input_shape[1:])
    expected = model.predict(x, verbose=0)
    before = [w.numpy() for w in model.weights]

    copy = InferenceCopy(model)
    # Equal up to the roundings of a rescaled filter: 6e-8 for each of about 30 products.
    close(copy.model(x, training=False), expected, FLOAT)
    copy.equalize([[x]])
    assert not copy.not_equalized
    close(copy.model(x, training=False), expected, FLOAT)

    for layer in copy.normalizations:
        if layer.name == "frn":
            values = np.asarray(keras.Function(copy.model.inputs, layer.input)([x]), "float64") ** 2
            mean = values.mean(tuple(range(values.ndim - 1))) + layer.epsilon
            np.testing.assert_allclose(mean, 1, rtol=1e-4)
    for old, weight in zip(before, model.weights):
        np.testing.assert_array_equal(old, weight.numpy())


def test_a_nested_model_that_is_called_twice_stays_closed(rng):
    """What feeds one of its calls may not be scaled alone."""
    inner = keras.Sequential([keras.Input((8, 8, 6)), frn(name="inner"), layers.Conv2D(4, 1)])
    inputs = keras.Input((10, 10, 4))
    calls = [inner(layers.Conv2D(6, 3)(inputs)) for _ in range(2)]
    model = shuffled_weights(keras.Model(inputs, layers.Add()(calls)))
    x = images(rng, 16, (10, 10, 4))
    copy = InferenceCopy(model)
    copy.equalize([[x]])
    assert copy.not_equalized == {"inner": "it is fed by the model's input"}
    close(copy.model(x, training=False), model.predict(x, verbose=0), FLOAT)


def preactivation(x):
    x = layers.Conv2D(4, 3, padding="same", name="stem")(x)
    return layers.Add(name="sum")([x, layers.Conv2D(4, 1)(frn(name="inner")(x))])


def twice(x):
    shared = layers.Conv2D(4, 1, name="shared")
    return shared(shared(x))


UNSCALABLE = {
    "input": (functional(lambda x: x), "frn", "it is fed by the model's input"),
    "used elsewhere": (functional(preactivation), "inner", "what feeds it also feeds sum"),
    "shared": (functional(twice), "frn", "shared is used in several places"),
    "nonlinear": (
        functional(layers.Conv2D(4, 1, activation="tanh", name="bent")),
        "frn",
        "bent (Conv2D) cannot be scaled",
    ),
    "saturating": (
        functional(lambda x: layers.ReLU(6.0, name="six")(layers.Conv2D(4, 1)(x))),
        "frn",
        "six (ReLU) cannot be scaled",
    ),
    "broadcast": (
        functional(lambda x: layers.Add(name="sum")([layers.Conv2D(4, 1)(x), x[..., :1]])),
        "frn",
        "sum (Add) cannot be scaled",
    ),
    "channels first": (
        keras.Sequential([keras.Input((4, 10, 10)), layers.Identity(), frn(axis=1, name="frn")]),
        "frn",
        "its channels are not the last axis",
    ),
}


@pytest.mark.parametrize("name", UNSCALABLE)
def test_what_cannot_be_scaled_is_left_with_a_reason(name, rng):
    model, layer, reason = UNSCALABLE[name]
    shuffled_weights(model)
    x = images(rng, 16, model.input_shape[1:])
    copy = InferenceCopy(model)
    copy.equalize([[x]])
    assert copy.not_equalized[layer] == reason
    close(copy.model(x, training=False), model.predict(x, verbose=0), FLOAT)


def stack(*after):
    return keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(6, 3, use_bias=False), *after])


def with_falling(model):
    """One gamma below zero in layers named "falling"; `shuffled_weights` makes all positive."""
    for layer in model._flatten_layers(include_self=False):
        if layer.name == "falling":
            layer.gamma.assign(layer.gamma * np.where(np.arange(layer.gamma.shape[0]) == 1, -1, 1))
    return model


def nested(*inner):
    return keras.Sequential(list(inner))


def functional_nested(*inner):
    inputs = x = keras.Input((10, 10, 4))
    for layer in inner:
        x = layer(x)
    return keras.Model(inputs, x)


# What follows a convolution, and whether the pooling comes first.
POOLINGS = {
    "fused": (lambda: [frn_tlu_layer(), layers.MaxPooling2D(2)], True),
    "overlapping, same": (lambda: [frn_tlu_layer(), layers.MaxPooling2D(3, 2, "same")], True),
    "separate": (lambda: [frn(), keras_frn.TLU(), layers.MaxPooling2D(2)], True),
    "without TLU": (lambda: [frn(), layers.MaxPooling2D(2)], True),
    "without gamma": (lambda: [frn_tlu_layer(scale=False), layers.MaxPooling2D(2)], True),
    "a negative gamma": (lambda: [frn_tlu_layer(name="falling"), layers.MaxPooling2D(2)], False),
    "a line": (lambda: [frn_tlu_layer(affine=True), layers.MaxPooling2D(2)], False),
    "average": (lambda: [frn_tlu_layer(), layers.AveragePooling2D(2)], False),
    "tau by row": (lambda: [frn(), keras_frn.TLU(axis=1), layers.MaxPooling2D(2)], False),
    "channels first": (
        lambda: [frn_tlu_layer(axis=1), layers.MaxPooling2D(2, data_format="channels_first")],
        False,
    ),
    "inside": (lambda: [nested(frn_tlu_layer(), layers.MaxPooling2D(2))], True),
    "inside, functional": (
        lambda: [functional_nested(frn_tlu_layer(), layers.MaxPooling2D(2))],
        True,
    ),
    "behind": (lambda: [nested(frn_tlu_layer()), layers.MaxPooling2D(2)], True),
    "behind, functional": (
        lambda: [functional_nested(frn_tlu_layer()), layers.MaxPooling2D(2)],
        False,
    ),
    "before": (lambda: [frn_tlu_layer(), nested(layers.MaxPooling2D(2), frn())], True),
    "before, functional": (
        lambda: [frn_tlu_layer(), functional_nested(layers.MaxPooling2D(2))],
        False,
    ),
}


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("integer_form", [False, True])
def test_maxima_are_taken_before_the_scale_where_that_is_exact(name, integer_form, rng):
    make, first = POOLINGS[name]
    after = [layers.Conv2D(4, 1), layers.Flatten(), layers.Dense(3)]
    convolution = layers.Conv2D(4, 3, padding="same")
    model = keras.Sequential([keras.Input((10, 10, 4)), convolution, *make(), *after])
    model = with_falling(shuffled_weights(model))
    x = images(rng, 16, (10, 10, 4))
    copy = InferenceCopy(model)
    copy.pool_first()
    if integer_form:
        copy.equalize([[x]])
        copy.use_integer_form(1 / 64)
    close(copy.model(x, training=False), model.predict(x, verbose=0), FLOAT)
    assert (copy.normalizations[0].pooling is not None) == first


def test_a_maximum_is_not_taken_first_where_something_else_reads_what_is_pooled(tmp_path, rng):
    inputs = keras.Input((10, 10, 4))
    x = frn_tlu_layer()(layers.Conv2D(4, 3)(inputs))
    pooled = layers.Flatten()(layers.MaxPooling2D(2)(x))
    model = shuffled_weights(keras.Model(inputs, [pooled, layers.GlobalAveragePooling2D()(x)]))
    data = images(rng, 16, (10, 10, 4))
    assert export_tflite(model, tmp_path / "m.tflite", calibration_data=data).max_error < 1e-5


@pytest.mark.parametrize(
    "layer", [layers.Flatten(), layers.Reshape((-1,))], ids=["Flatten", "Reshape"]
)
def test_reshaping_to_known_sizes_is_one_operator(layer, tmp_path, rng):
    after = [layer, layers.Dense(3)]
    model = shuffled_weights(stack(frn_tlu_layer(), layers.MaxPooling2D(2), *after))
    report = export_tflite(model, tmp_path / "m.tflite", "int8", images(rng, 16), integer_io=True)
    assert "SHAPE" not in report.operators
    assert not report.warnings


# An epsilon is dropped where it is below half a step of an 8-bit mean square: the smallest mean
# square here is 1e-2, so that 1e-5 shows as 5e-4.
@pytest.mark.parametrize(("epsilon", "tolerance"), [(1e-5, 2e-3), (3e-3, FLOAT)])
def test_the_integer_form_equals_the_formula_where_integers_resolve_it(epsilon, tolerance, rng):
    channels = 6
    layer = frn_tlu_layer(name="frn", epsilon=epsilon)
    model = shuffled_weights(keras.Sequential([keras.Input((9, 9, channels)), layer]))
    # Samples from 0.1 to 1: mean squares spread over a factor of 100.
    x = images(rng, 64, (9, 9, channels)) * np.geomspace(0.1, 1, 64)[:, None, None, None]
    copy = InferenceCopy(model)
    copy.equalize([[x.astype("float32")]])
    copy.use_integer_form(1 / 64)
    (normalization,) = copy.normalizations
    assert normalization.first_epsilon is not None
    gamma, beta, tau = (w.numpy() for w in (layer.gamma, layer.beta, layer.tau))
    expected = frn_tlu(x, gamma, beta, tau, epsilon=epsilon)
    close(copy.model(x, training=False), expected, tolerance)


def test_samples_that_differ_in_scale_keep_their_outputs_in_int8(tmp_path, rng):
    """Without equalization and two normalizations the error here is 1.3 of the largest output."""
    model = small_model()
    x = images(rng, 256) * (10 ** rng.uniform(-1, 0, (256, 1, 1, 1))).astype("float32")
    report = export_tflite(model, tmp_path / "m.tflite", "int8", x)
    expected = model.predict(x, verbose=0)
    (actual,) = LiteRT(report.path)(x)
    # 8 bits leave 12 steps to a sample of a tenth of the scale: an error of some percent.
    assert np.sqrt(np.mean((actual - expected) ** 2)) < 0.05 * np.abs(expected).max()
    assert report.agreement > 0.9


# Of a sample of a twelfth of the scale 8 bits leave 10 steps: an error of some percent. With one
# normalization, and in 16 bits without a floor, the errors were 0.36 and 0.05 to 0.09.
@pytest.mark.parametrize(
    ("preset", "scale", "tolerance"), [("int8", 1 / 12, 0.1), ("int16x8", 1 / 60, 0.03)]
)
def test_few_weak_samples_keep_their_outputs(preset, scale, tolerance, tmp_path, rng):
    model, x = small_model(), images(rng, 256)
    x[::20] *= scale
    report = export_tflite(model, tmp_path / "m.tflite", preset, x)
    expected = model.predict(x[::20], verbose=0)
    (actual,) = LiteRT(report.path)(x[::20])
    assert np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)) < tolerance


def test_every_tensor_of_an_int8_file_with_integer_io_is_an_integer(tmp_path, rng):
    x = images(rng)
    model = small_model()
    report = export_tflite(model, tmp_path / "m.tflite", "int8", x, integer_io=True)
    tensors = LiteRT(report.path).interpreter.get_tensor_details()
    assert {np.dtype(t["dtype"]).name for t in tensors} <= {"int8", "int32"}
    assert "QUANTIZE" not in report.operators
    assert "DEQUANTIZE" not in report.operators
    # The comparison goes through the scales of input and output.
    assert report.max_error < 0.1 * np.abs(model.predict(x, verbose=0)).max()


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics", "int16x8"])
def test_each_channel_of_a_convolution_has_its_own_scale(preset, tmp_path, rng):
    report = export_tflite(small_model(), tmp_path / "m.tflite", preset, images(rng, 16))
    details = LiteRT(report.path).interpreter
    found = {
        tuple(detail["shape"]): len(detail["quantization_parameters"]["scales"])
        for detail in details.get_tensor_details()
        if detail["dtype"] is np.int8 and len(detail["shape"]) == 4 and detail["shape"][1] == 3
    }
    assert found == {(8, 3, 3, 3): 8, (8, 3, 3, 8): 8}


@pytest.mark.filterwarnings("ignore:the outputs differ from the model")  # an outlier of 100 times
def test_rare_values_saturate_before_a_normalization(tmp_path, rng):
    """One position in 36,864 has 100 times the scale of the others, and they keep their steps."""
    model, x = small_model(), images(rng, 256)
    outlier = x.copy()
    outlier[0, 5, 5] *= 100
    scales = []
    for data in (x, outlier):
        report = export_tflite(model, tmp_path / "m.tflite", "int8_float_statistics", data)
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
        report = export_tflite(model, tmp_path / "m.tflite", preset, x)
    (actual,) = LiteRT(report.path)(x)
    assert actual.max() > 0.85 * model.predict(x, verbose=0).max()


def test_a_layer_without_an_integer_form_in_the_quantizer_goes_to_the_converter(tmp_path, rng):
    model = keras.Sequential([keras.Input((12, 12, 3)), frn_tlu_layer(), layers.LeakyReLU()])
    report = export_tflite(model, tmp_path / "m.tflite", "int8", images(rng), integer_io=True)
    tensors = LiteRT(report.path).interpreter.get_tensor_details()
    assert {np.dtype(t["dtype"]).name for t in tensors} <= {"int8", "int32"}
    assert "ai-edge-quantizer leaves LEAKY_RELU in float" in report.warnings[-1]


@pytest.mark.parametrize(
    ("preset", "dtype"), [("int16x8", np.int16), ("int8_float_statistics", np.int8)]
)
def test_integer_io(preset, dtype, tmp_path, rng):
    report = export_tflite(
        small_model(), tmp_path / "m.tflite", preset, images(rng), integer_io=True
    )
    interpreter = LiteRT(report.path).interpreter
    assert interpreter.get_input_details()[0]["dtype"] is dtype
    assert interpreter.get_output_details()[0]["dtype"] is dtype
    assert report.agreement > 0.9


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics", "int16x8"])
def test_blank_faint_and_saturated_inputs_give_outputs_in_the_range_seen(preset, tmp_path, rng):
    x = images(rng)
    model = small_model()
    report = export_tflite(model, tmp_path / "m.tflite", preset, x)
    seen = model.predict(x, verbose=0)
    # 16-bit integers reach as far on both sides of zero. One step of 255 may be added, as the range
    # is rounded outwards.
    low, high = seen.min(), seen.max()
    if preset == "int16x8":
        low, high = -np.abs(seen).max(), np.abs(seen).max()
    step = 1.01 * (high - low) / 255
    for extreme in (0 * x, 0.01 * x, 1e6 * x, np.full_like(x, 1e3)):
        (outputs,) = LiteRT(report.path)(extreme)
        assert np.isfinite(outputs).all()
        assert outputs.min() >= low - step
        assert outputs.max() <= high + step


def test_a_mixed_precision_model_is_exported_in_float32(tmp_path, rng):
    with_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inner = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(4, 3), frn()])
        inputs = keras.Input((12, 12, 3))
        x = layers.GlobalAveragePooling2D()(keras_frn.TLU()(inner(inputs)))
        model = keras.Model(inputs, layers.Dense(3)(x))
    finally:
        keras.config.set_dtype_policy(with_policy)
    x = images(rng, 16)
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=x)
    # Half precision, of the model, rounds at 5e-4.
    assert report.max_error < 5e-3
    assert not any(name.startswith("Flex") for name in report.operators)
    tensors = LiteRT(report.path).interpreter.get_tensor_details()
    assert np.float16 not in {t["dtype"] for t in tensors}
    assert model.compute_dtype == "float16"


def test_unknown_sizes(tmp_path, rng):
    model = shuffled_weights(
        keras.Sequential(
            [
                keras.Input((None, None, 3)),
                layers.Conv2D(6, 3),
                frn_tlu_layer(),
                layers.GlobalAveragePooling2D(),
            ]
        )
    )
    batches = [images(rng, 8, (9, 9, 3)), images(rng, 9, (7, 12, 3))]
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=iter(batches))
    assert report.samples == 17
    for x in batches:
        close(LiteRT(report.path)(x)[0], model(x, training=False), FLOAT)
    assert export_tflite(model, tmp_path / "m.tflite").operators == report.operators
    for preset in ("int8", "int8_float_statistics", "int16x8"):
        with pytest.raises(ValueError, match=r"one size .*\(7, 12, 3\), \(9, 9, 3\).*'dynamic'"):
            export_tflite(model, tmp_path / "m.tflite", preset, iter(batches))
    report = export_tflite(model, tmp_path / "m.tflite", "int8", images(rng, 16, (9, 9, 3)))
    assert {(-1, 9, 9, 3), (-1, 7, 7, 6)} <= stored_shapes(report.path)
    assert "takes the size of the calibration data only, (9, 9, 3)" in str(report)


def test_a_fixed_batch_size(tmp_path, rng):
    model, x = small_model(batch_size=4), images(rng, 30)
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=x)
    assert report.max_error < FLOAT
    close(LiteRT(report.path)(x[:4])[0], model(x[:4], training=False), FLOAT)


@pytest.mark.parametrize("preset", [None, "int8"])
def test_several_inputs_and_named_outputs(preset, tmp_path, rng):
    image, extra = keras.Input((8, 8, 3), name="z_image"), keras.Input((4,), name="a_extra")
    x = layers.GlobalAveragePooling2D()(frn_tlu_layer()(layers.Conv2D(6, 3)(image)))
    x = layers.Concatenate()([x, extra])
    outputs = {"scores": layers.Dense(3)(x), "amount": layers.Dense(1)(x)}
    model = shuffled_weights(keras.Model([image, extra], outputs))
    data = {"z_image": images(rng, 20, (8, 8, 3)), "a_extra": images(rng, 20, (4,))}
    as_list = [data["z_image"], data["a_extra"]]
    for calibration_data in (data, as_list, [(as_list, None)]):
        report = export_tflite(model, tmp_path / "m.tflite", preset, calibration_data)
        assert report.max_error < (1e-5 if preset is None else 0.1)
        assert report.samples == 20


def test_calibration_data_of_every_kind_gives_the_same_file(tmp_path, rng):
    import tensorflow as tf

    x, model = images(rng, 40), small_model()
    y = np.zeros(40)
    kinds = {
        "array": x,
        "dataset of batches": tf.data.Dataset.from_tensor_slices((x, y)).batch(16),
        "dataset of samples": tf.data.Dataset.from_tensor_slices(x).take(40),
        "generator": ((x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)),
        "list of batches": [x[:30], x[30:]],
    }
    found = {
        name: export_tflite(model, tmp_path / "m.tflite", None, data).max_error
        for name, data in kinds.items()
    }
    assert max(found.values()) == min(found.values()), found


@keras.saving.register_keras_serializable(package="test_export")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolution = layers.Conv2D(4, 3)
        self.normalization = frn_tlu_layer(name="within")
        self.pooling = layers.GlobalAveragePooling2D()

    def call(self, inputs):
        return self.pooling(self.normalization(self.convolution(inputs)))


def test_a_subclassed_model_is_taken_as_it_is(tmp_path, rng):
    x, model = images(rng, 20), Subclassed()
    model(x)
    report = export_tflite(model, tmp_path / "m.tflite", "dynamic", x)
    assert report.max_error < 0.05
    report = export_tflite(model, tmp_path / "m.tflite", "int8", x)
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
    "integer_io": (dict(integer_io=True), "`integer_io` must be False unless .*integer_io=True"),
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


def test_a_file_that_the_runtime_refuses_is_not_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("XNNPACK takes no output that is so much smaller than its products")

    monkeypatch.setattr("keras_frn.export.LiteRT", refuse)
    with pytest.raises(ValueError, match=r"`model` must become a file that LiteRT runs.*XNNP"):
        export_tflite(small_model(), tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_file_that_was_there(tmp_path, rng):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.ops.fft2((inputs, inputs)))
    path = tmp_path / "m.tflite"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="`model` must consist of operators that LiteRT has"):
        export_tflite(model, path, "int8", images(rng, 16, (8, 8, 3)))
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_the_model_need_not_restore_what_it_was_compiled_with(tmp_path, rng):
    model = small_model()
    model.compile("sgd", loss=lambda y, z: keras.ops.mean(z - y))
    weights = [w.numpy() for w in model.weights]
    export_tflite(model, tmp_path / "m.tflite", "int8", images(rng, 16))
    for before, after in zip(weights, model.weights):
        np.testing.assert_array_equal(before, after.numpy())
    assert model.get_layer("first").epsilon == 1e-6


@pytest.mark.filterwarnings(
    "ignore:the outputs differ from the model"
)  # not equalized, and few samples
def test_the_report_prints_what_matters(tmp_path, rng, capsys):
    model, _, reason = UNSCALABLE["used elsewhere"]
    report = export_tflite(
        model, tmp_path / "m.tflite", "int8", images(rng, 16, (10, 10, 4)), verbose=True
    )
    assert "converting to int8" in capsys.readouterr().out
    text = str(report)
    assert f"not inner: {reason}" in text
    assert "equalized      0 of 2 normalizations" in text
    assert "int8_float_statistics" in text  # what the warning recommends
    assert re.search(r"verified on +16 samples, .*: max error [\d.e-]+, same argmax [\d.]+%", text)
    assert "no `calibration_data`" in str(export_tflite(model, tmp_path / "m.tflite"))


@pytest.mark.parametrize("accelerator", ["ethos-u55-128", "ethos-u85-256"])
def test_an_npu_takes_every_operator(accelerator, tmp_path, rng):
    pytest.importorskip("ethosu")
    # Samples of different scale, so that the form with two normalizations is among them.
    x = images(rng) * (10 ** rng.uniform(-1, 0, (64, 1, 1, 1))).astype("float32")
    report = export_tflite(small_model(), tmp_path / "m.tflite", "int8", x, integer_io=True)
    assert report.operators["RSQRT"] == 3
    command = [
        sys.executable,
        "-c",
        "from ethosu.vela.vela import main; main()",
        report.path,
        "--output-dir",
        str(tmp_path),
    ]
    command += ["--accelerator-config", accelerator]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"CPU operators = 0 \(0.0%\)", done.stdout)
    assert re.search(r"NPU operators = [1-9]\d* \(100.0%\)", done.stdout)


def test_the_examples_of_the_guide(tmp_path, monkeypatch, rng, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"model": small_model(), "images": images(rng, 300), "labels": np.zeros(300)}
    names["keras_frn"] = keras_frn
    names["model"].save("model.keras")
    np.save("images.npy", names["images"])
    assert run_code("docs/export.md", names) == 3
    assert "XNNPACK" in capsys.readouterr().out
    assert (1, 12, 12, 3) in stored_shapes("model.tflite")


class Undescribed(layers.Layer):
    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def call(self, inputs):
        return inputs * self.amount


def test_layers_with_state_calls_with_arguments_and_layers_without_a_config(tmp_path, rng):
    x = images(rng, 16) * 3 + 5
    normalization = layers.Normalization()
    normalization.adapt(x)
    inputs = keras.Input((12, 12, 3))
    y = layers.Lambda(lambda t: t * 2.0)(normalization(inputs))
    y = frn_tlu_layer()(layers.Conv2D(6, 3)(y), training=False)
    model = shuffled_weights(keras.Model(inputs, layers.BatchNormalization()(y)))
    model.layers[-1].moving_mean.assign(np.arange(6.0))
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=x)
    assert report.max_error < 1e-4  # of outputs of about 10

    model = keras.Model(inputs, Undescribed(2.0)(inputs))
    with pytest.raises(ValueError, match="layers that `get_config` describes"):
        export_tflite(model, tmp_path / "n.tflite")


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
    report = export_tflite(model, tmp_path / "m.tflite", preset, x)
    close(LiteRT(report.path)(x)[0], model(x, training=False), tolerance)


class Elsewhere(layers.Layer):
    """Computes something else in a graph, as a layer that LiteRT has wrong would."""

    def call(self, inputs):
        import tensorflow as tf

        return inputs if tf.executing_eagerly() else inputs + 0.01


def test_a_float_file_of_something_else_is_refused_with_the_layer(tmp_path):
    after = [layers.Conv2D(4, 3), Elsewhere(name="elsewhere"), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(6, 3), frn(), *after])
    with pytest.raises(ValueError, match=r"computes the same.*The first layer to differ is else"):
        export_tflite(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_the_layer_is_found_where_branches_are_beside_it(tmp_path):
    """Half of the layers in the order of the model does not end in one tensor."""
    inputs = keras.Input((12, 12, 3))
    plain = wrong = inputs
    for i in range(4):
        plain = layers.Conv2D(4, 1, name=f"plain_{i}")(plain)
        wrong = Elsewhere(name="wrong")(wrong) if i == 1 else layers.Conv2D(4, 1)(wrong)
    model = keras.Model(inputs, layers.Add()([plain, wrong]))
    with pytest.raises(ValueError, match="The first layer to differ is wrong"):
        export_tflite(model, tmp_path / "m.tflite")


def test_outputs_beyond_the_bound_are_warned_of(tmp_path, rng):
    model = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(6, 3), frn(), Elsewhere()])
    with pytest.warns(UserWarning, match=r"differ .* by up to .*float16 should stay within 0.01"):
        report = export_tflite(
            keras.Sequential([model, layers.Rescaling(0.1), Elsewhere()]),
            tmp_path / "m.tflite",
            "float16",
            images(rng, 16),
        )
    assert "float16 should stay within 0.01" in str(report)


@pytest.mark.filterwarnings("ignore:Layer .* normalizes single positions")
def test_a_model_that_amplifies_roundings_is_exported_with_a_warning(tmp_path, rng):
    """At one position and without a learned epsilon a normalization is the sign of its input."""
    blocks = [layer for _ in range(6) for layer in (layers.Dense(128), frn(epsilon=1e-9))]
    model = keras.Sequential([keras.Input((16,)), *blocks])
    with pytest.warns(UserWarning, match="amplifies roundings.*should learn epsilon"):
        report = export_tflite(model, tmp_path / "m.tflite", None, images(rng, 500, (16,)))
    assert report.max_error > 1e-4


def test_not_a_number_in_the_file_alone_is_an_error(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(
        "keras_frn.export.LiteRT.__call__", lambda self, x: [np.full((len(x), 5), np.nan, "f4")]
    )
    with pytest.raises(ValueError, match="up to inf of their range"):
        export_tflite(small_model(), tmp_path / "m.tflite", None, images(rng, 16))


def stored_shapes(path):
    details = LiteRT(path, is_plain=True).interpreter.get_tensor_details()
    return {tuple(detail["shape_signature"]) for detail in details}


@pytest.mark.parametrize("preset", [None, "int8", "int8_float_statistics", "int16x8"])
def test_a_signature_fixes_the_sizes_throughout(preset, tmp_path, rng):
    import tensorflow as tf

    model = shuffled_weights(
        keras.Sequential(
            [
                keras.Input((None, None, 3)),
                layers.Conv2D(6, 3),
                frn_tlu_layer(),
                layers.MaxPooling2D(),
                layers.Conv2D(5, 1),
            ]
        )
    )
    x = images(rng, 32, (9, 9, 3))
    spec = tf.TensorSpec((1, 9, 9, 3)) if preset else keras.InputSpec(shape=(1, 9, 9, 3))
    report = export_tflite(model, tmp_path / "m.tflite", preset, x, input_signature=[spec])
    shapes = stored_shapes(report.path)
    assert {(1, 9, 9, 3), (1, 7, 7, 6), (1, 3, 3, 5)} <= shapes
    assert not any(-1 in shape for shape in shapes)
    close(LiteRT(report.path)(x[:1])[0], model(x[:1]), PRESETS[preset])
    with pytest.raises(ValueError, match=r"model's inputs, \(1, 9, 9, 3\).*\(16, 8, 9, 3\)"):
        export_tflite(model, report.path, preset, x[:16, :8], input_signature=[spec])


def test_a_fixed_batch_of_the_model_is_in_the_file(tmp_path, rng):
    report = export_tflite(small_model(batch_size=1), tmp_path / "m.tflite", None, images(rng, 16))
    assert (1, 12, 12, 3) in stored_shapes(report.path)
    report = export_tflite(small_model(), tmp_path / "m.tflite")
    assert (-1, 12, 12, 3) in stored_shapes(report.path)


SIGNATURES = {
    "rank": [keras.InputSpec(shape=(1, 12, 3))],
    "size": [keras.InputSpec(shape=(1, 12, 11, 3))],
    "type": [keras.InputSpec(shape=(1, 12, 12, 3), dtype="uint8")],
    "number": [keras.InputSpec(shape=(1, 12, 12, 3))] * 2,
    "none": [None],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_that_do_not_fit_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"`input_signature` must .*'float32', \(None, 12, 12, 3"):
        export_tflite(small_model(), tmp_path / "m.tflite", input_signature=SIGNATURES[name])


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
        export_tflite(recurrent(layers.GRU), path, None, x)
    fixed = [keras.InputSpec(shape=(1, 5, 4))]
    with pytest.raises(ValueError, match=r"no integer form.*unroll=True"):
        export_tflite(recurrent(layers.GRU), path, "int16x8", x, input_signature=fixed)
    assert not list(tmp_path.iterdir())
    model = recurrent(layers.GRU, unroll=True)
    assert export_tflite(model, path, "int16x8", x).agreement > 0.8


def test_a_subclassed_model_takes_integers_where_the_signature_says_so(tmp_path, rng):
    class Words(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = layers.Embedding(20, 4), frn()

        def call(self, words):
            return self.norm(self.embedding(words))

    model, words = Words(), rng.integers(0, 20, (8, 6)).astype("int32")
    model(words)
    shuffled_weights(model)
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        calibration_data=words,
        input_signature=[keras.InputSpec(shape=(None, 6), dtype="int32")],
    )
    close(LiteRT(report.path)(words)[0], model(words), FLOAT)
    (details,) = LiteRT(report.path).interpreter.get_input_details()
    assert details["dtype"] is np.int32


def test_a_subclassed_model_of_named_inputs_takes_a_signature(tmp_path, rng):
    class TwoInputs(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs["a"]) + inputs["b"]

    model, data = TwoInputs(), {"a": images(rng, 16, (4,)), "b": images(rng, 16, (3,))}
    model(data)
    shapes = {"a": (1, 4), "b": (1, 3)}
    signature = [{name: keras.InputSpec(shape=shape) for name, shape in shapes.items()}]
    report = export_tflite(model, tmp_path / "m.tflite", None, data, input_signature=signature)
    assert report.max_error < FLOAT
    assert {(1, 4), (1, 3)} <= stored_shapes(report.path)


def test_what_xnnpack_runs_is_counted_without_data(tmp_path):
    report = export_tflite(small_model(), tmp_path / "m.tflite")
    assert report.delegated == sum(report.operators.values()) == 20
    assert report.partitions == 1
    assert report.max_error < FLOAT


def test_data_that_show_nothing_are_warned_of(tmp_path, rng):
    x = images(rng)
    for data, message in ((0 * x, "hardly varies"), (x[:1], "1 different samples")):
        with pytest.warns(UserWarning, match=message):
            report = export_tflite(small_model(), tmp_path / "m.tflite", "int8", data)
        assert any(message in text for text in report.warnings)
    report = export_tflite(small_model(), tmp_path / "m.tflite", None, x)
    assert f"image {x.min():.4g} to {x.max():.4g}" in str(report)


@pytest.mark.parametrize("layer", [layers.ReLU(6.0), layers.Activation("relu6")])
def test_relu6_of_its_own_is_two_subtractions_in_integers(layer, tmp_path, rng):
    """TensorFlow Lite Micro computes RELU6 in the scale of its input."""
    after = [layer.__class__.from_config(layer.get_config()), layers.Conv2D(4, 1)]
    model = shuffled_weights(stack(frn_tlu_layer(), *after, layers.ReLU(6.0)))
    model.layers[1].gamma.assign(np.full(6, 6.0))
    report = export_tflite(model, tmp_path / "m.tflite", "int8", images(rng, 16))
    assert report.operators["SUB"] == 2
    assert "RELU6" not in report.operators, "alone, or not taken in by a convolution"
    assert export_tflite(model, tmp_path / "m.tflite").operators["RELU6"] == 1
