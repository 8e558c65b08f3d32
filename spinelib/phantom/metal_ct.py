"""Metal on CT, with the streaks that come from rays which it stops."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage, sparse

from spinelib.phantom.render import Lattice
from spinelib.phantom.solids import Piece

METAL_HU = 9000.0
_ANGLES = 60
_PITCH_MM = 3.0


def add_metal(values: np.ndarray, pieces: Sequence[Piece], lattice: Lattice, rng: np.random.Generator) -> None:
    """Put solids of metal into Hounsfield units (R, A, S), in place, and smear the slices that hold them."""
    share = _metal_share(pieces, lattice)
    slices = np.flatnonzero(share.any(axis=(0, 1)))
    if not len(slices):
        return
    values[..., slices] += rng.uniform(0.3, 1.0) * _streaks(share[..., slices], lattice.spacing_mm, rng)
    values += share * (METAL_HU - values)


def _metal_share(pieces, lattice):
    edge = lattice.edge_mm(0.2)
    share = torch.zeros(lattice.shape)
    for piece in pieces:
        window = lattice.window(piece.lower_mm, piece.upper_mm, 3 * edge)
        if window is not None:
            inside = torch.sigmoid(piece.distance(lattice.points(window)) * (-1 / edge))
            share[window] = torch.maximum(share[window], inside)
    share[share < 0.05] = 0
    return share.numpy()


def _streaks(share, spacing, rng) -> np.ndarray:
    """Errors in HU by filtered back-projection of what metal does to the rays: hardening and lack of photons."""
    shape = [max(2, round(n * s / _PITCH_MM)) for n, s in zip(share.shape[:2], spacing[:2], strict=True)]
    coarse = ndimage.zoom(share, [*np.divide(shape, share.shape[:2]), 1], order=1)
    projector, bins = _projector(*coarse.shape[:2])
    metal_mm = _PITCH_MM * (projector @ coarse.reshape(-1, coarse.shape[2])).reshape(_ANGLES, bins, -1)
    # a ray through 10 mm of titanium loses about a fifth of its attenuation to hardening and is noisy
    error = -0.004 * metal_mm**1.5 + 0.02 * metal_mm * rng.standard_normal(metal_mm.shape)
    ramp = np.abs(np.fft.rfftfreq(2 * bins))[:, None]
    filtered = np.fft.irfft(np.fft.rfft(error, 2 * bins, axis=1) * ramp, axis=1)[:, :bins]
    image = projector.T @ filtered.reshape(_ANGLES * bins, -1)
    image = 1.6e4 * np.pi / _ANGLES / _PITCH_MM * image.reshape(coarse.shape)
    return ndimage.zoom(image, [*np.divide(share.shape[:2], shape), 1], order=1)[: share.shape[0], : share.shape[1]]


def _projector(width, depth):
    """Parallel projection as a sparse matrix (angles * bins, pixels), linear between neighbouring bins."""
    right, anterior = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(depth) - (depth - 1) / 2, indexing="ij")
    bins = int(np.ceil(np.hypot(width, depth))) + 3
    angle = np.pi * np.arange(_ANGLES)[:, None] / _ANGLES
    place = np.cos(angle) * right.reshape(-1) + np.sin(angle) * anterior.reshape(-1) + bins / 2
    first = np.floor(place).astype(int)
    row = (first + bins * np.arange(_ANGLES)[:, None]).reshape(-1)
    column = np.broadcast_to(np.arange(width * depth), place.shape).reshape(-1)
    upper = (place - first).reshape(-1)
    entries = np.concatenate([1 - upper, upper]), (np.concatenate([row, row + 1]), np.concatenate([column, column]))
    return sparse.csr_matrix(entries, shape=(_ANGLES * bins, width * depth)), bins
