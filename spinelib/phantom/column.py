"""The column of vertebral bodies and discs: signed distance, silhouettes, true curves, mask and surface."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import trimesh
from jaxtyping import Float
from torch import Tensor

from spinelib.geometry import PlanarGrid, Volume
from spinelib.phantom.sacrum import subject_sacrum
from spinelib.phantom.sdf import smooth_max
from spinelib.phantom.vertebra import VertebraShape, body_faces, body_sdf, surface_mesh
from spinelib.spine import K_DEFAULT, Curves

DISC_CLEARANCE_MM = 0.5
"""Gap between a disc and each end plate (cartilage and bony end plate)."""

_OVERLAP_MM = -0.6  # discs of the column reach into the bodies, so that the union has no seam
_BULGE_MM = 0.8
_FAR_MM = 4.0  # distance assumed outside every box
_MARGIN_MM = 4.0
_STEP_MM = 2.0


class Element(NamedTuple):
    """A piece of the column: its name, signed distance of world points (..., 3) and world box (3, 2) mm."""

    name: str
    distance: Callable[[Tensor], Tensor]
    box_mm: np.ndarray


def disc_sdf(
    upper: tuple[VertebraShape, np.ndarray],
    lower: tuple[VertebraShape, np.ndarray],
    points: Float[Tensor, "*batch 3"],
    clearance_mm: float = DISC_CLEARANCE_MM,
) -> Float[Tensor, "*batch"]:
    """Return the signed distance (mm) to the disc between two vertebrae.

    Between the facing plates, `clearance_mm` away from each, the outline passes linearly from the rim of the
    upper to the rim of the lower body and bulges by 0.8 mm.

    Parameters
    ----------
    upper, lower : (VertebraShape, pose (4, 4))
        Neighbours with their local-to-world poses; `lower` may be the sacrum.
    points : tensor (..., 3), world mm
    """
    side_upper, _, under = body_faces(upper[0], _to_local(upper[1], points))
    side_lower, over, _ = body_faces(lower[0], _to_local(lower[1], points))
    share = (under / (under + over).clamp(min=0.5)).clamp(0, 1)
    side = side_upper + (side_lower - side_upper) * share - (4 * _BULGE_MM) * share * (1 - share)
    between = torch.maximum(clearance_mm - under, clearance_mm - over)
    return smooth_max(side, between, 1.5)


def column_elements(subject, shapes, first: str = "C2", sacrum: bool = True) -> tuple[Element, ...]:
    """Return bodies and discs from `first` down, cranial to caudal.

    Parameters
    ----------
    subject : Subject
    shapes : tuple of VertebraShape
        `vertebra.subject_shapes(subject)`.
    first : str
        Uppermost body, C2 or below; subjects that lack it start at their first body.
    sacrum : bool
        Whether the sacral bodies and the lumbosacral disc belong to it.
    """
    start = subject.levels.index(first) if first in subject.levels else 0
    chain = [pair for pair in zip(shapes[start:], subject.poses[start:], strict=False) if pair[0].drum is not None]
    if sacrum:
        chain.append((subject_sacrum(subject), subject.sacrum_pose))
    bodies = [Element(shape.level, _body_distance(shape, pose), _body_box(shape, pose)) for shape, pose in chain]
    elements = bodies[:1]
    for upper, lower, body in zip(chain, chain[1:], bodies[1:], strict=False):
        elements += [
            Element(f"{upper[0].level}-{lower[0].level}", _disc_distance(upper, lower), _disc_box(upper, lower)),
            body,
        ]
    return tuple(elements)


def column_sdf(subject, shapes, points: Float[Tensor, "*batch 3"], first: str = "C2") -> Float[Tensor, "*batch"]:
    """Return the signed distance (mm) of world points to the column from `first` to the sacrum."""
    distances = [element.distance(points) for element in column_elements(subject, shapes, first)]
    return torch.stack(distances).amin(0)


def column_curves(subject, shapes, k: int = K_DEFAULT, spacing_mm: float = _STEP_MM) -> tuple[Curves, Curves]:
    """Return (`true_curves`, `extended_curves`) from one evaluation of the column."""
    ends = [_plate_height(subject, shapes, *end) for end in _curve_ends(subject)]
    outline = _outline(column_elements(subject, shapes, "C4"), ends[2], ends[3], spacing_mm)
    true = outline.at(np.linspace(ends[0], ends[1], k))
    return true, outline


def true_curves(subject, shapes, k: int = K_DEFAULT) -> Curves:
    """Return the six curves of the column between the ends of the thoracolumbar spine.

    Edges are the silhouettes of bodies and discs (processes left out) in the coronal and sagittal projection,
    centres their mid-lines. The k heights run from the centre of T1's upper end plate to that of the
    lower plate of the last lumbar vertebra. Found on a 2 mm grid with linear sub-voxel crossings, unsmoothed.
    """
    return column_curves(subject, shapes, k)[0]


def extended_curves(subject, shapes, spacing_mm: float = _STEP_MM) -> Curves:
    """Return the same curves, a row per `spacing_mm`, from the top of C6 to the lower end of the S1 body."""
    return column_curves(subject, shapes, spacing_mm=spacing_mm)[1]


def spine_mask(subject, shapes, grid: PlanarGrid) -> np.ndarray:
    """Return the coronal silhouette of the column from C7 to the last lumbar vertebra, bool (rows, cols).

    Raises
    ------
    ValueError
        If the grid is not coronal.
    """
    if grid.view != "coronal":
        message = f"the spine mask is a coronal projection, given a {grid.view!r} grid. Expected 'coronal'."
        raise ValueError(message)
    elements = column_elements(subject, shapes, "C7", sacrum=False)
    axes = (grid.lateral_mm()[::-1], _axis(elements, 1, _STEP_MM), grid.superior_mm()[::-1])
    coronal, _ = _silhouettes(elements, axes)
    return (coronal < 0).T[::-1, ::-1].copy()


def column_mesh(subject, shapes, spacing_mm: float = 2.0) -> trimesh.Trimesh:
    """Return the closed surface of the column from C2 to the sacrum in world mm."""
    volume, axes = _sampled(column_elements(subject, shapes), spacing_mm)
    return surface_mesh(volume, [a[0] for a in axes], spacing_mm)


def column_volume(subject, shapes, spacing_mm: float = 2.0) -> Volume:
    """Return the bodies and discs from T1 to the last lumbar vertebra as a 0/1 volume, uint8."""
    volume, axes = _sampled(column_elements(subject, shapes, "T1", sacrum=False), spacing_mm)
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    return Volume((volume < 0).astype(np.uint8), affine)


def _sampled(elements, spacing_mm):
    """Return distances (right, anterior, superior) on the lattice that covers all elements, and its axes."""
    axes = tuple(_axis(elements, i, spacing_mm) for i in range(3))
    volume = np.full([len(a) for a in axes], _FAR_MM, np.float32)
    for block, values in _blocks(elements, axes):
        np.minimum(volume[block], values, out=volume[block])
    return volume, axes


def _to_local(pose, points: Tensor) -> Tensor:
    rotation = torch.as_tensor(pose[:3, :3], dtype=points.dtype, device=points.device)
    return (points - torch.as_tensor(pose[:3, 3], dtype=points.dtype, device=points.device)) @ rotation


def _body_distance(shape, pose):
    return lambda points: body_sdf(shape, _to_local(pose, points))


def _disc_distance(upper, lower):
    return lambda points: disc_sdf(upper, lower, points, _OVERLAP_MM)


def _body_box(shape, pose) -> np.ndarray:
    core = [part for part in shape.parts if part.group == "core" and not part.carve]
    corners = [_rim(shape, "top"), _rim(shape, "bottom")]
    corners += [np.add(end, s * max(part.radii)) for part in core for end in (part.start, part.end) for s in _SIGNS]
    return _box(np.vstack(corners), pose)


def _disc_box(upper, lower) -> np.ndarray:
    boxes = [_box(_rim(upper[0], "bottom"), upper[1]), _box(_rim(lower[0], "top"), lower[1])]
    return np.stack([np.minimum(boxes[0][:, 0], boxes[1][:, 0]), np.maximum(boxes[0][:, 1], boxes[1][:, 1])], 1)


_SIGNS = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])


def _rim(shape, plate) -> np.ndarray:
    """Corners (8, 3) that enclose a plate's rim in local mm."""
    d = shape.drum
    a, b = d["half_width"] * (1 + abs(d["taper"])) + d["lipping"], d["half_depth"] + d["lipping"]
    tilt = abs(d[f"{plate}_right_slope"]) * a + abs(d[f"{plate}_anterior_slope"]) * b + d["uncinate"] + d["lip"]
    return _SIGNS * [a, b, tilt] + [0, 0, d[f"{plate}_offset"]]


