"""Angles of curves whose angles are known on paper."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinelib import angles
from spinelib.errors import InputError
from spinelib.spine import Curves

LENGTH = 470.0
HEIGHTS = np.linspace(LENGTH, 0.0, 209)
DEPTH = LENGTH - HEIGHTS


def curves(right=None, anterior=None, heights=HEIGHTS):
    right = np.zeros_like(heights) if right is None else right
    anterior = np.zeros_like(heights) if anterior is None else anterior
    return Curves(
        heights,
        np.stack([right + 20, right, right - 20]),
        np.stack([anterior + 15, anterior, anterior - 15]),
    )


def arc(cobb_deg, height=LENGTH):
    """Circle arc bulging to +; its tangents at the ends enclose the Cobb angle."""
    half = np.radians(cobb_deg / 2)
    radius = height / 2 / np.sin(half)
    middle = np.linspace(height / 2, -height / 2, 209)
    return np.sqrt(radius**2 - middle**2) - radius * np.cos(half)


def sine(cobb_deg, half_waves):
    """Sine with `half_waves` bends of equal Cobb angle; the upper one bulges to +."""
    k = half_waves * np.pi / LENGTH
    return np.tan(np.radians(cobb_deg / 2)) / k * np.sin(k * DEPTH)


def test_straight_column_has_no_angles():
    straight = curves(0.1 * HEIGHTS, -0.2 * HEIGHTS)
    assert angles.cobb_angles(straight) == []
    found = angles.all_angles(straight)
    orientation = found.pop("pmc_orientation_deg")
    assert -90 < orientation <= 90
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-4)


@pytest.mark.parametrize("cobb", [1.8, 4.5, 9.0, 17.9, 34.9, 64.3])
@pytest.mark.parametrize(
    ("view", "shape", "tolerance"),
    # A coronal curve cut off in full bend is straightened towards its ends, see the module's text.
    [("coronal", arc, 0.11), ("sagittal", arc, 0.01), ("coronal", lambda cobb: sine(cobb, 1), 0.02)],
)
def test_single_bend(cobb, view, shape, tolerance):
    spine = curves(shape(cobb)) if view == "coronal" else curves(None, shape(cobb))
    found = angles.cobb_angles(spine, view)
    assert len(found) == 1
    assert found[0].angle_deg == pytest.approx(cobb, rel=tolerance)
    assert found[0].apex_height_mm == pytest.approx(LENGTH / 2, abs=1.5)
    assert found[0].convex == ("right" if view == "coronal" else "anterior")


@pytest.mark.parametrize("cobb", [3.6, 9.0, 17.9, 34.9, 64.3])
def test_double_bend_has_two_angles_with_opposite_sides(cobb):
    upper, lower = sorted(angles.cobb_angles(curves(sine(cobb, 2))), key=lambda b: -b.apex_height_mm)
    assert (upper.angle_deg, lower.angle_deg) == pytest.approx((cobb, cobb), rel=0.03)
    assert (upper.convex, lower.convex) == ("right", "left")
    assert upper.lower_height_mm == lower.upper_height_mm == pytest.approx(LENGTH / 2, abs=1.5)
    assert (upper.apex_height_mm, lower.apex_height_mm) == pytest.approx((0.75 * LENGTH, 0.25 * LENGTH), abs=2)


def test_unequal_bends_come_largest_first():
    lean = np.where(DEPTH < 190, -2.5 + 7.5 * np.cos(np.pi * DEPTH / 190), 5 - 15 * np.cos(np.pi * (DEPTH - 190) / 280))
    slope = np.tan(np.radians(lean))
    right = np.concatenate([[0.0], np.cumsum(np.diff(DEPTH) * (slope[1:] + slope[:-1]) / 2)])
    large, small = angles.cobb_angles(curves(right))
    assert (large.angle_deg, small.angle_deg) == pytest.approx((30, 15), abs=0.7)
    assert large.upper_height_mm == pytest.approx(280, abs=5)
    assert (large.convex, small.convex) == ("left", "right")


def test_modified_ferguson_of_arc_and_sine():
    assert angles.modified_ferguson_deg(curves(arc(40))) == pytest.approx(20, rel=0.02)
    expected = 2 * np.degrees(np.arctan(2 / np.pi * np.tan(np.radians(20))))
    assert angles.modified_ferguson_deg(curves(sine(40, 1))) == pytest.approx(expected, rel=0.02)


def test_kyphosis_and_lordosis_are_positive_for_an_ordinary_spine():
    # lean (deg, read upwards) : forwards at T4, backwards at T12-L1, forwards at the sacrum
    share = DEPTH / LENGTH
    thoracic = -2 + 20 * np.cos(np.pi * (share - 0.1342) / 0.4864)
    lean = np.where(share < 0.6206, thoracic, 3 - 25 * np.cos(np.pi * (share - 0.6206) / 0.3794))
    slope = np.tan(np.radians(lean))
    anterior = -np.concatenate([[0.0], np.cumsum(np.diff(DEPTH) * (slope[1:] + slope[:-1]) / 2)])
    heights = {"T4": LENGTH * 0.8658, "T12": LENGTH * 0.3862, "L1": LENGTH * 0.3726, "S1": 0.0}
    spine = curves(None, anterior)
    assert angles.thoracic_kyphosis_deg(spine, heights) == pytest.approx(40, abs=1)
    assert angles.lumbar_lordosis_deg(spine, heights) == pytest.approx(50, abs=3)
    # The thorax of a kyphotic spine bulges backwards.
    assert {b.convex for b in angles.cobb_angles(spine, "sagittal")} == {"posterior", "anterior"}
    assert angles.cobb_angles(spine, "sagittal")[1].convex == "posterior"
    # Placed by shares of arc length instead of known heights: the plates move by a few mm only.
    assert angles.thoracic_kyphosis_deg(spine) == pytest.approx(40, abs=2)
    assert angles.lumbar_lordosis_deg(spine) == pytest.approx(50, abs=3)


@pytest.mark.parametrize("azimuth", [-60.0, -20.0, 0.0, 30.0, 75.0, 90.0])
def test_plane_of_a_planar_curve(azimuth):
    lateral = sine(40, 1)
    spine = curves(np.cos(np.radians(azimuth)) * lateral, np.sin(np.radians(azimuth)) * lateral)
    found, cobb = angles.plane_of_maximum_curvature(spine)
    assert found == pytest.approx(azimuth, abs=1.0)
    assert cobb == pytest.approx(40, abs=1.0)
    flipped, same = angles.plane_of_maximum_curvature(spine.mirrored())
    assert flipped == pytest.approx(azimuth if azimuth == 90 else -azimuth, abs=1.0)
    assert same == pytest.approx(cobb, abs=1e-6)


def test_plane_of_a_helix():
    # Slopes run along a quarter circle about azimuth 55: the widest range lies along its chord, at 55 - 90.
    turn = np.radians(55) + np.linspace(-np.pi / 4, np.pi / 4, 209)
    pitch, steepness = np.pi / 2 / LENGTH, np.tan(np.radians(25))
    right, anterior = -steepness / pitch * np.array([np.sin(turn), -np.cos(turn)])
    found, cobb = angles.plane_of_maximum_curvature(curves(right, anterior))
    assert found == pytest.approx(-35, abs=2.5)
    assert cobb == pytest.approx(2 * np.degrees(np.arctan(steepness * np.sin(np.pi / 4))), abs=2)


def test_apical_translation_is_measured_from_the_lower_end():
    lateral = sine(30, 1)
    assert angles.apical_translation_mm(curves(lateral + 50)) == pytest.approx(lateral.max(), abs=0.3)
    assert angles.apical_translation_mm(curves(50 - lateral)) == pytest.approx(-lateral.max(), abs=0.3)


bends = st.tuples(st.floats(5, 60), st.sampled_from([1.0, 1.5, 2.0, 2.5]), st.floats(5, 40))


@settings(max_examples=20, deadline=None)
@given(bends, st.floats(-200, 200), st.floats(-200, 200), st.floats(0.3, 3.0))
def test_shift_and_scale_leave_angles_and_mirror_flips_the_side(bend, right, superior, scale):
    cobb, waves, sagittal = bend
    spine = curves(sine(cobb, waves) * (1 - 0.3 * DEPTH / LENGTH), -sine(sagittal, 1.3))
    known = angles.all_angles(spine)
    moved = angles.all_angles(spine.shifted(right, 13.0, superior))
    scaled = angles.all_angles(Curves(scale * spine.heights_mm, scale * spine.coronal_mm, scale * spine.sagittal_mm))
    mirrored = angles.all_angles(spine.mirrored())
    for name, value in known.items():
        expected = scale * value if name.endswith("_mm") else value
        sign = -1 if name in ("cobb_signed_deg", "apical_translation_mm", "pmc_orientation_deg") else 1
        assert moved[name] == pytest.approx(value, abs=1e-3), name
        assert scaled[name] == pytest.approx(expected, abs=1e-3), name
        assert mirrored[name] == pytest.approx(sign * value, abs=1e-3), name


@pytest.mark.parametrize(("half_waves", "count"), [(1, 1), (2, 2), (3, 3)])
def test_one_millimetre_of_noise_moves_a_cobb_angle_by_a_few_degrees_at_most(half_waves, count):
    rng = np.random.default_rng(11)
    clean = sine(30, half_waves)
    noisy = [angles.cobb_angles(curves(clean + rng.normal(0, 1, 209))) for _ in range(40)]
    largest = np.array([found[0].angle_deg for found in noisy])
    assert abs(largest.mean() - 30) < 1.5
    assert largest.std() < 1.5
    assert sorted(len(found) for found in noisy)[20] == count


def test_waves_of_vertebral_length_are_not_bends():
    wiggle = 0.7 * np.sin(2 * np.pi * DEPTH / 27)
    found = angles.cobb_angles(curves(sine(30, 2) + wiggle, -sine(40, 1.5) + wiggle))
    assert [bend.angle_deg for bend in found] == pytest.approx([30, 30], abs=1.5)
    assert angles.cobb_deg(curves(wiggle)) < 2


def test_noise_alone_stays_far_below_scoliosis():
    rng = np.random.default_rng(12)
    found = [angles.cobb_deg(curves(rng.normal(0, 1, 209))) for _ in range(40)]
    assert max(found) < 5


def test_other_sampling_gives_the_same_angles():
    spine = curves(sine(30, 1.8), -sine(25, 1.5))
    for k in (40, 800):
        found = angles.all_angles(spine.resample(k))
        for name, value in angles.all_angles(spine).items():
            assert found[name] == pytest.approx(value, abs=0.5), name


def test_level_fractions_rise_without_overlap():
    plates = np.array(list(angles.LEVEL_FRACTIONS.values())).ravel()
    assert len(plates) == 34 and plates[0] == 0 and plates[-1] == 1
    assert np.all(np.diff(plates) > 0)


def test_arc_length_of_a_tilted_line():
    spine = curves(0.75 * HEIGHTS)
    assert angles.arc_length_mm(spine)[-1] == pytest.approx(1.25 * LENGTH, rel=1e-6)


def test_unusable_requests_are_refused():
    spine = curves(sine(30, 1))
    with pytest.raises(InputError, match="unknown view"):
        angles.cobb_angles(spine, "ap")
    with pytest.raises(InputError, match="at least 8"):
        angles.cobb_deg(spine.resample(7))
    with pytest.raises(InputError, match="T12"):
        angles.thoracic_kyphosis_deg(spine, {"T4": 400.0})
    with pytest.raises(InputError, match="above the lower"):
        angles.plane_of_maximum_curvature(spine, 10.0, 200.0)
