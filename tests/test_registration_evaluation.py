"""Scores of registrations: what each method must reach on drawn pairs, tables and names."""

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_registration import drawn_pair

from spinelib import registration_evaluation as evaluation
from spinelib.deformation import DisplacementField
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.models.ctmr import CTMRModel

SHIFT_MM = np.array([3.0, 1.0, -2.0])
MOTION = np.eye(4)
MOTION[:3, 3] = SHIFT_MM


@pytest.fixture(scope="module")
def pair():
    drawn = drawn_pair(shift_mm=SHIFT_MM)
    truth = DisplacementField.rigid(MOTION, drawn.mr.grid)
    return replace(drawn, field=truth, transforms=dict.fromkeys((20, 21), MOTION))


@pytest.fixture(scope="module")
def scores(pair):
    methods = {"identity": evaluation.identity_method, "ceiling": evaluation.ceiling_method}
    return evaluation.evaluate_pairs(methods, [pair, replace(pair, key="again")])


def test_no_motion_is_off_by_the_true_one_and_rigid(scores):
    vertebrae, fields = scores
    still = vertebrae[vertebrae["method"] == "identity"]
    np.testing.assert_allclose(still["bone_tre_mm"], np.linalg.norm(SHIFT_MM), atol=1e-4)
    np.testing.assert_allclose(still["nonrigidity"], 0, atol=1e-6)
    assert (still["failed"] == 1).all()
    own = fields[fields["method"] == "identity"]
    np.testing.assert_allclose(own["soft_tre_mm"], np.linalg.norm(SHIFT_MM), atol=1e-4)
    np.testing.assert_allclose(own["inverse_consistency_mm"], 0, atol=1e-6)


def test_the_true_motion_is_the_ceiling(scores):
    vertebrae, fields = scores
    best = vertebrae[vertebrae["method"] == "ceiling"]
    assert best["bone_tre_mm"].max() < 1e-4
    assert (best["failed"] == 0).all()
    assert best["dice"].min() > vertebrae.loc[vertebrae["method"] == "identity", "dice"].max()
    assert fields.loc[fields["method"] == "ceiling", "soft_tre_mm"].max() < 1e-4


def test_an_untrained_network_moves_nothing(pair):
    torch.manual_seed(0)
    forward, backward = evaluation.network_fields(CTMRModel(), pair)
    assert forward.grid.shape == pair.mr.grid.shape and backward.grid.shape == pair.ct.grid.shape
    assert max(np.abs(field.values).max() for field in (forward, backward)) < 0.5


def test_ours_finds_the_motion_of_drawn_vertebrae(pair):
    vertebrae, fields = evaluation.evaluate_pairs({"ours": evaluation.polyrigid_method()}, [pair])
    assert vertebrae["bone_tre_mm"].max() < 1.0
    assert vertebrae["nonrigidity"].max() < 1e-3
    assert fields["folding_pct"].max() == 0


def test_rows_and_headlines(scores):
    rows = evaluation.table_rows(*scores)
    assert rows["method"].tolist() == ["identity", "ceiling"]
    assert rows["pairs"].tolist() == [2, 2] and rows["vertebrae"].tolist() == [4, 4]
    assert (rows["dice_low"] <= rows["dice"]).all() and (rows["dice"] <= rows["dice_high"]).all()
    numbers = evaluation.headline_numbers(rows)
    assert numbers["ctmr.identity.bone_tre_mm"] == pytest.approx(np.linalg.norm(SHIFT_MM), abs=1e-4)
    wanted = ("dice.mean", "rotation_error_deg", "translation_error_mm", "nonrigidity", "volume_change_pct")
    wanted += ("folding_pct", "soft_tre_mm", "seconds", "inverse_consistency_mm")
    assert {f"ctmr.identity.{name}" for name in wanted} <= set(numbers)
    assert "ctmr.ceiling.inverse_consistency_mm" not in numbers  # it gives no way back


def test_published_rows_are_marked_and_named():
    rows = evaluation.published_rows()
    assert set(rows["kind"]) == {"published"}
    assert set(rows["method"]) <= set(evaluation.NAMES)
    assert rows.set_index("method").loc["pc_rd", "dice"] == 0.783
    assert rows["source"].notna().all()


