"""Prints what XLA's programs of a layer on eight devices send between them, as JSON.

    KERAS_BACKEND=jax python tests/collectives.py

Run by test_devices.py in a process of its own, as XLA makes its devices once. A record for each
way to divide the input: kinds of mesh axes, how it is divided, the program, and of each collective
its name and how many numbers it sends."""

import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from keras_frn import FilterResponseNormalizationTLU

SHAPE = (8, 16, 16, 8)
DIVISIONS = {
    "batch": ((8,), PartitionSpec("a")),
    "height": ((8,), PartitionSpec(None, "a")),
    "height and width": ((2, 4), PartitionSpec(None, "a", "b")),
}


def collectives(program):
    results = re.findall(r" = (\(.*?\)|\S+) (all-\w+|collective-\w+|reduce-scatter)\(", program)
    return [(name, sum(map(numbers, re.findall(r"\[([\d,]*)\]", t)))) for t, name in results]


def numbers(dimensions):
    return int(np.prod([int(size) for size in dimensions.split(",") if size]))


def relative_error(actual, expected):
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def main():
    layer = FilterResponseNormalizationTLU()
    layer.build(SHAPE)

    def forward(x, weights):
        return layer.stateless_call(weights, [], x)[0]

    def gradient(x, weights):
        return jax.grad(lambda *args: (forward(*args) ** 2).sum(), (0, 1))(x, weights)

    data = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    weights = [np.asarray(v.value) for v in layer.trainable_variables]
    expected = gradient(data, weights)
    records = []
    for kind in (AxisType.Auto, AxisType.Explicit):
        for name, (devices, spec) in DIVISIONS.items():
            axes = ("a", "b")[: len(devices)]
            mesh = jax.make_mesh(devices, axes, axis_types=(kind,) * len(axes))
            with jax.set_mesh(mesh):
                x = jax.device_put(data, NamedSharding(mesh, spec))
                w = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
                programs = [jax.jit(f).lower(x, w).compile() for f in (forward, gradient)]
                actual = programs[1](x, w)
            errors = jax.tree.leaves(jax.tree.map(relative_error, actual, expected))
            record = {"axes": str(kind), "divided": name, "error": max(errors)}
            record["forward"], record["gradient"] = (collectives(p.as_text()) for p in programs)
            records.append(record)
    json.dump(records, sys.stdout)


if __name__ == "__main__":
    main()
