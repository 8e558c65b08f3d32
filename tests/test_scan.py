"""Synthetic CT scans with their truth."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import VolumeGrid
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.fields import smooth_field
from spinelib.phantom.implants import implants
from spinelib.phantom.metal_ct import METAL_HU, add_metal
from spinelib.phantom.population import sample_subject
from spinelib.phantom.render import Lattice, tissue_volume
from spinelib.phantom.scan import (
    HOSPITAL,
    ScanMix,
    field_of_view,
    sample_labels,
    sample_patient,
    sample_protocol,
    sample_scan,
)
from spinelib.phantom.scan_truth import VISIBLE_MM, scan_truth, visible_fraction
from spinelib.phantom.vertebra import subject_shapes, vertebra_mesh, vertebra_sdf

COARSE_MM = 4.0
SEEDS = (0, 1, 2, 7)


@pytest.fixture(scope="module")
def scans():
    return [sample_scan(seed, COARSE_MM) for seed in SEEDS]


def test_a_seed_gives_the_same_bytes_and_another_seed_another_scan(scans):
    again = sample_scan(SEEDS[1], COARSE_MM)
    assert again.ct.values.tobytes() == scans[1].ct.values.tobytes()
    assert again.labels.values.tobytes() == scans[1].labels.values.tobytes()
    assert again.cut == scans[1].cut
    assert scans[0].ct.values.shape != scans[1].ct.values.shape


def test_ct_and_labels_share_a_grid_of_the_asked_spacing(scans):
    for scan in scans:
        assert scan.ct.values.shape == scan.labels.values.shape
        np.testing.assert_array_equal(scan.ct.affine, scan.labels.affine)
        np.testing.assert_allclose(scan.ct.spacing_mm, COARSE_MM)
        assert scan.ct.values.dtype == np.float32
        assert scan.labels.values.dtype == np.uint8
        assert -1024 <= scan.ct.values.min() < scan.ct.values.max() <= 3071
    np.testing.assert_allclose(sample_scan(1, (3.0, 4.0, 5.0)).ct.spacing_mm, (3.0, 4.0, 5.0))


def test_labels_on_another_grid_are_of_the_same_patient(scans):
    scan = scans[2]
    np.testing.assert_array_equal(sample_labels(SEEDS[2], scan.ct.grid), scan.labels.values)
    raised = np.eye(4)
    raised[2, 3] = COARSE_MM
    moved = sample_labels(SEEDS[2], scan.ct.grid, motion=raised)
    assert (moved[:, :, 1:] == scan.labels.values[:, :, :-1]).mean() > 0.999
    assert (moved != scan.labels.values).mean() > 0.005
    corners = scan.ct.grid.corners_mm()
    finer = VolumeGrid.from_bounds(corners.min(0), corners.max(0), COARSE_MM / 2)
    volume = (sample_labels(SEEDS[2], finer) > 0).sum() / 8
    assert volume == pytest.approx((scan.labels.values > 0).sum(), rel=0.1)


def test_labels_are_vertebrae_in_order_from_top_to_bottom(scans):
    order = [*range(1, 20), 28, *range(20, 26)]
    for scan in scans:
        present = set(np.unique(scan.labels.values).tolist()) - {0}
        assert present == set(scan.centroids_mm) <= set(order)
        assert scan.cut <= present
        heights = [scan.centroids_mm[label][2] for label in order if label in present]
        assert np.all(np.diff(heights) < 0)


def test_vertebrae_are_brighter_than_their_surroundings(scans):
    for scan in scans:
        values, labels = scan.ct.values, scan.labels.values
        around = (labels == 0) & (values > -200)
        assert np.percentile(values[labels > 0], 75) > np.percentile(values[around], 75) + 60


def test_centroids_lie_in_their_bodies(scans):
    for scan in scans:
        for label in set(scan.centroids_mm) - scan.cut - {1}:
            index = np.linalg.inv(scan.labels.affine) @ [*scan.centroids_mm[label], 1]
            near = tuple(np.round(index[:3]).astype(int))
            assert scan.labels.values[near] == label


def test_visible_fraction_halves_at_the_middle_and_is_blind_to_the_grid():
    subject = sample_subject(3)
    shape = subject_shapes(subject)[subject.index("L2")]
    mesh = vertebra_mesh(shape, 1.5)
    lower, upper = shape.bounds_mm.T
    assert visible_fraction(shape, np.eye(4), VolumeGrid.from_bounds(lower - 5, upper + 5, 2.0)) == 1.0
    assert visible_fraction(shape, np.eye(4), VolumeGrid.from_bounds(upper + 5, upper + 50, 2.0)) == 0.0
    right = VolumeGrid.from_bounds((1.0, *(lower[1:] - 5)), upper + 5, 2.0)
    assert visible_fraction(shape, np.eye(4), right) == pytest.approx(0.5, abs=0.04)
    # volume above a plane: flux of (0, 0, max(s - 5, 0)) through the surface
    flux = np.clip(mesh.triangles_center[:, 2] - 5, 0, None) * mesh.face_normals[:, 2] * mesh.area_faces
    above = abs(float(flux.sum() / mesh.volume))
    for step in (1.0, 3.0):
        grid = VolumeGrid.from_bounds((*(lower[:2] - 5), 5.0 + step / 2), upper + 5, step)
        assert visible_fraction(shape, np.eye(4), grid) == pytest.approx(above, abs=0.03)


def test_cut_and_hidden_vertebrae_are_told_apart(scans):
    for scan in scans:
        box = scan.labels.values.shape
        for label in scan.centroids_mm:
            place = np.argwhere(scan.labels.values == label)
            touches = bool(np.any(place == 0) or np.any(place == np.array(box) - 1))
            assert touches or label not in scan.cut, f"{scan.key}: {label} is cut far from the border"


def test_masks_end_half_way_from_cortex_to_soft_tissue():
    scan = sample_scan(902, (0.75, 0.75, 2.5))
    whole = [label for label in scan.centroids_mm if label not in scan.cut and 8 <= label <= 24]
    edges = [_half_way_mm(scan, label) for label in whole[-3:]]
    assert abs(np.median(edges)) < 0.35  # 0.6 where masks end at the bone's own surface


def _half_way_mm(scan, label):
    """In axial slices, how far outside a mask values are half-way from its brightest layer to what is around it."""
    places = np.argwhere(scan.labels.values == label)
    window = tuple(slice(max(a - 8, 0), b + 8) for a, b in zip(places.min(0), places.max(0), strict=True))
    labels, values = scan.labels.values[window], scan.ct.values[window]
    shown = (labels == label).any((0, 1))
    labels, values = labels[..., shown], values[..., shown]
    outside = np.stack([_signed_mm(section, 0.75) for section in np.moveaxis(labels == label, 2, 0)], 2)
    layers = (np.arange(-4, 6) + 0.5) * 0.75
    alone = (labels == 0) | (labels == label)
    profile = np.array([np.median(values[alone & (abs(outside - depth) < 0.375)]) for depth in layers])
    half = (profile.max() + profile[-1]) / 2
    last = np.flatnonzero(profile >= half).max()
    return float(np.interp(-half, -profile[last : last + 2], layers[last : last + 2]))


def _signed_mm(section, pixel_mm):
    outer, inner = (ndimage.distance_transform_edt(mask, sampling=pixel_mm) for mask in (~section, section))
    return np.where(section, pixel_mm / 2 - inner, outer - pixel_mm / 2)


def test_spinous_processes_on_thin_laminae_are_labelled():
    subject = sample_subject(308, age_years=60)
    shapes, levels = subject_shapes(subject), ("T10", "T12", "L2")
    centres = subject.poses[[subject.index(v) for v in levels], :3, 3]
    grid = VolumeGrid.from_bounds(centres.min(0) - [60, 90, 60], centres.max(0) + [60, 40, 60], 2.5)
    tissue = tissue_volume(subject, shapes, grid)
    labels, _, cut = scan_truth(tissue, subject, shapes, np.eye(4))
    assert np.all(labels[tissue.labels == 20] == 20)
    for level, centre in zip(levels, centres, strict=True):
        label, i = VERSE_LABELS[level], subject.index(level)
        assert label not in cut
        axes = [torch.arange(*bounds, 1.5) for bounds in shapes[i].bounds_mm]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        volume = float((vertebra_sdf(shapes[i], points)[1] < VISIBLE_MM).sum()) * 1.5**3
        assert (labels == label).sum() * 2.5**3 == pytest.approx(volume, rel=0.06)
        back = grid.affine[1, 3] + 2.5 * np.argwhere(labels == label)[:, 1].min() - centre[1]
        reach = subject.dims["endplate_depth_mm"][i] / 2 + subject.dims["spinous_length_mm"][i]
        assert back < -0.8 * reach


def test_patients_differ_in_age_curve_arms_and_metal():
    people = [sample_patient(seed, np.random.default_rng(seed), HOSPITAL) for seed in range(80)]
    assert min(p.age_years for p in people) < 25 < 85 < max(p.age_years for p in people)
    variants = sum(set(p.levels) != {level for level, v in VERSE_LABELS.items() if v < 25} for p in people)
    assert 3 <= variants <= 18
    assert 5 <= sum(p.arms[0] for p in people) <= 30
    assert any(p.fused for p in people)
    assert all(2 <= len(p.fused) <= 8 for p in people if p.fused)
    assert np.ptp([p.family.canal for p in people]) > 0.1


def test_fields_of_view_hold_spine_and_respect_the_memory_limit():
    rng, lengths = np.random.default_rng(0), []
    subject = sample_subject(5)
    for _ in range(60):
        grid = field_of_view(rng, subject, np.eye(4), np.full(3, 1.0))
        assert np.prod(grid.shape) <= 1.05 * 16e6
        right, anterior, superior = grid.axes_mm()
        assert 60 <= superior[-1] - superior[0] <= 640
        lengths.append(superior[-1] - superior[0])
        near = (subject.poses[:, 2, 3] > superior[0]) & (subject.poses[:, 2, 3] < superior[-1])
        if near.any():
            assert right[0] < subject.poses[near, 0, 3].mean() < right[-1]
    assert min(lengths) < 150 < 400 < max(lengths)


def test_protocols_cover_noise_slices_and_kernels():
    drawn = [sample_protocol(np.random.default_rng(seed)) for seed in range(200)]
    assert 5 <= min(p.noise_hu for p in drawn) < 7 < 50 < max(p.noise_hu for p in drawn) <= 78
    assert 0.7 <= min(p.slice_mm for p in drawn) < 1 < 4 < max(p.slice_mm for p in drawn) <= 5
    assert 0.2 < np.mean([p.sharpening > 0 for p in drawn]) < 0.5


def test_smooth_field_has_unit_variance_and_its_length():
    rng = np.random.default_rng(0)
    field = smooth_field(rng, (50, 60, 70), (2.0, 2.0, 2.0), 12.0)
    assert field.shape == (50, 60, 70)
    assert field.std() == pytest.approx(1, abs=1e-3)
    apart = [float((field[n:] * field[:-n]).mean()) for n in (1, 12)]
    assert apart[0] > 0.9
    assert abs(apart[1]) < 0.2
    fine = smooth_field(rng, (50, 60, 70), (2.0, 2.0, 2.0), 0.1)
    assert abs(float((fine[3:] * fine[:-3]).mean())) < 0.1


def test_screws_are_bright_and_streak_in_their_own_slices():
    subject = dataclasses.replace(sample_subject(2), fused=("L2", "L3"))
    centre = subject.poses[subject.index("L2"), :3, 3]
    grid = VolumeGrid.from_bounds(centre - [60, 80, 20], centre + [60, 60, 100], 3.0)
    values = np.zeros(grid.shape, np.float32)
    add_metal(values, implants(subject), Lattice(tuple(grid.shape), grid.affine, "cpu"), np.random.default_rng(0))
    assert values.max() > 0.5 * METAL_HU
    smeared = np.flatnonzero(np.abs(values).max(axis=(0, 1)) > 0)
    assert 0 < len(smeared) < grid.shape[2]
    streaks = values[..., smeared][values[..., smeared] < 0]
    assert -900 < np.percentile(streaks, 1) < -20
    untouched = values.copy()
    add_metal(untouched, [], Lattice(tuple(grid.shape), grid.affine, "cpu"), None)
    np.testing.assert_array_equal(untouched, values)


def test_rates_of_zero_and_one_are_kept():
    bare = ScanMix(fused=0.0, arms=1.0, turned=0.0)
    people = [sample_patient(seed, np.random.default_rng(seed), bare) for seed in range(10)]
    assert all(p.arms == (True, True) and not p.fused for p in people)


@pytest.mark.parametrize("seed", [-1, 1.5, "3"])
def test_wrong_seed(seed):
    with pytest.raises(InputError, match="Expected an integer"):
        sample_scan(seed)


@pytest.mark.parametrize("spacing", [0.1, 20.0, (1.0, 2.0), float("nan")])
def test_wrong_spacing(spacing):
    with pytest.raises(InputError, match="0.3 to 10 mm"):
        sample_scan(0, spacing)
