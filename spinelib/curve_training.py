"""Train the DXA -> curves predictor: locator, then regressor, from the records of any manifest."""

import argparse
import json
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from spinelib.clinical import MEASURES, clinical_measures
from spinelib.data import Record, load_cohort
from spinelib.errors import InputError
from spinelib.metrics import curve_errors
from spinelib.models.crop import network_input
from spinelib.models.curves import CurveRegressor, light_network, paper_network
from spinelib.models.datasets import CurveDataset, CurveExample, LandmarkDataset, true_window
from spinelib.models.kernel import KernelRegressor
from spinelib.models.locator import SpineLocator, locate
from spinelib.models.predictor import CurvePredictor
from spinelib.models.windows import WindowSet, window_truth
from spinelib.novelty import Novelty, window_features
from spinelib.record import file_sha256
from spinelib.shards import ShardedCohort, render_shards
from spinelib.train import TrainConfig, fastest_device, fit
from spinelib.uncertainty import calibrate

NETWORKS = ("kernel", "light", "paper")
_LEAST_CALIBRATION, _VALIDATION_SUBJECTS, _NOVELTY_SUBJECTS = 20, 512, 1000
_RIGHT_JITTER_MM = 3.0
"""Standard deviation with which training windows leave the true place, as a locator's do."""


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


def train_locator(train, validation, config: TrainConfig, folder) -> SpineLocator:
    """Return a locator trained on examples; its log and checkpoint lie in `folder`."""
    torch.manual_seed(config.seed)
    locator = SpineLocator()
    fit(locator, LandmarkDataset(train, True, config.seed), LandmarkDataset(validation, False), config, folder)
    return locator


