"""Models and weights saved by TensorFlow Addons, opened in Keras 3."""

import inspect
import itertools
import os
import tempfile
import warnings

import keras
import numpy as np

from . import _addons_config as configs
from . import _addons_files as files
from .layers import TLU, FilterResponseNormalization

_OURS = ("gamma", "beta", "learned_epsilon", "tau", "alpha")
_TAU = ("auto", "per_channel", "per_position", "per_channel_mean")


def load_addons_model(path, weights=None, tau="auto", compile=True, custom_objects=None):
    """Opens a model that TensorFlow Addons saved, as an ordinary Keras 3 model.

    ```
    model = keras_frn.load_addons_model("old.h5")
    model.save("new.keras")
    ```

    `tfa.layers.FilterResponseNormalization` and `tfa.layers.TLU` become our layers; outputs,
    gradients, regularization losses, layer names and trainable weights stay what they were. Where
    the file has the state of an optimizer that Keras 3 has, training goes on with the step that
    would have come next; what cannot be carried over is named in a warning. Nothing in the file is
    executed or unpickled.

    Args:
        path: An `.h5` or `.keras` file, a SavedModel folder or a zip of one, or a `.json` config.
        weights: A weights file or a checkpoint, for a `.json` config. Defaults to None, the weights
            in `path`.
        tau: What becomes of the thresholds of TLU, which Addons kept per position. `"auto"` makes
            them one per channel where nothing is lost: all positions have the same value, and no
            optimizer state, constraint or regularizer tells them apart. `"per_position"` keeps
            all, `"per_channel"` refuses a layer whose positions differ, `"per_channel_mean"`
            averages it. Defaults to `"auto"`.
        compile: Whether to compile the model as it was. Defaults to True.
        custom_objects: Dict of names and classes or functions that the config uses and Keras has
            not. Defaults to None.

    Returns:
        A `keras.Model`.

    Example:

    >>> model = keras_frn.load_addons_model("resnet_frn.h5")  # doctest: +SKIP

    Raises:
        ValueError: if the file is damaged, was not saved by Keras 2, or holds a layer that cannot
            be read; the message has the layer's name and what to do.
    """
    if tau not in _TAU:
        raise ValueError(
            f"`tau` must be one of {_TAU}. Received: tau={tau!r}. Use 'auto' to lose nothing."
        )
    with files.opened(path) as saved:
        if saved.config is None:
            raise ValueError(
                f"`path` must hold a model with its config. Received: path={os.fspath(path)!r}, "
                f"which is a {saved.kind} without. Build the model in code with keras_frn layers "
                "and call keras_frn.load_addons_weights, or pass its JSON config as `path` and "
                "this file as `weights`."
            )
        if weights is not None:
            with files.opened(weights, "weights") as other:
                saved.weights = other.weights
                return _model(path, saved, tau, compile, custom_objects)
        if saved.weights is None:
            raise ValueError(
                f"`weights` must be given with a JSON config. Received: path={os.fspath(path)!r}, "
                "weights=None. Pass the weights file or checkpoint that belongs to it."
            )
        return _model(path, saved, tau, compile, custom_objects)


