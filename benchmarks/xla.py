"""What XLA makes of a program for a device that is not there: kernels, memory traffic, cycles.

XLA compiles for an H100 and for a TPU v5e on any x86-64 Linux machine with the wheels of the extra
`accelerators`. Nothing is run. TensorFlow's programs are its own, compiled by the XLA that comes
with JAX, which is newer. Imported by `accelerators.py` and by `tests/test_accelerators.py`."""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# Two processes may compile at a time, as neither has a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

RESULTS = Path(__file__).parent / "results"
# The card as XLA describes it to itself, a `GpuTargetConfigProto`.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
DEVICES = {
    "H100": {
        "platform": "cuda",
        "topology_name": "h100",
        "topology": "1x1x1",
        "target_config": _H100,
    },
    "TPU v5e": {"platform": "tpu", "topology_name": "v5e:2x2"},
}


class Kernel(NamedTuple):
    """One kernel of a program, and the bytes that it reads and writes."""

    name: str
    read: int
    written: int
    is_convolution: bool


class Counts(NamedTuple):
    """What a program takes, its convolutions left out of `kernels` and `bytes`."""

    kernels: int
    bytes: int
    temporary: int
    cycles: int


def device(name):
    """One of `DEVICES`, to compile for. Raises RuntimeError or ImportError without its wheels."""
    import jax
    from jax.experimental import topologies

    jax.devices()  # registers the plug-ins
    return topologies.get_topology_desc(**DEVICES[name]).devices[0]


def jax_program(function, *specs, platform="cuda"):
    """What JAX hands to XLA, as the text of a module of StableHLO."""
    import jax

    return jax.jit(function).trace(*specs).lower(lowering_platforms=(platform,)).as_text()


def tensorflow_program(function, *specs):
    """What TensorFlow hands to XLA for `jit_compile=True`, as the text of a module of StableHLO."""
    import tensorflow as tf
    from jaxlib import xla_client

    compiled = tf.function(function, jit_compile=True, autograph=False)
    program = compiled.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")
    module = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(program))
    module = module if isinstance(module, str) else module.decode()
    # A copy is the one operation that has no form in StableHLO.
    copy, reshape = r"mhlo\.copy (%\w+) : (tensor<[^>]*>)", r"stablehlo.reshape \1 : (\2) -> \2"
    return re.sub(copy, reshape, module)


def compile_for(device, program):
    """The executable of a module of StableHLO."""
    from jax._src.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        module = ir.Module.parse(program)
        return device.client.compile(
            module, xla_client.DeviceList((device,)), xla_client.CompileOptions()
        )


def count(executable):
    """The `Counts` of an executable."""
    text = "\n".join(module.to_string() for module in executable.hlo_modules())
    others = [kernel for kernel in kernels(text) if not kernel.is_convolution]
    return Counts(
        kernels=len(others),
        bytes=sum(kernel.read + kernel.written for kernel in others),
        temporary=executable.get_compiled_memory_stats().temp_size_in_bytes,
        cycles=sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text)),
    )


_SIZES = {"pred": 1, "bf16": 2} | {f"{k}{n}": n // 8 for k in "fsuc" for n in (8, 16, 32, 64)}
_TYPE = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}


def kernels(text):
    """The kernels of an optimized program: the instructions of its entry that move something."""
    computations, lines, entry = {}, [], None
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line:
            head = line.split()
            name = head[head[0] == "ENTRY"].lstrip("%")
            entry = name if head[0] == "ENTRY" else entry
            computations[name] = lines = []
        elif match := _INSTRUCTION.match(line):
            lines.append(match.groups())
    convolving = {
        name
        for name, lines in computations.items()
        if any(opcode == "convolution" for _, _, opcode, _ in lines)
    }

    def walk(computation):
        types = {name: shape for name, shape, _, _ in computations[computation]}
        for name, shape, opcode, rest in computations[computation]:
            called = re.findall(r"(?:to_apply|calls|body)=%?([\w.\-]+)", rest)
            if opcode in ("call", "while", "conditional"):
                for inner in called:
                    yield from walk(inner)
            elif opcode not in _FREE and not opcode.endswith("-done"):
                operands = dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
                is_convolution = (
                    "__cudnn$conv" in rest
                    or opcode == "convolution"
                    or not convolving.isdisjoint(called)
                )
                read = sum(_bytes(types[o]) for o in operands if o in types)
                yield Kernel(name, read, _bytes(shape), is_convolution)

    return list(walk(entry))


def _bytes(shape):
    """The bytes of a type as XLA prints it, those of a tuple together."""
    return sum(
        _SIZES.get(kind, 4) * math.prod(int(n) for n in sizes.split(",") if n)
        for kind, sizes in _TYPE.findall(shape)
    )
