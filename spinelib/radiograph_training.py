"""Training of the networks that see a vertebra in two radiographs: `spinelib train transvert`."""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import BiplanarSubject
from spinelib.models.biplanar import VARIANTS, load_variant, new_variant, save_variants
from spinelib.models.biplanar_data import ANNOTATIONS, BiplanarDataset
from spinelib.models.weights import finish_training
from spinelib.radiograph_cohort import cache_biplanar_cohort, render_biplanar_cohort
from spinelib.train import FINE_TUNING, TrainConfig, fastest_device, fit

PARTS = 800
"""Vertebrae that make up an epoch."""

BATCH_SIZE = 4
RATE = 2e-3
"""Peak rate of short trainings, for all networks; the paper's 1e-4 is for training until nothing changes."""


_TUNING_PARTS, _TUNING_RATE = 100, 1e-4  # of fine-tuning on a few scans; RATE * FINE_TUNING undoes much in so few
_LYING_SEED = 100_000  # of the first lying person, after that of the first standing one


class DrawnParts(Dataset):
    """A few items of a data set, others each epoch.

    Parameters
    ----------
    whole : Dataset
        Told the epoch by `set_epoch`.
    count : int
        Items an epoch, without repeats; all of them if there are fewer.
    seed : int
    """

    def __init__(self, whole: Dataset, count: int, seed: int = 0):
        self.whole, self.count, self.seed = whole, min(count, len(whole)), seed
        self.annotation = getattr(whole, "annotation", None)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the items of an epoch, the same for the same seed and epoch."""
        self.whole.set_epoch(epoch)
        self.places = np.random.default_rng([self.seed, epoch]).permutation(len(self.whole))[: self.count]

    def __len__(self) -> int:
        """Return the items an epoch."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of the item that stands at `index` this epoch."""
        return self.whole[int(self.places[index])]


def train_variant(
    name: str,
    train: Dataset,
    validation: Dataset,
    config: TrainConfig,
    folder,
    workers: int = 0,
    start: nn.Module | None = None,
) -> nn.Module:
    """Train one network and return it in evaluation mode.

    Parameters
    ----------
    name : str
        One of `spinelib.models.biplanar.VARIANTS`.
    train, validation : Dataset
        Items as those of `BiplanarDataset`. The network keeps the `annotation` of `train` in mind.
    config : TrainConfig
    folder : path
        Gets log and checkpoint; a training that was interrupted goes on.
    workers : int
        Processes that cut patches; 0 = none of their own.
    start : Module, optional
        A network of this name to go on from, to fine-tune it; left as it is.

    Raises
    ------
    InputError
        If the name is unknown.
    """
    torch.manual_seed(config.seed)
    network = new_variant(name).to(fastest_device())
    if start is not None:
        network.load_state_dict(start.state_dict())
    network.annotation = getattr(train, "annotation", None) or network.annotation
    fit(network, train, validation, config, folder, workers=workers)
    return network.eval()


def leave_one_out(
    start: nn.Module,
    subjects: Sequence[BiplanarSubject],
    beside: Sequence[BiplanarSubject],
    epochs: int,
    folder,
    seed: int = 0,
) -> dict[str, nn.Module]:
    """Fine-tune 'ours' for every subject on all the others, and as much on people that it knows.

    On a few scans alone it forgets what these do not show, as other levels.

    Parameters
    ----------
    start : Module
        A trained `LiftingNet`; left as it is.
    subjects : sequence of BiplanarSubject
    beside : sequence of BiplanarSubject
        As those that `start` was trained on.
    epochs : int
        Passes of 100 vertebrae, half of them of the others. The pass with the least loss on the others
        and as many people of `beside`, not spoilt, is kept.
    folder : path
    seed : int

    Returns
    -------
    dict of str to Module
        By the key of the subject that the network has not seen.

    Raises
    ------
    InputError
        With fewer than two subjects.
    """
    if len(subjects) < 2:
        message = f"leave-one-out needs two subjects or more, given {len(subjects)}."
        raise InputError(message)
    config, tuned = TrainConfig(epochs, BATCH_SIZE, _TUNING_RATE, seed=seed), {}
    for subject in subjects:
        others = [other for other in subjects if other is not subject]
        known, new = (sum(len(person.labels) for person in people) for people in (beside, others))
        people = [*beside, *others * max(1, round(known / new))]
        train = DrawnParts(BiplanarDataset(people, start.annotation, augment=True, seed=seed), _TUNING_PARTS, seed)
        validation = BiplanarDataset([*others, *beside[: len(others)]], start.annotation)
        tuned[subject.key] = train_variant("ours", train, validation, config, Path(folder) / subject.key, start=start)
    return tuned


