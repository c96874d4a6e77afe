"""What a user of the installed wheel does first; fails if a file is missing from it."""

from pathlib import Path

import keras
import numpy as np

import keras_frn

folder = Path(keras_frn.__file__).parent
assert "site-packages" in str(folder), folder
assert (folder / "py.typed").exists()
model = keras.Sequential([keras.Input((8, 8, 3)), keras_frn.FilterResponseNormalizationTLU()])
x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
expected = np.maximum(x / np.sqrt((x.astype("float64") ** 2).mean((1, 2), keepdims=True) + 1e-6), 0)
np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=2e-6)
for name in keras_frn.__all__:
    getattr(keras_frn, name)
print("smoke test passed with", keras_frn.__version__)
