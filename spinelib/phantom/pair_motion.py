"""True motion between an MR and a CT of one person: rigid vertebrae, and soft tissue that follows them.

The spine bends from one couch to the other. Each vertebra moves rigidly, `transforms[k]` takes its points in the MR to
the CT. Soft tissue is at rest where the Laplacian of the displacement vanishes, with the vertebrae and a smooth motion
of the border of the box as boundary values, and moves on its own by a smooth random part that vanishes at bone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from nibabel.affines import apply_affine
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg
from scipy.spatial.transform import Rotation

from spinelib.deformation import DisplacementField, grid_points_mm
from spinelib.geometry import VolumeGrid
from spinelib.phantom.fields import smooth_field
from spinelib.phantom.render import GAP_MM
from spinelib.phantom.vertebra import VertebraShape, vertebra_sdf

NODE_MM = 2.5
"""Spacing of the grid on which the Laplacian is solved."""

_BEND_DEG = np.array([1.3, 0.8, 0.4])  # a joint's share of the common bend: forward, aside, about the axis (SD)
_JOINT_DEG = np.array([0.7, 0.5, 0.3])  # of one joint alone
_JOINT_MM = 0.2
_WHOLE_DEG, _WHOLE_MM = 2.3, 2.3  # what a rigid alignment of the images leaves
_BORDER_MM, _BORDER_LENGTH_MM = 1.5, 60.0
_SOFT_MM, _SOFT_LENGTH_MM, _SOFT_FREE_MM = 1.2, 30.0, 12.0
_SHELL_MM = 2.5
_MARGIN_MM = 10.0


@dataclass(frozen=True)
class Bones:
    """Vertebrae (and sacrum) of a CT, cranial to caudal.

    Attributes
    ----------
    labels : tuple of int
    shapes : tuple of VertebraShape
    poses : ndarray (n, 4, 4)
        From the frame of a vertebra to the world of the CT.
    joints_mm : ndarray (n - 1, 3)
        Centres of rotation between neighbours, CT world mm.
    """

    labels: tuple[int, ...]
    shapes: tuple[VertebraShape, ...]
    poses: np.ndarray
    joints_mm: np.ndarray

    def distance(self, number: int, points_mm: np.ndarray) -> np.ndarray:
        """Return the signed distance (mm) of CT points (..., 3) to a vertebra."""
        local = apply_affine(np.linalg.inv(self.poses[number]), points_mm).astype(np.float32)
        parts = torch.from_numpy(local.reshape(-1, 3)).split(16384)
        return torch.cat([vertebra_sdf(self.shapes[number], p)[1] for p in parts]).numpy().reshape(local.shape[:-1])

    def bounds_mm(self, number: int) -> np.ndarray:
        """Return the corners (8, 3) of a vertebra's box, CT world mm."""
        corners = np.stack(np.meshgrid(*self.shapes[number].bounds_mm, indexing="ij"), -1).reshape(-1, 3)
        return apply_affine(self.poses[number], corners)


