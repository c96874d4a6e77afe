"""What a layer's `jit_compile=True` means on each backend: the layer, compiled alone."""

import functools
import types
from collections.abc import Callable
from typing import Any

import keras

from .typing import Tensor

# Programs that are kept; the one that was used longest ago goes first.
_PROGRAMS = 256


def run(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
    """Calls `function(**arguments)`, compiled by itself.

    What has a shape is an argument of the compiled program, everything else a constant of it.
    Calls with the same constants and shapes share one program."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        if not tf.executing_eagerly():
            # A compiled function would survive into ONNX files, which then do not load.
            with tf.xla.experimental.jit_scope():
                return function(**arguments)
    elif backend == "torch":
        import torch

        if torch.compiler.is_compiling():
            return function(**arguments)
    arrays = {n: _read(value) for n, value in arguments.items() if hasattr(value, "shape")}
    constants = tuple(item for item in arguments.items() if item[0] not in arrays)
    shapes = tuple(tuple(a.shape)[name in ("x", "mask") :] for name, a in arrays.items())
    return _compile(function, constants, tuple(arrays), shapes)(arrays)


@functools.lru_cache(_PROGRAMS)
def _compile(
    function: Callable[..., Tensor],
    constants: tuple[tuple[str, Any], ...],
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
) -> Callable[[dict[str, Tensor]], Tensor]:
    # The arrays are arguments: closed over, they would be baked into the program as constants.
    # All shapes but the batch size are in the key: a TensorFlow function that has seen two shapes
    # would generalize what must be known, the rank and the channel size, and PyTorch gives up at
    # the eighth version of one function.
    def call(arrays: dict[str, Tensor]) -> Tensor:
        return function(**arrays, **dict(constants))

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(call, jit_compile=True, autograph=False, reduce_retracing=True)
    if backend == "jax":
        import jax

        return jax.jit(call)
    if backend == "torch":
        import torch

        # `torch.compile` counts versions by code object, so that each program needs its own.
        code = call.__code__.replace()
        return torch.compile(types.FunctionType(code, call.__globals__, closure=call.__closure__))
    raise ValueError(
        "`jit_compile=True` must run on the TensorFlow, JAX or PyTorch backend. Received: "
        f"backend={backend!r}. Pass `jit_compile=None`."
    )


def _read(value: Any) -> Tensor:
    # TensorFlow would compile a program for each variable.
    return keras.ops.cast(value, value.dtype) if isinstance(value, keras.Variable) else value
