"""Poses by regression: its parts against their definitions, derivatives, and invariances of the whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from registration_cases import HARD, LOWER, UPPER, two_vertebrae

from spinelib.deformation import rotation_deg
from spinelib.geometry import Volume
from spinelib.models import pose_evidence, pose_fit

STARTS = {UPPER: np.eye(4), LOWER: np.eye(4)}


@pytest.fixture(scope="module")
def case():
    return two_vertebrae(seed=4, scale=0.7 * HARD, slice_mm=3.0, ct_mm=1.5)


@pytest.fixture(scope="module")
def evidence(case):
    return pose_evidence.evidence(case.ct, case.ct_labels, case.mr, None, STARTS, pose_fit.Level(2.0, 4000, 1))


@pytest.fixture(scope="module")
def found(case):
    return pose_fit.fit_poses(case.ct, case.ct_labels, case.mr, None, STARTS)[0]


def same(one, other, turn_deg=0.1, gap_mm=0.1):
    for label, matrix in one.items():
        assert rotation_deg(matrix @ np.linalg.inv(other[label])) < turn_deg
        gap = apply_affine(matrix, np.zeros(3)) - apply_affine(other[label], np.zeros(3))
        assert np.linalg.norm(gap) < gap_mm


@given(st.lists(st.floats(-1500, 4000), min_size=2, max_size=9))
def test_memberships_of_classes_sum_to_one(values):
    hounsfield = np.array(values)
    for bone in (True, False):
        classes = pose_evidence._classes(hounsfield, np.full(hounsfield.shape, bone))
        np.testing.assert_allclose(classes.sum(axis=0), 1, atol=1e-6)


@settings(max_examples=20)
@given(st.floats(0.0, 4.0), st.integers(1, 3))
def test_blur_keeps_constants_and_shifts_no_ramp(width, step):
    ramp = torch.arange(41.0)[None, :, None, None].expand(1, -1, 2, 2)
    middle = pose_evidence._blurred(ramp, 1, width, step)[0, :, 0, 0]
    inner = slice(int(16 / step), int(24 / step))
    np.testing.assert_allclose(middle[inner], ramp[0, ::step, 0, 0][inner], atol=2e-2)
    np.testing.assert_allclose(pose_evidence._blurred(torch.ones_like(ramp), 1, width, step), 1, atol=1e-5)


def test_slope_is_the_derivative_of_the_cost(evidence):
    back = torch.eye(4).expand(2, 1, 4, 4)
    fit = pose_fit.regress(evidence, back)
    centres = evidence.points.mean(dim=1)
    numeric = torch.zeros(2, 6)
    for way in range(6):
        ends = []
        for side in (-0.25, 0.25):
            step = torch.zeros(2, 1, 6)
            step[..., way] = side
            moved = pose_fit.regress(evidence, pose_fit._moved(back, step, centres), derive=False)
            ends.append(0.5 * fit.observed[:, 0] * moved.unexplained[:, 0].log())
        numeric[:, way] = (ends[1] - ends[0]) / 0.5
    slope = fit.slope[:, 0]
    assert torch.linalg.norm(slope - numeric) < 0.12 * torch.linalg.norm(numeric)


def test_what_is_a_function_of_the_ct_is_explained(case):
    mr = Volume(np.where(case.ct_labels.values > 0, 0.8, np.where(case.ct.values > -500, 0.3, 0.0)), case.ct.affine)
    level = pose_fit.Level(1.0, 3000, 1)
    evidence = pose_evidence.evidence(case.ct, case.ct_labels, mr, None, STARTS, level)
    right, wrong = torch.eye(4).repeat(2, 2, 1, 1).unbind(1)
    wrong = wrong.clone()
    wrong[:, 2, 3] = 5
    fit = pose_fit.regress(evidence, torch.stack([right, wrong], dim=1))
    assert fit.unexplained[:, 0].max() < 0.1 < 0.2 < fit.unexplained[:, 1].min()


def test_poses_are_found(found, case):
    same(found, case.transforms, turn_deg=2, gap_mm=0.7)  # drawn apart, against what is known of neighbours


def test_how_the_file_stores_the_mr_does_not_matter(found, case):
    flipped = case.mr.affine @ np.array([[-1, 0, 0, case.mr.values.shape[0] - 1], *np.eye(4)[1:]])
    turned = flipped[:, [1, 2, 0, 3]]
    mr = Volume(case.mr.values[::-1].transpose(1, 2, 0).copy(), turned)
    same(pose_fit.fit_poses(case.ct, case.ct_labels, mr, None, STARTS)[0], found)


def test_another_world_origin_changes_nothing(found, case):
    shift = np.eye(4)
    shift[:3, 3] = [120.0, -80.0, 300.0]
    moved = [Volume(v.values, shift @ v.affine) for v in (case.ct, case.ct_labels, case.mr)]
    poses, _ = pose_fit.fit_poses(*moved, None, STARTS)
    same({label: np.linalg.inv(shift) @ pose @ shift for label, pose in poses.items()}, found)


def test_a_lone_vertebra_is_found(case):
    poses, scores = pose_fit.fit_poses(case.ct, case.ct_labels, case.mr, None, {UPPER: np.eye(4)})
    same(poses, case.transforms, turn_deg=1.5, gap_mm=0.7)
    assert scores.shape == (1, 3) and scores[0, 1] > 0.7


def test_a_chain_takes_the_candidate_that_agrees_with_its_neighbour(evidence):
    flat = Volume(np.zeros((8, 40, 40), np.float32), np.diag([8.0, 2.0, 2.0, 1.0]))
    signal, to_unit = pose_evidence._signal(flat, None, 1.0)
    blind = replace(evidence, mr=signal, to_unit=to_unit)
    placed = torch.eye(4).repeat(2, 2, 1, 1)
    placed[0, 0, 2, 3], placed[0, 1, 2, 3] = 3.0, -3.0
    placed[1, 0, 2, 3], placed[1, 1, 2, 3] = -3.0, 12.0
    chosen = pose_fit._best_chain(blind, placed, torch.eye(4).expand(2, 4, 4))
    np.testing.assert_allclose(chosen[:, 2, 3], [-3.0, -3.0])
