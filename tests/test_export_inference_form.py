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
    small_model,
    stack,
)
from keras import layers
from reference import close, frn_tlu

import keras_frn
from keras_frn.export import export_tflite
from keras_frn.export.inference_form import InferenceCopy
from keras_frn.export.runtime import LiteRT

pytestmark = exports
pytest.importorskip("ai_edge_litert")


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


class SamePadding(layers.Conv2D):
    def __init__(self, *args, padding="same", **kwargs):
        super().__init__(*args, padding=padding, **kwargs)

    def get_config(self):
        return super().get_config()


class Doubled(keras_frn.FilterResponseNormalization):
    def call(self, inputs):
        return 2.0 * super().call(inputs)


class WithoutBeta(keras_frn.FilterResponseNormalization):
    def __init__(self, center=False, **kwargs):
        super().__init__(center=center, **kwargs)


class StandardizedWeights(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, keras.ops.normalize(kernel, axis=(0, 1, 2)))


class Shift(layers.Identity):
    def call(self, inputs):
        return inputs + 1.0


class Fade(keras_frn.TLU):
    def call(self, inputs):
        return -super().call(inputs)


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
        layers.Activation("leaky_relu"),
        layers.PReLU("glorot_uniform", shared_axes=[1, 2]),
        layers.MaxPooling2D(2),
        layers.AveragePooling2D(2),
        layers.UpSampling2D(2),
        layers.SpatialDropout2D(0.5),
    ),
    "of a class that only chooses options": sequential(SamePadding(6, 3)),
    "into such a class": keras.Sequential(
        [keras.Input((10, 10, 4)), layers.Conv2D(6, 3), WithoutBeta(name="frn")]
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
def test_equalization_changes_scales_but_not_outputs(name, rng):
    model = shuffled_weights(SCALABLE[name])
    # Scales from 0.01 to 1, and a channel so small that epsilon is not.
    for weight in model.weights:
        if weight.path.endswith("kernel"):
            weight.assign(weight * 10 ** rng.uniform(-2, 0, weight.shape[-1:]))
    x = images(rng, 64, model.input_shape[1:])
    expected = model.predict(x, verbose=0)
    before = [w.numpy() for w in model.weights]

    copy = InferenceCopy(model)
    # Equal up to the roundings of a rescaled filter: 6e-8 for each of about 30 products.
    close(copy.model(x, training=False), expected, FLOAT)
    copy.equalize([[x]])
    assert not copy.not_equalized
    assert "frn" in copy.equalized
    close(copy.model(x, training=False), expected, FLOAT)

    for layer in copy.normalizations:
        if layer.name == "frn":
            values = np.asarray(keras.Function(copy.model.inputs, layer.input)([x]), "float64") ** 2
            mean = values.mean(tuple(range(values.ndim - 1))) + layer.epsilon
            np.testing.assert_allclose(mean, 1, rtol=1e-4)
    copy.equalize([[x]], to_peaks=True)
    close(copy.model(x, training=False), expected, FLOAT)
    for old, weight in zip(before, model.weights):
        np.testing.assert_array_equal(old, weight.numpy())


def test_nested_model_called_twice_is_not_equalized(rng):
    """The input of one of its calls must not be scaled alone."""
    inner = keras.Sequential([keras.Input((8, 8, 6)), frn(name="inner"), layers.Conv2D(4, 1)])
    inputs = keras.Input((10, 10, 4))
    calls = [inner(layers.Conv2D(6, 3)(inputs)) for _ in range(2)]
    model = shuffled_weights(keras.Model(inputs, layers.Add()(calls)))
    x = images(rng, 64, (10, 10, 4))
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


def nest(*inner):
    return keras.Sequential(list(inner))


class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = frn(name="norm")

    def call(self, inputs):
        return self.norm(inputs)


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
    "of a class that computes something else": (
        functional(StandardizedWeights(4, 1, name="own")),
        "frn",
        "own (StandardizedWeights) cannot be scaled",
    ),
    "through such a class": (
        functional(lambda x: Shift(name="own")(layers.Conv2D(4, 1)(x))),
        "frn",
        "own (Shift) cannot be scaled",
    ),
    "a class of its own": (
        functional(lambda x: Doubled(name="own")(layers.Conv2D(4, 1)(x))),
        "own",
        "Doubled has code of its own",
    ),
    "inside of a layer": (
        functional(lambda x: Block(name="block")(layers.Conv2D(4, 1)(x))),
        "block/norm",
        "it is inside of block (Block)",
    ),
    "inside of a wrapper": (
        functional(layers.TimeDistributed(nest(frn(name="norm")), name="rows")),
        "rows/norm",
        "it is inside of rows (TimeDistributed)",
    ),
    "channels first": (
        keras.Sequential([keras.Input((4, 10, 10)), layers.Identity(), frn(axis=1, name="frn")]),
        "frn",
        "its channels are not the last axis",
    ),
}


