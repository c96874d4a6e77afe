"""Calibration data of every kind as batches, for every tool that takes it."""

import itertools

import keras
import numpy as np

from . import graph

# More samples than these are not read.
MAX_SAMPLES = 2048
# One batch of this size is in memory at a time.
BATCH_SIZE = 32


class Samples:
    """Calibration data as batches, each a list of arrays in the order of `model.inputs`.

    It can be iterated again and again. An array is read batch by batch; what comes from an iterable
    is kept. `count` is the number of samples.

    Args:
        model: The model that the data are for. Shapes are compared with its inputs, where it has
            symbolic ones.
        data: An array, or anything with a shape that can be sliced; a list, tuple or dict of
            arrays, one for each input; a `tf.data.Dataset`, `keras.utils.PyDataset` or another
            iterable of batches or single samples, each the inputs or `(inputs, targets)`. None is
            no data.

    Raises:
        ValueError: if the data are empty, not finite or do not fit the model's inputs.
    """

    def __init__(self, model, data):
        self._inputs = list(model.inputs) if graph.is_graph(model) else []
        # A model of a fixed batch size gets full batches.
        self._fixed = self._inputs[0].shape[0] if self._inputs else None
        self._parts, self.count = [], 0
        for element in [] if data is None else self._elements(data):
            part = self._flat(element)
            self._parts.append(part)
            self.count += _length(part)
            if self.count >= MAX_SAMPLES:
                break
        if data is not None and not self.count:
            raise ValueError(
                "`calibration_data` must hold at least one sample. Received: nothing. A generator "
                "that was used before is empty."
            )
        for batch in self:
            if any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in batch):
                raise ValueError(
                    "`calibration_data` must be finite. Received: an array with NaN or infinity. "
                    "Remove it."
                )

    def __iter__(self):
        for part in self._parts:
            length, step = _length(part), self._fixed or BATCH_SIZE
            for start in range(0, length, step):
                batch = [self._array(i, x[start : start + step]) for i, x in enumerate(part)]
                rows = np.arange(step) % len(batch[0])
                yield [array[rows] if self._fixed else array for array in batch]

    def _array(self, i, rows):
        rows = keras.ops.convert_to_numpy(rows)
        dtype = self._inputs[i].dtype if self._inputs else rows.dtype
        return rows.astype("float32") if keras.backend.is_float_dtype(str(dtype)) else rows

    def _elements(self, data):
        """The inputs of one batch after the other."""
        if isinstance(data, dict) or hasattr(data, "shape") or self._is_one_per_input(data):
            return [data]
        if isinstance(data, keras.utils.PyDataset):
            batches = data.num_batches
            data = map(data.__getitem__, itertools.count() if batches is None else range(batches))
        return (keras.utils.unpack_x_y_sample_weight(element)[0] for element in data)

    def _is_one_per_input(self, data):
        return (
            isinstance(data, (list, tuple))
            and len(self._inputs) == len(data) > 1
            and all(hasattr(array, "shape") for array in data)
        )

    def _flat(self, element):
        """The arrays of a batch, each of the rank of its input."""
        names = [tensor.name for tensor in self._inputs]
        if isinstance(element, dict) and set(element) == set(names):
            element = [element[name] for name in names]
        arrays = [
            array if hasattr(array, "shape") else np.asarray(array)
            for array in keras.tree.flatten(element)
        ]
        if self._inputs and len(arrays) != len(names):
            raise ValueError(
                f"`calibration_data` must hold {len(names)} inputs per sample. Received: "
                f"{len(arrays)}. Pass a list in the order of `model.inputs`, or a dict of their "
                "names."
            )
        for i, tensor in enumerate(self._inputs):
            if len(arrays[i].shape) == len(tensor.shape) - 1:
                arrays[i] = np.asarray(arrays[i])[None]
            shape = tuple(arrays[i].shape)
            if len(shape) != len(tensor.shape) or any(
                size not in (None, given) for given, size in zip(shape[1:], tensor.shape[1:])
            ):
                raise ValueError(
                    f"`calibration_data` must have the shape of the model's inputs, {tensor.shape}."
                    f" Received: an array of shape {shape}. Prepare it as for `model.predict`."
                )
        return arrays


def _length(part):
    lengths = {int(array.shape[0]) for array in part}
    if len(lengths) != 1:
        raise ValueError(
            "`calibration_data` must hold arrays of one length. Received: lengths "
            f"{sorted(lengths)}. Pass what `model.predict` takes."
        )
    return min(*lengths, MAX_SAMPLES)
