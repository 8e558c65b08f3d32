"""Vertebrae that stay rigid: poses from a known field and from images, and fields blended from known poses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from registration_cases import HARD, LOWER, UPPER, true_transforms, two_vertebrae
from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation

from spinelib.deformation import DisplacementField, rotation_deg, warp_labels
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.polyrigid import blend, refine, register_polyrigid, vertebra_transforms
from spinelib.registration_metrics import registration_errors


@pytest.fixture(scope="module")
def case():
    return two_vertebrae(seed=1)


@pytest.fixture(scope="module")
def thick():
    """Sagittal slices of 3.5 mm and a CT of 1.5 mm."""
    return two_vertebrae(seed=2, slice_mm=3.5, ct_mm=1.5)


@pytest.fixture(scope="module")
def found(thick):
    return register_polyrigid(thick.ct, thick.ct_labels, thick.mr)


def pose(degrees, shift_mm):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def apart(transforms, truth, case):
    """Return the turn in degrees and the mean distance over the bone in mm between two motions of each vertebra."""
    errors = {}
    for label, matrix in transforms.items():
        points = apply_affine(case.mr.affine, np.argwhere(case.mr_labels.values == label))
        gap = apply_affine(matrix, points) - apply_affine(truth[label], points)
        turn = rotation_deg(matrix @ np.linalg.inv(truth[label]))
        errors[label] = (turn, np.linalg.norm(gap, axis=-1).mean())
    return errors


def only(labels, *kept):
    return Volume(np.where(np.isin(labels.values, kept), labels.values, 0), labels.affine)


# --- poses from a field ---


def test_known_motion_is_read_from_a_field(case):
    for turn, gap in apart(vertebra_transforms(case.field, case.ct_labels), case.transforms, case).values():
        assert turn < 0.1 and gap < 0.02


def test_thick_slices_read_as_well(thick):
    for turn, gap in apart(vertebra_transforms(thick.field, thick.ct_labels), thick.transforms, thick).values():
        assert turn < 0.1 and gap < 0.05


@settings(max_examples=6, deadline=None)
@given(st.tuples(*[st.floats(-8, 8)] * 3), st.tuples(*[st.floats(-4, 4)] * 3))
def test_one_rigid_motion_moves_every_vertebra_alike(degrees, shift):
    case = two_vertebrae_labels()
    matrix = pose(degrees, shift)
    for found in vertebra_transforms(DisplacementField.rigid(matrix, case.grid), case).values():
        np.testing.assert_allclose(found, matrix, atol=5e-3)


def two_vertebrae_labels():
    values = np.zeros((24, 24, 24), np.uint8)
    values[8:16, 6:18, 3:10], values[8:16, 6:18, 13:20] = UPPER, LOWER
    affine = np.diag([2.0, 1.5, 2.5, 1.0])
    affine[:3, 3] = [-20.0, -10.0, -30.0]
    return Volume(values, affine)


def test_a_few_wild_displacements_do_not_turn_a_vertebra(case):
    values = case.field.values.copy()
    bone = np.argwhere(case.mr_labels.values == UPPER)
    corner = bone[(bone - bone.min(axis=0)).sum(axis=1) < 12]
    values[tuple(corner.T)] += [6.0, -6.0, 6.0]
    field = DisplacementField(values, case.field.grid)
    turn, gap = apart(vertebra_transforms(field, case.ct_labels), case.transforms, case)[UPPER]
    assert turn < 0.5 and gap < 0.2


def test_a_vertebra_cut_by_the_view_keeps_its_motion(case):
    values, grid = case.field.values[:, :, 8:54], case.field.grid
    affine = grid.affine.copy()
    affine[2, 3] += 8
    field = DisplacementField(values, type(grid)(values.shape[:3], affine))
    for turn, gap in apart(vertebra_transforms(field, case.ct_labels), case.transforms, case).values():
        assert turn < 0.2 and gap < 0.1


# --- blending ---


def test_bone_moves_exactly_rigidly_and_nothing_folds(case):
    field = blend(case.transforms, case.ct_labels, None, case.mr.grid)
    table = registration_errors(field, case.mr_labels, case.ct_labels, case.field, case.transforms)
    assert table["bone_tre_mm"].max() < 1e-4 and table["nonrigidity"].max() < 1e-4
    assert table["dice"].min() > 0.998  # interpolation rounds the corners of drawn boxes
    assert np.linalg.det(field.jacobian()).min() > 0.02


def test_one_motion_for_all_is_that_motion_everywhere(case):
    matrix = pose((3.0, -4.0, 5.0), (1.0, 2.0, -3.0))
    rigid = DisplacementField.rigid(matrix, case.mr.grid)
    field = blend({UPPER: matrix, LOWER: matrix}, case.ct_labels, rigid, case.mr.grid)
    near = binary_erosion(np.ones(case.mr.values.shape, bool), iterations=12)
    np.testing.assert_allclose(field.values[near], rigid.values[near], atol=0.15)
    bone = case.mr_labels.values > 0
    matched = warp_labels(case.ct_labels, rigid).values > 0
    np.testing.assert_allclose(field.values[matched], rigid.values[matched], atol=1e-4)
    assert bone.any()


def test_a_lone_vertebra_moves_alone_and_far_tissue_follows_the_soft_field(case):
    labels = only(case.ct_labels, UPPER)
    shift = DisplacementField.rigid(pose((0, 0, 0), (0.0, 0.0, 2.0)), case.mr.grid)
    field = blend({UPPER: case.transforms[UPPER]}, labels, shift, case.mr.grid)
    mask = case.mr_labels.values == UPPER
    np.testing.assert_allclose(field.values[mask], case.field.values[mask], atol=1e-4)
    np.testing.assert_allclose(field.values[:, :, :4], shift.values[:, :, :4], atol=0.05)


def test_the_inverse_leads_back(found, thick):
    bone = thick.mr_labels.values > 0
    points = found.field.points_mm()[bone]
    back = found.inverse.moved(found.field.moved(points))
    assert np.linalg.norm(back - points, axis=-1).mean() < 0.05


# --- poses from images ---


@pytest.mark.parametrize(("seed", "slice_mm", "turn_deg"), [(0, 1.0, 1.0), (3, 4.0, 1.5)])
def test_vertebrae_are_found_in_images(seed, slice_mm, turn_deg):
    case = two_vertebrae(seed, HARD, slice_mm)
    starts = dict.fromkeys((UPPER, LOWER), np.eye(4))
    transforms, flags = refine(starts, case.ct, case.ct_labels, case.mr)
    assert list(transforms) == [UPPER, LOWER]
    for turn, gap in apart(transforms, case.transforms, case).values():
        assert turn < turn_deg and gap < 0.4
    assert (flags["score"] > flags["score_start"] + 0.3).all()
    assert flags["reason"].str.contains("a neighbour differ").all()  # 9.6 mm: no spine bends so between two vertebrae
    matrix = transforms[UPPER][:3, :3]
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)


def test_a_pair_is_registered_from_nothing(found, thick):
    for turn, gap in apart(found.transforms, thick.transforms, thick).values():
        assert turn < 3 and gap < 0.6  # drawn apart by 9.6 mm, against what is known of neighbours
    table = registration_errors(found.field, thick.mr_labels, thick.ct_labels, thick.field, thick.transforms)
    assert table["dice"].min() > 0.9 and table["nonrigidity"].max() < 1e-3
    assert found.field.grid == thick.mr.grid or found.field.grid.shape == thick.mr.values.shape
    assert found.inverse.grid.shape == thick.ct.values.shape and 0 < found.seconds < 600


def test_brightness_of_the_mr_does_not_matter(thick):
    mr = Volume(1000 - 300 * thick.mr.values, thick.mr.affine)
    transforms, _ = refine(thick.transforms, thick.ct, thick.ct_labels, mr)
    again, _ = refine(thick.transforms, thick.ct, thick.ct_labels, thick.mr)
    for turn, gap in apart(transforms, again, thick).values():
        assert turn < 0.1 and gap < 0.05


def test_a_vertebra_out_of_view_follows_its_neighbour_and_is_flagged(thick):
    seen = np.ones(thick.mr.values.shape, np.uint8)
    seen[:, :, :30] = 0
    mr = Volume(np.where(seen, thick.mr.values, 0), thick.mr.affine)
    transforms, flags = refine(
        dict.fromkeys((UPPER, LOWER), np.eye(4)), thick.ct, thick.ct_labels, mr, Volume(seen, mr.affine)
    )
    turn, gap = apart(transforms, thick.transforms, thick)[UPPER]
    assert turn < 1.5 and gap < 0.6
    assert np.linalg.norm(transforms[LOWER][:3, 3]) < 12
    reasons = dict(zip(flags["label"], flags["reason"], strict=True))
    assert "the MR shows" in reasons[LOWER] and reasons[UPPER] == ""


def test_noise_is_flagged(thick):
    noise = np.random.default_rng(0).standard_normal(thick.mr.values.shape).astype(np.float32)
    _, flags = refine(true_transforms(0.0), thick.ct, thick.ct_labels, Volume(noise, thick.mr.affine))
    assert flags["reason"].str.contains("explains").all()


# --- bad input ---


def test_labels_without_a_vertebra_are_refused(case):
    empty = Volume(np.zeros_like(case.ct_labels.values), case.ct_labels.affine)
    with pytest.raises(InputError, match="hold no label"):
        register_polyrigid(case.ct, empty, case.mr, case.field)
    strange = Volume(np.where(case.ct_labels.values == UPPER, 77, 0).astype(np.uint8), empty.affine)
    with pytest.raises(InputError, match=r"labels \[77\]"):
        vertebra_transforms(case.field, strange)


def test_crumbs_are_no_vertebrae(case):
    values = case.ct_labels.values.copy()
    values[:2, :2, :2] = 10
    assert list(vertebra_transforms(case.field, Volume(values, case.ct_labels.affine))) == [UPPER, LOWER]