@pytest.mark.parametrize("name", UNSCALABLE)
def test_unscalable_layers_are_skipped_with_a_reason(name, rng):
    model, layer, reason = UNSCALABLE[name]
    shuffled_weights(model)
    x = images(rng, 64, model.input_shape[1:])
    copy = InferenceCopy(model)
    copy.equalize([[x]])
    assert copy.not_equalized[layer] == reason
    close(copy.model(x, training=False), model.predict(x, verbose=0), FLOAT)


def with_falling(model):
    """One gamma below zero in layers named "falling"; `shuffled_weights` makes all positive."""
    for layer in model._flatten_layers(include_self=False):
        if layer.name == "falling":
            layer.gamma.assign(layer.gamma * np.where(np.arange(layer.gamma.shape[0]) == 1, -1, 1))
    return model


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
    "a class of its own": (lambda: [frn(), Fade(), layers.MaxPooling2D(2)], False),
    "channels first": (
        lambda: [frn_tlu_layer(axis=1), layers.MaxPooling2D(2, data_format="channels_first")],
        False,
    ),
    "inside": (lambda: [nest(frn_tlu_layer(), layers.MaxPooling2D(2))], True),
    "inside, functional": (
        lambda: [functional_nested(frn_tlu_layer(), layers.MaxPooling2D(2))],
        True,
    ),
    "behind": (lambda: [nest(frn_tlu_layer()), layers.MaxPooling2D(2)], True),
    "behind, functional": (
        lambda: [functional_nested(frn_tlu_layer()), layers.MaxPooling2D(2)],
        False,
    ),
    "before": (lambda: [frn_tlu_layer(), nest(layers.MaxPooling2D(2), frn())], True),
    "before, functional": (
        lambda: [frn_tlu_layer(), functional_nested(layers.MaxPooling2D(2))],
        False,
    ),
}


@pytest.mark.parametrize("name", POOLINGS)
@pytest.mark.parametrize("integer_form", [False, True])
def test_max_pooling_moves_before_the_scale_if_exact(name, integer_form, rng):
    make, first = POOLINGS[name]
    after = [layers.Conv2D(4, 1), layers.Flatten(), layers.Dense(3)]
    convolution = layers.Conv2D(4, 3, padding="same")
    model = keras.Sequential([keras.Input((10, 10, 4)), convolution, *make(), *after])
    model = with_falling(shuffled_weights(model))
    x = images(rng, 64, (10, 10, 4))
    copy = InferenceCopy(model)
    copy.pool_first()
    if integer_form:
        copy.equalize([[x]])
        copy.use_integer_form(1 / 64, 8)
    close(copy.model(x, training=False), model.predict(x, verbose=0), FLOAT)
    assert (copy.normalizations[0].pooling is not None) == first


