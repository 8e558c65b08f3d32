"""Cone-beam geometry: orientation, projection and its way back, stacking under a constant magnification."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinelib.errors import InputError
from spinelib.imaging.cone_beam import ConeBeam, stack_naively, triangulate

ISOCENTRE_MM = np.array([12.0, -7.0, 310.0])
FRONTAL = ConeBeam.frontal(ISOCENTRE_MM, (256, 200), 1.8)
LATERAL = ConeBeam.lateral(ISOCENTRE_MM, (256, 220), 1.8)

coordinates = st.floats(-250, 250)
points = st.lists(st.tuples(coordinates, coordinates, coordinates), min_size=1, max_size=20).map(np.array)
angles = st.tuples(*[st.floats(-180, 180)] * 3)


def turned(beam: ConeBeam, angles_deg) -> ConeBeam:
    """The beam turned about the isocentre."""
    turn = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    source, corner = (ISOCENTRE_MM + turn @ (point - ISOCENTRE_MM) for point in (beam.source_mm, beam.corner_mm))
    return ConeBeam(source, corner, turn @ beam.col_step_mm, turn @ beam.row_step_mm, beam.shape)


def random_points(n=50):
    return ISOCENTRE_MM + np.random.default_rng(0).uniform(-1, 1, (n, 3)) * [80, 100, 300]


def test_isocentre_lies_in_the_middle_magnified_by_the_distances():
    for beam in (FRONTAL, LATERAL):
        middle = (np.array(beam.shape) - 1) / 2
        np.testing.assert_allclose(beam.project(ISOCENTRE_MM), middle)
        ten_mm_up = beam.project(ISOCENTRE_MM + [0, 0, 10])
        np.testing.assert_allclose(ten_mm_up, middle - [10 * 1800 / 1500 / 1.8, 0])


def test_radiological_orientation():
    right, anterior, superior = (ISOCENTRE_MM + step for step in 20 * np.eye(3))
    middle = [FRONTAL.project(ISOCENTRE_MM), LATERAL.project(ISOCENTRE_MM)]
    assert FRONTAL.project(right)[1] < middle[0][1]  # patient's right on the left of the image
    assert LATERAL.project(anterior)[1] < middle[1][1]
    assert FRONTAL.project(superior)[0] < middle[0][0] and LATERAL.project(superior)[0] < middle[1][0]
    assert FRONTAL.source_mm[1] > ISOCENTRE_MM[1] and LATERAL.source_mm[0] > ISOCENTRE_MM[0]


def test_pixels_project_onto_themselves():
    beam = turned(ConeBeam.lateral(ISOCENTRE_MM, (5, 7), 30.0), (20, -30, 40))
    np.testing.assert_allclose(beam.project(beam.pixels_mm()), np.moveaxis(np.indices((5, 7)), 0, -1), atol=1e-9)


def test_matrix_projects_and_has_depth_one_on_the_detector():
    beam = turned(FRONTAL, (5, 10, 20))
    homogeneous = np.column_stack([random_points(), np.ones(50)]) @ beam.matrix.T
    np.testing.assert_allclose(homogeneous[:, :2] / homogeneous[:, 2:], beam.project(random_points()))
    assert beam.matrix[2] @ [*beam.corner_mm, 1] == pytest.approx(1)
    assert beam.matrix[2] @ [*beam.source_mm, 1] == pytest.approx(0, abs=1e-12)


@given(points, angles)
def test_source_point_and_its_image_lie_on_one_line(offsets, angles_deg):
    beam, points_mm = turned(FRONTAL, angles_deg), ISOCENTRE_MM + offsets
    way, ray = points_mm - beam.source_mm, beam.detector_mm(beam.project(points_mm)) - beam.source_mm
    sine = np.linalg.norm(np.cross(way, ray), axis=1) / np.linalg.norm(way, axis=1) / np.linalg.norm(ray, axis=1)
    assert sine.max() < 1e-12


@given(points, angles, st.floats(20, 160))
def test_triangulation_undoes_projection(offsets, angles_deg, between_deg):
    points_mm = ISOCENTRE_MM + offsets
    beams = [turned(turned(FRONTAL, (0, 0, turn)), angles_deg) for turn in (0, between_deg)]
    found, residual = triangulate(beams, [beam.project(points_mm) for beam in beams])
    np.testing.assert_allclose(found, points_mm, atol=1e-6)
    assert residual.max() < 1e-6


@settings(max_examples=30)
@given(st.tuples(st.floats(-30, 280), st.floats(-30, 230)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_cropped_detector_sees_the_same_rays(centre_rc, shape):
    part = FRONTAL.cropped(centre_rc, shape)
    middle = (np.array(shape) - 1) / 2
    np.testing.assert_allclose(part.detector_mm(middle), FRONTAL.detector_mm(centre_rc), atol=1e-9)
    moved = FRONTAL.project(random_points()) - centre_rc + middle
    np.testing.assert_allclose(part.project(random_points()), moved, atol=1e-9)
    np.testing.assert_allclose(part.principal_mm, FRONTAL.principal_mm, atol=1e-9)


def test_projection_of_tensors_is_the_same_and_differentiable():
    points_mm = torch.tensor(random_points(4), requires_grad=True)
    np.testing.assert_allclose(FRONTAL.project(points_mm).detach(), FRONTAL.project(points_mm.detach().numpy()))
    assert torch.autograd.gradcheck(FRONTAL.project, points_mm)
    single = FRONTAL.project(torch.tensor(random_points(), dtype=torch.float32))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, FRONTAL.project(random_points()), atol=1e-3)


def test_three_views_share_the_error_of_one():
    beams = [FRONTAL, LATERAL, turned(FRONTAL, (0, 0, 45))]
    seen = np.stack([beam.project(random_points()) for beam in beams])
    exact = triangulate(beams, seen)[0]
    seen[0] += [0, 3]
    found, residual = triangulate(beams, seen)
    error = np.linalg.norm(found - exact, axis=1)
    assert 0.5 < error.mean() < 3 * 1.5 and residual.min() > 0.1


def test_views_that_do_not_belong_together_leave_a_residual():
    points_mm = random_points()
    frontal, lateral = FRONTAL.project(points_mm), LATERAL.project(points_mm)
    shifted = triangulate((FRONTAL, LATERAL), [frontal, lateral + [10, 0]])[1]
    # Ten rows of 1.8 mm are 15 mm in the body, shared by the two rays.
    np.testing.assert_allclose(shifted, 15 / 2, rtol=0.1)


def test_naive_stacking_errs_in_proportion_to_height():
    heights = np.array([0.0, 100, 200, 300])
    points_mm = ISOCENTRE_MM + np.stack([np.full(4, 50.0), np.zeros(4), heights], axis=1)
    seen = FRONTAL.project(points_mm), LATERAL.project(points_mm)
    naive = stack_naively(FRONTAL, LATERAL, *seen)
    np.testing.assert_allclose((naive - points_mm)[:, 2], heights * 50 / (1500 - 50), atol=1e-9)
    assert (naive - points_mm)[3, 2] > 10
    np.testing.assert_allclose(triangulate((FRONTAL, LATERAL), seen)[0], points_mm, atol=1e-6)


def test_naive_stacking_is_exact_in_the_isocentre_planes():
    up = ISOCENTRE_MM + np.array([[0, 0, 200.0], [0, 0, -200], [0, 0, 0]])
    found = stack_naively(FRONTAL, LATERAL, FRONTAL.project(up), LATERAL.project(up))
    np.testing.assert_allclose(found, up, atol=1e-9)
    frontal, lateral = FRONTAL.cropped((9, 30), (64, 64)), LATERAL.cropped((70.5, 3), (64, 64))
    np.testing.assert_allclose(stack_naively(frontal, lateral, frontal.project(up), lateral.project(up)), up, atol=1e-9)


def test_json_round_trip():
    beam = turned(FRONTAL, (1, 2, 3))
    again = ConeBeam.from_dict(json.loads(json.dumps(beam.to_dict())))
    assert again.to_dict() == beam.to_dict() and again.shape == (256, 200)
    with pytest.raises(InputError, match="corner_mm"):
        ConeBeam.from_dict({"source_mm": [0, 0, 0]})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"source_mm": FRONTAL.corner_mm}, "outside the detector's plane"),
        ({"col_step_mm": FRONTAL.row_step_mm}, "must differ"),
        ({"row_step_mm": [0, 0, 0]}, "must differ"),
        ({"corner_mm": [0, 0]}, "three finite coordinates"),
        ({"shape": (0, 5)}, "at least 1"),
    ],
)
def test_impossible_beams_are_refused(changes, named):
    with pytest.raises(InputError, match=named):
        ConeBeam.from_dict(FRONTAL.to_dict() | changes)


def test_impossible_distances_points_and_views_are_refused():
    with pytest.raises(InputError, match="source_object_mm <= source_detector_mm"):
        ConeBeam.frontal(ISOCENTRE_MM, (4, 4), 1.8, source_detector_mm=1000)
    with pytest.raises(InputError, match="behind the X-ray source"):
        FRONTAL.project(FRONTAL.source_mm + [0, 10, 0])
    with pytest.raises(InputError, match="behind the X-ray source"):
        FRONTAL.project([np.nan, 0, 0])
    with pytest.raises(InputError, match="two or more views"):
        triangulate([FRONTAL], np.zeros((1, 3, 2)))
    with pytest.raises(InputError, match="different directions"):
        triangulate([FRONTAL, FRONTAL], np.zeros((2, 3, 2)))
