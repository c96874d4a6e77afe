"""Filter Response Normalization and TLU in NumPy float64, with their gradients, from the
equations."""

import numpy as np

# Relative to max(1, largest magnitude). Outputs: some ten roundings of 6e-8. Gradients of x: two
# sums over positions, which cancel in part. Gradients of parameters: sums over batch and positions.
VALUE, INPUT_GRADIENT, PARAMETER_GRADIENT = 2e-6, 1e-5, 2e-5


def frn_tlu(
    x, gamma=1.0, beta=0.0, tau=None, alpha=None, axis=-1, epsilon=1e-6, mask=None, upstream=None
):
    """Returns `z` and, with `upstream` (the gradient at z), a dict of gradients.

    `gamma`, `beta`, `epsilon`, `tau` and `alpha` are scalars or `(channels,)`; `tau=None` leaves
    TLU out. `mask` has the shape of x without the channel axis, or a leading part of it."""
    x = np.moveaxis(np.asarray(x, "float64"), axis, -1)
    gamma, beta, epsilon = (np.asarray(p, "float64") for p in (gamma, beta, epsilon))
    spatial = tuple(range(1, x.ndim - 1))
    kept = np.ones(x.shape[:-1]) if mask is None else np.asarray(mask, "float64")
    kept = np.broadcast_to(kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim)), x.shape)
    count = np.maximum(kept.sum(spatial, keepdims=True), 1.0)
    nu2 = np.where(kept > 0, x * x, 0.0).sum(spatial, keepdims=True) / count
    r = 1.0 / np.sqrt(nu2 + epsilon)
    y = gamma * (x * r) + beta
    z = y
    below = np.zeros(x.shape, bool)
    slope = np.zeros(x.shape)
    if tau is not None:
        slope = slope + (0.0 if alpha is None else np.asarray(alpha, "float64"))
        line = slope * y + tau if alpha is not None else np.asarray(tau, "float64") + slope
        below = line > y
        z = np.where(below, line, y)
    if upstream is None:
        return np.moveaxis(z, -1, axis)
    dz = np.moveaxis(np.asarray(upstream, "float64"), axis, -1)
    dy = np.where(below, slope * dz, dz)
    others = tuple(range(x.ndim - 1))
    # d r / d nu2 = -r^3 / 2, and d nu2 / d x = 2 x / count where a position counts.
    along = (gamma * dy * x).sum(spatial, keepdims=True) * r**3
    dx = gamma * r * dy - kept * x * along / count
    gradients = {
        "x": np.moveaxis(dx, -1, axis),
        "gamma": (dy * x * r).sum(others),
        "beta": dy.sum(others),
        "epsilon": (-0.5 * along).sum(others),
        "tau": np.where(below, dz, 0.0).sum(others),
        "alpha": np.where(below, dz * y, 0.0).sum(others),
    }
    return np.moveaxis(z, -1, axis), gradients


def close(actual, expected, tolerance):
    """Asserts agreement within `tolerance`, relative to max(1, largest expected magnitude)."""
    if hasattr(actual, "detach"):  # a PyTorch tensor that wants gradients
        actual = actual.detach()
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape
    if expected.size:
        assert np.isfinite(actual).all()
        error = np.max(np.abs(actual - expected)) / max(1.0, np.max(np.abs(expected)))
        assert error <= tolerance, f"error {error:.3g} above {tolerance:.3g}"
