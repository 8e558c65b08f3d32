"""Harder images and other populations: the same people under conditions that a predictor was not trained on.

An image stress changes the DXA of a record that exists. A person stress renders the person anew, from the same seed,
in another condition; image and truth then change together. People keep their keys, so errors can be compared in pairs.
"""

import re
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy import ndimage
from tqdm.auto import tqdm

from spinelib.data import Record, assign_split, keep_freed_memory
from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection
from spinelib.imaging.readers import read_projection, read_volume, write_projection, write_volume
from spinelib.phantom.cohort import OTHER_SCANNER, STANDARD_SCANNER, Scanner, render_dxa, turned
from spinelib.phantom.column import column_volume
from spinelib.phantom.family import OTHER
from spinelib.phantom.population import Subject, sample_subject
from spinelib.phantom.vertebra import subject_shapes
from spinelib.spine import Curves

LOWEST_FUSED = "L4"
"""Last level of a metal construct; it is counted upwards from here."""


class Session(NamedTuple):
    """A person, the scanner and how they lie in it: turned about the superior axis by some degrees."""

    subject: Subject
    scanner: Scanner = STANDARD_SCANNER
    turn_deg: float = 0.0


@dataclass(frozen=True)
class Stress:
    """One way of making the task harder.

    Attributes
    ----------
    description : str
        One line.
    kind : str
        'image' (acts on the DXA of a record) or 'person' (renders the person anew).
    unit : str
        Of the levels.
    levels : tuple of float
        From mild to strong; any level within `limits` may be asked for.
    limits : tuple of float
        Least and largest level that makes sense.
    make : callable
        Image: (record, level) -> Projection. Person: (seed, level) -> Session.
    """

    description: str
    kind: str
    unit: str
    levels: tuple[float, ...]
    limits: tuple[float, float]
    make: Callable


def stressed(record: Record | str, name: str, level: float) -> Record:
    """Return one person under a stress, with DXA, curves and column mask in one frame.

    Parameters
    ----------
    record : Record or str
        A person of a synthetic cohort of the mix 'enriched' or their key, such as 'synthetic-0-00012'; an image
        stress takes any record with DXA and curves.
    name : str
        One of `STRESSES`.
    level : float
        In the unit of the stress.

    Raises
    ------
    InputError
        For an unknown stress, a level outside its limits, or a person stress on a record that is no synthetic person.
    """
    stress = _stress(name, level)
    if stress.kind == "person":
        key = record if isinstance(record, str) else record.key
        split = assign_split(key) if isinstance(record, str) else record.split
        return _rendered(key, split, stress.make(_seed(key), level))
    if isinstance(record, str):
        record = _rendered(record, assign_split(record), Session(_person(_seed(record))))
    if record.dxa is None or record.curves is None:
        message = f"{record.key} lacks its {'DXA' if record.dxa is None else 'curves'}: an image stress needs both."
        raise InputError(message)
    return replace(record, dxa=stress.make(record, level))


def stressed_subject(key: str, name: str, level: float) -> Subject:
    """Return the person behind `stressed`, without rendering; under an image stress the standard person."""
    stress, seed = _stress(name, level), _seed(key)
    return stress.make(seed, level).subject if stress.kind == "person" else _person(seed)


def stressed_records(
    name: str, level: float, records: Sequence[Record | str], *, n_jobs: int = 2, cache_dir=None
) -> list[Record]:
    """Return people under a stress, in the order given; one that cannot be rendered is left out with a warning.

    Parameters
    ----------
    name, level
        See `stressed`.
    records : sequence of Record or str
    n_jobs : int
        Processes that render; an image stress on records takes none.
    cache_dir : path, optional
        People rendered anew are kept here, a folder each, and found again by the next call, also after an
        interruption.
    """
    stress = _stress(name, level)
    if stress.kind == "image" and not any(isinstance(record, str) for record in records):
        return [stressed(record, name, level) for record in records]
    folder = Path(cache_dir) / f"{name}_{level:g}" if cache_dir else None
    slim = [r if stress.kind == "image" or isinstance(r, str) else Record(r.key, r.split) for r in records]
    jobs = (delayed(_attempted)(record, name, level, folder) for record in slim)
    results = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
    bar = tqdm(results, total=len(slim), desc=name, unit="subject", disable=not sys.stderr.isatty())
    done, reasons = zip(*bar, strict=True) if slim else ((), ())
    for reason in filter(None, reasons):
        warnings.warn(f"{name} at {level:g}: {reason}", stacklevel=2)
    return [record for record in done if record is not None]


# --- images ---


