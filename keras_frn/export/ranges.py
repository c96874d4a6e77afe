"""The ranges of activations that ai-edge-quantizer quantizes by."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..samples import Samples
from ..typing import Array
from .runtime import LiteRT, find_upstream

__all__ = ["CHANNELS", "LEAST_SPAN", "Product", "Range", "find_products", "measure_ranges"]

# The fraction of a tensor's values that saturate on either side, and the bins that find it.
_RARE, _BINS = 2e-4, 4096
# LiteRT's RSQRT of 16 bits interpolates in a table of its range: all but the first share of what it
# reads shall be above the second share of that.
_LEAST, _RESOLVED = 0.01, 1 / 16
# What the names of operators contain that add up several positions or channels.
_MIXING = ("CONV", "FULLY_CONNECTED", "MATMUL", "MEAN", "SUM", "POOL")
# The axis of the channels in the filters of the operators that add a bias.
CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 0, "TRANSPOSE_CONV": 0}
# The most steps of a bias, which are those of the input times those of the filter. An eighth of the
# largest integer, and few enough for the widest filter to stay at zero.
_BIAS_STEPS = 2.0**28
# The largest step of a product's input as a multiple of its output's range, which is 255 steps of
# 256, with a margin.
_LARGEST_STEP = 255.0
# The least range of the quantizer.
LEAST_SPAN = 1e-9

Range = dict[str, Array]
Limits = dict[int, tuple[Any, Any]]  # the least and the largest number of each tensor


def measure_ranges(runtime: LiteRT, samples: Samples, headroom: float = 1.0) -> dict[str, Range]:
    """Returns the range of each float tensor that is computed, by name, as the quantizer wants it.

    Saturating the rarest values of a full-size tensor makes the steps of the others finer. On two
    networks that halved the error of the logits, with 1e-4 as with 3e-4 of the values on either
    side; 3e-5 and 1e-3 were worse. Inputs keep their range, and so do outputs, what
    they are computed from position by position, and what no normalization follows: the peaks of a
    detector's output are rare, and what matters. A constant
    has its own range, channel by channel, but for filters that are tiny beside their bias.

    With a `headroom` above 1 nothing saturates, and each range is as many times wider than on the
    samples, which other inputs exceed. The input of RSQRT gets what that resolves.
    """
    operators, interpreter = runtime.list_operators(), runtime.interpreter
    computed = {i for operator in operators for i in operator["outputs"]}
    computed |= {detail["index"] for detail in interpreter.get_input_details()}
    limits: Limits = {}
    for i, values in _each_tensor(runtime, samples, computed):
        # With zero, as the quantizer does; in float64, which divides any range of float32.
        low, high = limits.get(i, (0.0, 0.0))
        limits[i] = np.float64(values.min(initial=low)), np.float64(values.max(initial=high))
    if headroom > 1:
        limits = _widen(runtime, samples, limits, headroom)
    else:
        limits |= _saturate(runtime, samples, limits)
    details = {detail["index"]: detail for detail in interpreter.get_tensor_details()}
    ranges: dict[str, Range] = {}
    largest = np.finfo("f4").max
    for i, (low, high) in limits.items():
        # Of the tensor's rank, as the quantizer wants them.
        shape = (1,) * len(details[i]["shape"])
        low, high = np.clip([low, high], -largest, largest)
        ends = {"min": np.full(shape, low, "f4"), "max": np.full(shape, high, "f4")}
        ranges[details[i]["name"]] = ends
    filters = _widen_filters(runtime, ranges)
    return ranges | filters | _widen_outputs(runtime, ranges, filters)


def _each_tensor(
    runtime: LiteRT, samples: Samples, chosen: Collection[int]
) -> Iterator[tuple[int, Array]]:
    """The finite numbers of float tensors, batch by batch."""
    for batch in samples:
        runtime(*batch)
        for detail in runtime.interpreter.get_tensor_details():
            if detail["dtype"] == np.float32 and detail["index"] in chosen:
                values = runtime.interpreter.get_tensor(detail["index"])
                # An infinity, as in the mask of an attention, is beyond any range. In a constant,
                # as the padding of a maximum, TensorFlow's converter has the largest number for it.
                is_finite = np.abs(values) < np.finfo("f4").max
                yield detail["index"], values if is_finite.all() else values[is_finite]


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
    operators, details = runtime.list_operators(), runtime.interpreter.get_tensor_details()
    outputs = {detail["index"] for detail in runtime.interpreter.get_output_details()}
    full_size = {d["index"] for d in details if np.prod(d["shape"][1:-1]) > 1}
    saturating = _find_before_normalizations(operators) - _find_outputs(operators, outputs)
    counts = _count(runtime, samples, saturating & full_size, limits)
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
    """An operator with filters and a bias: its number, its name, and the tensors that it reads."""

    number: int
    operator: str
    input: int
    filters: int
    bias: int


def find_products(runtime: LiteRT, ranges: Mapping[str, Range]) -> Iterator[Product]:
    """The operators whose filters and bias are constants; `ranges` has the computed tensors."""
    details = {d["index"]: d for d in runtime.interpreter.get_tensor_details()}
    for number, op in enumerate(runtime.list_operators()):
        read = [i for i in op["inputs"] if i in details and details[i]["dtype"] is np.float32]
        constant = [i for i in read if details[i]["name"] not in ranges]
        if op["op_name"] not in CHANNELS or len(read) != 3 or len(constant) != 2:
            continue
        (given,) = set(read) - set(constant)
        # A transposed convolution reads the sizes of its output and its filters first.
        if read.index(given) == (op["op_name"] == "TRANSPOSE_CONV"):
            yield Product(number, op["op_name"], given, *constant)


def _widen_filters(runtime: LiteRT, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges of filters whose own steps are so small that their bias has too many."""
    details = {d["index"]: d for d in runtime.interpreter.get_tensor_details()}
    widened = {}
    for product in find_products(runtime, ranges):
        filters, bias = map(runtime.interpreter.get_tensor, (product.filters, product.bias))
        others = tuple(i for i in range(filters.ndim) if i != CHANNELS[product.operator])
        largest = np.abs(filters).max(others, keepdims=True)
        span = np.ptp([*ranges[details[product.input]["name"]].values()])
        least = 127 * 255 * np.abs(bias) / (_BIAS_STEPS * max(span, LEAST_SPAN))
        if np.any(least.reshape(largest.shape) > largest):
            bound = np.maximum(largest, least.reshape(largest.shape)).astype("f4")
            widened[details[product.filters]["name"]] = {"min": -bound, "max": bound}
    return widened


