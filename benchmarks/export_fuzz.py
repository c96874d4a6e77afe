"""Random models of Keras' layers around FRN: is a file wrong without a word?

Each seed makes a model, its data and two files, float32 and int8 with integer inputs and outputs. A
file is judged on samples that the export has not seen. Where TensorFlow Lite Micro is installed
(`tflite-micro`), it runs the int8 file, too, and the outputs are compared in steps of the integer;
so are those of LiteRT's own kernels with XNNPACK and without.

    python benchmarks/export_fuzz.py --seeds 200 --results /tmp/again.csv

It goes on where the file of results ends.
"""

import argparse
import csv
import os
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from common import RESULTS
from keras import layers

import keras_frn
from keras_frn.export.presets import PRESETS
from keras_frn.export.runtime import LiteRT

CSV = RESULTS / "export_fuzz.csv"
ACTIVATIONS = (
    *("linear", "relu", "relu6", "leaky_relu", "silu", "gelu", "elu", "tanh", "sigmoid"),
    *("hard_sigmoid", "softplus"),
)
STEPS = 3


def normalization(rng):
    options = {
        "learned_epsilon": rng.choice([False, True, "per_channel"], p=[0.6, 0.2, 0.2]),
        "center": rng.random() < 0.8,
        "scale": rng.random() < 0.8,
    }
    if options["learned_epsilon"] not in ("per_channel",):
        options["learned_epsilon"] = options["learned_epsilon"] == "True"
    kind = rng.integers(4)
    if kind == 0:
        return [keras_frn.FilterResponseNormalization(**options)]
    if kind == 1:
        return [keras_frn.FilterResponseNormalization(**options), keras_frn.TLU()]
    return [keras_frn.FilterResponseNormalizationTLU(**options, affine=kind == 2)]


def preprocessing(rng, is_image):
    choices = [
        layers.Rescaling(0.5, 0.1),
        layers.Normalization(mean=0.2, variance=1.5),
        layers.GaussianNoise(0.1),
        layers.BatchNormalization(),
    ]
    if is_image:
        choices += [
            *(layers.Resizing(12, 12), layers.CenterCrop(12, 12), layers.RandomCrop(12, 12)),
            *(layers.RandomFlip(), layers.RandomRotation(0.1), layers.RandomZoom(0.1)),
            *(layers.RandomTranslation(0.1, 0.1), layers.RandomContrast(0.1)),
            layers.ZeroPadding2D(1),
        ]
    return choices[rng.integers(len(choices))]


def mixing(rng, rank, channels):
    """A layer that mixes channels or positions."""
    options = {"use_bias": bool(rng.random() < 0.5)}
    if rank == 1 or rng.random() < 0.1:
        return layers.Dense(channels, **options)
    options["padding"] = str(rng.choice(["same", "valid"]))
    size = int(rng.choice([1, 3]))
    if rank == 2:
        kinds = [layers.Conv1D, layers.SeparableConv1D, layers.Conv1DTranspose]
        return kinds[rng.choice(3, p=[0.6, 0.2, 0.2])](channels, size, **options)
    kind = rng.integers(6)
    if kind == 0:
        return layers.DepthwiseConv2D(size, depth_multiplier=int(rng.integers(1, 3)), **options)
    if kind == 1:
        return layers.SeparableConv2D(channels, size, **options)
    if kind == 2:
        return layers.Conv2DTranspose(channels, size, strides=int(rng.integers(1, 3)), **options)
    if kind == 3:
        return layers.Conv2D(channels, size, strides=2, **options)
    if kind == 4:
        return layers.Conv2D(channels, size, dilation_rate=int(rng.integers(1, 3)), **options)
    return layers.Conv2D(channels, size, **options)


