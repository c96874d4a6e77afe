"""The schedule of the epsilon of a converted model."""

import math
from typing import Any

import keras

from .. import graph
from ..layers import FilterResponseNormalization
from ..typing import is_int, is_number

__all__ = ["EpsilonScheduler"]


class EpsilonScheduler(keras.callbacks.Callback):
    """Lowers the epsilon of a converted model while it is fine-tuned, batch by batch.

    ```
    k = k * (final_ratio / initial_ratio) ** (1 / steps)       at each batch, down to final_ratio
    y = gamma * x * sqrt((1 + k) / (nu2 + epsilon + k * m)) + beta
    ```

    `replace_batch_normalization` makes layers with an epsilon of `epsilon_ratio` (k) times each
    channel's mean square (m), which is close to BatchNormalization's fixed scale. This callback
    brings k down to FRN, and then holds it. A typical output keeps its size.

    The state is the weight `epsilon_ratio` of the layers, which is not trained. So training resumes
    where it stopped after `BackupAndRestore`, after the model is compiled again, or after it is
    saved, loaded and trained with a new callback with the same arguments. Layers without an
    `epsilon_ratio`, such as those with a single position, do not change.

    Args:
        steps: Int, the number of batches from the initial ratio to the final one.
        initial_ratio: Float above 0, the ratio from which the steps count. Defaults to None, the
            `epsilon_ratio` that each layer was created with.
        final_ratio: Float above 0, the ratio at the end. Defaults to 0.1.

    Raises:
        ValueError: If an argument is not in its range, or, in training, if the model has no layer
            with an `epsilon_ratio` above 0.

    Example:

    ```python
    frn_model = keras_frn.replace_batch_normalization(bn_model, calibration_data=images[:500])
    frn_model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    scheduler = keras_frn.callbacks.EpsilonScheduler(steps=100)
    history = frn_model.fit(images, targets, batch_size=4, callbacks=[scheduler], verbose=0)
    ```

    Reference:
        Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737
    """

    def __init__(
        self, steps: int, *, initial_ratio: float | None = None, final_ratio: float = 0.1
    ) -> None:
        super().__init__()
        if not is_int(steps) or steps < 1:
            raise ValueError(
                f"`steps` must be an int of 1 or more. Received: steps={steps!r}. Count in batches."
            )
        for name, ratio in (("initial_ratio", initial_ratio), ("final_ratio", final_ratio)):
            is_left_out = ratio is None and name == "initial_ratio"
            if not is_left_out and not (is_number(ratio) and 0 < ratio < math.inf):
                raise ValueError(
                    f"`{name}` must be a finite number above 0. Received: {name}={ratio!r}. Each "
                    "batch multiplies by one factor, which leads neither from nor to 0."
                )
        self.steps = int(steps)
        self.initial_ratio = None if initial_ratio is None else float(initial_ratio)
        self.final_ratio = float(final_ratio)
        self.ratio: float | None = None
        self._layers: list[Any] = []
        self._begin = self._missed = 0
        self._has_run = self._has_begun = False

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        self._layers, self._missed, self._has_run = [], 0, False
        self._advance(0)

    # Before the batch, so that whatever saves after it saves what the batch was trained with.
    def on_train_batch_begin(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._begin = batch
        # At the end of data of unknown length, TensorFlow's `fit` begins a batch that never ends.
        if not self._has_begun:
            self._advance(1)
        self._has_begun = True

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        # With `steps_per_execution` these are several batches, the last time fewer than Keras says.
        self._has_run, self._has_begun = True, False
        last = min(batch, ((self.params or {}).get("steps") or batch + 1) - 1)
        if last > self._begin or self._missed:
            self._advance(last - self._begin)

    def _advance(self, batches: int) -> None:
        """Moves each layer on by some batches, and by those before the model was built."""
        self._missed += batches
        model = self.model  # brings the weights of a JAX model back to it
        if not self._layers:
            if not self._has_run and not graph.is_built(model):
                return  # `fit` builds it
            self._layers = _list_scheduled(model)
        for layer in self._layers:
            value = float(keras.ops.convert_to_numpy(layer.epsilon_ratio)[0])
            initial = self.initial_ratio or layer.initial_epsilon_ratio
            factor = (self.final_ratio / initial) ** (1 / self.steps)
            bound = max if factor < 1 else min
            # What is beyond the end already stays there.
            end = bound(self.final_ratio, value * factor**self._missed)
            self.ratio = value if bound(value, self.final_ratio) != value else end
            if self.ratio != value:
                layer.epsilon_ratio.assign([self.ratio])
        self._missed = 0


def _list_scheduled(model: keras.Model) -> list[Any]:
    layers = [
        layer
        for layer in graph.list_layers(model)
        if isinstance(layer, FilterResponseNormalization)
        and layer.initial_epsilon_ratio
        and layer.built
    ]
    if not layers:
        raise ValueError(
            f"`model` must have FRN layers with an `epsilon_ratio`. Received: model={model.name!r}."
            " Convert the BatchNormalization model with `epsilon_ratio` above 0, again if it was "
            "converted when epsilon was kept in `learned_epsilon`, which is trained."
        )
    return layers
