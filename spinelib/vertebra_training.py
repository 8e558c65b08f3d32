"""Training of the vertebra networks: `spinelib train vertebrae`."""

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from spinelib.ct_cohort import load_ct_cohort
from spinelib.data import keep_freed_memory
from spinelib.errors import InputError
from spinelib.models.scan_cache import CachedScan, cache_scan, pooled
from spinelib.models.vertebra_datasets import SPINE_STEP, LevelDataset, OutlineDataset, SpineDataset, VoteDataset
from spinelib.models.vertebra_networks import (
    VOTER,
    DistilledUNet,
    LevelNet,
    RefinedVotes,
    SpineFinder,
    SurfaceRefiner,
    VertebraUNet,
    VoteUNet,
)
from spinelib.models.vertebrae import VertebraSegmenter
from spinelib.models.weights import finish_training
from spinelib.phantom.scan import sample_scan
from spinelib.train import FINE_TUNING, TrainConfig, fit

PARTS = 400
"""Random parts of scans that make up an epoch."""

_RATE = 3e-3
_SPACINGS_MM = (1.0, 2.0)  # of rendered scans: what is smaller than a working voxel blurs scans as real ones are
_EPOCHS = {"finder": 12, "namer": 100, "voter": 32, "refiner": 24, "outliner": 17}


def render_scans(folder, count: int, seed: int = 0, n_jobs: int = 2) -> list[CachedScan]:
    """Render phantom scans of the seeds `seed` to `seed + count - 1` on the working grid; existing ones are kept."""
    jobs = (delayed(_render)(folder, seed + i) for i in range(count))
    return list(tqdm(Parallel(n_jobs, return_as="generator")(jobs), total=count, desc="scans", disable=None))


def train_finder(
    train: list[CachedScan],
    validation,
    config: TrainConfig,
    folder,
    parts: int = PARTS,
    workers: int = 0,
    start: SpineFinder | None = None,
) -> SpineFinder:
    """Train the heat map of the spine on `config.epochs` passes of random parts, from scratch or from `start`."""
    return _fitted(
        _new(SpineFinder, start), _coarse_sets(SpineDataset, train, validation, config, parts), config, folder, workers
    )


def train_voter(
    train: list[CachedScan],
    validation,
    config: TrainConfig,
    folder,
    channels: tuple[int, ...] = VOTER,
    teacher: VoteUNet | None = None,
    parts: int = PARTS,
    workers: int = 0,
    start: VoteUNet | None = None,
) -> VoteUNet:
    """Train the network whose voxels vote for the centre of their vertebra, from scratch or taught by another one."""
    sets = [VoteDataset(scans, length, config.seed, a) for scans, length, a in _plans(train, validation, parts)]
    if teacher is None:
        return _fitted(_new(lambda: VoteUNet(channels), start), sets, config, folder, workers)
    return _fitted(
        lambda: DistilledUNet(_new(lambda: VoteUNet(channels), start)(), teacher), sets, config, folder, workers
    ).student


def train_refiner(
    train: list[CachedScan],
    validation,
    config: TrainConfig,
    folder,
    voter: VoteUNet,
    parts: int = PARTS,
    workers: int = 0,
    start: SurfaceRefiner | None = None,
) -> SurfaceRefiner:
    """Train the network that places the surface of what `voter` calls bone."""
    sets = [VoteDataset(scans, n, config.seed, a, moved=0.0) for scans, n, a in _plans(train, validation, parts)]
    return _fitted(lambda: RefinedVotes(_new(SurfaceRefiner, start)(), voter), sets, config, folder, workers).refiner


def train_outliner(
    train: list[CachedScan],
    validation,
    config: TrainConfig,
    folder,
    parts: int = PARTS,
    workers: int = 0,
    start: VertebraUNet | None = None,
) -> VertebraUNet:
    """Train the network that outlines the next vertebra."""
    sets = [OutlineDataset(scans, length, config.seed, a) for scans, length, a in _plans(train, validation, parts)]
    return _fitted(_new(VertebraUNet, start), sets, config, folder, workers)


def train_namer(
    train: list[CachedScan],
    validation,
    config: TrainConfig,
    folder,
    parts: int = PARTS,
    workers: int = 0,
    start: LevelNet | None = None,
) -> LevelNet:
    """Train the network that names levels and tells complete from cut vertebrae."""
    return _fitted(
        _new(LevelNet, start), _coarse_sets(LevelDataset, train, validation, config, parts), config, folder, workers
    )


