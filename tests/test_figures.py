"""Figures show what they are given, in true proportions."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from spinelib import figures
from spinelib.dress import dressed_spine
from spinelib.geometry import PlanarTransform, Projection
from spinelib.levels import COLOURS
from spinelib.metrics import match_depth
from spinelib.reconstruct import reconstruct

mpl.use("agg")
pytestmark = pytest.mark.usefixtures("house_style")


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


def test_all_curves_are_drawn_at_the_depth_of_the_first(image, curves):
    shorter = curves.at(curves.heights_mm[20:150]).shifted(anterior_mm=30)
    side = figures.curves_on_image(image, {"true": curves, "predicted": shorter}).axes[1]
    assert np.allclose(side.lines[4].get_xdata(), match_depth(shorter, curves.depth_removed()).sagittal_mm[1])


def test_curves_lie_as_radiologists_look_at_them(image, curves):
    for axes, (left, right) in zip(figures.curves_on_image(image, {"true": curves}).axes, ("RL", "AP"), strict=True):
        assert axes.xaxis_inverted()
        letters = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert letters[left] < letters[right]
        assert axes.get_aspect() == 1
        assert "(mm)" in axes.get_xlabel()


def test_spine_in_3d_has_level_colours_and_a_scale_bar(curves):
    spine = dressed_spine(curves, spacing_mm=3.0)
    scene = figures.spine_3d(spine)
    assert scene.data[0].name == "T1"
    assert scene.data[0].color == COLOURS["T1"]
    assert len(scene.data) == 17 + 1  # levels and the scale bar
    assert np.isclose(np.diff(scene.data[-1].z)[0], 100)


def test_a_millimetre_is_as_long_on_every_axis_scale_bar_included(curves):
    scene = figures.spine_3d(reconstruct(curves))
    box, ratio = scene.layout.scene, scene.layout.scene.aspectratio
    lengths = [np.ptp(axis.range) for axis in (box.xaxis, box.yaxis, box.zaxis)]
    assert np.allclose(np.divide([ratio.x, ratio.y, ratio.z], lengths) * lengths[2], ratio.z)
    for trace in scene.data:
        for values, axis in zip((trace.x, trace.y, trace.z), (box.xaxis, box.yaxis, box.zaxis), strict=True):
            assert axis.range[0] < np.min(values)
            assert np.max(values) < axis.range[1]


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


def test_alignment_figure_has_its_panels(image):
    mri = Projection(("in_phase",), image.values[:1], image.grid)
    assert len(figures.alignment_panels(image, mri, PlanarTransform()).axes) == 4


def test_known_methods_keep_their_style_and_others_differ():
    methods = ["mine", "ours", "yours", "paper"]
    assert figures.method_style("ours", methods) == figures.method_style("ours", ["ours"])
    assert len({figures.method_style(name, methods) for name in methods}) == 4


@pytest.mark.parametrize(
    ("column", "label"),
    [
        ("lumbar_lordosis_deg", "lumbar lordosis (degrees)"),
        ("apical_translation_mm", "apical translation (mm)"),
        ("severity", "true Cobb angle (degrees)"),
        ("sex", "sex"),
        ("age_band", "age band"),
    ],
)
def test_labels_of_columns_have_their_unit(column, label):
    assert figures.with_unit(*figures.name_and_unit(column)) == label


def test_counts_are_one_number_or_a_range():
    assert figures.count_range([40, 40]) == "40"
    assert figures.count_range(n for n in (41, 38)) == "38 to 41"


def test_a_single_epoch_is_seen():
    log = pd.DataFrame({"epoch": [0], "train_loss": [7.0], "validation_loss": [6.0]})
    lines = figures.training_curve(log).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[7.0], [6.0]]
    assert all(line.get_marker() not in ("", "None", None) for line in lines)
