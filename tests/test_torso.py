"""Trunk anatomy: solids against exact distances, and that bones, organs and skin fit each other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinelib.phantom.landmarks import find_landmarks
from spinelib.phantom.organs import hull_distance
from spinelib.phantom.population import ScoliosisCurve, sample_subject
from spinelib.phantom.skeleton import bones, rib_path
from spinelib.phantom.solids import HeightTable, capsule, ellipsoid, hollow, plate, polygon_distance
from spinelib.phantom.torso import TISSUES, build_anatomy
from spinelib.phantom.vertebra import subject_shapes, vertebra_sdf

CURVE = ScoliosisCurve(45.0, "T5", "T12", "right", 0.3)


def points(*rows):
    return tuple(torch.tensor(np.array(rows), dtype=torch.float32).T)


@pytest.fixture(scope="module", params=[("F", 3, None), ("M", 4, None), ("F", 5, (CURVE,)), ("M", 6, "enriched")])
def subject(request):
    sex, seed, curves = request.param
    return sample_subject(seed, sex=sex, curves=curves)


@pytest.fixture(scope="module")
def marks(subject):
    return find_landmarks(subject)


@given(st.tuples(*[st.floats(-60, 60)] * 3))
@settings(max_examples=60, deadline=None)
def test_capsule_distance_is_the_distance_to_its_segment(point):
    start, end = np.array([-10.0, 0.0, 5.0]), np.array([20.0, 8.0, 15.0])
    run, offset = end - start, np.array(point) - start
    nearest = np.clip(offset @ run / (run @ run), 0, 1) * run
    expected = np.linalg.norm(offset - nearest) - 6.0
    assert float(capsule(start, end, 6.0).distance(points(point))[0]) == pytest.approx(expected, abs=1e-3)


@given(st.floats(-15, 15), st.floats(-15, 15))
@settings(max_examples=60, deadline=None)
def test_polygon_distance_of_a_square(first, second):
    square = np.array([[-5.0, -5.0], [5.0, -5.0], [5.0, 5.0], [-5.0, 5.0]])
    q = np.abs([first, second]) - 5.0
    expected = np.linalg.norm(np.maximum(q, 0)) + min(max(q), 0)
    got = polygon_distance(torch.tensor([first]), torch.tensor([second]), square)
    assert float(got[0]) == pytest.approx(expected, abs=1e-3)


def test_surfaces_have_distance_zero_and_boxes_hold_them():
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    solid = ellipsoid([3.0, -2.0, 1.0], [10.0, 20.0, 30.0], axes)
    directions = np.random.default_rng(1).standard_normal((500, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    surface = (directions * [10.0, 20.0, 30.0]) @ axes.T + [3.0, -2.0, 1.0]
    assert solid.distance(points(*surface)).abs().max() < 1e-3
    assert np.all(surface >= np.array(solid.lower_mm) - 1e-6) and np.all(surface <= np.array(solid.upper_mm) + 1e-6)
    shell = hollow(solid, 2.0)
    torch.testing.assert_close(shell.distance(points(*surface)), torch.full((500,), -2.0), atol=1e-3, rtol=0)


def test_plate_bows_along_its_normal():
    outline = np.array([[-20.0, -20.0], [20.0, -20.0], [20.0, 20.0], [-20.0, 20.0]])
    solid = plate([0, 0, 0], np.eye(3), outline, 2.0, bow_per_mm=0.01)
    inside, outside = solid.distance(points([0, 10, 1.0], [0, 10, 4.0]))
    assert inside == pytest.approx(-2.0, abs=1e-4) and outside == pytest.approx(1.0, abs=1e-4)


def test_height_table_is_linear_and_held_at_its_ends():
    table = HeightTable.sample(np.arange(0.0, 31.0, 10.0), np.array([0.0, 10.0, 40.0, 40.0]))
    assert [table.at(h) for h in (-50, 5, 15, 25, 99)] == pytest.approx([0, 5, 25, 40, 40], abs=0.2)


def test_skin_clears_every_vertebra(subject, marks):
    for level, pose, shape in zip(subject.levels, subject.poses, subject_shapes(subject), strict=True):
        if level[0] == "C":
            continue
        axes = [torch.arange(a, b, 3.0) for a, b in shape.bounds_mm]
        local = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        bone = local[vertebra_sdf(shape, local)[1] < 0].double().numpy() @ pose[:3, :3].T + pose[:3, 3]
        assert hull_distance(marks.hull, points(*bone)).max() < -8.0, level


def test_supine_body_lies_on_the_table(subject, marks):
    assert np.isfinite(marks.hull.table_mm)
    behind = points([0, marks.hull.table_mm - 3, 250], [0, marks.hull.table_mm + 12, 250])
    outside, inside = hull_distance(marks.hull, behind)
    assert outside > 0 > inside


def test_standing_body_has_no_table():
    standing = sample_subject(4, sex="M", posture="standing")
    assert find_landmarks(standing).hull.table_mm == -np.inf


def test_each_thoracic_vertebra_carries_two_ribs(subject, marks):
    shapes = dict(zip(subject.levels, subject_shapes(subject), strict=True))
    names = {part.name for part in bones(marks)}
    for ring in marks.rings:
        assert {f"rib_{ring.number}_0", f"rib_{ring.number}_1"} <= names
        local = (ring.head_mm - ring.pose[:3, 3]) @ ring.pose[:3, :3]
        distance = vertebra_sdf(shapes[f"T{ring.number}"], torch.tensor(local, dtype=torch.float32))[1]
        assert distance.max() < 6.0
    assert len(marks.rings) == sum(level[0] == "T" for level in subject.levels)


def test_ribs_widen_downwards_and_lie_under_the_skin(marks):
    widths = [ring.half_width_mm for ring in sorted(marks.rings, key=lambda ring: ring.number)]
    assert np.all(np.diff(widths[:8]) > 0)
    for ring in marks.rings[1:]:
        for side in (0, 1):
            path = rib_path(ring, side, marks.scale)
            assert hull_distance(marks.hull, points(*path)).max() < -2.0, ring.number
            assert path[-1, 2] < path[0, 2]


def test_right_convex_curve_raises_the_right_back():
    marks = find_landmarks(sample_subject(5, sex="F", curves=(CURVE,)))
    apex = next(ring for ring in marks.rings if ring.number == 8)
    right, left = (rib_path(apex, side, marks.scale)[:, 1].min() for side in (0, 1))
    assert right < left - 5.0


def test_hip_axis_gives_the_pelvic_tilt_back(subject, marks):
    to_plate = subject.sacrum_pose[:3, 3] - marks.hips_mm.mean(0)
    tilt = np.degrees(np.arctan2(-to_plate[1], to_plate[2]))
    assert tilt == pytest.approx(subject.angles["pelvic_tilt_deg"], abs=0.5)
    assert 150 < np.linalg.norm(marks.hips_mm[0] - marks.hips_mm[1]) < 210


def test_body_grows_with_bmi_and_fat():
    base = sample_subject(8, sex="F")
    thin, stout = (find_landmarks(replace(base, bmi=b, fat_fraction=f)) for b, f in ((19.0, 0.2), (36.0, 0.48)))
    assert stout.fat_mm > thin.fat_mm + 10
    assert torch.all(stout.hull.half_width.values >= thin.hull.half_width.values - 1e-3)


def test_anatomy_names_known_tissues_and_unique_bones(subject):
    anatomy = build_anatomy(subject, subject_shapes(subject))
    assert {t for layer in anatomy.layers for t in layer.mixture} <= set(TISSUES)
    assert all(sum(layer.mixture.values()) <= 1 + 1e-9 for layer in anatomy.layers)
    names = [part.name for part in (*anatomy.bones, *anatomy.inlays)]
    assert len(names) == len(set(names))
    assert sum(part.tissue == "disc" and "-" in part.name for part in anatomy.inlays) == len(subject.levels) - 1
