"""Figures: matplotlib for paper panels, plotly for 3D. One style, one palette, stated once here."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import trimesh
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from spinelib.geometry import PlanarTransform, Projection, move_projection
from spinelib.levels import COLOURS
from spinelib.metrics import match_depth
from spinelib.spine import Curves, Spine

TRUTH, PREDICTED, OTHER = "#0072B2", "#D55E00", "#009E73"
METHOD_NAMES = {
    "mean_curve": "mean curve",
    "height_scaled_mean": "mean curve scaled by height",
    "nearest": "nearest neighbour",
    "ridge": "ridge on pixels",
    "paper": "paper's network, its recipe",
    "paper_modern": "paper's network, modern recipe",
    "ours_this_run": "ours, trained in this run",
    "ours": "ours",
    "ceiling": "ceiling (true curves)",
}
BONE = "#E3D7BF"
_METHOD_STYLES = {
    "ours": (PREDICTED, "o", "-"),
    "ours_this_run": ("#E69F00", "D", "-"),
    "paper": (TRUTH, "s", "-"),
    "paper_modern": (TRUTH, "s", "-"),
    "ceiling": (OTHER, "*", "-"),
    "ridge": ("#555555", "^", "--"),
    "nearest": ("#555555", "v", ":"),
    "mean_curve": ("#888888", "x", "-."),
    "height_scaled_mean": ("#888888", "+", ":"),
}
_MORE_STYLES = (("#CC79A7", "P", "-"), ("#56B4E9", "h", "-"), ("#000000", "d", "-"), ("#F0E442", "p", "-"))
_COLUMN_NAMES = {
    "severity": ("true Cobb angle", "degrees"),
    "age": ("age", "years"),
    "bmi": ("BMI", "kg/m²"),
    "cobb_deg": ("Cobb angle", "degrees"),
    "modified_ferguson_deg": ("Ferguson angle (modified)", "degrees"),
    "pmc_cobb_deg": ("Cobb angle in the PMC", "degrees"),
    "pmc_azimuth_deg": ("azimuth of the PMC", "degrees"),
    "apex_level": ("apex level", "vertebrae"),
}
_UNITS = {"deg": "degrees", "mm": "mm", "years": "years"}
_FACES_PER_VERTEBRA = 2500
_ROOM_MM = 8.0  # around a 3D scene
_SIDES = {"sagittal": "AP", "coronal": "RL"}  # what the left and the right edge of a view show


def use_house_style() -> None:
    """Set matplotlib's and plotly's defaults for this process."""
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "savefig.bbox": "tight",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    template = go.layout.Template(layout={"font": {"family": "system-ui, sans-serif", "size": 13}})
    pio.templates["spine"] = template
    pio.templates.default = "plotly_white+spine"


def method_style(method: str, methods) -> tuple[str, str, str]:
    """Return colour, marker and line of a method: fixed for known ones, in the order of `methods` for others."""
    if method in _METHOD_STYLES:
        return _METHOD_STYLES[method]
    others = [name for name in methods if name not in _METHOD_STYLES]
    return _MORE_STYLES[others.index(method) % len(_MORE_STYLES)]


def name_and_unit(column: str) -> tuple[str, str]:
    """Split a column name such as 'lumbar_lordosis_deg' into 'lumbar lordosis' and 'degrees' (or no unit)."""
    if column in _COLUMN_NAMES:
        return _COLUMN_NAMES[column]
    stem, _, ending = column.rpartition("_")
    name, unit = (stem, _UNITS[ending]) if ending in _UNITS else (column, "")
    return name.replace("_", " "), unit


def with_unit(name: str, unit: str) -> str:
    """Return the label of an axis; a ratio has no unit."""
    return f"{name} ({unit})" if unit else name


def count_range(counts) -> str:
    """Return '40', or '38 to 40' where counts differ."""
    counts = sorted(int(count) for count in counts)
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"


def projection_axes(axes, image: Projection, channel: str, gamma: float = 1.0, percentile: float = 99.7) -> None:
    """Draw one channel in true proportions with millimetre axes; column 0 (patient's right) on the left."""
    grid = image.grid
    rows, cols = grid.superior_mm(), grid.lateral_mm()
    half_row, half_col = grid.spacing_mm[0] / 2, grid.spacing_mm[1] / 2
    extent = (cols[0] + half_col, cols[-1] - half_col, rows[-1] - half_row, rows[0] + half_row)
    shown = image.channel(channel)
    low, high = np.percentile(shown, [1, percentile])
    shown = np.clip((shown - low) / max(high - low, 1e-9), 0, 1) ** gamma
    axes.imshow(shown, cmap="gray", extent=extent, aspect="equal", interpolation="bilinear")
    axes.set_xlabel("right (mm)" if grid.view == "coronal" else "anterior (mm)")
    axes.set_ylabel("superior (mm)")


def image_panels(image: Projection, title: str = "") -> Figure:
    """Return a panel per channel of a projection."""
    figure, panels = plt.subplots(1, len(image.channels), figsize=(2.6 * len(image.channels), 4.6), squeeze=False)
    for axes, name in zip(panels[0], image.channels, strict=False):
        projection_axes(axes, image, name)
        axes.set_title(name.replace("_", " "))
    figure.suptitle(title)
    return figure


def cohort_sheet(images: dict[str, Projection], cobb_deg: pd.Series | None = None) -> Figure:
    """Return the first channels of several subjects in a row, each with its largest Cobb angle where it is known."""
    figure, panels = plt.subplots(1, len(images), figsize=(1.75 * len(images), 3.4), squeeze=False)
    for axes, (key, image) in zip(panels[0], images.items(), strict=False):
        projection_axes(axes, image, image.channels[0], gamma=0.7)
        axes.set(
            xticks=[],
            yticks=[],
            xlabel="",
            ylabel="",
            title="" if cobb_deg is None else f"Cobb {cobb_deg[key]:.0f} deg",
        )
    return figure


def curves_on_image(image: Projection, curves: dict[str, Curves], title: str = "") -> Figure:
    """Return the coronal curves drawn on the DXA and, beside it, the sagittal curves; one colour per source.

    As radiologists look at a spine: the patient's right on the left, anterior on the left.

    Parameters
    ----------
    curves : dict of str to Curves
        For example {'true': ..., 'predicted': ...}. The mean depth of the first is removed, the others are moved
        to its depth, as for scoring.
    """
    figure, (front, side) = plt.subplots(1, 2, figsize=(5.8, 5.8), sharey=True)
    projection_axes(front, image, "bone" if "bone" in image.channels else image.channels[0], gamma=0.8)
    reference = next(iter(curves.values())).depth_removed()
    # A wide first line stays in sight under the narrow ones that nearly cover it.
    for (name, item), colour, width in zip(curves.items(), (TRUTH, PREDICTED, OTHER), (2.8, 1.5, 1.5), strict=False):
        for axes, lines in ((front, item.coronal_mm), (side, match_depth(item, reference).sagittal_mm)):
            for place, line in enumerate(lines):
                thickness, label = (width, name) if place == 1 else (0.6 * width, None)
                axes.plot(line, item.heights_mm, color=colour, lw=thickness, label=label)
    heights = np.concatenate([c.heights_mm for c in curves.values()])
    centre = np.mean([c.coronal_mm[1].mean() for c in curves.values()])
    front.set(xlim=(centre + 125, centre - 125), ylim=(heights.min() - 60, heights.max() + 60), title="coronal")
    side.set(xlim=(125, -125), xlabel="anterior (mm), mean removed", title="sagittal", aspect="equal")
    side.legend(loc="lower left", fontsize=8)
    _mark_sides(front, "R", "L", "white")
    _mark_sides(side, "A", "P", "black")
    figure.suptitle(title)
    return figure


def alignment_panels(dxa: Projection, mri: Projection, found: PlanarTransform, truth=None, title: str = "") -> Figure:
    """Return DXA, MRI as acquired, and both overlaid before and after alignment (DXA orange, MRI blue)."""
    names = ("DXA, bone", "MRI, in phase", "before", "after")
    figure, panels = plt.subplots(1, 4, figsize=(11, 4.4))
    projection_axes(panels[0], dxa, "bone", gamma=0.8)
    projection_axes(panels[1], mri, "in_phase")
    fixed = _unit(dxa.channel("tissue"))
    for axes, transform in ((panels[2], PlanarTransform()), (panels[3], found)):
        moved = _unit(move_projection(mri, transform, dxa.grid).channel("in_phase"))
        _draw_overlay(axes, fixed, moved, dxa.grid)
    for axes, name in zip(panels, names, strict=False):
        axes.set_title(name)
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    figure.suptitle(title)
    return figure


def training_curve(log: pd.DataFrame, unit: str = "mm", title: str = "") -> Figure:
    """Return training and validation loss against epoch."""
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    dots = {"marker": ".", "ms": 5}  # a single epoch makes no line
    axes.plot(log["epoch"], log["train_loss"], color="#777777", label="training (augmented)", **dots)
    axes.plot(log["epoch"], log["validation_loss"], color=PREDICTED, label="validation", **dots)
    axes.set(xlabel="epoch", ylabel=f"mean absolute error ({unit})", title=title, yscale="log")
    axes.legend()
    return figure


def histogram_panels(table: pd.DataFrame, columns: dict[str, str]) -> Figure:
    """Return one histogram a column; `columns` maps names to axis labels."""
    figure, panels = plt.subplots(1, len(columns), figsize=(2.5 * len(columns), 2.4), squeeze=False)
    for axes, (name, label) in zip(panels[0], columns.items(), strict=False):
        axes.hist(table[name].dropna(), bins=18, color=TRUTH, edgecolor="white", linewidth=0.5)
        axes.set_xlabel(label)
    panels[0][0].set_ylabel("subjects")
    return figure


def spine_3d(spines: dict[str, Spine] | Spine, title: str = "", height: int = 720) -> go.Figure:
    """Return an interactive 3D figure in true proportions with a 100 mm scale bar.

    Parameters
    ----------
    spines : Spine or dict of str to Spine
        One spine is drawn with its vertebrae in level colours; several are drawn as columns, one colour each.
    """
    several = spines if isinstance(spines, dict) else {"": spines}
    figure = go.Figure()
    for (name, spine), colour in zip(several.items(), (TRUTH, PREDICTED, OTHER), strict=False):
        surfaces = spine.surfaces()
        if len(several) > 1:
            surfaces = {name: surfaces.get("column", next(iter(surfaces.values())))}
        elif spine.meshes:
            surfaces = {level: surfaces[level] for level in spine.levels}
        for label, mesh in surfaces.items():
            tint = colour if len(several) > 1 else COLOURS.get(label, BONE)
            opacity = 0.55 if len(several) > 1 else 1.0
            figure.add_trace(mesh_trace(mesh, label, color=tint, opacity=opacity, showlegend=bool(label)))
    return in_true_proportions(figure, title, height)


def in_true_proportions(figure: go.Figure, title: str = "", height: int = 720) -> go.Figure:
    """Add a 100 mm scale bar to a figure of 3D traces and give a millimetre the same length on every axis."""
    points = np.concatenate([np.stack([t.x, t.y, t.z], axis=1) for t in figure.data])
    lower, upper = np.nanmin(points, axis=0), np.nanmax(points, axis=0)  # NaN parts lines
    figure.add_trace(_scale_bar(lower, upper))
    # Fixed ranges, scale bar included: plotly would stretch what is left when a reader hides a trace.
    lower, upper = lower - _ROOM_MM, np.maximum(upper, [upper[0] + 12, *upper[1:]]) + _ROOM_MM
    axes = {
        f"{axis}axis": {"visible": False, "range": list(ends)} for axis, *ends in zip("xyz", lower, upper, strict=True)
    }
    figure.update_layout(
        title=title,
        height=height,
        margin={"l": 0, "r": 0, "t": 40 if title else 0, "b": 0},
        scene={
            **axes,
            # "data" would crop a tall spine: plotly scales by the geometric mean of the extents.
            "aspectmode": "manual",
            "aspectratio": dict(zip("xyz", (upper - lower) / (upper - lower).max() * 1.42, strict=True)),
            "camera": {"eye": {"x": 1.0, "y": 1.5, "z": 0.25}, "up": {"x": 0, "y": 0, "z": 1}},
        },
    )
    return figure


def mesh_trace(mesh: trimesh.Trimesh, name: str, **options) -> go.Mesh3d:
    """Return a surface in world mm as a plotly trace; `options` are go.Mesh3d's, such as color and opacity."""
    if len(mesh.faces) > _FACES_PER_VERTEBRA and name in COLOURS:
        mesh = mesh.simplify_quadric_decimation(face_count=_FACES_PER_VERTEBRA)
    vertices, faces = np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces)
    faces = faces.astype(np.uint16 if len(vertices) < 65536 else np.uint32)
    style = {
        "hovertemplate": name + "<br>right %{x:.0f} mm<br>anterior %{y:.0f} mm<br>superior %{z:.0f} mm<extra></extra>",
        "lighting": {"ambient": 0.45, "diffuse": 0.8, "specular": 0.1, "roughness": 0.8, "fresnel": 0.05},
        "lightposition": {"x": 6000, "y": 15000, "z": 12000},
    }
    corners = dict(zip("xyzijk", (*vertices.T, *faces.T), strict=True))
    return go.Mesh3d(**corners, name=name, **(style | options))


