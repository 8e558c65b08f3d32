"""The training loop: learns, repeats exactly, resumes exactly, stops early, refuses nonsense."""

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from spinelib.errors import InputError, SpinelibError
from spinelib.train import TrainConfig, fit, resolve_precision


class Points(Dataset):
    """y = 3 x - 1 with noise that depends on the epoch, as augmentation does."""

    def __init__(self, count, noisy):
        self.x = torch.linspace(-1, 1, count)[:, None]
        self.noisy, self.epoch = noisy, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = torch.randn(1, generator=torch.Generator().manual_seed(self.epoch * 1000 + index)) * 0.01
        x = self.x[index] + (noise if self.noisy else 0)
        return {"x": x, "y": 3 * self.x[index] - 1}


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(1, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))

    def loss(self, batch):
        return (self.net(batch["x"]) - batch["y"]).abs().mean()


CONFIG = TrainConfig(epochs=6, batch_size=8, learning_rate=0.02, precision="32-true", seed=4)


def train(folder, config=CONFIG):
    model = Line()
    log = fit(model, Points(64, True), Points(16, False), config, folder)
    return model, log


def weights(model):
    return torch.cat([p.flatten() for p in model.state_dict().values()]).double()


@pytest.mark.parametrize("recipe", ["modern", "paper"])
def test_it_learns_and_writes_its_log(tmp_path, recipe):
    config = TrainConfig(epochs=12, batch_size=8, learning_rate=0.02, recipe=recipe, precision="32-true")
    _, log = train(tmp_path, config)
    assert log["validation_loss"].iloc[-1] < 0.4 * log["validation_loss"].iloc[0]
    assert len(pd.read_csv(tmp_path / "log.csv")) == 12


class Traveller(Line):
    """Notes where it is sent, and after how many losses."""

    def __init__(self):
        super().__init__()
        self.losses, self.journeys = 0, []

    def loss(self, batch):
        self.losses += 1
        return super().loss(batch)

    def to(self, place):
        self.journeys.append((torch.device(place), self.losses))
        return super().to(place)


def test_a_model_comes_back_from_the_device_of_the_training(tmp_path):
    model = Traveller()
    fit(model, Points(64, True), Points(16, False), TrainConfig(epochs=1, precision="32-true"), tmp_path)
    assert model.losses > 0
    assert model.journeys[-1] == (torch.device("cpu"), model.losses)


def test_same_seed_same_weights(tmp_path):
    one, _ = train(tmp_path / "a")
    two, _ = train(tmp_path / "b")
    assert torch.equal(weights(one), weights(two))


def test_resumed_training_equals_an_unbroken_one(tmp_path, monkeypatch):
    whole, whole_log = train(tmp_path / "whole")
    from spinelib import train as module

    real = module._TrainingState.run_epoch
    calls = []

    def breaks_off(self):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self)

    monkeypatch.setattr(module._TrainingState, "run_epoch", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken")
    monkeypatch.setattr(module._TrainingState, "run_epoch", real)
    resumed, resumed_log = train(tmp_path / "broken")
    assert torch.equal(weights(whole), weights(resumed))
    columns = ["epoch", "train_loss", "validation_loss"]
    pd.testing.assert_frame_equal(whole_log[columns], resumed_log[columns])


@pytest.mark.parametrize("change", ["configuration", "data", "code"])
def test_another_training_starts_over_and_keeps_the_old_one(tmp_path, change, monkeypatch):
    train(tmp_path)
    config, data = CONFIG, Points(64, True)
    if change == "configuration":
        config = TrainConfig(epochs=7, batch_size=8, learning_rate=0.02, precision="32-true", seed=4)
    elif change == "data":
        data = Points(60, True)
    else:
        monkeypatch.setattr("spinelib.train.package_sha256", lambda: "edited")
    with pytest.warns(UserWarning, match="starts over"):
        log = fit(Line(), data, Points(16, False), config, tmp_path)
    assert log["epoch"].tolist() == list(range(config.epochs))
    assert (tmp_path / "last.old.ckpt").is_file()


def test_patience_stops_a_training_that_no_longer_improves(tmp_path):
    config = TrainConfig(epochs=50, batch_size=64, learning_rate=1e-30, recipe="paper", patience=2, precision="32-true")
    model = Line()
    model.net = nn.Linear(1, 1)
    log = fit(model, Points(64, False), Points(16, False), config, tmp_path)
    assert len(log) == 3


def test_time_budget_stops_after_an_epoch(tmp_path):
    config = TrainConfig(epochs=50, batch_size=8, max_seconds=1e-6, precision="32-true")
    _, log = train(tmp_path, config)
    assert len(log) == 1


class Broken(Line):
    def loss(self, batch):
        return super().loss(batch) * float("nan")


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    with pytest.raises(SpinelibError, match="lower learning_rate"):
        fit(Broken(), Points(16, False), Points(8, False), CONFIG, tmp_path)


@pytest.mark.parametrize("change", [{"recipe": "secret"}, {"epochs": 0}, {"learning_rate": -1.0}])
def test_bad_configurations_are_named(change):
    with pytest.raises(InputError):
        TrainConfig(**change)


class Observed(Line):
    """Keeps the types of its answers, in training and in validation."""

    def loss(self, batch):
        answer = self.net(batch["x"])
        self.seen = (*getattr(self, "seen", ()), (self.training, answer.dtype))
        return (answer.float() - batch["y"]).abs().mean()


@pytest.mark.parametrize(("precision", "expected"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_training_and_validation_compute_with_the_asked_precision(tmp_path, precision, expected):
    model = Observed()
    fit(
        model,
        Points(16, False),
        Points(16, False),
        TrainConfig(epochs=1, recipe="paper", precision=precision),
        tmp_path,
    )
    assert set(model.seen) == {(True, expected), (False, expected)}


def test_precision_names_are_fabrics():
    assert resolve_precision("auto") in {"bf16-mixed", "16-mixed", "32-true"}
    assert resolve_precision("32-true") == "32-true"
