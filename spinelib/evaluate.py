"""Score curve predictions against the truth: per subject, per method, with baselines and ceiling in one table."""

import sys

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from spinelib.angles import all_angles
from spinelib.data import Record
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.metrics import (
    SEVERITY_BANDS,
    bootstrap_ci,
    curve_errors,
    mask_errors,
    match_depth,
    pearson_r,
    severity_band,
    summarise,
)
from spinelib.reconstruct import column_mask, joint_grid
from spinelib.spine import Curves

METHODS = (
    "mean_curve",
    "height_scaled_mean",
    "nearest",
    "ridge",
    "paper",
    "ours_this_run",
    "ours",
    "ceiling",
)
SCORES = ("centreline_3d_mm", "coronal_mm", "sagittal_mm", "iou_3d", "hd95_mm", "assd_mm")
ANGLES = ("cobb_deg", "thoracic_kyphosis_deg", "lumbar_lordosis_deg")
PUBLISHED = {"centreline_3d_mm": 3.12, "iou_3d": 0.838}
"""Bourigault 2024 on UK Biobank, as quoted by a third-party summary: other data, other truth, not comparable."""

_PADDING_MM = 40.0


def predict_all(models: dict, records: list[Record], windows: list) -> dict[str, list[Curves]]:
    """Return the curves of every model for every record; a model brings `predict(image, window)`."""
    return {
        name: [model.predict(r.dxa, w) for r, w in zip(records, windows, strict=True)] for name, model in models.items()
    }


def score_subjects(records: list[Record], predictions: dict[str, list[Curves]]) -> pd.DataFrame:
    """Return one row per subject and method.

    The ceiling is added: the true curves through the same reconstruction, against the true volume. Overlap and
    surface distances compare with the record's `column_mask`; where a data set has none, with the solid rebuilt
    from the true curves, and the ceiling is then 1 by construction.
    """
    rows = []
    everything = predictions | {"ceiling": [r.curves for r in records]}
    for index, record in enumerate(tqdm(records, desc="scoring", unit="subject", disable=not sys.stderr.isatty())):
        truth_angles = all_angles(record.curves)
        reference = _padded(record.column_mask or _solid(record.curves))
        for method, curves in everything.items():
            row = {
                "subject_key": record.key,
                "method": method,
                "severity": severity_band(truth_angles["cobb_deg"])[0],
            }
            row |= _scores(curves[index], record.curves, reference)
            row |= {f"true_{a}": truth_angles[a] for a in ANGLES}
            row |= {f"predicted_{a}": v for a, v in _angles(curves[index]).items()}
            rows.append(row)
    frame = pd.DataFrame(rows)
    frame["severity"] = pd.Categorical(frame["severity"], SEVERITY_BANDS, ordered=True)
    return frame


def summary(scores: pd.DataFrame, by: tuple[str, ...] = ("method",), columns=SCORES) -> pd.DataFrame:
    """Return mean, 95% bootstrap interval, n, median and SD of each score, one row per group and score."""
    table = summarise(scores[[*by, *columns]], list(by)).rename(columns={"metric": "score"})
    return _in_method_order(table)


def methods_table(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """Return the rows of one score from `summary`, in the fixed order of methods."""
    return table[table["score"] == score].drop(columns="score").reset_index(drop=True)


def headline_table(table: pd.DataFrame, made_by: dict[str, str]) -> pd.DataFrame:
    """Return one row a method: where its weights come from, mean scores, interval of the 3D centre line, n.

    Parameters
    ----------
    table : DataFrame
        From `summary`.
    made_by : dict of str to str
        Method to a few words on its weights.
    """
    line = methods_table(table, "centreline_3d_mm").set_index("method")
    means = {score: methods_table(table, score).set_index("method")["mean"] for score in SCORES}
    wide = pd.DataFrame(means).reindex(line.index)
    interval = [f"{row.ci_low:.2f} to {row.ci_high:.2f}" for row in line.itertuples()]
    wide.insert(1, "centreline_95ci_mm", interval)
    wide.insert(0, "weights", [made_by.get(method, "") for method in wide.index])
    return wide.assign(n=line["n"])


def angle_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return error, bias, 95% limits of agreement and Pearson's r of each angle, one row per method and angle."""
    rows = []
    for method, group in scores.groupby("method", sort=False):
        for angle in ANGLES:
            truth, predicted = group[f"true_{angle}"].to_numpy(), group[f"predicted_{angle}"].to_numpy()
            difference = predicted - truth
            mean, low, high = bootstrap_ci(np.abs(difference))
            spread = 1.96 * difference.std(ddof=1)
            rows.append(
                {
                    "method": method,
                    "angle": angle,
                    "mae_deg": mean,
                    "ci_low": low,
                    "ci_high": high,
                    "bias_deg": difference.mean(),
                    "limit_low_deg": difference.mean() - spread,
                    "limit_high_deg": difference.mean() + spread,
                    "r": pearson_r(predicted, truth)[0],
                    "n": len(group),
                }
            )
    return _in_method_order(pd.DataFrame(rows))


def headline_metrics(scores: pd.DataFrame) -> dict[str, float]:
    """Return the flat names of metrics.json: curves.<method>.<score>.<mean|ci_low|ci_high> and angles of ours."""
    metrics = {}
    for row in summary(scores, columns=("centreline_3d_mm", "iou_3d")).itertuples():
        for name in ("mean", "ci_low", "ci_high"):
            metrics[f"curves.{row.method}.{row.score}.{name}"] = getattr(row, name)
    angles = angle_table(scores).set_index(["method", "angle"])
    for method in scores["method"].unique():
        metrics[f"curves.{method}.cobb_mae_deg"] = angles.loc[(method, "cobb_deg"), "mae_deg"]
        metrics[f"curves.{method}.kyphosis_r"] = angles.loc[(method, "thoracic_kyphosis_deg"), "r"]
        metrics[f"curves.{method}.lordosis_r"] = angles.loc[(method, "lumbar_lordosis_deg"), "r"]
    return {k: round(float(v), 4) for k, v in metrics.items() if np.isfinite(v)}


def height_errors(records: list[Record], curves: list[Curves], rows: int = 60) -> np.ndarray:
    """Return the 3D centre-line error at `rows` heights from T1 (first) to L5, shape (subjects, rows), mm."""
    errors = []
    for record, item in zip(records, curves, strict=True):
        truth = record.curves.resample(rows)
        found, truth = item.at(truth.heights_mm).depth_removed(), truth.depth_removed()
        errors.append(np.linalg.norm((found.centreline() - truth.centreline())[:, :2], axis=1))
    return np.stack(errors)


def _scores(curves, truth, reference):
    solid = column_mask(match_depth(curves, truth), reference.grid)
    return curve_errors(curves, truth) | mask_errors(solid, reference.values > 0, reference.spacing_mm)


def _padded(volume):
    """Widen a mask's grid, so that a prediction beside the truth is counted as what it is."""
    voxels = np.ceil(_PADDING_MM / volume.spacing_mm).astype(int)
    affine = volume.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ voxels
    return Volume(np.pad(volume.values, [(n, n) for n in voxels]), affine)


def _solid(curves):
    grid = joint_grid(curves)
    return Volume(column_mask(curves, grid).astype(np.uint8), grid.affine)


def _angles(curves):
    try:
        angles = all_angles(curves)
    except InputError:
        angles = {}
    return {a: angles.get(a, np.nan) for a in ANGLES}


def _in_method_order(table):
    known = {m: i for i, m in enumerate(METHODS)}
    return table.sort_values("method", key=lambda s: s.map(known).fillna(len(known)), kind="stable").reset_index(
        drop=True
    )
