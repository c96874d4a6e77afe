"""What `jit_compile` means on each backend, and which form of a formula a backend runs best.

This is the only backend-specific code of the package.
"""

import contextlib
import contextvars
import functools
import itertools
import math
import types

import keras
from keras import ops

# What a formula is being traced into: a "scope", a "function" of its own, or None for neither.
_CLUSTER = contextvars.ContextVar("cluster", default=None)
_SCOPES = itertools.cycle(range(100))


def use_gradient_form(training):
    """Whether to build the form of a formula with the cheapest gradient.

    TensorFlow's converters map the other form onto fewer operators, and they trace models with
    `training=False`. On JAX and PyTorch, gradients are often taken without `training=True`; JAX's
    XLA makes the forward pass of both forms the same program, PyTorch says whether one is wanted.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.is_grad_enabled()
    return bool(training) or keras.backend.backend() == "jax"


def divides_gradients_of_means():
    """Whether a mean's gradient is a division at full size, as on PyTorch: 3 ms of 32."""
    return keras.backend.backend() == "torch"


def folds_sums(gradient_form):
    """Whether to sum few positions first; see `ops._folded`.

    An exported graph is better off without the two reshapes that it takes, unless asked for a
    cluster."""
    return keras.backend.backend() == "tensorflow" and (gradient_form or _cluster() is not None)


def outside_cluster():
    """A context for reshapes, which cost nothing outside of a cluster: what a cluster returns is a
    copy, even of its input, and the gradient needs the input in its new shape."""
    if _cluster() != "scope":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.xla.experimental.jit_scope(compile_ops=False)


def adds_in_trees():
    """Whether sums are accurate, and fastest, over all axes at once, as JAX's on a GPU.

    Forward + backward at 256x112x112x64 on an H100: 2.3 ms instead of 2.5 for sums axis by axis and
    within samples, in bfloat16 1.1 instead of 1.4. Sums on a CPU are no faster so, and without the
    libraries of newer XLA slower and off by 3e-6 instead of 2e-7 (beta's gradient, 512x32x32x32).
    """
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "gpu"


def summed_apart(parameter):
    """A small tensor whose gradient is not one sum with what its uses sum.

    JAX's XLA merges nested sums, and so sums the gradient that reaches y over all positions once
    more for beta alone. And it hands sums of products to a library that takes milliseconds for
    some small ones, such as gamma's gradient: forward + backward with the barrier and without, ms:
    1.3 and 3.2 at 1024x2x2x256, 1.6 and 10.0 at 1024x1x1x1024, 11.1 and 11.5 at 32x56x56x64."""
    if keras.backend.backend() != "jax":
        return parameter
    import jax

    return jax.lax.optimization_barrier(parameter)