def main(argv: list[str] | None = None) -> int:
    """Serve `spinelib train transvert`; returns the exit code."""
    args = _arguments(argv)
    started, folder = time.time(), Path(args.output)
    train, validation, source = _subjects(args)
    start = load_variant(args.variant, args.start) if args.start else None
    annotation = args.annotation or (start.annotation if start else "c2v")
    sets = (
        DrawnParts(
            BiplanarDataset(train, annotation, augment=True, seed=args.seed, clutter=args.clutter),
            args.parts,
            args.seed,
        ),
        BiplanarDataset(validation, annotation),
    )
    config = TrainConfig(args.epochs, BATCH_SIZE, RATE * FINE_TUNING if start else RATE, seed=args.seed)
    network = train_variant(args.variant, *sets, config, folder, args.workers, start)
    card = {
        "command": "spinelib train transvert " + " ".join(argv or []),
        "variant": args.variant,
        "annotation": annotation,
        "subjects": {"train": len(train), "validation": len(validation), "source": source},
    }
    finish_training(folder, partial(save_variants, {args.variant: network}), card, started, f"{len(train)} subjects")
    return 0


def _subjects(args):
    """Return training and validation subjects and where they are from."""
    if bool(args.root) == bool(args.render):
        message = "give either a folder in VerSe layout or --render N for synthetic people."
        raise InputError(message)
    if args.lying and not args.render:
        message = "--lying adds synthetic people to those of --render N, and that is not given."
        raise InputError(message)
    if args.render:
        parts = _phantoms(args.cache, args.render, args.subject_seed, args.n_jobs)
        source = f"standing phantom seeds from {args.subject_seed}"
        if args.lying:
            seed = args.subject_seed + _LYING_SEED
            more = _phantoms(Path(args.cache) / "lying", args.lying, seed, args.n_jobs, "lying")
            parts = [standing + lying for standing, lying in zip(parts, more, strict=True)]
            source += f", lying ones from {seed}"
    else:
        cache, source = Path(args.cache), str(args.root)
        splits = ("training", "validation")
        parts = [cache_biplanar_cohort(args.root, cache / split, (split,), args.n_jobs) for split in splits]
    return *([BiplanarSubject.load(path) for path in part] for part in parts), source


def _phantoms(folder, count, *how):
    """Return files of `count` training people and of one more in twelve for validation."""
    held_out = max(1, count // 12)
    paths = render_biplanar_cohort(folder, count + held_out, *how)
    return paths[:-held_out], paths[-held_out:]


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="spinelib train transvert",
        description="Train a network that sees a vertebra in two radiographs, on CTs or synthetic people.",
        epilog="Example:  spinelib train transvert --render 100 --variant ours -o runs/ours",
    )
    parser.add_argument("root", nargs="?", default="", metavar="FOLDER", help="CTs and masks in VerSe layout")
    parser.add_argument(
        "--render", type=int, default=0, metavar="N", help="train on N synthetic standing people instead"
    )
    parser.add_argument(
        "--lying", type=int, default=0, metavar="N", help="with --render: N more who lie as in a CT scanner, bent"
    )
    parser.add_argument("--variant", choices=list(VARIANTS), default="ours")
    parser.add_argument(
        "--annotation", choices=ANNOTATIONS, help="what marks the vertebra in a patch; that of --from, or c2v"
    )
    parser.add_argument(
        "--subject-seed", type=int, default=200_000, help="first synthetic person; tests use small seeds"
    )
    parser.add_argument("--cache", default="data/biplanar-cache", metavar="FOLDER", help="radiographs and cubes")
    parser.add_argument("--from", dest="start", default="", metavar="WEIGHTS", help="fine-tune these weights")
    parser.add_argument("-o", "--output", required=True, help="folder for weights, log and checkpoint")
    parser.add_argument("--epochs", type=int, default=20, help="passes of --parts vertebrae")
    parser.add_argument("--parts", type=int, default=PARTS, help="vertebrae a pass")
    parser.add_argument(
        "--clutter", type=float, default=0.0, help="share of patches overlaid with what may hide a patient's spine"
    )
    parser.add_argument("--n-jobs", type=int, default=2, help="processes that render")
    parser.add_argument("--workers", type=int, default=1, help="processes that cut patches while training")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)
