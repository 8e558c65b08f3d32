"""MIND-SSC against its definition, and what it must not depend on."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from spinelib.models.mind import DILATION, RADIUS, REACH, mind_loss, mind_ssc, support

torch.set_num_threads(1)


def image(seed=0, shape=(12, 14, 11)):
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(seed))


def by_definition(values):
    """Every pair on its own, boxes by SciPy; true away from the border."""
    ways = [DILATION * sign * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (1, -1)]
    pairs = [(a, b) for a, b in combinations(ways, 2) if np.isclose(np.linalg.norm(a - b), DILATION * np.sqrt(2))]
    padded = np.pad(values, REACH, mode="edge")
    ahead = [np.roll(padded, -way, (0, 1, 2)) for way in ways]
    named = {tuple(way): moved for way, moved in zip(ways, ahead, strict=True)}
    inner = (slice(REACH, -REACH),) * 3
    means = [uniform_filter((named[tuple(a)] - named[tuple(b)]) ** 2, 2 * RADIUS + 1)[inner] for a, b in pairs]
    distances = np.stack(means) - np.min(means, 0)
    scale = distances.mean(0)
    return np.exp(-distances / scale.clip(1e-3 * scale.mean(), 1e3 * scale.mean()))


def test_descriptors_follow_the_definition():
    values = image()
    ours = np.sort(mind_ssc(values)[0].numpy(), 0)
    expected = np.sort(by_definition(values[0, 0].double().numpy()), 0)
    assert ours.shape == (12, 12, 14, 11)
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_channels_show_one_direction_each():
    along = torch.arange(12.0).expand(1, 1, 12, 12, 12)  # changes along the last axis only
    inner = mind_ssc(along)[0, :, 6, 6, 6]
    assert int((inner > 0.99).sum()) == 4  # pairs across the other two axes see nothing


@pytest.mark.parametrize("shape", [(12, 14, 11), (8, 9, 16)])
def test_every_second_voxel(shape):
    """The mean of V, over fewer voxels then, only limits V, and no V of noise comes near its limits."""
    values = image(1, shape)
    torch.testing.assert_close(mind_ssc(values, step=2), mind_ssc(values)[..., ::2, ::2, ::2], atol=1e-5, rtol=1e-5)


def test_contrast_does_not_matter():
    values = image(2)
    torch.testing.assert_close(mind_ssc(values), mind_ssc(3 - 2 * values), atol=1e-3, rtol=0)
    assert mind_loss(values, 3 - 2 * values) < 1e-6
    assert mind_loss(values, image(3)) > 0.01


def test_constant_images_are_safe():
    flat = torch.full((1, 1, 8, 8, 8), 0.3, requires_grad=True)
    assert torch.equal(mind_ssc(flat), torch.ones(1, 12, 8, 8, 8))
    mind_loss(flat, image(4, (8, 8, 8))).backward()
    assert torch.isfinite(flat.grad).all()


def test_what_is_not_valid_does_not_count():
    values, valid = image(5, (24, 12, 12)), torch.ones(1, 1, 24, 12, 12)
    valid[:, :, 15:] = 0
    spoilt = values.clone()
    spoilt[:, :, 15:] = 7
    assert mind_loss(values, spoilt, valid) == 0
    assert mind_loss(values, spoilt) > 0.01
    assert mind_loss(values, spoilt, torch.zeros_like(valid)) == 0
    whole = support(valid)[0, 0, :, 6, 6]
    assert torch.equal(whole, (torch.arange(24) < 15 - REACH).float())


def test_gradient():
    values = image(6, (6, 6, 6)).double().requires_grad_()
    other = image(7, (6, 6, 6)).double()
    direction = image(8, (6, 6, 6)).double()
    mind_loss(values, other, step=2).backward()
    slope = (values.grad * direction).sum()
    with torch.no_grad():
        step = 1e-5
        measured = (mind_loss(values + step * direction, other, step=2) - mind_loss(values, other, step=2)) / step
    assert slope.item() == pytest.approx(measured.item(), rel=1e-2)
