"""From the top of the spine to its lower end, one vertebra after another (Serrador 2024, after Lessmann 2019).

Peaks of the heat map, top first, say where to look. A patch there is re-centred on what the network outlines until it
rests; the vertebra then joins the memory, and a peak inside the memory is passed over. Beyond the published
pseudo-code: every loop ends, a vertebra is pasted where it was cut and never overwrites another, and a vertebra that
was passed over between two others is looked for once more, half-way between them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from skimage.feature import peak_local_max
from torch import Tensor

from spinelib.geometry import Volume, VolumeGrid
from spinelib.levels import LEVEL_ORDER
from spinelib.models.scan_cache import WORKING_MM
from spinelib.models.scan_grid import OUTSIDE, crop, overlap
from spinelib.models.vertebra_datasets import PATCH, SPINE_STEP
from spinelib.models.vertebra_networks import SpineFinder, VertebraUNet

MOST_VERTEBRAE = len(LEVEL_ORDER)
_HEAT, _PEAK = 0.15, 0.3
"""Heat that belongs to the spine, and that a peak must reach."""

_HEAT_MASS = 20.0  # coarse voxels; a lone vertebra's Gaussian sums to 53
_PEAKS_APART = 2  # coarse voxels, 8 mm: less than the least distance of neighbours, in the neck
_STILL_MM, _TRIES = 2.0, 4
_FEWEST_VOXELS = 150  # 1.2 cm3: less is no vertebra, not even a cut one
_MOST_OVERLAP = 0.5
_GAP = 1.6  # times the usual distance of neighbours
_ROI = (64, 64, 64)


@dataclass(frozen=True)
class Outline:
    """A vertebra as found.

    Attributes
    ----------
    corner : ndarray (3,)
        Working index of the first voxel of its patch.
    probability : Tensor (64, 64, 64)
        Zero outside its largest component.
    centre : ndarray (3,)
        Working index of the mask's centre of mass.
    """

    corner: np.ndarray
    probability: Tensor
    centre: np.ndarray


@torch.inference_mode()
def spine_heat(finder: SpineFinder, scan: Tensor) -> Tensor:
    """Return the heat map (r, a, s) in coarse voxels (4 mm) of a normalised working scan (R, A, S)."""
    from monai.inferers import sliding_window_inference

    coarse = torch.nn.functional.avg_pool3d(scan[None, None], SPINE_STEP, ceil_mode=True)
    logits = sliding_window_inference(
        coarse, _ROI, 2, finder, overlap=0.25, mode="gaussian", padding_mode="constant", cval=OUTSIDE
    )
    return torch.sigmoid(logits[0, 0])


def heat_grid(working: Volume) -> VolumeGrid:
    """Return the grid of `spine_heat` for a working scan."""
    affine = working.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ np.full(3, (SPINE_STEP - 1) / 2)
    affine[:3, :3] *= SPINE_STEP
    return VolumeGrid(tuple(-(-n // SPINE_STEP) for n in working.values.shape), affine)


@torch.inference_mode()
def traverse(net: VertebraUNet, scan: Tensor, heat: Tensor) -> tuple[list[Outline], tuple[str, ...]]:
    """Return the vertebrae of a scan from top to bottom, and what a user should know of the search.

    Parameters
    ----------
    net : VertebraUNet
    scan : Tensor (R, A, S)
        Normalised working scan.
    heat : Tensor (r, a, s)
        From `spine_heat`.
    """
    peaks = _peaks(heat)
    if not len(peaks):
        return [], ("no spine found",)
    memory, found = torch.zeros(scan.shape), []
    for peak in peaks[:MOST_VERTEBRAE]:
        _look(net, scan, memory, found, peak)
    for place in _gaps(found):
        _look(net, scan, memory, found, place)
    found.sort(key=lambda outline: -outline.centre[2])
    flags = () if len(peaks) <= MOST_VERTEBRAE else (f"more than {MOST_VERTEBRAE} places look like vertebrae",)
    return found[:MOST_VERTEBRAE], flags


def _look(net, scan, memory, found, place):
    """Look for a vertebra at a place; if there is one, add it to `found` and to the memory."""
    if _in_memory(memory, place):
        return
    outline = _settled(net, scan, memory, place)
    if outline is None:
        return
    inside, there = overlap(scan.shape, outline.corner, PATCH)
    memory[inside] = torch.maximum(memory[inside], (outline.probability[there] > 0.5).float())
    found.append(outline)


def _settled(net, scan, memory, centre):
    """Return the outline once re-centring has come to rest; None if there is none."""
    outline = None
    for _ in range(_TRIES):
        corner = np.rint(np.asarray(centre) - (PATCH - 1) / 2).astype(int)
        outline = _outline(net, crop(scan, corner, PATCH, OUTSIDE), crop(memory, corner, PATCH, 0.0), corner)
        if outline is None:
            return None
        moved = np.linalg.norm(outline.centre - centre) * WORKING_MM
        if moved < _STILL_MM:
            break
        centre = (outline.centre + centre) / 2  # half-way: between body and mask centre, as in training
    return outline


def _outline(net, image, memory, corner):
    both = torch.stack([image, memory])
    pair = torch.stack([both, both.flip(1)])  # the mirror image too: steadier, and two are faster than one
    logits = net(pair)[:, 0].float()
    probability = torch.sigmoid((logits[0] + logits[1].flip(0)) / 2)
    probability = probability * (memory < 0.5) * (image > OUTSIDE)
    pieces, count = ndimage.label((probability > 0.5).numpy(), np.ones((3, 3, 3)))
    if count == 0:
        return None
    sizes = np.bincount(pieces.ravel())
    largest = 1 + sizes[1:].argmax()
    if sizes[largest] < _FEWEST_VOXELS:
        return None
    kept = torch.from_numpy((pieces == largest) | (pieces == 0))
    centre = np.argwhere(pieces == largest).mean(axis=0) + corner
    return Outline(corner, (probability * kept).half(), centre)


def _peaks(heat):
    """Return working indices (n, 3) of the bodies that the heat map shows, top first."""
    pieces, count = ndimage.label((heat > _HEAT).numpy(), np.ones((3, 3, 3)))
    if count == 0:
        return np.empty((0, 3))
    mass = ndimage.sum_labels(heat.numpy(), pieces, np.arange(1, count + 1))
    kept = np.isin(pieces, 1 + np.flatnonzero(mass >= _HEAT_MASS))
    hot = np.where(kept, heat.numpy(), 0.0)
    peaks = peak_local_max(hot, min_distance=_PEAKS_APART, threshold_abs=_PEAK, exclude_border=False)
    peaks = peaks[np.argsort(-peaks[:, 2], kind="stable")]
    return peaks * SPINE_STEP + (SPINE_STEP - 1) / 2


def _in_memory(memory, place):
    index = np.rint(place).astype(int)
    around = tuple(slice(max(i - 1, 0), i + 2) for i in index)
    return memory[around].numel() > 0 and float(memory[around].mean()) > _MOST_OVERLAP


def _gaps(found):
    """Return places half-way between neighbours that lie much farther apart than others."""
    centres = np.array(sorted((outline.centre for outline in found), key=lambda centre: -centre[2]))
    if len(centres) < 4:
        return []
    apart = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    wide = apart > _GAP * np.median(apart)
    return [(upper + lower) / 2 for upper, lower, far in zip(centres, centres[1:], wide, strict=False) if far]
