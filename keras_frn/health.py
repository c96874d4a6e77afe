"""Whether the FRN and TLU layers of a model work well, as numbers and as a picture."""

import collections
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from . import graph
from .layers import TLU, FilterResponseNormalization, read_epsilon
from .samples import Samples
from .typing import PathLike, Tensor

__all__ = ["list_frn_layers", "measure_health", "plot_health"]


def list_frn_layers(model: keras.Model) -> list[Any]:
    """Lists the FRN and TLU layers of a model, those inside of other layers included."""
    kinds = (FilterResponseNormalization, TLU)
    return [layer for layer in graph.list_layers(model) if isinstance(layer, kinds)]


def measure_health(model: keras.Model, samples: Samples) -> list[dict[str, Any]]:
    """A dict for each FRN and TLU layer that runs: its name, and the values of `FRNMonitor`."""
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
    for layer in layers:
        row: dict[str, Any] = {"layer": layer.name}
        if fractions[layer]:
            fraction = np.mean(fractions[layer], axis=0)
            row |= {"at_tau": float(fraction.mean()), "dead": float((fraction == 1).mean())}
        if isinstance(layer, FilterResponseNormalization) and mean_squares[layer]:
            nu2 = np.maximum(np.mean(mean_squares[layer], axis=0), np.finfo("float32").tiny)
            row["epsilon_ratio"] = float(np.median(read_epsilon(layer) / nu2))
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


def plot_health(records: Sequence[dict[str, Any]], path: PathLike) -> None:
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
        is_fraction = keys[0] in ("at_tau", "dead")
        is_ratio = keys[0] in ("epsilon_ratio", "spread")
        axes.set(title=title, xlabel="layer", yscale="log" if is_ratio else "linear")
        axes.set(xlim=(0, len(layers) + 1), ylim=(-0.05, 1.05) if is_fraction else None)
    figure.savefig(path, dpi=120)
