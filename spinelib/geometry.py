"""Frames, pixel grids and rigid planar motion.

World frame: RAS+ millimetres; axis 0 grows to the patient's right, axis 1 to anterior, axis 2 to superior.
Projections show row 0 superior; column 0 is the patient's right (coronal) or anterior (sagittal), so the
lateral coordinate falls with the column number in both views.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

from spinelib.errors import InputError

VIEWS = ("coronal", "sagittal")


@dataclass(frozen=True)
class PlanarGrid:
    """Pixel grid of a projection image in world millimetres.

    Attributes
    ----------
    view : str
        'coronal' (lateral coordinate = right_mm) or 'sagittal' (lateral coordinate = anterior_mm).
    shape : tuple of int
        Rows, columns.
    spacing_mm : tuple of float
        Row pitch (superior to inferior) and column pitch.
    origin_mm : tuple of float
        (superior_mm, lateral_mm) of the centre of pixel (0, 0).
    """

    view: str
    shape: tuple[int, int]
    spacing_mm: tuple[float, float]
    origin_mm: tuple[float, float]

    def __post_init__(self):
        if self.view not in VIEWS:
            message = f"unknown view {self.view!r}. Expected one of: {', '.join(map(repr, VIEWS))}."
            raise InputError(message)
        if min(self.shape) < 1 or min(self.spacing_mm) <= 0 or not np.all(np.isfinite(self.origin_mm)):
            message = (
                f"a pixel grid needs a positive shape and spacing and a finite origin, given {self.shape}, "
                f"{self.spacing_mm} mm, {self.origin_mm} mm."
            )
            raise InputError(message)

    @classmethod
    def centred(cls, view, shape, spacing_mm, centre_mm):
        """Return the grid whose middle lies at `centre_mm` (superior, lateral)."""
        superior = centre_mm[0] + (shape[0] - 1) / 2 * spacing_mm[0]
        lateral = centre_mm[1] + (shape[1] - 1) / 2 * spacing_mm[1]
        return cls(view, tuple(shape), tuple(spacing_mm), (superior, lateral))

    @property
    def centre_mm(self) -> tuple[float, float]:
        """(superior_mm, lateral_mm) of the middle of the image."""
        return (
            self.origin_mm[0] - (self.shape[0] - 1) / 2 * self.spacing_mm[0],
            self.origin_mm[1] - (self.shape[1] - 1) / 2 * self.spacing_mm[1],
        )

    def superior_mm(self) -> np.ndarray:
        """Height of each row's centre, shape (rows,), falling."""
        return self.origin_mm[0] - np.arange(self.shape[0]) * self.spacing_mm[0]

    def lateral_mm(self) -> np.ndarray:
        """Lateral coordinate of each column's centre, shape (cols,), falling."""
        return self.origin_mm[1] - np.arange(self.shape[1]) * self.spacing_mm[1]

    def pixel_to_mm(self, rows, cols):
        """Map (fractional) rows, columns to (superior_mm, lateral_mm); inverse of `mm_to_pixel`."""
        return (
            self.origin_mm[0] - np.asarray(rows) * self.spacing_mm[0],
            self.origin_mm[1] - np.asarray(cols) * self.spacing_mm[1],
        )

    def mm_to_pixel(self, superior_mm, lateral_mm):
        """Map (superior_mm, lateral_mm) to fractional (rows, cols); inverse of `pixel_to_mm`."""
        return (
            (self.origin_mm[0] - np.asarray(superior_mm)) / self.spacing_mm[0],
            (self.origin_mm[1] - np.asarray(lateral_mm)) / self.spacing_mm[1],
        )

    def affine(self) -> np.ndarray:
        """NIfTI affine (4, 4), RAS mm, of this image stored as (right, anterior, superior), rising axes."""
        lowest_superior = self.origin_mm[0] - (self.shape[0] - 1) * self.spacing_mm[0]
        lowest_lateral = self.origin_mm[1] - (self.shape[1] - 1) * self.spacing_mm[1]
        lateral_axis = VIEWS.index(self.view)
        steps, corner = np.ones(3), np.zeros(3)
        steps[lateral_axis], steps[2] = self.spacing_mm[1], self.spacing_mm[0]
        corner[lateral_axis], corner[2] = lowest_lateral, lowest_superior
        affine = np.diag([*steps, 1.0])
        affine[:3, 3] = corner
        return affine


@dataclass(frozen=True)
class Projection:
    """A projection image with named channels on a pixel grid.

    Attributes
    ----------
    channels : tuple of str
        Channel names, for example ('bone', 'tissue').
    values : ndarray, shape (C, rows, cols), float32
    grid : PlanarGrid
    """

    channels: tuple[str, ...]
    values: np.ndarray
    grid: PlanarGrid

    def __post_init__(self):
        expected = (len(self.channels), *self.grid.shape)
        if self.values.shape != expected:
            message = f"projection values must have shape {expected} (channels, rows, cols), given {self.values.shape}."
            raise InputError(message)

    def channel(self, name: str) -> np.ndarray:
        """Return one channel, shape (rows, cols)."""
        if name not in self.channels:
            message = f"no channel {name!r}. This image has: {', '.join(self.channels)}."
            raise InputError(message)
        return self.values[self.channels.index(name)]

    def resampled(self, grid: PlanarGrid, fill: float = 0.0) -> "Projection":
        """Return the image on another grid of the same view (linear interpolation, mm preserved)."""
        if grid.view != self.grid.view:
            message = f"cannot resample a {self.grid.view} image to a {grid.view} grid."
            raise InputError(message)
        rows, _ = self.grid.mm_to_pixel(grid.superior_mm(), 0.0)
        _, cols = self.grid.mm_to_pixel(0.0, grid.lateral_mm())
        points = np.meshgrid(rows, cols, indexing="ij")
        values = [map_coordinates(c, points, order=1, cval=fill, mode="constant") for c in self.values]
        return Projection(self.channels, np.stack(values).astype(np.float32), grid)

    def mirrored(self) -> "Projection":
        """Return the image of the left-right mirrored patient (coronal view only)."""
        if self.grid.view != "coronal":
            message = f"left and right exist in the coronal view only, this image is {self.grid.view}."
            raise InputError(message)
        far_edge = self.grid.lateral_mm()[-1]
        grid = PlanarGrid("coronal", self.grid.shape, self.grid.spacing_mm, (self.grid.origin_mm[0], -far_edge))
        return Projection(self.channels, np.ascontiguousarray(self.values[:, :, ::-1]), grid)


