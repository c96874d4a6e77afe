"""A trained BatchNormalization model becomes an FRN model."""

import dataclasses
import math
import numbers
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

import keras
import numpy as np

from .. import graph
from ..layers import TLU, FilterResponseNormalization
from ..samples import Samples
from ..typing import CalibrationData
from .fit import CONSTANT_EPSILON, Affine, fit, set_closed_form

__all__ = ["ConversionReport", "Replacement", "replace_batch_normalization"]

# Below this, a channel of one position would be close to its sign: unit energy whatever the input.
_SINGLE_POSITION_RATIO = 1.0
_ACTIVATIONS = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ELU,
)
_FRN, _TLU = "FRN", "TLU with a threshold of 0"
_SHARED = "other layers come before it too"


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What became of one layer.

    Attributes:
        layer: Name of the layer.
        kind: Name of its class.
        action: `"replaced"` or `"kept"`.
        reason: What it became, or why it was kept.
        positions: Number of spatial positions of a BatchNormalization layer, if it is fixed.
        epsilon_ratio: The median over its channels of epsilon / mean square. Near 0 is FRN as in
            the paper, 3 normalizes mildly, and a large value is close to a fixed scale.
    """

    layer: str
    kind: str
    action: str
    reason: str
    positions: int | None = None
    epsilon_ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What `replace_batch_normalization` replaced and what it kept. `print(report)` shows it.

    Attributes:
        entries: A `Replacement` for each BatchNormalization layer, for each activation after one,
            and for each layer that has a BatchNormalization layer inside which no graph shows.
    """

    entries: tuple[Replacement, ...]

    def __str__(self) -> str:
        if not self.entries:
            return "No BatchNormalization layer was found: the model is an unchanged copy."
        width = max(len(entry.layer) for entry in self.entries)
        lines = [
            f"{sum(e.reason == _FRN for e in self.entries)} BatchNormalization layers became FRN, "
            f"{sum(e.reason == _TLU for e in self.entries)} activations became TLU, "
            f"{sum(e.action == 'kept' for e in self.entries)} layers were kept.",
            f"{'layer':{width}}  {'class':18}  N       eps/nu2  what",
        ]
        for entry in self.entries:
            ratio = "" if entry.epsilon_ratio is None else f"{entry.epsilon_ratio:.3g}"
            lines.append(
                f"{entry.layer:{width}}  {entry.kind:18}  {entry.positions or '':<6}  {ratio:7}  "
                f"{entry.action}: {entry.reason}"
            )
        return "\n".join(lines)


@overload
def replace_batch_normalization(
    model: keras.Model,
    *,
    calibration_data: CalibrationData | None = ...,
    epsilon_ratio: float = ...,
    learned_epsilon: Literal["per_channel", False] = ...,
    replace_activations: bool = ...,
    verbose: bool | Literal["auto"] = ...,
    return_report: Literal[False] = ...,
) -> keras.Model: ...


@overload
def replace_batch_normalization(
    model: keras.Model,
    *,
    calibration_data: CalibrationData | None = ...,
    epsilon_ratio: float = ...,
    learned_epsilon: Literal["per_channel", False] = ...,
    replace_activations: bool = ...,
    verbose: bool | Literal["auto"] = ...,
    return_report: Literal[True],
) -> tuple[keras.Model, ConversionReport]: ...


