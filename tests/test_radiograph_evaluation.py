"""Scores from two radiographs: analytic masks, baselines in their place, triangulation against naive stacking."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_pairs import BOXES_MM, drawn_ct

from spinelib import radiograph_evaluation as evaluation
from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import CUBE, CUBE_MM, LABELS, make_pair
from spinelib.models.biplanar import new_variant
from spinelib.standing_errors import true_masks

BODY = np.zeros((CUBE,) * 3, bool)
BODY[:, 32:] = True


@pytest.fixture(scope="module")
def subject():
    return make_pair(drawn_ct())


@pytest.fixture(scope="module")
def truth(subject):
    return true_masks(subject)


@pytest.fixture(scope="module")
def scores(subject):
    methods = {
        "baseline_mean_shape": evaluation.mean_shape_method([subject]),
        "baseline_adjacent": evaluation.adjacent_method,
        "baseline_dilated": evaluation.dilated_method,
        "ceiling": evaluation.ceiling_method,
    }
    return evaluation.evaluate_subjects(methods, [subject, replace(subject, key="again")])


def box(size, shift=(0, 0, 0)):
    mask = np.zeros((CUBE,) * 3, bool)
    low = np.add(CUBE // 2 - size // 2, shift)
    mask[tuple(slice(a, a + size) for a in low)] = True
    return mask


class Knows(torch.nn.Module):
    """Answers with the target, shifted by voxels, and one level further down."""

    annotation = "c2v"

    def __init__(self, shift=0):
        super().__init__()
        self.shift, self.weight = shift, torch.nn.Parameter(torch.zeros(1))

    def predict(self, batch):
        return torch.roll(batch["target"][:, 0].float() * 0.7, self.shift, 3), batch["level"] + (self.shift > 0)


# --- one vertebra ---


def test_equal_masks_are_perfect():
    found = evaluation.score_vertebra(box(20), box(20), BODY)
    assert [found[name] for name in ("dice", "nsd", "body_dice", "process_dice")] == [1, 1, 1, 1]
    assert [found[name] for name in ("hd_mm", "hd95_mm", "asd_mm")] == [0, 0, 0]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_shifted_cube_has_the_known_scores(steps):
    found = evaluation.score_vertebra(box(20, (steps, 0, 0)), box(20), BODY)
    assert found["dice"] == pytest.approx(1 - steps / 20)
    assert found["body_dice"] == found["process_dice"] == pytest.approx(1 - steps / 20)
    assert found["hd_mm"] == pytest.approx(steps * CUBE_MM)
    assert (found["nsd"] == 1) == (steps == 1)  # one voxel is the tolerance


def test_nothing_predicted_is_no_distance():
    found = evaluation.score_vertebra(np.zeros_like(BODY), box(20), BODY)
    assert found["dice"] == found["nsd"] == found["body_dice"] == 0
    assert np.isnan([found["hd_mm"], found["hd95_mm"], found["asd_mm"]]).all()
    assert np.isnan(evaluation.score_vertebra(box(8), box(8), np.ones_like(BODY))["process_dice"])


def test_the_body_region_holds_the_body_and_not_the_spinous_process(subject, truth):
    for number, label in enumerate(subject.labels):
        region = evaluation.body_region(subject, number)
        body_mm3 = np.prod(BOXES_MM[label][0][1])
        assert 0.75 * body_mm3 < (truth[number] & region).sum() * CUBE_MM**3 < 1.05 * body_mm3  # corners are rounded
        assert not (truth[number] & region)[:, : CUBE // 2 - 8].any()


# --- methods ---


def test_baselines_come_in_their_order(scores):
    mean = scores.groupby("method")["dice"].mean()
    assert mean["baseline_mean_shape"] == 1  # of the person itself
    assert mean["baseline_adjacent"] < mean["baseline_dilated"] < 0.95
    assert mean["ceiling"] > 0.98
    np.testing.assert_allclose(scores.loc[scores["method"] == "baseline_dilated", "hd_mm"], CUBE_MM * 2**0.5)
    assert scores["level"].unique().tolist() == ["L1", "L2"]
    assert scores["level_accuracy"].isna().all()


def test_the_mean_shape_is_the_level_s_majority(subject, truth):
    larger = make_pair(drawn_ct("larger"))
    lone = evaluation.mean_shape_method([subject, larger])(subject)[0]
    np.testing.assert_array_equal(lone, truth)
    first = replace(subject, labels=(19, 21))
    other = evaluation.mean_shape_method([subject])(first)[0]
    np.testing.assert_array_equal(other[0], truth.mean(axis=0) >= 0.5)


def test_the_adjacent_vertebra_is_the_next_one_below(subject, truth):
    predicted, _, levels = evaluation.adjacent_method(subject)
    np.testing.assert_array_equal(predicted, truth[::-1])
    assert levels is None


@pytest.mark.parametrize("click_mm", [0.0, 4.0])
def test_a_network_is_scored_on_its_own_cubes(subject, truth, click_mm):
    predicted, targets, levels = evaluation.network_method(Knows(), click_mm=click_mm)(subject)
    np.testing.assert_array_equal(predicted, targets)
    assert (targets == truth).all() == (click_mm == 0)
    assert [LABELS[level] for level in levels] == [20, 21]


def test_frames_that_the_network_reads(subject):
    frames = evaluation.predicted_frames(new_variant("ours").eval(), subject)
    np.testing.assert_allclose(frames @ frames.swapaxes(1, 2), np.tile(np.eye(3), (2, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(frames, np.tile(np.eye(3), (2, 1, 1)), atol=0.2)  # untrained: the axes of the world


def test_wrong_levels_count_apart_from_shapes(subject):
    scores = evaluation.evaluate_subjects({"right": evaluation.network_method(Knows())}, [subject])
    wrong = evaluation.evaluate_subjects({"wrong": evaluation.network_method(Knows(1))}, [subject])
    assert scores["level_accuracy"].tolist() == [1, 1]
    assert wrong["level_accuracy"].tolist() == [0, 0]
    assert (wrong["dice"] > 0.8).all()
    with pytest.raises(InputError, match="no subject"):
        evaluation.evaluate_subjects({}, [])


# --- tables ---


def test_rows_have_intervals_over_subjects():
    scores = pd.DataFrame(
        {"method": "ours", "subject": ["a", "a", "b", "c"], "dice": [0.8, 1.0, 0.7, 0.8], "hd_mm": [2, np.nan, 4, 6]}
        | dict.fromkeys(("hd95_mm", "asd_mm", "nsd", "body_dice", "process_dice"), 1.0)
        | {"level_accuracy": [1.0, 0.0, 1.0, 1.0]}
    )
    (row,) = evaluation.table_rows(scores).to_dict("records")
    assert row["dice"] == pytest.approx((0.9 + 0.7 + 0.8) / 3)
    assert 0.699 <= row["dice_low"] < row["dice"] < row["dice_high"] <= 0.901
    assert (row["subjects"], row["vertebrae"], row["empty"], row["kind"]) == (3, 4, 1, "ours")
    assert row["hd_mm"] == pytest.approx(4)
    numbers = evaluation.headline_numbers(pd.DataFrame([row]))
    assert numbers == {
        "transvert.ours.dice.mean": pytest.approx(0.8),
        "transvert.ours.hd_mm.mean": pytest.approx(4),
        "transvert.ours.asd_mm.mean": 1,
        "transvert.ours.level_accuracy": pytest.approx(2.5 / 3),
    }


def test_what_is_unknown_is_no_headline(scores):
    rows = evaluation.table_rows(scores)
    assert set(rows["kind"]) == {"baseline"}
    numbers = evaluation.headline_numbers(rows)
    assert numbers["transvert.baseline_mean_shape.dice.mean"] == 1
    assert not any(name.endswith("level_accuracy") for name in numbers)
    assert all(np.isfinite(list(numbers.values())))


def test_published_rows_are_marked():
    rows = evaluation.published_rows()
    assert set(rows["kind"]) == {"published"}
    assert rows["source"].notna().all()
    assert rows.set_index("method")["dice"]["attention_adv"] == 0.9552
    assert rows["dice"].between(0.5, 1).all()
    assert set(rows["method"]) - {"benchmark", "whole_spine"} <= set(evaluation.NAMES)
