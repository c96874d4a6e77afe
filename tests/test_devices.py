import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from backends import BACKEND
from reference import PARAMETER_GRADIENT

BATCH_TIMES_CHANNELS, WEIGHTS = 8 * 8, 3 * 8
# Weights of about 1 after four steps: a few roundings, as sums are taken in another order.
STEPS_IN_ANOTHER_ORDER = 1e-6
LEARNED = 1e-4  # much more, so that a weight that no step reached shows
SECONDS = 1800  # for processes that wait for each other


def run(program, *arguments):
    """Runs a program of this folder in processes of their own, one for each tuple of arguments."""
    folder = Path(__file__).parent
    paths = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, folder / program, *map(str, own)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
        for own in arguments or [()]
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow's strategies")
def test_mirrored_strategy_equals_one_device():
    """`fit` and a custom loop on two devices equal `fit` on one."""
    (result,) = run("devices_tensorflow.py", ("mirrored",))
    assert result["moved"] > LEARNED
    assert result["fit"] < STEPS_IN_ANOTHER_ORDER
    assert result["loop"] < STEPS_IN_ANOTHER_ORDER


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow's strategies")
def test_multi_worker_mirrored_strategy_equals_one_device():
    """A custom loop in two processes equals `fit` in one. What `fit` does with Keras' own
    GroupNormalization it does with this layer (Keras 3.15.1: ValueError, "PerReplica")."""
    ports = free_ports(2)
    for result in run("devices_tensorflow.py", (0, *ports), (1, *ports)):
        assert result["moved"] > LEARNED
        assert result["loop"] < STEPS_IN_ANOTHER_ORDER
        assert result["fit frn"] == result["fit group"]
        assert result["fit group"] in ("PerReplica", "works")


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch's data parallelism")
def test_distributed_data_parallel_equals_one_device():
    """Steps in two processes equal those in one; only gradients are sent, no buffers."""
    port = free_ports(1)[0]
    for result in run("devices_torch.py", (0, port), (1, port)):
        assert result["moved"] > LEARNED
        assert result["ddp"] < STEPS_IN_ANOTHER_ORDER
        assert result["sent"] == [result["weights"]] * 4
        assert result["buffers"] == 0


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="of Keras' distributions on JAX")
def test_keras_distributions_equal_one_device():
    (result,) = run("devices_jax.py")
    assert result["moved"] > LEARNED
    for name, gamma in (("data", "P(None,)"), ("model", "P('model',)")):
        assert result[name]["difference"] < STEPS_IN_ANOTHER_ORDER
        assert result[name]["gamma"] == gamma
    # The gradients and the loss, at once. Batch statistics: two sums a layer and direction.
    assert result["data"]["frn"] == [["all-reduce", result["parameters"] + 1]]
    assert len(result["data"]["batch normalization"]) > 4
    # Of a volume divided along its depth convolutions exchange borders. What FRN adds are sums of
    # (batch, channels), one for each layer and direction.
    for program, sums in (("forward", 2), ("gradient", 4)):
        ours, without = (result["depth"][name][program] for name in ("frn", "relu"))
        assert ours["error"] < PARAMETER_GRADIENT
        borders, borders_without = (
            sorted(c for c in r["sent"] if c[0] != "all-reduce") for r in (ours, without)
        )
        assert borders == borders_without
        assert {name for name, _ in borders} == {"collective-permute"}
        reductions = [size for name, size in ours["sent"] if name == "all-reduce"]
        weights = [size for name, size in without["sent"] if name == "all-reduce"]
        assert [size for size in reductions if size == 1 * 8] == [8] * sums
        assert len(reductions) == sums + len(weights)


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's sharding")
def test_collectives_are_only_those_expected():
    """Nothing if the batch is divided; one sum of (batch, channels) if positions are."""
    (records,) = run("collectives.py")
    assert {r["divided"] for r in records} == {"batch", "height", "height and width"}
    for record in records:
        assert record["error"] < PARAMETER_GRADIENT, "sums in another order"
        collectives = record["forward"] + record["gradient"]
        assert {name for name, _ in collectives} == {"all-reduce"}, record
        if record["divided"] == "batch":
            assert record["forward"] == []
            assert record["gradient"] == [["all-reduce", WEIGHTS]], "the weights' gradients"
        else:
            # Over each axis of the mesh; backward, gradients of weights go with the statistics'.
            axes = len(record["divided"].split(" and "))
            assert record["forward"] == [["all-reduce", BATCH_TIMES_CHANNELS]] * axes
            assert max(size for _, size in collectives) <= BATCH_TIMES_CHANNELS + WEIGHTS
