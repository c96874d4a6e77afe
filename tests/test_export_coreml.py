"""Core ML, by way of a trace of PyTorch or of a SavedModel. Linux converts, and does not run it."""

import warnings

import keras
import pytest
from backends import BACKEND
from exporting import shuffled_weights
from keras import layers

import keras_frn

SHAPE = (1, 8, 8, 3)


def model_with_gates():
    """Both forms of the layers, and a gate, whose normalization sees one position."""
    inputs = keras.Input(batch_shape=SHAPE)
    x = layers.Conv2D(6, 3, padding="same", use_bias=False)(inputs)
    x = keras_frn.FilterResponseNormalization()(x)
    x = keras_frn.TLU(affine=True)(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(6, 1)(gate)
    gate = keras_frn.FilterResponseNormalizationTLU(learned_epsilon="per_channel")(gate)
    x = layers.Multiply()([x, layers.Activation("hard_sigmoid")(gate)])
    return shuffled_weights(
        keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))
    )


def trace(model):
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        # Of the tracer: that it is to be replaced, and of sizes that Keras reads.
        warnings.simplefilter("ignore")
        return torch.jit.trace(model.eval(), torch.zeros(SHAPE))


@pytest.mark.skipif(BACKEND != "torch", reason="traces PyTorch")
def test_trace_uses_the_maximum_of_two_tensors():
    """coremltools refuses `clamp` with a tensor as the bound."""
    graph = str(trace(model_with_gates()).inlined_graph)
    assert graph.count("aten::maximum") == 2
    tensors = [line for line in graph.splitlines() if "aten::clamp" in line and "Float(" in line]
    assert not [line for line in tensors if line.count("Float(") > 1]


@pytest.mark.skipif(BACKEND == "jax", reason="coremltools reads PyTorch and TensorFlow")
def test_coremltools_converts_each_layer(tmp_path):
    coremltools = pytest.importorskip("coremltools")
    model = model_with_gates()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions that coremltools was not tested with
        if BACKEND == "torch":
            inputs = [coremltools.TensorType(shape=SHAPE)]
            converted = coremltools.convert(trace(model), inputs=inputs)
        else:
            import tensorflow as tf

            model.export(tmp_path, format="tf_saved_model", verbose=False)
            loaded = tf.saved_model.load(str(tmp_path))  # its functions need it alive
            functions = [loaded.signatures["serving_default"]]
            converted = coremltools.convert(functions, source="tensorflow")
    (output,) = converted.get_spec().description.output
    assert tuple(output.type.multiArrayType.shape) in {(), (1, 5)}
