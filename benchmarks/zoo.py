"""Architectures that others wrote: are they converted whole, saved, and exported truthfully?

Each model of `keras.applications` and of keras-hub gets random weights whose channels spread over
decades, and the BatchNormalization statistics that belong to them. It is converted, trained for a
step, saved, loaded in a new process and exported in each preset. Each file is compared with the
model on images that the export has not seen.

    pip install keras-hub
    python benchmarks/zoo.py

It writes a row for each model and preset, and goes on where the file of results ends. Each model
has a process of its own, so that a crash is a row, too.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from common import RESULTS
from keras import layers

import keras_frn
from keras_frn.export.presets import PRESETS
from keras_frn.export.runtime import LiteRT

CSV = RESULTS / "zoo.csv"
FIELDS = [
    *("model", "batch_normalization", "replaced", "left", "unnamed", "agreement", "loaded"),
    *("preset", "error", "bound", "said", "silent", "float_operators", "unnamed_operators"),
    *("kilobytes", "seconds"),
]
CALIBRATION, UNSEEN = 16, 8


def application(name, size=64, **options):
    """A model of `keras.applications` with a small head."""
    return lambda: getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, **options
    )


def hub_backbone(name, size=64, **options):
    def make():
        return getattr(hub(), f"{name}Backbone")(image_shape=(size, size, 3), **options)

    return make


def hub():
    import keras_hub

    return keras_hub.models


def hub_resnet(size=64, **options):
    return hub().ResNetBackbone(
        **{
            "input_conv_filters": [64],
            "input_conv_kernel_sizes": [7],
            "stackwise_num_filters": [64, 64, 64, 64],
            "stackwise_num_blocks": [1, 1, 1, 1],
            "stackwise_num_strides": [1, 2, 2, 2],
            "block_type": "basic_block",
            "image_shape": (size, size, 3),
            **options,
        }
    )


def hub_resnet_vd_classifier():
    """A classifier with the preprocessor that its images go through in `predict`."""
    backbone = hub_resnet(
        input_conv_filters=[8, 8, 64],
        input_conv_kernel_sizes=[3, 3, 3],
        block_type="bottleneck_block_vd",
    )
    converter = hub().ResNetImageClassifierPreprocessor.image_converter_cls
    return hub().ResNetImageClassifier(
        backbone=backbone,
        num_classes=10,
        preprocessor=hub().ResNetImageClassifierPreprocessor(
            image_converter=converter(image_size=(64, 64), scale=1 / 127.5, offset=-1)
        ),
    )


def hub_efficientnet():
    return hub().EfficientNetBackbone(
        stackwise_kernel_sizes=[3, 3, 5],
        stackwise_num_repeats=[1, 2, 2],
        stackwise_input_filters=[16, 16, 24],
        stackwise_output_filters=[16, 24, 40],
        stackwise_expansion_ratios=[1, 4, 4],
        stackwise_squeeze_and_excite_ratios=[0.0, 0.25, 0.25],
        stackwise_strides=[1, 2, 2],
        stackwise_block_types=["fused", "unfused", "cba"],
        stackwise_width_coefficients=[1.0] * 3,
        stackwise_depth_coefficients=[1.0] * 3,
        stackwise_force_input_filters=[0] * 3,
        stackwise_nores_option=[False] * 3,
        input_shape=(64, 64, 3),
        num_features=64,
    )


def hub_deeplab():
    backbone = hub().DeepLabV3Backbone(
        image_encoder=hub_resnet(use_pre_activation=True),
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P4",
        upsampling_size=4,
        dilation_rates=[2, 3, 4],
        projection_filters=16,
        image_shape=(64, 64, 3),
    )
    return hub().DeepLabV3ImageSegmenter(backbone=backbone, num_classes=4)


def hub_retinanet():
    return hub().RetinaNetBackbone(
        image_encoder=hub_resnet(),
        min_level=3,
        max_level=6,
        use_p5=False,
        use_fpn_batch_norm=True,
        image_shape=(64, 64, 3),
    )


def hub_segformer():
    encoder = hub().MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[4, 2],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=(64, 64, 3),
        hidden_dims=[16, 32],
    )
    backbone = hub().SegFormerBackbone(image_encoder=encoder, projection_filters=32)
    return hub().SegFormerImageSegmenter(backbone=backbone, num_classes=4)


def hub_basnet():
    # Its encoder takes any size, and goes on after a convolution of as many filters as its own.
    return hub().BASNetBackbone(
        image_encoder=hub_resnet(None),
        num_classes=1,
        image_shape=(32, 32, 3),
        projection_filters=64,
    )


MODELS = {
    "hub ResNet": hub_resnet,
    "hub ResNet-vd classifier": hub_resnet_vd_classifier,
    "hub MobileNet": hub_backbone(
        "MobileNet",
        stackwise_expansion=[[24, 32], [48, 48]],
        stackwise_num_blocks=[2, 2],
        stackwise_num_filters=[[16, 16], [24, 24]],
        stackwise_kernel_size=[[3, 3], [5, 5]],
        stackwise_num_strides=[[2, 1], [2, 1]],
        stackwise_se_ratio=[[None, None], [0.25, 0.25]],
        stackwise_activation=[["relu", "relu"], ["hard_swish", "hard_swish"]],
        stackwise_padding=[[1, 1], [2, 2]],
        output_num_filters=64,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        last_layer_filter=64,
        squeeze_and_excite=0.5,
    ),
    "hub EfficientNet": hub_efficientnet,
    "hub DenseNet": hub_backbone("DenseNet", stackwise_num_repeats=[2, 3, 3], growth_rate=8),
    "hub CSPDarkNet": hub_backbone(
        "CSPNet",
        stem_filters=16,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 2],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[32, 48],
        block_type="dark_block",
        stage_type="dark",
    ),
    "hub Xception": hub_backbone(
        "Xception",
        stackwise_conv_filters=[[16, 32], [32, 48], [64, 64]],
        stackwise_pooling=[True, True, False],
    ),
    "hub DeepLabV3+": hub_deeplab,
    "hub RetinaNet": hub_retinanet,
    "hub SegFormer": hub_segformer,
    "hub BASNet": hub_basnet,
    "hub HGNetV2": hub_backbone(
        "HGNetV2",
        depths=[1, 2],
        embedding_size=16,
        hidden_sizes=[32, 64],
        stem_channels=[3, 8, 16],
        hidden_act="relu",
        use_learnable_affine_block=True,
        stackwise_stage_filters=[(16, 8, 32, 1, 1, 3), (32, 16, 64, 2, 1, 3)],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, True],
    ),
    "MobileNet": application("MobileNet"),
    "MobileNetV2": application("MobileNetV2"),
    "MobileNetV3Small": application("MobileNetV3Small"),
    "MobileNetV3Large": application("MobileNetV3Large", minimalistic=True),
    "Xception": application("Xception", 72),
    "EfficientNetB0": application("EfficientNetB0"),
    "EfficientNetV2B0": application("EfficientNetV2B0"),
    "DenseNet121": application("DenseNet121"),
    "ResNet50": application("ResNet50"),
    "ResNet50V2": application("ResNet50V2"),
    "InceptionV3": application("InceptionV3", 80),
    "NASNetMobile": application("NASNetMobile"),
    "InceptionResNetV2": application("InceptionResNetV2", 80),
}


def images(rng, count, shape, high):
    """Smooth images of different contrast, from 0 to 255, or from -1 to 1 if `high` is 1."""
    coarse = rng.normal(size=(count, 8, 8, 3))
    x = keras.ops.convert_to_numpy(keras.ops.image.resize(coarse, shape[:2], "bicubic"))
    x = x * 10 ** rng.uniform(-0.7, 0, (count, 1, 1, 1)) + rng.normal(0, 0.05, x.shape)
    x = np.clip(x / 2, -1, 1)
    return ((x + 1) * 127.5 if high == 255 else x).astype("float32")


def is_batch_normalization(layer):
    return isinstance(layer, layers.BatchNormalization)


def make_wild(model, rng, data):
    """Gives a model weights that spread over decades, some of them 0, and their statistics."""
    inside = list(model._flatten_layers(include_self=False))
    norms = [x for x in inside if is_batch_normalization(x)]
    for layer in inside:
        kernel = getattr(layer, "kernel", None)
        if isinstance(layer, (layers.Conv2D, layers.SeparableConv2D)) and kernel is not None:
            factor = 10 ** rng.uniform(-1.5, 1.5, kernel.shape[-1])
            kernel.assign(kernel * np.where(rng.random(factor.shape) < 0.01, 0, factor))
    for layer in norms:
        if layer.gamma is not None:
            gamma = rng.uniform(0.3, 1.5, layer.gamma.shape)
            gamma *= rng.choice([1, -1, 0], p=[0.9, 0.08, 0.02], size=gamma.shape)
            layer.gamma.assign(gamma)
        if layer.beta is not None:
            layer.beta.assign(rng.normal(0, 0.5, layer.beta.shape))
    # The statistics of these images, and then those of others.
    flags = {layer: (layer.momentum, layer.trainable) for layer in norms}
    for layer in norms:
        layer.momentum, layer.trainable = 0.0, True
    model(data, training=True)
    for layer, (layer.momentum, layer.trainable) in flags.items():
        mean, variance = layer.moving_mean, layer.moving_variance
        variance.assign(variance * 10 ** rng.uniform(-0.2, 0.2, variance.shape))
        mean.assign(mean + 0.2 * rng.normal(size=mean.shape) * variance.value**0.5)
    return norms


def predict(model, x):
    outputs = model(np.asarray(x), training=False)
    return [keras.ops.convert_to_numpy(y) for y in keras.tree.flatten(outputs)]


def largest_fraction(actual, expected):
    """The largest difference as a fraction of the range of the output and zero."""
    return max(
        float(np.abs(a - e).max() / max(np.ptp(np.append(e, 0)), 1e-30))
        for a, e in zip(actual, expected, strict=True)
    )


def load_in_a_new_process(path, x, folder):
    """The outputs of a saved model, or the error that loading ends in."""
    np.save(folder / "x.npy", x)
    code = (
        "import sys; sys.path[:0] = sys.argv[3:4]\n"
        "import keras, numpy as np, keras_frn, zoo\n"
        "zoo.hub() if sys.argv[4] == 'hub' else None\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "outputs = zoo.predict(model, np.load(sys.argv[2] + '/x.npy'))\n"
        "np.savez(sys.argv[2] + '/y.npz', *outputs)\n"
    )
    kind = "hub" if "keras_hub" in sys.modules else ""
    done = subprocess.run(
        [sys.executable, "-c", code, path, folder, Path(__file__).parent, kind],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return None, done.stderr.strip().splitlines()[-1][:200]
    with np.load(folder / "y.npz") as arrays:
        return [arrays[name] for name in arrays.files], ""


def float_operators(path):
    """The operators of an integer file that compute in float32, by an interpreter of our own."""
    interpreter = Interpreter(
        str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    dtypes = {d["index"]: d["dtype"] for d in interpreter.get_tensor_details()}
    return {
        op["op_name"]
        for op in interpreter._get_ops_details()
        if op["op_name"] not in ("QUANTIZE", "DEQUANTIZE", "SHAPE")
        and any(dtypes.get(int(i)) is np.float32 for i in (*op["inputs"], *op["outputs"]))
    }


def study(name, write):
    rng = np.random.default_rng(sum(map(ord, name)))
    keras.utils.set_random_seed(1)
    start = time.time()
    model = MODELS[name]()
    shape = tuple(model.inputs[0].shape[1:])
    starts = [type(x) for x in model.layers[:4]]
    is_raw = layers.Rescaling in starts or getattr(model, "preprocessor", None) is not None
    data = images(rng, CALIBRATION + UNSEEN, shape, 255 if is_raw else 1)
    given = data
    if getattr(model, "preprocessor", None) is not None:
        given = keras.ops.convert_to_numpy(model.preprocessor(data))
    norms = make_wild(model, rng, given[:CALIBRATION])
    row = {"model": name, "batch_normalization": len(norms)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        converted, report = keras_frn.replace_batch_normalization(
            model, calibration_data=data[:CALIBRATION], verbose=False, return_report=True
        )
    print(*(str(w.message) for w in caught), sep="\n", flush=True)
    if getattr(converted, "preprocessor", None) is None:
        data = given  # the copy of a class that needs more than a graph takes prepared images
    left = [x for x in converted._flatten_layers(include_self=False) if is_batch_normalization(x)]
    said = " ".join(str(w.message) for w in caught)
    named = sum(int(n) for n in re.findall(r"keeps (\d+) of", said))
    row |= {"replaced": report.replaced, "left": len(left), "unnamed": len(left) - named}
    row["agreement"] = "" if report.agreement is None else f"{report.agreement:.3f}"
    targets = keras.tree.map_structure(lambda y: y + 0.1, converted(given[:4], training=False))
    converted.compile(keras.optimizers.SGD(1e-4, clipnorm=1.0), loss="mse")
    converted.train_on_batch(given[:4], targets)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        converted.save(folder / "model.keras")
        expected = predict(converted, given[CALIBRATION:])
        loaded, error = load_in_a_new_process(folder / "model.keras", given[CALIBRATION:], folder)
        row["loaded"] = error or f"{largest_fraction(loaded, expected):.1e}"
        print(f"{name}: {row}, {time.time() - start:.0f} s", flush=True)
        for preset in PRESETS:
            path = folder / f"{preset}.tflite"
            write({**row, **study_preset(converted, preset, path, data, given, expected)})


def study_preset(converted, preset, path, data, given, expected):
    start = time.time()
    row = {"preset": preset or "float32", "bound": PRESETS[preset].bound}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", ".*different samples")  # of all integer files
        try:
            report = keras_frn.export_tflite(
                converted, path, quantization=preset, calibration_data=data[:CALIBRATION]
            )
        except Exception as error:  # noqa: BLE001 - whatever is raised is a row
            kind = "refused" if isinstance(error, ValueError) else "raw error"
            text = " ".join(str(error).split())
            kind = kind if text.startswith("`") else "raw error"
            return {**row, "said": f"{kind}: {type(error).__name__}: {text[:400]}"}
    row["said"] = " ".join(str(w.message) for w in caught)
    actual = LiteRT(str(path), [x.name for x in converted.inputs])
    parts = [actual(*[x[None] for x in [image]]) for image in given[CALIBRATION:]]
    outputs = [np.concatenate(rows) for rows in zip(*parts)]
    row["error"] = f"{largest_fraction(outputs, expected):.2g}"
    is_beyond = float(row["error"]) > row["bound"]
    row["silent"] = int(is_beyond and "the outputs differ" not in row["said"])
    found = float_operators(path) if PRESETS[preset].is_integer else set()
    row["float_operators"] = " ".join(sorted(found))
    row["unnamed_operators"] = " ".join(sorted(x for x in found if x not in report.in_float))
    row["kilobytes"] = path.stat().st_size // 1000
    row["seconds"] = f"{time.time() - start:.0f}"
    print(row, flush=True)
    return row


def read(path):
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path, row):
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=CSV)
    parser.add_argument("--model", choices=MODELS, help="this one alone, in this process")
    arguments = parser.parse_args()
    if arguments.model:
        study(arguments.model, lambda row: append(arguments.results, row))
        return
    start = time.time()
    for number, name in enumerate(MODELS):
        found = [row for row in read(arguments.results) if row["model"] == name]
        if len(found) >= len(PRESETS) or any(not row["preset"] for row in found):
            continue
        print(
            f"{name}: {len(MODELS) - number} models left, {time.time() - start:.0f} s", flush=True
        )
        rest = [row for row in read(arguments.results) if row["model"] != name]
        arguments.results.unlink(missing_ok=True)
        for row in rest:
            append(arguments.results, row)
        command = [sys.executable, __file__, "--model", name, "--results", arguments.results]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            print(done.stderr[-3000:], flush=True)
            append(arguments.results, {"model": name, "said": f"stopped: {reason[:300]}"})
    rows = read(arguments.results)
    stopped = [row["model"] for row in rows if not row["preset"]]
    print(f"{len({row['model'] for row in rows})} models, stopped: {stopped}")
    for field in ("left", "unnamed", "silent", "unnamed_operators"):
        print(
            field,
            sorted({f"{r['model']} {r['preset']}" for r in rows if r[field] not in ("0", "")}),
        )
    print("raw", [row["model"] for row in rows if row["said"].startswith("raw")])
    print(
        "not loaded", sorted({r["model"] for r in rows if not re.match(r"[\d.e+-]+$", r["loaded"])})
    )


if __name__ == "__main__":
    main()
