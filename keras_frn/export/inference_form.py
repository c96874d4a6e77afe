"""A float32 copy of a model that computes the same function in a form that quantizes well.

Filter Response Normalization does not see a positive factor of an input channel: `x -> k * x` with
`epsilon -> k**2 * epsilon` leaves its output as it is. So the layer before it may scale its filters
until each channel has a root mean square of one, and one integer scale fits all channels.
"""

import keras
import numpy as np
from keras import layers, ops

from .. import ops as frn_ops
from ..layers import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

# Shares of the largest mean square of a layer: below the first, 8 bits leave fewer than 4 steps;
# below the second, less than half a step.
_RESOLVED, _VISIBLE = 1 / 64, 1 / 512
# What the first of two normalizations adds. Mean squares spread over a factor of 100 become spread
# over about 10 in each of the two.
_FIRST_EPSILON = 1 / 16


class _MaxPooling(layers.Layer):
    """Max-pooling, unless the normalization before it has done it already."""

    def __init__(self, pooling):
        super().__init__(name=pooling.name, dtype="float32")
        self.pooling = pooling
        self.data_format = pooling.data_format
        self.is_done = False

    def call(self, inputs):
        return inputs if self.is_done else self.pooling(inputs)


class _KnownSizes:
    """Reshapes to sizes that are known without asking for the batch size at run time, which takes
    four operators that no NPU has."""

    def call(self, inputs):
        shape = self.compute_output_shape(inputs.shape)
        if None in shape[1:] or getattr(self, "data_format", "channels_last") != "channels_last":
            return super().call(inputs)
        return ops.reshape(inputs, (-1, *shape[1:]))


class _Flatten(_KnownSizes, layers.Flatten):
    pass


class _Reshape(_KnownSizes, layers.Reshape):
    pass


_COMMUTING = (
    layers.Identity,
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
    _MaxPooling,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.LeakyReLU,
)
# Added numbers go through unchanged.
_SHIFTED = (
    layers.Identity,
    _MaxPooling,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.Dropout,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
)
_MAX_POOLING = (layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D)
_RESHAPING = {layers.Flatten: _Flatten, layers.Reshape: _Reshape}
_BIASED = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
_OTHER_FLOATS = ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")
# f(k * x) = k * f(x) for k > 0.
_HOMOGENEOUS = (keras.activations.linear, keras.activations.relu, keras.activations.leaky_relu)


