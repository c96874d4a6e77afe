"""Takes a converted model from mild to full normalization while it is fine-tuned."""

import math
import numbers

import keras
import numpy as np

from .layers import FilterResponseNormalization


class EpsilonScheduler(keras.callbacks.Callback):
    """Lowers the learned epsilon of a converted model during fine-tuning, batch by batch.

    ```
    k(t)    = initial_ratio * (final_ratio / initial_ratio) ** min(1, t / steps)
    epsilon = k(t) * m                                         m the mean square of the channel
    gamma   = gamma * sqrt((1 + k(t)) / (1 + k(t - 1)))        a typical output keeps its size
    ```

    `replace_batch_normalization` begins with an epsilon of `epsilon_ratio` times each channel's
    mean square, close to BatchNormalization's fixed scale, and keeps it in the weight
    `learned_epsilon`; this callback brings it down to FRN. It holds epsilon at its last value for
    the rest of the training it is used in, so an optimizer with large steps cannot carry epsilon
    away. Layers with a single position keep their epsilon: with a small one their output would be
    the sign of their input. The count of batches goes on when the same object is passed to `fit`
    again.

    Args:
        steps: Int, the number of batches from the first to the last ratio.
        initial_ratio: Float > 0, the `epsilon_ratio` of the conversion. Defaults to 3.
        final_ratio: Float > 0. Defaults to 0.1.

    Example:

    >>> frn_model = keras_frn.replace_batch_normalization(model, images[:500])
    >>> frn_model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    >>> schedule = keras_frn.callbacks.EpsilonScheduler(steps=100)
    >>> frn_model.fit(images, targets, batch_size=4, callbacks=[schedule])

    Raises:
        ValueError: if an argument does not fit, or the model has no layer with a learned epsilon.

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(self, steps, initial_ratio=3.0, final_ratio=0.1):
        super().__init__()
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
            raise ValueError(
                f"`steps` must be an int of 1 or more. Received: steps={steps!r}. A third of the "
                "batches does well."
            )
        for name, ratio in (("initial_ratio", initial_ratio), ("final_ratio", final_ratio)):
            if not isinstance(ratio, numbers.Real) or not 0 < ratio < math.inf:
                raise ValueError(
                    f"`{name}` must be a finite number above 0. Received: {name}={ratio!r}. A "
                    "weight of exactly 0 would stay there."
                )
        self.steps = int(steps)
        self.initial_ratio = float(initial_ratio)
        self.final_ratio = float(final_ratio)
        self._step = 0
        self._layers = None

    @property
    def ratio(self):
        """Epsilon / mean square now."""
        done = min(1.0, self._step / self.steps)
        return self.initial_ratio * (self.final_ratio / self.initial_ratio) ** done

    def on_train_begin(self, logs=None):
        if self._layers is not None:
            return
        self._layers = [
            (layer, keras.ops.convert_to_numpy(layer.learned_epsilon) / self.initial_ratio)
            for layer in _frn_layers(self.model)
            if layer.learned_epsilon is not None and not _single_position(layer)
        ]
        if not self._layers:
            raise ValueError(
                "`model` must have FRN layers with a learned epsilon and more than one position. "
                f"Received: model {self.model.name!r}. Convert it with "
                "`learned_epsilon='per_channel'` and `epsilon_ratio` above 0."
            )

    def on_train_batch_begin(self, batch, logs=None):
        before = self.ratio
        self._step += 1
        rescale = np.float32(math.sqrt((1 + self.ratio) / (1 + before)))
        # Keras holds the weights of a JAX model elsewhere while it trains.
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        for layer, mean_square in self._layers:
            layer.learned_epsilon.assign(self.ratio * mean_square)
            if layer.gamma is not None and rescale != 1:
                layer.gamma.assign(layer.gamma * rescale)


def _frn_layers(layer):
    if isinstance(layer, FilterResponseNormalization):
        yield layer
    for inner in getattr(layer, "layers", ()):
        yield from _frn_layers(inner)


def _single_position(layer):
    shape = layer.get_build_config()["input_shape"]
    channel = layer.axis % len(shape)
    return all(size == 1 for i, size in enumerate(shape) if i not in (0, channel))
