"""Cohorts of labelled CTs in the folders of VerSe: list, load, or render synthetic ones."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from spinelib.data import keep_freed_memory
from spinelib.errors import InputError
from spinelib.imaging.verse import SPLIT_FOLDERS, LabelledCT, read_labelled_ct, release_paths, write_labelled_ct
from spinelib.phantom.scan import sample_scan
from spinelib.record import read_json, write_json_atomic

SPLITS = tuple(SPLIT_FOLDERS)
COLUMNS = ("key", "subject", "split", "dataset", "ct_path", "mask_path", "centroids_path", "convention", "reason")
SEEDS_PER_SPLIT = 250_000

_NIFTI = r"\.nii(\.gz)?"
_KEY = r"(?P<key>[A-Za-z0-9-]+(_[a-z]+-[A-Za-z0-9]+)*?)"
_NAMES = tuple(
    (re.compile(pattern), kind, convention)
    for pattern, kind, convention in (
        (rf"sub-{_KEY}_ct{_NIFTI}", "ct", "complete"),
        (rf"sub-{_KEY}_seg-vert_msk{_NIFTI}", "mask", "complete"),
        (rf"sub-{_KEY}_seg-subreg_ctd\.json", "centroids", "complete"),
        (rf"(?P<key>(verse|gl|GL)\d+(_CT-[a-z]+)?)_seg{_NIFTI}", "mask", ""),
        (r"(?P<key>(verse|gl|GL)\d+(_CT-[a-z]+)?)_iso-ctd\.json", "centroids", "miccai2020"),
        (r"(?P<key>(verse|gl|GL)\d+)_ctd\.json", "centroids", "miccai2019"),
        (rf"(?P<key>(verse|gl|GL)\d+(_CT-[a-z]+)?){_NIFTI}", "ct", ""),
    )
)
"""File names of the complete release, then of the MICCAI challenges; the centroid file tells which one."""

_SPLIT = re.compile(rf"(^|[\d_-])(?P<split>{'|'.join(SPLITS)})$", re.IGNORECASE)
_ORIENTATIONS = tuple("".join(codes) for pairs in permutations(("RL", "AP", "SI")) for codes in product(*pairs))
_HELP = "Fix: fetch VerSe with spinelib.imaging.verse_archives.fetch_verse, or render scans with render_ct_cohort."


def list_series(root) -> pd.DataFrame:
    """List the CT series under a folder, in the names of VerSe's complete release or of MICCAI 2019 and 2020.

    Parameters
    ----------
    root : path
        Any folder above (or equal to) the split folders.

    Returns
    -------
    DataFrame
        One row a series with `COLUMNS`, ordered by dataset and key; a subject may have several series. The split
        is that of the innermost folder whose name ends in 'training', 'validation' or 'test'. `reason` is empty
        for a usable series, else says what keeps it from being used: a file without its partner, an unknown name,
        no split, the same series twice (the last folder by name counts), or a subject that another folder holds in
        a later split (VerSe 2020 repeats subjects of 2019: none of them may train in one and test in the other).

    Raises
    ------
    InputError
        If there is no such folder.
    """
    root = Path(root).expanduser().absolute()
    if not root.is_dir():
        message = f"no folder {root}. {_HELP}"
        raise InputError(message)
    found, rows = {}, []
    for path in _visible_files(root):
        match = _parsed(path.name)
        if match:
            key, kind, convention = match
            folder, split = _split_folder(path, root)
            found.setdefault((folder, split, key), []).append((kind, convention, path))
        elif path.name.endswith((".nii", ".nii.gz")):
            folder, split = _split_folder(path, root)
            rows.append(_row("", split, folder, root) | {"ct_path": str(path), "reason": "unknown kind of file name"})
    rows += [_series_row(*place, files, root) for place, files in found.items()]
    table = pd.DataFrame(rows, columns=COLUMNS, dtype=str)
    _mark_repeats(table)
    return table.sort_values(["dataset", "key"], ignore_index=True)


def load_series(row) -> LabelledCT:
    """Return the scan of a row of `list_series`.

    Raises
    ------
    InputError
        With the row's reason if it has one, or if a file cannot be used.
    """
    if row.reason:
        message = f"{row.key or row.ct_path}: {row.reason}."
        raise InputError(message)
    return read_labelled_ct(
        row.ct_path, row.mask_path, row.centroids_path or None, key=row.key, convention=row.convention or "complete"
    )


def load_ct_cohort(root, splits: Sequence[str] = SPLITS, limit: int = 0, quarantine=None) -> Iterator[LabelledCT]:
    """Read the scans of some splits one after another, as all of VerSe does not fit into memory.

    A series that fails goes to the `quarantine` CSV with its reason and the rest go on.

    Parameters
    ----------
    root : path
        See `list_series`.
    splits : sequence of str
        Of `SPLITS`.
    limit : int
        At most so many usable series a split, the first by key; 0 = all.
    quarantine : path, optional
        CSV with columns key, path, reason, kept up to date while reading.

    Raises
    ------
    InputError
        At once for an unknown split or an empty folder; at the end if no series could be used.
    """
    unknown = set(splits) - set(SPLITS)
    if unknown:
        message = f"unknown splits {sorted(unknown)}. Expected some of: {', '.join(SPLITS)}."
        raise InputError(message)
    table = list_series(root)
    if table.empty:
        message = f"no CT series under {root}; expected names such as sub-verse500_ct.nii.gz. {_HELP}"
        raise InputError(message)
    chosen = table[table["split"].isin([*splits, ""])]
    return _read_rows(chosen, root, splits, limit, quarantine)


def render_ct_cohort(
    root,
    counts: Mapping[str, int],
    seed: int = 0,
    spacing_mm=1.0,
    n_jobs: int = 2,
    sample: Callable[..., LabelledCT] = sample_scan,
) -> pd.DataFrame:
    """Render synthetic scans into the folders of VerSe, each in an orientation of its own; complete what is there.

    Each scan is written once; scan i of a split depends on (seed, split, i) alone, so a larger cohort contains the
    smaller one, and no two splits share a person. A scan that fails stands with its reason in quarantine.csv.

    Parameters
    ----------
    root : path
        One folder for one seed and spacing.
    counts : mapping of str to int
        Scans a split, for example {'training': 100, 'validation': 10, 'test': 20}.
    seed : int
    spacing_mm : float or (3,) of float
        Voxel size (right, anterior, superior).
    sample : callable
        Called as sample(seed, spacing_mm=...).

    Returns
    -------
    DataFrame
        The rows of `list_series` for these scans.

    Raises
    ------
    InputError
        For bad counts, a folder that holds another seed or spacing, or if no scan could be made.
    """
    root = Path(root).expanduser()
    _check_counts(counts)
    require_same_phantom(root, {"seed": int(seed), "spacing_mm": _three(spacing_mm)})
    numbers = {
        split: [int(seed) * 1_000_000 + SPLITS.index(split) * SEEDS_PER_SPLIT + i for i in range(count)]
        for split, count in counts.items()
    }
    jobs = [(split, number) for split, some in numbers.items() for number in some]
    results = Parallel(n_jobs=n_jobs, return_as="generator")(
        delayed(_make_scan)(root, split, number, spacing_mm, sample) for split, number in jobs
    )
    bar = tqdm(results, total=len(jobs), desc="synthetic CT", unit="scan", disable=not sys.stderr.isatty())
    failed = [{"key": _key(n), "path": "", "reason": why} for (_, n), why in zip(jobs, bar, strict=True) if why]
    pd.DataFrame(failed, columns=["key", "path", "reason"]).to_csv(root / "quarantine.csv", index=False)
    if len(failed) == len(jobs):
        message = (
            f"none of {len(jobs)} scans could be made; see {root / 'quarantine.csv'}. First: {failed[0]['reason']}"
        )
        raise InputError(message)
    table = list_series(root)
    return table[table["key"].isin([_key(number) for _, number in jobs])].reset_index(drop=True)


# --- listing ---


def require_same_phantom(folder: Path, settings: dict) -> None:
    """Note in a folder what is rendered into it, or compare with what was.

    Raises
    ------
    InputError
        If the folder holds something else.
    """
    there = read_json(folder / "phantom.json")
    if there is None:
        write_json_atomic(folder / "phantom.json", settings)
    elif there != settings:
        message = f"{folder} holds phantoms of {there}, given {settings}. Fix: render into another folder."
        raise InputError(message)


def _visible_files(root):
    for path in sorted(root.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path


def _parsed(name):
    for pattern, kind, convention in _NAMES:
        match = pattern.fullmatch(name)
        if match:
            return match["key"], kind, convention
    return None


def _split_folder(path, root):
    """Innermost folder that names a split, and the split; the root and '' without one."""
    for folder in path.parents:
        match = _SPLIT.search(folder.name)
        if match:
            return folder, match["split"].lower()
        if folder == root:
            break
    return root, ""


def _row(key, split, folder, root):
    dataset = folder.relative_to(root).as_posix() if folder != root else root.name
    blank = dict.fromkeys(COLUMNS, "")
    return blank | {"key": key, "subject": key.split("_")[0], "split": split, "dataset": dataset}


def _series_row(folder, split, key, files, root):
    row, kinds = _row(key, split, folder, root), [kind for kind, _, _ in files]
    for kind, convention, path in files:
        row[f"{kind}_path"] = str(path)
        row["convention"] = convention or row["convention"]
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    missing = [kind for kind in ("ct", "mask") if kind not in kinds]
    if twice:
        row["reason"] = f"more than one file for {' and '.join(twice)} in {folder}"
    elif missing:
        row["reason"] = f"no {' and no '.join(missing)} beside {max(files)[2].name}"  # an image rather than the points
    elif not split:
        row["reason"] = "no folder above it is named after a split; move it under 'training', 'validation' or 'test'"
    return row


def _mark_repeats(table):
    """Write reasons for subjects that stand in an earlier split too, and for series that stand twice in one."""
    rank = table["split"].map({split: i for i, split in enumerate(SPLITS)})
    usable = table["reason"] == ""
    last = rank.where(usable).groupby(table["subject"]).transform("max")
    earlier = usable & (rank < last)
    table.loc[earlier, "reason"] = [f"its subject is also in the {SPLITS[int(i)]} split" for i in last[earlier]]
    usable = table[table["reason"] == ""]
    again = usable.index[usable.duplicated("key", keep="last")]
    table.loc[again, "reason"] = "the same series stands in another folder of this split"


# --- reading ---


def _read_rows(table, root, splits, limit, quarantine):
    failed, done = [], dict.fromkeys(splits, 0)
    for row in tqdm(table.itertuples(), total=len(table), desc="reading", unit="CT", disable=not sys.stderr.isatty()):
        if limit and done.get(row.split, 0) >= limit:
            continue
        try:
            scan = load_series(row)
        except InputError as error:
            failed.append({"key": row.key, "path": row.ct_path or row.mask_path, "reason": str(error)})
            if quarantine:
                pd.DataFrame(failed).to_csv(quarantine, index=False)
            continue
        done[row.split] += 1
        yield scan
    if not sum(done.values()):
        message = f"no CT series of {root} can be used (splits {', '.join(splits)}; {len(failed)} failed). "
        raise InputError(message + (f"First: {failed[0]['reason']}" if failed else _HELP))


# --- rendering ---


def _key(number):
    return f"phantom-{number:06d}"


def _make_scan(root, split, number, spacing_mm, sample):
    """Write one scan; returns '' or why it failed."""
    if release_paths(root, _key(number), split)[-1].is_file():
        return ""
    torch.set_num_threads(1)
    keep_freed_memory()
    try:
        scan = replace(sample(number, spacing_mm=spacing_mm), key=_key(number))
        orientation = _ORIENTATIONS[np.random.default_rng([number, 48]).integers(len(_ORIENTATIONS))]
        write_labelled_ct(root, scan, split, orientation)
    except Exception as error:  # whatever it was, it must cost one scan, not the cohort
        return f"{type(error).__name__}: {error}"
    return ""


def _check_counts(counts):
    bad = {k: v for k, v in counts.items() if k not in SPLITS or not 0 <= v <= SEEDS_PER_SPLIT}
    if bad or not sum(counts.values()):
        message = (
            f"expected scans a split, some of {', '.join(SPLITS)}, each 0 to {SEEDS_PER_SPLIT}, given "
            f"{dict(counts)}. Fix: pass for example counts={{'training': 100, 'validation': 10, 'test': 20}}."
        )
        raise InputError(message)


def _three(spacing_mm):
    spacing = np.ravel(spacing_mm)
    if spacing.size not in (1, 3) or not np.issubdtype(spacing.dtype, np.number) or not np.all(spacing > 0):
        message = f"spacing_mm is {spacing_mm!r}. Expected one number or three, in mm, all above 0."
        raise InputError(message)
    return np.broadcast_to(spacing, 3).astype(float).tolist()
