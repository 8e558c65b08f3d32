"""Rigidity terms: 0 for rigid motions of every vertebra, known values for others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinelib.models.ctmr import index_grid, warped_labels
from spinelib.models.rigidity import (
    bone_jacobian,
    closest_rotation,
    orthonormality_loss,
    procrustes,
    properness_loss,
    rigid_dice_loss,
    rigid_field_loss,
)

torch.set_num_threads(1)

SHAPE = (20, 22, 28)


def blocks(*boxes):
    labels = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    for label, (r, a, s) in boxes:
        labels[0, slice(*r), slice(*a), slice(*s)] = label
    return labels


INSIDE = (22, ((6, 13), (6, 15), (4, 11)))
BESIDE = (23, ((6, 13), (6, 15), (15, 23)))
AT_BORDER = (24, ((0, 6), (0, 8), (20, 28)))


def affine_field(matrix, shift, centre=(9.0, 10.0, 12.0)):
    centre = torch.tensor(centre, dtype=torch.float64)[:, None]
    points = index_grid(SHAPE).double().flatten(1)
    moved = torch.as_tensor(matrix) @ (points - centre) + centre + torch.as_tensor(np.array(shift, float))[:, None]
    return (moved - points).reshape(1, 3, *SHAPE).float()


def turn(vector_deg):
    return Rotation.from_rotvec(vector_deg, degrees=True).as_matrix()


def all_terms(u, labels):
    """Every term, for CT labels that are given where the MR's are."""
    fixed = warped_labels(labels, u)
    return {
        "oc": orthonormality_loss(u, fixed),
        "pc": properness_loss(u, fixed),
        "rd": rigid_dice_loss(u, labels, fixed),
        "rf": rigid_field_loss(u, fixed),
    }


@pytest.mark.parametrize("boxes", [[INSIDE], [AT_BORDER], [INSIDE, BESIDE, AT_BORDER], []])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.tuples(*[st.floats(-15, 15)] * 3), st.tuples(*[st.floats(-3, 3)] * 3))
def test_rigid_motion_costs_nothing(boxes, vector, shift):
    for name, term in all_terms(affine_field(turn(vector), shift), blocks(*boxes)).items():
        assert abs(float(term)) < 1e-6, name


def test_vertebrae_may_move_apart():
    """Two rigid motions that tear what lies between cost nothing either."""
    labels = blocks(INSIDE, BESIDE)
    ours = affine_field(turn((3, -5, 4)), (0.5, -1, 0.3), (9, 10, 7))
    theirs = affine_field(turn((-6, 2, 1)), (-0.8, 1, 0.2), (9, 10, 19))
    lower = index_grid(SHAPE)[2] < 13
    u = torch.where(lower, ours, theirs)
    for name, term in all_terms(u, labels).items():
        assert abs(float(term)) < 1e-6, name


def test_known_values_of_a_stretch():
    labels, stretch = blocks(INSIDE), np.diag([1.2, 1.0, 1.0])
    u = affine_field(stretch, (0, 0, 0))
    torch.testing.assert_close(bone_jacobian(u, labels), torch.tensor(stretch).float().expand(6 * 8 * 6, 3, 3))
    assert float(orthonormality_loss(u, labels)) == pytest.approx(0.44**2, rel=1e-4)
    assert float(properness_loss(u, labels)) == pytest.approx(0.04, rel=1e-4)
    mean_offset = 0.2 * np.abs(np.arange(7) - 3).mean()  # a stretch about the middle: no rotation fits it better
    assert float(rigid_field_loss(u, labels)) == pytest.approx(mean_offset, abs=1e-3)


def test_rigid_dice_of_a_stretch_is_that_of_two_boxes():
    moving = blocks((22, ((4, 16), (6, 15), (6, 16))))
    u = affine_field(np.diag([2.0, 1.0, 1.0]), (0, 0, 0), (9.5, 10, 10.5))
    fixed = warped_labels(moving, u)
    assert int((fixed > 0).sum()) == 6 * 9 * 10  # half as wide
    p = np.interp(2 * (np.arange(20) - 9.5) + 9.5, np.arange(20), moving[0, :, 10, 10] > 0)
    q = (moving[0, :, 10, 10] > 0).numpy().astype(float)
    q[[4, 15]] = 0  # farther than two voxels from what is seen
    p, q = p[5:15], q[5:15]
    expected = 1 - 2 * (p * q).sum() / ((p * p).sum() + (q * q).sum())
    assert float(rigid_dice_loss(u, moving, fixed)) == pytest.approx(expected, abs=1e-5)


