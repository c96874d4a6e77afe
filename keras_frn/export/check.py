"""Whether a file computes what the model computes."""

import bisect
import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from .. import graph
from ..samples import Samples
from ..typing import Array, Batch
from .converters import ConversionError
from .presets import PRESETS, Preset
from .runtime import LiteRTError

__all__ = ["Comparison", "check_outputs", "compare", "find_bound"]

# How far models in half precision may be from a float32 file: the roundings are theirs.
_HALF_BOUND = 0.05


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far the outputs of a file are from the model's.

    Attributes:
        max_error: Largest absolute difference, or None if there was nothing to compare. That of an
            output of integers is the fraction of them that differ.
        fraction: The same as a fraction of the range of the output and zero.
        agreement: Fraction of positions with the same argmax, if outputs have several numbers, or
            with the same integer.
    """

    max_error: float | None
    fraction: float
    agreement: float | None


def compare(
    model: keras.Model, function: Callable[..., Batch], specs: Any, samples: Samples
) -> Comparison:
    """Compares the outputs of a file, or of another function, with the model's."""
    errors: dict[int, float] = {}
    lows: dict[int, float] = {}
    highs: dict[int, float] = {}
    same = positions = 0
    differing: collections.Counter[int] = collections.Counter()
    sizes: collections.Counter[int] = collections.Counter()
    for batch in _choose_batches(model, specs, samples):
        for i, (actual, expected) in enumerate(zip(function(*batch), _run(model, specs, batch))):
            if expected.dtype.kind in "biu":  # classes: how many differ, and not by how much
                equal = actual == expected
                same, positions = same + int(equal.sum()), positions + equal.size
                differing[i] += equal.size - int(equal.sum())
                sizes[i] += equal.size
                errors[i], highs[i], lows[i] = differing[i] / sizes[i], 1.0, 0.0
                continue
            is_same = (actual == expected) | np.isnan(actual) & np.isnan(expected)
            with np.errstate(invalid="ignore"):
                error = np.where(is_same, 0, np.nan_to_num(np.abs(actual - expected), nan=np.inf))
            finite = expected[np.isfinite(expected)]
            errors[i] = max(errors.get(i, 0.0), float(error.max(initial=0)))
            lows[i] = min(lows.get(i, 0.0), float(finite.min(initial=0)))
            highs[i] = max(highs.get(i, 0.0), float(finite.max(initial=0)))
            if expected.ndim > 1 and expected.shape[-1] > 1:
                equal = actual.argmax(-1) == expected.argmax(-1)
                same, positions = same + int(equal.sum()), positions + equal.size
    ranges = {i: highs[i] - lows[i] or float(np.finfo("f4").tiny) for i in errors}
    return Comparison(
        max_error=max(errors.values(), default=None),
        fraction=max((errors[i] / ranges[i] for i in errors), default=0.0),
        agreement=same / positions if positions else None,
    )


def _choose_batches(model: keras.Model, specs: Any, samples: Samples) -> Iterable[Batch]:
    """The inputs to compare on: the samples, or random ones that the model runs on."""
    import tensorflow as tf

    if samples.count:
        return samples
    rng, arrays = np.random.default_rng(0), []
    # Not every model takes 32 for each unknown size.
    with contextlib.suppress(ValueError, TypeError, RuntimeError, tf.errors.OpError):
        for spec in keras.tree.flatten(specs):
            shape = (spec.shape[0] or 2, *(size or 32 for size in spec.shape[1:]))
            is_float = spec.dtype == "float32"
            values = rng.normal(size=shape) if is_float else rng.integers(0, 2, shape)
            arrays.append(values.astype(spec.dtype))
        _run(model, specs, arrays)
        return [arrays]
    return []


def _run(model: keras.Model, specs: Any, arrays: Batch) -> Batch:
    outputs = model(*keras.tree.pack_sequence_as(specs, arrays), training=False)
    found = [np.asarray(output) for output in keras.tree.flatten(outputs)]
    return [x if x.dtype.kind in "biu" else x.astype("float32") for x in found]


def find_bound(model: keras.Model, quantization: Preset | None) -> float:
    """How far outputs may be off, as a fraction of their range and zero."""
    return max(PRESETS[quantization].bound, _HALF_BOUND if _is_half(model) else 0)


def _is_half(model: keras.Model) -> bool:
    dtypes = {layer.compute_dtype for layer in (model, *graph.list_layers(model))}
    return bool(dtypes & {"float16", "bfloat16"})


def check_outputs(
    model: keras.Model,
    specs: Any,
    samples: Samples,
    quantization: Preset | None,
    fraction: float,
    write_part: Callable[[keras.Model], Callable[..., Batch]],
) -> list[str]:
    """Warns of outputs beyond the preset's bound. A float32 file of them is refused.

    `write_part` exports a part of the model in float32, and returns a function that runs it.
    """
    bound = find_bound(model, quantization)
    # Samples that are not compared may be off by more, 1.4 times in a random model: a warning comes
    # at half of the bound.
    if fraction <= bound / 2:
        return []
    text = (
        f"the outputs differ from the model's by up to {fraction:.2g} of their range, and "
        f"{quantization or 'float32'} should stay within {bound:g} on any sample."
    )
    if quantization is not None or _is_half(model):
        return [text]
    if fraction < 10 * _measure_roundings(model, specs, samples):
        return [
            f"{text} The model amplifies roundings: changed in the sixth digit, its weights give "
            "such differences in any runtime. A normalization of one position should learn epsilon."
        ]
    if fraction <= bound:
        return []
    name = _find_first_wrong(model, specs, samples, bound, write_part)
    raise ValueError(
        f"`model` must become a file that computes the same. Received: {model.name}; {text} "
        + (f"The first layer to differ is {name}. " if name else "")
        + "Replace layers that LiteRT computes in another way."
    )


def _measure_roundings(model: keras.Model, specs: Any, samples: Samples) -> float:
    """How far outputs move when weights and inputs change by a millionth."""
    rng = np.random.default_rng(0)

    def change(array: Array) -> Array:
        if not keras.backend.is_float_dtype(str(array.dtype)):
            return array
        return array * np.asarray(1 + 1e-6 * rng.uniform(-1, 1, array.shape), array.dtype)

    weights = [(w, keras.ops.convert_to_tensor(change(w.value.numpy()))) for w in model.variables]

    def run_changed(*arrays: Array) -> Batch:
        with keras.StatelessScope(weights):
            return _run(model, specs, [change(array) for array in arrays])

    return compare(model, run_changed, specs, samples).fraction


def _find_first_wrong(
    model: keras.Model,
    specs: Any,
    samples: Samples,
    bound: float,
    write_part: Callable[[keras.Model], Callable[..., Batch]],
) -> str | None:
    """The name of the first layer that a file computes wrongly, found by halving, or None."""
    layers = [x for x in model.layers if not isinstance(x, keras.layers.InputLayer)]

    def is_wrong(count: int) -> bool:
        outputs = [layer.output for layer in layers[:count]]
        part = keras.Model(graph.inputs_like(model, model.inputs), outputs)
        return compare(part, write_part(part), specs, samples).fraction > bound

    # A subclassed model has no outputs of layers, and not every layer becomes a file.
    with contextlib.suppress(AttributeError, ValueError, IndexError, ConversionError, LiteRTError):
        counts = range(1, len(layers) + 1)
        return str(layers[bisect.bisect_left(counts, True, key=is_wrong)].name)
    return None