def load_addons_weights(model, path, tau="auto"):
    """Loads weights that TensorFlow Addons saved into a model built with our layers.

    The model has the layers of the old one in the same order, with
    `keras_frn.FilterResponseNormalization()` for `tfa.layers.FilterResponseNormalization()` and
    `keras_frn.TLU()` (one threshold per channel) or `keras_frn.TLU(axis=(1, 2, 3))` (one per
    position) for `tfa.layers.TLU()`. All weights are found and checked before the first is changed.
    If the model is compiled with the optimizer whose state the file has, that is loaded too.

    Args:
        model: A built Functional or Sequential `keras.Model`.
        path: A weights file (`.h5`, `.weights.h5`), a TensorFlow checkpoint (its prefix, its
            `.index` file or its folder), or a complete model, whose config is not looked at.
        tau: `"per_channel_mean"` averages thresholds that differ from position to position where
            the model has one per channel; `"auto"` refuses. Defaults to `"auto"`.

    Example:

    >>> keras_frn.load_addons_weights(model, "checkpoints/epoch_9")  # doctest: +SKIP

    Raises:
        ValueError: if the model is not built, or the file does not fit it.
    """
    if tau not in ("auto", "per_channel_mean"):
        raise ValueError(
            "`tau` must be 'auto' or 'per_channel_mean'. Received: "
            f"tau={tau!r}. Choose TLU(axis=...) in the model."
        )
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a built keras.Model. Received: model={model!r}. "
            "Give it an input shape, or call it once."
        )
    with files.opened(path) as saved:
        try:
            found = _match(model, {}, saved.weights)
            fitted = [(v, _fit(v, name, a, tau)) for v, name, a, _ in found]
        except Exception as error:
            raise files.unreadable(os.fspath(path), error) from error
        _assign(model, fitted)
        state = saved.weights.optimizer
        if state is not None and getattr(model, "optimizer", None) is not None:
            kind, legacy = _trained_with(saved.training)
            own = type(getattr(model.optimizer, "inner_optimizer", model.optimizer)).__name__
            if kind is not None and kind.lower() != own.lower():
                _warn(f"the state of {kind} was not loaded, as the model has {own}")
            else:
                _try_state(model, {}, state, found, legacy or "slots" in state)
        elif state is not None:
            _warn("the optimizer state in the file was not loaded, as the model is not compiled")


def migrate(path, target, weights=None, tau="auto", custom_objects=None):
    """Writes a model that TensorFlow Addons saved as a `.keras` file, and checks what was written.

    Args:
        path, weights, tau, custom_objects: As in `load_addons_model`.
        target: The `.keras` file to write. It appears only when it has been read again and every
            weight in it equals the one that was loaded.

    Returns:
        The model as read from `target`, and a list of lines that say what was found.

    Example:

    >>> model, report = keras_frn.addons.migrate("old.h5", "new.keras")  # doctest: +SKIP

    Raises:
        ValueError: as `load_addons_model`, and if `target` does not end in `.keras`.
    """
    target = os.fspath(target)
    if not target.endswith(".keras"):
        raise ValueError(
            f"`target` must end in .keras. Received: target={target!r}. Call it new.keras."
        )
    model = load_addons_model(path, weights, tau, custom_objects=custom_objects)
    folder = os.path.dirname(os.path.abspath(target))
    with tempfile.TemporaryDirectory(dir=folder) as hidden:
        written = os.path.join(hidden, "model.keras")
        model.save(written)
        reloaded = keras.saving.load_model(written, custom_objects=custom_objects)
        for old, new in zip(model.weights, reloaded.weights, strict=True):
            if not np.array_equal(_numpy(old), _numpy(new), equal_nan=True):
                raise ValueError(f"`target`: weight {new.path!r} was not written as it was loaded.")
        os.replace(written, target)
    return reloaded, describe(model)


def describe(model):
    """Lines that say what a loaded model has: our layers with their options, weights, optimizer.

    Args:
        model: A `keras.Model`.

    Example:

    >>> print("\\n".join(keras_frn.addons.describe(model)))  # doctest: +SKIP
    """
    lines = [f"model {model.name!r}: {len(model.layers)} layers, {model.count_params()} parameters"]
    for layer in configs.walk(model):
        if isinstance(layer, (FilterResponseNormalization, TLU)):
            shapes = ", ".join(f"{w.name} {tuple(w.shape)}" for w in layer.weights)
            options = f"epsilon={layer.epsilon}" if hasattr(layer, "epsilon") else ""
            frozen = "" if layer.trainable else ", frozen"
            lines.append(f"  {layer.name}: {type(layer).__name__}({options}) {shapes}{frozen}")
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        steps = int(_numpy(optimizer.iterations))
        lines.append(f"  optimizer: {type(optimizer).__name__}, {steps} steps")
    return lines


