"""`spinelib train` on a handful of synthetic people: it learns something, writes its card, names what is missing."""

import json

import pandas as pd
import pytest

from spinelib.cli import main
from spinelib.curve_training import curve_examples, new_network
from spinelib.data import Record, synthetic_cohort
from spinelib.errors import InputError
from spinelib.models.predictor import CurvePredictor
from spinelib.record import file_sha256


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    path = synthetic_cohort(tmp_path_factory.mktemp("people"), 4, seed=9, n_jobs=1)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    keys = table["subject_key"].unique()
    table["split"] = table["subject_key"].map(dict(zip(keys, ["train", "train", "train", "validation"], strict=True)))
    table.to_csv(path, index=False)
    return path


def test_the_command_trains_and_writes_weights_with_their_card(manifest, tmp_path, capsys):
    words = ["train", str(manifest), "-o", str(tmp_path), "--epochs", "2", "--locator-epochs", "2", "--batch-size", "2"]
    assert main(words) == 0
    card = json.loads((tmp_path / "weights.json").read_text())
    assert card["subjects"] == {"train": 3, "validation": 1}
    assert card["sha256"] == file_sha256(tmp_path / "weights.safetensors")
    assert card["command"].startswith("spinelib train")
    assert CurvePredictor.load(tmp_path / "weights.safetensors").card["config"]["epochs"] == 2
    assert len(pd.read_csv(tmp_path / "regressor" / "log.csv")) == 2
    assert "validation" in capsys.readouterr().out


def test_records_without_image_or_curves_are_named():
    with pytest.raises(InputError, match="1 subjects lack one"):
        curve_examples([Record("a", "train")])


def test_networks_have_names_and_seeds():
    with pytest.raises(InputError, match="'light', 'paper'"):
        new_network("huge")
    one, two = (next(iter(new_network("light", seed=s).parameters())) for s in (1, 1))
    assert (one == two).all()