def spine_panels(spine: Spine, title: str = "") -> Figure:
    """Return a spine seen from the front, the patient's left and behind, by matplotlib: needs no browser."""
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    views = (("from the front", 90), ("from the left", 180), ("from behind", -90))
    figure = plt.figure(figsize=(7.2, 6.4), layout="none")
    bounds = np.array([mesh.bounds for mesh in spine.surfaces().values()])
    lower, upper = bounds[:, 0].min(axis=0), bounds[:, 1].max(axis=0)
    for place, (name, azimuth) in enumerate(views):
        # Square axes as high as the figure: matplotlib fits a 3D box into the smaller side. They overlap, unfilled.
        left = (place + 0.5) / 3 - 0.45
        axes = figure.add_axes((left, 0.04, 0.9, 0.92), projection="3d", proj_type="ortho", facecolor="none")
        for level, mesh in _shown_surfaces(spine).items():
            colour = mpl.colors.to_rgb(COLOURS.get(level, BONE))
            axes.add_collection3d(Poly3DCollection(mesh.triangles, facecolors=colour, shade=True, linewidths=0))
        axes.set(xlim=(lower[0], upper[0]), ylim=(lower[1], upper[1]), zlim=(lower[2], upper[2]))
        axes.set_box_aspect(upper - lower, zoom=0.95)
        axes.view_init(elev=0, azim=azimuth)
        axes.set_axis_off()
        figure.text((place + 0.5) / 3, 0.02, name, ha="center")
    figure.suptitle(title)
    return figure


