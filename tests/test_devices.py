import json
import subprocess
import sys
from pathlib import Path

import pytest
from backends import BACKEND
from reference import PARAMETER_GRADIENT

BATCH_TIMES_CHANNELS, WEIGHTS = 4 * 8, 3 * 8


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX's sharding")
def test_what_devices_send_to_each_other():
    """Nothing in a batch that is divided; one sum of (batch, channels) in divided positions."""
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("collectives.py")],
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    records = json.loads(result.stdout)
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
