"""Alignment of MRI projections to DXA images: known motions, sign conventions, failure flags, curves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from spinelib.align import align_cohort, align_images, align_masks, align_pair
from spinelib.correlate import Level, edge_field, masked_ncc, scan
from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, PlanarTransform, Projection, move_projection
from spinelib.spine import Curves

DXA_GRID = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (150.0, 0.0))
MRI_GRID = PlanarGrid.centred("coronal", (360, 224), (3.0, 2.232), (60.0, 0.0))


def _bump(distance_mm, width_mm, edge_mm=2.0):
    """1 inside `width_mm` of a line, falling to 0 over about `edge_mm`."""
    return 1 / (1 + np.exp((np.abs(distance_mm) - width_mm) / edge_mm))


def _ellipse(right, superior, centre, radii, depth):
    """Path length through an ellipsoid."""
    inside = 1 - ((right - centre[0]) / radii[0]) ** 2 - ((superior - centre[1]) / radii[1]) ** 2
    return depth * np.sqrt(np.maximum(inside, 0))


class Torso:
    """A torso drawn as path lengths (mm) in the coronal plane, different for every seed."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.width = rng.uniform(130, 190)
        self.depth = rng.uniform(180, 300)
        self.fat = rng.uniform(8, 40)
        self.wave = rng.uniform(-15, 15, 2)
        self.waist = rng.uniform(0.05, 0.25)
        self.rib_drop = rng.uniform(40, 70)
        self.organs = rng.uniform(-1, 1, (12, 5))

    def spine_right_mm(self, superior):
        phase = (superior + 30) / 500 * np.pi
        return self.wave[0] * np.sin(2 * phase) + self.wave[1] * np.sin(4 * phase)

    def spine_half_width_mm(self, superior):
        return np.interp(superior, [0, 420, 520], [24, 13, 9]) * (1 + 0.12 * np.cos(2 * np.pi * superior / 33))

    def mask(self, right, superior):
        inside = np.abs(right - self.spine_right_mm(superior)) <= self.spine_half_width_mm(superior)
        return inside & (superior > 0) & (superior < 480)

    def bone(self, right, superior):
        spine = self.spine_half_width_mm(superior)
        segment = 0.8 + 0.2 * np.cos(2 * np.pi * superior / 33)
        areal = 0.9 * segment * _bump(right - self.spine_right_mm(superior), spine) * _bump(superior - 260, 290, 4)
        for level in range(12):
            top = 440 - 24 * level
            across = np.abs(right) / (self.width * 0.85)
            line = top - self.rib_drop * across**2
            areal = areal + 0.3 * _bump(superior - line, 4) * _bump(right, self.width * 0.85)
        for side in (-1, 1):
            ring = ((right - side * 75) / 70) ** 2 + ((superior + 25) / 75) ** 2
            areal = areal + 0.8 * np.exp(-(((ring - 1) / 0.25) ** 2))
            areal = areal + 1.2 * _bump(right - side * (95 + 0.05 * (superior + 250)), 14) * _bump(superior + 400, 300)
        return areal + 1.5 * np.exp(-((((right / 75) ** 2 + ((superior - 640) / 110) ** 2 - 1) / 0.2) ** 2))

    def tissue(self, right, superior):
        """Body thickness, fat layer and lung path, mm."""
        width = self.width * (1 - self.waist * np.exp(-(((superior - 120) / 90) ** 2)))
        trunk = np.sqrt(np.maximum(1 - (right / width) ** 4, 0)) * _bump(superior - 120, 400, 12)
        legs = sum(np.sqrt(np.maximum(1 - ((right - s * width / 2) / (width / 2)) ** 2, 0)) for s in (-1, 1))
        head = _ellipse(right, superior, (0, 640), (80, 120), 0.8)
        body = self.depth * np.maximum.reduce([trunk, 0.6 * legs * (superior < -200), head])
        inner = np.maximum(body - 2 * self.fat * (body > 0), 0)
        lung = sum(_ellipse(right, superior, (s * 70, 320), (55, 130), 120) for s in (-1, 1))
        return body, body - inner, np.minimum(lung, inner)

    def soft(self, right, superior):
        """Organs that MRI shows and DXA hardly does."""
        total = 0.0
        for a, b, c, d, e in self.organs:
            total = total + e * _ellipse(right, superior, (90 * a, 100 + 150 * b), (50 + 25 * c, 50 + 25 * d), 60)
        return total

    def dxa(self, right, superior):
        body, fat, lung = self.tissue(right, superior)
        return np.stack([self.bone(right, superior), (0.022 * body - 0.002 * fat - 0.02 * lung)])

    def mri(self, right, superior):
        body, fat, lung = self.tissue(right, superior)
        marrow = 12 * self.bone(right, superior)
        water = body - fat - lung - marrow + self.soft(right, superior)
        fatty = fat + 0.6 * marrow
        coil = 1 + 0.25 * np.cos(right / 180) + 0.15 * np.sin(superior / 200)
        return np.stack([water * coil, fatty * coil, (water + fatty) * coil]) / 100