def _widen_outputs(
    runtime: LiteRT, ranges: Mapping[str, Range], filters: Mapping[str, Range]
) -> dict[str, Range]:
    """The ranges of outputs so narrow that one step of the input may leave them.

    XNNPACK takes no larger steps, and does not survive them in a depthwise convolution.
    """
    details = {d["index"]: d for d in runtime.interpreter.get_tensor_details()}
    operators = runtime.list_operators()
    widened = {}
    for product in find_products(runtime, ranges):
        weights = runtime.interpreter.get_tensor(product.filters)
        weights = filters.get(details[product.filters]["name"], {"max": weights})["max"]
        span = np.ptp([*ranges[details[product.input]["name"]].values()])
        step = np.float32(span / 127 * np.abs(weights).max())
        name = details[operators[product.number]["outputs"][0]]["name"]
        low, width = ranges[name]["min"], max(np.ptp([*ranges[name].values()]), LEAST_SPAN)
        least = step / _LARGEST_STEP
        if width < least:
            low = low * least / width
            widened[name] = {"min": low, "max": low + least}
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


def _find_before_normalizations(operators: Sequence[Mapping[str, Any]]) -> set[int]:
    """The computed tensors that a reciprocal square root depends on."""
    roots = [i for root in _find_roots(operators) for i in root["inputs"]]
    return {output for i in find_upstream(operators, roots) for output in operators[i]["outputs"]}


def _find_outputs(operators: Sequence[Mapping[str, Any]], outputs: set[int]) -> set[int]:
    """The outputs, and what they are computed from position by position."""
    for op in reversed(operators):
        if outputs & set(op["outputs"]) and not any(name in op["op_name"] for name in _MIXING):
            outputs |= set(op["inputs"])
    return outputs
