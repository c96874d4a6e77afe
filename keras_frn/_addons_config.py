"""A model's config as Keras 2 wrote it becomes a Keras 3 model, with our layers for Addons' layers.

Every name in a config is looked up in the lists below or in the caller's `custom_objects`; nothing
is imported by name. The model is built with zeros, and never larger than the file's weights.
"""

import contextlib
import contextvars
import functools
import graphlib
import inspect
import math
import warnings

import keras
import numpy as np
from keras import ops

from .layers import TLU, FilterResponseNormalization
from .legacy import hard_sigmoid_of_keras2

# The layers of Keras 2 that compute the same in Keras 3 from the same weights.
_LAYERS = frozenset(
    """Activation ActivityRegularization Add AdditiveAttention AlphaDropout Attention Average
    AveragePooling1D AveragePooling2D AveragePooling3D BatchNormalization Bidirectional
    CategoryEncoding CenterCrop Concatenate Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D
    Conv3DTranspose ConvLSTM1D ConvLSTM2D ConvLSTM3D Cropping1D Cropping2D Cropping3D Dense
    DepthwiseConv1D DepthwiseConv2D Discretization Dot Dropout ELU EinsumDense Embedding Flatten GRU
    GRUCell GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D
    GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D
    GroupNormalization Identity LSTM LSTMCell LayerNormalization LeakyReLU Masking MaxPooling1D
    MaxPooling2D MaxPooling3D Maximum Minimum MultiHeadAttention Multiply Normalization PReLU
    Permute RNN RandomBrightness RandomContrast RandomCrop RandomFlip RandomRotation
    RandomTranslation RandomZoom ReLU RepeatVector Rescaling Reshape Resizing SeparableConv1D
    SeparableConv2D SimpleRNN SimpleRNNCell Softmax SpatialDropout1D SpatialDropout2D
    SpatialDropout3D SpectralNormalization StackedRNNCells Subtract TimeDistributed
    UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D
    ZeroPadding3D""".split()  # noqa: SIM905
)
_ALIASES = {
    "LayerNormalizationV2": "LayerNormalization",
    "BatchNormalizationV2": "BatchNormalization",
    "BatchNormalizationV1": "BatchNormalization",
    "SyncBatchNormalization": "BatchNormalization",
    "GRUV2": "GRU",
    "LSTMV2": "LSTM",
    "ThresholdedReLU": "ReLU",
}
# Arguments that Keras 3 lacks, with the values that mean nothing; None: any value does.
_GONE = {
    "groups": (1,),
    "time_major": (False,),
    "dynamic": (False,),
    "implementation": None,
    "input_length": None,
    "batch_input_shape": None,
    "batch_size": None,
    "kernel_initializer": None,
    "kernel_regularizer": (None,),
    "kernel_constraint": (None,),
    "query_shape": None,
    "key_shape": None,
    "value_shape": None,
    "renorm": (False,),
    "virtual_batch_size": (None,),
    "fused": None,
    "noise_shape": (None,),
}
_ABSENT = (
    "LocallyConnected1D",
    "LocallyConnected2D",
    "DenseFeatures",
    "RandomHeight",
    "RandomWidth",
)
_TABLES = ("StringLookup", "IntegerLookup", "TextVectorization")
_REASONS = {
    "Lambda": "holds Python code, which is never run from a file",
    **dict.fromkeys(_ABSENT, "is a layer that Keras 3 has not"),
    **dict.fromkeys(_TABLES, "has a table that is not among its weights"),
}
_BY_CODE = "Build the model in code with keras_frn layers and call keras_frn.load_addons_weights"
_MAX_DEPTH, _MAX_CALLS = 50, 100_000
_MAX_INPUT = 2**31

_room: contextvars.ContextVar[list] = contextvars.ContextVar("keras_frn_room")


