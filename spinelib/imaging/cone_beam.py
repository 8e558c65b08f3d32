"""Geometry of one radiograph: a point source, a flat detector, and the way back from two views to 3D.

World frame: RAS+ mm (right, anterior, superior). Detector coordinates are (row, col), fractional; whole numbers lie at
the centres of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from spinelib.errors import InputError

SOURCE_DETECTOR_MM = 1800.0
SOURCE_OBJECT_MM = 1500.0


@dataclass(frozen=True, eq=False)
class ConeBeam:
    """A point source and a flat detector.

    Attributes
    ----------
    source_mm : ndarray (3,)
    corner_mm : ndarray (3,)
        Centre of the detector pixel at row 0, column 0.
    col_step_mm, row_step_mm : ndarray (3,)
        From one pixel to the next along a row, and down a column.
    shape : tuple of int
        Rows, columns.

    Raises
    ------
    InputError
        If the source lies in the detector's plane, the steps are parallel or zero, or the detector has no pixel.
    """

    source_mm: np.ndarray
    corner_mm: np.ndarray
    col_step_mm: np.ndarray
    row_step_mm: np.ndarray
    shape: tuple[int, int]

    def __post_init__(self):
        for name in ("source_mm", "corner_mm", "col_step_mm", "row_step_mm"):
            value = np.array(getattr(self, name), float)
            if value.shape != (3,) or not np.isfinite(value).all():
                message = f"{name} must be three finite coordinates (right, anterior, superior) in mm, given {value}."
                raise InputError(message)
            object.__setattr__(self, name, value)
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 2 or min(shape) < 1:
            message = f"a detector needs (rows, columns), both at least 1, given {self.shape}."
            raise InputError(message)
        object.__setattr__(self, "shape", shape)
        frame = self._frame()
        if not abs(np.linalg.det(frame)) > 1e-6 * np.linalg.norm(frame, axis=0).prod():
            message = (
                "the source must lie outside the detector's plane and the steps of rows and columns must differ, given "
                f"source {self.source_mm}, corner {self.corner_mm}, steps {self.row_step_mm}, {self.col_step_mm} mm."
            )
            raise InputError(message)

    @classmethod
    def frontal(
        cls,
        isocentre_mm,
        shape: tuple[int, int],
        pixel_mm: float,
        source_detector_mm: float = SOURCE_DETECTOR_MM,
        source_object_mm: float = SOURCE_OBJECT_MM,
    ) -> "ConeBeam":
        """Return an anteroposterior beam: source in front, column 0 = patient's right, row 0 superior.

        Parameters
        ----------
        isocentre_mm : (3,) array-like
            Point of the patient on the central ray, which meets the middle of the detector.
        shape : tuple of int
            Rows, columns.
        pixel_mm : float
            Pitch on the detector.
        source_detector_mm, source_object_mm : float
            Source to detector, and source to isocentre.
        """
        distances = (source_detector_mm, source_object_mm)
        return cls._upright(isocentre_mm, (0, 1, 0), (-1, 0, 0), shape, pixel_mm, distances)

    @classmethod
    def lateral(
        cls,
        isocentre_mm,
        shape: tuple[int, int],
        pixel_mm: float,
        source_detector_mm: float = SOURCE_DETECTOR_MM,
        source_object_mm: float = SOURCE_OBJECT_MM,
    ) -> "ConeBeam":
        """Return a lateral beam: source on the patient's right, column 0 = anterior, row 0 superior.

        Parameters as for `frontal`.
        """
        distances = (source_detector_mm, source_object_mm)
        return cls._upright(isocentre_mm, (1, 0, 0), (0, -1, 0), shape, pixel_mm, distances)

    @classmethod
    def _upright(cls, isocentre_mm, to_source, along_row, shape, pixel_mm, distances_mm) -> "ConeBeam":
        detector, object_ = distances_mm
        if not 0 < object_ <= detector or not pixel_mm > 0:
            message = (
                "a radiograph needs 0 < source_object_mm <= source_detector_mm and pixel_mm > 0, given "
                f"{object_}, {detector} and {pixel_mm} mm."
            )
            raise InputError(message)
        isocentre, to_source = np.asarray(isocentre_mm, float), np.asarray(to_source, float)
        col_step, row_step = pixel_mm * np.asarray(along_row, float), np.array([0.0, 0.0, -pixel_mm])
        middle = isocentre - (detector - object_) * to_source
        corner = middle - (shape[0] - 1) / 2 * row_step - (shape[1] - 1) / 2 * col_step
        return cls(isocentre + object_ * to_source, corner, col_step, row_step, shape)

    @property
    def matrix(self) -> np.ndarray:
        """Projection matrix (3, 4): takes (right, anterior, superior, 1) to (row * w, col * w, w).

        w is 0 at the source and 1 on the detector.
        """
        inverse = np.linalg.inv(self._frame())
        return np.column_stack([inverse, -inverse @ self.source_mm])

    def project(self, points_mm):
        """Return where rays through points meet the detector.

        Parameters
        ----------
        points_mm : ndarray or Tensor (..., 3)

        Returns
        -------
        ndarray or Tensor (..., 2)
            Row and column, also beyond the detector's edges. Differentiable for tensors.

        Raises
        ------
        InputError
            If a point does not lie on the detector's side of the source.
        """
        is_tensor = hasattr(points_mm, "new_tensor")
        points = points_mm if is_tensor else np.asarray(points_mm, float)
        matrix = points.new_tensor(self.matrix) if is_tensor else self.matrix
        homogeneous = points @ matrix[:, :3].T + matrix[:, 3]
        depth = homogeneous[..., 2:]
        if not (depth > 0).all():
            message = "a point lies behind the X-ray source or is not finite, so no ray carries it to the detector."
            raise InputError(message)
        return homogeneous[..., :2] / depth

    def detector_mm(self, points_rc) -> np.ndarray:
        """Return the world position (..., 3) of detector points (..., 2) given as (row, col)."""
        points = np.asarray(points_rc, float)
        return self.corner_mm + points[..., :1] * self.row_step_mm + points[..., 1:] * self.col_step_mm

    def pixels_mm(self) -> np.ndarray:
        """Return the centres of all pixels, shape (rows, cols, 3)."""
        return self.detector_mm(np.stack(np.indices(self.shape), axis=-1))

    def cropped(self, centre_rc, shape: tuple[int, int]) -> "ConeBeam":
        """Return the part of the detector, `shape` pixels large, whose middle lies exactly at `centre_rc`.

        The middle may be fractional and the part may reach beyond this detector.
        """
        corner_rc = np.asarray(centre_rc, float) - (np.asarray(shape) - 1) / 2
        return ConeBeam(self.source_mm, self.detector_mm(corner_rc), self.col_step_mm, self.row_step_mm, shape)

    @property
    def principal_mm(self) -> np.ndarray:
        """Foot of the source on the detector's plane, shape (3,)."""
        normal = np.cross(self.row_step_mm, self.col_step_mm)
        normal /= np.linalg.norm(normal)
        return self.source_mm + normal * (normal @ (self.corner_mm - self.source_mm))

    def to_dict(self) -> dict:
        """Return plain lists for JSON; inverse of `from_dict`."""
        return {field.name: np.asarray(getattr(self, field.name)).tolist() for field in fields(self)}

    @classmethod
    def from_dict(cls, entries: dict) -> "ConeBeam":
        """Return the beam that `to_dict` wrote; InputError names what is missing or not known."""
        expected = {field.name for field in fields(cls)}
        if set(entries) != expected:
            message = f"a beam is described by {', '.join(sorted(expected))}; given {', '.join(sorted(entries))}."
            raise InputError(message)
        return cls(**entries)

    def _frame(self) -> np.ndarray:
        """Columns: steps of row and column, and the way from the source to the corner."""
        return np.column_stack([self.row_step_mm, self.col_step_mm, self.corner_mm - self.source_mm])


