"""The ranges of activations that ai-edge-quantizer quantizes by."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..samples import Samples
from ..typing import Array
from .runtime import LiteRT, find_upstream

__all__ = ["LEAST_SPAN", "Product", "Range", "find_largest", "find_products", "measure_ranges"]

# The fraction of a tensor's values that saturate on either side, and the bins that find it.
_RARE, _BINS = 2e-4, 4096
# LiteRT's RSQRT of 16 bits interpolates in a table of its range: all but the first share of what it
# reads shall be above the second share of that.
_LEAST, _RESOLVED = 0.01, 1 / 16
# What the names of operators contain that add up several positions or channels.
_MIXING = ("CONV", "FULLY_CONNECTED", "MATMUL", "MEAN", "SUM", "POOL")
# The axis of the channels in the filters of the operators that add a bias.
_CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}
# The most steps of a bias, which are those of the input times those of the filter. An eighth of the
# largest integer, and few enough for the widest filter to stay at zero.
_BIAS_STEPS = 2.0**28
# The largest step of a product's input as a multiple of its output's range, which is 255 steps of
# 256, with a margin.
_LARGEST_STEP = 255.0
# A sum or difference with a range below this share of its inputs' is their rounding in float32.
_ROUNDINGS = 2.0**-22
# The least range of the quantizer.
LEAST_SPAN = 1e-9

Range = dict[str, Array]
Limits = dict[int, tuple[Any, Any]]  # the least and the largest number of each tensor


def measure_ranges(
    runtime: LiteRT, samples: Samples, headroom: float = 1.0, bits: int = 8
) -> dict[str, Range]:
    """Returns the range of each float tensor that is computed, by name, as the quantizer wants it.

    Saturating the rarest values of a full-size tensor makes the steps of the others finer. On two
    networks that halved the error of the logits, with 1e-4 as with 3e-4 of the values on either
    side; 3e-5 and 1e-3 were worse. Inputs keep their range, and so do outputs, what they are
    computed from position by position, and what no normalization follows: the peaks of a detector's
    output are rare, and what matters. A constant has its own range, channel by channel, but for
    filters that are tiny beside their bias.

    With a `headroom` above 1 nothing saturates, and each range is as many times wider than on the
    samples, which other inputs exceed. The input of RSQRT gets what that resolves.
    """
    limits: Limits = {}
    for i, values in _each_tensor(runtime, samples, runtime.list_computed()):
        # With zero, as the quantizer does; in float64, which divides any range of float32.
        low, high = limits.get(i, (0.0, 0.0))
        limits[i] = np.float64(values.min(initial=low)), np.float64(values.max(initial=high))
    if headroom > 1:
        limits = _widen(runtime, samples, limits, headroom)
    else:
        limits |= _saturate(runtime, samples, limits)
    # Zeros, as of a ReLU that no sample wakes up, have the range of what they are computed from. In
    # an ELU of positive numbers they are roundings, with steps so small as to end the process of
    # TensorFlow Lite Micro.
    for operator in runtime.list_operators():
        span = max((np.ptp(limits[i]) for i in operator["inputs"] if i in limits), default=0)
        zero = _ROUNDINGS * span if operator["op_name"] in ("ADD", "SUB") else 0
        for i in operator["outputs"]:
            if i in limits and np.ptp(limits[i]) <= zero:
                limits[i] = np.float64(0), np.float64(span)
    tensors, largest = runtime.list_tensors(), np.finfo("f4").max
    ranges: dict[str, Range] = {}
    for i, ends in limits.items():
        # Of the tensor's rank, as the quantizer wants them.
        shape = (1,) * len(tensors[i]["shape"])
        low, high = np.clip(ends, -largest, largest).astype("f4").reshape(2, *shape)
        ranges[tensors[i]["name"]] = {"min": low, "max": high}
    return ranges | _widen_products(runtime, ranges, bits)


def _each_tensor(
    runtime: LiteRT, samples: Samples, chosen: Collection[int]
) -> Iterator[tuple[int, Array]]:
    """The finite numbers of float tensors, some samples at a time."""
    for _ in runtime.run_each(samples):
        for i, tensor in runtime.list_tensors().items():
            if tensor["dtype"] == np.float32 and i in chosen:
                values = runtime.interpreter.get_tensor(i)
                # An infinity, as in the mask of an attention, is beyond any range. In a constant,
                # as the padding of a maximum, TensorFlow's converter has the largest number for it.
                is_finite = np.abs(values) < np.finfo("f4").max
                yield i, values if is_finite.all() else values[is_finite]


def _widen(runtime: LiteRT, samples: Samples, limits: Limits, headroom: float) -> Limits:
    """The limits as many times further apart, as far as RSQRT resolves what it reads."""
    roots = _find_roots(runtime.list_operators())
    read = {i for root in roots for i in root["inputs"]} & limits.keys()
    factors = dict.fromkeys(limits, headroom)
    for i, count in _count(runtime, samples, read, limits).items():
        least = np.searchsorted(np.cumsum(count), _LEAST * count.sum()) / _BINS
        factors[i] = np.clip(least / _RESOLVED, 1, headroom)
    # The table has the end of the range for zero, and so makes what is next to it too large.
    factors |= {i: 1.0 for root in roots for i in root["outputs"]}
    return {i: (factors[i] * low, factors[i] * high) for i, (low, high) in limits.items()}


def _saturate(runtime: LiteRT, samples: Samples, limits: Limits) -> Limits:
    """The limits without the rarest values, of the full-size tensors before normalizations."""
    operators, tensors = runtime.list_operators(), runtime.list_tensors()
    roots = [i for root in _find_roots(operators) for i in root["inputs"]]
    before = {i for n in find_upstream(operators, roots) for i in operators[n]["outputs"]}
    outputs = {detail["index"] for detail in runtime.interpreter.get_output_details()}
    full_size = {i for i, tensor in tensors.items() if np.prod(tensor["shape"][1:-1]) > 1}
    saturating = (before & full_size) - _find_outputs(operators, outputs)
    counts = _count(runtime, samples, saturating, limits)
    return {i: _clip(count, *limits[i]) for i, count in counts.items()}


def _count(
    runtime: LiteRT, samples: Samples, chosen: Collection[int], limits: Limits
) -> dict[int, Array]:
    """Histograms of tensors between their limits."""
    counts: dict[int, Array] = {}
    for i, values in _each_tensor(runtime, samples, chosen):
        counts[i] = counts.get(i, 0) + np.histogram(values, _BINS, limits[i])[0]
    return counts


class Product(NamedTuple):
    """An operator with constant filters: its number, its name, and its tensors; -1 for no bias."""

    number: int
    operator: str
    input: int
    output: int
    filters: int
    bias: int


def find_products(runtime: LiteRT) -> Iterator[Product]:
    """The operators whose filters are constants, and their bias if they have one."""
    tensors, computed = runtime.list_tensors(), runtime.list_computed()
    for number, op in enumerate(runtime.list_operators()):
        read = [i for i in op["inputs"] if i in tensors and tensors[i]["dtype"] is np.float32]
        constant = [i for i in read if i not in computed]
        if op["op_name"] not in _CHANNELS or len(read) != len(constant) + 1 or not constant:
            continue
        (given,) = set(read) - set(constant)
        # A transposed convolution reads the sizes of its output and its filters first.
        if read.index(given) == (op["op_name"] == "TRANSPOSE_CONV"):
            filters, bias = (*constant, -1)[:2]
            yield Product(number, op["op_name"], given, op["outputs"][0], filters, bias)


def find_largest(filters: Array, operator: str) -> Array:
    """The largest absolute weight of each output channel, of the rank of the filters."""
    others = tuple(i for i in range(filters.ndim) if i != _CHANNELS[operator])
    return np.abs(filters).max(others, keepdims=True)


def _widen_products(runtime: LiteRT, ranges: Mapping[str, Range], bits: int) -> dict[str, Range]:
    """The ranges of the filters and outputs of products that are too narrow for integers.

    Filters have too small a step of their own if their bias would have too many. Outputs are too
    narrow if one step of the input may leave them: XNNPACK takes no larger steps, and does not
    survive them in a depthwise convolution.
    """
    names = {i: tensor["name"] for i, tensor in runtime.list_tensors().items()}
    widened = {}
    for product in find_products(runtime):
        filters = runtime.interpreter.get_tensor(product.filters)
        largest = find_largest(filters, product.operator)
        bias = np.zeros(largest.size)
        if product.bias >= 0:
            bias = runtime.interpreter.get_tensor(product.bias)
        span, width = (
            max(np.ptp([*ranges[names[i]].values()]), LEAST_SPAN)
            for i in (product.input, product.output)
        )
        least = 127 * (2**bits - 1) * np.abs(bias) / (_BIAS_STEPS * span)
        bound = np.maximum(largest, least.reshape(largest.shape)).astype("f4")
        if np.any(bound > largest):
            widened[names[product.filters]] = {"min": -bound, "max": bound}
        narrowest = np.float32(span / 127 * bound.max()) / _LARGEST_STEP
        if width < narrowest:
            low = ranges[names[product.output]]["min"] * narrowest / width
            widened[names[product.output]] = {"min": low, "max": low + narrowest}
    return widened


def _clip(counts: Array, low: float, high: float) -> tuple[float, float]:
    """The range without the rarest values, from a histogram of the whole range."""
    if not counts.any():  # all of them infinite
        return low, high
    fraction = np.cumsum(counts) / np.sum(counts)
    edges = np.linspace(low, high, _BINS + 1)
    least = float(edges[np.searchsorted(fraction, _RARE)])
    most = float(edges[np.searchsorted(fraction, 1 - _RARE) + 1])
    # The peaks of a sparse tensor are what it is about.
    return (least, most) if most - least > (high - low) / 256 else (low, high)


def _find_roots(operators: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The reciprocal square roots, which normalizations have."""
    return [op for op in operators if op["op_name"] == "RSQRT"]


def _find_outputs(operators: Sequence[Mapping[str, Any]], outputs: set[int]) -> set[int]:
    """The outputs, and what they are computed from position by position."""
    for op in reversed(operators):
        if outputs & set(op["outputs"]) and not any(name in op["op_name"] for name in _MIXING):
            outputs |= set(op["inputs"])
    return outputs
