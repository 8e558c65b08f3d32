"""From the top of the spine to its lower end, one vertebra after another (Serrador 2024, after Lessmann 2019).

The heat map shows the line of the vertebral bodies. Places along it, top first, say where to look: a patch there is
re-centred on what the network outlines until it rests, and the vertebra then joins the memory. Beyond the published
pseudo-code: every loop ends; places inside the memory are passed over; what hardly touches the line is no vertebra; a
vertebra is pasted where it was cut and never overwrites another.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from spinelib.geometry import Volume, VolumeGrid
from spinelib.levels import LEVEL_ORDER
from spinelib.models.scan_cache import WORKING_MM
from spinelib.models.scan_grid import OUTSIDE, crop, overlap
from spinelib.models.vertebra_datasets import PATCH, SPINE_STEP
from spinelib.models.vertebra_networks import SpineFinder, VertebraUNet

MOST_VERTEBRAE = len(LEVEL_ORDER)
HEAT = 0.2
"""Heat that belongs to the line of the bodies."""

_LEAST_RIDGE = 4  # coarse slices, 16 mm: less is no spine
_LONGEST_GAP = 8  # coarse slices, 32 mm
_FORWARD = 0.02  # heat that a coarse voxel farther forward costs
_PLACE_STEP = 2  # coarse slices between places to look at, 8 mm
_STILL_MM, _TRIES = 2.0, 4
_FEWEST_VOXELS, _FEWEST_HOT = 150, 60  # working voxels of 8 mm3: of a vertebra, cut or not, and of its body
_MOST_OVERLAP = 0.3
_FRAGMENT = 0.4  # of the usual volume nearby
_ROI = (64, 64, 64)


@dataclass(frozen=True)
class Outline:
    """A vertebra as found.

    Attributes
    ----------
    corner : ndarray (3,)
        Working index of the first voxel of its patch.
    probability : Tensor (64, 64, 64)
        Zero in what is rather bone than not and does not belong to it. Doubts beside it stay: on finer voxels the
        surface lies where probability passes one half between two centres.
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
    memory, found = torch.zeros(scan.shape), []
    for place in _places(heat):
        if len(found) == MOST_VERTEBRAE:
            break
        outline = None if _in_memory(memory, place) else _settled(net, scan, memory, place)
        if outline is None or not _is_vertebra(outline, heat, memory):
            continue
        inside, there = overlap(scan.shape, outline.corner, PATCH)
        memory[inside] = torch.maximum(memory[inside], (outline.probability[there] > 0.5).float())
        found.append(outline)
    found.sort(key=lambda outline: -outline.centre[2])
    found = without_fragments(found, scan.shape[2])
    return found, () if found else ("no spine found",)


def without_fragments(found: list[Outline], slices: int) -> list[Outline]:
    """Leave out what is much smaller than its neighbours although no border cuts it: discs, parts of a neighbour."""
    sizes = [int((outline.probability > 0.5).sum()) for outline in found]
    whole = [not _at_border(outline, slices) for outline in found]
    for place in sorted(range(len(found)), key=sizes.__getitem__):
        near = [sizes[i] for i in range(place - 2, place + 3) if i != place and 0 <= i < len(found) and whole[i]]
        if whole[place] and near and sizes[place] < _FRAGMENT * np.median(near):
            whole[place] = False
            sizes[place] = 0
    return [outline for outline, size in zip(found, sizes, strict=True) if size]


def _at_border(outline, slices):
    """Return whether an outline touches the first or the last slice."""
    heights = np.flatnonzero((outline.probability > 0.5).any(0).any(0).numpy()) + outline.corner[2]
    return bool(heights.min() <= 0 or heights.max() >= slices - 1)


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
    probability = probability * (image > OUTSIDE)
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


def _places(heat):
    """Return working indices (n, 3) along the line of the bodies, top first.

    The line is the chain of hot spots, one a slice, with the largest total heat: neighbours lie nearly below each
    other, and a spot farther back is preferred, since a bright aorta in front of the spine can be as hot.
    """
    spots = [_spots(heat[:, :, height], height) for height in range(heat.shape[2] - 1, -1, -1)]
    nodes = np.concatenate(spots) if spots else np.empty((0, 4))
    if not len(nodes):
        return np.empty((0, 3))
    value = nodes[:, 3] - _FORWARD * (nodes[:, 1] - nodes[:, 1].min())
    best, before = value.copy(), np.full(len(nodes), -1)
    for i, node in enumerate(nodes):
        above = nodes[:i, 2] - node[2]
        aside = np.linalg.norm(nodes[:i, :2] - node[:2], axis=1)
        linked = (above > 0) & (above <= _LONGEST_GAP) & (aside <= 2 + above)
        if linked.any():
            j = np.flatnonzero(linked)[(best[:i] - 0.05 * aside)[linked].argmax()]
            if best[j] - 0.05 * aside[j] > 0:
                best[i], before[i] = value[i] + best[j] - 0.05 * aside[j], j
    chain = [int(best.argmax())]
    while before[chain[-1]] >= 0:
        chain.append(int(before[chain[-1]]))
    line = nodes[chain, :3]  # from the bottom
    if line[-1, 2] - line[0, 2] < _LEAST_RIDGE:
        return np.empty((0, 3))
    heights = np.arange(line[-1, 2], line[0, 2] - 1, -_PLACE_STEP)
    places = [np.interp(heights, line[:, 2], line[:, axis]) for axis in range(2)]
    return np.stack([*places, heights], 1) * SPINE_STEP + (SPINE_STEP - 1) / 2


def _spots(section, height):
    """Return the hottest points (right, anterior, height, heat) of a slice's separate hot regions, at most four."""
    pieces, count = ndimage.label((section > HEAT).numpy())
    points = ndimage.maximum_position(section.numpy(), pieces, range(1, count + 1))
    spots = [(right, anterior, height, float(section[right, anterior])) for right, anterior in points]
    return np.array(sorted(spots, key=lambda spot: -spot[3])[:4]).reshape(-1, 4)


def _in_memory(memory, place):
    around = tuple(slice(max(int(i) - 1, 0), int(i) + 2) for i in np.rint(place))
    return float(memory[around].mean()) > 0.5


def _is_vertebra(outline, heat, memory):
    """Return whether an outline has a body on the hot line and is not what the memory holds already."""
    places = np.argwhere((outline.probability > 0.5).numpy()) + outline.corner
    places = places[((places >= 0) & (places < memory.shape)).all(axis=1)]
    coarse = np.minimum(places // SPINE_STEP, np.array(heat.shape) - 1)
    hot = (heat[tuple(torch.from_numpy(coarse.T.copy()))] > HEAT).sum()
    known = memory[tuple(torch.from_numpy(places.T.copy()))].mean()
    return bool(hot >= _FEWEST_HOT) and bool(known < _MOST_OVERLAP)
