"""Curves in three steps: exact mirror symmetry, exact round trips, and a law they must find."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_people import person
from safetensors.torch import load_file, save_file

from spinelib.curve_training import train_kernel
from spinelib.errors import InputError
from spinelib.models import kernel, strip
from spinelib.models.datasets import true_window
from spinelib.models.kernel import Frames, KernelRegressor
from spinelib.models.windows import WINDOW_PIXELS, WindowSet, window_truth


def problem(examples):
    """Windows, true rows and true ends of examples."""
    windows = [true_window(e.curves) for e in examples]
    truth = [window_truth(e.curves, e.extended, w) for e, w in zip(examples, windows, strict=True)]
    rows, ends = (torch.from_numpy(np.stack(part)) for part in zip(*truth, strict=True))
    return WindowSet.of([e.dxa for e in examples], windows), rows, ends


def with_network(monkeypatch):
    """Let a handful of people have a network, trained for a moment."""
    monkeypatch.setattr(kernel, "_NETWORK_SUBJECTS", 8)
    monkeypatch.setattr(strip, "_STEPS", 4)


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    pairs = zip(rng.uniform(-40, 40, 40), rng.uniform(10, 30, 40), strict=True)
    return [person(round(bend, 2), lordosis) for bend, lordosis in pairs]


@pytest.fixture(scope="module")
def regressor(people):
    return train_kernel(people, spoil=False)


def test_targets_and_curves_are_inverse(people):
    _, rows, ends = problem(people[:5])
    frames = Frames.from_ends(ends + torch.tensor([[4.0, -3.0]]))
    frames = replace(frames, centre=torch.randn(5, kernel.ROWS) * 5)
    outputs = dict(zip(("even", "odd"), kernel._targets(rows, ends, frames), strict=True))
    found_ends, found = kernel._curves(frames, outputs)
    truth = kernel._truth_at(rows, frames.heights(kernel._shares(rows.device)))
    assert found_ends == pytest.approx(ends, abs=1e-3)
    assert found == pytest.approx(truth, abs=1e-3)


def test_frames_hold_their_ends():
    ends = torch.tensor([[230.0, -220.0], [200.0, -150.0]])
    assert Frames.from_ends(ends).ends() == pytest.approx(ends, abs=1e-4)


def test_strip_follows_the_centre_line(people):
    windows, _, ends = problem(people[:3])
    frames = Frames.from_ends(ends)
    example = [e.extended for e in people[:3]]
    heights = frames.heights(kernel._shares("cpu")) + torch.tensor(
        [[true_window(e.curves).superior_mm] for e in people[:3]]
    )
    centre = torch.tensor(np.stack([c.at(h).coronal_mm[1] for c, h in zip(example, heights.numpy(), strict=True)]))
    centre -= torch.tensor([[true_window(e.curves).right_mm] for e in people[:3]])
    strip = kernel._sampled(windows, replace(frames, centre=centre.float()), (112, 32), (kernel._FRAME, 0.3), True, 2)
    bone = strip[:, 0, 16:40].float()  # inside the column
    places = torch.arange(16) - 7.5
    shift = (bone * places).sum(2) / bone.sum(2)
    assert shift.abs().max() < 0.15  # of a block of 18 mm


@pytest.mark.parametrize("steps", ["one", "two", "three"])
def test_a_mirrored_image_gives_exactly_the_mirrored_curves(people, steps, monkeypatch):
    windows, rows, ends = problem(people[:24])
    if steps == "three":
        with_network(monkeypatch)
    regressor = KernelRegressor.fit(windows.spoilt(0), rows, ends, steps=1 if steps == "one" else 3)
    assert (regressor.network is not None) == (steps == "three")
    asked = problem(people[24:])[0]
    heights, curves, spread = regressor(asked)
    mirrored = regressor(WindowSet(asked.images.flip(3), asked.ends_mm))
    expected = torch.cat([-curves[..., [2, 1, 0]], curves[..., 3:]], 2)
    assert mirrored[0] == pytest.approx(heights, abs=1e-4)
    assert mirrored[1] == pytest.approx(expected, abs=1e-4)
    assert mirrored[2] == pytest.approx(spread, abs=1e-4)


def test_it_finds_curves_that_are_a_function_of_the_image(regressor):
    asked = [person(17.3, 15.0), person(-31.0, 26.0), person(3.0, 21.0)]
    windows, rows, ends = problem(asked)
    heights, curves, spread = regressor(windows)
    truth = kernel._truth_at(rows, heights)
    assert (curves - truth).abs().mean() < 1.0
    assert rows.std(0).mean() > 4  # a mean curve would be off by about this
    assert heights[:, [0, -1]] == pytest.approx(ends, abs=3)
    assert (spread > 0).all()
    assert spread.mean() < 3


def test_wrong_ends_are_mended(regressor):
    windows, _, ends = problem([person(12.0)])
    shifted = replace(windows, ends_mm=ends + torch.tensor([[4.0, 4.0]]))
    heights = regressor(shifted)[0]
    assert (heights[:, [0, -1]] - ends).abs().mean() < 2.5


@pytest.mark.parametrize(("channels", "other"), [("bone", 1), ("tissue", 0)])
def test_one_channel_ignores_the_other(people, channels, other):
    regressor = train_kernel(people[:10], channels=channels, spoil=False)
    windows = problem(people[10:12])[0]
    images = windows.images.clone()
    images[:, other] = torch.rand(2, WINDOW_PIXELS, WINDOW_PIXELS).half()
    for one, two in zip(regressor(windows), regressor(replace(windows, images=images)), strict=True):
        assert torch.equal(one, two)
    images[:, 1 - other] = 0.3
    assert not torch.equal(regressor(windows)[1], regressor(replace(windows, images=images))[1])


@pytest.mark.parametrize("steps", [3, 1])
def test_state_survives_a_file(people, tmp_path, steps, monkeypatch):
    with_network(monkeypatch)
    regressor = train_kernel(people[:10], steps=steps, channels="bone")
    save_file(regressor.state(), tmp_path / "k.safetensors")
    again = KernelRegressor.from_state(load_file(tmp_path / "k.safetensors"), **regressor.config)
    assert (again.fine is not None) == (again.network is not None) == (steps == 3)
    assert again.config == {"channels": "bone"}
    windows = problem(people[10:12])[0]
    for one, two in zip(regressor(windows), again(windows), strict=True):
        assert torch.equal(one, two)


def test_few_people_get_no_network(regressor):
    assert regressor.network is None
    assert not any(name.startswith("network.") for name in regressor.state())


def test_seed_decides_the_training(people, monkeypatch):
    with_network(monkeypatch)
    asked = problem(people[10:12])[0]
    one, two, other = (train_kernel(people[:10], seed=seed)(asked)[1] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_bad_training_is_named(people):
    windows, rows, ends = problem(people[:8])
    with pytest.raises(InputError, match="at least 8"):
        KernelRegressor.fit(windows[:7], rows[:7], ends[:7])
    with pytest.raises(InputError, match="'both', 'bone', 'tissue'"):
        KernelRegressor.fit(windows, rows, ends, channels="lung")
