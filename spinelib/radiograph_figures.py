"""Figures of vertebrae from two radiographs: contours on the views, scores beside published ones.

In 3D a spine is drawn by `vertebra_figures.vertebrae_3d`, coloured by `radiograph_evaluation.surface_distances`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import trimesh
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image, ImageDraw
from skimage.measure import find_contours

from spinelib.errors import InputError
from spinelib.figures import OTHER, PREDICTED, TRUTH
from spinelib.imaging.cone_beam import ConeBeam
from spinelib.levels import COLOURS
from spinelib.spine import Spine

PUBLISHED = "#888888"
KIND_STYLES = {"ours": (PREDICTED, "o"), "baseline": (OTHER, "D"), "published": (PUBLISHED, "x")}
"""Colour and marker of the rows of `score_dots`."""

_KIND_NAMES = {"ours": "networks", "baseline": "baselines and ceiling", "published": "published"}
_LETTERS = ("RL", "AP")  # what the left and right edges of the frontal and the lateral view show
_RASTER = 700  # pixels along the longer side of a silhouette
_POINTS = 7.5


def silhouettes(meshes: Mapping[str, trimesh.Trimesh], beam: ConeBeam) -> dict[str, list[np.ndarray]]:
    """Return the outline of the shadow of each mesh on a detector.

    Parameters
    ----------
    meshes : mapping of str to Trimesh
        Closed surfaces, world RAS mm.
    beam : ConeBeam

    Returns
    -------
    dict of str to list of ndarray (n, 2)
        Closed lines of (row, col) in pixels of the detector; more than one where the shadow has holes.
    """
    return {name: _outline(beam.project(mesh.vertices)[mesh.faces]) for name, mesh in meshes.items()}


def radiograph_pair(
    images: Sequence[np.ndarray],
    beams: Sequence[ConeBeam],
    predicted: Spine,
    truth: Spine | None = None,
    title: str = "",
) -> Figure:
    """Return the frontal and the lateral radiograph with the contours of all vertebrae.

    As radiologists look at a spine: the patient's right on the left, anterior on the left.

    Parameters
    ----------
    images : two of ndarray (rows, cols)
        Frontal, lateral; bone bright.
    beams : two of ConeBeam
        Of the whole images.
    predicted : Spine
        With surfaces. Contours are in level colours; beside a truth all are in the colour of predictions.
    truth : Spine, optional
        Drawn below in the colour of truth.
    title : str
    """
    heights = [beam.shape[0] * np.linalg.norm(beam.row_step_mm) for beam in beams]
    widths = [beam.shape[1] * np.linalg.norm(beam.col_step_mm) for beam in beams]
    inches = min(7.5 / max(heights), 10.0 / sum(widths))
    size = (inches * sum(widths) + 0.4, inches * max(heights) + 0.5)
    figure, panels = plt.subplots(1, 2, figsize=size, width_ratios=widths)
    for axes, image, beam, letters, name in zip(panels, images, beams, _LETTERS, ("frontal", "lateral"), strict=True):
        _draw_radiograph(axes, image, beam, letters)
        axes.set_title(name)
        if truth is not None:
            _draw_contours(axes, truth, beam, dict.fromkeys(truth.levels, TRUTH), 1.8)
        colours = COLOURS if truth is None else dict.fromkeys(predicted.levels, PREDICTED)
        _draw_contours(axes, predicted, beam, colours, 0.9)
        if truth is None:
            _write_names(axes, predicted, beam)
    if truth is not None:
        for colour, name in ((TRUTH, "true"), (PREDICTED, "predicted")):
            panels[1].plot([], [], color=colour, label=name)
        panels[1].legend(loc="lower right", fontsize=8, labelcolor="white")
    figure.suptitle(title)
    return figure


def score_dots(rows: pd.DataFrame, value: str = "dice", label: str = "Dice", title: str = "") -> Figure:
    """Return one line a row of a table: the mean as a dot with its interval, the number beside it.

    Parameters
    ----------
    rows : DataFrame
        As `radiograph_evaluation.table_rows` makes it: name, kind (of `KIND_STYLES`), data, and `value` with
        `value`_low and `value`_high, NaN where there is no interval. Top row first; rows without a value are left out.
    value : str
    label : str
        Of the axis.
    title : str
    """
    missing = [name for name in ("name", "kind", "data", value) if name not in rows]
    if missing:
        message = f"the table lacks the columns: {', '.join(missing)}. It has: {', '.join(map(str, rows.columns))}."
        raise InputError(message)
    rows = rows[np.isfinite(rows[value].astype(float))]
    if rows.empty:
        message = f"no row has a finite {value!r}; expected at least one."
        raise InputError(message)
    figure, axes = plt.subplots(figsize=(6.2, 0.27 * len(rows) + 1.1))
    digits = 2 if value.endswith("_mm") else 3
    for place, row in enumerate(rows.to_dict("records")):
        colour, marker = KIND_STYLES[row["kind"]]
        low, high = row.get(f"{value}_low", np.nan), row.get(f"{value}_high", np.nan)
        axes.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
        axes.plot(row[value], place, marker, color=colour, ms=5.5, mew=1.6 if marker == "x" else 0)
        at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8, "color": colour}
        axes.annotate(f"{row[value]:.{digits}f}", (1.02, place), **at)
    axes.set_yticks(range(len(rows)), rows["name"], fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=label, title=title)
    axes.grid(axis="x", color="#DDDDDD", lw=0.6)
    axes.set_axisbelow(True)
    for kind, data in rows.drop_duplicates("kind")[["kind", "data"]].itertuples(index=False):
        colour, marker = KIND_STYLES[kind]
        seen_on = "other data" if kind == "published" else data
        axes.plot([], [], marker, color=colour, ms=5.5, label=f"{_KIND_NAMES[kind]}, on {seen_on}")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _outline(triangles) -> list[np.ndarray]:
    """Return the outlines of the shadow of a closed surface, given its triangles on the detector (n, 3, 2)."""
    corner, extent = triangles.min(axis=(0, 1)), np.ptp(triangles, axis=(0, 1))
    scale = _RASTER / extent.max()
    canvas = Image.new("L", tuple(int(n) + 5 for n in np.ceil(extent[::-1] * scale)))
    draw = ImageDraw.Draw(canvas)
    first, second = np.moveaxis(np.diff(triangles, axis=1), 1, 0)
    facing = np.linalg.det(np.stack([first, second], axis=1)) > 0  # one side of the surface casts the whole shadow
    for corners in ((triangles[facing] - corner) * scale + 2)[:, :, ::-1].reshape(-1, 6).tolist():
        draw.polygon(corners, fill=255)
    return [(line - 2) / scale + corner for line in find_contours(np.asarray(canvas), 127.5)]


def _draw_radiograph(axes, image, beam, letters):
    low, high = np.percentile(image, [1, 99.5])
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear")
    axes.set(xticks=[], yticks=[], xlim=(-0.5, beam.shape[1] - 0.5), ylim=(beam.shape[0] - 0.5, -0.5))
    for place, side, letter in ((0.02, "left", letters[0]), (0.98, "right", letters[1])):
        style = {"transform": axes.transAxes, "ha": side, "va": "top", "color": "white", "weight": "bold"}
        axes.text(place, 0.985, letter, **style)


def _draw_contours(axes, spine, beam, colours, width):
    for level, lines in silhouettes(dict(zip(spine.levels, spine.meshes, strict=True)), beam).items():
        for line in lines:
            axes.plot(line[:, 1], line[:, 0], color=colours[level], lw=width)


def _write_names(axes, spine, beam):
    for level, (row, col) in zip(spine.levels, beam.project(spine.poses[:, :3, 3]), strict=True):
        style = {"fontsize": _POINTS, "ha": "center", "va": "center", "color": "white", "weight": "bold"}
        axes.text(col, row, level, path_effects=[withStroke(linewidth=1.8, foreground="black")], **style)
