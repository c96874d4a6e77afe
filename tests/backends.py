"""What tests do differently on each backend: gradients, float64, programs."""

import contextlib

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()


def numpy(tensor):
    return np.asarray(ops.convert_to_numpy(tensor))


def gradients(function, arrays, upstream):
    """`function(**arrays)` and the gradients of `sum(output * upstream)` for each array."""
    upstream = ops.convert_to_tensor(upstream)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        arrays = {name: tf.convert_to_tensor(a) for name, a in arrays.items()}
        with tf.GradientTape() as tape:
            tape.watch(list(arrays.values()))
            z = function(**arrays)
        found = tape.gradient(z, arrays, upstream)
    elif BACKEND == "jax":
        import jax

        @jax.jit  # one program to compile, and not one for each operation and shape
        def run(arrays):
            z, pullback = jax.vjp(lambda a: function(**a), arrays)
            return z, *pullback(upstream)

        z, found = run({n: jax.numpy.asarray(a) for n, a in arrays.items()})
    else:
        import torch

        arrays = {n: torch.tensor(a, requires_grad=True) for n, a in arrays.items()}
        z = function(**arrays)
        values = torch.autograd.grad(z, list(arrays.values()), upstream, allow_unused=True)
        found = dict(zip(arrays, values, strict=True))
        z = z.detach()
    return numpy(z), {name: numpy(g) for name, g in found.items()}


def layer_gradients(layer, x, upstream, **kwargs):
    """The layer's output and the gradients of `sum(output * upstream)` for x and each weight."""
    names = [v.name for v in layer.trainable_variables]

    def call(x, **weights):
        values = [weights[name] for name in names]
        if BACKEND == "jax":
            return layer.stateless_call(values, [], x, **kwargs)[0]
        with keras.StatelessScope(
            state_mapping=list(zip(layer.trainable_variables, values, strict=True))
        ):
            return layer(x, **kwargs)

    arrays = {"x": x, **{v.name: numpy(v) for v in layer.trainable_variables}}
    return gradients(call, arrays, upstream)


@contextlib.contextmanager
def float64_enabled():
    """Float64 is off by default in JAX."""
    if BACKEND != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield
