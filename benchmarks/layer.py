"""One layer: FRN + TLU against the formula as written and its peers, interleaved in one process.

    python benchmarks/layer.py                            # every mode of the active backend
    KERAS_BACKEND=jax python benchmarks/layer.py --dtype bfloat16
    KERAS_BACKEND=jax python benchmarks/layer.py --growth

Prints milliseconds (least, median, range), the ratio of least times to BatchNormalization + ReLU
and to the formula as written, units of one `x + 1` pass over the same tensor in the same mode, and
"of copy": the least traffic (x is read twice and z written; then x and the gradient are read twice
and one gradient written) per second, against the traffic of `x + 1` per second. Writes CSV and a
plot to `benchmarks/results/`."""

import argparse
import csv
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers, ops

import keras_frn

BACKEND = keras.backend.backend()
RESULTS = Path(__file__).parent / "results"
MODES = {
    "tensorflow": ["graph", "xla", "eager", "eager jit_compile=True"],
    "jax": ["jit"],
    "torch": ["eager", "eager jit_compile=True", "compile"],
}[BACKEND]


class AsWritten(keras_frn.FilterResponseNormalizationTLU):
    """max(gamma * (x * r) + beta, tau), as in the paper."""

    def call(self, x, training=None):
        axes = tuple(range(1, len(x.shape) - 1))
        nu2 = ops.mean(ops.square(ops.cast(x, "float32")), axis=axes, keepdims=True)
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
    """Functions of no arguments that run forward, and forward and backward, and wait."""
    for layer in stack:
        layer.build(x.shape)
    if BACKEND == "jax":
        import jax

        x, upstream = jax.device_put(x), jax.device_put(upstream)
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
        return (
            lambda: jax.block_until_ready(forward(x, weights, state)),
            lambda: jax.block_until_ready(both(x, weights, state, upstream)),
        )

    def call(x):
        for layer in stack:
            x = layer(x, training=True) if layer._call_has_training_arg else layer(x)
        return x

    weights = [v.value for layer in stack for v in layer.trainable_variables]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        x, upstream = tf.constant(x), tf.constant(upstream)

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

    x = torch.tensor(x, requires_grad=True)
    upstream = torch.tensor(upstream)
    # Keras' own layers cannot be compiled alone; what they call can.
    run = torch.compile(call) if mode == "compile" else call

    def forward():
        with torch.no_grad():
            return run(x)

    return forward, lambda: torch.autograd.grad(run(x), [x, *weights], upstream)


def measure(shape, mode, dtype, repeats, axis=-1, names=None):
    """Rows of one table: least, median and largest milliseconds of each peer, interleaved."""
    rng = np.random.default_rng(0)
    numpy_dtype = ops.convert_to_numpy(ops.zeros((), dtype)).dtype
    x, upstream = (rng.standard_normal(shape, "float32").astype(numpy_dtype) for _ in range(2))
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
                functions[name][which]()
        for _ in range(repeats):
            for name in functions:
                functions[name][which]()  # takes the memory that the one before it gave back
                start = time.perf_counter()
                functions[name][which]()
                times[name].append(1e3 * (time.perf_counter() - start))
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
                "gb_per_s": traffic * np.prod(shape) * numpy_dtype.itemsize / min(t) / 1e6,
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
    parser.add_argument("--shape", type=int, nargs="+", default=[32, 56, 56, 64])
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
    name = f"layer_{'growth_' if arguments.growth else ''}{BACKEND}_{arguments.dtype}"
    write(rows, RESULTS / f"{name}.csv")
    if not arguments.growth:
        plot(rows, RESULTS / f"{name}.png")


def device():
    """The processor or the accelerator, in words."""
    if BACKEND == "jax":
        import jax

        if jax.default_backend() != "cpu":
            return jax.devices()[0].device_kind
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def write(rows, path):
    versions = (
        f"keras {keras.__version__}, {BACKEND} {_version()}, keras_frn {keras_frn.__version__}"
    )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "device", "versions"])
        writer.writeheader()
        for row in rows:
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**row, "device": device(), "versions": versions})


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
