"""A trained BatchNormalization model becomes an FRN model."""

import collections
import dataclasses
import math
import numbers
import warnings

import keras
import numpy as np

from .. import graph
from ..layers import TLU, FilterResponseNormalization
from . import fit as calibration

_CONSTANT_EPSILON = 1e-6
# Below this, a channel of one position would be close to its sign: unit energy whatever the input.
_SINGLE_POSITION_RATIO = 1.0
_LINEAR = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_ACTIVATIONS = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ELU,
)


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What became of one layer: `action` is "replaced", "changed" or "kept"."""

    layer: str
    kind: str
    action: str
    reason: str
    positions: int | None = None
    epsilon_ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What `replace_batch_normalization` replaced, what it kept, and why; `print` shows a table.

    `entries` has a `Replacement` for each BatchNormalization, for each activation after one, for
    each layer that got a bias back, and for each layer that hides a BatchNormalization.
    `epsilon_ratio` is the median over the channels of epsilon / mean square: near 0 is FRN as in
    the paper, 3 normalizes mildly, and a large value would be BatchNormalization's fixed scale."""

    entries: tuple[Replacement, ...]

    def count(self, kind, action="replaced"):
        """The number of layers of a class that had this action."""
        return sum(entry.kind == kind and entry.action == action for entry in self.entries)

    def __str__(self):
        if not any(entry.kind == "BatchNormalization" for entry in self.entries):
            head = "No BatchNormalization layer was found: the model is an unchanged copy."
        else:
            head = (
                f"{self.count('BatchNormalization')} BatchNormalization layers became FRN, "
                f"{sum(e.reason == _TLU for e in self.entries)} activations became TLU, "
                f"{sum(e.action == 'kept' for e in self.entries)} layers were kept."
            )
        lines = [head]
        if self.entries:
            width = max(len(entry.layer) for entry in self.entries)
            lines.append(f"{'layer':{width}}  {'class':18}  N       eps/nu2  what")
        for entry in self.entries:
            ratio = "" if entry.epsilon_ratio is None else f"{entry.epsilon_ratio:.3g}"
            positions = "" if entry.positions is None else entry.positions
            lines.append(
                f"{entry.layer:{width}}  {entry.kind:18}  {positions!s:6}  {ratio:7}  "
                f"{entry.action}: {entry.reason}"
            )
        return "\n".join(lines)


_TLU = "TLU with a threshold of 0"


