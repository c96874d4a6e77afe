"""Files saved by TensorFlow Addons; `loading` has the public functions.

What is here loads with the package, so that files that were migrated open."""

import keras

from ..typing import Tensor


@keras.saving.register_keras_serializable(package="keras_frn")
def hard_sigmoid_of_keras2(x: Tensor) -> Tensor:
    """`clip(0.2 * x + 0.5, 0, 1)`. In Keras 3 the slope of `hard_sigmoid` is 1/6."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)
