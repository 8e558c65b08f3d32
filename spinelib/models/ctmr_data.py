"""Pairs of CT and MR as the registration networks see them: a common grid of 1.5 mm, cached, cropped and augmented.

Every item depends on (seed, epoch, index) alone.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nibabel.affines import apply_affine
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from spinelib.deformation import covers, grid_points_mm, resample
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.pairs import RegistrationPair, vertebra_labels
from spinelib.models.ctmr import DIVISOR, index_grid, sample
from spinelib.record import written_atomically

WORKING_MM = 1.5
"""Voxel size of the working grid, along the world's axes."""

MARGIN_MM = 12.0
"""How far the working grid reaches beyond the vertebrae."""

CROP = (64, 80, 80)
"""Voxels of a training item: 96 x 120 x 120 mm, three to five vertebrae."""

JITTER_DEG, JITTER_MM = 3.0, 4.0
"""Largest turn and shift, about and along each axis, by which training moves a CT: what pre-alignment leaves."""

_HU_LIMITS = (-1000.0, 2000.0)
_MR_PERCENTILES = (0.5, 99.5)
_SMOOTHING = 0.4  # standard deviation of the filter, in units of the resolution that is given up
_CROP_SHIFT = 8  # voxels that a training crop's middle may lie off a vertebra's
_GAMMA, _BIAS = 0.2, 0.15  # standard deviations of logarithms
_FORMAT = "spinelib ctmr pair 1"


def working_pair(pair: RegistrationPair) -> tuple[dict[str, Tensor], VolumeGrid]:
    """Return a pair on the working grid, and the grid.

    The grid is the box around the CT's vertebrae, as far as the MR covers them, with `MARGIN_MM` around but not beyond
    both images, made larger until its sides are multiples of 16 voxels. Finer images are smoothed before they are
    sampled.

    Returns
    -------
    tensors : dict of str to Tensor
        'ct' (1, R, A, S) float32: 0 at -1000 HU and below, 1 at 2000 HU and above. 'mr' (1, R, A, S) float32: 0 and 1
        at the percentiles 0.5 and 99.5 of what is in the box. 'labels' (R, A, S) uint8: VerSe labels of the CT.
        'valid', 'ct_valid' (1, R, A, S) float32: 1 where the MR, and the CT, were acquired.
    grid : VolumeGrid

    Raises
    ------
    InputError
        If no labelled vertebra lies in the MR.
    """
    grid = _working_grid(pair)
    points = grid_points_mm(grid)
    in_mr, in_ct = covers(pair.mr.grid, points), covers(pair.ct.grid, points)
    mr = resample(_smoothed(pair.mr), grid).values
    low, high = np.percentile(mr[in_mr], _MR_PERCENTILES)
    hounsfield = resample(_smoothed(pair.ct), grid, fill=_HU_LIMITS[0]).values
    labels = resample(pair.ct_labels, grid, order=0).values
    labels[~np.isin(labels, vertebra_labels(pair.ct_labels))] = 0
    images = {
        "ct": (hounsfield - _HU_LIMITS[0]) / (_HU_LIMITS[1] - _HU_LIMITS[0]),
        "mr": np.where(in_mr, (mr - low) / max(high - low, 1e-6), 0),
        "valid": in_mr,
        "ct_valid": in_ct,
    }
    tensors = {name: torch.from_numpy(image.clip(0, 1).astype(np.float32))[None] for name, image in images.items()}
    return tensors | {"labels": torch.from_numpy(labels.astype(np.uint8))}, grid


def cache_pair(pair: RegistrationPair, path) -> Path:
    """Write the working pair to a safetensors file, whole or not at all; returns its path."""
    tensors, grid = working_pair(pair)
    narrow = {name: tensors[name].to(torch.uint8) for name in ("valid", "ct_valid")}
    narrow |= {name: tensors[name].half() for name in ("ct", "mr")} | {"labels": tensors["labels"]}
    about = {"format": _FORMAT, "key": pair.key, "affine": json.dumps(grid.affine.tolist())}
    return written_atomically(path, [".safetensors"], partial(save_file, narrow, metadata=about))


