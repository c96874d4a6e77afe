import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_frn.samples import BATCH_SIZE, MAX_SAMPLES, Samples


@pytest.fixture
def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


@pytest.fixture
def two_inputs():
    inputs = [keras.Input((4,), name="b"), keras.Input((3,), name="a", dtype="int32")]
    return keras.Model(inputs, keras.layers.Concatenate()(inputs))


def joined(samples):
    return [np.concatenate(parts) for parts in zip(*samples)]


class Batches(keras.utils.PyDataset):
    """Samples and targets; without end if no size is given."""

    def __init__(self, x, size=None):
        super().__init__()
        self.x, self.size = x, size

    @property
    def num_batches(self):
        return self.size and -(-len(self.x) // self.size)

    def __getitem__(self, index):
        size = self.size or 8
        start = index * size % len(self.x)
        part = self.x[start : start + size]
        return part, np.zeros(len(part))


class Readable:
    """What can only be sliced, as a file can."""

    def __init__(self, x):
        self.x, self.shape = x, x.shape

    def __getitem__(self, rows):
        return self.x[rows]


# Of all samples and a batch size.
KINDS = {
    "array": lambda x, n: x,
    "float64": lambda x, n: x.astype("float64"),
    "what can be sliced": lambda x, n: Readable(x),
    "list of one array": lambda x, n: [x],
    "list of batches": lambda x, n: batches(x, n),
    "list of samples": lambda x, n: list(x),
    "inputs and targets": lambda x, n: (x, np.zeros(len(x))),
    "inputs and masks of the same shape": lambda x, n: (x, np.ones_like(x)),
    "inputs, targets and weights": lambda x, n: (x, np.zeros(len(x)), np.ones(len(x))),
    "generator function, as TFLite's guides write it": lambda x, n: (
        lambda: ([row[None]] for row in x)
    ),
    "generator of pairs": lambda x, n: ((part, np.zeros(len(part))) for part in batches(x, n)),
    "PyDataset": lambda x, n: Batches(x, n),
    "backend tensor": lambda x, n: keras.ops.convert_to_tensor(x),
}


def batches(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


@settings(max_examples=5 * len(KINDS))
@given(st.sampled_from(list(KINDS)), st.integers(1, 99), st.integers(1, 70))
def test_every_kind_of_data_can_be_read_again(kind, count, size):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Flatten()])
    x = np.random.default_rng(0).normal(size=(count, 4)).astype("float32")
    samples = Samples(model, KINDS[kind](x, size))
    assert samples.count == count
    for _ in range(2):
        (array,) = joined(samples)
        np.testing.assert_array_equal(array, x)
        assert array.dtype == "float32"
        assert max(len(batch[0]) for batch in samples) <= BATCH_SIZE
    low, high = samples.ranges[0]
    assert (low, high) == (x.min(), x.max())


@pytest.mark.parametrize(
    ("sizes", "expected"), [((96, 96, 3), 32), ((256, 256, 3), 10), ((1024, 1024, 3), 1)]
)
def test_batches_of_large_samples_are_smaller(sizes, expected):
    """Else the layers of a network on 32 photographs fill the memory."""
    model = keras.Sequential([keras.Input((None, None, 3)), keras.layers.ReLU()])
    x = np.broadcast_to(np.linspace(0, 1, sizes[1], dtype="float32")[:, None], (35, *sizes))
    batches = [len(batch[0]) for batch in Samples(model, x[: 3 * expected + 2])]
    assert (max(batches), sum(batches)) == (expected, min(35, 3 * expected + 2))


def test_tensorflow_datasets(model, rng):
    tf = pytest.importorskip("tensorflow")
    x = rng.normal(size=(40, 4)).astype("float32")
    dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(40)))
    for data in (dataset, dataset.batch(16)):
        np.testing.assert_array_equal(joined(Samples(model, data))[0], x)


def test_multiple_inputs_follow_the_order_of_the_model(two_inputs, rng):
    b, a = rng.normal(size=(5, 4)).astype("float32"), np.arange(15).reshape(5, 3)
    for data in (
        [b, a],
        (b, a),
        {"a": a, "b": b},
        [([b, a], np.zeros(5))],
        iter([{"a": a, "b": b}]),
        lambda: ([b[i : i + 1], a[i : i + 1]] for i in range(5)),
    ):
        first, second = joined(Samples(two_inputs, data))
        np.testing.assert_array_equal(first, b)
        np.testing.assert_array_equal(second, a)
        assert second.dtype.kind == "i"


def test_no_more_samples_than_the_maximum_are_read(model, rng):
    x = rng.normal(size=(64, 4)).astype("float32")
    assert Samples(model, Batches(x)).count == MAX_SAMPLES
    samples = Samples(model, np.broadcast_to(x[:1], (3 * MAX_SAMPLES, 4)))
    assert samples.count == sum(len(batch[0]) for batch in samples) == MAX_SAMPLES


