"""Vertebrae and sacrum: realised dimensions, surfaces, symmetry, determinism."""

from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinelib.levels import VERTEBRAE
from spinelib.phantom.calibration import measure_drums
from spinelib.phantom.sacrum import sacrum_sdf, sacrum_shape
from spinelib.phantom.sdf import capsule_distances, make_capsules, smooth_max, smooth_min
from spinelib.phantom.vertebra import body_sdf, vertebra_mesh, vertebra_sdf, vertebra_shapes

LEVELS = (*VERTEBRAE[:19], "T13", *VERTEBRAE[19:], "L6")
_MODEL = {"T13": "T12", "L6": "L5"}
_COLUMNS = {
    "height_anterior_mm": "body_h_ant_mm", "height_posterior_mm": "body_h_post_mm",
    "endplate_depth_mm": "endplate_d_mm",
    "canal_width_mm": "canal_w_mm", "canal_depth_mm": "canal_d_mm", "pedicle_width_mm": "pedicle_w_mm",
    "pedicle_height_mm": "pedicle_h_mm", "tp_span_mm": "tp_span_mm",
    "spinous_length_mm": "spinous_len_from_post_wall_mm", "spinous_drop_mm": "spinous_tip_drop_mm",
    "disc_below_mm": "disc_below_h_mm",
}  # fmt: skip


def table_dims(levels, scale=1.0):
    """Mean dimensions of the morphometry table as `Subject.dims`."""
    table = pd.read_csv(str(files("spinelib.phantom") / "morphometry.csv")).set_index("level")
    rows = table.loc[[_MODEL.get(level, level) for level in levels]]
    dims = {name: np.nan_to_num(rows[column].to_numpy(float), nan=2.0) * scale for name, column in _COLUMNS.items()}
    widths = rows[["endplate_w_sup_mm", "endplate_w_inf_mm"]].to_numpy(float).mean(1)
    dims["endplate_width_mm"] = np.nan_to_num(widths, nan=17.0) * scale
    dims["coronal_wedge_deg"] = np.zeros(len(levels))
    return dims


@pytest.fixture(scope="module")
def shapes():
    return dict(zip(LEVELS, vertebra_shapes(LEVELS, table_dims(LEVELS), 3), strict=True))


def _requests(levels, dims):
    return [{name: float(values[i]) for name, values in dims.items()} for i in range(len(levels))]


def _measured(levels, dims, seed):
    built = vertebra_shapes(levels, dims, seed)
    return measure_drums([s.drum for s in built], [s.warp for s in built], _requests(levels, dims))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.85, 1.15), wedge=st.floats(-8, 8))
def test_realised_dimensions_equal_the_request(seed, scale, wedge):
    levels = LEVELS[1:]
    dims = table_dims(levels, scale) | {"coronal_wedge_deg": np.full(len(levels), wedge)}
    measured = _measured(levels, dims, seed)
    for name, values in measured._asdict().items():
        np.testing.assert_allclose(values, dims[name], atol=0.2, err_msg=name)


def test_wedge_fracture_in_the_request_is_realised():
    dims = table_dims(("T8", "L1"))
    dims["height_anterior_mm"] = 0.6 * dims["height_anterior_mm"]
    measured = _measured(("T8", "L1"), dims, 5)
    np.testing.assert_allclose(measured.height_anterior_mm, dims["height_anterior_mm"], atol=0.2)
    np.testing.assert_allclose(measured.height_posterior_mm, dims["height_posterior_mm"], atol=0.2)


def test_mesh_of_the_body_has_the_requested_width_and_depth(shapes):
    """Independent of the calibration's own rays: sections of a dense grid through L3 and T8."""
    dims = table_dims(LEVELS)
    for level in ("L3", "T8"):
        i = LEVELS.index(level)
        up = 0.35 * min(dims["height_anterior_mm"][i], dims["height_posterior_mm"][i])
        line = torch.arange(-40, 40, 0.02)
        extents = []
        for axis in (0, 1):
            for height in (up, -up):
                points = torch.zeros(len(line), 3)
                points[:, axis], points[:, 2] = line, height
                extents.append(0.02 * float((body_sdf(shapes[level], points) < 0).sum()))
        assert np.mean(extents[:2]) == pytest.approx(dims["endplate_width_mm"][i], abs=0.2)
        assert np.mean(extents[2:]) == pytest.approx(dims["endplate_depth_mm"][i], abs=0.2)


def test_meshes_are_closed_single_and_of_human_volume(shapes):
    volumes = {}
    for level, shape in shapes.items():
        mesh = vertebra_mesh(shape, 1.5)
        assert mesh.is_watertight and mesh.body_count == 1, level
        assert np.all(mesh.bounds[0] > shape.bounds_mm[:, 0]) and np.all(mesh.bounds[1] < shape.bounds_mm[:, 1]), level
        volumes[level] = mesh.volume / 1000
    assert 35 < volumes["L3"] < 65 and 18 < volumes["T8"] < 30 and 7 < volumes["C5"] < 11, volumes


