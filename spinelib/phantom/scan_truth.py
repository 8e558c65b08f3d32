"""Truth of a synthetic CT: labels with all their parts, body centres, and which vertebrae the border cuts."""

import numpy as np
import torch
from scipy import ndimage

from spinelib.geometry import VolumeGrid
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.population import Subject
from spinelib.phantom.render import GAP_MM, TissueVolume
from spinelib.phantom.vertebra import VertebraShape, vertebra_sdf

WHOLE_FRACTION, LEAST_FRACTION = 0.97, 0.03
"""Share of a vertebra inside the volume above which it counts as whole, and below which it is not labelled."""

VISIBLE_MM = 0.5
"""How far outside the bone's surface masks end.

Readers draw the edge that they see, half-way from the brightest cortex to soft tissue. A thin shell, blurred by the
scanner, is dimmer and wider than it was: on synthetic scans half-way lies 0.58 mm outside the bone (ten scans,
0.22 to 0.79), on three real ones (15 vertebrae) 0.05 to 0.12 mm outside their reference masks.
"""

_BONE_G_CM3 = 0.05
_LEAST_PART_MM3 = 60.0


def scan_truth(
    tissue: TissueVolume, subject: Subject, shapes: tuple[VertebraShape, ...], pose: np.ndarray
) -> tuple[np.ndarray, dict[int, np.ndarray], frozenset[int]]:
    """Return labels (R, A, S) uint8, centroids in the world by label, and the labels that the border cuts.

    Parameters
    ----------
    tissue : TissueVolume
        Rendered from `subject` and `shapes` with `pose`.
    subject : Subject
    shapes : tuple of VertebraShape
    pose : ndarray (4, 4)
    """
    grid, centroids, seen = tissue.grid, {}, {}
    for level, shape, local in zip(subject.levels, shapes, subject.poses, strict=True):
        seen[VERSE_LABELS[level]] = visible_fraction(shape, pose @ local, grid)
        if seen[VERSE_LABELS[level]] >= LEAST_FRACTION:
            centroids[VERSE_LABELS[level]] = moved(pose, local[:3, 3])
    labels = with_all_parts(tissue, subject, shapes, pose)
    labels[~np.isin(labels, list(centroids))] = 0
    labels = _to_visible_edge(labels, tissue, subject, shapes, pose)
    labels[~np.isin(labels, list(centroids))] = 0
    present = set(np.unique(labels).tolist())
    centroids = {label: place for label, place in centroids.items() if label in present}
    cut = frozenset(label for label in centroids if seen[label] < WHOLE_FRACTION)
    return labels, centroids, cut


def visible_fraction(shape: VertebraShape, pose: np.ndarray, grid: VolumeGrid, step_mm: float = 2.5) -> float:
    """Return the share of a vertebra's volume that lies inside an axis-aligned grid.

    Parameters
    ----------
    shape : VertebraShape
    pose : ndarray (4, 4)
        From the vertebra's frame to the world of the grid.
    grid : VolumeGrid
    step_mm : float
        Spacing of the points that are counted.
    """
    lower = grid.affine[:3, 3] - grid.spacing_mm / 2
    upper = lower + grid.spacing_mm * np.array(grid.shape)
    world = moved(pose, _corners(shape))
    if np.all((world >= lower) & (world <= upper)):
        return 1.0
    if np.any(world.max(0) < lower) or np.any(world.min(0) > upper):
        return 0.0
    axes = [np.arange(a + step_mm / 2, b, step_mm) for a, b in shape.bounds_mm]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    world = moved(pose, points[_distance(shape, points) < 0])
    return float(np.mean(np.all((world >= lower) & (world <= upper), axis=1)))


def with_all_parts(tissue, subject, shapes, pose) -> np.ndarray:
    """Return the rendered labels with the parts of a vertebra that hang on less than a voxel or on bone outside.

    The renderer keeps the largest piece of each label. On coarse grids thin laminae break, and the spinous process
    would be lost.
    """
    labels = tissue.labels.copy()
    missed = (tissue.mineral > _BONE_G_CM3) & (labels == 0)
    owner = _owners(missed, 0.0, tissue.grid, subject, shapes, pose)
    return np.where(_large_parts(owner, tissue.grid.spacing_mm), owner, labels)


def _to_visible_edge(labels, tissue, subject, shapes, pose) -> np.ndarray:
    """Return labels grown to where a reader draws the surface, `VISIBLE_MM` outside the bone; joints stay open."""
    steps = int(np.ceil(VISIBLE_MM / tissue.grid.spacing_mm.min()))
    beside = ndimage.binary_dilation(labels > 0, np.ones((3, 3, 3)), steps) & (labels == 0) & (tissue.labels == 0)
    owner = _owners(beside, VISIBLE_MM, tissue.grid, subject, shapes, pose)
    return np.where(owner > 0, owner, labels)


def moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return points (..., 3) under an affine matrix (4, 4)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _owners(asked, reach_mm, grid, subject, shapes, pose) -> np.ndarray:
    """Return the label of the vertebra within `reach_mm` of every asked voxel, 0 where there is none or two compete."""
    best, second = np.full((2, *asked.shape), 1e3, np.float32)
    owner = np.zeros(asked.shape, np.uint8)
    for level, shape, local in zip(subject.levels, shapes, subject.poses, strict=True):
        window = _window(shape, pose @ local, grid)
        index = np.argwhere(asked[window])
        if not len(index):
            continue
        index += [w.start for w in window]
        distance = _distance(shape, moved(np.linalg.inv(pose @ local) @ grid.affine, index))
        place = tuple(index.T)
        nearer = distance < best[place]
        loser = np.where(nearer, best[place], distance)
        second[place] = np.minimum(second[place], loser)
        best[place] = np.where(nearer, distance, best[place])
        owner[place] = np.where(nearer, VERSE_LABELS[level], owner[place])
    owner[(best >= reach_mm) | (second - best <= GAP_MM)] = 0
    return owner


def _large_parts(labels, spacing_mm) -> np.ndarray:
    kept = np.zeros(labels.shape, bool)
    least = max(3, _LEAST_PART_MM3 / float(np.prod(spacing_mm)))
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is not None:
            pieces, _ = ndimage.label(labels[window] == label)
            large = np.bincount(pieces.reshape(-1)) >= least
            large[0] = False
            kept[window] |= large[pieces]
    return kept


def _corners(shape):
    return np.stack(np.meshgrid(*shape.bounds_mm, indexing="ij"), -1).reshape(-1, 3)


def _distance(shape, points) -> np.ndarray:
    return vertebra_sdf(shape, torch.from_numpy(points.astype(np.float32)))[1].numpy()


def _window(shape, pose, grid) -> tuple[slice, slice, slice]:
    """Index box of a vertebra's bounds; empty outside the grid."""
    index = moved(np.linalg.inv(grid.affine) @ pose, _corners(shape))
    first = np.clip(np.floor(index.min(0)), 0, None).astype(int)
    last = np.clip(np.ceil(index.max(0)) + 1, 0, grid.shape).astype(int)
    return tuple(slice(int(a), int(max(a, b))) for a, b in zip(first, last, strict=True))
