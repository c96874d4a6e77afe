"""Callbacks for training with FRN."""

from typing import Any

import keras
import numpy as np

from . import graph
from .conversion.schedule import EpsilonScheduler
from .health import list_frn_layers, measure_health, plot_health
from .samples import Samples
from .typing import CalibrationData, PathLike

__all__ = ["EpsilonScheduler", "FRNMonitor"]


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
        if graph.is_built(self.model):
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
