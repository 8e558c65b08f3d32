"""Coronal curves: what is asked for is what an independent ruler measures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline

from spinelib.errors import InputError
from spinelib.levels import VERTEBRAE
from spinelib.phantom.population import sample_subject
from spinelib.phantom.scoliosis import (
    ScoliosisCurve,
    TiltPattern,
    check_curves,
    coronal_wedges_deg,
    sample_curves,
)

THORACIC = ScoliosisCurve(40.0, "T5", "T12", "right", 0.3)
LUMBAR = ScoliosisCurve(30.0, "T12", "L4", "left", 0.22)
PATTERNS = {
    "thoracic": (THORACIC,),
    "thoracolumbar": (ScoliosisCurve(35.0, "T10", "L3", "left"),),
    "lumbar": (ScoliosisCurve(25.0, "T11", "L4", "left"),),
    "double": (THORACIC, LUMBAR),
    "apart": (ScoliosisCurve(25.0, "T2", "T7", "left"), ScoliosisCurve(30.0, "T10", "L3", "right")),
    "triple": (ScoliosisCurve(25.0, "T1", "T5", "left"), THORACIC, LUMBAR),
}


def ruler_cobb_deg(subject, curve):
    """Cobb angle by dense differences of the spline through S1 and the body centres: no library code."""
    centres = np.vstack([subject.poses[1:, :3, 3], np.zeros(3)])[::-1]
    height = (subject.dims["height_anterior_mm"] + subject.dims["height_posterior_mm"]) / 2
    superior = np.linspace(centres[0, 2], centres[-1, 2], 20001)
    angle = np.degrees(np.arctan(np.gradient(CubicSpline(centres[:, 2], centres[:, 0])(superior), superior)))
    lower, upper = (subject.levels.index(end) for end in (curve.lower_end, curve.upper_end))
    reach = subject.poses[:, 2, 2] * height / 2
    inside = superior >= subject.poses[lower, 2, 3] - reach[lower]
    inside &= superior <= subject.poses[upper, 2, 3] + reach[upper]
    return np.ptp(angle[inside])


def bulge_mm(subject, curve, level):
    """How far a body centre lies to the right of the chord between the end vertebrae."""
    ends = subject.poses[[subject.levels.index(curve.lower_end), subject.levels.index(curve.upper_end)], :3, 3]
    centre = subject.poses[subject.levels.index(level), :3, 3]
    return centre[0] - np.interp(centre[2], ends[:, 2], ends[:, 0])


def test_cobb_of_100_sampled_curve_sets_is_the_requested_one():
    errors = []
    for seed in range(100):
        subject = sample_subject(seed, curves="enriched", posture=("supine", "standing")[seed % 2])
        errors += [ruler_cobb_deg(subject, curve) - curve.cobb_deg for curve in subject.curves]
    assert len(errors) > 105  # some are double curves
    assert np.abs(errors).max() < 0.01


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("posture", ["supine", "standing"])
def test_cobb_apex_and_rotation_of_each_pattern(name, posture):
    subject = sample_subject(5, curves=PATTERNS[name], posture=posture)
    for curve in PATTERNS[name]:
        assert ruler_cobb_deg(subject, curve) == pytest.approx(curve.cobb_deg, abs=0.01)
    largest = max(PATTERNS[name], key=lambda curve: curve.cobb_deg)
    assert subject.angles["cobb_deg"] == pytest.approx(largest.cobb_deg, abs=0.01)
    assert bulge_mm(subject, largest, subject.apex) * largest.direction > 5
    assert subject.angles["apical_rotation_deg"] == pytest.approx(largest.rotation_ratio * largest.cobb_deg, rel=0.1)


def test_body_faces_the_convex_side():
    for curve in (THORACIC, THORACIC.mirrored()):
        subject = sample_subject(3, curves=(curve,))
        anterior_axis = subject.poses[subject.levels.index(subject.apex), :3, 1]
        assert np.sign(anterior_axis[0]) == curve.direction


@settings(max_examples=25, deadline=None)
@given(
    cobb=st.floats(3, 60),
    upper=st.sampled_from(["T3", "T4", "T6", "T9"]),
    span=st.integers(5, 8),
    convex=st.sampled_from(["right", "left"]),
    seed=st.integers(0, 10_000),
)
def test_any_single_curve_is_realised(cobb, upper, span, convex, seed):
    curve = ScoliosisCurve(cobb, upper, VERTEBRAE[VERTEBRAE.index(upper) + span], convex)
    try:
        subject = sample_subject(seed, curves=(curve,), variants=False)
    except InputError as refused:  # rare: a large curve down to L5 in a spine with thin discs
        assert cobb > 50 and "would wedge" in str(refused)
        return
    assert ruler_cobb_deg(subject, curve) == pytest.approx(cobb, abs=0.05)
    assert bulge_mm(subject, curve, subject.apex) * curve.direction > 0
    assert abs(subject.poses[subject.levels.index("C7"), 0, 3]) <= 24.1  # balanced: three SD of the trunk shift


@settings(max_examples=15, deadline=None)
@given(upper_cobb=st.floats(15, 60), ratio=st.floats(0.5, 1.0), seed=st.integers(0, 10_000))
def test_both_angles_of_a_double_curve_are_realised(upper_cobb, ratio, seed):
    curves = (
        ScoliosisCurve(upper_cobb, "T5", "T11", "right"),
        ScoliosisCurve(ratio * upper_cobb, "T11", "L4", "left"),
    )
    subject = sample_subject(seed, curves=curves)
    measured = [ruler_cobb_deg(subject, curve) for curve in curves]
    np.testing.assert_allclose(measured, [curve.cobb_deg for curve in curves], atol=0.05)


def test_a_curve_that_no_vertebra_could_follow_is_refused():
    with pytest.raises(InputError, match="would wedge L5 by"):
        sample_subject(1_000_001_238, curves=(ScoliosisCurve(67.0, "T12", "L5", "right"),))


def test_sampled_wedges_stay_plausible():
    wedges = [np.abs(sample_subject(seed, curves="enriched").dims["coronal_wedge_deg"]).max() for seed in range(300)]
    assert max(wedges) < 20


def test_endplate_cobb_is_near_but_not_the_curve_cobb():
    subjects = [sample_subject(seed, curves=(THORACIC,)) for seed in range(20)]
    ratio = np.array([s.angles["cobb_endplate_deg"] / s.angles["cobb_deg"] for s in subjects])
    assert np.all((ratio > 0.85) & (ratio < 1.12))
    assert np.abs(ratio - 1).max() > 1e-3


def test_tilt_pattern_steps_by_the_cobb_angle_between_end_vertebrae():
    arc = np.linspace(600, 20, len(VERTEBRAE))
    curves = check_curves((THORACIC, LUMBAR), VERTEBRAE)
    pattern = TiltPattern.from_curves(curves, VERTEBRAE, arc)
    tilts = pattern.tilts_deg(arc, 7.0, np.array([30.0, 40.0]))
    at = dict(zip(VERTEBRAE, tilts, strict=True))
    assert at["L4"] == pytest.approx(7.0)
    assert at["T12"] - at["L4"] == pytest.approx(30.0)  # convex left: leans right going up
    assert at["T5"] - at["T12"] == pytest.approx(-40.0)
    assert at["C7"] == pytest.approx(0.0)
    assert np.all(tilts[: VERTEBRAE.index("C7")] == 0)


def test_bodies_take_62_percent_of_a_thoracic_curve():
    arc = np.linspace(600, 20, len(VERTEBRAE))
    body_mm = np.full(len(VERTEBRAE), 20.0)
    curve = ScoliosisCurve(50.0, "T4", "T11", "right")
    wide = coronal_wedges_deg((curve,), VERTEBRAE, arc, body_mm, np.full(len(VERTEBRAE), 90.0))
    inside = slice(VERTEBRAE.index("T4"), VERTEBRAE.index("T11") + 1)
    assert wide[inside].sum() == pytest.approx(0.62 * 50, rel=0.05)
    assert wide[VERTEBRAE.index("T8")] > 3  # taller on the convex side
    tight = coronal_wedges_deg((curve,), VERTEBRAE, arc, body_mm, np.full(len(VERTEBRAE), 0.1))
    assert tight[inside].sum() > 0.9 * 50  # what discs cannot take, bodies do


def test_sampled_mix_has_the_stated_severity_shares():
    rng = np.random.default_rng(0)
    largest = np.array([max(c.cobb_deg for c in sample_curves(rng, "enriched", VERTEBRAE)) for _ in range(3000)])
    shares = np.histogram(largest, bins=[0, 10, 20, 30, 45, 71])[0] / len(largest)
    np.testing.assert_allclose(shares, [0.60, 0.20, 0.10, 0.07, 0.03], atol=0.03)
    natural = [max(c.cobb_deg for c in sample_curves(rng, "natural", VERTEBRAE)) for _ in range(2000)]
    assert np.mean(np.array(natural) < 10) == pytest.approx(0.915, abs=0.02)


def test_standing_curves_are_supine_ones_enlarged():
    supine = sample_subject(8, curves="enriched")
    standing = sample_subject(8, curves="enriched", posture="standing")
    for lying, upright in zip(supine.curves, standing.curves, strict=True):
        assert upright.cobb_deg == pytest.approx(lying.cobb_deg / 0.82)
        assert (upright.upper_end, upright.convex) == (lying.upper_end, lying.convex)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"cobb_deg": -5.0}, "above 0 and at most 90"),
        ({"cobb_deg": float("nan")}, "above 0 and at most 90"),
        ({"cobb_deg": 120.0}, "above 0 and at most 90"),
        ({"convex": "up"}, "'right', 'left'"),
        ({"rotation_ratio": -0.1}, "0 to 1"),
    ],
)
def test_a_bad_curve_is_refused(fields, said):
    good = {"cobb_deg": 30.0, "upper_end": "T5", "lower_end": "T12", "convex": "right", "rotation_ratio": 0.3}
    with pytest.raises(InputError, match=said):
        ScoliosisCurve(**(good | fields))


@pytest.mark.parametrize(
    ("curves", "said"),
    [
        ((ScoliosisCurve(30, "T5", "Q9", "right"),), "Expected one of: T1, T2"),
        ((ScoliosisCurve(30, "C3", "T5", "right"),), "unknown end vertebra 'C3'"),
        ((ScoliosisCurve(30, "T12", "T5", "right"),), "at least 2 levels below"),
        ((THORACIC, ScoliosisCurve(20, "T10", "L3", "left")), "overlap"),
        ((THORACIC, ScoliosisCurve(20, "T12", "L4", "right")), "both convex right"),
        ((30.0,), "expected ScoliosisCurve"),
        (THORACIC, "a tuple of ScoliosisCurve"),
    ],
)
def test_curves_that_do_not_fit_are_refused(curves, said):
    with pytest.raises(InputError, match=said):
        sample_subject(0, curves=curves)


def test_an_impossible_pair_is_refused_and_named():
    squeezed = (ScoliosisCurve(80, "T5", "T12", "right"), ScoliosisCurve(0.2, "T12", "L2", "left"))
    with pytest.raises(InputError, match=r"T12-L2 0\.2 deg left"):
        sample_subject(0, curves=squeezed)


def test_an_unknown_mix_is_refused():
    with pytest.raises(InputError, match="'natural', 'enriched'"):
        sample_subject(0, curves="many")