class _Normalization(layers.Layer):
    """One of our normalizations with its weights as constants, in a float or an integer form, and
    with the max-pooling that follows it where `pool_first` says so.

    The integer form takes `rsqrt(max(nu2, floor))`, as the rare large values of
    `rsqrt(nu2 + epsilon)` would stretch the integer range of all others. Where the mean squares
    span more than 8 bits resolve, it normalizes twice: with a large epsilon, which brings the
    samples to similar scales, and then exactly. Above the floor both equal the float form.
    """

    def __init__(self, source):
        super().__init__(name=source.name, dtype="float32")
        self.supports_masking = True
        self.axis = source.axis
        epsilon = np.asarray(source.epsilon, "float64")
        if source.use_learned_epsilon:
            epsilon = epsilon + np.abs(source.learned_epsilon.numpy())
        weights = (getattr(source, name, None) for name in ("gamma", "beta", "tau", "alpha"))
        self.constants = tuple(None if w is None else w.numpy() for w in weights)
        self.epsilon = epsilon
        self.rank = source.input_spec.ndim
        self.recorded = None
        self.floor = None
        self.first_epsilon = None
        self.pooling = None

    def call(self, inputs, training=None, mask=None):
        gamma, beta, tau, alpha = (
            None if c is None else c.astype("float32") for c in self.constants
        )
        if self.recorded is not None:
            self.recorded.append(ops.convert_to_numpy(self._mean_square(inputs)))
        if mask is None and (self.floor is not None or self.pooling is not None):
            return self._in_steps(inputs, gamma, beta, tau, alpha)
        options = {"axis": self.axis, "epsilon": self.epsilon.astype("float32"), "mask": mask}
        if tau is None:
            y = frn_ops.filter_response_normalization(inputs, gamma, beta, **options)
        else:
            y = frn_ops.filter_response_normalization_tlu(
                inputs, gamma, beta, tau, alpha, **options
            )
        return y if self.pooling is None else self.pooling(y)

    def _in_steps(self, x, gamma, beta, tau, alpha):
        epsilon = self.epsilon
        if self.first_epsilon is not None:
            # With e1 and then e2 the result is x / sqrt((1 + e2) * nu2 + e1 * e2).
            x = x * ops.rsqrt(self._mean_square(x) + self.aligned(self.first_epsilon, x))
            epsilon = epsilon / (self.first_epsilon - epsilon)
            gamma = (1.0 if gamma is None else gamma) * np.sqrt(1 + epsilon)
        nu2 = self._mean_square(x)
        if self.floor is None or np.max(epsilon) > _VISIBLE * self.floor / _RESOLVED:
            nu2 = nu2 + self.aligned(epsilon, x)
        if self.floor is not None:
            nu2 = ops.maximum(nu2, self.aligned(self.floor, x))
        scale = ops.rsqrt(nu2)
        scale = scale if gamma is None else scale * self.aligned(gamma, x)
        y = (x if self.pooling is None else self.pooling(x)) * scale
        if beta is not None:
            y = y + self.aligned(beta, x)
        return y if tau is None else frn_ops.tlu(y, tau, alpha, axis=self.axis)

    def _mean_square(self, x):
        axes = [axis for axis in range(1, len(x.shape)) if axis != self.axis % len(x.shape)]
        if self.floor is None:
            return frn_ops._mean(x * x, axes, in_parts=False)
        return ops.mean(x * x, axis=axes, keepdims=True) if axes else x * x

    def aligned(self, value, x):
        """A constant of x's rank, as converters want it."""
        value = np.asarray(value, "float32").reshape(-1)
        shape = [1] * len(x.shape)
        shape[self.axis] = value.size
        return value.reshape(shape)


def input_structure(model):
    """The input of a functional or Sequential model: symbolic tensors, nested as they are."""
    return model.input if isinstance(model, keras.Function) else model.inputs[0]


