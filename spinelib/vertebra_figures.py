"""Figures of segmented vertebrae: CT with coloured levels, surfaces in 3D, scores by level, heat maps, cohorts.

2D views are curved sections (`spinelib.imaging.sections`), so that all vertebrae of a scoliotic spine show.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import trimesh
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy import ndimage
from scipy.spatial import cKDTree

from spinelib.errors import InputError
from spinelib.figures import (
    OTHER,
    PREDICTED,
    TRUTH,
    in_true_proportions,
    mesh_trace,
    name_and_unit,
    section_axes,
    show_section,
    with_unit,
)
from spinelib.geometry import Volume
from spinelib.imaging.ct import AIR_HU
from spinelib.imaging.sections import curved_section, heat_centres, projected, sampled
from spinelib.imaging.surfaces import STEP_MM, vertebra_meshes
from spinelib.imaging.verse import LabelledCT, body_centroids_mm
from spinelib.levels import COLOURS, LEVEL_OF_LABEL, LEVEL_ORDER, VERSE_LABELS, region
from spinelib.metrics import bootstrap_ci

WINDOW_HU = (-450.0, 1050.0)
"""Grey values from black to white: a bone window, width 1500 about 300 HU."""

LEVELS = tuple(LEVEL_OF_LABEL[label] for label in LEVEL_ORDER)
"""C1 to L6, cranial to caudal."""

REGION_COLOURS = {"cervical": TRUTH, "thoracic": PREDICTED, "lumbar": OTHER}

_SIDE_FIRST = ("sagittal", "coronal")
_ALPHA, _EDGE_ALPHA = 0.38, 0.95
_EYE = {"x": 1.15, "y": 1.75, "z": 0.2}  # far enough off for the head of a bent spine
_FACES = 2500  # of a vertebra in an interactive figure
_NAME_POINTS = 7.5
_PIECE = 0.2  # of the median volume
_HALF_BODY_MM = 40.0  # at most, C1 with its transverse processes included
_SCANS_IN_A_ROW = 7


def segmentation_panels(
    ct: Volume, labels: Volume, names: bool = True, truth: Volume | None = None, title: str = ""
) -> Figure:
    """Return curved sagittal and coronal views of a CT with its vertebrae in level colours.

    As radiologists look at a spine: the patient's right on the left, anterior on the left.

    Parameters
    ----------
    ct : Volume
        HU.
    labels : Volume
        VerSe labels on any grid.
    names : bool
        Write the level beside each body.
    truth : Volume, optional
        True labels, drawn beside; the views then run through the true vertebrae.
    title : str
    """
    shown = {"": labels} if truth is None else {", found": labels, ", true": truth}
    centres = {ending: _body_centres(volume) for ending, volume in shown.items()}
    path = list(centres.values())[-1]
    panels = [(curved_section(name, ct.grid, path), ending) for name in _SIDE_FIRST for ending in shown]
    figure, all_axes, inches_per_mm = section_axes([view for view, _ in panels])
    for axes, (view, ending) in zip(all_axes, panels, strict=True):
        found = _draw(axes, ct, shown[ending], view)
        axes.set_title(view.name + ending)
        if names:
            _write_names(axes, view, found, centres[ending], 1.25 * _NAME_POINTS / 72 / inches_per_mm)
    figure.suptitle(title)
    return figure


def location_panels(ct: Volume, heat: Volume, title: str = "") -> Figure:
    """Return a CT in two curved views with the largest heat along each line of sight.

    Parameters
    ----------
    ct : Volume
        HU.
    heat : Volume
        How likely the spine is here, 0 to 1, on any grid.
    title : str
    """
    centres = heat_centres(heat)
    views = [curved_section(name, ct.grid, centres, whole=True) for name in _SIDE_FIRST]
    figure, panels, _ = section_axes(views, beside_inches=0.9)
    for axes, view in zip(panels, views, strict=True):
        _draw(axes, ct, None, view)
        seen, extent = projected(heat, ct.grid, view.name)
        style = {"cmap": "inferno", "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
        shown = axes.imshow(seen, extent=extent, alpha=0.7 * np.clip(2 * seen, 0, 1), **style)
        axes.set(xlim=view.extent[:2], ylim=view.extent[2:], title=view.name)
    bar = plt.cm.ScalarMappable(shown.norm, shown.cmap)  # without the transparency of the picture
    figure.colorbar(bar, ax=panels, label="largest heat along the line of sight", shrink=0.6, pad=0.02)
    figure.suptitle(title)
    return figure


def cohort_of_scans(scans: Sequence[LabelledCT], title: str = "") -> Figure:
    """Return the sagittal and, below it, the coronal view of each scan, vertebrae coloured, all at one scale."""
    if not scans:
        message = "no scan to show; expected at least one LabelledCT."
        raise InputError(message)
    pairs = [[curved_section(n, scan.ct.grid, scan.centroids_mm, whole=True) for n in _SIDE_FIRST] for scan in scans]
    extents = np.array([view.extent for pair in pairs for view in pair])
    half_width, half_height = np.ptp(extents[:, :2], axis=1).max() / 2, np.ptp(extents[:, 2:], axis=1).max() / 2
    bands = -(-len(scans) // _SCANS_IN_A_ROW)
    columns = -(-len(scans) // bands)
    inches_per_mm = min(0.75 / half_width, 1.1 / half_height)
    size = (2 * half_width * columns * inches_per_mm + 0.4, (4 * half_height * inches_per_mm + 0.5) * bands + 0.3)
    figure, panels = plt.subplots(2 * bands, columns, figsize=size, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for place, (scan, pair) in enumerate(zip(scans, pairs, strict=True)):
        band, column = divmod(place, columns)
        for axes, view in zip(panels[2 * band : 2 * band + 2, column], pair, strict=True):
            _draw(axes, scan.ct, scan.labels, view)
            across, up = np.mean(view.extent[:2]), np.mean(view.extent[2:])
            axes.set(xlim=(across + half_width, across - half_width), ylim=(up - half_height, up + half_height))
        panels[2 * band, column].set_title(f"{scan.key}\n{_span(scan.labels)}", fontsize=8, loc="center")
    _scale_bar(panels[0, 0], pairs[0][0])
    figure.suptitle(title)
    return figure


def vertebrae_3d(
    labels: Volume | Mapping[str, trimesh.Trimesh],
    errors: Mapping[str, float | np.ndarray] | None = None,
    title: str = "",
    height: int = 720,
) -> go.Figure:
    """Return vertebrae in 3D, in true proportions, in level colours or coloured by their error.

    Parameters
    ----------
    labels : Volume or mapping of str to Trimesh
        VerSe labels, or surfaces in world mm as `imaging.surfaces.vertebra_meshes` returns them.
    errors : mapping of str to float or ndarray (vertices,), optional
        Distance to the true surface in mm, one of a level or one of each vertex (then give the meshes).
    title, height
        Height in pixels.
    """
    meshes = labels if isinstance(labels, Mapping) else vertebra_meshes(labels)
    if not meshes:
        message = "no vertebra to show; expected VerSe labels of vertebrae (1 to 25 and 28) or at least one mesh."
        raise InputError(message)
    spread = {level: np.broadcast_to(value, len(meshes[level].vertices)) for level, value in (errors or {}).items()}
    highest = max([1.0, *(float(np.quantile(value, 0.98)) for value in spread.values())])
    figure = go.Figure()
    for level, mesh in meshes.items():
        light = mesh.simplify_quadric_decimation(face_count=_FACES) if len(mesh.faces) > _FACES else mesh
        text, style = f"<b>{level}</b>, {abs(mesh.volume) / 1000:.1f} cm³", {"color": COLOURS[level]}
        if level in spread:
            text += f", mean error {spread[level].mean():.2f} mm"
            style = _error_colours(mesh, light, spread[level], highest)
        text += "<br>right %{x:.0f} mm<br>anterior %{y:.0f} mm<br>superior %{z:.0f} mm<extra></extra>"
        figure.add_trace(mesh_trace(light, level, hovertemplate=text, showlegend=not spread, **style))
    figure.update_traces(showscale=False, selector=lambda trace: trace.name != next(iter(spread), ""))
    in_true_proportions(figure, title, height)
    return figure.update_layout(scene_camera_eye=_EYE)


def score_by_level(frame: pd.DataFrame, value: str = "dice", title: str = "") -> Figure:
    """Return a score of each level: every vertebra as a dot, the mean with its 95% bootstrap interval.

    Parameters
    ----------
    frame : DataFrame
        One row a vertebra: its true level, and the column `value`. Missing values are left out and show in n.
    value : str
        For example 'dice' or 'hd_mm', or 'shape_dice', which leaves the name aside.
    title : str
    """
    _require(frame, "level", value)
    frame = frame[np.isfinite(frame[value].astype(float))]
    levels = [level for level in LEVELS if (frame["level"] == level).any()]
    if not levels:
        message = f"no vertebra has a finite {value!r}; expected levels such as 'T12', each with a number."
        raise InputError(message)
    name, unit = name_and_unit(value)
    figure, axes = plt.subplots(figsize=(4.8, 0.2 * len(levels) + 1.1))
    for place, level in enumerate(levels):
        values = frame.loc[frame["level"] == level, value].to_numpy(float)
        _score_row(axes, place, values, REGION_COLOURS[region(level)], decimals=2 if unit else 3)
    axes.set_yticks(range(len(levels)), levels, fontsize=8)
    for label, level in zip(axes.get_yticklabels(), levels, strict=True):
        label.set_color(REGION_COLOURS[region(level)])
    plain = name.removeprefix("shape ")
    label = with_unit(_SCORE_NAMES.get(plain, plain), unit)
    axes.set_xlabel(f"{label}{', whatever the name' if plain != name else ''}\nmean and 95% CI")
    axes.set(ylim=(len(levels) - 0.4, -0.6), title=title)
    return figure


def level_confusion(frame: pd.DataFrame, title: str = "") -> Figure:
    """Return how often each true level was given each name.

    Parameters
    ----------
    frame : DataFrame
        As `vertebra_scores.score_scan` makes it, of one scan or many: outcome, level, predicted_label.
    title : str
    """
    _require(frame, "outcome", "level", "predicted_label")
    if frame.empty:
        message = "no vertebra to show; expected at least one row of score_scan."
        raise InputError(message)
    found = frame["predicted_label"].map(LEVEL_OF_LABEL).where(frame["outcome"] != "missed", "missed")
    pairs = pd.DataFrame({"true": frame["level"].where(frame["outcome"] != "extra", "not there"), "found": found})
    present = [level for level in LEVELS if (pairs == level).any(axis=None)]
    rows, columns = [*present, "not there"], [*present, "missed"]
    counts = pd.crosstab(pairs["true"], pairs["found"]).reindex(index=rows, columns=columns, fill_value=0).to_numpy()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 0.24 * len(rows) + 1.2
    figure, axes = plt.subplots(figsize=(side, side))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            colour, weight = "white" if share[row, column] > 0.6 else "black", "normal" if row == column else "bold"
            axes.text(column, row, count, ha="center", va="center", fontsize=7, color=colour, weight=weight)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.axhline(len(present) - 0.5, color="#999999", lw=0.8)
    axes.axvline(len(present) - 0.5, color="#999999", lw=0.8)
    axes.set(xlabel="found level", ylabel="true level", title=title)
    return figure


_SCORE_NAMES = {"dice": "Dice", "hd": "Hausdorff distance", "hd95": "95% Hausdorff distance"} | {
    name: name.upper() for name in ("assd", "nsd")
}


def _score_row(axes, place, values, colour, decimals):
    offsets = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
    axes.plot(values, place + offsets, ".", color=colour, ms=3, alpha=0.35, mew=0)
    mean, low, high = bootstrap_ci(values)
    axes.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
    axes.plot(mean, place, "o", color=colour, ms=5, mec="white", mew=0.6)
    at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
    axes.annotate(f"{mean:.{decimals}f}, n = {len(values)}", (1.02, place), **at)


def _error_colours(mesh, light, error, highest):
    """Return plotly's colours of the vertices of `light`, each with the error of the nearest vertex of `mesh`."""
    nearest = cKDTree(mesh.vertices).query(light.vertices)[1]
    return {
        "intensity": error[nearest].astype(np.float32),
        "colorscale": "YlOrRd",
        "cmin": 0,
        "cmax": highest,
        "colorbar": {"title": {"text": "distance to the<br>true surface (mm)"}, "len": 0.6, "thickness": 16},
        # Bright all round, so that a colour reads as its value and not as shade.
        "lighting": {"ambient": 0.75, "diffuse": 0.35, "specular": 0.0},
    }


