"""Clinical measures of curves known on paper; agreement statistics against published worked examples."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinelib.angles import LEVEL_FRACTIONS, all_angles
from spinelib.clinical import (
    MEASURES,
    READER_RELIABILITY,
    agreement_table,
    axial_view,
    clinical_measures,
    icc_agreement,
    limits_of_agreement,
    measure_difference,
)
from spinelib.errors import InputError
from spinelib.spine import Curves

LENGTH = 470.0
HEIGHTS = np.linspace(LENGTH, 0.0, 209)
SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
"""Shrout & Fleiss 1979, Table 2: 6 subjects, 4 judges."""
PEAK_FLOW_WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
PEAK_FLOW_MINI = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]
"""Bland & Altman 1986, Table 1: 17 subjects, first readings of two peak flow meters, l/min."""


def curves(right=0.0, anterior=0.0):
    right, anterior = np.broadcast_to(right, HEIGHTS.shape), np.broadcast_to(anterior, HEIGHTS.shape)
    return Curves(
        HEIGHTS,
        np.stack([right + 20, right, right - 20]),
        np.stack([anterior + 15, anterior, anterior - 15]),
    )


def half_sine(cobb_deg=30.0):
    """One bend to + whose tangents at the ends enclose the Cobb angle; the apex lies half way."""
    return np.tan(np.radians(cobb_deg / 2)) * LENGTH / np.pi * np.sin(np.pi * HEIGHTS / LENGTH)


def circle(radius=500.0):
    """Circle arc bulging to +, ends on the vertical."""
    return np.sqrt(radius**2 - (HEIGHTS - LENGTH / 2) ** 2) - np.sqrt(radius**2 - (LENGTH / 2) ** 2)


def middle_of(level):
    return np.mean(LEVEL_FRACTIONS[level])


def table(truth, **methods):
    """One row per subject and method, every measure holding the same values."""
    parts = [
        pd.DataFrame({f"true_{m}": truth for m in MEASURES} | {f"predicted_{m}": values for m in MEASURES}).assign(
            method=name
        )
        for name, values in methods.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_measures_have_their_names_and_take_the_angles_as_they_are():
    spine = curves(half_sine(), -half_sine(40))
    found, angles = clinical_measures(spine), all_angles(spine)
    assert tuple(found) == MEASURES
    shared = set(MEASURES) & set(angles)
    assert len(shared) == 6
    assert {name: found[name] for name in shared} == {name: angles[name] for name in shared}
    assert found["pmc_azimuth_deg"] == angles["pmc_orientation_deg"]


def test_single_bend():
    found = clinical_measures(curves(half_sine(30)))
    bulge = np.tan(np.radians(15)) * LENGTH / np.pi
    assert found["cobb_deg"] == pytest.approx(30, rel=0.02)
    assert found["apical_translation_mm"] == pytest.approx(bulge, rel=0.03)
    assert found["max_axial_offset_mm"] == pytest.approx(bulge, rel=0.01)
    assert found["pmc_azimuth_deg"] == pytest.approx(0, abs=1)


@pytest.mark.parametrize("level", ["T4", "T8", "T12", "L2"])
def test_apex_level_counts_vertebrae(level):
    depth = middle_of(level) * LENGTH
    bump = 12 * np.exp(-(((LENGTH - HEIGHTS - depth) / 70) ** 2))
    found = clinical_measures(curves(bump))
    assert found["apex_level"] == pytest.approx(list(LEVEL_FRACTIONS).index(level) + 1, abs=0.25)


def test_straight_column_has_no_apex():
    found = clinical_measures(curves(0.05 * HEIGHTS, -half_sine(30)))
    assert np.isnan(found.pop("apex_level"))
    assert np.isfinite(list(found.values())).all()
    assert found["apical_translation_mm"] == found["cobb_deg"] == 0


def test_mirrored_patient():
    spine = curves(half_sine(25), -half_sine(35))
    found, mirrored = clinical_measures(spine), clinical_measures(spine.mirrored())
    for name in MEASURES:
        sign = -1 if name in ("apical_translation_mm", "pmc_azimuth_deg") else 1
        assert mirrored[name] == pytest.approx(sign * found[name], abs=0.01), name


def test_measures_do_not_depend_on_where_the_patient_lies():
    spine = curves(half_sine(25), -half_sine(35))
    moved = clinical_measures(spine.shifted(right_mm=31, anterior_mm=-77, superior_mm=400))
    assert moved == pytest.approx(clinical_measures(spine), abs=1e-6)


def test_axial_view_of_a_column_bent_in_one_vertical_plane():
    turn = np.radians(30)
    bulge = half_sine(40)
    view = axial_view(curves(np.cos(turn) * bulge, np.sin(turn) * bulge))
    assert list(view["level"]) == list(LEVEL_FRACTIONS)
    assert view["anterior_mm"].to_numpy() == pytest.approx(np.tan(turn) * view["right_mm"].to_numpy(), abs=1e-9)
    middle = view.set_index("level").loc["T5":"L2", "azimuth_deg"]
    assert middle.to_numpy() == pytest.approx(np.full(len(middle), 30.0), abs=2)


@pytest.mark.parametrize(("sign", "azimuth"), [(1, 90), (-1, -90)])
def test_curvature_of_a_circle(sign, azimuth):
    view = axial_view(curves(0, sign * circle(500))).set_index("level").loc["T4":"L3"]
    # The tangent turns in the sagittal plane; its axial part is shortened by the cosine of the lean.
    middles = [middle_of(level) for level in view.index]
    lean = (np.array(middles) - 0.5) * 2 * np.arcsin(LENGTH / 1000)
    assert view["curvature_per_m"].to_numpy() == pytest.approx(2 * np.cos(lean), rel=0.02)
    assert view["azimuth_deg"].to_numpy() == pytest.approx(np.full(len(view), azimuth), abs=1e-6)


def test_axial_view_starts_at_the_lower_end():
    spine = curves(0.1 * HEIGHTS, -0.2 * HEIGHTS).shifted(right_mm=50, anterior_mm=80)
    view = axial_view(spine).set_index("level")
    height = (1 - middle_of("T1")) * LENGTH
    assert view.loc["T1", ["right_mm", "anterior_mm"]].tolist() == pytest.approx([0.1 * height, -0.2 * height])
    assert clinical_measures(spine)["max_axial_offset_mm"] == pytest.approx(np.hypot(0.1, 0.2) * height)


@pytest.mark.parametrize(("predicted", "truth", "turn"), [(89, -89, -2), (-89, 89, 2), (10, 30, -20), (45, -45, 90)])
def test_azimuths_differ_by_the_smallest_turn(predicted, truth, turn):
    assert measure_difference("pmc_azimuth_deg", predicted, truth) == pytest.approx(turn)


@settings(max_examples=50)
@given(st.floats(-90, 90), st.floats(-90, 90), st.integers(-3, 3))
def test_azimuth_difference_ignores_half_turns(predicted, truth, turns):
    difference = measure_difference("pmc_azimuth_deg", predicted + 180 * turns, truth)
    assert -90 <= difference <= 90
    assert np.cos(np.radians(2 * difference)) == pytest.approx(np.cos(np.radians(2 * (predicted - truth))), abs=1e-9)


def test_other_measures_differ_plainly_and_unknown_ones_are_refused():
    assert measure_difference("cobb_deg", [100.0, 5.0], [5.0, 100.0]).tolist() == [95, -95]
    with pytest.raises(InputError, match="unknown measure 'cob'. Expected one of: cobb_deg"):
        measure_difference("cob", 1, 2)


def test_icc_of_shrout_and_fleiss():
    icc, low, high = icc_agreement(np.array(SHROUT_FLEISS))
    assert icc == pytest.approx(0.29, abs=0.005)
    assert (low, high) == pytest.approx((0.019, 0.761), abs=0.001)


def test_icc_interval_holds_the_true_value_as_often_as_it_says():
    rng = np.random.default_rng(0)
    # Subjects SD 3, error SD 1, two raters without a bias of their own: ICC = 9 / 10.
    held = 0
    for _ in range(400):
        _, low, high = icc_agreement(3 * rng.normal(size=(40, 1)) + rng.normal(size=(40, 2)))
        held += low <= 0.9 <= high
    assert held / 400 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("ratings", "expected"),
    [
        ([[1, 1], [2, 2], [5, 5]], (1, 1, 1)),
        ([[3, 3], [3, 3]], (np.nan,) * 3),
        ([[3, 4], [3, 4]], (np.nan,) * 3),
        ([[3, 4]], (np.nan,) * 3),
    ],
)
def test_icc_at_its_edges(ratings, expected):
    assert icc_agreement(np.array(ratings)) == pytest.approx(expected, nan_ok=True)


def test_icc_punishes_a_bias_that_correlation_does_not_see():
    truth = np.arange(10.0)
    icc, low, high = icc_agreement(np.stack([truth + 3, truth], axis=1))
    # Mean squares of the subjects 2 Var(truth), of the raters n b^2 / 2, of the error 0.
    variance = truth.var(ddof=1)
    assert icc == pytest.approx(variance / (variance + 3**2 / 2))
    assert low < icc < high


def test_limits_of_agreement_of_bland_and_altman():
    found = limits_of_agreement(np.subtract(PEAK_FLOW_WRIGHT, PEAK_FLOW_MINI))
    assert found["bias"] == pytest.approx(-2.1, abs=0.05)
    assert (found["bias_ci_low"], found["bias_ci_high"]) == pytest.approx((-22.0, 17.8), abs=0.15)
    # The paper rounds 1.96 to 2: its limits are -79.7 and 75.5, theirs -114.3 to -45.1 and 40.9 to 110.1.
    wider = 0.04 * 38.8
    assert (found["loa_low"] - wider, found["loa_high"] + wider) == pytest.approx((-79.7, 75.5), abs=0.15)
    assert (found["loa_low_ci_low"], found["loa_low_ci_high"]) == pytest.approx(
        (-114.3 + wider, -45.1 + wider), abs=0.4
    )
    assert (found["loa_high_ci_low"], found["loa_high_ci_high"]) == pytest.approx(
        (40.9 - wider, 110.1 - wider), abs=0.4
    )


def test_one_difference_has_a_bias_only_and_none_is_refused():
    found = limits_of_agreement(np.array([2.0]))
    assert found.pop("bias") == 2
    assert np.isnan(list(found.values())).all()
    for bad in ([], [1.0, np.nan]):
        with pytest.raises(InputError, match="finite differences"):
            limits_of_agreement(np.array(bad))


def test_agreement_table_of_a_perfect_and_a_biased_method():
    truth = np.linspace(5, 45, 30)
    found = agreement_table(table(truth, ours=truth, mean_curve=truth + 4)).set_index(["method", "measure"])
    assert list(found.index) == [(m, n) for m in ("ours", "mean_curve") for n in MEASURES]
    perfect, biased = found.loc[("ours", "cobb_deg")], found.loc[("mean_curve", "cobb_deg")]
    exact = perfect[["n", "mae", "bias", "loa_high", "icc", "icc_ci_low", "r"]].tolist()
    assert exact == pytest.approx([30, 0, 0, 0, 1, 1, 1])
    assert biased[["mae", "mae_ci_low", "bias", "loa_low", "r"]].tolist() == pytest.approx([4, 4, 4, 4, 1])
    assert 0.85 < biased["icc"] < 1


def test_azimuth_agreement_goes_round_the_circle():
    truth = np.array([80.0, 85.0, 89.0, -89.0, -85.0])
    predicted = 90 - (90 - (truth + 5)) % 180
    row = agreement_table(table(truth, ours=predicted), measures=["pmc_azimuth_deg"]).iloc[0]
    assert (row["mae"], row["bias"], row["n"]) == pytest.approx((5, 5, 5))
    assert np.isnan(row["icc"])
    assert np.isnan(row["r"])


def test_missing_values_are_left_out_and_counted():
    truth = np.array([1.0, 2.0, np.nan, 4.0])
    frame = table(truth, ours=np.array([1.5, np.nan, 3.0, 4.5]), none=np.full(4, np.nan))
    found = agreement_table(frame, measures=["cobb_deg"]).set_index("method")
    assert found["n"].to_dict() == {"ours": 2, "none": 0}
    assert found.loc["ours", "mae"] == pytest.approx(0.5)
    assert found.loc["none"].drop(["measure", "n"]).isna().all()


def test_groups_by_several_columns():
    truth = np.linspace(5, 45, 12)
    frame = table(truth, b=truth + 1, a=truth - 1).assign(sex=["F", "M"] * 12)
    found = agreement_table(frame, ["method", "sex"], ["cobb_deg"])
    assert found[["method", "sex"]].to_numpy().tolist() == [["b", "F"], ["b", "M"], ["a", "F"], ["a", "M"]]
    assert found["bias"].tolist() == pytest.approx([1, 1, -1, -1])


def test_missing_columns_are_named():
    with pytest.raises(InputError, match="lacks the columns: method, predicted_cobb_deg, true_cobb_deg"):
        agreement_table(pd.DataFrame({"subject_key": ["a"]}), measures=["cobb_deg"])


def test_reader_reliability_belongs_to_the_measures_and_has_sources():
    assert set(READER_RELIABILITY["measure"]) <= set(MEASURES)
    assert READER_RELIABILITY[["comparison", "statistic", "value", "image", "source"]].notna().all(axis=None)
    iccs = READER_RELIABILITY["statistic"].str.startswith("ICC")
    assert READER_RELIABILITY.loc[iccs, "value"].between(0, 1).all()
    assert (READER_RELIABILITY.loc[~iccs, "unit"] == "deg").all()
