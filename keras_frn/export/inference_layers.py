"""The layers that stand in an inference copy for those of the model."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from .. import graph
from .. import ops as frn_ops
from ..layers import FilterResponseNormalization, read_epsilon, read_gamma
from ..typing import Array, Tensor

__all__ = [
    "REPLACED",
    "Activation",
    "ActivationLayer",
    "Kept",
    "MaxPooling",
    "Normalization",
    "is_channels_last",
    "list_classes",
    "rank_of",
]

# The most positions in a row or a column of which an Ethos-U takes the mean.
_LONGEST = 4096

# The scale of SELU, and its alpha.
_SELU = 1.0507009873554805, 1.6732632423543772

_Function = Callable[[Tensor], Tensor]


class Kept(layers.Layer):
    """Calls a layer of the model itself: one that its config does not make again."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        super().__init__(name=layer.name, dtype="float32")
        self.supports_masking = True
        self.layer = layer

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        return self.layer.compute_mask(inputs, previous_mask)


class MaxPooling(layers.Layer):
    """Max-pooling, unless the normalization before it has done it already."""

    def __init__(self, pooling: keras.layers.Layer) -> None:
        super().__init__(name=pooling.name, dtype="float32")
        self.pooling = pooling
        self.data_format = pooling.data_format
        self.is_done = False

    def call(self, inputs: Tensor) -> Tensor:
        return inputs if self.is_done else self.pooling(inputs)


class Activation:
    """An activation in the operators of floats or, `in_steps`, in others that integers want.

    ai-edge-quantizer has no LEAKY_RELU, PRELU and MINIMUM, and the files of TensorFlow's converter
    no headroom in 16 bits. HARD_SWISH has no 16 bits at all. TensorFlow Lite Micro computes a RELU6
    in the scale of its input, without an error, unless the operator before it takes it in. In 8
    bits a network with PRELU takes twice as long as with steps, and its error is a little larger.
    With LEAKY_RELU the errors are alike, and steps are twice as many pieces for XNNPACK. ELU, NEG
    and SQUARE have no integers; in 8 bits, squares of a saturated tensor are less accurate than in
    float. Of an EXP whose results reach from 0 to thousands integers keep nothing.

    Attributes:
        wants_steps: Whether 8 bits want it in steps, too.
        is_fusible: Whether the operator before it may take it in, as it may a RELU6.
        is_homogeneous: Whether f(k * x) = k * f(x) for k > 0.
    """

    in_steps = is_fusible = is_homogeneous = False

    def __init__(
        self, function: _Function, steps: _Function | None = None, wants_steps: bool = False
    ) -> None:
        self.function, self.steps, self.wants_steps = function, steps or function, wants_steps

    def __call__(self, inputs: Tensor) -> Tensor:
        return self.steps(inputs) if self.in_steps else self.function(inputs)

    @classmethod
    def of(cls, source: Any) -> "Activation | None":
        """The forms of such a layer, operation or function, or None. Argmax has one, too."""
        if type(source) is layers.Activation:
            source = source.activation
        if _is_named(source, "hard_silu"):
            return cls(ops.hard_silu, lambda x: x * _clip_in_steps(x + 3.0, 6.0) / 6.0)
        if _is_named(source, "softplus"):
            return cls(_softplus)
        if _is_named(source, "log_sigmoid"):
            return cls(lambda x: x - _softplus(x))
        if _is_named(source, "mish"):
            return cls(source, _mish_in_steps, wants_steps=True)
        if _is_named(source, "selu"):
            return cls(ops.selu, lambda x: _SELU[0] * _elu_in_steps(x, _SELU[1]), wants_steps=True)
        if type(source) is layers.ELU or _is_named(source, "elu"):
            alpha = getattr(source, "alpha", 1.0)
            steps = functools.partial(_elu_in_steps, alpha=alpha)
            return cls(lambda x: ops.elu(x, alpha), steps, wants_steps=True)
        if graph.is_operation(source, ops.square):
            return cls(ops.square, lambda x: x * x)
        if graph.is_operation(source, ops.negative):
            return cls(ops.negative, lambda x: -1.0 * x, wants_steps=True)
        for index, find in (ops.argmax, "argmax"), (ops.argmin, "argmin"):
            if graph.is_operation(source, index) and source.axis is not None:
                return cls(functools.partial(_find_index, find, source))
        slope, largest = _read_rectifier(source)
        if largest is not None:
            steps = functools.partial(_clip_in_steps, largest=largest)
            result = cls(lambda x: ops.clip(x, 0.0, largest), steps, wants_steps=True)
            result.is_fusible = largest == 6
            return result
        if slope is None or np.any(slope > 1):
            return None
        is_prelu = np.ndim(slope) > 0

        def rectify(x: Tensor) -> Tensor:
            if is_prelu:  # in the words that TensorFlow's converter knows as a PRELU
                return ops.relu(x) + -slope * ops.relu(-x)
            return ops.leaky_relu(x, slope)

        result = cls(rectify, lambda x: ops.maximum(x, slope * x), wants_steps=is_prelu)
        result.is_homogeneous = True
        return result