def test_max_pooling_stays_if_its_input_has_other_consumers(tmp_path, rng):
    inputs = keras.Input((10, 10, 4))
    x = frn_tlu_layer()(layers.Conv2D(4, 3)(inputs))
    pooled = layers.Flatten()(layers.MaxPooling2D(2)(x))
    model = shuffled_weights(keras.Model(inputs, [pooled, layers.GlobalAveragePooling2D()(x)]))
    data = images(rng, 64, (10, 10, 4))
    assert export_tflite(model, tmp_path / "m.tflite", calibration_data=data).max_error < 1e-5


@pytest.mark.parametrize(
    "layer", [layers.Flatten(), layers.Reshape((-1,))], ids=["Flatten", "Reshape"]
)
def test_reshape_to_known_sizes_is_one_operator(layer, tmp_path, rng):
    after = [layer, layers.Dense(3)]
    model = shuffled_weights(stack(frn_tlu_layer(), layers.MaxPooling2D(2), *after))
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization="int8",
        calibration_data=images(rng),
        integer_io=True,
    )
    assert "SHAPE" not in report.operators
    assert not report.warnings


# An epsilon is dropped where it is below half a step of an 8-bit mean square: the smallest mean
# square here is 1e-2, so that 1e-5 shows as 5e-4.
@pytest.mark.parametrize(("epsilon", "tolerance"), [(1e-5, 2e-3), (3e-3, FLOAT)])
def test_integer_form_equals_the_formula_within_integer_resolution(epsilon, tolerance, rng):
    channels = 6
    layer = frn_tlu_layer(name="frn", epsilon=epsilon)
    model = shuffled_weights(keras.Sequential([keras.Input((9, 9, channels)), layer]))
    # Samples from 0.1 to 1: mean squares spread over a factor of 100.
    x = images(rng, 64, (9, 9, channels)) * np.geomspace(0.1, 1, 64)[:, None, None, None]
    copy = InferenceCopy(model)
    copy.equalize([[x.astype("float32")]])
    copy.use_integer_form(1 / 64, 8)
    (normalization,) = copy.normalizations
    assert normalization.first_epsilon is not None
    gamma, beta, tau = (w.numpy() for w in (layer.gamma, layer.beta, layer.tau))
    expected = frn_tlu(x, gamma, beta, tau, epsilon=epsilon)
    close(copy.model(x, training=False), expected, tolerance)


def test_relu6_becomes_two_integer_subtractions(tmp_path, rng):
    """TensorFlow Lite Micro computes RELU6 in the scale of its input."""
    inputs = keras.Input((12, 12, 3))
    x = frn_tlu_layer()(layers.Conv2D(6, 3)(inputs))
    alone = [
        layers.ReLU(6.0)(x),
        layers.Activation("relu6")(x),
        keras.ops.relu6(x),
        keras.ops.clip(x, 0.0, 6.0),
        layers.Conv2DTranspose(6, 3, padding="same", activation="relu6")(x),
    ]
    x = layers.ReLU(6.0)(layers.Conv2D(4, 1)(layers.Concatenate()(alone)))
    x = layers.Conv2D(4, 1, activation="relu6")(x)
    model = shuffled_weights(keras.Model(inputs, x))
    model.layers[2].gamma.assign(np.full(6, 6.0))
    report = export_tflite(
        model, tmp_path / "m.tflite", quantization="int8", calibration_data=images(rng)
    )
    assert report.operators["SUB"] == 2 * 2, "of two tensors, as equal branches become one"
    assert "RELU6" not in report.operators, "alone, or not taken in by a convolution"
    assert "SUB" not in export_tflite(model, tmp_path / "m.tflite").operators, "in float"


