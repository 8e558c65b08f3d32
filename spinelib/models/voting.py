"""Vertebrae of a scan from votes: every voxel of bone points at the centre of its own vertebral body.

Where votes pile up is a vertebra. From the top to the bottom, each takes the voxels that point at it. A vote is worth
what a mark in the middle of a patch has to say voxel by voxel, but for all vertebrae of a patch at once.
"""

from functools import partial

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import cKDTree
from torch import Tensor

from spinelib.models.scan_grid import OUTSIDE, crop
from spinelib.models.traversal import HEAT, MOST_VERTEBRAE, Outline, without_fragments
from spinelib.models.vertebra_datasets import PATCH, SPINE_STEP
from spinelib.models.vertebra_networks import VOTE_VOXELS, SurfaceRefiner, VoteUNet

_ROI = (PATCH,) * 3
_AROUND = 48  # working voxels, 96 mm, around the hot line
_GENEROUS = 0.6  # on the logit: the best of 0, 0.3, 0.6 on six scans that the last training left out, by 0.001
_BLUR, _LOWEST_PILE = 1.5, 0.5  # working voxels, of the map of votes; votes a voxel
_MARGIN = 8  # working voxels around the scan: the centre of a cut vertebra may lie outside
_PEAK = 2  # working voxels around a peak that are lower; with 4, the flank of a neighbour hid a T1 12 mm above it
_FEWEST_VOTES = 120.0  # working voxels of 8 mm3
_FARTHEST = 12.0  # working voxels that a vote may miss a centre by
_NEAREST, _LONGEST = 5.0, 35.0  # working voxels from one body to the next; the second bridges a missed vertebra
_DETOUR = 0.01  # share of a vertebra's votes that a working voxel of distance costs
_LOOSE = 80  # voxels: smaller loose pieces are left out; with 20, distances (HD) were 5 % longer


@torch.inference_mode()
def vote(net: VoteUNet, refiner: SurfaceRefiner, scan: Tensor, heat: Tensor) -> tuple[Tensor, Tensor]:
    """Return probability (R, A, S) of vertebral bone and where each voxel points at (3, R, A, S), working indices.

    Parameters
    ----------
    net : VoteUNet
    refiner : SurfaceRefiner
    scan : Tensor (R, A, S)
        Normalised working scan.
    heat : Tensor (r, a, s)
        From `traversal.spine_heat`; only the box around what is hot is looked at.
    """
    from monai.inferers import sliding_window_inference

    probability = torch.zeros(scan.shape)
    aims = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in scan.shape), indexing="ij"))
    hot = torch.nonzero(heat > HEAT)
    if not len(hot):
        return probability, aims
    low = (hot.amin(0) * SPINE_STEP - _AROUND).clamp(min=0).tolist()
    high = torch.minimum((hot.amax(0) + 1) * SPINE_STEP + _AROUND, torch.tensor(scan.shape)).tolist()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    answer = sliding_window_inference(
        scan[box][None, None],
        _ROI,
        2,
        partial(_both_ways, net, refiner),
        overlap=0.25,
        mode="gaussian",
        padding_mode="constant",
        cval=OUTSIDE,
    )[0]
    probability[box] = torch.sigmoid(answer[0] + _GENEROUS) * (scan[box] > OUTSIDE)
    aims[(slice(None), *box)] += answer[1:] * VOTE_VOXELS
    return probability, aims


def _both_ways(net, refiner, patch):
    """Return the mean answer for a patch (b, 1, R, A, S) and its mirror image: worth 0.004 of Dice, twice the time."""
    answer, mirrored = (_refined(net, refiner, image) for image in (patch, patch.flip(2)))
    mirrored = mirrored.flip(2)
    mirrored[:, 1] *= -1
    return (answer + mirrored) / 2


def _refined(net, refiner, image):
    answer = net(image).float()
    return torch.cat([refiner(image, answer[:, :1]), answer[:, 1:]], 1)


def vote_map(probability: Tensor, aims: Tensor, margin: int = 0) -> np.ndarray:
    """Return votes per voxel (R, A, S), smoothed, `margin` voxels larger on every side."""
    _, points, weights = _votes(probability, aims)
    size = np.array(probability.shape) + 2 * margin
    index = np.rint(points).astype(int) + margin
    kept = ((index >= 0) & (index < size)).all(1)
    flat = np.ravel_multi_index(index[kept].T, size)
    votes = np.bincount(flat, weights[kept], minlength=int(size.prod())).reshape(size)
    return ndimage.gaussian_filter(votes.astype(np.float32), _BLUR, truncate=3)


