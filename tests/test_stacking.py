"""Stacked vertebrae lie where they belong, with the frames, angles and collisions that are known beforehand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import BEHIND_MM, CUBE, CUBE_MM, cube_affine
from spinelib.levels import T1_TO_L5, VERSE_LABELS
from spinelib.phantom.population import sample_subject
from spinelib.phantom.vertebra import subject_shapes, vertebra_sdf
from spinelib.stacking import GRID_MM, PredictedVertebra, stack, vertebral_angles, vertebral_pose

CHOSEN = ("T3", "T8", "T9", "L1", "L2", "L4")
MIRROR = np.diag([-1.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def person():
    subject = sample_subject(901, age_years=50, posture="standing", curves="enriched", variants=False)
    return subject, subject_shapes(subject)


@pytest.fixture(scope="module")
def truth(person):
    """Vertebrae of a person with a double curve on their cubes, and their frames."""
    subject, shapes = person
    places = [subject.index(level) for level in CHOSEN]
    return [sampled(shapes[i], subject.poses[i]) for i in places], subject.poses[places]


@pytest.fixture(scope="module")
def stacked(truth):
    return stack(truth[0], "truth")


def sampled(shape, pose):
    index = np.moveaxis(np.indices((CUBE,) * 3), 0, -1)
    affine = cube_affine(pose[:3, 3])
    local = (index @ affine[:3, :3].T + affine[:3, 3] - pose[:3, 3]) @ pose[:3, :3]
    inside = np.all((local > shape.bounds_mm[:, 0]) & (local < shape.bounds_mm[:, 1]), axis=-1)
    mask = np.zeros((CUBE,) * 3, np.float32)
    mask[inside] = vertebra_sdf(shape, torch.from_numpy(local[inside].astype(np.float32)))[1].numpy() < 0
    return PredictedVertebra(shape.level, pose[:3, 3], mask)


def block(level, centre_mm, size_mm=(30.0, 30.0, 30.0), probability=1.0):
    """A box around the body centre, edges between voxels."""
    offset = CUBE_MM * (np.moveaxis(np.indices((CUBE,) * 3), 0, -1) - (CUBE - 1) / 2) - [0, BEHIND_MM, 0]
    inside = np.all(np.abs(offset) < np.divide(size_mm, 2), axis=-1)
    return PredictedVertebra(level, np.asarray(centre_mm, float), np.where(inside, probability, 0.0).astype(np.float32))


def turn_deg(a, b):
    return np.degrees(Rotation.from_matrix(a[:3, :3].T @ b[:3, :3]).magnitude())


# --- frames ---


def test_frames_from_true_shapes_are_the_true_frames(truth, stacked):
    errors = [turn_deg(found, true) for found, true in zip(stacked.spine.poses, truth[1], strict=True)]
    assert np.mean(errors) < 1.3
    assert np.max(errors) < 3.0
    np.testing.assert_allclose(stacked.spine.poses[:, :3, 3], truth[1][:, :3, 3], atol=1.2)
    for pose in stacked.spine.poses:
        np.testing.assert_allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3), atol=1e-9)
        assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("angles", [(0, 0, 0), (11, 12, -20), (-40, 18, -28), (34, -3, 27), (-20, -24, 10)])
def test_a_turned_vertebra_has_a_turned_frame(person, angles):
    subject, shapes = person
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    assert turn_deg(vertebral_pose(sampled(shapes[subject.index("L3")], pose)), pose) < 3.0


def test_the_mirrored_vertebra_has_the_mirrored_frame(truth):
    vertebra = truth[0][1]
    mirrored = replace(vertebra, centre_mm=MIRROR @ vertebra.centre_mm, probability=vertebra.probability[::-1])
    mirrored = vertebral_pose(mirrored)
    pose = vertebral_pose(vertebra)
    np.testing.assert_allclose(mirrored[:3, :3], MIRROR @ pose[:3, :3] @ MIRROR, atol=1e-2)
    np.testing.assert_allclose(mirrored[:3, 3], MIRROR @ pose[:3, 3], atol=0.3)


def test_a_given_rotation_is_taken(truth):
    turn = Rotation.from_euler("z", 20, degrees=True).as_matrix()
    first = truth[0][0]
    pose = vertebral_pose(PredictedVertebra(first.level, first.centre_mm, first.probability, turn))
    np.testing.assert_array_equal(pose[:3, :3], turn)
    np.testing.assert_array_equal(pose[:3, 3], first.centre_mm)


# --- angles ---


def leaning(tilts_deg, leans_deg, turns_deg):
    """Frames whose axes lean to the right and forwards by known angles and are turned about themselves."""
    poses = np.tile(np.eye(4), (len(tilts_deg), 1, 1))
    for pose, tilt, lean, turn in zip(poses, *np.radians([tilts_deg, leans_deg, turns_deg]), strict=True):
        axis = np.array([np.tan(tilt), np.tan(lean), 1.0])
        axis /= np.linalg.norm(axis)
        right = np.array([1.0, 0, 0]) - axis[0] * axis
        right /= np.linalg.norm(right)
        forward = np.cross(axis, right)
        pose[:3, 0] = np.cos(turn) * right - np.sin(turn) * forward
        pose[:3, 1] = np.sin(turn) * right + np.cos(turn) * forward
        pose[:3, 2] = axis
    return poses


def test_angles_of_known_frames():
    levels = ("T4", "T8", "T12", "L1", "L3", "L5")
    poses = leaning([10, 0, -25, -5, 0, 5], [30, 10, -12, -10, 5, 28], [3, 12, 5, 1, 0, -2])
    poses[:, :3, 3] = [[0, 0, 500], [30, 0, 400], [0, 0, 300], [0, 0, 280], [0, 0, 200], [0, 0, 100]]
    angles = vertebral_angles(levels, poses)
    assert angles["vertebral_cobb_deg"] == pytest.approx(35)
    assert angles["vertebral_kyphosis_deg"] == pytest.approx(42)
    assert angles["vertebral_lordosis_deg"] == pytest.approx(38)
    assert angles["apical_rotation_deg"] == angles["rotation_T8_deg"] == pytest.approx(12)
    assert angles["rotation_L5_deg"] == pytest.approx(-2)


def test_mirroring_turns_rotations_round_and_keeps_the_rest(truth):
    plain = vertebral_angles(CHOSEN, truth[1])
    mirror = np.diag([-1.0, 1, 1, 1])
    mirrored = vertebral_angles(CHOSEN, mirror @ truth[1] @ mirror)
    for name, value in plain.items():
        assert mirrored[name] == pytest.approx(-value if "rotation" in name else value, abs=1e-9)


def test_angles_without_their_levels_are_left_out(truth):
    assert not {"vertebral_kyphosis_deg", "vertebral_lordosis_deg"} & set(vertebral_angles(CHOSEN, truth[1]))


# --- the joint grid ---


def test_true_vertebrae_keep_place_and_size(truth, stacked):
    assert stacked.spine.levels == CHOSEN
    assert stacked.spine.source == "truth"
    for vertebra, mesh in zip(truth[0], stacked.spine.meshes, strict=True):
        volume = vertebra.probability.sum() * CUBE_MM**3
        assert mesh.volume == pytest.approx(volume, rel=0.03)
        assert np.sum(stacked.labels.values == VERSE_LABELS[vertebra.level]) == pytest.approx(volume, rel=0.03)
        middle = np.argwhere(vertebra.probability).mean(0) @ vertebra.affine[:3, :3] + vertebra.affine[:3, 3]
        np.testing.assert_allclose(mesh.center_mass, middle, atol=0.5)


def test_order_and_place_do_not_matter(truth, stacked):
    shift = np.array([3.0, -5.0, 40.0])
    moved = [replace(v, centre_mm=v.centre_mm + shift, rotation=np.eye(3)) for v in reversed(truth[0])]
    again = stack(moved)
    assert again.spine.levels == CHOSEN
    np.testing.assert_array_equal(again.labels.values, stacked.labels.values)
    np.testing.assert_allclose(again.labels.affine[:3, 3], stacked.labels.affine[:3, 3] + shift)
    pd.testing.assert_frame_equal(again.contacts, stacked.contacts)


@pytest.mark.parametrize("overlap", [0.0, 6.0, 12.0])
def test_a_collision_is_measured_and_goes_to_the_more_probable(overlap):
    upper, lower = block("L1", [0, 0, 30 - overlap]), block("L2", [0, 0, 0], probability=0.9)
    together = stack([upper, lower])
    (row,) = together.contacts.itertuples()
    assert (row.upper, row.lower) == ("L1", "L2")
    assert row.overlap_mm3 == pytest.approx(30 * 30 * overlap, rel=0.1, abs=30 * 30)
    counts = [np.sum(together.labels.values == VERSE_LABELS[level]) * GRID_MM**3 for level in ("L1", "L2")]
    assert counts[0] == pytest.approx(30**3, rel=0.05)
    assert counts[1] == pytest.approx(30**2 * (30 - overlap), rel=0.07)
    assert row.gap_mm < 2.5


def test_the_gap_between_blocks_is_their_distance():
    together = stack([block("T5", [0, 0, 40]), block("T6", [0, 0, 0])])
    assert together.contacts["gap_mm"][0] == pytest.approx(10, abs=0.7)
    assert together.contacts["overlap_mm3"][0] == 0


def test_a_whole_column_has_curves_and_their_angles():
    blocks = [block(level, [0, 0, -34.0 * i], (40, 32, 24)) for i, level in enumerate(T1_TO_L5)]
    blocks = [replace(b, rotation=np.eye(3)) for b in blocks]
    spine = stack(blocks).spine
    assert np.abs(spine.curves.coronal_mm[1]).max() < 1
    assert spine.angles["cobb_deg"] < 1
    assert spine.angles["vertebral_cobb_deg"] == 0
    alone = stack(blocks[:2]).spine
    assert "cobb_deg" not in alone.angles


def test_what_cannot_be_stacked_is_named():
    one = block("L1", [0, 0, 0])
    with pytest.raises(InputError, match="given: none"):
        stack([])
    with pytest.raises(InputError, match="different levels from T1 to L5, given: L1, L1"):
        stack([one, one])
    with pytest.raises(InputError, match="given: C7"):
        stack([block("C7", [0, 0, 0])])
    with pytest.raises(InputError, match="no voxel of L2 reaches"):
        stack([one, block("L2", [0, 0, -30], probability=0.4)])
    with pytest.raises(InputError, match="L2 lies wholly inside"):
        stack([one, block("L2", [0, 0, 0], (12, 12, 12), probability=0.8)])
