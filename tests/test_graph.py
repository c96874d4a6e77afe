import keras
import numpy as np
import pytest
from keras import layers
from reference import close

from keras_frn import graph


def nested():
    """A model in which one block is called once and another twice."""
    once = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="inside")], name="once")
    inner = keras.Input((4,))
    twice = keras.Model(inner, layers.Dense(4, name="shared")(inner), name="twice")
    x = inputs = keras.Input((4,))
    x = layers.Dense(4, name="first")(x)
    x = twice(twice(layers.ReLU(name="between")(once(x))))
    return keras.Model(inputs, layers.Add(name="sum")([x, x]))


def names(calls):
    return [call and call.layer.name for call in calls]


def test_wiring_includes_a_nested_model_called_once():
    model = nested()
    wiring = graph.Wiring(model)
    order = ["first", "inside", "between", "twice", "shared", "twice", "sum"]
    assert names(wiring.calls) == order
    by_name = dict(zip(order, wiring.calls))
    (tensor,) = by_name["inside"].inputs
    assert names([wiring.producer(tensor)]) == ["first"]
    assert names(wiring.consumers(tensor)) == ["inside"]
    assert names(wiring.consumers(by_name["inside"].outputs[0])) == ["between"]


def test_wiring_treats_a_nested_model_called_twice_as_closed():
    wiring = graph.Wiring(nested())
    shared = next(call for call in wiring.calls if call.layer.name == "shared")
    assert wiring.producer(shared.inputs[0]) is None
    assert wiring.consumers(shared.outputs[0]) == [None]
    add = wiring.calls[-1]
    assert names(wiring.consumers(add.inputs[0])) == ["sum", "sum"]
    assert wiring.consumers(add.outputs[0]) == [None]


def test_wiring_separates_a_symbolic_tensor_of_two_models():
    x = inputs = keras.Input((4,))
    x = layers.Dense(4, name="inside")(x)
    model = keras.Sequential([inputs, keras.Model(inputs, x), layers.ReLU(name="last")])
    wiring = graph.Wiring(model)
    assert names(wiring.calls) == ["inside", "last"]
    assert wiring.producer(wiring.calls[0].inputs[0]) is None


def test_copy_has_new_layers_and_the_same_wiring(rng):
    model = nested()
    copy, copies = graph.copy(model, graph.copy_layer)
    for layer, new in copies.items():
        graph.copy_weights(layer, new)
        assert new is not layer
        assert new.name == layer.name
    x = rng.normal(size=(3, 4)).astype("float32")
    close(keras.ops.convert_to_numpy(copy(x)), keras.ops.convert_to_numpy(model(x)), 1e-6)
    assert names(graph.Wiring(copy).calls) == names(graph.Wiring(model).calls)


def test_list_layers_lists_inner_layers_once():
    found = [layer.name for layer in graph.list_layers(nested())]
    for name in ("once", "inside", "twice", "shared", "sum"):
        assert found.count(name) == 1
    wrapped = keras.Sequential([keras.Input((5, 4)), layers.TimeDistributed(layers.Dense(2))])
    assert any(type(layer) is layers.Dense for layer in graph.list_layers(wrapped))


def test_list_layers_is_in_the_order_of_the_model():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="b"), layers.ReLU(name="c")])
    ends = [layers.Dense(4, name="a"), inner, layers.Dense(4, name="d")]
    found = graph.list_layers(keras.Sequential([keras.Input((4,)), *ends]))
    assert [layer.name for layer in found if len(layer.name) == 1] == ["a", "b", "c", "d"]


def run_steps(model, x):
    """The output of the last step."""
    steps, (key,) = graph.unroll(model)
    values = {key: graph.Value(x)}
    for step in steps:
        values |= zip(step.outputs, step.run(values[key] for key in step.inputs), strict=True)
    return values[steps[-1].outputs[0]].array


