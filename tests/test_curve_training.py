"""`spinelib train` on a handful of synthetic people: it learns something, writes its card, names what is missing."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from drawn_people import person

from spinelib.cli import main
from spinelib.clinical import clinical_measures
from spinelib.curve_training import (
    calibrate_predictor,
    curve_examples,
    new_network,
    train_kernel,
    train_regressor,
)
from spinelib.data import Record, synthetic_cohort
from spinelib.errors import InputError
from spinelib.models.datasets import true_window
from spinelib.models.kernel import KernelRegressor
from spinelib.models.locator import SpineLocator
from spinelib.models.predictor import CurvePredictor
from spinelib.record import file_sha256
from spinelib.train import TrainConfig
from spinelib.uncertainty import centreline_distances_mm


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    path = synthetic_cohort(tmp_path_factory.mktemp("people"), 4, seed=9, n_jobs=1)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    keys = table["subject_key"].unique()
    table["split"] = table["subject_key"].map(dict(zip(keys, ["train", "train", "train", "validation"], strict=True)))
    table.to_csv(path, index=False)
    return path


def test_the_command_trains_and_writes_weights_with_their_card(manifest, tmp_path, capsys):
    words = ["train", str(manifest), "-o", str(tmp_path), "--network", "light", "--epochs", "2"]
    with pytest.warns(UserWarning, match="too few to calibrate"):
        assert main([*words, "--locator-epochs", "2", "--batch-size", "2"]) == 0
    card = json.loads((tmp_path / "weights.json").read_text())
    assert card["subjects"] == {"train": 3, "validation": 1}
    assert card["sha256"] == file_sha256(tmp_path / "weights.safetensors")
    assert card["command"].startswith("spinelib train")
    assert CurvePredictor.load(tmp_path / "weights.safetensors").card["config"]["epochs"] == 2
    assert len(pd.read_csv(tmp_path / "regressor" / "log.csv")) == 2
    assert "validation" in capsys.readouterr().out


def test_the_command_trains_the_kernel_regressor_on_shards(tmp_path, monkeypatch):
    people = [person(bend) for bend in np.linspace(-30, 30, 20)]
    asked = []
    monkeypatch.setattr("spinelib.curve_training.ShardedCohort", lambda *words: asked.append(words) or people)
    with pytest.warns(UserWarning, match="too few to calibrate"):
        assert main(["train", "--shards", "folder", "-o", str(tmp_path), "--locator-epochs", "1", "--limit", "20"]) == 0
    assert asked == [("folder", 20)]
    predictor = CurvePredictor.load(tmp_path / "weights.safetensors")
    assert isinstance(predictor.regressor, KernelRegressor)
    assert predictor.card["subjects"] == {"train": 18, "validation": 2}
    assert predictor.calibration is None


def test_neither_manifest_nor_shards_is_an_error(tmp_path, capsys):
    assert main(["train", "-o", str(tmp_path)]) == 2
    assert "--shards" in capsys.readouterr().err


def test_a_light_network_learns_from_examples(tmp_path):
    people = [person(bend) for bend in (-20.0, 0.0, 20.0)]
    network, recipe = new_network("light"), TrainConfig(2, 2, 1e-3)
    log = train_regressor(network, SpineLocator(), people, people[:1], recipe, tmp_path, augment=False)
    assert len(log) == 2


def true_place(predictor, image):
    """Stand in for a trained locator: drawn people stand all at one place."""
    return true_window(person(0.0).curves)


def test_calibration_covers_and_a_strange_image_is_unusual(monkeypatch, tmp_path):
    monkeypatch.setattr(CurvePredictor, "window", true_place)
    rng = np.random.default_rng(0)
    people = [person(*pair) for pair in zip(rng.uniform(-30, 30, 90), rng.uniform(10, 30, 90), strict=True)]
    predictor = CurvePredictor(SpineLocator(), train_kernel(people[:20], spoil=False), {"command": "test"})
    with pytest.warns(UserWarning, match="ordinary image"):
        predictor = calibrate_predictor(predictor, people[:20], people[20:60])
    path = tmp_path / "w.safetensors"
    predictor.save(path)
    predictor = CurvePredictor.load(path)
    found = [(predictor.estimate(p.dxa), p.curves) for p in people[60:]]
    inside = [centreline_distances_mm([e.curves], [truth])[0] <= e.tube_mm for e, truth in found]
    assert np.mean(inside) > 0.75
    cobb = [(e.measures["cobb_deg"], clinical_measures(truth)["cobb_deg"]) for e, truth in found]
    assert np.mean([low <= truth <= high for (_, low, high), truth in cobb]) > 0.75
    assert np.mean([e.is_unusual for e, _ in found]) < 0.2
    image = people[0].dxa
    strange = replace(image, values=image.values[:, ::-1].copy())
    assert predictor.estimate(strange).is_unusual


def test_records_without_image_or_curves_are_named():
    with pytest.raises(InputError, match="1 subjects lack one"):
        curve_examples([Record("a", "train")])


def test_networks_have_names_and_seeds():
    with pytest.raises(InputError, match="'light', 'paper'"):
        new_network("huge")
    one, two = (next(iter(new_network("light", seed=s).parameters())) for s in (1, 1))
    assert (one == two).all()