@pytest.mark.parametrize("level", ["C1", "C2", "C5", "T4", "L3"])
def test_nothing_is_lost_with_the_largest_component(shapes, level):
    shape = shapes[level]
    axes = [torch.arange(lower, upper, 1.0) for lower, upper in shape.bounds_mm]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    inside = float((vertebra_sdf(shape, points)[1] < 0).sum())
    assert vertebra_mesh(shape, 1.0).volume == pytest.approx(inside, rel=0.03)


def test_spinous_process_and_transverse_span_follow_the_request(shapes):
    dims = table_dims(LEVELS)
    for level in ("C7", "T1", "T8", "T12", "L1", "L3", "L5"):
        i = LEVELS.index(level)
        lower, upper = vertebra_mesh(shapes[level], 1.5).bounds
        span, tip = dims["tp_span_mm"][i], dims["endplate_depth_mm"][i] / 2 + dims["spinous_length_mm"][i]
        assert upper[0] - lower[0] == pytest.approx(span, rel=0.1), level
        assert -lower[1] == pytest.approx(tip, rel=0.1), level


def test_canal_is_open(shapes):
    dims = table_dims(LEVELS)
    for level in LEVELS[1:]:
        i = LEVELS.index(level)
        middle = -dims["endplate_depth_mm"][i] / 2 - 0.45 * dims["canal_depth_mm"][i]
        points = torch.tensor([[0.0, middle, h] for h in np.linspace(-8, 8, 9)], dtype=torch.float32)
        assert float(vertebra_sdf(shapes[level], points)[1].min()) > 3.0, level


def test_body_is_part_of_the_whole(shapes):
    points = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0)) * 80 - 40
    for shape in shapes.values():
        body, whole = vertebra_sdf(shape, points)
        assert bool((whole <= body + 1e-6).all())
        torch.testing.assert_close(body, body_sdf(shape, points))


def test_distance_is_close_to_millimetres_outside(shapes):
    """Moving by t away from the body along its axes changes the distance by about t."""
    shape = shapes["L3"]
    far = torch.tensor([[35.0, 0, 0], [0, 30, 0], [0, 0, 25]])
    near = far - 5 * torch.nn.functional.normalize(far, dim=1)
    change = body_sdf(shape, far) - body_sdf(shape, near)
    torch.testing.assert_close(change, torch.full((3,), 5.0), atol=0.6, rtol=0)


def test_mirrored_shape_is_exact(shapes):
    points = torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)) * 100 - 50
    flipped = points * torch.tensor([-1.0, 1, 1])
    for level in ("C1", "C4", "T6", "L5"):
        there = vertebra_sdf(shapes[level].mirrored(), flipped)
        for a, b in zip(vertebra_sdf(shapes[level], points), there, strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(vertebra_sdf(shapes[level], points)[1], vertebra_sdf(shapes[level], flipped)[1])


def test_mirrored_person_has_mirrored_shapes():
    dims = table_dims(("T8", "L3")) | {"coronal_wedge_deg": np.array([4.0, -3.0])}
    flipped = dims | {"coronal_wedge_deg": -dims["coronal_wedge_deg"]}
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(2)) * 60 - 30
    for a, b in zip(
        vertebra_shapes(("T8", "L3"), dims, 9),
        vertebra_shapes(("T8", "L3"), flipped, 9, is_mirrored=True),
        strict=True,
    ):
        assert torch.equal(vertebra_sdf(a, points)[1], vertebra_sdf(b, points * torch.tensor([-1.0, 1, 1]))[1])


def test_coronal_wedge_is_taller_on_the_right():
    dims = table_dims(("L3",)) | {"coronal_wedge_deg": np.array([10.0])}
    shape = vertebra_shapes(("L3",), dims, 4)[0]
    line = torch.arange(-30, 30, 0.02)
    height = [
        0.02 * float((body_sdf(shape, torch.stack([torch.full_like(line, x), 0 * line, line], 1)) < 0).sum())
        for x in (15.0, -15.0)
    ]
    assert height[0] - height[1] == pytest.approx(2 * 30 * np.tan(np.radians(5.0)), abs=0.5)


def test_same_seed_same_bytes_other_seed_differs():
    dims = table_dims(LEVELS)
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(3)) * 60 - 30
    first, again, other = (vertebra_shapes(LEVELS, dims, seed) for seed in (7, 7, 8))
    for a, b, c in zip(first, again, other, strict=True):
        value = vertebra_sdf(a, points)[1]
        assert torch.equal(value, vertebra_sdf(b, points)[1])
        assert not torch.equal(value, vertebra_sdf(c, points)[1])


