"""From one vectorized call the gradient of each example, equal to that of a batch of one."""

import keras
import numpy as np
import pytest
from backends import BACKEND, numpy
from reference import PARAMETER_GRADIENT, close

from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

EXAMPLES = 6


def network(first):
    """PyTorch's `vmap` cannot run Keras' channels-last convolutions: channels come first there."""
    torch = BACKEND == "torch"
    shape, axis = ((3, 9, 8), 1) if torch else ((9, 8, 3), -1)
    options = {"data_format": "channels_first" if torch else "channels_last"}
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(8, 3, **options),
            *first(axis),
            keras.layers.Conv2D(8, 3, strides=2, **options),
            FilterResponseNormalizationTLU(axis=axis, learned_epsilon="per_channel"),
            keras.layers.GlobalAveragePooling2D(**options),
            keras.layers.Dense(3),
        ]
    )


def data(rng):
    shape = (EXAMPLES, 3, 9, 8) if BACKEND == "torch" else (EXAMPLES, 9, 8, 3)
    scales = 10.0 ** rng.uniform(-2, 2, (EXAMPLES, 1, 1, 1))  # no example like the others
    return (scales * rng.normal(size=shape)).astype("float32"), rng.integers(0, 3, EXAMPLES)


def jax_gradients(model, x, y):
    """In one call, and one by one."""
    import jax

    def loss(weights, x, y):
        logits, _ = model.stateless_call(weights, [], x[None], training=True)
        return -jax.nn.log_softmax(logits)[0, y]

    weights = [v.value for v in model.trainable_variables]
    gradient = jax.jit(jax.grad(loss))
    return jax.vmap(gradient, (None, 0, 0))(weights, x, y), [
        gradient(weights, *example) for example in zip(x, y)
    ]


def torch_gradients(model, x, y):
    import torch

    def loss(weights, x, y):
        logits, _ = model.stateless_call(weights, [], x[None], training=True)
        return torch.nn.functional.cross_entropy(logits, y[None])

    weights = [v.value.detach() for v in model.trainable_variables]
    x, y = torch.tensor(x), torch.tensor(y)
    gradient = torch.func.grad(loss)
    return torch.func.vmap(gradient, (None, 0, 0))(weights, x, y), [
        gradient(weights, *example) for example in zip(x, y)
    ]


def tensorflow_gradients(model, x, y, method):
    import tensorflow as tf

    losses = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    weights = model.trainable_variables

    def gradient(example):
        x, y = example
        with tf.GradientTape() as tape:
            loss = losses(y[None], model(x[None], training=True))
        return tape.gradient(loss, weights)

    @tf.function
    def jacobian(x, y):
        with tf.GradientTape() as tape:
            loss = losses(y, model(x, training=True))
        return tape.jacobian(loss, weights)

    @tf.function
    def vectorized(x, y):
        return tf.vectorized_map(gradient, (x, y), fallback_to_while_loop=False)

    together = {"jacobian": jacobian, "vectorized_map": vectorized}[method]
    x, y = tf.constant(x), tf.constant(y)
    return together(x, y), [gradient(example) for example in zip(x, y)]


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(lambda axis: [FilterResponseNormalizationTLU(axis=axis)], id="fused"),
        pytest.param(
            lambda axis: [FilterResponseNormalization(axis=axis), TLU(axis=axis)], id="two"
        ),
        pytest.param(lambda axis: [FilterResponseNormalizationTLU(axis, affine=True)], id="affine"),
    ],
)
@pytest.mark.parametrize(
    "method", ["jacobian", "vectorized_map"] if BACKEND == "tensorflow" else ["vmap"]
)
def test_per_example_gradients_in_one_call(method, first, rng):
    model = network(first)
    x, y = data(rng)
    if BACKEND == "tensorflow":
        together, singles = tensorflow_gradients(model, x, y, method)
    else:
        of_backend = {"jax": jax_gradients, "torch": torch_gradients}[BACKEND]
        together, singles = of_backend(model, x, y)
    for name, gradients, *ones in zip(
        [v.path for v in model.trainable_variables], together, *singles, strict=True
    ):
        assert len(gradients) == EXAMPLES
        for gradient, one in zip(gradients, ones):
            # Sums over positions in another order.
            close(numpy(gradient), numpy(one), PARAMETER_GRADIENT)
        assert any(np.any(numpy(one) != 0) for one in ones), name


@pytest.mark.skipif(BACKEND != "jax", reason="a comparison, once")
def test_batch_normalization_has_no_per_example_gradients(rng):
    """The gradient of an example depends on the other examples."""
    import jax

    x, _ = data(rng)
    gradients = []
    for layer in (FilterResponseNormalizationTLU(), keras.layers.BatchNormalization()):
        model = keras.Sequential([keras.Input(x.shape[1:]), layer])

        def loss(x, model=model):
            weights, state = model.trainable_variables, model.non_trainable_variables
            values = ([v.value for v in variables] for variables in (weights, state))
            return (model.stateless_call(*values, x, training=True)[0][0] ** 3).sum()

        others = x.copy()
        others[1:] *= 2
        gradients.append([np.asarray(jax.grad(loss)(a)[0]) for a in (x, others)])
    (first, second), (batch_first, batch_second) = gradients
    np.testing.assert_array_equal(first, second)
    assert np.max(np.abs(batch_first - batch_second)) > 0.1 * np.max(np.abs(batch_first))