def _read_rectifier(source: Any) -> tuple[Any, Any]:
    """The slope of a leaky ReLU below zero and None, None and the largest value of a ReLU that has
    one, or None twice."""
    kind = type(source)
    if _is_named(source, "relu6"):
        return None, 6.0
    if _is_named(source, "leaky_relu"):
        return getattr(source, "negative_slope", 0.2), None
    if kind is layers.ReLU and not source.threshold:
        slope, largest = source.negative_slope or None, source.max_value
        return (None, None) if slope and largest is not None else (slope, largest)
    if kind is layers.LeakyReLU:
        return source.negative_slope, None
    if kind is layers.PReLU:
        return ops.convert_to_numpy(source.alpha).astype("float32"), None
    is_clip = graph.is_operation(source, lambda x: ops.clip(x, 0, 6))
    if is_clip and not np.any(source.x_min) and np.ndim(source.x_max) == 0:
        return None, source.x_max
    return None, None


def _is_named(source: Any, name: str) -> bool:
    """Whether it is the function or the operation of this name."""
    operation = getattr(ops, name, None)
    is_function = source is getattr(keras.activations, name)
    return is_function or (operation is not None and graph.is_operation(source, operation))


def _clip_in_steps(x: Tensor, largest: float) -> Tensor:
    return largest - ops.relu(largest - ops.relu(x))


def _softplus(x: Tensor) -> Tensor:
    # The converter's own is log(1 + exp(x)), which is infinite above 88.
    return ops.relu(x) - ops.log(ops.sigmoid(ops.abs(x)))


def _mish_in_steps(x: Tensor) -> Tensor:
    """`x * tanh(softplus(x))`, as tanh(-log(q)) is (1 - q^2) / (1 + q^2)."""
    q = ops.sigmoid(-1.0 * x)
    root = ops.rsqrt(1.0 + q * q)
    return x * (2.0 * (root * root) - 1.0)


def _elu_in_steps(x: Tensor, alpha: float) -> Tensor:
    """`max(x, 0) + alpha * (exp(min(x, 0)) - 1)`."""
    positive = ops.relu(x)
    root = ops.rsqrt(ops.sigmoid(positive - x))  # root^2 is 1 + exp(min(x, 0))
    return positive + alpha * (root * root - 2.0)


def _find_index(name: str, source: Any, x: Tensor) -> Tensor:
    import tensorflow as tf

    # Keras' own looks at the bits of zeros, for which LiteRT has no operator.
    found = getattr(tf, name)(x, source.axis, "int32")
    return tf.expand_dims(found, source.axis) if source.keepdims else found


class ActivationLayer(layers.Layer):
    """An `Activation` as a layer."""

    def __init__(self, name: str, activation: Activation) -> None:
        super().__init__(name=name, dtype="float32")
        self.supports_masking = True
        self.activation = activation

    def call(self, inputs: Tensor) -> Tensor:
        return self.activation(inputs)


