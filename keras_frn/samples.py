"""Calibration data of every kind as batches, for every tool that takes it."""

import itertools
import warnings

import keras
import numpy as np

from . import graph

# More samples than these are not read.
MAX_SAMPLES = 2048
# One batch of this size is in memory at a time.
BATCH_SIZE = 32
# Layers at a model's inputs that show what inputs it was made for: behind them the standard
# deviation is about one, and 255 times that for images that were not divided by 255.
_KNOWING = (
    keras.layers.Normalization,
    keras.layers.Rescaling,
    keras.layers.BatchNormalization,
)
_LEAST, _MOST = 0.02, 20


class Samples:
    """Calibration data as batches, each a list of arrays in the order of `model.inputs`.

    It can be iterated again and again. An array is read batch by batch; what comes from an iterable
    is kept. `count` is the number of samples, and `ranges` has a pair of the least and the largest
    value of each input. `fixed_size` is the batch size of a model that has one.

    Args:
        model: The model that the data are for.
        data: An array, or anything with a shape that can be sliced; a list, tuple or dict of
            arrays, one for each input; a tuple `(inputs, targets)`; a `tf.data.Dataset`,
            `keras.utils.PyDataset` or another iterable of batches or single samples, each the
            inputs or `(inputs, targets)`; or a function that returns such an iterable. None is no
            data.
        specs: A `keras.InputSpec` for each input, whose shapes the data must have. Defaults to
            the model's own inputs, where it has symbolic ones.
        least: The number of different samples below which a warning says that they are few.
            Defaults to 1.

    Raises:
        ValueError: if the model is not built, or if the data are empty, not finite or do not fit
            its inputs.
    """

    def __init__(self, model, data, specs=(), least=1):
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(
                f"`model` must be a built Keras model. Received: model={model!r}. Call it on data."
            )
        self._inputs = list(specs or (model.inputs if graph.is_graph(model) else ()))
        # A model of a fixed batch size gets full batches.
        self.fixed_size = self._inputs[0].shape[0] if self._inputs else None
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
        different = set()
        self.ranges = []
        for batch in self:
            if any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in batch):
                raise ValueError(
                    "`calibration_data` must be finite. Received: an array with NaN or infinity. "
                    "Remove it."
                )
            different |= {hash(b"".join(row.tobytes() for row in rows)) for rows in zip(*batch)}
            ends = [(array.min(), array.max()) for array in batch]
            pairs = zip(self.ranges or ends, ends)
            self.ranges = [(min(a[0], b[0]), max(a[1], b[1])) for a, b in pairs]
        self.warnings = [*self._uniform(), *self._unlike(model)] if self.count else []
        if self.count and len(different) < least:
            self.warnings.append(
                f"`calibration_data` has {len(different)} different samples. Pass 100 or more: so "
                "few do not show the range of each channel."
            )
        for text in self.warnings:
            warnings.warn(text, stacklevel=3)

    def __iter__(self):
        for part in self._parts:
            length, step = _length(part), self.fixed_size or BATCH_SIZE
            for start in range(0, length, step):
                batch = [self._array(i, x[start : start + step]) for i, x in enumerate(part)]
                rows = np.arange(step) % len(batch[0])
                yield [array[rows] if self.fixed_size else array for array in batch]

    def _array(self, i, rows):
        rows = keras.ops.convert_to_numpy(rows)
        dtype = self._inputs[i].dtype if self._inputs else rows.dtype
        return rows.astype("float32") if keras.backend.is_float_dtype(str(dtype)) else rows

    def _uniform(self):
        """Sentences about inputs that are the same everywhere."""
        for i, (low, high) in enumerate(self.ranges):
            if float(high) - float(low) <= 1e-3 * max(abs(float(low)), abs(float(high))):
                yield (
                    f"`calibration_data` hardly varies: input {i} is from {low:.6g} to "
                    f"{high:.6g}. Pass inputs like those at inference."
                )

    def _unlike(self, model):
        """Sentences about inputs that the model's first layers were not made for."""
        wiring = graph.Wiring(model) if graph.is_graph(model) else None
        for call in wiring.calls if wiring else []:
            if type(call.layer) not in _KNOWING or call.inputs[0] not in wiring.inputs:
                continue
            i = wiring.inputs.index(call.inputs[0])
            outputs = [keras.ops.convert_to_numpy(call.layer(batch[i])) for batch in self]
            mean = np.mean([np.mean(y, dtype="float64") for y in outputs])
            deviation = np.sqrt(np.mean([np.mean((y - mean) ** 2) for y in outputs]))
            if abs(mean) > _MOST or not _LEAST < deviation < _MOST:
                low, high = self.ranges[i]
                yield (
                    f"`calibration_data` is from {low:.6g} to {high:.6g} in input {i}, which "
                    f"{call.layer.name} was not made for: behind it the mean is {mean:.3g} and the "
                    f"standard deviation {deviation:.3g}. Prepare it as for `model.predict`."
                )

    def _elements(self, data):
        """The inputs of one batch after the other."""
        if callable(data):
            data = data()  # a generator function, as TFLite's guides write it
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
            shape, rank = tuple(arrays[i].shape), len(tensor.shape)
            sizes = shape if len(shape) == rank - 1 else shape[1:]
            if len(sizes) != rank - 1 or any(
                size not in (None, given) for given, size in zip(sizes, tensor.shape[1:])
            ):
                raise ValueError(
                    f"`calibration_data` must have the shape of the model's inputs, {tensor.shape}."
                    f" Received: an array of shape {shape}. Prepare it as for `model.predict`."
                )
            if len(shape) < rank:
                arrays[i] = np.asarray(arrays[i])[None]
        return arrays


def _length(part):
    lengths = {int(array.shape[0]) for array in part}
    if len(lengths) != 1:
        raise ValueError(
            "`calibration_data` must hold arrays of one length. Received: lengths "
            f"{sorted(lengths)}. Pass what `model.predict` takes."
        )
    return min(*lengths, MAX_SAMPLES)
