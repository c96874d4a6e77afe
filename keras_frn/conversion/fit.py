"""The weights of FRN layers, from the BatchNormalization layers that they replace."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from .. import graph
from ..errors import ArgumentError
from ..layers import read_gamma, read_weight
from ..samples import Samples
from ..typing import Tensor
from .calibration import ForwardPass

__all__ = ["CONSTANT_EPSILON", "Affine", "fit", "measure_agreement", "set_closed_form"]

# The constant part of epsilon, as in the paper.
CONSTANT_EPSILON = 1e-6
_TINY = np.finfo("float32").tiny


@dataclasses.dataclass(frozen=True)
class Affine:
    """BatchNormalization at inference, `scale * x + offset`, and the mean square of its inputs."""

    scale: Any
    offset: Any
    mean_square: Any

    @classmethod
    def of(cls, bn: Any) -> "Affine":
        """Reads the weights of a layer, in float64."""
        mean, variance = read_weight(bn.moving_mean), read_weight(bn.moving_variance)
        gamma = 1.0 if bn.gamma is None else read_weight(bn.gamma)
        beta = 0.0 if bn.beta is None else read_weight(bn.beta)
        scale = gamma / np.sqrt(variance + bn.epsilon)
        offset = beta - scale * mean
        return cls(scale, offset, np.maximum(mean**2 + variance, _TINY))


def set_closed_form(frn: Any, bn: Any, ratio: float) -> None:
    """Sets the weights that give what BatchNormalization gave for a sample of typical energy."""
    affine = Affine.of(bn)
    gamma = affine.scale * np.sqrt(affine.mean_square * (1.0 + ratio) + CONSTANT_EPSILON)
    _assign(frn, gamma, affine.offset, affine.mean_square, ratio)


def _assign(frn: Any, gamma: Any, beta: Any, mean_square: Any, ratio: float) -> None:
    """Sets the weights of `gamma * x / sqrt(nu2 + epsilon + ratio * mean_square) + beta`."""
    if frn.epsilon_ratio is not None:
        frn.mean_square.assign(mean_square)
        gamma = gamma / np.sqrt(1.0 + ratio)
    elif frn.learned_epsilon is not None:
        frn.learned_epsilon.assign(ratio * mean_square)
    frn.gamma.assign(gamma)
    frn.beta.assign(beta)


def fit(
    model: keras.Model,
    converted: keras.Model,
    replaced: Mapping[Any, Any],
    ratios: Mapping[Any, float],
    samples: Samples,
    verbose: bool,
) -> dict[Any, Any]:
    """Refines gamma, beta and epsilon of each FRN layer, in the order of the forward pass.

    Each layer gets the mean and the standard deviation that its BatchNormalization gave on the same
    data, per channel. Least squares would shrink gamma wherever the two networks differ by more
    than a scale, and every later layer would see too small a signal.

    `replaced` maps each layer of `converted` to its BatchNormalization layer in `model`, and
    `ratios` each BatchNormalization layer to its epsilon / mean square. Returns the ratios that
    were measured, by channel.
    """
    inputs: dict[Any, list[_Moments]] = collections.defaultdict(list)

    def record(bn: Any, x: Tensor, _: Tensor, mask: Tensor) -> None:
        inputs[bn].append(_Moments.of(x, bn.axis, mask))

    with graph.watch_calls(replaced.values(), record):
        for batch in samples:
            model(samples.nest(batch), training=False)
    targets = {bn: _measure_outputs(bn, moments) for bn, moments in inputs.items()}
    progress = keras.utils.Progbar(len(targets), unit_name="layer") if verbose else None
    measured: dict[Any, Any] = {}

    def fit_one(frn: Any, watch_inputs: Callable[..., None]) -> None:
        bn, moments = replaced[frn], []
        watch_inputs(lambda x, mask: moments.append(_Moments.of(x, frn.axis, mask)))
        measured[bn] = _fit_layer(frn, moments, targets[bn], ratios[bn])
        if progress:
            progress.update(len(measured))

    ForwardPass(converted, samples, replaced).fit(fit_one)
    return measured


def measure_agreement(model: keras.Model, converted: keras.Model, samples: Samples) -> float | None:
    """The correlation of two models' outputs over 8 to 128 samples; None if they are fewer."""
    outputs: list[list[Any]] = [[], []]
    count = 0
    for batch in samples:
        for found, one in zip(outputs, (model, converted)):
            given = keras.tree.flatten(one(samples.nest(batch), training=False))
            found.append([ops.convert_to_numpy(ops.cast(y, "float32")) for y in given])
        count += len(batch[0])
        if count >= 8 and len(outputs[0]) >= 4:  # many batches only if they are small
            break
    if count < 8:
        return None
    correlations = []
    for pair in zip(*(map(np.concatenate, zip(*found)) for found in outputs)):
        # What is the same in all samples says nothing.
        a, b = ((y - y.mean(0)).ravel().astype("float64") for y in pair)
        if a.any() and b.any():
            correlations.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    return float(np.mean(correlations)) if correlations else None


