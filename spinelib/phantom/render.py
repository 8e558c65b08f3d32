"""Sampling of a subject's anatomy: coronal path lengths (fast) and tissue volumes (any grid, any pose).

Both read the same signed distances. A voxel's share of a solid is a logistic function of the distance at its
centre, as wide as the voxel, so thin shells keep their mass on coarse grids.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, VolumeGrid
from spinelib.phantom.organs import Layer
from spinelib.phantom.population import Subject
from spinelib.phantom.solids import Points, Structure
from spinelib.phantom.torso import TISSUES, Anatomy, build_anatomy

APATITE_G_PER_CM3 = 3.156
GAP_MM = 0.6
"""Joint gap: a voxel is labelled only if the second nearest vertebra is at least this much farther."""

_EDGE_MM = 0.35
"""Logistic half-width of a cortical surface before voxel blurring."""
_SOFT_STEP_MM = 6.0
_DEPTH_STEP_MM = 2.0
_BATCH_VOXELS = 1_500_000
_CORNERS = np.stack(np.meshgrid(*[[False, True]] * 3, indexing="ij"), -1).reshape(-1, 3)


@dataclass(frozen=True)
class TissueVolume:
    """Labels and tissue of every voxel of a grid.

    Attributes
    ----------
    labels : ndarray (R, A, S), uint8
        VerSe labels of vertebrae and S1 (26), 0 elsewhere.
    fractions : ndarray (T, R, A, S), float32
        Volume fractions in the order of `tissues`; what is missing to 1 is mineral, gas or air.
    mineral : ndarray (R, A, S), float32
        Hydroxyapatite, g/cm3.
    grid : VolumeGrid
    tissues : tuple of str
    """

    labels: np.ndarray
    fractions: np.ndarray
    mineral: np.ndarray
    grid: VolumeGrid
    tissues: tuple[str, ...] = TISSUES


@dataclass(frozen=True)
class Lattice:
    """Regular grid of sample points: `matrix` (4, 4) carries voxel indices to subject mm."""

    shape: tuple[int, int, int]
    matrix: np.ndarray
    device: torch.device

    @cached_property
    def spacing_mm(self) -> np.ndarray:
        """Voxel size, shape (3,)."""
        return np.linalg.norm(self.matrix[:3, :3], axis=0)

    def edge_mm(self, sharp_mm: float) -> float:
        """Logistic half-width of a surface seen through a voxel: variances of edge and box add."""
        return float(np.sqrt(sharp_mm**2 + (self.spacing_mm**2).mean() / 12 * 3 / np.pi**2))

    def window(self, lower_mm, upper_mm, margin_mm: float) -> tuple[slice, slice, slice] | None:
        """Index box that covers a box in subject mm widened by a margin; None if it misses the lattice."""
        lower, upper = np.asarray(lower_mm) - margin_mm, np.asarray(upper_mm) + margin_mm
        corners = np.where(_CORNERS, upper, lower)
        index = corners @ self._inverse[:3, :3].T + self._inverse[:3, 3]
        first = np.maximum(np.ceil(index.min(0)), 0).astype(int)
        last = np.minimum(np.floor(index.max(0)), np.array(self.shape) - 1).astype(int)
        if np.any(last < first):
            return None
        return tuple(slice(int(a), int(b) + 1) for a, b in zip(first, last, strict=True))

    def points(self, window: tuple[slice, slice, slice]) -> Points:
        """Subject mm of a window's voxels: three tensors that broadcast, short if the matrix is diagonal."""
        axes = []
        for axis, part in enumerate(window):
            shape = [1, 1, 1]
            shape[axis] = -1
            index = torch.arange(part.start, part.stop, dtype=torch.float32, device=self.device)
            axes.append(index.reshape(shape))
        linear, shift = self.matrix[:3, :3], self.matrix[:3, 3].tolist()
        if self._is_diagonal:
            return tuple(axes[i] * float(linear[i, i]) + shift[i] for i in range(3))
        rows = linear.tolist()
        return tuple((axes[0] * r[0] + shift[i]) + axes[1] * r[1] + axes[2] * r[2] for i, r in enumerate(rows))

    @cached_property
    def _inverse(self) -> np.ndarray:
        return np.linalg.inv(self.matrix)

    @cached_property
    def _is_diagonal(self) -> bool:
        linear = self.matrix[:3, :3]
        return np.allclose(linear, np.diag(np.diag(linear)), atol=1e-9)

    def slab(self, start: int, stop: int) -> "Lattice":
        """Return the part with superior index from `start` to `stop` (excluded)."""
        matrix = self.matrix.copy()
        matrix[:3, 3] += start * matrix[:3, 2]
        return Lattice((*self.shape[:2], stop - start), matrix, self.device)


