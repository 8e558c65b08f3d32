"""Curved sections: views of a volume that follow the column.

A sagittal view is cut at the right coordinate that the bodies have at each height, a coronal view at their anterior
coordinate. Both axes of a view stay true millimetres; grids may be turned.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import map_coordinates

from spinelib.geometry import Volume, VolumeGrid

AROUND_MM = {"sagittal": (-85.0, 50.0), "coronal": (-62.0, 62.0)}
"""What a section shows about the body centres: from, to (mm, anterior or right)."""

ENDS_MM = 40.0
"""What it shows above the uppermost and below the lowest centre."""

_STRAIGHT_MM = 22.0  # the path goes on in its direction for so long beyond the last centre, then upright
_STEPS_MM = (0.5, 1.0)  # smallest and largest pixel
_LEAST_HEAT_STEP_MM, _SLAB_MM, _STRONG = 3.0, 20.0, 0.2


class Section(NamedTuple):
    """A view of a volume.

    Attributes
    ----------
    name : str
        'sagittal' or 'coronal'.
    points : ndarray (rows, cols, 3)
        World RAS mm; rows go down, columns to posterior or to the patient's left.
    extent : tuple of float
        Left, right, bottom and top edge in mm, as imshow takes it.
    """

    name: str
    points: np.ndarray
    extent: tuple[float, float, float, float]


def curved_section(name: str, grid: VolumeGrid, centres: Mapping, whole: bool = False) -> Section:
    """Return the section of a volume through some points.

    Parameters
    ----------
    name : str
        'sagittal' or 'coronal'.
    grid : VolumeGrid
    centres : mapping to ndarray (3,)
        World mm; without any, the section is the flat one through the middle.
    whole : bool
        Show all of the volume, not only what surrounds the points.
    """
    along = _axis_along(name)
    path, (lower, upper) = _path(grid, centres), _bounds(grid)
    if centres and not whole:
        heights = np.array([centre[2] for centre in centres.values()])
        around = path(heights)[:, along]
        for axis, values, (near, far) in ((2, heights, (-ENDS_MM, ENDS_MM)), (along, around, AROUND_MM[name])):
            lower[axis] = max(lower[axis], values.min() + near)
            upper[axis] = min(upper[axis], values.max() + far)
    step = float(np.clip(grid.spacing_mm.min(), *_STEPS_MM))
    superior, lateral = (np.arange(upper[axis], lower[axis], -step) for axis in (2, along))
    points = np.empty((len(superior), len(lateral), 3), np.float32)
    points[..., :2], points[..., 2] = path(superior)[:, None], superior[:, None]
    points[..., along] = lateral
    return Section(name, points, _extent(superior, lateral, step))


def projected(volume: Volume, grid: VolumeGrid, name: str) -> tuple[np.ndarray, tuple]:
    """Return the largest value along each line of sight of a view over `grid`, (rows, cols), and its extent."""
    along = _axis_along(name)
    step = float(max(_LEAST_HEAT_STEP_MM, volume.spacing_mm.min()))
    places = [np.arange(high, low, -step) for low, high in zip(*_bounds(grid), strict=True)]
    order = (2, along, 1 - along)
    lattice = np.meshgrid(*(places[axis] for axis in order), indexing="ij")
    points = np.stack([lattice[order.index(axis)] for axis in range(3)], axis=-1)
    return sampled(volume, points, order=1).max(axis=2), _extent(places[2], places[along], step)


def sampled(volume: Volume, points: np.ndarray, order: int, fill: float = 0.0) -> np.ndarray:
    """Return the values at world points (..., 3), nearest (order 0) or linear (1); `fill` outside."""
    inverse = np.linalg.inv(volume.affine)
    index = np.moveaxis(points @ inverse[:3, :3].T + inverse[:3, 3], -1, 0)
    return map_coordinates(volume.values, index, order=order, cval=fill)


def heat_centres(heat: Volume) -> dict[int, np.ndarray]:
    """Return the centre of the heat of every 20 mm of height, (3,) world mm, by number of the slab."""
    strong = np.argwhere(heat.values >= max(_STRONG * float(heat.values.max()), 1e-6))
    world = strong @ heat.affine[:3, :3].T + heat.affine[:3, 3]
    weights, slabs = heat.values[tuple(strong.T)] ** 2, np.round(world[:, 2] / _SLAB_MM).astype(int)
    return {
        int(slab): np.average(world[slabs == slab], axis=0, weights=weights[slabs == slab]) for slab in np.unique(slabs)
    }


def _axis_along(name):
    return 1 if name == "sagittal" else 0


def _path(grid, centres):
    """Return a function of heights (n,) that gives right and anterior (n, 2) of the column in mm."""
    points = np.array(sorted(centres.values(), key=lambda centre: centre[2]) or [np.mean(_bounds(grid), axis=0)])
    points = points[np.diff(points[:, 2], prepend=-np.inf) > 1]
    if len(points) == 1:
        return lambda heights: np.broadcast_to(points[0, :2], (len(heights), 2))
    (first, second), (last, other) = points[:2], points[:-3:-1]
    lower = first + (first - second) * _STRAIGHT_MM / (second - first)[2]
    upper = last + (last - other) * _STRAIGHT_MM / (last - other)[2]
    knots = np.vstack([lower, points, upper])
    line = PchipInterpolator(knots[:, 2], knots[:, :2])
    return lambda heights: line(np.clip(heights, lower[2], upper[2]))


def _bounds(grid):
    """Return the lowest and the highest world coordinates of voxel centres, each (3,)."""
    corners = grid.corners_mm()
    return corners.min(axis=0), corners.max(axis=0)


def _extent(superior, lateral, step):
    return (lateral[0] + step / 2, lateral[-1] - step / 2, superior[-1] - step / 2, superior[0] + step / 2)
