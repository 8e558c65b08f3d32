"""What the vertebra networks learn from: random parts of cached scans, moved, cut and spoilt.

Every item depends on (seed, epoch, index) alone. A part is sampled once, straight from the file, through a random
affine motion; the field of view is cut above and below at random, because vertebrae at its border decide where the
iteration starts and ends.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from spinelib.levels import LEVEL_ORDER
from spinelib.models.scan_cache import WORKING_MM, CachedScan
from spinelib.models.scan_grid import OUTSIDE, normalised, overlap

PATCH = 64
"""Voxels a side of a vertebra patch: 128 mm, as in Serrador 2024."""

SPINE_STEP = 2
"""Working voxels a side of a coarse voxel, 4 mm, on which the spine is found and levels are read."""

SPINE_CUBE, LEVEL_CUBE = 48, 40
"""Coarse voxels a side of a training part of the heat map, 192 mm, and of a level patch, 160 mm."""

HEAT_SIGMA_MM = 6.0
"""Of the Gaussians at body centres."""

WHOLE_SHARE = 0.97
"""Visible share from which a vertebra counts as complete."""


_ASIDE = 20.0
"""Voxels by which a patch of `VoteDataset` lies beside a vertebra at most, along each axis."""

_NOWHERE = 255  # label of voxels outside the field of view while a patch is sampled


@dataclass(frozen=True)
class _View:
    """Random motion and field of view: `linear` (3, 3) from patch to scan voxels; slices `low` to `high` exist."""

    linear: np.ndarray
    low: int
    high: int


class _Parts(Dataset):
    """Items are pure functions of (seed, epoch, index)."""

    def __init__(self, scans: list[CachedScan], length: int, seed: int = 0, augment: bool = True):
        self.scans, self.length, self.seed, self.augment, self.epoch = scans, length, seed, augment, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other parts from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the parts an epoch."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a part."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        place = int(rng.integers(len(self.scans))) if self.augment else index % len(self.scans)
        return self._item(place, rng)

    def _target(self, scan, rng):
        """Return a level, if possible one in the field of view; the view; and all levels in it."""
        target = int(rng.choice(scan.levels))
        view = self._view(scan, rng, target)
        present = _present(scan, view)
        return target if target in present or not present else int(rng.choice(present)), view, present

    def _view(self, scan, rng, target) -> _View:
        linear = _random_linear(rng) if self.augment else np.eye(3)
        low, high = 0, scan.shape[2]
        centre = scan.small["centres"][target, 2]
        if self.augment and rng.random() < 0.25:
            high = int(np.clip(rng.uniform(centre, scan.shape[2]), centre + 2, scan.shape[2]))
        elif self.augment and rng.random() < 0.25:  # just above the target
            high = int(np.clip(centre + rng.uniform(2, 25), 1, scan.shape[2]))
        if self.augment and rng.random() < 0.25:
            low = int(np.clip(rng.uniform(0, centre), 0, centre - 2))
        return _View(linear, low, max(high, low + 1))


class OutlineDataset(_Parts):
    """Items 'image' (2, 64, 64, 64): CT and memory, and 'target' (1, 64, 64, 64) uint8, the vertebra in the middle.

    One item in eight has nothing to outline: its middle lies in a vertebra of the memory, or away from any body.
    """

    def _item(self, place, rng):
        scan = self.scans[place]
        target, view, present = self._target(scan, rng)
        wanted = target in present and rng.random() > 0.125
        above = set(present[: present.index(target)]) if target in present else set()
        centre = _between(scan, target, rng)
        if not wanted and rng.random() < 0.5:
            above.add(target)
        elif not wanted:
            centre = _elsewhere(scan, centre, rng)
        ct, labels = _sampled(scan, centre, view, PATCH)
        ct = _spoilt(ct, rng) if self.augment else ct
        memory = torch.isin(labels, torch.tensor(sorted(above), dtype=torch.uint8))
        if self.augment and above:
            memory = _roughened(memory, rng)
        return {
            "image": torch.stack([ct, memory.float()]),
            "target": ((labels == target) & wanted)[None].to(torch.uint8),
        }


class VoteDataset(_Parts):
    """Items 'image' (1, 64, 64, 64), 'labels' (64, 64, 64) uint8, 'bodies' (29, 3): body centres as patch indices.

    Parameters
    ----------
    scans, length, seed, augment
        As for the others.
    moved : float
        Share of parts under a random affine motion. The others are as the scan has them, or mirrored: labels that
        are sampled anew are wrong by half a voxel at the surface, which teaches a network to leave it vague.
    """

    def __init__(self, scans, length, seed=0, augment=True, moved=0.5):
        super().__init__(scans, length, seed, augment)
        self.moved = moved

    def _item(self, place, rng):
        scan = self.scans[place]
        target = int(rng.choice(scan.levels))
        view = self._view(scan, rng, target)
        near = scan.small["centres"][target] if rng.random() < 0.85 else rng.uniform(0, scan.shape)
        centre = near + (rng.uniform(-_ASIDE, _ASIDE, 3) if self.augment else 0.0)
        if not self.augment or rng.random() >= self.moved:
            view = replace(view, linear=_flip(rng) if self.augment else view.linear)
            centre = np.floor(centre) + 0.5  # voxels of the patch are voxels of the scan
        ct, labels = _sampled(scan, centre, view, PATCH)
        bodies = (scan.small["bodies"] - centre) @ np.linalg.inv(view.linear).T + (PATCH - 1) / 2
        known = torch.from_numpy(np.isfinite(bodies[:, 0]))
        return {
            "image": (_spoilt(ct, rng) if self.augment else ct)[None],
            "labels": torch.where(known[labels.long()], labels, 0),
            "bodies": torch.from_numpy(np.nan_to_num(bodies).astype(np.float32)),
        }


class _CoarseParts(_Parts):
    """Parts with voxels of 4 mm, cut from scans that were averaged beforehand (`scan_cache.pooled`)."""

    def __init__(self, scans, length, seed=0, augment=True, coarse=None):
        super().__init__(scans, length, seed, augment)
        self.coarse = coarse

    def _coarse_ct(self, place, centre, view, size, rng):
        """Return network values (size, size, size) and the working index of every voxel (size, size, size, 3)."""
        step = SPINE_STEP
        points = _points(centre, view.linear * step, size)
        values = _interpolate(self.coarse[place].float(), (points - (step - 1) / 2) / step, np.zeros(3, int))
        image = torch.where(_inside(points, self.scans[place].shape, view), normalised(values), OUTSIDE)
        return _spoilt(image, rng) if self.augment else image, points


class LevelDataset(_CoarseParts):
    """Items 'image' (2, 40, 40, 40): CT and mask, 'level' index in LEVEL_ORDER, 'complete' 0 or 1."""

    def _item(self, place, rng):
        scan = self.scans[place]
        target, view, present = self._target(scan, rng)
        centre = scan.small["centres"][target] + (rng.uniform(-4, 4, 3) if self.augment else 0.0)
        ct, _ = self._coarse_ct(place, centre, view, LEVEL_CUBE, rng)
        coarse = _View(view.linear * SPINE_STEP, view.low, view.high)
        mask = _sampled(scan, centre, coarse, LEVEL_CUBE)[1] == target
        if self.augment and rng.random() < 0.5:
            mask = _shifted(mask, rng)
        complete = _visible_share(scan, view)[target] >= WHOLE_SHARE and not scan.small["cut"][target]
        return {
            "image": torch.stack([ct, mask.float()]),
            "level": torch.tensor(LEVEL_ORDER.index(target)),
            "complete": torch.tensor(float(complete)),
        }


class SpineDataset(_CoarseParts):
    """Items 'image' (1, 48, 48, 48): CT at 4 mm, and 'heat' of the same shape, Gaussians at body centres."""

    def _item(self, place, rng):
        scan = self.scans[place]
        target = int(rng.choice(scan.levels))
        view = self._view(scan, rng, target)
        near = scan.small["centres"][target] if rng.random() < 0.7 else rng.uniform(0, scan.shape)
        image, points = self._coarse_ct(place, near + rng.uniform(-30, 30, 3), view, SPINE_CUBE, rng)
        bodies = scan.small["bodies"]
        bodies = bodies[_present(scan, view)]
        heat = torch.zeros(points.shape[:3])
        for body in bodies:
            apart = ((points - torch.as_tensor(body, dtype=torch.float32)) ** 2).sum(-1) * WORKING_MM**2
            heat = torch.maximum(heat, torch.exp(-apart / (2 * HEAT_SIGMA_MM**2)))
        return {"image": image[None], "heat": heat[None]}


def _between(scan, target, rng):
    """Return a place between the centres of body and mask, where the search comes to rest, give or take 5 mm."""
    tables = scan.small
    share = rng.random() if np.isfinite(tables["bodies"][target]).all() else 1.0
    body = np.nan_to_num(tables["bodies"][target])
    return (1 - share) * body + share * tables["centres"][target] + rng.normal(0, 2.5, 3)


def _elsewhere(scan, centre, rng):
    """Return a place at least 30 mm from every body, or the given one moved by 80 mm if chance finds none."""
    bodies = scan.small["bodies"]
    bodies = bodies[np.isfinite(bodies[:, 0])]
    for _ in range(20):
        place = centre + rng.uniform(-40, 40, 3)
        if np.linalg.norm(bodies - place, axis=1).min() > 30 / WORKING_MM:
            return place
    return centre + [40.0, 0.0, 0.0]


def _visible_share(scan, view):
    profile = scan.small["profile"]
    return profile[:, view.low : view.high].sum(1) / np.maximum(profile.sum(1), 1)


def _present(scan, view):
    """Return the levels whose body centre lies in the field of view, cranial to caudal."""
    bodies = scan.small["bodies"]
    low = np.array([0, 0, view.low])
    inside = ((bodies >= low) & (bodies < [*scan.shape[:2], view.high])).all(axis=1)
    return [label for label in scan.levels if inside[label]]


def _random_linear(rng):
    """Rotation of some 6 degrees, scale 0.85 to 1.18 with 5% of stretch per axis, left-right flip."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_rotvec(np.radians(np.clip(rng.normal(0, 6), -20, 20)) * _unit(rng)).as_matrix()
    scale = np.exp(rng.uniform(-0.16, 0.16) + rng.uniform(-0.05, 0.05, 3))
    return turn @ np.diag(scale) @ _flip(rng)


