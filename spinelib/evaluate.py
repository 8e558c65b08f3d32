"""Score curve predictions against the truth: per subject, per method, with baselines and ceiling in one table."""

import sys

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from spinelib.clinical import MEASURES, clinical_measures
from spinelib.data import Record
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.metrics import (
    SEVERITY_BANDS,
    curve_errors,
    mask_errors,
    match_depth,
    pearson_r,
    severity_band,
    summarise,
)
from spinelib.reconstruct import column_mask, joint_grid
from spinelib.spine import Curves
from spinelib.stress import STRESSES, stressed_records
from spinelib.uncertainty import tube_coverage

METHODS = (
    "mean_curve",
    "height_scaled_mean",
    "nearest",
    "ridge",
    "paper",
    "paper_modern",
    "ours_this_run",
    "ours",
    "ceiling",
)
SCORES = ("centreline_3d_mm", "coronal_mm", "sagittal_mm", "iou_3d", "hd95_mm", "assd_mm")
PUBLISHED = {"centreline_3d_mm": 3.12, "iou_3d": 0.838}
"""Bourigault 2024 on UK Biobank, as quoted by a third-party summary: other data, other truth, not comparable."""

SCOLIOSIS_DEG = 10.0
"""Cobb angle from which scoliosis is diagnosed; errors of Cobb and Ferguson angles are given above it."""

AGES = {"under 55": 0, "55-65": 55, "65-75": 65, "over 75": 75}
BMIS = {"under 22": 0, "22-27": 22, "27-32": 27, "over 32": 32}

_PADDING_MM = 40.0


def predict_all(models: dict, records: list[Record], windows: list) -> dict[str, list[Curves]]:
    """Return the curves of every model for every record; a model brings `predict(image, window)`."""
    return {
        name: [model.predict(r.dxa, w) for r, w in zip(records, windows, strict=True)] for name, model in models.items()
    }


def score_subjects(records: list[Record], predictions: dict[str, list[Curves]], n_jobs: int = 1) -> pd.DataFrame:
    """Return one row per subject and method.

    The ceiling is added: the true curves through the same reconstruction, against the true volume. Overlap and
    surface distances compare with the record's `column_mask`; where a data set has none, with the solid rebuilt
    from the true curves, and the ceiling is then 1 by construction.
    """
    everything = predictions | {"ceiling": [r.curves for r in records]}
    jobs = (
        delayed(_subject_rows)(
            record.key, record.curves, record.column_mask, {m: curves[i] for m, curves in everything.items()}
        )
        for i, record in enumerate(records)
    )
    done = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
    bar = tqdm(done, total=len(records), desc="scoring", unit="subject", disable=not sys.stderr.isatty())
    frame = pd.DataFrame([row for rows in bar for row in rows])
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


def headline_metrics(scores: pd.DataFrame) -> dict[str, float]:
    """Return the flat names of metrics.json: curves.<method>.<score>.<mean|ci_low|ci_high> and errors of angles.

    Errors of Cobb and Ferguson angles are those of people with a true Cobb angle of `SCOLIOSIS_DEG` or more.
    """
    metrics = {}
    for row in summary(scores, columns=("centreline_3d_mm", "iou_3d")).itertuples():
        for name in ("mean", "ci_low", "ci_high"):
            metrics[f"curves.{row.method}.{row.score}.{name}"] = getattr(row, name)
    for method, group in scores.groupby("method", sort=False):
        bent = group[group["true_cobb_deg"] >= SCOLIOSIS_DEG]
        for name, measure, people in (
            ("cobb", "cobb_deg", bent),
            ("ferguson", "modified_ferguson_deg", bent),
            ("kyphosis", "thoracic_kyphosis_deg", group),
            ("lordosis", "lumbar_lordosis_deg", group),
        ):
            truth, predicted = (people[f"{kind}_{measure}"].to_numpy() for kind in ("true", "predicted"))
            metrics[f"curves.{method}.{name}_mae_deg"] = np.abs(predicted - truth).mean() if len(people) else np.nan
            metrics[f"curves.{method}.{name}_r"] = pearson_r(predicted, truth)[0]
    return {k: round(float(v), 4) for k, v in metrics.items() if np.isfinite(v)}


def grouped(scores: pd.DataFrame, people: pd.DataFrame) -> pd.DataFrame:
    """Return the scores with columns sex, age and bmi in groups, where the table of subjects has them."""
    joined = people.reindex(scores["subject_key"]).set_axis(scores.index)
    groups = {}
    if "sex" in people:
        groups["sex"] = joined["sex"].map({"F": "women", "M": "men"})
    for name, column, bounds in (("age", "age_years", AGES), ("bmi", "bmi", BMIS)):
        if column in people:
            groups[name] = pd.cut(joined[column], [*bounds.values(), np.inf], labels=list(bounds), right=False)
    return scores.assign(**groups)


