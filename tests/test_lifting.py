"""Lifting: where voxels look, rotations, and that the network learns."""

import pytest
import torch
from drawn_ellipsoids import TO_FRONTAL, Ellipsoids, random_batch, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spinelib.imaging.radiograph_pairs import CUBE, LABELS, PATCH
from spinelib.models.lifting import LiftingNet, lift, orthonormal

CONE = torch.tensor([[[0.02, -0.01, -0.97, 62.0], [-0.95, 0.03, 0.01, 61.0], [0.0, 8e-4, 0.0, 0.98]]])
"""Slightly oblique cone-beam projection of the cube onto a patch."""


def index(size=CUBE):
    step = CUBE / size
    axis = torch.arange(size) * step + (step - 1) / 2
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))


def projected(matrix, size=CUBE):
    """Row and column of every voxel, by homogeneous coordinates in double precision."""
    points = torch.cat([index(size).double().flatten(1), torch.ones(1, size**3, dtype=torch.float64)])
    row, col, weight = (matrix.double() @ points).unbind(0)
    return (torch.stack([row, col]) / weight).reshape(2, size, size, size)


def axes_image():
    """An image (1, 2, rows, cols) whose values are its own rows and columns."""
    axis = torch.arange(PATCH, dtype=torch.float32)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"))[None]


@pytest.mark.parametrize("size", [64, 32, 16])
def test_voxels_see_the_pixel_that_they_are_projected_to(size):
    expected = projected(CONE[0], size)
    seen = lift(axes_image(), CONE, size)[0].double()
    inside = ((expected > 0) & (expected < PATCH - 1)).all(0)
    assert inside.float().mean() > 0.8
    assert (seen - expected)[:, inside].abs().max() < 1e-3


def test_features_of_any_resolution_cover_the_patch():
    half = nn.functional.avg_pool2d(axes_image(), 2)
    expected = projected(CONE[0])
    inside = ((expected > 0.5) & (expected < PATCH - 1.5)).all(0)
    assert (lift(half, CONE, CUBE)[0].double() - expected)[:, inside].abs().max() < 1e-3


def test_nothing_is_seen_outside_the_patch():
    away = CONE.clone()
    away[:, 0, 3] += 3 * PATCH
    assert lift(torch.ones(1, 1, PATCH, PATCH), away, 16).abs().max() == 0


def test_mixed_precision_keeps_the_places():
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lift(axes_image(), CONE, 32)
    assert torch.equal(mixed, lift(axes_image(), CONE, 32))


def test_a_scaled_projection_is_the_same_projection():
    assert torch.allclose(lift(axes_image(), 7 * CONE, 16), lift(axes_image(), CONE, 16), atol=1e-3)


def test_people_of_a_batch_have_their_own_rays():
    both = torch.cat([CONE, TO_FRONTAL[None]])
    seen = lift(axes_image().expand(2, -1, -1, -1), both, 16)
    for place in range(2):
        assert torch.equal(seen[place], lift(axes_image(), both[place : place + 1], 16)[0])


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6))
@settings(max_examples=50, deadline=None)
def test_six_numbers_make_a_rotation(numbers):
    six = torch.tensor([numbers], dtype=torch.float64)
    right, anterior = six[0, :3], six[0, 3:]
    if torch.linalg.cross(right, anterior).norm() < 1e-3:
        return
    frame = orthonormal(six)[0]
    assert torch.allclose(frame.T @ frame, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.linalg.det(frame) == pytest.approx(1)
    again = orthonormal(torch.cat([frame[:, 0], 5 * frame[:, 1] - frame[:, 0]])[None])[0]
    assert torch.allclose(again, frame, atol=1e-9)


def test_answers_of_an_untrained_network():
    torch.manual_seed(0)
    network, batch = LiftingNet().eval(), random_batch(2)
    probability, level = network.predict(batch)
    assert probability.shape == (2, CUBE, CUBE, CUBE)
    assert 0 < probability.min() <= probability.mean() < 0.3
    assert level.shape == (2,) and set(level.tolist()) <= set(range(len(LABELS)))
    assert torch.allclose(network.predict_frames(batch), torch.eye(3).expand(2, 3, 3), atol=0.05)


def test_pose_is_taught_only_by_frames():
    torch.manual_seed(0)
    network, batch = LiftingNet().eval(), random_batch()
    network.loss(batch).backward()
    assert network.pose.weight.grad is None
    turned = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    bare, taught = network.loss(batch), network.loss(batch | {"frame": turned})
    assert (taught - bare).item() == pytest.approx(0.2 * 2 * 2**0.5 / 3, abs=0.01)
    taught.backward()
    assert network.pose.weight.grad.abs().max() > 0


def test_what_is_asked_without_gradients_can_be_trained_afterwards():
    network, batch = LiftingNet(), random_batch()
    with torch.inference_mode():
        network.eval().predict(batch)
    network.train().loss(batch).backward()
    assert network.place.weight.grad is not None


def test_the_projection_matters():
    network, batch = LiftingNet().eval(), random_batch()
    moved = batch["cube_to_lateral"].clone()
    moved[:, 1, 3] += 4
    here, there = network.predict(batch)[0], network.predict(batch | {"cube_to_lateral": moved})[0]
    assert not torch.allclose(here, there, atol=1e-4)


def overlap(network, batch):
    found, true = network.predict(batch)[0] > 0.5, batch["target"][:, 0] > 0
    return 2 * (found & true).sum((1, 2, 3)) / (found.sum((1, 2, 3)) + true.sum((1, 2, 3)))


def test_one_vertebra_is_learnt_in_a_few_steps():
    torch.manual_seed(0)
    (batch,) = Ellipsoids(1).batches(1)
    network = LiftingNet()
    losses = trained(network, [batch], 8, 3e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert overlap(network, batch).min() > 0.7


@pytest.mark.slow
def test_eight_vertebrae_are_learnt_by_heart():
    torch.manual_seed(0)
    batches = Ellipsoids(8).batches(2)
    network = LiftingNet()
    trained(network, batches, 24, 3e-3)
    assert torch.cat([overlap(network, batch) for batch in batches]).mean() > 0.9