def path_lengths(
    subject: Subject, shapes: tuple, grid: PlanarGrid, device: str | torch.device = "cpu", pose=None
) -> dict[str, np.ndarray]:
    """Integrate a subject's tissue along the anterior-posterior direction.

    Soft tissue is sampled every 6 mm and interpolated; bones, discs and canal are sampled on the pixel grid
    every 2 mm of depth and displace the soft tissue around them.

    Parameters
    ----------
    subject : Subject
    shapes : tuple of VertebraShape
        As made by `vertebra_shapes` for this subject.
    grid : PlanarGrid
        Coronal.
    device : str or torch.device
    pose : ndarray (4, 4), optional
        Rigid motion of the whole body in world mm, as in `tissue_volume`.

    Returns
    -------
    dict of ndarray (rows, cols), float32
        One map per tissue of `TISSUES`, mm, and 'mineral', hydroxyapatite in g/cm2.

    Raises
    ------
    InputError
        If the grid is not coronal or `pose` is not rigid.
    """
    if grid.view != "coronal":
        message = f"path lengths run from front to back: expected a coronal grid, given a {grid.view} one."
        raise InputError(message)
    anatomy = build_anatomy(subject, shapes)
    fine = _image_lattice(anatomy, grid, torch.device(device), _rigid(pose))
    coarse, weights = _soft_lattice(fine)
    fractions = soft_fractions(anatomy.layers, coarse)
    step, depth = float(fine.spacing_mm[1]), float(coarse.spacing_mm[1])
    hard, occupied = _solid_samples(anatomy.bones, fine, anatomy.bone_density, None)
    soft, _ = _solid_samples(anatomy.inlays, fine, 0.0, occupied)
    samples = _Samples(*(torch.cat(pair) for pair in zip(hard, soft, strict=True)))
    column, plane = _columns(samples.index, fine), fine.shape[0] * fine.shape[2]
    maps = _upsample(fractions.sum(2) * depth, weights) - step * _displaced(
        samples, column, fractions, fine, coarse, weights
    )
    filled = samples.share - samples.mineral / APATITE_G_PER_CM3
    maps = maps.clamp(min=0).reshape(-1)
    maps.index_add_(0, samples.channel * plane + column, filled, alpha=step)
    mineral = torch.zeros(plane, device=maps.device).index_add_(0, column, samples.mineral, alpha=step / 10)
    images = torch.cat([maps, mineral]).reshape(-1, fine.shape[0], fine.shape[2]).mT
    return dict(zip((*TISSUES, "mineral"), images.contiguous().cpu().numpy(), strict=True))


