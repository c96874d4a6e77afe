"""Test accuracy by batch size and normalization, with and without filters of zero mean.

    python benchmarks/small_batch.py --budget-minutes 10 --results /tmp/again
    python benchmarks/small_batch.py --ablate
    python benchmarks/small_batch.py --tune

A pre-activation ResNet of 14 layers, 16 to 64 channels, on Fashion-MNIST (Debian package
`dataset-fashion-mnist`, or `--data FOLDER`). Every network sees the same number of images and has
the same schedule: SGD with Nesterov momentum 0.9, linear warm-up over 5% of the steps, a cosine to
0, the rate in proportion to the batch size, horizontal flips, no weight decay. Accuracy is on the
10,000 test images.

`--tune` chooses the rate of each normalization: rate * 32 / batch is 0.03, 0.1 or 0.3 (or 1 or
0.01, tried where their neighbor is best), by accuracy on 2,000 training images that no run trains
on, one run of a quarter of the length, at batch 2 (for 2, 4 and 8) and at batch 32 (for 32 and
128). The choices are in results/small_batch_rates.csv; a study takes those of the longest runs that
are no longer than its own.

BatchNormalization has momentum 0.99 up to batch 8 and 0.9 from 32, and statistics recomputed over
2,000 training images as a second choice; the better of the two on the same 2,000 images counts.

The budget ends the study, and the runs are in the order of their use: one seed at batch 2 and 32,
more seeds, the other batch sizes. Each finished run is a line of results/small_batch.csv and is not
done again: `--results` names another folder, to do them anew with the same rates. Without a budget
all runs are done. Prints a summary and draws the plot at the end."""

import argparse
import functools
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from common import BN, RESULTS
from jax import numpy as jnp
from keras import layers
from report import ablation_table, cells, in_words, picture, plot_batches
from training import (
    append,
    batch_statistics,
    initial_state,
    predictor,
    rates,
    read,
    tables,
    training_step,
)

import keras_frn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "saved_models"))
from build import FASHION_MNIST, fashion_mnist

BATCHES = (2, 32, 8, 4, 128)
RATES, BEYOND = (0.03, 0.1, 0.3), {1.0: 0.3, 0.01: 0.03}
VALIDATION = 2000


def frn_tlu(**options):
    return [keras_frn.FilterResponseNormalizationTLU(**options)]


def frn_relu():
    return [keras_frn.FilterResponseNormalization(), layers.ReLU()]


def batch_norm(momentum=0.9):
    return [layers.BatchNormalization(momentum=momentum), layers.ReLU()]


def group_norm():
    return [layers.GroupNormalization(8), layers.ReLU()]


def layer_norm():
    return [layers.LayerNormalization(), layers.ReLU()]


def group_norm_tlu():
    return [layers.GroupNormalization(8), keras_frn.TLU()]


NORMALIZATIONS = {
    "FRN + TLU": frn_tlu,
    "BatchNormalization + ReLU": batch_norm,
    "GroupNormalization + ReLU": group_norm,
    "FRN + ReLU": frn_relu,
    "LayerNormalization + ReLU": layer_norm,
    "GroupNormalization + TLU": group_norm_tlu,
}
GN, FRN = "GroupNormalization + ReLU", "FRN + TLU"


def tau(start):
    return {"tau_initializer": keras.initializers.Constant(start)}


# One change each to FRN + TLU with filters of zero mean. What `frn` has goes to the layer, `net`
# to the network, the rest to the training.
ABLATION = {
    "tau starts at -1": {"frn": tau(-1.0)},
    "tau starts at -0.5": {"frn": tau(-0.5)},
    "decay 5e-4 of kernels": {"decay": 5e-4},
    "decay 5e-4 of all weights": {"decay": 5e-4, "decay_all": True},
    "epsilon = nu2 at the start": {"frn": {"learned_epsilon": "per_channel"}, "k": 1.0},
    "epsilon = 3 nu2 at the start": {"frn": {"learned_epsilon": "per_channel"}, "k": 3.0},
    "the first, then learned": {"frn": {"learned_epsilon": "per_channel"}, "k": 1.0, "learn": True},
    "epsilon learned from 1e-4": {"frn": {"learned_epsilon": "per_channel"}, "learn": True},
    "no last normalization": {"net": {"last": "none"}},
    "last normalization after the mean": {"net": {"last": "after"}},
    "filters start at half": {"net": {"scale": 0.25}},
    "filters start at double": {"net": {"scale": 4.0}},
    "no warm-up": {"warm_up": 0.0},
    "warm-up of 20%": {"warm_up": 0.2},
    "weights of zero mean, logits too": {"net": {"center_logits": True}},
}


