import keras
import numpy as np
import pytest
from keras import layers

from keras_frn.callbacks import EpsilonScheduler
from keras_frn.conversion import replace_batch_normalization


def _converted(rng, ratio=3.0):
    block = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(name="inner")]
    )
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            block,
            layers.GlobalAveragePooling2D(),
            layers.BatchNormalization(name="single"),
            layers.Dense(2),
        ]
    )
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    model = replace_batch_normalization(model, x, epsilon_ratio=ratio, verbose=False)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    return model, x, np.zeros((16, 2))


def _layers(model):
    return model.layers[0].get_layer("inner"), model.get_layer("single")


def test_epsilon_goes_down_and_gamma_keeps_the_size_of_the_output(rng):
    model, x, y = _converted(rng, ratio=2.0)
    inner, single = _layers(model)
    start = [np.array(w) for w in (inner.learned_epsilon, inner.gamma, single.learned_epsilon)]
    schedule = EpsilonScheduler(steps=4, initial_ratio=2.0, final_ratio=0.5)
    model.fit(x, y, batch_size=8, verbose=0, callbacks=[schedule])
    # Two of four steps, on a geometric path: half of 2 to 0.5.
    assert schedule.ratio == pytest.approx(1.0)
    # Products and quotients of float32.
    np.testing.assert_allclose(inner.learned_epsilon, start[0] / 2, rtol=1e-5)
    np.testing.assert_allclose(inner.gamma, start[1] * np.sqrt(2 / 3), rtol=1e-5)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[schedule])
    np.testing.assert_allclose(inner.learned_epsilon, start[0] / 4, rtol=1e-5)
    np.testing.assert_allclose(inner.gamma, start[1] * np.sqrt(1.5 / 3), rtol=1e-5)
    np.testing.assert_array_equal(single.learned_epsilon, start[2])


def test_epsilon_is_held_against_the_optimizer(rng):
    model, x, y = _converted(rng)
    inner, _ = _layers(model)
    start = np.array(inner.learned_epsilon)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    schedule = EpsilonScheduler(steps=1, final_ratio=0.3)
    model.fit(x, y, batch_size=1, verbose=0, callbacks=[schedule])
    # One step of the optimizer, of 0.1 at most, comes after the last batch began.
    assert np.max(np.abs(np.array(inner.learned_epsilon) - start / 10)) < 0.11


def test_a_model_without_a_learned_epsilon_is_refused(rng):
    model, x, y = _converted(rng, ratio=0.0)
    with pytest.raises(ValueError, match=r"`model` must have FRN layers with a learned epsilon"):
        model.fit(x, y, verbose=0, callbacks=[EpsilonScheduler(steps=2)])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 0}, r"`steps` must be .*Received: steps=0"),
        ({"steps": 2, "initial_ratio": 0}, r"`initial_ratio` must be .*initial_ratio=0"),
        ({"steps": 2, "final_ratio": float("inf")}, r"`final_ratio` must be .*final_ratio=inf"),
    ],
)
def test_arguments_are_checked(arguments, match):
    with pytest.raises(ValueError, match=match):
        EpsilonScheduler(**arguments)
