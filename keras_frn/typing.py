"""The types that signatures of this package speak of."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

# A tensor of whatever backend Keras runs on, or what becomes one. Keras itself has no types.
Tensor: TypeAlias = Any
Shape: TypeAlias = tuple[int | None, ...]
PathLike: TypeAlias = str | os.PathLike[str]

# What `keras.initializers.get`, `keras.regularizers.get` and `keras.constraints.get` take.
Initializer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any]
Regularizer: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None
Constraint: TypeAlias = str | Mapping[str, Any] | Callable[..., Any] | None

Epsilon: TypeAlias = float | Sequence[float]
LearnedEpsilon: TypeAlias = bool | Literal["per_channel"]
