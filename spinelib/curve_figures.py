"""Figures of predicted curves: people in 2D and 3D, uncertainty, agreement of measures, errors along the spine."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from scipy.stats import binomtest

from spinelib.angles import LEVEL_FRACTIONS
from spinelib.clinical import limits_of_agreement, measure_difference
from spinelib.errors import InputError
from spinelib.figures import (
    METHOD_NAMES,
    PREDICTED,
    TRUTH,
    count_range,
    curves_on_image,
    in_true_proportions,
    mesh_trace,
    method_style,
    name_and_unit,
)
from spinelib.geometry import Projection
from spinelib.metrics import bootstrap_ci, curve_errors, match_depth
from spinelib.reconstruct import column_mesh
from spinelib.spine import Curves

ERROR_RANGE_MM = (0.0, 10.0)
"""Range of the colours of `error_3d`, the same in every figure so that they compare."""


def case_panels(dxa: Projection, truth: Curves, predicted: Curves, tube_mm=None, title: str = "") -> Figure:
    """Return true and predicted curves of one person in both views, with the band of the 90% tube.

    Parameters
    ----------
    dxa : Projection
    truth, predicted : Curves
        The prediction is moved to the truth's mean depth, which a frontal image does not tell.
    tube_mm : float or array_like, shape (K,), optional
        Radius of the tube about the predicted centre line at `predicted.heights_mm`.
    """
    figure = curves_on_image(dxa, {"true": truth, "predicted": predicted}, title)
    if tube_mm is not None:
        _draw_tube(figure, match_depth(predicted, truth.depth_removed()), tube_mm, PREDICTED)
    error = curve_errors(predicted, truth)
    for axes, view in zip(figure.axes, ("coronal", "sagittal"), strict=True):
        axes.set_title(f"{view}, mean error {error[f'{view}_mm']:.1f} mm")
    return figure


def prediction_panels(dxa: Projection, predicted: Curves, tube_mm=None, title: str = "") -> Figure:
    """Return `case_panels` of a person whose true curves are not known.

    Parameters
    ----------
    dxa : Projection
    predicted : Curves
    tube_mm : float or array_like, shape (K,), optional
        Radius of the tube about the predicted centre line at `predicted.heights_mm`.
    """
    figure = curves_on_image(dxa, {"predicted": predicted}, title)
    for line in (line for axes in figure.axes for line in axes.lines):
        line.set_linewidth(line.get_linewidth() / 2)  # the tube stays in sight, and nothing lies on top
    if tube_mm is not None:
        _draw_tube(figure, predicted.depth_removed(), tube_mm, TRUTH)  # the first curves' colour
    return figure


def tube_3d(curves: Curves, tube_mm, truth: Curves | None = None, title: str = "", height: int = 720) -> go.Figure:
    """Return the predicted centre line in its translucent tube, the column faint around it, and the true line.

    Parameters
    ----------
    curves : Curves
    tube_mm : float or array_like, shape (K,)
        Radius in the horizontal plane at `curves.heights_mm`, as centre-line errors are measured.
    truth : Curves, optional
        `curves` are moved to its mean depth.
    title, height
        Height in pixels.
    """
    radius = _radius(curves, tube_mm)
    found = curves if truth is None else match_depth(curves, truth)
    edges = np.stack([radius, np.zeros_like(radius), -radius])
    tube = Curves(found.heights_mm, found.coronal_mm[1] + edges, found.sagittal_mm[1] + edges)
    figure = go.Figure(_line_trace(found.centreline().T, "predicted centre line", PREDICTED, width=5))
    if truth is not None:
        # Wider, so that it shows on both sides where the lines coincide.
        figure.add_trace(_line_trace(truth.centreline().T, "true centre line", TRUTH, width=11))
    tube_mesh = column_mesh(tube, "ellipse", 32)
    figure.add_trace(mesh_trace(tube_mesh, "90% tube", color=PREDICTED, opacity=0.35, showlegend=True))
    column = column_mesh(found)
    figure.add_trace(mesh_trace(column, "predicted column", color="#777777", opacity=0.15, showlegend=True))
    return in_true_proportions(figure, title, height)


def error_3d(found: Curves, truth: Curves, title: str = "", height: int = 720) -> go.Figure:
    """Return the predicted column coloured by how far its centre line lies from the true one at each height.

    The prediction is moved to the truth's mean depth. Colours span ERROR_RANGE_MM in every figure; dark lines are
    the true edges.
    """
    found = match_depth(found, truth)
    distance = np.linalg.norm(found.centreline() - truth.at(found.heights_mm).centreline(), axis=1)
    mesh = column_mesh(found)
    of_vertices = np.interp(mesh.vertices[:, 2], found.heights_mm[::-1], distance[::-1])
    low, high = ERROR_RANGE_MM
    colours = {
        "intensity": of_vertices.astype(np.float32),
        "colorscale": "YlOrRd",  # pale where the error is small, so that the dark edges show
        "cmin": low,
        "cmax": high,
        "colorbar": {"title": {"text": "distance of<br>centre lines (mm)"}, "len": 0.6, "thickness": 16},
        # Bright all round, so that a colour reads as its value and not as shade.
        "lighting": {"ambient": 0.75, "diffuse": 0.35, "specular": 0.0},
    }
    figure = go.Figure(mesh_trace(mesh, "predicted column", **colours))
    figure.add_trace(_line_trace(_edges(truth), "true edges", "#222222", width=3))
    return in_true_proportions(figure, title, height)


def axial_view_figure(tables: dict[str, pd.DataFrame], title: str = "") -> Figure:
    """Return vertebra centres T1 to L5 from above, anterior up; the first table joined by a line, others dashed.

    Parameters
    ----------
    tables : dict of str to DataFrame
        For example {'true': ..., 'predicted': ...} from `spinelib.clinical.axial_view`: level, right_mm,
        anterior_mm.
    """
    figure, axes = plt.subplots(figsize=(4.8, 3.6))
    for (name, table), marker, line in zip(tables.items(), "oDs", ("-", "--", ":"), strict=False):
        right, anterior = table["right_mm"], table["anterior_mm"]
        axes.plot(right, anterior, line, color="#777777", lw=1, zorder=1)
        shown = axes.scatter(right, anterior, c=np.arange(len(table)), cmap="viridis", marker=marker, s=34, label=name)
    first = next(iter(tables.values()))
    for row in first[first["level"].isin(["T1", "T6", "T12", "L5"])].itertuples():
        # Lumbar levels on the other side: seen from above, L5 often lies under T1.
        away, align = (-7, "right") if row.level.startswith("L") else (7, "left")
        style = {"xytext": (away, 0), "textcoords": "offset points", "fontsize": 8, "ha": align, "va": "center"}
        halo = [withStroke(linewidth=2, foreground="white")]
        axes.annotate(row.level, (row.right_mm, row.anterior_mm), path_effects=halo, **style)
    bar = figure.colorbar(shown, ax=axes, shrink=0.7, ticks=range(0, len(first), 2))
    bar.ax.set_yticklabels(first["level"][::2])
    bar.ax.invert_yaxis()
    axes.set(xlabel="right (mm), seen from above", ylabel="anterior (mm)", title=title)
    axes.set_aspect("equal", adjustable="datalim")
    for handle in axes.legend(fontsize=8).legend_handles:
        handle.set(array=None, facecolor="#777777")
    axes.margins(0.1)
    return figure


def bland_altman_grid(frame: pd.DataFrame, measures, title: str = "") -> Figure:
    """Return a Bland-Altman panel for each measure, with bias, 95% limits and their intervals.

    Parameters
    ----------
    frame : DataFrame
        One row a subject, columns true_<measure> and predicted_<measure>.
    measures : sequence of str
        Of `spinelib.clinical.MEASURES`. Pairs with a missing value are left out and show in n.
    """
    missing = [f"{side}_{m}" for m in measures for side in ("true", "predicted") if f"{side}_{m}" not in frame]
    if missing:
        message = f"the table lacks the columns: {', '.join(missing)}. Fill them from clinical_measures(curves)."
        raise InputError(message)
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(2.45 * columns, 2.35 * rows), squeeze=False)
    for axes, measure in zip(panels.flat, measures, strict=False):
        truth, predicted = _pairs(frame[f"true_{measure}"], frame[f"predicted_{measure}"])
        name, unit = name_and_unit(measure)
        _bland_altman(axes, truth, measure_difference(measure, predicted, truth), unit)
        axes.set_title(f"{name}, n = {len(truth)}", fontsize=9)
    for axes in panels.flat[len(measures) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    return figure


def error_by_height_and_level(errors: dict[str, np.ndarray], title: str = "") -> Figure:
    """Return mean error with its 95% bootstrap band from T1 to L5; each array is (subjects, K), superior first.

    Level names stand at their mean share of the column's length: on average within 3 mm, in a severe curve up to
    a vertebra off.
    """
    figure, axes = _level_axes()
    for name, values in errors.items():
        colour, _, line = method_style(name, errors)
        mean, low, high = np.array([bootstrap_ci(column) for column in np.asarray(values, float).T]).T
        heights = np.linspace(1, 0, len(mean))
        axes.fill_betweenx(heights, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(mean, heights, line, color=colour, label=METHOD_NAMES.get(name, name))
    subjects = count_range(len(values) for values in errors.values())
    axes.set(xlabel=f"3D centre-line error (mm)\nmean and 95% CI, n = {subjects}", title=title)
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    return figure


def coverage_by_height(covered: np.ndarray, nominal: float = 0.9, title: str = "") -> Figure:
    """Return the share of subjects whose true centre line lies in the tube, by height, with Wilson's 95% band.

    Parameters
    ----------
    covered : ndarray of bool, shape (subjects, K), superior first
    nominal : float
        The share that the tube promises.
    """
    covered = np.asarray(covered, bool)
    if covered.ndim != 2 or not covered.size:
        message = f"expected (subjects, heights) of True where the tube holds the truth, given shape {covered.shape}."
        raise InputError(message)
    tests = [binomtest(int(inside), len(covered)) for inside in covered.sum(axis=0)]
    low, high = np.array([test.proportion_ci(method="wilson") for test in tests]).T
    figure, axes = _level_axes()
    heights = np.linspace(1, 0, covered.shape[1])
    axes.axvline(nominal, color="#555555", ls="--", lw=1, label=f"nominal {nominal:.0%}")
    axes.fill_betweenx(heights, low, high, color=PREDICTED, alpha=0.2, lw=0)
    axes.plot(covered.mean(axis=0), heights, color=PREDICTED, label=f"found, mean {covered.mean():.1%}")
    axes.set(xlabel=f"centre line inside the tube (% of people)\nn = {len(covered)}, 95% CI", title=title)
    axes.set_xlim(min(0.5, low.min() - 0.02), 1.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=None))
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _draw_tube(figure, curves, tube_mm, colour):
    radius = _radius(curves, tube_mm)
    for axes, centre in zip(figure.axes, (curves.coronal_mm[1], curves.sagittal_mm[1]), strict=True):
        band = {"color": colour, "alpha": 0.28, "lw": 0, "label": "90% tube"}
        axes.fill_betweenx(curves.heights_mm, centre - radius, centre + radius, **band)
    figure.axes[1].legend(loc="lower left", fontsize=8)


def _radius(curves, tube_mm):
    radius = np.asarray(tube_mm, float)
    if radius.shape not in ((), curves.heights_mm.shape) or not np.isfinite(radius).all() or radius.min() <= 0:
        message = (
            f"a tube needs one positive radius in mm or one at each of the {len(curves.heights_mm)} heights, "
            f"given shape {radius.shape}, smallest {np.min(radius):.3g}."
        )
        raise InputError(message)
    return np.broadcast_to(radius, curves.heights_mm.shape)


def _edges(curves):
    """Return the right, left, anterior and posterior edge in 3D, shape (3, n), parted by NaN."""
    (right, middle, left), (front, depth, back) = curves.coronal_mm, curves.sagittal_mm
    pairs = ((right, depth), (left, depth), (middle, front), (middle, back))
    return np.concatenate(
        [np.pad((*pair, curves.heights_mm), ((0, 0), (0, 1)), constant_values=np.nan) for pair in pairs], 1
    )


def _line_trace(points, name, colour, width):
    points = dict(zip("xyz", points.astype(np.float32), strict=True))
    return go.Scatter3d(**points, mode="lines", name=name, line={"color": colour, "width": width}, hoverinfo="name")


def _pairs(truth, predicted):
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    both = np.isfinite(truth) & np.isfinite(predicted)
    if not both.any():
        message = "no subject has both a true and a predicted value; expected at least one pair of finite numbers."
        raise InputError(message)
    return truth[both], predicted[both]


def _bland_altman(axes, truth, difference, unit):
    axes.plot(truth + difference / 2, difference, "o", color=PREDICTED, ms=3, alpha=0.6, mew=0)
    limits = limits_of_agreement(difference)
    for name, style in (("loa_high", "--"), ("bias", "-"), ("loa_low", "--")):
        level = limits[name]
        axes.axhspan(limits[f"{name}_ci_low"], limits[f"{name}_ci_high"], color="#555555", alpha=0.15, lw=0)
        axes.axhline(level, color="#555555", ls=style, lw=1)
        place = {"xytext": (0, 1), "textcoords": "offset points", "fontsize": 8, "va": "bottom", "ha": "right"}
        axes.annotate(f"{level:+.1f}".replace("-", "−"), (1, level), xycoords=("axes fraction", "data"), **place)
    axes.set(xlabel=f"mean ({unit})", ylabel=f"predicted − true ({unit})")


def _level_axes():
    """Axes whose height runs from the lower end of L5 (0) to the upper end of T1 (1), levels named."""
    figure, axes = plt.subplots(figsize=(4.2, 4.6))
    axes.set_yticks([1 - sum(ends) / 2 for ends in LEVEL_FRACTIONS.values()], list(LEVEL_FRACTIONS), fontsize=8)
    axes.set(ylim=(0, 1), ylabel="vertebral level")
    return figure, axes