def test_unrolled_steps_compute_the_model(rng):
    model = nested()
    x = rng.normal(size=(3, 4)).astype("float32")
    steps, _ = graph.unroll(model)
    assert [step.layer.name for step in steps] == [
        "first",
        "inside",
        "between",
        "shared",
        "shared",
        "sum",
    ]
    close(run_steps(model, x), keras.ops.convert_to_numpy(model(x)), 1e-6)


def test_unrolled_steps_carry_masks(rng):
    inputs = keras.Input((None,), dtype="int32")
    x = layers.ReLU()(layers.Embedding(5, 3, mask_zero=True)(inputs))
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(x))
    x = np.array([[1, 2, 0], [3, 0, 0]])
    close(run_steps(model, x), keras.ops.convert_to_numpy(model(x)), 1e-6)
    (embedded,) = graph.unroll(model)[0][0].run([graph.Value(x)])
    np.testing.assert_array_equal(embedded.mask, x > 0)


def test_replace_call_changes_one_layer_only(rng):
    x = rng.normal(size=(3, 4)).astype("float32")
    one, other = layers.ReLU(), layers.ReLU()
    graph.replace_call(one, lambda x: x)
    close(keras.ops.convert_to_numpy(one(x)), x, 0)
    close(keras.ops.convert_to_numpy(other(x)), np.maximum(x, 0), 0)


class WritesTooMuch(layers.Layer):
    """Its config has a key that its constructor does not know."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor, "unknown": 1}


def test_copy_layer_drops_unknown_config_keys():
    copy = graph.copy_layer(WritesTooMuch(3, name="x"))
    assert (type(copy), copy.factor, copy.name) == (WritesTooMuch, 3, "x")


def test_copy_layer_without_a_config_of_keras():
    """Keras writes no config for a layer that was given a policy and no `get_config`."""
    policy = keras.DTypePolicy("mixed_float16")
    copy = graph.copy_layer(layers.Identity(name="x", dtype=policy))
    assert (copy.name, copy.dtype_policy.name) == ("x", "mixed_float16")
    assert type(copy).from_config(copy.get_config()).name == "x", "and the copy can be saved"


def relu(x):
    """A user's function, of a name that Keras has for another."""
    return keras.ops.clip(x, 0.0, 1.0)


@pytest.mark.each_backend
@pytest.mark.parametrize("function", [relu, lambda x: x * x])
def test_copy_layer_keeps_functions(function, rng):
    x = rng.normal(2.0, size=(4, 3)).astype("float32")
    dense = layers.Dense(3, activation=function, kernel_initializer=lambda shape, dtype: np.eye(3))
    for layer in (layers.Activation(function), dense, layers.Lambda(function, output_shape=(3,))):
        copy = graph.copy_layer(layer)
        assert copy.compute_output_shape((4, 3)) == (4, 3)
        expected, actual = map(keras.ops.convert_to_numpy, (layer(x), copy(x)))
        np.testing.assert_array_equal(actual, expected)


class Reads(layers.Layer):
    """Its constructor does not take what its config has."""

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        self.source = path.removesuffix(".npy")

    def get_config(self):
        return {**super().get_config(), "path": {"path": self.source}}


def test_refusal_of_a_config_leaves_the_config_out():
    with pytest.raises(ValueError, match="Received: x of class Reads: 'dict' object has no attrib"):
        graph.copy_layer(Reads("x.npy", name="x"))


class HoldsAFunction(layers.Layer):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function


def test_layer_without_a_config_is_named():
    with pytest.raises(ValueError, match="Received: x of class HoldsAFunction: "):
        graph.copy_layer(HoldsAFunction(abs, name="x"))


class Forgetful(layers.Layer):
    """Its config makes a layer of other weights."""

    def __init__(self, hidden=3, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(hidden)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {k: v for k, v in super().get_config().items() if k != "hidden"}


def test_layer_whose_config_changes_its_weights_is_named():
    one, other = Forgetful(5, name="x"), Forgetful()
    for layer in (one, other):
        layer(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="Received: x of class Forgetful: the copy has weights of"):
        graph.copy_weights(one, other)