def _model(path, saved, tau, compile, custom_objects):
    state = saved.weights.optimizer if compile and saved.training else None
    trained = state is not None and (len(state.get("arrays", ())) > 1 or bool(state.get("slots")))
    try:
        # A layer that was shared between models inside comes back as one for each of them.
        room = 4 * saved.weights.elements()
        with keras.saving.custom_object_scope(custom_objects or {}):
            model, members, found_tlus = configs.build(saved.config, room, None, custom_objects)
            found = _match(model, members, saved.weights)
            if found_tlus:
                arrays = {id(variable): array for variable, _, array, _ in found}
                thresholds = [_axis(layer, arrays, tau, trained) for layer in found_tlus]
                model, members, _ = configs.build(saved.config, room, thresholds, custom_objects)
                found = _match(model, members, saved.weights)
            fitted = [(v, _fit(v, name, a, tau)) for v, name, a, _ in found]
    except Exception as error:
        raise files.unreadable(os.fspath(path), error) from error
    _assign(model, fitted)
    keys = [key for _, _, _, key in found]
    shared = {v.path.split("/")[-2] for v, _, _, key in found if key and keys.count(key) > 1}
    if shared:
        _warn(f"layers {sorted(shared)} were shared between models, which have copies now")
    if compile and saved.training:
        legacy = _compile(model, saved.training, custom_objects)
        if legacy is not None and saved.weights.optimizer is not None:
            _try_state(model, members, saved.weights.optimizer, found, legacy)
        elif legacy:
            _warn("the file has no state of its optimizer, which starts anew")
    elif compile and saved.weights.optimizer is not None:
        _warn("the optimizer state in the file was not loaded, as its config is not in the file")
    return model


def _assign(model, fitted):
    for variable, value in fitted:
        variable.assign(value)
    for layer in configs.walk(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # takes the statistics over from the weights


def _warn(message):
    warnings.warn(message[0].upper() + message[1:] + ".", stacklevel=4)


def _numpy(value):
    return np.asarray(keras.ops.convert_to_numpy(value))


# Thresholds


def _axis(layer, arrays, tau, trained):
    """The axis of the TLU that takes the place of a stored one, and the positions that share it."""
    stored = [arrays[id(weight)] for weight in layer.weights]
    positions = int(np.prod(stored[0].shape[:-1]))
    if positions == 1 and len(stored[0].shape) == 1:
        return -1, 1
    uniform = all(_is_uniform(array) for array in stored)
    trained = trained and layer.trainable and positions > 1
    if tau == "auto" and uniform and layer.can_be_shared and not trained:
        return -1, positions
    if tau in ("auto", "per_position"):
        return tuple(range(1, stored[0].ndim + 1)), 1
    if not layer.can_be_shared:
        raise ValueError(
            f"layer {layer.name!r} has a constraint or regularizer that needs its positions: "
            "pass tau='auto' or tau='per_position'"
        )
    return -1, positions


def _is_uniform(array):
    rows = array.reshape(-1, array.shape[-1])
    return np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape), equal_nan=True)


def _fit(variable, name, array, tau):
    """The stored array in the shape that our layers give it."""
    shape = tuple(variable.shape)
    if array.shape == shape:
        return array
    if name in ("gamma", "beta") and array.shape == (1, 1, 1, *shape):
        return array.reshape(shape)
    if name in ("tau", "alpha") and array.shape[-1:] == shape:
        rows = array.reshape(-1, *shape)
        if _is_uniform(array):
            return rows[0]
        if tau == "per_channel_mean":
            return rows.mean(axis=0, dtype="float64").astype(array.dtype)
        raise ValueError(
            f"weight {variable.path!r} has one value per channel, and the file another one for "
            "each position: keep them with tau='per_position' (in a model of your own, "
            "TLU(axis=...)), or average them with tau='per_channel_mean'"
        )
    raise ValueError(f"weight {variable.path!r} has the shape {shape}, the file's {array.shape}")


# Which stored array belongs to which weight


