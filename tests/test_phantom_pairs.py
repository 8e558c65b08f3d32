"""Synthetic CT/MR pairs: what is seen, and the truth beside it."""

from functools import partial

import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy import ndimage

from spinelib.deformation import (
    DisplacementField,
    grid_points_mm,
    resample,
    rotation_deg,
    warp_labels,
    warp_volume,
)
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.pairs import check_pair
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.pairs import PairMix, sample_pair, with_errors

SHAPE_MM = (66.0, 90.0, 75.0)


@pytest.fixture(scope="module")
def t2():
    return sample_pair(1, SHAPE_MM, PairMix(t2=1.0, partial=0.0))


@pytest.fixture(scope="module")
def hard():
    return sample_pair(1, SHAPE_MM, PairMix(t2=0.0, partial=1.0, distorted=1.0, label_errors=1.0))


def overlap(labels, truth):
    values = [v for v in np.unique(truth) if v]
    pairs = [(labels == v, truth == v) for v in values]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]))


def test_what_a_pair_holds(t2):
    assert t2.key == "pair-000001" and t2.contrast == "t2" and check_pair(t2) == ()
    assert t2.ct.values.shape == t2.ct_labels.values.shape == (44, 60, 50)
    assert np.allclose(t2.ct.spacing_mm, 1.5)
    right, anterior, superior = t2.mr.spacing_mm
    assert 3.0 <= right <= 4.0 and 0.9 <= anterior == superior <= 1.1
    assert t2.mr.values.shape == t2.mr_labels.values.shape == t2.field.grid.shape
    assert t2.ct_labels.values.dtype == t2.mr_labels.values.dtype == np.uint8
    assert set(np.unique(t2.ct_labels.values)) - {0} == set(t2.transforms)
    assert t2.mr.values.min() >= 0 and t2.ct.values.min() < -50 and t2.ct.values.max() > 200


def test_bone_moves_rigidly(t2):
    points, jacobian = t2.field.points_mm(), t2.field.jacobian()
    for label, matrix in t2.transforms.items():
        bone = ndimage.binary_erosion(t2.mr_labels.values == label)  # the shell of half a voxel may be soft
        assert bone.sum() > 100 and 0 < rotation_deg(matrix) < 25
        assert np.allclose(t2.field.values[bone], (apply_affine(matrix, points) - points)[bone], atol=1e-3)
        inner = ndimage.binary_erosion(bone)
        error = np.abs(jacobian[inner].swapaxes(1, 2) @ jacobian[inner] - np.eye(3))
        assert error.max() < 1e-3


def test_the_truth_does_not_fold_and_lays_labels_over_each_other(t2):
    assert np.linalg.det(t2.field.jacobian()).min() > 0.1
    before = overlap(resample(t2.ct_labels, t2.mr.grid, order=0).values, t2.mr_labels.values)
    after = overlap(warp_labels(t2.ct_labels, t2.field).values, t2.mr_labels.values)
    assert after > 0.96 and before < 0.9


def shared_information(first, second):
    """Mutual information of two images, nats."""
    joint, _, _ = np.histogram2d(first.ravel(), second.ravel(), 24)
    joint /= joint.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0)
    return float(np.sum(joint[joint > 0] * np.log(joint[joint > 0] / apart[joint > 0])))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_images_agree_under_the_truth_and_nowhere_beside_it(t2, axis):
    ct = Volume(t2.ct.values.clip(-200, 500), t2.ct.affine)
    shift = np.zeros(3)
    shift[axis] = 4.0
    fields = [DisplacementField(t2.field.values + sign * shift, t2.field.grid) for sign in (-1, 0, 1)]
    shared = [shared_information(warp_volume(ct, field).values, t2.mr.values) for field in fields]
    assert shared[1] > 1.1 * max(shared[0], shared[2]), shared


def test_the_same_seed_gives_the_same_bytes(t2):
    again = sample_pair(1, SHAPE_MM, PairMix(t2=1.0, partial=0.0))
    for name in ("ct", "ct_labels", "mr", "mr_labels", "field"):
        assert np.array_equal(getattr(t2, name).values, getattr(again, name).values), name
    assert all(np.array_equal(t2.transforms[label], again.transforms[label]) for label in t2.transforms)


def test_difficulties(t2, hard):
    assert hard.contrast == "t1"
    assert np.array_equal(hard.ct.values, t2.ct.values)  # the same person, the same scan
    assert 0.5 < hard.mr.values.shape[2] / t2.mr.values.shape[2] < 0.85
    assert not np.array_equal(hard.ct_labels.values, t2.ct_labels.values)
    points, bent = hard.field.points_mm(), 0.0
    for label in np.unique(hard.mr_labels.values)[1:]:
        bone = ndimage.binary_erosion(hard.mr_labels.values == label)
        apart = hard.field.values - (apply_affine(hard.transforms[label], points) - points)
        bent = max(bent, float(np.abs(apart[bone]).max(initial=0)))
    assert 0.1 < bent < 4.0  # mm of distortion


def test_label_errors_keep_every_vertebra():
    labels = np.zeros((24, 24, 40), np.uint8)
    labels[4:20, 4:20, 3:18] = 21
    labels[4:20, 4:20, 20:36] = 20
    for seed in range(5):
        wrong = with_errors(labels, np.random.default_rng(seed))
        assert set(np.unique(wrong)) == {0, 20, 21} and wrong.dtype == np.uint8
        assert 0.6 < overlap(wrong, labels) < 0.999
    assert not with_errors(np.zeros_like(labels), np.random.default_rng(0)).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (partial(sample_pair, -1), "seed is -1"),
        (partial(sample_pair, 0.5), "seed is 0.5"),
        (partial(sample_pair, 0, (50, 90, 90)), "three lengths of 60 to 300 mm"),
        (partial(sample_pair, 0, 90), "three lengths"),
    ],
)
def test_bad_requests(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_only_vertebrae_are_labelled(t2, hard):
    for pair in (t2, hard):
        assert VERSE_LABELS["S1"] not in pair.ct_labels.values
        assert set(np.unique(pair.mr_labels.values)) <= {0, *pair.transforms}
        seen = apply_affine(np.linalg.inv(pair.ct.affine), pair.field.moved(grid_points_mm(pair.mr.grid)))
        outside = np.any((seen < -1) | (seen > np.array(pair.ct.values.shape)), axis=-1)
        assert not pair.mr_labels.values[outside].any()