def draw_pair(seed, motion, noise=0.03, fixed=DXA_GRID, moving=MRI_GRID):
    """DXA and MRI (with masks) of one torso; `motion` carries MRI mm to DXA mm."""
    rng, torso = np.random.default_rng([seed, 1]), Torso(seed)
    right, superior = np.meshgrid(fixed.lateral_mm(), fixed.superior_mm())
    carried = motion.apply(*np.meshgrid(moving.lateral_mm(), moving.superior_mm()))
    dxa = _noisy(torso.dxa(right, superior), noise, rng)
    mri = _noisy(torso.mri(*carried), noise, rng)
    masks = [m.astype(np.float32)[None] for m in (torso.mask(right, superior), torso.mask(*carried))]
    return (
        Projection(("bone", "tissue"), dxa, fixed),
        Projection(("water", "fat", "in_phase"), mri, moving),
        Projection(("spine",), masks[0], fixed),
        Projection(("spine",), masks[1], moving),
    )


def random_motion(seed, rotation=8.0, shift=60.0, centre=MRI_GRID.centre_mm):
    rng = np.random.default_rng([seed, 2])
    turn, right, superior = rng.uniform(-1, 1, 3) * [rotation, shift, shift]
    return PlanarTransform(turn, right, superior, centre[1], centre[0])


def _noisy(values, noise, rng):
    scale = values.std(axis=(1, 2), keepdims=True)
    return (values + noise * scale * rng.standard_normal(values.shape)).astype(np.float32)


def _difference(found, true):
    """Rotation error in degrees and shift error in mm, both about the MRI's middle."""
    found = found.about(true.centre_right_mm, true.centre_superior_mm)
    shift = np.hypot(found.shift_right_mm - true.shift_right_mm, found.shift_superior_mm - true.shift_superior_mm)
    return abs(found.rotation_deg - true.rotation_deg), shift


def _turned_about_middle(**motion):
    return PlanarTransform(centre_right_mm=0.0, centre_superior_mm=MRI_GRID.centre_mm[0], **motion)


def test_known_motions_are_recovered_by_both_stages():
    errors = []
    for seed in range(5):
        true = random_motion(seed)
        found = align_pair(*draw_pair(seed, true))
        assert not found.failed, found.reason
        errors.append([*_difference(found.stage1, true), *_difference(found.transform, true)])
    assert np.median(errors, axis=0) == pytest.approx(0, abs=0.7)
    assert np.median(np.array(errors)[:, [0, 2]], axis=0) == pytest.approx(0, abs=0.3)
    assert np.max(errors) < 1.0


def test_identity():
    found = align_images(*draw_pair(1, PlanarTransform())[:2])
    turn, shift = _difference(found.transform, _turned_about_middle())
    assert turn < 0.1
    assert shift < 0.7
    assert found.transform.centre_superior_mm == pytest.approx(MRI_GRID.centre_mm[0])


def test_pure_shift_of_one_contrast_is_exact():
    dxa, torso = draw_pair(2, PlanarTransform())[0], Torso(2)
    true = _turned_about_middle(shift_right_mm=23.37, shift_superior_mm=-41.91)
    carried = true.apply(*np.meshgrid(MRI_GRID.lateral_mm(), MRI_GRID.superior_mm()))
    same = Projection(dxa.channels, torso.dxa(*carried).astype(np.float32), MRI_GRID)
    turn, shift = _difference(align_images(dxa, same).transform, true)
    assert turn < 0.05
    assert shift < 0.1


def test_inverted_contrast_changes_nothing():
    dxa, mri, *_ = draw_pair(3, random_motion(3), noise=0.0)
    negative = Projection(mri.channels, -mri.values, mri.grid)
    turn, shift = _difference(align_images(dxa, negative).transform, align_images(dxa, mri).transform)
    assert turn < 1e-3
    assert shift < 1e-2


