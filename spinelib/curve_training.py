"""Train the DXA -> curves predictor: locator, then regressor, from the records of any manifest."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from spinelib.data import Record, load_cohort
from spinelib.errors import InputError
from spinelib.models.curves import CurveRegressor, light_network, paper_network
from spinelib.models.datasets import CurveDataset, CurveExample, LandmarkDataset, true_window
from spinelib.models.locator import SpineLocator, locate
from spinelib.models.predictor import CurvePredictor
from spinelib.record import file_sha256
from spinelib.train import TrainConfig, fit

NETWORKS = ("light", "paper")


def curve_examples(records: list[Record]) -> list[CurveExample]:
    """Return what training needs of records; extended curves fall back to the T1-L5 curves.

    Raises
    ------
    InputError
        If a record has no DXA or no curves.
    """
    lacking = [r.key for r in records if r.dxa is None or r.curves is None]
    if lacking:
        message = f"training needs modalities dxa and curves; {len(lacking)} subjects lack one, first: {lacking[:3]}."
        raise InputError(message)
    return [CurveExample(r.key, r.dxa, r.curves, r.extended_curves or r.curves) for r in records]


def train_locator(train: list[Record], validation: list[Record], config: TrainConfig, folder) -> SpineLocator:
    """Return a trained locator; its log and checkpoint lie in `folder`."""
    torch.manual_seed(config.seed)
    locator = SpineLocator()
    sets = (
        LandmarkDataset(curve_examples(train), True, config.seed),
        LandmarkDataset(curve_examples(validation), False),
    )
    fit(locator, *sets, config, folder)
    return locator


def train_regressor(
    regressor: CurveRegressor,
    locator: SpineLocator,
    train: list[Record],
    validation: list[Record],
    config: TrainConfig,
    folder,
    *,
    augment: bool = True,
) -> pd.DataFrame:
    """Train `regressor` in place and return the log.

    Training windows are chosen by the truth and jittered; validation windows by the locator, as at inference.
    Without augmentation (the paper's recipe) the training windows come from the locator, too.
    """
    examples, others = curve_examples(train), curve_examples(validation)
    windows = [true_window(e.curves) if augment else locate(locator, e.dxa) for e in examples]
    training_set = CurveDataset(examples, windows, augment, config.seed)
    validation_set = CurveDataset(others, [locate(locator, e.dxa) for e in others], augment=False)
    if config.recipe == "modern":
        rows = training_set.rows()
        spread = rows.std(axis=(0, 1))
        if regressor.shortcut is not None:
            items = training_set.plain()
            regressor.shortcut.fit(items["image"], items["rows_mm"])
            spread = spread / 3  # of what the shortcut leaves to the network, roughly
        regressor.set_output_scale(
            torch.from_numpy(rows.mean(axis=0).astype(np.float32)), torch.from_numpy(spread.astype(np.float32))
        )
    return fit(regressor, training_set, validation_set, config, folder)


def new_network(name: str, pretrained: bool = False, seed: int = 0) -> CurveRegressor:
    """Return a fresh 'light' or 'paper' network with seeded weights."""
    if name not in NETWORKS:
        message = f"unknown network {name!r}. Expected one of: {', '.join(map(repr, NETWORKS))}."
        raise InputError(message)
    torch.manual_seed(seed)
    return paper_network(pretrained) if name == "paper" else light_network(pretrained)


def main(argv: list[str] | None = None) -> int:
    """Serve `spinelib train`; returns the exit code."""
    args = _arguments(argv)
    started = time.time()
    train = load_cohort(args.manifest, splits=args.train_splits, limit=args.limit)
    validation = load_cohort(args.manifest, splits=("validation",), limit=args.limit)
    folder = Path(args.output)
    locator_config = TrainConfig(epochs=args.locator_epochs, batch_size=32, learning_rate=2e-3, seed=args.seed)
    locator = train_locator(train, validation, locator_config, folder / "locator")
    recipe = TrainConfig(args.epochs, args.batch_size, args.learning_rate, args.recipe, seed=args.seed)
    network = new_network(args.network, args.pretrained, args.seed)
    augment = args.recipe == "modern"
    log = train_regressor(network, locator, train, validation, recipe, folder / "regressor", augment=augment)
    card = {
        "command": "spinelib train " + " ".join(argv or []),
        "subjects": {"train": len(train), "validation": len(validation)},
        "config": asdict(recipe),
        "validation_mm": float(log["validation_loss"].min()),
        "seconds": round(time.time() - started),
        "torch": torch.__version__,
    }
    path = folder / "weights.safetensors"
    CurvePredictor(locator, network, card).save(path)
    path.with_suffix(".json").write_text(json.dumps(card | {"sha256": file_sha256(path)}, indent=1) + "\n")
    print(f"{path}: validation {card['validation_mm']:.2f} mm in {card['seconds']} s")
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="spinelib train",
        description="Train the DXA -> curves predictor on a manifest.",
        epilog="Example:  spinelib train data/synthetic/manifest.csv -o runs/light --epochs 40",
    )
    parser.add_argument("manifest")
    parser.add_argument("-o", "--output", required=True, help="folder for weights, logs and checkpoints")
    parser.add_argument("--network", default="light", choices=NETWORKS)
    parser.add_argument("--recipe", default="modern", choices=("modern", "paper"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--locator-epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--train-splits",
        nargs="+",
        default=["train"],
        choices=("train", "test"),
        help="add test only if you test elsewhere",
    )
    parser.add_argument("--limit", type=int, default=0, help="at most so many subjects per split (0 = all)")
    parser.add_argument("--pretrained", action="store_true", help="start from ImageNet weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)
