"""Biases that make up for what rounding changes in the mean."""

import collections
import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..samples import Samples
from ..typing import Array
from . import flatbuffer
from .ranges import LEAST_SPAN, Range, find_largest, find_products
from .runtime import LiteRT

__all__ = ["correct_biases"]


def correct_biases(
    content: bytes, runtime: LiteRT, samples: Samples, ranges: Mapping[str, Range]
) -> bytes:
    """Returns the float file with the mean effect of rounding inputs and filters taken out of the
    biases.

    Many positions of a channel are exactly at tau, and all are rounded by the same amount, which no
    sum over positions averages out, and which the next normalization amplifies.
    """
    model = flatbuffer.read(content)
    graph = model.subgraphs[0]  # the others are the branches of conditions
    interpreter, tensors = runtime.interpreter, runtime.list_tensors()
    # A transposed convolution does not add all of its taps at each position. Filters that have a
    # range are tiny beside their bias, and close to zero in integers.
    products = [
        product
        for product in find_products(runtime)
        if product.operator != "TRANSPOSE_CONV"
        and product.bias >= 0
        and tensors[product.filters]["name"] not in ranges
    ]
    readers = collections.Counter(int(i) for op in graph.operators for i in op.inputs)
    # Of each input: the sums of its channels, exact and rounded, and the number of positions.
    sums: dict[int, Any] = {p.input: np.zeros((2, tensors[p.input]["shape"][-1])) for p in products}
    counts = dict.fromkeys(sums, 0)
    for _ in runtime.run_each(samples):
        for x in sums:
            values = interpreter.get_tensor(x).astype("float64")
            low, high = (ranges[tensors[x]["name"]][end].item() for end in ("min", "max"))
            step = max(high - low, LEAST_SPAN) / 255
            zero = np.round(low / step)
            rounded = np.clip(np.round(values / step), zero, zero + 255) * step
            pair = np.stack([values, rounded]).reshape(2, -1, values.shape[-1])
            sums[x], counts[x] = sums[x] + pair.sum(1), counts[x] + pair.shape[1]
    for product in products:
        weights = interpreter.get_tensor(product.filters)
        step = np.maximum(find_largest(weights, product.operator), LEAST_SPAN) / 127
        exact, rounded = sums[product.input] / counts[product.input]
        shift = _sum_taps(product.operator, np.round(weights / step) * step, rounded)
        shift = shift - _sum_taps(product.operator, weights, exact)
        corrected = interpreter.get_tensor(product.bias) - shift.astype("float32")
        tensor = graph.tensors[product.bias]
        # Convolutions without a bias share one constant. The last of them takes it over.
        readers[product.bias] -= 1
        if readers[product.bias]:
            tensor = copy.copy(tensor)
            graph.tensors.append(tensor)
            inputs = [product.input, product.filters, len(graph.tensors) - 1]
            graph.operators[product.number].inputs = inputs
        # Of the output, as a layer that is called twice has its filters but once.
        tensor.name = f"{tensors[product.output]['name']}/bias"
        tensor.buffer = flatbuffer.add_buffer(model, corrected)
    return flatbuffer.write(model)


def _sum_taps(operator: str, weights: Array, channels: Array) -> Array:
    """What an operator gives at each position if its input is constant, without the bias."""
    if operator == "DEPTHWISE_CONV_2D":
        return weights.sum((0, 1, 2)) * np.repeat(channels, weights.shape[-1] // channels.size)
    groups = channels.size // weights.shape[-1]
    taps = weights.reshape(groups, len(weights) // groups, -1, weights.shape[-1]).sum(2)
    return np.einsum("goi,gi->go", taps, channels.reshape(groups, -1)).ravel()