def test_sign_conventions_with_drawn_points():
    """A dot moved to the patient's right and up, and one turned towards the patient's right."""
    grid = PlanarGrid.centred("coronal", (200, 200), (2.0, 2.0), (0.0, 0.0))

    def dots(*places):
        image = np.zeros(grid.shape, np.float32)
        for right, superior in places:
            row, col = np.round(grid.mm_to_pixel(superior, right)).astype(int)
            image[row, col] = 1
        return Projection(("dots",), gaussian_filter(image, 3)[None], grid)

    moved = align_images(dots((21, 31), (1, -89)), dots((1, 1), (-19, -119))).transform
    assert (moved.shift_right_mm, moved.shift_superior_mm) == pytest.approx((20, 30), abs=1.0)
    head_to_right = 150 * np.tan(np.radians(5.0))
    turned = align_images(dots((head_to_right, 150), (-head_to_right, -150)), dots((0, 150), (0, -150))).transform
    assert turned.rotation_deg == pytest.approx(5.0, abs=0.3)


def test_mirrored_pair_has_mirrored_transform():
    pair = draw_pair(4, random_motion(4))
    plain = align_pair(*pair).transform
    mirrored = align_pair(*(image.mirrored() for image in pair)).transform
    expected = PlanarTransform(
        -plain.rotation_deg,
        -plain.shift_right_mm,
        plain.shift_superior_mm,
        -plain.centre_right_mm,
        plain.centre_superior_mm,
    )
    turn, shift = _difference(mirrored, expected)
    assert turn < 0.05
    assert shift < 0.15


def test_same_input_same_result():
    pair = draw_pair(5, random_motion(5))
    assert align_pair(*pair) == align_pair(*pair)


def test_masks_mend_a_poor_start_and_ignore_what_lies_outside_the_view():
    grid = PlanarGrid.centred("coronal", (140, 180), (3.0, 2.232), (255.0, 0.0))
    true = random_motion(6, rotation=5, shift=30, centre=grid.centre_mm)
    _, _, dxa_mask, mri_mask = draw_pair(6, true, moving=grid)
    assert mri_mask.values[0, -1].any(), "the view must cut the spine"
    start = PlanarTransform(
        true.rotation_deg + 1.3, true.shift_right_mm - 5, true.shift_superior_mm + 6, *grid.centre_mm[::-1]
    )
    found = align_masks(dxa_mask, mri_mask, start)
    turn, shift = _difference(found.transform, true)
    assert not found.failed, found.reason
    assert turn < 0.3
    assert shift < 1.0
    assert found.residual_mm < 1.0
    assert found.stage1 == start


def test_a_mask_that_stops_short_shifts_nothing():
    true = random_motion(6)
    dxa, mri, dxa_mask, mri_mask = draw_pair(6, true)
    short = dxa_mask.values.copy()
    last = np.flatnonzero(short[0].any(axis=1))[-1]
    short[0, last - 3 :] = 0
    found = align_pair(dxa, mri, Projection(("spine",), short, dxa_mask.grid), mri_mask)
    assert not found.failed, found.reason
    assert _difference(found.transform, true)[1] < 1.0


def _unrelated(image):
    noise = np.random.default_rng(0).standard_normal(image.values.shape)
    return Projection(image.channels, gaussian_filter(noise, (0, 4, 4)).astype(np.float32), image.grid)


def test_unrelated_images_are_flagged():
    dxa, mri, *_ = draw_pair(7, PlanarTransform())
    found = align_images(dxa, _unrelated(mri))
    assert found.failed
    assert "score" in found.reason


@pytest.mark.parametrize(
    "motion", [{"shift_right_mm": 110.0}, {"shift_superior_mm": -100.0}, {"rotation_deg": 13.0}], ids=str
)
def test_motion_out_of_range_is_flagged(motion):
    found = align_images(*draw_pair(8, _turned_about_middle(**motion))[:2])
    assert found.failed
    assert "range" in found.reason


def test_range_is_the_callers():
    true = _turned_about_middle(rotation_deg=13.0, shift_right_mm=95.0)
    found = align_images(*draw_pair(8, true)[:2], max_rotation_deg=16, max_shift_mm=110)
    assert not found.failed, found.reason
    assert max(_difference(found.transform, true)) < 1.0


