"""The column of bodies and discs: silhouettes, gaps, mask, surface."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_vertebra import table_dims

from spinelib.geometry import PlanarGrid
from spinelib.levels import VERTEBRAE
from spinelib.phantom.column import (
    column_curves,
    column_mesh,
    column_sdf,
    disc_sdf,
    extended_curves,
    spine_mask,
    true_curves,
)
from spinelib.phantom.sacrum import subject_sacrum
from spinelib.phantom.vertebra import body_sdf, subject_shapes

GRID = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (200.0, 0.0))


def straight_subject(shift_mm=(0.0, 0.0, 0.0), seed=1, levels=VERTEBRAE, motion=None, **dims):
    """A spine of mean dimensions stacked along superior, S1 plate at the origin, then moved rigidly."""
    dims = table_dims(levels) | dims
    heights = (dims["height_anterior_mm"] + dims["height_posterior_mm"]) / 2
    bottoms = np.cumsum((dims["disc_below_mm"] + heights)[::-1])[::-1] - heights
    poses = np.tile(np.eye(4), (len(levels), 1, 1))
    poses[:, 2, 3] = bottoms + heights / 2
    motion = np.eye(4) if motion is None else motion.copy()
    motion[:3, 3] += shift_mm
    return SimpleNamespace(
        levels=tuple(levels), dims=dims, poses=motion @ poses, sacrum_pose=motion, sex="M",
        shape_seed=seed, degeneration={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight():
    subject = straight_subject()
    return subject, subject_shapes(subject)


def test_curves_of_a_straight_spine_follow_width_and_depth(straight):
    subject, shapes = straight
    curves = true_curves(subject, shapes)
    for level in VERTEBRAE[8:]:
        i = subject.levels.index(level)
        rim = subject.poses[i, 2, 3] + 0.35 * subject.dims["height_anterior_mm"][i]
        row = curves.at([rim, rim - 0.1])
        half = subject.dims["endplate_width_mm"][i] / 2
        np.testing.assert_allclose(row.coronal_mm[:, 0], [half, 0, -half], atol=1.5, err_msg=level)
        half = subject.dims["endplate_depth_mm"][i] / 2
        assert row.sagittal_mm[0, 0] == pytest.approx(half, abs=1.5), level
        assert row.sagittal_mm[2, 0] == pytest.approx(-half, abs=3.0), level  # the wall is hollow in the middle


def test_centre_is_the_middle_of_the_edges_and_edges_are_ordered(straight):
    for curves in column_curves(*straight):
        for right_or_front, centre, left_or_back in (curves.coronal_mm, curves.sagittal_mm):
            np.testing.assert_allclose(centre, (right_or_front + left_or_back) / 2)
            assert np.all(right_or_front > left_or_back)


def test_heights_run_from_t1_to_l5_and_from_c6_to_s1(straight):
    subject, shapes = straight
    true, extended = column_curves(subject, shapes)
    assert len(true.heights_mm) == 209
    height = dict(zip(subject.levels, subject.poses[:, 2, 3], strict=True))
    half = dict(
        zip(
            subject.levels,
            (subject.dims["height_anterior_mm"] + subject.dims["height_posterior_mm"]) / 4,
            strict=True,
        )
    )
    assert true.heights_mm[0] == pytest.approx(height["T1"] + half["T1"], abs=1.0)
    assert true.heights_mm[-1] == pytest.approx(height["L5"] - half["L5"], abs=1.0)
    assert extended.heights_mm[0] == pytest.approx(height["C6"] + half["C6"], abs=1.0)
    assert -40 < extended.heights_mm[-1] < -20
    assert -np.diff(extended.heights_mm).mean() == pytest.approx(2.0, abs=0.02)
    inner = extended.at(true.heights_mm)
    np.testing.assert_allclose(inner.to_array(), true.to_array(), atol=1e-6)


def test_separate_calls_equal_the_shared_evaluation(straight):
    subject, shapes = straight
    true, extended = column_curves(subject, shapes)
    np.testing.assert_array_equal(true_curves(subject, shapes).to_array(), true.to_array())
    np.testing.assert_array_equal(extended_curves(subject, shapes).to_array(), extended.to_array())


def test_shifting_the_patient_shifts_the_curves(straight):
    subject, shapes = straight
    moved = straight_subject((7.3, -4.6, 11.9))
    expected = true_curves(subject, shapes).shifted(7.3, -4.6, 11.9)
    found = true_curves(moved, shapes)
    np.testing.assert_allclose(found.heights_mm, expected.heights_mm, atol=1e-3)
    np.testing.assert_allclose(found.to_array(), expected.to_array(), atol=0.35)


def test_tilting_the_patient_tilts_the_centre_line(straight):
    _, shapes = straight
    angle = np.radians(6.0)
    motion = np.eye(4)
    motion[[0, 0, 2, 2], [0, 2, 0, 2]] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    curves = true_curves(straight_subject(motion=motion), shapes)
    slope = np.polyfit(curves.heights_mm, curves.coronal_mm[1], 1)[0]
    assert np.degrees(np.arctan(slope)) == pytest.approx(6.0, abs=0.2)


def test_mirrored_person_has_mirrored_curves():
    wedge = np.linspace(-4, 4, 24)
    subject = straight_subject(coronal_wedge_deg=wedge)
    other = straight_subject(coronal_wedge_deg=-wedge)
    other.is_mirrored = True
    a = true_curves(subject, subject_shapes(subject)).mirrored()
    b = true_curves(other, subject_shapes(other))
    np.testing.assert_allclose(a.to_array(), b.to_array(), atol=1e-3)


def test_edges_are_smooth(straight):
    """Rows 2.2 mm apart: neighbouring edge points differ by less than a rim is deep."""
    array = true_curves(*straight).to_array()
    assert np.abs(np.diff(array, axis=0)).max() < 3.0


def test_bodies_keep_their_distance(straight):
    subject, shapes = straight
    generator = torch.Generator().manual_seed(0)
    for i in range(1, len(shapes) - 1):
        middle = (subject.poses[i, 2, 3] + subject.poses[i + 1, 2, 3]) / 2
        points = (torch.rand(60000, 3, generator=generator) - 0.5) * torch.tensor([60.0, 45.0, 36.0])
        points[:, 2] += middle
        upper, lower = (
            body_sdf(shapes[j], points - torch.as_tensor(subject.poses[j, :3, 3], dtype=torch.float32))
            for j in (i, i + 1)
        )  # fmt: skip
        # Half way across a gap g both distances are g / 2: the least sum is the gap.
        assert float((upper + lower).min()) > 0.25, subject.levels[i]


def test_disc_fills_the_gap_but_no_bone(straight):
    subject, shapes = straight
    i = subject.levels.index("L3")
    upper, lower = ((shapes[j], subject.poses[j]) for j in (i, i + 1))
    between = subject.poses[i, 2, 3] - (subject.dims["height_anterior_mm"] + subject.dims["height_posterior_mm"])[i] / 4
    centre = torch.tensor([[0.0, 0.0, between - subject.dims["disc_below_mm"][i] / 2]])
    assert float(disc_sdf(upper, lower, centre)) < -3
    assert float(disc_sdf(upper, lower, centre + torch.tensor([40.0, 0, 0]))) > 10
    points = torch.rand(20000, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([60.0, 45, 40]) - 22
    points[:, 2] += float(centre[0, 2])
    for shape, pose in (upper, lower):
        bone = body_sdf(shape, points - torch.as_tensor(pose[:3, 3], dtype=torch.float32)) < 0
        assert not bool((bone & (disc_sdf(upper, lower, points) < 0)).any())


def test_mask_agrees_with_the_curves(straight):
    subject, shapes = straight
    mask, curves = spine_mask(subject, shapes, GRID), true_curves(subject, shapes)
    assert mask.shape == GRID.shape and mask.dtype == bool
    rows = np.flatnonzero(
        (GRID.superior_mm() < curves.heights_mm[0]) & (GRID.superior_mm() > curves.heights_mm[-1] + 6)
    )
    widths = mask[rows].sum(1) * GRID.spacing_mm[1]
    outline = curves.at(GRID.superior_mm()[rows]).coronal_mm
    assert np.abs(widths - (outline[0] - outline[2])).max() < 2 * GRID.spacing_mm[1]
    lateral = GRID.lateral_mm()
    centres = np.array([lateral[mask[row]].mean() for row in rows])
    np.testing.assert_allclose(centres, outline[1], atol=GRID.spacing_mm[1])


def test_mask_of_a_sagittal_grid_is_refused(straight):
    with pytest.raises(ValueError, match="Expected 'coronal'"):
        spine_mask(*straight, PlanarGrid.centred("sagittal", (10, 10), (3, 3), (0, 0)))


def test_column_surface_is_one_closed_piece(straight):
    mesh = column_mesh(*straight)
    assert mesh.is_watertight and mesh.body_count == 1
    subject, shapes = straight
    on_surface = torch.as_tensor(mesh.vertices[::40].copy(), dtype=torch.float32)
    assert float(column_sdf(subject, shapes, on_surface).abs().mean()) < 0.1


def test_same_subject_same_curves():
    first, again = (true_curves(s, subject_shapes(s)) for s in (straight_subject(), straight_subject()))
    np.testing.assert_array_equal(first.to_array(), again.to_array())
    other = straight_subject(seed=2)
    assert np.abs(true_curves(other, subject_shapes(other)).to_array() - first.to_array()).max() > 0.05


def test_sacralised_spine_without_l5_works():
    subject = straight_subject(levels=VERTEBRAE[:-1])
    curves = true_curves(subject, subject_shapes(subject))
    assert curves.heights_mm[-1] == pytest.approx(subject.poses[-1, 2, 3] - 13.5, abs=2)


def test_sacral_plate_faces_the_last_disc(straight):
    subject, shapes = straight
    sacrum = (subject_sacrum(subject), subject.sacrum_pose)
    middle = torch.tensor([[0.0, 0.0, subject.dims["disc_below_mm"][-1] / 2]])
    assert float(disc_sdf((shapes[-1], subject.poses[-1]), sacrum, middle)) < -2
