"""A small CT/MR pair of two drawn vertebrae that move rigidly, with its true field.

Anatomy is a closed form of CT points: two vertebrae of boxes (body and posterior arm) with a cortical shell, a disc, a
cord, a round body. The truth takes an MR point to x + sum_k w_k(x) (T_k x - x), where w_k is 1 in bone k and 0 in the
other bone, by distances to the boxes themselves. Nothing in the truth is interpolated: the true field scores Dice 1.
"""

from dataclasses import dataclass

import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from spinelib.deformation import DisplacementField, grid_points_mm
from spinelib.geometry import Volume, VolumeGrid

UPPER, LOWER = 22, 23
SIDE_MM = 64.0
HARD = 1.5
"""Scale of the motion at which the labels of the resting CT overlap by a Dice of 0.69, as the paper's pairs do."""

# (lower, upper) corners in mm from the middle, right, anterior, superior; faces lie between voxel centres
_BODY = np.array([[-12.5, -4.5, -9.5], [11.5, 17.5, 8.5]])
_ARM = np.array([[-4.5, -20.5, -5.5], [3.5, -4.5, 2.5]])
_CENTRES = {UPPER: np.array([0.0, 0.0, 14.0]), LOWER: np.array([0.0, 0.0, -14.0])}
_TURNS_DEG = {UPPER: (-6.0, -3.0, 2.0), LOWER: (5.0, 2.0, -3.0)}
_SHIFTS_MM = {UPPER: np.array([-1.5, -2.0, -1.0]), LOWER: np.array([1.5, 2.0, 1.5])}
_DISC = np.array([[-11.0, -3.0, -4.0], [11.0, 17.0, 4.0]])
_CORD_ANTERIOR, _CORD_MM, _SKIN_MM, _REACH_MM, _CORTEX_MM = -24.5, 3.5, 30.0, 18.0, 2.0


@dataclass(frozen=True)
class Case:
    """A pair and its truth; names as in `spinelib.imaging.pairs.RegistrationPair`."""

    ct: Volume
    ct_labels: Volume
    mr: Volume
    mr_labels: Volume
    field: DisplacementField
    transforms: dict


def true_transforms(scale: float = HARD) -> dict[int, np.ndarray]:
    """Return the motion of both vertebrae, MR to CT, about the point between body and arm."""
    transforms = {}
    for label, centre in _CENTRES.items():
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_euler("xyz", np.multiply(scale, _TURNS_DEG[label]), degrees=True).as_matrix()
        matrix[:3, 3] = centre - matrix[:3, :3] @ centre + scale * _SHIFTS_MM[label]
        transforms[label] = matrix
    return transforms


def two_vertebrae(seed: int = 0, scale: float = HARD, slice_mm: float = 1.0, ct_mm: float = 1.0) -> Case:
    """Return a pair.

    Parameters
    ----------
    seed : int
        Of texture, coil shading and noise.
    scale : float
        Of the motion: 0 none, `HARD` as large as in the paper.
    slice_mm : float
        Thickness and distance of the sagittal MR slices; 1 mm in the plane.
    ct_mm : float
        Voxels of the CT.
    """
    rng = np.random.default_rng(seed)
    transforms = true_transforms(scale)
    tissue = _Texture(rng)
    ct_grid, mr_grid = _grid((ct_mm,) * 3), _grid((slice_mm, 1.0, 1.0))
    ct_points, mr_points = grid_points_mm(ct_grid), grid_points_mm(mr_grid)
    displacement = _displacement(mr_points, transforms)
    offsets = (np.arange(3) - 1) / 3 * slice_mm if slice_mm > 1 else np.zeros(1)
    layers = [_moved(mr_points + [offset, 0, 0], transforms) for offset in offsets]
    signal = np.mean([_mr(points, tissue) for points in layers], axis=0) * tissue.shading(mr_points)
    signal = np.abs(signal + 0.02 * rng.standard_normal(signal.shape))
    hounsfield = _ct(ct_points, tissue) + 25 * rng.standard_normal(ct_grid.shape)
    return Case(
        Volume(hounsfield.astype(np.float32), ct_grid.affine),
        Volume(bone_labels(ct_points), ct_grid.affine),
        Volume(signal.astype(np.float32), mr_grid.affine),
        Volume(bone_labels(mr_points + displacement), mr_grid.affine),
        DisplacementField(displacement, mr_grid),
        transforms,
    )