def _convolve(
    x: Tensor,
    kernel: Tensor,
    strides: Sequence[int],
    padding: str,
    dilations: Sequence[int],
    is_depthwise: bool = False,
) -> Tensor:
    """A convolution in 2D that is one operator also if it is dilated.

    Where the batch size is unknown, TensorFlow's own is three, of which two move positions into the
    batch and back, with about twenty for the sizes if those are unknown too. ai-edge-quantizer has
    none of them.
    """
    import tensorflow as tf

    is_grouped = not is_depthwise and kernel.shape[-2] != x.shape[-1]
    # On a CPU TensorFlow has no such depthwise convolution: it is there to be traced.
    if set(dilations) == {1} or is_grouped or tf.executing_eagerly():
        convolve = ops.depthwise_conv if is_depthwise else ops.conv
        return convolve(x, kernel, tuple(strides), padding, "channels_last", tuple(dilations))
    if not is_depthwise:
        return tf.nn.conv2d(x, kernel, strides, padding.upper(), dilations=dilations)
    return tf.raw_ops.DepthwiseConv2dNative(
        input=x,
        filter=kernel,
        strides=[1, *strides, 1],
        padding=padding.upper(),
        dilations=[1, *dilations, 1],
    )


class _Dilated(layers.Layer):
    """A dilated convolution of one operator."""

    def call(self, inputs: Tensor) -> Tensor:
        # With strides as well, Keras has a way of its own.
        if set(self.dilation_rate) == {1} or set(self.strides) != {1} or not is_channels_last(self):
            return super().call(inputs)
        x, padding = inputs, self.padding
        if padding == "causal":
            x, padding = ops.pad(x, self._compute_causal_padding()), "valid"
        is_separable = hasattr(self, "pointwise_kernel")
        is_depthwise = is_separable or hasattr(self, "depth_multiplier")
        kernel = self.depthwise_kernel if is_separable else self.kernel
        dilations = tuple(self.dilation_rate)
        if self.rank == 1:
            x, kernel, dilations = ops.expand_dims(x, 1), kernel[None], (1, *dilations)
        x = _convolve(x, kernel, (1, 1), padding, dilations, is_depthwise)
        if is_separable:
            pointwise = self.pointwise_kernel
            x = ops.conv(x, pointwise if self.rank == 2 else pointwise[None])
        if self.rank == 1:
            x = ops.squeeze(x, 1)
        return self.activation(x if self.bias is None else x + self.bias)


def _is_flat(layer: keras.layers.Layer, window: tuple[int, ...], inputs: Tensor) -> bool:
    """Whether a layer in 3D is one in 2D on slices in depth."""
    # TensorFlow's padding is negative there, and only in 3D.
    is_cut = layer.padding == "same" and any(s - w > 1 for s, w in zip(layer.strides, window))
    return None not in inputs.shape[1:] and is_channels_last(layer) and not is_cut


