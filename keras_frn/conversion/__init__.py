"""A trained BatchNormalization model becomes an FRN model."""

import math
import warnings
from collections.abc import Container, Iterator
from typing import Any, Literal, overload

import keras

from .. import graph
from ..errors import ArgumentError, ArgumentWarning, format_count
from ..samples import Samples
from ..typing import CalibrationData, is_number
from .fit import fit, measure_agreement, set_closed_form
from .opening import copy_model, open_layers
from .plan import Plan
from .report import ConversionReport, Replacement

__all__ = ["ConversionReport", "Replacement", "replace_batch_normalization"]

# Converted networks of all kinds are above this, and those that need a larger ratio are below.
_GOOD_AGREEMENT = 0.8
# What a class of models may have of its own, which a functional model has not.
_OWN = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")
# What `compile` and `fit` give to every model.
_OF_TRAINING = ("history", "optimizer", "stop_evaluating", "stop_predicting", "stop_training")


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
    gamma * x * sqrt((1 + k) / (nu2 + k * m)) + beta        FRN with k = epsilon_ratio
    m = mean^2 + variance,   gamma = a * sqrt(m),   beta = c,   tau = 0
    ```

    With these weights each FRN layer outputs what its BatchNormalization layer did for a sample of
    typical energy, nu2 = m. With `calibration_data` they are refined layer by layer: each output
    channel then has its original mean and standard deviation. The ratio k leads from one
    normalization to the other: a large one is BatchNormalization's fixed scale, 0 normalizes each
    sample fully. It is a weight that is not trained. Fine-tune the result, and let
    `keras_frn.callbacks.EpsilonScheduler` lower the ratio meanwhile.

    The result is a new, uncompiled model. All other layers keep their names, weights and trainable
    flags. The given model does not change.

    Args:
        model: A built functional or Sequential model. Nested models and shared layers are followed.
        calibration_data: Inputs like those at inference, without labels; 200 to 1000 samples are
            enough, and at most 2048 are used. Of any kind that `export_tflite` takes. An array is
            read batch by batch, so that a memory map need not fit into memory. With None, the
            moving statistics alone decide. Defaults to None.
        epsilon_ratio: Float of 0 or more, epsilon / mean square of each channel. It is at least 1
            if a layer has a single position. Defaults to 3.
        learned_epsilon: How layers with a single position keep their epsilon: `"per_channel"` in a
            trained weight, False as a constant. Defaults to `"per_channel"`.
        replace_activations: Whether a `ReLU`, `Activation("relu")` or `keras.ops.relu` becomes TLU
            if it directly follows a replaced layer, and nothing else. Defaults to True.
        verbose: Bool or `"auto"`, whether to show the progress of the calibration; `"auto"` is
            True, as in `keras.Model.fit`. Defaults to `"auto"`.
        return_report: Whether to also return a `ConversionReport`. Defaults to False.

    Returns:
        A `keras.Model`, or with `return_report=True` a tuple `(model, report)`.

    Raises:
        ValueError: If the model is not built, if it has no graph of layers or computes more than
            that in a `call` of its own, if an argument is out of its range, or if the data do not
            fit the model.

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
    opened, closed = open_layers(model)
    plan = Plan(opened, replace_activations, epsilon_ratio, learned_epsilon, closed)
    converted, copies = copy_model(opened, plan.copy_layer, plan.changes)
    for layer, copy in copies.items():
        if layer in plan.ratios:
            set_closed_form(copy, layer, plan.ratios[layer])
        elif plan.keeps_weights(layer):
            graph.copy_weights(layer, copy)
    graph.copy_trainable(copies)
    ratios, agreement, itself = dict(plan.ratios), None, None
    if samples.count and ratios:
        replaced = {copies[bn]: bn for bn in ratios}
        ratios |= fit(opened, converted, replaced, ratios, samples, bool(verbose))
        agreement = measure_agreement(opened, converted, samples)
        if agreement is not None and agreement < _GOOD_AGREEMENT:
            itself = measure_agreement(opened, opened, samples)
    report = ConversionReport(tuple(plan.describe(ratios)), agreement)
    models = [(model, converted), *(pair for pair in copies.items() if graph.is_graph(pair[0]))]
    for warning in (*_describe_rest(model, report, itself), *_describe_losses(models)):
        warnings.warn(warning, stacklevel=2)
    return (converted, report) if return_report else converted


def _describe_rest(
    model: keras.Model, report: ConversionReport, itself: float | None
) -> Iterator[Warning]:
    """Warnings about what was not converted, or not well. `itself` is how far the given model
    agrees with itself, if that was measured."""
    if report.left:
        names = ", ".join(f"{x.layer} ({x.reason})" for x in report.entries if x.left)
        total = format_count(report.left + report.replaced, "BatchNormalization layer")
        text = (
            f"keeps {report.left} of {total}, with batch statistics in `fit`: {names}. Build the "
            "model from layers that hold none inside to have all replaced."
        )
        yield ArgumentWarning("model", text)
    elif not report.replaced:
        text = f"has no BatchNormalization layer. Received: {model.name!r}. The result is a copy."
        yield ArgumentWarning("model", text)
    if itself is not None and itself < _GOOD_AGREEMENT:
        text = (
            f"is random at inference: its outputs correlate by {itself:.2f} with those of a second "
            f"call, and by {report.agreement:.2f} with the result's. Compare what is not random."
        )
        yield ArgumentWarning("model", text)
    elif report.agreement is not None and report.agreement < _GOOD_AGREEMENT:
        text = (
            "is too small for this model: over the calibration data the outputs correlate with "
            f"those of the given model by {report.agreement:.2f} only. Networks with gates, as "
            "squeeze-and-excite, need a larger one. Try 30 and 1000, fine-tune, and let "
            "`keras_frn.callbacks.EpsilonScheduler` lower it."
        )
        yield ArgumentWarning("epsilon_ratio", text)


def _describe_losses(pairs: list[tuple[Any, Any]]) -> Iterator[Warning]:
    """Warnings about what models had of their own, by class or as an attribute, and lack now."""
    inputs = keras.Input((1,))
    # Older versions of Keras refuse a model of nothing.
    known = {*vars(keras.Model(inputs, keras.layers.Identity()(inputs))), *_OF_TRAINING}
    described: set[Any] = set()
    for old, new in pairs:
        is_same = isinstance(new, type(old))
        own = [x for x in _OWN if getattr(type(old), x, 0) is not getattr(type(new), x, 0)]
        own += _list_lost_attributes(old, new, known)
        if type(old) in described or (is_same and not own):
            continue
        described.add(type(old))
        text = f"{old.name!r} of class {type(old).__name__} "
        text += "is copied" if is_same else f"becomes a plain {type(new).__name__}"
        text += f", without its own {', '.join(own)}" if own else ""
        try:
            config = keras.saving.serialize_keras_object(pairs[0][1])
            keras.saving.deserialize_keras_object(config)
        except (TypeError, ValueError) as error:
            text += f". It can be saved, but not loaded again: {error}"
        yield ArgumentWarning("model", f"{text}.")


def _list_lost_attributes(old: keras.Model, new: keras.Model, known: Container[str]) -> list[str]:
    """Public attributes that a model has beside those known of every model, and its copy not."""
    own = {k: v for k, v in vars(old).items() if k not in known and not k.startswith("_")}
    values = (bool, int, float, str)
    return [
        name
        for name, value in own.items()
        if name not in vars(new) or (isinstance(value, values) and value != vars(new)[name])
    ]


def _check_model(model: Any) -> None:
    if isinstance(model, keras.Model) and not graph.is_graph(model):
        raise ValueError(
            "`model` must be a functional or Sequential model, whose graph of layers can be "
            f"rewritten. Received: model={model!r} of class {type(model).__name__}. Make a "
            "subclassed model functional first: `inputs = keras.Input(shape); functional = "
            "keras.Model(inputs, model.call(inputs))`."
        )
    graph.check_built(model)


def _check_arguments(epsilon_ratio: Any, learned_epsilon: Any) -> None:
    if not is_number(epsilon_ratio) or not 0 <= epsilon_ratio < math.inf:
        raise ArgumentError(
            "epsilon_ratio",
            f"must be a finite number of 0 or more. Received: {epsilon_ratio!r}. 3 is the default, "
            "0 is FRN with the epsilon of the paper.",
        )
    if learned_epsilon not in ("per_channel", False):
        raise ValueError(
            "`learned_epsilon` must be 'per_channel' or False. Received: "
            f"learned_epsilon={learned_epsilon!r}. One epsilon per layer cannot follow the mean "
            "square of each channel."
        )
