"""Times the programs that `accelerators.py --write FOLDER` wrote, on the GPU of this machine.

    KERAS_BACKEND=jax python benchmarks/accelerators.py --devices H100 --write programs
    KERAS_BACKEND=tensorflow python benchmarks/accelerators.py --devices H100 --write programs
    python benchmarks/accelerators_time.py programs

The last command needs JAX with a GPU, and neither Keras nor TensorFlow: TensorFlow's programs run
by JAX's client. Programs of one network and dtype run in turns, some steps each; the time is the
median of the rounds, and the ratio the median of that to BatchNormalization + ReLU of the same
framework and round. Inputs are random. Prints a table and writes `accelerators_time.csv` beside
this file's other results."""

import argparse
import csv
import gzip
import itertools
import os
import re
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "")  # not the processor, which `xla` would choose

import jax
import numpy as np
import xla
from jax._src.interpreters import mlir
from jaxlib import xla_client
from jaxlib.mlir import ir

ROUNDS, WARM_UP, STEPS = 25, 3, 5


def load(text, device):
    """The executable of a program; inputs are not given away, as they are used again."""
    text = re.sub(r"mhlo\.input_output_alias = \[\{.*?\}\], ", "", text)
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        return device.client.compile_and_load(
            module, xla_client.DeviceList((device,)), xla_client.CompileOptions()
        )


def inputs(text, device):
    """Random arrays for the arguments of a program: small weights, scales about 1, labels."""
    rng = np.random.default_rng(0)
    arguments = re.search(r"func\.func public @main\((.*?)\) ->", text, re.DOTALL)[1]
    for description in re.findall(r"%\w+: tensor<([^>]*)>", arguments):
        *sizes, kind = description.split("x")
        shape = tuple(map(int, sizes))
        if kind.startswith("i"):
            array = rng.integers(0, 10, shape).astype("int32")
        else:
            array = 0.03 * rng.standard_normal(shape, "float32") + (len(shape) == 1)
        yield jax.device_put(array.astype("bfloat16" if kind == "bf16" else array.dtype), device)


def run(program):
    executable, arguments = program
    return executable.execute_sharded(arguments).disassemble_into_single_device_arrays()


def seconds(program):
    start = time.perf_counter()
    for _ in range(STEPS):
        outputs = run(program)
    jax.block_until_ready(outputs)
    return (time.perf_counter() - start) / STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    device = jax.devices()[0]
    rows = []
    paths = sorted(parser.parse_args().folder.glob("*.mlir.gz"))
    for _, group in itertools.groupby(paths, lambda path: path.name.split(".")[:3]):
        programs = {}
        for path in group:
            with gzip.open(path, "rt") as file:
                text = file.read()
            name = path.name.removesuffix(".mlir.gz").replace("_", " ")
            programs[name] = load(text, device), list(inputs(text, device))
        times = {name: [] for name in programs}
        for _ in range(ROUNDS):
            for name, program in programs.items():
                times[name].append(seconds(program))
        for name, taken in times.items():
            framework = name.split(".")[3]
            bases = [n for n in times if f".{framework}.BatchNormalization" in n]
            base = times[bases[0]] if bases else taken
            ratio = float(np.median(np.divide(taken, base)[WARM_UP:]))
            moved = xla.count(programs[name][0]).bytes
            rows.append([name, 1e3 * float(np.median(taken[WARM_UP:])), ratio, moved])
            print("{:72}{:9.3f} ms{:7.3f} of BatchNormalization, {:,} bytes".format(*rows[-1]))
    with (xla.RESULTS / "accelerators_time.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["program", "ms", "of_bn", "bytes", "device"])
        writer.writerows([*row, device.device_kind] for row in rows)


if __name__ == "__main__":
    main()
