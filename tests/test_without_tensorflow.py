"""Everything that needs no TensorFlow runs where its import fails, on JAX and on PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest
from backends import BACKEND

PROGRAM = """
import sys
sys.modules["tensorflow"] = None  # `import tensorflow` raises ModuleNotFoundError
import keras
import numpy as np
import keras_frn

addons = sys.argv[1]
keras.utils.set_random_seed(0)
images = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype("float32")
targets = np.eye(2)[np.arange(64) % 2]


def build(*normalization):
    stack = [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3, use_bias=False), *normalization]
    return keras.Sequential([*stack, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2)])


def train(model, callback):
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    model.fit(images, targets, callbacks=[callback], verbose=0)


for layers in (
    [keras_frn.FilterResponseNormalization(learned_epsilon=True), keras_frn.TLU(affine=True)],
    [keras_frn.FilterResponseNormalizationTLU()],
):
    model = build(*layers)
    monitor = keras_frn.callbacks.FRNMonitor(images[:8])
    train(model, monitor)
    assert monitor.records
    for name in ("model.keras", "model.h5"):
        model.save(name)
        loaded = keras.models.load_model(name, compile=False)
        np.testing.assert_array_equal(loaded.predict(images), model.predict(images))

model = build(keras.layers.BatchNormalization(), keras.layers.ReLU())
converted = keras_frn.replace_batch_normalization(model, calibration_data=images)
train(converted, keras_frn.callbacks.EpsilonScheduler(steps=2))
for name in ("model.h5", "model.keras"):
    migrated = keras_frn.load_addons_model(f"{addons}/{name}")
    with np.load(f"{addons}/io.npz") as io:
        expected, found = io["y"], migrated.predict(io["x"], verbose=0)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
try:
    keras_frn.load_addons_weights(migrated, f"{addons}/ckpt")
except ImportError as error:
    assert "pip install tensorflow" in str(error), error
else:
    raise AssertionError("a checkpoint was read")
try:
    keras_frn.export_tflite(model, "model.tflite")
except ValueError as error:
    assert "TensorFlow backend" in str(error), error
else:
    raise AssertionError("a file was exported")
print("done")
"""


@pytest.mark.skipif(BACKEND == "tensorflow", reason="on the other backends")
def test_package_works_without_tensorflow(tmp_path):
    addons = Path(__file__).with_name("addons_models") / "frn_tlu"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, addons],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.endswith("done\n"), run.stderr[-3000:]