def train_kernel(
    examples,
    *,
    channels: str = "both",
    steps: int = 3,
    spoil: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> KernelRegressor:
    """Return the kernel regressor of training examples.

    Parameters
    ----------
    examples : sequence of CurveExample
        May be read one by one, as a `ShardedCohort` is.
    channels, steps
        See `KernelRegressor.fit`.
    spoil : bool
        Cut, blur or disturb a quarter of the images, see `WindowSet.spoilt`.
    device : str or device
        Where it is fitted; the result lies on the CPU.
    """
    rng = np.random.default_rng([seed, 5])
    pixels, rows, ends = [], [], []
    for example in examples:
        window = true_window(example.curves)
        window = replace(window, right_mm=window.right_mm + rng.normal(0, _RIGHT_JITTER_MM))
        pixels.append(WindowSet.of([example.dxa], [window]))
        truth = window_truth(example.curves, example.extended, window)
        rows.append(truth[0])
        ends.append(truth[1])
    windows = WindowSet(torch.cat([p.images for p in pixels]), torch.cat([p.ends_mm for p in pixels]))
    del pixels
    windows = windows.spoilt(seed) if spoil else windows
    truth = (torch.from_numpy(np.stack(part)).to(device) for part in (rows, ends))
    return KernelRegressor.fit(windows, *truth, channels=channels, steps=steps, seed=seed).to("cpu")


def calibrate_predictor(predictor: CurvePredictor, train, validation) -> CurvePredictor:
    """Return the predictor with 90% tube, intervals and novelty.

    Parameters
    ----------
    predictor : CurvePredictor
    train : sequence of CurveExample
        At most `_NOVELTY_SUBJECTS` of them tell what ordinary images look like.
    validation : sequence of CurveExample
        Neither trained nor tested on; with fewer than `_LEAST_CALIBRATION` the predictor stays without
        calibration, and a warning says so.
    """
    if len(validation) < _LEAST_CALIBRATION:
        warnings.warn(
            f"{len(validation)} validation subjects are too few to calibrate with ({_LEAST_CALIBRATION} at least): no "
            "tube, no intervals.",
            stacklevel=2,
        )
        return predictor
    windows = [predictor.window(e.dxa) for e in validation]
    found = [predictor.with_spread(e.dxa, w) for e, w in zip(validation, windows, strict=True)]
    predicted, truth = [clinical_measures(c) for c, _ in found], [clinical_measures(e.curves) for e in validation]
    measures = {m: tuple(np.array([row[m] for row in rows]) for rows in (predicted, truth)) for m in MEASURES}
    known = {m: np.isfinite(pair).all(axis=0).sum() for m, pair in measures.items()}  # a straight spine has no apex
    measures = {m: pair for m, pair in measures.items() if known[m] >= _LEAST_CALIBRATION}
    calibration = calibrate(
        [c for c, _ in found], np.stack([s for _, s in found]), [e.curves for e in validation], measures
    )
    features = [window_features(network_input(e.dxa, w)) for e, w in zip(validation, windows, strict=True)]
    ordinary = [window_features(network_input(e.dxa, true_window(e.curves))) for e in train[:_NOVELTY_SUBJECTS]]
    return replace(predictor, calibration=calibration, novelty=Novelty.fit(np.stack(ordinary), np.stack(features)))


def train_regressor(
    regressor: CurveRegressor,
    locator: SpineLocator,
    train: list[CurveExample],
    validation: list[CurveExample],
    config: TrainConfig,
    folder,
    *,
    augment: bool = True,
) -> pd.DataFrame:
    """Train `regressor` in place and return the log.

    Training windows are chosen by the truth and jittered; validation windows by the locator, as at inference.
    Without augmentation (the paper's recipe) the training windows come from the locator, too.
    """
    windows = [true_window(e.curves) if augment else locate(locator, e.dxa) for e in train]
    training_set = CurveDataset(train, windows, augment, config.seed)
    validation_set = CurveDataset(validation, [locate(locator, e.dxa) for e in validation], augment=False)
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


def new_network(name: str, pretrained: bool = False, seed: int = 0, **options) -> CurveRegressor:
    """Return a fresh 'light' or 'paper' network with seeded weights; options go to `light_network`."""
    if name not in NETWORKS[1:]:
        message = f"unknown network {name!r}. Expected one of: {', '.join(map(repr, NETWORKS[1:]))}."
        raise InputError(message)
    torch.manual_seed(seed)
    return paper_network(pretrained) if name == "paper" else light_network(pretrained, **options)


def validation_errors_mm(predictor: CurvePredictor, validation) -> np.ndarray:
    """Return the 3D centre-line error of each example, depth matched; windows by the locator."""
    return np.array([curve_errors(predictor.predict(e.dxa), e.curves)["centreline_3d_mm"] for e in validation])


def main(argv: list[str] | None = None) -> int:
    """Serve `spinelib train`; returns the exit code."""
    args = _arguments(argv)
    started = time.time()
    train, validation = _subjects(args)
    folder = Path(args.output)
    locator_config = TrainConfig(args.locator_epochs, 32, 2e-3, seed=args.seed)
    locator = train_locator(train, validation, locator_config, folder / "locator")
    card = {
        "command": "spinelib train " + " ".join(argv or []),
        "subjects": {"train": len(train), "validation": len(validation)},
        "torch": torch.__version__,
    }
    if args.network == "kernel":
        predictor = CurvePredictor(locator, train_kernel(train, seed=args.seed, device=fastest_device()), card)
    else:
        recipe = TrainConfig(args.epochs, args.batch_size, args.learning_rate, args.recipe, seed=args.seed)
        network = new_network(args.network, args.pretrained, args.seed)
        augment = args.recipe == "modern"
        train_regressor(network, locator, train, validation, recipe, folder / "regressor", augment=augment)
        predictor = CurvePredictor(locator, network, card | {"config": asdict(recipe)})
    predictor = calibrate_predictor(predictor, train, validation)
    predictor.card["validation_mm"] = round(float(validation_errors_mm(predictor, validation).mean()), 3)
    predictor.card["seconds"] = round(time.time() - started)
    path = folder / "weights.safetensors"
    predictor.save(path)
    path.with_suffix(".json").write_text(json.dumps(predictor.card | {"sha256": file_sha256(path)}, indent=1) + "\n")
    print(f"{path}: validation {predictor.card['validation_mm']:.2f} mm in {predictor.card['seconds']} s")
    return 0


def _subjects(args):
    """Return training and validation examples of the manifest, or of shards: the last tenth validates."""
    if args.shards:
        if args.render:
            render_shards(args.shards, args.render, seed=args.people_seed, n_jobs=args.n_jobs)
        cohort = ShardedCohort(args.shards, args.limit)
        held_out = max(1, min(len(cohort) // 10, _VALIDATION_SUBJECTS))
        return cohort[:-held_out], cohort[-held_out:]
    if not args.manifest:
        message = "nothing to train on. Give a manifest, or --shards FOLDER --render 2000 for synthetic people."
        raise InputError(message)
    train = load_cohort(args.manifest, splits=args.train_splits, limit=args.limit)
    return curve_examples(train), curve_examples(load_cohort(args.manifest, splits=("validation",), limit=args.limit))


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="spinelib train",
        description="Train the DXA -> curves predictor on a manifest.",
        epilog="Example:  spinelib train data/synthetic-0/manifest-1200.csv -o runs/kernel\n"
        "Vertebrae in CT have their own:  spinelib train vertebrae --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", nargs="?", default="", help="train and validate on its splits")
    parser.add_argument("--shards", metavar="FOLDER", help="train on shards of synthetic people instead")
    parser.add_argument("--render", type=int, default=0, metavar="N", help="render N people into --shards first")
    parser.add_argument("--people-seed", type=int, default=2000, help="who is rendered; test cohorts use small seeds")
    parser.add_argument("--n-jobs", type=int, default=2, help="processes that render")
    parser.add_argument("-o", "--output", required=True, help="folder for weights, logs and checkpoints")
    parser.add_argument("--network", default="kernel", choices=NETWORKS)
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