def triangulate(beams: Sequence[ConeBeam], points_rc) -> tuple[np.ndarray, np.ndarray]:
    """Return the points nearest to their rays, by least squares over all views.

    Parameters
    ----------
    beams : sequence of ConeBeam
        Two or more, from different directions.
    points_rc : array-like (n_views, n, 2)
        The same n points as (row, col) in each view.

    Returns
    -------
    points_mm : ndarray (n, 3)
    residual_mm : ndarray (n,)
        Root mean square distance of a point from its rays; a wrong pairing or a wrong geometry shows here.
    """
    points = np.asarray(points_rc, float)
    if len(beams) < 2 or points.ndim != 3 or points.shape[::2] != (len(beams), 2) or not np.isfinite(points).all():
        message = (
            f"triangulation needs two or more views and finite points of shape (views, n, 2), given {len(beams)} views "
            f"and {points.shape}."
        )
        raise InputError(message)
    sources = np.stack([beam.source_mm for beam in beams])[:, None]
    rays = np.stack([beam.detector_mm(seen) for beam, seen in zip(beams, points, strict=True)]) - sources
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    across = np.eye(3) - rays[..., :, None] * rays[..., None, :]  # takes a vector to its part across the ray
    total = across.sum(axis=0)
    if not (np.linalg.cond(total) < 1e8).all():
        message = "the rays of the views are parallel: triangulation needs views from different directions."
        raise InputError(message)
    # Relative to the middle of the sources, so that rounding stays far below a micrometre.
    origin = sources.mean(axis=0)
    pull = (across @ (sources - origin)[..., None]).sum(axis=0)
    found = np.linalg.solve(total, pull)[..., 0] + origin
    distances = np.linalg.norm((across @ (found - sources)[..., None])[..., 0], axis=-1)
    return found, np.sqrt((distances**2).mean(axis=0))


def stack_naively(frontal: ConeBeam, lateral: ConeBeam, points_frontal_rc, points_lateral_rc) -> np.ndarray:
    """Return 3D points under one constant magnification, as Bayat et al. (2020) stack their vertebrae.

    Right comes from the frontal view, anterior and superior from the lateral view. A point off the central ray of the
    lateral view by `right` appears too high by superior * right / source_object: the error grows with height.

    Parameters
    ----------
    frontal, lateral : ConeBeam
        Beams whose central rays meet, at the isocentre.
    points_frontal_rc, points_lateral_rc : array-like (n, 2)

    Returns
    -------
    ndarray (n, 3)
    """
    beams = (frontal, lateral)
    rays = [beam.principal_mm - beam.source_mm for beam in beams]
    principal_rc = [beam.project(beam.principal_mm)[None] for beam in beams]
    (isocentre,), _ = triangulate(beams, principal_rc)
    right, across = (
        isocentre
        + (beam.detector_mm(seen) - beam.principal_mm)
        * (np.linalg.norm(isocentre - beam.source_mm) / np.linalg.norm(ray))
        for beam, ray, seen in zip(beams, rays, (points_frontal_rc, points_lateral_rc), strict=True)
    )
    return np.concatenate([right[..., :1], across[..., 1:]], axis=-1)
