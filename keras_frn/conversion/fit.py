"""Fits FRN layers to the BatchNormalization layers they replace, from what flows through both."""

import collections
import contextlib

import keras
import numpy as np
from keras import ops


class _Reached(BaseException):
    """Ends a forward pass early. Keras rewrites an `Exception` on its way out; this one passes."""


class Recorder:
    """What the taps of one model see, in the order of their calls."""

    def __init__(self):
        self.rows = collections.defaultdict(list)
        self._only, self._calls_left = None, 0

    def run(self, model, data, batch_size, only=None, calls=0):
        """Runs the model over the data; with `only`, records this layer and stops each pass after
        so many calls of it."""
        self.rows.clear()
        # Models from older files name their one input in a list, and Keras warns of an array.
        if isinstance(model, keras.Function) and isinstance(model.input, list):
            data = data if isinstance(data, (list, tuple)) else [data]
        for start in range(0, sample_count(data), batch_size):
            self._only, self._calls_left = only, calls
            with contextlib.suppress(_Reached):
                model(_batch(data, start, batch_size), training=False)

    def record(self, layer, inputs, mask):
        if self._only not in (None, layer):
            return
        self.rows[id(layer)].append(_sample_moments(inputs, layer.axis, mask))
        if self._only is layer:
            self._calls_left -= 1
            if self._calls_left == 0:
                raise _Reached


class Tap(keras.layers.Layer):
    """A normalization layer that reports its inputs before it runs, at inference."""

    def __init__(self, layer, recorder):
        super().__init__(name=layer.name, dtype=layer.dtype_policy)
        self.autocast = False
        self.supports_masking = True
        self.layer = layer
        self.recorder = recorder

    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build(input_shape)

    def call(self, inputs, training=None, mask=None):
        self.recorder.record(self.layer, inputs, mask)
        return self.layer(inputs, training=False, mask=mask)

    def compute_output_spec(self, inputs, training=None, mask=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)


def sample_count(data):
    """The number of samples, the same in every array."""
    counts = {len(x) for x in keras.tree.flatten(data)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "`calibration_data` must be an array, or a list or dict of arrays of one length, with "
            f"at least one sample. Received: lengths {sorted(counts)}. Pass what `model.predict` "
            "takes."
        )
    return counts.pop()


def _batch(data, start, size):
    return keras.tree.map_structure(lambda x: np.asarray(x[start : start + size]), data)


def calibrate(original, converted, targets, data, batch_size, verbose):
    """Sets gamma, beta and epsilon of each FRN layer, in the order of the forward pass.

    Each layer gets the mean and the standard deviation that its BatchNormalization gave on the same
    data, per channel. Least squares would shrink gamma wherever the two networks differ by more
    than a scale, and every later layer would see too small a signal.

    Args:
        original: `(model, recorder)`, with taps around the BatchNormalization layers.
        converted: `(model, recorder)`, with taps around the FRN layers.
        targets: Dict from FRN layer to its BatchNormalization layer and epsilon / mean square.
        data, batch_size: The samples; only one batch is in memory at a time.
        verbose: Whether to show progress.

    Returns:
        Dict from the id of the FRN layer to its measured epsilon / mean square, one per channel."""
    model, recorder = original
    recorder.run(model, data, batch_size)
    wanted = {
        frn: (*_target(bn, recorder.rows[id(bn)]), ratio) for frn, (bn, ratio) in targets.items()
    }
    model, recorder = converted
    recorder.run(model, _batch(data, 0, 1), 1)
    calls = {key: len(rows) for key, rows in recorder.rows.items()}
    layers = {id(frn): frn for frn in targets}
    progress = keras.utils.Progbar(len(calls), unit_name="layer") if verbose else None
    measured = {}
    for done, (key, count) in enumerate(calls.items(), 1):
        frn = layers[key]
        recorder.run(model, data, batch_size, only=frn, calls=count)
        measured[key] = _fit(frn, recorder.rows[key], *wanted[frn])
        if progress:
            progress.update(done)
    return measured


