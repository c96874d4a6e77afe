"""What `jit_compile=True` means on each backend: one layer, compiled alone."""

import functools
import types

import keras


def run(function, arguments, jit_compile):
    """Calls `function(**arguments)`, compiled by itself if `jit_compile`.

    What has a shape is an argument of the compiled program, everything else a constant of it.
    Calls with the same constants and shapes share one program."""
    if not jit_compile:
        return function(**arguments)
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
    arrays = {n: _tensor(value) for n, value in arguments.items() if hasattr(value, "shape")}
    constants = tuple(item for item in arguments.items() if item[0] not in arrays)
    shapes = tuple(tuple(a.shape)[name in ("x", "mask") :] for name, a in arrays.items())
    return _compiled(function, constants, tuple(arrays), shapes)(arrays)


@functools.cache
def _compiled(function, constants, names, shapes):
    # The arrays are arguments: closed over, they would be baked into the program as constants.
    # All shapes but the batch size are in the key: a TensorFlow function that has seen two shapes
    # would generalize what must be known, the rank and the channel size, and PyTorch gives up at
    # the eighth version of one function.
    def call(arrays):
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

        return torch.compile(with_own_code(call))
    raise ValueError(
        "`jit_compile=True` must run on the TensorFlow, JAX or PyTorch backend. Received: "
        f"backend={backend!r}. Pass `jit_compile=None`."
    )


def _tensor(value):
    # TensorFlow would compile a program for each variable.
    return keras.ops.cast(value, value.dtype) if isinstance(value, keras.Variable) else value


def with_own_code(function):
    """A copy of a function for `torch.compile`, which counts versions by code object."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)
