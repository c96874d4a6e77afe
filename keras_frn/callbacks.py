"""Callbacks for training with FRN."""

import math
import numbers
from typing import Any

import keras
import numpy as np

from . import graph
from .conversion.plan import count_positions
from .health import list_frn_layers, measure_health, plot_health
from .layers import FilterResponseNormalization
from .samples import Samples
from .typing import CalibrationData, PathLike

__all__ = ["EpsilonScheduler", "FRNMonitor"]


class EpsilonScheduler(keras.callbacks.Callback):
    """Lowers the learned epsilon of a converted model while it is fine-tuned, batch by batch.

    ```
    k(t)    = initial_ratio * (final_ratio / initial_ratio) ** min(1, t / steps)
    epsilon = k(t) * m                                         m is the channel's mean square
    gamma   = gamma * sqrt((1 + k(t)) / (1 + k(t - 1)))        a typical output keeps its size
    ```

    `replace_batch_normalization` starts with an epsilon of `epsilon_ratio` times each channel's
    mean square, which is close to BatchNormalization's fixed scale, and keeps it in the weight
    `learned_epsilon`. This callback brings it down to FRN, and then holds it, so that an optimizer
    with large steps cannot carry it away. Layers with a single position keep
    their epsilon, as their output would become the sign of their input.

    The state is in the model: t is the count of batches of `model.optimizer`, less `initial_step`,
    and m is epsilon / k(t). So a training goes on where it was after `BackupAndRestore`, and after
    a model is saved, loaded and trained with a new callback of the same arguments. Two rules hold:

    - Callbacks that save within an epoch come after this one in the list.
    - `compile` gives the model a new optimizer, which counts from 0. To go on after it, pass a new
      callback what is left: the ratio that was reached as `initial_ratio` and the remaining
      `steps`.

    Args:
        steps: Int, the number of batches from the first ratio to the last.
        initial_ratio: Float above 0, epsilon / mean square at the start: the `epsilon_ratio` of the
            conversion. Defaults to 3.
        final_ratio: Float above 0, epsilon / mean square at the end. Defaults to 0.1.
        initial_step: Int, the count of the optimizer at the start. It is above 0 where the model
            was trained with the same optimizer before. Defaults to 0.

    Example:

    ```python
    frn_model = keras_frn.replace_batch_normalization(bn_model, calibration_data=images[:500])
    frn_model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    scheduler = keras_frn.callbacks.EpsilonScheduler(steps=100)
    history = frn_model.fit(images, targets, batch_size=4, callbacks=[scheduler], verbose=0)
    ```

    Raises:
        ValueError: if an argument is not in its range. When training starts, if the model has no
            layer with a learned epsilon and more than one position; at the first batch, if its
            epsilon is no longer that of the optimizer's count, as after `compile`.

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""

    def __init__(self, steps, initial_ratio=3.0, final_ratio=0.1, initial_step=0):
        super().__init__()
        for name, value, least in (("steps", steps, 1), ("initial_step", initial_step, 0)):
            is_int = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not is_int or value < least:
                raise ValueError(
                    f"`{name}` must be an int of {least} or more. Received: {name}={value!r}. "
                    "Count in batches, as `model.optimizer.iterations` does."
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
        self.initial_step = int(initial_step)
        self.ratio = self.initial_ratio
        self._layers, self._mean_squares, self._is_in_step = [], {}, False

    def on_train_begin(self, logs=None):
        # Callbacks after this one may still restore the weights.
        self._is_in_step = False
        self._layers = [
            layer
            for layer in graph.list_layers(self.model)
            if isinstance(layer, FilterResponseNormalization)
            and layer.learned_epsilon is not None
            and count_positions(layer) != 1
        ]
        if not self._layers:
            raise ValueError(
                "`model` must have FRN layers with a learned epsilon and more than one position. "
                f"Received: model={self.model.name!r}. Convert it with "
                "`learned_epsilon='per_channel'` and `epsilon_ratio` above 0."
            )

    def on_train_batch_begin(self, batch, logs=None):
        if not self._is_in_step:
            self._read_state()
            self._is_in_step = True
        # An interrupted batch may have counted: the weights are those of the count after it.
        self._set(self._ratio_after(1))

    def on_train_batch_end(self, batch, logs=None):
        self._set(self._ratio_after(0))

    def _ratio_after(self, batches):
        """The ratio after some more batches."""
        # `self.model` brings the weights of a JAX model back to it.
        count = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) + batches
        share = min(1.0, max(0, count - self.initial_step) / self.steps)
        return self.initial_ratio * (self.final_ratio / self.initial_ratio) ** share

    def _read_state(self):
        """Takes the ratio and the mean squares from the model."""
        ratio = self._ratio_after(0)
        for layer in self._layers:
            epsilon = np.abs(keras.ops.convert_to_numpy(layer.learned_epsilon))
            mean_square = epsilon / np.float32(ratio)
            known = self._mean_squares.setdefault(layer, mean_square)
            with np.errstate(all="ignore"):
                share = float(np.median(mean_square / known))
            # The step of an optimizer is smaller, and what `compile` forgets is larger.
            if not abs(share - 1) <= 0.1:  # NaN, too
                raise ValueError(
                    "`model` must have the epsilon that belongs to its optimizer's count. Received:"
                    f" layer {layer.name!r} with epsilon / mean square = "
                    f"{ratio * share:.3g} instead of {ratio:.3g}. After "
                    "`compile`, or a training without this callback, pass a new one the ratio "
                    "that was reached and the steps that are left."
                )
        self.ratio = ratio

    def _set(self, ratio):
        rescale = np.float32(math.sqrt((1 + ratio) / (1 + self.ratio)))
        self.ratio = ratio
        for layer in self._layers:
            layer.learned_epsilon.assign(ratio * self._mean_squares[layer])
            if layer.gamma is not None and rescale != 1:
                layer.gamma.assign(keras.ops.convert_to_numpy(layer.gamma) * rescale)


class FRNMonitor(keras.callbacks.Callback):
    """Monitors FRN and TLU layers for dead channels and extreme epsilons, epoch by epoch.

    After each epoch it runs some samples through the model, at inference, and takes for each layer

    - `at_tau`, the fraction of outputs that are at the threshold, and `dead`, the fraction of
      channels all of whose outputs are: such a channel gives a constant and learns nothing but tau;
    - `epsilon_ratio`, the median over the channels of epsilon / mean square. Far below 1 is FRN as
      in the paper; far above 1 hardly normalizes;
    - `spread`, the largest mean square of a channel over the smallest. At 1e4, a factor of 100
      between channels, plain 8-bit files lose their accuracy, and `export_tflite` keeps it;
    - the least and the largest value of each weight, as `gamma_min`, `gamma_max`, ...

    Positions that are masked count. The values are in `records`, a list of dicts with the keys
    `epoch`, `layer` and those above, and in Keras' logs: `CSVLogger` and other callbacks after this
    one in the list see them.

    Args:
        data: Samples like those of training, of any kind that `export_tflite` takes as calibration
            data. Some tens are enough; each epoch takes one forward pass over them.
        per_layer: Bool, whether the logs get each layer's values, as `layer/at_tau`, or those of
            the whole network: the mean of `at_tau`, the largest `dead` and `spread`, and the median
            `epsilon_ratio`, as `frn/at_tau`. Defaults to False, as Keras' progress bar prints all
            logs.

    Raises:
        ValueError: If the model has no FRN or TLU layer, or the data do not fit it: when training
            starts, or after the first batch of a model that `fit` builds.

    Example:

    ```python
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    monitor = keras_frn.callbacks.FRNMonitor(images[:32])
    history = model.fit(images, targets, callbacks=[monitor], verbose=0)
    monitor.plot("layers.png")
    ```
    """

    def __init__(self, data: CalibrationData, *, per_layer: bool = False) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []
        self._data, self._per_layer = data, per_layer
        self._samples: Samples | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        model = self.model
        if model.built and all(layer.built for layer in graph.list_layers(model)):
            self._read_data()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self._samples is None:
            self._read_data()

    def _read_data(self) -> None:
        model = self.model
        if not list_frn_layers(model):
            raise ValueError(
                f"`model` must have FRN or TLU layers. Received: model={model.name!r}. Leave "
                "FRNMonitor out."
            )
        if self._samples is None:  # a generator cannot be read again for another training
            self._samples = Samples(model, self._data, argument="data")

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert self._samples is not None
        rows = measure_health(self.model, self._samples)
        self.records += [{"epoch": epoch, **row} for row in rows]
        if logs is None:
            return
        if self._per_layer:
            for row in rows:
                logs.update({f"{row['layer']}/{k}": v for k, v in row.items() if k != "layer"})
            return
        together: dict[str, Any] = {
            "at_tau": np.mean,
            "dead": max,
            "epsilon_ratio": np.median,
            "spread": max,
        }
        for key, of in together.items():
            values = [row[key] for row in rows if key in row]
            if values:
                logs[f"frn/{key}"] = float(of(values))

    def plot(self, path: PathLike) -> None:
        """Draws the values, layer by layer, a line for each epoch. Needs matplotlib.

        Args:
            path: The picture to write, of any kind that matplotlib writes.
        """
        plot_health(self.records, path)