def section_axes(views, beside_inches: float = 0.0, below_inches: float = 0.9) -> tuple[Figure, list, float]:
    """Return a figure, its axes side by side at one scale, and that scale in inches a millimetre.

    Parameters
    ----------
    views : sequence
        Of `imaging.sections.curved_section`.
    beside_inches, below_inches : float
        Room for a colour bar, and for titles and legend.
    """
    widths = [view.extent[0] - view.extent[1] for view in views]
    height = views[0].extent[3] - views[0].extent[2]
    inches_per_mm = min(6.2 / height, 12.0 / sum(widths), 0.035)
    width = inches_per_mm * sum(widths) + 0.35 * len(views) + 0.6 + beside_inches
    size = (width, inches_per_mm * height + below_inches)
    figure, panels = plt.subplots(1, len(views), figsize=size, width_ratios=widths, sharey=True, squeeze=False)
    panels[0, 0].set_ylabel("superior (mm)")
    return figure, list(panels[0]), inches_per_mm


def show_section(axes, picture, view, letters: str = "white", **grey) -> None:
    """Draw a picture (rows, cols) or (rows, cols, 3 or 4) of a view, with letters for the sides it shows."""
    axes.imshow(picture, extent=view.extent, interpolation="bilinear", **({"cmap": "gray"} | grey))
    axes.set_xlabel("anterior (mm)" if view.name == "sagittal" else "right (mm)")
    left, right, _, top = view.extent
    for place, side, letter in zip((left, right), ("left", "right"), _SIDES[view.name], strict=True):
        style = {"va": "top", "ha": side, "color": letters, "weight": "bold", "fontsize": 7.5}
        axes.annotate(f" {letter} ", (place, top), xytext=(0, -2), textcoords="offset points", **style)