@pytest.mark.parametrize(("which", "name"), [(2, "fixed"), (3, "moving")])
def test_empty_mask_is_flagged(which, name):
    pair = list(draw_pair(9, PlanarTransform()))
    pair[which] = Projection(("spine",), np.zeros_like(pair[which].values), pair[which].grid)
    found = align_pair(*pair)
    assert found.failed
    assert found.reason == f"the {name} mask is empty"


def test_constant_image_is_flagged():
    dxa, mri, *_ = draw_pair(9, PlanarTransform())
    assert align_images(dxa, Projection(("flat",), np.ones((1, *mri.grid.shape), np.float32), mri.grid)).failed


def test_another_spine_mask_is_flagged():
    _, _, dxa_mask, mri_mask = draw_pair(10, PlanarTransform())
    bent = mri_mask.values[0].copy()
    for row in range(len(bent)):
        bent[row] = np.roll(bent[row], int(15 * np.sin(row / 25)))
    found = align_masks(dxa_mask, Projection(("spine",), bent[None], mri_mask.grid), PlanarTransform())
    assert found.failed


def test_no_masks_means_the_image_stage_alone():
    dxa, mri, mask, _ = draw_pair(11, random_motion(11))
    assert align_pair(dxa, mri, mask, None) == align_images(dxa, mri)


def test_cohort_quarantines_and_goes_on():
    good = draw_pair(12, random_motion(12))

    def broken():
        raise OSError("no such scan")

    flat = (good[0], _unrelated(good[1]), None, None)
    table = align_cohort([("a", lambda: good), ("b", broken), ("c", lambda: flat)], n_jobs=1)
    assert list(table["key"]) == ["a", "b", "c"]
    assert list(table["failed"]) == [False, True, True]
    assert table["reason"][0] == ""
    assert table["reason"][1] == "OSError: no such scan"
    assert table["rotation_deg"][0] == align_pair(*good).transform.rotation_deg


def test_bad_input_is_refused():
    dxa, mri, mask, _ = draw_pair(13, PlanarTransform())
    side = Projection(mri.channels, mri.values, PlanarGrid("sagittal", *_layout(mri.grid)))
    with pytest.raises(InputError, match="sagittal"):
        align_images(dxa, side)
    with pytest.raises(InputError, match="no channel 'water'.*bone, tissue"):
        align_images(dxa, mri, fixed_channels=("water",))
    with pytest.raises(InputError, match="at least one channel"):
        align_images(dxa, mri, moving_channels=())
    with pytest.raises(InputError, match="range"):
        align_images(dxa, mri, max_rotation_deg=0)
    holes = mri.values.copy()
    holes[0, 3, 3] = np.nan
    with pytest.raises(InputError, match="finite values.*water"):
        align_images(dxa, Projection(mri.channels, holes, mri.grid))
    with pytest.raises(InputError, match="sagittal"):
        align_masks(mask, Projection(("spine",), mri.values[:1], side.grid), PlanarTransform())
    tiny = PlanarGrid("coronal", (4, 4), (3.0, 3.0), (0.0, 0.0))
    with pytest.raises(InputError, match="16 x 16"):
        align_images(dxa, Projection(("a",), np.ones((1, 4, 4), np.float32), tiny))


def _layout(grid):
    return grid.shape, grid.spacing_mm, grid.origin_mm


def _direct_ncc(fixed, fixed_valid, moving, moving_valid, row, col):
    """Correlation over the common valid pixels at one lag, by its definition."""
    rows = range(max(0, row), min(fixed.shape[1], moving.shape[1] + row))
    cols = range(max(0, col), min(fixed.shape[2], moving.shape[2] + col))
    a = fixed[:, rows.start : rows.stop, cols.start : cols.stop]
    b = moving[:, rows.start - row : rows.stop - row, cols.start - col : cols.stop - col]
    w = (
        fixed_valid[rows.start : rows.stop, cols.start : cols.stop]
        * (moving_valid[rows.start - row : rows.stop - row, cols.start - col : cols.stop - col])
    )
    a, b = (v[:, w > 0] - v[:, w > 0].mean(axis=1, keepdims=True) for v in (a, b))
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def test_fourier_scores_equal_the_definition():
    rng = np.random.default_rng(0)
    fixed, moving = rng.standard_normal((2, 23, 19)), rng.standard_normal((2, 17, 26))
    valid = [(rng.random(v.shape[1:]) > 0.3).astype(float) for v in (fixed, moving)]
    lags = range(-5, 8), range(-9, 3)
    tensors = [torch.from_numpy(v) for v in (fixed, valid[0], moving[None], valid[1][None])]
    scores = masked_ncc(*tensors, *lags, min_overlap=0.0)[0].numpy()
    direct = [[_direct_ncc(fixed, valid[0], moving, valid[1], r, c) for c in lags[1]] for r in lags[0]]
    assert scores == pytest.approx(np.array(direct), abs=1e-9)


