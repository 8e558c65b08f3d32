"""The published objective solved for one pair: what it finds, and what each rigidity term changes."""

import numpy as np
import pytest
import torch
from drawn_registration import drawn_pair

from spinelib.errors import InputError
from spinelib.models.ctmr import integrate, objective, warped_labels
from spinelib.models.ctmr_data import working_pair
from spinelib.models.ctmr_pair import solve_velocity
from spinelib.models.rigidity import properness_loss
from spinelib.registration_evaluation import solved_method

SHIFT_MM = np.array([3.0, 1.0, -2.0])


@pytest.fixture(scope="module")
def batch():
    tensors, _ = working_pair(drawn_pair(shift_mm=SHIFT_MM))
    return {name: value[None] for name, value in tensors.items()}


@pytest.fixture(scope="module")
def baseline(batch):
    return solve_velocity(batch, "baseline")


def bent(batch, velocity):
    forward, _ = integrate(velocity)
    return properness_loss(forward, warped_labels(batch["labels"], forward)).item()


def test_a_shift_is_found(batch, baseline):
    forward, _ = integrate(baseline)
    bone = warped_labels(batch["labels"], forward)[0] > 0
    found_mm = 1.5 * forward[0, :, bone].mean(1).numpy()
    assert np.linalg.norm(found_mm - SHIFT_MM) < 1.0


def test_the_objective_falls(batch, baseline):
    assert objective(baseline, batch, "baseline") < 0.8 * objective(torch.zeros_like(baseline), batch, "baseline")
    assert not baseline.requires_grad


def test_a_rigidity_term_keeps_what_it_is_for(batch, baseline):
    kept = solve_velocity(batch, "pc")
    assert bent(batch, kept) < 0.8 * bent(batch, baseline)
    assert objective(kept, batch, "pc") < 0.8 * objective(torch.zeros_like(kept), batch, "pc")


def test_the_same_pair_gives_the_same_answer_without_gradients_around(batch, baseline):
    with torch.no_grad():
        again = solve_velocity(batch, "baseline")
    torch.testing.assert_close(again, baseline, rtol=0, atol=1e-5)


def test_as_a_method_it_gives_fields_in_mm_both_ways():
    pair = drawn_pair(shift_mm=SHIFT_MM)
    forward, backward = solved_method("baseline")(pair)
    assert forward.grid.shape == pair.mr.grid.shape and backward.grid.shape == pair.ct.grid.shape
    points = np.argwhere(pair.mr_labels.values > 0) @ pair.mr.affine[:3, :3].T + pair.mr.affine[:3, 3]
    there = forward.moved(points)
    assert np.linalg.norm(there.mean(0) - points.mean(0) - SHIFT_MM) < 1.0
    assert np.median(np.linalg.norm(backward.moved(there) - points, axis=1)) < 0.5


def test_unknown_variant(batch):
    with pytest.raises(InputError, match="unknown variant 'all'"):
        solve_velocity(batch, "all")
