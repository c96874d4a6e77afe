import keras
import numpy as np
import pytest

from keras_frn import models
from keras_frn.constraints import ZeroMean
from keras_frn.layers import TLU, FilterResponseNormalization


def _kernel_shapes(model):
    return sorted(tuple(weight.shape) for weight in model.weights if weight.path.endswith("kernel"))


def _channels(model):
    norms = [x for x in model.layers if isinstance(x, FilterResponseNormalization)]
    return sum(x.gamma.shape[0] for x in norms)


@pytest.mark.once
def test_resnet20_frn_has_the_size_of_its_source():
    # By hand from the source: kernels 270,896 and the dense bias 10, and in each of the 784
    # channels behind a convolution a bias, gamma, beta and tau.
    kernels = 432 + 6 * 2304 + (4608 + 5 * 9216 + 512) + (18432 + 5 * 36864 + 2048) + 640
    assert kernels == 270_896
    model = models.resnet_cifar()
    assert model.count_params() == kernels + 10 + 4 * 784 == 274_042
    activations = [x for x in model.layers if isinstance(x, keras.layers.Activation)]
    assert len(activations) == 1 + 2 * 9
    assert all(x.activation is keras.activations.silu for x in activations)


@pytest.mark.once
def test_tlu_replaces_the_activation():
    model = models.resnet_cifar(activation="tlu", depth=8)
    assert not [x for x in model.layers if isinstance(x, keras.layers.Activation)]
    # 3 blocks: a branch end each, two projections, neither with a threshold; a TLU after each
    # addition.
    plain = [x for x in model.layers if type(x) is FilterResponseNormalization]
    assert len(plain) == 5
    assert sum(isinstance(x, TLU) for x in model.layers) == 3


@pytest.mark.once
def test_resnet_has_the_convolutions_of_the_pre_activation_resnet():
    reference = keras.applications.ResNet50V2(weights=None, input_shape=(64, 64, 3))
    model = models.resnet((64, 64, 3))
    assert _kernel_shapes(model) == _kernel_shapes(reference)
    norms = [x for x in reference.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert _channels(model) == sum(x.gamma.shape[0] for x in norms)
    # gamma, beta and tau; the only bias is that of the logits.
    kernels = sum(int(np.prod(shape)) for shape in _kernel_shapes(model))
    assert model.count_params() == kernels + 1000 + 3 * _channels(model)
    assert model.output_shape == (None, 1000)


@pytest.mark.once
@pytest.mark.parametrize(
    ("input_shape", "size"),
    [
        pytest.param((96, 3), 3, id="1d"),
        pytest.param((64, 64, 3), 9, id="2d"),
        pytest.param((32, 32, 32, 3), 27, id="3d"),
        pytest.param((None, None, 3), 9, id="sizes unknown"),
    ],
)
def test_resnet_of_each_rank(input_shape, size):
    model = models.resnet(input_shape, classes=4, depth=18, width=8, learned_epsilon=True)
    kernel = model.get_layer("stage1_block1_conv1").kernel
    assert tuple(kernel.shape) == (3,) * (len(input_shape) - 1) + (8, 8)
    assert int(np.prod(kernel.shape)) == size * 64
    x = np.random.default_rng(0).normal(size=(2, *(s or 48 for s in input_shape)))
    y = keras.ops.convert_to_numpy(model(x.astype("float32")))
    assert y.shape == (2, 4)
    assert np.isfinite(y).all()
    assert np.std(y) > 1e-3


@pytest.mark.once
@pytest.mark.parametrize(
    "build",
    [
        lambda c: models.resnet((32, 32, 3), 4, 18, 4, learned_epsilon=True, kernel_constraint=c),
        lambda c: models.resnet_cifar((8, 8, 3), 4, 8, 4, kernel_constraint=c),
    ],
)
def test_every_convolution_and_no_other_layer_has_the_constraint(build):
    constraint = ZeroMean()
    model = build(constraint)
    convolutions = {w.path for w in model.weights if w.path.endswith("kernel")} - {"logits/kernel"}
    assert {w.path for w in model.weights if w.constraint is constraint} == convolutions


@pytest.mark.once  # JAX compiles it for half a minute
def test_a_training_step_reaches_every_weight(rng):
    model = models.resnet((64, 2), classes=2, depth=18, width=4, learned_epsilon=True)
    model.compile(keras.optimizers.SGD(1.0), keras.losses.CategoricalCrossentropy(from_logits=True))
    before = [np.array(weight) for weight in model.weights]
    model.fit(rng.normal(size=(16, 64, 2)), np.eye(2)[np.arange(16) % 2], verbose=0)
    still = [w.path for w, b in zip(model.weights, before) if np.array_equal(np.array(w), b)]
    assert still == []


@pytest.mark.once
@pytest.mark.parametrize(
    "build",
    [
        lambda: models.resnet((32, 24, 3), 5, 18, 4, learned_epsilon=True),
        lambda: models.resnet_cifar(depth=8, width=4),
    ],
)
def test_networks_are_channels_last_whatever_keras_is_set_to(build, monkeypatch):
    expected = build()
    keras.config.set_image_data_format("channels_first")
    try:
        model = build()
    finally:
        keras.config.set_image_data_format("channels_last")
    shapes = [[tuple(w.shape) for w in m.weights] for m in (model, expected)]
    assert shapes[0] == shapes[1]
    outputs = [[tuple(layer.output.shape) for layer in m.layers] for m in (model, expected)]
    assert outputs[0] == outputs[1]
    formats = {getattr(layer, "data_format", "channels_last") for layer in model.layers}
    assert formats == {"channels_last"}


@pytest.mark.once
@pytest.mark.parametrize("network", [models.resnet, models.resnet_cifar])
@pytest.mark.parametrize(
    "arguments",
    [
        {"input_shape": 32},
        {"input_shape": "32"},
        {"input_shape": (3,)},
        {"input_shape": (8, 8, None)},
        {"input_shape": (32, 32, 0)},
        {"input_shape": (32, 32.0, 3)},
        {"input_shape": (32, True, 3)},
        {"input_shape": (8, 8, 8, 8, 3)},
        {"depth": [18]},
        {"depth": 21},
        {"depth": True},
        {"depth": "20"},
        {"classes": 0},
        {"classes": None},
        {"width": 1.5},
        {"width": "wide"},
    ],
    ids=str,
)
def test_arguments_are_checked(network, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}=") as error:
        network(**arguments)
    assert repr(value) in str(error.value)


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: models.resnet(learned_epsilon="no"), "`learned_epsilon` must be .*Received: .*no"),
        (lambda: models.resnet_cifar(depth=2), "`depth` must be 6 n . 2. Received: depth=2"),
        (lambda: models.resnet_cifar((8, 3)), "`input_shape` must be a tuple of 2 spatial sizes"),
        (lambda: models.resnet_cifar(activation="no"), "`activation` must be .*activation='no'"),
        (lambda: models.resnet_cifar(activation=7), "`activation` must be .*activation=7"),
    ],
)
def test_arguments_of_one_network_are_checked(call, match):
    with pytest.raises(ValueError, match=match):
        call()
