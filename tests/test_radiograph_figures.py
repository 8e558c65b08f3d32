"""Contours lie where the beam puts them; tables show what they hold."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import trimesh
from matplotlib.colors import to_hex

from spinelib import radiograph_figures as figures
from spinelib.errors import InputError
from spinelib.figures import PREDICTED, TRUTH
from spinelib.imaging.cone_beam import ConeBeam
from spinelib.levels import COLOURS
from spinelib.radiograph_evaluation import published_rows
from spinelib.spine import Spine

mpl.use("agg")
pytestmark = pytest.mark.usefixtures("house_style")
BEAMS = (ConeBeam.frontal((0, 0, 0), (300, 200), 1.8), ConeBeam.lateral((0, 0, 0), (300, 160), 1.8))
IMAGES = [np.random.default_rng(i).random(beam.shape) for i, beam in enumerate(BEAMS)]


def balls(shift_mm=0.0, radius_mm=20.0):
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[:, :3, 3] = [[10 + shift_mm, 5, 60], [0 + shift_mm, -10, -60]]
    meshes = [trimesh.creation.icosphere(3, radius_mm).apply_translation(pose[:3, 3]) for pose in poses]
    return Spine(("T12", "L1"), poses, tuple(meshes))


@pytest.mark.parametrize("radius", [5.0, 40.0])
@pytest.mark.parametrize("beam", BEAMS)
def test_the_shadow_of_a_ball_is_a_circle_of_known_size(beam, radius):
    (lines,) = figures.silhouettes({"T1": trimesh.creation.icosphere(4, radius)}, beam).values()
    (line,) = lines
    middle = (np.array(beam.shape) - 1) / 2
    expected = 1800 * np.tan(np.arcsin(radius / 1500)) / 1.8
    np.testing.assert_allclose(np.hypot(*(line - middle).T), expected, rtol=0.02)


def test_a_hole_has_an_outline_of_its_own():
    ring = trimesh.creation.annulus(r_min=10, r_max=20, height=5)
    ring.apply_transform(trimesh.geometry.align_vectors([0, 0, 1], [0, 1, 0]))
    lines = figures.silhouettes({"ring": ring}, BEAMS[0])["ring"]
    assert len(lines) == 2


def test_contours_surround_their_bodies_in_both_views():
    figure = figures.radiograph_pair(IMAGES, BEAMS, balls(), title="two balls")
    for axes, beam, letters in zip(figure.axes, BEAMS, ("RL", "AP"), strict=True):
        for line, level, centre in zip(axes.lines, ("T12", "L1"), balls().poses[:, :3, 3], strict=True):
            assert line.get_color() == COLOURS[level]
            places = line.get_xydata()[:, ::-1]
            np.testing.assert_allclose((places.min(0) + places.max(0)) / 2, beam.project(centre), atol=0.3)
        texts = [text.get_text() for text in axes.texts]
        assert texts == [*letters, "T12", "L1"]
    assert figure.get_suptitle() == "two balls"


def test_truth_lies_under_the_prediction():
    figure = figures.radiograph_pair(IMAGES, BEAMS, balls(3.0), balls())
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours == [TRUTH] * 2 + [PREDICTED] * 2
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert min(widths[:2]) > max(widths[2:])
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["true", "predicted"]


def rows():
    ours = pd.DataFrame(
        {
            "name": ["sagittal only", "ours", "mean shape", "broken"],
            "kind": ["ours", "ours", "baseline", "ours"],
            "data": "unseen phantoms",
            "dice": [0.8, 0.9, 0.7, np.nan],
            "dice_low": [0.78, 0.89, np.nan, np.nan],
            "dice_high": [0.82, 0.91, np.nan, np.nan],
        }
    )
    return pd.concat([published_rows().iloc[:2], ours], ignore_index=True)


def test_every_row_with_a_value_is_a_dot_with_its_interval():
    figure = figures.score_dots(rows(), title="Views and fusion")
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [*published_rows()["name"][:2], "sagittal only", "ours", "mean shape"]
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [dot.get_xdata()[0] for dot in dots] == pytest.approx([0.884, 0.9259, 0.8, 0.9, 0.7])
    assert [to_hex(dot.get_color()) for dot in dots][:3] == [figures.PUBLISHED.lower()] * 2 + [PREDICTED.lower()]
    assert [text.get_text() for text in axes.texts] == ["0.884", "0.926", "0.800", "0.900", "0.700"]
    spans = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(spans[3], [0.89, 0.91])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "published, on other data" in legend
    assert len(set(legend)) == 3


def test_tables_without_values_are_refused():
    with pytest.raises(InputError, match="lacks the columns: data"):
        figures.score_dots(rows().drop(columns="data"))
    with pytest.raises(InputError, match="no row has a finite 'dice'"):
        figures.score_dots(rows().iloc[-1:])
