"""What is drawn of curves is where the numbers put it."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from spinelib import curve_figures as cf
from spinelib.angles import LEVEL_FRACTIONS
from spinelib.clinical import MEASURES, axial_view, limits_of_agreement
from spinelib.errors import InputError
from spinelib.metrics import bootstrap_ci
from spinelib.spine import Curves

mpl.use("agg")
pytestmark = pytest.mark.usefixtures("house_style")
RNG = np.random.default_rng(0)


def trace(figure, name):
    (found,) = [t for t in figure.data if t.name == name]
    return found


def points(found):
    return np.stack([found.x, found.y, found.z], axis=1).astype(float)


def horizontal_distance(vertices, curves):
    """From the centre line at the same height."""
    right, anterior = (
        np.interp(-vertices[:, 2], -curves.heights_mm, line) for line in (curves.coronal_mm[1], curves.sagittal_mm[1])
    )
    return np.hypot(vertices[:, 0] - right, vertices[:, 1] - anterior)


def test_case_panels_draw_truth_prediction_and_tube_in_both_views(image, curves):
    predicted, radius = curves.shifted(right_mm=5, anterior_mm=40), np.linspace(8, 3, 209)
    figure = cf.case_panels(image, curves, predicted, radius)
    for axes, centre in zip(figure.axes, (predicted.coronal_mm[1], curves.depth_removed().sagittal_mm[1]), strict=True):
        assert len(axes.lines) == 6
        outline = axes.collections[0].get_paths()[0].vertices
        for place in (0, 100, 208):
            band = outline[np.isclose(outline[:, 1], predicted.heights_mm[place]), 0]
            assert np.isclose(np.ptp(band), 2 * radius[place])
            assert np.isclose((band.min() + band.max()) / 2, centre[place])
    assert figure.axes[0].get_title("left") == "coronal, mean error 5.0 mm"
    assert figure.axes[1].get_title("left") == "sagittal, mean error 0.0 mm"  # its depth is not the image's to know
    assert [t.get_text() for t in figure.axes[1].get_legend().get_texts()] == ["true", "predicted", "90% tube"]


def test_case_panels_without_tube_have_no_band(image, curves):
    assert [len(axes.collections) for axes in cf.case_panels(image, curves, curves).axes] == [0, 0]


@pytest.mark.parametrize("radius", [4.0, np.linspace(9, 3, 209)])
def test_tube_has_the_given_radius_at_every_height(curves, radius):
    vertices = points(trace(cf.tube_3d(curves, radius), "90% tube"))[:-2]  # the last two close the ends
    wanted = np.repeat(np.broadcast_to(radius, 209), 32)
    assert np.allclose(horizontal_distance(vertices, curves), wanted, atol=1e-4)  # float32 of 500 mm


def test_tube_is_moved_to_the_depth_of_the_truth(curves):
    figure = cf.tube_3d(curves.shifted(anterior_mm=-70), 4.0, curves)
    assert np.allclose(points(trace(figure, "true centre line")), curves.centreline(), atol=1e-4)
    assert np.allclose(points(trace(figure, "predicted centre line")), curves.centreline(), atol=1e-4)
    assert trace(figure, "90% tube").opacity < 1


@pytest.mark.parametrize("radius", [0.0, -2.0, np.nan, np.ones(60), np.r_[np.ones(208), np.inf]])
def test_a_tube_needs_a_radius_at_each_height(curves, radius):
    with pytest.raises(InputError, match="209 heights"):
        cf.tube_3d(curves, radius)


def test_column_is_coloured_by_the_distance_of_the_centre_lines(curves):
    lower = np.where(curves.heights_mm < 200, 3.0, 0.0)
    bent = Curves(curves.heights_mm, curves.coronal_mm + lower, curves.sagittal_mm)
    column = trace(cf.error_3d(bent, curves), "predicted column")
    assert len(column.intensity) == len(column.z)
    assert np.allclose(column.intensity[column.z < 195], 3, atol=1e-5)
    assert np.allclose(column.intensity[column.z > 205], 0, atol=1e-5)
    assert "(mm)" in column.colorbar.title.text


def test_colours_of_errors_span_the_same_range_and_ignore_depth(curves):
    columns = [
        trace(cf.error_3d(curves.shifted(right_mm=right, anterior_mm=50), curves), "predicted column")
        for right in (1, 30)
    ]
    assert {(c.cmin, c.cmax) for c in columns} == {cf.ERROR_RANGE_MM}
    assert [np.round(np.unique(np.round(c.intensity, 3))).tolist() for c in columns] == [[1], [30]]


def test_true_edges_are_four_lines(curves):
    edges = points(trace(cf.error_3d(curves, curves), "true edges"))
    gaps = np.isnan(edges[:, 0])
    assert gaps.sum() == 4
    right = edges[:209]
    assert np.allclose(right[:, 0], curves.coronal_mm[0], atol=1e-4)
    assert np.allclose(right[:, 1], curves.sagittal_mm[1], atol=1e-4)


@pytest.mark.parametrize("figure", [lambda c: cf.tube_3d(c, 4.0, c), lambda c: cf.error_3d(c, c)])
def test_scenes_are_in_true_proportions(figure, curves):
    scene = figure(curves).layout.scene
    lengths = [np.ptp(axis.range) for axis in (scene.xaxis, scene.yaxis, scene.zaxis)]
    ratio = [scene.aspectratio.x, scene.aspectratio.y, scene.aspectratio.z]
    assert np.allclose(np.divide(ratio, lengths), ratio[2] / lengths[2])


def test_top_view_has_right_on_the_right_and_equal_axes(curves):
    tables = {"true": axial_view(curves), "predicted": axial_view(curves.shifted(right_mm=3))}
    axes = cf.axial_view_figure(tables).axes[0]
    for dots, table in zip(axes.collections, tables.values(), strict=True):
        assert np.allclose(dots.get_offsets(), table[["right_mm", "anterior_mm"]])
        assert np.array_equal(dots.get_array(), np.arange(17))  # T1 to L5 in order
    assert axes.get_aspect() == 1
    assert not axes.xaxis_inverted()
    assert not axes.yaxis_inverted()
    assert "(mm)" in axes.get_xlabel()
    assert "(mm)" in axes.get_ylabel()
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["true", "predicted"]


def level_lines(axes):
    return sorted(line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2)


def test_bland_altman_lines_are_bias_and_limits():
    truth = np.array([10.0, 20, 30, 40, np.nan])
    frame = pd.DataFrame({"true_cobb_deg": truth, "predicted_cobb_deg": truth + [1, 2, 3, 2, 0]})
    axes = cf.bland_altman_grid(frame, ["cobb_deg"]).axes[0]
    low, bias, high = level_lines(axes)
    assert np.isclose(bias, 2.0)
    assert np.isclose(high - low, 2 * 1.96 * np.std([1, 2, 3, 2], ddof=1))
    assert np.allclose(axes.lines[0].get_xdata(), [10.5, 21, 31.5, 41])
    assert axes.get_title("left") == "Cobb angle, n = 4"


def test_agreement_of_nothing_is_refused():
    with pytest.raises(InputError, match="no subject"):
        cf.bland_altman_grid(
            pd.DataFrame({"true_cobb_deg": [1.0, np.nan], "predicted_cobb_deg": [np.nan, 2.0]}), ["cobb_deg"]
        )


def test_grid_has_a_panel_with_limits_for_every_measure():
    measures = MEASURES[:5]
    frame = pd.DataFrame({f"true_{m}": RNG.normal(30, 9, 25) for m in measures})
    frame = frame.assign(**{f"predicted_{m}": frame[f"true_{m}"] + RNG.normal(1, 2, 25) for m in measures})
    frame.loc[3, "predicted_cobb_deg"] = np.nan
    panels = cf.bland_altman_grid(frame, measures).axes
    assert [axes.axison for axes in panels] == [True] * 5 + [False]
    for axes, measure in zip(panels, measures, strict=False):
        difference = (frame[f"predicted_{measure}"] - frame[f"true_{measure}"]).dropna()
        limits = limits_of_agreement(difference.to_numpy())
        assert np.allclose(level_lines(axes), [limits["loa_low"], limits["bias"], limits["loa_high"]])
        assert axes.get_title("left").endswith(f"n = {len(difference)}")
        assert axes.get_ylabel() == "predicted − true (degrees)"


def test_differences_of_an_azimuth_go_the_short_way_round():
    frame = pd.DataFrame({"true_pmc_azimuth_deg": [89.0, -88, 10], "predicted_pmc_azimuth_deg": [-89.0, 88, 12]})
    axes = cf.bland_altman_grid(frame, ["pmc_azimuth_deg"]).axes[0]
    assert np.allclose(axes.lines[0].get_ydata(), [2, -4, 2])


def test_grid_names_missing_columns():
    with pytest.raises(InputError, match="predicted_cobb_deg"):
        cf.bland_altman_grid(pd.DataFrame({"true_cobb_deg": [1.0]}), ["cobb_deg"])


def test_error_by_height_runs_from_t1_on_top_with_its_interval():
    errors = {"mean_curve": RNG.random((30, 60)) + 3, "ours": RNG.random((30, 60))}
    axes = cf.error_by_height_and_level(errors).axes[0]
    for line, band, values in zip(axes.lines, axes.collections, errors.values(), strict=True):
        assert np.allclose(line.get_xdata(), values.mean(axis=0))
        assert line.get_ydata()[0] == 1
        assert line.get_ydata()[-1] == 0
        _, low, high = bootstrap_ci(values[:, 0])
        top = band.get_paths()[0].vertices
        assert np.allclose(sorted(set(top[top[:, 1] == 1, 0])), [low, high])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["mean curve", "ours"]
    assert "(mm)" in axes.get_xlabel()
    assert "n = 30" in axes.get_xlabel()


def test_level_names_stand_at_their_share_of_the_height():
    axes = cf.error_by_height_and_level({"ours": np.ones((3, 10))}).axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names == list(LEVEL_FRACTIONS)
    assert np.all(np.diff(axes.get_yticks()) < 0)
    assert np.isclose(axes.get_yticks()[names.index("T12")], 1 - np.mean(LEVEL_FRACTIONS["T12"]))


def test_coverage_is_the_share_inside_with_wilsons_interval():
    covered = np.zeros((50, 209), bool)
    covered[:45] = True
    covered[:, 0] = True
    axes = cf.coverage_by_height(covered, 0.8).axes[0]
    nominal, found = axes.lines
    assert set(nominal.get_xdata()) == {0.8}
    assert np.allclose(found.get_xdata(), [1.0] + [0.9] * 208)
    band = axes.collections[0].get_paths()[0].vertices
    # Wilson by hand: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n), p = 45/50
    z2, n, p = 1.959964**2, 50, 0.9
    middle, reach = p + z2 / (2 * n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    wanted = np.array([middle - reach, middle + reach]) / (1 + z2 / n)
    assert np.allclose(np.unique(np.round(band[band[:, 1] == 0, 0], 6)), wanted, atol=1e-5)
    assert band[band[:, 1] == 1, 0].min() < 1  # all inside, and yet not certain
    assert "n = 50" in axes.get_xlabel()
    assert axes.get_xlim()[0] <= 0.5


def test_coverage_needs_subjects_by_heights():
    with pytest.raises(InputError, match=r"shape \(209,\)"):
        cf.coverage_by_height(np.ones(209, bool))
