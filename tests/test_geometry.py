"""Frames, grids and planar motion: analytic truth, round trips, invariance, bad input."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, PlanarTransform, Projection, VolumeGrid, move_projection

GRID = PlanarGrid("coronal", (40, 30), (3.0, 2.4), (100.0, 36.0))
small = st.floats(-50, 50)


def test_first_pixel_is_superior_and_on_the_patients_right():
    assert GRID.superior_mm()[0] == 100.0 > GRID.superior_mm()[-1]
    assert GRID.lateral_mm()[0] == 36.0 > GRID.lateral_mm()[-1]


@given(small, small)
def test_pixel_and_mm_are_inverse(superior, lateral):
    assert np.allclose(GRID.pixel_to_mm(*GRID.mm_to_pixel(superior, lateral)), (superior, lateral))


def test_centred_grid_has_its_middle_there():
    assert np.allclose(PlanarGrid.centred("sagittal", (7, 10), (2.0, 1.5), (12.0, -3.0)).centre_mm, (12.0, -3.0))


@pytest.mark.parametrize(("view", "axis"), [("coronal", 0), ("sagittal", 1)])
def test_affine_carries_the_stored_array_to_ras(view, axis):
    grid = PlanarGrid(view, (40, 30), (3.0, 2.4), (100.0, 36.0))
    last = np.array([0, 0, 39, 1])
    last[axis] = 29
    corner = grid.affine() @ last
    assert np.allclose(corner[[axis, 2]], (36.0, 100.0))


@given(st.floats(-20, 20), small, small, small, small, small, small)
def test_transform_and_inverse_cancel(angle, dr, ds, cr, cs, right, superior):
    motion = PlanarTransform(angle, dr, ds, cr, cs)
    assert np.allclose(motion.inverse().apply(*motion.apply(right, superior)), (right, superior), atol=1e-9)
    assert np.allclose(motion.about(0, 0).apply(right, superior), motion.apply(right, superior), atol=1e-9)


def test_positive_rotation_turns_the_head_to_the_patients_right():
    right, superior = PlanarTransform(90.0).apply(0.0, 10.0)
    assert np.allclose((right, superior), (10.0, 0.0), atol=1e-12)


def test_moved_image_carries_a_point_with_it():
    values = np.zeros((1, 60, 60), np.float32)
    grid = PlanarGrid.centred("coronal", (60, 60), (2.0, 2.0), (0.0, 0.0))
    row, col = (int(round(float(v))) for v in grid.mm_to_pixel(31.0, 11.0))
    values[0, row, col] = 1.0
    superior, right = (float(v) for v in grid.pixel_to_mm(row, col))
    motion = PlanarTransform(30.0, 5.0, -8.0)
    moved = move_projection(Projection(("spot",), values, grid), motion, grid)
    found = np.unravel_index(moved.values[0].argmax(), (60, 60))
    expected = grid.mm_to_pixel(*motion.apply(right, superior)[::-1])
    assert np.allclose(found, expected, atol=0.75)


def test_mirrored_image_mirrors_places():
    values = np.zeros((1, 40, 30), np.float32)
    values[0, 4, 3] = 1.0
    image = Projection(("spot",), values, GRID).mirrored()
    row, col = np.unravel_index(image.values[0].argmax(), (40, 30))
    assert np.allclose(image.grid.pixel_to_mm(row, col), np.multiply(GRID.pixel_to_mm(4, 3), (1, -1)))


def test_resampling_to_the_same_grid_changes_nothing():
    image = Projection(("a",), np.random.default_rng(0).random((1, 40, 30)).astype(np.float32), GRID)
    assert np.allclose(image.resampled(GRID).values, image.values, atol=1e-6)


def test_volume_grid_covers_its_bounds():
    grid = VolumeGrid.from_bounds((-5, 0, 10), (5, 7, 21), (2.0, 2.0, 3.0))
    ends = np.array([axis[[0, -1]] for axis in grid.axes_mm()])
    assert (ends[:, 0] <= (-5, 0, 10)).all()
    assert (ends[:, 1] >= (5, 7, 21)).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PlanarGrid("ap", (4, 4), (1, 1), (0, 0)), "'coronal', 'sagittal'"),
        (lambda: PlanarGrid("coronal", (4, 4), (0, 1), (0, 0)), "positive shape and spacing"),
        (lambda: Projection(("a",), np.zeros((2, 40, 30)), GRID), "must have shape"),
        (lambda: Projection(("a",), np.zeros((1, 40, 30)), GRID).channel("b"), "This image has: a"),
        (lambda: VolumeGrid.from_bounds((0, 0, 0), (1, 1, 0), 1.0), "lower < upper"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_corners_of_an_oblique_grid():
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("z", 30, degrees=True).as_matrix() * [1.0, 2.0, 3.0]
    affine[:3, 3] = [5.0, -7.0, 11.0]
    corners = VolumeGrid((3, 4, 5), affine).corners_mm()
    expected = [affine[:3, :3] @ index + affine[:3, 3] for index in product((0, 2), (0, 3), (0, 4))]
    np.testing.assert_allclose(corners, expected)