def extra(rng, rank, x):
    """What stands between two blocks."""
    kind = rng.integers(9)
    channels = x.shape[-1]
    if kind == 0:
        return layers.Add()([x, layers.Dense(channels)(x)])
    if kind == 1:
        return layers.Concatenate()([x, layers.Dense(3)(x)])
    if kind == 2:
        return layers.Dropout(0.3)(x)
    if kind == 3:
        return layers.LayerNormalization()(x)
    if kind == 4:
        return layers.BatchNormalization()(x)
    if kind == 5 and rank == 3:
        gate = layers.Dense(channels, "sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
        return layers.Multiply()([x, gate])
    if rank == 1 or min(x.shape[1:-1]) < 4:
        return x
    pooling = {
        2: (layers.MaxPooling1D, layers.AveragePooling1D, layers.UpSampling1D),
        3: (layers.MaxPooling2D, layers.AveragePooling2D, layers.UpSampling2D),
    }[rank]
    return pooling[rng.integers(3)](2)(x)


def head(rng, rank, x):
    if rank == 2 and rng.random() < 0.3:
        unroll = bool(rng.random() < 0.5)  # a loop is for float files
        x = (layers.GRU, layers.LSTM)[rng.integers(2)](6, unroll=unroll)(x)
    elif rank == 2:
        x = (layers.GlobalAveragePooling1D, layers.GlobalMaxPooling1D, layers.Flatten)[
            rng.integers(3)
        ]()(x)
    elif rank == 3 and rng.random() < 0.2:
        return layers.Conv2D(4, 1)(x)  # a map
    elif rank == 3:
        x = (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D, layers.Flatten)[
            rng.integers(3)
        ]()(x)
    return layers.Dense(5, str(rng.choice(["linear", "softmax", "sigmoid"])))(x)


def random_model(seed):
    """A model with weights that show, and a function that makes inputs of a number of samples."""
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    rank = int(rng.choice([1, 2, 3], p=[0.1, 0.2, 0.7]))
    shape = {1: (12,), 2: (24, 4), 3: (16, 16, 3)}[rank]
    inputs = x = keras.Input(shape)
    if rng.random() < 0.5:
        x = preprocessing(rng, rank == 3)(x)
    for _ in range(rng.integers(1, 4)):
        x = mixing(rng, rank, int(rng.integers(3, 9)))(x)
        for layer in normalization(rng):
            x = layer(x)
        x = layers.Activation(str(rng.choice(ACTIVATIONS)))(x)
        x = extra(rng, rank, x)
    model = keras.Model(inputs, head(rng, rank, x), name=f"seed_{seed}")
    for layer in model.layers:
        for name, low, high in (
            *(("gamma", 0.5, 1.5), ("beta", -0.5, 0.5), ("tau", -0.6, 0.3), ("alpha", -0.2, 0.2)),
            *(("moving_mean", -0.3, 0.3), ("moving_variance", 0.5, 2)),
        ):
            weight = getattr(layer, name, None)
            if isinstance(weight, keras.Variable):
                weight.assign(rng.uniform(low, high, weight.shape))
        if layer.weights and rng.random() < 0.3:  # channels of different scale
            kernel = layer.weights[0]
            kernel.assign(kernel * 10 ** rng.uniform(-1, 0, kernel.shape[-1:]))
    contrast = rng.random() < 0.3

    def samples(number):
        x = rng.normal(size=(number, *shape))
        if contrast:
            x = x * 10 ** rng.uniform(-1, 0, (number, *[1] * len(shape)))
        return x.astype("float32")

    return model, samples


def share(actual, expected):
    """The largest difference as a share of the range of the output and zero."""
    return np.abs(actual - expected).max() / np.ptp(np.append(expected, 0))


def export(model, path, preset, data, integer_io):
    """What the export said: "", a warning or an error."""
    # A fixed batch, as recurrent layers and microcontrollers want it.
    signature = [keras.InputSpec(shape=(1, *model.input_shape[1:]))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            keras_frn.export_tflite(
                model,
                path,
                quantization=preset,
                calibration_data=data,
                integer_io=integer_io,
                input_signature=signature,
            )
        except ValueError as error:
            if getattr(error, "argument", "") == "integer_io":  # operators stay in float
                return export(model, path, preset, data, False)
            return f"refused: {error}"
    texts = [str(w.message) for w in caught if "the outputs differ" in str(w.message)]
    return "".join(f"warned: {text}" for text in texts[:1])


def run(path, x):
    """The outputs of a file in LiteRT, sample by sample."""
    runtime = LiteRT(str(path))
    return np.concatenate([runtime(x[i : i + 1])[0] for i in range(len(x))])


def steps_apart(path, x):
    """How many steps of the output TensorFlow Lite Micro and LiteRT without XNNPACK are off from
    LiteRT with it; for TensorFlow Lite Micro, or why it does not run the file."""
    litert = LiteRT(str(path))
    litert(x[:1])
    (given,) = litert.interpreter.get_input_details()
    (taken,) = litert.interpreter.get_output_details()
    if taken["dtype"] is not np.int8:
        return f"output is {taken['dtype'].__name__}", ""
    scale, zero = given["quantization"]
    integers = np.clip(np.round(x / scale) + zero, -128, 127).astype("int8")
    expected = _integers(litert, integers)
    plain = np.abs(_integers(LiteRT(str(path), is_plain=True), integers) - expected).max()
    try:
        return np.abs(_in_micro(path, integers) - expected).max(), plain
    except ImportError:
        return "not installed", plain
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0][:80]}", plain


