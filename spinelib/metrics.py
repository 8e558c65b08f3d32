"""Errors of curves, masks and angles, with confidence intervals.

A single frontal projection says nothing about depth. Wherever a prediction from one is scored, both spines
are first moved along the anterior axis so that their sagittal centre curves have zero mean over the truth's
heights (`remove_depth`, on by default): sagittal and 3D errors then judge shape, not an unknowable offset.
"""

import numpy as np
import pandas as pd
from jaxtyping import Bool
from scipy import ndimage, stats
from scipy.spatial import cKDTree

from spinelib.errors import InputError
from spinelib.spine import CURVE_COLUMNS, Curves

SEVERITY_BANDS = ("<10", "10-20", "20-30", "30-45", ">45")
"""Names of the ranges of the Cobb angle in degrees; a lower bound belongs to its band."""

_SEVERITY_EDGES_DEG = (10.0, 20.0, 30.0, 45.0)
_ROUNDING_MM = 1e-6  # a distance of exactly the tolerance counts as within it

Mask = Bool[np.ndarray, "*grid"]


def curve_errors(predicted: Curves, truth: Curves, remove_depth: bool = True) -> dict[str, float]:
    """Return errors of six curves in mm at the truth's heights.

    Parameters
    ----------
    predicted, truth : Curves
        In one world frame. The prediction is interpolated; beyond its ends the end value is held.
    remove_depth : bool
        Compare sagittal shape only, see the module's text.

    Returns
    -------
    dict of str to float
        centreline_3d_mm, centreline_3d_p95_mm : mean and 95th percentile over heights of the distance between
        the centres in the (right, anterior) plane of equal height;
        coronal_mm, sagittal_mm : mean absolute error over heights and the three curves of a view;
        one entry per name in CURVE_COLUMNS : mean absolute error of that curve.
    """
    absolute = np.abs(_on_common_ground(predicted, truth, remove_depth).to_array() - truth.to_array())
    distance = np.hypot(absolute[:, 1], absolute[:, 4])
    return {
        "centreline_3d_mm": float(distance.mean()),
        "centreline_3d_p95_mm": float(np.percentile(distance, 95)),
        "coronal_mm": float(absolute[:, :3].mean()),
        "sagittal_mm": float(absolute[:, 3:].mean()),
    } | {name: float(error) for name, error in zip(CURVE_COLUMNS, absolute.mean(axis=0), strict=True)}


def match_depth(predicted: Curves, truth: Curves) -> Curves:
    """Return the prediction moved along anterior until its mean sagittal centre is the truth's.

    Both means are taken over the truth's heights.
    """
    offset = truth.sagittal_mm[1].mean() - predicted.at(truth.heights_mm).sagittal_mm[1].mean()
    return predicted.shifted(anterior_mm=float(offset))


def dice(predicted: Mask, truth: Mask) -> float:
    """Return 2 |A and B| / (|A| + |B|) of two masks of any dimension (MONAI)."""
    from monai.metrics import compute_dice  # here, as MONAI takes seconds to import

    predicted, truth = _tensors(predicted, truth)
    return float(compute_dice(predicted.float(), truth.float(), include_background=True))


def iou(predicted: Mask, truth: Mask) -> float:
    """Return |A and B| / |A or B| of two masks, 2D or 3D (MONAI)."""
    from monai.metrics import compute_iou

    predicted, truth = _tensors(predicted, truth)
    return float(compute_iou(predicted.float(), truth.float(), include_background=True))


def hd_mm(predicted: Mask, truth: Mask, spacing_mm) -> float:
    """Return the Hausdorff distance, the larger directed maximum; infinite if nothing was predicted."""
    return surface_errors(predicted, truth, spacing_mm)["hd_mm"]


def hd95_mm(predicted: Mask, truth: Mask, spacing_mm) -> float:
    """Return the larger directed 95 % surface distance; infinite if nothing was predicted."""
    return surface_errors(predicted, truth, spacing_mm)["hd95_mm"]


def assd_mm(predicted: Mask, truth: Mask, spacing_mm) -> float:
    """Return the mean distance over both surfaces' voxels; infinite if nothing was predicted."""
    return surface_errors(predicted, truth, spacing_mm)["assd_mm"]


