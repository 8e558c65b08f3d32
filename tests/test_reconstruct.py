"""Solids of known volume, their surfaces and overlaps."""

from math import gamma, pi

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinelib import reconstruct as rc
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.spine import Curves, Spine

HEIGHTS = np.linspace(300.3, 0.3, 151)


def tube(right=0.0, anterior=0.0, half_right=20.0, half_anterior=15.0, heights=HEIGHTS):
    right, anterior, a, b = (np.broadcast_to(v, heights.shape) for v in (right, anterior, half_right, half_anterior))
    return Curves(heights, np.stack([right + a, right, right - a]), np.stack([anterior + b, anterior, anterior - b]))


def bent(seed=0):
    """Scoliotic and kyphotic column with changing width."""
    phase, size = np.random.default_rng(seed).uniform(0.0, 1.0, 2)
    k = 2 * pi / 300
    return tube(
        (5 + 10 * size) * np.sin(k * HEIGHTS + phase),
        12 * np.cos(k * HEIGHTS),
        22 - 0.02 * HEIGHTS,
        17 - 0.015 * HEIGHTS,
    )


def area(half_right, half_anterior, exponent):
    return 4 * half_right * half_anterior * gamma(1 + 1 / exponent) ** 2 / gamma(1 + 2 / exponent)


def mask_volume(curves, model, spacing=1.0):
    grid = rc.joint_grid(curves, spacing_mm=spacing)
    return rc.column_mask(curves, grid, model).sum() * spacing**3


@pytest.mark.parametrize(("model", "exponent"), rc.CROSS_SECTIONS.items())
def test_volume_of_an_upright_cylinder(model, exponent):
    expected = area(20, 15, exponent) * 300
    assert mask_volume(tube(), model) == pytest.approx(expected, rel=0.01)
    mesh = rc.column_mesh(tube(), model, n_around=96)
    assert mesh.volume == pytest.approx(expected, rel=0.005)
    assert np.allclose(mesh.bounds, [[-20, -15, 0.3], [20, 15, 300.3]], atol=1e-4)


def test_superellipse_is_between_ellipse_and_box():
    ellipse, outline = mask_volume(tube(), "ellipse"), mask_volume(tube(), "superellipse")
    assert ellipse < outline < 40 * 30 * 300
    assert outline / ellipse == pytest.approx(area(1, 1, rc.SUPERELLIPSE_EXPONENT) / pi, rel=0.005)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tilt_deg", [10, 30])
def test_orthogonal_sections_keep_the_volume_of_a_tilted_cylinder(axis, tilt_deg):
    # A cylinder of radius 20 and length 200; its horizontal cut is 1/cos wider in the plane of the lean.
    tilt = np.radians(tilt_deg)
    heights = np.linspace(0.5, 0.5 - 200 * np.cos(tilt), 120)
    lean, wide = np.tan(tilt) * heights, 20 / np.cos(tilt)
    leaning = (tube(lean, 0, wide, 20, heights), tube(0, lean, 20, wide, heights))[axis]
    expected = area(20, 20, rc.SUPERELLIPSE_EXPONENT) * 200
    assert mask_volume(leaning, "superellipse") == pytest.approx(expected, rel=0.01)
    mesh = rc.column_mesh(leaning)
    assert mesh.volume == pytest.approx(expected, rel=0.005)
    # The ends are square to the axis, so the cylinder reaches 20 sin(tilt) beyond them.
    assert mesh.bounds[1, 2] == pytest.approx(0.5 + 20 * np.sin(tilt), abs=0.1)


@pytest.mark.parametrize("model", rc.CROSS_SECTIONS)
def test_silhouettes_of_the_solid_are_the_curves(model):
    # Away from the ends, the extent of the solid at one height is the half width it was made from.
    slope = np.array([0.3, -0.4])
    leaning = tube(slope[0] * HEIGHTS, slope[1] * HEIGHTS)
    mesh = rc.column_mesh(leaning, model, n_around=192)
    loop = mesh.section([0, 0, 1], [0, 0, 150.0]).vertices[:, :2] - 150 * slope
    assert np.allclose(loop.max(axis=0), [20, 15], atol=0.1)
    assert np.allclose(loop.min(axis=0), [-20, -15], atol=0.1)


@pytest.mark.parametrize("model", rc.CROSS_SECTIONS)
def test_surface_is_closed_and_encloses_the_mask(model):
    column = bent()
    mesh = rc.column_mesh(column, model)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    assert mesh.vertices.shape == (151 * 48 + 2, 3)
    assert mesh.volume == pytest.approx(mask_volume(column, model), rel=0.02)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(list(rc.CROSS_SECTIONS)), st.integers(-20, 20))
def test_mirror_and_translation_carry_the_solid_along(seed, model, steps):
    column = bent(seed)
    grid = VolumeGrid.from_bounds((-60, -60, -20), (60, 60, 320), 4.0)
    mask = rc.column_mask(column, grid, model)
    assert np.array_equal(rc.column_mask(column.mirrored(), grid, model), mask[::-1])
    shift = 4.0 * steps
    affine = grid.affine.copy()
    affine[:3, 3] += shift
    moved_grid = VolumeGrid(grid.shape, affine)
    assert np.mean(rc.column_mask(column.shifted(shift, shift, shift), moved_grid, model) != mask) < 1e-4


