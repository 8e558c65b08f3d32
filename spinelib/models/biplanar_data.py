"""What the networks that see a vertebra in two radiographs learn from: patches, annotations, cubes.

Every item depends on (seed, epoch, index) alone. Patches are cut from the cached line integrals at whole pixels and
cubes at whole voxels, so nothing is interpolated, and the matrices of an item are exact.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spinelib.data import assign_split
from spinelib.errors import InputError
from spinelib.imaging.cone_beam import ConeBeam
from spinelib.imaging.radiograph_pairs import (
    CUBE,
    CUBE_MM,
    LABELS,
    PATCH,
    REACH_MM,
    VIEWS,
    BiplanarSubject,
    cube_affine,
    cut_out,
    patch_corner,
)

ANNOTATIONS = ("none", "c2v", "n2v", "b2v", "v2v")
"""Second channel of a patch: nothing, a disc at the body centre, fainter ones at the next body centres besides, the
projected body, the projected vertebra. All but 'n2v', of ours, are those of Bayat 2020."""

MARKED = ("c2v", "n2v")
"""Those that need marked points only, no mask."""

CLICK_MM = 1.5
"""Standard deviation of the body centre that training assumes, about 1 pixel; on real images it is 2 to 5."""

_DISC_PX, _NEXT = 1.0, 0.5  # radius; how bright the discs of the next vertebrae are
_UNMARKED_RATE = 0.15  # share of next vertebrae that nobody has marked, in augmented items
_EXPOSED = 0.1  # a ray that lost less met no patient: the volume ends there, or a shutter was in the way
_SHUTTER_RATE = 0.15
_MOST_CLUTTER = 4
_CLUTTER = 0.05  # line integral a pixel of radius: a lung takes 0.05 away, vessels with contrast agent add 0.02


class BiplanarDataset(Dataset):
    """Items are vertebrae of some subjects.

    'frontal', 'lateral' (2, 64, 64) float32: radiograph, see `normalised`, and annotation. 'target' (1, 64, 64, 64)
    uint8: the vertebra, axes (right, anterior, superior). 'level' int64: index in `LABELS`, 0 = T1. 'cube_to_frontal',
    'cube_to_lateral' (3, 4) float32: take voxel index (i, j, k, 1) of the cube to (row * w, col * w, w) of the patch.
    'frame' (3, 3) float32, if all subjects have them: columns are the vertebra's axes in the world.

    Parameters
    ----------
    subjects : sequence of BiplanarSubject
    annotation : str
        One of `ANNOTATIONS`.
    augment : bool
        Left-right mirroring; exposure, scatter, noise, blur, gamma and shutters that differ between the two views.
    seed : int
    click_mm : float, optional
        Standard deviation, along each axis, of the body centre that is annotated: the patches and the cube are cut
        around it and the disc lies there. By default `CLICK_MM` with `augment`, else 0.
    crop_mm : float
        Standard deviation of the point that patches and cube are cut around, from the annotated one. With 0 the
        disc is always in the middle and says nothing that the cut does not; above 0 the value of an annotation shows.
    clutter : float
        Share of augmented patches that are overlaid with ellipsoids, solid or hollow, as lungs, arms and vessels with
        contrast agent lie before the spine of a patient.

    Raises
    ------
    InputError
        For an unknown annotation, a share that is none, or without any vertebra.
    """

    def __init__(
        self,
        subjects: Sequence[BiplanarSubject],
        annotation: str = "c2v",
        augment: bool = False,
        seed: int = 0,
        click_mm: float | None = None,
        crop_mm: float = 0.0,
        clutter: float = 0.0,
    ):
        if annotation not in ANNOTATIONS:
            message = f"unknown annotation {annotation!r}. Expected one of: {', '.join(map(repr, ANNOTATIONS))}."
            raise InputError(message)
        if not 0 <= clutter <= 1:
            message = f"clutter is {clutter}. Expected a share from 0 to 1."
            raise InputError(message)
        self.subjects, self.annotation, self.augment, self.seed, self.epoch = subjects, annotation, augment, seed, 0
        self.click_mm, self.crop_mm = CLICK_MM * augment if click_mm is None else click_mm, crop_mm
        self.clutter = clutter
        self.has_frames = all(subject.frames is not None for subject in subjects)
        self.parts = [(s, number) for s, subject in enumerate(subjects) for number in range(len(subject.labels))]
        if not self.parts:
            message = "no vertebra to learn from. Fix: render subjects with radiograph_cohort.render_biplanar_cohort."
            raise InputError(message)

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of vertebrae."""
        return len(self.parts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a vertebra; `parts[index]` says of which subject, and which of its vertebrae."""
        rng = np.random.default_rng([self.seed, self.epoch, index])
        place, number = self.parts[index]
        subject = self.subjects[place]
        body = subject.bodies_mm[number]
        click = body + _clipped(rng.normal(0, self.click_mm, 3))
        voxels = np.rint(_clipped(click - body + rng.normal(0, self.crop_mm, 3)) / CUBE_MM).astype(int)
        middle = body + voxels * CUBE_MM
        marks = self._next_marks(subject, number, rng) if self.annotation == "n2v" else ()
        item = {
            "target": subject.masks.cut(number, voxels, CUBE)[None].astype(np.uint8),
            "level": np.array(LABELS.index(subject.labels[number])),
        }
        if self.has_frames:
            item["frame"] = subject.frames[number].astype(np.float32)
        for view, name in enumerate(VIEWS):
            beam = subject.beams[view]
            corner = patch_corner(beam, middle)
            values = cut_out(subject.radiographs[view], corner, PATCH).astype(np.float32)
            values = _spoilt(values, rng, self.clutter) if self.augment else values
            item[name] = np.stack([normalised(values), self._annotation(subject, number, view, corner, click, marks)])
            item[f"cube_to_{name}"] = cube_to_patch(beam, cube_affine(middle), corner)
        item = _mirrored(item) if self.augment and rng.random() < 0.5 else item
        return {key: torch.as_tensor(value.copy()) for key, value in item.items()}

    def _next_marks(self, subject, number, rng):
        """Return the marked body centres (n, 3) above and below, as far off as the vertebra's own."""
        bodies = next_bodies(subject.bodies_mm, number)
        marked = rng.random(len(bodies)) >= _UNMARKED_RATE * self.augment
        return (bodies + _clipped(rng.normal(0, self.click_mm, bodies.shape)))[marked]

    def _annotation(self, subject, number, view, corner, click, marks):
        if self.annotation == "none":
            return np.zeros((PATCH, PATCH), np.float32)
        if self.annotation in MARKED:
            return discs(subject.beams[view], corner, click, marks)
        kind = {"b2v": "body", "v2v": "whole"}[self.annotation]
        return subject.shadows[kind][view].cut(number, corner, PATCH).astype(np.float32)


def next_bodies(bodies_mm: np.ndarray, number: int) -> np.ndarray:
    """Return the body centres (0 to 2, 3) before and after one of a list (n, 3) from the top down."""
    return np.concatenate([bodies_mm[max(number - 1, 0) : number], bodies_mm[number + 1 : number + 2]])


def discs(beam: ConeBeam, corner_rc, centre_mm, next_mm=()) -> np.ndarray:
    """Return the annotation (64, 64) of a body centre (3,) in a view, and of the next ones (n, 3), half as bright.

    The line through the next bodies says how a vertebra is tilted where its plates are hard to see. Those outside the
    patch leave nothing.
    """
    drawn = [_NEXT * disc(beam.project(each) - corner_rc) for each in next_mm]
    return np.max([disc(beam.project(centre_mm) - corner_rc), *drawn], axis=0)


def disc(centre_rc) -> np.ndarray:
    """Return the annotation (64, 64) of a body centre at (row, col) of a patch: a disc of radius 1 with a soft edge.

    The edge falls from 1 to 0 between 0.5 and 1.5 pixels, so that fractions of a pixel are not lost.
    """
    row, col = np.ogrid[:PATCH, :PATCH]
    apart = np.hypot(row - centre_rc[0], col - centre_rc[1])
    return (_DISC_PX + 0.5 - apart).clip(0, 1).astype(np.float32)


def normalised(values: np.ndarray) -> np.ndarray:
    """Return a patch with mean 0 and standard deviation 1 over what was exposed, and 0 elsewhere.

    Parameters
    ----------
    values : ndarray (64, 64)
        Bright bone; line integrals, or a radiograph's logarithm with 0 for the open beam. Below 0.1 counts as not
        exposed.
    """
    exposed = values > _EXPOSED
    if not exposed.any():
        return np.zeros(values.shape, np.float32)
    mean, spread = values[exposed].mean(), values[exposed].std()
    return np.where(exposed, (values - mean) / max(float(spread), 1e-3), 0).astype(np.float32)


def cube_to_patch(beam: ConeBeam, affine, corner_rc) -> np.ndarray:
    """Return the matrix (3, 4), float32, from voxel index (i, j, k, 1) to (row * w, col * w, w) of a patch.

    Parameters
    ----------
    beam : ConeBeam
    affine : ndarray (4, 4)
        Of the cube, see `cube_affine`.
    corner_rc : (2,) of float
        Pixel of the beam's detector where the patch begins, see `patch_corner`.
    """
    shift = np.eye(3)
    shift[:2, 2] = np.negative(corner_rc)
    return (shift @ beam.matrix @ affine).astype(np.float32)


def cross_validation(subjects: Sequence[BiplanarSubject], fold: int, folds: int = 3, salt: str = "biplanar"):
    """Return training, validation and test subjects of a fold; one in six of what is not tested validates.

    A salted hash of the key decides, so a person stays on one side whatever else is in the cohort. Bayat et al. use
    three folds and 5 : 1 for training and validation.

    Raises
    ------
    InputError
        If a part is empty.
    """
    parts = {"train": [], "validation": [], "test": []}
    for subject in subjects:
        digest = hashlib.sha256(f"{salt}:{subject.key}".encode()).digest()
        tested = int.from_bytes(digest[:8], "big") * folds >> 64 == fold
        split = "test" if tested else assign_split(subject.key, f"{salt}-validation", test=0.0, validation=1 / 6)
        parts[split].append(subject)
    empty = [name for name, some in parts.items() if not some]
    if empty:
        message = (
            f"fold {fold} of {folds} (0 to {folds - 1}) has nobody for {' and '.join(empty)}, of {len(subjects)} "
            "subjects. Fix: render more."
        )
        raise InputError(message)
    return parts["train"], parts["validation"], parts["test"]


def _clipped(shift):
    return shift.clip(-REACH_MM, REACH_MM)


def _mirrored(item):
    """Return the item of the mirrored person, who is seen from the left in the lateral view.

    A beam from the right through the mirrored person would give another image by a few percent of magnification; the
    matrices carry the source that the image really had.
    """
    flip = np.diag([-1.0, 1.0, 1.0, 1.0]).astype(np.float32)
    flip[0, 3] = CUBE - 1
    columns = np.array([[1, 0, 0], [0, -1, PATCH - 1], [0, 0, 1]], np.float32)
    frame = {"frame": flip[:3, :3] @ item["frame"] @ flip[:3, :3]} if "frame" in item else {}
    return (
        item
        | frame
        | {
            "target": item["target"][:, ::-1],
            "frontal": item["frontal"][:, :, ::-1],
            "cube_to_frontal": columns @ item["cube_to_frontal"] @ flip,
            "cube_to_lateral": item["cube_to_lateral"] @ flip,
        }
    )


def _spoilt(lengths, rng, clutter=0.0):
    """Return line integrals as a detector and its software would show them; what was not exposed stays so."""
    exposed = lengths > _EXPOSED
    if not exposed.any():
        return lengths
    if clutter and rng.random() < clutter:
        lengths = np.where(exposed, (lengths + _clutter(rng)).clip(2 * _EXPOSED), lengths)
    primary = np.exp(-lengths)
    typical = np.exp(-np.median(lengths[exposed]))
    seen = primary + rng.uniform(0, 0.6) * typical  # scatter
    photons = np.exp(rng.uniform(np.log(100), np.log(2e4))) / typical
    values = _blurred(-np.log(seen), rng.uniform(0, 0.8))
    values += rng.standard_normal(values.shape) / np.sqrt(photons * seen)
    low, high = values[exposed].min(), values[exposed].max()
    values = ((values - low) / max(high - low, 1e-3)).clip(0, 1) ** np.exp(rng.uniform(-0.4, 0.4))
    values += (np.stack(np.indices(values.shape), -1) @ rng.normal(0, 0.1, 2)) / PATCH  # heel of the anode
    if rng.random() < _SHUTTER_RATE:
        exposed &= _shutter(rng)
    return np.where(exposed, values - values.min() + 1, 0).astype(np.float32)


def _blurred(values, sigma):
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(values, sigma, truncate=2.5)


def _clutter(rng):
    """Return line integrals (64, 64) of what may lie before a spine: solid or hollow ellipsoids of any size.

    Lungs, arms, vessels with contrast agent differ between people more than phantoms do. A network that relies on
    them finds no vertebra in a patient.
    """
    row, col = np.indices((PATCH, PATCH))
    total = np.zeros((PATCH, PATCH))
    for _ in range(rng.integers(1, _MOST_CLUTTER + 1)):
        (r, c), angle = rng.uniform(-0.2 * PATCH, 1.2 * PATCH, 2), rng.uniform(0, np.pi)
        along = (row - r) * np.cos(angle) + (col - c) * np.sin(angle)
        aside = (col - c) * np.cos(angle) - (row - r) * np.sin(angle)
        longer, shorter = np.exp(rng.uniform(np.log(6), np.log(90), 2))
        depth = (1 - (along / longer) ** 2 - (aside / shorter) ** 2).clip(0)
        total += rng.normal(0, _CLUTTER * min(longer, shorter)) * depth ** rng.uniform(0.2, 1)
    return _blurred(total, rng.uniform(0, 2))


def _shutter(rng):
    """Return where a straight edge, at least 18 pixels from the middle, leaves the patch open."""
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(18, 32)
    row, col = np.indices((PATCH, PATCH)) - (PATCH - 1) / 2
    return row * np.sin(angle) + col * np.cos(angle) < reach