def replace_batch_normalization(
    model: keras.Model,
    *,
    calibration_data: CalibrationData | None = None,
    epsilon_ratio: float = 3.0,
    learned_epsilon: Literal["per_channel", False] = "per_channel",
    replace_activations: bool = True,
    verbose: bool | Literal["auto"] = "auto",
    return_report: bool = False,
) -> keras.Model | tuple[keras.Model, ConversionReport]:
    """Converts a trained BatchNormalization model to FRN, and its ReLU activations to TLU.

    ```
    a * x + c                                   BatchNormalization at inference, per channel
    m = mean^2 + variance                       the channel's mean square
    epsilon = epsilon_ratio * m
    gamma = a * sqrt(m + epsilon),   beta = c,   tau = 0
    ```

    With these weights each FRN layer gives what its BatchNormalization layer gave for a sample of
    typical energy. With `calibration_data` they are refined layer by layer: each output channel
    then has the mean and the standard deviation that it had. Epsilon is the path between the two
    normalizations: a large one is BatchNormalization's fixed scale, 0 normalizes each sample fully.
    Fine-tune the result, and let `keras_frn.callbacks.EpsilonScheduler` lower epsilon meanwhile.

    The result is a new, uncompiled model. All other layers keep their names, weights and trainable
    flags. The given model does not change.

    Args:
        model: A built functional or Sequential model. Nested models and shared layers are followed.
        calibration_data: Inputs like those at inference, without labels; 100 to 1000 samples are
            enough, and at most 2048 are used. An array, a list or dict of arrays for several
            inputs, a `tf.data.Dataset`, a `keras.utils.PyDataset`, or an iterable of batches, each
            the inputs or `(inputs, targets)`. An array is read batch by batch, so that a memory map
            need not fit into memory. With None, the moving statistics alone decide. Defaults to
            None.
        epsilon_ratio: Float of 0 or more, epsilon / mean square of each channel. It is at least 1
            where a channel has a single position. Defaults to 3.
        learned_epsilon: Where epsilon is kept. `"per_channel"` keeps it in a weight, which training
            and `EpsilonScheduler` change; False makes it a constant. Defaults to `"per_channel"`.
        replace_activations: Whether a `ReLU` or `Activation("relu")` becomes TLU, where it follows
            a replaced layer directly, and no other layer. Defaults to True.
        verbose: Bool or `"auto"`, whether to show the progress of the calibration; `"auto"` is
            True, as in `keras.Model.fit`. Defaults to `"auto"`.
        return_report: Whether to return a `ConversionReport`, too. Defaults to False.

    Returns:
        A `keras.Model`, or with `return_report=True` a tuple `(model, report)`.

    Raises:
        ValueError: If the model is not built, if it is subclassed and so has no graph of layers, if
            an argument is out of its range, or if the data do not fit the model.

    Example:

    ```python
    frn_model = keras_frn.replace_batch_normalization(bn_model, calibration_data=images[:500])
    ```

    Reference:
        Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737
    """
    _check_model(model)
    _check_arguments(epsilon_ratio, learned_epsilon)
    samples = Samples(model, calibration_data)
    plan = _Plan(model, replace_activations)
    if not plan.norms:
        warnings.warn(
            f"Model {model.name!r} has no BatchNormalization layer that can be replaced: the "
            "result is a copy.",
            stacklevel=2,
        )
    ratios: dict[Any, Any] = {}
    for bn in plan.norms:
        is_single = count_positions(bn) == 1
        ratios[bn] = max(epsilon_ratio, _SINGLE_POSITION_RATIO) if is_single else epsilon_ratio

    def copy_one(layer: Any) -> Any:
        if layer in plan.norms:
            return _make_frn(layer, ratios[layer], learned_epsilon)
        if layer in plan.tlus:
            return _make_tlu(layer, plan.tlus[layer])
        return graph.copy_layer(layer)

    converted, copies = graph.copy(model, copy_one)
    for layer, copy in copies.items():
        if layer in plan.norms:
            set_closed_form(copy, layer, ratios[layer])
        elif layer not in plan.tlus:
            graph.copy_weights(layer, copy)
    graph.copy_trainable(copies)
    replaced = {copies[bn]: bn for bn in plan.norms}
    if samples.count and replaced:
        ratios |= fit(model, converted, replaced, ratios, samples, bool(verbose))
    if not return_report:
        return converted
    return converted, ConversionReport(tuple(plan.entries(ratios)))


