"""How far one set of people and images lies from another, in standard deviations of the first."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import ndimage

from spinelib.angles import lumbar_lordosis_deg, thoracic_kyphosis_deg
from spinelib.data import Record
from spinelib.errors import InputError
from spinelib.phantom.population import Subject


def shift_table(standard: Sequence[Record], shifted: Sequence[Record]) -> pd.DataFrame:
    """Return how far images and columns of people differ from those of the standard people.

    Parameters
    ----------
    standard, shifted : sequence of Record
        With DXA and curves; two people or more each.

    Returns
    -------
    DataFrame
        measure, standard_mean, standard_sd, shifted_mean, shift_sd = (shifted_mean - standard_mean) / standard_sd.
    """
    return _compared([_measures(r) for r in standard], [_measures(r) for r in shifted])


def anatomy_shift_table(standard: Sequence[Subject], shifted: Sequence[Subject]) -> pd.DataFrame:
    """Return the same for sizes of vertebrae, discs and pelvis, which records do not hold."""
    return _compared([_sizes(s) for s in standard], [_sizes(s) for s in shifted])


def _compared(standard, shifted):
    if min(len(standard), len(shifted)) < 2:
        message = f"a shift in SDs needs two people or more each, given {len(standard)} and {len(shifted)}."
        raise InputError(message)
    standard, shifted = pd.DataFrame(standard), pd.DataFrame(shifted)
    table = pd.DataFrame({"standard_mean": standard.mean(), "standard_sd": standard.std()})
    table["shifted_mean"] = shifted.mean()
    table["shift_sd"] = (table["shifted_mean"] - table["standard_mean"]) / table["standard_sd"]
    return table.rename_axis("measure").reset_index()


def _measures(record):
    """Size and shape of the column, contrast, noise and sharpness of the image."""
    curves, dxa = record.curves, record.dxa
    width, depth = (float((edges[0] - edges[2]).mean()) for edges in (curves.coronal_mm, curves.sagittal_mm))
    bone, tissue = dxa.channel("bone"), dxa.channel("tissue")
    inside = _silhouette(curves, dxa.grid)
    fine = bone - ndimage.gaussian_filter(bone, [6 / pitch for pitch in dxa.grid.spacing_mm])
    return {
        "column_length_mm": float(curves.heights_mm[0] - curves.heights_mm[-1]),
        "column_width_mm": width,
        "column_depth_mm": depth,
        "column_width_over_depth": width / depth,
        "thoracic_kyphosis_deg": thoracic_kyphosis_deg(curves),
        "lumbar_lordosis_deg": lumbar_lordosis_deg(curves),
        "bone_in_column_g_cm2": float(bone[inside].mean()),
        "bone_detail_g_cm2": float(fine[inside].std()),
        "tissue_in_column": float(tissue[inside].mean()),
        "body_area_cm2": float((tissue > 0.3).sum() * np.prod(dxa.grid.spacing_mm) / 100),
    }


def _silhouette(curves, grid):
    """Pixels of the column as the true curves have it, bool (rows, cols)."""
    rows = curves.at(grid.superior_mm()).coronal_mm
    right, superior = grid.lateral_mm()[None], grid.superior_mm()[:, None]
    between = (right < rows[0][:, None]) & (right > rows[2][:, None])
    return between & (superior < curves.heights_mm[0]) & (superior > curves.heights_mm[-1])


def _sizes(subject):
    """Mean T1-L5 sizes of vertebrae and discs, and the shape of the pelvis."""
    part = slice(subject.index("T1"), None)
    names = ("endplate_width_mm", "endplate_depth_mm", "disc_below_mm", "pedicle_width_mm", "canal_width_mm")
    names += ("tp_span_mm", "spinous_length_mm", "height_anterior_mm", "height_posterior_mm")
    sizes = {name: float(subject.dims[name][part].mean()) for name in names}
    return sizes | {"pelvic_incidence_deg": subject.angles["pelvic_incidence_deg"], "bmi": subject.bmi}