@dataclasses.dataclass(frozen=True)
class _Moments:
    """Mean and mean square `(samples, channels)`, and the positions `(samples,)` they are over."""

    mean: Any
    mean_square: Any
    positions: Any

    @classmethod
    def of(cls, x: Tensor, axis: int, mask: Tensor) -> "_Moments":
        """Measures an input of a layer. Positions that are masked do not count."""
        x = np.moveaxis(ops.convert_to_numpy(ops.cast(x, "float32")), axis, -1)
        kept = np.ones((1,) * (x.ndim - 1)) if mask is None else ops.convert_to_numpy(mask)
        kept = kept.reshape(kept.shape + (1,) * (x.ndim - 1 - kept.ndim))
        kept = np.broadcast_to(kept, x.shape[:-1]).reshape(len(x), -1, 1).astype(bool)
        # Zeros and not a product, as NaN may stand under a mask.
        x = np.where(kept, x.reshape(len(x), -1, x.shape[-1]), 0).astype("float64")
        positions = kept.sum((1, 2))
        count = np.maximum(positions, 1)[:, None]
        return cls(x.sum(1) / count, (x * x).sum(1) / count, positions)

    @classmethod
    def join(cls, moments: Iterable["_Moments"]) -> "_Moments":
        """Those of all calls of a layer as one."""
        arrays = zip(*((m.mean, m.mean_square, m.positions) for m in moments))
        mean, mean_square, positions = map(np.concatenate, arrays)
        if not np.isfinite(mean_square).all():
            raise ArgumentError(
                "calibration_data",
                "must give finite values in every layer. Received: NaN or infinity at the input of "
                "a normalization layer. Look at the preprocessing.",
            )
        # No weight at all would have no average.
        return cls(mean, mean_square, positions if positions.any() else np.ones_like(positions))

    def average(self, values: Any) -> Any:
        """The average over the samples, each with its positions."""
        return np.average(values, axis=0, weights=self.positions)


def _measure_outputs(bn: Any, recorded: Iterable[_Moments]) -> tuple[Any, Any]:
    """The mean of each output channel, and the standard deviation with the sign of the scale."""
    affine, moments = Affine.of(bn), _Moments.join(recorded)
    mean = moments.average(moments.mean)
    variance = np.maximum(moments.average(moments.mean_square) - mean**2, 0.0)
    return affine.scale * mean + affine.offset, affine.scale * np.sqrt(variance)


def _fit_layer(frn: Any, recorded: list[_Moments], target: tuple[Any, Any], ratio: float) -> Any:
    """Fits one layer to a mean and a standard deviation; returns its epsilon / mean square."""
    moments = _Moments.join(recorded)
    mean_square = moments.average(moments.mean_square)
    is_constant = frn.epsilon_ratio is None and frn.learned_epsilon is None
    epsilon = np.asarray(frn.epsilon, "float64") + (0.0 if is_constant else ratio * mean_square)
    r = 1.0 / np.sqrt(moments.mean_square + epsilon)
    first = moments.average(r * moments.mean)
    second = moments.average(r * r * moments.mean_square)
    variance = second - first**2
    # A channel that does not vary says nothing about its scale; the closed form stays.
    mean, deviation = target
    varies = (variance > 1e-6 * second) & (deviation != 0)
    scale = deviation / np.sqrt(np.where(varies, variance, 1.0))
    gamma = np.where(varies, scale, read_gamma(frn))
    _assign(frn, gamma, mean - gamma * first, mean_square, ratio)
    return epsilon / np.maximum(mean_square, _TINY)
