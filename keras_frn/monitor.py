"""Monitors the FRN and TLU layers of a model, in numbers and in a plot."""

import collections
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from . import graph
from .layers import TLU, FilterResponseNormalization, read_epsilon
from .samples import Samples
from .typing import CalibrationData, PathLike, Tensor

__all__ = ["FRNMonitor", "list_frn_layers", "measure_layers", "plot_layers"]


class FRNMonitor(keras.callbacks.Callback):
    """Monitors FRN and TLU layers for dead channels and extreme epsilons, epoch by epoch.

    After each epoch it runs some samples through the model in inference mode, and records for each
    layer

    - `at_tau`, the fraction of outputs that are at the threshold, and `dead`, the fraction of
      channels all of whose outputs are: such a channel is constant and trains only tau. An affine
      TLU has neither;
    - `epsilon_ratio`, the median over the channels of epsilon / mean square. Far below 1 is FRN as
      in the paper; far above 1 hardly normalizes;
    - `spread`, the largest mean square of a channel over the smallest. At 1e4, a factor of 100
      between channels, plain 8-bit files lose accuracy; `export_tflite` keeps it;
    - the least and the largest value of each weight, as `gamma_min`, `gamma_max`, ...

    Masked positions count. The values are in `records`, a list of dicts with the keys
    `epoch`, `layer` (its name, or its path if others have that name) and those above, and in Keras'
    logs: `CSVLogger` and other callbacks after this one in the list see them.

    Args:
        data: Samples like those of training, of any kind that `export_tflite` takes as calibration
            data. A few dozen are enough; each epoch takes one forward pass over them.
        per_layer: Bool, whether the logs get each layer's values, as `layer/at_tau`, or those of
            the whole network: the mean of `at_tau`, the largest `dead` and `spread`, and the median
            `epsilon_ratio`, as `frn/at_tau`. Defaults to False, as Keras' progress bar prints all
            logs.

    Raises:
        ValueError: if the model has no FRN or TLU layer, or the data do not fit it: when training
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
            self._read_samples()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._read_samples()

    def _read_samples(self) -> Samples:
        if self._samples is None:  # a generator cannot be read again for another training
            model = self.model
            if not list_frn_layers(model):
                raise ValueError(
                    f"`model` must have FRN or TLU layers. Received: model={model.name!r}. Leave "
                    "FRNMonitor out."
                )
            self._samples = Samples(model, self._data, argument="data")
        return self._samples

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        rows = measure_layers(self.model, self._read_samples())
        self.records += [{"epoch": epoch, **row} for row in rows]
        if logs is None:
            return
        if self._per_layer:
            for row in rows:
                logs |= {f"{row['layer']}/{key}": row[key] for key in row if key != "layer"}
            return
        for key, summarize in _SUMMARIES.items():
            if values := [row[key] for row in rows if key in row]:
                logs[f"frn/{key}"] = float(summarize(values))

    def plot(self, path: PathLike) -> None:
        """Draws the values, layer by layer, a line for each epoch. Needs matplotlib.

        Args:
            path: The picture to write, of any kind that matplotlib writes.
        """
        plot_layers(self.records, path)


def list_frn_layers(model: keras.Model) -> list[Any]:
    """Lists the FRN and TLU layers of a model, those inside of other layers included."""
    kinds = (FilterResponseNormalization, TLU)
    return [layer for layer in graph.list_layers(model) if isinstance(layer, kinds)]


def measure_layers(model: keras.Model, samples: Samples) -> list[dict[str, Any]]:
    """A dict for each FRN and TLU layer: its name, unique here, and the values of `FRNMonitor`."""
    mean_squares: dict[Any, list[Any]] = collections.defaultdict(list)
    fractions: dict[Any, list[Any]] = collections.defaultdict(list)

    def means(values: Tensor, axes: list[int]) -> Any:
        """The mean of each sample."""
        values = ops.cast(values, "float32")
        return ops.convert_to_numpy(ops.mean(values, axes) if axes else values)

    def watch(layer: Any, x: Tensor, z: Tensor, _: Tensor) -> None:
        kept = {axis % len(x.shape) for axis in np.ravel(layer.axis).tolist()}
        axes = [axis for axis in range(1, len(x.shape)) if axis not in kept]
        x = ops.cast(x, "float32")
        mean_squares[layer].extend(means(x * x, axes))
        if getattr(layer, "tau", None) is not None and layer.alpha is None:
            tau = ops.cast(ops.expand_dims(layer.tau, [0, *axes]), z.dtype)
            fractions[layer].extend(means(z <= tau, axes))

    layers = list_frn_layers(model)
    with graph.watch_calls(layers, watch):
        for batch in samples:
            model(samples.nest(batch), training=False)
    rows = []
    for layer, label in zip(layers, _label(layers)):
        row: dict[str, Any] = {"layer": label}
        if fractions[layer]:
            fraction = np.mean(fractions[layer], axis=0)
            row |= {"at_tau": float(fraction.mean()), "dead": float((fraction == 1).mean())}
        if isinstance(layer, FilterResponseNormalization) and mean_squares[layer]:
            nu2 = np.maximum(np.mean(mean_squares[layer], axis=0), np.finfo("float32").tiny)
            row["epsilon_ratio"] = float(np.median(read_epsilon(layer) / nu2))
            row["spread"] = float(nu2.max() / nu2.min())
        for weight in layer.weights:
            values = ops.convert_to_numpy(weight)
            row[f"{weight.name}_min"] = float(values.min())
            row[f"{weight.name}_max"] = float(values.max())
        rows.append(row)
    return rows


def _label(layers: Sequence[Any]) -> list[str]:
    """The name of each layer, its path if others have its name, with a number if its path, too."""
    names = [layer.name for layer in layers]
    labels = [x.path or x.name if names.count(x.name) > 1 else x.name for x in layers]
    return [
        f"{label} ({labels[:i].count(label) + 1})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


# How the values of the layers become one of the network.
_SUMMARIES: dict[str, Any] = {
    "at_tau": np.mean,
    "dead": max,
    "epsilon_ratio": np.median,
    "spread": max,
}
_FRACTION, _RATIO = {"ylim": (-0.05, 1.05)}, {"yscale": "log"}
_PANELS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "outputs at tau": (["at_tau"], _FRACTION),
    "dead channels": (["dead"], _FRACTION),
    "epsilon / mean square": (["epsilon_ratio"], _RATIO),
    "largest / smallest mean square": (["spread"], _RATIO),
    "gamma, least and largest": (["gamma_min", "gamma_max"], {}),
    "tau, least and largest": (["tau_min", "tau_max"], {}),
}


def plot_layers(records: Sequence[dict[str, Any]], path: PathLike) -> None:
    """Draws `FRNMonitor.records` into a file. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 5), layout="constrained")
    epochs = sorted({record.get("epoch", 0) for record in records})
    layers = list(dict.fromkeys(record["layer"] for record in records))
    for axes, (title, (keys, options)) in zip(figure.subplots(2, 3).flat, _PANELS.items()):
        for number, epoch in enumerate(epochs, 1):
            rows = [record for record in records if record.get("epoch", 0) == epoch]
            shade = str(0.8 * (1 - number / len(epochs)))  # the last epoch is black
            for key in keys:
                points = [(layers.index(r["layer"]) + 1, r[key]) for r in rows if key in r]
                axes.plot([x for x, _ in points], [y for _, y in points], ".-", color=shade)
        axes.set(title=title, xlabel="layer", xlim=(0, len(layers) + 1), **options)
    figure.savefig(path, dpi=120)
