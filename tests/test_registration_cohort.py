"""Cohorts of synthetic pairs: cached, complete or absent, failures set aside."""

import pandas as pd
import pytest
from drawn_registration import drawn_pair

from spinelib import registration_cohort
from spinelib.errors import InputError
from spinelib.imaging.pairs import list_pairs, read_pair
from spinelib.phantom.pairs import PairMix
from spinelib.registration_cohort import render_pair_cohort


def drawn_unless(bad):
    def sample(seed, mix):
        if seed == bad:
            raise RuntimeError("this one fails")
        return drawn_pair(f"pair-{seed:06d}", seed=seed)

    return sample


def test_cohort_keeps_what_is_there_and_quarantines(tmp_path, monkeypatch):
    folder = tmp_path / "train"
    monkeypatch.setattr(registration_cohort, "sample_pair", drawn_unless(8))
    paths = render_pair_cohort(folder, 3, seed=7, n_jobs=1)
    assert [path.name for path in paths] == ["pair-000007", "pair-000009"]
    assert list_pairs(tmp_path, "train") == paths
    reasons = pd.read_csv(folder / "quarantine.csv")
    assert reasons.to_numpy().tolist() == [["pair-000008", "RuntimeError: this one fails"]]
    stamps = [(path / "ct.nii.gz").stat().st_mtime_ns for path in paths]
    monkeypatch.setattr(registration_cohort, "sample_pair", drawn_unless(-1))
    again = render_pair_cohort(folder, 4, seed=7, n_jobs=1)
    assert [path.name for path in again] == [f"pair-{i:06d}" for i in (7, 8, 9, 10)]
    assert [(again[i] / "ct.nii.gz").stat().st_mtime_ns for i in (0, 2)] == stamps
    assert read_pair(again[1]).ct.values.shape == drawn_pair().ct.values.shape
    assert pd.read_csv(folder / "quarantine.csv").empty


def test_a_broken_run_leaves_no_half_pair(tmp_path, monkeypatch):
    def write_half(folder, pair):
        folder.mkdir(parents=True)
        (folder / "ct.nii.gz").touch()
        raise OSError("disk full")

    monkeypatch.setattr(registration_cohort, "sample_pair", drawn_unless(-1))
    with monkeypatch.context() as broken:
        broken.setattr(registration_cohort, "write_pair", write_half)
        with pytest.raises(InputError, match="none of 1 pairs .* disk full"):
            render_pair_cohort(tmp_path / "train", 1, n_jobs=1)
    with pytest.raises(InputError, match="no pairs in"):
        list_pairs(tmp_path, "train")
    assert len(render_pair_cohort(tmp_path / "train", 1, n_jobs=1)) == 1


def test_one_mix_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(registration_cohort, "sample_pair", drawn_unless(-1))
    render_pair_cohort(tmp_path, 1, n_jobs=1)
    with pytest.raises(InputError, match="render into another folder"):
        render_pair_cohort(tmp_path, 1, n_jobs=1, mix=PairMix(partial=1.0))
    with pytest.raises(InputError, match="none of 0"):
        render_pair_cohort(tmp_path, 0, n_jobs=1)