def tissue_volume(
    subject: Subject,
    shapes: tuple,
    grid: VolumeGrid,
    pose: np.ndarray | None = None,
    device: str | torch.device = "cpu",
) -> TissueVolume:
    """Sample a subject's tissue on a voxel grid.

    Parameters
    ----------
    subject : Subject
    shapes : tuple of VertebraShape
        As made by `vertebra_shapes` for this subject.
    grid : VolumeGrid
    pose : ndarray (4, 4), optional
        Rigid motion of the whole body in world mm; sampled, not resampled. Default: none.
    device : str or torch.device

    Returns
    -------
    TissueVolume
        A voxel has the label of its nearest vertebra if it lies inside and the next vertebra is at least
        `GAP_MM` farther; each label keeps its largest component.

    Raises
    ------
    InputError
        If `pose` is not a rigid 4 x 4 matrix.
    """
    anatomy = build_anatomy(subject, shapes)
    matrix = _mirror(anatomy) @ np.linalg.inv(_rigid(pose)) @ grid.affine
    lattice = Lattice(tuple(grid.shape), matrix, torch.device(device))
    fractions = torch.zeros((len(TISSUES), *lattice.shape), device=lattice.device)
    rows = max(1, _BATCH_VOXELS // (lattice.shape[0] * lattice.shape[1]))
    for start in range(0, lattice.shape[2], rows):
        stop = min(start + rows, lattice.shape[2])
        fractions[..., start:stop] = soft_fractions(anatomy.layers, lattice.slab(start, stop))
    hard, occupied = _solid_samples(anatomy.bones, lattice, anatomy.bone_density, None)
    soft, inlaid = _solid_samples(anatomy.inlays, lattice, 0.0, occupied)
    flat = fractions.reshape(len(TISSUES), -1)
    flat *= (1 - occupied.clamp(max=1) - inlaid.clamp(max=1)).clamp(min=0)
    mineral = torch.zeros(flat.shape[1], device=flat.device).index_add_(0, hard.index, hard.mineral)
    for samples in (hard, soft):
        filled = samples.share - samples.mineral / APATITE_G_PER_CM3
        flat.view(-1).index_add_(0, samples.channel * flat.shape[1] + samples.index, filled)
    labels = _labels(anatomy.bones, lattice)
    shape = lattice.shape
    return TissueVolume(labels, fractions.cpu().numpy(), mineral.reshape(shape).cpu().numpy(), grid)


def soft_fractions(layers: tuple[Layer, ...], lattice: Lattice) -> Tensor:
    """Return the soft-tissue fractions (T, R, A, S) of a lattice, bones ignored."""
    out = torch.zeros((len(TISSUES), *lattice.shape), device=lattice.device)
    left = torch.ones(lattice.shape, device=lattice.device)
    edge = lattice.edge_mm(_EDGE_MM)
    for layer in layers:
        window = lattice.window(layer.lower_mm, layer.upper_mm, 5 * edge)
        if window is None:
            continue
        share = torch.sigmoid(layer.distance(lattice.points(window)) * (-1 / edge)) * left[window]
        left[window] -= share
        for tissue, part in layer.mixture.items():
            out[(TISSUES.index(tissue), *window)].add_(share, alpha=part)
    return out


class _Samples(NamedTuple):
    """Voxels touched by solids: flat lattice index, share, mineral g/cm3, tissue channel, each (m,)."""

    index: Tensor
    share: Tensor
    mineral: Tensor
    channel: Tensor


def _solid_samples(structures, lattice: Lattice, bone_density: float, occupied: Tensor | None):
    """Sample structures; where they overlap, shares and mineral are scaled to a total share of one.

    Returns the samples and the summed share of every lattice voxel. `occupied` is the share already taken by
    other solids.
    """
    edge = lattice.edge_mm(_EDGE_MM)
    parts = []
    for structure in structures:
        index, distance = _near_voxels(structure, lattice, 5 * edge)
        share = torch.sigmoid(distance * (-1 / edge))
        core = torch.sigmoid((distance + structure.cortex_mm) * (-1 / edge))
        mineral = bone_density * (structure.cortical * (share - core) + structure.trabecular * core)
        channel = torch.full_like(index, TISSUES.index(structure.tissue))
        parts.append((index, share, mineral, channel))
    index, share, mineral, channel = (torch.cat(columns) for columns in zip(*parts, strict=True))
    total = torch.zeros(int(np.prod(lattice.shape)), device=lattice.device)
    total.index_add_(0, index, share)
    scale = 1 / total[index].clamp(min=1)
    if occupied is not None:
        scale = scale * (1 - occupied[index]).clamp(min=0)
        total = torch.zeros_like(total).index_add_(0, index, share * scale)
    return _Samples(index, share * scale, mineral * scale, channel), total


def _upsample(maps: Tensor, weights: list[Tensor]) -> Tensor:
    """Interpolate maps (T, right, superior) of the coarse lattice linearly to the fine one."""
    return torch.einsum("ia,tas,ks->tik", weights[0], maps, weights[2])


def _displaced(samples, column, fractions, fine: Lattice, coarse: Lattice, weights) -> Tensor:
    """Return the soft tissue that solids displace, (T, right, superior), in fine voxels of depth.

    The amount is summed on the fine lattice, its split into tissues on the coarse one.
    """
    nearest = _coarse_index(samples.index, fine, coarse)
    tissue = fractions.reshape(len(TISSUES), -1)[:, nearest] * samples.share
    amount = torch.zeros(fine.shape[0] * fine.shape[2], device=column.device).index_add_(0, column, tissue.sum(0))
    split = torch.zeros((len(TISSUES), coarse.shape[0] * coarse.shape[2]), device=column.device)
    split.index_add_(1, _columns(nearest, coarse), tissue)
    split = _upsample(split.reshape(-1, coarse.shape[0], coarse.shape[2]), weights)
    return split / split.sum(0).clamp(min=1e-6) * amount.reshape(fine.shape[0], fine.shape[2])


def _near_voxels(structure: Structure, lattice: Lattice, reach_mm: float) -> tuple[Tensor, Tensor]:
    """Flat indices and distances of the voxels nearer than `reach_mm` to the union of the pieces."""
    windows = [(lattice.window(p.lower_mm, p.upper_mm, reach_mm), p) for p in structure.pieces]
    windows = [(window, piece) for window, piece in windows if window is not None]
    if not windows:
        return torch.zeros(0, dtype=torch.long, device=lattice.device), torch.zeros(0, device=lattice.device)
    first = [min(w[a].start for w, _ in windows) for a in range(3)]
    last = [max(w[a].stop for w, _ in windows) for a in range(3)]
    if len(windows) == 1:
        block = windows[0][1].distance(lattice.points(windows[0][0]))
    else:
        block = torch.full([b - a for a, b in zip(first, last, strict=True)], 1e3, device=lattice.device)
        for window, piece in windows:
            part = tuple(slice(w.start - a, w.stop - a) for w, a in zip(window, first, strict=True))
            block[part] = torch.minimum(block[part], piece.distance(lattice.points(window)))
    inside = (block < reach_mm).reshape(-1).nonzero().squeeze(1)
    distance = block.reshape(-1)[inside]
    depth, height = block.shape[1], block.shape[2]
    right = inside.div(depth * height, rounding_mode="floor")
    rest = inside - right * (depth * height)
    anterior = rest.div(height, rounding_mode="floor")
    superior = rest - anterior * height
    index = ((right + first[0]) * lattice.shape[1] + (anterior + first[1])) * lattice.shape[2] + (superior + first[2])
    return index, distance


def _labels(structures, lattice: Lattice) -> np.ndarray:
    """Label volume (R, A, S) uint8 by the joint-gap rule."""
    count = int(np.prod(lattice.shape))
    best = torch.full((count,), 1e3, device=lattice.device)
    second = best.clone()
    labels = torch.zeros(count, dtype=torch.uint8, device=lattice.device)
    for structure in structures:
        if structure.label:
            index, distance = _near_voxels(structure, lattice, 2 * GAP_MM)
            nearest, runner_up = best[index], second[index]
            closer = distance < nearest
            second[index] = torch.where(closer, nearest, torch.minimum(runner_up, distance))
            best[index] = torch.where(closer, distance, nearest)
            labels[index[closer]] = structure.label
    labels[~((best < 0) & (second - best > GAP_MM))] = 0
    return _largest_components(labels.reshape(lattice.shape).cpu().numpy())


def _largest_components(labels: np.ndarray) -> np.ndarray:
    for value, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is not None:
            mask = labels[window] == value
            pieces, count = ndimage.label(mask)
            if count > 1:
                sizes = np.bincount(pieces.reshape(-1))
                labels[window][mask & (pieces != 1 + sizes[1:].argmax())] = 0
    return labels


def _rigid(pose: np.ndarray | None) -> np.ndarray:
    pose = np.eye(4) if pose is None else np.asarray(pose, float)
    if pose.shape != (4, 4) or not np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-5):
        message = f"pose must be a rigid (4, 4) matrix, given shape {pose.shape}."
        raise InputError(message)
    return pose


