"""Training from the command line, and the table of scores."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from spinelib.cli import main
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.verse import body_centroids_mm, write_labelled_ct
from spinelib.models.scan_cache import cache_scan
from spinelib.models.vertebra_networks import VoteUNet
from spinelib.models.vertebrae import VertebraSegmenter
from spinelib.phantom.scan import sample_scan
from spinelib.train import TrainConfig
from spinelib.vertebra_evaluation import (
    anatomy,
    ceiling_method,
    evaluate_scans,
    field_of_view,
    headline_numbers,
    published_rows,
    score_rows,
    threshold_method,
    whole_vertebrae,
)
from spinelib.vertebra_training import main as train
from spinelib.vertebra_training import (
    train_finder,
    train_namer,
    train_outliner,
    train_refiner,
    train_segmenter,
    train_voter,
)


@pytest.fixture(scope="module")
def scan():
    return sample_scan(3, spacing_mm=2.5)


def perfect(scan):
    truth = whole_vertebrae(scan)
    return truth, {k: v for k, v in scan.centroids_mm.items() if k not in scan.cut}


def shifted(scan):
    truth, centroids = perfect(scan)
    return np.where(truth > 0, truth + 1, 0).astype(np.uint8), {k + 1: v for k, v in centroids.items()}


@pytest.fixture(scope="module")
def scores(scan):
    methods = {"perfect": perfect, "shifted": shifted, "ceiling": ceiling_method, "threshold": threshold_method}
    return evaluate_scans(methods, [scan])


def mean(scores, method, column):
    return scores.loc[scores["method"] == method, column].astype(float).mean()


def test_perfect_and_shifted_masks(scores):
    assert mean(scores, "perfect", "dice") == 1
    assert mean(scores, "perfect", "identified") == 1
    assert mean(scores, "shifted", "shape_dice") == 1
    assert mean(scores, "shifted", "identified") < 0.2
    assert set(scores.loc[scores["method"] == "shifted", "label_shift"].dropna()) == {1}


def test_the_ceiling_lies_between_the_threshold_and_perfection(scores):
    assert 0.85 < mean(scores, "ceiling", "shape_dice") < 1
    assert mean(scores, "threshold", "shape_dice") < mean(scores, "ceiling", "shape_dice")


def test_numbers_for_the_report(scores):
    summary = score_rows(scores, n=50)
    values = headline_numbers(summary, scores, "shifted")
    assert values["vertebrae.label_shift_rate"] == 1
    assert values["vertebrae.shape_dice.mean"] == 1
    assert values["vertebrae.seconds_per_scan"] > 0
    assert all(np.isfinite(v) for v in values.values())
    row = summary[(summary["method"] == "perfect") & (summary["metric"] == "dice") & (summary["group"] == "all")]
    assert row["text"].item().startswith("1.000")


def test_cut_vertebrae_are_no_truth(scan):
    label = next(iter(scan.centroids_mm))
    cut = replace(scan, cut=frozenset({label}))
    assert label not in whole_vertebrae(cut)
    assert set(np.unique(whole_vertebrae(scan))) - {0} <= set(scan.centroids_mm)


def test_field_of_view_names_regions_from_the_top():
    assert field_of_view(np.array([0, 24, 8, 20])) == "thoracic + lumbar"
    assert field_of_view(np.array([0, 28])) == "thoracic"
    assert field_of_view(np.array([1])) == "cervical"


def test_scans_with_an_odd_number_of_vertebrae_are_told_apart():
    assert anatomy(np.array([0, 19, 28, 20])) == anatomy(np.array([24, 25])) == "T13 or L6"
    assert anatomy(np.array([0, 19, 20])) == "neither in view"


def test_published_rows_name_their_source():
    rows = published_rows()
    assert rows["source"].str.len().min() > 5
    assert (rows["system"] == "Serrador 2024 (the scheme followed here)").any()


def test_training_on_a_folder_in_verse_layout_from_the_command_line(tmp_path, scan, capsys):
    for split, key in (("training", "a"), ("validation", "b")):
        write_labelled_ct(tmp_path / "verse", replace(scan, key=key), split, "PIR")
    words = ["vertebrae", str(tmp_path / "verse"), "--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "out")]
    words += ["--finder-epochs", "1", "--namer-epochs", "1", "--voter-epochs", "1", "--refiner-epochs", "1"]
    words += ["--outliner-epochs", "1", "--workers", "0"]
    assert main(["train", *words, "--parts", "4"]) == 0
    card = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert card["scans"] == {"train": 1, "validation": 1, "source": str(tmp_path / "verse")}
    segmenter = VertebraSegmenter.load(tmp_path / "out" / "weights.safetensors")
    assert segmenter.card["command"].startswith("spinelib train vertebrae")
    assert "weights.safetensors" in capsys.readouterr().out
    logs = [
        pd.read_csv(tmp_path / "out" / net / "log.csv") for net in ("finder", "namer", "voter", "refiner", "outliner")
    ]
    assert all(np.isfinite(log["train_loss"]).all() for log in logs)


def untaught_refiner(*args, **options):
    """Train a refiner beside a voter that nothing taught."""
    return train_refiner(*args, voter=VoteUNet((8, 16)), **options)


@pytest.mark.parametrize("school", [train_finder, train_namer, train_voter, untaught_refiner, train_outliner])
def test_the_seed_decides_the_first_weights(school, scan, tmp_path, monkeypatch):
    monkeypatch.setattr("spinelib.vertebra_training.fit", lambda *args, **options: None)
    cached = [cache_scan(scan, tmp_path)]
    first, again, other = (school(cached, cached, TrainConfig(seed=seed), tmp_path, parts=1) for seed in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in net.parameters()]) for net in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("school", "name"),
    [
        (train_finder, "finder"),
        (train_namer, "namer"),
        (train_voter, "voter"),
        (untaught_refiner, "refiner"),
        (train_outliner, "outliner"),
    ],
)
def test_fine_tuning_starts_from_given_weights_and_leaves_them(school, name, scan, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "spinelib.vertebra_training.fit", lambda net, *args, **options: next(net.parameters()).data.add_(1)
    )
    cached, start = [cache_scan(scan, tmp_path)], getattr(VertebraSegmenter.load(), name)
    before = next(start.parameters()).clone()
    tuned = school(cached, cached, TrainConfig(), tmp_path, parts=1, start=start)
    assert torch.equal(next(tuned.parameters()), before + 1)
    assert torch.equal(next(start.parameters()), before)


def test_no_epochs_keeps_the_network_that_is_given(scan, tmp_path):
    cached, start = [cache_scan(scan, tmp_path)], VertebraSegmenter.load()
    none = dict.fromkeys(("finder", "namer", "voter", "refiner", "outliner"), 0)
    kept = train_segmenter(cached, cached, tmp_path, none, start=start)
    assert all(getattr(kept, name) is getattr(start, name) for name in none)
    with pytest.raises(InputError, match="epochs"):
        train_segmenter(cached, cached, tmp_path, none)


def test_training_needs_one_source(tmp_path):
    with pytest.raises(InputError, match="either a folder in VerSe layout or --render"):
        train(["-o", str(tmp_path)])


def test_body_centroids_of_truth_lie_near_the_phantoms(scan):
    truth, centroids = perfect(scan)
    found = body_centroids_mm(Volume(truth, scan.ct.affine))
    apart = [np.linalg.norm(found[label] - centroids[label]) for label in found if label != 1]
    assert max(apart) < 6
