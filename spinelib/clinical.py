"""Clinical measures of a spine in 3D, and how far predicted ones agree with the true ones.

Everything here is read from the centre curve. Axial vertebral rotation is not in the curves: the centre line
of a column does not tell how the vertebrae are turned about it. The axial view below shows where the column
lies and to which side it bends, not the rotation.

Noise
-----
SD under 1 mm of noise in both views, smooth over 25 mm of height (Gaussian), 30 phantom spines with a Cobb angle
of 10 degrees or more: Cobb 1.7, modified Ferguson 1.1, kyphosis 1.9, lordosis 2.2, Cobb in the plane of maximum
curvature 2.9, its azimuth 11 degrees, apex 0.9 levels, its translation 4.1 mm, axial offset 1.5 mm.
Azimuth, apex and translation have long tails: where two curves are about equal, noise chooses the larger, and
they jump from one to the other (SD from the median absolute deviation 6 degrees, 0.24 levels, 1.6 mm). In people
taken without regard to scoliosis the azimuth varies by 20 degrees, the Cobb angle in its plane by 9.5.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

from spinelib.angles import LEVEL_FRACTIONS, all_angles, arc_length_mm, cobb_angles, tangent_slopes
from spinelib.errors import InputError
from spinelib.metrics import bootstrap_ci, pearson_r
from spinelib.spine import Curves

MEASURES = (
    "cobb_deg",
    "modified_ferguson_deg",
    "thoracic_kyphosis_deg",
    "lumbar_lordosis_deg",
    "pmc_cobb_deg",
    "pmc_azimuth_deg",
    "apex_level",
    "apical_translation_mm",
    "max_axial_offset_mm",
)
"""Names and order of `clinical_measures`; `apex_level` counts vertebrae."""

UNSIGNED = ("cobb_deg", "modified_ferguson_deg", "pmc_cobb_deg", "max_axial_offset_mm")
"""Measures that are never negative, nor are the ends of their intervals."""

READER_RELIABILITY = pd.read_csv(Path(__file__).with_name("reader_reliability.csv"))
"""What human readers achieve: measure, comparison, statistic, value, unit, image, subjects, note, source.