@dataclass(frozen=True)
class Motion:
    """Motion of all tissue of one person.

    Attributes
    ----------
    bones : Bones
    transforms : ndarray (n, 4, 4)
        MR world mm to CT world mm, of each bone.
    soft : DisplacementField
        Of soft tissue, on a coarse grid of the MR's world.
    """

    bones: Bones
    transforms: np.ndarray
    soft: DisplacementField

    def at(self, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return displacements (R, A, S, 3), mm, of MR points (R, A, S, 3) of a box, and how many bones claim each.

        Over `_SHELL_MM` outside a bone its own motion passes into that of the coarse grid, without a jump.
        """
        moved, weight = self.soft.at(points_mm).astype(float), np.ones(points_mm.shape[:3])
        claims, rigid = np.zeros(points_mm.shape[:3], np.uint8), []
        for window, distance, inside, shift in near_bones(self.bones, self.transforms, points_mm, _SHELL_MM):
            claims[window] += inside
            rigid.append((window, inside, shift))
            share = np.clip(1 - distance / _SHELL_MM, 0, 1) ** 2
            pull = share / (1.001 - share)
            moved[window] += pull[..., None] * shift
            weight[window] += pull
        moved /= weight[..., None]
        for window, inside, shift in rigid:
            moved[window][inside] = shift[inside]
        return moved, claims


def near_bones(bones: Bones, transforms: np.ndarray, points_mm: np.ndarray, margin_mm: float):
    """Yield (window, distance, inside, displacement) of every bone near MR points (R, A, S, 3) of a box."""
    axes = points_mm[:, 0, 0, 0], points_mm[0, :, 0, 1], points_mm[0, 0, :, 2]
    for number, transform in enumerate(transforms):
        corners = apply_affine(np.linalg.inv(transform), bones.bounds_mm(number))
        low, high = corners.min(0) - margin_mm, corners.max(0) + margin_mm
        window = tuple(slice(*np.searchsorted(a, [b, c])) for a, b, c in zip(axes, low, high, strict=True))
        points = points_mm[window]
        if points.size:
            source = apply_affine(transform, points)
            distance = bones.distance(number, source)
            yield window, distance, _belongs(bones, number, source, distance), source - points


def _belongs(bones, number, points_mm, distance):
    """Whether CT points belong to a vertebra: inside, and the next vertebra at least `GAP_MM` farther."""
    own = distance < 0
    for other in (number - 1, number + 1):
        if 0 <= other < len(bones.labels):
            own[own] = bones.distance(other, points_mm[own]) - distance[own] > GAP_MM
    return own


def sample_transforms(
    rng: np.random.Generator, bones: Bones, centre_mm, amount: float, joints: np.ndarray
) -> np.ndarray:
    """Draw how each bone moved, (n, 4, 4) from MR to CT world mm.

    A rigid motion of the whole person, then in every joint the common bend and a turn and shift of its own: neighbours
    move alike, and more differently the farther they are apart.

    Parameters
    ----------
    rng : numpy.random.Generator
    bones : Bones
    centre_mm : (3,) array-like
        The bone nearest to it has the motion of the whole.
    amount : float
        Factor on all angles and shifts.
    joints : ndarray (n - 1,)
        Factor on each joint.
    """
    count = len(bones.labels)
    whole = rng.standard_normal(6)
    bend = rng.standard_normal(3) * _BEND_DEG
    own = rng.standard_normal((max(count - 1, 0), 6))
    middle = int(np.argmin(np.linalg.norm(bones.poses[:, :3, 3] - centre_mm, axis=1)))
    shift = amount * _WHOLE_MM * whole[3:]
    to_mr = {middle: _turned(centre_mm, amount * _WHOLE_DEG * whole[:3], shift)}
    steps = [
        _turned(joint, factor * amount * (bend + _JOINT_DEG * draw[:3]), factor * amount * _JOINT_MM * draw[3:])
        for joint, draw, factor in zip(bones.joints_mm, own, joints, strict=True)
    ]
    for number in range(middle - 1, -1, -1):
        to_mr[number] = to_mr[number + 1] @ steps[number]
    for number in range(middle + 1, count):
        to_mr[number] = to_mr[number - 1] @ np.linalg.inv(steps[number - 1])
    return np.stack([np.linalg.inv(to_mr[number]) for number in range(count)])


def solve_motion(
    rng: np.random.Generator, bones: Bones, transforms: np.ndarray, box: VolumeGrid, amount: float
) -> Motion:
    """Let soft tissue in and around an MR's box follow its bones.

    Parameters
    ----------
    rng : numpy.random.Generator
    bones : Bones
    transforms : ndarray (n, 4, 4)
        Of `sample_transforms`.
    box : VolumeGrid
        Axis-aligned grid of the MR.
    amount : float
        Factor on the random part.
    """
    axes = box.axes_mm()
    grid = VolumeGrid.from_bounds([a[0] - _MARGIN_MM for a in axes], [a[-1] + _MARGIN_MM for a in axes], NODE_MM)
    points = grid_points_mm(grid)
    fixed = np.zeros(grid.shape, bool)
    start = _bent(bones, transforms, points)
    for window, distance, _, shift in near_bones(bones, transforms, points, NODE_MM):
        fixed[window] |= distance < 0
        start[window][distance < 0] = shift[distance < 0]
    free_mm = ndimage.distance_transform_edt(~fixed, sampling=grid.spacing_mm)
    away = (1 - np.exp(-((free_mm / _SOFT_FREE_MM) ** 2)))[..., None]
    start += amount * _BORDER_MM * away * _random_vectors(rng, grid, _BORDER_LENGTH_MM)
    border = np.ones(grid.shape, bool)
    border[1:-1, 1:-1, 1:-1] = False
    values = harmonic(start, fixed | border)
    values += amount * _SOFT_MM * away * _random_vectors(rng, grid, _SOFT_LENGTH_MM)
    return Motion(bones, transforms, DisplacementField(values, grid))


def harmonic(values: np.ndarray, known: np.ndarray, tolerance: float = 1e-4) -> np.ndarray:
    """Return values whose Laplacian vanishes where they are not known.

    Parameters
    ----------
    values : ndarray (R, A, S, C)
        Kept where known, first guess elsewhere.
    known : ndarray (R, A, S), bool
        True on the whole border.
    tolerance : float
        Of the residual, relative to the right-hand side.
    """
    number = np.full(known.shape, -1)
    free = np.flatnonzero(~known)
    number.reshape(-1)[free] = np.arange(len(free))
    strides = np.array(known.strides) // known.itemsize
    flat, guess = number.reshape(-1), values.reshape(-1, values.shape[-1]).astype(float)
    rows, columns, right = [], [], np.zeros((len(free), values.shape[-1]))
    for step in (*strides, *-strides):
        beside = free + step
        inner = flat[beside] >= 0
        rows.append(np.flatnonzero(inner))
        columns.append(flat[beside[inner]])
        right[~inner] += guess[beside[~inner]]
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    matrix = sparse.csr_matrix((-np.ones(len(rows)), (rows, columns)), (len(free), len(free)))
    matrix = matrix + 6 * sparse.identity(len(free), format="csr")
    for channel in range(values.shape[-1]):
        solved, _ = cg(matrix, right[:, channel], guess[free, channel], rtol=tolerance)
        guess[free, channel] = solved
    return guess.reshape(values.shape)


def _bent(bones, transforms, points_mm) -> np.ndarray:
    """Return the displacement of a body that bends with its spine: between bones by height, linearly."""
    centres = _heights_mm(transforms, bones)
    order = np.argsort(centres)
    place = np.interp(points_mm[0, 0, :, 2], centres[order], np.arange(len(order)))
    lower = np.clip(place.astype(int), 0, max(len(order) - 2, 0))
    upper = np.minimum(lower + 1, len(order) - 1)
    share = (place - lower)[:, None, None]
    matrices = transforms[order]
    mixed = matrices[lower] * (1 - share) + matrices[upper] * share
    return np.einsum("sij,rasj->rasi", mixed[:, :3, :3], points_mm) + mixed[:, :3, 3] - points_mm


def _heights_mm(transforms, bones) -> np.ndarray:
    """Return the heights (n,) of the bones in the MR."""
    return np.array(
        [apply_affine(np.linalg.inv(t), pose[:3, 3])[2] for t, pose in zip(transforms, bones.poses, strict=True)]
    )


def _random_vectors(rng, grid, length_mm):
    return np.stack([smooth_field(rng, grid.shape, grid.spacing_mm, length_mm) for _ in range(3)], axis=-1)


def _turned(centre_mm, angles_deg, shift_mm) -> np.ndarray:
    """Rotation about a point by a rotation vector (right, anterior, superior), then a shift."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(angles_deg, degrees=True).as_matrix()
    matrix[:3, 3] = centre_mm - matrix[:3, :3] @ centre_mm + shift_mm
    return matrix