def train_segmenter(
    train: list[CachedScan],
    validation: list[CachedScan],
    folder,
    epochs: dict[str, int],
    parts=PARTS,
    seed=0,
    workers=0,
    start: VertebraSegmenter | None = None,
) -> VertebraSegmenter:
    """Train the five networks.

    Parameters
    ----------
    train, validation : list of CachedScan
    folder : path
        Logs and checkpoints; a training that was interrupted goes on.
    epochs : dict of int
        Of 'finder', 'namer', 'voter', 'refiner' and 'outliner'; 0 keeps the network of `start`.
    parts : int
        Random parts of scans an epoch.
    seed, workers : int
        Of everything drawn; processes that cut parts, 0 = none of their own.
    start : VertebraSegmenter, optional
        Networks to go on from, to fine-tune them; left as they are.
    """
    folder = Path(folder)
    schools = {"finder": (train_finder, 2), "namer": (train_namer, 16)}
    schools |= {"voter": (train_voter, 2), "outliner": (train_outliner, 2)}
    schools["refiner"] = (lambda *args, **options: train_refiner(*args, voter=nets["voter"], **options), 2)
    nets = {}
    for name, (school, batch_size) in schools.items():
        first = getattr(start, name, None)
        if epochs[name] == 0 and first is not None:
            nets[name] = first
            continue
        rate = _RATE if first is None else _RATE * FINE_TUNING
        config = TrainConfig(epochs[name], batch_size, rate, seed=seed)
        nets[name] = school(train, validation, config, folder / name, parts=parts, workers=workers, start=first)
    return VertebraSegmenter(**nets)


def main(argv: list[str] | None = None) -> int:
    """Serve `spinelib train vertebrae`; returns the exit code."""
    args = _arguments(argv)
    started, folder = time.time(), Path(args.output)
    train, validation, source = _scans(args)
    epochs = {name: getattr(args, f"{name}_epochs") for name in _EPOCHS}
    start = VertebraSegmenter.load(args.start) if args.start else None
    segmenter = train_segmenter(train, validation, folder, epochs, args.parts, args.seed, args.workers, start)
    card = {
        "command": "spinelib train vertebrae " + " ".join(argv or []),
        "scans": {"train": len(train), "validation": len(validation), "source": source},
    }
    finish_training(
        folder, lambda path, card: replace(segmenter, card=card).save(path), card, started, f"{len(train)} scans"
    )
    return 0


def _scans(args):
    """Return cached training and validation scans and where they are from."""
    if bool(args.root) == bool(args.render):
        message = "give either a folder in VerSe layout or --render N for synthetic scans."
        raise InputError(message)
    if args.render:
        held_out = max(1, args.render // 12)
        scans = render_scans(args.cache, args.render + held_out, args.scan_seed, args.n_jobs)
        return scans[: args.render], scans[args.render :], f"phantom seeds from {args.scan_seed}"
    parts = []
    for split in ("training", "validation"):
        scans = load_ct_cohort(args.root, splits=(split,), quarantine=Path(args.cache) / f"quarantine-{split}.csv")
        parts.append([cache_scan(scan, Path(args.cache) / split) for scan in scans])
    return *parts, str(args.root)


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="spinelib train vertebrae",
        description="Train the CT -> vertebrae networks on a data set in VerSe layout or on synthetic scans.",
        epilog="Example:  spinelib train vertebrae --render 400 -o runs/vertebrae",
    )
    parser.add_argument("root", nargs="?", default="", metavar="FOLDER", help="a data set in VerSe layout")
    parser.add_argument("--render", type=int, default=0, metavar="N", help="train on N synthetic scans instead")
    parser.add_argument("--scan-seed", type=int, default=100_000, help="first synthetic scan; tests use small seeds")
    parser.add_argument("--cache", default="data/ct-cache", metavar="FOLDER", help="scans on the working grid")
    parser.add_argument("--from", dest="start", default="", metavar="WEIGHTS", help="fine-tune these weights")
    parser.add_argument("-o", "--output", required=True, help="folder for weights, logs and checkpoints")
    for name, epochs in _EPOCHS.items():
        parser.add_argument(
            f"--{name}-epochs", type=int, default=epochs, help="passes of --parts parts; 0 with --from: keep it"
        )
    parser.add_argument("--parts", type=int, default=PARTS, help="parts a pass")
    parser.add_argument("--n-jobs", type=int, default=2, help="processes that render")
    parser.add_argument("--workers", type=int, default=1, help="processes that cut parts while training")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _plans(train, validation, parts):
    return (train, parts, True), (validation, max(parts // 4, len(validation)), False)


def _coarse_sets(kind, train, validation, config, parts):
    return [
        kind(scans, length, config.seed, augment, pooled(scans, SPINE_STEP))
        for scans, length, augment in _plans(train, validation, parts)
    ]


def _new(make, start):
    """Return what builds the first network: a copy of `start`, or else what `make` builds."""
    return make if start is None else lambda: copy.deepcopy(start).train()


def _fitted(make, sets, config, folder, workers):
    """Return a network that `make` builds after the seed is set, trained."""
    torch.manual_seed(config.seed)
    model = make()
    fit(model, *sets, config, folder, workers=workers)
    return model.eval()


def _render(folder, seed):
    keep_freed_memory()
    torch.set_num_threads(1)
    path = Path(folder) / f"phantom-{seed:06d}.safetensors"
    if path.is_file():
        return CachedScan(path)
    plane, slices = np.random.default_rng([seed, 20]).uniform(*_SPACINGS_MM, 2)
    return cache_scan(sample_scan(seed, (plane, plane, slices)), folder)