def test_overlap_of_a_column_with_itself_is_one():
    assert rc.solid_iou(bent(), bent()) == 1.0
    assert rc.solid_iou(bent().shifted(anterior_mm=80), bent()) == pytest.approx(1.0, abs=0.01)
    assert rc.solid_iou(bent().shifted(anterior_mm=80), bent(), remove_depth=False) == 0.0


def test_overlap_of_two_cylinders_beside_each_other():
    # Two discs of radius r at distance r share the lens r^2 (2 pi/3 - sqrt(3)/2).
    lens = 2 * pi / 3 - np.sqrt(3) / 2
    found = rc.solid_iou(tube(20.0, 0, 20, 20), tube(0, 0, 20, 20), model="ellipse", spacing_mm=1.0)
    assert found == pytest.approx(lens / (2 * pi - lens), abs=0.005)


def test_overlap_of_two_columns_one_above_the_other():
    found = rc.solid_iou(tube(heights=HEIGHTS + 150), tube(heights=HEIGHTS), spacing_mm=1.0)
    assert found == pytest.approx(1 / 3, abs=0.005)


def test_ceiling_against_a_box_is_the_area_share():
    column = tube()
    grid = VolumeGrid.from_bounds((-25.5, -20.5, -4.8), (25.5, 20.5, 305.2), 1.0)
    right, anterior, superior = np.meshgrid(*grid.axes_mm(), indexing="ij")
    within = (superior >= HEIGHTS[-1]) & (superior <= HEIGHTS[0])
    box = (np.abs(right) <= 20) & (np.abs(anterior) <= 15) & within
    expected = area(0.5, 0.5, rc.SUPERELLIPSE_EXPONENT)
    assert rc.ceiling(column, Volume(box, grid.affine)) == pytest.approx(expected, abs=0.01)
    assert rc.ceiling(column, Volume(box, grid.affine), "ellipse") == pytest.approx(pi / 4, abs=0.01)


def test_joint_grid_covers_every_column_with_its_margin():
    columns = (bent(1), bent(2).shifted(30, 20, 10))
    grid = rc.joint_grid(*columns, margin_mm=6.0)
    lower = [axis.min() for axis in grid.axes_mm()]
    upper = [axis.max() for axis in grid.axes_mm()]
    for column in columns:
        low, high = rc.column_mesh(column).bounds
        assert np.all(low - lower > 5.5) and np.all(upper - high > 5.5)


def test_spine_holds_levels_poses_and_angles(tmp_path):
    spine = rc.reconstruct(bent())
    assert spine.levels[0] == "T1" and spine.levels[-1] == "L5" and len(spine.levels) == 17
    rotations = spine.poses[:, :3, :3]
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotations), 1.0)
    assert np.allclose(rotations[:, 1, 0], 0.0)  # no axial rotation is claimed
    assert np.all(np.diff(spine.poses[:, 2, 3]) < 0)
    assert spine.angles["cobb_deg"] > 5
    spine.save(tmp_path / "spine.npz")
    assert Spine.load(tmp_path / "spine.npz").column_mesh.is_watertight


def test_level_centres_sit_at_their_share_of_the_arc():
    leaning = tube(0.75 * HEIGHTS)
    poses = rc.level_poses(leaning, {"T1": (0.0, 0.2), "L5": (0.9, 1.0)})
    assert np.allclose(poses[:, 2, 3], 300.3 - 300 * np.array([0.1, 0.95]), atol=1e-6)
    assert np.allclose(poses[:, 0, 3], 0.75 * poses[:, 2, 3], atol=1e-6)
    assert np.allclose(poses[:, :3, 2], [0.6, 0.0, 0.8], atol=1e-6)


def test_noise_of_half_a_millimetre_leaves_a_closed_surface_of_about_the_same_volume():
    column = bent()
    noise = np.random.default_rng(0).normal(0, 0.5, (151, 6))
    noisy = Curves.from_array(HEIGHTS, column.to_array() + noise)
    mesh = rc.column_mesh(noisy)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(rc.column_mesh(column).volume, rel=0.02)
    assert rc.solid_iou(noisy, column) > 0.95


def test_unusable_curves_are_refused():
    good = tube()
    crossing = Curves(HEIGHTS, good.coronal_mm[::-1], good.sagittal_mm)
    for make in (rc.column_mesh, rc.reconstruct, lambda c: rc.column_mask(c, rc.joint_grid(good))):
        with pytest.raises(InputError, match="right edge"):
            make(crossing)
    with pytest.raises(InputError, match="anterior edge"):
        rc.column_mesh(Curves(HEIGHTS, good.coronal_mm, good.sagittal_mm * 0.0))
    with pytest.raises(InputError):
        rc.column_mesh(Curves(HEIGHTS, good.coronal_mm * np.nan, good.sagittal_mm))
    with pytest.raises(InputError):
        rc.column_mesh(Curves(HEIGHTS[::-1], good.coronal_mm, good.sagittal_mm))


def test_unusable_requests_are_refused():
    with pytest.raises(InputError, match="'superellipse', 'ellipse'"):
        rc.column_mesh(tube(), "box")
    with pytest.raises(InputError, match="at least 3"):
        rc.column_mesh(tube(), n_around=2)
    turned = np.eye(4)
    turned[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    with pytest.raises(InputError, match="resample"):
        rc.column_mask(tube(), VolumeGrid((8, 8, 8), turned))
