"""Displacement fields: analytic motion on oblique, anisotropic grids, inverses, rigid fits, and ITK as the judge."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from spinelib.deformation import (
    DisplacementField,
    covers,
    framed,
    grid_points_mm,
    read_field,
    resample,
    rigid_fit,
    rotation_deg,
    warp_labels,
    warp_volume,
    write_field,
    write_itk_transform,
)
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid

SHAPE = (11, 14, 9)
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])


def rigid_matrix(degrees=(4.0, -7.0, 5.0), shift_mm=(2.0, -3.0, 1.5)):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def oblique_grid(shape=SHAPE, spacing=(1.2, 0.9, 3.5), origin=(-40.0, 25.0, 310.0)):
    """A grid whose axes are turned by some 20 degrees and whose first axis runs backwards."""
    affine = rigid_matrix((20.0, -15.0, 10.0), origin)
    affine[:3, :3] *= np.array([-1.0, 1.0, 1.0]) * spacing
    return VolumeGrid(shape, affine)


def smooth_field(grid, amplitude_mm=3.0, wave_mm=9.0):
    """A field without folds, far from affine."""
    phase = (grid_points_mm(grid) - grid.affine[:3, 3]) / wave_mm
    waves = np.stack([np.sin(phase[..., 1]), np.cos(phase[..., 2]), np.sin(phase[..., 0] + 1)], axis=-1)
    return DisplacementField(amplitude_mm * waves, grid)


def noise(grid, seed=0):
    values = gaussian_filter(np.random.default_rng(seed).standard_normal(grid.shape), 1.0)
    return Volume((100 * values).astype(np.float32), grid.affine)


def as_sitk(volume):
    """The image with its LPS frame, built independently of the module."""
    image, lps = sitk.GetImageFromArray(np.asarray(volume.values).T), FLIP @ volume.affine
    image.SetSpacing(volume.spacing_mm.tolist())
    image.SetDirection((lps[:3, :3] / volume.spacing_mm).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def inner(values, margin=2):
    return values[(slice(margin, -margin),) * 3]


# --- points and derivatives ---


def test_a_rigid_field_moves_points_as_its_matrix_does():
    grid, matrix = oblique_grid(), rigid_matrix()
    field = DisplacementField.rigid(matrix, grid)
    between = grid_points_mm(grid)[1:-1, 1:-1, 1:-1] + [0.3, -0.2, 0.4]
    assert field.values.dtype == np.float32
    np.testing.assert_allclose(field.moved(between), apply_affine(matrix, between), atol=1e-4)
    np.testing.assert_allclose(field.points_mm()[0, 0, 0], grid.affine[:3, 3])


def test_the_field_is_constant_beyond_its_border():
    grid = VolumeGrid.from_bounds((0, 0, 0), (10, 10, 10), 2.0)
    field = smooth_field(grid)
    np.testing.assert_allclose(field.at([[-50.0, 4.0, 6.0], [4.0, 99.0, 6.0]]), field.values[[0, 2], [2, 5], [3, 3]])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-0.4, 0.4), min_size=9, max_size=9), st.integers(0, 10_000))
def test_the_jacobian_of_affine_motion_is_exact_up_to_the_border(entries, seed):
    rng = np.random.default_rng(seed)
    grid = oblique_grid((4, 3, 2), rng.uniform(0.5, 4.0, 3))
    motion = np.eye(4)
    motion[:3, :3] += np.reshape(entries, (3, 3))
    jacobian = DisplacementField(apply_affine(motion, grid_points_mm(grid)) - grid_points_mm(grid), grid).jacobian()
    assert jacobian.shape == (4, 3, 2, 3, 3)
    np.testing.assert_allclose(jacobian, np.broadcast_to(motion[:3, :3], jacobian.shape), atol=3e-4)


def test_the_jacobian_of_a_rigid_motion_is_its_rotation():
    jacobian = DisplacementField.rigid(rigid_matrix(), oblique_grid()).jacobian()
    assert np.abs(np.swapaxes(jacobian, -1, -2) @ jacobian - np.eye(3)).max() < 3e-5
    assert np.abs(jacobian - rigid_matrix()[:3, :3]).max() < 3e-5


# --- inverse ---


def test_the_inverse_of_a_rigid_field_is_the_inverse_matrix():
    matrix = rigid_matrix((2.0, 3.0, -4.0), (1.0, 0.5, -1.0))
    fixed = VolumeGrid.from_bounds((-20, -20, -20), (20, 20, 20), (1.0, 2.0, 4.0))
    moving = VolumeGrid.from_bounds((-9, -9, -9), (9, 9, 9), 3.0)
    found = DisplacementField.rigid(matrix, fixed).inverse(moving)
    expected = DisplacementField.rigid(np.linalg.inv(matrix), moving)
    assert found.grid is moving
    np.testing.assert_allclose(found.values, expected.values, atol=2e-3)


def test_forth_and_back_through_the_inverse_changes_nothing():
    field = smooth_field(oblique_grid((24, 28, 12)))
    there = field.inverse()
    np.testing.assert_allclose(field.moved(there.moved(there.points_mm())), there.points_mm(), atol=2e-3)


def test_strong_stretch_is_inverted_where_the_plain_iteration_diverges():
    grid = VolumeGrid.from_bounds((0, 0, 0), (40, 2, 2), 1.0)
    values = np.zeros((*grid.shape, 3))
    values[..., 0] = 1.8 * (np.arange(41)[:, None, None] - 20)  # phi' = 2.8, an iteration x <- y - u(x) grows by 1.8
    found = DisplacementField(values, grid).inverse()
    expected = -(1.8 / 2.8) * (np.arange(41) - 20)
    np.testing.assert_allclose(found.values[:, 1, 1, 0], expected, atol=2e-3)


def test_resampled_keeps_world_displacements():
    matrix, coarse = rigid_matrix(), VolumeGrid.from_bounds((0, 0, 0), (40, 40, 40), 4.0)
    fine = VolumeGrid.from_bounds((5, 5, 5), (30, 30, 30), (1.0, 1.5, 2.0))
    np.testing.assert_allclose(
        DisplacementField.rigid(matrix, coarse).resampled(fine).values,
        DisplacementField.rigid(matrix, fine).values,
        atol=1e-5,
    )


# --- images ---


def test_the_zero_field_changes_no_voxel_even_at_the_border_of_an_oblique_grid():
    grid = oblique_grid()
    image = noise(grid)
    np.testing.assert_allclose(
        warp_volume(image, DisplacementField.zero(grid), fill=-999).values, image.values, atol=1e-3
    )
    labels = Volume(np.random.default_rng(1).integers(0, 26, grid.shape), grid.affine)
    warped = warp_labels(labels, DisplacementField.zero(grid))
    assert warped.values.dtype == np.uint8 and np.array_equal(warped.values, labels.values)


def test_a_shift_by_whole_voxels_moves_the_image_against_the_field():
    grid = VolumeGrid.from_bounds((0, 0, 0), (14, 12, 20), (1.0, 2.0, 4.0))
    image, field = noise(grid), DisplacementField(np.broadcast_to([0.0, 2.0, -4.0], (*grid.shape, 3)), grid)
    warped = warp_volume(image, field, fill=7.0).values
    np.testing.assert_allclose(warped[:, :-1, 1:], image.values[:, 1:, :-1], atol=1e-4)
    assert (warped[:, -1] == 7).all() and (warped[:, :, 0] == 7).all()


def test_labels_that_leave_the_field_of_view_become_background():
    grid = oblique_grid()
    labels = Volume(np.full(grid.shape, 20, np.uint8), grid.affine)
    away = DisplacementField(np.full((*grid.shape, 3), 500.0), grid)
    assert not warp_labels(labels, away).values.any()


def test_coarse_labels_move_by_parts_of_a_voxel():
    coarse, fine = (VolumeGrid.from_bounds((0, 0, 0), (24, 24, 24), (mm,) * 3) for mm in (3.0, 0.5))
    ball = np.linalg.norm(grid_points_mm(coarse) - 12, axis=-1) < 8
    labels = Volume(ball * np.uint8(20), coarse.affine)
    for shift in (0.5, 1.0, 1.4):
        values = warp_labels(labels, DisplacementField(np.full((*fine.shape, 3), [shift, 0.0, 0.0]), fine)).values
        assert set(np.unique(values)) == {0, 20}
        centre = apply_affine(fine.affine, np.argwhere(values)).mean(axis=0)
        np.testing.assert_allclose(centre, [12 - shift, 12, 12], atol=0.05)


def test_the_larger_share_wins_where_labels_meet():
    grid = VolumeGrid.from_bounds((0, 0, 0), (5, 2, 2), (1.0, 1.0, 1.0))
    values = np.full(grid.shape, 20, np.uint8)
    values[3:] = 21
    shift = DisplacementField(np.full((*grid.shape, 3), [0.3, 0.0, 0.0]), grid)
    assert (warp_labels(Volume(values, grid.affine), shift).values == values).all()


def test_resample_reads_the_same_world_point():
    source, target = oblique_grid((20, 20, 20), (2.0, 2.0, 2.0)), oblique_grid((9, 8, 7), (2.5, 1.5, 3.0))
    ramp = Volume(grid_points_mm(source) @ [1.0, -2.0, 0.5], source.affine)
    result = resample(ramp, target)
    np.testing.assert_allclose(result.values, grid_points_mm(target) @ [1.0, -2.0, 0.5], atol=1e-6)
    assert resample(Volume(ramp.values.astype(np.uint8), ramp.affine), target, order=0).values.dtype == np.uint8


def test_a_grid_covers_its_voxels_and_no_more():
    grid = VolumeGrid.from_bounds((0, 0, 0), (4, 4, 4), 2.0)
    assert covers(grid, [[0, 0, 0], [4.99, 2, 2], [5.1, 2, 2], [2, -0.99, 2], [2, 2, -1.1]]).tolist() == [1, 1, 0, 1, 0]


# --- rigid motions ---


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.tuples(*[st.floats(-170, 170)] * 3))
def test_a_rigid_motion_is_recovered_exactly(seed, degrees):
    rng = np.random.default_rng(seed)
    x, matrix = rng.uniform(-200, 200, (30, 3)), rigid_matrix(degrees, rng.uniform(-50, 50, 3))
    np.testing.assert_allclose(rigid_fit(x, apply_affine(matrix, x), rng.uniform(0.1, 1, 30)), matrix, atol=1e-8)


def test_the_fit_has_the_least_weighted_squares():
    rng = np.random.default_rng(3)
    x, weights = rng.uniform(-20, 20, (50, 3)), rng.uniform(0, 1, 50)
    y = apply_affine(rigid_matrix(), x) + rng.normal(0, 1, x.shape)
    best = rigid_fit(x, y, weights)

    def cost(matrix):
        return weights @ ((apply_affine(matrix, x) - y) ** 2).sum(axis=1)

    for _ in range(50):
        nudge = rigid_matrix(rng.normal(0, 0.3, 3), rng.normal(0, 0.05, 3))
        assert cost(best) < cost(nudge @ best)


def test_points_of_weight_zero_do_not_count():
    rng = np.random.default_rng(4)
    x = rng.uniform(-20, 20, (20, 3))
    y = apply_affine(rigid_matrix(), x)
    y[:5] += 100
    np.testing.assert_allclose(rigid_fit(x, y, np.arange(20) >= 5), rigid_matrix(), atol=1e-9)


def test_a_mirror_is_answered_with_a_proper_rotation():
    x = np.random.default_rng(5).uniform(-20, 20, (20, 3))
    assert np.linalg.det(rigid_fit(x, x * [-1, 1, 1])[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 30.0, 179.999])
def test_the_angle_of_a_rotation(degrees):
    axis = np.array([1.0, 2.0, -2.0]) / 3
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * axis).as_matrix()
    assert rotation_deg(matrix) == pytest.approx(degrees, abs=1e-7)
    assert rotation_deg(matrix[:3, :3].T) == pytest.approx(degrees, abs=1e-7)


@pytest.mark.parametrize(
    "x",
    [np.zeros((2, 3)), np.outer(np.arange(9.0), [1, 2, 3]), np.zeros((0, 3))],
    ids=["two points", "one line", "none"],
)
def test_points_that_fix_no_rotation_are_refused(x):
    with pytest.raises(InputError, match="not on one line"):
        rigid_fit(x, x)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="pairs of points"):
        rigid_fit(np.zeros((5, 3)), np.zeros((4, 3)))


# --- files: ITK warps with them as we do ---


def itk_warped(transform, moving, fixed_grid):
    fixed = as_sitk(Volume(np.zeros(fixed_grid.shape, np.float32), fixed_grid.affine))
    return sitk.GetArrayFromImage(sitk.Resample(as_sitk(moving), fixed, transform, sitk.sitkLinear, -50.0)).T


def oblique_pair():
    fixed = oblique_grid((16, 18, 10), (1.3, 1.1, 3.3))
    moving_affine = rigid_matrix((-8.0, 12.0, 30.0), fixed.affine[:3, 3] - [28.0, 8.0, 8.0])
    moving_affine[:3, :3] *= 1.5
    return smooth_field(fixed, 2.0), noise(VolumeGrid((30, 34, 36), moving_affine))


def test_itk_resamples_with_the_written_transform_as_warp_volume_does(tmp_path):
    field, moving = oblique_pair()
    ours = warp_volume(moving, field, fill=-50.0).values
    assert 0.3 < np.mean(ours != -50) < 1
    for name in ("field.h5", "field.tfm"):
        transform = sitk.ReadTransform(str(write_itk_transform(tmp_path / name, field)))
        assert np.abs(inner(itk_warped(transform, moving, field.grid) - ours)).max() < 1e-2


def test_itk_reads_the_nifti_field_as_its_own(tmp_path):
    field, moving = oblique_pair()
    image = sitk.ReadImage(str(write_field(tmp_path / "new" / "field.nii.gz", field)), sitk.sitkVectorFloat64)
    theirs = itk_warped(sitk.DisplacementFieldTransform(image), moving, field.grid)
    assert np.abs(inner(theirs - warp_volume(moving, field, fill=-50.0).values)).max() < 1e-2
    header = nib.load(tmp_path / "new" / "field.nii.gz").header
    assert int(header["intent_code"]) == 1007 and header.get_data_shape() == (*field.grid.shape, 1, 3)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["field.nii.gz"]


def test_fields_of_our_own_and_of_itk_are_read_back(tmp_path):
    field, _ = oblique_pair()
    ours = write_field(tmp_path / "ours.nii.gz", field)
    sitk.WriteImage(sitk.ReadImage(str(ours)), str(tmp_path / "itk.nii"))
    for path in (ours, tmp_path / "itk.nii"):
        back = read_field(path)
        np.testing.assert_array_equal(back.values, field.values)
        np.testing.assert_allclose(back.grid.affine, field.grid.affine, atol=1e-4)


# --- bad input ---


@pytest.mark.parametrize("values", [np.zeros((4, 4, 4)), np.zeros((4, 4, 5, 3)), np.full((4, 4, 4, 3), np.nan)])
def test_values_that_are_no_field_are_refused(values):
    with pytest.raises(InputError, match="finite displacements"):
        DisplacementField(values, VolumeGrid((4, 4, 4), np.eye(4)))


def test_a_single_slice_has_no_derivative():
    with pytest.raises(InputError, match="at least 2 voxels"):
        DisplacementField.zero(VolumeGrid((8, 8, 1), np.eye(4))).jacobian()


def test_files_that_hold_no_field_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 1, 3), np.float32), np.eye(4)), tmp_path / "no_intent.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "image.nii.gz")
    (tmp_path / "text.nii.gz").write_text("not an image")
    for name, match in {
        "no_intent.nii.gz": "intent 'vector'",
        "image.nii.gz": "displacement field",
        "text.nii.gz": "cannot read",
        "absent.nii.gz": "cannot read",
    }.items():
        with pytest.raises(InputError, match=match):
            read_field(tmp_path / name)


@pytest.mark.parametrize(("write", "name"), [(write_field, "field.h5"), (write_itk_transform, "field.nii.gz")])
def test_a_wrong_ending_is_refused_and_nothing_written(tmp_path, write, name):
    with pytest.raises(InputError, match="change the ending"):
        write(tmp_path / name, DisplacementField.zero(oblique_grid()))
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_field(tmp_path / "file" / "field.nii.gz", DisplacementField.zero(oblique_grid()))


def test_itk_is_given_no_sheared_grid(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.2
    with pytest.raises(InputError, match="right angles"):
        write_itk_transform(tmp_path / "field.h5", DisplacementField.zero(VolumeGrid((4, 4, 4), affine)))


def test_a_part_of_a_volume_stays_where_it_is():
    values = np.arange(6 * 7 * 8).reshape(6, 7, 8)
    volume = Volume(values, np.diag([2.0, 1.0, 3.0, 1.0]))
    mask = np.zeros(values.shape, bool)
    mask[4, 3:5, 1] = True
    part = framed(volume, mask, margin_mm=2.0)
    np.testing.assert_array_equal(part.values, values[3:6, 1:7, 0:3])
    np.testing.assert_allclose(part.affine[:3, 3], [6.0, 1.0, 0.0])
    assert framed(volume, mask).values.shape == (1, 2, 1)