def nsd(predicted: Mask, truth: Mask, spacing_mm, tolerance_mm: float = 2.0) -> float:
    """Return normalised surface Dice: the share of both surfaces within `tolerance_mm` of the other."""
    return surface_errors(predicted, truth, spacing_mm, tolerance_mm)["nsd"]


def surface_errors(predicted: Mask, truth: Mask, spacing_mm, tolerance_mm: float = 2.0) -> dict[str, float]:
    """Return all surface measures of two masks of any dimension.

    Surfaces are the voxels of a mask that touch the outside by a face, distances those between voxel centres;
    outside the image counts as outside the mask. These are the definitions of MONAI, computed on a k-d tree of
    the surface voxels: equal to 1e-6 (float32 there) and 19 instead of 78 ms for a vertebra at 1 mm.

    Returns
    -------
    dict of str to float
        hd_mm, hd95_mm : larger of the two directed maxima, 95th percentiles;
        assd_mm : mean over the voxels of both surfaces (MONAI);
        assd_of_means_mm : mean of the two directed means (medpy, panoptica);
        nsd : share of the voxels of both surfaces within `tolerance_mm` of the other surface.
        If nothing was predicted the distances are infinite and nsd is 0.
    """
    predicted, truth = _checked(predicted, truth)
    spacing = _spacing(spacing_mm, predicted)
    if not predicted.any():
        return dict.fromkeys(("hd_mm", "hd95_mm", "assd_mm", "assd_of_means_mm"), float("inf")) | {"nsd": 0.0}
    surfaces = [_surface_mm(mask, spacing) for mask in _cropped(predicted, truth)]
    directed = [cKDTree(b).query(a)[0] for a, b in (surfaces, surfaces[::-1])]
    both = np.concatenate(directed)
    return {
        "hd_mm": float(both.max()),
        "hd95_mm": float(max(np.percentile(distances, 95) for distances in directed)),
        "assd_mm": float(both.mean()),
        "assd_of_means_mm": float(np.mean([distances.mean() for distances in directed])),
        "nsd": float(np.mean(both <= tolerance_mm + _ROUNDING_MM)),
    }


def mask_errors(predicted: Mask, truth: Mask, spacing_mm, tolerance_mm: float = 2.0) -> dict[str, float]:
    """Return dice, iou_3d, hd95_mm, assd_mm and nsd of two masks (right, anterior, superior)."""
    surface = surface_errors(predicted, truth, spacing_mm, tolerance_mm)
    overlap = {"dice": dice(predicted, truth), "iou_3d": iou(predicted, truth)}
    return overlap | {name: surface[name] for name in ("hd95_mm", "assd_mm", "nsd")}


