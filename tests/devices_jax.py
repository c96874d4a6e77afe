"""Trains a network on eight virtual devices and on one, and prints as JSON what
differs and what XLA's programs send between the devices.

    python tests/devices_jax.py"""

import json

import collectives  # makes the eight devices
import jax
import keras
import numpy as np
from devices_network import (
    BATCH,
    batch_normalization,
    compiled,
    data,
    difference,
    fit,
    frn,
    frn_tlu,
    moved,
    network,
)
from jax.sharding import NamedSharding, PartitionSpec
from keras import layers
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel, set_distribution

VOLUME = (1, 32, 8, 8, 2)


def model_parallel():
    """Two groups of four devices; within each, the channels of every layer are divided."""
    layout = LayoutMap(DeviceMesh((2, 4), ("batch", "model"), keras.distribution.list_devices()))
    layout["conv.*kernel"] = (None, None, None, "model")
    layout["conv.*bias"] = ("model",)
    layout[".*(gamma|beta|tau)"] = ("model",)
    return ModelParallel(layout_map=layout, batch_dim_name="batch")


def sent_by_a_step(model):
    """The collectives of one training step as Keras compiles it."""
    x, y = (part[:BATCH] for part in data())
    distribution = keras.distribution.distribution()
    x, y = (
        jax.device_put(part, distribution.get_data_layout(part.shape).backend_layout)
        for part in (x, y)
    )
    state = [
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
    ]
    program = jax.jit(model.train_step).lower(state, (x, y)).compile()
    return collectives.collectives(program.as_text())


def volumes(normalization):
    """A network of volumes of any depth."""
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input((None, *VOLUME[2:]))
    for _ in range(2):
        x = layers.Conv3D(8, 3, padding="same")(x)
        for layer in normalization():
            x = layer(x)
    return keras.Model(inputs, layers.Conv3D(2, 1)(x))


def split_depth(normalization):
    """One volume whose depth is divided over all devices: the error of the output and of all
    gradients, and what is sent."""
    model = volumes(normalization)
    weights = [v.value for v in model.trainable_variables]
    x = np.random.default_rng(0).normal(size=VOLUME).astype("float32")

    def forward(weights, x):
        return model.stateless_call(weights, [], x)[0]

    def gradient(weights, x):
        return jax.grad(lambda *args: (forward(*args) ** 2).mean(), (0, 1))(weights, x)

    mesh = jax.make_mesh((8,), ("depth",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = (
        jax.device_put(weights, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "depth"))),
    )
    result = {}
    for name, function in (("forward", forward), ("gradient", gradient)):
        program = jax.jit(function).lower(*placed).compile()
        errors = jax.tree.map(
            collectives.relative_error, program(*placed), function(weights, jax.numpy.asarray(x))
        )
        result[name] = {
            "error": max(jax.tree.leaves(errors)),
            "sent": collectives.collectives(program.as_text()),
        }
    return result


def main():
    one = fit(compiled(network(frn, frn_tlu)))
    result = {"moved": moved(one, network(frn, frn_tlu)), "parameters": one.count_params()}
    for name, distribution in (("data", DataParallel()), ("model", model_parallel())):
        set_distribution(distribution)
        many = fit(compiled(network(frn, frn_tlu)))
        gamma = many.layers[1].gamma.value.sharding
        result[name] = {"difference": difference(one, many), "gamma": str(gamma.spec)}
        if name == "data":
            result[name]["frn"] = sent_by_a_step(many)
            batch = fit(compiled(network(batch_normalization, batch_normalization)))
            result[name]["batch normalization"] = sent_by_a_step(batch)
    set_distribution(None)
    result["depth"] = {"frn": split_depth(frn_tlu), "relu": split_depth(lambda: [layers.ReLU()])}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