def _box(corners, pose) -> np.ndarray:
    world = corners @ pose[:3, :3].T + pose[:3, 3]
    return np.stack([world.min(0) - _MARGIN_MM, world.max(0) + _MARGIN_MM], 1)


def _axis(elements, i, spacing) -> np.ndarray:
    """Lattice of multiples of `spacing` that covers all boxes along world axis i."""
    lower, upper = min(e.box_mm[i, 0] for e in elements), max(e.box_mm[i, 1] for e in elements)
    return spacing * np.arange(np.floor(lower / spacing), np.ceil(upper / spacing) + 1)


def _blocks(elements, axes):
    """Yield (index block, distances) of every element that meets the grid `axes` (rising coordinates)."""
    tensors = [torch.as_tensor(np.ascontiguousarray(a), dtype=torch.float32) for a in axes]
    for element in elements:
        block = tuple(slice(*np.searchsorted(a, box)) for a, box in zip(axes, element.box_mm, strict=False))
        if all(part.stop > part.start for part in block):
            grids = torch.meshgrid(*(t[part] for t, part in zip(tensors, block, strict=False)), indexing="ij")
            yield block, element.distance(torch.stack(grids, -1)).numpy()


def _silhouettes(elements, axes):
    """Return the least distance along anterior (right, superior) and along right (anterior, superior)."""
    coronal = np.full((len(axes[0]), len(axes[2])), _FAR_MM, np.float32)
    sagittal = np.full((len(axes[1]), len(axes[2])), _FAR_MM, np.float32)
    for (right, anterior, superior), values in _blocks(elements, axes):
        coronal[right, superior] = np.minimum(coronal[right, superior], values.min(1))
        sagittal[anterior, superior] = np.minimum(sagittal[anterior, superior], values.min(0))
    return coronal, sagittal


