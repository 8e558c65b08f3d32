"""Motion between MR and CT: rigid vertebrae, harmonic soft tissue, no jumps."""

import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from spinelib.deformation import DisplacementField, grid_points_mm, rotation_deg
from spinelib.geometry import VolumeGrid
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.pair_motion import Bones, Motion, harmonic, near_bones, sample_transforms, solve_motion
from spinelib.phantom.population import sample_subject
from spinelib.phantom.vertebra import subject_shapes

LEVELS = ("L2", "L3", "L4")


@pytest.fixture(scope="module")
def bones():
    subject = sample_subject(3)
    first = subject.index(LEVELS[0])
    poses = subject.poses[first : first + 3]
    joints = (poses[:-1, :3, 3] + poses[1:, :3, 3]) / 2
    labels = tuple(VERSE_LABELS[level] for level in LEVELS)
    return Bones(labels, subject_shapes(subject)[first : first + 3], poses, joints)


def box_around(bones, half_mm, step_mm):
    centre = bones.poses[1, :3, 3]
    return VolumeGrid.from_bounds(centre - half_mm, centre + half_mm, step_mm)


def test_linear_fields_are_harmonic():
    rng = np.random.default_rng(0)
    points = np.stack(np.indices((9, 8, 10)), -1).astype(float)
    linear = points @ rng.standard_normal((3, 2)) + [1.0, 2.0]
    known = np.ones(points.shape[:3], bool)
    known[1:-1, 1:-1, 1:-1] = False
    known[4, 4, 4:6] = True
    guess = np.where(known[..., None], linear, rng.standard_normal(linear.shape))
    assert np.allclose(harmonic(guess, known, 1e-9), linear, atol=1e-6)


def test_harmonic_fields_have_no_extremes_inside():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((8, 8, 8, 1))
    known = np.ones((8, 8, 8), bool)
    known[1:-1, 1:-1, 1:-1] = False
    solved = harmonic(values, known, 1e-8)
    assert np.array_equal(solved[known], values[known])
    assert solved[~known].min() > values[known].min() and solved[~known].max() < values[known].max()


def test_no_motion_without_an_amount(bones):
    still = sample_transforms(np.random.default_rng(0), bones, bones.poses[1, :3, 3], 0.0, np.ones(2))
    assert np.allclose(still, np.eye(4), atol=1e-12)


def test_twice_the_amount_is_twice_the_turn(bones):
    def turn(amount):
        t = sample_transforms(np.random.default_rng(2), bones, bones.poses[1, :3, 3], amount, np.zeros(2))
        return rotation_deg(t[1])

    assert turn(1.0) == pytest.approx(2 * turn(0.5)) and turn(1.0) > 0.5


def test_bones_move_rigidly_and_bend_at_their_joints(bones):
    centre = bones.poses[1, :3, 3]
    moved = sample_transforms(np.random.default_rng(0), bones, centre, 1.0, np.ones(2))
    assert np.allclose(moved[:, :3, :3] @ moved[:, :3, :3].transpose(0, 2, 1), np.eye(3))
    assert np.all(np.linalg.det(moved[:, :3, :3]) > 0)
    places = np.stack([apply_affine(np.linalg.inv(t), bones.joints_mm) for t in moved])
    assert np.linalg.norm(places[0, 0] - places[1, 0]) < 1.0  # neighbours agree where they meet
    assert np.linalg.norm(places[1, 1] - places[2, 1]) < 1.0
    whole = sample_transforms(np.random.default_rng(0), bones, centre, 1.0, np.zeros(2))
    assert np.allclose(whole, moved[1])  # stiff joints: all move as the one in the middle


def test_neighbours_move_more_alike_than_others(bones):
    near, far = [], []
    for seed in range(40):
        t = sample_transforms(np.random.default_rng(seed), bones, bones.poses[1, :3, 3], 1.0, np.ones(2))
        turn = Rotation.from_matrix(t[:, :3, :3])
        near.append((turn[0].inv() * turn[1]).magnitude())
        far.append((turn[0].inv() * turn[2]).magnitude())
    assert np.mean(far) > 1.5 * np.mean(near)


def test_soft_tissue_follows_without_a_jump(bones):
    rng = np.random.default_rng(4)
    transforms = sample_transforms(rng, bones, bones.poses[1, :3, 3], 1.0, np.ones(2))
    motion = solve_motion(rng, bones, transforms, box_around(bones, 30.0, 3.0), 1.0)
    across = np.arange(-30.0, 30.0, 0.1)  # through the body from side to side
    centre = apply_affine(np.linalg.inv(transforms[1]), bones.poses[1, :3, 3])
    points = centre + np.stack([across, 0 * across, 0 * across], -1)
    shift, claims = motion.at(points.reshape(-1, 1, 1, 3))
    shift, inside = shift[:, 0, 0], claims[:, 0, 0] == 1
    assert 200 < inside.sum() < 500
    assert np.allclose(shift[inside], (apply_affine(transforms[1], points) - points)[inside])
    assert np.linalg.norm(np.diff(shift, axis=0), axis=1).max() < 0.1  # less than the step
    assert np.linalg.norm(shift[0] - shift[300]) > 0.3


def test_at_rest_every_point_belongs_to_one_bone_or_none(bones):
    grid = box_around(bones, 30.0, 2.0)
    still = np.repeat(np.eye(4)[None], 3, axis=0)
    shift, claims = Motion(bones, still, DisplacementField.zero(grid)).at(grid_points_mm(grid))
    assert not shift.any() and claims.max() == 1
    assert len(list(near_bones(bones, still, grid_points_mm(grid), 0.0))) == 3


def test_bones_that_collide_are_claimed_twice(bones):
    grid = box_around(bones, 20.0, 2.0)
    crushed = np.repeat(np.eye(4)[None], 3, axis=0)
    crushed[0, 2, 3] = 15.0  # L2 sinks into L3
    assert Motion(bones, crushed, DisplacementField.zero(grid)).at(grid_points_mm(grid))[1].max() == 2
