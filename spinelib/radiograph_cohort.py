"""Radiographs with known vertebrae, cached: phantoms that stand or lie, and CTs in the folders of VerSe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy.spatial.transform import Rotation
from tqdm.auto import tqdm

from spinelib.ct_cohort import SPLITS, list_series, load_series
from spinelib.data import keep_freed_memory
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.radiograph_pairs import LABELS, BiplanarSubject, make_pair, project_pair
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.ct_tissue import patient_hounsfield
from spinelib.phantom.landmarks import find_landmarks
from spinelib.phantom.population import Subject, sample_subject
from spinelib.phantom.render import GAP_MM, tissue_volume
from spinelib.phantom.scan import ScanMix, sample_patient
from spinelib.phantom.scan_truth import moved
from spinelib.phantom.vertebra import VertebraShape, subject_shapes, vertebra_sdf

_VOXEL_MM = 2.0
_AROUND_MM = np.array([45.0, 20.0, 75.0])  # beyond shoulders, skin, and body centres of T1 and L5
_ASIDE_DEG, _TURN_DEG = 1.5, 4.0  # standard deviation of bending aside and of turning before the detector


@dataclass(frozen=True)
class _Bearing:
    """How people are before the detectors; `lean_deg` is the standard deviation of bending forward or back."""

    posture: str
    mix: ScanMix
    lean_deg: float


BEARINGS: Mapping[str, _Bearing] = MappingProxyType(
    {
        "standing": _Bearing("standing", ScanMix(enriched=0.5, arms=0.1), lean_deg=1.5),
        "lying": _Bearing("supine", ScanMix(enriched=0.5), lean_deg=10.0),
    }
)
"""People 'standing' as for radiographs, mostly with the arms out of the lateral view; or 'lying' as in CT scanners,
bent more than patients are: a round back holds its upper vertebrae at angles that few standing people have."""


def radiographed_person(seed: int, bearing: str = "standing") -> tuple[Subject, np.ndarray]:
    """Return a person of a seed, and the rigid motion (4, 4) before the detectors.

    The poses in the world of the radiographs are `motion @ subject.poses`.

    Parameters
    ----------
    seed : int
    bearing : str
        One of `BEARINGS`.

    Raises
    ------
    InputError
        If the bearing is unknown.
    """
    if bearing not in BEARINGS:
        message = f"unknown bearing {bearing!r}. Expected one of: {', '.join(map(repr, BEARINGS))}."
        raise InputError(message)
    how = BEARINGS[bearing]
    rng = np.random.default_rng([seed, 51])
    patient = sample_patient(seed, rng, how.mix)
    subject = sample_subject(
        seed,
        age_years=patient.age_years,
        posture=how.posture,
        curves="enriched" if rng.random() < how.mix.enriched else "natural",
        degenerative=bool(patient.degeneration),
        family=patient.family,
    )
    subject = replace(subject, bone_density=patient.bone_density, arms=patient.arms, fused=patient.fused)
    motion = np.eye(4)
    turn = np.clip(rng.standard_normal(3), -2, 2) * (how.lean_deg, _ASIDE_DEG, _TURN_DEG)
    motion[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    return subject, motion


def phantom_pair(seed: int, bearing: str = "standing") -> BiplanarSubject:
    """Return the radiographs of `radiographed_person`; the same arguments give the same bytes.

    Tissue is that of CT scans (`patient_hounsfield`), half of them with contrast agent as in the CTs that other
    radiographs are reconstructed from.
    """
    subject, motion = radiographed_person(seed, bearing)
    shapes = subject_shapes(subject)
    grid = _trunk_grid(subject, motion)
    tissue = tissue_volume(subject, shapes, grid, motion)
    values = patient_hounsfield(tissue, subject, shapes, motion, np.random.default_rng([seed, 52]), has_table=False)
    places = {VERSE_LABELS[level]: i for i, level in enumerate(subject.levels)}
    poses = {label: motion @ subject.poses[places[label]] for label in LABELS if label in places}
    return project_pair(
        f"{bearing}-{seed:06d}",
        Volume(values, grid.affine),
        {label: pose[:3, 3] for label, pose in poses.items()},
        lambda label, affine: _sampled(shapes, motion @ subject.poses, places[label], affine),
        np.stack([pose[:3, :3] for pose in poses.values()]),
    )


def render_biplanar_cohort(folder, count: int, seed: int = 0, n_jobs: int = 2, bearing: str = "standing") -> list[Path]:
    """Render phantoms of the seeds `seed` to `seed + count - 1`; existing files are kept.

    Parameters
    ----------
    folder : path
        Gets one safetensors file a person, and quarantine.csv with the reasons of those that failed.
    count, seed : int
    n_jobs : int
        Processes.
    bearing : str
        One of `BEARINGS`.

    Returns
    -------
    list of Path
        Files of `BiplanarSubject.load`.

    Raises
    ------
    InputError
        If nobody could be rendered.
    """
    seeds = range(seed, seed + count)
    jobs = {f"{bearing}-{each:06d}": partial(phantom_pair, each, bearing) for each in seeds}
    return _cached(folder, jobs, n_jobs)


def cache_biplanar_cohort(root, folder, splits: Sequence[str] = SPLITS, n_jobs: int = 1) -> list[Path]:
    """Cache the radiographs of the labelled CTs under `root`; existing files are kept.

    Parameters
    ----------
    root : path
        See `spinelib.ct_cohort.list_series`.
    folder, n_jobs
        As in `render_biplanar_cohort`.
    splits : sequence of str

    Returns
    -------
    list of Path

    Raises
    ------
    InputError
        If no scan could be used.
    """
    table = list_series(root)
    rows = [row for row in table.itertuples() if row.split in splits and row.key]
    return _cached(folder, {row.key: partial(_series_pair, row) for row in rows}, n_jobs)


def _sampled(shapes: tuple[VertebraShape, ...], poses, number: int, affine):
    """Return a phantom's vertebra on the lattice of `affine`, from signed distances: see `project_pair`.

    As in `tissue_volume`, a voxel belongs to a vertebra if the next one is at least `GAP_MM` farther.
    """
    shape, to_local = shapes[number], np.linalg.inv(poses[number]) @ affine
    ends = np.stack(np.meshgrid(*shape.bounds_mm), axis=-1).reshape(-1, 3)
    ends = moved(np.linalg.inv(to_local), ends)
    first, last = np.floor(ends.min(axis=0)).astype(int), np.ceil(ends.max(axis=0)).astype(int)
    index = np.stack(np.meshgrid(*map(np.arange, first, last + 1), indexing="ij"), axis=-1)
    body, whole = _distances(shape, moved(to_local, index))
    inside = whole < 0
    for other in {max(number - 1, 0), min(number + 1, len(shapes) - 1)} - {number}:
        _, apart = _distances(shapes[other], moved(np.linalg.inv(poses[other]) @ affine, index[inside]))
        inside[inside] = apart - whole[inside] > GAP_MM
    return inside, inside & (body < 0), first


def _distances(shape, points):
    """Signed distances (mm) to body and whole vertebra; small batches stay in the processor's cache."""
    rows = torch.from_numpy(points.reshape(-1, 3).astype(np.float32)).split(16384)
    parts = zip(*(vertebra_sdf(shape, row) for row in rows), strict=True)
    return [torch.cat(part).numpy().reshape(points.shape[:-1]) for part in parts]


