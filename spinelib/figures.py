"""Figures: matplotlib for paper panels, plotly for 3D. One style, one palette, stated once here."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from spinelib.geometry import PlanarTransform, Projection, move_projection
from spinelib.levels import COLOURS
from spinelib.spine import Curves, Spine

TRUTH, PREDICTED, OTHER = "#0072B2", "#D55E00", "#009E73"
METHOD_NAMES = {
    "mean_curve": "mean curve",
    "height_scaled_mean": "mean curve scaled by height",
    "nearest": "nearest neighbour",
    "ridge": "ridge on pixels",
    "paper": "paper's network",
    "ours_this_run": "ours, trained in this run",
    "ours": "ours",
    "ceiling": "ceiling (true curves)",
}
BONE = "#E3D7BF"
_FACES_PER_VERTEBRA = 2500


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

    Parameters
    ----------
    curves : dict of str to Curves
        For example {'true': ..., 'predicted': ...}; the sagittal depth of each is removed before drawing.
    """
    figure, (front, side) = plt.subplots(1, 2, figsize=(7.2, 5.6), width_ratios=(1.25, 1), sharey=True)
    projection_axes(front, image, "bone" if "bone" in image.channels else image.channels[0], gamma=0.8)
    colours = dict(zip(curves, (TRUTH, PREDICTED, OTHER), strict=False))
    for name, item in curves.items():
        for axes, lines in ((front, item.coronal_mm), (side, item.depth_removed().sagittal_mm)):
            for place, line in enumerate(lines):
                style = {
                    "color": colours[name],
                    "lw": 1.6 if place == 1 else 0.9,
                    "label": name if place == 1 else None,
                }
                axes.plot(line, item.heights_mm, **style)
    heights = np.concatenate([c.heights_mm for c in curves.values()])
    centre = np.mean([c.coronal_mm[1].mean() for c in curves.values()])
    front.set(xlim=(centre + 150, centre - 150), ylim=(heights.min() - 60, heights.max() + 60), title="coronal")
    side.set(xlim=(110, -110), xlabel="anterior (mm), mean removed", title="sagittal", aspect="equal")
    side.legend(loc="upper right")
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


def methods_forest(table: pd.DataFrame, value: str, unit: str, paper=None, title: str = "") -> Figure:
    """Return means with 95% intervals, one line a method.

    Parameters
    ----------
    table : DataFrame
        Columns method, mean, ci_low, ci_high, n.
    value, unit : str
        Axis label.
    paper : float or None
        The published figure, drawn dashed and marked as measured on other data.
    """
    table = table.iloc[::-1]
    figure, axes = plt.subplots(figsize=(6.4, 0.42 * len(table) + 1.2))
    colours = [PREDICTED if m == "ours" else OTHER if m == "ceiling" else "#555555" for m in table["method"]]
    for place, (row, colour) in enumerate(zip(table.itertuples(), colours, strict=False)):
        axes.plot([row.ci_low, row.ci_high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
        axes.plot(row.mean, place, "o", color=colour, ms=5)
        axes.annotate(f"{row.mean:.2f}", (row.ci_high, place), xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(table)), [METHOD_NAMES.get(m, m) for m in table["method"]])
    if paper is not None:
        axes.axvline(paper, color="#999999", ls="--", lw=1)
        axes.annotate(
            f"published {paper:g} {unit}\n(other data)",
            (paper, 0.99),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=7,
            color="#777777",
            va="top",
        )
    label = f"{value} ({unit})" if unit else value
    axes.set(xlabel=f"{label}, mean and 95% CI, n = {int(table['n'].max())}", title=title)
    axes.margins(x=0.12)
    return figure


def error_by_height(errors: dict[str, np.ndarray], title: str = "") -> Figure:
    """Return mean error against height from L5 (0) to T1 (1); each array is (subjects, K), superior first."""
    figure, axes = plt.subplots(figsize=(4.4, 4.2))
    greys = iter(np.linspace(0.35, 0.75, max(1, len(errors) - 1)))
    for name, values in errors.items():
        colour = PREDICTED if name == "ours" else str(next(greys, 0.5))
        axes.plot(
            values.mean(axis=0),
            np.linspace(1, 0, values.shape[1]),
            color=colour,
            label=METHOD_NAMES.get(name, name),
        )
    axes.set(xlabel="centre-line error in 3D (mm)", ylabel="height, L5 (0) to T1 (1)", title=title)
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)
    return figure


