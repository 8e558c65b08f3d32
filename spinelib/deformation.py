"""Displacement fields and rigid motions of volumes in world millimetres.

A field lives on the grid of the FIXED image and pulls back: phi(x) = x + u(x) takes a point of the fixed image to the
point of the MOVING image that belongs there, and the warped image is moving(phi(x)). Points, displacements and 4 x 4
matrices are RAS+ mm; files hold LPS mm, as ITK reads them.
"""

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.filebasedimages import ImageFileError
from scipy.ndimage import find_objects, map_coordinates
from scipy.spatial.transform import Rotation

from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.record import written_atomically

INVERSE_TOLERANCE_MM = 1e-3

_INVERSE_STEPS = 100
_EDGE = 0.5 + 1e-6  # a voxel reaches half a step beyond its centre; the rest is for rounding
_LPS = np.array([-1.0, -1.0, 1.0])
_NIFTI = (".nii", ".nii.gz")
_ITK = (".h5", ".tfm")


@dataclass(frozen=True, eq=False)
class DisplacementField:
    """Displacements u of the points of a voxel grid.

    Attributes
    ----------
    values : ndarray, shape (R, A, S, 3), float32
        (right, anterior, superior) displacement in mm at every voxel centre.
    grid : VolumeGrid
        Of the FIXED image; may be anisotropic and oblique.

    Raises
    ------
    InputError
        If the shapes differ or a displacement is not finite.
    """

    values: np.ndarray
    grid: VolumeGrid

    def __post_init__(self):
        values = np.asarray(self.values, np.float32)
        if values.shape != (*self.grid.shape, 3) or not np.isfinite(values).all():
            message = (
                f"a field needs finite displacements of shape {(*self.grid.shape, 3)} (right, anterior, superior, "
                f"component), given {values.shape}, finite: {bool(np.isfinite(values).all())}."
            )
            raise InputError(message)
        object.__setattr__(self, "values", values)

    @classmethod
    def zero(cls, grid: VolumeGrid) -> "DisplacementField":
        """Return the field that moves nothing."""
        return cls(np.zeros((*grid.shape, 3), np.float32), grid)

    @classmethod
    def rigid(cls, matrix, grid: VolumeGrid) -> "DisplacementField":
        """Return the field of one 4 x 4 matrix, x -> matrix @ x in world mm."""
        points = grid_points_mm(grid)
        return cls(apply_affine(matrix, points) - points, grid)

    def points_mm(self) -> np.ndarray:
        """Return the voxel centres, shape (R, A, S, 3)."""
        return grid_points_mm(self.grid)

    def at(self, points_mm) -> np.ndarray:
        """Return u at world points (..., 3): trilinear, constant beyond the outermost voxel centres."""
        index = np.moveaxis(_index(self.grid, points_mm), -1, 0)
        sampled = [map_coordinates(self.values[..., i], index, order=1, mode="nearest") for i in range(3)]
        return np.stack(sampled, axis=-1)

    def moved(self, points_mm) -> np.ndarray:
        """Return phi(x) = x + u(x) of world points (..., 3)."""
        return np.asarray(points_mm, float) + self.at(points_mm)

    def resampled(self, grid: VolumeGrid) -> "DisplacementField":
        """Return the same displacements on another grid (trilinear, constant beyond the border)."""
        return DisplacementField(self.at(grid_points_mm(grid)), grid)

    def inverse(self, grid: VolumeGrid | None = None) -> "DisplacementField":
        """Return the field of phi^-1, which takes points of the MOVING image to the FIXED image.

        Fixed-point iteration x <- x - step (phi(x) - y), to 0.001 mm. The step of a point is halved whenever its
        residual grows, so that strong compression, where the plain iteration cycles, converges too. Where phi folds
        no inverse exists; the nearest point that was found is kept there.

        Parameters
        ----------
        grid : VolumeGrid, optional
            Where the inverse is wanted, usually the moving image's grid; this field's own by default.
        """
        grid = self.grid if grid is None else grid
        targets = grid_points_mm(grid).reshape(-1, 3)
        found = _solve(self, targets)
        return DisplacementField((found - targets).reshape(*grid.shape, 3), grid)

    def jacobian(self) -> np.ndarray:
        """Return J[..., i, j] = d phi_i / d x_j in world mm, shape (R, A, S, 3, 3), float32.

        Central differences, one-sided at the border: exact for affine motion everywhere.
        """
        if min(self.grid.shape) < 2:
            message = f"derivatives need at least 2 voxels along each axis, given {self.grid.shape}."
            raise InputError(message)
        steps = np.stack(np.gradient(self.values, axis=(0, 1, 2)), axis=-1)  # (..., component, index axis)
        to_index = np.linalg.inv(self.grid.affine[:3, :3]).astype(np.float32)
        return steps @ to_index + np.eye(3, dtype=np.float32)


