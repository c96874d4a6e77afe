"""What the studies share: one training step of any network on JAX, rows that survive a kill.

A step that is compiled whole takes a third of the time of `fit` at batch 2. A loop in Python around
it is several times faster on a CPU than `jax.lax.scan`."""

import csv
import os

import jax
import numpy as np
from common import RESULTS
from jax import numpy as jnp


def rates(peak, steps, warm_up=0.05):
    """Linear from 0 to the peak, then a cosine to 0."""
    start = max(1, round(warm_up * steps))
    rising = peak * np.arange(1, start + 1) / start if warm_up else np.full(1, peak)
    falling = 0.5 * peak * (1 + np.cos(np.pi * np.arange(steps - start) / max(1, steps - start)))
    return np.concatenate([rising, falling]).astype("float32")


def training_step(model, batch_loss, decay=0.0, decay_all=False, momentum=0.9):
    """SGD with Nesterov momentum and Keras' constraints; `decay` is of kernels, or of all weights.

    `batch_loss(predict, data, batch)` calls `predict(x)` once and returns a loss; `data` stays
    on the device, `batch` and `rate` are new in each step."""
    variables = model.trainable_variables
    decays = [decay if decay_all or v.path.endswith("kernel") else 0.0 for v in variables]

    def loss(weights, statistics, data, batch):
        updated = []

        def predict(x):
            z, new = model.stateless_call(weights, statistics, x, training=True)
            updated.append(new)
            return z

        value = batch_loss(predict, data, batch)
        return value, updated[0]

    def step(state, data, batch, rate):
        weights, statistics, velocities = state
        grad, statistics = jax.grad(loss, has_aux=True)(weights, statistics, data, batch)
        for k, v in enumerate(variables):
            g = grad[k] + decays[k] * weights[k]
            velocities[k] = momentum * velocities[k] - rate * g
            weights[k] = weights[k] + momentum * velocities[k] - rate * g
            if v.constraint is not None:
                weights[k] = v.constraint(weights[k])
        return weights, statistics, velocities

    return jax.jit(step, donate_argnums=0)


def initial_state(model):
    """Copies of a model's weights, since the step overwrites what it is given."""
    weights = [
        jnp.array(v.value if v.constraint is None else v.constraint(v.value))
        for v in model.trainable_variables
    ]
    statistics = [jnp.array(v.value) for v in model.non_trainable_variables]
    return weights, statistics, [jnp.zeros_like(w) for w in weights]


def predictor(model):
    return jax.jit(lambda w, s, x: model.stateless_call(w, s, x, training=False)[0])


def batch_statistics(model, momentum):
    """The moving statistics that BatchNormalization would have if there were only this batch."""

    def statistics(weights, moving, x):
        # From zero, one update of momentum m leaves 1 - m of the batch's statistics.
        zeros = [jnp.zeros_like(v) for v in moving]
        new = model.stateless_call(weights, zeros, x, training=True)[1]
        return [v / (1 - momentum) for v in new]

    return jax.jit(statistics)


def read(path):
    """The rows of a table; a last line that a kill cut short is removed."""
    if not path.exists():
        return []
    text = path.read_bytes()
    if not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables(folder, name, is_tuned):
    """The files of a study's runs and of its rates, which are the shipped ones unless the folder
    has its own or gets them."""
    path, rates_path = folder / f"{name}.csv", folder / f"{name}_rates.csv"
    has_own = is_tuned or rates_path.exists()
    return path, rates_path if has_own else RESULTS / rates_path.name


def append(row, path):
    """Adds a row, which is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def interval(values):
    """Mean and half of the 95% interval of the mean, by Student's t (NaN for one value)."""
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    values, n = np.asarray(values, "float64"), len(values)
    if n < 2:
        return float(values.mean()), float("nan")
    t = quantiles[n - 2] if n - 2 < len(quantiles) else 1.96 + 2.6 / (n - 1)
    return float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(n))
