import keras
import numpy as np
import pytest
from exporting import PRESETS, exports, frn_tlu_layer, images, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from reference import close

from keras_frn.export import export_tflite
from keras_frn.export.ranges import measure_ranges
from keras_frn.export.runtime import LiteRT

pytestmark = exports
pytest.importorskip("ai_edge_litert")


class Batches:
    fixed_size = None

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter([[batch] for batch in self.batches])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A float file with its tensors in sight."""
    path = tmp_path_factory.mktemp("ranges") / "m.tflite"
    export_tflite(small_model(), path)
    return LiteRT(path, is_plain=True)


@given(
    offset=st.sampled_from([0.0, 1.0, -3.0, 1e-30]),
    scale=st.sampled_from([0.0, 1e-45, 1e-38, 1e-7, 1.0, 1e10, 1e25]),
    count=st.integers(1, 3),
    seed=st.integers(0, 99),
    headroom=st.sampled_from([1.0, 4.0]),
)
@settings(max_examples=60, deadline=None, database=None)
def test_ranges_of_any_data_are_finite(plain, offset, scale, count, seed, headroom):
    """Also of constants, of subnormal numbers, and of those whose squares overflow."""
    x = np.random.default_rng(seed).normal(
        size=(count, *images(np.random.default_rng(0)).shape[1:])
    )
    x = (offset + scale * x).astype("float32")
    ranges = measure_ranges(plain, Batches(x), headroom)
    assert ranges
    for found in ranges.values():
        assert np.all(found["min"] <= found["max"])
        assert np.isfinite([found["min"], found["max"]]).all()
    (given_name,) = (d["name"] for d in plain.interpreter.get_input_details())
    assert ranges[given_name]["max"].item() == headroom * max(x.max(), 0), (
        "an input keeps its range"
    )


@pytest.mark.parametrize("headroom", [1.0, 4.0])
def test_large_samples_are_run_one_by_one(plain, headroom, monkeypatch, rng):
    """All tensors of a run are kept: of 16 volumes of 32 positions a side they had 11 GB."""
    x, sizes, run = images(rng, 5), [], LiteRT.__call__
    monkeypatch.setattr(LiteRT, "__call__", lambda self, x: sizes.append(len(x)) or run(self, x))
    expected = measure_ranges(plain, Batches(x), headroom)
    assert set(sizes) == {5}
    sizes.clear()
    monkeypatch.setattr("keras_frn.export.runtime._KEPT", 1)
    found = measure_ranges(plain, Batches(x[:3], x[3:]), headroom)
    assert set(sizes) == {1}
    for name, ends in expected.items():
        for end in ends:
            # A convolution of one sample may add in another order than that of five.
            np.testing.assert_allclose(found[name][end], ends[end], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*(hardly varies|different sample)")
@pytest.mark.parametrize("value", [1.0, 1e-42])
def test_constant_data_are_exported(value, tmp_path, rng):
    x = np.full_like(images(rng), value)
    report = export_tflite(
        small_model(), tmp_path / "m.tflite", quantization="int8", calibration_data=x
    )
    assert report.max_error_fraction < 0.1, "of 8 bits in each layer"


def test_overflowing_squares_are_named(tmp_path, rng):
    with pytest.raises(ValueError, match="`calibration_data` must have finite squares in every"):
        export_tflite(small_model(), tmp_path / "m.tflite", calibration_data=1e25 * images(rng))


def test_16_bits_reach_beyond_the_calibration_data(tmp_path, rng):
    x, model, path = images(rng), small_model(), tmp_path / "m.tflite"
    export_tflite(model, path, quantization="int16x8", calibration_data=x)
    (actual,) = LiteRT(path)(1.4 * x)
    expected = model.predict(1.4 * x, verbose=0)
    # As on the data themselves, where it is 0.004. Ranges without headroom give 0.04.
    assert np.abs(actual - expected).max() < 0.01 * np.ptp(expected)


def test_activations_leave_16_bits_their_headroom(tmp_path, rng):
    """As layers, as operations and as those of other layers."""
    inputs = keras.Input((12, 12, 3))
    x = frn_tlu_layer()(layers.Conv2D(6, 3)(inputs))
    branches = [
        layers.LeakyReLU(0.2)(x),
        layers.PReLU(keras.initializers.RandomUniform(-0.5, 1.0))(x),
        layers.ReLU(negative_slope=0.1)(x),
        layers.ReLU(6.0)(layers.Identity()(x)),
        layers.ReLU(1.0)(x),
        layers.Activation("leaky_relu")(x),
        layers.Activation("hard_swish")(x),
        layers.Activation("mish")(x),
        layers.ELU(0.7)(x),
        keras.ops.selu(x),
        keras.ops.leaky_relu(x, 0.1),
        keras.ops.hard_silu(x),
        keras.activations.relu6(x),
        keras.ops.clip(x, 0, 6),
        layers.Dense(6, activation="leaky_relu")(x),
        layers.Conv2D(6, 3, padding="same", activation="hard_swish")(x),
        layers.Conv2DTranspose(6, 3, padding="same", activation="relu6")(x),
    ]
    x = layers.GlobalAveragePooling2D()(layers.Concatenate()(branches))
    model = keras.Model(inputs, layers.Dense(4)(x))
    x = images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization="int16x8", calibration_data=x)
    kinds = {"LEAKY_RELU", "PRELU", "HARD_SWISH", "RELU6", "MINIMUM", "ELU", "EXP"}
    assert not kinds & set(report.operators)
    assert not report.warnings, "such as one that TensorFlow's converter wrote the file"
    assert report.max_error_fraction < 0.01, "of 8-bit weights"


def test_steep_activation_stays_as_it_is(tmp_path, rng):
    """max(x, a * x) is a rectifier for a <= 1 only."""
    inputs = keras.Input((12, 12, 3))
    x = layers.PReLU(keras.initializers.Constant(1.5))(layers.Conv2D(4, 3)(inputs))
    model, x = keras.Model(inputs, layers.LeakyReLU(2.0)(x)), images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization="int8", calibration_data=x)
    close(LiteRT(report.path)(x)[0], model.predict(x, verbose=0), PRESETS["int8"])


@pytest.mark.parametrize(("scale", "offset", "high"), [(1 / 127.5, -1, 255), (1.0, -0.5, 1)])
def test_rescaled_images_are_exported_in_16_bits(scale, offset, high, tmp_path, rng):
    """LiteRT refuses sums of 16 bits whose scales are powers of two."""
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, padding="same")(layers.Rescaling(scale, offset)(inputs))
    model = keras.Model(inputs, layers.Conv2D(4, 3)(frn_tlu_layer()(x)))
    x = rng.integers(0, 256, (64, 12, 12, 3)).astype("float32") * high / 255
    x[0, 0, :2] = [[0], [high]]
    export_tflite(model, tmp_path / "m.tflite", quantization="int16x8", calibration_data=x)
    (actual,) = LiteRT(tmp_path / "m.tflite")(x)
    close(actual, model.predict(x, verbose=0), PRESETS["int16x8"])


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics", "int16x8"])
def test_units_that_no_sample_wakes_up_have_a_range(preset, tmp_path, rng):
    """As in a squeeze-and-excite block, where XNNPACK would refuse steps of 1e-11."""
    inputs = keras.Input((12, 12, 3))
    x = frn_tlu_layer()(layers.Conv2D(8, 3)(inputs))
    squeezed = layers.GlobalAveragePooling2D(keepdims=True)(layers.ReLU()(x))
    asleep = keras.initializers.Constant(-0.1)
    squeezed = layers.Dense(4, "relu", use_bias=False, kernel_initializer=asleep)(squeezed)
    gates = layers.Dense(8, "sigmoid", use_bias=False)(squeezed)
    model = keras.Model(inputs, layers.Conv2D(4, 3)(layers.Multiply()([x, gates])))
    x = images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    close(LiteRT(report.path)(x)[0], model.predict(x, verbose=0), PRESETS[preset])
    assert not report.warnings


@pytest.mark.parametrize(("preset", "shift"), [("int8", 20), ("int16x8", 15)])
def test_a_sum_of_nothing_but_roundings_has_the_range_of_what_it_adds(preset, shift, tmp_path, rng):
    """As in an ELU of positive numbers, where TensorFlow Lite Micro would end the process."""
    positive = [layers.Conv2D(8, 3), layers.ReLU(), layers.ELU(), layers.Conv2D(4, 3)]
    model = keras.Sequential([keras.Input((12, 12, 3)), *positive])
    x = images(rng)
    report = export_tflite(model, tmp_path / "m.tflite", quantization=preset, calibration_data=x)
    close(LiteRT(report.path)(x)[0], model.predict(x, verbose=0), PRESETS[preset])
    runtime = LiteRT(report.path, is_plain=True)
    scales = {i: t["quantization"][0] for i, t in runtime.list_tensors().items()}
    sums = [op for op in runtime.list_operators() if op["op_name"] in ("ADD", "SUB")]
    assert len(sums) >= 3
    for op in sums:
        # What TensorFlow Lite Micro checks.
        assert 2 * max(scales[i] for i in op["inputs"]) < 2**shift * scales[op["outputs"][0]]


@pytest.mark.parametrize("layer", [layers.Conv2D, layers.DepthwiseConv2D])
@pytest.mark.filterwarnings("ignore:the outputs differ from the model")
def test_filter_whose_steps_leave_the_output_is_exported(layer, tmp_path, rng):
    """XNNPACK refuses such a convolution, and does not survive it if it is depthwise."""
    kernel = layer(*([6] if layer is layers.Conv2D else []), 3, use_bias=False)
    model = keras.Sequential(
        [keras.Input((12, 12, 6)), layers.ReLU(), kernel, layers.ReLU(), layers.Conv2D(6, 1)]
    )
    weights = kernel.get_weights()[0]
    weights[:, :, 0] = -1e6  # it gives zeros after the ReLU, as `x` is positive there
    if layer is layers.Conv2D:
        weights[..., 1:] = 0.01
        weights[:, :, 0, 0], weights[:, :, 1:, 0] = -1e6, 0
    kernel.set_weights([weights])
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization="int8",
        calibration_data=np.abs(images(rng, 64, (12, 12, 6))),
    )
    assert not report.in_float