def test_mixed_precision_model_is_exported_in_float32(tmp_path, rng):
    with_policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inner = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(4, 3), frn()])
        inputs = keras.Input((12, 12, 3))
        x = layers.GlobalAveragePooling2D()(keras_frn.TLU()(inner(inputs)))
        model = keras.Model(inputs, layers.Dense(3)(x))
    finally:
        keras.config.set_dtype_policy(with_policy)
    x = images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=x)
    # Half precision, of the model, rounds at 5e-4.
    assert report.max_error < 5e-3
    assert not any(name.startswith("Flex") for name in report.operators)
    tensors = LiteRT(report.path).interpreter.get_tensor_details()
    assert np.float16 not in {t["dtype"] for t in tensors}
    assert model.compute_dtype == "float16"


def test_stateful_layers_call_arguments_and_lambdas_are_exported(tmp_path, rng):
    x = images(rng) * 3 + 5
    normalization = layers.Normalization()
    normalization.adapt(x)
    inputs = keras.Input((12, 12, 3))
    y = layers.Lambda(lambda t: t * 2.0)(normalization(inputs))
    y = frn_tlu_layer()(layers.Conv2D(6, 3)(y), training=False)
    model = shuffled_weights(keras.Model(inputs, layers.BatchNormalization()(y)))
    model.layers[-1].moving_mean.assign(np.arange(6.0))
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=x)
    assert report.max_error < 1e-4  # of outputs of about 10


def test_int8_is_accurate_for_samples_of_different_scales(tmp_path, rng):
    """Without equalization and two normalizations the error here is 1.3 of the largest output."""
    model = small_model()
    x = images(rng, 256) * (10 ** rng.uniform(-1, 0, (256, 1, 1, 1))).astype("float32")
    report = export_tflite(model, tmp_path / "m.tflite", quantization="int8", calibration_data=x)
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
def test_rare_weak_samples_are_accurate(preset, scale, tolerance, tmp_path, rng):
    model, x = small_model(), images(rng, 256)
    x[::20] *= scale
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    expected = model.predict(x[::20], verbose=0)
    (actual,) = LiteRT(report.path)(x[::20])
    assert np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)) < tolerance