def stress_errors(
    predictor, records: list[Record], chosen: dict[str, tuple], cache_dir=None, n_jobs: int = 2
) -> pd.DataFrame:
    """Return one row per condition, level and person: the error beside that of the same person unstressed.

    Parameters
    ----------
    predictor : CurvePredictor
    records : list of Record
        Synthetic test people of `spinelib.data.synthetic_cohort`; conditions of kind 'person' render them anew.
    chosen : dict of str to tuple
        Levels of each condition of `spinelib.stress.STRESSES`.

    Returns
    -------
    DataFrame
        stress, level, unit, subject_key, error_mm and plain_mm (3D centre line), ratio, coverage (share of heights
        inside the 90% tube), is_unusual.
    """
    plain = {r.key: _judged(predictor, r)["error_mm"] for r in records}
    rows = []
    for name, levels in chosen.items():
        for level in levels:
            for record in stressed_records(name, level, records, n_jobs=n_jobs, cache_dir=cache_dir):
                row = {"stress": name, "level": level, "unit": STRESSES[name].unit, "subject_key": record.key}
                rows.append(row | _judged(predictor, record) | {"plain_mm": plain[record.key]})
    table = pd.DataFrame(rows)
    return table.assign(ratio=table["error_mm"] / table["plain_mm"])


def stress_table(errors: pd.DataFrame) -> pd.DataFrame:
    """Return one row per condition and level from `stress_errors`.

    Returns
    -------
    DataFrame
        stress, level, unit, n; mean, ci_low, ci_high: mean error over the mean error of the same people
        unstressed, with a 95% bootstrap interval over people; error_mm, coverage, unusual: means.
    """
    rows = []
    for (name, level), group in errors.groupby(["stress", "level"], sort=False):
        draws = np.random.default_rng(0).integers(0, len(group), (2000, len(group)))
        error, plain = group["error_mm"].to_numpy(), group["plain_mm"].to_numpy()
        low, high = np.quantile(error[draws].mean(1) / plain[draws].mean(1), (0.025, 0.975))
        rows.append(
            {
                "stress": name,
                "level": level,
                "unit": group["unit"].iloc[0],
                "n": len(group),
                "mean": error.mean() / plain.mean(),
                "ci_low": low,
                "ci_high": high,
                "error_mm": error.mean(),
                "coverage": group["coverage"].mean(),
                "unusual": group["is_unusual"].mean(),
            }
        )
    return pd.DataFrame(rows)


def height_errors(records: list[Record], curves: list[Curves], rows: int = 60) -> np.ndarray:
    """Return the 3D centre-line error at `rows` heights from T1 (first) to L5, shape (subjects, rows), mm."""
    errors = []
    for record, item in zip(records, curves, strict=True):
        truth = record.curves.resample(rows)
        found, truth = item.at(truth.heights_mm).depth_removed(), truth.depth_removed()
        errors.append(np.linalg.norm((found.centreline() - truth.centreline())[:, :2], axis=1))
    return np.stack(errors)


def _subject_rows(key, true_curves, mask, predictions):
    torch.set_num_threads(1)
    truth, reference = _measured(true_curves), _padded(mask or _solid(true_curves))
    rows = []
    for method, curves in predictions.items():
        found = truth if method == "ceiling" else _measured(curves)
        row = {"subject_key": key, "method": method, "severity": severity_band(truth["cobb_deg"])[0]}
        row |= _scores(curves, true_curves, reference)
        row |= {f"true_{name}": value for name, value in truth.items()}
        rows.append(row | {f"predicted_{name}": value for name, value in found.items()})
    return rows


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


def _measured(curves):
    try:
        return clinical_measures(curves)
    except InputError:
        return dict.fromkeys(MEASURES, np.nan)


def _judged(predictor, record):
    found = predictor.estimate(record.dxa)
    inside = tube_coverage([found.curves], found.tube_mm[None], [record.curves]) if predictor.calibration else np.nan
    error = curve_errors(found.curves, record.curves)["centreline_3d_mm"]
    return {"error_mm": error, "coverage": float(np.nanmean(inside)), "is_unusual": found.is_unusual}


def _in_method_order(table):
    known = {m: i for i, m in enumerate(METHODS)}
    return table.sort_values("method", key=lambda s: s.map(known).fillna(len(known)), kind="stable").reset_index(
        drop=True
    )
