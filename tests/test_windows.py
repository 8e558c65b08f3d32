"""Windows of many subjects: what is stored, where the truth lies in them, and how training spoils a quarter."""

import numpy as np
import pytest
import torch

from spinelib.geometry import PlanarGrid, Projection
from spinelib.models import windows
from spinelib.models.crop import PITCH_MM, Window
from spinelib.models.windows import UNSEEN, WINDOW_PIXELS, WindowSet, row_heights_mm, window_truth
from spinelib.spine import Curves

GRID = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (200.0, 0.0))
WINDOW = Window(200.0, 4.0, 430.0, -20.0)


def plain_set(count=1):
    images = torch.full((count, 2, WINDOW_PIXELS, WINDOW_PIXELS), 0.5, dtype=torch.float16)
    return WindowSet(images, torch.tensor([[230.0, -220.0]]).repeat(count, 1))


def test_brightness_lies_where_the_world_says():
    values = np.zeros((1, *GRID.shape), np.float32)
    superior, lateral = np.meshgrid(GRID.superior_mm(), GRID.lateral_mm(), indexing="ij")
    values[0] = np.exp(-((superior - 300) ** 2 + (lateral - 50) ** 2) / 800)
    found = WindowSet.of([Projection(("bone",), values, GRID)], [WINDOW])
    bone = found.images[0, 0].float().clamp(min=0)
    across = (WINDOW_PIXELS - 1) / 2 - torch.arange(WINDOW_PIXELS)
    assert float((bone.sum(0) * across).sum() / bone.sum()) * PITCH_MM + WINDOW.right_mm == pytest.approx(50, abs=0.2)
    height = float((bone.sum(1) * torch.from_numpy(row_heights_mm())).sum() / bone.sum())
    assert height + WINDOW.superior_mm == pytest.approx(300, abs=0.2)
    assert found.ends_mm.tolist() == [[230.0, -220.0]]


def test_outside_the_field_of_view_nothing_is_seen():
    found = WindowSet.of([Projection(("bone",), np.ones((1, *GRID.shape), np.float32), GRID)], [WINDOW]).images[0, 0]
    across = WINDOW.right_mm + ((WINDOW_PIXELS - 1) / 2 - np.arange(WINDOW_PIXELS)) * PITCH_MM
    outside = np.abs(across) > 300 + PITCH_MM  # the scan is 600 mm wide
    assert outside.any()
    assert (found[:, torch.from_numpy(outside)] == UNSEEN).all()
    assert (found[:, torch.from_numpy(np.abs(across) < 300 - PITCH_MM)] > UNSEEN).all()


def test_images_may_be_read_one_by_one_and_must_be_as_many_as_windows():
    image = Projection(("bone",), np.ones((1, *GRID.shape), np.float32), GRID)
    assert len(WindowSet.of((image for _ in range(3)), [WINDOW] * 3)) == 3
    with pytest.raises(ValueError, match="argument 2"):
        WindowSet.of([image], [WINDOW] * 2)


def test_truth_of_a_line_is_a_line():
    heights = np.linspace(600, -100, 400)
    column = lambda middle: np.stack([middle + 20, middle, middle - 20])  # noqa: E731
    extended = Curves(heights, column(0.1 * heights), column(0.2 * heights + 7))
    curves = extended.at(np.linspace(430, -20, 209))
    rows, ends = window_truth(curves, extended, WINDOW)
    world = WINDOW.superior_mm + row_heights_mm()
    inside = (world < 600) & (world > -100)
    assert rows[inside, 1] == pytest.approx(0.1 * world[inside] - WINDOW.right_mm, abs=1e-3)
    assert rows[inside, 4] == pytest.approx(0.2 * (world[inside] - 205), abs=1e-3)  # mean depth of T1-L5 removed
    assert rows[inside, 0] - rows[inside, 2] == pytest.approx(40, abs=1e-3)
    assert ends.tolist() == [230, -220]


def test_about_three_quarters_stay_as_they_are_and_the_seed_decides():
    plain = plain_set(80)
    spoilt = plain.spoilt(3)
    changed = (spoilt.images != plain.images).flatten(1).any(1)
    assert 10 <= changed.sum() <= 30
    assert torch.equal(plain.images, plain_set(80).images), "the set itself was changed"
    assert torch.equal(spoilt.ends_mm, plain.ends_mm)
    assert torch.equal(spoilt.images, plain.spoilt(3).images)
    assert not torch.equal(spoilt.images, plain.spoilt(4).images)


@pytest.mark.parametrize("seed", range(3))
def test_cut_rows_are_unseen_and_the_rest_is_whole(seed):
    rng = lambda: np.random.default_rng(seed)  # noqa: E731
    image = plain_set().images[0].float()
    for cut, rows in ((windows._cut_above, slice(0, 8)), (windows._cut_below, slice(-8, None))):
        found = cut(image.clone(), [230.0, -220.0], rng())
        assert (found[:, rows] == UNSEEN).all()
        assert (found[:, 140:148] == 0.5).all()
        assert set(found.unique().tolist()) == {UNSEEN, 0.5}
    sides = windows._cut_sides(image.clone(), [230.0, -220.0], rng())
    assert (sides[:, :, [0, -1]] == UNSEEN).all()
    assert (sides[:, :, 120:168] == 0.5).all()


def test_missing_arms_are_air_and_noise_leaves_air_alone():
    image = plain_set().images[0].float()
    image[:, :40] = UNSEEN
    image[:, 40:80] = 0
    rng = np.random.default_rng(0)
    armless = windows._without_arm(image.clone(), [230.0, -220.0], rng)
    assert (armless[:, 100, 0] == 0).all()
    assert (armless[:, :40] == UNSEEN).all()
    noisy = windows._noisy(image.clone(), [230.0, -220.0], rng)
    assert torch.equal(noisy[:, :80], image[:, :80])
    assert (noisy[:, 80:] != image[:, 80:]).float().mean() > 0.9