def build(config, room, thresholds=None, custom_objects=None):
    """The model of a Keras 2 config, with zeros for weights, `room` numbers of them at most.

    `thresholds` has the axis and the number of positions that share a threshold for each TLU, in
    the order of the config; None gives each TLU one threshold per position. Returns the model, the
    layers of each model inside in the order of the config, by id, and the TLU layers.
    """
    builder = _Builder(thresholds, custom_objects or {})
    token = _room.set([room])
    try:
        model = builder.layer(config)
        if not isinstance(model, keras.Model):
            raise ValueError("the config is not that of a Functional or Sequential model")
        if not model.built:
            raise ValueError("the model was saved before it was built, so it has no weights")
    finally:
        _room.reset(token)
    for layer in walk(model):
        for name, value in list(vars(layer).items()):
            if isinstance(value, _Stored):
                setattr(layer, name, value.initializer)
    return model, builder.members, builder.thresholds_found


def sublayers(layer):
    """The layers in a layer's attributes: (attribute, layer or list of layers)."""
    # Under PyTorch a layer is a torch.nn.Module, which keeps the modules in it apart.
    for name, value in [*vars(layer).items(), *vars(layer).get("_modules", {}).items()]:
        if isinstance(value, keras.Layer):
            yield name, value
        elif name != "_layers" and isinstance(value, (list, tuple)):
            layers = [item for item in value if isinstance(item, keras.Layer)]
            if layers and len(layers) == len(value):
                yield name, layers


def parameters(cls):
    """The parameters that a class takes, those of its bases where it passes them on, by name."""
    found = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            own = inspect.signature(base.__init__).parameters
            found = {**own, **found}
            if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                break
    return found


def walk(layer, seen=None):
    """A layer and all layers inside."""
    seen = {} if seen is None else seen
    if id(layer) not in seen:
        seen[id(layer)] = layer
        inside = [layer.layers] if isinstance(layer, keras.Model) else []
        inside += [value for _, value in sublayers(layer)]
        for value in inside:
            for child in value if isinstance(value, list) else [value]:
                walk(child, seen)
    return list(seen.values())


# Wrappers copy their layer by way of its config, so this has to be registered.
@keras.saving.register_keras_serializable(package="keras_frn")
class _Stored(keras.initializers.Initializer):
    """Zeros where a stored weight will come, no more of them than the file holds."""

    def __init__(self, initializer):
        self.initializer = keras.initializers.get(initializer)

    def __call__(self, shape, dtype=None, **kwargs):
        take_room(math.prod(shape))
        return ops.zeros(shape, dtype)

    def get_config(self):
        return {"initializer": keras.initializers.serialize(self.initializer)}


def take_room(count):
    room = _room.get()
    room[0] -= count
    if room[0] < 0:
        raise ValueError("the config makes larger weights than the file holds")


class _StoredTLU(TLU):
    """One threshold per position, whatever the rank, as the files hold it."""

    def build(self, input_shape):
        self.axis = tuple(range(1, len(input_shape)))
        super().build(input_shape)


