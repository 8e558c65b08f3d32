"""Surfaces of labelled vertebrae."""

from collections.abc import Iterator

import numpy as np
import trimesh
from scipy import ndimage
from skimage.measure import marching_cubes

from spinelib.geometry import Volume
from spinelib.levels import LEVEL_OF_LABEL, LEVEL_ORDER

STEP_MM = 1.0
"""Finer grids are averaged to about this size first."""

_SMOOTH_VOXELS = 0.6
_SURFACE = 0.499  # a half would pass through voxel centres of symmetric edges, where vertices then coincide


def vertebra_meshes(labels: Volume) -> dict[str, trimesh.Trimesh]:
    """Return the lightly smoothed, closed surface of each vertebra in world RAS mm, cranial to caudal.

    Parameters
    ----------
    labels : Volume
        VerSe labels; those that are not of `LEVEL_ORDER` are left out.
    """
    return {level: _surface(share, affine) for level, share, affine in _boxes(labels)}


def _boxes(labels: Volume) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield level, share of the vertebra in voxels of about `STEP_MM`, and affine of its box."""
    boxes = ndimage.find_objects(labels.values)
    steps = np.maximum(1, np.round(STEP_MM / labels.spacing_mm)).astype(int)
    for label in LEVEL_ORDER:
        box = boxes[label - 1] if label <= len(boxes) else None
        if box is None:
            continue
        mask = labels.values[box] == label
        mask = np.pad(mask, [(0, -size % step) for size, step in zip(mask.shape, steps, strict=True)])
        blocks = [n for size, step in zip(mask.shape, steps, strict=True) for n in (size // step, step)]
        affine = labels.affine.copy()
        affine[:3, :3] *= steps
        affine[:3, 3] += labels.affine[:3, :3] @ ([part.start for part in box] + (steps - 1) / 2)
        yield LEVEL_OF_LABEL[label], mask.reshape(blocks).mean(axis=(1, 3, 5), dtype=np.float32), affine


def _surface(share, affine):
    smooth = ndimage.gaussian_filter(np.pad(share, 3), _SMOOTH_VOXELS)
    vertices, faces, _, _ = marching_cubes(smooth, min(_SURFACE, 0.9 * float(smooth.max())))
    # Unprocessed: merging vertices would tear the surface, which smoothing then blows up.
    mesh = trimesh.Trimesh((vertices - 3) @ affine[:3, :3].T + affine[:3, 3], faces, process=False)
    trimesh.smoothing.filter_taubin(mesh, iterations=10)
    if mesh.volume < 0:
        mesh.invert()
    return mesh