# --- images ---


def grid_points_mm(grid: VolumeGrid) -> np.ndarray:
    """Return the world position of every voxel centre, shape (R, A, S, 3)."""
    index = np.stack(np.indices(grid.shape), axis=-1)
    return apply_affine(grid.affine, index)


def covers(grid: VolumeGrid, points_mm) -> np.ndarray:
    """Return whether world points (..., 3) lie in a voxel of the grid, shape (...), bool."""
    index = _index(grid, points_mm)
    return ((index >= -_EDGE) & (index <= np.array(grid.shape) - 1 + _EDGE)).all(axis=-1)


def warp_volume(moving: Volume, field: DisplacementField, order: int = 1, fill: float = 0.0) -> Volume:
    """Return moving(phi(x)) on the field's grid.

    Parameters
    ----------
    moving : Volume
    field : DisplacementField
    order : int
        Of the spline: 0 nearest, 1 linear, 3 cubic.
    fill : float
        Value outside the moving image, that is more than half a voxel beyond its outermost centres.
    """
    return Volume(_sampled(moving, field.moved(field.points_mm()), order, fill), field.grid.affine)


def warp_labels(labels: Volume, field: DisplacementField) -> Volume:
    """Return labels(phi(x)) on the field's grid, uint8: the label with the largest share in linear interpolation.

    So a mask stands for the solid where its own linear interpolation is over a half, and coarse voxels leave no steps,
    as the nearest neighbour does. Half a voxel beyond the outermost centres there is no label.
    """
    values = np.asarray(labels.values, np.uint8)
    index = _index(labels.grid, field.moved(field.points_mm()))
    inside = ((index >= -_EDGE) & (index <= np.array(values.shape) - 1 + _EDGE)).all(axis=-1)
    best, total = np.zeros((2, *field.grid.shape), np.float32)
    result = np.zeros(field.grid.shape, np.uint8)
    for label, box in enumerate(find_objects(values), start=1):
        if box is not None:
            near = inside & np.all(
                [(index[..., i] > s.start - 1) & (index[..., i] < s.stop) for i, s in enumerate(box)], 0
            )
            mask = (values == label).astype(np.float32)
            share = np.zeros_like(best)
            share[near] = map_coordinates(mask, index[near].T, order=1, mode="nearest")
            result[share > best] = label
            best, total = np.maximum(best, share), total + share
    result[best <= 1 - total] = 0
    return Volume(result, field.grid.affine)


def resample(volume: Volume, grid: VolumeGrid, order: int = 1, fill: float = 0.0) -> Volume:
    """Return a volume on another grid in the same world; `order` and `fill` as for `warp_volume`."""
    return Volume(_sampled(volume, grid_points_mm(grid), order, fill), grid.affine)


def framed(volume: Volume, mask: np.ndarray, margin_mm: float = 0.0) -> Volume:
    """Return the part of a volume (R, A, S) in the box around a mask of its shape, and `margin_mm` around the box."""
    margin = np.ceil(margin_mm / volume.spacing_mm).astype(int)
    box = find_objects(mask, max_label=1)[0]
    box = tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(box, margin, strict=True))
    affine = volume.affine.copy()
    affine[:3, 3] = apply_affine(volume.affine, [s.start for s in box])
    return Volume(volume.values[box], affine)


# --- rigid motions ---


def rigid_fit(x_mm, y_mm, weights=None) -> np.ndarray:
    """Return the rotation and translation that carry x to y with the least weighted squares.

    Both sides are centred on the weighted centroids of these very pairs; any other centre is not the optimum.

    Parameters
    ----------
    x_mm, y_mm : array-like (n, 3)
    weights : array-like (n,), optional
        At least 0; equal by default.

    Returns
    -------
    ndarray (4, 4)
        Proper rotation, never a mirror.

    Raises
    ------
    InputError
        If the weighted points lie on one line, so that no rotation is determined, or the input does not fit.

    Notes
    -----
    Kabsch, W. A solution for the best rotation to relate two sets of vectors. Acta Cryst. A32 (1976).
    """
    x, y = np.asarray(x_mm, float), np.asarray(y_mm, float)
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, float)
    if x.ndim != 2 or x.shape[1] != 3 or y.shape != x.shape or weights.shape != x.shape[:1]:
        message = f"expected pairs of points (n, 3) and weights (n,), given {x.shape}, {y.shape}, {weights.shape}."
        raise InputError(message)
    used = weights > 0
    if used.sum() < 3 or np.linalg.matrix_rank(x[used] - x[used].mean(axis=0), tol=1e-6) < 2:
        message = f"a rigid motion needs 3 points that are not on one line, given {int(used.sum())} with a weight."
        raise InputError(message)
    centre_x, centre_y = (np.average(side, axis=0, weights=weights) for side in (x, y))
    rotation, _ = Rotation.align_vectors(y - centre_y, x - centre_x, weights=weights)
    matrix = np.eye(4)
    matrix[:3, :3] = rotation.as_matrix()
    matrix[:3, 3] = centre_y - matrix[:3, :3] @ centre_x
    return matrix


