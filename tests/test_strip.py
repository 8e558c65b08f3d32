"""The network of the third step: exactly symmetric, harmless before training, and able to learn a local law."""

import pytest
import torch

from spinelib.models import strip
from spinelib.models.mirror import UNSEEN_BYTE
from spinelib.models.strip import STRIP_SHAPE, StripNetwork

ROWS = 21


def problem(count, seed=0):
    """Strips whose brightness at each height is the slope of the depth that the outputs lack."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(count, 1, 6, generator=generator)
    at_rows = torch.nn.functional.interpolate(slopes, STRIP_SHAPE[0], mode="linear")[:, 0]
    strips = (80 + 30 * at_rows).clamp(0, 200).round().byte()[:, None, :, None].repeat(1, 2, 1, STRIP_SHAPE[1])
    depth = torch.nn.functional.interpolate(at_rows[:, None].cumsum(2) / 3000, ROWS, mode="linear")[:, 0]
    depth = depth - depth.mean(1, keepdim=True)
    outputs = {"even": torch.zeros(count, 4 * ROWS + 2), "odd": torch.zeros(count, 2 * ROWS)}
    targets = {name: value.clone() for name, value in outputs.items()}
    targets["even"][:, ROWS : 4 * ROWS] = depth[:, :, None].expand(-1, -1, 3).flatten(1)
    return strips, outputs, targets, torch.full((count,), 450.0)


def shaken(network):
    """The network with arbitrary weights, the last layer's among them."""
    torch.manual_seed(1)
    torch.nn.init.normal_(network.out.weight)
    torch.nn.init.normal_(network.out.bias)
    return network


def test_before_training_nothing_is_changed():
    strips, outputs, _, _ = problem(3)
    mended = StripNetwork(ROWS, 3.0).mended(strips, outputs)
    assert all(torch.equal(mended[name], outputs[name]) for name in outputs)


def test_a_mirrored_strip_gives_the_mirrored_answer():
    network, generator = shaken(StripNetwork(ROWS, 3.0, 1)), torch.Generator().manual_seed(0)
    strips = torch.randint(0, 255, (5, 1, *STRIP_SHAPE), generator=generator, dtype=torch.uint8)
    strips[0, 0, :20] = UNSEEN_BYTE
    even, odd = (torch.randn(5, n, generator=generator) * 0.02 for n in (4 * ROWS + 2, 2 * ROWS))
    one = network.mended(strips, {"even": even, "odd": odd})
    other = network.mended(strips.flip(3), {"even": even, "odd": -odd})
    assert (one["odd"] - odd).abs().max() > 1e-4
    assert other["even"] == pytest.approx(one["even"], abs=1e-5)
    assert other["odd"] == pytest.approx(-one["odd"], abs=1e-5)


def test_mean_depth_and_what_else_is_known_stay():
    network = shaken(StripNetwork(ROWS, 3.0))
    strips, outputs, _, _ = problem(4)
    spread = torch.ones(4, 3)
    mended = network.mended(strips, outputs | {"spread": spread})
    assert mended["spread"] is spread
    moved = {"even": outputs["even"].clone(), "odd": outputs["odd"]}
    moved["even"][:, ROWS : 4 * ROWS] += 0.1  # depth of the whole spine: not to be known from a frontal image
    assert network.mended(strips, moved)["even"] - moved["even"] == pytest.approx(mended["even"], abs=1e-4)


def test_it_learns_a_law_that_holds_at_every_height(monkeypatch):
    monkeypatch.setattr(strip, "_STEPS", 50)
    torch.manual_seed(0)
    network = StripNetwork(ROWS, 3.0)
    strips, outputs, targets, length = problem(64)
    network.fit(strips, outputs, targets, length, seed=0)
    strips, outputs, targets, length = problem(20, seed=1)
    left = (network.mended(strips, outputs)["even"] - targets["even"]).abs().mean()
    assert left < 0.5 * targets["even"].abs().mean()


def test_batches_hold_every_subject_as_often():
    places = torch.cat(list(strip._batches(96, 6, torch.Generator().manual_seed(0))))
    assert torch.bincount(places, minlength=96).tolist() == [2] * 96
