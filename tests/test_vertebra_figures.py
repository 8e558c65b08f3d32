"""Figures of vertebrae show what they are given, where it is; sections and surfaces against analytic truth."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from drawn_spines import BODY_MM, block_spine
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from scipy.spatial.transform import Rotation

from spinelib import vertebra_figures as figures
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.sections import curved_section, heat_centres, projected, sampled
from spinelib.imaging.surfaces import vertebra_meshes
from spinelib.levels import COLOURS, LEVEL_OF_LABEL, VERSE_LABELS

mpl.use("agg")
pytestmark = pytest.mark.usefixtures("house_style")
NAMES = ["T11", "T12", "L1", "L2"]


@pytest.fixture(scope="module")
def scan():
    return block_spine()


@pytest.fixture(scope="module")
def bent():
    """Seven vertebrae whose middle lies 55 mm off the line through the ends, more than a body's width."""
    return block_spine(labels=range(14, 21), bend_mm=55.0)


def ramp(turn=None, shape=(30, 34, 40), step=(2.0, 2.5, 3.0)):
    """A volume whose value is 2 right + 3 anterior - superior, on a grid that may be turned."""
    affine = np.diag([*step, 1.0])
    affine[:3, :3] = (np.eye(3) if turn is None else turn) @ affine[:3, :3]
    affine[:3, 3] = [-30, -40, 100]
    world = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    return Volume((world @ [2, 3, -1]).astype(np.float32), affine)


def level_names(axes):
    return {text.get_text(): text for text in axes.texts if text.get_text().strip() in VERSE_LABELS}


# --- sections ---


@pytest.mark.parametrize("name", ["sagittal", "coronal"])
def test_a_section_follows_the_bodies_and_keeps_millimetres(bent, name):
    section = curved_section(name, bent.ct.grid, bent.centroids_mm)
    along, away = (1, 0) if name == "sagittal" else (0, 1)
    superior, lateral = section.points[:, 0, 2], section.points[0, :, along]
    for centre in bent.centroids_mm.values():
        row = np.abs(superior - centre[2]).argmin()
        np.testing.assert_allclose(section.points[row, :, away], centre[away], atol=0.6)
        assert lateral.min() < centre[along] < lateral.max()
    left, right, bottom, top = section.extent
    assert (left - right) / len(lateral) == pytest.approx(lateral[0] - lateral[1])
    assert (top - bottom) / len(superior) == pytest.approx(superior[0] - superior[1])
    assert left > right
    assert top > bottom


@settings(max_examples=20, deadline=None)
@given(st.tuples(*[st.floats(-25, 25)] * 3))
def test_values_are_read_where_they_lie_on_turned_grids(angles):
    volume = ramp(Rotation.from_euler("xyz", angles, degrees=True).as_matrix())
    inside = np.random.default_rng(0).uniform([2, 2, 2], [27, 31, 37], (50, 3))
    world = inside @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    np.testing.assert_allclose(sampled(volume, world, order=1), world @ [2, 3, -1], atol=1e-2)
    assert sampled(volume, world + 1e4, order=1, fill=-7).tolist() == [-7] * 50


def test_without_centres_a_section_is_the_flat_middle(scan):
    section = curved_section("coronal", scan.ct.grid, {})
    assert np.ptp(section.points[..., 1]) == 0
    assert section.extent[0] - section.extent[1] == pytest.approx(150, abs=3)


def test_the_whole_volume_shows_when_asked(scan):
    near, whole = (curved_section("sagittal", scan.ct.grid, scan.centroids_mm, whole=w) for w in (False, True))
    assert whole.extent[0] >= near.extent[0]
    assert whole.extent[0] - whole.extent[1] == pytest.approx(130, abs=3)


def test_a_projection_keeps_the_largest_value_and_its_place():
    values = np.zeros((20, 24, 30), np.float32)
    values[4:7, 10:13, 20:23] = 0.8
    heat = Volume(values, np.diag([4.0, 4.0, 4.0, 1.0]))
    for name, along, lateral in (("sagittal", 1, 44), ("coronal", 0, 20)):
        seen, (left, right, bottom, top) = projected(heat, heat.grid, name)
        assert seen.max() == pytest.approx(0.8, abs=1e-6)
        rows, columns = (
            np.linspace(a, b, 2 * n + 1)[1::2] for a, b, n in zip((top, left), (bottom, right), seen.shape, strict=True)
        )
        strong = np.argwhere(seen > 0.7)
        assert rows[strong[:, 0]].mean() == pytest.approx(84, abs=2)
        assert columns[strong[:, 1]].mean() == pytest.approx(lateral, abs=2), along


