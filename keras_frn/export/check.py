"""Whether a file computes what the model computes."""

import bisect
import contextlib

import keras
import numpy as np

from .. import graph
from .quantization import PRESETS, convert
from .runtime import LiteRT

# How far models in half precision may be from a float32 file: the roundings are theirs.
_HALF_BOUND = 0.05


def _batches(model, specs, samples):
    """The inputs to compare on: the samples, or random ones that the model runs on."""
    if samples.count:
        return samples
    rng, arrays = np.random.default_rng(0), []
    with contextlib.suppress(Exception):  # not every model takes 32 for each unknown size
        for spec in keras.tree.flatten(specs):
            shape = (spec.shape[0] or 2, *(size or 32 for size in spec.shape[1:]))
            is_float = spec.dtype == "float32"
            values = rng.normal(size=shape) if is_float else rng.integers(0, 2, shape)
            arrays.append(values.astype(spec.dtype))
        _outputs(model, specs, arrays)
        return [arrays]
    return []


def _outputs(model, specs, arrays):
    outputs = model(*keras.tree.pack_sequence_as(specs, arrays), training=False)
    return [np.asarray(output, "float32") for output in keras.tree.flatten(outputs)]


def compared(model, function, specs, samples):
    """What the report says of the outputs of a file or another function, and `share`, their largest
    difference from the model's as a share of the range of an output and zero.
    """
    errors, lows, highs = {}, {}, {}
    same = positions = 0
    for batch in _batches(model, specs, samples):
        for i, (actual, expected) in enumerate(
            zip(function(*batch), _outputs(model, specs, batch))
        ):
            with np.errstate(invalid="ignore"):
                error = np.nan_to_num(np.abs(actual - expected), nan=np.inf)
            error[(actual == expected) | np.isnan(actual) & np.isnan(expected)] = 0
            finite = expected[np.isfinite(expected)]
            errors[i] = max(errors.get(i, 0.0), float(error.max(initial=0)))
            lows[i] = min(lows.get(i, 0.0), float(finite.min(initial=0)))
            highs[i] = max(highs.get(i, 0.0), float(finite.max(initial=0)))
            if expected.ndim > 1 and expected.shape[-1] > 1:
                equal = actual.argmax(-1) == expected.argmax(-1)
                same, positions = same + int(equal.sum()), positions + equal.size
    ranges = {i: highs[i] - lows[i] or np.finfo("f4").tiny for i in errors}
    return {
        "max_error": max(errors.values(), default=None),
        "agreement": same / positions if positions else None,
        "share": max((errors[i] / ranges[i] for i in errors), default=0.0),
    }


def doubts(model, specs, samples, quantization, share):
    """Warnings about outputs beyond the preset's bound. A float32 file of them is refused."""
    dtypes = {layer.compute_dtype for layer in (model, *graph.layers(model))}
    is_half = bool(dtypes & {"float16", "bfloat16"})
    bound = max(PRESETS[quantization].bound, _HALF_BOUND if is_half else 0)
    # Samples that are not compared may be off by more, 1.4 times in a random model: a warning comes
    # at half of the bound.
    if share <= (bound if quantization is None else bound / 2):
        return []
    text = (
        f"the outputs differ from the model's by up to {share:.2g} of their range, and "
        f"{quantization or 'float32'} should stay within {bound:g} on any sample."
    )
    if quantization is not None or is_half:
        return [text]
    if share < 10 * _share_of_roundings(model, specs, samples):
        return [
            f"{text} The model amplifies roundings: changed in the sixth digit, its weights give "
            "such differences in any runtime. A normalization of one position should learn epsilon."
        ]
    name = _first_wrong(model, specs, samples, bound)
    raise ValueError(
        f"`model` must become a file that computes the same. Received: {model.name}; {text} "
        + (f"The first layer to differ is {name}. " if name else "")
        + "Replace layers that LiteRT computes in another way."
    )


def _share_of_roundings(model, specs, samples):
    """How far outputs move where weights and inputs change by a millionth."""
    rng = np.random.default_rng(0)

    def changed(array):
        if not keras.backend.is_float_dtype(str(array.dtype)):
            return array
        return array * (1 + 1e-6 * rng.uniform(-1, 1, array.shape)).astype(array.dtype)

    weights = [(w, keras.ops.convert_to_tensor(changed(w.value.numpy()))) for w in model.variables]

    def function(*arrays):
        with keras.StatelessScope(weights):
            return _outputs(model, specs, [changed(array) for array in arrays])

    return compared(model, function, specs, samples)["share"]


def _first_wrong(model, specs, samples, bound):
    """The name of the first layer that a file computes wrongly, found by halving, or None."""
    layers = [x for x in model.layers if not isinstance(x, keras.layers.InputLayer)]

    def is_wrong(count):
        outputs = [layer.output for layer in layers[:count]]
        part = keras.Model(graph.inputs_like(model, model.inputs), outputs)
        content, _ = convert(part, PRESETS[None], specs, samples, False)
        runtime = LiteRT(content, [spec.name for spec in keras.tree.flatten(specs)])
        return compared(part, runtime, specs, samples)["share"] > bound

    # A subclassed model has no outputs of layers, and not every layer is one in LiteRT.
    with contextlib.suppress(Exception):
        counts = range(1, len(layers) + 1)
        return layers[bisect.bisect_left(counts, True, key=is_wrong)].name