def agreement(truth, predicted, name: str, unit: str = "degrees") -> Figure:
    """Return predicted against true values and their differences (Bland-Altman), with bias and 95% limits."""
    truth, predicted = np.asarray(truth, float), np.asarray(predicted, float)
    difference = predicted - truth
    bias, limit = difference.mean(), 1.96 * difference.std(ddof=1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.4))
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    left.plot(ends, ends, color="#999999", lw=1)
    left.plot(truth, predicted, "o", color=PREDICTED, ms=3.5, alpha=0.7)
    left.set(xlabel=f"true {name} ({unit})", ylabel=f"predicted {name} ({unit})")
    right.plot((truth + predicted) / 2, difference, "o", color=PREDICTED, ms=3.5, alpha=0.7)
    for level, style in ((bias, "-"), (bias - limit, "--"), (bias + limit, "--")):
        right.axhline(level, color="#555555", ls=style, lw=1)
        right.annotate(
            f"{level:+.1f}",
            (1, level),
            xycoords=("axes fraction", "data"),
            fontsize=8,
            va="bottom",
            ha="right",
        )
    right.set(xlabel=f"mean ({unit})", ylabel=f"predicted - true ({unit})")
    return figure


def training_curve(log: pd.DataFrame, unit: str = "mm", title: str = "") -> Figure:
    """Return training and validation loss against epoch."""
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    axes.plot(log["epoch"], log["train_loss"], color="#777777", label="training (augmented)")
    axes.plot(log["epoch"], log["validation_loss"], color=PREDICTED, label="validation")
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
    figure, points = go.Figure(), []
    for (name, spine), colour in zip(several.items(), (TRUTH, PREDICTED, OTHER), strict=False):
        surfaces = spine.surfaces()
        if len(several) > 1:
            surfaces = {name: surfaces.get("column", next(iter(surfaces.values())))}
        elif spine.meshes:
            surfaces = {level: surfaces[level] for level in spine.levels}
        for label, mesh in surfaces.items():
            tint = colour if len(several) > 1 else COLOURS.get(label, BONE)
            figure.add_trace(_mesh_trace(mesh, label, tint, 0.55 if len(several) > 1 else 1.0))
            points.append(mesh.bounds)
    lower, upper = np.min([p[0] for p in points], axis=0), np.max([p[1] for p in points], axis=0)
    figure.add_trace(_scale_bar(lower, upper))
    extent = np.maximum(upper - lower, 1.0)
    ratio = extent / extent.max() * 1.42
    hidden = {"visible": False}
    figure.update_layout(
        title=title,
        height=height,
        margin={"l": 0, "r": 0, "t": 40 if title else 0, "b": 0},
        scene={
            "xaxis": hidden,
            "yaxis": hidden,
            "zaxis": hidden,
            # "data" would crop a tall spine: plotly scales by the geometric mean of the extents.
            "aspectmode": "manual",
            "aspectratio": dict(zip("xyz", ratio, strict=False)),
            "camera": {"eye": {"x": 1.0, "y": 1.5, "z": 0.25}, "up": {"x": 0, "y": 0, "z": 1}},
        },
    )
    return figure


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


def _shown_surfaces(spine):
    surfaces = spine.surfaces()
    return {level: surfaces[level] for level in spine.levels} if spine.meshes else surfaces


def _mesh_trace(mesh, name, colour, opacity):
    if len(mesh.faces) > _FACES_PER_VERTEBRA and name in COLOURS:
        mesh = mesh.simplify_quadric_decimation(face_count=_FACES_PER_VERTEBRA)
    vertices, faces = np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces)
    faces = faces.astype(np.uint16 if len(vertices) < 65536 else np.uint32)
    return go.Mesh3d(
        x=vertices[:, 0],
        y=vertices[:, 1],
        z=vertices[:, 2],
        i=faces[:, 0],
        j=faces[:, 1],
        k=faces[:, 2],
        color=colour,
        opacity=opacity,
        name=name,
        showlegend=bool(name),
        hovertemplate=name + "<br>right %{x:.0f} mm<br>anterior %{y:.0f} mm<br>superior %{z:.0f} mm<extra></extra>",
        lighting={"ambient": 0.45, "diffuse": 0.8, "specular": 0.1, "roughness": 0.8, "fresnel": 0.05},
        lightposition={"x": 6000, "y": 15000, "z": 12000},
    )


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