def _flip(rng):
    return np.diag([rng.choice([-1.0, 1.0]), 1.0, 1.0])


def _unit(rng):
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _points(centre, linear, size):
    """Return the scan index of every voxel of a patch, (size, size, size, 3)."""
    axis = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    local = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return local @ torch.as_tensor(linear, dtype=torch.float32).T + torch.as_tensor(centre, dtype=torch.float32)


def _inside(points, shape, view):
    """Return where points lie in the field of view."""
    low, high = torch.tensor([0, 0, view.low]) - 0.5, torch.tensor([*shape[:2], view.high]) - 0.5
    return ((points >= low) & (points < high)).all(-1)


def _sampled(scan, centre, view, size):
    """Return network values of the CT and labels (uint8) of a moved patch."""
    reach = np.abs(view.linear).sum(axis=1) * (size - 1) / 2
    first = np.floor(centre - reach).astype(int) - 1
    shape = np.ceil(centre + reach).astype(int) + 2 - first
    ct, labels = torch.full(tuple(shape), -1000.0), torch.full(tuple(shape), float(_NOWHERE))
    inside, there = overlap((*scan.shape[:2], view.high), first, shape)
    if inside is not None and inside[2].stop > view.low:
        skipped = max(view.low - inside[2].start, 0)
        inside = (*inside[:2], slice(inside[2].start + skipped, inside[2].stop))
        there = (*there[:2], slice(there[2].start + skipped, there[2].stop))
        ct[there], labels[there] = scan.box("ct", inside).float(), scan.box("labels", inside).float()
    grid = _grid(view.linear, centre - first, shape, size)
    ct = functional.grid_sample(ct[None, None], grid, align_corners=True, padding_mode="border")[0, 0]
    labels = functional.grid_sample(labels[None, None], grid, "nearest", "border", align_corners=True)[0, 0]
    outside = labels == _NOWHERE
    return torch.where(outside, OUTSIDE, normalised(ct)), torch.where(outside, 0, labels).to(torch.uint8)


