import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND, layer_gradients, numpy
from reference import INPUT_GRADIENT, VALUE, close, frn_tlu

from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU, compilation

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow graphs")
jax_only = pytest.mark.skipif(BACKEND != "jax", reason="of JAX programs")
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="of torch.compile")
compiled_by_xla = pytest.mark.skipif(BACKEND == "torch", reason="reads XLA programs")

STACKS_OF_LAYERS = {
    "fused": lambda: [FilterResponseNormalizationTLU()],
    "one after the other": lambda: [FilterResponseNormalization(), TLU()],
}
STACKS = pytest.mark.parametrize("stack", STACKS_OF_LAYERS)
SHAPE = (4, 16, 24, 32)


@pytest.mark.slow
@compiled_by_xla
def test_each_shape_is_compiled_once():
    """Batch and image sizes change; each setting of the layers, the model compiled or not."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("compilations.py")],
        env={**os.environ, "KERAS_BACKEND": BACKEND, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    for record in json.loads(result.stdout):
        assert record["programs"] > 0, "what the count is to see"
        assert record["more programs"] == 0, record


@jax_only
def test_network_memory_is_no_more_than_with_relu():
    import jax

    def temporary(normalize):
        inputs = x = keras.Input((32, 32, 3))
        for filters in (16, 16, 16):
            x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            for layer in normalize():
                x = layer(x)
        model = keras.Model(inputs, x)
        weights = [v.value for v in model.trainable_variables]

        def loss(x, weights):
            return (model.stateless_call(weights, [], x)[0] ** 2).sum()

        x = jax.ShapeDtypeStruct((8, 32, 32, 3), "float32")
        program = jax.jit(jax.grad(loss, 1)).lower(x, weights).compile()
        return program.memory_analysis().temp_size_in_bytes

    relu = temporary(lambda: [keras.layers.ReLU()])
    for stack in STACKS_OF_LAYERS.values():
        # Means and small tensors are a hundredth of a feature map here.
        assert temporary(stack) < 1.05 * relu
    assert temporary(lambda: [AsWritten()]) > 1.5 * relu, "what the analysis is to see"


class AsWritten(FilterResponseNormalizationTLU):
    """The formula as the paper writes it."""

    def call(self, x):
        nu2 = keras.ops.mean(keras.ops.square(x), axis=(1, 2), keepdims=True)
        y = self.gamma * (x * keras.ops.rsqrt(nu2 + 1e-6)) + self.beta
        return keras.ops.maximum(y, self.tau)


@jax_only
@STACKS
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_network_lowers_for_other_platforms(stack, platform):
    import jax
    import jax.export

    layers = STACKS_OF_LAYERS[stack]()
    for layer in layers:
        layer.build(SHAPE)

    def loss(x):
        for layer in layers:
            values = [v.value for v in layer.trainable_variables]
            x, _ = layer.stateless_call(values, [], x)
        return (x**2).sum()

    exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(
        jax.ShapeDtypeStruct(SHAPE, "float32")
    )
    assert exported.platforms == (platform,)
    assert "custom_call" not in exported.mlir_module()


def small_model(jit_compile, shape=(8, 8, 3)):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(6, 3, use_bias=False),
            FilterResponseNormalization(jit_compile=jit_compile),
            TLU(jit_compile=jit_compile),
            keras.layers.Conv2D(4, 3, use_bias=False),
            FilterResponseNormalizationTLU(learned_epsilon=True, jit_compile=jit_compile),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )


# Without `jit_compile` JAX and PyTorch run eagerly. With it PyTorch needs minutes for a step.
MODES = {
    "tensorflow": [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}],
    "jax": [{"jit_compile": False}, {"jit_compile": True}],
    "torch": [{"jit_compile": False}],
}


@pytest.mark.parametrize("mode", MODES[BACKEND], ids=str)
def test_fit_in_each_mode(mode, rng):
    x = rng.normal(size=(24, 8, 8, 3)).astype("float32")
    y = x.std((1, 2))[:, :2]
    losses = []
    for jit_compile in (None, False, True):
        model = small_model(jit_compile)
        model.compile(keras.optimizers.Adam(0.01), "mse", **mode)
        history = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
    # Of the last model, whose layers are compiled; batches of 8 again, whose programs are there.
    y_predicted = model.predict(x, batch_size=8, verbose=0)
    assert model.evaluate(x, y, batch_size=8, verbose=0) == pytest.approx(
        float(np.mean((y_predicted - y) ** 2)), rel=1e-4
    )
    # Nine steps of float32 roundings that differ between programs.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    assert losses[1][-1] < losses[1][0]


@pytest.fixture
def graphs_only(monkeypatch):
    """`torch.compile` that finds the graphs of a function, and makes no C++ of them."""
    import torch

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compilation, "_compile", functools.cache(compilation._compile.__wrapped__))


@torch_only
@pytest.mark.parametrize("how", ["jit_compile=True", "torch.compile", "both"])
@STACKS
def test_torch_compiles_each_layer_as_one_graph(stack, how, rng, graphs_only):
    """A tensor between two graphs would be written at full size, in float32."""
    import torch

    x = torch.tensor(rng.normal(size=(2, 4, 4, 3)), dtype=torch.bfloat16, requires_grad=True)
    learned = FilterResponseNormalizationTLU(learned_epsilon=True)
    for layer in [*STACKS_OF_LAYERS[stack](), learned]:
        layer.jit_compile = True if how != "torch.compile" else None
        layer.build(x.shape)
        run = layer if how == "jit_compile=True" else torch.compile(layer)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run(x)
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 1


@torch_only
def test_torch_compiles_all_layers_of_a_large_model(rng, graphs_only):
    """PyTorch stops compiling a function after eight versions, and then runs it eagerly."""
    import torch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for channels in range(1, 13):
        layer = TLU(jit_compile=True)
        layer(rng.normal(size=(2, 3, channels)).astype("float32"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12


@torch_only
def test_torch_func_transforms_work_on_compiled_layers(rng):
    import torch

    x = torch.tensor(rng.normal(size=(3, 4, 5, 2)).astype("float32"))
    for layer in (TLU(), FilterResponseNormalizationTLU()):
        layer.build(x.shape)

        def gradients(layer=layer):
            gradient = torch.func.grad(lambda x: (layer(x[None]) ** 2).sum())
            return torch.func.vmap(gradient)(x)

        expected = gradients()
        layer.jit_compile = True
        torch.testing.assert_close(gradients(), expected)


@torch_only
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
# Checks of shapes are constants of the graph, as they should be.
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python")
@pytest.mark.filterwarnings("ignore:Using len to get tensor shape")
@pytest.mark.filterwarnings("ignore:Iterating over a tensor")
@STACKS
def test_torch_trace_is_the_same_with_and_without_gradients(stack, rng):
    import torch

    x = torch.tensor(rng.normal(size=(2, 4, 4, 3)), dtype=torch.float32)
    layers = torch.nn.Sequential(*STACKS_OF_LAYERS[stack]())
    expected = layers(x)
    # The check of `trace` fails where the graph differs between two calls.
    with_gradients = torch.jit.trace(layers, x)
    with torch.no_grad():
        without = torch.jit.trace(layers, x)
    for traced in (with_gradients, without):
        torch.testing.assert_close(traced(x), expected)


@jax_only
def test_rematerialization_keeps_the_gradients(rng):
    import jax

    x = rng.normal(size=(2, 5, 6, 3)).astype("float32")

    def gradients(mode):
        with keras.RematScope(mode=mode):
            layer = FilterResponseNormalizationTLU(learned_epsilon=True)
        layer.build(x.shape)
        weights = [v.value for v in layer.trainable_variables]
        return jax.grad(lambda w: (layer.stateless_call(w, [], x)[0] ** 2).sum())(weights)

    for actual, expected in zip(gradients("full"), gradients(None), strict=True):
        close(numpy(actual), numpy(expected), INPUT_GRADIENT)


def test_compiled_program_takes_weights_as_arguments(rng):
    """A compiled program that had closed over the weights would not see the assignment."""
    x = rng.normal(size=(2, 6, 6, 3)).astype("float32")
    layer = FilterResponseNormalizationTLU(learned_epsilon=True, jit_compile=True)
    close(numpy(layer(x)), frn_tlu(x, epsilon=1e-6 + 1e-4, tau=0.0), VALUE)
    for weight, value in zip(layer.weights, (2.0, 0.5, 0.3, -0.7), strict=True):
        weight.assign(np.full(weight.shape, value, "float32"))
    expected = frn_tlu(x, 2.0, 0.5, -0.7, epsilon=0.3 + 1e-6)
    close(numpy(layer(x)), expected, VALUE)
    other = FilterResponseNormalizationTLU(jit_compile=True)  # another layer, the same program
    close(numpy(other(x)), frn_tlu(x, tau=0.0), VALUE)


@pytest.mark.parametrize("jit_compile", [None, True])
def test_gradient_at_a_tie_goes_to_tau(jit_compile):
    layer = TLU(jit_compile=jit_compile)
    x = np.zeros((2, 3), "float32")
    layer.build(x.shape)
    _, found = layer_gradients(layer, x, x + 1)
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["tau"], [2, 2, 2])


def test_mask_may_be_a_list():
    x = np.ones((1, 2, 3), "float32")
    layer = FilterResponseNormalization(jit_compile=True)
    close(numpy(layer(x, mask=[[True, False]])), frn_tlu(x, mask=np.array([[True, False]])), VALUE)


def test_jit_compile_with_many_shapes(rng):
    layer = FilterResponseNormalization(learned_epsilon=True, jit_compile=True)
    for batch, size in [(1, 4), (2, 4), (5, 4), (2, 7), (3, 9)]:
        x = rng.normal(size=(batch, size, 6, 3)).astype("float32")
        close(numpy(layer(x)), frn_tlu(x, epsilon=1e-4 + 1e-6), VALUE)


@tensorflow_only
@pytest.mark.parametrize("jit_compile", [None, False, True])
def test_jit_compile_marks_operators_and_adds_no_must_compile(jit_compile):
    import tensorflow as tf

    layer = FilterResponseNormalizationTLU(jit_compile=jit_compile)
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec(SHAPE)).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    assert any(node.attr["_XlaCompile"].b for node in nodes) == bool(jit_compile)
    assert not any("_XlaMustCompile" in node.attr for node in nodes), "ONNX files would not load"


@tensorflow_only
@pytest.mark.parametrize("jit_compile", [True, False])
def test_tensorflow_form_depends_on_jit_compile(jit_compile):
    """XLA gets one sum of the squares and selections; TensorFlow's own kernels get a mean of means
    and the gradient of a ReLU."""
    import tensorflow as tf

    layer = FilterResponseNormalizationTLU()
    layer.build((2, 80, 80, 4))

    @tf.function(jit_compile=jit_compile)
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = tf.cond(tf.size(x) > 0, lambda: layer(x), lambda: x)  # a graph within the graph
        return tape.gradient(z, x)

    graph = step.get_concrete_function(tf.TensorSpec((2, 80, 80, 4))).graph.as_graph_def()
    operators = [node.op for f in graph.library.function for node in f.node_def]
    assert ("ReluGrad" in operators) != jit_compile
    assert operators.count("Mean") >= (1 if jit_compile else 2)
    assert ("SelectV2" in operators) == jit_compile


@tensorflow_only
def test_layers_of_one_shape_share_a_program(rng):
    from keras_frn.compilation import _compile

    x = rng.normal(size=(2, 5, 6, 3)).astype("float32")
    _compile.cache_clear()
    for layer in (FilterResponseNormalizationTLU(jit_compile=True) for _ in range(3)):
        layer(x)
    assert _compile.cache_info().misses == 1
    FilterResponseNormalizationTLU(jit_compile=True, epsilon=1e-3)(x)
    assert _compile.cache_info().misses == 2


@tensorflow_only
def test_all_kinds_of_derivatives_in_a_graph(rng):
    """Compared with eager mode, one example at a time."""
    import tensorflow as tf

    layers = [
        FilterResponseNormalizationTLU(learned_epsilon=True, jit_compile=True),
        TLU(affine=True, jit_compile=True),
    ]
    for layer in layers:
        layer.build((None, 6, 6, 3))
    weights = [v.value for layer in layers for v in layer.trainable_variables]
    x = tf.constant(rng.normal(size=(4, 6, 6, 3)).astype("float32"))

    def loss(x):
        for layer in layers:
            x = layer(x)
        return tf.reduce_sum(x**3, axis=(1, 2, 3))

    def gradients(x):
        with tf.GradientTape() as tape:
            value = loss(x[None])
        return tape.gradient(value, weights)

    def second(x):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = loss(x)
            square = tf.reduce_sum(inner.gradient(value, x) ** 2)
        return outer.gradient(square, x)

    def forward(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            value = loss(x)
        return accumulator.jvp(value)

    per_example = tf.function(lambda x: tf.vectorized_map(lambda x: gradients(x), x))(x)
    expected = zip(*(gradients(x[i]) for i in range(4)), strict=True)
    for actual, one_by_one in zip(per_example, expected, strict=True):
        close(numpy(actual), np.stack([numpy(g) for g in one_by_one]), INPUT_GRADIENT)
    for derivative in (second, forward):
        actual = tf.function(derivative)(x)
        # Second derivatives add up two gradients' rounding errors.
        close(numpy(actual), numpy(derivative(x)), 2 * INPUT_GRADIENT)


@tensorflow_only
def test_litert_trains_on_device(rng, tmp_path):
    """A training step is a LiteRT signature.

    With FRN alone: TLU has the gradient of ReLU, for which LiteRT needs Flex operators."""
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    layer = FilterResponseNormalization(jit_compile=True)
    layer.build((2, 6, 6, 3))
    weights = [v.value for v in layer.trainable_variables]

    class Trainer(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((2, 6, 6, 3))])
        def step(self, x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((layer(x, training=True) - 1) ** 2)
            for weight, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
                weight.assign_sub(0.1 * gradient)
            return {"loss": loss}

    trainer = Trainer()
    trainer.weights = weights
    tf.saved_model.save(trainer, tmp_path / "saved", signatures={"step": trainer.step})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    converter.target_spec.supported_ops = [
        tf.lite.OpsSet.TFLITE_BUILTINS,
        tf.lite.OpsSet.SELECT_TF_OPS,
    ]
    converter.experimental_enable_resource_variables = True
    content = converter.convert()
    x = rng.normal(size=(2, 6, 6, 3)).astype("float32")
    step = Interpreter(model_content=content).get_signature_runner("step")
    losses = [float(step(x=x)["loss"]) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


@tensorflow_only
def test_gradient_penalty_reaches_every_weight(rng):
    """That of the last beta and tau is zero, as with BatchNormalization and ReLU, and not None."""
    import tensorflow as tf

    layer = FilterResponseNormalizationTLU()
    x = tf.constant(rng.normal(size=(2, 5, 6, 3)).astype("float32"))
    layer.build(x.shape)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            inner.watch(x)
            z = layer(x)
        penalty = tf.reduce_sum(inner.gradient(z, x) ** 2)
    gamma, beta, tau = outer.gradient(penalty, [v.value for v in layer.trainable_variables])
    assert np.abs(gamma).max() > 0
    np.testing.assert_array_equal(beta, np.zeros(3))
    np.testing.assert_array_equal(tau, np.zeros(3))


@tensorflow_only
def test_statistics_have_a_name_scope():
    import tensorflow as tf

    layer = FilterResponseNormalizationTLU()
    layer.build(SHAPE)
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec(SHAPE)).graph
    named = {op.type for op in graph.get_operations() if "frn_statistics" in op.name}
    assert {"Mean", "Rsqrt"} <= named


@tensorflow_only
@pytest.mark.parametrize("jit_compile", [None, True])
def test_gradients_through_a_reloaded_saved_model(jit_compile, rng, tmp_path):
    import tensorflow as tf

    layer = FilterResponseNormalizationTLU(jit_compile=jit_compile)
    model = keras.Sequential([keras.Input((None, None, 3)), layer])
    model.export(tmp_path / "saved", verbose=False)
    reloaded = tf.saved_model.load(tmp_path / "saved")
    x, upstream = rng.normal(size=(2, 2, 9, 7, 3)).astype("float32")
    tensor = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(tensor)
        z = reloaded.serve(tensor)
    expected, gradients = frn_tlu(x, tau=0.0, upstream=upstream)
    close(z, expected, VALUE)
    close(tape.gradient(z, tensor, upstream), gradients["x"], INPUT_GRADIENT)
