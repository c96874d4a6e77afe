"""Trains and predicts with changing batch and image sizes, and prints what that compiled, as JSON.

    python tests/compilations.py

Run by test_compilation.py in a process of its own, as XLA reads its flags once. A record for each
setting of the layers and of the model: programs that XLA compiled, and those that it compiled after
the first two rounds over the sizes."""

import json
import os
import sys
import tempfile
from pathlib import Path

SIZES = [(4, 16), (7, 20), (2, 16), (7, 20)]
# `jit_compile` of the layers and of the model.
SETTINGS = [(None, True), (True, True), (True, False), (False, False)]


def main():
    with tempfile.TemporaryDirectory() as folder:
        # XLA writes every program that it compiles.
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        import conftest  # noqa: F401  (chooses the backend)

        records = []
        for layers_compiled, model_compiled in SETTINGS:
            train_and_predict = steps(layers_compiled, model_compiled)
            for _ in range(2):
                train_and_predict()
            programs = count(folder)
            train_and_predict()
            records.append(
                {
                    "layers": layers_compiled,
                    "model": model_compiled,
                    "programs": count(folder),
                    "more programs": count(folder) - programs,
                }
            )
    json.dump(records, sys.stdout)


def count(folder):
    return len(list(Path(folder).glob("*before_optimizations.txt")))


def steps(layers_compiled, model_compiled):
    import keras
    import numpy as np

    from keras_frn import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            FilterResponseNormalizationTLU(learned_epsilon=True, jit_compile=layers_compiled),
            keras.layers.Conv2D(4, 3, use_bias=False),
            FilterResponseNormalization(jit_compile=layers_compiled),
            TLU(affine=True, jit_compile=layers_compiled),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1),
        ]
    )
    model.compile("sgd", "mse", jit_compile=model_compiled)

    def run():
        for batch, size in SIZES:
            x = np.ones((batch, size, size, 3), "float32")
            model.train_on_batch(x, np.zeros((batch, 1), "float32"))
            model.predict_on_batch(x)

    return run


if __name__ == "__main__":
    main()