class Undescribed(layers.Layer):
    """Its config lacks what its constructor needs."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units, use_bias=False)

    def call(self, inputs):
        return self.dense(inputs)

    def get_config(self):
        return {k: v for k, v in super().get_config().items() if k != "units"}


class Forgetful(layers.Layer):
    """Its config makes a layer of other weights."""

    def __init__(self, hidden=3, **kwargs):
        super().__init__(**kwargs)
        self.stack = keras.Sequential([layers.Dense(hidden), layers.Dense(48)])

    def call(self, inputs):
        return self.stack(inputs)

    def get_config(self):
        return {k: v for k, v in super().get_config().items() if k != "hidden"}


def test_layer_whose_config_changes_its_weights_is_not_copied(tmp_path, rng):
    inputs = keras.Input((12, 12, 3))
    x = frn_tlu_layer()(Forgetful(5, name="own")(layers.Conv2D(48, 3)(inputs)))
    model, x = shuffled_weights(keras.Model(inputs, x)), images(rng)
    report = export_tflite(model, tmp_path / "m.tflite")
    close(LiteRT(report.path)(x)[0], model.predict(x, verbose=0), FLOAT)


@pytest.mark.parametrize("preset", [None, "float16", "dynamic", "int8"])
def test_layer_that_its_config_cannot_rebuild_is_not_copied(preset, tmp_path, rng):
    inputs = keras.Input((12, 12, 3))
    x = Undescribed(4, name="own")(layers.Conv2D(48, 3)(inputs))
    x = layers.Conv2D(6, 3)(frn_tlu_layer(name="after")(x))
    model, x = shuffled_weights(keras.Model(inputs, frn_tlu_layer(name="last")(x))), images(rng)
    expected = model.predict(x, verbose=0)
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    close(LiteRT(report.path)(x)[0], expected, PRESETS[preset])
    if preset == "int8":
        assert report.not_equalized == {"after": "own (Undescribed) cannot be scaled"}
        assert report.equalized == ("last",)
    assert len(model.get_layer("own")._inbound_nodes) == 1, "the model stays as it was"


def test_half_precision_layer_that_cannot_be_rebuilt_is_refused(tmp_path):
    inputs = keras.Input((12, 12, 3))
    model = keras.Model(inputs, Undescribed(4, name="own", dtype="mixed_float16")(inputs))
    with pytest.raises(ValueError, match=r"`model` must have .*own in float16.*float32"):
        export_tflite(model, tmp_path / "m.tflite")


def run_in_half(file, x):
    """What a file computes if each operator adds and multiplies in half precision."""
    runtime = LiteRT(file, is_plain=True)
    runtime(x)
    half = {runtime.interpreter.get_input_details()[0]["index"]: x.astype("float16")}
    for op in runtime.list_operators():
        tensors = [runtime.interpreter.get_tensor(i) if i >= 0 else None for i in op["inputs"]]
        a, *rest = (
            half.get(i, t if t.dtype.kind == "i" else t.astype("float16"))
            for i, t in zip(op["inputs"], tensors)
            if t is not None
        )
        name = op["op_name"]
        if name == "CONV_2D":
            kernel, bias = rest
            rows, columns = kernel.shape[1:3]
            size = a.shape[1] - rows + 1, a.shape[2] - columns + 1
            result = np.zeros((len(a), *size, len(kernel)), "float16")
            for r, c, i in np.ndindex(kernel.shape[1:]):
                result += a[:, r : r + size[0], c : c + size[1], i, None] * kernel[:, r, c, i]
            result += bias
        elif name == "MEAN":
            axes = tuple(rest[0].ravel() % a.ndim)
            sums = np.moveaxis(a, axes, range(len(axes)))
            kept = sums.shape[len(axes) :]
            sums = sums.reshape(-1, *kept)
            count = len(sums)
            while len(sums) > 1:
                odd = sums[len(sums) // 2 * 2 :]
                sums = np.concatenate([sums[0 : len(sums) - len(odd) : 2] + sums[1::2], odd])
            result = (sums[0].astype("float32") / count).astype("float16")
            result = result.reshape([1 if i in axes else n for i, n in enumerate(a.shape)])
        elif name == "RESHAPE":
            result = a.reshape(rest[0])
        elif name == "DEQUANTIZE":
            result = a
        else:
            functions = {"MUL": np.multiply, "ADD": np.add, "MAXIMUM": np.maximum}
            functions["RSQRT"] = lambda a: np.float16(1) / np.sqrt(a)
            result = functions[name](a, *rest)
        assert result.dtype == np.float16
        half[op["outputs"][0]] = result
    return result.astype("float32")


@pytest.mark.parametrize("preset", [None, "float16"])
@pytest.mark.parametrize(("size", "largest"), [(32, 255), (256, 255), (256, 1)])
def test_equalized_file_is_accurate_in_half_precision(preset, size, largest, tmp_path, rng):
    """Also in sums. With inputs up to 255 and without equalization the error is 0.99."""
    inputs = keras.Input((size + 2, size + 2, 3))
    model = keras.Model(inputs, frn_tlu_layer()(layers.Conv2D(8, 3)(inputs)))
    x = rng.uniform(0, largest, (4, size + 2, size + 2, 3)).astype("float32")
    x = x * np.geomspace(0.2, 1, len(x), dtype="float32")[:, None, None, None]
    shuffled_weights(model)
    path = tmp_path / "m.tflite"
    export_tflite(model, path, quantization=preset, calibration_data=x)
    shown = x[[0, -1]]
    with np.errstate(over="ignore"):
        actual = run_in_half(path, shown)
    # 27 products and then a sum in 16 steps, each with a rounding of 5e-4.
    close(actual, model.predict(shown, verbose=0), 0.01)
    if preset == "float16":  # a float32 file keeps its epsilon, which is 0 in half precision
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            assert np.isfinite(run_in_half(path, 0 * shown)).all()