def _mirror(anatomy: Anatomy) -> np.ndarray:
    return np.diag([-1.0 if anatomy.is_mirrored else 1.0, 1.0, 1.0, 1.0])


def _image_lattice(anatomy: Anatomy, grid: PlanarGrid, device: torch.device, pose: np.ndarray) -> Lattice:
    """Lattice (cols, depth, rows) whose columns and rows are those of the image."""
    boxes = (*anatomy.layers, *(piece for part in anatomy.bones for piece in part.pieces))
    anterior = np.array([[box.lower_mm, box.upper_mm] for box in boxes]) * (pose @ _mirror(anatomy))[1, :3]
    rear = anterior.min(axis=1).sum(axis=1).min() + pose[1, 3]
    front = anterior.max(axis=1).sum(axis=1).max() + pose[1, 3]
    depth = int(np.ceil((front - rear) / _DEPTH_STEP_MM)) + 1
    matrix = np.diag([-grid.spacing_mm[1], _DEPTH_STEP_MM, -grid.spacing_mm[0], 1.0])
    matrix[:3, 3] = grid.origin_mm[1], rear, grid.origin_mm[0]
    shape = grid.shape[1], depth, grid.shape[0]
    return Lattice(shape, _mirror(anatomy) @ np.linalg.inv(pose) @ matrix, device)


