"""Functions of TensorFlow in a functional graph of Keras 2, as Keras layers and operations.

Each of these computes the same in Keras; others are refused.
"""

import keras
from keras import ops

_PACKAGES = ("", "math", "nn", "linalg", "__operators__", "compat.v1", "compat.v1.nn")
_MERGES = {
    "add": keras.layers.Add,
    "subtract": keras.layers.Subtract,
    "multiply": keras.layers.Multiply,
    "maximum": keras.layers.Maximum,
    "minimum": keras.layers.Minimum,
}
_ACTIVATIONS = "relu relu6 sigmoid tanh elu selu silu softplus softsign".split()  # noqa: SIM905
_OPERATIONS = {
    **{name: getattr(ops, name) for name in (*_MERGES, *_ACTIVATIONS)},
    **{name: getattr(ops, name) for name in ("abs", "cast", "cos", "divide", "exp", "expand_dims")},
    **{name: getattr(ops, name) for name in ("gelu", "leaky_relu", "log", "log1p", "log_softmax")},
    **{name: getattr(ops, name) for name in ("matmul", "negative", "reshape", "rsqrt", "sign")},
    **{name: getattr(ops, name) for name in ("sin", "softmax", "sqrt", "square", "squeeze")},
    **{name: getattr(ops, name) for name in ("stack", "stop_gradient", "transpose")},
    **{f"reduce_{name}": getattr(ops, name) for name in ("max", "mean", "min", "prod", "std")},
    **{"reduce_sum": ops.sum, "reduce_variance": ops.var},
    **{"clip_by_value": ops.clip, "concat": ops.concatenate, "identity": lambda x: x},
    **{"pow": ops.power, "swish": ops.silu, "truediv": ops.true_divide},
    "getitem": lambda x, slice_spec: x[tuple(map(_slice, slice_spec))],
}
_ARGUMENTS = {
    "alpha": "negative_slope",
    "clip_value_max": "x_max",
    "clip_value_min": "x_min",
    "perm": "axes",
    "shape": "newshape",
}


def call_operator(function, name, x, options):
    """What a TensorFlow function computes, in a layer of its name where Keras has such a layer."""
    package, _, short = function.rpartition(".")
    options = {_ARGUMENTS.get(k, k): v for k, v in options.items() if k != "name"}
    tensors = [v for v in keras.tree.flatten([x, options]) if keras.backend.is_keras_tensor(v)]
    if package not in _PACKAGES or short not in _OPERATIONS or not tensors:
        raise ValueError(f"calls {function!r}, which has no counterpart here")
    own = {"name": name, "dtype": tensors[0].dtype}
    # Other ranks are broadcast in a way of their own by Keras' merging layers.
    if short in _MERGES and len({(t.ndim, t.dtype) for t in tensors}) == 1 and len(tensors) == 2:
        return _MERGES[short](**own)([x, options["y"]])
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


def _slice(item):
    return slice(item["start"], item["stop"], item["step"]) if isinstance(item, dict) else item
