"""Training of the biplanar networks, from Python and from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_ellipsoids import Ellipsoids
from drawn_spines import block_spine

from spinelib import radiograph_training
from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import BiplanarSubject, make_pair
from spinelib.imaging.verse import write_labelled_ct
from spinelib.models.biplanar import load_variant, new_variant, read_card
from spinelib.radiograph_training import DrawnParts, leave_one_out, main, train_variant
from spinelib.train import TrainConfig


def test_training_lowers_the_loss_and_repeats_itself(tmp_path):
    items = Ellipsoids(1)
    config = TrainConfig(epochs=2, batch_size=1, learning_rate=2e-3)
    network = train_variant("sagittal_only", items, items, config, tmp_path / "a")
    assert not network.training
    log = pd.read_csv(tmp_path / "a" / "log.csv")
    assert log["train_loss"].iloc[-1] < log["train_loss"].iloc[0]
    again = train_variant("sagittal_only", items, items, config, tmp_path / "b")
    for (name, value), other in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert np.array_equal(value, other), name


def test_fine_tuning_starts_from_given_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("spinelib.radiograph_training.fit", lambda *args, **options: None)
    start = new_variant("sagittal_only")
    tuned = train_variant("sagittal_only", Ellipsoids(1), Ellipsoids(1), TrainConfig(), tmp_path, start=start)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), tuned.parameters(), strict=True))
    assert tuned is not start


def test_each_epoch_draws_other_parts():
    drawn = DrawnParts(Ellipsoids(9), 4, seed=1)
    first = drawn.places.tolist()
    assert len(drawn) == 4 == len(set(first))
    drawn.set_epoch(1)
    assert drawn.places.tolist() != first
    assert drawn.whole.epoch == 1
    drawn.set_epoch(0)
    assert drawn.places.tolist() == first
    assert len(DrawnParts(Ellipsoids(2), 50)) == 2


def test_leave_one_out_never_trains_on_the_one(tmp_path, monkeypatch):
    seen = {}

    def look(net, train, validation, config, folder, **options):
        seen[folder.name] = [[person.key for person in part.subjects] for part in (train.whole, validation)]
        assert train.annotation == validation.annotation == net.annotation == "n2v"

    monkeypatch.setattr("spinelib.radiograph_training.fit", look)
    pair = make_pair(block_spine((18, 19)))
    people, beside = [[replace(pair, key=key) for key in keys] for keys in ("abc", "vwxyz")]
    start = new_variant("ours")
    start.annotation = "n2v"
    tuned = leave_one_out(start, people, beside, 1, tmp_path)
    for key, others in {"a": "bc", "b": "ac", "c": "ab"}.items():
        assert seen[key] == [["v", "w", "x", "y", "z", *others, *others], [*others, "v", "w"]]  # half of them others
    assert set(tuned) == set("abc")
    with pytest.raises(InputError, match="two subjects"):
        leave_one_out(start, people[:1], beside, 1, tmp_path)


def test_unknown_variant(tmp_path):
    with pytest.raises(InputError, match="unknown variant"):
        train_variant("unet", Ellipsoids(1), Ellipsoids(1), TrainConfig(epochs=1), tmp_path)


@pytest.mark.parametrize("words", [[], ["folder", "--render", "2"]])
def test_one_source(tmp_path, words):
    with pytest.raises(InputError, match="either a folder in VerSe layout or --render"):
        main([*words, "-o", str(tmp_path)])


def test_lying_people_are_added_to_standing_ones(tmp_path, monkeypatch):
    asked = []

    def render(folder, count, *how):
        asked.append((Path(folder), count, *how))
        return [tmp_path / f"{len(asked)}-{i}" for i in range(count)]

    monkeypatch.setattr(radiograph_training, "render_biplanar_cohort", render)
    monkeypatch.setattr(BiplanarSubject, "load", lambda path: path.name)
    words = ["--render", "24", "--lying", "2", "--cache", str(tmp_path), "-o", str(tmp_path)]
    train, validation, source = radiograph_training._subjects(radiograph_training._arguments(words))
    assert asked == [(tmp_path, 26, 200_000, 2), (tmp_path / "lying", 3, 300_000, 2, "lying")]
    assert train == [f"1-{i}" for i in range(24)] + ["2-0", "2-1"]
    assert validation == ["1-24", "1-25", "2-2"]
    assert source == "standing phantom seeds from 200000, lying ones from 300000"


def test_lying_people_are_synthetic(tmp_path):
    with pytest.raises(InputError, match="--lying adds synthetic people to those of --render"):
        main(["folder", "--lying", "2", "-o", str(tmp_path)])


def test_training_from_the_command_line(tmp_path, capsys):
    for split, key in (("training", "a"), ("validation", "b")):
        write_labelled_ct(tmp_path / "verse", replace(block_spine((18, 19)), key=key), split, "PIR")
    words = [str(tmp_path / "verse"), "--variant", "ours", "--annotation", "b2v", "--epochs", "1", "--clutter", "0.5"]
    words += ["--parts", "1", "--workers", "0", "--n-jobs", "1", "--cache", str(tmp_path / "cache")]
    out = tmp_path / "out"
    assert main([*words, "-o", str(out)]) == 0
    assert "weights.safetensors: 1 subjects" in capsys.readouterr().out
    card = json.loads((out / "weights.json").read_text())
    assert card["subjects"] == {"train": 1, "validation": 1, "source": str(tmp_path / "verse")}
    assert (card["variant"], card["annotation"]) == ("ours", "b2v")
    assert card["command"].startswith("spinelib train transvert")
    assert read_card(out / "weights.safetensors") == {key: value for key, value in card.items() if key != "sha256"}
    network = load_variant("ours", out / "weights.safetensors")
    assert not network.training and network.annotation == "b2v"
    on = [word for word in words if word not in ("--annotation", "b2v")]
    assert main([*on, "--from", str(out / "weights.safetensors"), "-o", str(tmp_path / "on")]) == 0
    assert load_variant("ours", tmp_path / "on" / "weights.safetensors").annotation == "b2v"
    assert np.isfinite(pd.read_csv(out / "log.csv")["train_loss"]).all()