def test_what_cannot_be_scored(pair):
    with pytest.raises(InputError, match="no MR labels"):
        evaluation.evaluate_pairs({"identity": evaluation.identity_method}, [replace(pair, mr_labels=None)])
    with pytest.raises(InputError, match="no pair"):
        evaluation.evaluate_pairs({"identity": evaluation.identity_method}, [])
    with pytest.raises(InputError, match="no true motion"):
        evaluation.ceiling_method(replace(pair, field=None))
    unknown, _ = evaluation.evaluate_pairs(
        {"identity": evaluation.identity_method}, [replace(pair, field=None, transforms=None)]
    )
    assert unknown["failed"].isna().all() and isinstance(unknown, pd.DataFrame)


def test_one_rigid_motion_for_all(pair):
    forward, backward = evaluation.affine_method(pair)
    middle = np.array([[[24.0, 24.0, 30.0]]])
    np.testing.assert_allclose(backward.moved(forward.moved(middle)), middle, atol=0.05)
    assert np.abs(forward.jacobian() - np.eye(3)).max() < 0.2


def test_stored_scores_are_of_the_pairs_they_were_made_on(pair):
    text = resources.files("spinelib").joinpath("registration_elastix.json").read_text()
    key, voxels = next(iter(json.loads(text)["label_voxels"].items()))
    labels = np.zeros(pair.ct_labels.values.shape, np.uint8)
    labels.flat[:voxels] = 20
    same = replace(pair, key=key, ct_labels=Volume(labels, pair.ct_labels.affine))
    vertebrae, fields = evaluation.stored_elastix([pair, same])
    assert set(vertebrae["pair"]) == set(fields["pair"]) == {key}
    assert set(vertebrae["method"]) == {"elastix"} and vertebrae["dice"].between(0, 1).all()
    assert evaluation.table_rows(vertebrae, fields)["pairs"].tolist() == [1]
    other = replace(same, ct_labels=pair.ct_labels)
    assert not any(len(table) for table in evaluation.stored_elastix([other]))


def test_easy_and_hard_vertebrae_are_told_apart(pair, scores):
    half = replace(pair, key="again", mr=Volume(pair.mr.values[: len(pair.mr.values) // 2], pair.mr.affine))
    vertebrae = pd.concat([scores[0], scores[0].assign(method="elastix").query("pair == 'again'")])
    rows = evaluation.difficulty_rows(vertebrae, [pair, half])
    assert list(rows["group"].unique()) == ["small motion", "whole in the MR", "cut by the MR's border"]
    assert set(rows["method"]) == {"identity", "ceiling"}  # elastix has not seen every pair
    still = rows[rows["method"] == "identity"].set_index("group")
    assert still["vertebrae"].tolist() == [
        4,
        1,
        3,
    ]  # the shift takes one out of the first MR
    assert still["pairs"].tolist() == [2, 1, 2]
    np.testing.assert_allclose(still["bone_tre_mm"], np.linalg.norm(SHIFT_MM), atol=1e-4)
    far = vertebrae.assign(bone_tre_mm=vertebrae["bone_tre_mm"].where(vertebrae["label"] == 20, 9.0))
    rows = evaluation.difficulty_rows(far, [pair, half])
    assert rows.query("group == 'large motion' and method == 'ceiling'")["vertebrae"].tolist() == [2]
    nothing = evaluation.difficulty_rows(vertebrae, [replace(pair, transforms=None, field=None)])
    assert nothing.empty


def test_methods_are_compared_on_pairs_that_all_have_seen(scores):
    vertebrae, fields = (table[(table["method"] != "ceiling") | (table["pair"] == "again")] for table in scores)
    same = evaluation.on_the_same_pairs(vertebrae, fields)
    assert [set(table["pair"]) for table in same] == [{"again"}, {"again"}]
    assert evaluation.table_rows(*same)["pairs"].tolist() == [1, 1]
    assert evaluation.table_rows(vertebrae, fields)["pairs"].tolist() == [2, 1]
    apart = [table[(table["method"] == "ceiling") == (table["pair"] == "again")] for table in scores]
    assert not any(len(table) for table in evaluation.on_the_same_pairs(*apart))
