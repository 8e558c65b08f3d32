"""Rigid alignment by mutual information: a known motion of the whole spine, and of each vertebra."""

import numpy as np
import pytest
from nibabel.affines import apply_affine
from registration_cases import LOWER, UPPER, two_vertebrae
from scipy.spatial.transform import Rotation

from spinelib.deformation import rotation_deg
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.prealign import affine_prealign, per_vertebra_rigid


@pytest.fixture(scope="module")
def resting():
    """A pair without motion."""
    return two_vertebrae(seed=0, scale=0.0, slice_mm=2.0)


def moved_world(volume, matrix):
    """Return a volume whose world points are carried by a matrix."""
    return Volume(volume.values, matrix @ volume.affine)


def motion(degrees, shift_mm):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def bone_gap_mm(found, truth, case):
    points = apply_affine(case.mr.affine, np.argwhere(case.mr_labels.values > 0))
    points = apply_affine(np.linalg.inv(truth), points)
    return np.linalg.norm(apply_affine(found, points) - apply_affine(truth, points), axis=-1).mean()


@pytest.mark.parametrize("shift", [(3.0, -4.0, 5.0), (150.0, -80.0, 200.0)])
def test_a_known_motion_is_found_near_and_far(resting, shift):
    truth = motion((4.0, -3.0, 2.0), shift)
    mr = moved_world(resting.mr, np.linalg.inv(truth))
    found = affine_prealign(resting.ct, resting.ct_labels, mr)
    assert rotation_deg(found @ np.linalg.inv(truth)) < 1
    assert bone_gap_mm(found, truth, resting) < 0.5
    again = affine_prealign(resting.ct, resting.ct_labels, mr)
    np.testing.assert_allclose(again, found, atol=1e-9)


def test_each_vertebra_is_found_from_a_common_start():
    case = two_vertebrae(seed=1, scale=0.5)
    found = per_vertebra_rigid(case.ct, case.ct_labels, case.mr, np.eye(4))
    assert set(found) == {UPPER, LOWER}
    for label, matrix in found.items():
        truth = case.transforms[label]
        bone = apply_affine(case.mr.affine, np.argwhere(case.mr_labels.values == label))
        before, after = (apply_affine(m, bone) - apply_affine(truth, bone) for m in (np.eye(4), matrix))
        assert np.linalg.norm(after, axis=-1).mean() < 0.6 < 1.5 < np.linalg.norm(before, axis=-1).mean()
        np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-6)


def test_a_vertebra_that_the_mr_does_not_show_keeps_the_start(resting):
    start = motion((0.0, 0.0, 0.0), (0.0, 0.0, 500.0))
    found = per_vertebra_rigid(resting.ct, resting.ct_labels, resting.mr, start)
    np.testing.assert_array_equal(found[UPPER], start)


def test_labels_without_a_vertebra_are_refused(resting):
    empty = Volume(np.zeros_like(resting.ct_labels.values), resting.ct.affine)
    with pytest.raises(InputError, match="no vertebra"):
        affine_prealign(resting.ct, empty, resting.mr)