def test_heat_is_followed_where_it_is():
    values = np.zeros((20, 24, 60), np.float32)
    for k in range(4, 56, 4):
        values[6 + k // 8, 12, k] = 0.3 if k > 30 else 1.0  # weak heat counts as well
    values[0, 0, 0] = 0.05
    centres = heat_centres(Volume(values, np.diag([4.0, 4.0, 4.0, 1.0])))
    points = np.array([centres[k] for k in sorted(centres)])
    np.testing.assert_allclose(points[:, 1], 48)
    assert np.all(np.diff(points[:, 0]) >= 0)
    assert points[0, 0] < 30
    assert points[-1, 0] >= 44


# --- surfaces ---


@pytest.mark.parametrize("step", [(0.4, 0.4, 1.0), (1, 1, 1), (2, 2, 2), (0.8, 0.8, 2.5)])
def test_a_ball_has_its_surface(step):
    turn = Rotation.from_euler("xyz", (10, -8, 20), degrees=True).as_matrix()
    shape = np.round(54 / np.array(step)).astype(int)
    affine = np.eye(4)
    affine[:3, :3] = turn * step
    affine[:3, 3] = [40, -20, 900]
    centre = affine[:3, :3] @ (shape / 2) + affine[:3, 3]
    world = np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]
    ball = np.linalg.norm(world - centre, axis=-1) < 20
    (name, mesh), *rest = vertebra_meshes(Volume(ball.astype(np.uint8) * 28, affine)).items()
    assert (name, rest) == ("T13", [])
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 20**3, rel=0.03)
    distance = np.linalg.norm(mesh.vertices - centre, axis=1)
    assert np.abs(distance - 20).max() < 0.75 * max(step) + 0.3
    np.testing.assert_allclose(mesh.center_mass, centre, atol=0.25)


def test_blocks_come_top_to_bottom_and_closed():
    scan = block_spine(labels=(19, 28, 20, 25, 26))
    meshes = vertebra_meshes(scan.labels)
    assert list(meshes) == ["T12", "T13", "L1", "L6"]  # the sacrum is no vertebra
    for level, mesh in meshes.items():
        centre = scan.centroids_mm[VERSE_LABELS[level]]
        assert mesh.is_watertight
        assert mesh.volume > 0
        np.testing.assert_allclose(mesh.bounds[:, 0], centre[0] + BODY_MM[0] / 2 * np.array([-1, 1]), atol=0.7)


def test_a_surface_through_voxel_centres_does_not_tear():
    """Where a fine grid repeats coarse voxels, vertices coincide; merged, they tore the surface, which then blew up."""
    fine = block_spine(labels=(3,)).labels.values.repeat(3, 0).repeat(3, 1).repeat(3, 2)
    (mesh,) = vertebra_meshes(Volume(fine, np.diag([2 / 3, 2 / 3, 2 / 3, 1]))).values()
    assert mesh.is_watertight
    np.testing.assert_allclose(mesh.extents, [40, 70, 24], atol=0.7)


# --- 2D ---


@pytest.mark.parametrize("which", ["scan", "bent"])
def test_every_level_is_named_beside_its_body(which, request):
    scan = request.getfixturevalue(which)
    figure = figures.segmentation_panels(scan.ct, scan.labels, title="title")
    sagittal, coronal = figure.axes
    assert (sagittal.get_title(loc="left"), coronal.get_title(loc="left")) == ("sagittal", "coronal")
    for axes, along, beside in ((sagittal, 1, 16 + 3), (coronal, 0, -(20 + 3))):
        names = level_names(axes)
        assert set(names) == {LEVEL_OF_LABEL[label] for label in scan.centroids_mm}
        for level, text in names.items():
            centre = scan.centroids_mm[VERSE_LABELS[level]]
            lateral, superior = text.get_position()
            assert superior == pytest.approx(centre[2], abs=2)
            assert lateral == pytest.approx(centre[along] + beside, abs=2.5)
        left, right, bottom, top = axes.images[0].get_extent()
        assert left > right
        assert top > bottom
        assert axes.get_aspect() == 1
        assert "(mm)" in axes.get_xlabel()


