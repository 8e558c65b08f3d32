"""Smooth random fields: the texture of tissue."""

import numpy as np
from scipy.interpolate import BSpline


def smooth_field(rng: np.random.Generator, shape, spacing_mm, length_mm) -> np.ndarray:
    """Return a random field (R, A, S), float32, of unit variance: cubic splines with knots every `length_mm`.

    Knots are never closer than the voxels.

    Parameters
    ----------
    rng : numpy.random.Generator
    shape : (3,) of int
    spacing_mm : (3,) of float
    length_mm : float or (3,) of float
    """
    lengths = np.maximum(np.broadcast_to(np.asarray(length_mm, float), 3), np.asarray(spacing_mm))
    steps = np.asarray(spacing_mm) / lengths
    weights = [_spline_weights(n, step, rng.random()) for n, step in zip(shape, steps, strict=True)]
    field = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    for axis, w in enumerate(weights):
        field = np.moveaxis(np.tensordot(w, field, (1, axis)), 0, axis)
    return np.ascontiguousarray(field / max(float(field.std()), 1e-6))


def _spline_weights(count, step, shift) -> np.ndarray:
    """Cubic B-spline weights (count, knots) at positions spaced by `step` knots; rows have unit length."""
    place = shift + step * np.arange(count)
    knots = np.arange(-1, int(place[-1]) + 3)
    weights = BSpline.basis_element(np.arange(-2, 3), extrapolate=False)(place[:, None] - knots)
    weights = np.nan_to_num(weights)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
