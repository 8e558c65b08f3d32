"""Cohorts of synthetic CT/MR pairs on disk, in the folders of the paper."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from spinelib.ct_cohort import require_same_phantom
from spinelib.data import keep_freed_memory
from spinelib.errors import InputError
from spinelib.imaging.pairs import CT_NAME, write_pair
from spinelib.phantom.pairs import STANDARD_MIX, PairMix, sample_pair


def render_pair_cohort(folder, count: int, seed: int = 0, n_jobs: int = 2, mix: PairMix = STANDARD_MIX) -> list[Path]:
    """Render the pairs of the seeds `seed` to `seed + count - 1`; what is there is kept.

    Parameters
    ----------
    folder : path
        For one mix. Named `<root>/train`, its pairs are found by `list_pairs(root, "train")`. Gets a folder a pair and
        quarantine.csv with the reasons of those that failed.
    count, seed : int
    n_jobs : int
        Processes.
    mix : PairMix

    Returns
    -------
    list of Path
        Folders of `spinelib.imaging.pairs.read_pair`.

    Raises
    ------
    InputError
        If no pair could be made, or the folder holds pairs of another mix.
    """
    folder = Path(folder).expanduser()
    require_same_phantom(folder, asdict(mix))
    seeds = range(seed, seed + count)
    results = Parallel(n_jobs, return_as="generator")(delayed(_make)(folder, number, mix) for number in seeds)
    reasons = list(tqdm(results, total=count, desc="CT/MR pairs", unit="pair", disable=None))
    paths = [_pair_folder(folder, number) for number in seeds]
    failed = [{"key": path.name, "reason": why} for path, why in zip(paths, reasons, strict=True) if why]
    pd.DataFrame(failed, columns=["key", "reason"]).to_csv(folder / "quarantine.csv", index=False)
    if len(failed) == count:
        message = f"none of {count} pairs could be made. First: {failed[0]['reason'] if failed else 'none asked for'}"
        raise InputError(message)
    return [path for path, why in zip(paths, reasons, strict=True) if not why]


def _pair_folder(folder, number) -> Path:
    return folder / f"pair-{number:06d}"


def _make(folder, number, mix):
    """Write one pair, all of it or nothing; returns '' or why it failed."""
    target = _pair_folder(folder, number)
    if (target / CT_NAME).is_file():
        return ""
    torch.set_num_threads(1)
    keep_freed_memory()
    draft = folder / f".{target.name}.part"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        write_pair(draft, sample_pair(number, mix=mix)).rename(target)
    except Exception as error:  # whatever it was, it must cost one pair, not the cohort
        return f"{type(error).__name__}: {error}"
    return ""