def test_a_level_keeps_its_shape_in_another_company():
    alone = vertebra_shapes(("T12",), table_dims(("T12",)), 11)[0]
    among = vertebra_shapes(LEVELS, table_dims(LEVELS), 11)[LEVELS.index("T12")]
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(4)) * 60 - 30
    torch.testing.assert_close(vertebra_sdf(alone, points)[1], vertebra_sdf(among, points)[1], atol=1e-3, rtol=0)


def test_osteophytes_widen_the_rims_only():
    dims = table_dims(("L4",))
    plain = vertebra_shapes(("L4",), dims, 2)[0]
    worn = vertebra_shapes(("L4",), dims, 2, {"osteophyte_mm": np.array([4.0])})[0]
    grid = torch.stack(torch.meshgrid(torch.arange(0, 40, 0.1), torch.arange(0, 16, 0.25), indexing="ij"), -1)
    points = torch.stack([grid[..., 0], torch.zeros_like(grid[..., 0]), grid[..., 1]], -1)
    before, after = ((body_sdf(shape, points) < 0).sum(0) * 0.1 for shape in (plain, worn))
    assert 2.5 < float(after.max() - before.max()) < 4.1
    assert float(after[0]) == pytest.approx(float(before[0]), abs=0.11)


def test_shape_of_points_is_kept_and_empty_input_is_fine(shapes):
    body, whole = vertebra_sdf(shapes["L2"], torch.zeros(2, 3, 4, 3))
    assert body.shape == whole.shape == (2, 3, 4)
    assert vertebra_sdf(shapes["L2"], torch.zeros(0, 3))[1].shape == (0,)


def test_bad_dims_are_refused():
    dims = table_dims(("L3", "L4"))
    with pytest.raises(ValueError, match="missing: .'tp_span_mm'"):
        vertebra_shapes(("L3", "L4"), {k: v for k, v in dims.items() if k != "tp_span_mm"}, 0)
    with pytest.raises(ValueError, match="wrong length"):
        vertebra_shapes(("L3",), dims, 0)
    with pytest.raises(ValueError, match="L4 must be positive"):
        vertebra_shapes(("L3", "L4"), dims | {"canal_width_mm": np.array([20.0, np.nan])}, 0)


def test_sacrum_is_closed_and_of_the_published_size():
    for sex, width, length in (("M", 121, 150), ("F", 119, 139)):
        shape = sacrum_shape(50.0, 34.0, sex, 1)
        mesh = vertebra_mesh(shape, 2.0)
        assert mesh.is_watertight and mesh.body_count == 1
        extents = mesh.extents
        assert extents[0] == pytest.approx(width, rel=0.12)
        assert 0.75 * length < np.hypot(extents[2], 0.3 * extents[1]) < 1.1 * length
        body, whole = sacrum_sdf(shape, torch.tensor([[0.0, 0, -5], [0, 0, 3], [50, -10, -10]]))
        assert float(body[0]) < 0 < float(body[1])
        assert float(whole[2]) < 0 < float(body[2])


def test_sacral_plate_lies_on_the_origin():
    shape = sacrum_shape(52.0, 34.5, "M", 2)
    line = torch.stack([torch.zeros(4001), torch.zeros(4001), torch.linspace(-10, 10, 4001)], 1)
    top = float(line[body_sdf(shape, line) < 0, 2].max())
    assert top == pytest.approx(0.0, abs=1.5)


def test_unknown_sacrum_is_refused():
    with pytest.raises(ValueError, match="sex 'F' or 'M'"):
        sacrum_shape(50.0, 34.0, "X", 1)


@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0.5, 6))
def test_smooth_operators_bound_the_sharp_ones(a, b, blend):
    a, b = torch.tensor(a), torch.tensor(b)
    low, high = smooth_min(a, b, blend), smooth_max(a, b, blend)
    assert torch.minimum(a, b) - blend / 4 - 1e-4 <= low <= torch.minimum(a, b) + 1e-4
    torch.testing.assert_close(high, -smooth_min(-a, -b, blend))
    if abs(float(a - b)) > blend + 1e-3:
        assert float(low) == pytest.approx(float(torch.minimum(a, b)), abs=1e-4)


def test_round_capsule_distance_is_exact():
    capsules = make_capsules([[0, 0, 0]], [[10.0, 0, 0]], [[3.0, 3, 3, 3]], [[0, 0, 1.0]], [0.0])
    points = torch.tensor([[5.0, 4, 3], [14, 0, 3], [-6, 8, 0], [5, 0, 1]]).T
    expected = torch.tensor([[5.0 - 3, 5 - 3, 10 - 3, 1 - 3]])
    torch.testing.assert_close(capsule_distances(capsules, points.contiguous()), expected, atol=1e-3, rtol=0)