Mostly end-plate angles on standing radiographs, so a scale to read errors against, not a like-for-like rival.
"""

_ESTIMATES = ("mae", "bias", "loa_low", "loa_high", "icc")
_AGREEMENT_COLUMNS = ("n", *(f"{name}{part}" for name in _ESTIMATES for part in ("", "_ci_low", "_ci_high")), "r")
_LIMIT_SDS = 1.96
_PERIODS_DEG = {"pmc_azimuth_deg": 180.0}


def clinical_measures(curves: Curves) -> dict[str, float]:
    """Return the measures of MEASURES of one spine; `apex_level` is NaN for a coronally straight column.

    Angles are those of `spinelib.angles.all_angles`; `pmc_azimuth_deg` is its `pmc_orientation_deg`, an axis
    without an arrow: compare it with `measure_difference`. What belongs to the apex or to the plane of the main
    coronal curve means little below 10 degrees of Cobb angle, where no scoliosis is diagnosed.

    apex_level
        Level of the apex of the largest coronal curve: T1 = 1, ..., T12 = 12, L1 = 13, ..., L5 = 17 at the middle
        of each body, fractions between, by `LEVEL_FRACTIONS`.
    apical_translation_mm
        Positive to the right. Standard definition: from the central sacral vertical line, for thoracic curves
        from the C7 plumb line. The curves reach neither S1 nor C7, so the vertical through the lower end of L5
        stands in for both.
    max_axial_offset_mm
        Largest distance of a vertebra from that vertical in the top view, see `axial_view`.
    """
    angles, bends, view = all_angles(curves), cobb_angles(curves), axial_view(curves)
    found = angles | {
        "pmc_azimuth_deg": angles["pmc_orientation_deg"],
        "apex_level": _level_number(curves, bends[0].apex_height_mm) if bends else float("nan"),
        "max_axial_offset_mm": float(np.hypot(view["right_mm"], view["anterior_mm"]).max()),
    }
    return {name: found[name] for name in MEASURES}


def axial_view(curves: Curves) -> pd.DataFrame:
    """Return where each vertebra lies and how the column bends there, seen from above; one row a level, T1 to L5.

    The numbers of a top view as drawn by Illes & Somoskeoy (2013) and of the 'da Vinci' view (Labelle 2011).
    The vectors of the former point where the vertebra faces, which the curves do not tell; here they are the
    bend of the centre line. The triangles of the latter join the centre curve at the upper end, the apex and the
    lower end of each curve of `cobb_angles`.

    Returns
    -------
    DataFrame
        level; right_mm, anterior_mm : centre of the body from the vertical through the lower end of L5;
        azimuth_deg : side to which the column bulges, opposite to the curvature vector of the 3D centre line in
        the axial plane, -180 to 180, 0 right, 90 anterior; meaningless where the column is straight;
        curvature_per_m : length of that vector, mean over the body, 1 / radius in metres.
    """
    upper, lower = np.array(list(LEVEL_FRACTIONS.values())).T
    centres = curves.at(_heights_of(curves, (upper + lower) / 2)).centreline()[:, :2] - curves.centreline()[-1, :2]
    turn = _axial_tangent(curves, _heights_of(curves, upper)) - _axial_tangent(curves, _heights_of(curves, lower))
    curvature = turn / ((lower - upper) * arc_length_mm(curves)[-1])
    return pd.DataFrame(
        {
            "level": list(LEVEL_FRACTIONS),
            "right_mm": centres[:, 0],
            "anterior_mm": centres[:, 1],
            "azimuth_deg": np.degrees(np.arctan2(-curvature[1], -curvature[0])),
            "curvature_per_m": 1000 * np.hypot(*curvature),
        }
    )


def measure_difference(name: str, predicted, truth):
    """Return predicted minus true; for an azimuth the smallest turn between two axes, in (-90, 90] degrees."""
    if name not in MEASURES:
        message = f"unknown measure {name!r}. Expected one of: {', '.join(MEASURES)}."
        raise InputError(message)
    difference = np.asarray(predicted, float) - np.asarray(truth, float)
    if name not in _PERIODS_DEG:
        return difference
    half = _PERIODS_DEG[name] / 2
    return half - (half - difference) % (2 * half)


def agreement_table(frame: pd.DataFrame, by="method", measures=MEASURES) -> pd.DataFrame:
    """Return how far predicted measures agree with true ones, one row per group and measure.

    Parameters
    ----------
    frame : DataFrame
        One row per subject and method with columns predicted_<measure> and true_<measure>. For the measures of
        the apex pass only the subjects with `true_cobb_deg` >= 10.
    by : str or list of str
        Grouping columns; groups keep their order of appearance.
    measures : sequence of str

    Returns
    -------
    DataFrame
        Group columns, measure, n (subjects with both values), mae and its 95 % bootstrap interval, the columns of
        `limits_of_agreement`, icc and its interval (`icc_agreement`), r (Pearson). An azimuth has no icc and no r,
        as both depend on where the circle is cut; what cannot be computed is NaN.
    """
    keys = [by] if isinstance(by, str) else list(by)
    wanted = [*keys, *(f"{side}_{name}" for name in measures for side in ("predicted", "true"))]
    missing = [column for column in wanted if column not in frame]
    if missing:
        message = f"the table lacks the columns: {', '.join(missing)}. Fill them from clinical_measures(curves)."
        raise InputError(message)
    rows = [
        dict(zip(keys, group, strict=True))
        | {"measure": name}
        | _agreement(name, part[f"predicted_{name}"].to_numpy(float), part[f"true_{name}"].to_numpy(float))
        for group, part in frame.groupby(keys, sort=False, observed=True)
        for name in measures
    ]
    return pd.DataFrame(rows, columns=[*keys, "measure", *_AGREEMENT_COLUMNS])


def limits_of_agreement(difference: Float[np.ndarray, " n"]) -> dict[str, float]:
    """Return bias, loa_low and loa_high (bias -+ 1.96 SD), each with its 95 % interval (*_ci_low, *_ci_high).

    Standard errors SD / sqrt(n) and sqrt(3 SD^2 / n) with Student's t (Bland & Altman 1986). One value has no
    SD: all but the bias are NaN.
    """
    difference = np.asarray(difference, float)
    if difference.size == 0 or not np.isfinite(difference).all():
        message = f"limits of agreement need finite differences, given {difference.size} values, not all finite."
        raise InputError(message)
    n, bias = len(difference), float(np.mean(difference))
    sd = float(np.std(difference, ddof=1)) if n > 1 else float("nan")
    half = stats.t.ppf(0.975, max(n - 1, 1)) * sd / np.sqrt(n)
    lines = {
        "bias": (bias, half),
        "loa_low": (bias - _LIMIT_SDS * sd, np.sqrt(3) * half),
        "loa_high": (bias + _LIMIT_SDS * sd, np.sqrt(3) * half),
    }
    return {
        key: float(value)
        for name, (middle, reach) in lines.items()
        for key, value in _with_interval(name, middle, middle - reach, middle + reach).items()
    }


def icc_agreement(ratings: Float[np.ndarray, "n k"]) -> tuple[float, float, float]:
    """Return (icc, ci_low, ci_high) of n subjects rated by the same k raters, 95 % interval.

    ICC(A,1) of McGraw & Wong (1996), two-way, absolute agreement, single rating; the same number as ICC(2,1)
    of Shrout & Fleiss (1979). The interval takes the raters for a sample of many. For two fixed ones, a method
    and the truth, it holds 95 % if they do not differ in the mean and is too wide if they do. NaN for fewer than
    two subjects or raters, or if no rater tells the subjects apart.
    """
    ratings = np.asarray(ratings, float)
    n, k = ratings.shape
    if min(n, k) < 2 or np.ptp(ratings, axis=0).max() == 0:
        return (float("nan"),) * 3
    mean, subjects, raters = ratings.mean(), ratings.mean(axis=1), ratings.mean(axis=0)
    residual = ratings - subjects[:, None] - raters + mean
    between_subjects = k * np.sum((subjects - mean) ** 2) / (n - 1)
    between_raters = n * np.sum((raters - mean) ** 2) / (k - 1)
    error = np.sum(residual**2) / ((n - 1) * (k - 1))
    disagreement = k * between_raters + (k * n - k - n) * error
    icc = (between_subjects - error) / (between_subjects + (k - 1) * error + k * (between_raters - error) / n)
    if np.isclose(icc, 1.0, rtol=0, atol=1e-12):
        return 1.0, 1.0, 1.0
    # Satterthwaite's degrees of freedom of the error term, with the weights of McGraw & Wong, Table 7.
    odds = k * icc / (n * (1 - icc))
    of_raters, of_error = odds * between_raters, (1 + odds * (n - 1)) * error
    freedom = (of_raters + of_error) ** 2 / (of_raters**2 / (k - 1) + of_error**2 / ((n - 1) * (k - 1)))
    wide, narrow = stats.f.ppf(0.975, n - 1, freedom), stats.f.ppf(0.975, freedom, n - 1)
    low = n * (between_subjects - wide * error) / (wide * disagreement + n * between_subjects)
    high = n * (narrow * between_subjects - error) / (disagreement + n * narrow * between_subjects)
    return float(icc), float(low), float(high)


def _agreement(name, predicted, truth):
    both = np.isfinite(predicted) & np.isfinite(truth)
    predicted, truth = predicted[both], truth[both]
    if not both.any():
        return {"n": 0}
    difference = measure_difference(name, predicted, truth)
    row = {"n": len(truth)} | _with_interval("mae", *bootstrap_ci(np.abs(difference)))
    row |= limits_of_agreement(difference)
    if name in _PERIODS_DEG:
        return row
    icc = icc_agreement(np.stack([predicted, truth], axis=1))
    return row | _with_interval("icc", *icc) | {"r": pearson_r(predicted, truth)[0]}


def _with_interval(name, value, low, high):
    return {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}


def _level_number(curves, height_mm):
    """Count of the level at a height: whole numbers at the middles of the bodies T1 to L5."""
    length = arc_length_mm(curves)
    share = np.interp(-height_mm, -curves.heights_mm, length) / length[-1]
    middles = np.mean(list(LEVEL_FRACTIONS.values()), axis=1)
    return float(np.interp(share, middles, np.arange(1, len(middles) + 1)))


def _heights_of(curves, shares):
    length = arc_length_mm(curves)
    return np.interp(np.asarray(shares) * length[-1], length, curves.heights_mm)


def _axial_tangent(curves, heights_mm):
    """Right and anterior part of the unit tangent, read upwards, shape (2, n)."""
    slopes = tangent_slopes(curves, heights_mm)
    return slopes / np.sqrt(1.0 + np.sum(slopes**2, axis=0))
