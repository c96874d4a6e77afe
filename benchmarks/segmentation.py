"""Segmentation of volumes at batch 1: Dice by normalization, with and without filters of zero mean.

    python benchmarks/segmentation.py --results /tmp/again [--tune]

The volumes, 16x16x16, are made here: a few overlapping ellipsoids, to be found, among bright rods,
to be left alone, under uneven light and noise; brightness and light differ from volume to volume.
Each volume is brought to zero mean and unit variance. A 3D U-Net of three levels, 8 to 32 channels,
sees 300 fresh volumes, one a step: SGD with Nesterov momentum 0.9, linear warm-up over 5% of the
steps, a cosine to 0, cross-entropy and soft Dice. Dice is the mean over 100 other volumes.

`--tune` chooses the rate of each normalization out of 0.01, 0.03 and 0.1 (and 0.3, where 0.1 is
best) by the Dice on 40 validation volumes, one run of a third of the length. BatchNormalization has
its moving statistics, momentum 0.99, or statistics recomputed over 40 training volumes, whichever
is better on the validation volumes. Finished runs are in results/segmentation.csv and are not done
again: `--results` names another folder, to do them anew, with the same rates without `--tune`."""

import argparse
import functools
import os
import pathlib
import time

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np
from common import BN, RESULTS
from jax import numpy as jnp
from keras import layers
from report import cells, in_words, picture, plot_bars
from small_batch import batch_norm, frn_tlu
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

RATES, BEYOND = (0.01, 0.03, 0.1), 0.3
NORMALIZATIONS = {
    "FRN + TLU": frn_tlu,
    BN: functools.partial(batch_norm, 0.99),
    "GroupNormalization + ReLU": lambda: [layers.GroupNormalization(4), layers.ReLU()],
    "ReLU alone": lambda: [layers.ReLU()],
}


def volumes(count, seed, size=16):
    """Images `(count, size, size, size, 1)` and masks of the same shape."""
    rng = np.random.default_rng(seed)
    line = np.linspace(-1, 1, size)
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1)
    images, masks = [], []
    for _ in range(count):
        light, mask = np.zeros(grid.shape[:3]), np.zeros(grid.shape[:3], bool)
        for kind in ["rod"] * 4 + ["ellipsoid"] * rng.integers(2, 6):
            radii = (0.1, 0.1, 0.9) if kind == "rod" else rng.uniform(0.2, 0.5, 3)
            turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            inside = ((((grid - rng.uniform(-0.8, 0.8, 3)) @ turn) / radii) ** 2).sum(-1) < 1
            light = np.where(inside, rng.uniform(0.6, 1.0), light)
            mask = np.where(inside, kind == "ellipsoid", mask)
        light = light * 10 ** rng.uniform(-0.3, 0.3) * np.exp(grid @ rng.normal(size=3) * 0.5)
        image = light + grid @ rng.normal(size=3) * 0.3 + 0.4 * rng.normal(size=light.shape)
        images.append((image - image.mean()) / image.std())
        masks.append(mask)
    return np.stack(images)[..., None].astype("float32"), np.stack(masks)[..., None]


def unet(normalize, zero_mean, width=8, size=16):
    constraint = keras_frn.constraints.ZeroMean() if zero_mean else None

    def block(x, filters):
        for _ in range(2):
            x = layers.Conv3D(
                filters,
                3,
                padding="same",
                # Without a normalization the bias has nothing to take its place.
                use_bias=len(normalize()) == 1 and isinstance(normalize()[0], layers.ReLU),
                kernel_initializer="he_normal",
                kernel_constraint=constraint,
            )(x)
            for layer in normalize():
                x = layer(x)
        return x

    inputs = keras.Input((size, size, size, 1))
    fine = block(inputs, width)
    middle = block(layers.MaxPooling3D(2)(fine), 2 * width)
    x = layers.UpSampling3D(2)(block(layers.MaxPooling3D(2)(middle), 4 * width))
    x = layers.UpSampling3D(2)(block(layers.Concatenate()([x, middle]), 2 * width))
    x = block(layers.Concatenate()([x, fine]), width)
    return keras.Model(inputs, layers.Conv3D(1, 1)(x))


def batch_loss(predict, data, batch):
    images, masks = data
    logits, y = predict(images[batch])[..., 0], masks[batch][..., 0]
    entropy = jnp.mean(jax.nn.softplus(logits) - y * logits)
    p = jax.nn.sigmoid(logits)
    return entropy + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


@functools.cache
def compiled(name, zero_mean, size):
    model = unet(NORMALIZATIONS[name], zero_mean, size=size)
    return training_step(model, batch_loss), predictor(model), batch_statistics(model, 0.99)


