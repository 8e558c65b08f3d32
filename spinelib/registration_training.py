"""Training of the networks that register CT to MR: `spinelib train ctmr`."""

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from joblib import Parallel, delayed
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from spinelib.data import keep_freed_memory
from spinelib.errors import InputError
from spinelib.imaging.pairs import list_pairs, read_pair
from spinelib.models.ctmr import VARIANTS, CTMRModel, held_variants, load_variant, save_variants
from spinelib.models.ctmr_data import PairDataset, cache_pair
from spinelib.models.weights import finish_training
from spinelib.phantom.pairs import sample_pair
from spinelib.train import TrainConfig, fastest_device, fit

PARTS = 200
"""Crops that make up an epoch."""

BATCH_SIZE = 1

RATE = 2e-4
"""Peak rate: the loss of three pairs falls to 0.70 in 120 steps, at 5e-4 to 0.88; the released code takes 1e-4."""


def train_variant(
    name: str,
    train: Dataset,
    validation: Dataset,
    config: TrainConfig,
    folder,
    workers: int = 0,
    start: CTMRModel | None = None,
) -> CTMRModel:
    """Train one variant and return it in evaluation mode.

    Two stages, as published: similarity and smoothness first ('baseline'), then with the variant's rigidity terms.

    Parameters
    ----------
    name : str
        One of `spinelib.models.ctmr.VARIANTS`.
    train, validation : Dataset
        Items as those of `PairDataset`. Validation measures the objective that the variant is trained for.
    config : TrainConfig
        Of each stage.
    folder : path
        Gets log and checkpoint, those of the first stage in a folder of its own; an interrupted training goes on.
    workers : int
        Processes that cut crops; 0 = none of their own.
    start : CTMRModel, optional
        Of any variant: its weights instead of a first stage; left as it is.

    Raises
    ------
    InputError
        If the name is unknown.
    """
    torch.manual_seed(config.seed)
    model = CTMRModel(name).to(fastest_device())
    if start is None and VARIANTS[name]:
        start = train_variant("baseline", train, validation, config, Path(folder) / "stage1", workers)
    if start is not None:
        model.load_state_dict(start.state_dict())
    fit(model, train, validation, config, folder, workers=workers)
    return model.eval()


def mean_terms(model: CTMRModel, data: Dataset) -> dict[str, float]:
    """Return every term of the loss, before weighting, over a data set: the same measure for all variants."""
    device = next(model.parameters()).device
    found = [model.terms({name: value.to(device) for name, value in batch.items()}) for batch in DataLoader(data, 1)]
    return {name: float(torch.stack([terms[name] for terms in found]).mean()) for name in found[0]}


def main(argv: list[str] | None = None) -> int:
    """Serve `spinelib train ctmr`; returns the exit code."""
    args = _arguments(argv)
    started, folder = time.time(), Path(args.output)
    train, validation, source = _pairs(args)
    sets = PairDataset(train, augment=True, seed=args.seed, parts=args.parts), PairDataset(validation)
    config = TrainConfig(args.epochs, BATCH_SIZE, RATE, seed=args.seed)
    model = train_variant(args.variant, *sets, config, folder, args.workers, _start(args))
    card = {
        "command": "spinelib train ctmr " + " ".join(argv or []),
        "variant": args.variant,
        "pairs": {"train": len(train), "validation": len(validation), "source": source},
        "validation": {name: float(f"{value:.4g}") for name, value in mean_terms(model, sets[1]).items()},
    }
    finish_training(folder, partial(save_variants, {args.variant: model}), card, started, f"{len(train)} pairs")
    return 0


def _start(args):
    """Return the model to go on from: of the same variant if the file has it, else the first in it."""
    if not args.start:
        return None
    held = held_variants(args.start)
    return load_variant(args.variant if args.variant in held else held[0], args.start)


def _pairs(args):
    """Return the cached pairs for training and validation and where they are from."""
    if bool(args.root) == bool(args.render):
        message = "give either a folder of pairs or --render N for synthetic ones."
        raise InputError(message)
    if args.render:
        held_out = max(1, args.render // 12)
        seeds = range(args.pair_seed, args.pair_seed + args.render + held_out)
        paths = _cached(args.cache, {f"pair-{seed:06d}": partial(sample_pair, seed) for seed in seeds}, args.n_jobs)
        source = f"phantom pair seeds from {args.pair_seed}"
        return paths[:-held_out], paths[-held_out:], source
    parts = [
        _cached(Path(args.cache) / split, {path.name: partial(read_pair, path) for path in found}, args.n_jobs)
        for split in ("train", "val")
        for found in [list_pairs(args.root, split)]
    ]
    return *parts, str(args.root)


def _cached(folder, jobs: dict[str, Callable], n_jobs) -> list[Path]:
    """Return the files of the pairs that could be made; existing ones are kept, others are named in a warning."""
    paths = [Path(folder).expanduser() / f"{key}.safetensors" for key in jobs]
    results = Parallel(n_jobs, return_as="generator")(
        delayed(_make)(path, job) for path, job in zip(paths, jobs.values(), strict=True)
    )
    reasons = list(tqdm(results, "pairs", len(paths), unit="pair", disable=None))
    failed = [f"{path.stem}: {reason}" for path, reason in zip(paths, reasons, strict=True) if reason]
    if len(failed) == len(paths):
        message = f"no pair could be used. The first reason: {failed[0]}"
        raise InputError(message)
    if failed:
        warnings.warn("pairs left out: " + "; ".join(failed), stacklevel=2)
    return [path for path, reason in zip(paths, reasons, strict=True) if not reason]


def _make(path, job):
    if path.is_file():
        return ""
    keep_freed_memory()
    try:
        cache_pair(job(), path)
    except InputError as error:
        return str(error)
    return ""


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="spinelib train ctmr",
        description="Train a network that registers CT to MR, on pairs with vertebra masks of the CT, or on phantoms.",
        epilog="Example:  spinelib train ctmr --render 100 --variant pc_rd -o runs/pc_rd",
    )
    parser.add_argument("root", nargs="?", default="", metavar="FOLDER", help="pairs: FOLDER/train/001/ct.nii.gz ...")
    parser.add_argument("--render", type=int, default=0, metavar="N", help="train on N synthetic pairs instead")
    parser.add_argument("--variant", choices=list(VARIANTS), default="baseline")
    parser.add_argument("--pair-seed", type=int, default=300_000, help="first synthetic pair; tests use small seeds")
    parser.add_argument("--cache", default="data/ctmr-cache", metavar="FOLDER", help="pairs on the working grid")
    parser.add_argument("--from", dest="start", default="", metavar="WEIGHTS", help="second stage from these weights")
    parser.add_argument("-o", "--output", required=True, help="folder for weights, log and checkpoint")
    parser.add_argument("--epochs", type=int, default=20, help="passes of --parts crops, of each stage")
    parser.add_argument("--parts", type=int, default=PARTS, help="crops a pass")
    parser.add_argument("--n-jobs", type=int, default=2, help="processes that make pairs")
    parser.add_argument("--workers", type=int, default=1, help="processes that cut crops while training")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)