def test_names_do_not_overlap_on_a_long_spine():
    scan = block_spine(labels=(*range(1, 20), 28, *range(20, 26)), spacing_mm=4.0)
    figure = figures.segmentation_panels(scan.ct, scan.labels)
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent() for text in level_names(axes).values()), key=lambda box: -box.y1)
        assert len(boxes) == 26
        assert all(upper.y0 > lower.y1 for upper, lower in zip(boxes[:-1], boxes[1:], strict=True))


def test_labels_have_their_level_colours_and_nothing_else_is_coloured(scan):
    axes = figures.segmentation_panels(scan.ct, scan.labels).axes[0]
    picture = np.asarray(axes.images[1].get_array())
    shown = {to_hex(colour).upper() for colour in picture[picture[..., 3] > 0][:, :3]}
    assert shown == {COLOURS[name] for name in NAMES}
    grey = np.asarray(axes.images[0].get_array())
    assert np.all(grey[picture[..., 3] > 0] > 100)
    assert axes.images[0].get_clim() == figures.WINDOW_HU


def test_truth_is_drawn_beside_on_the_same_section(scan):
    shifted = Volume(np.roll(scan.labels.values, 2, axis=2), scan.labels.affine)
    figure = figures.segmentation_panels(scan.ct, shifted, truth=scan.labels)
    found, true = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "sagittal, found",
        "sagittal, true",
        "coronal, found",
        "coronal, true",
    ]
    np.testing.assert_array_equal(found.images[0].get_array(), true.images[0].get_array())
    difference = [level_names(a)["T12"].get_position()[1] for a in (found, true)]
    assert difference[0] - difference[1] == pytest.approx(4, abs=1)


def test_nothing_found_still_shows_the_scan(scan):
    empty = Volume(np.zeros_like(scan.labels.values), scan.labels.affine)
    figure = figures.segmentation_panels(scan.ct, empty)
    assert [level_names(axes) for axes in figure.axes] == [{}, {}]
    assert not level_names(figures.segmentation_panels(scan.ct, scan.labels, names=False).axes[0])


def test_a_sliver_at_the_border_does_not_bend_the_view(scan):
    values = scan.labels.values.copy()
    values[5:8, 5:8, -3:] = 17
    axes = figures.segmentation_panels(scan.ct, Volume(values, scan.labels.affine)).axes[1]
    assert "T10" not in level_names(axes)
    assert set(level_names(axes)) == set(NAMES)


def test_heat_lies_where_it_was_found(scan):
    values = np.zeros((38, 33, 42), np.float32)
    affine = scan.ct.affine @ np.diag([2, 2, 2, 1])
    for centre in scan.centroids_mm.values():
        place = np.round((centre - affine[:3, 3]) / np.diag(affine)[:3]).astype(int)
        values[tuple(slice(p - 1, p + 2) for p in place)] = 1.0
    figure = figures.location_panels(scan.ct, Volume(values, affine))
    coronal = figure.axes[1]
    heat = np.asarray(coronal.images[1].get_array())
    left, right, bottom, top = coronal.images[1].get_extent()
    rows = np.linspace(top, bottom, 2 * len(heat) + 1)[1::2]
    bright = np.unique(rows[np.argwhere(heat > 0.9)[:, 0]])
    assert all(np.abs(bright - centre[2]).min() < 4 for centre in scan.centroids_mm.values())
    assert coronal.get_xlim()[0] > coronal.get_xlim()[1]
    assert len(figure.axes) == 3  # two views and the scale of the heat


def test_scans_of_a_cohort_share_one_scale(scan, bent):
    figure = figures.cohort_of_scans([scan, bent] * 4)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 16
    assert len({round(float(np.ptp(axes.get_xlim())), 3) for axes in shown}) == 1
    assert len({round(float(np.ptp(axes.get_ylim())), 3) for axes in shown}) == 1
    titles = [axes.get_title() for axes in figure.axes]
    assert "block\nT11 to L2" in titles
    assert "block\nT7 to L1" in titles
    with pytest.raises(InputError, match="at least one"):
        figures.cohort_of_scans([])


# --- 3D ---