class _Builder:
    def __init__(self, thresholds, custom_objects):
        self.thresholds = thresholds
        self.thresholds_found = []
        self.custom_objects = custom_objects
        self.members = {}
        self.shared = {}
        self.calls = {}
        self.depth = 0

    # Objects by name

    def layer(self, data):
        """The layer or model of one entry of a config."""
        name, kind, config = _entry(data)
        number = data.get("shared_object_id")
        if number is not None and number in self.shared:
            return self.shared[number]
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError(f"its models are nested deeper than {_MAX_DEPTH}")
        with _naming(name, kind):
            layer = self._layer(data, kind, config)
        self.depth -= 1
        self.calls.setdefault(id(layer), 1)
        if number is not None:
            self.shared[number] = layer
        return layer

    def _layer(self, data, kind, config):
        addons = "Addons>" in f"{data['class_name']}{data.get('registered_name')}"
        addons |= str(data.get("module")).startswith("tensorflow_addons.")
        ours = {"FilterResponseNormalization": self._normalization, "TLU": self._threshold}
        if addons and kind in ours:
            return ours[kind](config)
        custom = self._custom(data, kind)
        if custom is not None:
            return custom.from_config(self._value(config))
        made = {"Functional": self._functional, "Model": self._functional, **ours}
        made["Sequential"] = self._sequential
        if kind in made:
            return made[kind](config)
        if addons or kind not in _LAYERS | set(_ALIASES):
            reason = _REASONS.get(kind, "is not known")
            if addons:
                reason = "is a layer of TensorFlow Addons that has no counterpart here"
            remedy = f"Pass custom_objects={{{kind!r}: its class}}, or build"
            remedy = _BY_CODE if kind == "Lambda" else _BY_CODE.replace("Build", remedy)
            raise _Refused(f"{reason}. {remedy}")
        return self._builtin(kind, config)

    def _custom(self, data, kind):
        names = [data.get("registered_name"), data.get("class_name"), kind]
        for name in [name for name in names if isinstance(name, str)]:
            registered = keras.saving.get_registered_object(name, self.custom_objects)
            if registered is not None:
                return registered
        return None

    def _builtin(self, kind, config):
        config = self._value(config)
        if kind == "ThresholdedReLU":
            config["threshold"] = config.pop("theta", 1.0)
        if kind == "SyncBatchNormalization":
            config["synchronized"] = True
        if kind == "LeakyReLU" and "alpha" in config:
            config["negative_slope"] = config.pop("alpha")
        kind = _ALIASES.get(kind, kind)
        axis = config.get("axis")
        if isinstance(axis, (list, tuple)) and len(axis) == 1:
            config["axis"] = axis[0]
        # Unrolled or not, the result is the same, and a loop's cost does not grow with its length.
        if config.get("unroll"):
            config["unroll"] = False
        cls = getattr(keras.layers, kind)
        accepted = parameters(cls)
        trainable = config.pop("trainable", True)
        for key in [k for k in config if k not in accepted and k in _GONE]:
            value = config.pop(key)
            if _GONE[key] is not None and value not in _GONE[key]:
                raise _Refused(f"has {key}={value!r}, which Keras 3 has not. {_BY_CODE}")
        for key, parameter in accepted.items():
            if key.endswith("_initializer"):
                value = config.get(key, parameter.default)
                if value is not None and value is not inspect.Parameter.empty:
                    config[key] = _Stored(value)
        layer = cls(**config)
        if not trainable:
            layer.trainable = False
        if kind == "Normalization":
            _before_build(layer, functools.partial(_check_normalization, layer))
        elif kind == "TimeDistributed":
            _before_build(layer, functools.partial(self._check_steps, layer))
        self.calls[id(layer)] = 1 + sum(
            self.calls.get(id(v), 1) for _, v in sublayers(layer) if not isinstance(v, list)
        )
        return layer

    def _check_steps(self, layer, shape):
        if (shape[1] or 1) * self.calls[id(layer)] > _MAX_CALLS:
            raise ValueError(f"its {shape[1]} time steps are too many to build one by one")

    def _normalization(self, config):
        if config.get("axis", [1, 2]) not in ([1, 2], (1, 2)):
            raise _Refused(f"has axis={config['axis']!r}, where Addons allowed [1, 2] only")
        epsilon = config.get("epsilon", 1e-6)
        if not isinstance(epsilon, (int, float)):
            raise _Refused(f"has epsilon={epsilon!r}, which is not a number")
        learned = bool(config.get("learned_epsilon"))
        epsilon = abs(epsilon)
        if epsilon == 0 and not learned:
            epsilon = float(np.finfo("float32").tiny)
            if self.thresholds is None:  # a model with thresholds is built a second time
                warnings.warn(
                    f"Layer {config.get('name')!r} has epsilon=0, which gives NaN for a channel of "
                    f"zeros; it became {epsilon:.3g}, which keeps all other outputs.",
                    stacklevel=2,
                )
        return FilterResponseNormalization(
            axis=-1,
            epsilon=epsilon,
            learned_epsilon=learned,
            learned_epsilon_initializer=_Stored(keras.initializers.Constant(1e-4)),
            learned_epsilon_constraint=self._value(config.get("learned_epsilon_constraint")),
            **self._options(config, ("gamma", "beta"), _of_channels),
            **self._base(config),
        )

    def _threshold(self, config):
        affine = bool(config.get("affine"))
        base = {"affine": affine, **self._base(config)}
        if self.thresholds is None:
            options = self._options(config, ("tau", "alpha"), lambda constraint: constraint)
            layer = _StoredTLU(**options, **base)
            options = {k: v for k, v in options.items() if affine or k.startswith("tau")}
            layer.can_be_shared = _elementwise(options)
        else:
            axis, positions = self.thresholds[len(self.thresholds_found)]
            config = {k: _times(v, positions) if "regul" in k else v for k, v in config.items()}
            options = self._options(config, ("tau", "alpha"), lambda constraint: constraint)
            layer = TLU(axis=axis, **options, **base)
        self.thresholds_found.append(layer)
        return layer

    def _base(self, config):
        base = {k: config[k] for k in ("name", "trainable") if k in config}
        return {**base, "dtype": self._value(config.get("dtype"))}

    def _options(self, config, weights, of_constraint):
        options = {}
        for weight in weights:
            value = self._value(config.get(f"{weight}_initializer"))
            default = "ones" if weight == "gamma" else "zeros"
            options[f"{weight}_initializer"] = _Stored(default if value is None else value)
            options[f"{weight}_regularizer"] = self._value(config.get(f"{weight}_regularizer"))
            constraint = of_constraint(config.get(f"{weight}_constraint"))
            options[f"{weight}_constraint"] = self._value(constraint)
        return options

    def _value(self, value, key=None):
        """A value in a layer's config, with the objects that it describes."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._value(item) for item in value)
        if isinstance(value, str) and value == "hard_sigmoid" and "activation" in str(key):
            return hard_sigmoid_of_keras2
        if not isinstance(value, dict):
            return value
        kind = value.get("class_name")
        if kind in ("__tuple__", "TensorShape"):
            return tuple(self._value(item) for item in value["items"])
        if kind == "__ellipsis__":
            return Ellipsis
        if kind in ("__numpy__", "__tensor__") or value.get("type") == "ndarray":
            stored = value.get("config", value)
            return np.asarray(stored["value"], stored["dtype"]).tolist()
        if not isinstance(kind, str) or "config" not in value:
            return {k: self._value(v, k) for k, v in value.items()}
        return self._object(value, kind.rpartition(">")[2], key)

    def _object(self, value, kind, key):
        custom = self._custom(value, kind)
        if kind == "function":
            name = value["config"]
            custom = self._custom({"class_name": name}, name) if isinstance(name, str) else None
            if custom is not None:
                return custom
            return self._value(name, key) if name == "hard_sigmoid" else keras.activations.get(name)
        if custom is not None:
            return custom.from_config(self._value(value["config"]))
        if kind in ("Policy", "PolicyV1", "DTypePolicy"):
            return keras.DTypePolicy(value["config"]["name"])
        for module, base in (
            (keras.initializers, keras.initializers.Initializer),
            (keras.regularizers, keras.regularizers.Regularizer),
            (keras.constraints, keras.constraints.Constraint),
        ):
            cls = getattr(module, kind, None)
            if inspect.isclass(cls) and issubclass(cls, base):
                config = self._value(value["config"])
                return cls(**{k: v for k, v in config.items() if k != "dtype"})
        return self.layer(value)

    # Models

    def _sequential(self, config):
        layers, calls = [], 0
        for data in config["layers"]:
            _, kind, inner = _entry(data)
            shape = _shape(inner)
            if kind == "InputLayer" or (not layers and shape is not None):
                layers.append(_input(inner, shape, named=kind == "InputLayer"))
            if kind != "InputLayer":
                layers.append(self.layer(data))
                calls += self.calls[id(layers[-1])]
        self._check_calls(calls)
        model = keras.Sequential(layers, name=config.get("name"))
        if not model.built and config.get("build_input_shape"):
            model.build(tuple(self._value(config["build_input_shape"])))
        self.members[id(model)] = list(model.layers)
        self.calls[id(model)] = calls
        return model

    def _functional(self, config):
        layers, nodes, tensors = {}, {}, {}
        for data in config["layers"]:
            name, kind, inner = _entry(data)
            if name in layers:
                raise ValueError(f"two of its layers are called {name!r}")
            if kind == "InputLayer":
                tensors[name, 0] = [_input(inner, _shape(inner))]
                layers[name] = None
                continue
            operator = kind in ("TFOpLambda", "SlicingOpLambda")
            layers[name] = inner["function"] if operator else self.layer(data)
            # In Keras 2 a model's own definition counts as its first call.
            first = int(isinstance(layers[name], keras.Model))
            for number, node in enumerate(data["inbound_nodes"], first):
                nodes[name, number] = node
        graph = {key: _references(node, layers) for key, node in nodes.items()}
        total = sum(self.calls.get(id(layers[name]), 1) for name, _ in nodes)
        self._check_calls(total)
        try:
            order = list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError:
            raise ValueError("its layers are connected in a circle") from None
        for key in order:
            if key in tensors:
                continue
            if key not in nodes:
                raise ValueError(f"its layer {key[0]!r} is used before it is connected")
            name, number = key
            with _naming(name, layers[name] if isinstance(layers[name], str) else None):
                arguments, options = _arguments(nodes[key], layers, tensors, self._value)
                if isinstance(layers[name], str):
                    called = name if number == 0 else None
                    y = operator_call(layers[name], called, arguments, options)
                else:
                    recurrent = isinstance(
                        layers[name], (keras.layers.RNN, keras.layers.Bidirectional)
                    )
                    if recurrent and isinstance(arguments, list):
                        arguments, *options["initial_state"] = arguments
                    y = layers[name](arguments, **options)
            tensors[key] = keras.tree.flatten(y)
        inputs, outputs = (
            _structure(config[name], layers, tensors) for name in ("input_layers", "output_layers")
        )
        model = keras.Model(inputs, outputs, name=config.get("name"))
        if config.get("trainable") is False:
            model.trainable = False
        self.members[id(model)] = [v for v in layers.values() if isinstance(v, keras.Layer)]
        self.calls[id(model)] = total
        return model

    def _check_calls(self, total):
        if total > _MAX_CALLS:
            raise ValueError(f"its layers are called more than {_MAX_CALLS} times")


class _Refused(ValueError):
    pass


@contextlib.contextmanager
def _naming(name, kind):
    """Errors inside name the layer, once."""
    try:
        yield
    except _Refused as error:
        raise ValueError(f"layer {name!r} ({kind}) {error}") from None
    except Exception as error:
        said = " ".join(str(error).split())[:400] or type(error).__name__
        if said.startswith("layer '"):
            raise ValueError(said) from error
        of = f" ({kind})" if kind else ""
        raise ValueError(f"layer {name!r}{of}: {said}") from error


def _entry(data):
    if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
        raise ValueError("a layer of its config is not described")
    if not isinstance(data.get("class_name"), str):
        raise ValueError("a layer of its config has no class name")
    name = data.get("name") or data["config"].get("name")
    return name, data["class_name"].rpartition(">")[2], data["config"]


def _shape(config):
    shape = config.get("batch_input_shape", config.get("batch_shape"))
    return tuple(shape["items"] if isinstance(shape, dict) else shape) if shape else None


def _input(config, shape, named=True):
    if shape is None or config.get("ragged"):
        raise ValueError(f"input {config.get('name')!r} is ragged or has no shape")
    if math.prod(size or 1 for size in shape) > _MAX_INPUT:
        raise ValueError(f"input {config.get('name')!r} has the shape {shape}")
    dtype = config.get("dtype")
    return keras.Input(
        batch_shape=shape,
        dtype=dtype["config"]["name"] if isinstance(dtype, dict) else dtype,
        sparse=bool(config.get("sparse")),
        name=config.get("name") if named else None,
    )


def _before_build(layer, check):
    """Calls `check` with the shape before the layer is built, once."""
    original = layer.build

    @functools.wraps(original)
    def build(*args, **kwargs):
        check([*args, *kwargs.values()][0])
        layer.build = original
        return original(*args, **kwargs)

    layer.build = build


def _check_normalization(layer, shape):
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    take_room(2 * math.prod(shape[axis] or 1 for axis in axes if axis is not None))


# Constraints and regularizers of weights that change their shape


def _of_channels(constraint):
    """A constraint of a (1, 1, 1, C) weight, for a (C,) weight."""
    if not isinstance(constraint, dict):
        return constraint
    kind = constraint["class_name"].rpartition(">")[2]
    if kind == "RadialConstraint":  # of a 1x1 kernel: nothing
        return None
    if kind not in ("MaxNorm", "MinMaxNorm", "UnitNorm"):
        return constraint
    axes = constraint["config"].get("axis", 0)
    axes = axes.get("items") if isinstance(axes, dict) else axes
    axes = range(4) if axes is None else np.ravel(axes).tolist()
    channel = any(axis in (3, -1) for axis in axes)
    return {**constraint, "config": {**constraint["config"], "axis": [0] if channel else []}}


def _elementwise(options):
    """Whether a weight's constraints and regularizers can be those of one value per channel."""
    allowed = (
        keras.constraints.NonNeg,
        keras.regularizers.L1,
        keras.regularizers.L2,
        keras.regularizers.L1L2,
    )
    return all(
        value is None or type(value) in allowed
        for name, value in options.items()
        if not name.endswith("initializer")
    )


