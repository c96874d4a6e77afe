import keras
import numpy as np
import pytest
from exporting import exports, frn_tlu_layer, images, stack
from keras import layers

from keras_frn.export import export_tflite
from keras_frn.export.runtime import LiteRT

pytestmark = exports
pytest.importorskip("ai_edge_litert")


FOLLOWING = {
    "plain": lambda: layers.Conv2D(6, 3, use_bias=False),
    "grouped": lambda: layers.Conv2D(6, 3, groups=2, use_bias=False),
    "depthwise": lambda: layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
}


@pytest.mark.parametrize("kind", FOLLOWING)
@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics"])
def test_biases_compensate_the_rounding_of_tau(preset, kind, tmp_path, rng):
    """A third to four fifths of a channel's positions are at tau, with the same rounding error."""
    keras.utils.set_random_seed(0)
    model, x = stack(frn_tlu_layer(), FOLLOWING[kind]()), images(rng, 256)
    model.layers[1].tau.assign(np.linspace(-0.3, 0.9, 6))
    expected = model.predict(x, verbose=0)
    path = tmp_path / "m.tflite"
    export_tflite(model, path, quantization=preset, calibration_data=x[:128])
    (actual,) = LiteRT(path)(x[128:])
    shift = np.abs((actual - expected[128:]).mean((0, 1, 2))).max()
    # A step of the output is 0.01 to 0.03, whose own rounding averages out. Uncorrected: 0.0025 to
    # 0.007.
    assert shift < 0.0012


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics"])
def test_layer_that_is_called_twice_keeps_its_corrected_biases_apart(preset, tmp_path, rng):
    """ai-edge-quantizer refuses tensors of one name."""
    conv = layers.Conv2D(3, 3, padding="same")
    model = keras.Sequential([keras.Input((12, 12, 3)), conv, frn_tlu_layer(), conv])
    report = export_tflite(
        model, tmp_path / "m.tflite", quantization=preset, calibration_data=images(rng)
    )
    assert not [text for text in report.warnings if "converter" in text]


class Condition(layers.Layer):
    def call(self, x):
        return keras.ops.cond(keras.ops.mean(x) > 0, lambda: 2 * x, lambda: -x)


@pytest.mark.parametrize("preset", ["int8", "int8_float_statistics"])
@pytest.mark.filterwarnings("ignore:operators stay in float")
def test_model_with_a_condition_is_quantized(preset, tmp_path, rng):
    """Its branches are graphs of their own in the file."""
    model = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(4, 3), Condition()])
    report = export_tflite(
        model, tmp_path / "m.tflite", quantization=preset, calibration_data=images(rng)
    )
    assert report.operators["IF"] == 1
    assert report.max_error_fraction < 0.1, "of 8 bits; 0.07 was seen, and 0.01"