def dice(predict, weights, statistics, images, masks):
    """The mean over the volumes, in percent."""
    found = []
    for image, mask in zip(images, masks):
        guess = np.asarray(predict(weights, statistics, image[None])[0]) > 0
        found.append((2 * (guess & mask).sum() + 1) / (guess.sum() + mask.sum() + 1))
    return 100 * float(np.mean(found))


def train(name, zero_mean, seed, steps, rate, data):
    """Trains a network; its Dice on the validation and on the test volumes."""
    size = data["validation"][0].shape[1]
    step, predict, recompute = compiled(name, zero_mean, size)
    keras.utils.set_random_seed(seed)
    state = initial_state(unet(NORMALIZATIONS[name], zero_mean, size=size))
    images, masks = (jnp.asarray(a, "float32") for a in data["train"])
    order = np.random.default_rng(seed).permutation(len(images))[:steps].astype("int32")
    for i, rate_now in enumerate(rates(rate, len(order))):
        state = step(state, (images, masks), order[i : i + 1], rate_now)
    weights, moving, _ = state
    choices = [moving]
    if name == BN:
        each = [recompute(weights, moving, images[i : i + 1]) for i in order[:40]]
        choices.append([sum(values) / len(values) for values in zip(*each)])
    validation = [dice(predict, weights, c, *data["validation"]) for c in choices]
    best = int(np.argmax(validation))
    return validation[best], lambda: dice(predict, weights, choices[best], *data["test"])


def tune(path, steps, data, names):
    """Tries RATES, and more than the last of them where that is the best."""
    for name in names:
        for zero_mean in (False, True):
            where = {"normalization": name, "zero_mean": int(zero_mean)}
            found = {
                float(r["rate"]): float(r["validation"])
                for r in read(path)
                if all(r[k] == str(v) for k, v in where.items())
            }
            for rate in (*RATES, BEYOND):
                if rate in found or (rate == BEYOND and max(found, key=found.get) < RATES[-1]):
                    continue
                found[rate], _ = train(name, zero_mean, 100, steps, rate, data)
                row = {**where, "rate": rate, "steps": steps}
                append({**row, "validation": round(found[rate], 2)}, path)
                print(*row.values(), f"{found[rate]:.2f}", flush=True)


def study(path, rates_path, steps, seeds, data, names):
    best = {}
    for row in read(rates_path):
        where = row["normalization"], row["zero_mean"] == "1"
        best[where] = max(best.get(where, (0, 0)), (float(row["validation"]), float(row["rate"])))
    done = {(r["normalization"], r["zero_mean"], r["seed"], r["steps"]) for r in read(path)}
    runs = [(n, z, s) for s in range(seeds) for n in names for z in (False, True)]
    runs = [r for r in runs if (r[0], str(int(r[1])), str(r[2]), str(steps)) not in done]
    began = time.monotonic()
    for number, (name, zero_mean, seed) in enumerate(runs, 1):
        start, rate = time.monotonic(), best[name, zero_mean][1]
        _, test = train(name, zero_mean, seed, steps, rate, data)
        row = {"normalization": name, "zero_mean": int(zero_mean), "seed": seed, "steps": steps}
        row |= {"rate": rate, "dice": round(test(), 2)}
        append({**row, "seconds": round(time.monotonic() - start, 1)}, path)
        left = (time.monotonic() - began) / number * (len(runs) - number) / 60
        print(f"[{number}/{len(runs)}]", *row.values(), f"{left:.0f} min left", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--only", nargs="+", help="names of normalizations")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the CSV")
    arguments = parser.parse_args()
    counts = {"train": arguments.steps, "validation": 40, "test": 100}
    data = {
        part: volumes(min(count, arguments.steps), seed, arguments.size)
        for seed, (part, count) in enumerate(counts.items())
    }
    path, rates_path = tables(arguments.results, "segmentation", arguments.tune)
    names = [n for n in NORMALIZATIONS if n in (arguments.only or NORMALIZATIONS)]
    if arguments.tune:
        tune(rates_path, max(1, arguments.steps // 3), data, names)
    study(path, rates_path, arguments.steps, arguments.seeds, data, names)
    rows = [r for r in read(path) if r["steps"] == str(arguments.steps)]
    print("\nDice in %, mean ± 95% interval:")
    cells(rows, "dice", NORMALIZATIONS, [("Dice", {})])
    in_words(rows, "dice", NORMALIZATIONS, {})
    plot_bars(rows, NORMALIZATIONS, picture(path))


if __name__ == "__main__":
    main()
