"""One layer: FRN + TLU against the formula as written and its peers, interleaved in one process.

    python benchmarks/layer.py                            # every mode of the active backend
    KERAS_BACKEND=jax python benchmarks/layer.py --dtype bfloat16
    KERAS_BACKEND=jax python benchmarks/layer.py --growth

Prints milliseconds (least, median, range), the ratio of least times to BatchNormalization + ReLU
and to the formula as written, units of one `x + 1` pass over the same tensor in the same mode, and
"of copy": the least traffic (x is read twice and z written; then x and the gradient are read twice
and one gradient written) per second, against the traffic of `x + 1` per second. Writes CSV and a
plot to `benchmarks/results/`. On a GPU or TPU a run is ten calls in a row, started before the first
has ended, so that the device and not the host is timed, and the tensor is larger."""

import argparse
import csv
import os
import platform
import re
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers, ops

import keras_frn
from keras_frn.compilation import with_own_code

BACKEND = keras.backend.backend()
RESULTS = Path(__file__).parent / "results"
MODES = {
    "tensorflow": ["graph", "xla", "eager", "eager jit_compile=True"],
    "jax": ["jit"],
    "torch": ["eager", "eager jit_compile=True", "compile"],
}[BACKEND]


def accelerator():
    """The name of the GPU or TPU that the backend computes on, or None."""
    if BACKEND == "jax":
        import jax

        return None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    if BACKEND == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(found[0])["device_name"] if found else None


DEVICE = accelerator()
CALLS = 10 if DEVICE else 1
# Results of a processor and of an accelerator lie side by side.
SUFFIX = "_" + re.sub(r"\W+", "_", DEVICE) if DEVICE else ""


class AsWritten(keras_frn.FilterResponseNormalizationTLU):
    """max(gamma * (x * r) + beta, tau), as in the paper."""

    def call(self, x, training=None):
        axes = tuple(range(1, len(x.shape) - 1))
        x = ops.cast(x, "float32")
        nu2 = ops.mean(ops.square(x), axis=axes, keepdims=True)
        y = self.gamma * (x * ops.rsqrt(nu2 + 1e-6)) + self.beta
        return ops.cast(ops.maximum(y, self.tau), self.compute_dtype)


class AddOne(layers.Layer):
    """One pass over the tensor: the unit."""

    def call(self, x):
        return x + 1


def peers(axis, jit_compile):
    relu = layers.ReLU
    return {
        "x + 1": [AddOne()],
        "FRN + TLU, fused": [
            keras_frn.FilterResponseNormalizationTLU(axis=axis, jit_compile=jit_compile)
        ],
        "FRN, TLU": [
            keras_frn.FilterResponseNormalization(axis=axis, jit_compile=jit_compile),
            keras_frn.TLU(axis=axis, jit_compile=jit_compile),
        ],
        "FRN as written": [AsWritten()],
        "BatchNormalization + ReLU": [layers.BatchNormalization(axis=axis), relu()],
        "GroupNormalization + ReLU": [layers.GroupNormalization(groups=-1, axis=axis), relu()],
        "LayerNormalization + ReLU": [layers.LayerNormalization(axis=axis), relu()],
    }


def programs(stack, x, upstream, mode):
    """Functions of no arguments that start forward, and forward and backward."""
    for layer in stack:
        layer.build(x.shape)
    if BACKEND == "jax":
        import jax

        weights = [[v.value for v in layer.trainable_variables] for layer in stack]
        state = [[v.value for v in layer.non_trainable_variables] for layer in stack]

        def forward(x, weights, state):
            updates = []
            for layer, w, s in zip(stack, weights, state, strict=True):
                kwargs = {"training": True} if layer._call_has_training_arg else {}
                x, new = layer.stateless_call(w, s, x, **kwargs)
                updates.append(new)
            return x, updates

        def both(x, weights, state, upstream):
            z, pullback, updates = jax.vjp(
                lambda x, w: forward(x, w, state), x, weights, has_aux=True
            )
            return z, pullback(upstream), updates

        forward, both = jax.jit(forward), jax.jit(both)
        return lambda: forward(x, weights, state), lambda: both(x, weights, state, upstream)

    def call(x):
        for layer in stack:
            x = layer(x, training=True) if layer._call_has_training_arg else layer(x)
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
        if not mode.startswith("eager"):
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


def wait(result):
    """Until what was started has ended."""
    if BACKEND == "jax":
        import jax

        jax.block_until_ready(result)
    elif DEVICE and BACKEND == "torch":
        import torch

        torch.cuda.synchronize()
    elif DEVICE:
        import tensorflow as tf

        tf.test.experimental.sync_devices()


