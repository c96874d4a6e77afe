"""Whether data look like what a model was made for."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from . import graph

__all__ = ["find_doubts"]

# Layers at a model's inputs that show what inputs it was made for: after them the standard
# deviation is about one, and 255 times that for images that were not divided by 255.
_SCALING = (
    keras.layers.Normalization,
    keras.layers.Rescaling,
    keras.layers.BatchNormalization,
)
_LEAST, _MOST = 0.02, 20


def find_doubts(
    model: keras.Model, batches: Iterable[list[Any]], ranges: Sequence[tuple[Any, Any]]
) -> Iterator[str]:
    """Sentences about inputs that are the same everywhere, or not what the first layers expect.

    `ranges` has the least and the largest value of each input; the name of the data is left out of
    the sentences.
    """
    for i, (low, high) in enumerate(ranges):
        if float(high) - float(low) <= 1e-3 * max(abs(float(low)), abs(float(high))):
            yield (
                f"hardly varies: input {i} is from {low:.6g} to {high:.6g}. Pass inputs like those "
                "at inference."
            )
    if not ranges or not graph.is_graph(model):
        return
    wiring = graph.Wiring(model)
    for call in wiring.calls:
        if type(call.layer) not in _SCALING or call.inputs[0] not in wiring.inputs:
            continue
        i = wiring.inputs.index(call.inputs[0])
        outputs = [keras.ops.convert_to_numpy(call.layer(batch[i])) for batch in batches]
        mean = np.mean([np.mean(y, dtype="float64") for y in outputs])
        deviation = np.sqrt(np.mean([np.mean((y - mean) ** 2) for y in outputs]))
        if abs(mean) > _MOST or not _LEAST < deviation < _MOST:
            low, high = ranges[i]
            yield (
                f"is from {low:.6g} to {high:.6g} in input {i}, which {call.layer.name} was not "
                f"made for: its output has mean {mean:.3g} and standard deviation {deviation:.3g}. "
                "Prepare it as for `model.predict`."
            )
