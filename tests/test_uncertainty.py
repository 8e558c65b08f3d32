"""Conformal tubes and intervals: exact quantiles, coverage in simulation, round trips, bad input."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from spinelib import uncertainty
from spinelib.errors import InputError
from spinelib.spine import Curves
from spinelib.uncertainty import Calibration, calibrate, coverage_table, interval_table, tube_coverage

HEIGHTS = np.linspace(470.0, 0.0, 209)
ONES = np.ones_like(HEIGHTS)
BODY = np.outer((20.0, 0.0, -20.0), ONES)
TRUTH = Curves(HEIGHTS, BODY, BODY)
PROFILE = 1.0 + 2.0 * np.linspace(0, 1, 209) ** 2


def off_by(right_mm, anterior_mm=0.0):
    """Return the true curves, moved at each height."""
    return Curves(HEIGHTS, BODY + np.asarray(right_mm) * ONES, BODY + np.asarray(anterior_mm) * ONES)


def smooth_noise(rng, n, waves=6):
    """Return Gaussian curves of unit variance at each height, shape (n, 209)."""
    phase = np.outer(np.arange(1, waves + 1), np.linspace(0, np.pi, 209))
    basis = np.concatenate([np.cos(phase), np.sin(phase)]) / np.sqrt(waves)
    return rng.normal(size=(n, len(basis))) @ basis


def subjects(rng, n, spreads=PROFILE):
    """Return (predicted, spreads, truth) whose errors are to the right and as large as the spread says."""
    spreads = np.broadcast_to(spreads, (n, 209))
    return [off_by(e) for e in smooth_noise(rng, n) * spreads], spreads, [TRUTH] * n


def test_the_factor_is_the_order_statistic_of_split_conformal_prediction():
    predicted = [off_by(e) for e in range(1, 20)]
    found = calibrate(predicted, np.ones((19, 209)), [TRUTH] * 19, alpha=0.1)
    np.testing.assert_allclose(found.row_factors, 18.0)  # ceil(20 * 0.9)-th of 19
    assert found.line_factor == pytest.approx(18.0)
    assert (found.n, found.alpha) == (19, 0.1)
    np.testing.assert_allclose(found.tube_mm(2 * ONES), 36.0)


def test_distance_is_taken_in_the_plane_of_each_height_and_ignores_the_unknown_depth():
    lean = np.linspace(-4.0, 4.0, 209)
    predicted = [off_by(3.0, lean + depth) for depth in (0.0, 500.0)]
    found = uncertainty.centreline_distances_mm(predicted, [TRUTH] * 2)
    np.testing.assert_allclose(found, [np.hypot(3.0, lean)] * 2, atol=1e-9)


def test_distances_do_not_depend_on_the_world_frame():
    rng = np.random.default_rng(1)
    predicted, _, truth = subjects(rng, 3)
    moved = [[c.shifted(11.0, -7.0, 300.0) for c in group] for group in (predicted, truth)]
    here = uncertainty.centreline_distances_mm(predicted, truth)
    np.testing.assert_allclose(uncertainty.centreline_distances_mm(*moved), here, atol=1e-9)


@pytest.mark.parametrize("n", [15, 30, 100])
def test_new_subjects_lie_inside_as_often_as_promised(n):
    rng = np.random.default_rng(n)
    pool = np.abs(smooth_noise(rng, 20_000)) * PROFILE
    promised = np.ceil((n + 1) * 0.9) / (n + 1)
    sets = [calibrate(*subjects(rng, n)) for _ in range(40)]
    at_heights = np.mean([(pool <= c.tube_mm(PROFILE)).mean(axis=0) for c in sets], axis=0)
    whole = np.mean([(pool <= c.tube_mm(PROFILE, simultaneous=True)).all(axis=1).mean() for c in sets])
    error = 3 * np.sqrt(0.09 / n / len(sets))
    assert promised - error < at_heights.mean() < promised + error + 0.01
    assert at_heights.min() > promised - 1.5 * error
    assert promised - error < whole < promised + error


def test_tubes_follow_the_errors_whether_the_spread_knows_them_or_not():
    rng = np.random.default_rng(3)
    informed = calibrate(*subjects(rng, 400))
    assert np.ptp(informed.row_factors) < 0.3 * informed.row_factors.mean()
    predicted, _, truth = subjects(rng, 400)
    blind = calibrate(predicted, np.ones((400, 209)), truth)
    for tube in (informed.tube_mm(PROFILE), blind.tube_mm(ONES)):
        np.testing.assert_allclose(tube, 1.645 * PROFILE, rtol=0.25)
        assert np.corrcoef(tube, PROFILE)[0, 1] > 0.98


def test_a_spread_per_subject_makes_each_group_of_subjects_right():
    rng = np.random.default_rng(4)
    size = np.where(np.arange(600) % 2, 4.0, 1.0)[:, None] * PROFILE
    predicted, spreads, truth = subjects(rng, 600, size)
    tubes = calibrate(predicted, spreads, truth).tube_mm(spreads)
    new = np.abs(smooth_noise(rng, 600)) * size
    for group in (0, 1):
        assert (new <= tubes)[group::2].mean() == pytest.approx(0.9, abs=0.03)


@settings(max_examples=20, deadline=None)
@given(unit=st.floats(0.01, 100.0), seed=st.integers(0, 99))
def test_the_unit_of_the_spread_does_not_matter(unit, seed):
    predicted, spreads, truth = subjects(np.random.default_rng(seed), 12)
    plain, other = (calibrate(predicted, spreads * f, truth) for f in (1.0, unit))
    np.testing.assert_allclose(other.tube_mm(unit * PROFILE), plain.tube_mm(PROFILE), rtol=1e-9)
    whole = plain.tube_mm(PROFILE, simultaneous=True)
    np.testing.assert_allclose(other.tube_mm(unit * PROFILE, simultaneous=True), whole, rtol=1e-9)
    assert np.all(whole >= plain.tube_mm(PROFILE))


def test_heights_without_truth_count_neither_way_and_still_get_a_tube():
    short = TRUTH.at(HEIGHTS[6:-6])
    predicted = [off_by(e) for e in range(1, 20)]
    inside = tube_coverage(predicted, np.full((19, 209), 5.5), [short] * 19)
    assert np.isnan(inside[:, :6]).all() and np.isnan(inside[:, -6:]).all()
    assert inside[:5, 6:-6].min() == 1 and inside[5:, 6:-6].max() == 0
    found = calibrate(predicted, np.ones((19, 209)), [short] * 19)
    np.testing.assert_allclose(found.row_factors, 18.0)


def test_coverage_table_by_region():
    share = np.linspace(0, 1, 209)
    wrong_in_lumbar = off_by(np.where(share > 0.8, 9.0, 0.0))
    tubes = np.tile(np.where(share < 0.5, 2.0, 4.0), (4, 1))
    table = coverage_table([TRUTH, TRUTH, TRUTH, wrong_in_lumbar], tubes, [TRUTH] * 4).set_index("region")
    assert list(table.index) == ["T1-T4", "T5-T8", "T9-T12", "L1-L5", "T1-L5"]
    assert (table["n"] == 4).all()
    np.testing.assert_allclose(table["coverage"].iloc[:3], 1.0)
    lumbar = (share > uncertainty.LEVEL_FRACTIONS["L1"][0] - 0.0068) & (share <= 0.8)
    good = lumbar.sum() / (lumbar.sum() + (share > 0.8).sum())
    assert table.loc["L1-L5", "coverage"] == pytest.approx((3 + good) / 4, abs=0.01)
    assert table.loc["T1-L5", "coverage"] == pytest.approx(0.95, abs=0.001)
    assert list(table["whole_inside"]) == [1, 1, 1, 0.75, 0.75]
    assert table.loc["T1-L5", "ci_low"] < 0.95 < table.loc["T1-L5", "ci_high"]
    assert list(table["mean_radius_mm"].iloc[:2]) == [2, 2]
    assert table.loc["L1-L5", "mean_radius_mm"] == 4


def test_regions_meet_between_their_vertebrae():
    ends = list(uncertainty._region_ends().values())[:-1]
    assert (ends[0][0], ends[-1][1]) == (0.0, 1.0)
    assert [a[1] for a in ends[:-1]] == [b[0] for b in ends[1:]]
    plates = uncertainty.LEVEL_FRACTIONS
    assert plates["T4"][1] < ends[0][1] < plates["T5"][0]
    assert plates["T12"][1] < ends[2][1] < plates["L1"][0]


def with_measures(measures, n=19):
    return calibrate([off_by(e + 1.0) for e in range(n)], np.ones((n, 209)), [TRUTH] * n, measures)


def test_interval_of_a_measure_is_its_residuals_quantile_around_the_value():
    true = np.linspace(5, 40, 19)
    errors = np.arange(1, 20) * np.where(np.arange(19) % 2, 0.1, -0.1)
    found = with_measures({"cobb_deg": (true + errors, true)})
    assert found.interval("cobb_deg", 30.0) == pytest.approx((28.2, 31.8))
    assert list(found.intervals({"cobb_deg": 1.0, "unknown_deg": 3.0})) == ["cobb_deg"]
    table = interval_table(found, {"cobb_deg": (true + errors, true)})
    assert table.loc[0, "coverage"] == pytest.approx(18 / 19)
    assert table.loc[0, "mean_half_width"] == pytest.approx(1.8)


def test_azimuths_are_compared_modulo_180():
    true = np.full(19, 88.0)
    found = with_measures({"pmc_azimuth_deg": (true + np.arange(19) - 180.0, true), "lean_deg": (true - 175.0, true)})
    assert found.interval("pmc_azimuth_deg", -89.0) == pytest.approx((-106.0, -72.0))
    assert found.interval("lean_deg", 0.0) == pytest.approx((-175.0, 175.0))
    wild = with_measures({"azimuth_deg": (true + 80.0, true, np.full(19, 0.5))})
    assert wild.interval("azimuth_deg", 0.0, 1.0) == (-90.0, 90.0)


def test_a_scale_makes_intervals_wide_where_errors_are_large():
    rng = np.random.default_rng(5)
    true = rng.uniform(0, 50, 4000)
    predicted = true + rng.normal(size=4000) * (1 + true / 10)
    half = slice(0, 2000), slice(2000, None)
    measures = [{"cobb_deg": (predicted[s], true[s], 1 + np.abs(predicted[s]) / 10)} for s in half]
    factor = with_measures(measures[0])
    table = interval_table(factor, measures[1])
    assert table.loc[0, "coverage"] == pytest.approx(0.9, abs=0.02)
    low, high = factor.interval("cobb_deg", 40.0, 5.0)
    assert high - low == pytest.approx(5 * 2 * 1.645, rel=0.15)
    with pytest.raises(InputError, match="needs the scale"):
        factor.interval("cobb_deg", 40.0)
    with pytest.raises(InputError, match="without scale"):
        with_measures({"cobb_deg": (true, true)}).interval("cobb_deg", 40.0, 5.0)


def test_intervals_of_measures_cover_in_simulation():
    rng = np.random.default_rng(6)
    covered = []
    for _ in range(60):
        errors = rng.standard_t(3, 1000)
        found = with_measures({"x_mm": (errors[:30], np.zeros(30))})
        covered.append(interval_table(found, {"x_mm": (errors[30:], np.zeros(970))}).loc[0, "coverage"])
    assert np.mean(covered) == pytest.approx(28 / 31, abs=3 * np.sqrt(0.09 / 30 / 60))


def test_subjects_without_a_value_are_left_out():
    true = np.arange(21.0)
    predicted = true + np.r_[np.arange(1, 20), np.nan, np.nan]
    assert with_measures({"cobb_deg": (predicted, true)}).measure_factors["cobb_deg"] == 18.0


def test_round_trip_through_a_safetensors_file(tmp_path):
    predicted, spreads, truth = subjects(np.random.default_rng(7), 30)
    values = np.random.default_rng(8).normal(size=(2, 30))
    measures = {"cobb_deg": tuple(values), "pmc_azimuth_deg": (*values, np.full(30, 2.0))}
    there = calibrate(predicted, spreads, truth, measures)
    arrays, header = there.to_tensors()
    assert {a.dtype for a in arrays.values()} == {np.dtype("float32")}
    save_file(arrays, tmp_path / "weights.safetensors", metadata={"calibration": json.dumps(header)})
    with safe_open(tmp_path / "weights.safetensors", framework="np") as file:
        header = json.loads(file.metadata()["calibration"])
        back = Calibration.from_tensors({k: file.get_tensor(k) for k in file.keys()}, header)  # noqa: SIM118
    np.testing.assert_allclose(back.tube_mm(PROFILE), there.tube_mm(PROFILE), rtol=1e-6)
    np.testing.assert_allclose(back.tube_mm(PROFILE, True), there.tube_mm(PROFILE, True), rtol=1e-6)
    assert back.interval("cobb_deg", 20.0) == pytest.approx(there.interval("cobb_deg", 20.0), rel=1e-6)
    assert (back.n, back.alpha, back.scaled) == (30, 0.1, ("pmc_azimuth_deg",))


def test_a_calibration_without_measures_is_stored_as_well():
    there = with_measures(None)
    assert Calibration.from_tensors(*there.to_tensors()).measure_factors == {}
    with pytest.raises(InputError, match="There are: none"):
        there.interval("cobb_deg", 1.0)


def test_what_is_no_calibration_is_refused():
    arrays, header = with_measures(None).to_tensors()
    with pytest.raises(InputError, match="row_factors"):
        Calibration.from_tensors({k: v for k, v in arrays.items() if k != "row_factors"}, header)
    with pytest.raises(InputError, match="shorter|argument"):
        Calibration.from_tensors(arrays, header | {"measures": ["cobb_deg"]})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spreads_mm": np.ones((19, 208))}, "209 rows of 19 subjects"),
        ({"spreads_mm": np.zeros((19, 209))}, "positive"),
        ({"spreads_mm": np.full((19, 209), np.nan)}, "finite"),
        ({"truth": [TRUTH] * 18}, "19 and 18"),
        ({"truth": [TRUTH.shifted(superior_mm=900)] * 19}, "share no height"),
        ({"predicted": [TRUTH.resample(50), *[TRUTH] * 18]}, "equally many rows"),
        ({"alpha": 0.0}, "between 0 and 1"),
        ({"alpha": 0.01}, "needs at least 99"),
        ({"measures": {"cobb_deg": (np.ones(19),)}}, "two or three"),
        ({"measures": {"cobb_deg": (np.ones(19), np.ones(18))}}, "equally long"),
        ({"measures": {"cobb_deg": (np.ones(8), np.ones(8))}}, "cobb_deg has 8 calibration subjects"),
        ({"measures": {"cobb_deg": (np.ones(9), np.ones(9), np.zeros(9))}}, "scales of 'cobb_deg'"),
    ],
)
def test_bad_input_is_refused_with_the_reason(change, reason):
    good = {"predicted": [TRUTH] * 19, "spreads_mm": np.ones((19, 209)), "truth": [TRUTH] * 19}
    with pytest.raises(InputError, match=reason):
        calibrate(**good | change)


def test_a_spread_of_other_rows_gets_no_tube():
    with pytest.raises(InputError, match="each of 209 rows"):
        with_measures(None).tube_mm(np.ones(100))


def test_nobody_has_no_coverage():
    with pytest.raises(InputError, match="at least one"):
        coverage_table([], np.ones((0, 209)), [])