def test_vertebrae_in_3d_have_level_colours_volumes_and_a_scale_bar(scan):
    scene = figures.vertebrae_3d(scan.labels, title="spine")
    *vertebrae, bar = scene.data
    assert [trace.name for trace in vertebrae] == NAMES
    assert [trace.color for trace in vertebrae] == [COLOURS[name] for name in NAMES]
    assert np.diff(bar.z)[0] == pytest.approx(100)
    litres = vertebra_meshes(scan.labels)["T11"].volume / 1000
    assert f"<b>T11</b>, {litres:.1f} cm³" in vertebrae[0].hovertemplate
    assert scene.layout.scene.aspectmode == "manual"
    assert all(len(trace.i) <= 2500 for trace in vertebrae)


def test_errors_become_colours_with_one_bar(scan):
    meshes = vertebra_meshes(scan.labels)
    errors = {name: 0.5 for name in NAMES[1:]} | {"L2": np.linspace(0, 4, len(meshes["L2"].vertices))}
    scene = figures.vertebrae_3d(meshes, errors)
    by_name = {trace.name: trace for trace in scene.data}
    assert by_name["T11"].intensity is None
    assert by_name["T11"].color == COLOURS["T11"]
    assert np.unique(by_name["T12"].intensity).tolist() == [0.5]
    assert np.ptp(by_name["L2"].intensity) > 3
    assert {by_name[name].cmax for name in errors} == {by_name["L2"].cmax}
    assert [name for name in NAMES if by_name[name].showscale is not False] == ["T12"]
    assert "mean error 2.00 mm" in by_name["L2"].hovertemplate


def test_3d_needs_a_vertebra(scan):
    with pytest.raises(InputError, match="no vertebra to show"):
        figures.vertebrae_3d(Volume(np.zeros((4, 4, 4), np.uint8), np.eye(4)))


# --- scores ---


def scores():
    levels = np.repeat(["L1", "T13", "C2", "T12", "L6"], 4)
    return pd.DataFrame({"level": levels, "dice": np.tile([0.8, 0.9, 1.0, np.nan], 5), "hd_mm": 3.0})


def test_scores_stand_by_level_in_the_order_of_the_spine():
    axes = figures.score_by_level(scores()).axes[0]
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["C2", "T12", "T13", "L1", "L6"]
    assert [label.get_color() for label in labels[1:3]] == [figures.REGION_COLOURS["thoracic"]] * 2
    assert [text.get_text() for text in axes.texts] == ["0.900, n = 3"] * 5
    dots, interval, mean = axes.lines[:3]
    np.testing.assert_allclose(sorted(dots.get_xdata()), [0.8, 0.9, 1.0])
    assert mean.get_xdata()[0] == pytest.approx(0.9)
    assert 0.8 <= interval.get_xdata()[0] < 0.9 < interval.get_xdata()[1] <= 1.0
    assert "Hausdorff distance (mm)" in figures.score_by_level(scores(), "hd_mm").axes[0].get_xlabel()
    by_shape = figures.score_by_level(scores().rename(columns={"dice": "shape_dice"}), "shape_dice")
    assert by_shape.axes[0].get_xlabel().startswith("Dice, whatever the name")


def test_scores_name_what_is_missing():
    with pytest.raises(InputError, match="lacks the columns: assd"):
        figures.score_by_level(scores(), "assd")
    with pytest.raises(InputError, match="finite 'dice'"):
        figures.score_by_level(scores().assign(dice=np.nan))


def test_confusion_counts_names_missed_and_invented():
    frame = pd.DataFrame(
        [("matched", "T12", 19)] * 3
        + [("matched", "T12", 28), ("matched", "L1", 20), ("missed", "L1", pd.NA), ("extra", "T13", 28)],
        columns=["outcome", "level", "predicted_label"],
    ).astype({"predicted_label": "Int64"})
    axes = figures.level_confusion(frame).axes[0]
    rows, columns = ([label.get_text() for label in get()] for get in (axes.get_yticklabels, axes.get_xticklabels))
    assert rows == ["T12", "T13", "L1", "not there"]
    assert columns == ["T12", "T13", "L1", "missed"]
    counts = {(rows[t.get_position()[1]], columns[t.get_position()[0]]): t.get_text() for t in axes.texts}
    assert counts == {
        ("T12", "T12"): "3",
        ("T12", "T13"): "1",
        ("L1", "L1"): "1",
        ("L1", "missed"): "1",
        ("not there", "T13"): "1",
    }
    with pytest.raises(InputError, match="at least one row"):
        figures.level_confusion(frame.iloc[:0])