def _match(model, members, stored):
    """(weight, name in our layers or None, array, key in a checkpoint) for all weights."""
    if stored is None:
        raise ValueError("it holds no weights")
    if isinstance(stored, files.FlatWeights):
        found = _match_flat(model, members, stored)
    else:
        found = []
        _match_tree(model, members, stored.root, found, set())
    given = {id(variable) for variable, _, _, _ in found}
    missing = [weight.path for weight in model.weights if id(weight) not in given]
    if missing:
        raise ValueError(f"it holds no array for {', '.join(map(repr, missing[:5]))}")
    return found


def _inside(layer, members):
    """The layers directly inside, a model's in the order in which Keras 2 had them."""
    if isinstance(layer, keras.Model):
        return members.get(id(layer), layer.layers)
    values = [value for _, value in configs.sublayers(layer)]
    return [v for value in values for v in (value if isinstance(value, list) else [value])]


def _own(layer, members):
    """A layer's own weights as Keras 2 ordered them: (weight, its name in our layers or None)."""
    inside = {id(w) for child in _inside(layer, members) for w in child.weights}
    own = [w for w in layer.weights if id(w) not in inside]
    if isinstance(layer, FilterResponseNormalization):
        own = sorted(own, key=lambda w: w is not layer.learned_epsilon)
    if not isinstance(layer, (FilterResponseNormalization, TLU)):
        return [(weight, None) for weight in own]
    return [(w, n) for w in own for n in _OURS if getattr(layer, n, None) is w]


def _in_order(layer, members, frozen=None):
    """All weights in the order of Keras 2, trainable ones and others, with their names.

    `frozen` tells the order of a model whose layers all were (True) or all were not (False).
    """
    children = [_in_order(child, members, frozen) for child in _inside(layer, members)]
    own, trainable, others = _own(layer, members), [], []
    layer_trains = layer.trainable if frozen is None else not frozen
    for weight, name in own:
        by_nature = "moving_" not in weight.name if frozen is False else weight.trainable
        (trainable if layer_trains and by_nature else others).append((weight, name))
    inner_trainable = [w for found, _ in children for w in found]
    inner_others = [w for _, found in children for w in found]
    if layer_trains:
        return _once(trainable + inner_trainable), _once(others + inner_others)
    if isinstance(layer, keras.Model):
        return [], _once(others + inner_trainable + inner_others)
    return [], _once(others + [w for both in children for found in both for w in found])


def _once(weights):
    return list({id(weight): (weight, name) for weight, name in weights}.values())


def _match_flat(model, members, stored):
    layers = [v for v in _inside(model, members) if v.weights]
    groups = [(name, arrays) for name, arrays in stored.groups if arrays]
    if [name for name, _ in groups] == [None]:
        arrays = iter(groups[0][1])
        groups = [
            (layer.name, list(itertools.islice(arrays, len(layer.weights)))) for layer in layers
        ]
        if any(True for _ in arrays):
            raise ValueError("it holds more weights than the model")
    if len(layers) != len(groups):
        raise ValueError(
            f"it holds weights for {len(groups)} layers, the model has {len(layers)} with weights"
        )
    by_name = {layer.name: layer for layer in layers}
    if all(name in by_name for name, _ in groups):
        layers = [by_name[name] for name, _ in groups]
    found = []
    for layer, (group, arrays) in zip(layers, groups, strict=True):
        orders = [[*a, *b] for a, b in (_in_order(layer, members, f) for f in (None, False, True))]
        pairs = next(filter(None, (_paired(order, arrays) for order in orders)), None)
        if pairs is None:
            expected = [tuple(weight.shape) for weight, _ in orders[0]]
            raise ValueError(
                f"layer {layer.name!r} has weights of the shapes {expected}, and {group!r} in the "
                f"file {[a.shape for _, a in arrays]}"
            )
        found += pairs
    return found


def _paired(order, arrays):
    """Weights with the arrays of one layer, or None if they do not fit in this order."""
    if len(order) != len(arrays):
        return None
    names = [_last(name) for name, _ in arrays]
    expected = [name or weight.name for weight, name in order]
    if names != expected and sorted(names) == sorted(expected):
        if len(set(names)) < len(names):
            return None
        arrays = [arrays[names.index(name)] for name in expected]
    pairs = []
    for (weight, name), (_, array) in zip(order, arrays, strict=True):
        if not _fits(weight, name, array):
            return None
        pairs.append((weight, name, array, None))
    return pairs