def _trunk_grid(subject, motion) -> VolumeGrid:
    """Return the box that holds every ray through the strips: shoulder to shoulder, skin to skin."""
    marks = find_landmarks(subject)
    hull, spine = marks.hull, moved(motion, subject.poses[subject.index("T1") :, :3, 3])
    half = float(hull.half_width.values.max())
    aside = np.array([*marks.shoulders_mm[:, 0], spine[:, 0].min() - half + 40, spine[:, 0].max() + half - 40])
    rear = float((hull.centre.values - hull.half_depth.values).min())
    front = float((hull.centre.values + hull.half_depth.values).max())
    lower = np.array([aside.min(), rear, spine[:, 2].min()]) - _AROUND_MM
    upper = np.array([aside.max(), front, spine[:, 2].max()]) + _AROUND_MM
    skin = _skin_line(hull, subject.poses[subject.index("T1") :, 2, 3], motion)
    room = skin.min() - _VOXEL_MM, skin.max() + _VOXEL_MM  # whoever is bent far needs more
    lower[1], upper[1] = min(lower[1], room[0]), max(upper[1], room[1])
    return VolumeGrid.from_bounds(lower, upper, _VOXEL_MM)


def _skin_line(hull, heights_mm, motion):
    """Return the anterior coordinates of belly and back, up and down the spine, after `motion`."""
    heights = torch.arange(heights_mm.min() - _AROUND_MM[2], heights_mm.max() + _AROUND_MM[2], 10)
    centre, half = hull.centre(heights).numpy(), hull.half_depth(heights).numpy()
    aside = hull.middle(heights).numpy()
    line = np.stack([np.stack([aside, anterior, heights.numpy()], -1) for anterior in (centre - half, centre + half)])
    return moved(motion, line)[..., 1]


# --- caching ---


def _cached(folder, jobs: dict[str, Callable[[], BiplanarSubject]], n_jobs) -> list[Path]:
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{key}.safetensors" for key in jobs]
    results = Parallel(n_jobs, return_as="generator")(
        delayed(_make)(path, job) for path, job in zip(paths, jobs.values(), strict=True)
    )
    reasons = list(tqdm(results, total=len(jobs), desc="radiographs", unit="person", disable=None))
    failed = [{"key": path.stem, "reason": why} for path, why in zip(paths, reasons, strict=True) if why]
    pd.DataFrame(failed, columns=["key", "reason"]).to_csv(folder / "quarantine.csv", index=False)
    if len(failed) == len(jobs):
        first = failed[0]["reason"] if failed else "nobody was asked for"
        message = f"none of {len(jobs)} pairs of radiographs could be made. First: {first}"
        raise InputError(message)
    return [path for path, why in zip(paths, reasons, strict=True) if not why]


def _make(path, job):
    """Write one file; returns '' or why it failed."""
    if path.is_file():
        return ""
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        job().save(path)
    except Exception as error:  # whatever it was, it must cost one person, not the cohort
        return f"{type(error).__name__}: {error}"
    return ""


def _series_pair(row) -> BiplanarSubject:
    return make_pair(load_series(row))
