"""Pairs of a given CT and an MR image made from it, with the true motion between them.

Pairs of real CT and MR with a known motion do not exist. Here the CT and its vertebrae are given, real ones for
instance; the motion is drawn as for phantoms, and the signal of the MR is guessed from the CT. So anatomy and CT are
real, the MR is not: it shows nothing that the CT does not, and discs look like muscle.
"""

from dataclasses import dataclass
from functools import cached_property
from zlib import crc32

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from spinelib.deformation import DisplacementField, resample, warp_labels
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.canal import spinal_canal
from spinelib.imaging.labels import signed_distance
from spinelib.imaging.mr_contrast import sample_sequence, sample_signals
from spinelib.imaging.pairs import RegistrationPair, vertebra_labels
from spinelib.levels import LEVEL_OF_LABEL, LEVEL_ORDER, VERSE_LABELS
from spinelib.phantom.fields import smooth_field
from spinelib.phantom.pairs import (
    BOX_MM,
    LABELLED_SHARE,
    STANDARD_MIX,
    PairMix,
    inner_box,
    pair_boxes,
    sample_motion,
    scan_moved,
)

_FRAME_MM = 6.0  # around a mask, as far as distances to it are asked for
_FAT_HU, _LEAN_HU, _GAS_HU, _LUNG_HU = -100.0, 20.0, -300.0, -700.0
_MINERAL_HU = (250.0, 900.0)  # bone loses its signal between these
_BRIGHT_HU = (130.0, 300.0)  # outside vertebrae: vessels with contrast agent, calcium, ribs
_LEAST_VOXELS = 200
_CORD_SHARE, _CONUS = 0.55, VERSE_LABELS["L1"]  # of the canal's radius; where the cord ends


def pairs_from_ct(
    ct: Volume, labels: Volume, key: str, seed: int = 0, mix: PairMix = STANDARD_MIX
) -> list[RegistrationPair]:
    """Return pairs around about every fourth vertebra of a CT, each with its own motion.

    Parameters
    ----------
    ct, labels : Volume
        HU and VerSe labels on one grid.
    key : str
        Begins the keys of the pairs.
    seed : int
        Motion and contrast depend on it and on the pair's key.
    mix : PairMix
        `label_errors` is not used.

    Raises
    ------
    InputError
        Without a vertebra that a box holds to its half.
    """
    order = vertebra_labels(labels)
    boxes = max(1, round(len(order) / 4))
    middles = [order[int((number + 0.5) * len(order) / boxes)] for number in range(boxes if order else 0)]
    pairs = [_pair(ct, labels, middle, key, seed, mix) for middle in middles]
    if not (pairs := [pair for pair in pairs if pair.transforms]):
        message = f"{key}: no labelled vertebra fits into a box. Expected VerSe labels. Fix: check the mask."
        raise InputError(message)
    return pairs


@dataclass(frozen=True)
class MaskBones:
    """Vertebrae as masks of a CT; what `pair_motion` asks of `Bones`."""

    labels: tuple[int, ...]
    values: Volume
    poses: np.ndarray
    joints_mm: np.ndarray

    @classmethod
    def of(cls, labels: Volume) -> "MaskBones":
        """Take every vertebra of a volume; joints lie halfway between the middles of neighbours."""
        order = vertebra_labels(labels)
        middles = ndimage.center_of_mass(labels.values > 0, labels.values, order)
        poses = np.tile(np.eye(4), (len(order), 1, 1))
        poses[:, :3, 3] = apply_affine(labels.affine, middles)
        return cls(tuple(order), labels, poses, (poses[1:, :3, 3] + poses[:-1, :3, 3]) / 2)

    @cached_property
    def frames(self) -> list[Volume]:
        """Signed distances (mm) in a box around each mask."""
        return [signed_distance(self.values, label, _FRAME_MM) for label in self.labels]

    def distance(self, number: int, points_mm: np.ndarray) -> np.ndarray:
        """Return the signed distance (mm) of CT points (..., 3) to a vertebra, at most about `_FRAME_MM`."""
        frame = self.frames[number]
        index = apply_affine(np.linalg.inv(frame.affine), points_mm)
        return ndimage.map_coordinates(frame.values, np.moveaxis(index, -1, 0), order=1, mode="nearest")

    def bounds_mm(self, number: int) -> np.ndarray:
        """Return the corners (8, 3) of a vertebra's box, CT world mm."""
        return self.frames[number].grid.corners_mm()


