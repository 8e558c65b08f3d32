"""CT to MR registration that keeps every vertebra rigid by construction.

One rigid motion per vertebra, MR to CT, comes from a deformable field (`vertebra_transforms`) or from the images
(`refine`), and one smooth field is made of them that is exactly rigid in bone (`blend`).

That field is a polyrigid transformation (Arsigny et al. 2005, Med Image Anal 9:507): the velocity of a point is the
mean of the velocities of all rigid motions, weighted by its distance from their bones, so that following it never
folds. Theirs has weights fixed in space and is rigid nowhere exactly. Here the bones move along: at every moment of
the way a point is weighted by its distance to the bones where they are at that moment, and what starts in a bone stays
in it. Weights are inverse distances with a finite reach (Franke & Nielson 1980, Int J Numer Methods Eng 15:1691).
"""

import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.linalg import expm, logm
from torch.nn.functional import grid_sample

from spinelib.deformation import DisplacementField, framed, grid_points_mm, rigid_fit
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.labels import signed_distance
from spinelib.levels import LEVEL_OF_LABEL, LEVEL_ORDER, VERSE_LABELS
from spinelib.models.pose_fit import fit_poses
from spinelib.prealign import placements

REACH_MM = 24.0
"""Beyond this distance from its surface a vertebra moves nothing."""

SOFT_MM = 12.0
"""At this distance from a lone vertebra the soft field counts about as much as the vertebra."""

LEAST_DETERMINANT = 0.1
"""More steps are taken along the motions until the Jacobian determinant of the field stays above this."""

LEAST_SCORE, LEAST_IN_VIEW, MAX_APART_MM = 0.3, 0.5, 5.0
"""Limits of the flags: variance of the MR explained by the CT, share of a vertebra in the MR, motion of neighbours."""

_OUTLIER_MM = 0.5
_FIT_TURNS = 5
_LEAST_VOXELS, _MAX_VOXELS = 50, 20_000
_COVER = 0.5  # voxels by which rigid motion exceeds the label, for MR voxels that the surface cuts
_TOUCH_MM = 1e-3
_STEPS = (2, 4, 8)
_FRAME_MM, _THIN_MM = 20.0, 1.2
_ORDER = (*LEVEL_ORDER, VERSE_LABELS["S1"], VERSE_LABELS["Co"])


@dataclass(frozen=True)
class Registration:
    """Result for one pair.

    Attributes
    ----------
    field : DisplacementField
        MR to CT, on the MR's grid.
    inverse : DisplacementField
        CT to MR, on the CT's grid.
    transforms : dict of int to ndarray (4, 4)
        Rigid motion of each vertebra, MR world mm to CT world mm.
    flags : DataFrame
        See `refine`.
    seconds : float
    """

    field: DisplacementField
    inverse: DisplacementField
    transforms: dict[int, np.ndarray]
    flags: pd.DataFrame
    seconds: float


def register_polyrigid(
    ct: Volume, ct_labels: Volume, mr: Volume, soft: DisplacementField | None = None, valid: Volume | None = None
) -> Registration:
    """Register a CT to an MR image.

    Parameters
    ----------
    ct, ct_labels : Volume
        HU and VerSe labels on one grid.
    mr : Volume
        Signal in any unit.
    soft : DisplacementField, optional
        A deformable registration, MR to CT, for the start of the vertebrae and for tissue far from them. By default
        vertebrae start where the headers place them or where mutual information of the whole spine does, whichever
        explains the MR better, and far tissue follows their common motion.
    valid : Volume, optional
        On the MR's grid, 1 where it was acquired; everywhere by default.

    Raises
    ------
    InputError
        Without a vertebra, or if the two images do not show the same part of the spine.
    """
    begin = time.perf_counter()
    if soft is None:
        rough, guess = placements(ct, ct_labels, mr)
        starts = dict.fromkeys(_labels_of(ct_labels), rough)
    else:
        starts, guess = vertebra_transforms(soft, ct_labels), None
    transforms, flags = refine(starts, ct, ct_labels, mr, valid, guess)
    if soft is None:
        soft = DisplacementField.rigid(_common_motion(transforms, ct_labels), mr.grid)
    field = blend(transforms, ct_labels, soft, mr.grid)
    return Registration(field, field.inverse(ct.grid), transforms, flags, time.perf_counter() - begin)