def bootstrap_ci(values, n: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float, float]:
    """Return (mean, ci_low, ci_high) by the percentile bootstrap over independent subjects.

    The same seed gives the same interval; one value has no interval (NaN).
    """
    values = np.asarray(values, float).ravel()
    if values.size == 0 or not np.isfinite(values).all():
        message = f"a confidence interval needs finite values, given {values.size} values, not all finite."
        raise InputError(message)
    if values.size == 1:
        return float(values[0]), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, values.size, (n, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def interval_columns(name: str, values) -> dict[str, float]:
    """Return `name`, `name`_low and `name`_high: mean and bootstrap interval of what is finite, NaN if nothing is."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    triple = bootstrap_ci(values) if values.size else (float("nan"),) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), triple, strict=True))


def summarise(frame: pd.DataFrame, by=None, n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return one row per group and numeric column of a table with one row per subject.

    Parameters
    ----------
    frame : DataFrame
    by : str or list of str, optional
        Grouping columns, for example 'severity'; the whole table by default.
    n, seed
        See `bootstrap_ci`.

    Returns
    -------
    DataFrame
        Group columns, metric, n, mean, ci_low, ci_high, median, sd. Groups keep their order, empty ones are
        left out. NaN and infinite values are left out and show in `n`.
    """
    keys = [by] if isinstance(by, str) else list(by or [])
    missing = [key for key in keys if key not in frame]
    if missing:
        message = f"no columns {missing} to group by. This table has: {', '.join(map(str, frame.columns))}."
        raise InputError(message)
    groups = frame.groupby(keys, observed=True, sort=True) if keys else [((), frame)]
    numeric = [c for c in frame.select_dtypes("number").columns if c not in keys]
    rows = [
        dict(zip(keys, np.atleast_1d(np.asarray(name, object)), strict=True))
        | {"metric": column}
        | _summary(part[column].to_numpy(float), n, seed)
        for name, part in groups
        for column in numeric
    ]
    return pd.DataFrame(rows, columns=[*keys, "metric", "n", "mean", "ci_low", "ci_high", "median", "sd"])


def pearson_r(predicted, truth, level: float = 0.95) -> tuple[float, float, float]:
    """Return (r, ci_low, ci_high) with Fisher's interval; NaN where it is not defined.

    A constant input has no correlation; fewer than four pairs have no interval.
    """
    predicted, truth = np.asarray(predicted, float), np.asarray(truth, float)
    if predicted.shape != truth.shape or predicted.ndim != 1:
        message = f"a correlation needs two equally long vectors, given {predicted.shape} and {truth.shape}."
        raise InputError(message)
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return (float("nan"),) * 3
    result = stats.pearsonr(predicted, truth)
    if len(predicted) < 4:
        return float(result.statistic), float("nan"), float("nan")
    interval = result.confidence_interval(level)
    return float(result.statistic), float(interval.low), float(interval.high)


def severity_band(cobb_deg) -> pd.Categorical:
    """Return the ordered band of SEVERITY_BANDS of each Cobb angle in degrees (10 belongs to '10-20')."""
    angles = np.abs(np.atleast_1d(np.asarray(cobb_deg, float)))
    return pd.cut(angles, [-1.0, *_SEVERITY_EDGES_DEG, np.inf], right=False, labels=list(SEVERITY_BANDS))


def _on_common_ground(predicted, truth, remove_depth):
    top, bottom = truth.heights_mm[[0, -1]]
    if predicted.heights_mm[0] <= bottom or predicted.heights_mm[-1] >= top:
        message = (
            f"prediction ({predicted.heights_mm[0]:.0f} to {predicted.heights_mm[-1]:.0f} mm) and truth "
            f"({top:.0f} to {bottom:.0f} mm) share no height. Bring both to one world frame."
        )
        raise InputError(message)
    return (match_depth(predicted, truth) if remove_depth else predicted).at(truth.heights_mm)


def _summary(values, n, seed):
    values = values[np.isfinite(values)]
    if values.size == 0:
        return {"n": 0} | dict.fromkeys(("mean", "ci_low", "ci_high", "median", "sd"), float("nan"))
    mean, low, high = bootstrap_ci(values, n, seed)
    sd = float(values.std(ddof=1)) if values.size > 1 else float("nan")
    spread = {"median": float(np.median(values)), "sd": sd}
    return {"n": values.size, "mean": mean, "ci_low": low, "ci_high": high} | spread


def _tensors(predicted, truth):
    import torch  # here, as only overlap by MONAI needs it

    masks = _checked(predicted, truth)
    return tuple(torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in masks)


def _checked(predicted, truth):
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.shape != truth.shape or predicted.dtype != bool or truth.dtype != bool:
        message = (
            f"expected two boolean masks of one shape, given {predicted.shape} {predicted.dtype} and "
            f"{truth.shape} {truth.dtype}."
        )
        raise InputError(message)
    if not truth.any():
        message = "the true mask is empty, so no overlap or distance to it exists."
        raise InputError(message)
    return predicted, truth


def _cropped(predicted, truth):
    """Cut both masks to their joint bounding box."""
    (box,) = ndimage.find_objects((predicted | truth).view(np.uint8))
    return predicted[box], truth[box]


def _surface_mm(mask, spacing):
    return np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(spacing)


def _spacing(spacing_mm, mask):
    spacing = np.broadcast_to(np.asarray(spacing_mm, float), np.ndim(mask))
    if not np.all(spacing > 0):
        message = f"spacing must be positive mm, given {spacing}."
        raise InputError(message)
    return tuple(float(s) for s in spacing)
