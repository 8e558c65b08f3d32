"""Figures of CT/MR registrations: images before and after, the deformation, poses of vertebrae, methods.

2D views are curved sections (`spinelib.imaging.sections`) of the MR through the bodies of the warped CT labels. The
patient's right is on the left, anterior on the left, as radiologists look at a spine.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from nibabel.affines import apply_affine
from scipy import ndimage

from spinelib.deformation import DisplacementField, warp_labels
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
from spinelib.imaging.sections import Section, curved_section, sampled
from spinelib.imaging.surfaces import vertebra_meshes
from spinelib.imaging.verse import body_centroids_mm
from spinelib.levels import COLOURS, LEVEL_OF_LABEL
from spinelib.models.ctmr import VARIANTS
from spinelib.registration_evaluation import NAMES, by_method
from spinelib.registration_metrics import DIRECTIONS, pose_table

WINDOW_HU = (-200.0, 700.0)
"""Grey values of the CT from black to white: bone, and a little of soft tissue."""

SQUARE_MM, LINES_MM = 14.0, 5.0
"""Squares of a checkerboard; distance of the lines of a deformation grid."""

DETERMINANTS = (0.5, 2.0)
"""Ends of the colours of a Jacobian map."""

BEFORE, FOLD, _LINES = "#F0E442", "#FF00FF", "#56B4E9"

_VIEWS = ("sagittal", "coronal")
_ACROSS = {"sagittal": 1, "coronal": 0}
_BELOW = 1.2  # inches for titles and legend
_CT_TINT, _MR_TINT = np.array([1.0, 0.9, 0.72]), np.array([0.82, 0.93, 1.0])
_METHOD_COLOURS = dict.fromkeys(VARIANTS, TRUTH) | {
    "ours": PREDICTED,
    "ours_soft": PREDICTED,
    "this_run": "#E69F00",
    "ceiling": OTHER,
}
_VALUE_NAMES = {
    "dice": "Dice",
    "hd95_mm": "95% Hausdorff distance (mm)",
    "bone_tre_mm": "error of points in bone (mm)",
    "soft_tre_mm": "error of points in soft tissue (mm)",
    "nonrigidity": "non-rigidity, mean |JᵀJ − I| in bone",
    "volume_change_pct": "volume change of vertebrae (%)",
    "local_volume_change_pct": "local volume change in bone (%)",
    "folding_pct": "folded voxels (%)",
}
_GAMMA = 0.7
_DECADES = 100.0  # a wider range of values is drawn on a logarithmic axis


def checkerboard(ct: Volume, ct_labels: Volume, mr: Volume, field: DisplacementField, title: str = "") -> Figure:
    """Return squares of CT and MR in turn, before and after registration: edges go on where both fit.

    Parameters
    ----------
    ct : Volume
        HU.
    ct_labels : Volume
        VerSe labels on any grid.
    mr : Volume
        Signal in any unit.
    field : DisplacementField
        MR to CT, on the MR's grid; this and the labels as in the figures below.
    title : str
    """
    views, _ = _views(ct_labels, mr, field)
    panels = [(view, name) for view in views for name in ("before", "after")]
    figure, all_axes, _ = section_axes([view for view, _ in panels], below_inches=_BELOW)
    for axes, (view, name) in zip(all_axes, panels, strict=True):
        points = view.points if name == "before" else field.moved(view.points)
        low, high = WINDOW_HU
        grey = np.clip((sampled(ct, points, order=1, fill=AIR_HU) - low) / (high - low), 0, 1)
        squares = np.floor(view.points[..., [_ACROSS[view.name], 2]] / SQUARE_MM).sum(axis=-1, keepdims=True) % 2 == 0
        _show(axes, np.where(squares, grey[..., None] * _CT_TINT, _signal(mr, view)[..., None] * _MR_TINT), view)
        axes.set_title(f"{view.name}, {name}")
    handles = [Patch(color=tint, label=name) for name, tint in (("CT", _CT_TINT), ("MR", _MR_TINT))]
    return _finished(figure, title, handles)


def overlay(
    mr: Volume, ct_labels: Volume, field: DisplacementField, mr_labels: Volume | None = None, title: str = ""
) -> Figure:
    """Return the MR with the outlines of the CT's vertebrae before and after registration, and of its own if known."""
    views, centres = _views(ct_labels, mr, field)
    figure, panels, _ = section_axes(views, below_inches=_BELOW)
    names = {"CT, before": (BEFORE, "dashed"), "MR": (TRUTH, "solid"), "CT, after": (PREDICTED, "solid")}
    for axes, view in zip(panels, views, strict=True):
        _show(axes, _signal(mr, view), view)
        _outline(axes, ct_labels, view, view.points, *names["CT, before"], 0.9)
        if mr_labels is not None:
            _outline(axes, mr_labels, view, view.points, *names["MR"], 1.6)
        _outline(axes, ct_labels, view, field.moved(view.points), *names["CT, after"], 1.2)
        _write_names(axes, view, centres)
        axes.set_title(view.name)
    shown = [name for name in names if name != "MR" or mr_labels is not None]
    handles = [Line2D([], [], color=names[name][0], ls=names[name][1], label=name) for name in shown]
    return _finished(figure, title, handles)