def gather(probability: Tensor, aims: Tensor) -> tuple[list[Outline], tuple[str, ...]]:
    """Return the vertebrae that votes agree on, from top to bottom, and what a user should know of the search.

    Parameters
    ----------
    probability : Tensor (R, A, S)
    aims : Tensor (3, R, A, S)
        From `vote`.
    """
    places, points, weights = _votes(probability, aims)
    centres, votes = _piles(points, weights, vote_map(probability, aims, _MARGIN), probability.shape[2])
    if not len(centres):
        return [], ("no spine found",)
    spine = _chain(centres, votes)
    apart, nearest = cKDTree(centres).query(points)
    nearest[apart > _FARTHEST] = -1
    found = [_outline(places[nearest == number], probability) for number in spine]
    found = without_fragments([outline for outline in found if outline], probability.shape[2])
    return found, () if found else ("no spine found",)


def _chain(centres, votes):
    """Return which piles make up the spine, top first: the chain of neighbours with the most votes."""
    order = np.argsort(-centres[:, 2])
    usual = np.minimum(votes / np.median(votes), 1.0)
    best, before = usual.copy(), np.full(len(centres), -1)
    for rank, i in enumerate(order):
        above = order[:rank]
        step = centres[above] - centres[i]
        apart = np.linalg.norm(step, axis=1)
        linked = (apart >= _NEAREST) & (apart <= _LONGEST) & (step[:, 2] > 0.3 * apart)
        if linked.any():
            j = above[linked][(best[above] - _DETOUR * apart)[linked].argmax()]
            gain = best[j] - _DETOUR * np.linalg.norm(centres[j] - centres[i])
            if gain > 0:
                best[i], before[i] = usual[i] + gain, j
    chain = [int(best.argmax())]
    while before[chain[-1]] >= 0:
        chain.append(int(before[chain[-1]]))
    return chain[::-1][:MOST_VERTEBRAE]


def _votes(probability, aims):
    """Return index (n, 3), aim (n, 3) and weight (n,) of voxels that are rather bone than not."""
    places = np.argwhere(probability.numpy() > 0.5)
    index = tuple(places.T)
    return places, aims.numpy()[(slice(None), *index)].T, probability.numpy()[index]


def _piles(points, weights, votes, slices):
    """Return the places (n, 3) where votes pile up, as the mean of the votes nearby, and how many these are (n,)."""
    highest = ndimage.maximum_filter(votes, 2 * _PEAK + 1)
    peaks = np.argwhere((votes == highest) & (votes > _LOWEST_PILE))
    peaks = peaks[np.argsort(-votes[tuple(peaks.T)])] - _MARGIN
    tree, centres, counts = cKDTree(points.reshape(-1, 3)), [], []
    for peak in peaks:
        near = tree.query_ball_point(peak, _NEAREST)
        if weights[near].sum() < _FEWEST_VOTES:
            continue
        centre = np.average(points[near], axis=0, weights=weights[near])
        if all(np.linalg.norm(centre - other) >= _NEAREST for other in centres):
            centres.append(centre)
            counts.append(weights[near].sum())
    centres, counts = np.array(centres).reshape(-1, 3), np.array(counts)
    for beyond in (lambda places: places[:, 2] < 0, lambda places: places[:, 2] > slices - 1):
        centres, counts = _with_cut(centres, counts, points[beyond(points)], weights[beyond(points)], beyond(centres))
    return centres, counts


def _with_cut(centres, counts, points, weights, there):
    """Return piles with one for the votes beyond the first or the last slice: those of a cut vertebra.

    They scatter, so that there may be no peak, or only small ones (`there`). Without a pile of their own they would go
    to the whole vertebra beside it, which would then be taken for a cut one.
    """
    if weights.sum() < _FEWEST_VOTES or counts[there].max(initial=0) > weights.sum() / 2:
        return centres, counts
    centres, counts = centres[~there], counts[~there]
    centre = np.average(points, axis=0, weights=weights)
    if len(centres) and np.linalg.norm(centres - centre, axis=1).min() < _NEAREST:
        return centres, counts
    return np.vstack([centres, centre]), np.append(counts, weights.sum())


def _outline(places, probability):
    """Return voxels as an outline, without crumbs."""
    if len(places) < _FEWEST_VOTES:
        return None
    centre = places.mean(axis=0)
    corner = np.rint(centre - (PATCH - 1) / 2).astype(int)
    inside = ((places >= corner) & (places < corner + PATCH)).all(1)
    own = np.zeros(_ROI, bool)
    own[tuple((places[inside] - corner).T)] = True
    pieces, _ = ndimage.label(own, np.ones((3, 3, 3)))
    sizes = np.bincount(pieces.ravel())
    own &= sizes[pieces] >= min(_LOOSE, sizes[1:].max(initial=0))
    around = crop(probability, corner, PATCH, 0.0)
    return Outline(corner, (around * ((around <= 0.5) | torch.from_numpy(own))).half(), centre)