def rotation_deg(matrix) -> float:
    """Return the angle of a rotation matrix (3, 3) or of the rotation of a (4, 4), 0 to 180 degrees."""
    return float(np.degrees(Rotation.from_matrix(np.asarray(matrix, float)[:3, :3]).magnitude()))


# --- files ---


def write_field(path, field: DisplacementField) -> Path:
    """Write the field as a NIfTI vector image and return the path.

    Shape (R, A, S, 1, 3), float32, LPS mm, intent 1007 (vector): ITK and SimpleITK read it as it is.
    """
    image = nib.Nifti1Image((field.values * _LPS.astype(np.float32))[:, :, :, None], field.grid.affine)
    image.header.set_intent("vector", name="displacement")
    image.header.set_xyzt_units("mm")
    return written_atomically(path, _NIFTI, lambda draft: nib.save(image, draft))


def read_field(path) -> DisplacementField:
    """Return the field that `write_field` or ITK wrote (NIfTI vector image, LPS mm).

    Raises
    ------
    InputError
        If there is no such file or it holds no vector image of three components.
    """
    path = Path(path)
    try:
        image = nib.load(path)
    except (OSError, ImageFileError) as error:
        message = f"cannot read {path}: {error}. Fix: give the NIfTI file of a displacement field."
        raise InputError(message) from error
    intent = image.header.get_intent()[0] if isinstance(image, nib.Nifti1Pair) else "none"
    if image.shape[3:] != (1, 3) or intent != "vector":
        message = (
            f"{path.name}: expected a displacement field, a NIfTI image of shape (R, A, S, 1, 3) with the intent "
            f"'vector' (1007), given {image.shape} with {intent!r}."
        )
        raise InputError(message)
    values = np.asarray(image.dataobj, np.float32)[:, :, :, 0] * _LPS.astype(np.float32)
    return DisplacementField(values, VolumeGrid(tuple(values.shape[:3]), image.affine))


def write_itk_transform(path, field: DisplacementField) -> Path:
    """Write the field as an ITK displacement field transform (.h5 or .tfm); returns the path.

    `SimpleITK.Resample(moving, fixed, SimpleITK.ReadTransform(path))` then warps as `warp_volume` does.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray((field.values * _LPS).transpose(2, 1, 0, 3), isVector=True)
    spacing = field.grid.spacing_mm
    direction = _LPS[:, None] * field.grid.affine[:3, :3] / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-4):
        message = "ITK stores no sheared grid. Fix: resample the field to a grid whose axes are at right angles."
        raise InputError(message)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((_LPS * field.grid.affine[:3, 3]).tolist())
    image.SetDirection(direction.ravel().tolist())
    transform = sitk.DisplacementFieldTransform(image)
    return written_atomically(path, _ITK, lambda draft: sitk.WriteTransform(transform, draft))


# --- private ---


def _index(grid, points_mm):
    return apply_affine(np.linalg.inv(grid.affine), points_mm)


def _sampled(volume, points_mm, order, fill):
    index = np.moveaxis(_index(volume.grid, points_mm), -1, 0)
    # "nearest" rather than "constant": that one gives the fill value from the outermost centres on, and with it
    # holes in the border wherever the coordinates carry a rounding error.
    values = map_coordinates(volume.values, index, order=order, mode="nearest")
    return np.where(covers(volume.grid, points_mm), values, np.asarray(fill, values.dtype))


def _solve(field, targets):
    """Return points x (n, 3) with phi(x) = targets."""
    points = targets - field.at(targets)
    residual = field.moved(points) - targets
    error, step = np.linalg.norm(residual, axis=-1), np.ones(len(targets))
    active = np.flatnonzero(error > INVERSE_TOLERANCE_MM)
    for _ in range(_INVERSE_STEPS):
        if not len(active):
            break
        trial = points[active] - step[active, None] * residual[active]
        trial_residual = field.moved(trial) - targets[active]
        trial_error = np.linalg.norm(trial_residual, axis=-1)
        better = trial_error < error[active]
        kept = active[better]
        points[kept], residual[kept], error[kept] = trial[better], trial_residual[better], trial_error[better]
        step[active[~better]] /= 2
        active = active[error[active] > INVERSE_TOLERANCE_MM]
    return points
