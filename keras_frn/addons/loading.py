"""Models and weights saved by TensorFlow Addons, opened in Keras 3."""

import contextlib
import os
import warnings

import keras
import numpy as np

from . import files
from .config import OPTIMIZERS, Builder, Thresholds
from .weights import is_uniform, match

_TAU = ("auto", "per_channel", "per_position", "per_channel_mean")
_ELEMENTWISE = ("NoneType", "NonNeg", "L1", "L2", "L1L2")


def load_addons_model(path, weights=None, tau="auto", compile=True, custom_objects=None):
    """Opens a model that TensorFlow Addons saved: returns an ordinary `keras.Model`.

    `tfa.layers.FilterResponseNormalization` and `tfa.layers.TLU` become our layers. Outputs,
    gradients, regularization losses, layer names and trainable weights stay what they were. The
    model is compiled as it was, with an optimizer that starts fresh. Nothing in the file is
    executed or unpickled.

    Args:
        path: An `.h5` or `.keras` file, a SavedModel folder or a zip of one, or a `.json` config.
        weights: The weights of a `.json` config: a file or a checkpoint. Defaults to None.
        tau: What becomes of the thresholds of TLU, which Addons kept per position. `"auto"` makes
            them one per channel where nothing is lost: all positions have the same value, and no
            constraint or regularizer tells them apart. `"per_position"` keeps all, `"per_channel"`
            refuses positions that differ, `"per_channel_mean"` averages. Defaults to `"auto"`.
        compile: Whether to compile the model as it was. Defaults to True.
        custom_objects: Dict of names and classes or functions of your own. Defaults to None.

    Raises:
        ValueError: if the file is damaged or of Keras 3, or has a layer that cannot be read.
    """
    _check_tau(tau, _TAU, "Use 'auto' to lose nothing")
    with contextlib.ExitStack() as stack:
        stack.enter_context(keras.saving.custom_object_scope(custom_objects or {}))
        saved = stack.enter_context(files.opened(path))
        if weights is not None:
            saved.weights = stack.enter_context(files.opened(weights, "weights")).weights
        if saved.config is None or saved.weights is None:
            raise ValueError(
                "`path` must hold a model with its config and its weights. Received: path="
                f"{os.fspath(path)!r}, weights={weights!r}. Pass a JSON config as `path` and the "
                "file of its weights as `weights`; or, where there is no config, build the model "
                "in code with keras_frn layers and call keras_frn.load_addons_weights."
            )
        with files.explained(path):
            model = _model(saved, tau)
        if compile and saved.training:
            _compile(model, saved.training)
    return model


def load_addons_weights(model, path, tau="auto"):
    """Loads weights that TensorFlow Addons saved into a model built with our layers.

    The model has the layers of the old one in the same order, with
    `keras_frn.FilterResponseNormalization()` for `tfa.layers.FilterResponseNormalization()` and
    `keras_frn.TLU()` (one threshold per channel) or `keras_frn.TLU(axis=(1, 2, 3))` (one per
    position) for `tfa.layers.TLU()`. All weights are found and checked before the first is changed.
    The state of an optimizer is not read.

    Args:
        model: A built Functional or Sequential `keras.Model`.
        path: A weights file (`.h5`, `.weights.h5`), a TensorFlow checkpoint (its prefix, its
            `.index` file or its folder), or a complete model, whose config is not looked at.
        tau: `"per_channel_mean"` averages thresholds that differ from position to position where
            the model has one per channel; `"auto"` refuses. Defaults to `"auto"`.

    Raises:
        ValueError: if the model is not built, or the file does not fit it.
    """
    _check_tau(tau, ("auto", "per_channel_mean"), "Choose TLU(axis=...) in the model")
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a built keras.Model. Received: model={model!r}. "
            "Give it an input shape, or call it once."
        )
    with files.opened(path) as saved, files.explained(path):
        _assign(match(model, {}, saved.weights), tau)


def _check_tau(tau, choices, remedy):
    if tau not in choices:
        raise ValueError(f"`tau` must be one of {choices}. Received: tau={tau!r}. {remedy}.")


def _model(saved, tau, thresholds=None):
    builder = Builder(thresholds)
    model = builder.revive(saved.config)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError("its config is not that of a built Functional or Sequential model")
    pairs = match(model, builder.members, saved.weights)
    if builder.tlus and thresholds is None:  # only the arrays tell whether positions differ
        return _model(saved, tau, [_thresholds(layer, pairs, tau) for layer in builder.tlus])
    _assign(pairs, tau)
    return model


def _thresholds(layer, pairs, tau):
    """What takes the place of a stored TLU."""
    arrays = [np.asarray(pair.array) for pair in pairs if pair.layer is layer]
    shape = arrays[0].shape
    options = [f"{w.name}_{o}" for w in layer.weights for o in ("regularizer", "constraint")]
    is_elementwise = all(type(getattr(layer, o)).__name__ in _ELEMENTWISE for o in options)
    if len(shape) == 1:
        return Thresholds()
    loses_nothing = is_elementwise and all(map(is_uniform, arrays))
    if tau == "per_position" or (tau == "auto" and not loses_nothing):
        return Thresholds(axis=tuple(range(1, 1 + len(shape))))
    if not is_elementwise:
        raise ValueError(
            f"layer {layer.name!r} has a constraint or regularizer that needs its positions: "
            "pass tau='auto' or tau='per_position'"
        )
    return Thresholds(positions=int(np.prod(shape[:-1])))


def _assign(pairs, tau):
    values = [pair.value(tau) for pair in pairs]
    for pair, value in zip(pairs, values, strict=True):
        pair.weight.assign(value)
        if isinstance(pair.layer, keras.layers.Normalization):
            pair.layer.finalize_state()  # takes the statistics over from the weights


def _compile(model, training):
    """Compiles the model as it was, where Keras 3 can."""
    builder = Builder()

    def metrics(name):
        revived = builder.revive(training.get(name), (keras.metrics,))
        # Keras 2 writes a list for each output; the oldest Keras 3 wants one list for one output.
        is_nested = isinstance(revived, list) and len(revived) == len(model.outputs) == 1
        return revived[0] if is_nested and isinstance(revived[0], list) else revived

    try:
        model.compile(
            builder.revive(training.get("optimizer_config", training.get("optimizer")), OPTIMIZERS),
            builder.revive(training.get("loss"), (keras.losses,)),
            training.get("loss_weights"),
            metrics("metrics"),
            metrics("weighted_metrics"),
        )
        # Keras saves an optimizer that is not built in a way that it warns about when it loads it.
        model.optimizer.build(model.trainable_variables)
        message = f"The optimizer {model.optimizer.name!r} starts fresh: its state is not read."
    except Exception as error:
        model.compiled = False
        message = f"The model is not compiled, as Keras 3 refuses how it was: {error}"
    warnings.warn(message, stacklevel=3)
