"""What FRN + TLU keeps in memory for the backward pass, exactly, from the compiled programs (JAX).

    KERAS_BACKEND=jax python benchmarks/memory.py

One layer: full-size tensors that the forward pass hands to the backward pass (of the traced
program, the input among them, each counted once), and the temporary memory of the compiled forward
and backward program, in units of the input. A convolution before each normalization, as in a
network: the same. ResNet-20: temporary memory of the compiled gradient per image, and the largest
batch whose gradient fits in `--budget` MB; likewise the largest cubic volume of a small 3D network
at batch 1. Nothing is run, all is read off what the compiler reserves. Writes CSV to
`benchmarks/results/`."""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from common import RESULTS, SUFFIX, normalizations, write
from keras import layers
from network import resnet20

NORMALIZATIONS = {"ReLU alone": lambda: [layers.ReLU()], **normalizations()}


def stateless(model):
    """The model as a function of input and weights."""
    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    return lambda x, w: model.stateless_call(w, state, x, training=True)[0], weights


def kept(model, shape):
    """Full-size tensors that go from the forward to the backward pass, each counted once."""
    function, weights = stateless(model)

    def residuals(x, w):
        return jax.tree.leaves(jax.vjp(function, x, w)[1])

    # Inlined, an array that is handed on under two names is one variable.
    program = jax.make_jaxpr(jax.jit(residuals, inline=True))(
        np.zeros(shape, "float32"), weights
    ).jaxpr
    size = np.prod(shape)
    return len({v for v in program.outvars if v.aval.size >= size})


def gradient_bytes(model, shape):
    """Temporary bytes of the compiled program that returns all gradients."""
    function, weights = stateless(model)

    def step(x, w, upstream):
        z, pullback = jax.vjp(function, x, w)
        return z, pullback(upstream)

    x = jax.ShapeDtypeStruct(shape, "float32")
    upstream = jax.eval_shape(function, x, weights)
    program = jax.jit(step).lower(x, weights, upstream).compile()
    return program.memory_analysis().temp_size_in_bytes


def network_bytes(model, shape):
    """Temporary bytes of the compiled program that returns the weights' gradients of a loss."""
    function, weights = stateless(model)

    def loss(w, x):
        return keras.ops.mean(keras.ops.square(function(x, w)))

    x = jax.ShapeDtypeStruct(shape, "float32")
    program = jax.jit(jax.grad(loss)).lower(weights, x).compile()
    return program.memory_analysis().temp_size_in_bytes


def volume_network(normalize):
    """Six 3x3x3 convolutions of 16 channels on volumes of any size."""
    inputs = x = keras.Input((None, None, None, 1))
    for _ in range(6):
        x = layers.Conv3D(16, 3, padding="same", use_bias=False)(x)
        for layer in normalize():
            x = layer(x)
    return keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling3D()(x)))


def largest(fits, start):
    """The largest n for which `fits(n)`, within 2 percent."""
    low = start
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs="+", default=[32, 56, 56, 64])
    parser.add_argument("--budget", type=int, default=1024, help="MB of temporary memory")
    arguments = parser.parse_args()
    shape, budget = tuple(arguments.shape), arguments.budget * 2**20
    unit = 4 * np.prod(shape)
    rows = []

    def show(study, name, measure, value):
        rows.append({"study": study, "layers": name, "measure": measure, "value": value})
        print(f"{study:24} {name:27} {measure:34} {value:10.2f}", flush=True)

    for name, normalize in NORMALIZATIONS.items():
        for study, before in (
            ("layer", []),
            ("convolution and layer", [layers.Conv2D(shape[-1], 3, padding="same")]),
        ):
            model = keras.Sequential([keras.Input(shape[1:]), *before, *normalize()])
            show(study, name, "full-size tensors kept", kept(model, shape))
            temporary = gradient_bytes(model, shape)
            show(study, name, "temporary memory, inputs", temporary / unit)
    for name, normalize in NORMALIZATIONS.items():
        model = resnet20(normalize)
        per_image = network_bytes(model, (128, 32, 32, 3)) / 128
        show("ResNet-20, batch 128", name, "temporary kB per image", per_image / 1024)
        batch = largest(lambda n, m=model: network_bytes(m, (n, 32, 32, 3)) <= budget, 64)
        show("ResNet-20", name, f"largest batch in {arguments.budget} MB", batch)
    for name, normalize in NORMALIZATIONS.items():
        model = volume_network(normalize)
        side = largest(lambda n, m=model: network_bytes(m, (1, n, n, n, 1)) <= budget, 16)
        show("3D network, batch 1", name, f"largest side in {arguments.budget} MB", side)
    write(rows, RESULTS / f"memory_jax{SUFFIX}.csv")


if __name__ == "__main__":
    main()
