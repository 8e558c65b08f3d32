"""What a CT with labels and an MR image say of the poses of vertebrae, in a form that `pose_fit` can search.

Around each vertebra the MR signal is to be told from the CT: from classes of its values, bone and tissue apart. The
classes, not the CT, are blurred as the MR is (slices of 3 to 4 mm): blurring and linear regression commute, so thick
slices cost sharpness but make no error. The canal is left out: a CT cannot tell fluid, the brightest in a T2-weighted
image, from other soft tissue (with it, 8 of 20 vertebrae of real CTs were lost, without it none).
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from spinelib.geometry import Volume
from spinelib.imaging.canal import spinal_canal

SHELL_MM = 4.0
"""Points are taken in bone and this far around it, but not in other bones."""

LEVER_MM = 20.0
"""Turns are counted in mm of arc at this radius."""

_BONE_HU = (0.0, 120.0, 240.0, 400.0, 700.0, 1200.0)
_TISSUE_HU = (-600.0, -100.0, 0.0, 60.0, 150.0, 400.0)
_GRAIN_MM = 8.0  # misfit is correlated over this length, so that points closer together count as one observation


@dataclass(frozen=True)
class Level:
    """One stage from coarse to fine: smoothing of both images in mm, points of a vertebra, Gauss-Newton steps."""

    sigma_mm: float
    points: int
    steps: int


@dataclass(frozen=True)
class Evidence:
    """What the images say of the poses of k vertebrae.

    Attributes
    ----------
    points : Tensor (k, n, 3)
        Points of each vertebra, CT world mm.
    classes : Tensor (k, n, c)
        Memberships of CT classes at the points, as the MR would blur them, and a plane for the shading by the coil.
    weights : Tensor (k, n)
        Of the points; 1 at first.
    mr : Tensor (1, 5, R, A, S)
        Signal, its gradient (1/mm, world axes), and 1 where it was acquired.
    to_unit : Tensor (3, 4)
        From MR world mm to (superior, anterior, right) from -1 to 1 on the MR's grid.
    observations : Tensor (k,)
        Independent observations of each vertebra when it is wholly in view.
    chance : Tensor (k,)
        Share of the variance that the regression leaves where the vertebra is not; 1 at first.
    """

    points: Tensor
    classes: Tensor
    weights: Tensor
    mr: Tensor
    to_unit: Tensor
    observations: Tensor
    chance: Tensor


def evidence(ct: Volume, labels: Volume, mr: Volume, valid: Volume | None, starts: dict, level: Level) -> Evidence:
    """Return the evidence of a level; images and `starts` as for `pose_fit.fit_poses`."""
    widths = _point_spread(ct, mr, next(iter(starts.values())), level.sigma_mm)
    canal = spinal_canal(labels)
    vertebrae = [_vertebra(ct, labels, canal, label, widths, level) for label in starts]
    points, classes, observations = (torch.stack(part) for part in zip(*vertebrae, strict=True))
    alike, chance = torch.ones(classes.shape[:2]), torch.ones(len(classes))
    return Evidence(points, classes, alike, *_signal(mr, valid, level.sigma_mm), observations, chance)


def _point_spread(ct, mr, pose, sigma_mm):
    """Return the widths in voxels along the CT's axes of the Gaussian that makes it as smooth as the smoothed MR."""
    edges = np.linalg.inv(ct.affine[:3, :3]) @ pose[:3, :3] @ mr.affine[:3, :3]  # of an MR voxel, in CT voxels
    boxes = (edges**2).sum(axis=1)
    return np.sqrt(np.maximum(boxes - 1, 0) / 12 + (sigma_mm / ct.spacing_mm) ** 2)


def _vertebra(ct, labels, canal, label, widths, level):
    """Return points (n, 3), classes (n, c) and the number of observations of one vertebra."""
    margin = np.ceil(SHELL_MM / ct.spacing_mm + 2 * widths).astype(int)
    box = ndimage.find_objects(labels.values == label, max_label=1)[0]
    box = tuple(slice(max(s.start - m, 0), s.stop + m) for s, m in zip(box, margin, strict=True))
    names, stride = labels.values[box], np.maximum(widths.astype(int), 1)
    near = ndimage.distance_transform_edt(names != label, sampling=ct.spacing_mm) <= SHELL_MM
    near &= (names == label) | ((names == 0) & ~canal[box])
    lattice = tuple(slice(None, None, int(s)) for s in stride)
    classes = torch.from_numpy(_classes(ct.values[box], names > 0))
    for axis, (width, step) in enumerate(zip(widths, stride, strict=True), start=1):
        classes = _blurred(classes, axis, float(width), int(step))
    index = np.argwhere(near[lattice])
    index = index[np.linspace(0, len(index) - 1, level.points).round().astype(int)]
    rows = classes[(slice(None), *index.T)].T
    corner = np.array([s.start for s in box])
    points = (corner + index * stride) @ ct.affine[:3, :3].T + ct.affine[:3, 3]
    plane = (points - points.mean(axis=0)) / LEVER_MM
    volume_mm3 = near.sum() * np.prod(ct.spacing_mm)
    observations = volume_mm3 / (_GRAIN_MM**2 + level.sigma_mm**2) ** 1.5
    rows = torch.cat([rows, torch.from_numpy(plane).float()], dim=1)
    return torch.from_numpy(points).float(), rows, torch.tensor(observations, dtype=torch.float32)


def _classes(hounsfield, bone):
    """Return memberships (c, ...) of overlapping classes; they sum to 1."""
    parts = []
    for nodes, mask in ((_BONE_HU, bone), (_TISSUE_HU, ~bone)):
        place = np.interp(hounsfield, nodes, np.arange(len(nodes)))
        parts += [np.maximum(1 - np.abs(place - i), 0) * mask for i in range(len(nodes))]
    return np.stack(parts).astype(np.float32)


def _blurred(values, axis, width, step):
    """Return values blurred along an axis, at every `step`-th voxel; weights beyond the border go to the others."""
    place = torch.arange(values.shape[axis], dtype=torch.float32)
    weights = torch.exp(-0.5 * ((place[::step, None] - place) / max(width, 1e-3)) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.tensordot(values, weights, dims=([axis], [1])).movedim(-1, axis)


def _signal(mr, valid, sigma_mm):
    smooth = ndimage.gaussian_filter(mr.values.astype(np.float32), sigma_mm / mr.spacing_mm, mode="nearest")
    smooth = (smooth - smooth.mean()) / (smooth.std() + 1e-6)
    gradient = np.stack(np.gradient(smooth), axis=-1) @ np.linalg.inv(mr.affine[:3, :3])
    acquired = np.ones_like(smooth) if valid is None else valid.values.astype(np.float32)
    channels = np.stack([smooth, *np.moveaxis(gradient, -1, 0), acquired]).astype(np.float32)
    to_unit = np.diag(2 / (np.array(mr.values.shape) - 1)) @ np.linalg.inv(mr.affine)[:3]
    to_unit[:, 3] -= 1
    return torch.from_numpy(channels)[None], torch.from_numpy(to_unit[::-1].copy()).float()
