"""What a person waits for: first step, new shapes, steps and epochs of whole networks.

    python benchmarks/network.py
    KERAS_BACKEND=jax python benchmarks/network.py --networks resnet20

One model for each normalization, all in one process; batch and image sizes change within a model,
as they do in a session. "first" is the first `train_on_batch` of a size, which traces and
compiles; the others are `train_on_batch` and `predict_on_batch`, interleaved: the least time, and
the median over the rounds of the ratio to BatchNormalization + ReLU. "fit" is the wall time of
the first and of a later epoch of `fit` with 1,000 images in batches of 32; the last batch has 8.
On TensorFlow once as `fit` does by default on a CPU and once with `jit_compile=True`. Prints tables
and writes CSV and a plot to `benchmarks/results/`."""

import argparse
import gc

import keras
import numpy as np
from common import BACKEND, BN, RESULTS, SUFFIX, interleaved, normalizations, ratio, seconds, write
from keras import layers

# (batch, image size) in the order in which they come.
SIZES = {
    "resnet20": [(32, 32), (128, 32), (8, 32)],
    "resnet50": [(16, 64), (16, 96), (16, 128), (7, 64)],
}


def apply(x, normalize):
    for layer in normalize():
        x = layer(x)
    return x


def conv(x, filters, size, strides=1):
    return layers.Conv2D(filters, size, strides, "same", use_bias=False)(x)


def resnet20(normalize):
    """Three stages of three blocks of two 3x3 convolutions, 16 to 64 channels, on 32x32 images."""
    inputs = keras.Input((32, 32, 3))
    x = apply(conv(inputs, 16, 3), normalize)
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if filters > 16 and block == 0 else 1
            y = apply(conv(x, filters, 3, strides), normalize)
            y = apply(conv(y, filters, 3), normalize)
            x = conv(x, filters, 1, strides) if strides > 1 else x
            x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def resnet50(normalize):
    """Four stages of 3, 4, 6, 3 bottlenecks, 32 to 256 channels, of images of any size."""
    inputs = keras.Input((None, None, 3))
    x = apply(conv(inputs, 32, 3), normalize)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        filters = 32 * 2**stage
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            y = apply(conv(x, filters, 1), normalize)
            y = apply(conv(y, filters, 3, strides), normalize)
            y = apply(conv(y, filters, 1), normalize)
            if strides > 1 or x.shape[-1] != filters:
                x = conv(x, filters, 1, strides)
            x = layers.Add()([x, y])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def unet3d(normalize, size, width):
    """A 3D U-Net of three levels, `width` to four times as many channels, on cubes of `size`."""

    def block(x, filters):
        for _ in range(2):
            x = apply(layers.Conv3D(filters, 3, padding="same", use_bias=False)(x), normalize)
        return x

    inputs = keras.Input((size, size, size, 1))
    x, skips = block(inputs, width), []
    for filters in (2 * width, 4 * width):
        skips.append(x)
        x = block(layers.Conv3D(filters, 2, 2, use_bias=False)(x), filters)
    for filters in (2 * width, width):
        x = layers.Conv3DTranspose(filters, 2, 2, use_bias=False)(x)
        x = block(layers.Concatenate()([x, skips.pop()]), filters)
    return keras.Model(inputs, layers.Conv3D(4, 1)(x))


def compiled(model, jit_compile):
    model.compile(
        keras.optimizers.SGD(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit_compile,
    )
    return model


def data(batch, size):
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, size, size, 3)).astype("float32"), rng.integers(0, 10, batch)


def measure(network, jit_compile, repeats):
    """A table for each size, with a row for each normalization."""
    models = {
        name: compiled({"resnet20": resnet20, "resnet50": resnet50}[network](make), jit_compile)
        for name, make in {"ReLU alone": lambda: [layers.ReLU()], **normalizations()}.items()
    }
    for batch, size in SIZES[network]:
        x, y = data(batch, size)
        train = {n: lambda m=m, x=x, y=y: m.train_on_batch(x, y) for n, m in models.items()}
        infer = {n: lambda m=m, x=x: m.predict_on_batch(x) for n, m in models.items()}
        first = {name: seconds(function) for name, function in train.items()}
        interleaved({**train, **{f"predict {n}": f for n, f in infer.items()}}, 2)
        steps, inference = interleaved(train, repeats), interleaved(infer, repeats)
        yield [
            {
                "backend": BACKEND,
                "jit_compile": jit_compile,
                "network": network,
                "what": f"{batch}x{size}x{size}",
                "normalization": name,
                "first_s": first[name],
                "first_of_bn": first[name] / first[BN],
                "step_ms": 1e3 * min(steps[name]),
                "step_of_bn": ratio(steps, name),
                "step_of_plain": ratio(steps, name, "plain formula"),
                "inference_ms": 1e3 * min(inference[name]),
                "inference_of_bn": ratio(inference, name),
            }
            for name in models
        ]


