"""A model's config as Keras 2 wrote it becomes a Keras 3 model, with our layers for Addons' layers.

Nothing in it is imported by name or run: names are those of Keras' classes or `custom_objects`.
"""

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeAlias

import keras
import numpy as np

from ..layers import TLU, FilterResponseNormalization
from ..typing import Tensor
from . import hard_sigmoid_of_keras2
from .files import reading_errors
from .operators import BY_CODE, call_operator
from .weights import Origin

LAYERS = (keras.layers, keras.initializers, keras.regularizers, keras.constraints)
OPTIMIZERS = (keras.optimizers, keras.optimizers.schedules)
# What becomes of a TLU: the axes of its weights, and how many stored values share one.
Thresholds: TypeAlias = tuple[int | tuple[int, ...], int]
_WITH_CODE = ("Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
# Those with a table, and one that Keras 3 leaves out at inference: it returns the whole image.
_NOT_READ = ("StringLookup", "IntegerLookup", "TextVectorization", "RandomCrop")
_RENAMED_CLASSES = {"SyncBatchNormalization": "BatchNormalization", "ThresholdedReLU": "ReLU"}
_RENAMED = {
    ("InputLayer", "batch_input_shape"): "batch_shape",
    ("LeakyReLU", "alpha"): "negative_slope",
    ("ThresholdedReLU", "theta"): "threshold",
}
# Arguments that Keras 3 has not, and that do not change what is computed.
_WITHOUT_EFFECT = frozenset(
    """batch_input_shape batch_size fn fused implementation input_length is_legacy_optimizer
    jit_compile kernel_initializer key_shape query_shape rng_type trainable value_shape""".split()  # noqa: SIM905
)
# Names of functions that are others, or have other names, in Keras 3.
_FUNCTIONS = {
    "hard_sigmoid": hard_sigmoid_of_keras2,
    "kullback_leibler_divergence": keras.losses.kl_divergence,
    "logcosh": keras.losses.log_cosh,
}


class _NamedError(ValueError):
    """An error that says which layer it is about."""


class Builder:
    """Builds a model from its config; `thresholds` are those of each TLU, in order.

    `tlus` are the TLU layers in order, `origin` is what the config says of each layer."""

    def __init__(self, thresholds: Iterable[Thresholds] | None = None) -> None:
        self.thresholds: Iterator[Thresholds] = iter(thresholds or itertools.repeat((-1, 1)))
        self.origin = Origin()
        self.tlus: list[TLU] = []

    def revive(
        self, value: Any, homes: tuple[ModuleType, ...] = LAYERS, key: str | None = None
    ) -> Any:
        """A value in a config, with the objects that it describes, from the modules `homes`."""
        if key and key.endswith("_initializer"):  # Identity is also a layer
            homes = (keras.initializers,)
        if isinstance(value, list):
            return [self.revive(item, homes) for item in value]
        if isinstance(value, str) and key != "name":
            return keras.saving.get_registered_object(value, _FUNCTIONS) or value
        if not isinstance(value, dict):
            return value
        kind = value.get("class_name")
        if kind in ("__tuple__", "TensorShape"):
            return tuple(self.revive(value["items"]))
        if kind == "__ellipsis__":
            return Ellipsis
        if kind in ("__numpy__", "__tensor__") or value.get("type") == "ndarray":
            array = value.get("config", value)
            return np.asarray(array["value"], array["dtype"])
        if kind == "function":
            return self.revive(value["config"])
        if kind == "Policy":
            return keras.DTypePolicy(value["config"]["name"])
        if not isinstance(kind, str) or "config" not in value:
            return {k: self.revive(v, homes, k) for k, v in value.items()}
        try:
            made = self._make(value, homes)
            if isinstance(made, keras.Layer):
                self.origin.kinds[made] = kind.rpartition(">")[2]
            return made
        except (_NamedError, OSError):
            raise
        except reading_errors() as error:
            message = " ".join(str(error).split())[:400] or type(error).__name__
            if BY_CODE not in message:
                message = f"{message.rstrip('.')}. {BY_CODE}"
            name = f" {_name(value)!r}" if _name(value) else ""
            raise _NamedError(f"{kind}{name} {message}") from error

    def _make(self, data: dict[str, Any], homes: tuple[ModuleType, ...]) -> Any:
        # The .keras format has the name of the package apart.
        name = str(data.get("registered_name") or data["class_name"])
        kind, config = data["class_name"].rpartition(">")[2], data["config"]
        if homes is LAYERS and "/" in str(config.get("name")):  # which Keras 3 refuses
            config = {**config, "name": config["name"].replace("/", "_")}
        if name == "Addons>FilterResponseNormalization":
            return self._make_normalization(config)
        if name == "Addons>TLU":
            return self._make_tlu(config)
        for known in (name, data["class_name"], kind):
            if custom := keras.saving.get_registered_object(known):
                # A class that adds a train_step, and has the config of any other model.
                is_model = inspect.isclass(custom) and issubclass(custom, keras.Model)
                if is_model and "input_layers" in config:
                    return self._make_functional(config, custom)
                if is_model and issubclass(custom, keras.Sequential):
                    return custom(self.revive(config["layers"]), name=config.get("name"))
                return custom.from_config(self.revive(config, homes))
        if kind in ("Functional", "Model"):
            return self._make_functional(config)
        if kind == "Sequential":
            return keras.Sequential(self.revive(config["layers"]), name=config.get("name"))
        if kind.startswith("LossScaleOptimizer"):
            inner = self.revive(config["inner_optimizer"], homes)
            return keras.optimizers.LossScaleOptimizer(inner)
        if kind == "MeanMetricWrapper":
            if function := keras.saving.get_registered_object(config["fn"]):
                return keras.metrics.MeanMetricWrapper(function, config["name"])
            kind = "".join(word.title() for word in config["fn"].split("_"))
        known = _RENAMED_CLASSES.get(kind, kind)
        cls = next(filter(inspect.isclass, (getattr(home, known, None) for home in homes)), None)
        if kind in _WITH_CODE:
            raise ValueError(f"holds code, which is never run from a file. {BY_CODE}")
        if cls is None or kind in _NOT_READ or name.startswith("Addons>"):
            reason = "is not in Keras 3" if cls is None else "is not read"
            own = f"{config['fn']!r}: its function" if "fn" in config else f"{kind!r}: its class"
            remedy = f", or pass custom_objects={{{own}}}"
            # A subclassed model has no name here, and no layers that could be built.
            raise ValueError(f"{reason}. {BY_CODE}{remedy if 'name' in config else ''}")
        config = {_RENAMED.get((kind, key), key): value for key, value in config.items()}
        return cls(**self._read_options(cls, config, homes))

    def _read_options(
        self, cls: type, config: dict[str, Any], homes: tuple[ModuleType, ...] = LAYERS
    ) -> dict[str, Any]:
        """The arguments of a class of Keras 3, from those of Keras 2."""
        options, accepted = self.revive(config, homes), {*inspect.signature(cls).parameters}
        if "kwargs" in accepted:  # which go to the base class
            accepted |= {"name", "dtype", "trainable", "activity_regularizer"}
        if options.get("reduction") == "auto":
            options["reduction"] = "sum_over_batch_size"
        if isinstance(options.get("axis"), list) and len(options["axis"]) == 1:
            options["axis"] = options["axis"][0]
        if options.get("decay") and isinstance(options["learning_rate"], float):
            rate, decay = options["learning_rate"], options.pop("decay")
            options["learning_rate"] = keras.optimizers.schedules.InverseTimeDecay(rate, 1, decay)
        for key in options.keys() - accepted:
            value = options.pop(key)
            if key not in _WITHOUT_EFFECT and (value is True or value not in (None, False, 1)):
                raise ValueError(f"has {key}={value!r}, which Keras 3 has not. {BY_CODE}")
        return {k: v for k, v in options.items() if (k, v) != ("name", None)}

    # The layers of Addons

    def _make_normalization(self, config: dict[str, Any]) -> FilterResponseNormalization:
        if config["axis"] != [1, 2]:
            raise ValueError(f"has axis={config['axis']!r}, where Addons allowed [1, 2] only")
        # Not 0: the layer refuses what gave NaN for zeros, below 5.2e-26.
        epsilon = max(abs(config["epsilon"]), 0 if config["learned_epsilon"] else 1e-25)
        config = {**config, "axis": -1, "epsilon": epsilon}
        for key in ("gamma_constraint", "beta_constraint"):
            config[key] = _adapt_constraint(config.get(key))
        options = self._read_options(FilterResponseNormalization, config)
        return FilterResponseNormalization(**options)

    def _make_tlu(self, config: dict[str, Any]) -> TLU:
        (axis, positions), options = next(self.thresholds), self._read_options(TLU, config)
        for key in ("tau_regularizer", "alpha_regularizer"):
            if positions > 1 and options.get(key) is not None:
                factors = options[key].get_config().items()
                options[key] = type(options[key])(**{k: positions * v for k, v in factors})
        self.tlus.append(TLU(axis=axis, **options))
        return self.tlus[-1]

    # Models

    def _make_functional(
        self, config: dict[str, Any], cls: type[keras.Model] = keras.Model
    ) -> keras.Model:
        layers: dict[str, Any] = {}
        calls: dict[tuple[str, int], Any] = {}
        tensors: dict[tuple[str, int], list[Tensor]] = {}
        for data in config["layers"]:
            is_operator = data["class_name"] in ("TFOpLambda", "SlicingOpLambda")
            layer = data["config"]["function"] if is_operator else self.revive(data)
            layers[_name(data)] = layer
            if isinstance(layer, keras.layers.InputLayer):
                tensors[_name(data), 0] = [layer.output]
            first = int(isinstance(layer, keras.Model))  # its definition is its first call
            calls.update({(_name(data), i): c for i, c in enumerate(data["inbound_nodes"], first)})

        def compute(name: str, number: int) -> list[Tensor]:
            if (name, number) not in tensors:
                inputs, options = self._resolve_inputs(calls[name, number], compute)
                y = _call(layers[name], name if number == 0 else None, inputs, options)
                tensors[name, number] = keras.tree.flatten(y)
            return tensors[name, number]

        for call in calls:  # in the order of the file, so that the recursion is never deep
            compute(*call)
        inputs, _ = self._resolve_inputs(config["input_layers"], compute)
        outputs, _ = self._resolve_inputs(config["output_layers"], compute)
        model = cls(inputs, outputs, name=config.get("name"))
        if config.get("trainable") is False:
            model.trainable = False
        self.origin.members[id(model)] = [v for v in layers.values() if isinstance(v, keras.Layer)]
        return model

    def _resolve_inputs(
        self, call: Any, compute: Callable[[str, int], list[Tensor]]
    ) -> tuple[Any, dict[str, Any]]:
        """The inputs and the options of a call: `[layer, call, output, options]` in any nesting."""
        options: dict[str, Any] = {}

        def resolve(value: Any) -> Any:
            is_list = isinstance(value, list)
            if is_list and len(value) in (3, 4) and [*map(type, value[:2])] == [str, int]:
                name, number, item, *rest = value
                for key, option in (rest[0] if rest else {}).items():
                    if option is not None:
                        options[key] = resolve(option)
                is_constant = name == "_CONSTANT_VALUE"
                return self.revive(item) if is_constant else compute(name, number)[item]
            if is_list:
                return [resolve(item) for item in value]
            if isinstance(value, dict) and "class_name" not in value:
                return {key: resolve(item) for key, item in value.items()}
            return self.revive(value)

        inputs = resolve(call)
        return (inputs[0] if isinstance(inputs, list) and len(inputs) == 1 else inputs), options


def _name(data: dict[str, Any]) -> Any:
    return data.get("name") or data["config"].get("name")


def _call(layer: Any, name: str | None, inputs: Any, options: dict[str, Any]) -> Any:
    if isinstance(layer, str):
        return call_operator(layer, name, inputs, options)
    is_recurrent = isinstance(layer, (keras.layers.RNN, keras.layers.Bidirectional))
    if is_recurrent and isinstance(inputs, list):
        inputs, *options["initial_state"] = inputs
    return layer(inputs, **options)


def _adapt_constraint(constraint: Any) -> Any:
    """A constraint of a (1, 1, 1, C) weight, for a (C,) weight."""
    if not isinstance(constraint, dict) or "axis" not in constraint["config"]:
        return constraint
    config = constraint["config"]
    axes = config["axis"]["items"] if isinstance(config["axis"], dict) else config["axis"]
    over_channels = axes is None or bool({3, -1} & set(np.ravel(axes).tolist()))
    return {**constraint, "config": {**config, "axis": [0] if over_channels else []}}
