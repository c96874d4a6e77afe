"""Functions of TensorFlow in a functional graph of Keras 2 that compute the same in Keras 3."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from ..typing import Tensor

BY_CODE = "Build the model in code with keras_frn layers and call keras_frn.load_addons_weights"
_PACKAGES = ("", "math", "nn", "linalg", "image", "__operators__", "compat.v1", "compat.v1.nn")
_MERGES = ("add", "subtract", "multiply", "maximum", "minimum")
_ACTIVATIONS = ("relu", "relu6", "sigmoid", "tanh", "elu", "selu", "silu", "softplus", "softsign")
_SAME_NAME = """abs cast ceil cos divide erf exp expand_dims floor gelu greater greater_equal
    leaky_relu less less_equal log log1p log_softmax negative reshape round rsqrt sign sin softmax
    sqrt square squeeze stack stop_gradient transpose"""


def _matmul(x: Tensor, y: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    x = ops.swapaxes(x, -2, -1) if transpose_a else x
    return ops.matmul(x, ops.swapaxes(y, -2, -1) if transpose_b else y)


def _resize(x: Tensor, size: Any, method: str = "bilinear", antialias: bool = False) -> Tensor:
    return ops.image.resize(x, tuple(size), method, antialias, data_format="channels_last")


def _pad(x: Tensor, pads: Any, mode: str = "CONSTANT", constant_values: float = 0) -> Tensor:
    return ops.pad(x, pads, mode.lower(), constant_values or None)


def _split(x: Tensor, sizes: Any, axis: int = 0) -> Any:
    return ops.split(x, np.cumsum(sizes)[:-1].tolist() if np.ndim(sizes) else sizes, axis)


def _index(x: Tensor, slice_spec: list[Any]) -> Tensor:
    keys = ("start", "stop", "step")
    return x[tuple(slice(*map(s.get, keys)) if isinstance(s, dict) else s for s in slice_spec)]


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(ops, name) for name in (*_MERGES, *_ACTIVATIONS, *_SAME_NAME.split())},
    **{f"reduce_{name}": getattr(ops, name) for name in ("max", "mean", "min", "prod", "std")},
    **{"reduce_sum": ops.sum, "reduce_variance": ops.var, "truediv": ops.true_divide},
    **{"clip_by_value": ops.clip, "identity": lambda x: x, "pow": ops.power},
    **dict.fromkeys(("silu", "swish"), lambda x, beta=1.0: ops.silu(beta * x) / beta),
    **{"concat": ops.concatenate, "getitem": _index, "matmul": _matmul, "resize": _resize},
    **{"split": _split, "where": lambda condition, y, x: ops.where(condition, x, y)},
    "pad": _pad,
}
_ARGUMENTS = {"alpha": "negative_slope", "perm": "axes", "shape": "newshape", "b": "y"}
_ARGUMENTS.update(paddings="pads", num_or_size_splits="sizes")
_ARGUMENTS.update(clip_value_min="x_min", clip_value_max="x_max")


def call_operator(function: str, name: str | None, x: Any, options: dict[str, Any]) -> Tensor:
    """What a TensorFlow function computes, in a layer of its name where Keras has such a layer."""
    package, _, short = function.rpartition(".")
    options = {_ARGUMENTS.get(k, k): v for k, v in options.items() if k != "name"}
    tensors = [v for v in keras.tree.flatten([x, options]) if keras.backend.is_keras_tensor(v)]
    if package not in _PACKAGES or short not in _OPERATIONS or not tensors:
        raise ValueError(f"calls {function!r}, which has no counterpart here. {BY_CODE}")
    own = {"name": name, "dtype": tensors[0].dtype}
    # Keras' merging layers broadcast tensors of different ranks in a way of their own.
    if short in _MERGES and len(tensors) == 2 and len({(t.ndim, t.dtype) for t in tensors}) == 1:
        return getattr(keras.layers, short.title())(**own)([x, options["y"]])
    if short in _ACTIVATIONS and not options:
        return keras.layers.Activation(short, **own)(x)
    if short == "concat":
        return keras.layers.Concatenate(options["axis"], **own)(x)
    if short == "gelu":
        options.setdefault("approximate", False)
    if short.startswith("reduce_") and isinstance(options.get("axis"), list):
        options["axis"] = tuple(options["axis"])
    operands = [x, *([options.pop("y")] if "y" in options else [])]
    for i, value in enumerate(operands):
        if isinstance(value, list) and not any(map(keras.backend.is_keras_tensor, value)):
            operands[i] = np.asarray(value, tensors[0].dtype)
    accepted = inspect.signature(_OPERATIONS[short]).parameters
    for key in options.keys() - accepted.keys():
        if options.pop(key) not in (None, False):
            raise ValueError(f"calls {function!r} with {key}, which is not read. {BY_CODE}")
    return _OPERATIONS[short](*operands, **options)