def _soft_lattice(fine: Lattice) -> tuple[Lattice, list[Tensor]]:
    """Coarse lattice over the same box; per axis the linear weights (n_fine, n_coarse) to the fine one."""
    shape, matrix, weights = [], fine.matrix.copy(), []
    for axis, count in enumerate(fine.shape):
        extent = (count - 1) * fine.spacing_mm[axis]
        coarse = max(2, int(np.ceil(extent / _SOFT_STEP_MM)) + 1)
        matrix[:3, axis] *= max(extent, 1.0) / (coarse - 1) / fine.spacing_mm[axis]
        place = torch.linspace(0, coarse - 1, count)[:, None] - torch.arange(coarse)[None]
        weights.append((1 - place.abs()).clamp(min=0).to(fine.device))
        shape.append(coarse)
    return Lattice(tuple(shape), matrix, fine.device), weights


def _columns(index: Tensor, lattice: Lattice) -> Tensor:
    """Flat (right, superior) index of flat voxel indices."""
    plane = lattice.shape[1] * lattice.shape[2]
    return index.div(plane, rounding_mode="floor") * lattice.shape[2] + index % lattice.shape[2]


def _coarse_index(index: Tensor, fine: Lattice, coarse: Lattice) -> Tensor:
    """Flat index of the nearest voxel of the coarse lattice over the same box."""
    plane = fine.shape[1] * fine.shape[2]
    right = index.div(plane, rounding_mode="floor")
    rest = index - right * plane
    anterior = rest.div(fine.shape[2], rounding_mode="floor")
    places = (right, anterior, rest - anterior * fine.shape[2])
    near = []
    for place, many, few in zip(places, fine.shape, coarse.shape, strict=True):
        table = torch.linspace(0, few - 1, many, device=index.device).round().long()
        near.append(table[place])
    return (near[0] * coarse.shape[1] + near[1]) * coarse.shape[2] + near[2]