def _integers(litert, rows):
    outputs = [litert(row[None]) for row in rows]
    scale, zero = litert.interpreter.get_output_details()[0]["quantization"]
    return np.round(np.concatenate([y for (y,) in outputs]) / scale + zero).astype(int)


def _in_micro(path, rows):
    from tflite_micro import runtime as micro

    interpreter = micro.Interpreter.from_bytes(Path(path).read_bytes(), arena_size=2**22)
    outputs = []
    for row in rows:
        interpreter.set_input(row[None], 0)
        interpreter.invoke()
        outputs.append(interpreter.get_output(0).astype(int))
    return np.concatenate(outputs)


def study(seed, presets=(None, "int8"), micro=True):
    """A dict of what became of the model of a seed."""
    model, samples = random_model(seed)
    data, unseen = samples(64), samples(32)
    row = {"seed": seed, "layers": " ".join(type(x).__name__ for x in model.layers[1:])}
    try:
        expected = keras.ops.convert_to_numpy(model(unseen, training=False))
    except ValueError as error:  # Keras infers a wrong shape for some layers in a row
        reason = " ".join(str(error).split())[:120]
        return {**row, **{f"{p or 'float32'} said": f"not run by Keras: {reason}" for p in presets}}
    for preset in presets:
        name = preset or "float32"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.tflite"
            said = export(model, path, preset, data, preset == "int8")
            row[f"{name} said"] = said
            if not path.exists():
                row[name] = ""
                continue
            row[name] = f"{share(run(path, unseen), expected):.3g}"
            row[f"{name} silent"] = int(not said and float(row[name]) > PRESETS[preset].bound)
            if preset == "int8" and micro:
                row["micro steps"], row["plain steps"] = steps_apart(path, unseen[:10])
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--results", type=Path, default=CSV)
    arguments = parser.parse_args()
    fields = ["seed", "float32", "float32 said", "float32 silent"]
    fields += ["int8", "int8 said", "int8 silent", "micro steps", "plain steps", "layers"]
    rows = []
    if arguments.results.exists():
        with arguments.results.open() as file:
            rows = list(csv.DictReader(file))
    start = time.time()
    for seed in range(len(rows), arguments.seeds):
        keras.backend.clear_session()
        rows.append(study(seed))
        is_new = not arguments.results.exists()
        with arguments.results.open("a", newline="") as file:
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(rows[-1])
        print(f"{time.time() - start:.0f} s", rows[-1], flush=True)
    for name in ("float32", "int8"):
        said = [row[f"{name} said"].partition(":")[0] for row in rows]
        silent = sum(int(row.get(f"{name} silent") or 0) for row in rows)
        counts = {word: said.count(word) for word in ("warned", "refused")}
        print(f"{name}: {silent} silent, {counts}")
    both = [(str(row.get("micro steps")), str(row.get("plain steps"))) for row in rows]
    found = [(int(a), int(b)) for a, b in both if a.isdigit()]
    apart = [(a, b) for a, b in found if a > STEPS]
    print(f"TensorFlow Lite Micro: {len(found)} files, {len(apart)} above {STEPS} steps.")
    print(f"Of these LiteRT's own kernels are as far apart in {sum(b >= a for a, b in apart)}.")


if __name__ == "__main__":
    main()
