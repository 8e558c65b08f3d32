"""Training of the registration networks, from Python and from the command line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_registration import drawn_pair
from torch.utils.data import Dataset

from spinelib.cli import main as command
from spinelib.errors import InputError
from spinelib.imaging.pairs import write_pair
from spinelib.models.ctmr import CTMRModel, load_variant, read_card, save_variants
from spinelib.models.ctmr_data import PairDataset
from spinelib.registration_training import main, mean_terms, train_variant
from spinelib.train import TrainConfig

torch.set_num_threads(1)


class Blobs(Dataset):
    """One pair of 16 voxels a side, 2 voxels apart."""

    def __init__(self, count=1):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        coarse = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(index))
        blobs = torch.nn.functional.interpolate(coarse, (16, 16, 18), mode="trilinear")[0]
        valid, labels = torch.ones(1, 16, 16, 16), torch.zeros(16, 16, 16, dtype=torch.uint8)
        labels[4:12, 4:12, 4:12] = 20
        return {"ct": blobs[..., 2:], "mr": 1 - blobs[..., :16], "labels": labels, "valid": valid, "ct_valid": valid}


def test_two_stages_lower_the_loss_and_repeat_themselves(tmp_path):
    config = TrainConfig(epochs=6, batch_size=1, learning_rate=2e-4, recipe="paper", precision="32-true")
    model = train_variant("rf", Blobs(), Blobs(), config, tmp_path / "a")
    assert not model.training
    first, second = (pd.read_csv(tmp_path / "a" / name / "log.csv")["train_loss"] for name in ("stage1", "."))
    assert first.iloc[-1] < 0.95 * first.iloc[0]
    assert second.iloc[0] < 0.95 * first.iloc[0]  # goes on where the first stage stopped
    again = train_variant("rf", Blobs(), Blobs(), config, tmp_path / "b")
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_second_stage_starts_from_given_weights(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr("spinelib.registration_training.fit", lambda *args, **options: folders.append(args[4]))
    start = CTMRModel("baseline")
    tuned = train_variant("pc_rd", Blobs(), Blobs(), TrainConfig(), tmp_path, start=start)
    assert folders == [tmp_path]
    assert tuned is not start
    assert tuned.variant == "pc_rd"
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), tuned.parameters(), strict=True))
    train_variant("oc", Blobs(), Blobs(), TrainConfig(), tmp_path)
    assert folders[1:] == [tmp_path / "stage1", tmp_path]


def test_terms_are_means_over_the_data():
    model = CTMRModel("pc")
    terms = mean_terms(model, Blobs(2))
    alone = [mean_terms(model, [Blobs(2)[index]]) for index in range(2)]
    assert terms["mind"] == pytest.approx((alone[0]["mind"] + alone[1]["mind"]) / 2)
    assert terms["rd"] < 1e-3  # an untrained network moves nothing


def test_unknown_variant(tmp_path):
    with pytest.raises(InputError, match="unknown variant"):
        train_variant("ours", Blobs(), Blobs(), TrainConfig(), tmp_path)


@pytest.mark.parametrize("words", [[], ["folder", "--render", "2"]])
def test_one_source(tmp_path, words):
    with pytest.raises(InputError, match="either a folder of pairs or --render"):
        main([*words, "-o", str(tmp_path)])


def small_items(monkeypatch):
    monkeypatch.setattr(PairDataset.__init__, "__defaults__", ((32, 32, 32), False, 0, None))


def test_training_from_the_command_line(tmp_path, monkeypatch, capsys):
    small_items(monkeypatch)
    for split, seed in (("train", 0), ("val", 1)):
        write_pair(tmp_path / "pairs" / split / "001", drawn_pair(seed=seed))
    save_variants({"baseline": CTMRModel()}, tmp_path / "first.safetensors", {})
    words = ["train", "ctmr", str(tmp_path / "pairs"), "--variant", "pc_rf", "--epochs", "1", "--parts", "1"]
    words += ["--from", str(tmp_path / "first.safetensors"), "--workers", "0", "--n-jobs", "1"]
    out = tmp_path / "out"
    assert command([*words, "--cache", str(tmp_path / "cache"), "-o", str(out)]) == 0
    assert "weights.safetensors: 1 pairs" in capsys.readouterr().out
    card = json.loads((out / "weights.json").read_text())
    assert card["pairs"] == {"train": 1, "validation": 1, "source": str(tmp_path / "pairs")}
    assert card["command"].startswith("spinelib train ctmr")
    assert set(card["validation"]) == {"mind", "diffusion", "oc", "pc", "rd", "rf"}
    assert read_card(out / "weights.safetensors") == {key: value for key, value in card.items() if key != "sha256"}
    assert load_variant("pc_rf", out / "weights.safetensors").variant == "pc_rf"
    assert np.isfinite(pd.read_csv(out / "log.csv")["train_loss"]).all()
    assert not (out / "stage1").exists()


def test_synthetic_pairs_are_made_once(tmp_path, monkeypatch):
    small_items(monkeypatch)
    made, trained = [], []

    def sample(seed):
        made.append(seed)
        if seed == 11:
            message = "nobody"
            raise InputError(message)
        return drawn_pair(seed=seed)

    monkeypatch.setattr("spinelib.registration_training.sample_pair", sample)
    monkeypatch.setattr(
        "spinelib.registration_training.train_variant",
        lambda name, train, validation, *rest: trained.append((train, validation)) or CTMRModel(name),
    )
    words = ["--render", "3", "--pair-seed", "10", "--cache", str(tmp_path / "cache"), "--n-jobs", "1"]
    for _ in range(2):
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.warns(UserWarning, match="pair-000011: nobody"):
            assert main([*words, "-o", str(tmp_path / "out")]) == 0
    assert made == [10, 11, 12, 13, 11]
    train, validation = trained[0]
    assert [path.stem for path in train.paths] == ["pair-000010", "pair-000012"]
    assert [path.stem for path in validation.paths] == ["pair-000013"]
    assert len(train) == 200


def test_no_usable_pair(tmp_path, monkeypatch):
    def sample(seed):
        message = "nobody"
        raise InputError(message)

    monkeypatch.setattr("spinelib.registration_training.sample_pair", sample)
    with pytest.raises(InputError, match="no pair could be used.*nobody"):
        main(["--render", "1", "--cache", str(tmp_path), "--n-jobs", "1", "-o", str(tmp_path)])