def where(condition, a, b):
    """`a` where the condition holds and `b` elsewhere, in the dtype of both."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.where(condition, a, b)  # Keras 3.15's brings float64 to float32 here
    return ops.where(condition, a, b)


def square(x):
    """x * x.

    PyTorch makes the gradient of a product in two products and a sum, that of the squared error in
    one pass: forward + backward in eager mode 22.5 and 27.5 ms where x * x takes 24.0 and 31.7."""
    if keras.backend.backend() != "torch" or not x.requires_grad or _in_torch_compile():
        return x * x
    import torch

    zero = x.new_zeros(()).expand_as(x)
    return torch.nn.functional.mse_loss(x, zero, reduction="none")


def maximum(a, b):
    """The larger of two tensors of one dtype, in the form with the cheaper gradient.

    Forward + backward of FRN + TLU at 32x56x56x64, least of the runs: in a TensorFlow graph with
    one XLA cluster per layer 18.6 ms with a selection and 24.2 ms with `maximum`, whose gradient
    compares again outside of the cluster; in PyTorch eager 34 ms with `clamp`, 65 ms with
    `maximum`, which splits the gradient of ties, and 84 ms for the formula as the paper writes it.
    """
    if keras.backend.backend() == "torch" and not a.is_cuda:
        import torch

        return torch.clamp(a, min=b)
    # A NaN in a is below nothing, and so stays.
    return where(a < b, b, a)


def maximum_plus(a, b, c):
    """`maximum(a, b) + c` of a tensor without -inf, a constant and a small tensor.

    In PyTorch eager on a CPU a product with the comparison takes 32 ms where `clamp` takes 38 (as
    above, in one run; the formula as the paper writes it takes 71): the gradient of `clamp`
    selects. On a GPU selections are no slower than other passes: 9.5 ms instead of 11.0 eager, 2.5
    instead of 2.7 compiled, 2.9 instead of 3.3 in bfloat16 (H100, 256x112x112x64)."""
    if keras.backend.backend() != "torch" or not a.requires_grad or a.is_cuda:
        return maximum(a, b) + c
    if _in_torch_compile():  # 9 ms with `clamp`, 60 with a comparison
        return maximum(a, b) + c
    import torch

    limit = torch.finfo(b.dtype).max
    above = (a.detach() >= b).to(a.dtype)
    # b is finite where it is multiplied, and cancels to the bit.
    b_or_0 = torch.addcmul(b.clamp(min=-limit) + c, b.clamp(-limit, limit), above, value=-1)
    return (a * above).add_(b_or_0)


def run(function, arrays, options, jit_compile):
    """Calls `function(**arrays, **options)` under the layer's `jit_compile` setting.

    Args:
        function: A pure function of module level.
        arrays: Dict of tensors or None.
        options: Dict of hashable values, constants of the compiled program; `training` among them.
        jit_compile: True for one XLA cluster (`torch.compile` on PyTorch, where the caller is not
            being compiled) of its own, False for no compilation, None for what measures best: a
            cluster in a TensorFlow graph that is traced for training, unless its input is known to
            be small.
    """
    in_tensorflow_graph = _in_tensorflow_graph()
    if jit_compile is None:
        jit_compile = in_tensorflow_graph and options["training"] and not _is_small(arrays["x"])
    if not jit_compile or _in_torch_compile():
        return function(**arrays, **options)
    if in_tensorflow_graph:
        return _in_scope(function, arrays, options)
    shapes = tuple(
        (name, tuple(array.shape)[1 if name in ("x", "mask") else 0 :])
        for name, array in arrays.items()
        if array is not None
    )
    return _compiled(function, tuple(sorted(options.items())), shapes)(arrays)


def _is_small(x):
    """Whether starting a cluster takes longer than it saves: a step of ResNet-20 on 32x32 images
    takes 17 ms with clusters and 14 ms without at batch 2, 66 and 72 ms at batch 32."""
    return None not in x.shape and math.prod(x.shape) < 100_000


def _in_scope(function, arrays, options):
    """A cluster in a TensorFlow graph; when training, its gradient is a cluster, too."""
    import tensorflow as tf

    def scoped(arrays):
        # A must-compile function would survive into ONNX files, which then do not load.
        with _within("scope"), tf.xla.experimental.jit_scope():
            return function(**arrays, **options)

    if not options["training"]:
        return scoped(arrays)

    def numbered(arrays):
        # Scopes are numbered within a function, and ops of equal number may become one cluster,
        # which then holds the tensors of many layers until the last has come.
        for _ in range(number):
            with tf.xla.experimental.jit_scope():
                pass
        return scoped(arrays)

    # TensorFlow carries a scope to the gradient only where it differentiates a function.
    number = next(_SCOPES)
    return tf.function(numbered, autograph=False)(arrays)


@contextlib.contextmanager
def _within(kind):
    token = _CLUSTER.set(kind)
    try:
        yield
    finally:
        _CLUSTER.reset(token)


def _cluster():
    if keras.backend.backend() != "tensorflow":
        return None  # PyTorch's compiler stops at a context variable
    return _CLUSTER.get()


def _in_tensorflow_graph():
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def _in_torch_compile():
    if keras.backend.backend() != "torch":
        return False
    import torch

    return torch.compiler.is_compiling()


def with_own_code(function):
    """A copy for `torch.compile`, which counts versions by code: each is more general than the one
    before it, and at the eighth it gives up."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


@functools.cache
def _compiled(function, options, shapes):
    # The arrays are arguments: closed over, they would be baked into the program as constants.
    # All shapes but the batch size are in the key: a TensorFlow function that has seen two shapes
    # would generalize what must be known, the rank and the channel size.
    def call(arrays):
        return function(**arrays, **dict(options))

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        def clustered(arrays):
            with _within("function"):
                return call(arrays)

        return tf.function(clustered, jit_compile=True, autograph=False, reduce_retracing=True)
    if backend == "jax":
        import jax

        return jax.jit(call)
    if backend == "torch":
        import torch
        from torch.utils.checkpoint import checkpoint

        # What sums nothing is made again in the backward pass. Else PyTorch writes the mask of the
        # maximum: forward + backward of a TLU at 32x56x56x64 49 ms, and 7 so.
        recompute = "epsilon" not in {*dict(options), *dict(shapes)}

        def compiled(arrays):
            if recompute and _in_torch_compile():
                return checkpoint(call, arrays, use_reentrant=False, preserve_rng_state=False)
            return call(arrays)

        return torch.compile(with_own_code(compiled))
    raise ValueError(
        "`jit_compile=True` must run on the TensorFlow, JAX or PyTorch backend. Received: "
        f"backend={backend!r}. Pass `jit_compile=None`."
    )