def test_small_and_empty_labels():
    u = affine_field(np.diag([1.3, 1, 1]), (0, 0, 0)).requires_grad_()
    few = blocks((22, ((5, 8), (5, 8), (5, 8))))
    assert rigid_field_loss(u, few) == rigid_dice_loss(u, few, few) == 0
    total = sum(all_terms(u, blocks()).values())
    total.backward()
    assert total == 0
    assert torch.equal(u.grad, torch.zeros_like(u))


def test_batches_keep_pairs_apart():
    labels = torch.cat([blocks(INSIDE, BESIDE), blocks(AT_BORDER, INSIDE)])
    motions = [affine_field(turn((4, 1, -3)), (1, 0, 0)), affine_field(turn((0, -9, 2)), (-1, 1, 2))]
    u = torch.cat(motions)
    for name, term in all_terms(u, labels).items():
        assert abs(float(term)) < 1e-6, name
    bent = torch.cat([u[:1], affine_field(np.diag([1.2, 1, 1]), (0, 0, 0))])
    assert all(float(term) > 1e-4 for term in all_terms(bent, labels).values())


def test_descent_straightens_a_bent_vertebra():
    labels = blocks(INSIDE, AT_BORDER)
    noise = torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for name in ("oc", "pc", "rd", "rf"):
        u = (0.3 * noise).requires_grad_()
        before = all_terms(u, labels)[name]
        (slope,) = torch.autograd.grad(before, u)
        after = all_terms(u - slope * 0.2 * before / slope.square().sum(), labels)[name]
        assert 0 < after < 0.95 * before, name


def test_masks_are_constants():
    """No gradient where there is no vertebra: a term cannot fall because the mask moves."""
    labels = blocks(INSIDE)
    u = affine_field(np.diag([1.1, 1, 1]), (0, 0, 0)).requires_grad_()
    (orthonormality_loss(u, labels) + properness_loss(u, labels) + rigid_field_loss(u, labels)).backward()
    outside = (labels == 0).expand(3, -1, -1, -1)[None]
    assert float(u.grad[outside].abs().max()) == 0 < float(u.grad.abs().max())


# --- Procrustes ---


def test_procrustes_finds_weighted_motions():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(0, 12, (4, 50, 3)) + [30, 40, 50])
    rotations = torch.from_numpy(Rotation.random(4, random_state=1).as_matrix())
    shifts = torch.from_numpy(rng.normal(0, 5, (4, 3)))
    y = x @ rotations.mT + shifts[:, None]
    weights = torch.from_numpy(rng.uniform(0, 1, (4, 50)))
    y[:, 40:] += 100  # and what has no weight does not matter
    weights[:, 40:] = 0
    found, shift = procrustes(x, y, weights)
    torch.testing.assert_close(found, rotations)
    torch.testing.assert_close(shift, shifts)


def test_procrustes_centres_on_the_pairs():
    rng = np.random.default_rng(2)
    x = rng.uniform(-12, 12, (256, 3))
    y = x @ turn((0, 0, 5)).T + [1, -2, 1] + rng.normal(0, 0.5, x.shape)
    rotation, shift = procrustes(torch.from_numpy(x), torch.from_numpy(y))
    best = Rotation.align_vectors(y - y.mean(0), x - x.mean(0))[0].as_matrix()
    np.testing.assert_allclose(rotation, best, atol=1e-9)
    np.testing.assert_allclose(shift, y.mean(0) - best @ x.mean(0), atol=1e-9)


@pytest.mark.parametrize("matrix", [np.eye(3), np.diag([2.0, 2, -1]), np.diag([3.0, 1, 0])])
def test_gradient_of_a_rotation(matrix):
    """Also where singular values are equal, the determinant is negative, or the points lie in a plane."""
    matrix = torch.from_numpy(turn((10, 20, 30)) @ matrix).requires_grad_()
    rotation = closest_rotation(matrix)
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64))
    assert float(torch.linalg.det(rotation)) == pytest.approx(1)
    assert torch.autograd.gradcheck(closest_rotation, matrix, eps=1e-6, atol=1e-5)