def vertebra_transforms(field: DisplacementField, ct_labels: Volume) -> dict[int, np.ndarray]:
    """Return the rigid motion of each labelled vertebra that lies nearest to a deformable field.

    Pairs of points are the voxel centres of the CT label and where the inverse field puts them in the MR; those off the
    field's grid count only if too few are on it. Least squares are repeated with Cauchy weights against outliers.

    Parameters
    ----------
    field : DisplacementField
        MR to CT, on the MR grid.
    ct_labels : Volume
        VerSe labels; 0 background. Labels of less than 50 voxels are left out.

    Returns
    -------
    dict of int to ndarray (4, 4)
        MR world mm to CT world mm, cranial to caudal.

    Raises
    ------
    InputError
        Without a vertebra.
    """
    names = _labels_of(ct_labels)
    labels = framed(ct_labels, ct_labels.values > 0)
    inverse = field.inverse(labels.grid)
    transforms = {}
    for label in names:
        index = np.argwhere(labels.values == label)
        index = index[:: max(1, len(index) // _MAX_VOXELS)]
        ct_points = apply_affine(labels.affine, index)
        mr_points = ct_points + inverse.values[tuple(index.T)]
        seen = _inside(mr_points, field.grid)
        if np.count_nonzero(seen) >= _LEAST_VOXELS:
            ct_points, mr_points = ct_points[seen], mr_points[seen]
        transforms[label] = _robust_fit(mr_points, ct_points)
    return transforms


def refine(
    transforms: dict[int, np.ndarray],
    ct: Volume,
    ct_labels: Volume,
    mr: Volume,
    valid: Volume | None = None,
    guess: np.ndarray | None = None,
) -> tuple[dict[int, np.ndarray], pd.DataFrame]:
    """Return better motions of all vertebrae, found in the images together (`spinelib.models.pose_fit`).

    Parameters
    ----------
    transforms : dict of int to ndarray (4, 4)
        Starts, MR to CT; up to about 12 mm and 10 degrees off.
    ct, ct_labels, mr : Volume
    valid : Volume, optional
        On the MR's grid, 1 where it was acquired; everywhere by default.
    guess : ndarray (4, 4), optional
        One more pose, of all vertebrae, to look around.

    Returns
    -------
    transforms : dict of int to ndarray (4, 4)
    flags : DataFrame
        One row per vertebra: label, level; score_start and score, the share of the variance of the MR signal around it
        that the CT explains; in_view, the share of it that the MR shows; moved_mm, how far its centre moved from the
        start; apart_mm, how far it and its neighbours disagree on the tissue between them; reason, why not to trust
        the result, empty if there is none.
    """
    starts = {label: transforms[label] for label in sorted(transforms, key=_ORDER.index)}
    ct, ct_labels = _thinned(ct), _thinned(ct_labels)
    near = np.isin(ct_labels.values, list(starts))
    image, labels = (framed(volume, near, _FRAME_MM) for volume in (ct, ct_labels))
    poses, scores = fit_poses(image, labels, mr, valid, starts, guess)
    centres = ndimage.center_of_mass(near, ct_labels.values, list(starts))
    centres_mm = dict(zip(starts, apply_affine(ct_labels.affine, centres), strict=True))
    return poses, _flags(starts, poses, scores, centres_mm)


def blend(
    transforms: dict[int, np.ndarray], ct_labels: Volume, soft: DisplacementField | None, grid: VolumeGrid
) -> DisplacementField:
    """Return one field that is rigid in every vertebra and smooth between them.

    A point is led from the MR to the CT in N equal steps x <- x + sum_k w_k (exp(log(T_k) / N) x - x) + (1 - sum_k w_k)
    u_soft / N with w_k = a_k / (sum_j a_j + b), a_k = (1 / d_k - 1 / REACH_MM)^2, where d_k is the distance of
    exp((1 - t) log T_k) x to bone k in the CT, the place that bone k would take the point to from the moment t on. In
    bone k w_k is 1, so the steps add up to T_k. N grows until the field does not fold, up to 8.

    Parameters
    ----------
    transforms : dict of int to ndarray (4, 4)
        MR to CT of each label.
    ct_labels : Volume
    soft : DisplacementField, optional
        What tissue far from bone does, MR to CT; it rests by default.
    grid : VolumeGrid
        Of the MR image.
    """
    points = grid_points_mm(grid)
    still = np.zeros_like(points) if soft is None else soft.resampled(grid).values
    thin = _thinned(ct_labels)
    bones = [_Bone.of(thin, label, matrix, grid) for label, matrix in transforms.items()]
    points, still = torch.from_numpy(points), torch.from_numpy(still).double()
    for steps in _STEPS:
        field = DisplacementField((_led(points, bones, still, steps) - points).numpy(), grid)
        if min(grid.shape) < 2 or np.linalg.det(field.jacobian()).min() > LEAST_DETERMINANT:
            break
    return field


# --- blending ---


@dataclass(frozen=True)
class _Bone:
    """One vertebra on its way.

    Attributes
    ----------
    velocity : ndarray (4, 4)
        Logarithm of its motion.
    distance : Tensor (1, 1, R, A, S)
        Signed distance in mm to the faces of the label's voxels, less than 0 inside, in a box around it.
    to_unit : ndarray (4, 4)
        From CT world mm to (superior, anterior, right) from -1 to 1 in this box.
    cover_mm : float
        Largest distance from the label at which motion is still rigid.
    window : tuple of slice
        Part of the MR's grid that the box covers.
    """

    velocity: np.ndarray
    distance: torch.Tensor
    to_unit: np.ndarray
    cover_mm: float
    window: tuple[slice, slice, slice]

    @classmethod
    def of(cls, labels, label, matrix, grid):
        """Measure a vertebra of the CT."""
        bone = signed_distance(labels, label, REACH_MM)
        shape = bone.values.shape
        to_unit = np.diag([*(2 / (np.array(shape) - 1)), 1.0]) @ np.linalg.inv(bone.affine)
        to_unit[:3, 3] -= 1
        window = _window(np.linalg.inv(grid.affine) @ np.linalg.inv(matrix) @ bone.affine, shape, grid.shape)
        distance = torch.from_numpy(bone.values).float()[None, None]
        return cls(np.real(logm(matrix)), distance, to_unit[[2, 1, 0, 3]], _COVER * bone.spacing_mm.min(), window)

    def distances(self, points, left):
        """Return the distances (r, a, s) of points from where the share `left` of the motion still takes them."""
        unit = _carried(self.to_unit @ expm(left * self.velocity), points).float()
        sampled = grid_sample(self.distance, unit[None], padding_mode="border", align_corners=True)[0, 0]
        return torch.where((unit.abs() <= 1).all(dim=-1), sampled, torch.full_like(sampled, REACH_MM))


def _led(points, bones, still, steps):
    """Return MR points (R, A, S, 3) led to the CT."""
    for step in range(steps):
        distances = torch.full((len(bones), *points.shape[:3]), REACH_MM)
        for distance, bone in zip(distances, bones, strict=True):
            distance[bone.window] = bone.distances(points[bone.window], 1 - step / steps)
        weights = _weights(distances, [bone.cover_mm for bone in bones]).double()
        moved = points + (1 - weights.sum(dim=0))[..., None] * still / steps
        for weight, bone in zip(weights, bones, strict=True):
            here = points[bone.window]
            moved[bone.window] += weight[bone.window][..., None] * (_carried(expm(bone.velocity / steps), here) - here)
        points = moved
    return points


def _weights(distances, covers):
    """Return the weights (k, ...) of vertebrae at distances (k, ...)."""
    two = distances.topk(min(2, len(distances)), dim=0, largest=False).values
    for distance, cover in zip(distances, covers, strict=True):
        other = torch.where(distance > two[0], two[0], two[-1]) if len(distances) > 1 else distance + 2 * cover
        distance -= ((other - distance) / 2).clamp(0, cover)  # no farther than halfway to the next bone
    near = (1 / distances.clamp(min=_TOUCH_MM) - 1 / REACH_MM).clamp(min=0) ** 2
    return near / (near.sum(dim=0) + (1 / SOFT_MM - 1 / REACH_MM) ** 2)


def _carried(matrix, points):
    matrix = torch.from_numpy(np.ascontiguousarray(matrix))
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _window(to_index, shape, whole):
    """Return the slices of a grid of shape `whole` that hold a box of voxels, given voxel to index of the grid."""
    index = VolumeGrid(shape, to_index).corners_mm()
    lower = np.clip(np.floor(index.min(axis=0)).astype(int), 0, whole)
    upper = np.clip(np.ceil(index.max(axis=0)).astype(int) + 1, 0, whole)
    return tuple(map(slice, lower, upper))


# --- labels ---


def _labels_of(ct_labels) -> list[int]:
    """Return the labels that are large enough, cranial to caudal."""
    labels, counts = np.unique(ct_labels.values, return_counts=True)
    present = {int(label) for label, count in zip(labels, counts, strict=True) if label and count >= _LEAST_VOXELS}
    unknown = present - set(LEVEL_OF_LABEL)
    if unknown or not present:
        given = f"labels {sorted(unknown)}" if unknown else "no label"
        message = (
            f"the CT labels hold {given} of {_LEAST_VOXELS} voxels or more. Expected VerSe labels, 1 to 28. "
            "Fix: check the file of the labels."
        )
        raise InputError(message)
    return sorted(present, key=_ORDER.index)


def _thinned(volume) -> Volume:
    """Return every second, third, ... voxel along axes of very fine spacing."""
    stride = np.maximum(np.round(_THIN_MM / volume.spacing_mm).astype(int), 1)
    affine = volume.affine @ np.diag([*stride, 1.0])
    return Volume(volume.values[tuple(slice(None, None, int(step)) for step in stride)], affine)


# --- poses ---


def _common_motion(transforms, ct_labels):
    """Return the one rigid motion, MR to CT, that lies nearest to all vertebrae."""
    ct_points = {
        label: apply_affine(ct_labels.affine, np.argwhere(ct_labels.values == label)[::9]) for label in transforms
    }
    mr_points = [apply_affine(np.linalg.inv(transforms[label]), points) for label, points in ct_points.items()]
    return rigid_fit(np.concatenate(mr_points), np.concatenate(list(ct_points.values())))


def _robust_fit(x, y):
    weights = np.ones(len(x))
    for _ in range(_FIT_TURNS):
        matrix = rigid_fit(x, y, weights)
        misfit = np.linalg.norm(apply_affine(matrix, x) - y, axis=-1)
        weights = 1 / (1 + (misfit / max(_OUTLIER_MM, np.median(misfit))) ** 2)
    return matrix


def _inside(points, grid):
    index = apply_affine(np.linalg.inv(grid.affine), points)
    return ((index >= 0) & (index <= np.array(grid.shape) - 1)).all(axis=-1)


def _flags(starts, poses, scores, centres_mm) -> pd.DataFrame:
    """Return the table of `refine`; `centres_mm` are of the vertebrae in the CT."""
    back = {label: np.linalg.inv(pose) for label, pose in poses.items()}
    rows = []
    for number, label in enumerate(poses):
        centre = centres_mm[label]
        neighbours = [other for i, other in enumerate(poses) if abs(i - number) == 1]
        places = [(centre + centres_mm[other]) / 2 for other in neighbours]
        gaps = [
            np.linalg.norm(apply_affine(back[label], place) - apply_affine(back[other], place))
            for other, place in zip(neighbours, places, strict=True)
        ]
        start, score, in_view = scores[number]
        moved = apply_affine(back[label], centre) - apply_affine(np.linalg.inv(starts[label]), centre)
        row = {"label": label, "level": LEVEL_OF_LABEL[label], "score_start": start, "score": score}
        row |= {"in_view": in_view, "moved_mm": np.linalg.norm(moved), "apart_mm": max(gaps, default=0.0)}
        rows.append(row | {"reason": _reason(row)})
    return pd.DataFrame(rows)


def _reason(row) -> str:
    if row["in_view"] < LEAST_IN_VIEW:
        return f"the MR shows {100 * row['in_view']:.0f} % of it (at least {100 * LEAST_IN_VIEW:.0f} %)"
    if row["score"] < LEAST_SCORE:
        return f"the CT explains {row['score']:.2f} of the MR's variance around it (at least {LEAST_SCORE})"
    if row["apart_mm"] > MAX_APART_MM:
        return f"it and a neighbour differ by {row['apart_mm']:.1f} mm (at most {MAX_APART_MM})"
    return ""
