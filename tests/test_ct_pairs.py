"""Pairs of a given CT and an MR made from it: true motion, signal after the CT, vertebrae of real CTs found again."""

from pathlib import Path

import numpy as np
import pytest
from nibabel.affines import apply_affine
from registration_cases import LOWER, UPPER, two_vertebrae

from spinelib.ct_cohort import load_ct_cohort
from spinelib.deformation import rotation_deg, warp_labels, warp_volume
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.pairs import check_pair
from spinelib.phantom.ct_pairs import MaskBones, pairs_from_ct, signal_of_ct
from spinelib.phantom.pairs import PairMix
from spinelib.registration_evaluation import evaluate_pairs, identity_method, polyrigid_method

REAL = Path(__file__).parents[1] / "data" / "real-ct"


@pytest.fixture(scope="module")
def case():
    return two_vertebrae(scale=0.0)


@pytest.fixture(scope="module")
def pair(case):
    (pair,) = pairs_from_ct(case.ct, case.ct_labels, "drawn", seed=3, mix=PairMix(t2=0.0, partial=0.0))
    return pair


def overlap(one, other, label):
    one, other = one == label, other == label
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_the_true_field_carries_the_labels(pair):
    assert check_pair(pair) == ()
    assert list(pair.transforms) == [UPPER, LOWER]
    warped = warp_labels(pair.ct_labels, pair.field)
    for label in pair.transforms:
        assert overlap(warped.values, pair.mr_labels.values, label) > 0.98
    moved = [rotation_deg(matrix) for matrix in pair.transforms.values()]
    assert 0.5 < max(moved) < 20


def test_bone_moves_as_its_transform_says(pair):
    for label, matrix in pair.transforms.items():
        points = apply_affine(pair.mr.affine, np.argwhere(pair.mr_labels.values == label))
        np.testing.assert_allclose(pair.field.moved(points), apply_affine(matrix, points), atol=0.05)


def test_same_seed_same_pair_other_seed_other_motion(case, pair):
    mix = PairMix(t2=0.0, partial=0.0)
    (again,) = pairs_from_ct(case.ct, case.ct_labels, "drawn", seed=3, mix=mix)
    (other,) = pairs_from_ct(case.ct, case.ct_labels, "drawn", seed=4, mix=mix)
    np.testing.assert_array_equal(again.mr.values, pair.mr.values)
    assert np.abs(other.transforms[UPPER] - pair.transforms[UPPER]).max() > 0.1


def test_dense_bone_and_gas_are_dark_and_fat_is_bright(case):
    hounsfield, labels = case.ct.values.copy(), np.zeros(case.ct.values.shape, np.uint8)
    hounsfield[:] = 30.0
    for place, value in enumerate((-800.0, -100.0, 30.0, 200.0, 1200.0)):
        hounsfield[10 * place : 10 * place + 10] = value
    labels[30:50] = UPPER
    signal = signal_of_ct(
        Volume(hounsfield, case.ct.affine), Volume(labels, case.ct.affine), "t1", np.random.default_rng(0)
    )
    gas, fat, lean, marrow, cortex = (signal[10 * place + 5].mean() for place in range(5))
    assert fat > marrow > lean > gas and cortex == 0


def test_distances_to_masks_are_those_of_boxes(case):
    bones = MaskBones.of(case.ct_labels)
    assert bones.labels == (UPPER, LOWER) and bones.joints_mm.shape == (1, 3)
    index = np.argwhere(case.ct_labels.values == UPPER)
    top = apply_affine(case.ct.affine, index[index[:, 2].argmax()])
    heights = bones.distance(0, top + np.outer([0.0, 2.0, 4.0], [0.0, 0.0, 1.0]))
    np.testing.assert_allclose(heights, [-0.5, 1.5, 3.5], atol=0.05)


def test_a_mask_without_vertebrae_is_refused(case):
    empty = Volume(np.zeros(case.ct.values.shape, np.uint8), case.ct.affine)
    with pytest.raises(InputError, match="no labelled vertebra fits"):
        pairs_from_ct(case.ct, empty, "empty")


@pytest.mark.skipif(
    not REAL.is_dir(), reason="no real CTs in data/real-ct: tests/benchmarks/real_ct_scans.py makes them"
)
def test_vertebrae_of_a_real_ct_are_found_in_the_mr_made_from_it():
    (scan,) = (scan for scan in load_ct_cohort(REAL, splits=("test",)) if scan.key == "real-abdomen")
    methods = {"identity": identity_method, "ours": polyrigid_method()}
    vertebrae, _ = evaluate_pairs(methods, pairs_from_ct(scan.ct, scan.labels, scan.key))
    means = vertebrae.groupby("method")[["dice", "bone_tre_mm"]].mean()
    assert means.loc["ours", "dice"] > 0.95 > 0.85 > means.loc["identity", "dice"]
    assert means.loc["ours", "bone_tre_mm"] < 0.5


def test_the_mr_shows_the_moved_ct(pair):
    moved = warp_volume(pair.ct, pair.field, fill=-1000.0).values
    lean = (moved > 0) & (moved < 100)
    assert np.median(pair.mr.values[moved < -900]) < 0.3 * np.median(pair.mr.values[lean])
