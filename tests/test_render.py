"""Rendered maps and volumes: they agree with each other and keep mass, symmetry and labels."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, VolumeGrid
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.population import ScoliosisCurve, mirrored, sample_subject
from spinelib.phantom.render import APATITE_G_PER_CM3, TISSUES, path_lengths, tissue_volume
from spinelib.phantom.vertebra import subject_shapes

GRID = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (200.0, 0.0))
CURVE = ScoliosisCurve(40.0, "T5", "T12", "right", 0.3)
SPINE_LOW, SPINE_HIGH = (-110, -130, -150), (110, 100, 640)


@pytest.fixture(scope="module")
def subject():
    return sample_subject(21, sex="F", curves=(CURVE,))


@pytest.fixture(scope="module")
def shapes(subject):
    return subject_shapes(subject)


@pytest.fixture(scope="module")
def maps(subject, shapes):
    return path_lengths(subject, shapes, GRID)


@pytest.fixture(scope="module")
def spine_volume(subject, shapes):
    return tissue_volume(subject, shapes, VolumeGrid.from_bounds(SPINE_LOW, SPINE_HIGH, 3.0))


def soft_thickness(maps):
    return sum(maps[name] for name in TISSUES)


def areal_density(maps, subject):
    """Mineral over area of the four boxes around the bodies of L1-L4, g/cm2."""
    superior, right = GRID.superior_mm()[:, None], GRID.lateral_mm()[None]
    mineral = area = 0.0
    for level in ("L1", "L2", "L3", "L4"):
        i = subject.index(level)
        size = {name: subject.dims[name][i] for name in subject.dims}
        half = (size["height_posterior_mm"] + size["disc_below_mm"]) / 2
        centre = subject.poses[i, :3, 3]
        inside = (abs(superior - centre[2]) < half) & (abs(right - centre[0]) < size["endplate_width_mm"] / 2 + 1)
        mineral, area = mineral + maps["mineral"][inside].sum(), area + inside.sum()
    return mineral / area


def test_maps_are_finite_non_negative_and_complete(maps):
    assert set(maps) == {*TISSUES, "mineral"}
    for name, image in maps.items():
        assert image.shape == GRID.shape and image.dtype == np.float32, name
        assert np.isfinite(image).all() and image.min() >= 0 and image.max() > 0, name


def test_air_beside_the_head_and_body_in_the_middle(maps):
    thickness = soft_thickness(maps)
    assert thickness[10, :40].max() < 1.0
    row = int(GRID.mm_to_pixel(60.0, 0.0)[0])
    assert 150 < thickness[row, 125] < 350


def test_volume_summed_along_anterior_equals_the_path_lengths(subject, shapes):
    spacing = 3.0
    volume = tissue_volume(subject, shapes, VolumeGrid.from_bounds((-270, -170, 0), (270, 230, 120), spacing))
    right, _, superior = volume.grid.axes_mm()
    grid = PlanarGrid("coronal", (len(superior), len(right)), (spacing, spacing), (superior[-1], right[-1]))
    maps = path_lengths(subject, shapes, grid)
    mineral = volume.mineral.sum(1).T[::-1, ::-1] * spacing / 10
    assert mineral.sum() == pytest.approx(maps["mineral"].sum(), rel=0.02)
    assert np.corrcoef(mineral.ravel(), maps["mineral"].ravel())[0, 1] > 0.99
    depth = volume.fractions.sum(2).transpose(0, 2, 1)[:, ::-1, ::-1] * spacing
    assert depth.sum() == pytest.approx(soft_thickness(maps).sum(), rel=0.01)
    error = np.abs(depth.sum(0) - soft_thickness(maps))
    assert error.mean() < 1.5 and np.quantile(error, 0.99) < 12.0
    for channel, name in enumerate(TISSUES):
        assert depth[channel].sum() == pytest.approx(maps[name].sum(), rel=0.05, abs=2e3), name


def test_mirrored_subject_gives_mirrored_maps_and_labels(subject, maps):
    other = mirrored(subject)
    flipped = path_lengths(other, subject_shapes(other), GRID)
    for name in maps:
        np.testing.assert_allclose(flipped[name][:, ::-1], maps[name], atol=0.05, err_msg=name)
    assert np.abs(maps["mineral"][:, ::-1] - maps["mineral"]).max() > 0.5


def test_same_seed_renders_identically(maps):
    again = sample_subject(21, sex="F", curves=(CURVE,))
    for name, image in path_lengths(again, subject_shapes(again), GRID).items():
        np.testing.assert_array_equal(image, maps[name])


@pytest.mark.parametrize("seed", range(3))
def test_lumbar_areal_density_is_that_of_an_adult(seed):
    adult = sample_subject(seed, variants=False)
    standard = replace(adult, bone_density=1.0)
    density = areal_density(path_lengths(standard, subject_shapes(standard), GRID), standard)
    assert 0.95 < density < 1.25
    assert 0.8 < density * adult.bone_density < 1.5


def test_mineral_scales_with_bone_density_and_tissue_does_not(subject, shapes, maps):
    denser = path_lengths(replace(subject, bone_density=1.3 * subject.bone_density), shapes, GRID)
    np.testing.assert_allclose(denser["mineral"], 1.3 * maps["mineral"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(denser["muscle"], maps["muscle"], atol=1e-3)


@pytest.mark.parametrize("factor", [2, 0.5])
def test_mineral_mass_does_not_depend_on_the_pixel_size(subject, shapes, maps, factor):
    shape, spacing = (int(333 / factor), int(250 / factor)), (3.0 * factor, 2.4 * factor)
    grid = PlanarGrid.centred("coronal", shape, spacing, (200.0, 0.0))
    mass = path_lengths(subject, shapes, grid)["mineral"].sum() * np.prod(spacing)
    assert mass == pytest.approx(maps["mineral"].sum() * 7.2, rel=0.03)


def test_labels_hold_each_level_once_in_one_piece(subject, spine_volume):
    expected = {VERSE_LABELS[level] for level in (*subject.levels, "S1")}
    assert set(np.unique(spine_volume.labels)) - {0} == expected
    for value, window in enumerate(ndimage.find_objects(spine_volume.labels), start=1):
        if window is not None:
            assert ndimage.label(spine_volume.labels[window] == value)[1] == 1, value


def test_labels_lie_at_their_vertebrae_and_inside_the_body(subject, spine_volume):
    affine = spine_volume.grid.affine
    for level, pose in zip(subject.levels, subject.poses, strict=True):
        index = np.argwhere(spine_volume.labels == VERSE_LABELS[level])
        centre = index.mean(0) @ affine[:3, :3].T + affine[:3, 3]
        assert np.linalg.norm(centre - pose[:3, 3]) < 45.0, level
    filled = spine_volume.fractions.sum(0) + spine_volume.mineral / APATITE_G_PER_CM3
    assert filled[spine_volume.labels > 0].min() > 0.9
    assert filled.max() < 1.02


def test_whole_voxel_shift_moves_labels_and_tissue(subject, shapes):
    low, high, spacing = (-60, -90, 20), (60, 60, 110), 3.0
    grid = VolumeGrid.from_bounds(low, high, spacing)
    still = tissue_volume(subject, shapes, grid)
    pose = np.eye(4)
    pose[:3, 3] = [2 * spacing, -3 * spacing, 4 * spacing]
    moved = tissue_volume(subject, shapes, grid, pose)
    np.testing.assert_allclose(moved.mineral[2:, :-3, 4:], still.mineral[:-2, 3:, :-4], atol=2e-3)
    agreement = moved.labels[2:, :-3, 4:] == still.labels[:-2, 3:, :-4]
    assert agreement.mean() > 0.995
    assert (moved.labels != still.labels).mean() > 0.02


def test_turned_pose_equals_turned_grid(subject, shapes):
    angle = np.radians(20.0)
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    grid = VolumeGrid.from_bounds((-60, -90, 60), (60, 60, 90), 3.0)
    turned = VolumeGrid(grid.shape, pose @ grid.affine)
    plain, both = tissue_volume(subject, shapes, grid), tissue_volume(subject, shapes, turned, pose)
    np.testing.assert_allclose(both.mineral, plain.mineral, atol=2e-3)
    np.testing.assert_allclose(both.fractions, plain.fractions, atol=5e-3)


def test_bad_requests_name_what_was_expected(subject, shapes):
    with pytest.raises(InputError, match="coronal"):
        path_lengths(subject, shapes, replace(GRID, view="sagittal"))
    grid = VolumeGrid.from_bounds((0, 0, 0), (9, 9, 9), 3.0)
    with pytest.raises(InputError, match="rigid"):
        tissue_volume(subject, shapes, grid, np.diag([2.0, 1.0, 1.0, 1.0]))