def bone_labels(points) -> np.ndarray:
    """Return the label of CT points (..., 3), uint8."""
    labels = np.zeros(points.shape[:-1], np.uint8)
    for label in _CENTRES:
        labels[_distance(points, label) <= 0] = label
    return labels


class _Texture:
    """Grain of tissue and coil shading as functions of the place."""

    def __init__(self, rng):
        noise = rng.standard_normal((3, 64, 64, 64))
        sizes = (3.0, 1.2, 14.0)
        fields = [gaussian_filter(n, size, mode="wrap") for n, size in zip(noise, sizes, strict=True)]
        self.soft, self.marrow = (field / field.std() for field in fields[:2])
        self._shading = fields[2] / np.abs(fields[2]).max()

    def shading(self, points):
        return 1 + 0.15 * sampled(self._shading, points)


def sampled(field, points):
    """Return a periodic 64 mm field at world points."""
    return map_coordinates(field, np.moveaxis(points + SIDE_MM / 2, -1, 0), order=1, mode="grid-wrap")


def _grid(spacing) -> VolumeGrid:
    spacing = np.array(spacing)
    affine = np.diag([*spacing, 1.0])
    shape = np.round(SIDE_MM / spacing).astype(int)
    affine[:3, 3] = -spacing * shape // 2
    return VolumeGrid(tuple(int(n) for n in shape), affine)


def _displacement(points, transforms):
    """Return the true displacement of MR points."""
    moved = {label: apply_affine(matrix, points) for label, matrix in transforms.items()}
    weights = {label: (_distance(there, label) + 1e-9) ** -2.0 for label, there in moved.items()}
    total = sum(weights.values()) + _REACH_MM**-2.0
    return sum((weights[label] / total)[..., None] * (moved[label] - points) for label in transforms)


def _moved(points, transforms):
    return points + _displacement(points, transforms)


def _box_distance(points, box):
    return np.linalg.norm(np.maximum(np.maximum(box[0] - points, points - box[1]), 0), axis=-1)


def _distance(points, label):
    here = points - _CENTRES[label]
    return np.minimum(_box_distance(here, _BODY), _box_distance(here, _ARM))


def _tissues(points):
    """Return masks of bone, cortex, disc, cord and body."""
    bone = bone_labels(points) > 0
    depth = np.full(bone.shape, -np.inf)
    for centre in _CENTRES.values():
        for box in (_BODY, _ARM):
            here = points - centre
            depth = np.maximum(depth, np.minimum(here - box[0], box[1] - here).min(axis=-1))
    disc = _box_distance(points, _DISC) <= 0
    cord = np.hypot(points[..., 0], points[..., 1] - _CORD_ANTERIOR) < _CORD_MM
    body = np.hypot(points[..., 0], points[..., 1]) < _SKIN_MM
    return bone, bone & (depth < _CORTEX_MM), disc, cord, body


def _painted(points, values, air):
    """Return one value per tissue; later tissues cover earlier ones."""
    bone, cortex, disc, cord, body = _tissues(points)
    image = np.where(body, values["soft"], air)
    for mask, name in ((disc, "disc"), (cord, "cord"), (bone, "marrow"), (cortex, "cortex")):
        image = np.where(mask, values[name], image)
    return image


def _ct(points, tissue):
    soft, marrow = sampled(tissue.soft, points), sampled(tissue.marrow, points)
    values = {"soft": 45 + 10 * soft, "disc": 90.0, "cord": 35.0, "marrow": 220 + 40 * marrow, "cortex": 800.0}
    return _painted(points, values, -1000.0)


def _mr(points, tissue):
    soft, marrow = sampled(tissue.soft, points), sampled(tissue.marrow, points)
    values = {"soft": 0.3 + 0.06 * soft, "disc": 0.22, "cord": 0.45, "marrow": 0.62 - 0.05 * marrow, "cortex": 0.1}
    return _painted(points, values, 0.02)