def _grid(linear, centre, shape, size):
    """Return the sampling grid of a patch in a box: voxel i of the patch lies at centre + linear (i - middle)."""
    half = (np.asarray(shape) - 1) / 2
    matrix = np.concatenate([linear * (size - 1) / 2 / half[:, None], (centre / half - 1)[:, None]], axis=1)
    theta = np.concatenate([matrix[::-1, 2::-1], matrix[::-1, 3:]], axis=1)  # torch names the last axis first
    theta = torch.from_numpy(theta.astype(np.float32))[None]
    return functional.affine_grid(theta, (1, 1, size, size, size), align_corners=True)


def _interpolate(values, points, first):
    """Interpolate values, whose voxel 0 has index `first`, linearly at points; the border is held."""
    span = torch.tensor(values.shape, dtype=torch.float32) - 1
    places = 2 * (points - torch.as_tensor(first, dtype=torch.float32)) / span.clamp(min=1) - 1
    grid = places.flip(-1)[None]  # grid_sample wants the last axis first
    return functional.grid_sample(values[None, None], grid, padding_mode="border", align_corners=True)[0, 0]


def _spoilt(ct, rng):
    """Return the CT with another calibration, sharpness and noise; what lies outside stays as it is."""
    outside = ct <= OUTSIDE + 1e-3
    values = ct * float(rng.uniform(0.8, 1.2)) + float(rng.uniform(-0.06, 0.06))
    bright = (values > 0.1).float()
    values = values + bright * (values - 0.1) * float(rng.uniform(-0.4, 0.4))  # bone of another density
    if rng.random() < 0.5:
        values = _blurred(values, rng.uniform(0.0, 0.9, 3) if rng.random() < 0.7 else (0, 0, rng.uniform(0.5, 1.6)))
    if rng.random() < 0.7:
        noise = torch.randn(ct.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
        noise = _blurred(noise, rng.uniform(0, 0.8, 3)) if rng.random() < 0.5 else noise
        values = values + noise * float(rng.uniform(0, 0.07))
    return torch.where(outside, OUTSIDE, values.clamp(-1, 2))


def _blurred(values, sigmas):
    from scipy.ndimage import gaussian_filter

    return torch.from_numpy(gaussian_filter(values.numpy(), sigmas, truncate=2.5))


def _roughened(memory, rng):
    """Return a mask (bool) as a network would leave it: shifted by a voxel, or grown, or shrunk."""
    kind = rng.random()
    if kind < 0.4:
        return memory
    if kind < 0.7:
        return _shifted(memory, rng)
    grown = functional.max_pool3d((memory if kind < 0.85 else ~memory).float()[None], 3, 1, 1)[0] > 0.5
    return grown if kind < 0.85 else ~grown


def _shifted(mask, rng):
    """Return a mask moved by at most a voxel along each axis."""
    return torch.roll(mask, tuple(int(s) for s in rng.integers(-1, 2, 3)), (0, 1, 2))
