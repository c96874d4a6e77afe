"""Models and weights saved by TensorFlow Addons, opened in Keras 3."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from .. import graph
from ..errors import ArgumentError, ArgumentWarning
from ..typing import PathLike
from . import files
from .config import OPTIMIZERS, Builder, Thresholds
from .operators import BY_CODE
from .weights import Pair, explain_doubts, is_uniform, match

__all__ = ["load_addons_model", "load_addons_weights"]

_TAU = ("auto", "per_channel", "per_position", "per_channel_mean")
_ELEMENTWISE = ("NoneType", "NonNeg", "L1", "L2", "L1L2")


def load_addons_model(
    path: PathLike,
    *,
    weights: PathLike | None = None,
    tau: Literal["auto", "per_channel", "per_position", "per_channel_mean"] = "auto",
    compile: bool = True,
    custom_objects: Mapping[str, Any] | None = None,
) -> keras.Model:
    """Opens a model that TensorFlow Addons saved: returns an ordinary `keras.Model`.

    `tfa.layers.FilterResponseNormalization` and `tfa.layers.TLU` become our layers. Outputs,
    gradients, regularization losses, layer names and trainable weights stay what they were. The
    model is compiled as it was, with an optimizer that starts fresh. Nothing in the file is
    executed or unpickled.

    Args:
        path: An `.h5` or `.keras` file, a SavedModel folder or a zip of one, or a `.json` config.
        weights: The weights of a `.json` config: a file or a checkpoint. Defaults to None.
        tau: What becomes of the thresholds of TLU, which Addons kept per position. `"auto"` makes
            them one per channel if nothing is lost: all positions have the same value, and no
            constraint or regularizer tells them apart. `"per_position"` keeps all, `"per_channel"`
            refuses positions that differ, `"per_channel_mean"` averages. Defaults to `"auto"`.
        compile: Whether to compile the model as it was. Defaults to True.
        custom_objects: Dict of names and classes or functions of your own. Defaults to None.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: if the file is damaged or of Keras 3, or has a layer that cannot be read.
        ImportError: if a SavedModel or a checkpoint is given, and TensorFlow is not installed.
        OSError: if a file cannot be opened.

    Example:

    ```python
    model = keras_frn.load_addons_model("old.h5")
    model.save("new.keras")
    ```
    """
    _check_tau(tau, _TAU, "Use 'auto' to lose nothing")
    saved, source = files.read(path), (path, "path")
    if weights is not None:
        source = (weights, "weights")
        saved.weights = files.read(*source).weights
        if not saved.weights:
            found = f"Received: {os.fspath(weights)!r}, which has none"
            raise ArgumentError("weights", f"must hold weights. {found}. Pass another file.")
    if saved.config is None or not saved.weights:
        missing = "config" if saved.config is None else "weights"
        raise ArgumentError(
            "path",
            f"must hold a model with its config and its weights. Received: {os.fspath(path)!r}, "
            f"which has no {missing}. Pass the JSON config of the model and its weights. {BY_CODE} "
            "if there is no config.",
        )
    with keras.saving.custom_object_scope(custom_objects or {}):
        with files.explain_errors(path, "path", "must hold a model that Keras 3 can build"):
            model, pairs = _build(saved, tau, source)
            _assign(pairs, tau)
        if compile and saved.training:
            _compile(model, saved.training)
    for doubt in explain_doubts(pairs):
        warnings.warn(ArgumentWarning("path", doubt), stacklevel=2)
    return model


def load_addons_weights(
    model: keras.Model,
    path: PathLike,
    *,
    tau: Literal["auto", "per_channel_mean"] = "auto",
    part: str | None = None,
) -> None:
    """Loads weights that TensorFlow Addons saved into a model built with our layers.

    The model must have the layers of the old one in the same order, with
    `keras_frn.FilterResponseNormalization()` for `tfa.layers.FilterResponseNormalization()` and
    `keras_frn.TLU()` (one threshold per channel) or `keras_frn.TLU(axis=(1, 2, 3))` (one per
    position) for `tfa.layers.TLU()`. All weights are found and checked before the first is changed.
    The state of an optimizer is not read.

    Args:
        model: A built `keras.Model`. For a file of a subclassed model it has the same attributes,
            or layers of their names. Otherwise layers go by order.
        path: A weights file (`.h5`, `.weights.h5`), a TensorFlow checkpoint (its prefix, its
            `.index` file or its folder), or a complete model, whose config is not looked at.
        tau: `"per_channel_mean"` averages thresholds that differ from position to position if the
            model has one per channel; `"auto"` refuses them. Defaults to `"auto"`.
        part: The name of the model in a `tf.train.Checkpoint(generator=..., discriminator=...)`,
            or its path, such as `"gan/generator"`. Defaults to None: the whole file, or the one
            part that fits.

    Raises:
        ValueError: if the model is not built, or the file does not fit it.
        ImportError: if a SavedModel or a checkpoint is given, and TensorFlow is not installed.
        OSError: if a file cannot be opened.

    Example:

    ```python
    keras_frn.load_addons_weights(model, "weights.h5")
    ```
    """
    _check_tau(tau, ("auto", "per_channel_mean"), "Choose TLU(axis=...) in the model")
    graph.check_built(model)
    saved = files.read(path)
    with files.explain_errors(path, "path", "must hold the weights of the model"):
        pairs = match(model, None, saved.weights, part)
        for doubt in explain_doubts(pairs):
            warnings.warn(ArgumentWarning("path", doubt), stacklevel=2)
        _assign(pairs, tau)


def _check_tau(tau: object, choices: tuple[str, ...], remedy: str) -> None:
    if tau not in choices:
        raise ArgumentError("tau", f"must be one of {choices}. Received: {tau!r}. {remedy}.")


def _build(
    saved: files.Saved,
    tau: str,
    source: tuple[PathLike, str],
    thresholds: Sequence[Thresholds] | None = None,
) -> tuple[keras.Model, list[Pair]]:
    """The model of a config, with the weights of a source: a file and the argument it came by."""
    builder = Builder(thresholds)
    model = builder.revive(saved.config)
    if not isinstance(model, keras.Model) or not model.built:
        problem = "its config is not that of a built Functional or Sequential model"
        raise ValueError(f"{problem}. {BY_CODE}")
    with files.explain_errors(*source, "must hold the weights of the model"):
        pairs = match(model, builder.origin, saved.weights)
    if builder.tlus and thresholds is None:  # only the arrays tell whether positions differ
        chosen = [_choose_thresholds(layer, pairs, tau) for layer in builder.tlus]
        return _build(saved, tau, source, chosen)
    return model, pairs


def _choose_thresholds(layer: keras.Layer, pairs: list[Pair], tau: str) -> Thresholds:
    """What takes the place of a stored TLU."""
    arrays = [np.asarray(pair.array) for pair in pairs if pair.layer is layer]
    shape = arrays[0].shape
    options = [f"{w.name}_{o}" for w in layer.weights for o in ("regularizer", "constraint")]
    is_elementwise = all(type(getattr(layer, o)).__name__ in _ELEMENTWISE for o in options)
    if len(shape) == 1:
        return -1, 1
    loses_nothing = is_elementwise and all(map(is_uniform, arrays))
    if tau == "per_position" or (tau == "auto" and not loses_nothing):
        return tuple(range(1, 1 + len(shape))), 1
    if not is_elementwise:
        raise ArgumentError(
            "tau",
            f"must be 'auto' or 'per_position' for layer {layer.name!r}, which has a constraint or "
            f"regularizer that needs its positions. Received: {tau!r}.",
        )
    return -1, int(np.prod(shape[:-1]))


def _assign(pairs: list[Pair], tau: str) -> None:
    values = [pair.value(tau) for pair in pairs]
    for pair, value in zip(pairs, values, strict=True):
        pair.weight.assign(value)
        if isinstance(pair.layer, keras.layers.Normalization):
            pair.layer.finalize_state()  # takes the statistics over from the weights


def _compile(model: keras.Model, training: dict[str, Any]) -> None:
    """Compiles the model as it was, where Keras 3 can."""
    revive = Builder().revive
    names = getattr(model, "output_names", None) or [model.layers[-1].name]  # of a Sequential

    def metrics(key: str) -> Any:
        stored = training.get(key)
        if isinstance(stored, list) and len(names) > 1:
            is_plain = not any(isinstance(item, list) for item in stored)
            stored = [stored] * len(names) if is_plain else stored  # as Keras 2 did
            stored = [_list_metrics(*pair) for pair in zip(names, stored, strict=True)]
        revived = revive(stored, (keras.metrics,))
        _check_names(revived, keras.metrics.get)
        # Keras 2 writes a list for each output; the oldest Keras 3 wants one list for one output.
        return keras.tree.flatten(revived) if revived and len(names) == 1 else revived

    def list_outputs(value: Any, default: Any = None) -> Any:
        # Keras 3 wants all outputs, and losses and weights in the same form. Keras 2 did not.
        is_of_names = isinstance(value, dict) and value.keys() <= {*names}
        return [value.get(name, default) for name in names] if is_of_names else value

    try:
        loss = list_outputs(revive(training.get("loss"), (keras.losses,)))
        _check_names(loss, keras.losses.get)
        weights = list_outputs(training.get("loss_weights"), 1.0)
        if weights and loss and not isinstance(loss, (dict, list)):
            loss = [loss] * len(names)
        model.compile(
            revive(training.get("optimizer_config", training.get("optimizer")), OPTIMIZERS),
            loss,
            weights,
            metrics("metrics"),
            metrics("weighted_metrics"),
        )
        # Keras saves an optimizer that is not built in a way that it warns about when it loads it.
        model.optimizer.build(model.trainable_variables)
        message = f"The optimizer {model.optimizer.name!r} starts fresh: its state is not read."
    except files.reading_errors() as error:
        model.compiled = False
        problem = "The model is not compiled, as Keras 3 cannot restore the compile arguments"
        message = f"{problem}: {error}"
    warnings.warn(message, stacklevel=3)


def _check_names(arguments: Any, get: Callable[[str], object]) -> None:
    """Looks for the functions that are given by names, as `compile` does so in the first step."""
    for name in keras.tree.flatten(arguments):
        if isinstance(name, str) and name not in ("accuracy", "acc", "crossentropy", "ce"):
            get(name)


def _list_metrics(output: str, stored: Any) -> list[Any]:
    """The metrics of an output. In a file their names may begin with its own, in Keras 3 not."""
    found = [v for v in (stored if isinstance(stored, list) else [stored]) if v is not None]
    for item in found:
        if isinstance(item, dict) and "name" in item.get("config", ()):
            item["config"]["name"] = item["config"]["name"].removeprefix(f"{output}_")
    return found