def test_fixed_batch_size_gets_full_batches(rng):
    model = keras.Sequential([keras.Input(batch_shape=(4, 4)), keras.layers.Dense(2)])
    x = rng.normal(size=(6, 4)).astype("float32")
    for data in (x, keras.ops.convert_to_tensor(x)):
        first, second = Samples(model, data)
        np.testing.assert_array_equal(first[0], x[:4])
        np.testing.assert_array_equal(second[0], x[[4, 5, 4, 5]])


class OwnCall(keras.Model):
    def call(self, inputs):
        return 2.0 * super().call(inputs)


def test_a_model_with_its_own_call_tells_its_inputs(rng):
    inputs = keras.Input((5, 4))
    model = OwnCall(inputs, keras.layers.Dense(2)(inputs))
    assert Samples(model, rng.normal(size=(6, 5, 4))).count == 6


def test_no_data_means_no_samples(model):
    samples = Samples(model, None)
    assert samples.count == 0
    assert not list(samples)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            "images.npy",
            r"`calibration_data` must be arrays, or .*Received: 'images.npy'.*numpy.load",
        ),
        (3, r"`calibration_data` must be arrays, or an iterable of batches. Received: 3"),
        (iter([]), r"`calibration_data` must hold at least one sample. Received: nothing"),
        (np.zeros((2, 5)), r"`calibration_data` must have the shape .*4.* Received: .*\(2, 5\)"),
        (
            np.full((2, 4), np.nan),
            r"`calibration_data` must be finite. Received: .* NaN",
        ),
        # Its own shape, not that of what is tried as a single sample.
        (np.zeros((7, 6, 4)), r"Received: an array of shape \(7, 6, 4\)"),
        (np.zeros(5), r"Received: an array of shape \(5,\)"),
        ({"a": np.zeros((2, 4)), "b": np.zeros(2)}, r"must hold 1 inputs per sample. Received: 2"),
    ],
)
def test_wrong_data_are_refused(data, match, model):
    with pytest.raises(ValueError, match=match):
        Samples(model, data)


def test_inputs_of_different_lengths_are_refused(two_inputs):
    with pytest.raises(ValueError, match=r"must hold arrays of one length. Received: .*\[2, 3\]"):
        Samples(two_inputs, [np.zeros((2, 4)), np.zeros((3, 3), "int32")])


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (keras.Sequential([keras.layers.Dense(2)]), "`model` must be a built Keras model"),
        ("model.keras", r"`model` must be a model of Keras 3\. Received: .* of class builtins.str"),
    ],
)
def test_model_without_weights_is_refused(model, match):
    with pytest.raises(ValueError, match=match):
        Samples(model, np.zeros((2, 4)))


def test_too_few_samples_warn(model, rng):
    x = np.repeat(rng.normal(size=(3, 4)), 20, axis=0)
    assert not Samples(model, x).warnings
    with pytest.warns(UserWarning, match="`calibration_data` has 3 different samples"):
        samples = Samples(model, x, least=16)
    assert samples.count == 60
    assert len(samples.warnings) == 1


@pytest.mark.parametrize("value", [0.0, 127.5])
def test_nearly_constant_inputs_warn(value, model, rng):
    x = value * (1 + 1e-4 * rng.random((20, 4)))
    with pytest.warns(UserWarning, match="hardly varies: input 0 is from"):
        Samples(model, x)


KNOWING = {
    "Rescaling": (lambda: keras.layers.Rescaling(1 / 255), 255),
    "Rescaling to -1 and 1": (lambda: keras.layers.Rescaling(1 / 127.5, -1), 255),
    "Normalization": (lambda: keras.layers.Normalization(mean=0.5, variance=0.08), 1),
    "Normalization of bytes": (lambda: keras.layers.Normalization(mean=128, variance=5400), 255),
}


@pytest.mark.parametrize("name", KNOWING)
def test_input_range_that_does_not_fit_the_first_layer_warns(name, rng):
    make, scale = KNOWING[name]
    inner = keras.Sequential([keras.Input((4,)), make(), keras.layers.Dense(2)])
    other = keras.Input((3,))
    inputs = keras.Input((4,))
    model = keras.Model([other, inputs], keras.layers.Concatenate()([inner(inputs), other]))
    x = rng.random((20, 4))
    data = [rng.normal(size=(20, 3)), scale * x]
    assert not Samples(model, data).warnings
    data[1] = 256 / scale * x
    with pytest.warns(UserWarning, match=r"in input 1, which \w+ was not made for"):
        Samples(model, data)


def test_specs_override_the_sizes_of_the_model(rng):
    model = keras.Sequential([keras.Input((None, 4)), keras.layers.Dense(2)])
    specs = [keras.InputSpec(shape=(2, 5, 4), dtype="float32", name="x")]
    samples = Samples(model, rng.normal(size=(3, 5, 4)), specs)
    assert [batch[0].shape for batch in samples] == [(2, 5, 4)] * 2
    ((low, high),) = samples.ranges
    assert low < 0 < high
    with pytest.raises(ValueError, match=r"the model's inputs, \(2, 5, 4\).*\(3, 6, 4\)"):
        Samples(model, np.zeros((3, 6, 4)), specs)