@dataclass(frozen=True)
class VolumeGrid:
    """Voxel grid: shape (right, anterior, superior) and affine (4, 4) from voxel index to RAS mm."""

    shape: tuple[int, int, int]
    affine: np.ndarray

    @classmethod
    def from_bounds(cls, lower_mm, upper_mm, spacing_mm) -> "VolumeGrid":
        """Return the axis-aligned grid that covers the box from `lower_mm` to `upper_mm`, each (3,)."""
        lower, upper = np.asarray(lower_mm, float), np.asarray(upper_mm, float)
        spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3)
        if np.any(upper <= lower) or np.any(spacing <= 0):
            message = f"a volume grid needs lower < upper and spacing > 0, given {lower}, {upper}, {spacing} mm."
            raise InputError(message)
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = lower
        return cls(tuple(int(n) for n in np.ceil((upper - lower) / spacing).astype(int) + 1), affine)

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel size, shape (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def corners_mm(self) -> np.ndarray:
        """World coordinates of the outermost voxel centres, shape (8, 3)."""
        index = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij")).reshape(3, -1)
        return (self.affine[:3, :3] @ index + self.affine[:3, 3:]).T

    def axes_mm(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """World coordinates along each axis of an axis-aligned grid."""
        return tuple(self.affine[i, 3] + self.affine[i, i] * np.arange(n) for i, n in enumerate(self.shape))


@dataclass(frozen=True)
class Volume:
    """Values indexed (right, anterior, superior) with an affine (4, 4) from voxel index to RAS mm."""

    values: np.ndarray
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Voxel size, shape (3,)."""
        return self.grid.spacing_mm

    @property
    def grid(self) -> VolumeGrid:
        """The voxel grid without the values."""
        return VolumeGrid(tuple(self.values.shape[:3]), self.affine)


@dataclass(frozen=True)
class PlanarTransform:
    """Rigid motion in the coronal plane that carries MOVING millimetres to FIXED millimetres.

    A point is turned about the centre, then shifted.

    Attributes
    ----------
    rotation_deg : float
        Positive turns counter-clockwise as seen on the coronal image, whose left side is the patient's
        right: the head moves towards the patient's right.
    shift_right_mm, shift_superior_mm : float
    centre_right_mm, centre_superior_mm : float
        Centre of rotation.
    """

    rotation_deg: float = 0.0
    shift_right_mm: float = 0.0
    shift_superior_mm: float = 0.0
    centre_right_mm: float = 0.0
    centre_superior_mm: float = 0.0

    def matrix(self) -> np.ndarray:
        """Return the homogeneous matrix (3, 3) that acts on columns (right_mm, superior_mm, 1)."""
        angle = np.radians(self.rotation_deg)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        centre = np.array([self.centre_right_mm, self.centre_superior_mm])
        matrix = np.eye(3)
        matrix[:2, :2] = turn
        matrix[:2, 2] = centre - turn @ centre + [self.shift_right_mm, self.shift_superior_mm]
        return matrix

    def apply(self, right_mm, superior_mm):
        """Carry points; returns (right_mm, superior_mm), shapes as given."""
        m = self.matrix()
        right, superior = np.asarray(right_mm, float), np.asarray(superior_mm, float)
        return (
            m[0, 0] * right + m[0, 1] * superior + m[0, 2],
            m[1, 0] * right + m[1, 1] * superior + m[1, 2],
        )

    def inverse(self) -> "PlanarTransform":
        """Return the motion from FIXED to MOVING, about the same centre."""
        m = np.linalg.inv(self.matrix())
        centre = np.array([self.centre_right_mm, self.centre_superior_mm])
        shift = m[:2, 2] - centre + m[:2, :2] @ centre
        return PlanarTransform(-self.rotation_deg, *shift, *centre)

    def about(self, centre_right_mm: float, centre_superior_mm: float) -> "PlanarTransform":
        """Return the same motion written about another centre."""
        m = self.matrix()
        centre = np.array([centre_right_mm, centre_superior_mm])
        shift = m[:2, 2] - centre + m[:2, :2] @ centre
        return PlanarTransform(self.rotation_deg, *shift, *centre)


def move_projection(image: Projection, transform: PlanarTransform, grid: PlanarGrid, fill=0.0) -> Projection:
    """Return a coronal MOVING image carried by `transform` and sampled on the FIXED `grid` (linear)."""
    right, superior = np.meshgrid(grid.lateral_mm(), grid.superior_mm())
    source_right, source_superior = transform.inverse().apply(right, superior)
    points = image.grid.mm_to_pixel(source_superior, source_right)
    values = [map_coordinates(c, points, order=1, cval=fill, mode="constant") for c in image.values]
    return Projection(image.channels, np.stack(values).astype(np.float32), grid)