def _fits(weight, name, array):
    """Whether a stored array can be this weight, perhaps after `_fit`."""
    shape = tuple(weight.shape)
    return array.shape == shape or (name in _OURS and array.shape[-1:] == shape)


def _last(name):
    """`block/n/gamma:0` is called gamma."""
    return name.rpartition("/")[2].partition(":")[0]


def _match_tree(layer, members, node, found, seen):
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if isinstance(layer, keras.Model):
        inside = [v for v in _inside(layer, members) if id(v) not in seen or node.named]
        inside = [v for v in inside if v.weights or not node.named]
        nodes = node.layers([_class_name(v) for v in inside])
        if not nodes and any(v.weights for v in inside):
            raise ValueError(f"it has not the layers of model {layer.name!r}")
        children = list(zip(inside, nodes, strict=False))
    else:
        _match_own(layer, members, node, found)
        children = []
        for attribute, value in configs.sublayers(layer):
            inner = node.child(attribute)
            if isinstance(value, list):
                nodes = inner.items([_class_name(v) for v in value]) if inner else []
                children += zip(value, nodes, strict=False)
            else:
                children.append((value, inner))
    for child, inner in children:
        if inner is not None:
            _match_tree(child, members, inner, found, seen)
        elif child.weights and id(child) not in seen:
            raise ValueError(f"it holds no weights for layer {child.name!r}")


def _class_name(layer):
    if isinstance(layer, keras.Sequential):
        return "Sequential"
    if isinstance(layer, TLU):
        return "TLU"
    return "Functional" if isinstance(layer, keras.Model) else type(layer).__name__


def _match_own(layer, members, node, found):
    own = _own(layer, members)
    arrays = node.arrays() if own else []
    by_name = {name: (key, array) for name, key, array in arrays}
    if node.named and all((name or weight.name) in by_name for weight, name in own):
        pairs = [(w, n, *by_name[n or w.name][::-1]) for w, n in own]
    elif len(arrays) == len(own):
        pairs = [(w, n, a, key) for (w, n), (_, key, a) in zip(own, arrays, strict=True)]
    else:
        raise ValueError(f"layer {layer.name!r} has {len(own)} weights, the file {len(arrays)}")
    for weight, name, array, _ in pairs:
        if not _fits(weight, name, array):
            raise ValueError(
                f"layer {layer.name!r} has a weight of the shape {tuple(weight.shape)}, "
                f"the file one of {array.shape}"
            )
    found += pairs


# Compilation and optimizer state


def _compile(model, training, custom_objects):
    """Compiles the model as it was. Returns whether the optimizer's state has the layout from
    before Keras 2.11, or None if it was not compiled."""
    options = {}
    for name in ("metrics", "weighted_metrics"):
        try:
            value = training.get(name)
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
                value = value[0]
            options[name] = _objects(value, keras.metrics, custom_objects)
        except Exception as error:
            _warn(f"the {name} are left out: {_said(error)}")
    try:
        optimizer, legacy = _optimizer(training.get("optimizer_config", training.get("optimizer")))
        model.compile(
            optimizer,
            _objects(training.get("loss"), keras.losses, custom_objects),
            loss_weights=training.get("loss_weights"),
            run_eagerly=bool(training.get("run_eagerly")),
            steps_per_execution=training.get("steps_per_execution") or 1,
            **options,
        )
        # Keras saves an optimizer that is not built in a way that it warns about when it loads it.
        model.optimizer.build(model.trainable_variables)
    except Exception as error:
        model.compiled = False
        _warn(f"the model is not compiled: {_said(error)}")
        return None
    return legacy