class _Plan:
    """What becomes of each layer of a model.

    Attributes:
        norms: The BatchNormalization layers to replace.
        tlus: Dict from each activation that becomes TLU to the layer in `norms` before it.
    """

    def __init__(self, model: keras.Model, replace_activations: bool) -> None:
        self._wiring = graph.Wiring(model)
        self._layers = dict.fromkeys(call.layer for call in self._wiring.calls)
        self.norms = [x for x in self._layers if type(x) is keras.layers.BatchNormalization]
        self.tlus: dict[Any, Any] = {}
        for layer in self._layers if replace_activations else ():
            norm = self._norm_before(layer)
            if norm is not None and _is_relu(layer) and self._sources(layer) == {norm}:
                self.tlus[layer] = norm

    def _sources(self, layer: Any) -> set[Any]:
        """The layers that a layer reads; None is an input."""
        calls = self._wiring.calls_of(layer)
        producers = [self._wiring.producer(tensor) for call in calls for tensor in call.inputs]
        return {producer and producer.layer for producer in producers}

    def _norm_before(self, layer: Any) -> Any:
        """A layer in `norms` that the layer reads, or None."""
        return next((source for source in self._sources(layer) if source in self.norms), None)

    def entries(self, ratios: Mapping[Any, Any]) -> Iterator[Replacement]:
        """The rows of the report."""
        for layer in self._layers:
            row: dict[str, Any] = {"layer": layer.name, "kind": type(layer).__name__}
            if layer in self.norms:
                row |= {"positions": count_positions(layer)}
                row |= {"epsilon_ratio": float(np.median(ratios[layer]))}
                yield Replacement(**row, action="replaced", reason=_FRN)
            elif layer in self.tlus:
                yield Replacement(**row, action="replaced", reason=_TLU)
            elif self._norm_before(layer) is not None and isinstance(layer, _ACTIVATIONS):
                alone = "not asked for" if len(self._sources(layer)) == 1 else _SHARED
                reason = alone if _is_relu(layer) else "not a ReLU"
                yield Replacement(**row, action="kept", reason=reason)
            elif not graph.is_graph(layer) and any(
                "moving_variance" in weight.path for weight in getattr(layer, "weights", ())
            ):
                reason = "BatchNormalization inside, which no graph shows"
                yield Replacement(**row, action="kept", reason=reason)


def _make_frn(bn: Any, ratio: float, learned_epsilon: Any) -> FilterResponseNormalization:
    config = bn.get_config()
    names = ["name", "trainable", "dtype", "axis"]
    names += [
        f"{w}_{x}" for w in ("beta", "gamma") for x in ("initializer", "regularizer", "constraint")
    ]
    epsilon: Any = CONSTANT_EPSILON
    if not learned_epsilon:
        epsilon = (epsilon + ratio * Affine.of(bn).mean_square).tolist()
    return FilterResponseNormalization.from_config(
        {
            **{name: config[name] for name in names},
            "epsilon": epsilon,
            "learned_epsilon": learned_epsilon if ratio else False,
        }
    )


def _make_tlu(activation: Any, bn: Any) -> TLU:
    config = activation.get_config()
    options = {name: config[name] for name in ("name", "trainable", "dtype")}
    return TLU.from_config({**options, "axis": bn.axis})


def _is_relu(layer: Any) -> bool:
    if type(layer) is keras.layers.ReLU:
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    return type(layer) is keras.layers.Activation and layer.activation is keras.activations.relu


def _check_model(model: Any) -> None:
    if not graph.is_graph(model):
        raise ValueError(
            "`model` must be a functional or Sequential model, whose graph of layers can be "
            f"rewritten. Received: model={model!r} of class {type(model).__name__}. Make a "
            "subclassed model functional first: `inputs = keras.Input(shape); functional = "
            "keras.Model(inputs, model.call(inputs))`."
        )
    if not model.built or not model.inputs:
        raise ValueError(
            f"`model` must be built. Received: model={model.name!r}, which has no weights yet. "
            "Call it on data, or begin it with `keras.Input`."
        )


def _check_arguments(epsilon_ratio: Any, learned_epsilon: Any) -> None:
    if (
        isinstance(epsilon_ratio, bool)
        or not isinstance(epsilon_ratio, numbers.Real)
        or not 0 <= epsilon_ratio < math.inf
    ):
        raise ValueError(
            "`epsilon_ratio` must be a finite number of 0 or more. Received: "
            f"epsilon_ratio={epsilon_ratio!r}. 3 is the default, 0 is FRN with the epsilon of the "
            "paper."
        )
    if learned_epsilon not in ("per_channel", False):
        raise ValueError(
            "`learned_epsilon` must be 'per_channel' or False. Received: "
            f"learned_epsilon={learned_epsilon!r}. One epsilon per layer cannot follow the mean "
            "square of each channel."
        )


def count_positions(norm: keras.Layer) -> int | None:
    """The number of spatial positions that a normalization sees, or None if it may change."""
    shape = list(norm.get_build_config()["input_shape"])
    del shape[norm.axis], shape[0]
    return None if None in shape else math.prod(shape)