def measure_fit(jit_compile, epochs=3):
    """A row for each normalization: first epoch of a new model, least of the later ones."""
    x, y = data(1000, 32)
    models = {n: compiled(resnet20(make), jit_compile) for n, make in normalizations().items()}
    functions = {
        n: lambda m=m: m.fit(x, y, batch_size=32, verbose=0) and None for n, m in models.items()
    }
    times = interleaved(functions, epochs)
    later = {name: t[1:] for name, t in times.items()}
    return [
        {
            "backend": BACKEND,
            "jit_compile": jit_compile,
            "network": "resnet20",
            "what": "fit, an epoch of 1,000 images",
            "normalization": name,
            "first_s": times[name][0],
            "first_of_bn": times[name][0] / times[BN][0],
            "step_ms": 1e3 * min(later[name]),
            "step_of_bn": ratio(later, name),
            "step_of_plain": None,
            "inference_ms": None,
            "inference_of_bn": None,
        }
        for name in models
    ]


def warm_up(jit_compile):
    """The first model of a process also waits for the backend to get ready."""
    inputs = keras.Input((8, 8, 3))
    outputs = layers.Dense(10)(layers.GlobalAveragePooling2D()(conv(inputs, 4, 3)))
    compiled(keras.Model(inputs, outputs), jit_compile).train_on_batch(*data(4, 8))


def show(rows):
    row = rows[0]
    print(f"\n{BACKEND}, jit_compile={row['jit_compile']}, {row['network']}, {row['what']}")
    heads = ("first, s", "of BN", "step, ms", "of BN", "of plain", "inference", "of BN")
    print(f"  {'':28}" + "".join(f"{head:>10}" for head in heads))
    for row in rows:
        numbers = list(row.values())[5:]
        digits = (2, 2, 1, 2, 2, 1, 2)
        print(
            f"  {row['normalization']:28}"
            + "".join(
                " " * 10 if n is None else f"{n:10.{d}f}"
                for n, d in zip(numbers, digits, strict=True)
            ),
            flush=True,
        )


def plot(rows, path):
    """Seconds until the first step has ended and milliseconds a step, of the largest network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in rows if r["step_of_plain"]]
    network = rows[-1]["network"]
    what = "{0}x{1}x{1}".format(*SIZES[network][0])
    rows = [r for r in rows if r["network"] == network and r["what"] == what][::-1]
    rows = [r for r in rows if r["normalization"] not in ("ReLU alone", "plain formula")]
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.4), layout="constrained", sharey=True)
    panels = (("first_s", "%.1f", "First training step, s"), ("step_ms", "%.0f", "Later steps, ms"))
    for axis, (key, form, title) in zip(axes, panels, strict=True):
        colors = ["C1" if "TLU" in r["normalization"] else "0.6" for r in rows]
        bars = axis.barh([r["normalization"] for r in rows], [r[key] for r in rows], color=colors)
        axis.bar_label(bars, fmt=form, padding=3)
        axis.set_title(title, fontsize=11)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{network}, {what} images, {BACKEND}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--repeats", type=int, default=8)
    # JAX compiles whole steps; Keras' torch.compile of one takes minutes.
    modes = {"tensorflow": ["off", "on"], "jax": ["on"], "torch": ["off"]}[BACKEND]
    parser.add_argument("--modes", nargs="+", default=modes, choices=["off", "on"])
    arguments = parser.parse_args()
    for mode in arguments.modes:
        jit_compile = mode == "on"
        warm_up(jit_compile)
        rows = []
        for network in arguments.networks:
            for table in measure(network, jit_compile, arguments.repeats):
                show(table)
                rows += table
            keras.backend.clear_session()
            gc.collect()
        if "resnet20" in arguments.networks:
            table = measure_fit(jit_compile)
            show(table)
            rows += table
        name = f"network_{BACKEND}{'_compiled' if BACKEND == 'tensorflow' and jit_compile else ''}"
        write(rows, RESULTS / f"{name}{SUFFIX}.csv")
        plot(rows, RESULTS / f"{name}{SUFFIX}.png")


if __name__ == "__main__":
    main()