def deformation_grid(field: DisplacementField, mr: Volume, ct_labels: Volume, title: str = "") -> Figure:
    """Return the lines of a square grid in the CT where the field finds them in the MR, vertebrae outlined."""
    views, centres = _views(ct_labels, mr, field)
    figure, panels, _ = section_axes(views, below_inches=_BELOW)
    for axes, view in zip(panels, views, strict=True):
        _show(axes, 0.55 * _signal(mr, view), view)
        moved = field.moved(view.points)
        for axis in (_ACROSS[view.name], 2):
            values = moved[..., axis]
            lines = np.arange(np.ceil(values.min() / LINES_MM), values.max() / LINES_MM) * LINES_MM
            style = {"colors": _LINES, "linewidths": 0.55, "linestyles": "solid"}
            axes.contour(*_coordinates(view), values, levels=lines, **style)
        _outline(axes, ct_labels, view, moved, PREDICTED, "solid", 1.4)
        _write_names(axes, view, centres)
        axes.set_title(view.name)
    return _finished(figure, title, [Line2D([], [], color=_LINES, label=f"lines {LINES_MM:.0f} mm apart in the CT")])


def jacobian_map(field: DisplacementField, ct_labels: Volume, title: str = "") -> Figure:
    """Return the determinant of the Jacobian, CT volume per MR volume; folds stand out, vertebrae are outlined."""
    determinant = Volume(np.linalg.det(field.jacobian()), field.grid.affine)
    views, _ = _views(ct_labels, determinant, field)
    figure, panels, _ = section_axes(views, 0.9, _BELOW)
    scale = ScalarMappable(LogNorm(*DETERMINANTS), "PuOr")
    for axes, view in zip(panels, views, strict=True):
        picture = scale.to_rgba(np.clip(sampled(determinant, view.points, order=1, fill=1.0), *DETERMINANTS))
        picture[sampled(determinant, view.points, order=0, fill=1.0) <= 0] = to_rgba(FOLD)
        _show(axes, picture, view, "black")
        _outline(axes, ct_labels, view, field.moved(view.points), "black", "solid", 1.0)
        axes.set_title(view.name)
    bar = figure.colorbar(scale, ax=panels, label="CT volume / MR volume", shrink=0.8, pad=0.02, extend="both")
    bar.set_ticks([0.5, 0.7, 1, 1.4, 2], labels=["0.5", "0.7", "1", "1.4", "2"])
    bar.minorticks_off()
    folded = 100 * float((determinant.values <= 0).mean())
    return _finished(figure, title, [Patch(color=FOLD, label=f"folded: {folded:.2g}% of the voxels")])


def pose_plot(
    transforms: Mapping[int, np.ndarray],
    ct_labels: Volume,
    truth: Mapping[int, np.ndarray] | None = None,
    title: str = "",
) -> Figure:
    """Return rotation and translation of the vertebrae by level, the estimate beside the truth.

    Parameters
    ----------
    transforms : mapping of int to ndarray (4, 4)
        MR to CT of each label, world mm.
    ct_labels : Volume
    truth : mapping of int to ndarray (4, 4), optional
    title : str
    """
    shown = [("true", truth, TRUTH, "D", 7)] if truth else []
    shown.append(("estimate", transforms, PREDICTED, "o", 4))
    levels = [LEVEL_OF_LABEL[label] for label in transforms]
    size = (7.6, 2 * (0.22 * len(levels) + 0.9) + 0.4)
    figure, panels = plt.subplots(2, 3, figsize=size, sharey=True, sharex="row")
    for name, matrices, colour, marker, points in shown:
        table = pose_table(matrices, ct_labels).set_index("level").reindex(levels)
        face = "none" if name == "true" else colour
        for row, (kind, unit) in enumerate((("rotation", "deg"), ("translation", "mm"))):
            for axes, direction in zip(panels[row], DIRECTIONS, strict=True):
                values = table[f"{kind}_{direction}_{unit}"]
                axes.plot(values, range(len(levels)), marker, color=colour, mfc=face, ms=points, mew=1.2, label=name)
    for axes in panels.flat:
        axes.axvline(0, color="#BBBBBB", lw=0.8, zorder=0)
        axes.grid(axis="x", color="#E6E6E6", lw=0.6)
        axes.set_yticks(range(len(levels)), levels, fontsize=8)
        axes.set_ylim(len(levels) - 0.5, -0.5)
    for direction, turn, way in zip(DIRECTIONS, *panels, strict=True):
        turn.set_xlabel(f"rotation about {direction} (degrees)")
        way.set_xlabel(f"translation to {direction} (mm)")
    return _finished(figure, title, panels[0, 0].lines[: len(shown)])


