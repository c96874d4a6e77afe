"""Trains under TensorFlow's strategies and on one device, and prints the differences as JSON.

python tests/devices_tensorflow.py mirrored
python tests/devices_tensorflow.py RANK PORT PORT     in two processes"""

import json
import os
import sys
import warnings

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf

DEVICES = 2


def mirrored():
    """`fit` and a loop of one's own on two logical processors."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    one = fit(compiled(network(frn, frn_tlu)))
    with strategy.scope():
        fitted = compiled(network(frn, frn_tlu))
    fit(fitted)
    assert strategy.num_replicas_in_sync == DEVICES
    in_loop = loop(
        strategy,
        lambda batch: strategy.experimental_distribute_values_from_function(
            lambda context: halved(batch, context.replica_id_in_sync_group)
        ),
    )
    return {
        "moved": moved(one, network(frn, frn_tlu)),
        "fit": difference(one, fitted),
        "loop": difference(one, in_loop),
    }


def multi_worker(rank, ports):
    """A loop of one's own in two processes; and what `fit` does, with this layer and Keras' own."""
    cluster = {"worker": [f"localhost:{port}" for port in ports]}
    task = {"type": "worker", "index": rank}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    assert strategy.num_replicas_in_sync == DEVICES
    in_loop = loop(strategy, lambda batch: halved(batch, rank))
    one = fit(compiled(network(frn, frn_tlu)))
    result = {"moved": moved(one, network(frn, frn_tlu)), "loop": difference(one, in_loop)}
    for name, normalization in (("frn", frn_tlu), ("group", group_normalization)):
        with strategy.scope():
            model = compiled(network(normalization, normalization))
        try:
            model.fit(tf.data.Dataset.from_tensor_slices(data()).batch(BATCH), verbose=0)
            result[f"fit {name}"] = "works"
        except ValueError as error:
            result[f"fit {name}"] = "PerReplica" if "PerReplica" in str(error) else str(error)
    return result


def halved(batch, rank):
    half = BATCH // DEVICES
    return tuple(tf.constant(part[rank * half : (rank + 1) * half]) for part in batch)


def loop(strategy, distribute):
    with strategy.scope():
        model = network(frn, frn_tlu)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True)) / BATCH
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # Keras sums over the replicas here

    @tf.function
    def step(x, y):
        strategy.run(replica_step, (x, y))

    x, y = data()
    for start in range(0, len(x), BATCH):
        step(*distribute((x[start : start + BATCH], y[start : start + BATCH])))
    return model


if __name__ == "__main__":
    import keras
    from devices_network import (
        BATCH,
        compiled,
        data,
        difference,
        fit,
        frn,
        frn_tlu,
        group_normalization,
        moved,
        network,
    )

    warnings.filterwarnings("ignore", "`shuffle=True` was passed")
    first, *rest = sys.argv[1:]
    result = mirrored() if first == "mirrored" else multi_worker(int(first), rest)
    print(json.dumps(result))
