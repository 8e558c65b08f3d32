"""Tables: the ceiling is a ceiling, intervals and orders are right, names are the promised ones."""

import numpy as np
import pandas as pd
import pytest

from spinelib.clinical import agreement_table
from spinelib.data import Record
from spinelib.evaluate import (
    METHODS,
    SCOLIOSIS_DEG,
    grouped,
    headline_metrics,
    height_errors,
    methods_table,
    score_subjects,
    stress_table,
    summary,
)
from spinelib.geometry import Volume
from spinelib.metrics import iou
from spinelib.reconstruct import column_mask, joint_grid
from spinelib.spine import Curves


def column(bend, lordosis=18.0):
    heights = np.linspace(470, 5, 209)
    phase = (heights - 5) / 465
    centre = bend * np.sin(2 * np.pi * phase)
    depth = lordosis * np.cos(1.5 * np.pi * phase)
    return Curves(heights, np.stack([centre + 19, centre, centre - 19]), np.stack([depth + 15, depth, depth - 15]))


@pytest.fixture(scope="module")
def scores():
    truth = [column(b, 18 + b / 4) for b in (2.0, 12.0, -20.0, 30.0)]
    records = [Record(f"s{i}", "test", curves=c) for i, c in enumerate(truth)]
    off = [c.shifted(right_mm=3.0, anterior_mm=50.0) for c in truth]
    return records, score_subjects(records, {"mean_curve": [column(0.0)] * 4, "ours": off})


def test_known_shift_is_measured_and_depth_is_not(scores):
    table = summary(scores[1])
    row = methods_table(table, "centreline_3d_mm").set_index("method").loc["ours"]
    assert np.isclose(row["mean"], 3.0, atol=1e-6)
    assert row["ci_low"] <= row["mean"] <= row["ci_high"]
    assert row["n"] == 4


def test_the_ceiling_is_above_everything(scores):
    table = methods_table(summary(scores[1]), "iou_3d").set_index("method")["mean"]
    assert np.isclose(table["ceiling"], 1.0)
    assert table["ceiling"] > table["ours"] > table["mean_curve"]


def test_a_prediction_beside_the_truth_is_not_forgiven_by_a_tight_mask():
    truth = column(0.0)
    tight = joint_grid(truth, margin_mm=2.0)
    record = Record(
        "s", "test", curves=truth, column_mask=Volume(column_mask(truth, tight).astype(np.uint8), tight.affine)
    )
    scores = score_subjects([record], {"ours": [truth.shifted(right_mm=25.0)]}).set_index("method")
    wide = joint_grid(truth, truth.shifted(right_mm=25.0))
    expected = iou(column_mask(truth.shifted(right_mm=25.0), wide), column_mask(truth, wide))
    assert abs(scores.loc["ours", "iou_3d"] - expected) < 0.01
    assert scores.loc["ceiling", "iou_3d"] > 0.999


def test_methods_keep_their_order(scores):
    order = methods_table(summary(scores[1]), "iou_3d")["method"].tolist()
    assert order == [m for m in METHODS if m in order]


def test_measures_of_a_shifted_copy_agree(scores):
    rows = agreement_table(scores[1], measures=["cobb_deg", "lumbar_lordosis_deg"]).set_index(["method", "measure"])
    assert rows.loc[("ours", "cobb_deg"), "mae"] < 0.01
    assert rows.loc[("ours", "lumbar_lordosis_deg"), "r"] > 0.999
    assert rows.loc[("mean_curve", "cobb_deg"), "mae"] > 2


def test_headline_errors_of_cobb_are_those_of_scoliosis(scores):
    frame = scores[1].copy()
    straight = frame["true_cobb_deg"] < SCOLIOSIS_DEG
    assert 0 < straight.sum() < len(frame)
    before = headline_metrics(frame)
    frame.loc[straight, "predicted_cobb_deg"] += 50
    assert headline_metrics(frame)["curves.ours.cobb_mae_deg"] == before["curves.ours.cobb_mae_deg"]
    frame.loc[~straight, "predicted_cobb_deg"] += 5
    assert abs(headline_metrics(frame)["curves.ours.cobb_mae_deg"] - before["curves.ours.cobb_mae_deg"] - 5) < 0.1


def test_groups_come_from_the_table_of_subjects(scores):
    keys = [f"s{i}" for i in range(4)]
    people = pd.DataFrame(
        {"sex": ["F", "M", "F", "M"], "age_years": [50, 60, 70, 80], "bmi": [20, 25, 30, 35]},
        index=pd.Index(keys, name="subject_key"),
    )
    table = grouped(scores[1], people).drop_duplicates("subject_key").set_index("subject_key").loc[keys]
    assert table["sex"].tolist() == ["women", "men", "women", "men"]
    assert table["age"].astype(str).tolist() == ["under 55", "55-65", "65-75", "over 75"]
    assert table["bmi"].astype(str).tolist() == ["under 22", "22-27", "27-32", "over 32"]
    assert "sex" not in grouped(scores[1], people[[]])


def test_stress_is_told_relative_to_the_same_people():
    rows = [("blur", 3.0, f"s{i}", 2.0 * (i + 1), 1.0 * (i + 1), 0.8, i == 0) for i in range(5)]
    columns = ["stress", "level", "subject_key", "error_mm", "plain_mm", "coverage", "is_unusual"]
    table = stress_table(pd.DataFrame(rows, columns=columns).assign(unit="mm")).iloc[0]
    assert table[["mean", "ci_low", "ci_high"]].tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert (table["n"], table["error_mm"], table["unusual"]) == (5, 6.0, 0.2)


def test_workers_score_as_one_process_does(scores):
    again = score_subjects(scores[0][:2], {"ours": [r.curves for r in scores[0][:2]]}, n_jobs=2)
    single = score_subjects(scores[0][:2], {"ours": [r.curves for r in scores[0][:2]]})
    pd.testing.assert_frame_equal(again, single)


def test_headline_names(scores):
    metrics = headline_metrics(scores[1])
    wanted = {f"curves.ours.centreline_3d_mm.{k}" for k in ("mean", "ci_low", "ci_high")}
    wanted |= {
        "curves.ceiling.iou_3d.mean",
        "curves.ours.cobb_mae_deg",
        "curves.ours.lordosis_r",
        "curves.ours.kyphosis_r",
    }
    assert wanted <= set(metrics)
    assert all(isinstance(v, float) for v in metrics.values())


def test_error_by_height_of_a_shift_is_flat(scores):
    records = scores[0]
    errors = height_errors(records, [r.curves.shifted(right_mm=2.0) for r in records], rows=30)
    assert errors.shape == (4, 30)
    assert np.allclose(errors, 2.0, atol=1e-6)