def _outline(elements, top_mm, bottom_mm, spacing_mm) -> Curves:
    """Return the silhouette curves on evenly spaced rows (about `spacing_mm`) between two heights."""
    heights = np.linspace(bottom_mm, top_mm, max(2, round((top_mm - bottom_mm) / spacing_mm) + 1))
    axes = (_axis(elements, 0, _STEP_MM), _axis(elements, 1, _STEP_MM), heights)
    coronal, sagittal = _silhouettes(elements, axes)
    edges = [*_crossings(coronal, axes[0]), *_crossings(sagittal, axes[1])]
    right_low, right_high, back, front = (edge[::-1] for edge in edges)
    return Curves(
        heights[::-1].copy(),
        np.stack([right_high, (right_high + right_low) / 2, right_low]),
        np.stack([front, (front + back) / 2, back]),
    )


def _crossings(profile, axis):
    """Return the lowest and highest zero crossing (rows,) of distances (lateral, rows), NaN where all > 0."""
    inside = profile < 0
    columns = np.arange(profile.shape[1])

    def crossing(index, step):
        here, there = profile[index, columns], profile[np.clip(index + step, 0, len(axis) - 1), columns]
        share = here / np.where(here < there, here - there, -1.0)
        return np.where(inside.any(0), axis[index] + share * step * (axis[1] - axis[0]), np.nan)

    return crossing(inside.argmax(0), -1), crossing(len(axis) - 1 - inside[::-1].argmax(0), 1)


def _curve_ends(subject):
    """(level, plate) of the true top and bottom and the extended top and bottom."""
    levels = subject.levels
    top = "T1" if "T1" in levels else levels[0]
    extended = next(level for level in ("C6", "C7", top) if level in levels)
    return (top, "top"), (levels[-1], "bottom"), (extended, "top"), ("S1", "bottom")


def _plate_height(subject, shapes, level, plate) -> float:
    """World height of a plate's centre."""
    if level == "S1":
        shape, pose = subject_sacrum(subject), subject.sacrum_pose
    else:
        i = subject.levels.index(level)
        shape, pose = shapes[i], subject.poses[i]
    return float(pose[2, 2] * shape.drum[f"{plate}_offset"] + pose[2, 3])
