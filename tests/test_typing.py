"""What a type checker says of a user's code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="of the [dev] extra")

BEFORE = """
import pathlib
import keras
import numpy as np
import keras_frn
model = keras.Sequential([keras.Input((8, 8, 3)), keras_frn.FilterResponseNormalizationTLU()])
images = np.zeros((4, 8, 8, 3), "float32")
"""
RIGHT = """
keras_frn.FilterResponseNormalization(epsilon=1e-5, learned_epsilon=True, name="frn")(images)
keras_frn.FilterResponseNormalization(epsilon=[1e-6, 1e-5], learned_epsilon="per_channel")
keras_frn.FilterResponseNormalization(axis=1, gamma_initializer=keras.initializers.Constant(2.0))
keras_frn.TLU(axis=(1, 2, 3), affine=True, tau_regularizer="l2", dtype="float16")
keras_frn.FilterResponseNormalizationTLU(axis=-1, scale=False, jit_compile=True)
keras_frn.ops.filter_response_normalization(images, epsilon=1e-6)
report = keras_frn.export_tflite(
    model, pathlib.Path("m.tflite"), quantization="int8", calibration_data=images
)
size: int = report.size
keras_frn.export_tflite(model, "m.tflite", calibration_data=lambda: iter([images]))
converted = keras_frn.replace_batch_normalization(model, calibration_data=[images])
converted.compile("sgd", "mse")
keras_frn.load_addons_model(pathlib.Path("old.h5"), tau="per_channel", compile=False).save("new")
keras_frn.load_addons_weights(model, "w.h5", tau="per_channel_mean")
keras_frn.models.resnet((32, 32, 3), classes=10)
keras_frn.callbacks.EpsilonScheduler(steps=100)
keras_frn.callbacks.FRNMonitor(images).plot("layers.png")
keras.layers.Conv2D(4, 3, kernel_constraint=keras_frn.constraints.ZeroMean())
"""
WRONG = [
    'keras_frn.FilterResponseNormalization(epsilon="tiny")',
    'keras_frn.FilterResponseNormalization(axis="last")',
    "keras_frn.FilterResponseNormalization(-1, 1e-6)",
    'keras_frn.FilterResponseNormalization(learned_epsilon="per_chanel")',
    'keras_frn.FilterResponseNormalizationTLU(center="no")',
    'keras_frn.TLU(axis="last")',
    'keras_frn.TLU(affine="yes")',
    "keras_frn.export_tflite(None, 7)",
    'keras_frn.export_tflite(model, "m.tflite", quantization="int88")',
    'keras_frn.export_tflite(model, "m.tflite", "int8")',
    "keras_frn.export_tflite(model, calibration_data=7)",
    'keras_frn.replace_batch_normalization(model, calibration_data=images, epsilon_ratio="3")',
    "keras_frn.replace_batch_normalization(model, images, 3.0)",
    'keras_frn.load_addons_model("old.h5", tau="mean")',
    'keras_frn.load_addons_model("old.h5", "weights.h5")',
    'keras_frn.load_addons_weights(model, "w.h5", tau="per_position")',
    'keras_frn.models.resnet("32x32")',
    'keras_frn.callbacks.EpsilonScheduler(steps="all")',
    "keras_frn.no_such_name",
]


@pytest.mark.once
def test_mypy_accepts_correct_calls_and_rejects_wrong_ones(tmp_path):
    (tmp_path / "user.py").write_text(BEFORE + RIGHT + "\n".join(WRONG) + "\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nignore_missing_imports = True\nfollow_imports = silent\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "user.py", "--config-file", "mypy.ini"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    lines = run.stdout.splitlines()
    found = {int(line.split(":")[1]) for line in lines if ": error:" in line}
    first = (BEFORE + RIGHT).count("\n") + 1
    expected = set(range(first, first + len(WRONG)))
    text = (tmp_path / "user.py").read_text().splitlines()
    assert not [text[number - 1] for number in expected - found], "wrong code passes"
    assert not found - expected, run.stdout