def replace_batch_normalization(
    model,
    calibration_data=None,
    epsilon_ratio=3.0,
    learned_epsilon="per_channel",
    replace_activations=True,
    restore_biases=False,
    batch_size=32,
    verbose=True,
    return_report=False,
):
    """A copy of a trained model with FRN in place of BatchNormalization, and TLU in place of ReLU.

    ```
    a * x + c                                   BatchNormalization at inference, per channel
    m = mean^2 + variance                       the channel's mean square
    epsilon = epsilon_ratio * m
    gamma = a * sqrt(m + epsilon),   beta = c,   tau = 0
    ```

    The weights make each FRN give what its BatchNormalization gave for a sample of typical energy.
    With `calibration_data` they are refined layer by layer, so that each output channel has the
    mean and the standard deviation that it had. Epsilon is the path between the two layers: a large
    one is BatchNormalization's fixed scale, 0 normalizes each sample fully. Fine-tune the result,
    and let `EpsilonScheduler` lower epsilon meanwhile.

    The result is uncompiled and has the names, the trainable flags and the weights of the other
    layers. The given model is not changed.

    Args:
        model: Functional or Sequential model, built; nested and shared layers are followed.
        calibration_data: Inputs as `model.predict` takes them: an array (a memory map is read batch
            by batch), or a list or dict of arrays. No labels. 100 to 1000 samples do. Defaults to
            None: the moving statistics alone.
        epsilon_ratio: Float >= 0, epsilon / mean square of each channel; at least 1 where a channel
            has a single position. Defaults to 3.
        learned_epsilon: `"per_channel"` keeps epsilon in a weight, which training and
            `EpsilonScheduler` change; False makes it a constant. Defaults to `"per_channel"`.
        replace_activations: Whether a `ReLU` or `Activation("relu")` that directly follows one of
            the replaced layers, and no other layer, becomes TLU. Defaults to True.
        restore_biases: Whether a convolution or dense layer before BatchNormalization gets a bias
            of minus the moving mean, which FRN does not subtract. Defaults to False.
        batch_size: Samples per step of the calibration. It does not change the result. Defaults to
            32.
        verbose: Whether to show the progress of the calibration. Defaults to True.
        return_report: Whether to return `(model, report)`, with a printable `ConversionReport`.
            Defaults to False.

    Returns:
        A `keras.Model`, or `(keras.Model, ConversionReport)`.

    Raises:
        ValueError: if the model has no graph of layers (subclassed), is not built, or an argument
            does not fit.

    Example:

    >>> frn_model = keras_frn.replace_batch_normalization(model, images[:500])

    Reference: Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737."""
    _check_model(model)
    _check_arguments(epsilon_ratio, learned_epsilon, batch_size)
    if calibration_data is not None:
        calibration.sample_count(calibration_data)
    plan = _Plan(model, replace_activations, restore_biases)
    if not plan.norms:
        warnings.warn(
            f"Model {model.name!r} has no BatchNormalization layer that can be replaced: the "
            "result is a copy.",
            stacklevel=2,
        )
    ratios = {
        bn: max(epsilon_ratio, _SINGLE_POSITION_RATIO) if _positions(bn) == 1 else epsilon_ratio
        for bn in plan.norms
    }

    def replacement(layer):
        if layer in plan.norms:
            return _frn(layer, ratios[layer], learned_epsilon, layer in plan.centered)
        if layer in plan.tlus:
            return _tlu(layer, plan.tlus[layer])
        return graph.copy_layer(layer, **({"use_bias": True} if layer in plan.biases else {}))

    converted, clones = graph.clone(model, replacement)
    for layer, clone in clones.items():
        if layer in plan.norms:
            _set_closed_form(clone, layer, ratios[layer], layer in plan.centered)
        elif layer in plan.biases:
            kernels = layer.get_weights()[: -1 if layer.use_bias else None]
            bias = np.asarray(layer.bias) if layer.use_bias else 0.0
            clone.set_weights([*kernels, bias - np.asarray(plan.biases[layer].moving_mean)])
        elif layer not in plan.tlus:
            graph.copy_weights(layer, clone)
    graph.copy_trainable(clones)
    frns = {layer: clones[layer] for layer in plan.norms}
    if calibration_data is not None and frns:
        ratios.update(
            _calibrate(model, converted, frns, calibration_data, batch_size, ratios, verbose)
        )
    report = ConversionReport(tuple(plan.entries(ratios)))
    return (converted, report) if return_report else converted


class _Plan:
    """What becomes of each layer, from the graph of calls of the model and the models inside it."""

    def __init__(self, model, replace_activations, restore_biases):
        self.layers = {}  # layer -> True, in the order of the graph
        # Layer -> the layers it reads, and those that read it; None is an input or an output.
        self.sources, self.readers = collections.defaultdict(set), collections.defaultdict(set)
        self._walk(model, set())
        self.norms = dict.fromkeys(
            layer for layer in self.layers if type(layer) is keras.layers.BatchNormalization
        )
        self.tlus, self.biases, self.centered = {}, {}, set()
        for layer in self.layers if replace_activations else ():
            norm = self._norm_before(layer)
            if norm is not None and _is_relu(layer) and self.sources[layer] == {norm}:
                self.tlus[layer] = norm
        for norm in self.norms if restore_biases else ():
            linear = next(iter(self.sources[norm]))
            if (
                self.sources[norm] == {linear}
                and self.readers[linear] == {norm}
                and _has_channel_bias(linear, norm)
            ):
                self.biases[linear] = norm
                self.centered.add(norm)

    def _walk(self, model, seen):
        if model in seen:
            return
        seen.add(model)
        calls, outputs = graph.calls(model)
        for layer, sources in calls:
            self.layers[layer] = True
            for source in sources:
                self.sources[layer].add(source)
                self.readers[source].add(layer)
            if graph.is_graph(layer):
                self._walk(layer, seen)
        for layer in outputs:
            self.readers[layer].add(None)

    def _norm_before(self, layer):
        """A BatchNormalization whose output the layer reads, or None."""
        return next((source for source in self.sources[layer] if source in self.norms), None)

    def entries(self, ratios):
        for layer in self.layers:
            kind, before = type(layer).__name__, self._norm_before(layer)
            if layer in self.norms:
                reason = "FRN" + (
                    ", the mean in a bias before it" if layer in self.centered else ""
                )
                yield Replacement(
                    layer.name,
                    kind,
                    "replaced",
                    reason,
                    _positions(layer),
                    float(np.median(ratios[layer])),
                )
            elif layer in self.tlus:
                yield Replacement(layer.name, kind, "replaced", _TLU)
            elif layer in self.biases:
                yield Replacement(layer.name, kind, "changed", "bias of minus the moving mean")
            elif before is not None and isinstance(layer, _ACTIVATIONS):
                reason = "other layers come before it too" if _is_relu(layer) else "not a ReLU"
                if self.sources[layer] == {before} and _is_relu(layer):
                    reason = "not asked for"
                yield Replacement(layer.name, kind, "kept", reason)
            elif not graph.is_graph(layer) and any(
                "moving_variance" in weight.path for weight in getattr(layer, "weights", ())
            ):
                yield Replacement(
                    layer.name, kind, "kept", "BatchNormalization inside, which no graph shows"
                )


