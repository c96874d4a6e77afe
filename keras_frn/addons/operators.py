"""Functions of TensorFlow in a functional graph of Keras 2 that compute the same in Keras 3."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from ..typing import Tensor

_PACKAGES = ("", "math", "nn", "linalg", "__operators__", "compat.v1", "compat.v1.nn")
_MERGES = ("add", "subtract", "multiply", "maximum", "minimum")
_ACTIVATIONS = ("relu", "relu6", "sigmoid", "tanh", "elu", "selu", "silu", "softplus", "softsign")
_SAME_NAME = """abs cast cos divide exp expand_dims gelu leaky_relu log log1p log_softmax matmul
    negative reshape rsqrt sign sin softmax sqrt square squeeze stack stop_gradient transpose"""
_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(ops, name) for name in (*_MERGES, *_ACTIVATIONS, *_SAME_NAME.split())},
    **{f"reduce_{name}": getattr(ops, name) for name in ("max", "mean", "min", "prod", "std")},
    **{"reduce_sum": ops.sum, "reduce_variance": ops.var, "truediv": ops.true_divide},
    **{"clip_by_value": ops.clip, "identity": lambda x: x, "pow": ops.power},
    **dict.fromkeys(("silu", "swish"), lambda x, beta=1.0: ops.silu(beta * x) / beta),
    **{"concat": ops.concatenate, "getitem": lambda x, slice_spec: x[_index(slice_spec)]},
}
_ARGUMENTS = {"alpha": "negative_slope", "perm": "axes", "shape": "newshape"}
_ARGUMENTS.update(clip_value_min="x_min", clip_value_max="x_max")


def call_operator(function: str, name: str | None, x: Any, options: dict[str, Any]) -> Tensor:
    """What a TensorFlow function computes, in a layer of its name where Keras has such a layer."""
    package, _, short = function.rpartition(".")
    options = {_ARGUMENTS.get(k, k): v for k, v in options.items() if k != "name"}
    tensors = [v for v in keras.tree.flatten([x, options]) if keras.backend.is_keras_tensor(v)]
    if package not in _PACKAGES or short not in _OPERATIONS or not tensors:
        raise ValueError(f"calls {function!r}, which has no counterpart here")
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
    second = [options.pop("y")] if "y" in options else []
    return _OPERATIONS[short](x, *second, **options)


def _index(slice_spec: list[Any]) -> tuple[Any, ...]:
    keys = ("start", "stop", "step")
    return tuple(slice(*map(s.get, keys)) if isinstance(s, dict) else s for s in slice_spec)
