"""Tables become dots and intervals at their numbers."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from spinelib import comparison_figures as cf
from spinelib.errors import InputError
from spinelib.figures import METHOD_NAMES, PREDICTED, TRUTH

mpl.use("agg")
pytestmark = pytest.mark.usefixtures("house_style")


def table(**columns):
    frame = pd.DataFrame(columns)
    return frame.assign(ci_low=frame["mean"] - 0.25, ci_high=frame["mean"] + 0.5)


def intervals(axes):
    return [tuple(line.get_xdata()) for line in axes.lines if len(set(line.get_ydata())) == 1 < len(line.get_xdata())]


def test_forest_shows_every_interval_and_marks_the_published_figure():
    frame = table(method=["ridge", "ours"], mean=[5.0, 3.0], n=9)
    axes = cf.methods_forest(frame, "error", "mm", paper=3.12).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ours", "ridge on pixels"]
    assert intervals(axes) == [(2.75, 3.5), (4.75, 5.5)]
    assert {"3.00", "5.00"} < {t.get_text() for t in axes.texts}
    assert any("other data" in t.get_text() for t in axes.texts)
    assert axes.get_xlabel() == "error (mm), mean and 95% CI, n = 9"


@pytest.mark.parametrize("group", ["severity", "sex"])
def test_groups_have_their_means_intervals_and_counts(group):
    frame = table(**{"method": ["ours"] * 2 + ["paper"] * 2, group: ["b", "a"] * 2}, mean=[1.0, 2, 3, 4], n=[7, 9] * 2)
    figure = cf.severity_plot(frame, group)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["b\nn = 7", "a\nn = 9"]
    for bars, means in zip(axes.containers, ([1, 2], [3, 4]), strict=True):
        dots, _, (stems,) = bars.lines
        assert np.allclose(dots.get_ydata(), means)
        assert np.array_equal(np.round(dots.get_xdata()), [0, 1])
        assert np.allclose([s[:, 1] for s in stems.get_segments()], [[m - 0.25, m + 0.5] for m in means])
    places = [bars.lines[0].get_xdata() for bars in axes.containers]
    assert np.all(places[0] < places[1])  # side by side
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["ours", METHOD_NAMES["paper"]]
    assert "(mm)" in axes.get_ylabel()


def test_a_group_that_a_method_lacks_is_left_empty():
    frame = table(method=["ours", "ours", "paper"], severity=["<10", "10-20", "10-20"], mean=[1.0, 2, 3], n=[4, 5, 6])
    axes = cf.severity_plot(frame).axes[0]
    assert np.round(axes.containers[1].lines[0].get_xdata()).tolist() == [1]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["<10\nn = 4", "10-20\nn = 5 to 6"]
    assert axes.get_xlabel() == "true Cobb angle (degrees)"


def test_stress_is_grouped_by_condition_against_no_change():
    frame = table(
        stress=["crop_top", "crop_top", "scanner"], level=[40, -2.5, 1], unit="mm", mean=[1.25, 1.5, 2.0], n=80
    )
    axes = cf.stress_plot(frame).axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == ["crop top, mm", "40", "-2.5", "scanner"]  # one level: beside its name
    assert [t.get_fontweight() for t in axes.get_yticklabels()] == ["bold", "normal", "normal", "bold"]
    assert set(axes.lines[0].get_xdata()) == {1}
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [dot.get_xdata()[0] for dot in dots] == [1.25, 1.5, 2.0]
    assert [dot.get_color() for dot in dots] == [TRUTH, TRUTH, PREDICTED]
    assert [dot.get_ydata()[0] for dot in dots] == list(np.delete(axes.get_yticks(), 0))
    assert axes.get_xscale() == "log"
    axes.figure.canvas.draw()
    assert {"1", "1.5", "2"} <= {t.get_text() for t in axes.get_xticklabels()}
    assert axes.yaxis_inverted()


@pytest.mark.parametrize("draw", [cf.severity_plot, cf.stress_plot], ids=lambda f: f.__name__)
def test_tables_without_intervals_are_refused(draw):
    with pytest.raises(InputError, match="lacks the columns:.*ci_low"):
        draw(pd.DataFrame({"method": ["ours"], "mean": [1.0]}))
