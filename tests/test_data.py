"""Manifests, splits, the embedded cohort, quarantine."""

import hashlib
import shutil

import numpy as np
import pandas as pd
import pytest

from spinelib import data
from spinelib.data import (
    assign_split,
    check_manifest,
    load_cohort,
    load_record,
    open_cohort,
    read_manifest,
    read_subjects,
    synthetic_cohort,
)
from spinelib.errors import InputError
from spinelib.phantom.cohort import render_case, render_subject
from spinelib.phantom.population import mirrored, sample_subject


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return synthetic_cohort(tmp_path_factory.mktemp("cohort"), 3, seed=5, n_jobs=1)


@pytest.fixture
def copy(cohort, tmp_path):
    shutil.copytree(cohort.parent, tmp_path / "copy")
    return tmp_path / "copy" / cohort.name


def test_a_made_cohort_is_sound_and_loads(cohort):
    assert check_manifest(cohort).empty
    records = load_cohort(cohort)
    assert len(records) == 3
    first = records[0]
    assert first.dxa.channels == ("bone", "tissue")
    assert first.curves.to_array().shape == (209, 6)
    assert first.extended_curves.heights_mm[0] > first.curves.heights_mm[0]
    assert first.column_mask.values.sum() * 8 / 1000 > 250  # cm3 of bodies and discs


def test_files_hold_what_was_rendered(cohort):
    record = load_record(read_manifest(cohort), cohort.parent, "synthetic-5-00001")
    case = render_case(5_000_001)
    assert np.abs(record.curves.to_array() - case.curves.to_array()).max() < 6e-4
    assert np.abs(record.dxa.values - case.dxa.values).max() < 1e-3
    assert np.allclose(record.dxa.grid.origin_mm, case.dxa.grid.origin_mm, atol=1e-3)


def test_a_larger_cohort_contains_the_smaller_one(cohort, copy):
    before = pd.read_csv(cohort)
    after = pd.read_csv(synthetic_cohort(copy.parent, 4, seed=5, n_jobs=1))
    kept = after[after["subject_key"].isin(before["subject_key"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(before, kept)
    assert after["subject_key"].nunique() == 4


def test_same_seed_same_bytes():
    digests = {hashlib.sha256(render_case(11).dxa.values.tobytes()).hexdigest() for _ in range(2)}
    assert len(digests) == 1


def test_mirrored_subject_gives_mirrored_truth_and_bone():
    from spinelib.phantom.render import path_lengths
    from spinelib.phantom.vertebra import subject_shapes

    subject = sample_subject(3, curves="enriched")
    twin = mirrored(subject)
    one, two = render_subject(subject), render_subject(twin)
    assert np.abs(one.curves.mirrored().to_array() - two.curves.to_array()).max() < 0.05
    grid = one.dxa.grid
    flipped = type(grid)("coronal", grid.shape, grid.spacing_mm, (grid.origin_mm[0], -grid.lateral_mm()[-1]))
    bone = path_lengths(subject, subject_shapes(subject), grid)["mineral"]
    other = path_lengths(twin, subject_shapes(twin), flipped)["mineral"]
    assert np.abs(bone[:, ::-1] - other).max() < 1e-3 * bone.max()


def test_a_failing_subject_is_quarantined_and_the_rest_goes_on(tmp_path, monkeypatch):
    real = data._render_to

    def fails_once(folder, seed, mix):
        if folder.name.endswith("1"):
            raise RuntimeError("phantom fell off the table")
        return real(folder, seed, mix)

    monkeypatch.setattr(data, "_render_to", fails_once)
    manifest = synthetic_cohort(tmp_path, 2, seed=6, n_jobs=1)
    quarantine = pd.read_csv(tmp_path / "quarantine-2.csv")
    assert quarantine["reason"].tolist() == ["RuntimeError: phantom fell off the table"]
    assert read_manifest(manifest)["subject_key"].unique().tolist() == ["synthetic-6-00000"]


def test_an_unreadable_image_costs_one_subject_and_says_why(copy, tmp_path):
    (copy.parent / "synthetic-5-00000" / "dxa.nii.gz").write_bytes(b"broken")
    problems = check_manifest(copy)
    assert problems["reason"].str.contains("changed since").tolist() == [True]
    records = load_cohort(copy, quarantine=tmp_path / "q.csv")
    assert len(records) == 2
    assert pd.read_csv(tmp_path / "q.csv")["subject_key"].tolist() == ["synthetic-5-00000"]


def test_splits_are_stable_and_near_their_shares():
    splits = pd.Series([assign_split(f"p{i}") for i in range(4000)]).value_counts(normalize=True)
    assert abs(splits["test"] - 0.25) < 0.03
    assert abs(splits["validation"] - 0.10) < 0.02
    assert assign_split("p1") == assign_split("p1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modality": "xray"}, "modality"),
        ({"path": "/data/secret.nii.gz"}, "must be relative"),
        ({"sha256": "123"}, "sha256"),
        ({"split": "holdout"}, "split"),
    ],
)
def test_bad_manifest_rows_are_listed(copy, change, words):
    table = pd.read_csv(copy, dtype=str, keep_default_na=False)
    for column, value in change.items():
        table.loc[0, column] = value
    table.to_csv(copy, index=False)
    with pytest.raises(InputError, match=words):
        read_manifest(copy)


def test_one_subject_in_two_splits_is_found(copy):
    table = pd.read_csv(copy, dtype=str, keep_default_na=False)
    table.loc[0, "split"] = {"train": "test"}.get(table.loc[0, "split"], "train")
    table.to_csv(copy, index=False)
    assert "more than one split" in check_manifest(copy)["reason"].iloc[0]


def test_missing_things_are_named(cohort, tmp_path):
    with pytest.raises(InputError, match="spinelib run 01"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(InputError, match="no subject 'nobody'"):
        load_record(read_manifest(cohort), cohort.parent, "nobody")


def test_subjects_are_optional(cohort, tmp_path):
    assert read_subjects(cohort)["true_rotation_deg"].between(-8, 8).all()
    own = tmp_path / "mine.csv"
    shutil.copy(cohort, own)
    people = read_subjects(own)
    assert people.index.tolist() == read_manifest(cohort)["subject_key"].unique().tolist()
    assert people.columns.empty


def test_own_manifest_wins_over_the_synthetic_cohort(cohort):
    assert open_cohort(str(cohort), "unused", 99) == cohort
