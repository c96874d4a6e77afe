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
    stored_shapes,
)
from keras import layers
from reference import close

from keras_frn.export import export_tflite
from keras_frn.export.runtime import LiteRT

pytestmark = exports
pytest.importorskip("ai_edge_litert")


def test_unknown_sizes_stay_dynamic(tmp_path, rng):
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
    batches = [images(rng, 32, (9, 9, 3)), images(rng, 33, (7, 12, 3))]
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=iter(batches))
    assert report.samples == 65
    for x in batches:
        close(LiteRT(report.path)(x)[0], model(x, training=False), FLOAT)
    assert export_tflite(model, tmp_path / "m.tflite").operators == report.operators
    for preset in ("int8", "int8_float_statistics", "int16x8"):
        with pytest.raises(ValueError, match=r"one size .*\(7, 12, 3\), \(9, 9, 3\).*'dynamic'"):
            export_tflite(
                model, tmp_path / "m.tflite", quantization=preset, calibration_data=iter(batches)
            )
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization="int8",
        calibration_data=images(rng, 64, (9, 9, 3)),
    )
    assert {(-1, 9, 9, 3), (-1, 7, 7, 6)} <= stored_shapes(report.path)
    assert "takes the size of the calibration data only, (9, 9, 3)" in str(report)


def test_batch_size_is_fixed_by_the_signature(tmp_path, rng):
    model, x = small_model(batch_size=4), images(rng, 30)
    report = export_tflite(model, tmp_path / "m.tflite", calibration_data=x)
    assert report.max_error < FLOAT
    close(LiteRT(report.path)(x[:4])[0], model(x[:4], training=False), FLOAT)


@pytest.mark.parametrize("preset", [None, "int8", "int8_float_statistics", "int16x8"])
def test_signature_fixes_all_sizes(preset, tmp_path, rng):
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
    x = images(rng, 64, (9, 9, 3))
    spec = tf.TensorSpec((1, 9, 9, 3)) if preset else keras.InputSpec(shape=(1, 9, 9, 3))
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization=preset,
        calibration_data=x,
        input_signature=[spec],
    )
    shapes = stored_shapes(report.path)
    assert {(1, 9, 9, 3), (1, 7, 7, 6), (1, 3, 3, 5)} <= shapes
    assert not any(-1 in shape for shape in shapes)
    close(LiteRT(report.path)(x[:1])[0], model(x[:1]), PRESETS[preset])
    with pytest.raises(ValueError, match=r"model's inputs, \(1, 9, 9, 3\).*\(16, 8, 9, 3\)"):
        export_tflite(
            model,
            report.path,
            quantization=preset,
            calibration_data=x[:16, :8],
            input_signature=[spec],
        )


def test_fixed_batch_of_the_model_is_kept(tmp_path, rng):
    report = export_tflite(
        small_model(batch_size=1),
        tmp_path / "m.tflite",
        quantization=None,
        calibration_data=images(rng),
    )
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
def test_wrong_signatures_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"`input_signature` must .*'float32', \(None, 12, 12, 3"):
        export_tflite(small_model(), tmp_path / "m.tflite", input_signature=SIGNATURES[name])


def test_signature_sets_integer_inputs_of_a_subclassed_model(tmp_path, rng):
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


def test_inputs_may_have_names_that_tensorflow_refuses(tmp_path, rng):
    names = ("über 1", "a:0")
    inputs = [keras.Input((4,), name=name) for name in names]
    model = keras.Model(inputs, keras.layers.Subtract()(inputs))
    x = [images(rng, 64, (4,)), 1 + images(rng, 64, (4,))]
    # By the names of the model, in another order than the alphabet's.
    data = dict(zip(names, x, strict=True))
    options = {"quantization": "int8", "calibration_data": data}
    report = export_tflite(model, tmp_path / "m.tflite", **options)
    assert report.ranges == {"ber_1": (x[0].min(), x[0].max()), "a_0": (x[1].min(), x[1].max())}
    (actual,) = LiteRT(report.path, ["ber_1", "a_0"])(*x)
    close(actual, x[0] - x[1], PRESETS["int8"])


def test_signature_of_a_subclassed_model_with_named_inputs(tmp_path, rng):
    class TwoInputs(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            return self.dense(inputs["a"]) + inputs["b"]

    model, data = TwoInputs(), {"a": images(rng, 64, (4,)), "b": images(rng, 64, (3,))}
    model(data)
    shapes = {"a": (1, 4), "b": (1, 3)}
    signature = [{name: keras.InputSpec(shape=shape) for name, shape in shapes.items()}]
    report = export_tflite(
        model,
        tmp_path / "m.tflite",
        quantization=None,
        calibration_data=data,
        input_signature=signature,
    )
    assert report.max_error < FLOAT
    assert {(1, 4), (1, 3)} <= stored_shapes(report.path)
