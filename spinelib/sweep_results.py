"""Compare the variants of a sweep: a table with one row each, and a figure with one mark each."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from spinelib.figures import PREDICTED

_OTHERS, _REFERENCE = "#555555", "#999999"


def by_seed(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one metric with variants as rows and seeds as columns.

    Parameters
    ----------
    results : DataFrame
        Index (variant, seed), one column a metric, NaN where there is no result.
    metric : str
    """
    column = results[metric]
    return pd.DataFrame({seed: column.xs(seed, level="seed") for seed in column.index.unique("seed")})


def comparison_table(results: pd.DataFrame, metrics: list[str], base: str) -> pd.DataFrame:
    """Return one row a variant and for each metric its mean over seeds and the difference from the base.

    The columns '<metric>.min' and '.max' are there where there are several seeds. '<metric>.difference' is the
    mean of variant - base over the seeds that both have, so that what seeds share does not count.

    Parameters
    ----------
    results : DataFrame
        As in `by_seed`.
    metrics : list of str
        Columns of `results`.
    base : str
        A variant.
    """
    columns = {}
    for metric in metrics:
        values = by_seed(results, metric)
        columns[metric] = values.mean(axis=1)
        if values.shape[1] > 1:
            columns |= {f"{metric}.min": values.min(axis=1), f"{metric}.max": values.max(axis=1)}
        columns[f"{metric}.difference"] = (values - values.loc[base]).mean(axis=1)
    return pd.DataFrame(columns, index=results.index.unique("variant"))


def variant_dots(values: pd.DataFrame, base: str, label: str) -> Figure:
    """Return one line a variant: its mean, its range over seeds, and its difference from the base.

    Parameters
    ----------
    values : DataFrame
        From `by_seed`. A variant without any result keeps its line.
    base : str
        The variant in colour, with a dashed line through its mean.
    label : str
        Of the axis.
    """
    means, differences = values.mean(axis=1), (values - values.loc[base]).mean(axis=1)
    figure, axes = plt.subplots(figsize=(6.4, 0.3 * len(means) + 0.9))
    axes.axvline(means[base], color=_REFERENCE, ls="--", lw=1)
    for place, (name, mean) in enumerate(means.items()):
        colour, ends = PREDICTED if name == base else _OTHERS, (values.loc[name].min(), values.loc[name].max())
        axes.plot(ends, [place, place], color=colour, lw=2, solid_capstyle="butt")
        axes.plot(mean, place, "o", color=colour, ms=5)
        if np.isfinite(mean):
            compared = name != base and np.isfinite(differences[name])
            text = f"{mean:.4g} ({differences[name]:+.2g})" if compared else f"{mean:.4g}"
            axes.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    names = [f"{n} (base)" if n == base else n if np.isfinite(m) else f"{n}: no result" for n, m in means.items()]
    axes.set_yticks(range(len(means)), names)
    axes.set(xlabel=label, ylim=(len(means) - 0.4, -0.6))
    axes.margins(x=0.06)
    return figure


def parameter_line(values: pd.DataFrame, parameter: pd.Series, base: str, label: str) -> Figure:
    """Return a metric's mean and range over seeds against a numeric parameter, on a log axis.

    Parameters
    ----------
    values, base, label
        As in `variant_dots`.
    parameter : Series
        Values of the parameter with variants as index and its name as name. A variant at or below 0, which often
        means 'all' or 'none', has no place on the axis: it is drawn as a dashed line with its name.
    """
    means = values.mean(axis=1)
    places = parameter[(parameter > 0) & means.notna()].sort_values()
    ranges = values.loc[places.index]
    figure, axes = plt.subplots(figsize=(5.2, 3.6))
    axes.fill_between(places, ranges.min(axis=1), ranges.max(axis=1), color=_OTHERS, alpha=0.2, lw=0)
    axes.plot(places, means[places.index], "o-", color=_OTHERS, ms=5)
    if base in places:
        axes.plot(places[base], means[base], "o", color=PREDICTED, ms=7, label=f"{base} (base)")
        axes.legend()
    for name in parameter.index[(parameter <= 0) & means.notna()]:
        axes.axhline(means[name], color=PREDICTED if name == base else _REFERENCE, ls="--", lw=1)
        text, at = f"{name}: {means[name]:.4g}", (0.99, means[name])
        axes.annotate(text, at, xycoords=("axes fraction", "data"), fontsize=8, ha="right", va="bottom")
    axes.set_xscale("log")
    axes.set_xticks(places.unique(), [f"{value:g}" for value in places.unique()])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=f"{parameter.name} (log scale)", ylabel=label)
    return figure