def milliseconds(start):
    """Of one call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        result = start()
    wait(result)
    return 1e3 * (time.perf_counter() - begin) / CALLS


def measure(shape, mode, dtype, repeats, axis=-1, names=None):
    """Rows of one table: least, median and largest milliseconds of each peer, interleaved."""
    rng = np.random.default_rng(0)
    x, upstream = (
        ops.convert_to_tensor(rng.standard_normal(shape, "float32"), dtype) for _ in range(2)
    )
    itemsize = 4 if dtype == "float32" else 2
    keras.config.set_dtype_policy(f"mixed_{dtype}" if dtype != "float32" else dtype)
    stacks = peers(axis, True if mode.endswith("jit_compile=True") else None)
    functions = {
        name: programs(stack, x, upstream, mode)
        for name, stack in stacks.items()
        if names is None or name in names
    }
    # One pass is the unit of both tables.
    functions["x + 1"] = (functions["x + 1"][0],) * 2
    rows = []
    for which, direction in enumerate(["forward", "forward + backward"]):
        times = {name: [] for name in functions}
        for name in functions:
            for _ in range(2):
                wait(functions[name][which]())
        for _ in range(repeats):
            for name in functions:
                wait(functions[name][which]())  # takes the memory that the one before it gave back
                times[name].append(milliseconds(functions[name][which]))
        least = {name: min(t) for name, t in times.items()}
        for name, t in times.items():
            traffic = 2 if name == "x + 1" else (3, 8)[which]
            row = {
                "backend": BACKEND,
                "mode": mode,
                "shape": "x".join(map(str, shape)),
                "axis": axis,
                "dtype": dtype,
                "direction": direction,
                "layer": name,
                "min_ms": min(t),
                "median_ms": float(np.median(t)),
                "max_ms": max(t),
                "passes": min(t) / least["x + 1"],
                "gb_per_s": traffic * np.prod(shape) * itemsize / min(t) / 1e6,
            }
            row["of_copy"] = traffic / 2 / row["passes"]
            for key, other in (("bn", "BatchNormalization + ReLU"), ("written", "FRN as written")):
                row[f"of_{key}"] = min(t) / least[other] if other in least else None
            rows.append(row)
    return rows


def show(rows):
    first = rows[0]
    print(f"\n{first['backend']} {first['mode']}, {first['shape']} {first['dtype']}")
    for direction in ("forward", "forward + backward"):
        print(
            f"  {direction:27}{'min':>8}{'median':>9}{'max':>9}"
            f"{'of BN':>8}{'of paper':>10}{'passes':>8}{'of copy':>9}"
        )
        for r in (r for r in rows if r["direction"] == direction):
            ratios = (
                f"{r[key]:{width}.2f}" if r[key] is not None else " " * width
                for key, width in (("of_bn", 8), ("of_written", 10), ("passes", 8))
            )
            numbers = f"{r['min_ms']:8.2f}{r['median_ms']:9.2f}{r['max_ms']:9.2f}"
            print(f"  {r['layer']:27}" + numbers + "".join(ratios) + f"{r['of_copy']:9.2f}")


GROWTH = [
    # batch, spatial sizes, channels: from 1e4 to 1e8 elements
    *[((32, s, s, 64), -1) for s in (2, 7, 14, 28, 56, 112)],
    *[((n, 32, 32, 32), -1) for n in (1, 8, 64, 512, 1024)],
    *[((8, 56, 56, c), -1) for c in (1, 3, 8, 32, 128, 512, 2048)],
    *[((8, t, 32), -1) for t in (1000, 10_000, 100_000)],
    ((1, 64, 64, 64, 16), -1),
    ((1, 128, 128, 128, 16), -1),
    ((32, 64, 56, 56), 1),
    ((256, 4, 4, 512), -1),
    ((1024, 1, 1, 1024), -1),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # On an accelerator a tensor must be many times its cache for the memory to be measured.
    shape = [256, 112, 112, 64] if DEVICE else [32, 56, 56, 64]
    parser.add_argument("--shape", type=int, nargs="+", default=shape)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--growth", action="store_true", help="many sizes, x + 1 and fused only")
    arguments = parser.parse_args()
    rows = []
    if arguments.growth:
        modes = [m for m in arguments.modes if m in ("xla", "jit", "compile")]
        for shape, axis in GROWTH:
            for mode in modes:
                names = ("x + 1", "FRN + TLU, fused")
                repeats = arguments.repeats if np.prod(shape) < 3e7 else 5
                rows += measure(shape, mode, arguments.dtype, repeats, axis, names)
                both = rows[-1]
                print(
                    f"{mode} {both['shape']:>20} axis {axis:2}: forward + backward "
                    f"{both['min_ms']:9.3f} ms, {both['passes']:6.2f} passes",
                    flush=True,
                )
    else:
        for mode in arguments.modes:
            rows += measure(tuple(arguments.shape), mode, arguments.dtype, arguments.repeats)
            show([r for r in rows if r["mode"] == mode])
    RESULTS.mkdir(exist_ok=True)
    name = f"layer_{'growth_' if arguments.growth else ''}{BACKEND}_{arguments.dtype}{SUFFIX}"
    write(rows, RESULTS / f"{name}.csv")
    if not arguments.growth:
        plot(rows, RESULTS / f"{name}.png")


def write(rows, path):
    versions = (
        f"keras {keras.__version__}, {BACKEND} {_version()}, keras_frn {keras_frn.__version__}"
    )
    device = DEVICE or f"CPU, {os.cpu_count()} cores, {platform.machine()}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "device", "versions"])
        writer.writeheader()
        for row in rows:
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**row, "device": device, "versions": versions})


def _version():
    return __import__(BACKEND).__version__


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r["direction"] == "forward + backward"]
    modes = list(dict.fromkeys(r["mode"] for r in rows))
    figure, axes = plt.subplots(
        1, len(modes), figsize=(5 * len(modes), 3.2), layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes[0], modes, strict=True):
        chosen = [r for r in rows if r["mode"] == mode][::-1]
        axis.barh([r["layer"] for r in chosen], [r["min_ms"] for r in chosen])
        axis.set(title=f"{BACKEND} {mode}", xlabel=f"forward + backward, ms ({rows[0]['shape']})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
