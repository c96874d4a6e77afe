import keras
import numpy as np
import pytest
from exporting import (
    exports,
    frn,
    images,
    small_model,
)
from keras import layers

from keras_frn.export import export_tflite
from keras_frn.export.check import check_outputs, compare, find_bound
from keras_frn.export.signature import specs_of
from keras_frn.samples import Samples

pytestmark = exports
pytest.importorskip("ai_edge_litert")


class Elsewhere(layers.Layer):
    """Computes something else in a graph, as a layer that LiteRT has wrong would."""

    def call(self, inputs):
        import tensorflow as tf

        return inputs if tf.executing_eagerly() else inputs + 0.01


def test_wrong_float_file_is_refused_and_the_layer_named(tmp_path):
    after = [layers.Conv2D(4, 3), Elsewhere(name="elsewhere"), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(6, 3), frn(), *after])
    with pytest.raises(ValueError, match=r"computes the same.*The first layer to differ is else"):
        export_tflite(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_wrong_layer_is_found_between_parallel_branches(tmp_path):
    """The first half of the layers does not end in a single tensor."""
    inputs = keras.Input((12, 12, 3))
    plain = wrong = inputs
    for i in range(4):
        plain = layers.Conv2D(4, 1, name=f"plain_{i}")(plain)
        wrong = Elsewhere(name="wrong")(wrong) if i == 1 else layers.Conv2D(4, 1)(wrong)
    model = keras.Model(inputs, layers.Add()([plain, wrong]))
    with pytest.raises(ValueError, match="The first layer to differ is wrong"):
        export_tflite(model, tmp_path / "m.tflite")


def test_integers_differ_by_how_many_they_are(rng):
    inputs = keras.Input((8,))
    model, x = keras.Model(inputs, keras.ops.argmax(inputs, -1)), rng.normal(size=(20, 8))
    specs = specs_of(model, None)
    wrong = [np.where(np.arange(20) < 3, 7 - x.argmax(-1), x.argmax(-1))]
    found = compare(model, lambda *_: wrong, specs, Samples(model, x, keras.tree.flatten(specs)))
    assert (found.max_error, found.fraction, found.agreement) == (0.15, 0.15, 0.85)


def test_output_of_a_single_number_is_compared(tmp_path, rng):
    inputs = keras.Input((12, 12, 3))
    model = keras.Model(inputs, keras.ops.mean(frn()(layers.Conv2D(6, 3)(inputs))))
    assert export_tflite(model, tmp_path / "m.tflite").max_error < 1e-6


def test_error_beyond_the_limit_warns(tmp_path, rng):
    model = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(6, 3), frn(), Elsewhere()])
    with pytest.warns(UserWarning, match=r"differ .* by up to .*float16 should stay within 0.01"):
        report = export_tflite(
            keras.Sequential([model, layers.Rescaling(0.1), Elsewhere()]),
            tmp_path / "m.tflite",
            quantization="float16",
            calibration_data=images(rng),
        )
    assert "float16 should stay within 0.01" in str(report)


def ill_conditioned_model():
    """FRN on single positions without a learned epsilon is the sign of its input."""
    blocks = [layer for _ in range(6) for layer in (layers.Dense(128), frn(epsilon=1e-9))]
    return keras.Sequential([keras.Input((16,)), *blocks])


@pytest.mark.filterwarnings("ignore:Layer .* normalizes single positions")
def test_ill_conditioned_model_is_exported_with_a_warning(tmp_path, rng):
    model = ill_conditioned_model()
    with pytest.warns(UserWarning, match="amplifies roundings.*should learn epsilon"):
        report = export_tflite(
            model,
            tmp_path / "m.tflite",
            quantization=None,
            calibration_data=images(rng, 500, (16,)),
        )
    assert report.max_error > 1e-4


@pytest.mark.filterwarnings("ignore:Layer .* normalizes single positions")
@pytest.mark.parametrize("is_ill_conditioned", [False, True])
def test_float_file_near_its_limit_warns_if_roundings_are_amplified(is_ill_conditioned, rng):
    model, x = small_model(), images(rng)
    if is_ill_conditioned:
        model, x = ill_conditioned_model(), images(rng, 500, (16,))
    specs = specs_of(model, None)
    samples = Samples(model, x, keras.tree.flatten(specs))
    doubts = check_outputs(model, specs, samples, None, 0.8 * find_bound(model, None), None)
    assert ["amplifies roundings" in text for text in doubts] == [True] * is_ill_conditioned


def test_nan_from_the_file_alone_is_an_error(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(
        "keras_frn.export.LiteRT.__call__", lambda self, x: [np.full((len(x), 5), np.nan, "f4")]
    )
    with pytest.raises(ValueError, match="up to inf of their range"):
        export_tflite(
            small_model(),
            tmp_path / "m.tflite",
            quantization=None,
            calibration_data=images(rng),
        )


def test_refusal_of_a_kernel_names_the_operator(tmp_path, rng, monkeypatch):
    """LiteRT's own text has a line of its code first, and the operator as a node last."""

    def refuse(*_):
        raise RuntimeError(
            "kernels/add.cc:227 a == b was not true.Node number 2 (ADD) failed to prepare."
        )

    monkeypatch.setattr("ai_edge_litert.interpreter.Interpreter.get_signature_runner", refuse)
    refusal = r"gives: LiteRT refuses ADD \(kernels/add.cc:227 a == b was not true\)\. Try"
    with pytest.raises(ValueError, match=refusal):
        export_tflite(small_model(), tmp_path / "m.tflite", calibration_data=images(rng))
    assert not list(tmp_path.iterdir())
