"""One layer: FRN + TLU against the formula as written and its peers, interleaved in one process.

    python benchmarks/layer.py                            # every mode of the active backend
    KERAS_BACKEND=jax python benchmarks/layer.py --dtype bfloat16

Prints milliseconds (least, median), the median over the rounds of the ratio to
BatchNormalization + ReLU, and units of one `x + 1` pass over the same tensor in the same mode.
Writes CSV to `benchmarks/results/`. A network decides, not a layer: see `network.py`. On a GPU or
TPU a run is ten calls in a row, started before the first has ended, so that the device and not the
host is timed, and the tensor is larger."""

import argparse

import keras
import numpy as np
from common import (
    BACKEND,
    DEVICE,
    RESULTS,
    SUFFIX,
    interleaved,
    normalizations,
    ratio,
    wait,
    write,
)
from keras import layers, ops

from keras_frn.compilation import with_own_code

MODES = {"tensorflow": ["graph", "xla", "eager"], "jax": ["jit"], "torch": ["eager", "compile"]}
CALLS = 10 if DEVICE else 1


class AddOne(layers.Layer):
    """One pass over the tensor: the unit."""

    def call(self, x):
        return x + 1


def programs(stack, x, upstream, mode):
    """Functions of no arguments that start forward, and forward and backward."""
    for layer in stack:
        layer.build(x.shape)
    if BACKEND == "jax":
        return _jax_programs(stack, x, upstream)

    def call(x):
        for layer in stack:
            x = layer(x, training=True)
        return x

    weights = [v.value for layer in stack for v in layer.trainable_variables]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def both(x, upstream):
            with tf.GradientTape() as tape:
                tape.watch(x)
                z = call(x)
            return z, tape.gradient(z, [x, *weights], upstream)

        forward = call
        if mode != "eager":
            forward = tf.function(call, jit_compile=mode == "xla")
            both = tf.function(both, jit_compile=mode == "xla")
        return lambda: forward(x), lambda: both(x, upstream)
    import torch

    x = x.detach().requires_grad_()
    run = call
    if mode == "compile":
        torch._dynamo.config.recompile_limit = 1000  # Keras' own functions serve all stacks
        run = torch.compile(with_own_code(call))

    def forward():
        with torch.no_grad():
            return run(x)

    return forward, lambda: torch.autograd.grad(run(x), [x, *weights], upstream)


def _jax_programs(stack, x, upstream):
    import jax

    model = keras.Sequential([keras.Input(x.shape[1:]), *stack])
    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]

    def forward(x, weights):
        return model.stateless_call(weights, state, x, training=True)

    def both(x, weights, upstream):
        z, pullback, updates = jax.vjp(forward, x, weights, has_aux=True)
        return z, pullback(upstream), updates

    forward_program, both_program = jax.jit(forward), jax.jit(both)
    return lambda: forward_program(x, weights), lambda: both_program(x, weights, upstream)


def in_a_row(function):
    def run():
        for _ in range(CALLS):
            result = function()
        wait(result)

    return run


def measure(shape, mode, dtype, repeats):
    """Rows of one table: each layer, forward and forward + backward."""
    rng = np.random.default_rng(0)
    x, upstream = (
        ops.convert_to_tensor(rng.standard_normal(shape, "float32"), dtype) for _ in range(2)
    )
    keras.config.set_dtype_policy(f"mixed_{dtype}" if dtype != "float32" else dtype)
    stacks = {"x + 1": [AddOne()], **{n: make() for n, make in normalizations(-1).items()}}
    functions = {name: programs(stack, x, upstream, mode) for name, stack in stacks.items()}
    functions["x + 1"] = (functions["x + 1"][0],) * 2  # one pass is the unit of both tables
    for which, direction in enumerate(["forward", "forward + backward"]):
        chosen = {name: in_a_row(both[which]) for name, both in functions.items()}
        interleaved(chosen, 2)
        times = interleaved(chosen, repeats)
        for name, t in times.items():
            yield {
                "backend": BACKEND,
                "mode": mode,
                "shape": "x".join(map(str, shape)),
                "dtype": dtype,
                "direction": direction,
                "layer": name,
                "min_ms": 1e3 * min(t) / CALLS,
                "median_ms": 1e3 * float(np.median(t)) / CALLS,
                "of_bn": ratio(times, name),
                "passes": ratio(times, name, "x + 1"),
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # On an accelerator a tensor must be many times its cache for the memory to be measured.
    shape = [256, 112, 112, 64] if DEVICE else [32, 56, 56, 64]
    parser.add_argument("--shape", type=int, nargs="+", default=shape)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=MODES[BACKEND], choices=MODES[BACKEND])
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    rows = []
    for mode in arguments.modes:
        print(f"\n{BACKEND} {mode}, {arguments.shape} {arguments.dtype}")
        print(f"  {'':20}{'':27}{'min, ms':>10}{'median':>9}{'of BN':>8}{'passes':>8}")
        for row in measure(tuple(arguments.shape), mode, arguments.dtype, arguments.repeats):
            print(
                f"  {row['direction']:20}{row['layer']:27}{row['min_ms']:10.2f}"
                f"{row['median_ms']:9.2f}{row['of_bn']:8.2f}{row['passes']:8.2f}",
                flush=True,
            )
            rows.append(row)
    write(rows, RESULTS / f"layer_{BACKEND}_{arguments.dtype}{SUFFIX}.csv")


if __name__ == "__main__":
    main()