def _noisy(record, level):
    """White noise; one pattern per person and channel, so that levels differ in strength alone."""
    dxa, rng = record.dxa, np.random.default_rng(zlib.crc32(record.key.encode()))
    top = np.percentile(dxa.values, 99.5, axis=(1, 2), keepdims=True)
    noise = rng.standard_normal(dxa.values.shape) * top * level / 100
    return replace(dxa, values=(dxa.values + noise).astype(np.float32))


def _blurred(record, level):
    sigma = [level / pitch for pitch in record.dxa.grid.spacing_mm]
    values = [ndimage.gaussian_filter(channel, sigma, mode="nearest") for channel in record.dxa.values]
    return replace(record.dxa, values=np.stack(values))


def _without_top(record, level):
    return _cut(record, record.dxa.grid.superior_mm() <= record.curves.heights_mm[0] + level, 0)


def _without_bottom(record, level):
    return _cut(record, record.dxa.grid.superior_mm() >= record.curves.heights_mm[-1] - level, 0)


def _without_sides(record, level):
    middle = record.curves.coronal_mm[1].mean()
    return _cut(record, np.abs(record.dxa.grid.lateral_mm() - middle) <= level / 2, 1)


def _cut(record, keep, axis):
    """Keep the rows (axis 0) or columns (axis 1) told; what is left is a smaller image, not a blackened one."""
    kept = np.flatnonzero(keep)
    if len(kept) < 2:
        message = f"nothing of {record.key} is left in this field of view. Choose a larger one."
        raise InputError(message)
    grid, first = record.dxa.grid, [0, 0]
    first[axis] = int(kept[0])
    values = np.take(record.dxa.values, kept, axis=1 + axis)
    origin = tuple(float(mm) for mm in grid.pixel_to_mm(*first))
    return Projection(record.dxa.channels, values, PlanarGrid(grid.view, values.shape[1:], grid.spacing_mm, origin))


def _misscaled(record, level):
    grid = record.dxa.grid
    spacing = tuple(pitch * (1 + level / 100) for pitch in grid.spacing_mm)
    return replace(record.dxa, grid=PlanarGrid.centred(grid.view, grid.shape, spacing, grid.centre_mm))


# --- people ---


def _person(seed, **options):
    return sample_subject(seed, curves="enriched", **options)


def _armless(seed, level):
    return Session(replace(_person(seed), arms=(level < 1, level < 2)))


def _instrumented(seed, level):
    subject = _person(seed)
    last = subject.index(LOWEST_FUSED) + 1
    return Session(replace(subject, fused=subject.levels[last - int(level) : last]))


def _osteoporotic(seed, level):
    """Bone density of a T-score: young adults have 1.18 +- 0.12 g/cm2 at L1-L4, the phantom 1.09 at density 1."""
    return Session(replace(_person(seed), bone_density=(1.18 + 0.12 * level) / 1.09))


def _low_dose(seed, level):
    dose = STANDARD_SCANNER.dose_photons_mm2 * level
    return Session(_person(seed), replace(STANDARD_SCANNER, dose_photons_mm2=dose))


def _turned(seed, level):
    return Session(_person(seed), turn_deg=level)


def _foreign(seed, level):
    return Session(_person(seed, family=OTHER.times(level)))


def _everything(seed, level):
    return Session(_person(seed, family=OTHER.times(level), degenerative=True), OTHER_SCANNER)


