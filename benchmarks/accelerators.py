"""What normalizations cost on a GPU and on a TPU, counted in the programs that XLA makes for them.

    pip install -e ".[accelerators]"
    python benchmarks/accelerators.py

No device is needed, and no time is measured. For each normalization in each network, in float32 and
mixed bfloat16, for a training step (SGD) and for inference, of TensorFlow and of JAX: how many
kernels the program has besides its convolutions, the bytes that they read and write, the temporary
memory of the whole program and, on a TPU, the compiler's own estimate of cycles. `PLAN` takes one
to two hours of two cores; a second call goes on where the first one stopped. `--all` takes every
combination. Prints a table, and writes `results/accelerators.csv` and the plot of docs/speed.md.
With `--write FOLDER` it writes the programs instead, for `accelerators_time.py` on a machine with a
GPU."""

import argparse
import csv
import functools
import gzip
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import xla
from common import BN, RESULTS, normalizations
from keras import layers
from network import apply, conv, resnet20, unet3d

BACKEND = keras.backend.backend()
FIELDS = [
    "device",
    "framework",
    "network",
    "dtype",
    "mode",
    "normalization",
    "kernels",
    "bytes",
    "temporary",
    "cycles",
]
KEY = FIELDS[:6]
PATH = RESULTS / "accelerators.csv"
SHORT = {
    BN: "BatchNormalization",
    "GroupNormalization + ReLU": "GroupNormalization",
    "LayerNormalization + ReLU": "LayerNormalization",
    "FRN + TLU": "FRN + TLU",
    "FRN, then TLU": "FRN, then TLU",
    "ReLU alone": "ReLU alone",
}


def three_convolutions(normalize):
    inputs = x = keras.Input((56, 56, 64))
    for _ in range(3):
        x = apply(conv(x, 64, 3), normalize)
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def resnet50(normalize):
    """ResNetV2-50, the network of the paper, on 224x224 images."""
    inputs = keras.Input((224, 224, 3))
    x = layers.MaxPooling2D(3, 2, "same")(conv(inputs, 64, 7, 2))
    for stage, blocks in enumerate((3, 4, 6, 3)):
        filters = 64 * 2**stage
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            y = apply(x, normalize)
            x = conv(y, 4 * filters, 1, strides) if block == 0 else x
            y = apply(conv(y, filters, 1), normalize)
            y = apply(conv(y, filters, 3, strides), normalize)
            x = layers.Add()([x, conv(y, 4 * filters, 1)])
    x = layers.GlobalAveragePooling2D()(apply(x, normalize))
    return keras.Model(inputs, layers.Dense(1000)(x))


# Of each network: what builds it, and the batch size.
NETWORKS = {
    "ResNet-20": (resnet20, 128),
    "three convolutions": (three_convolutions, 256),
    "ResNet-50": (resnet50, 128),
    "3D U-Net": (functools.partial(unet3d, size=64, width=32), 2),
}


_BOTH, _LARGE = ("tensorflow", "jax"), ("ResNet-20", "ResNet-50", "3D U-Net")
_FEW = (BN, "GroupNormalization + ReLU", "FRN + TLU", "ReLU alone")
_MANY = (*_FEW, "LayerNormalization + ReLU")
# What is compiled without `--all`: device, frameworks, networks, dtype, mode and normalizations. A
# step of ResNet-20 takes minutes to compile for a TPU, and less than one for a GPU.
PLAN = [
    ("H100", _BOTH, tuple(NETWORKS), "mixed_bfloat16", "training", tuple(SHORT)),
    ("H100", _BOTH, _LARGE, "mixed_bfloat16", "inference", _MANY),
    ("H100", _BOTH, _LARGE, "float32", "training", _MANY),
    ("TPU v5e", _BOTH, ("ResNet-20",), "mixed_bfloat16", "training", _FEW),
    ("TPU v5e", ("jax",), ("ResNet-20",), "mixed_bfloat16", "inference", _FEW),
    ("TPU v5e", ("jax",), ("ResNet-20",), "float32", "training", _FEW),
]


