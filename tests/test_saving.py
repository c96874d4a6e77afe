import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from backends import numpy

import keras_frn

# A fresh process that does nothing but import keras_frn: what it loads needs no `custom_objects`.
RELOAD = textwrap.dedent(
    """
    import sys
    import numpy as np
    import keras_frn
    import keras
    data, result, *paths = sys.argv[1:]
    x, y = (np.load(data)[name] for name in "xy")
    found = {}
    for path in paths:
        model = keras.models.load_model(path)
        if path.endswith(".h5"):
            # Keras 3.15 builds the optimizer of an .h5 file for no variables: no such model trains
            # on.
            model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
        found[path[-3:] + " before"] = model.predict(x, verbose=0)
        model.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
        found[path[-3:] + " after"] = model.predict(x, verbose=0)
    # The activation of Keras 2 that Keras 3 changed, which migrated files need.
    name = "keras_frn>hard_sigmoid_of_keras2"
    found["activation"] = keras.saving.get_registered_object(name)(np.ones(1, "float32"))
    np.savez(result, **found)
    """
)


def every_option():
    """All layers, with options whose loss in a file would show."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False)(inputs)
    x = keras_frn.FilterResponseNormalization(
        learned_epsilon="per_channel", epsilon=[1e-6, 1e-3, 0.1, 1.0], gamma_regularizer="l2"
    )(x)
    x = keras_frn.TLU(axis=(1, 2, 3), affine=True, tau_initializer="random_normal")(x)
    x = keras.layers.Conv2D(5, 3)(x)
    x = keras_frn.FilterResponseNormalizationTLU(
        epsilon=0.1, learned_epsilon=True, affine=True, alpha_initializer="random_normal"
    )(x)
    x = keras.layers.Permute((3, 1, 2))(x)
    x = keras_frn.FilterResponseNormalization(axis=1, scale=False, epsilon=0.3)(x)
    x = keras_frn.TLU(axis=1, tau_constraint="non_neg", jit_compile=True)(x)
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    y = rng.normal(size=(16, 2)).astype("float32")
    model = every_option()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
    model.fit(x, y, epochs=3, verbose=0)
    data = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(data, x=x, y=y)
    return model, x, y, data


def test_reload_in_a_fresh_process(trained, tmp_path):
    model, x, y, data = trained
    result, paths = tmp_path / "result.npz", [tmp_path / "model.keras", tmp_path / "model.h5"]
    for path in paths:
        model.save(path)
    subprocess.run([sys.executable, "-c", RELOAD, data, result, *paths], check=True)
    reloaded = np.load(result)
    np.testing.assert_allclose(reloaded["activation"], 0.7, rtol=1e-6)  # 2 / 3 in Keras 3
    for suffix in ("ras", ".h5"):
        np.testing.assert_array_equal(reloaded[f"{suffix} before"], model.predict(x, verbose=0))
        # The next step from here, of a copy, as other tests use the model.
        copy = keras.models.clone_model(model)
        copy.set_weights([np.array(w) for w in model.get_weights()])
        copy.compile(keras.optimizers.Adam(0.01), keras.losses.MeanSquaredError())
        if suffix == "ras":
            copy.optimizer.build(copy.trainable_variables)
            variables = zip(copy.optimizer.variables, model.optimizer.variables, strict=True)
            for target, source in variables:
                target.assign(np.array(numpy(source)))
        copy.fit(x, y, batch_size=len(x), shuffle=False, verbose=0)
        # Threads may add in another order in another process, and Adam's first steps divide each
        # gradient by its own size, so that the rounding of a small one shows.
        after = reloaded[f"{suffix} after"]
        np.testing.assert_allclose(after, copy.predict(x, verbose=0), rtol=1e-5, atol=3e-5)
        assert not np.allclose(after, reloaded[f"{suffix} before"], atol=1e-4)


@pytest.mark.parametrize("suffix", ["weights.h5", "h5"])
def test_weights_load_into_a_new_model(trained, suffix, tmp_path):
    model, x, _, _ = trained
    path = tmp_path / f"only.{suffix}"
    if suffix == "weights.h5":
        model.save_weights(path)
    else:
        model.save(path)
    other = every_option()
    other.load_weights(path)
    np.testing.assert_array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))


def test_json_and_clone_keep_the_config(trained):
    model, x, _, _ = trained
    for other in (keras.models.model_from_json(model.to_json()), keras.models.clone_model(model)):
        for layer, original in zip(other.layers[1:], model.layers[1:], strict=True):
            assert layer.get_config() == original.get_config()
        other.set_weights(model.get_weights())
        np.testing.assert_array_equal(other.predict(x, verbose=0), model.predict(x, verbose=0))


def test_tau_axes_survive_h5(tmp_path):
    """Keras drops `axis` from the config of a layer in an .h5 file unless it is one number."""
    for axis in ((1, 2), (2,), [1, 2, 3]):
        model = keras.Sequential([keras.Input((4, 5, 6)), keras_frn.TLU(axis=axis)])
        model.save(tmp_path / "model.h5")
        layer = keras.models.load_model(tmp_path / "model.h5").layers[0]
        assert layer.axis == tuple(axis)
        assert layer.tau.shape == model.layers[0].tau.shape


def test_registered_names():
    for cls in (
        keras_frn.FilterResponseNormalization,
        keras_frn.TLU,
        keras_frn.FilterResponseNormalizationTLU,
    ):
        name = f"keras_frn>{cls.__name__}"
        assert keras.saving.get_registered_name(cls) == name
        assert keras.saving.get_registered_object(name) is cls