def _span(labels):
    present = set(np.unique(labels.values).tolist())
    levels = [level for level in LEVELS if VERSE_LABELS[level] in present]
    return f"{levels[0]} to {levels[-1]}" if levels else "no vertebra"


def _require(frame, *names):
    missing = [name for name in names if name not in frame]
    if missing:
        message = f"the table lacks the columns: {', '.join(missing)}. It has: {', '.join(map(str, frame.columns))}."
        raise InputError(message)


def _body_centres(labels):
    """Return the body centre of each level, without small pieces: a cut vertebra may show no body."""
    steps = np.maximum(1, STEP_MM // labels.spacing_mm).astype(int)
    values = labels.values[tuple(slice(None, None, step) for step in steps)]
    centres = body_centroids_mm(Volume(values, labels.affine @ np.diag([*steps, 1])))
    boxes = ndimage.find_objects(values)
    sizes = {label: np.count_nonzero(values[boxes[label - 1]] == label) for label in centres}
    least = _PIECE * np.median(list(sizes.values())) if sizes else 0
    return {LEVEL_OF_LABEL[label]: centre for label, centre in centres.items() if sizes[label] >= least}


# --- drawing ---


def _draw(axes, ct, labels, view):
    """Draw a view of a CT and of labels, if any; return the labels of its pixels."""
    low, high = WINDOW_HU
    show_section(axes, sampled(ct, view.points, order=1, fill=AIR_HU), view, vmin=low, vmax=high)
    if labels is None:
        return None
    found = sampled(labels, view.points, order=0)
    axes.imshow(_in_level_colours(found), extent=view.extent, interpolation="nearest")
    return found


def _scale_bar(axes, view, length_mm=50):
    left, _, bottom, _ = view.extent
    axes.plot([left - 8] * 2, [bottom + 8, bottom + 8 + length_mm], color="white", lw=2)
    axes.text(left - 12, bottom + 8, f"{length_mm} mm", color="white", fontsize=6, rotation=90, va="bottom", ha="left")


def _in_level_colours(found):
    """Return labels (rows, cols) as RGBA: translucent level colours with a strong rim."""
    table = np.zeros((256, 4))
    for level in LEVELS:
        table[VERSE_LABELS[level]] = to_rgba(COLOURS[level], _ALPHA)
    picture, around = table[found], np.pad(found, 1, mode="edge")
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    rim = np.any([side != found for side in neighbours], axis=0) & (picture[..., 3] > 0)
    picture[rim, 3] = _EDGE_ALPHA
    return picture


def _write_names(axes, view, found, centres, least_mm):
    """Write the levels beside the bodies that show: before them in a sagittal, on the right in a coronal view."""
    along = 1 if view.name == "sagittal" else 0
    superior, lateral = view.points[:, 0, 2], view.points[0, :, along]
    height = np.inf
    for level, centre in sorted(centres.items(), key=lambda item: -item[1][2]):
        seen = lateral[found[np.abs(superior - centre[2]).argmin()] == VERSE_LABELS[level]]
        near = seen[np.abs(seen - centre[along]) < _HALF_BODY_MM]
        if not len(near):
            continue
        height = min(float(centre[2]), height - least_mm)
        place, side = (near.max() + 3, "right") if view.name == "sagittal" else (near.min() - 3, "left")
        style = {"fontsize": _NAME_POINTS, "ha": side, "va": "center", "color": "white", "weight": "bold"}
        axes.text(place, height, level, path_effects=[withStroke(linewidth=1.8, foreground="black")], **style)