STRESSES = {
    "noise": Stress(
        "White noise on both channels", "image", "% of the 99.5th percentile", (2, 5, 10), (0, 100), _noisy,
    ),
    "blur": Stress(
        "Gaussian blur of the image", "image", "mm (SD)", (1.5, 3, 6), (0, 50), _blurred,
    ),
    "crop_top": Stress(
        "Field of view ends above: head, then vertebrae cut off",
        "image", "mm kept above T1", (40, 0, -40), (-400, 400), _without_top,
    ),
    "crop_bottom": Stress(
        "Field of view ends below: legs and pelvis, then vertebrae cut off",
        "image", "mm kept below L5", (40, 0, -40), (-400, 400), _without_bottom,
    ),
    "crop_sides": Stress(
        "Narrow field of view around the spine: arms, then flanks cut off",
        "image", "mm of width", (360, 270, 180), (50, 1000), _without_sides,
    ),
    "pixel_size": Stress(
        "Wrong pixel size in the header; the truth stays in true millimetres",
        "image", "% too large", (-5, -2, 2, 5), (-50, 50), _misscaled,
    ),
    "dose": Stress(
        "Fewer photons", "person", "of the standard dose", (0.5, 0.25, 0.1), (0.001, 1000), _low_dose,
    ),
    "missing_arms": Stress(
        "Right arm, then both arms lost or outside the image", "person", "arms", (1, 2), (0, 2), _armless,
    ),
    "metal": Stress(
        "Titanium screws and rods, from L4 upwards", "person", "vertebrae", (2, 6, 12), (0, 20), _instrumented,
    ),
    "axial_rotation": Stress(
        "The patient lies turned about the superior axis", "person", "degrees", (1, 3, 5), (-45, 45), _turned,
    ),
    "low_bmd": Stress(
        "Osteoporosis", "person", "T-score", (-2.5, -3.5, -4.5), (-6, 6), _osteoporotic,
    ),
    "anatomy": Stress(
        "Transfer: another population, each constant moved by about 0.5 to 1 SD times the level",
        "person", "times the shift", (1, 2), (-2, 3), _foreign,
    ),
    "scanner": Stress(
        "Transfer: another maker's beam, pixels, dose, line gain and focus",
        "person", "scanner", (1,), (1, 1), lambda seed, _: Session(_person(seed), OTHER_SCANNER),
    ),
    "degenerative": Stress(
        "Transfer: narrowed discs, osteophytes and wedge fractures",
        "person", "cohort", (1,), (1, 1), lambda seed, _: Session(_person(seed, degenerative=True)),
    ),
    "standing": Stress(
        "Transfer: standing, not lying",
        "person", "posture", (1,), (1, 1), lambda seed, _: Session(_person(seed, posture="standing")),
    ),
    "all": Stress(
        "Transfer: other population, degenerative, on the other scanner",
        "person", "times the shift of anatomy", (1, 2), (-2, 3), _everything,
    ),
}  # fmt: skip
"""By name; levels rise in strength. Nobody stands in a DXA scanner, so 'standing' is no part of 'all'."""


# --- bookkeeping ---


def _stress(name, level):
    if name not in STRESSES:
        message = f"unknown stress {name!r}. Expected one of: {', '.join(STRESSES)}."
        raise InputError(message)
    low, high = STRESSES[name].limits
    if not low <= level <= high:
        message = (
            f"{name} at level {level} makes no sense. Expected {low:g} to {high:g} {STRESSES[name].unit}, "
            f"for example {', '.join(f'{v:g}' for v in STRESSES[name].levels)}."
        )
        raise InputError(message)
    return STRESSES[name]


def _seed(key):
    """Return the seed of a person of `spinelib.data.synthetic_cohort`."""
    found = re.fullmatch(r"synthetic-(\d+)-(\d+)", key)
    if found is None:
        message = (
            f"{key!r} is no person of the synthetic cohort, so nobody can be rendered anew. Expected a key such as "
            "'synthetic-0-00012', or choose an image stress: "
            f"{', '.join(n for n, s in STRESSES.items() if s.kind == 'image')}."
        )
        raise InputError(message)
    return int(found[1]) * 1_000_000 + int(found[2])


def _rendered(key, split, session):
    dxa, curves, extended = render_dxa(session.subject, scanner=session.scanner, turn_deg=session.turn_deg)
    mask = column_volume(turned(session.subject, session.turn_deg), subject_shapes(session.subject))
    return Record(key, split, dxa=dxa, curves=curves, extended_curves=extended, column_mask=mask)


def _attempted(record, name, level, folder):
    """Return (record, '') or (None, reason)."""
    torch.set_num_threads(1)
    keep_freed_memory()
    key = record if isinstance(record, str) else record.key
    try:
        if folder is None:
            return stressed(record, name, level), ""
        if not (folder / key).is_dir():
            _write(stressed(record, name, level), folder / key)
        return _read(folder / key, assign_split(key) if isinstance(record, str) else record.split), ""
    except Exception as error:  # whatever it was, it must cost one person, not the rest
        return None, f"{key}: {type(error).__name__}: {error}"


def _write(record, folder):
    """Write a person; the folder gets its name when all files are in it."""
    part = folder.with_name(folder.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    write_projection(part / "dxa.nii.gz", record.dxa)
    write_volume(part / "column_mask.nii.gz", record.column_mask)
    for name in ("curves", "extended_curves"):
        getattr(record, name).save_csv(part / f"{name}.csv")
    part.replace(folder)


def _read(folder, split):
    curves = {name: Curves.load_csv(folder / f"{name}.csv") for name in ("curves", "extended_curves")}
    dxa, mask = read_projection(folder / "dxa.nii.gz"), read_volume(folder / "column_mask.nii.gz")
    return Record(folder.name, split, dxa=dxa, column_mask=mask, **curves)
