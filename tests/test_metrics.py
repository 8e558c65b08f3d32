"""Errors of curves, overlap and surface measures against independent numbers, intervals against theory."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spinelib import metrics
from spinelib.errors import InputError
from spinelib.spine import CURVE_COLUMNS, Curves

DATA = Path(__file__).parent / "data"
ORACLES = json.loads((DATA / "metric_oracles.json").read_text())["cases"]
SURFACE_ORACLES = json.loads((DATA / "vertebra_oracles.json").read_text())["cases"]
HEIGHTS = np.linspace(470.0, 0.0, 209)


def straight(right=0.0, anterior=0.0, heights=HEIGHTS):
    centre = np.ones_like(heights)
    return Curves(
        heights,
        np.stack([(right + w) * centre for w in (20, 0, -20)]),
        np.stack([(anterior + w) * centre for w in (15, 0, -15)]),
    )


def wavy(seed):
    rng = np.random.default_rng(seed)
    return Curves.from_array(HEIGHTS, straight().to_array() + rng.normal(0, 3, (209, 6)))


def draw(parts, spacing, shape=(32, 32, 32)):
    index = np.indices(shape)
    mask = np.zeros(shape, bool)
    for part in parts:
        if "box" in part:
            low, high = part["box"]
            mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
        else:
            centre, radius = part["ball"]
            squares = [((index[i] - centre[i]) * spacing[i]) ** 2 for i in range(3)]
            mask |= sum(squares) <= radius**2
    return mask


@pytest.mark.parametrize("case", ORACLES, ids=[c["case"] for c in ORACLES])
def test_mask_errors_equal_the_independent_numbers(case):
    truth, predicted = (draw(case[name], case["spacing_mm"]) for name in ("truth", "predicted"))
    found = metrics.mask_errors(predicted, truth, case["spacing_mm"], case["tolerance_mm"])
    for name, expected in case["expected"].items():
        assert found[name] == pytest.approx(expected, abs=1e-6, rel=1e-6), name
    assert found["iou_3d"] == pytest.approx(found["dice"] / (2 - found["dice"]), abs=1e-6)


@pytest.mark.parametrize("case", ORACLES, ids=[c["case"] for c in ORACLES])
def test_hausdorff_and_mean_of_means_equal_the_independent_numbers(case):
    import surface_distance

    truth, predicted = (draw(case[name], case["spacing_mm"]) for name in ("truth", "predicted"))
    found = metrics.surface_errors(predicted, truth, case["spacing_mm"], case["tolerance_mm"])
    expected = SURFACE_ORACLES[case["case"]] | {k: v for k, v in case["expected"].items() if k != "dice"}
    assert found == pytest.approx(expected, abs=1e-6)
    assert metrics.hd_mm(predicted, truth, case["spacing_mm"]) == found["hd_mm"]
    theirs = surface_distance.compute_surface_distances(truth, predicted, case["spacing_mm"])
    assert found["hd_mm"] == pytest.approx(surface_distance.compute_robust_hausdorff(theirs, 100), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.95]), st.permutations([0, 1, 2]))
def test_surface_measures_equal_monai_scale_and_turn_with_the_grid(seed, density, axes):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

    rng, spacing = np.random.default_rng(seed), np.array([0.7, 1.0, 2.3])
    truth, predicted = rng.random((2, 6, 7, 8)) < density
    found = metrics.surface_errors(predicted, truth, spacing, 1.0)
    pair = [torch.from_numpy(np.pad(mask, 1))[None, None] for mask in (predicted, truth)]
    options = {"include_background": True, "spacing": tuple(spacing)}
    assert found["hd_mm"] == pytest.approx(float(compute_hausdorff_distance(*pair, **options)), abs=1e-5)
    assert found["hd95_mm"] == pytest.approx(
        float(compute_hausdorff_distance(*pair, percentile=95, **options)), abs=1e-5
    )
    mean = compute_average_surface_distance(*pair, symmetric=True, **options)
    assert found["assd_mm"] == pytest.approx(float(mean), abs=1e-5)
    assert found["nsd"] == pytest.approx(float(compute_surface_dice(*pair, [1.0], **options)), abs=1e-5)
    scaled = metrics.surface_errors(predicted, truth, 3 * spacing, 3.0)
    assert scaled == pytest.approx({k: v * (1 if k == "nsd" else 3) for k, v in found.items()})
    turned = metrics.surface_errors(predicted.transpose(axes), truth.transpose(axes), spacing[axes], 1.0)
    assert turned == pytest.approx(found)


def test_surface_measures_do_not_depend_on_empty_space_around_the_masks():
    truth, predicted = (draw(ORACLES[9][name], (1, 1, 2)) for name in ("truth", "predicted"))
    wide = [np.pad(mask, ((7, 0), (0, 30), (3, 3))) for mask in (predicted, truth)]
    assert metrics.mask_errors(*wide, (1, 1, 2)) == metrics.mask_errors(predicted, truth, (1, 1, 2))


def test_iou_of_flat_masks():
    truth, predicted = np.zeros((2, 10, 10), bool)
    truth[:, :6] = True
    predicted[:, 3:9] = True
    assert metrics.iou(predicted, truth) == pytest.approx(3 / 9, abs=1e-6)


def test_nothing_predicted_is_the_worst_score_and_an_empty_truth_is_refused():
    truth = draw([{"box": [[8] * 3, [18] * 3]}], (1, 1, 1))
    empty = np.zeros_like(truth)
    worst = {"dice": 0.0, "iou_3d": 0.0, "hd95_mm": np.inf, "assd_mm": np.inf, "nsd": 0.0}
    assert metrics.mask_errors(empty, truth, 1.0) == worst
    assert metrics.hd_mm(empty, truth, 1.0) == np.inf
    with pytest.raises(InputError, match="true mask is empty"):
        metrics.mask_errors(truth, empty, 1.0)


@pytest.mark.parametrize(
    ("predicted", "spacing"),
    [(np.ones((3, 3, 4), bool), 1.0), (np.ones((3, 3, 3), np.uint8), 1.0), (np.ones((3, 3, 3), bool), 0.0)],
)
def test_unusable_masks_are_refused(predicted, spacing):
    with pytest.raises(InputError):
        metrics.hd95_mm(predicted, np.ones((3, 3, 3), bool), spacing)


def test_known_offset_gives_known_curve_errors():
    errors = metrics.curve_errors(straight(3.0, 4.0), straight(), remove_depth=False)
    assert errors["centreline_3d_mm"] == pytest.approx(5.0)
    assert errors["centreline_3d_p95_mm"] == pytest.approx(5.0)
    assert (errors["coronal_mm"], errors["sagittal_mm"]) == pytest.approx((3.0, 4.0))
    assert set(CURVE_COLUMNS) <= set(errors)


def test_depth_is_left_out_by_default_but_shape_is_not():
    assert metrics.curve_errors(straight(3.0, 400.0), straight())["centreline_3d_mm"] == pytest.approx(3.0)
    bent = straight()
    ramp = Curves(HEIGHTS, bent.coronal_mm, bent.sagittal_mm + 0.1 * HEIGHTS)
    # mean |0.1 (h - 235)| over an even grid from 0 to 470
    expected = np.abs(0.1 * (HEIGHTS - HEIGHTS.mean())).mean()
    assert metrics.curve_errors(ramp, bent)["sagittal_mm"] == pytest.approx(expected)


def test_prediction_on_other_heights_is_interpolated():
    tilted = Curves(HEIGHTS, straight().coronal_mm + 0.2 * HEIGHTS, straight().sagittal_mm)
    coarse = tilted.resample(31)
    assert metrics.curve_errors(coarse, tilted)["coronal_mm"] == pytest.approx(0.0, abs=1e-9)


def test_curves_without_a_common_height_are_refused():
    with pytest.raises(InputError, match="share no height"):
        metrics.curve_errors(straight(heights=HEIGHTS + 1000), straight())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(-300, 300), st.floats(-300, 300))
def test_curve_errors_are_a_distance(first, second, right, anterior):
    a, b = wavy(first), wavy(second)
    errors = metrics.curve_errors(a, b)
    assert metrics.curve_errors(a, a) == dict.fromkeys(errors, 0.0)
    assert metrics.curve_errors(b, a) == pytest.approx(errors)
    mirrored = metrics.curve_errors(a.mirrored(), b.mirrored())
    assert mirrored["coronal_right_mm"] == pytest.approx(errors["coronal_left_mm"])
    assert mirrored["centreline_3d_mm"] == pytest.approx(errors["centreline_3d_mm"])
    moved = metrics.curve_errors(a.shifted(right, anterior, 50.0), b.shifted(right, 0.0, 50.0))
    assert moved == pytest.approx(errors)


def test_bootstrap_interval_agrees_with_theory_and_repeats():
    values = np.random.default_rng(3).normal(10.0, 2.0, 400)
    mean, low, high = metrics.bootstrap_ci(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05)
    assert metrics.bootstrap_ci(values) == (mean, low, high)
    assert metrics.bootstrap_ci(values, seed=1) != (mean, low, high)


def test_bootstrap_equals_scipys_percentile_interval():
    values = np.random.default_rng(4).gamma(2.0, 3.0, 60)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=0)
    ours = metrics.bootstrap_ci(values, n=20000)[1:]
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.04)


def test_bootstrap_of_one_value_has_no_interval_and_nan_is_refused():
    mean, low, high = metrics.bootstrap_ci([4.0])
    assert (mean, np.isnan(low), np.isnan(high)) == (4.0, True, True)
    for values in ([], [1.0, np.nan]):
        with pytest.raises(InputError, match="finite"):
            metrics.bootstrap_ci(values)


def test_summary_by_severity():
    frame = pd.DataFrame({"cobb_deg": [2.0, 8.0, 12.0, 60.0], "error_mm": [1.0, 3.0, 5.0, np.inf]})
    frame["severity"] = metrics.severity_band(frame["cobb_deg"])
    table = metrics.summarise(frame, by="severity")
    assert list(table["severity"].unique()) == ["<10", "10-20", ">45"]
    errors = table[table["metric"] == "error_mm"].set_index("severity")
    assert errors.loc["<10", ["n", "mean", "median"]].tolist() == [2, 2.0, 2.0]
    assert errors.loc[">45", "n"] == 0
    assert metrics.summarise(frame)["metric"].tolist() == ["cobb_deg", "error_mm"]
    with pytest.raises(InputError, match="group by"):
        metrics.summarise(frame, by="sex")


def test_severity_bounds_belong_to_the_band_above():
    found = list(metrics.severity_band([0, 9.999, 10, 20, 30, 44.9, 45, 120, -25]))
    assert found == ["<10", "<10", "10-20", "20-30", "30-45", "30-45", ">45", ">45", "20-30"]


def test_correlation_with_fishers_interval():
    truth = np.random.default_rng(5).normal(size=50)
    predicted = truth + np.random.default_rng(6).normal(size=50)
    r, low, high = metrics.pearson_r(predicted, truth)
    assert r == pytest.approx(np.corrcoef(predicted, truth)[0, 1])
    expected = np.tanh(np.arctanh(r) + np.array([-1, 1]) * stats.norm.ppf(0.975) / np.sqrt(47))
    assert (low, high) == pytest.approx(tuple(expected))


def test_correlation_that_does_not_exist_is_nan():
    assert np.isnan(metrics.pearson_r([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0])).all()
    r, low, _ = metrics.pearson_r([1.0, 2.0, 3.0], [1.0, 2.0, 4.0])
    assert r > 0.9 and np.isnan(low)
    with pytest.raises(InputError, match="equally long"):
        metrics.pearson_r([1.0, 2.0], [1.0, 2.0, 3.0])
