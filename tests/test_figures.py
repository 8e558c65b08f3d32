"""Figures show what they are given, in true proportions."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from spinelib import figures
from spinelib.dress import dressed_spine
from spinelib.geometry import PlanarGrid, PlanarTransform, Projection
from spinelib.levels import COLOURS
from spinelib.reconstruct import reconstruct
from spinelib.spine import Curves

mpl.use("agg")


@pytest.fixture(autouse=True)
def _close():
    figures.use_house_style()
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def curves():
    heights = np.linspace(470, 5, 209)
    centre, depth = 15 * np.sin(heights / 90), 18 * np.cos(heights / 140)
    return Curves(heights, np.stack([centre + 19, centre, centre - 19]), np.stack([depth + 15, depth, depth - 15]))


@pytest.fixture(scope="module")
def image():
    grid = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (200.0, 0.0))
    values = np.random.default_rng(0).random((2, 333, 250)).astype(np.float32)
    return Projection(("bone", "tissue"), values, grid)


def test_image_axes_are_millimetres_with_the_patients_right_on_the_left(image):
    axes = figures.image_panels(image).axes[0]
    left, right, bottom, top = axes.images[0].get_extent()
    assert left > right
    assert top > bottom
    assert np.isclose(left - right, 600)
    assert np.isclose(top - bottom, 999)


def test_curves_are_drawn_where_they_are(image, curves):
    front, side = figures.curves_on_image(image, {"true": curves, "predicted": curves.shifted(right_mm=5)}).axes
    assert np.allclose(front.lines[1].get_xdata(), curves.coronal_mm[1])
    assert np.allclose(front.lines[4].get_xdata(), curves.coronal_mm[1] + 5)
    assert abs(np.mean(side.lines[1].get_xdata())) < 1e-9


def test_spine_in_3d_keeps_its_proportions_and_level_colours(curves):
    spine = dressed_spine(curves, spacing_mm=3.0)
    scene = figures.spine_3d(spine)
    ratio = scene.layout.scene.aspectratio
    bounds = np.array([m.bounds for m in spine.meshes])
    extent = bounds[:, 1].max(0) - bounds[:, 0].min(0)
    assert np.isclose(ratio.z / ratio.x, extent[2] / extent[0])
    assert scene.data[0].name == "T1"
    assert scene.data[0].color == COLOURS["T1"]
    assert len(scene.data) == 17 + 1  # levels and the scale bar
    assert np.isclose(np.diff(scene.data[-1].z)[0], 100)


def test_two_spines_are_told_apart(curves):
    spine = reconstruct(curves)
    scene = figures.spine_3d({"true": spine, "predicted": spine})
    assert [t.name for t in scene.data[:2]] == ["true", "predicted"]
    assert scene.data[0].color != scene.data[1].color


def test_dressed_vertebrae_lie_on_the_column(curves):
    spine = dressed_spine(curves, spacing_mm=3.0)
    assert spine.levels[0] == "T1"
    assert spine.levels[-1] == "L5"
    for mesh, pose in zip(spine.meshes, spine.poses, strict=True):
        assert np.all(mesh.bounds[0] < pose[:3, 3])
        assert np.all(pose[:3, 3] < mesh.bounds[1])


def test_forest_shows_every_interval_and_marks_the_published_figure():
    table = pd.DataFrame(
        {"method": ["ridge", "ours"], "mean": [5.0, 3.0], "ci_low": [4.5, 2.7], "ci_high": [5.5, 3.3], "n": 9}
    )
    axes = figures.methods_forest(table, "error", "mm", paper=3.12).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ours", "ridge on pixels"]
    assert any("other data" in t.get_text() for t in axes.texts)
    assert [2.7, 3.3] in [list(line.get_xdata()) for line in axes.lines]


def test_bland_altman_lines_are_bias_and_limits():
    truth = np.array([10.0, 20, 30, 40])
    right = figures.agreement(truth, truth + [1, 2, 3, 2], "Cobb angle").axes[1]
    levels = sorted(line.get_ydata()[0] for line in right.lines if len(set(line.get_ydata())) == 1)
    assert np.isclose(levels[1], 2.0)
    assert np.isclose(levels[2] - levels[0], 2 * 1.96 * np.std([1, 2, 3, 2], ddof=1))


def test_alignment_and_height_figures_have_their_panels(image):
    mri = Projection(("in_phase",), image.values[:1], image.grid)
    assert len(figures.alignment_panels(image, mri, PlanarTransform()).axes) == 4
    axes = figures.error_by_height({"mean_curve": np.ones((3, 10)), "ours": np.zeros((3, 10))}).axes[0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["mean curve", "ours"]