def _mark_sides(axes, left, right, colour):
    for place, letter in ((0.03, left), (0.97, right)):
        style = {"transform": axes.transAxes, "ha": "left" if place < 0.5 else "right", "weight": "bold"}
        axes.text(place, 0.985, letter, va="top", color=colour, **style)


def _shown_surfaces(spine):
    surfaces = spine.surfaces()
    return {level: surfaces[level] for level in spine.levels} if spine.meshes else surfaces


def _scale_bar(lower, upper):
    start = np.array([upper[0] + 12, lower[1], lower[2]])
    return go.Scatter3d(
        x=[start[0]] * 2,
        y=[start[1]] * 2,
        z=[start[2], start[2] + 100],
        mode="lines+text",
        text=["", "100 mm"],
        line={"color": "#333333", "width": 6},
        showlegend=False,
        hoverinfo="skip",
    )


def _unit(image):
    low, high = np.percentile(image, [2, 99.5])
    return np.clip((image - low) / max(high - low, 1e-9), 0, 1)


def _draw_overlay(axes, fixed, moved, grid):
    orange, blue = np.array([0.84, 0.37, 0.0]), np.array([0.0, 0.45, 0.70])
    picture = np.clip(fixed[..., None] * orange + moved[..., None] * blue, 0, 1)
    axes.imshow(picture, aspect=grid.spacing_mm[0] / grid.spacing_mm[1])