def signal_of_ct(hounsfield: Volume, labels: Volume, contrast: str, rng: np.random.Generator) -> np.ndarray:
    """Return a spin-echo signal (R, A, S), float32, that a CT lets one guess.

    Fat, lean tissue and gas by their Hounsfield units; marrow inside the labels, less where bone is dense; cord and
    fluid in a canal through the rings that arches close; none in what is bright outside vertebrae.

    Parameters
    ----------
    hounsfield, labels : Volume
        On one grid.
    contrast : str
        't1' or 't2'.
    rng : numpy.random.Generator
    """
    signals, values = sample_signals(sample_sequence(contrast, rng), rng), hounsfield.values
    bone = labels.values > 0
    fat = _ramp(values, _LEAN_HU, _FAT_HU)
    soft = signals["muscle"] + fat * (signals["fat"] - signals["muscle"])
    soft = soft + _ramp(values, _GAS_HU, _LUNG_HU) * (signals["lung"] - soft)
    soft *= 1 - _ramp(values, *_BRIGHT_HU)
    marrow = 0.5 * (signals["marrow_fat"] + signals["marrow_water"]) * (1 - _ramp(values, *_MINERAL_HU))
    canal = spinal_canal(labels)
    depth = ndimage.distance_transform_edt(canal, sampling=hounsfield.spacing_mm)
    cord = depth > (1 - _CORD_SHARE) * depth.max()
    cord[:, :, : _lowest(labels, _CONUS)] = False
    fluid = np.where(cord, signals["cord"], signals["csf"])
    signal = np.where(bone, marrow, np.where(canal & (values < _BRIGHT_HU[0]), fluid, soft))
    texture = sum(0.05 * smooth_field(rng, values.shape, hounsfield.spacing_mm, length) for length in (3.0, 12.0))
    return (signal * (1 + texture)).astype(np.float32).clip(min=0)


def _pair(ct, labels, middle, key, seed, mix):
    centre = apply_affine(labels.affine, np.argwhere(labels.values == middle).mean(axis=0))
    box, scene = pair_boxes(centre, BOX_MM)
    hounsfield = resample(ct, scene, fill=-1000.0)
    names = warp_labels(labels, DisplacementField.zero(scene))
    counts = np.bincount(names.values.ravel(), minlength=256)
    names.values[(counts < _LEAST_VOXELS)[names.values]] = 0
    name = f"{key}-{LEVEL_OF_LABEL[middle]}"
    drawn, moved = np.random.SeedSequence([seed, crc32(name.encode())]).spawn(2)
    rng = np.random.default_rng(drawn)
    contrast = "t2" if rng.random() < mix.t2 else "t1"
    signal = Volume(signal_of_ct(hounsfield, names, contrast, rng), scene.affine)
    motion, mr_grid = sample_motion(moved, bones := MaskBones.of(names), box, mix)
    inner = inner_box(scene, box)
    shown = _kept(names.values[inner], counts)
    shown_labels = Volume(shown, box.affine)
    transforms = {label: motion.transforms[bones.labels.index(label)] for label in vertebra_labels(shown_labels)}
    mr, mr_labels, field = scan_moved(signal, shown_labels, transforms, motion, mr_grid, mix, rng)
    scan = Volume(hounsfield.values[inner].copy(), box.affine)
    return RegistrationPair(name, scan, shown_labels, mr, mr_labels, field, transforms, contrast)


def _kept(values, counts):
    """Return labels without those of which less than half is shown."""
    shown = np.bincount(values.ravel(), minlength=256)
    return np.where((shown >= LABELLED_SHARE * counts)[values], values, 0).astype(np.uint8)


def _lowest(labels, label):
    """Return the lowest slice of a vertebra; where it is not labelled, the end that it lies beyond."""
    slices = np.flatnonzero((labels.values == label).any(axis=(0, 1)))
    if len(slices):
        return slices[0]
    below = [LEVEL_ORDER.index(other) > LEVEL_ORDER.index(label) for other in vertebra_labels(labels)]
    return labels.values.shape[2] if all(below) else 0


def _ramp(values, start, end):
    """Return 0 at and before a value, 1 at and beyond another."""
    return ((values - start) / (end - start)).clip(0, 1).astype(np.float32)
