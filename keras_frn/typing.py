"""The types that signatures of this package speak of, and what counts as a number."""

import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, TypeGuard

import numpy as np

# A tensor of whatever backend Keras runs on, or what becomes one. Keras itself has no types.
Tensor: TypeAlias = Any
Array: TypeAlias = np.ndarray[Any, Any]
# The arrays of one batch, in the order of a model's inputs or outputs.
Batch: TypeAlias = list[Array]
Shape: TypeAlias = tuple[int | None, ...]
PathLike: TypeAlias = str | os.PathLike[str]

# What `keras.initializers.get`, `keras.regularizers.get` and `keras.constraints.get` take.
Initializer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any]
Regularizer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Constraint: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None

Epsilon: TypeAlias = float | Sequence[float]
LearnedEpsilon: TypeAlias = bool | Literal["per_channel"]


class Sliceable(Protocol):
    """An array of any kind, also one that is read from a file as it is used."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


# What `samples.Samples` reads: arrays, one for each input, `tf.data.Dataset` and
# `keras.utils.PyDataset` among the iterables of batches, or a function that returns one.
CalibrationData: TypeAlias = (
    Sliceable | Mapping[str, Any] | Iterable[Any] | Callable[[], Iterable[Any]]
)


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, of NumPy too, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number, of NumPy too, and no bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
