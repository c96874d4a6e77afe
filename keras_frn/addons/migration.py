"""A file of TensorFlow Addons becomes a `.keras` file."""

import os
import tempfile

import keras
import numpy as np

from .loading import load_addons_model


def migrate(path, target, weights=None, tau="auto", custom_objects=None):
    """Writes a model that TensorFlow Addons saved as a `.keras` file, and checks what was written.

    Args:
        path, weights, tau, custom_objects: As in `load_addons_model`.
        target: The `.keras` file to write. It appears only when it has been read again and every
            weight in it equals the one that was loaded.

    Returns:
        The model as read from `target`.

    Raises:
        ValueError: as `load_addons_model`, and if `target` does not end in `.keras`.
    """
    target = os.fspath(target)
    if not target.endswith(".keras"):
        raise ValueError(
            f"`target` must end in .keras. Received: target={target!r}. Call it new.keras."
        )
    model = load_addons_model(path, weights, tau, custom_objects=custom_objects)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(target))) as folder:
        written = os.path.join(folder, "model.keras")
        model.save(written)
        reloaded = keras.saving.load_model(written, custom_objects=custom_objects)
        for old, new in zip(model.weights, reloaded.weights, strict=True):
            if not np.array_equal(*map(keras.ops.convert_to_numpy, (old, new)), equal_nan=True):
                raise ValueError(f"`target`: weight {new.path!r} was not written as it was loaded.")
        os.replace(written, target)
    return reloaded
