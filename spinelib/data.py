"""Manifests, splits, the embedded synthetic cohort, and the one loader that serves it and the user's own data."""

import ctypes
import hashlib
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import pandera.pandas as pa
import torch
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from spinelib.errors import InputError
from spinelib.geometry import Projection, Volume
from spinelib.imaging.readers import read_projection, read_volume, write_projection, write_volume
from spinelib.phantom.cohort import render_case
from spinelib.phantom.population import describe
from spinelib.record import file_sha256, run_folder, write_text_atomic
from spinelib.spine import Curves

MODALITIES = ("dxa", "dxa_mask", "mri", "mri_mask", "curves", "extended_curves", "column_mask")
SPLITS = ("train", "validation", "test")

SCHEMA = pa.DataFrameSchema(
    {
        "subject_key": pa.Column(str, pa.Check.str_matches(r"^[A-Za-z0-9_-]+$")),
        "modality": pa.Column(str, pa.Check.isin(MODALITIES)),
        "path": pa.Column(str, pa.Check(lambda s: ~s.str.startswith(("/", "~", "..")), error="must be relative")),
        "sha256": pa.Column(str, pa.Check.str_matches(r"^[0-9a-f]{64}$")),
        "spacing_mm": pa.Column(str, pa.Check.str_matches(r"^([0-9.]+ [0-9.]+)?$"), nullable=False),
        "split": pa.Column(str, pa.Check.isin(SPLITS)),
        "source": pa.Column(str),
    },
    strict=True,
    unique=["subject_key", "modality"],
)
"""One row a file. Paths are relative to the manifest's folder, which stays outside git."""


@dataclass(frozen=True)
class Record:
    """What is known of one subject; absent modalities are None.

    Attributes
    ----------
    key, split : str
    dxa, dxa_mask, mri, mri_mask : Projection or None
    curves, extended_curves : Curves or None
        In the DXA frame, T1-L5 and beyond.
    column_mask : Volume or None
        Bodies and discs T1-L5 in the DXA frame, 0/1.
    """

    key: str
    split: str
    dxa: Projection | None = None
    dxa_mask: Projection | None = None
    mri: Projection | None = None
    mri_mask: Projection | None = None
    curves: Curves | None = None
    extended_curves: Curves | None = None
    column_mask: Volume | None = None