class InferenceCopy:
    """A float32 copy of a functional or Sequential model, with its wiring.

    Its layers and weights are new; nested models keep their place. `normalizations` are the layers
    of this package in it, `equalized` the names of those that `equalize` served, and
    `not_equalized` maps the names of the others to the reason.
    """

    def __init__(self, model):
        self._copies = []
        self._calls = []
        self._same = {}
        self._mean_squares = None
        self.equalized, self.not_equalized = [], {}
        # A plain functional model, without what the caller compiled: a copy may not restore that.
        outputs = model.output if isinstance(model, keras.Function) else model.outputs[0]
        model = keras.Model(input_structure(model), outputs, name=model.name)
        inputs = keras.tree.map_structure(
            lambda t: keras.Input(batch_shape=t.shape, dtype=_float32(t.dtype), name=t.name),
            model.input,
        )
        self.model = keras.models.clone_model(
            model,
            input_tensors=inputs,
            clone_function=self._clone,
            call_function=self._call,
            recursive=True,
        )
        for source, copy in self._copies:
            if not isinstance(copy, _Normalization):
                weights = source.get_weights()
                zeros = [np.zeros(w.shape, w.dtype) for w in copy.weights[len(weights) :]]
                copy.set_weights(weights + zeros)
                if hasattr(copy, "finalize_state"):
                    copy.finalize_state()  # of layers that `adapt` to data
        self.normalizations = [c for _, c in self._copies if isinstance(c, _Normalization)]

    def _clone(self, layer):
        if type(layer) in (FilterResponseNormalization, FilterResponseNormalizationTLU):
            copy = _Normalization(layer)
        else:
            config = _float32(layer.get_config())
            kind = _RESHAPING.get(type(layer), type(layer))
            if kind in _BIASED:
                config["use_bias"] = True  # which the kernels of the runtime have anyway
            # A Lambda is the caller's own code, not a file's.
            options = {"safe_mode": False} if isinstance(layer, layers.Lambda) else {}
            copy = kind.from_config(config, **options)
            if kind in _MAX_POOLING and _is_channels_last(copy):
                copy = _MaxPooling(copy)
        if isinstance(layer, keras.Layer):
            self._copies.append((layer, copy))
        return copy

    def _call(self, layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        self._connect(layer, _tensors((args, kwargs)), _tensors(outputs))
        return outputs

    def _connect(self, layer, inputs, outputs):
        if isinstance(layer, keras.Sequential):
            for inner in layer.layers[:-1]:
                between = keras.KerasTensor(())
                self._connect(inner, inputs, [between])
                inputs = [between]
            self._connect(layer.layers[-1], inputs, outputs)
        elif isinstance(layer, keras.Function):
            self._calls.append((layer, [], []))
            for inside, outside in zip(layer.inputs, inputs):
                self._same[id(inside)] = self._tensor(outside)
            for inside, outside in zip(layer.outputs, outputs):
                self._same[id(outside)] = self._tensor(inside)
        else:
            self._calls.append((layer, inputs, outputs))

    def _tensor(self, tensor):
        """One of the tensors that are the same on both sides of the border of a nested model."""
        while id(tensor) in self._same:
            tensor = self._same[id(tensor)]
        return tensor

    def absorb_offsets(self):
        """Moves beta behind TLU, and there into the bias of the next layer, where that is exact.

        `max(y + beta, tau) = max(y, tau - beta) + beta`: one operator less on the full tensor. It
        is exact unless the next layer pads with zeros.
        """
        for layer in self.normalizations:
            gamma, beta, tau, alpha = layer.constants
            outputs = [outputs for caller, _, outputs in self._calls if caller is layer]
            if beta is None or alpha is not None or len(outputs) != 1:
                continue
            try:
                thresholds, targets = self._absorbers(outputs[0][0])
            except _NotScalableError:
                continue
            if layer.axis not in (-1, layer.rank - 1):
                continue
            if tau is not None:
                tau = tau - beta
            for threshold in thresholds:
                threshold.tau.assign(threshold.tau - beta)
            for target in targets:
                *others, bias = target.get_weights()
                kernel = others[0].astype("float64").reshape(-1, *others[0].shape[-2:])
                target.set_weights([*others, bias + beta @ kernel.sum(0)])
            layer.constants = (gamma, None, tau, alpha)

    def _absorbers(self, tensor):
        """The TLU layers to shift and the layers whose bias takes what is added to `tensor`."""
        tensor = self._tensor(tensor)
        if any(self._tensor(out) is tensor for out in self.model.outputs):
            raise _NotScalableError
        thresholds, targets = [], []
        for layer, inputs, outputs in self._calls:
            if not any(self._tensor(used) is tensor for used in inputs):
                continue
            if len(inputs) != 1 or sum(caller is layer for caller, _, _ in self._calls) > 1:
                raise _NotScalableError
            if _is_threshold(layer):
                found = self._absorbers(outputs[0])
                thresholds += [layer, *found[0]]
                targets += found[1]
            elif isinstance(layer, _SHIFTED) and _is_channels_last(layer):
                found = self._absorbers(outputs[0])
                thresholds += found[0]
                targets += found[1]
            elif _takes_offset(layer):
                targets.append(layer)
            else:
                raise _NotScalableError
        return thresholds, targets

    def pool_first(self):
        """Takes maxima before the scale where that is exact, as it leaves fewer positions to scale.

        `max(s * x + beta) = s * max(x) + beta` for s > 0, and TLU comes through any maximum. The
        mean squares are those of all positions.
        """
        for layer in self.normalizations:
            gamma, _, _, alpha = layer.constants
            rises = gamma is None or np.all(gamma > 0)
            pooling = self._next_pooling(layer) if rises and alpha is None else None
            if pooling is not None and layer.axis in (-1, layer.rank - 1):
                # Its method, as a layer that is built takes no new layers.
                layer.pooling, pooling.is_done = pooling.pooling.call, True

    def _next_pooling(self, layer):
        """The `_MaxPooling` behind the layer, or behind its TLU, if nothing else reads either."""
        outputs = [outputs for caller, _, outputs in self._calls if caller is layer]
        if len(outputs) != 1:
            return None
        if isinstance(layer, _MaxPooling):
            return layer
        (tensor,) = outputs[0]
        readers = self._readers(tensor)
        # Another tensor is read inside of a nested model, which checks sizes at its border.
        if len(readers) != 1 or readers[0][1] is not tensor:
            return None
        reader = readers[0][0]
        passes_on = isinstance(reader, _MaxPooling) or _is_threshold(reader)
        return self._next_pooling(reader) if passes_on else None

    def _readers(self, tensor):
        """Pairs of a layer, or None for the model's output, and the tensor as it is read there."""
        tensor = self._tensor(tensor)
        calls = [(caller, used) for caller, inputs, _ in self._calls for used in inputs]
        calls += [(None, output) for output in self.model.outputs]
        return [(reader, used) for reader, used in calls if self._tensor(used) is tensor]

    def equalize(self, batches):
        """Scales each input channel of a normalization to unit root mean square on the batches."""
        self._record(batches)
        for layer in self.normalizations:
            values = self._mean_squares[layer]
            channels = layer.axis % values.ndim
            others = tuple(axis for axis in range(values.ndim) if axis != channels)
            factor = 1 / np.sqrt(values.mean(others) + layer.epsilon)
            try:
                targets = self._scalable(self._input_of(layer), factor)
            except _NotScalableError as reason:
                self.not_equalized[layer.name] = str(reason)
                continue
            for target, part in targets:
                target.set_weights(_scaled_weights(target, part))
            layer.epsilon = layer.epsilon * factor**2
            self._mean_squares[layer] = values * np.expand_dims(factor, others) ** 2
            self.equalized.append(layer.name)

    def use_integer_form(self, batches):
        """Gives each normalization the integer form that fits its mean squares on the batches."""
        if self._mean_squares is None:
            self._record(batches)
        for layer in self.normalizations:
            values = self._mean_squares[layer]
            values = values + layer.aligned(layer.epsilon, values)
            largest = values.max()
            if np.quantile(values, 0.1) < _RESOLVED * largest:
                layer.first_epsilon = np.maximum(_FIRST_EPSILON * largest, 2 * layer.epsilon)
                largest = 1.0
            layer.floor = _RESOLVED * largest

    def _record(self, batches):
        for layer in self.normalizations:
            layer.recorded = []
        for batch in batches:
            self.model(keras.tree.pack_sequence_as(self.model.input, batch), training=False)
        self._mean_squares = {}
        for layer in self.normalizations:
            self._mean_squares[layer] = np.concatenate(layer.recorded).astype("float64")
            layer.recorded = None

    def _input_of(self, layer):
        inputs = [inputs for caller, inputs, _ in self._calls if caller is layer]
        if len(inputs) != 1:
            raise _NotScalableError("it is used in several places")
        if layer.axis not in (-1, layer.rank - 1):
            raise _NotScalableError("its channels are not the last axis")
        return inputs[0][0]

    def _scalable(self, tensor, factor):
        """The layers to scale, with their factors, so that `tensor` is scaled and nothing else."""
        tensor = self._tensor(tensor)
        readers = self._readers(tensor)
        if len(readers) > 1:
            last = readers[-1][0]
            name = "the model's output" if last is None else last.name
            raise _NotScalableError(f"what feeds it also feeds {name}")
        made = [call for call in self._calls if any(t is tensor for t in call[2])]
        if not made:
            raise _NotScalableError("it is fed by the model's input")
        layer, inputs, _ = made[0]
        if sum(caller is layer for caller, _, _ in self._calls) > 1:
            raise _NotScalableError(f"{layer.name} is used in several places")
        if isinstance(layer, layers.Add) and all(t.shape[-1] == factor.size for t in inputs):
            return [target for t in inputs for target in self._scalable(t, factor)]
        if isinstance(layer, layers.Concatenate) and layer.axis in (-1, len(tensor.shape) - 1):
            parts = np.split(factor, np.cumsum([t.shape[-1] for t in inputs])[:-1])
            return [target for t, part in zip(inputs, parts) for target in self._scalable(t, part)]
        if _commutes(layer):
            return self._scalable(inputs[0], factor)
        if not _is_scalable(layer):
            raise _NotScalableError(f"{layer.name} ({type(layer).__name__}) cannot be scaled")
        return [(layer, factor)]


class _NotScalableError(Exception):
    """Says why a channel cannot be scaled."""


def _commutes(layer):
    """Whether the layer maps a scaled channel to its output, scaled alike."""
    if isinstance(layer, layers.ReLU):
        return layer.max_value is None and not np.any(layer.threshold)
    if isinstance(layer, layers.Activation):
        return layer.activation in _HOMOGENEOUS
    return isinstance(layer, _COMMUTING) and _is_channels_last(layer)


def _is_scalable(layer):
    return (
        isinstance(layer, (*_BIASED, *_SEPARABLE, *_DEPTHWISE, *_TRANSPOSED))
        and layer.activation in _HOMOGENEOUS
        and _is_channels_last(layer)
        and _has_plain_kernel(layer)
    )


def _has_plain_kernel(layer):
    return not (getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None))