def load_pair(path) -> tuple[dict[str, Tensor], VolumeGrid]:
    """Read a file of `cache_pair`; returns what `working_pair` does.

    Raises
    ------
    InputError
        If it is not one.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        message = f"{path} cannot be read ({error}). Fix: delete it and run the training again."
        raise InputError(message) from error
    if about.get("format") != _FORMAT:
        message = f"{path}: expected the format {_FORMAT!r}, given {about.get('format')!r}. Fix: delete it."
        raise InputError(message)
    grid = VolumeGrid(tuple(tensors["labels"].shape), np.array(json.loads(about["affine"])))
    return {name: value if name == "labels" else value.float() for name, value in tensors.items()}, grid


class PairDataset(Dataset):
    """Crops of cached pairs, with the tensors of `working_pair`; outside the working grid all are 0.

    Parameters
    ----------
    paths : sequence of path
        Files of `cache_pair`.
    shape : (3,) of int
        Voxels of an item, multiples of 16.
    augment : bool
        Crops around any vertebra, not around the middle; CT turned and shifted as if pre-alignment were imperfect;
        left-right mirroring; contrast and coil sensitivity of the MR.
    seed : int
    parts : int, optional
        Items an epoch, from as many pairs as there are, others each epoch. Default: one a pair.

    Raises
    ------
    InputError
        Without any pair, or for a side that is no multiple of 16.
    """

    def __init__(
        self,
        paths: Sequence,
        shape: tuple[int, int, int] = CROP,
        augment: bool = False,
        seed: int = 0,
        parts: int | None = None,
    ):
        if not paths or any(n < DIVISOR or n % DIVISOR for n in shape):
            message = (
                f"expected at least one pair and sides that are multiples of {DIVISOR}, given {len(paths)}, {shape}."
            )
            raise InputError(message)
        self.paths, self.shape, self.augment, self.seed = list(paths), tuple(shape), augment, seed
        self.count = len(self.paths) if parts is None else parts
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw other pairs and augmentations from now on."""
        self.epoch = epoch
        rng = np.random.default_rng([self.seed, epoch])
        self.order = rng.permutation(len(self.paths)) if self.augment else np.arange(len(self.paths))

    def __len__(self) -> int:
        """Return the items an epoch."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of an item."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        tensors, _ = load_pair(self.paths[self.order[index % len(self.order)]])
        points = index_grid(self.shape) + self._corner(tensors["labels"], rng)[:, None, None, None]
        moved = _jittered(points, rng) if self.augment else points
        item = {name: _sampled(tensors[name], points, "nearest") for name in ("mr", "valid")}
        item["ct"] = _sampled(tensors["ct"], moved, "bilinear")
        item["ct_valid"] = _sampled(tensors["ct_valid"], moved, "nearest")
        item["labels"] = _sampled(tensors["labels"][None].float(), moved, "nearest")[0].to(torch.uint8)
        if not self.augment:
            return item
        item["mr"] = _other_scanner(item["mr"], rng)
        return {name: value.flip(-3) for name, value in item.items()} if rng.random() < 0.5 else item

    def _corner(self, labels, rng):
        """Return the index (3,) of an item's first voxel; may be negative where the item is larger than the pair."""
        size, shape = np.array(labels.shape), np.array(self.shape)
        middle = size / 2
        if self.augment and (size > shape).any():
            label = rng.choice(np.unique(labels.numpy())[1:])
            middle = np.argwhere(labels.numpy() == label).mean(0) + rng.uniform(-_CROP_SHIFT, _CROP_SHIFT, 3)
        room = size - shape
        corner = np.rint(middle - shape / 2).clip(np.minimum(0, room // 2), np.maximum(0, room))
        return torch.from_numpy(np.where(room < 0, room // 2, corner)).float()


def _working_grid(pair):
    labelled = np.isin(pair.ct_labels.values, vertebra_labels(pair.ct_labels))
    points = apply_affine(pair.ct_labels.affine, np.argwhere(labelled))
    points = points[covers(pair.mr.grid, points)]
    if not len(points):
        message = f"{pair.key}: no labelled vertebra lies inside the MR. Fix: lay the MR over the CT first."
        raise InputError(message)
    seen = np.concatenate([pair.mr.grid.corners_mm(), pair.ct.grid.corners_mm()])
    low = np.maximum(points.min(0) - MARGIN_MM, seen.min(0))
    high = np.minimum(points.max(0) + MARGIN_MM, seen.max(0))
    block = DIVISOR * WORKING_MM
    sides = np.ceil((high - low) / block).astype(int) * DIVISOR
    affine = np.diag([WORKING_MM, WORKING_MM, WORKING_MM, 1.0])
    affine[:3, 3] = (low + high) / 2 - WORKING_MM * (sides - 1) / 2
    return VolumeGrid(tuple(int(n) for n in sides), affine)


def _smoothed(volume):
    """Return an image without the detail that the working grid cannot show."""
    finer = np.maximum(WORKING_MM**2 - volume.spacing_mm**2, 0)
    sigma = _SMOOTHING * np.sqrt(finer) / volume.spacing_mm
    return Volume(gaussian_filter(volume.values.astype(np.float32), sigma), volume.affine)


def _sampled(image, points, mode):
    return sample(image[None], points[None], mode, "zeros")[0]


def _jittered(points, rng):
    """Return points turned about their middle and shifted, by no more than the jitter."""
    turn = Rotation.from_euler("xyz", rng.uniform(-JITTER_DEG, JITTER_DEG, 3), degrees=True).as_matrix()
    shift = torch.from_numpy(rng.uniform(-JITTER_MM, JITTER_MM, 3) / WORKING_MM).float()
    middle = points.mean((1, 2, 3))
    turned = torch.tensordot(torch.from_numpy(turn).float(), points - middle[:, None, None, None], 1)
    return turned + (middle + shift)[:, None, None, None]


def _other_scanner(mr, rng):
    """Return an MR with another contrast and a smooth change of sensitivity."""
    bias = torch.from_numpy(rng.normal(0, _BIAS, (1, 1, 3, 3, 3))).float()
    bias = functional.interpolate(bias, mr.shape[1:], mode="trilinear", align_corners=True)[0]
    return mr ** float(np.exp(rng.normal(0, _GAMMA))) * bias.exp()