def network(
    normalize, zero_mean, width=16, blocks=2, last="before", scale=1.0, center_logits=False
):
    """The ResNet of `keras_frn.models` in the small: three stages, a 3x3 stem of stride 2."""
    constraint = keras_frn.constraints.ZeroMean() if zero_mean else None
    normal = keras.initializers.VarianceScaling(2.0 * scale, "fan_in", "truncated_normal")

    def conv(x, filters, size, strides=1):
        options = {"kernel_initializer": normal.clone(), "kernel_constraint": constraint}
        return layers.Conv2D(filters, size, strides, "same", use_bias=False, **options)(x)

    def apply(x):
        for layer in normalize():
            x = layer(x)
        return x

    inputs = keras.Input((28, 28, 1))
    x = conv(inputs, width, 3, 2)
    for stage in range(3):
        filters = width * 2**stage
        for block in range(blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            y = apply(x)
            if strides > 1:
                x = conv(y, filters, 1, strides)
            y = conv(apply(conv(y, filters, 3, strides)), filters, 3)
            x = layers.Add()([x, y])
    x = apply(x) if last == "before" else x
    x = layers.GlobalAveragePooling2D()(x)
    if last == "after":
        x = keras_frn.FilterResponseNormalizationTLU(learned_epsilon=True)(x)
    constraint = keras_frn.constraints.ZeroMean() if center_logits else None
    return keras.Model(inputs, layers.Dense(10, kernel_constraint=constraint)(x))


def momentum_at(batch):
    """Of BatchNormalization's statistics; 0.99 lags behind in the few steps of a large batch."""
    return 0.9 if batch >= 32 else 0.99


def build(name, zero_mean, batch, options):
    normalize = NORMALIZATIONS[name]
    if normalize is batch_norm:
        normalize = functools.partial(batch_norm, momentum_at(batch))
    normalize = functools.partial(normalize, **options.get("frn", {}))
    model = network(normalize, zero_mean, **options.get("net", {}))
    if "k" in options:
        set_epsilon(model, options["k"])
    for layer in model.layers:
        if "frn" in options and getattr(layer, "learned_epsilon", None) is not None:
            layer.learned_epsilon.trainable = options.get("learn", False)
    return model


def set_epsilon(model, k):
    """Each channel's epsilon is k times its mean square over 256 images, from input to output."""
    for layer in model.layers:
        if isinstance(layer, keras_frn.FilterResponseNormalization):
            x = np.asarray(keras.Model(model.input, layer.input)(DATA["probe"]))
            layer.learned_epsilon.assign(k * np.mean(x * x, axis=(0, 1, 2)))


DATA = {}


def load(folder):
    data = fashion_mnist(folder)
    for part in ("train", "test"):
        images = (getattr(data, f"{part}_images") - 0.286) / 0.353
        DATA[part] = jnp.asarray(images), jnp.asarray(getattr(data, f"{part}_labels"), "int32")
    images, labels = DATA["train"]
    held_out = min(VALIDATION, len(images) // 4)
    DATA["validation"] = images[-held_out:], labels[-held_out:]
    DATA["train"] = images[:-held_out], labels[:-held_out]
    DATA["probe"] = images[:256]


def batch_loss(predict, data, batch):
    images, labels = data
    rows, flips = batch
    x = images[rows]
    x = jnp.where(flips[:, None, None, None], x[:, :, ::-1], x)
    log = jax.nn.log_softmax(predict(x))
    return -jnp.mean(jnp.take_along_axis(log, labels[rows][:, None], 1))


@functools.cache
def compiled(name, zero_mean, batch, variant):
    """The step, what predicts and what recomputes statistics, compiled once for all seeds."""
    options = ABLATION.get(variant, {})
    model = build(name, zero_mean, batch, options)
    decays = {key: options[key] for key in ("decay", "decay_all") if key in options}
    step = training_step(model, batch_loss, **decays)
    return step, predictor(model), batch_statistics(model, momentum_at(batch))


def accuracy(predict, weights, statistics, part, size=500):
    images, labels = DATA[part]
    right = 0
    for i in range(0, len(images), size):
        z = predict(weights, statistics, images[i : i + size])
        right += int((jnp.argmax(z, -1) == labels[i : i + size]).sum())
    return 100 * right / len(images)


def train(name, zero_mean, batch, seed, images, rate, variant=""):
    """Trains a network and returns the functions and the state."""
    step, predict, statistics = compiled(name, zero_mean, batch, variant)
    options = ABLATION.get(variant, {})
    keras.utils.set_random_seed(seed)
    state = initial_state(build(name, zero_mean, batch, options))
    rng, steps = np.random.default_rng(seed), images // batch
    count = len(DATA["train"][0])
    order = np.concatenate([rng.permutation(count) for _ in range(-(-images // count))])
    rate_of = rates(rate * batch / 32, steps, options.get("warm_up", 0.05))
    for i in range(steps):
        rows = order[i * batch : (i + 1) * batch].astype("int32")
        state = step(state, DATA["train"], (rows, rng.random(batch) < 0.5), rate_of[i])
    return state, predict, statistics


def run(name, zero_mean, batch, seed, images, rate, variant=""):
    """A row of the table."""
    start = time.perf_counter()
    (weights, moving, *_), predict, recompute = train(
        name, zero_mean, batch, seed, images, rate, variant
    )
    used = "running" if name == BN else ""
    if name == BN:
        x = DATA["train"][0]
        found = [recompute(weights, moving, x[i : i + 250]) for i in range(0, 2000, 250)]
        found = [sum(values) / len(values) for values in zip(*found)]
        choices = {"running": moving, "recomputed": found}
        used = max(choices, key=lambda c: accuracy(predict, weights, choices[c], "validation"))
        moving = choices[used]
    return {
        "normalization": name,
        "zero_mean": int(zero_mean),
        "variant": variant,
        "batch": batch,
        "seed": seed,
        "images": images,
        "rate": rate,
        "accuracy": round(accuracy(predict, weights, moving, "test"), 2),
        "statistics": used,
        "seconds": round(time.perf_counter() - start, 1),
    }


def key(row):
    names = ("normalization", "zero_mean", "variant", "batch", "seed", "images")
    return tuple(str(row[name]) for name in names)


def tune(path, images, names, batches):
    """Tries RATES, and what is beyond the first or the last of them where that is the best."""
    for batch in batches:
        for zero_mean in (True, False):
            for name in names:
                where = {"normalization": name, "zero_mean": int(zero_mean), "at_batch": batch}
                same = {**where, "images": images}
                found = {
                    float(r["rate"]): float(r["validation"])
                    for r in read(path)
                    if all(r[k] == str(v) for k, v in same.items())
                }
                for rate in (*RATES, *BEYOND):
                    is_tried = rate not in BEYOND or max(found, key=found.get) == BEYOND[rate]
                    if rate in found or not is_tried:
                        continue
                    (weights, moving, _), predict, recompute = train(
                        name, zero_mean, batch, 100, images, rate
                    )
                    if name == BN:
                        moving = recompute(weights, moving, DATA["train"][0][:1000])
                    found[rate] = accuracy(predict, weights, moving, "validation")
                    row = {**where, "rate": rate, "images": images, "validation": found[rate]}
                    append(row, path)
                    print(*row.values(), flush=True)


def chosen(path, images):
    """The rate for each normalization, constraint and batch size in runs of so many images."""
    best = {}
    for row in read(path):
        if int(row["images"]) > images:
            continue
        for batch in (2, 4, 8) if row["at_batch"] == "2" else (32, 128):
            where = row["normalization"], row["zero_mean"] == "1", batch
            found = int(row["images"]), float(row["validation"]), float(row["rate"])
            best[where] = max(best.get(where, (0, 0, 0)), found)
    return {where: rate for where, (*_, rate) in best.items()}


def study_runs(seeds):
    pairs = [(zero_mean, name) for zero_mean in (True, False) for name in NORMALIZATIONS]
    for batches in ((2, 32), *((b,) for b in BATCHES[2:])):
        for seed in range(seeds):
            for batch in batches:
                for zero_mean, name in pairs:
                    yield name, zero_mean, batch, seed, ""


def ablation_runs(seeds):
    for seed in range(seeds):
        for variant in ABLATION:
            yield FRN, True, 2, seed, variant


def perform(runs, path, rates_path, images, minutes):
    """Does the runs that the table lacks, and says how long the rest takes."""
    done, rate_of = {key(row) for row in read(path)}, chosen(rates_path, images)
    names = ("normalization", "zero_mean", "batch", "seed", "variant")
    runs = [dict(zip(names, r), images=images) for r in runs]
    runs = [r for r in runs if key({**r, "zero_mean": int(r["zero_mean"])}) not in done]
    start = time.monotonic()
    for number, r in enumerate(runs, 1):
        if minutes and time.monotonic() - start > 60 * minutes:
            print(f"The budget is used up; {len(runs) - number + 1} runs are left.")
            return
        rate = rate_of[r["normalization"], r["zero_mean"], r["batch"]]
        row = run(
            r["normalization"], r["zero_mean"], r["batch"], r["seed"], images, rate, r["variant"]
        )
        append(row, path)
        left = (time.monotonic() - start) / number * (len(runs) - number) / 60
        print(
            f"[{number}/{len(runs)}] {row['normalization']}{', zero mean' * row['zero_mean']}"
            f"{', ' * bool(row['variant'])}{row['variant']}, batch {row['batch']}, seed "
            f"{row['seed']}: {row['accuracy']:.2f}% in {row['seconds']:.0f} s, {left:.0f} min"
            " left",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=FASHION_MNIST)
    parser.add_argument("--budget-minutes", type=float, default=0)
    parser.add_argument("--images", type=int, default=10_000, help="that each network sees")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--only", nargs="+", help="names of normalizations, or of changes")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    load(arguments.data)
    path, rates_path = tables(arguments.results, "small_batch", arguments.tune)
    if arguments.tune:
        names = [n for n in NORMALIZATIONS if n in (arguments.only or NORMALIZATIONS)]
        tune(
            rates_path, arguments.images // 4, names, [b for b in (2, 32) if b in arguments.batches]
        )
    runs = (ablation_runs if arguments.ablate else study_runs)(arguments.seeds)
    runs = [r for r in runs if r[2] in arguments.batches]
    if arguments.only:
        runs = [r for r in runs if (r[4] or r[0]) in arguments.only]
    perform(runs, path, rates_path, arguments.images, arguments.budget_minutes)
    report(path, arguments.images)


def report(path, images):
    rows = [r for r in read(path) if r["images"] == str(images)]
    study = [r for r in rows if not r["variant"]]
    # The figure is of the length that most runs have, whichever was asked for.
    runs = [r for r in read(path) if not r["variant"]]
    lengths = [r["images"] for r in runs]
    usual = max(lengths, key=lengths.count, default=None)
    batches = sorted({int(r["batch"]) for r in study})
    print(f"\nTest accuracy in %, mean ± 95% interval; {images} images seen. By batch size:")
    columns = [(batch, {"batch": batch}) for batch in batches]
    cells(study, "accuracy", NORMALIZATIONS, columns)
    for batch in batches:
        print(f"\nBatch {batch}:")
        in_words(study, "accuracy", NORMALIZATIONS, {"batch": batch})
    print("\nFRN + TLU at batch 2; the change against filters of zero mean alone:")
    ablation_table(rows, "accuracy", ABLATION)
    plot_batches([r for r in runs if r["images"] == usual], NORMALIZATIONS, picture(path))


if __name__ == "__main__":
    main()