def assign_split(subject_key: str, salt: str = "spinelib", test: float = 0.25, validation: float = 0.1) -> str:
    """Return the split of a subject from a salted hash: repeat visits of one key always stay together."""
    digest = hashlib.sha256(f"{salt}:{subject_key}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test else "validation" if place < test + validation else "train"


def read_manifest(path) -> pd.DataFrame:
    """Return a manifest whose columns and values fit `SCHEMA`.

    Raises
    ------
    InputError
        With every bad row, if any.
    """
    path = Path(path)
    if not path.is_file():
        message = f"no manifest at {path}. Make the synthetic one with: spinelib run 01"
        raise InputError(message)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    try:
        return SCHEMA.validate(table, lazy=True)
    except pa.errors.SchemaErrors as error:
        cases = error.failure_cases[["column", "check", "failure_case", "index"]].head(20).to_string(index=False)
        message = f"{path} does not fit the manifest schema ({', '.join(SCHEMA.columns)}):\n{cases}"
        raise InputError(message) from error


def check_manifest(path) -> pd.DataFrame:
    """Return one row per problem with the files of a manifest (missing, changed, unreadable); empty = sound."""
    table = read_manifest(path)
    problems = []
    for row in table.itertuples():
        file = Path(path).parent / row.path
        reason = _file_problem(file, row)
        if reason:
            problems.append({"subject_key": row.subject_key, "modality": row.modality, "reason": reason})
    splits = table.groupby("subject_key")["split"].nunique()
    problems += [
        {"subject_key": key, "modality": "", "reason": "stands in more than one split"}
        for key in splits[splits > 1].index
    ]
    return pd.DataFrame(problems, columns=["subject_key", "modality", "reason"])


def load_record(table: pd.DataFrame, folder, key: str) -> Record:
    """Return a subject's images and curves from manifest rows.

    Raises
    ------
    InputError
        If the subject is not in the manifest or one of the files cannot be used.
    """
    rows = table[table["subject_key"] == key]
    if rows.empty:
        message = f"no subject {key!r} in the manifest; it has {table['subject_key'].nunique()} subjects."
        raise InputError(message)
    found = {row.modality: _load(Path(folder) / row.path, row) for row in rows.itertuples()}
    return Record(key, rows["split"].iloc[0], **found)


def load_cohort(manifest, *, splits=SPLITS, limit=0, quarantine=None) -> list[Record]:
    """Return all subjects of the given splits; a failing one goes to the `quarantine` CSV and the rest go on.

    Parameters
    ----------
    manifest : path
    splits : sequence of str
    limit : int
        At most so many subjects per split; 0 = all.
    quarantine : path or None
        Where failing subjects and reasons are written.
    """
    table, folder = read_manifest(manifest), Path(manifest).parent
    keys = [k for s in splits for k in _limited(table.loc[table["split"] == s, "subject_key"].unique(), limit)]
    records, failed = [], []
    for key in tqdm(keys, desc="reading", unit="subject", disable=not sys.stderr.isatty()):
        try:
            records.append(load_record(table, folder, key))
        except InputError as error:
            failed.append({"subject_key": key, "stage": "read", "reason": str(error)})
    if failed and quarantine:
        pd.DataFrame(failed).to_csv(quarantine, index=False)
    if not records:
        message = f"no subject of {manifest} can be used (splits {', '.join(splits)}; {len(failed)} failed)."
        raise InputError(message)
    return records


def synthetic_cohort(folder, count: int, *, seed: int = 0, mix: str = "enriched", n_jobs: int = 2) -> Path:
    """Make (or complete) the embedded cohort and return its manifest.

    Each subject is rendered once, written atomically and found again by the next call; subject i depends on
    (seed, i) alone, so a larger cohort contains the smaller one.

    Parameters
    ----------
    folder : path
        Gets one folder a subject and, named after the count so that cohorts of several sizes can share it,
        manifest-<count>.csv, subjects-<count>.csv and quarantine-<count>.csv.
    count : int
    mix : str
        'enriched' or 'natural', see `spinelib.phantom.population.sample_subject`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = (delayed(_make_subject)(folder, seed, i, mix) for i in range(count))
    results = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
    bar = tqdm(results, total=count, desc="synthetic cohort", unit="subject", disable=not sys.stderr.isatty())
    people = pd.DataFrame(list(bar))
    failed = people[people["reason"] != ""]
    failed[["subject_key", "stage", "reason"]].to_csv(folder / f"quarantine-{count}.csv", index=False)
    people = people[people["reason"] == ""].drop(columns=["reason", "stage"])
    people.to_csv(folder / f"subjects-{count}.csv", index=False, float_format="%.4f")
    manifest = folder / f"manifest-{count}.csv"
    pd.DataFrame([row for key in people["subject_key"] for row in _manifest_rows(folder, key)]).to_csv(
        manifest, index=False
    )
    return manifest


def open_cohort(manifest, data_dir, subjects: int, seed: int = 0, n_jobs: int = 2) -> Path:
    """Return the manifest to work on: the user's own if given, else that of the synthetic cohort, made if needed.

    Parameters
    ----------
    manifest : str or path
        Empty for the synthetic cohort.
    data_dir : str or path
        Relative paths count from the project root, whatever the working directory.
    subjects, seed, n_jobs
        Of the synthetic cohort, see `synthetic_cohort`.
    """
    if manifest:
        return run_folder(manifest)
    return synthetic_cohort(run_folder(data_dir) / f"synthetic-{seed}", subjects, seed=seed, n_jobs=n_jobs)


def read_subjects(manifest) -> pd.DataFrame:
    """Return the table of subjects beside a manifest (sex, age, angles, true motion), indexed by subject_key.

    The synthetic cohort has one. Your own data may bring a `subjects.csv` with any of its columns; without it the
    table has the manifest's subjects and no columns.
    """
    manifest = Path(manifest)
    path = manifest.with_name("subjects" + manifest.name.removeprefix("manifest"))
    if manifest.name.startswith("manifest") and path.is_file():
        return pd.read_csv(path).set_index("subject_key")
    return pd.DataFrame(index=pd.Index(read_manifest(manifest)["subject_key"].unique(), name="subject_key"))


def _make_subject(folder, seed, index, mix):
    key = f"synthetic-{seed}-{index:05d}"
    done = folder / key / "subject.json"
    if done.is_file():
        return pd.read_json(done, typ="series", dtype=False).to_dict()
    torch.set_num_threads(1)
    keep_freed_memory()
    start = time.process_time()
    try:
        row = {"subject_key": key, **_render_to(folder / key, int(seed) * 1_000_000 + index, mix)}
    except Exception as error:  # whatever it was, it must cost one subject, not the cohort
        return {"subject_key": key, "stage": "render", "reason": f"{type(error).__name__}: {error}"}
    row |= {"cpu_s": time.process_time() - start, "stage": "", "reason": ""}
    write_text_atomic(done, pd.Series(row).to_json())
    return row


def keep_freed_memory():
    """Let glibc reuse freed arrays: giving them back to the kernel cost two thirds of a rendering process's time."""
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**27)) if mallopt else ():
        mallopt(option, value)


def _render_to(folder, seed, mix):
    folder.mkdir(exist_ok=True)
    case = render_case(seed, curves=mix)
    for name in ("dxa", "dxa_mask", "mri", "mri_mask"):
        write_projection(folder / f"{name}.nii.gz", getattr(case, name))
    write_volume(folder / "column_mask.nii.gz", case.column_mask)
    case.curves.save_csv(folder / "curves.csv")
    case.extended_curves.save_csv(folder / "extended_curves.csv")
    person = describe([case.subject]).iloc[0].to_dict()
    return person | {f"true_{k}": v for k, v in asdict(case.mri_to_dxa).items()}


def _manifest_rows(folder, key):
    for modality in MODALITIES:
        file = folder / key / (f"{modality}.csv" if "curves" in modality else f"{modality}.nii.gz")
        yield {
            "subject_key": key,
            "modality": modality,
            "path": file.relative_to(folder).as_posix(),
            "sha256": file_sha256(file),
            "spacing_mm": "",
            "split": assign_split(key),
            "source": "spinelib.phantom",
        }


def _load(file, row):
    if "curves" in row.modality:
        return Curves.load_csv(file)
    if row.modality == "column_mask":
        return read_volume(file)
    spacing = tuple(float(v) for v in row.spacing_mm.split()) or None
    return read_projection(file, spacing_mm=spacing)


def _file_problem(file, row):
    if not file.is_file():
        return f"missing: {row.path}"
    if file_sha256(file) != row.sha256:
        return f"changed since the manifest was written: {row.path}"
    try:
        _load(file, row)
    except InputError as error:
        return str(error)
    return ""


def _limited(keys, limit):
    return keys[:limit] if limit else keys