def scale_and_offset(bn):
    """BatchNormalization at inference, `scale * x + offset`, and its mean and variance; float64."""
    mean, variance = _float64(bn.moving_mean), _float64(bn.moving_variance)
    scale = (1.0 if bn.gamma is None else _float64(bn.gamma)) / np.sqrt(variance + bn.epsilon)
    offset = (0.0 if bn.beta is None else _float64(bn.beta)) - scale * mean
    return scale, offset, mean, variance


def _target(bn, rows):
    """Mean and standard deviation of the layer's output, and the sign of its scale."""
    scale, offset, _, _ = scale_and_offset(bn)
    mean, mean_square, weight = _joined(rows)
    first = np.average(mean, axis=0, weights=weight)
    variance = np.average(mean_square, axis=0, weights=weight) - first**2
    return (
        scale * first + offset,
        np.abs(scale) * np.sqrt(np.maximum(variance, 0.0)),
        np.sign(scale),
    )


def _fit(frn, rows, mean, deviation, sign, ratio):
    sample_mean, nu2, weight = _joined(rows)
    mean_square = np.average(nu2, axis=0, weights=weight)
    learned = 0.0 if frn.learned_epsilon is None else ratio * mean_square
    epsilon = np.asarray(frn.epsilon, "float64") + learned
    r = 1.0 / np.sqrt(nu2 + epsilon)
    first = np.average(r * sample_mean, axis=0, weights=weight)
    second = np.average(r * r * nu2, axis=0, weights=weight)
    variance = second - first**2
    # A channel that does not vary says nothing about its scale; the closed form stays.
    varies = (variance > 1e-6 * second) & (deviation > 0)
    gamma = np.where(
        varies, sign * deviation / np.sqrt(np.where(varies, variance, 1.0)), _float64(frn.gamma)
    )
    frn.gamma.assign(gamma)
    frn.beta.assign(mean - gamma * first)
    if frn.learned_epsilon is not None:
        frn.learned_epsilon.assign(learned)
    return epsilon / np.maximum(mean_square, np.finfo("float32").tiny)


def _joined(rows):
    """Mean, mean square `(samples, channels)` and positions `(samples,)`, over all calls."""
    mean, mean_square, count = (np.concatenate(parts) for parts in zip(*rows))
    if not np.isfinite(mean_square).all():
        raise ValueError(
            "`calibration_data` must give finite values in every layer. Received: NaN or infinity "
            "at the input of a normalization layer. Look at the data and its preprocessing."
        )
    # No weight at all would have no average.
    return mean, mean_square, count if count.any() else np.ones_like(count)


def _sample_moments(x, axis, mask):
    x = ops.cast(x, "float32")
    axis %= len(x.shape)
    spatial = tuple(i for i in range(1, len(x.shape)) if i != axis)
    if mask is None:
        kept, count = 1.0, np.full(x.shape[0], np.prod([x.shape[i] for i in spatial]))
        share = 1.0
    else:
        mask = ops.cast(mask, "float32")
        for _ in range(len(x.shape) - 1 - len(mask.shape)):
            mask = ops.expand_dims(mask, -1)
        kept = ops.expand_dims(mask, axis) * ops.ones_like(
            x[(slice(None),) * axis + (slice(0, 1),)]
        )
        share = ops.maximum(ops.mean(kept, axis=spatial), 1e-12)
        count = _float64(ops.sum(kept, axis=(*spatial, axis)))
    mean = ops.mean(kept * x, axis=spatial) / share if spatial else kept * x
    mean_square = ops.mean(kept * x * x, axis=spatial) / share if spatial else kept * x * x
    return _float64(mean), _float64(mean_square), count


def _float64(x):
    return ops.convert_to_numpy(x).astype("float64")