def _is_threshold(layer):
    """Whether the layer is `max(y, tau)` with one tau per channel."""
    if not isinstance(layer, TLU) or layer.affine:
        return False
    rank = layer.input_spec.ndim
    return [axis % rank for axis in layer.input_spec.axes] == [rank - 1]


def _takes_offset(layer):
    """Whether a number added to an input channel is the same as one added to the bias."""
    if type(layer) not in _BIASED or not _is_channels_last(layer) or not _has_plain_kernel(layer):
        return False
    if isinstance(layer, layers.Dense):
        return True
    # Zeros beside the input are not what was added.
    padded = layer.padding != "valid" and any(size > 1 for size in layer.kernel_size)
    return not padded and layer.groups == 1


def _is_channels_last(layer):
    return getattr(layer, "data_format", "channels_last") == "channels_last"


def _scaled_weights(layer, factor):
    weights = layer.get_weights()
    kernel = 1 if isinstance(layer, _SEPARABLE) else 0
    shaped = factor
    if isinstance(layer, _DEPTHWISE):
        shaped = factor.reshape(weights[0].shape[-2:])
    elif isinstance(layer, _TRANSPOSED):
        shaped = factor[:, None]
    weights[kernel] = weights[kernel] * shaped
    if layer.use_bias:
        weights[-1] = weights[-1] * factor
    return weights


def _tensors(structure):
    return [t for t in keras.tree.flatten(structure) if isinstance(t, keras.KerasTensor)]


def _float32(config):
    """A config whose layers compute in float32."""
    if isinstance(config, str):
        return "float32" if config in _OTHER_FLOATS else config
    if isinstance(config, (list, tuple)):
        return type(config)(_float32(c) if isinstance(c, (dict, list)) else c for c in config)
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return _float32(config["config"]["name"])
    return {
        key: value if isinstance(value, str) and key != "dtype" else _float32(value)
        for key, value in config.items()
    }
