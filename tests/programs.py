"""Prints how many full-size arrays XLA's programs for a stack of layers write, as JSON.

    python tests/programs.py 4 16 24 32

Run by test_compilation.py in a process of its own, as XLA reads its flags once.
"""

import json
import re
import sys

import conftest  # noqa: F401  (chooses the backend)
import keras
import numpy as np

from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

SHAPE = (4, 16, 24, 32)
if __name__ == "__main__":
    SHAPE = tuple(int(size) for size in sys.argv[1:])
FULL_SIZE = int(np.prod(SHAPE))


class AsWritten(FilterResponseNormalizationTLU):
    """The formula as the paper writes it."""

    def call(self, x, training=None):
        nu2 = keras.ops.mean(keras.ops.square(x), axis=(1, 2), keepdims=True)
        y = self.gamma * (x * keras.ops.rsqrt(nu2 + 1e-6)) + self.beta
        return keras.ops.maximum(y, self.tau)


STACKS = {
    "fused": lambda: [FilterResponseNormalizationTLU()],
    "one after the other": lambda: [FilterResponseNormalization(), TLU()],
    "as written": lambda: [AsWritten()],
}


def full_size_writes(program):
    """How many full-size arrays the entry computation of an optimized HLO program writes."""
    entry = program[program.index("ENTRY") :]
    entry = entry[: entry.index("\n}")]
    count = 0
    for line in entry.splitlines()[1:]:
        result, opcode = re.match(r".*? = (\(.*?\)|\S+) ([\w-]+)\(", line).groups()
        if opcode not in ("parameter", "get-tuple-element", "tuple", "bitcast"):
            for dims in re.findall(r"\w+\[([\d,]*)\]", result):
                count += int(np.prod([int(d) for d in dims.split(",") if d])) >= FULL_SIZE
    return count


def full_size_sums(program):
    """How many sums over full-size arrays a program makes, inside of its fusions, too."""
    sizes = {
        name: int(np.prod([int(d) for d in dims.split(",") if d]))
        for name, dims in re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", program)
    }
    return sum(sizes[name] >= FULL_SIZE for name in re.findall(r" reduce\((%[\w.-]+)", program))


def jax_programs(layers):
    import jax

    weights = [[v.value for v in layer.trainable_variables] for layer in layers]

    def forward(x, weights):
        for layer, values in zip(layers, weights, strict=True):
            x, _ = layer.stateless_call(values, [], x, training=True)
        return x

    def both(x, weights, upstream):
        z, pullback = jax.vjp(forward, x, weights)
        return z, pullback(upstream)

    x = jax.numpy.zeros(SHAPE)
    programs = [
        jax.jit(f).lower(*args).compile()
        for f, args in ((forward, (x, weights)), (both, (x, weights, x)))
    ]
    temporary = [p.memory_analysis().temp_size_in_bytes / (4 * FULL_SIZE) for p in programs]
    return [p.as_text() for p in programs], temporary


def tensorflow_programs(layers):
    import tensorflow as tf

    def forward(x):
        for layer in layers:
            x = layer(x, training=True)
        return x

    def both(x, upstream):
        weights = [v.value for layer in layers for v in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            z = forward(x)
        return z, tape.gradient(z, [x, *weights], upstream)

    x = tf.zeros(SHAPE)
    return [
        tf.function(f, jit_compile=True).experimental_get_compiler_ir(*args)(stage="optimized_hlo")
        for f, args in ((forward, (x,)), (both, (x, x)))
    ], None


def main():
    found = {}
    for name, make in STACKS.items():
        layers = make()
        for layer in layers:
            layer.build(SHAPE)
        compile_programs = {"jax": jax_programs, "tensorflow": tensorflow_programs}
        programs, temporary = compile_programs[keras.backend.backend()](layers)
        found[name] = {
            "writes": [full_size_writes(p) for p in programs],
            "sums": [full_size_sums(p) for p in programs],
            "temporary": temporary,
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
