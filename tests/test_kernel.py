"""Kernel regression: exact mirror symmetry, exact leave-one-out, exact round trips, and a law it must find."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_people import person
from safetensors.torch import load_file, save_file

from spinelib.curve_training import train_kernel
from spinelib.errors import InputError
from spinelib.models import kernel
from spinelib.models.datasets import true_window
from spinelib.models.kernel import Frames, KernelRegressor, MirrorRidge
from spinelib.models.windows import WINDOW_PIXELS, WindowSet, window_truth

UNSEEN_BYTE = 255


def problem(examples):
    """Windows, true rows and true ends of examples."""
    windows = [true_window(e.curves) for e in examples]
    truth = [window_truth(e.curves, e.extended, w) for e, w in zip(examples, windows, strict=True)]
    rows, ends = (torch.from_numpy(np.stack(part)) for part in zip(*truth, strict=True))
    return WindowSet.of([e.dxa for e in examples], windows), rows, ends


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    pairs = zip(rng.uniform(-40, 40, 40), rng.uniform(10, 30, 40), strict=True)
    return [person(round(bend, 2), lordosis) for bend, lordosis in pairs]


@pytest.fixture(scope="module")
def regressor(people):
    return train_kernel(people, spoil=False)


def random_features(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randint(0, 200, (count, 12), generator=generator, dtype=torch.uint8)
    features[0, 3] = UNSEEN_BYTE
    mirror = torch.arange(12).flip(0)
    even, odd = (torch.randn(count, p, generator=generator) for p in (3, 2))
    return features, mirror, torch.ones(12), even, odd


def systems(machine, features):
    """The kernels of subjects with themselves, penalty included, in double precision and exactly symmetric."""
    lower = {name: k.double().tril() for name, k in machine._kernels(features).items()}
    return {name: k + k.tril(-1).T + kernel._PENALTY * torch.eye(len(k)) for name, k in lower.items()}


def test_left_out_outputs_are_those_of_refitting_without_the_subject():
    features, mirror, weights, even, odd = random_features(12)
    machine, left_out = MirrorRidge.fit(features, mirror, weights, even, odd)
    for name, targets in (("even", even), ("odd", odd)):
        system, mean = systems(machine, features)[name], machine.tensors[f"{name}_mean"]
        codes = ((targets - mean) @ machine.tensors[f"{name}_basis"]).double()
        for one in range(12):
            rest = [i for i in range(12) if i != one]
            coefficients = torch.linalg.solve(system[rest][:, rest], codes[rest])
            code = system[one, rest] @ coefficients
            expected = code.float() @ machine.tensors[f"{name}_basis"].T + mean
            # All components are kept here, so that nothing of the subject's own target is in its basis.
            assert left_out[name][one] == pytest.approx(expected, abs=1e-5)


def test_two_systems_of_n_are_one_of_2n_with_mirrored_twins():
    features, mirror, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, mirror, weights, even, odd)
    asked = random_features(4, seed=1)[0]
    found = machine(asked)
    twins = machine._scaled(torch.cat([features, features[:, mirror]])).double()
    gaussian = kernel._gaussian(twins, twins) + kernel._PENALTY * torch.eye(18)
    between = kernel._gaussian(machine._scaled(asked).double(), twins)
    for name, targets, sign in (("even", even, 1), ("odd", odd, -1)):
        mean = machine.tensors[f"{name}_mean"]
        both = torch.cat([targets - mean, sign * (targets - mean)]).double()
        expected = between @ torch.linalg.solve(gaussian, both) + mean
        assert found[name] == pytest.approx(expected, abs=1e-4)


def test_a_small_penalty_reproduces_the_training_targets(monkeypatch):
    monkeypatch.setattr(kernel, "_PENALTY", 1e-9)
    features, mirror, weights, even, odd = random_features(9)
    found = MirrorRidge.fit(features, mirror, weights, even, odd)[0](features)
    assert found["even"] == pytest.approx(even, abs=1e-3)
    assert found["odd"] == pytest.approx(odd, abs=1e-3)


def test_unseen_bytes_count_as_the_mean():
    features, mirror, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, mirror, weights, even, odd)
    assert machine._scaled(features)[0, 3] == 0
    both = torch.cat([features, features[:, mirror]])[:, 3].float()
    seen = both[both != UNSEEN_BYTE]
    assert machine.tensors["mean"][3] == pytest.approx(float(seen.mean()) / kernel._GREYS, rel=1e-5)
    middle = (machine.tensors["mean"] * kernel._GREYS).round().byte()[None]
    nothing = torch.full_like(middle, UNSEEN_BYTE)
    assert machine(nothing)["even"] == pytest.approx(machine(middle)["even"], abs=0.05)  # a byte is rounded
    assert machine(nothing)["odd"] == pytest.approx(torch.zeros(1, 2), abs=1e-6)  # as symmetric as can be


def test_spread_is_positive_and_its_mean_that_of_logarithms():
    features, mirror, weights, even, odd = random_features(9)
    machine, _ = MirrorRidge.fit(features, mirror, weights, even, odd)
    machine.fit_spread(torch.full((9, 4), 2.5))
    assert machine(random_features(5, seed=2)[0])["spread"] == pytest.approx(torch.full((5, 4), 2.5), rel=1e-5)


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
    strip = kernel._sampled(windows, replace(frames, centre=centre.float()), (112, 32), kernel._STRIP, True, 2)
    bone = strip[:, 0, 16:40].float()  # inside the column
    places = torch.arange(16) - 7.5
    shift = (bone * places).sum(2) / bone.sum(2)
    assert shift.abs().max() < 0.15  # of a block of 18 mm


@pytest.mark.parametrize("refine", [True, False])
def test_a_mirrored_image_gives_exactly_the_mirrored_curves(people, refine):
    windows, rows, ends = problem(people[:24])
    regressor = KernelRegressor.fit(windows.spoilt(0), rows, ends, refine=refine)
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


@pytest.mark.parametrize("refine", [True, False])
def test_state_survives_a_file(people, tmp_path, refine):
    regressor = train_kernel(people[:10], refine=refine, channels="bone")
    save_file(regressor.state(), tmp_path / "k.safetensors")
    again = KernelRegressor.from_state(load_file(tmp_path / "k.safetensors"), **regressor.config)
    assert (again.fine is not None) == refine
    assert again.config == {"channels": "bone"}
    windows = problem(people[10:12])[0]
    for one, two in zip(regressor(windows), again(windows), strict=True):
        assert torch.equal(one, two)


def test_seed_decides_the_training(people):
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
