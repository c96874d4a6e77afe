import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy
from programs import SHAPE
from programs import STACKS as STACKS_OF_LAYERS
from reference import INPUT_GRADIENT, VALUE, close, frn_tlu

import keras_frn
from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow graphs")
jax_only = pytest.mark.skipif(BACKEND != "jax", reason="of JAX programs")
torch_only = pytest.mark.skipif(BACKEND != "torch", reason="of torch.compile")
compiled_by_xla = pytest.mark.skipif(BACKEND == "torch", reason="reads XLA programs")

STACKS = pytest.mark.parametrize("stack", ["fused", "one after the other"])


@pytest.fixture(scope="module", params=[True, False], ids=["XLA's fusion", "with CPU libraries"])
def programs(request):
    """What XLA compiles for a CPU: by its own fusion alone, or with libraries for sums."""
    only_xla = request.param
    flags = "--xla_cpu_experimental_ynn_fusion_type=" if only_xla else ""
    # By default XLA on a CPU cuts sums over more than 32 positions in two.
    shape = SHAPE if only_xla else (4, 40, 48, 32)
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("programs.py"), *map(str, shape)],
        env={**os.environ, "KERAS_BACKEND": BACKEND, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    return only_xla, json.loads(result.stdout)


@compiled_by_xla
@STACKS
def test_only_outputs_are_written_at_full_size(programs, stack):
    only_xla, found = programs
    forward, both = found[stack]["writes"]
    assert forward == 1, "the output"
    # The libraries sum what is in memory: the gradient that reaches y is put where the gradient of
    # the input will be, one write more and no memory.
    assert both == (2 if only_xla else 3), "the output and the gradient of the input"
    if not only_xla:
        assert found["as written"]["writes"][1] > both, "what the count is to see"


@jax_only
@STACKS
def test_each_sum_over_the_tensor_is_made_once(programs, stack):
    only_xla, found = programs
    if only_xla:
        pytest.skip("XLA's own sums take other operators")
    assert found[stack]["sums"] == [1, 4], "squares; gradients, above tau, and times x"


@jax_only
@STACKS
def test_no_temporary_memory(programs, stack):
    only_xla, found = programs
    # A row of means and statistics: 1 / 24 of the input here.
    assert max(found[stack]["temporary"]) < 1 / 8
    if not only_xla:
        assert found["as written"]["temporary"][1] > 1, "what the analysis is to see"


@jax_only
@STACKS
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_other_platforms(stack, platform):
    import jax
    import jax.export

    layers = STACKS_OF_LAYERS[stack]()
    for layer in layers:
        layer.build(SHAPE)

    def loss(x):
        for layer in layers:
            values = [v.value for v in layer.trainable_variables]
            x, _ = layer.stateless_call(values, [], x, training=True)
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


@pytest.mark.parametrize(
    "mode", [{"jit_compile": False}, {"jit_compile": True}, {"run_eagerly": True}], ids=str
)
def test_fit_in_each_mode(mode, rng):
    if BACKEND == "torch" and mode.get("jit_compile"):
        pytest.skip("Keras' own torch.compile of the training step takes minutes here")
    x = rng.normal(size=(24, 8, 8, 3)).astype("float32")
    y = x.std((1, 2))[:, :2]
    losses = []
    for jit_compile in (None, False, True):
        model = small_model(jit_compile)
        model.compile(keras.optimizers.Adam(0.01), "mse", **mode)
        history = model.fit(x, y, batch_size=8, epochs=3, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
        assert model.evaluate(x, y, verbose=0) == pytest.approx(
            float(np.mean((model.predict(x, verbose=0) - y) ** 2)), rel=1e-4
        )
    # Nine steps of float32 roundings that differ between programs.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
    assert losses[1][-1] < losses[1][0]


@torch_only
@pytest.mark.parametrize("how", ["jit_compile=True", "torch.compile", "both"])
@STACKS
def test_torch_compiles_each_layer_as_one_graph(stack, how, rng):
    """What goes from one graph to another is written at full size, in float32."""
    import torch

    x = torch.tensor(rng.normal(size=(2, 4, 4, 3)), dtype=torch.bfloat16, requires_grad=True)
    learned = FilterResponseNormalizationTLU(learned_epsilon=True)
    for layer in [*STACKS_OF_LAYERS[stack](), learned]:
        layer.jit_compile = True if how != "torch.compile" else None
        layer.build(x.shape)
        run = layer if how == "jit_compile=True" else torch.compile(layer, backend="eager")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run(x)
        counters = torch._dynamo.utils.counters
        assert not counters["graph_break"]
        assert counters["stats"]["unique_graphs"] == 1


@torch_only
def test_torch_compiles_every_layer_of_a_large_model(rng):
    """It gives up at the eighth version of a function, and runs it as it is."""
    import torch

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for channels in range(1, 13):
        layer = TLU(jit_compile=True)
        layer(rng.normal(size=(2, 3, channels)).astype("float32"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12


@torch_only
def test_torch_transforms_of_compiled_layers(rng):
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
@pytest.mark.parametrize("affine", [False, True])
@STACKS
def test_torch_keeps_only_the_input(stack, affine, rng):
    import torch

    x = torch.tensor(rng.normal(size=(2, 8, 8, 16)), dtype=torch.float32, requires_grad=True)
    for layer in STACKS_OF_LAYERS[stack]():
        layer.jit_compile = True
        layer.affine = affine and hasattr(layer, "affine")
        layer.build(x.shape)
        kept = layer(x).grad_fn.saved_tensors
        assert [t.data_ptr() for t in kept if t.numel() >= x.numel()] == [x.data_ptr()]


def test_supports_jit():
    for cls in (FilterResponseNormalization, TLU, FilterResponseNormalizationTLU):
        assert cls().supports_jit


def test_weights_are_arguments_of_the_compiled_program(rng):
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


def test_many_shapes_under_jit_compile(rng):
    layer = FilterResponseNormalization(learned_epsilon=True, jit_compile=True)
    for batch, size in [(1, 4), (2, 4), (5, 4), (2, 7), (3, 9)]:
        x = rng.normal(size=(batch, size, 6, 3)).astype("float32")
        close(numpy(layer(x)), frn_tlu(x, epsilon=1e-4 + 1e-6), VALUE)


@tensorflow_only
def test_the_scope_in_a_graph():
    """True marks the ops of any graph, None those of a graph for training, False none.

    When training, the gradient's ops are marked, too, each layer's with a scope of its own."""
    import tensorflow as tf

    for jit_compile, training, batch, marked in (
        (True, False, 4, True),
        (True, True, 4, True),
        (None, True, None, True),
        (None, True, 16, True),
        (None, True, 4, False),  # too small to be worth it
        (None, False, None, False),
        (False, True, None, False),
    ):
        layers = [FilterResponseNormalizationTLU(jit_compile=jit_compile) for _ in range(2)]

        def step(x, layers=layers, training=training):
            with tf.GradientTape() as tape:
                tape.watch(x)
                z = layers[1](layers[0](x, training=training), training=training)
            return tape.gradient(z, x)

        x = tf.TensorSpec((batch, *SHAPE[1:]))
        graph = tf.function(step).get_concrete_function(x).graph.as_graph_def()
        nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
        in_scope = [node for node in nodes if node.attr["_XlaCompile"].b]
        assert bool(in_scope) == marked
        assert not any("_XlaMustCompile" in node.attr for node in nodes)
        if marked:
            assert len({node.attr["_XlaScope"].s for node in in_scope}) == 2
        if marked and training:
            assert "RsqrtGrad" in {node.op for node in in_scope}


@tensorflow_only
def test_derivatives_of_every_kind_through_the_clusters_of_a_graph(rng):
    """Against the inference form in eager mode."""
    import tensorflow as tf

    layers = [
        FilterResponseNormalizationTLU(learned_epsilon=True, jit_compile=True),
        TLU(affine=True, jit_compile=True),
    ]
    for layer in layers:
        layer.build((None, 6, 6, 3))
    weights = [v.value for layer in layers for v in layer.trainable_variables]
    x = tf.constant(rng.normal(size=(4, 6, 6, 3)).astype("float32"))

    def loss(x, training):
        for layer in layers:
            x = layer(x, training=training)
        return tf.reduce_sum(x**3, axis=(1, 2, 3))

    def gradients(x, training):
        with tf.GradientTape() as tape:
            value = loss(x[None], training)
        return tape.gradient(value, weights)

    def second(x, training):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                value = loss(x, training)
            square = tf.reduce_sum(inner.gradient(value, x) ** 2)
        return outer.gradient(square, x)

    def forward(x, training):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            value = loss(x, training)
        return accumulator.jvp(value)

    per_example = tf.function(lambda x: tf.vectorized_map(lambda x: gradients(x, True), x))(x)
    expected = zip(*(gradients(x[i], False) for i in range(4)), strict=True)
    for actual, one_by_one in zip(per_example, expected, strict=True):
        close(numpy(actual), np.stack([numpy(g) for g in one_by_one]), INPUT_GRADIENT)
    for derivative in (second, forward):
        actual = tf.function(derivative)(x, True)
        # Second derivatives add up two gradients' rounding errors.
        close(numpy(actual), numpy(derivative(x, False)), 2 * INPUT_GRADIENT)


@tensorflow_only
def test_on_device_training_in_litert(rng, tmp_path):
    """A training step, whose graph has the clusters, is a LiteRT signature."""
    import tensorflow as tf
    from ai_edge_litert.interpreter import Interpreter

    layer = FilterResponseNormalizationTLU(jit_compile=True)
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


def test_public_ops_take_training():
    x = np.ones((1, 2, 2, 1), "float32")
    for training in (True, False):
        close(numpy(keras_frn.ops.tlu(x, np.zeros(1), training=training)), x, 0)
