"""Figures of registrations show what they are given, where it is."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from nibabel.affines import apply_affine
from registration_cases import LOWER, UPPER, two_vertebrae
from scipy.ndimage import distance_transform_edt
from scipy.spatial.transform import Rotation

from spinelib import registration_figures as figures
from spinelib.deformation import DisplacementField
from spinelib.errors import InputError
from spinelib.figures import PREDICTED, TRUTH
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.sections import sampled
from spinelib.imaging.surfaces import vertebra_meshes
from spinelib.levels import COLOURS
from spinelib.registration_metrics import DIRECTIONS, pose_table

mpl.use("agg")
pytestmark = pytest.mark.usefixtures("house_style")


@pytest.fixture(scope="module")
def case():
    return two_vertebrae(scale=0.7, slice_mm=2.0)


def still(case):
    return DisplacementField.zero(case.mr.grid)


def legend_names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines_of(axes, colour):
    """Points (n, 2) of the contours of a colour: across, superior."""
    drawn = [c for c in axes.collections if len(c.get_edgecolor()) and np.allclose(c.get_edgecolor(), to_rgba(colour))]
    return np.concatenate([path.vertices for collection in drawn for path in collection.get_paths()])


def shown(axes):
    return np.asarray(axes.images[0].get_array())


def named_levels(axes):
    return {text.get_text() for text in axes.texts} - set("APRL ") - {" A ", " P ", " R ", " L "}


# --- pictures ---


def test_squares_show_ct_and_mr_in_turn_and_only_the_ct_moves(case):
    figure = figures.checkerboard(case.ct, case.ct_labels, case.mr, case.field, "pair 1")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        f"{view}, {stage}" for view in ("sagittal", "coronal") for stage in ("before", "after")
    ]
    assert legend_names(figure) == ["CT", "MR"]
    assert figure.get_suptitle() == "pair 1"
    for before, after in ((figure.axes[0], figure.axes[1]), (figure.axes[2], figure.axes[3])):
        pictures = shown(before), shown(after)
        warm = [picture[..., 0] > picture[..., 2] for picture in pictures]  # tints
        cold = pictures[0][..., 0] < pictures[0][..., 2]
        assert 0.3 < warm[0].mean() < 0.7
        np.testing.assert_array_equal(pictures[0][cold], pictures[1][cold])
        assert np.abs(pictures[0] - pictures[1])[warm[0]].mean() > 0.02
    same = figures.checkerboard(case.ct, case.ct_labels, case.mr, still(case))
    np.testing.assert_array_equal(shown(same.axes[0]), shown(same.axes[1]))


def test_outlines_lie_on_the_bone_of_the_mr_after_and_not_before(case):
    figure = figures.overlay(case.mr, case.ct_labels, case.field, case.mr_labels)
    assert legend_names(figure) == ["CT, before", "MR", "CT, after"]
    bone = case.mr_labels.values > 0
    spacing = case.mr.spacing_mm
    edge = np.maximum(distance_transform_edt(bone, spacing), distance_transform_edt(~bone, spacing))
    away = {}
    for colour in (figures.BEFORE, TRUTH, PREDICTED):
        line = lines_of(figure.axes[0], colour)
        points = np.column_stack([np.zeros(len(line)), line])  # the middle of both bodies
        away[colour] = np.median(sampled(Volume(edge, case.mr.affine), points, order=1))
    assert away[TRUTH] == pytest.approx(1.0, abs=0.1)  # a voxel to either side
    assert away[PREDICTED] < 1.3
    assert away[figures.BEFORE] > away[PREDICTED] + 0.3
    assert {"L3", "L4"} <= named_levels(figure.axes[0])
    alone = figures.overlay(case.mr, case.ct_labels, case.field)
    assert legend_names(alone) == ["CT, before", "CT, after"]


def test_grid_lines_are_the_places_of_even_ct_coordinates(case):
    shift = np.eye(4)
    shift[:3, 3] = [0, 2, -1]
    field = DisplacementField.rigid(shift, case.mr.grid)
    axes = figures.deformation_grid(field, case.mr, case.ct_labels).axes[0]
    line = lines_of(axes, "#56B4E9")
    off = np.abs((line + [2, -1] + 2.5) % 5 - 2.5).min(axis=1)
    np.testing.assert_allclose(off, 0, atol=1e-3)
    assert axes.get_title(loc="left") == "sagittal"


def scaled(grid, factor):
    return DisplacementField.rigid(np.diag([factor, factor, factor, 1.0]), grid)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_jacobian_of_a_scaling_has_one_colour_and_no_fold(case, factor):
    figure = figures.jacobian_map(scaled(case.mr.grid, factor), case.ct_labels)
    picture = shown(figure.axes[0])
    bar = figure.axes[2].collections[-1] if figure.axes[2].collections else None
    assert bar is not None
    np.testing.assert_allclose(picture - picture[0, 0], 0, atol=0.02)
    red, _, blue = picture[10, 10, :3]
    assert np.sign(np.round(blue - red, 1)) == np.sign(round(factor - 1, 1))  # purple grows, orange shrinks
    assert legend_names(figure) == ["folded: 0% of the voxels"]


def test_folds_stand_out(case):
    values = np.zeros((*case.mr.grid.shape, 3), np.float32)
    superior = case.field.points_mm()[..., 2]
    values[..., 2] = np.clip(-2 * (superior - 20), -12, 0)  # turns around from 20 to 26 mm
    figure = figures.jacobian_map(DisplacementField(values, case.mr.grid), case.ct_labels)
    axes = figure.axes[0]
    rows = np.flatnonzero(np.all(shown(axes) == to_rgba(figures.FOLD), axis=-1).any(axis=1))
    bottom, top = axes.images[0].get_extent()[2:]
    heights = top - (rows + 0.5) * (top - bottom) / len(shown(axes))
    assert heights.min() == pytest.approx(20, abs=1.5)
    assert heights.max() == pytest.approx(26, abs=1.5)
    assert float(legend_names(figure)[0].split()[1].rstrip("%")) == pytest.approx(100 * 6 / 64, abs=2)


# --- poses ---


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.floats(-0.5, 0.5)] * 3), st.tuples(*[st.floats(-20, 20)] * 3))
def test_pose_table_holds_rotation_vector_and_way_of_the_centroid(turn, way):
    values = np.zeros((9, 9, 9), np.uint8)
    values[2:5, 3:8, 4] = 20
    labels = Volume(values, np.diag([2.0, 1.0, 3.0, 1.0]))
    centre = np.array([3 * 2, 5 * 1, 4 * 3])
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(turn).as_matrix()
    matrix[:3, 3] = centre - matrix[:3, :3] @ (centre - way)
    (row,) = pose_table({20: matrix}, labels).to_dict("records")
    assert row["level"] == "L1"
    np.testing.assert_allclose([row[f"rotation_{n}_deg"] for n in DIRECTIONS], np.degrees(turn), atol=1e-6)
    np.testing.assert_allclose([row[f"translation_{n}_mm"] for n in DIRECTIONS], way, atol=1e-9)


def test_poses_stand_by_level_beside_the_truth(case):
    found = {label: np.eye(4) for label in case.transforms}
    figure = figures.pose_plot(found, case.ct_labels, case.transforms)
    assert legend_names(figure) == ["true", "estimate"]
    truth = pose_table(case.transforms, case.ct_labels)
    for row, (kind, unit) in enumerate((("rotation", "deg"), ("translation", "mm"))):
        for axes, name in zip(figure.axes[3 * row : 3 * row + 3], DIRECTIONS, strict=True):
            true, estimate = axes.lines[:2]
            np.testing.assert_allclose(true.get_xdata(), truth[f"{kind}_{name}_{unit}"])
            np.testing.assert_allclose(estimate.get_xdata(), 0, atol=1e-9)
            assert name in axes.get_xlabel()
        assert [label.get_text() for label in figure.axes[3 * row].get_yticklabels()] == ["L3", "L4"]
    alone = figures.pose_plot(case.transforms, case.ct_labels)
    assert legend_names(alone) == ["estimate"]


# --- methods ---


def scores():
    return pd.DataFrame(
        {
            "method": np.repeat(["identity", "pc", "ours"], 4),
            "dice": [0.6, 0.7, 0.8, np.nan, 0.7, 0.8, 0.9, 1.0, 0.97, 0.98, 0.99, 0.98],
            "nonrigidity": np.repeat([0.2, 0.01, 1e-6], 4),
        }
    )


def test_boxes_stand_by_method_with_published_means():
    published = pd.DataFrame({"method": ["pc", "identity", "elastix"], "dice": [0.784, 0.675, 0.767]})
    figure = figures.method_boxes(scores(), "dice", published)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["no registration", "published objective, volume", "ours, rigid by construction"]
    assert [text.get_text() for text in axes.texts] == ["0.700, n = 3", "0.850, n = 4", "0.980, n = 4"]
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    np.testing.assert_allclose(list(cross.get_xdata()), [0.675, 0.784, np.nan])
    assert axes.texts[2].get_color() == PREDICTED
    assert axes.get_xlabel() == "Dice"
    assert axes.get_xscale() == "linear"
    assert legend_names(figure) == ["published mean, other data"]


def test_single_rows_far_off_are_arrows():
    rows = pd.DataFrame({"method": ["affine"] * 9 + ["pc"] * 4, "volume_change_pct": [0.0] * 8 + [500.0, 5, 6, 7, 8]})
    axes = figures.method_boxes(rows, "volume_change_pct").axes[0]
    assert 8.0 < axes.get_xlim()[1] < 16.0
    arrows = [line for line in axes.lines if line.get_marker() == ">" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in arrows] == [[pytest.approx(8.8)]]
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert sorted(len(line.get_xdata()) for line in dots) == [4, 8]


def test_wide_ranges_are_logarithmic_and_nothing_is_invented():
    figure = figures.method_boxes(scores(), "nonrigidity")
    assert figure.axes[0].get_xscale() == "log"
    assert not figure.legends
    for rows, value in ((scores(), "hd95_mm"), (scores().assign(dice=np.nan), "dice")):
        with pytest.raises(InputError, match="expected the columns method and"):
            figures.method_boxes(rows, value)


# --- 3D ---


def surface(trace):
    corners = [np.stack(parts, axis=-1) for parts in ((trace.x, trace.y, trace.z), (trace.i, trace.j, trace.k))]
    return trimesh.Trimesh(*corners)


def test_vertebrae_are_carried_to_the_mr(case):
    scene = figures.vertebrae_before_after(case.ct_labels, case.transforms, case.mr_labels, "pair")
    meshes = [trace for trace in scene.data if trace.type == "mesh3d"]
    groups = {name: [t for t in meshes if t.legendgroup == name] for name in ("CT, before", "CT, after", "MR")}
    assert [len(group) for group in groups.values()] == [2, 2, 2]
    assert [t.showlegend for t in groups["CT, after"]] == [True, False]
    assert [t.color for t in groups["CT, after"]] == [COLOURS["L3"], COLOURS["L4"]]
    assert {t.visible for t in groups["MR"]} == {"legendonly"}
    for label, before, after in zip((UPPER, LOWER), groups["CT, before"], groups["CT, after"], strict=True):
        centres = [surface(trace).center_mass for trace in (before, after)]
        np.testing.assert_allclose(apply_affine(case.transforms[label], centres[1]), centres[0], atol=0.2)
    assert len(figures.vertebrae_before_after(case.ct_labels, case.transforms).data) == 5
    assert set(vertebra_meshes(case.ct_labels)) == {"L3", "L4"}


def test_3d_needs_a_vertebra(case):
    empty = Volume(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    for labels, transforms in ((empty, {}), (case.ct_labels, {})):
        with pytest.raises(InputError, match="no vertebra to show"):
            figures.vertebrae_before_after(labels, transforms)


def test_views_follow_turned_grids(case):
    """The MR's axes may be turned against the world: what is drawn stays where it is."""
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (8, -6, 10), degrees=True).as_matrix()
    grid = VolumeGrid(case.mr.values.shape, turn @ case.mr.affine)
    mr = Volume(case.mr.values, grid.affine)
    figure = figures.overlay(mr, case.ct_labels, DisplacementField.rigid(np.linalg.inv(turn), grid))
    for label in (UPPER, LOWER):
        mask = np.argwhere(case.ct_labels.values == label).mean(axis=0)
        place = apply_affine(turn, apply_affine(case.ct.affine, mask))
        line = lines_of(figure.axes[0], PREDICTED)
        assert np.abs(line[:, 1] - place[2]).min() < 12
