"""The inputs of the file: their sizes, types and names."""

import re
from collections.abc import Sequence
from typing import Any

import keras

from .. import graph
from ..errors import ArgumentError
from ..typing import Shape

__all__ = ["specs_of"]


def specs_of(model: keras.Model, input_signature: Sequence[Any] | None) -> list[Any]:
    """The `keras.InputSpec` of each input, nested as the model takes them: a list of one structure
    for each positional argument. Sizes are those given, else the model's own, a fixed batch size
    included.
    """
    if graph.has_inputs(model):
        own = [_spec(x.shape, x.dtype, x.name) for x in model.inputs]
        nested = [graph.inputs_like(model, own)]
    else:
        config = model.get_build_config()
        shapes = config["shapes_dict"].values() if "shapes_dict" in config else config.values()
        # Nested as the model has seen them, of any type and batch size.
        nested = keras.tree.map_shape_structure(
            lambda shape: keras.InputSpec(shape=(None, *shape[1:])), list(shapes)
        )
        own = keras.tree.flatten(nested)
    given = own if input_signature is None else keras.tree.flatten(input_signature)
    if len(given) != len(own) or not all(map(_fits, given, own)):
        raise ArgumentError(
            "input_signature",
            f"must fit the model's inputs, {[(spec.dtype, spec.shape) for spec in own]}. Received: "
            f"{[(x.dtype, x.shape) if hasattr(x, 'shape') else x for x in given]}. Pass the whole "
            "shape of each, with the batch.",
        )
    chosen = [_spec(x.shape, spec.dtype or x.dtype, spec.name) for x, spec in zip(given, own)]
    return keras.tree.pack_sequence_as(nested, chosen)


def _spec(shape: Shape, dtype: str | None, name: str | None = None) -> keras.InputSpec:
    dtype = keras.backend.standardize_dtype(dtype or "float32")
    dtype = "float32" if keras.backend.is_float_dtype(dtype) else dtype
    # Of a name with a space TensorFlow says that it is there twice.
    name = re.sub(r"[^\w.>-]", "_", name or "", flags=re.ASCII).lstrip("_->") or None
    return keras.InputSpec(shape=tuple(shape), dtype=dtype, name=name)


def _fits(given: Any, own: keras.InputSpec) -> bool:
    """Whether the shape is one of those that the model takes, and the type its own, if given."""
    if getattr(given, "shape", None) is None or len(given.shape) != len(own.shape):
        return False
    dtype = given.dtype and keras.backend.standardize_dtype(given.dtype)
    is_type = None in (dtype, own.dtype) or dtype == own.dtype
    return is_type and all(size in (None, x) for x, size in zip(given.shape, own.shape))