def test_margin_is_small_where_the_picture_repeats():
    grid = PlanarGrid.centred("coronal", (250, 120), (2.0, 2.0), (0.0, 0.0))
    right, superior = np.meshgrid(grid.lateral_mm(), grid.superior_mm())
    once = np.exp(-(right**2 + superior**2) / 200)
    ladder = np.exp(-(right**2) / 200) * np.cos(superior / 40 * 2 * np.pi) * np.exp(-((superior / 180) ** 8))
    level, start = Level(4.0, 4.0, 2.0, 2.0, 60.0), PlanarTransform()
    margins = []
    for image in (once, ladder):
        field = edge_field(Projection(("a",), image[None].astype(np.float32), grid), 4.0)
        margins.append(scan(field, field, start, level).margin())
    assert margins[0] > 0.3
    assert margins[1] < 0.15


def _curves(k=209):
    heights = np.linspace(430, 5, k)
    centre = 18 * np.sin(heights / 70)
    sagittal = 25 * np.cos(heights / 110)
    return Curves(
        heights,
        np.stack([centre + 20, centre, centre - 20]),
        np.stack([sagittal + 16, sagittal, sagittal - 16]),
    )


@settings(max_examples=40, deadline=None)
@given(st.floats(-10, 10), st.floats(-80, 80), st.floats(-80, 80), st.floats(-200, 400))
def test_curves_come_back_through_the_inverse(turn, right, superior, centre):
    curves, motion = _curves(), PlanarTransform(turn, right, superior, 10.0, centre)
    back = curves.moved(motion).moved(motion.inverse())
    assert back.heights_mm == pytest.approx(curves.heights_mm, abs=1e-8)
    assert back.coronal_mm[1] == pytest.approx(curves.coronal_mm[1], abs=1e-8)
    assert back.sagittal_mm == pytest.approx(curves.sagittal_mm, abs=1e-8)
    assert back.coronal_mm == pytest.approx(curves.coronal_mm, abs=0.15)


def test_carried_curves_follow_the_carried_picture():
    """The edges read from the moved mask equal the moved edges."""
    true = _turned_about_middle(rotation_deg=6.0, shift_right_mm=14.0, shift_superior_mm=-22.0)
    grid = PlanarGrid.centred("coronal", (700, 400), (1.0, 1.0), (220.0, 0.0))
    curves = _curves()
    right, superior = np.meshgrid(grid.lateral_mm(), grid.superior_mm())
    at_rows = curves.at(grid.superior_mm()).coronal_mm
    mask = (right <= at_rows[0][:, None]) & (right >= at_rows[2][:, None])
    mask &= (superior < curves.heights_mm[0]) & (superior > curves.heights_mm[-1])
    moved = move_projection(Projection(("spine",), mask[None].astype(np.float32), grid), true, grid).values[0] > 0.5
    carried = curves.moved(true).at(grid.superior_mm())
    rows = np.flatnonzero((grid.superior_mm() < 380) & (grid.superior_mm() > 30))
    lateral = grid.lateral_mm()
    seen_right = [lateral[moved[row]].max() for row in rows]
    seen_left = [lateral[moved[row]].min() for row in rows]
    assert seen_right == pytest.approx(carried.coronal_mm[0][rows], abs=1.6)
    assert seen_left == pytest.approx(carried.coronal_mm[2][rows], abs=1.6)


def test_curve_that_would_fold_is_refused():
    heights = np.linspace(100, 0, 20)
    steep = np.linspace(0, 3000, 20)
    curves = Curves(heights, np.stack([steep + 9, steep, steep - 9]), np.zeros((3, 20)))
    with pytest.raises(InputError, match="runs upwards"):
        curves.moved(PlanarTransform(-8.0))
