"""Synthetic CT scans of the spine with the truth: random people, fields of view, contrast and scanners."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.ct import Protocol, acquire
from spinelib.imaging.verse import LabelledCT
from spinelib.phantom.ct_tissue import patient_hounsfield
from spinelib.phantom.family import OTHER, STANDARD, Family
from spinelib.phantom.population import Subject, sample_subject
from spinelib.phantom.render import tissue_volume
from spinelib.phantom.scan_truth import moved, scan_truth
from spinelib.phantom.vertebra import subject_shapes

MAX_VOXELS = 16_000_000
"""Larger fields of view are narrowed: 9 channels of this many voxels take 0.6 GB."""

_RANGES = {
    # share, first and last level; S1 stands for the sacrum
    "cervical": (0.14, "C1", "T2"),
    "chest": (0.20, "C7", "L1"),
    "abdomen": (0.26, "T10", "S1"),
    "lumbar": (0.14, "L1", "S1"),
    "thoracolumbar": (0.12, "T5", "S1"),
    "whole": (0.04, "C1", "S1"),
    "any": (0.10, "", ""),
}
_AROUND_SPINE_MM = np.array([[-42.0, 42.0], [-72.0, 26.0]])
"""What a vertebra takes up around its body centre, (right, anterior)."""

_MARGINS_MM = ((0.45, 2.0, 25.0), (0.30, 15.0, 70.0), (0.25, 60.0, 150.0))
"""In-plane margin around the spine: share of scans, least, largest."""

_STREAMS = ("person", "field", "tissue", "imaging")


@dataclass(frozen=True)
class ScanMix:
    """How often things occur in `sample_scan` (assumed, made a little commoner than in a hospital).

    Attributes
    ----------
    enriched, degenerative, fused : float
        Share of people with the enriched mix of scoliosis (the rest has the natural one), with worn discs and
        fractures, with pedicle screws.
    arms : float
        Share of scans with the arms beside the body.
    turned : float
        Share of people who lie turned or tilted by a few degrees.
    clipped : float
        Share of fields of view that cut the spine at the sides, front or back too.
    table, round_field : float
        Share of scans with a table, and blank outside the circle of reconstruction.
    """

    enriched: float = 0.3
    degenerative: float = 0.7
    fused: float = 0.06
    arms: float = 0.2
    turned: float = 0.35
    clipped: float = 0.1
    table: float = 0.8
    round_field: float = 0.25


HOSPITAL = ScanMix()


def sample_scan(seed: int, spacing_mm=2.0, mix: ScanMix = HOSPITAL, device: str | torch.device = "cpu") -> LabelledCT:
    """Return the CT of a seed with its vertebrae; the same arguments give the same bytes on the same device.

    Parameters
    ----------
    seed : int
        Not negative.
    spacing_mm : float or (3,) of float
        Voxel size along right, anterior, superior.
    mix : ScanMix
    device : str or torch.device
        Where the anatomy is sampled.

    Returns
    -------
    LabelledCT
        World RAS mm with S1 near the origin. Labels 1-25 and 28, which end where the edge of the bone is seen
        (`scan_truth.VISIBLE_MM`); the sacrum is background. Centroids are those of
        the bodies, of C1 the place of the dens in its ring, also of cut vertebrae, so they may lie outside. A
        vertebra with less than 97 % of its volume inside is in `cut`, with less than 3 % it is left out.

    Raises
    ------
    InputError
        For a negative seed or a spacing outside 0.3 to 10 mm.
    """
    spacing = _checked_spacing(spacing_mm)
    rng, subject, shapes, pose = _patient(seed, mix)
    grid = field_of_view(rng["field"], subject, pose, spacing, mix)
    tissue = tissue_volume(subject, shapes, grid, pose, device)
    has_table = rng["imaging"].random() < mix.table
    values = patient_hounsfield(tissue, subject, shapes, pose, rng["tissue"], has_table)
    values = acquire(values, spacing, sample_protocol(rng["imaging"]), rng["imaging"])
    if rng["imaging"].random() < mix.round_field:
        _blank_corners(values)
    labels, centroids, cut = scan_truth(tissue, subject, shapes, pose)
    return LabelledCT(f"phantom-{seed:06d}", Volume(values, grid.affine), Volume(labels, grid.affine), centroids, cut)


def sample_labels(seed: int, grid: VolumeGrid, mix: ScanMix = HOSPITAL, motion: np.ndarray | None = None) -> np.ndarray:
    """Return the labels of `sample_scan` on another grid: the truth of a scan that was resampled or turned.

    Parameters
    ----------
    seed : int
    grid : VolumeGrid
        Along the axes of the world.
    mix : ScanMix
    motion : ndarray (4, 4), optional
        Rigid motion of the patient in the world.

    Returns
    -------
    ndarray (R, A, S) of uint8
        Vertebrae that the border of `grid` cuts included.

    Raises
    ------
    InputError
        For a negative seed.
    """
    _, subject, shapes, pose = _patient(seed, mix)
    pose = pose if motion is None else motion @ pose
    return scan_truth(tissue_volume(subject, shapes, grid, pose), subject, shapes, pose)[0]


def sample_patient(seed: int, rng: np.random.Generator, mix: ScanMix) -> Subject:
    """Return a person of 20 to 90 years from a population of their own, arms mostly raised out of the way."""
    subject = sample_subject(
        seed,
        age_years=float(rng.uniform(20, 90)),
        curves="enriched" if rng.random() < mix.enriched else "natural",
        degenerative=bool(rng.random() < mix.degenerative),
        family=_random_family(rng),
    )
    density = float(np.clip(subject.bone_density * np.exp(0.18 * rng.standard_normal()), 0.4, 1.9))
    beside = bool(rng.random() < mix.arms)
    fused = _fused_levels(rng, subject) if rng.random() < mix.fused else ()
    return replace(subject, bone_density=density, arms=(beside, beside), fused=fused)


def sample_protocol(rng: np.random.Generator) -> Protocol:
    """Draw a reconstruction: soft to sharp kernels, slices of 0.7 to 5 mm, noise of 5 to 78 HU."""
    sharp = rng.random() < 0.35
    slice_mm = float(np.exp(rng.uniform(np.log(0.7), np.log(5.0))))
    noise = float(np.exp(rng.uniform(np.log(5), np.log(30)))) * (2.6 if sharp else 1.0)
    return Protocol(
        kernel_fwhm_mm=float(rng.uniform(0.6, 1.2) if sharp else rng.uniform(0.9, 2.4)),
        sharpening=float(rng.uniform(0.3, 1.3)) if sharp else 0.0,
        slice_mm=slice_mm,
        pitch_mm=float(slice_mm * rng.choice([1.0, 0.8, 0.5])),
        noise_hu=noise,
        gain=float(rng.uniform(0.97, 1.03)),
        offset_hu=float(rng.uniform(-15, 15)),
        streak_hu=float(rng.uniform(5, 45)) if rng.random() < 0.2 else 0.0,
    )


def field_of_view(rng, subject: Subject, pose: np.ndarray, spacing_mm, mix: ScanMix = HOSPITAL) -> VolumeGrid:
    """Draw the box that is scanned: a part of the column, and a window around it or through it."""
    centres = moved(pose, np.concatenate([subject.poses[:, :3, 3], subject.sacrum_pose[None, :3, 3]]))
    bottom, top = _height_range(rng, (*subject.levels, "S1"), centres[:, 2])
    near = (centres[:, 2] > bottom - 30) & (centres[:, 2] < top + 30)
    spread = np.stack([centres[near, :2].min(0), centres[near, :2].max(0)], 1) + _AROUND_SPINE_MM
    _, least, largest = _MARGINS_MM[rng.choice(len(_MARGINS_MM), p=[m[0] for m in _MARGINS_MM])]
    margins = rng.uniform(least, largest, (2, 2))
    if rng.random() < mix.clipped:
        margins[tuple(rng.integers(0, 2, 2))] = -rng.uniform(5, 45)
    room = MAX_VOXELS * np.prod(spacing_mm) / (top - bottom)
    for _ in range(20):
        sides = spread + margins * [-1, 1]
        if np.prod(sides[:, 1] - sides[:, 0]) <= room:
            break
        margins *= 0.8
    else:
        top = bottom + MAX_VOXELS * np.prod(spacing_mm) / np.prod(sides[:, 1] - sides[:, 0])
    return VolumeGrid.from_bounds((*sides[:, 0], bottom), (*sides[:, 1], top), spacing_mm)


def _height_range(rng, levels, heights):
    kind = rng.choice(list(_RANGES), p=[share for share, _, _ in _RANGES.values()])
    _, first, last = _RANGES[kind]
    if kind == "any":
        length = np.exp(rng.uniform(np.log(60), np.log(600)))
        middle = rng.uniform(heights.min(), heights.max())
        return middle - length / 2, middle + length / 2
    low = heights[levels.index(last)] if last in levels else heights[-1]
    bottom, top = low - rng.uniform(-15, 50), heights[levels.index(first)] + rng.uniform(-15, 50)
    return float(bottom), float(max(top, bottom + 60))


def _patient(seed, mix):
    """Return the streams of random numbers of a seed, its person, the vertebrae and how they lie."""
    streams = np.random.SeedSequence(_checked_seed(seed)).spawn(len(_STREAMS))
    rng = {name: np.random.default_rng(stream) for name, stream in zip(_STREAMS, streams, strict=True)}
    subject = sample_patient(seed, rng["person"], mix)
    return rng, subject, subject_shapes(subject), _lying(rng["person"], mix)


def _random_family(rng) -> Family:
    """Move every constant of a population on its own, most within the difference of `OTHER` from `STANDARD`.

    Bodies vary most in relief: brittle ones are deeply dished.
    """
    names = [f.name for f in fields(Family)]
    amounts = np.clip(rng.standard_normal(len(names)), -2, 2)
    relief = float(np.clip(np.exp(0.1 + 0.3 * rng.standard_normal()), 0.6, 2.0))
    return replace(
        STANDARD,
        **{n: getattr(OTHER.times(float(a)), n) for n, a in zip(names, amounts, strict=True)} | {"relief": relief},
    )


def _fused_levels(rng, subject):
    last = int(rng.integers(subject.index("T8"), len(subject.levels)))
    return subject.levels[max(last - int(rng.integers(1, 7)), 8) : last + 1]


def _lying(rng, mix) -> np.ndarray:
    """Rotation of the body about its origin; none for most."""
    pose = np.eye(4)
    if rng.random() < mix.turned:
        angles = np.clip(rng.standard_normal(3), -2.5, 2.5) * [5.0, 4.0, 6.0]
        pose[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    return pose


def _blank_corners(values) -> None:
    """Set what lies outside the circle that touches the longer sides to the lowest value, in place."""
    half = (np.array(values.shape[:2]) - 1) / 2
    right, anterior = np.ogrid[: values.shape[0], : values.shape[1]]
    outside = np.hypot(right - half[0], anterior - half[1]) > half.max() + 0.5
    values[outside] = -1024.0


def _checked_seed(seed) -> int:
    if not isinstance(seed, int | np.integer) or seed < 0:
        message = f"seed is {seed!r}. Expected an integer of 0 or more."
        raise InputError(message)
    return int(seed)


def _checked_spacing(spacing_mm) -> np.ndarray:
    spacing = np.asarray(spacing_mm, float)
    if spacing.shape not in ((), (3,)) or not np.all((spacing >= 0.3) & (spacing <= 10)):
        message = f"spacing_mm is {spacing_mm!r}. Expected one number or three, each 0.3 to 10 mm."
        raise InputError(message)
    return np.broadcast_to(spacing, 3)
