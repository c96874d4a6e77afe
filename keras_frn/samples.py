"""Calibration data of every kind as batches, for every tool that takes it."""

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from . import graph
from .data_checks import find_doubts
from .errors import ArgumentError, ArgumentWarning, format_count
from .typing import CalibrationData

__all__ = ["BATCH_SIZE", "MAX_SAMPLES", "Samples"]

# More samples than these are not read.
MAX_SAMPLES = 2048
# One batch of this size is in memory at a time, or of fewer samples if they have more numbers: what
# a network keeps of them is some hundred times as large.
BATCH_SIZE, _MOST_NUMBERS = 32, 2**21


class Samples:
    """Calibration data as batches, each a list of arrays in the order of the model's inputs.

    It can be iterated repeatedly. An array is read batch by batch; what comes from an iterable
    is kept. `count` is the number of samples, and `ranges` has a pair of the least and the largest
    value of each input. `fixed_size` is the batch size of a model that has one.

    Args:
        model: The model that the data are for.
        data: An array, or anything with a shape that can be sliced; a list, tuple or dict of
            arrays, one for each input; a tuple `(inputs, targets)`; a `tf.data.Dataset`,
            `keras.utils.PyDataset` or another iterable of batches or single samples, each the
            inputs or `(inputs, targets)`; or a function that returns such an iterable. It is what
            `predict` takes: a `preprocessor` of the model is applied. None is no data.
        specs: A `keras.InputSpec` for each input, whose shapes the data must have. Defaults to
            the model's own inputs.
        least: The number of different samples below which a warning says that they are few.
            Defaults to 1.
        argument: What the caller's user calls the data, for errors and warnings. Defaults to
            `"calibration_data"`.

    Raises:
        ValueError: if the model is not built, or if the data are empty, not finite or do not fit
            its inputs.
    """

    def __init__(
        self,
        model: keras.Model,
        data: CalibrationData | None,
        specs: Sequence[keras.InputSpec] = (),
        least: int = 1,
        *,
        argument: str = "calibration_data",
    ) -> None:
        graph.check_built(model)
        self._argument, self._model = argument, model
        self._nested = _nest_specs(model)
        told = [] if self._nested is None else keras.tree.flatten(self._nested)
        self._inputs: list[Any] = list(specs) or told
        # The model's own, as a file may have others.
        self._names = [tensor.name for tensor in told or self._inputs]
        # A model of a fixed batch size gets full batches.
        self.fixed_size: int | None = self._inputs[0].shape[0] if self._inputs else None
        self._parts: list[list[Any]] = []
        self.count = 0
        for element in [] if data is None else self._elements(data):
            part = self._flat(element)
            self._parts.append(part)
            self.count += self._length(part)
            if self.count >= MAX_SAMPLES:
                break
        if data is not None and not self.count:
            raise self._error(
                "must hold at least one sample. Received: nothing. A generator that was used "
                "before is empty."
            )
        different: set[int] = set()
        self.ranges: list[tuple[Any, Any]] = []
        for batch in self:
            if any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in batch):
                raise self._error(
                    "must be finite. Received: an array with NaN or infinity. Remove it."
                )
            different |= {hash(b"".join(row.tobytes() for row in rows)) for rows in zip(*batch)}
            # Text has neither.
            is_text = [array.dtype.kind in "OSU" for array in batch]
            ends = [(np.nan,) * 2 if x else (a.min(), a.max()) for a, x in zip(batch, is_text)]
            pairs = zip(self.ranges or ends, ends)
            self.ranges = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs]
        doubts = list(find_doubts(model, self, self.ranges))
        if self.count and len(different) < least:
            doubts.append(
                f"has {format_count(len(different), 'different sample')}. Pass 100 or more: so few "
                "do not show the range of each channel."
            )
        found = [ArgumentWarning(argument, text) for text in doubts]
        self.warnings = [str(warning) for warning in found]
        for warning in found:
            warnings.warn(warning, stacklevel=3)

    def __iter__(self) -> Iterator[list[Any]]:
        for part in self._parts:
            length, numbers = self._length(part), sum(math.prod(x.shape[1:]) for x in part)
            step = self.fixed_size or min(BATCH_SIZE, max(1, _MOST_NUMBERS // max(numbers, 1)))
            for start in range(0, length, step):
                batch = [self._array(i, x[start : start + step]) for i, x in enumerate(part)]
                rows = np.arange(step) % len(batch[0])
                yield [array[rows] if self.fixed_size else array for array in batch]

    def nest(self, batch: list[Any]) -> Any:
        """A batch, nested as the model takes it."""
        return keras.tree.pack_sequence_as(self._nested, batch)

    def _array(self, i: int, rows: Any) -> Any:
        rows = keras.ops.convert_to_numpy(rows)
        if rows.dtype == object:  # text
            rows = rows.astype("S" if isinstance(rows.flat[0], bytes) else "U")
        dtype = (self._inputs and self._inputs[i].dtype) or rows.dtype
        return rows.astype("float32") if keras.backend.is_float_dtype(str(dtype)) else rows

    def _error(self, text: str) -> ArgumentError:
        return ArgumentError(self._argument, text)

    def _elements(self, data: Any) -> Iterable[Any]:
        """The inputs of one batch after the other, as the model takes them."""
        preprocess = getattr(self._model, "preprocessor", None)
        if preprocess is None:
            yield from self._raw(data)
            return
        # As `predict` of such a model does, which `call` does not.
        for element in self._raw(data):
            leaves = keras.tree.flatten(element)
            are_arrays = all(hasattr(leaf, "shape") for leaf in leaves)
            length = min(len(leaves[0]), MAX_SAMPLES) if are_arrays else 1
            for start in range(0, length, BATCH_SIZE):
                rows = slice(start, start + BATCH_SIZE)
                part = element
                if are_arrays:
                    part = keras.tree.map_structure(lambda x, rows=rows: x[rows], element)
                yield keras.utils.unpack_x_y_sample_weight(preprocess(part))[0]

    def _raw(self, data: Any) -> Iterable[Any]:
        """The inputs of one batch after the other, as they are."""
        if callable(data):
            data = data()  # a generator function, as TFLite's guides write it
        can_iterate = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
        if isinstance(data, (str, os.PathLike)) or not can_iterate:
            raise self._error(
                f"must be arrays, or an iterable of batches. Received: {data!r}. Pass what a file "
                "holds, such as `numpy.load(path)`."
            )
        if isinstance(data, tuple) and len(data) in (2, 3) and not self._is_one_per_input(data):
            data = [data]  # inputs, targets and weights, as Keras has them
        if isinstance(data, dict) or hasattr(data, "shape") or self._is_one_per_input(data):
            return [data]
        if isinstance(data, keras.utils.PyDataset):
            batches = data.num_batches
            data = map(data.__getitem__, itertools.count() if batches is None else range(batches))
        return (
            element
            if self._is_one_per_input(element)
            else keras.utils.unpack_x_y_sample_weight(element)[0]
            for element in data
        )

    def _is_one_per_input(self, data: Any) -> bool:
        return (
            isinstance(data, (list, tuple))
            and len(self._inputs) == len(data) > 1
            and all(hasattr(array, "shape") for array in data)
        )

    def _flat(self, element: Any) -> list[Any]:
        """The arrays of a batch, each of the rank of its input."""
        if self._nested is None:
            self._nested = keras.tree.map_structure(lambda _: 0, element)
        names = self._names
        if isinstance(element, dict) and set(element) == set(names):
            element = [element[name] for name in names]
        arrays = [
            array if hasattr(array, "shape") else np.asarray(array)
            for array in keras.tree.flatten(element)
        ]
        if self._inputs and len(arrays) != len(names):
            raise self._error(
                f"must hold {len(names)} inputs per sample. Received: {len(arrays)}. Pass a list "
                "in the order of `model.inputs`, or a dict of their names."
            )
        for i, tensor in enumerate(self._inputs):
            shape, rank = tuple(arrays[i].shape), len(tensor.shape)
            sizes = shape if len(shape) == rank - 1 else shape[1:]
            if len(sizes) != rank - 1 or any(
                size not in (None, given) for given, size in zip(sizes, tensor.shape[1:])
            ):
                raise self._error(
                    f"must have the shape of the model's inputs, {tensor.shape}. Received: an "
                    f"array of shape {shape}. Prepare it as for `model.predict`."
                )
            if len(shape) < rank:
                arrays[i] = np.asarray(arrays[i])[None]
        return arrays

    def _length(self, part: list[Any]) -> int:
        lengths = {int(array.shape[0]) for array in part}
        if len(lengths) != 1:
            raise self._error(
                f"must hold arrays of one length. Received: lengths {sorted(lengths)}. Pass what "
                "`model.predict` takes."
            )
        return min(*lengths, MAX_SAMPLES)


def _nest_specs(model: keras.Model) -> Any:
    """What a model tells of its inputs, nested as it takes them; None if it tells nothing."""
    if graph.has_inputs(model):
        return graph.inputs_like(model, model.inputs)
    shapes = (model.get_build_config() or {}).get("input_shape")
    # A subclass was built on the sizes of some data, and takes others.
    return shapes and keras.tree.map_shape_structure(
        lambda shape: keras.InputSpec(shape=(None,) * len(shape)), shapes
    )
