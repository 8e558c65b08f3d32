"""CT scans on the grid that the vertebra networks work on, patches of it, and the way back."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from spinelib.geometry import Volume, VolumeGrid

OUTSIDE = -2.0
"""Network value of what lies outside the scan; air is -1."""

_HU_SCALE, _HU_LIMITS = 1000.0, (-1000.0, 2000.0)
_SLAB_VOXELS = 30_000_000


def working_grid(grid: VolumeGrid, spacing_mm: float) -> VolumeGrid:
    """Return the grid that covers the same box with voxels of about `spacing_mm`.

    The box is divided evenly, so the spacing differs from the one asked for by less than half a voxel in total.
    """
    extent = np.array(grid.shape) * grid.spacing_mm
    shape = np.maximum(np.rint(extent / spacing_mm), 1).astype(int)
    stretch = np.array(grid.shape) / shape
    affine = grid.affine.copy()
    affine[:3, :3] *= stretch
    affine[:3, 3] = grid.affine[:3, 3] + grid.affine[:3, :3] @ ((stretch - 1) / 2)
    return VolumeGrid(tuple(int(n) for n in shape), affine)


def normalised(hounsfield):
    """Return network values: -1 for air, 0 for water, 1 at 1000 HU, clipped at 2000 HU. Array or tensor."""
    return hounsfield.clip(*_HU_LIMITS) / _HU_SCALE


def resampled(volume: Volume, spacing_mm: float) -> Volume:
    """Return a scan on its working grid, float32, averaged where voxels become larger (triangular filter).

    Runs through slabs of slices, so that a large scan is never held in floating point as a whole.
    """
    grid = working_grid(volume.grid, spacing_mm)
    planes = np.empty((*grid.shape[:2], volume.values.shape[2]), np.float32)
    rows = max(1, _SLAB_VOXELS // int(np.prod(volume.values.shape[:2])))
    for start in range(0, planes.shape[2], rows):
        slab = np.moveaxis(volume.values[:, :, start : start + rows], 2, 0).astype(np.float32, order="C")
        slab = _resize(torch.from_numpy(slab)[None], grid.shape[:2])[0]
        planes[:, :, start : start + rows] = np.moveaxis(slab.numpy(), 0, 2)
    flat = torch.from_numpy(planes).reshape(1, 1, -1, planes.shape[2])
    values = _resize(flat, (flat.shape[2], grid.shape[2])).reshape(grid.shape)
    return Volume(values.numpy(), grid.affine)


def labels_on(labels: Volume, grid: VolumeGrid) -> np.ndarray:
    """Return labels on a grid over the same box, uint8: what fills most of a voxel, background included.

    The label at a voxel's centre would move surfaces by up to half a voxel of the scan, which teaches a network to
    leave them vague.
    """
    shape = labels.values.shape
    weights = [_overlaps(n, m) for n, m in zip(shape, grid.shape, strict=True)]
    best, rest = np.zeros(grid.shape, np.float32), np.ones(grid.shape, np.float32)
    out = np.zeros(grid.shape, np.uint8)
    for label, window in enumerate(ndimage.find_objects(labels.values.astype(np.uint8)), start=1):
        if window is None:
            continue
        share, box = (labels.values[window] == label).astype(np.float32), []
        for axis, (matrix, part) in enumerate(zip(weights, window, strict=True)):
            rows = np.flatnonzero(matrix[:, part].any(1))
            box.append(slice(rows[0], rows[-1] + 1))
            share = np.moveaxis(np.tensordot(matrix[box[-1], part], share, (1, axis)), 0, axis)
        box = tuple(box)
        rest[box] -= share
        first = share > best[box]
        best[box][first], out[box][first] = share[first], label
    out[best <= rest] = 0
    return out


def crop(values: Tensor, corner, size: int, fill: float) -> Tensor:
    """Return the cube of `size` voxels whose first voxel has index `corner` (3,); `fill` outside. (…, R, A, S)."""
    out = values.new_full((*values.shape[:-3], size, size, size), fill)
    inside, there = overlap(values.shape[-3:], corner, size)
    if inside is not None:
        out[(..., *there)] = values[(..., *inside)]
    return out


def overlap(shape, corner, size):
    """Return index boxes of a box's part inside a volume: in the volume and in the box; (None, None) if empty.

    Parameters
    ----------
    shape : (3,) of int
    corner : (3,) of int
        First voxel of the box, may be negative.
    size : int or (3,) of int
    """
    first = [max(int(c), 0) for c in corner]
    last = [min(int(c) + int(m), n) for c, m, n in zip(corner, np.broadcast_to(size, 3), shape, strict=True)]
    if any(b <= a for a, b in zip(first, last, strict=True)):
        return None, None
    inside = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
    there = tuple(slice(a - int(c), b - int(c)) for a, b, c in zip(first, last, corner, strict=True))
    return inside, there


def sample_separably(values: Tensor, places) -> Tensor:
    """Interpolate a cube (R, A, S) linearly at the outer product of three index vectors, zero beyond its ends."""
    for axis, place in enumerate(places):
        index = torch.arange(values.shape[axis], dtype=torch.float32)
        weights = (1 - (torch.as_tensor(place, dtype=torch.float32)[:, None] - index).abs()).clamp(min=0)
        values = torch.movedim(torch.tensordot(weights, values, dims=([1], [axis])), 0, axis)
    return values


def _resize(images, shape):
    if tuple(images.shape[-2:]) == tuple(shape):
        return images
    return functional.interpolate(images, tuple(int(n) for n in shape), mode="bilinear", antialias=True)


def _overlaps(voxels, working):
    """Return how much of each of `working` equal parts of an axis each of its `voxels` fills, (working, voxels)."""
    edges, cuts = np.arange(voxels + 1) * working / voxels, np.arange(working + 1)
    low = np.maximum(cuts[:-1, None], edges[None, :-1])
    return np.clip(np.minimum(cuts[1:, None], edges[None, 1:]) - low, 0, None).astype(np.float32)