def method_boxes(
    rows: pd.DataFrame, value: str = "dice", published: pd.DataFrame | None = None, title: str = ""
) -> Figure:
    """Return a box of each method: quartiles, whiskers to 1.5 times their distance, every row as a dot.

    Where single rows would squeeze the boxes, the axis ends before them and arrows stand for them.

    Parameters
    ----------
    rows : DataFrame
        method and `value`, one row a vertebra or a pair, as `registration_evaluation.evaluate_pairs` makes them;
        methods from top to bottom in the order of `registration_evaluation.NAMES`.
    value : str
    published : DataFrame, optional
        method and `value`: the mean of a method on other data, marked on its row.
    title : str

    Raises
    ------
    InputError
        If a column is missing or no value is finite.
    """
    if not {"method", value} <= set(rows) or not np.isfinite(rows[value].astype(float)).any():
        message = f"expected the columns method and {value} with a finite number, given {', '.join(map(str, rows))}."
        raise InputError(message)
    rows = rows[np.isfinite(rows[value].astype(float))]
    groups = {method: part[value].to_numpy(float) for method, part in by_method(rows)}
    marks = {} if published is None else dict(zip(published["method"], published[value], strict=True))
    marks = {method: marks.get(method, np.nan) for method in groups}
    figure, axes = plt.subplots(figsize=(6.4, 0.3 * len(groups) + 1.2))
    end = _end_of_axis([*groups.values(), list(marks.values())])
    for place, (method, values) in enumerate(groups.items()):
        _box(axes, place, values, _METHOD_COLOURS.get(method, "#777777"), end)
    if np.isfinite(list(marks.values())).any():
        axes.plot(
            marks.values(), range(len(marks)), "x", color="black", ms=6, mew=1.5, label="published mean, other data"
        )
        figure.legend(loc="outside lower center", fontsize=8)
    if rows[value].min() > 0 and rows[value].max() > _DECADES * rows[value].min():
        axes.set_xscale("log")
    axes.set_yticks(range(len(groups)), [NAMES.get(method, method) for method in groups], fontsize=8)
    axes.set(ylim=(len(groups) - 0.4, -0.6), xlabel=_VALUE_NAMES.get(value, with_unit(*name_and_unit(value))))
    if np.isfinite(end):
        axes.set_xlim(right=1.02 * end)
    axes.set_title(title)
    axes.grid(axis="x", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    return figure


def vertebrae_before_after(
    ct_labels: Volume, transforms: Mapping[int, np.ndarray], mr_labels: Volume | None = None, title: str = ""
) -> go.Figure:
    """Return the CT's vertebrae in 3D as they lie in the CT and carried to the MR; the legend switches them.

    Parameters
    ----------
    ct_labels : Volume
    transforms : mapping of int to ndarray (4, 4)
        MR to CT of each label, world mm.
    mr_labels : Volume, optional
        Drawn once the reader asks for them.
    title : str
    """
    before = vertebra_meshes(ct_labels)
    back = {LEVEL_OF_LABEL[label]: np.linalg.inv(matrix) for label, matrix in transforms.items()}
    after = {level: mesh.copy().apply_transform(back[level]) for level, mesh in before.items() if level in back}
    if not after:
        message = "no vertebra to show; expected VerSe labels of vertebrae and their transforms."
        raise InputError(message)
    stages = {"CT, before": (before, 0.3, "#888888"), "CT, after": (after, 1.0, None)}
    stages |= {} if mr_labels is None else {"MR": (vertebra_meshes(mr_labels), 0.5, TRUTH)}
    figure = go.Figure()
    for name, (meshes, opacity, colour) in stages.items():
        for level, mesh in meshes.items():
            text = f"<b>{level}</b>, {name}<br>right %{{x:.0f}} mm<br>anterior %{{y:.0f}} mm<br>superior %{{z:.0f}} mm"
            style = {"color": colour or COLOURS[level], "opacity": opacity, "hovertemplate": text + "<extra></extra>"}
            group = {"legendgroup": name, "showlegend": level == next(iter(meshes))}
            trace = mesh_trace(mesh, level, visible="legendonly" if name == "MR" else True, **style, **group)
            figure.add_trace(trace.update(name=name))
    return in_true_proportions(figure, title)


# --- drawing ---


def _views(ct_labels, image, field):
    """Return the sagittal and the coronal section of an image through the CT's vertebrae, and the centres of these."""
    centres = body_centroids_mm(warp_labels(ct_labels, field))
    return [_inset(curved_section(name, image.grid, centres)) for name in _VIEWS], centres


def _inset(view):
    """Return a view without its outermost pixels, which may lie outside by rounding."""
    left, right, bottom, top = view.extent
    step = (top - bottom) / len(view.points)
    return Section(view.name, view.points[1:-1, 1:-1], (left - step, right + step, bottom + step, top - step))


def _finished(figure, title, handles):
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    return figure


def _signal(mr, view):
    """Return the MR in a view, 0 to 1, its darker tissues brightened."""
    values = sampled(mr, view.points, order=1)
    low, high = np.percentile(values, (1, 99))
    return np.clip((values - low) / max(high - low, 1e-9), 0, 1) ** _GAMMA


def _show(axes, picture, view, letters="white"):
    show_section(axes, picture, view, letters, vmin=0, vmax=1)


def _coordinates(view):
    """Return across and up in mm of the pixels of a view, as contour takes them."""
    return view.points[0, :, _ACROSS[view.name]], view.points[:, 0, 2]


def _outline(axes, labels, view, points, colour, style, width):
    """Draw the outlines that labels have at points (rows, cols, 3) of a view."""
    boxes = ndimage.find_objects(labels.values)
    for label, box in ((label, box) for label, box in enumerate(boxes, start=1) if box is not None):
        affine = labels.affine.copy()
        affine[:3, 3] = apply_affine(labels.affine, [side.start - 1 for side in box])
        # Linear between voxels: the outlines of thick slices are smooth then.
        share = sampled(Volume(np.pad(labels.values[box] == label, 1).astype(np.float32), affine), points, order=1)
        if share.min() < 0.5 < share.max():
            axes.contour(*_coordinates(view), share, levels=[0.5], colors=colour, linewidths=width, linestyles=style)


def _write_names(axes, view, centres):
    left, right, bottom, top = view.extent
    for label, centre in centres.items():
        across = centre[_ACROSS[view.name]]
        if right < across < left and bottom < centre[2] < top:
            style = {"fontsize": 7.5, "ha": "center", "va": "center", "color": "white", "weight": "bold"}
            outline = [withStroke(linewidth=1.8, foreground="black")]
            axes.text(across, centre[2], LEVEL_OF_LABEL[label], path_effects=outline, **style)


def _end_of_axis(groups) -> float:
    """Return where an axis ends that shows all whiskers, if the largest value lies beyond twice that; else infinity."""
    groups = [np.asarray(values, float)[np.isfinite(values)] for values in groups]
    tops = []
    for values in filter(len, groups):
        low, high = np.percentile(values, (25, 75))
        tops.append(values[values <= high + 1.5 * (high - low)].max())
    end = 1.1 * max(tops)
    return end if max(values.max() for values in groups if len(values)) > 2 * end else np.inf


def _box(axes, place, values, colour, end):
    line = {"color": colour, "lw": 1.2}
    axes.boxplot(
        values,
        positions=[place],
        orientation="horizontal",
        widths=0.55,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "white", "edgecolor": colour, "lw": 1.2},
        medianprops=line | {"lw": 2.2},
        whiskerprops=line,
        capprops=line,
        manage_ticks=False,
    )
    offsets = np.random.default_rng(0).uniform(-0.2, 0.2, len(values))
    beyond = values > end
    axes.plot(values[~beyond], place + offsets[~beyond], ".", color=colour, ms=4.5, alpha=0.45, mew=0, zorder=3)
    axes.plot(np.full(beyond.sum(), end), place + offsets[beyond], ">", color=colour, ms=5, mew=0, zorder=3)
    at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": colour}
    axes.annotate(f"{np.median(values):#.3g}, n = {len(values)}", (1.02, place), **at)