class Conv3D(layers.Conv3D):
    """A 3D convolution as one of 2D: LiteRT has no integers for CONV_3D, and slow floats.

    The slices in depth that a position sees stand side by side in the channels.
    """

    def call(self, inputs: Tensor) -> Tensor:
        if not _is_flat(self, self.kernel_size, inputs):
            return super().call(inputs)
        (depth, *sizes, channels), (kernel, *kernels) = inputs.shape[1:], self.kernel_size
        (stride, *strides), (dilation, *dilations) = self.strides, self.dilation_rate
        reach = (kernel - 1) * dilation + 1
        is_same = self.padding == "same"
        outputs = -(-depth // stride) if is_same else (depth - reach) // stride + 1
        before = max((outputs - 1) * stride + reach - depth, 0) // 2 if is_same else 0
        # Steps of a stride become blocks of rows, as a slice with a stride takes long.
        blocks = outputs - 1 + -(-reach // stride)
        after = blocks * stride - depth - before
        x = inputs if after >= 0 else inputs[:, :after]
        x = ops.pad(x, [(0, 0), (before, max(after, 0)), *[(0, 0)] * 3])
        x = ops.reshape(x, (-1, blocks, stride * sizes[0], sizes[1], channels))
        parts = []
        for start in range(0, reach, dilation):
            block, row = start // stride, start % stride * sizes[0]
            parts.append(x[:, block : block + outputs, row : row + sizes[0]])
        width = channels // self.groups
        groups = [slice(i, i + width) for i in range(0, channels, width)]
        x = ops.concatenate([part[..., group] for group in groups for part in parts], -1)
        x = ops.reshape(x, (-1, *sizes, kernel * channels))
        weights = ops.transpose(self.kernel, (1, 2, 0, 3, 4))
        weights = ops.reshape(weights, (*kernels, kernel * width, self.filters))
        x = _convolve(x, weights, strides, self.padding, dilations)
        x = x if self.bias is None else x + ops.reshape(self.bias, (1, 1, 1, -1))
        return ops.reshape(self.activation(x), (-1, outputs, *x.shape[1:]))


class Conv3DTranspose(layers.Conv3DTranspose):
    """A transposed 3D convolution as one of 2D, whose outputs are added up in depth."""

    def call(self, inputs: Tensor) -> Tensor:
        is_plain = self.output_padding is None and set(self.dilation_rate) == {1}
        if not is_plain or not _is_flat(self, self.kernel_size, inputs):
            return super().call(inputs)
        (depth, *sizes, channels), (kernel, *kernels) = inputs.shape[1:], self.kernel_size
        stride, *strides = self.strides
        weights = ops.transpose(self.kernel, (1, 2, 0, 3, 4))
        weights = ops.reshape(weights, (*kernels, kernel * self.filters, channels))
        x = ops.reshape(inputs, (-1, *sizes, channels))
        x = ops.conv_transpose(x, weights, tuple(strides), self.padding)
        x = ops.reshape(x, (-1, depth, *x.shape[1:]))
        sizes = x.shape[2:4]
        blocks = depth + (kernel - 1) // stride
        phases: list[Tensor] = []
        for phase in range(stride):
            total = None
            for block, step in enumerate(range(phase, kernel, stride)):
                part = x[..., step * self.filters : (step + 1) * self.filters]
                part = ops.pad(part, [(0, 0), (block, blocks - depth - block), *[(0, 0)] * 3])
                total = part if total is None else total + part
            phases.append(0 * phases[0] if total is None else total)
        parts = [ops.reshape(x, (-1, 1, math.prod(sizes) * self.filters)) for x in phases]
        x = ops.reshape(ops.concatenate(parts, 1), (-1, blocks * stride, *sizes, self.filters))
        cut = max(kernel - stride, 0)
        first, last = (cut // 2, 0) if self.padding == "same" else (0, cut)
        x = x[:, first : first + depth * stride + last]
        return self.activation(x if self.bias is None else x + self.bias)


class _Pooling3D(layers.Layer):
    """3D pooling, which LiteRT does not have, as pooling of rows and columns and then of depth."""

    def call(self, inputs: Tensor) -> Tensor:
        if not _is_flat(self, self.pool_size, inputs):
            return super().call(inputs)
        depth, *sizes, channels = inputs.shape[1:]
        pool = ops.max_pool if isinstance(self, layers.MaxPooling3D) else ops.average_pool
        (size, *rest), (stride, *strides) = self.pool_size, self.strides
        x = ops.reshape(inputs, (-1, *sizes, channels))
        x = pool(x, tuple(rest), tuple(strides), self.padding, "channels_last")
        sizes = x.shape[1:3]
        x = ops.reshape(x, (-1, depth, math.prod(sizes), channels))
        x = pool(x, (size, 1), (stride, 1), self.padding, "channels_last")
        return ops.reshape(x, (-1, x.shape[1], *sizes, channels))


class Dense(layers.Dense):
    """A dense layer on maps as one on rows, as TensorFlow's converter computes the sizes of maps at
    run time, by operators that NPUs and TensorFlow Lite Micro lack."""

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        *sizes, channels = inputs.shape[1:]
        if not sizes or None in sizes:
            return super().call(inputs, training)
        x = super().call(ops.reshape(inputs, (-1, channels)), training)
        return ops.reshape(x, (-1, *sizes, self.units))


class _GlobalMaxPooling(layers.Layer):
    """Global max-pooling as one window, as ai-edge-quantizer has no REDUCE_MAX."""

    def call(self, inputs: Tensor) -> Tensor:
        *sizes, channels = inputs.shape[1:]
        if None in sizes or not is_channels_last(self):
            return super().call(inputs)
        window = math.prod(sizes[:-1]), sizes[-1]
        x = ops.max_pool(ops.reshape(inputs, (-1, *window, channels)), window, 1)
        kept = [1] * len(sizes) if self.keepdims else []
        return ops.reshape(x, (-1, *kept, channels))


class _UpSampling(layers.Layer):
    """Repeats positions by one operator in 2D, instead of TILE, which quantizers and NPUs lack."""

    def call(self, inputs: Tensor) -> Tensor:
        is_nearest = getattr(self, "interpolation", "nearest") == "nearest"
        is_known = None not in inputs.shape[1:]
        if not is_nearest and not is_known and is_channels_last(self):
            import tensorflow as tf

            # Keras asks for the sizes in a way that cannot be traced.
            return tf.image.resize(inputs, tf.shape(inputs)[1:3] * self.size, self.interpolation)
        if not is_nearest or not is_known or not is_channels_last(self):
            return super().call(inputs)
        *sizes, channels = inputs.shape[1:]
        factors = [self.size] if isinstance(self.size, int) else list(self.size)
        if len(sizes) == 1:
            return ops.squeeze(_repeat(ops.expand_dims(inputs, 1), [1, *factors]), 1)
        if len(sizes) == 2:
            return _repeat(inputs, factors)
        x = _repeat(ops.reshape(inputs, (-1, *sizes[1:], channels)), factors[1:])
        _, *area, _ = x.shape
        x = ops.reshape(x, (-1, sizes[0], math.prod(area), channels))
        x = _repeat(x, [factors[0], 1])
        return ops.reshape(x, (-1, x.shape[1], *area, channels))


def _repeat(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Repeats the rows and columns of images."""
    size = tuple(n * factor for n, factor in zip(x.shape[1:3], factors))
    return ops.image.resize(x, size, "nearest", data_format="channels_last")


class Normalization(layers.Layer):
    """One of our normalizations with its weights as constants, in a float or an integer form.

    The integer form takes `rsqrt(max(nu2, floor))`, as the rare large values of
    `rsqrt(nu2 + epsilon)` would stretch the integer range of all others. Where the mean squares
    span more than integers resolve, it normalizes twice: with a large epsilon, which brings the
    samples to similar scales, and then exactly. Above the floor both equal the float form.

    Attributes:
        gamma, beta, tau, alpha: The weights as arrays, or None.
        epsilon: All that is added to the mean square.
        floor: The least mean square of the integer form, or None for the float form.
        first_epsilon: The epsilon of the first of two normalizations, or None for one.
        pooling: The max-pooling that follows, as a function, where it comes before the scale.
    """

    def __init__(self, source: FilterResponseNormalization) -> None:
        super().__init__(name=source.name, dtype="float32")
        self.supports_masking = True
        self.rank = rank_of(source)
        self.axis = -1 if source.axis == self.rank - 1 else source.axis
        self.epsilon = read_epsilon(source)
        for name in ("gamma", "beta", "tau", "alpha"):
            weight = read_gamma(source) if name == "gamma" else getattr(source, name, None)
            value = None if weight is None else ops.convert_to_numpy(weight).astype("float32")
            setattr(self, name, value)
        self.floor = self.first_epsilon = self.pooling = None

    @property
    def is_channels_last(self) -> bool:
        """Whether the channels are the last axis."""
        return self.axis == -1

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None and (self.floor is not None or self.pooling is not None):
            if self.rank < 5 or None in inputs.shape[1:] or not self.is_channels_last:
                return self._normalize_in_steps(inputs)
            # TensorFlow's converter does not survive 16-bit volumes.
            depth, *sizes, channels = inputs.shape[1:]
            x = ops.reshape(inputs, (-1, depth, math.prod(sizes), channels))
            return ops.reshape(self._normalize_in_steps(x), (-1, *inputs.shape[1:]))
        options = {"axis": self.axis, "epsilon": self.epsilon.astype("float32"), "mask": mask}
        y = frn_ops.filter_response_normalization(inputs, self.gamma, self.beta, **options)
        y = self._threshold(y)
        return y if self.pooling is None else self.pooling(y)

    def _normalize_in_steps(self, x: Tensor) -> Tensor:
        epsilon, gamma = self.epsilon, self.gamma
        if self.first_epsilon is not None:
            # With e1 and then e2 the result is x / sqrt((1 + e2) * nu2 + e1 * e2).
            x = x * ops.rsqrt(self.mean_square(x) + self.align(self.first_epsilon, x))
            epsilon = epsilon / (self.first_epsilon - epsilon)
            gamma = (1.0 if gamma is None else gamma) * np.sqrt(1 + epsilon)
        nu2 = self.mean_square(x)
        # An eighth of the floor is half a step of 8 bits.
        if self.floor is None or np.max(epsilon) > self.floor / 8:
            nu2 = nu2 + self.align(epsilon, x)
        if self.floor is not None:
            nu2 = ops.maximum(nu2, self.align(self.floor, x))
        scale = ops.rsqrt(nu2)
        scale = scale if gamma is None else scale * self.align(gamma, x)
        y = (x if self.pooling is None else self.pooling(x)) * scale
        return self._threshold(y if self.beta is None else y + self.align(self.beta, x))

    def _threshold(self, y: Tensor) -> Tensor:
        return y if self.tau is None else frn_ops.tlu(y, self.tau, self.alpha, axis=self.axis)

    def mean_square(self, x: Tensor) -> Tensor:
        """The mean square of an input per sample and channel, of the input's rank."""
        axes = [axis for axis in range(1, len(x.shape)) if axis != self.axis % len(x.shape)]
        squares = x * x
        sizes = [x.shape[axis] for axis in axes]
        if None in sizes or max(sizes, default=0) <= _LONGEST or not self.is_channels_last:
            return ops.mean(squares, axis=axes, keepdims=True) if axes else squares
        positions = math.prod(sizes)
        rows = next(n for n in range(math.isqrt(positions), 0, -1) if positions % n == 0)
        squares = ops.reshape(squares, (-1, rows, positions // rows, x.shape[-1]))
        return ops.reshape(ops.mean(squares, (1, 2)), (-1, *(1 for _ in sizes), x.shape[-1]))

    def align(self, value: Any, x: Tensor) -> Array:
        """A constant of the rank of `x`, as converters want it."""
        value = np.asarray(value, "float32").reshape(-1)
        shape = [1] * len(x.shape)
        shape[self.axis] = value.size
        return value.reshape(shape)


def rank_of(layer: keras.layers.Layer) -> int:
    """The rank of a layer's input."""
    return len(layer.get_build_config()["input_shape"])


def is_channels_last(layer: keras.layers.Layer) -> bool:
    """Whether the channels are the last axis, as far as the layer has a format."""
    return getattr(layer, "data_format", "channels_last") == "channels_last"


def list_classes(ranks: str, *names: str) -> tuple[type[layers.Layer], ...]:
    """The layers of Keras of some names, in which N is the rank."""
    return tuple(getattr(layers, name.replace("N", rank, 1)) for name in names for rank in ranks)


_CALLS = {
    _Dilated: list_classes("12", "ConvND", "DepthwiseConvND", "SeparableConvND"),
    _GlobalMaxPooling: list_classes("123", "GlobalMaxPoolingND"),
    _UpSampling: list_classes("123", "UpSamplingND"),
    _Pooling3D: list_classes("3", "MaxPoolingND", "AveragePoolingND"),
}
# Layers that are made again in another class, which computes the same.
REPLACED = {
    **{x: type(x.__name__, (call, x), {}) for call, kinds in _CALLS.items() for x in kinds},
    layers.Dense: Dense,
    layers.Conv3D: Conv3D,
    layers.Conv3DTranspose: Conv3DTranspose,
}
