"""Callbacks for training with FRN."""

import collections
import math
import numbers

import keras
import numpy as np
from keras import ops

from . import graph
from .layers import TLU, FilterResponseNormalization, epsilon_of
from .samples import Samples


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

    >>> frn_model = keras_frn.replace_batch_normalization(bn_model, images[:500])
    >>> frn_model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    >>> scheduler = keras_frn.callbacks.EpsilonScheduler(steps=100)
    >>> history = frn_model.fit(images, targets, batch_size=4, callbacks=[scheduler], verbose=0)

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
            for layer in graph.layers(self.model)
            if isinstance(layer, FilterResponseNormalization)
            and layer.learned_epsilon is not None
            and graph.positions(layer) != 1
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
    """Shows whether the FRN and TLU layers of a model are well, epoch by epoch.

    After each epoch it runs some samples through the model, at inference, and takes for each layer

    - `at_tau`, the share of outputs that are at the threshold, and `dead`, the share of channels
      all of whose outputs are: such a channel gives a constant and learns nothing but tau;
    - `epsilon_ratio`, the median over the channels of epsilon / mean square. Far below 1 is FRN as
      in the paper; far above 1 hardly normalizes;
    - `spread`, the largest mean square of a channel over the smallest. At 1e4, a factor of 100
      between channels, plain 8-bit files lose their accuracy, and `export_tflite` keeps it;
    - the least and the largest gamma, tau and learned epsilon, as `gamma_min`, `gamma_max`, ...

    Args:
        data: Samples like those of training, of any kind that `export_tflite` takes as calibration
            data. Some tens are enough; each epoch takes one forward pass over them.
        per_layer: Whether the logs get each layer's values, as `layer/at_tau`, or those of the
            whole network: the mean of `at_tau`, the largest `dead` and `spread`, and the median
            `epsilon_ratio`, as `frn/at_tau`. Defaults to False, as Keras' progress bar prints all
            logs.

    Positions that are masked count. The values are in `records`, a list of dicts with the keys
    `epoch`, `layer` and those above, and in Keras' logs: `CSVLogger` and other callbacks after this
    one in the list see them.

    Raises:
        ValueError: when training starts, if the model has no FRN or TLU layer, or the data do not
            fit it.

    Example:

    >>> model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    >>> monitor = keras_frn.callbacks.FRNMonitor(images[:32])
    >>> history = model.fit(images, targets, callbacks=[monitor], verbose=0)
    >>> monitor.plot("layers.png")"""

    def __init__(self, data, per_layer=False):
        super().__init__()
        self.records = []
        self._data, self._samples, self._per_layer = data, None, per_layer

    def on_train_begin(self, logs=None):
        self._samples = Samples(self.model, self._data)
        if not frn_layers(self.model):
            raise ValueError(
                "`model` must have FRN or TLU layers. Received: "
                f"model={self.model.name!r}. Leave FRNMonitor out."
            )

    def on_epoch_end(self, epoch, logs=None):
        rows = health(self.model, self._samples)
        self.records += [{"epoch": epoch, **row} for row in rows]
        if logs is None:
            return
        if self._per_layer:
            for row in rows:
                logs.update({f"{row['layer']}/{k}": v for k, v in row.items() if k != "layer"})
            return
        together = {"at_tau": np.mean, "dead": max, "epsilon_ratio": np.median, "spread": max}
        for key, of in together.items():
            values = [row[key] for row in rows if key in row]
            if values:
                logs[f"frn/{key}"] = float(of(values))

    def plot(self, path):
        """Draws the values, layer by layer, a line for each epoch. Needs matplotlib."""
        plot_health(self.records, path)


def frn_layers(model):
    """The FRN and TLU layers of a model, those inside of other layers included."""
    kinds = (FilterResponseNormalization, TLU)
    return [layer for layer in graph.layers(model) if isinstance(layer, kinds)]


def health(model, samples):
    """A dict for each FRN and TLU layer that runs: its name, and the values of `FRNMonitor`."""
    mean_squares, shares = collections.defaultdict(list), collections.defaultdict(list)

    def means(values, axes):
        """The mean of each sample."""
        values = ops.cast(values, "float32")
        return ops.convert_to_numpy(ops.mean(values, axes) if axes else values)

    def watch(layer, x, z, _):
        kept = {axis % len(x.shape) for axis in np.ravel(layer.axis).tolist()}
        axes = [axis for axis in range(1, len(x.shape)) if axis not in kept]
        x = ops.cast(x, "float32")
        mean_squares[layer].extend(means(x * x, axes))
        if getattr(layer, "tau", None) is not None and layer.alpha is None:
            tau = ops.cast(ops.expand_dims(layer.tau, [0, *axes]), z.dtype)
            shares[layer].extend(means(z <= tau, axes))

    layers = frn_layers(model)
    with graph.watched(layers, watch):
        for batch in samples:
            model(graph.inputs_like(model, batch), training=False)
    rows = []
    for layer in layers:
        row = {"layer": layer.name}
        if shares[layer]:
            share = np.mean(shares[layer], axis=0)
            row |= {"at_tau": float(share.mean()), "dead": float((share == 1).mean())}
        if isinstance(layer, FilterResponseNormalization) and mean_squares[layer]:
            nu2 = np.maximum(np.mean(mean_squares[layer], axis=0), np.finfo("float32").tiny)
            row["epsilon_ratio"] = float(np.median(epsilon_of(layer) / nu2))
            row["spread"] = float(nu2.max() / nu2.min())
        for weight in layer.weights:
            values = ops.convert_to_numpy(weight)
            row |= {f"{weight.name}_min": float(values.min())}
            row |= {f"{weight.name}_max": float(values.max())}
        rows.append(row)
    return rows


_PANELS = {
    "outputs at tau": ["at_tau"],
    "dead channels": ["dead"],
    "epsilon / mean square": ["epsilon_ratio"],
    "largest / smallest mean square": ["spread"],
    "gamma, least and largest": ["gamma_min", "gamma_max"],
    "tau, least and largest": ["tau_min", "tau_max"],
}


def plot_health(records, path):
    """Draws `FRNMonitor.records` into a file. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 5), layout="constrained")
    epochs = sorted({record.get("epoch", 0) for record in records})
    layers = list(dict.fromkeys(record["layer"] for record in records))
    for axes, (title, keys) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        for number, epoch in enumerate(epochs):
            rows = [record for record in records if record.get("epoch", 0) == epoch]
            for key in keys:
                points = [(layers.index(r["layer"]) + 1, r[key]) for r in rows if key in r]
                shade = str(0.8 * (1 - (number + 1) / len(epochs)))  # the last epoch is black
                if points:
                    axes.plot(*zip(*points), ".-", color=shade)
        is_share = keys[0] in ("at_tau", "dead")
        is_ratio = keys[0] in ("epsilon_ratio", "spread")
        axes.set(title=title, xlabel="layer", yscale="log" if is_ratio else "linear")
        axes.set(xlim=(0, len(layers) + 1), ylim=(-0.05, 1.05) if is_share else None)
    figure.savefig(path, dpi=120)
