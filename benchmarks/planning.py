"""What ResNet-50 computes, keeps and sends on each of 8 to 4,096 devices, from compiled programs.

    python benchmarks/planning.py

A training step's gradient (data parallel, float32, `--batch` images of 224x224 on each
device) is compiled by XLA for 2 and for 8 virtual devices; nothing is run. Of the program of one
device are read:

- operations and bytes that go through memory: XLA's cost analysis;
- temporary memory: what the compiler reserves;
- collectives: from the text of the program, each with its bytes.

With the batch of a device fixed, the program of a device is the same on any number of devices but
for the list of partners; that 2 and 8 agree is checked. So the rest is arithmetic. A ring
all-reduce of B bytes among n devices sends 2 (n - 1) / n B bytes from each, in 2 (n - 1) turns;
each collective waits for the slowest device. Batch statistics that are not synchronized cost
nothing to send, but are those of one device. Writes CSV to `benchmarks/results/`."""

import argparse
import math
import os
import re

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import keras
from common import BN, RESULTS, write
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from keras import layers

import keras_frn

DEVICES = [8, 64, 512, 4096]
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s64": 8, "f16": 2}


def batch_normalization_resnet(**options):
    """The same network with BatchNormalization and ReLU: each FRN layer is replaced on copying."""

    def replace(layer):
        if not isinstance(layer, keras_frn.FilterResponseNormalizationTLU):
            return layer.__class__.from_config(layer.get_config())
        both = [layers.BatchNormalization(), layers.ReLU()]
        return keras.Sequential(both, name=layer.name)

    model = keras_frn.models.resnet(**options)
    return keras.models.clone_model(model, clone_function=replace)


NETWORKS = {"FRN + TLU": keras_frn.models.resnet, f"{BN}, synchronized": batch_normalization_resnet}


def compiled(model, devices, batch, image):
    """The program of the weights' gradients on one of the devices."""
    mesh = jax.make_mesh((devices,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:devices])
    everywhere, divided = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("batch",)))
    weights, state = (
        [jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=everywhere) for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    )
    images = devices * batch
    x = jax.ShapeDtypeStruct((images, image, image, 3), "float32", sharding=divided)
    y = jax.ShapeDtypeStruct((images,), "int32", sharding=divided)

    def loss(weights, state, x, y):
        logits, state = model.stateless_call(weights, state, x, training=True)
        logits = logits.astype("float32")
        errors = (
            jax.nn.logsumexp(logits, -1) - jax.numpy.take_along_axis(logits, y[:, None], 1)[:, 0]
        )
        return errors.mean(), state

    # Out as they came in: the gradients on every device, as the optimizer needs them.
    gradient = jax.jit(jax.grad(loss, has_aux=True), out_shardings=everywhere)
    return gradient.lower(weights, state, x, y).compile()


def sent(program):
    """The bytes of each all-reduce."""
    found = re.findall(r" = (\(.*?\)|\S+) (all-\w+|collective-\w+|reduce-scatter)\(", program)
    assert {name for _, name in found} <= {"all-reduce"}, found
    return [
        sum(
            BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
            for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", types)
        )
        for types, _ in found
    ]


def read(program):
    cost = program.cost_analysis()
    collectives = sent(program.as_text())
    return {
        "gflop": cost["flops"] / 1e9,
        "gb_through_memory": cost["bytes accessed"] / 1e9,
        "gb_temporary": program.memory_analysis().temp_size_in_bytes / 1e9,
        "collectives": len(collectives),
        "mb_reduced": sum(collectives) / 1e6,
        "largest_collective_mb": max(collectives) / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="images on each device")
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--policy", default="float32")
    parser.add_argument("--no-file", action="store_true")
    arguments = parser.parse_args()
    keras.config.set_dtype_policy(arguments.policy)
    rows = []
    for name, make in NETWORKS.items():
        shape = (arguments.image, arguments.image, 3)
        model = make(input_shape=shape, depth=arguments.depth)
        few, many = (
            read(compiled(model, devices, arguments.batch, arguments.image)) for devices in (2, 8)
        )
        assert few["collectives"] == many["collectives"]
        assert few["mb_reduced"] == many["mb_reduced"]
        for devices in DEVICES:
            row = {"devices": devices, "network": name, **many}
            row["mb_sent"] = 2 * (devices - 1) / devices * many["mb_reduced"]
            row["turns"] = 2 * (devices - 1) * many["collectives"]
            rows.append(row)
            print(*(f"{v:.3f}" if isinstance(v, float) else v for v in row.values()), flush=True)
    if not arguments.no_file:
        write(rows, RESULTS / "planning_jax.csv")
    return rows


if __name__ == "__main__":
    main()
