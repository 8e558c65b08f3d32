"""Figures that compare: methods, groups of people, sizes of the training set, variants, stress, unusual images.

Tables come with mean, ci_low, ci_high (95%) and n, as `spinelib.evaluate.summary` makes them.
"""

from numbers import Number

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from spinelib.errors import InputError
from spinelib.figures import METHOD_NAMES, OTHER, PREDICTED, TRUTH, count_range, method_style, name_and_unit, with_unit

_ERROR_NAME = "3D centre-line error"
_OFFSET = 0.16  # between the methods of a group


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
        _forest_row(axes, place, row, colour, f"{row.mean:.2f}")
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
    axes.set(xlabel=f"{with_unit(value, unit)}, mean and 95% CI, n = {int(table['n'].max())}", title=title)
    axes.margins(x=0.12)
    return figure


def severity_plot(
    table: pd.DataFrame, group: str = "severity", value: str = _ERROR_NAME, unit: str = "mm", title: str = ""
) -> Figure:
    """Return the mean with its interval per group and method, n under each group.

    Parameters
    ----------
    table : DataFrame
        Columns method, `group`, mean, ci_low, ci_high, n.
    group : str
        'severity' or another grouping column, for example 'sex'; groups keep their order of appearance.
    value, unit : str
        Axis label.
    """
    _require(table, "method", group)
    groups, methods = list(table[group].unique()), list(table["method"].unique())
    figure, axes = plt.subplots(figsize=(max(3.6, 0.9 * len(groups) + 0.9), 3.2))
    for method, offset in zip(methods, _OFFSET * (np.arange(len(methods)) - (len(methods) - 1) / 2), strict=True):
        rows = table[table["method"] == method]
        places = np.array([groups.index(name) for name in rows[group]]) + offset
        _interval(axes, places, rows, method, methods)
    counts = [count_range(table.loc[table[group] == name, "n"]) for name in groups]
    names = [f"{name}\nn = {count}" for name, count in zip(groups, counts, strict=True)]
    axes.set_xticks(range(len(groups)), names, fontsize=8)
    axes.set(xlabel=with_unit(*name_and_unit(group)), ylabel=f"{with_unit(value, unit)}\nmean and 95% CI", title=title)
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(bottom=0)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def stress_plot(table: pd.DataFrame, value: str = _ERROR_NAME, title: str = "") -> Figure:
    """Return the error under stress as a multiple of the same people's error without it, by condition and level.

    Parameters
    ----------
    table : DataFrame
        Columns stress, level, unit (of the level), mean, ci_low, ci_high, n; the mean is the ratio of errors, 1 is
        no change. A condition with one row is drawn beside its name.
    value : str
        What the ratio is of.
    """
    _require(table, "stress", "level", "unit")
    figure, axes = plt.subplots()
    axes.axvline(1, color="#555555", lw=1)
    labels, headings = {}, []
    for number, (stress, rows) in enumerate(table.groupby("stress", sort=False, observed=True)):
        place, colour = len(labels) + 0.4 * number, (TRUTH, PREDICTED)[number % 2]
        headings.append(len(labels))
        several = len(rows) > 1
        labels[place] = f"{stress}".replace("_", " ") + (f", {rows['unit'].iloc[0]}" if several else "")
        for step, row in enumerate(rows.itertuples(), 1 if several else 0):
            labels.setdefault(place + step, f"{row.level:g}" if isinstance(row.level, Number) else f"{row.level}")
            _forest_row(axes, place + step, row, colour, f"{row.mean:.2f}")
    _name_rows(axes, labels, headings)
    _logarithmic(axes, (1, 1.5, 2, 3, 5, 7))
    axes.set(xlabel=f"{value} / without stress\nmean and 95% CI, n = {count_range(table['n'])}", title=title)
    figure.set_size_inches(5.2, 0.17 * max(labels) + 1.0)
    return figure


def _forest_row(axes, place: float, row, colour: str, text: str) -> None:
    """Draw mean and interval of one row (attributes mean, ci_low, ci_high) at a height, and a text beside it."""
    axes.plot([row.ci_low, row.ci_high], [place, place], color=colour, lw=2.2, solid_capstyle="butt")
    axes.plot(row.mean, place, "o", color=colour, ms=5)
    _note(axes, place, text)


def _note(axes, place, text, **style):
    """Write to the right of a row, clear of what is drawn."""
    at = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
    axes.annotate(text, (1.02, place), **(at | style))


def _name_rows(axes, labels, headings):
    """Write labels (place: text) beside the axis, headings in bold, the first on top."""
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    for heading in headings:
        axes.get_yticklabels()[heading].set_fontweight("bold")
    axes.tick_params("y", length=0)
    axes.set_ylim(max(labels) + 0.8, -0.8)


def _logarithmic(axes, steps):
    """Make the horizontal axis logarithmic, with plain numbers at `steps` of every decade."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xticks([], minor=True)


def _interval(axes, places, rows, method, methods):
    colour, marker, _ = method_style(method, methods)
    reach = np.abs(rows[["ci_low", "ci_high"]].to_numpy(float).T - rows["mean"].to_numpy(float))
    style = {"fmt": marker, "color": colour, "ms": 5, "lw": 1.5, "capsize": 2}
    axes.errorbar(places, rows["mean"], reach, label=METHOD_NAMES.get(method, method), **style)


def _require(table, *names):
    missing = [name for name in (*names, "mean", "ci_low", "ci_high", "n") if name not in table]
    if missing:
        message = f"the table lacks the columns: {', '.join(missing)}. It has: {', '.join(map(str, table.columns))}."
        raise InputError(message)