def program_of(network, normalization, dtype, mode, platform):
    """The StableHLO of a training step or of inference, of this process' backend."""
    keras.utils.clear_session()
    keras.config.set_dtype_policy(dtype)  # which `clear_session` has reset
    build, batch = NETWORKS[network]
    groups = 32 if network == "ResNet-50" else 8
    choices = {"ReLU alone": lambda: [layers.ReLU()], **normalizations(groups)}
    model = build(choices[normalization])
    images = (batch, *model.input_shape[1:])
    labels = (batch, *model.output_shape[1:-1])
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float32")
    if BACKEND == "jax":
        import jax

        weights, state = (
            [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        )
        x, y = jax.ShapeDtypeStruct(images, "float32"), jax.ShapeDtypeStruct(labels, "int32")

        def loss(weights, state, x, y):
            outputs, state = model.stateless_call(weights, state, x, training=True)
            return loss_of(y, outputs), state

        def train(weights, state, x, y):
            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, state), gradients = gradient(weights, state, x, y)
            return [w - 1e-3 * g for w, g in zip(weights, gradients)], state, value

        def infer(weights, state, x, y):
            return model.stateless_call(weights, state, x, training=False)[0]

        function = {"training": train, "inference": infer}[mode]
        return xla.jax_program(function, weights, state, x, y, platform=platform)
    import tensorflow as tf

    x, y = tf.TensorSpec(images), tf.TensorSpec(labels, "int32")

    def train(x, y):
        with tf.GradientTape() as tape:
            value = loss_of(y, model(x, training=True))
        weights = [v.value for v in model.trainable_variables]
        for weight, gradient in zip(weights, tape.gradient(value, weights)):
            weight.assign_sub(1e-3 * gradient)
        return value

    def infer(x, y):
        return model(x, training=False)

    return xla.tensorflow_program({"training": train, "inference": infer}[mode], x, y)


def read():
    """The rows that are there, by what was compiled."""
    if not PATH.exists():
        return {}
    with PATH.open(newline="") as file:
        return {tuple(row[field] for field in KEY): row for row in csv.DictReader(file)}


def wanted(arguments):
    for key in itertools.product(
        arguments.devices,
        arguments.frameworks,
        arguments.networks,
        arguments.dtypes,
        arguments.modes,
        arguments.normalizations,
    ):
        device, framework, network, dtype, mode, normalization = key
        is_planned = any(
            (device, dtype, mode) == (d, t, m)
            and framework in frameworks
            and network in networks
            and normalization in chosen
            for d, frameworks, networks, t, m, chosen in PLAN
        )
        if arguments.all or is_planned:
            yield key


