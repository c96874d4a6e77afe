"""What files of Keras 2 mean and Keras 3 has not; imported at once, so that they open."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_frn")
def hard_sigmoid_of_keras2(x):
    """`clip(0.2 * x + 0.5, 0, 1)`. In Keras 3 the slope of `hard_sigmoid` is 1/6."""
    return ops.clip(0.2 * x + 0.5, 0.0, 1.0)