def _said(error):
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _optimizer(config):
    if isinstance(config, str):
        return keras.optimizers.get(config), False
    kind = config["class_name"].rpartition(">")[2]
    options = dict(config["config"])
    if kind.startswith("LossScaleOptimizer"):
        inner, legacy = _optimizer(options["inner_optimizer"])
        if not options.get("dynamic", True):
            inner.loss_scale_factor = float(options["initial_scale"])
            return inner, legacy
        return keras.optimizers.LossScaleOptimizer(
            inner,
            initial_scale=options.get("initial_scale", 2.0**15),
            dynamic_growth_steps=options.get("dynamic_growth_steps", 2000),
        ), legacy
    cls = getattr(keras.optimizers, kind, None)
    own = not config["class_name"].startswith("Addons>")
    if not own or not inspect.isclass(cls) or not issubclass(cls, keras.optimizers.Optimizer):
        raise ValueError(f"its optimizer {config['class_name']!r} is not one that Keras 3 has")
    legacy = "decay" in options
    decay = options.pop("decay", 0.0)
    rate = options.get("learning_rate", 0.001)
    if isinstance(rate, dict):
        options["learning_rate"] = _objects(rate, keras.optimizers.schedules, None)
    elif decay:
        options["learning_rate"] = keras.optimizers.schedules.InverseTimeDecay(rate, 1, decay)
    return _made(cls, options, ("is_legacy_optimizer", "jit_compile")), legacy


def _made(cls, config, ignored=()):
    """An object of this class, from the part of an old config that still exists."""
    accepted = configs.parameters(cls)
    known = {*accepted, *ignored}
    lost = [key for key, value in config.items() if key not in known and value is not None]
    if lost:
        _warn(f"{cls.__name__} lost the options {', '.join(lost)}, which Keras 3 has not")
    named = {k: v for k, v in config.items() if k in accepted and (k, v) != ("name", None)}
    return cls(**named)


def _objects(value, module, custom_objects):
    """Losses, metrics or schedules, in any nesting, from the module that has them."""
    if isinstance(value, (list, tuple)):
        return [_objects(item, module, custom_objects) for item in value]
    if isinstance(value, dict) and "class_name" not in value:
        return {key: _objects(item, module, custom_objects) for key, item in value.items()}
    if isinstance(value, str):
        found = (custom_objects or {}).get(value, value)
        if isinstance(found, str) and module is not keras.metrics:
            module.get(found)  # raises for an unknown name
        return found
    if value is None:
        return None
    kind, config = value["class_name"].rpartition(">")[2], dict(value["config"])
    custom = (custom_objects or {}).get(value["class_name"], (custom_objects or {}).get(kind))
    if custom is not None:
        return custom.from_config(config)
    if kind == "MeanMetricWrapper":
        kind = "".join(part.title() for part in str(config.pop("fn")).split("_"))
    config.pop("fn", None)
    cls = getattr(module, kind, None)
    base = {keras.losses: keras.losses.Loss, keras.metrics: keras.metrics.Metric}.get(
        module, keras.optimizers.schedules.LearningRateSchedule
    )
    if not inspect.isclass(cls) or not issubclass(cls, base):
        raise ValueError(f"{value['class_name']!r} is not in Keras 3. Pass it in `custom_objects`")
    if config.get("reduction") == "auto":
        config["reduction"] = "sum_over_batch_size"
    if module is keras.metrics and any(map(_is_large, config.values())):
        raise ValueError(f"{kind!r} is larger than any metric should be: {config}")
    return _made(cls, config)


def _is_large(value):
    return isinstance(value, (int, float)) and not -5000 <= value <= 5000


_SLOTS = {
    "SGD": ["momentum"],
    "Adam": ["m v"],
    "AdamW": ["m v"],
    "Nadam": ["m v"],
    "Adamax": ["m v"],
    "Adadelta": ["accum_grad accum_var"],
    "Adagrad": ["accumulator"],
    "Ftrl": ["accumulator linear"],
    "Lion": ["m"],
    "RMSprop": ["rms"],
}