def _times(regularizer, count):
    """The regularizer of one value that stands for `count`."""
    if not isinstance(regularizer, dict):
        return regularizer
    config = regularizer["config"]
    scaled = {k: v * count if k in ("l1", "l2") else v for k, v in config.items()}
    return {**regularizer, "config": scaled}


# Calls of layers, as Keras 2 wrote them: [name, call, output, options], in any nesting


def _is_reference(value, layers):
    return (
        isinstance(value, (list, tuple))
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and (value[0] in layers or value[0] == "_CONSTANT_VALUE")
        and isinstance(value[1], int)
    )


def _references(value, layers):
    """The calls whose results a call needs."""
    if _is_reference(value, layers):
        rest = _references(value[3], layers) if len(value) == 4 else []
        return ([] if value[0] == "_CONSTANT_VALUE" else [(value[0], value[1])]) + rest
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], str) and len(value) == 4 and isinstance(value[3], dict):
            raise ValueError(f"it uses a layer {value[0]!r} that it does not have")
        return [key for item in value for key in _references(item, layers)]
    return []


def _arguments(node, layers, tensors, revive):
    """The inputs and the options of a call."""
    options = {}

    def resolve(value):
        if _is_reference(value, layers):
            if len(value) == 4:
                options.update({k: resolve(v) for k, v in value[3].items()})
            if value[0] == "_CONSTANT_VALUE":
                return revive(value[2])
            return tensors[value[0], value[1]][value[2]]
        if isinstance(value, dict) and "class_name" not in value:
            return {k: resolve(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [resolve(item) for item in value]
        return revive(value)

    arguments = resolve(node)
    if isinstance(arguments, list) and len(arguments) == 1:
        arguments = arguments[0]
    return arguments, {k: v for k, v in options.items() if v is not None}


def _structure(value, layers, tensors):
    arguments, _ = _arguments(value, layers, tensors, lambda v: v)
    return arguments


# Functions of TensorFlow in a functional graph

_MERGES = {
    "add": keras.layers.Add,
    "subtract": keras.layers.Subtract,
    "multiply": keras.layers.Multiply,
    "maximum": keras.layers.Maximum,
    "minimum": keras.layers.Minimum,
}
_BINARY = {
    **{name: getattr(ops, name) for name in _MERGES},
    "truediv": ops.true_divide,
    "divide": ops.true_divide,
    "pow": ops.power,
    "matmul": ops.matmul,
}
_ACTIVATIONS = {
    **{name: name for name in ("relu", "relu6", "sigmoid", "tanh", "softmax", "log_softmax")},
    **{name: name for name in ("elu", "selu", "gelu", "silu", "softplus", "softsign")},
    **{"leaky_relu": "leaky_relu", "swish": "silu", "exp": "exponential"},
}
_UNARY = {
    "negative": ops.negative,
    "abs": ops.absolute,
    "sqrt": ops.sqrt,
    "rsqrt": ops.rsqrt,
    "square": ops.square,
    "log": ops.log,
    "log1p": ops.log1p,
    "sin": ops.sin,
    "cos": ops.cos,
    "sign": ops.sign,
    "identity": lambda x: x,
    "stop_gradient": ops.stop_gradient,
}
_REDUCTIONS = {
    "reduce_mean": ops.mean,
    "reduce_sum": ops.sum,
    "reduce_max": ops.max,
    "reduce_min": ops.min,
    "reduce_prod": ops.prod,
    "reduce_variance": ops.var,
    "reduce_std": ops.std,
}
_SHAPES = {
    "reshape": lambda x, shape: ops.reshape(x, shape),
    "expand_dims": lambda x, axis: ops.expand_dims(x, axis),
    "squeeze": lambda x, axis=None: ops.squeeze(x, axis),
    "transpose": lambda x, perm=None: ops.transpose(x, perm),
    "cast": lambda x, dtype: ops.cast(x, dtype),
    "stack": lambda x, axis=0: ops.stack(x, axis),
    "clip_by_value": lambda x, clip_value_min, clip_value_max: ops.clip(
        x, clip_value_min, clip_value_max
    ),
    "getitem": lambda x, slice_spec: x[tuple(_slice(s) for s in slice_spec)],
}


def operator_call(function, name, x, options):
    """What a TensorFlow function in a Keras 2 graph computes: a layer of that name where there is
    one, otherwise a Keras operation."""
    package, _, short = function.rpartition(".")
    options = {k: v for k, v in options.items() if k != "name"}
    inputs = keras.tree.flatten([x, options])
    if not any(map(keras.backend.is_keras_tensor, inputs)):
        raise _Refused(f"calls {function!r} on constants. {_BY_CODE}")
    known = package in ("", "math", "nn", "linalg", "__operators__", "compat.v1", "compat.v1.nn")
    if known and short in _BINARY and set(options) == {"y"}:
        return _binary(short, name, x, options["y"])
    if known and short in _ACTIVATIONS and keras.backend.is_keras_tensor(x):
        dtype = x.dtype
        if short == "leaky_relu":
            slope = options.pop("alpha", 0.2)
            if not options:
                return keras.layers.LeakyReLU(slope, name=name, dtype=dtype)(x)
        elif short == "gelu" and options.pop("approximate", False):
            return ops.gelu(x, approximate=True)
        elif short in ("softmax", "log_softmax") and options.get("axis", -1) != -1:
            return getattr(ops, short)(x, axis=options["axis"])
        if set(options) <= {"axis", "beta"} and options.get("beta", 1.0) == 1.0:
            return keras.layers.Activation(_ACTIVATIONS[short], name=name, dtype=dtype)(x)
    if known and short == "concat" and set(options) <= {"axis"}:
        return keras.layers.Concatenate(options.get("axis", -1), name=name, dtype=x[0].dtype)(x)
    if known and short in _UNARY and not options:
        return _UNARY[short](x)
    if known and short in _REDUCTIONS and set(options) <= {"axis", "keepdims"}:
        axis = options.get("axis")
        axis = tuple(axis) if isinstance(axis, list) else axis
        return _REDUCTIONS[short](x, axis=axis, keepdims=options.get("keepdims", False))
    if known and short in _SHAPES:
        return _SHAPES[short](x, **options)
    raise _Refused(
        f"is the TensorFlow function {function!r} with {options}, which is not known. {_BY_CODE}"
    )


def _binary(short, name, x, y):
    tensors = [t for t in (x, y) if keras.backend.is_keras_tensor(t)]
    if len(tensors) == 2:
        if short in _MERGES and len(x.shape) == len(y.shape) and x.dtype == y.dtype:
            return _MERGES[short](name=name, dtype=x.dtype)([x, y])
        return _BINARY[short](x, y)
    number = y if tensors[0] is x else x
    left = tensors[0] is x
    if isinstance(number, (int, float)) and "float" in tensors[0].dtype:
        scale, offset = {
            "add": (1.0, number),
            "subtract": (1.0, -number) if left else (-1.0, number),
            "multiply": (number, 0.0),
            "truediv": (1.0 / number if left and number else None, 0.0),
        }.get(short, (None, None))
        if scale is not None:
            return keras.layers.Rescaling(scale, offset, name=name, dtype=tensors[0].dtype)(
                tensors[0]
            )
    return _BINARY[short](x, y)


def _slice(spec):
    return slice(spec["start"], spec["stop"], spec["step"]) if isinstance(spec, dict) else spec
