"""Novelty of images: against scikit-learn's likelihood, valid p-values, what it must flag, storing."""

import warnings

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.stats import ortho_group
from sklearn.decomposition import PCA

from spinelib.errors import InputError
from spinelib.novelty import Novelty, window_features

D = 40
SCALES = np.r_[np.linspace(5, 1, 6), np.full(D - 6, 0.2)]


def features(n, seed):
    return np.random.default_rng(seed).normal(size=(n, D)) * SCALES + 3.0


MODEL = Novelty.fit(features(400, 0), features(300, 1))


def test_distance_is_that_of_probabilistic_pca():
    training, new = features(60, 2), features(30, 3)
    found = Novelty.fit(training, features(100, 4))
    reference = PCA(len(found.components), svd_solver="full").fit(training).score_samples(new)
    square = D * found.distance(new) ** 2
    np.testing.assert_allclose(square - square[0], -2 * (reference - reference[0]), rtol=1e-6, atol=1e-6)


def test_distance_is_about_one_and_does_not_depend_on_the_axes_of_the_features():
    assert np.median(MODEL.distances) == pytest.approx(1.0, abs=0.1)
    turn = ortho_group.rvs(D, random_state=0)
    turned = Novelty.fit(features(400, 0) @ turn, features(300, 1) @ turn)
    np.testing.assert_allclose(turned.distance(features(9, 5) @ turn), MODEL.distance(features(9, 5)), rtol=1e-6)


def test_p_values_are_valid():
    shares = {level: [] for level in (0.01, 0.1, 0.5)}
    for seed in range(30):
        model = Novelty.fit(features(100, seed), features(120, 100 + seed))
        p = model.p_value(features(500, 200 + seed))
        for level, found in shares.items():
            found.append((p <= level).mean())
    for level, found in shares.items():
        expected = np.floor(level * 121 + 1e-9) / 121
        assert np.mean(found) == pytest.approx(expected, abs=3 * np.sqrt(level * (1 - level) / 120 / 30))


def test_one_ordinary_image_in_a_hundred_is_unusual():
    assert MODEL.false_alarm_share == 0.01
    assert MODEL.is_unusual(features(5000, 6)).mean() == pytest.approx(0.01, abs=0.015)


@pytest.mark.parametrize("axis", [0, D - 1], ids=["along a main direction", "off all main directions"])
def test_both_kinds_of_outlier_are_flagged(axis):
    odd = np.full(D, 3.0)
    assert not MODEL.is_unusual(odd)
    odd[axis] += 20 * SCALES[axis]
    assert MODEL.is_unusual(odd)
    assert MODEL.p_value(odd) == pytest.approx(1 / 301)


def test_too_few_calibration_images_are_said_and_still_tell_the_extreme():
    with pytest.warns(UserWarning, match="1 ordinary image in 21"):
        few = Novelty.fit(features(100, 0), features(20, 1))
    assert few.false_alarm_share == pytest.approx(1 / 21)
    assert few.is_unusual(np.full(D, 90.0)) and not few.is_unusual(np.full(D, 3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Novelty.fit(features(100, 0), features(99, 1))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_round_trip_even_in_half_precision(dtype):
    arrays = MODEL.to_tensors()
    assert {a.dtype for a in arrays.values()} == {np.dtype("float32")}
    back = Novelty.from_tensors({k: v.astype(dtype) for k, v in arrays.items()})
    new = features(200, 7)
    np.testing.assert_allclose(back.distance(new), MODEL.distance(new), rtol=20 * np.finfo(dtype).eps)
    np.testing.assert_allclose(back.p_value(new), MODEL.p_value(new), atol=0.06)
    assert np.mean(np.abs(back.p_value(new) - MODEL.p_value(new))) < 0.01


def test_it_is_small():
    rng = np.random.default_rng(0)
    arrays = Novelty.fit(rng.normal(size=(600, 448)), rng.normal(size=(2000, 448))).to_tensors()
    assert arrays["components"].shape == (128, 448)
    assert sum(a.nbytes for a in arrays.values()) < 300_000


def test_window_features_tell_brightness_and_sharpness():
    flat = window_features(np.full((2, 224, 224), 0.7))
    assert flat.shape == (448,)
    np.testing.assert_allclose(flat, np.r_[np.full(224, 0.7), np.zeros(224)], atol=1e-12)
    window = np.random.default_rng(0).random((2, 224, 224))
    blurred = window_features(gaussian_filter(window, (0, 2, 2)))
    sharp = window_features(window)
    np.testing.assert_allclose(blurred[:224], sharp[:224], atol=0.1)
    assert np.all(blurred[224:] < 0.5 * sharp[224:])


def test_window_features_ignore_the_arms_and_the_resolution():
    window = gaussian_filter(np.random.default_rng(1).random((2, 224, 224)), (0, 6, 6))
    arms = window.copy()
    arms[:, :, :40] = arms[:, :, -40:] = 1.0
    np.testing.assert_array_equal(window_features(arms), window_features(window))
    assert window_features(np.zeros((2, 448, 448))).shape == (448,)
    fine = window_features(np.kron(window, np.ones((2, 2))))
    np.testing.assert_allclose(fine[:224], window_features(window)[:224], atol=1e-12)


@pytest.mark.parametrize("shape", [(224, 224), (2, 225, 224), (2, 224, 100)])
def test_other_windows_are_refused(shape):
    with pytest.raises(InputError, match="multiples of 14"):
        window_features(np.zeros(shape))


def test_bad_features_are_refused():
    good = features(20, 0)
    for training, calibration in ((good[:5], good), (good, good[:0]), (good[0], good)):
        with pytest.raises(InputError, match="training features"):
            Novelty.fit(training, calibration)
    for dull in (np.ones((20, D)), np.outer(np.arange(20.0), np.ones(D))):
        with pytest.raises(InputError, match="do not vary"):
            Novelty.fit(dull, good)
    with pytest.raises(InputError, match="finite"):
        Novelty.fit(np.where(np.eye(20, D) > 0, np.nan, good), good)
    with pytest.raises(InputError, match="expected 40 features"):
        MODEL.distance(np.zeros(41))
    with pytest.raises(InputError, match="expected 40 features"):
        MODEL.distance(3.0)
    with pytest.raises(InputError, match="finite"):
        MODEL.distance(np.full(D, np.inf))
    with pytest.raises(InputError, match="missing: rest_deviation"):
        Novelty.from_tensors({k: v for k, v in MODEL.to_tensors().items() if k != "rest_deviation"})