def _layout(optimizer, weights, legacy):
    """(slot, weight) of an optimizer's arrays, in the order in which Keras 2 and 3 create them.

    Before Keras 2.11, one slot after the other; since then, slots of one line here alternate.
    """
    groups = list(_SLOTS[type(optimizer).__name__])
    groups += ["vhat"] * bool(getattr(optimizer, "amsgrad", False))
    if type(optimizer).__name__ == "RMSprop":
        groups += ["momentum"] * (optimizer.momentum > 0) + ["mg"] * bool(optimizer.centered)
    if optimizer.use_ema:
        groups.insert(0, "average")
    if legacy and type(optimizer).__name__ != "Ftrl":
        groups = " ".join(groups).split()
    return [(slot, id(w)) for group in groups for w in weights for slot in group.split()]


def _trained_with(training):
    """The name of the optimizer in a file, or None, and whether it is one of before Keras 2.11."""
    config = training or {}
    config = config.get("optimizer_config", config.get("optimizer"))
    while isinstance(config, dict) and "inner_optimizer" in config["config"]:
        config = config["config"]["inner_optimizer"]
    if not isinstance(config, dict):
        return config, False
    return config["class_name"].rpartition(">")[2], "decay" in config["config"]


def _try_state(model, *arguments):
    try:
        _load_state(model, *arguments)
    except Exception as error:  # a damaged file; the weights are there and checked
        _warn(f"the optimizer's state was not loaded: {_said(error)}")


def _load_state(model, members, state, found, legacy):
    """Gives the optimizer the state that was saved, for the step that would have come next."""
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    optimizer = model.optimizer.inner_optimizer if scaled else model.optimizer
    kind = type(optimizer).__name__
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    steps_so_far = int(state["iterations"])
    optimizer.iterations.assign(steps_so_far)
    names = {id(weight): name for weight, name, _, _ in found}
    values = _old_state(model, members, optimizer, state, found, legacy)
    rest = [v for v in optimizer.variables if v is not optimizer.iterations]
    rest = [v for v in rest if v is not optimizer.learning_rate]
    slots = _layout(optimizer, model.trainable_variables, False) if kind in _SLOTS else []
    if kind == "SGD" and optimizer.momentum == 0:
        slots = slots[: len(rest)]
    if kind == "Nadam":
        steps = np.arange(1, 1 + min(steps_so_far, 10_000))
        rest.pop().assign(np.prod(optimizer.beta_1 * (1.0 - 0.5 * 0.96**steps)))
        _warn("the files have no momentum schedule of Nadam, so it was computed from its steps")
    if values is None or len(slots) != len(rest):
        if steps_so_far > 0:
            _warn(f"the state of {kind} was not loaded: only its {steps_so_far} steps were")
        return
    lost = []
    for (slot, weight), variable in zip(slots, rest, strict=True):
        try:
            variable.assign(_fit(variable, names[weight], values[slot, weight], "auto"))
        except (KeyError, ValueError):
            lost.append(variable.path)
    if lost:
        _warn(f"the state of {kind} starts anew for {', '.join(lost)}")
    if "learning_rate" in state and any(v is optimizer.learning_rate for v in optimizer.variables):
        optimizer.learning_rate.assign(state["learning_rate"])
    if scaled and "loss_scale" in state:
        model.optimizer.step_counter.assign(state["loss_scale"][0])
        model.optimizer.dynamic_scale.assign(state["loss_scale"][1])


def _old_state(model, members, optimizer, state, found, legacy):
    """The file's arrays by (slot, weight), or None if their number is another one."""
    kind = type(optimizer).__name__
    if kind not in _SLOTS or (kind in ("Nadam",) and legacy):
        return None
    if "slots" in state:
        weights = {key: id(weight) for weight, _, _, key in found}
        return {(slot, weights.get(key)): array for (slot, key), array in state["slots"].items()}
    trainable = [weight for weight, _ in _in_order(model, members)[0]]
    layout = _layout(optimizer, trainable, legacy)
    if len(layout) != len(state["arrays"]) - 1:
        return {} if kind == "SGD" and optimizer.momentum == 0 else None
    return dict(zip(layout, state["arrays"][1:], strict=True))