def work(keys):
    """Compiles what is wanted of this process' backend, and appends a row for each."""
    devices = {}
    for done, key in enumerate(keys):
        device, _, network, dtype, mode, normalization = key
        start = time.perf_counter()
        if device not in devices:
            devices[device] = xla.device(device)
        platform = xla.DEVICES[device]["platform"]
        program = program_of(network, normalization, dtype, mode, platform)
        counts = xla.count(xla.compile_for(devices[device], program))
        is_new = not PATH.exists()
        with PATH.open("a", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(FIELDS)
            writer.writerow([*key, *counts])
        took = time.perf_counter() - start
        print(f"{done + 1} of {len(keys)}: {', '.join(key)}: {counts}, {took:.0f} s", flush=True)


def write(keys, folder):
    """Writes the programs of this process' backend as files."""
    folder.mkdir(exist_ok=True)
    for device, framework, network, dtype, mode, normalization in keys:
        platform = xla.DEVICES[device]["platform"]
        program = program_of(network, normalization, dtype, mode, platform)
        name = ".".join((network, dtype, mode, framework, normalization)).replace(" ", "_")
        with gzip.open(folder / f"{name}.mlir.gz", "wt") as file:
            file.write(program)


def show(rows):
    """A table of ratios to BatchNormalization in the same program."""
    print(f"\n{'ratio to ' + SHORT[BN]:82}{'bytes':>8}{'kernels':>9}{'memory':>8}{'cycles':>8}")
    for key, row in rows.items():
        base = rows.get((*key[:5], BN))
        if base is None or key[5] == BN:
            continue
        # On a TPU most of a normalization is part of a convolution's kernel.
        told = ("cycles",) if key[0] == "TPU v5e" else ("bytes", "kernels", "temporary")
        ratios = [
            f"{int(row[f]) / int(base[f]):.2f}" if f in told and int(base[f]) else ""
            for f in ("bytes", "kernels", "temporary", "cycles")
        ]
        print("{:82}{:>8}{:>9}{:>8}{:>8}".format(", ".join((*key[:5], SHORT[key[5]])), *ratios))


def plot(rows, path):
    """What each normalization takes beside BatchNormalization, as far as it was counted."""
    from matplotlib.figure import Figure

    step = ("mixed_bfloat16", "training")
    networks = {name: (name, *step) for name in NETWORKS}
    panels = [
        ("Memory traffic of training, H100, TensorFlow", "bytes", "H100", "tensorflow", networks),
        ("Memory traffic of training, H100, JAX", "bytes", "H100", "jax", networks),
    ]
    modes = {
        "training\nbfloat16": ("ResNet-20", *step),
        "training\nfloat32": ("ResNet-20", "float32", "training"),
        "inference\nbfloat16": ("ResNet-20", "mixed_bfloat16", "inference"),
    }
    panels.append(("Cycles on a TPU v5e, JAX, ResNet-20", "cycles", "TPU v5e", "jax", modes))
    names = [name for name in SHORT if name != "FRN, then TLU"]
    colors = dict(zip(names, ("0.5", "0.65", "0.78", "#2f6fb3", "0.88")))
    # As wide as a phone: three panels below each other.
    figure = Figure(figsize=(5.6, 9), layout="constrained")
    for axis, (title, field, device, framework, bars) in zip(figure.subplots(3), panels):
        for i, key in enumerate(bars.values()):
            found = {n: rows.get((device, framework, *key, n)) for n in names}
            found = {n: int(row[field]) for n, row in found.items() if row}
            for j, (name, value) in enumerate(found.items() if BN in found else ()):
                ratio = value / found[BN]
                bar = axis.barh(-i - 0.16 * (j - 2), ratio, 0.15, color=colors[name])
                if name == "FRN + TLU":
                    axis.bar_label(bar, fmt="%.2f", padding=2, fontsize=9)
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set_title(title, fontsize=11)
        axis.set_yticks([-i for i in range(len(bars))], bars)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [axis.barh(0, 0, color=colors[name], label=SHORT[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Relative to BatchNormalization + ReLU, mixed bfloat16")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = {
        "devices": list(xla.DEVICES),
        "frameworks": ["tensorflow", "jax"],
        "networks": list(NETWORKS),
        "dtypes": ["float32", "mixed_bfloat16"],
        "modes": ["training", "inference"],
        "normalizations": list(SHORT),
    }
    for name, values in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=values)
    parser.add_argument("--all", action="store_true", help="compile every combination")
    parser.add_argument("--show", action="store_true", help="only show what is there")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the programs")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if arguments.write:
        write([key for key in wanted(arguments) if key[1] == BACKEND], arguments.write)
        return
    keys = [key for key in wanted(arguments) if key not in read() and not arguments.show]
    for framework in arguments.frameworks:
        mine = [key for key in keys if key[1] == framework]
        if framework == BACKEND:
            work(mine)
        elif mine and len(arguments.frameworks) > 1:
            # A process has one backend.
            environment = {**os.environ, "KERAS_BACKEND": framework}
            command = [sys.executable, __file__, *sys.argv[1:], "--frameworks", framework]
            subprocess.run(command, env=environment, check=True)
        elif mine:
            raise SystemExit(f"Set KERAS_BACKEND={framework}.")
    order = list(wanted(argparse.Namespace(**choices, all=True)))
    rows = dict(sorted(read().items(), key=lambda item: order.index(item[0])))
    show(rows)
    plot(rows, RESULTS.parents[1] / "docs/images/accelerators.png")


if __name__ == "__main__":
    main()