def _frn(bn, ratio, learned_epsilon, centered):
    config = bn.get_config()
    same = ("name", "trainable", "dtype", "axis", "beta_initializer", "gamma_initializer")
    same += ("beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint")
    constant = _CONSTANT_EPSILON
    if not learned_epsilon:
        constant = (_CONSTANT_EPSILON + ratio * _mean_square(bn, centered)).tolist()
    return FilterResponseNormalization.from_config(
        {
            **{key: config[key] for key in same},
            "epsilon": constant,
            "learned_epsilon": learned_epsilon if ratio else False,
        }
    )


def _tlu(activation, bn):
    config = activation.get_config()
    same = {key: config[key] for key in ("name", "trainable", "dtype")}
    return TLU.from_config({**same, "axis": bn.axis})


def _mean_square(bn, centered=False):
    _, _, mean, variance = calibration.scale_and_offset(bn)
    return np.maximum(variance if centered else mean**2 + variance, np.finfo("float32").tiny)


def _set_closed_form(frn, bn, ratio, centered):
    scale, offset, mean, _ = calibration.scale_and_offset(bn)
    mean_square = _mean_square(bn, centered)
    frn.gamma.assign(scale * np.sqrt(mean_square * (1.0 + ratio) + _CONSTANT_EPSILON))
    frn.beta.assign(offset + scale * mean if centered else offset)
    if frn.learned_epsilon is not None:
        frn.learned_epsilon.assign(ratio * mean_square)


def _calibrate(model, converted, frns, data, batch_size, ratios, verbose):
    measured = calibration.calibrate(
        _tapped(model, frns),
        _tapped(converted, frns.values()),
        {frn: (bn, ratios[bn]) for bn, frn in frns.items()},
        data,
        batch_size,
        verbose,
    )
    return {bn: measured[id(frn)] for bn, frn in frns.items() if id(frn) in measured}


def _tapped(model, norms):
    """A copy of the model with taps around these very layers, and their recorder."""
    norms, recorder = set(norms), calibration.Recorder()
    copy, clones = graph.clone(
        model,
        lambda layer: (
            calibration.Tap(layer, recorder) if layer in norms else graph.copy_layer(layer)
        ),
    )
    for layer, clone in clones.items():
        if layer not in norms:
            graph.copy_weights(layer, clone)
    return copy, recorder


def _is_relu(layer):
    if type(layer) is keras.layers.ReLU:
        config = layer.get_config()
        return (
            config["max_value"] is None and not config["negative_slope"] and not config["threshold"]
        )
    return type(layer) is keras.layers.Activation and layer.activation is keras.activations.relu


def _has_channel_bias(layer, bn):
    """Whether a bias of this layer is an offset of the channels of the BatchNormalization."""
    if type(layer) not in _LINEAR or layer.activation is not keras.activations.linear:
        return False
    rank = bn.input_spec.ndim
    first = getattr(layer, "data_format", "channels_last") == "channels_first"
    return bn.axis % rank == (1 if first else rank - 1)


def _positions(layer):
    """The number of spatial positions of a layer's input, or None if it is not fixed."""
    shape = list(layer.get_build_config()["input_shape"])
    del shape[layer.axis], shape[0]
    return None if None in shape else math.prod(shape)


def _check_model(model):
    if not isinstance(model, keras.Model) or not graph.is_graph(model):
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


def _check_arguments(epsilon_ratio, learned_epsilon, batch_size):
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
    if (
        isinstance(batch_size, bool)
        or not isinstance(batch_size, numbers.Integral)
        or batch_size < 1
    ):
        raise ValueError(
            f"`batch_size` must be an int of 1 or more. Received: batch_size={batch_size!r}. It "
            "bounds the memory and does not change the result."
        )
