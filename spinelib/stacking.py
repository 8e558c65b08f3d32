"""Predicted vertebrae to one spine: shapes at their places, frames from shapes, collisions, angles.

Each vertebra comes as a cube of probabilities around its body centre, which was found in two radiographs
(`spinelib.imaging.cone_beam.triangulate`; `stack_naively` is the paper's way). Cubes are laid over one grid; where
two vertebrae claim a voxel the larger probability keeps it, and the volume that both claimed is reported.

Frames come from shapes. The symmetric mean vertebra of a level, whose frame is known, is turned, moved and scaled
along its three axes until its surface lies on the surface found (least squares on the signed distance, Cauchy loss,
from the best of 45 turns; the idea of Fitzgibbon 2003, Image Vis Comput 21:1145). Measured on true shapes of ten
standing phantoms, 170 vertebrae at 1.5 mm: 0.35 degrees coronal, 0.55 sagittal, 0.35 of axial rotation (mean absolute
errors; largest 2.0), and so 0.3 degrees of the Cobb angle: floors that no prediction can be expected to undercut. A
vertebra takes 0.1 s. Without processes the fit says little: true bodies alone are 1.5 degrees off coronally and 12 in
rotation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product

import numpy as np
import pandas as pd
import torch
import trimesh
from jaxtyping import Float
from scipy import ndimage
from scipy.optimize import least_squares
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from spinelib.angles import all_angles
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.labels import curves_from_labels
from spinelib.imaging.radiograph_pairs import BEHIND_MM, CUBE_MM, cube_affine
from spinelib.imaging.surfaces import vertebra_meshes
from spinelib.levels import T1_TO_L5, VERSE_LABELS
from spinelib.phantom.population import sample_subject
from spinelib.phantom.scoliosis import body_rotation_deg
from spinelib.phantom.vertebra import vertebra_mesh, vertebra_sdf, vertebra_shapes
from spinelib.spine import Curves, Spine

GRID_MM = 1.0
"""Voxels of the joint grid. Surfaces of true shapes that pass through it are 0.2 mm off on average."""

FOREGROUND = 0.5
"""Probability from which a voxel belongs to a vertebra."""

_TYPICAL_PEOPLE = 16  # whose mean sizes make the templates
_TEMPLATE_MM, _TEMPLATE_POINTS = 2.0, 400  # marching cubes; points on one side of the mirror plane
_BODY_WEIGHT, _BODY_SKIN_MM = 2.0, 1.0  # bodies vary less than processes and carry the end plates
_OUTLIER_MM, _LOST_MM = 3.0, 8.0  # of the fit, and of the search for its start
_STARTS = Rotation.from_euler("xyz", list(product((-30, -15, 0, 15, 30), (-20, 0, 20), (-25, 0, 25))), degrees=True)
_SCALE_STIFFNESS_MM = 0.9  # per template point; pulls the scales to 1


@dataclass(frozen=True)
class PredictedVertebra:
    """One vertebra as a network gives it.

    Attributes
    ----------
    level : str
    centre_mm : ndarray (3,)
        Centre of the body, world RAS mm; it places the cube, see `imaging.radiograph_pairs.cube_affine`.
    probability : ndarray (64, 64, 64)
        0 to 1, axes right, anterior, superior, voxels of `CUBE_MM`.
    rotation : ndarray (3, 3), optional
        Axes of the vertebra (right, anterior, superior) as columns, if the network tells; else from the shape.
    """

    level: str
    centre_mm: np.ndarray
    probability: np.ndarray
    rotation: np.ndarray | None = None

    @property
    def affine(self) -> Float[np.ndarray, "4 4"]:
        """From voxel index to world mm."""
        return cube_affine(self.centre_mm)


@dataclass(frozen=True)
class Stack:
    """A spine put together from single vertebrae.

    Attributes
    ----------
    spine : Spine
    labels : Volume
        VerSe labels on voxels of `GRID_MM`, no voxel twice.
    contacts : DataFrame
        One row a pair of neighbours: upper, lower, overlap_mm3 (volume that both claimed) and gap_mm (least distance of
        the two surfaces, at the accuracy of the grid).
    """

    spine: Spine
    labels: Volume
    contacts: pd.DataFrame


def stack(vertebrae: Sequence[PredictedVertebra], source: str = "") -> Stack:
    """Put vertebrae together.

    Parameters
    ----------
    vertebrae : sequence of PredictedVertebra
        In any order, at most one of each level.
    source : str
        Goes to `Spine.source`.

    Returns
    -------
    Stack
        The spine has frames, surfaces, `vertebral_angles`, and curves where the bodies can be outlined; if it runs from
        T1 to L5 also the angles of its centre curve (`spinelib.angles.all_angles`).

    Raises
    ------
    InputError
        Without a vertebra, for a level twice or outside T1 to L5, for an empty prediction, or for a vertebra that
        others cover wholly.
    """
    ordered = _checked(vertebrae)
    levels = tuple(v.level for v in ordered)
    labels, overlaps = joined(ordered)
    meshes = vertebra_meshes(labels)
    covered = [level for level in levels if level not in meshes]
    if covered:
        message = f"{', '.join(covered)} lies wholly inside its neighbours. Fix: check the centroids of these levels."
        raise InputError(message)
    poses = np.stack([vertebral_pose(v) for v in ordered])
    curves, angles = _curves(labels, levels), vertebral_angles(levels, poses)
    if curves is not None and levels == T1_TO_L5:
        angles |= all_angles(curves)
    spine = Spine(levels, poses, tuple(meshes[level] for level in levels), curves, None, angles, source)
    return Stack(spine, labels, _contacts(meshes, overlaps))


def joined(vertebrae: Sequence[PredictedVertebra]) -> tuple[Volume, list[float]]:
    """Return labels on the joint grid, and the volume in mm3 that each vertebra and the next one both claimed."""
    lower = np.array([v.affine[:3, 3] for v in vertebrae])
    upper = lower + [CUBE_MM * (np.array(v.probability.shape) - 1) for v in vertebrae]
    grid = VolumeGrid.from_bounds(lower.min(axis=0), upper.max(axis=0), GRID_MM)
    owner, best = np.zeros(grid.shape, np.uint8), np.zeros(grid.shape, np.float32)
    above, overlaps = np.zeros(grid.shape, bool), []
    for vertebra in vertebrae:
        window, probability = _sampled(vertebra, grid)
        claim = probability >= FOREGROUND
        overlaps.append(np.count_nonzero(claim & above[window]) * GRID_MM**3)
        above[:] = False
        above[window] = claim
        wins = claim & (probability > best[window])
        owner[window][wins] = VERSE_LABELS[vertebra.level]
        best[window][wins] = probability[wins]
    return Volume(owner, grid.affine), overlaps[1:]


def vertebral_pose(vertebra: PredictedVertebra) -> Float[np.ndarray, "4 4"]:
    """Return the body-centre frame of a vertebra to world RAS mm.

    It is fitted to the shape, see the module's text, unless the vertebra comes with its rotation.
    """
    pose = np.eye(4)
    if vertebra.rotation is not None:
        pose[:3, :3], pose[:3, 3] = vertebra.rotation, vertebra.centre_mm
        return pose
    points, weights = _template(vertebra.level)
    distance = _signed_distance(vertebra.probability >= FOREGROUND)
    body = (np.array(distance.shape) - 1) / 2 + [0.0, BEHIND_MM / CUBE_MM, 0.0]  # voxel of the body centre

    def distances(placed):
        return ndimage.map_coordinates(distance, (placed / CUBE_MM + body).T, order=1, mode="nearest")

    def residuals(parameters):
        turn, shift, log_scale = np.split(parameters, 3)
        placed = (points * np.exp(log_scale)) @ Rotation.from_rotvec(turn).as_matrix().T + shift
        return np.concatenate([weights * distances(placed), _SCALE_STIFFNESS_MM * np.sqrt(len(points)) * log_scale])

    turned = (points @ _STARTS.as_matrix().transpose(0, 2, 1)).reshape(-1, 3)
    misfit = np.minimum(np.abs(distances(turned)), _LOST_MM).reshape(len(_STARTS), -1).mean(axis=1)
    start = np.concatenate([_STARTS[int(misfit.argmin())].as_rotvec(), np.zeros(6)])
    steps = np.repeat([0.1, 1.0, 0.1], 3)  # radians, mm, logarithms of scales
    best = least_squares(residuals, start, loss="cauchy", f_scale=_OUTLIER_MM, x_scale=steps, max_nfev=40).x
    pose[:3, :3] = Rotation.from_rotvec(best[:3]).as_matrix()
    pose[:3, 3] = vertebra.centre_mm + best[3:6]
    return pose


def vertebral_angles(levels: Sequence[str], poses: Float[np.ndarray, "n 4 4"]) -> dict[str, float]:
    """Return the angles of body frames in degrees; those whose levels are missing are left out.

    A frame lies midway between the plates of its body, so half the wedge of each end vertebra separates these angles
    from those of end plates. Angles of centre curves (`spinelib.angles`) differ more; do not mix them in one table.

    Returns
    -------
    dict of str to float
        vertebral_cobb_deg : largest difference of the coronal tilts of two levels;
        vertebral_kyphosis_deg, vertebral_lordosis_deg : T4 to T12 and L1 to L5, both positive in an ordinary adult;
        rotation_<level>_deg : axial rotation, positive when the body faces the patient's right;
        apical_rotation_deg : that of the vertebra farthest from the line through the two of the Cobb angle.
    """
    coronal, sagittal = (np.degrees(np.arctan2(poses[:, axis, 2], poses[:, 2, 2])) for axis in (0, 1))
    rotation = [body_rotation_deg(pose) for pose in poses]
    ends = sorted((int(coronal.argmin()), int(coronal.argmax())))
    angles = {f"rotation_{level}_deg": turn for level, turn in zip(levels, rotation, strict=True)}
    angles |= {
        "vertebral_cobb_deg": float(np.ptp(coronal)),
        "apical_rotation_deg": rotation[_apex(poses[:, :3, 3], *ends)],
    }
    lean = dict(zip(levels, sagittal, strict=True))
    for name, upper, lower, sign in (("kyphosis", "T4", "T12", 1), ("lordosis", "L1", "L5", -1)):
        if upper in lean and lower in lean:
            angles[f"vertebral_{name}_deg"] = float(sign * (lean[upper] - lean[lower]))
    return angles


# --- the joint grid ---


def _checked(vertebrae) -> list[PredictedVertebra]:
    """Return the vertebrae cranial to caudal."""
    levels = [v.level for v in vertebrae]
    if not levels or not set(levels) <= set(T1_TO_L5) or len(set(levels)) < len(levels):
        message = (
            f"expected different levels from {T1_TO_L5[0]} to {T1_TO_L5[-1]}, given: {', '.join(levels) or 'none'}."
        )
        raise InputError(message)
    empty = [v.level for v in vertebrae if not (v.probability >= FOREGROUND).any()]
    if empty:
        message = f"no voxel of {', '.join(empty)} reaches a probability of {FOREGROUND}: there is no shape to place."
        raise InputError(message)
    return sorted(vertebrae, key=lambda v: T1_TO_L5.index(v.level))


def _sampled(vertebra, grid) -> tuple[tuple[slice, ...], np.ndarray]:
    """Return where a cube lies in the grid and its probabilities there (linear)."""
    shift = vertebra.affine[:3, 3] - grid.affine[:3, 3]
    size = np.array(vertebra.probability.shape)
    first = np.ceil(shift / GRID_MM).astype(int)
    last = np.minimum(np.floor((shift + CUBE_MM * (size - 1)) / GRID_MM).astype(int), np.array(grid.shape) - 1)
    ratio, start = GRID_MM / CUBE_MM, (first * GRID_MM - shift) / CUBE_MM
    values = ndimage.affine_transform(
        vertebra.probability.astype(np.float32), [ratio] * 3, start, tuple(last - first + 1), order=1, mode="nearest"
    )
    return tuple(slice(a, b + 1) for a, b in zip(first, last, strict=True)), values


def _contacts(meshes, overlaps) -> pd.DataFrame:
    rows = [
        {
            "upper": upper,
            "lower": lower,
            "overlap_mm3": overlap,
            "gap_mm": float(cKDTree(meshes[upper].vertices).query(meshes[lower].vertices)[0].min()),
        }
        for (upper, lower), overlap in zip(pairwise(meshes), overlaps, strict=True)
    ]
    return pd.DataFrame(rows, columns=["upper", "lower", "overlap_mm3", "gap_mm"])


def _curves(labels, levels) -> Curves | None:
    """Return the curves of the bodies, None where they cannot be outlined."""
    try:
        return curves_from_labels(labels, [VERSE_LABELS[level] for level in levels])
    except InputError:
        return None


# --- frames ---


@cache
def _template(level: str) -> tuple[np.ndarray, np.ndarray]:
    """Return points (n, 3) on the symmetric mean vertebra of a level, in its body frame, and their weights (n,)."""
    sizes = _typical_sizes()
    shape = vertebra_shapes((level,), {name: values[[T1_TO_L5.index(level)]] for name, values in sizes.items()}, 0)[0]
    half, _ = trimesh.sample.sample_surface(vertebra_mesh(shape, _TEMPLATE_MM), _TEMPLATE_POINTS, seed=0)
    to_body = vertebra_sdf(shape, torch.from_numpy(half.astype(np.float32)))[0].numpy()
    weights = np.where(to_body < _BODY_SKIN_MM, _BODY_WEIGHT, 1.0)
    return np.concatenate([half, half * [-1, 1, 1]]), np.tile(weights, 2)


@cache
def _typical_sizes() -> dict[str, np.ndarray]:
    """Return the mean dimensions of the levels over a few people."""
    people = [sample_subject(seed, variants=False) for seed in range(_TYPICAL_PEOPLE)]
    rows = [people[0].index(level) for level in T1_TO_L5]
    return {name: np.mean([person.dims[name][rows] for person in people], axis=0) for name in people[0].dims}


def _signed_distance(mask) -> np.ndarray:
    """Return the distance in mm to the surface of a mask, negative inside."""
    outside, inside = (ndimage.distance_transform_edt(side) for side in (~mask, mask))
    return (CUBE_MM * (outside - inside)).astype(np.float32)


def _apex(centres, first, last) -> int:
    """Return which of the centres from `first` to `last` lies farthest right or left of the line through these two."""
    (bottom, top), span = centres[[last, first]], slice(first, last + 1)
    chord = np.interp(centres[span, 2], [bottom[2], top[2]], [bottom[0], top[0]])
    return first + int(np.abs(centres[span, 0] - chord).argmax())
