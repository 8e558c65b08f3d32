"""Shards: the same people as elsewhere, rendered once, read when asked for."""

import numpy as np
import pytest

from spinelib import shards
from spinelib.errors import InputError
from spinelib.phantom.cohort import render_case
from spinelib.shards import ShardedCohort, render_shards

SEED = 870


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards of two people."""
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 2)
        cohort = render_shards(folder, 3, seed=SEED, n_jobs=1)
    assert len(cohort) == 3  # four were rendered
    return folder


def test_people_are_those_of_their_seeds(folder):
    cohort = ShardedCohort(folder)
    assert len(cohort) == 4
    for index in (1, 2):  # of either shard
        case, example = render_case(SEED * 1_000_000 + index), cohort[index]
        assert example.dxa.channels == case.dxa.channels
        assert example.dxa.grid == case.dxa.grid
        assert example.dxa.values == pytest.approx(case.dxa.values, rel=1e-3, abs=1e-3)  # 16 bits
        assert example.curves.to_array() == pytest.approx(case.curves.to_array(), abs=1e-3)
        assert example.curves.heights_mm == pytest.approx(case.curves.heights_mm, abs=1e-3)
        heights = example.extended.heights_mm
        assert len(heights) == 300
        assert heights[0] > case.curves.heights_mm[0]
        assert heights[-1] < case.curves.heights_mm[-1]
        assert example.extended.to_array() == pytest.approx(case.extended_curves.at(heights).to_array(), abs=0.05)
    assert len({example.key for example in cohort}) == 4


def test_a_cohort_is_a_sequence_and_its_slices_are_lazy(folder, monkeypatch):
    cohort = ShardedCohort(folder)
    keys = [example.key for example in cohort]
    read = []
    monkeypatch.setattr(shards, "_unpacked", lambda rows: read.append(1))
    part = cohort[1:][::-1]
    assert not read
    assert [example.key for example in part] == keys[:0:-1]
    assert part[-1].key == keys[1]
    assert cohort[-1].key == keys[-1]
    for place in (4, -5):
        with pytest.raises(IndexError):
            cohort[place]
    with pytest.raises(IndexError):
        part[3]


def test_the_limit_cuts_examples_and_people_alike(folder):
    cohort = ShardedCohort(folder, limit=3)
    assert len(cohort) == len(list(cohort)) == len(cohort.people()) == 3
    assert len(ShardedCohort(folder, limit=99)) == 4
    ages = cohort.people()["age"] if "age" in cohort.people() else cohort.people().iloc[:, 0]
    assert ages.notna().all()


def test_what_is_there_is_not_rendered_again(folder, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)
    monkeypatch.setattr(shards, "_person", lambda *_: pytest.fail("rendered again"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(render_shards(folder, 4, seed=SEED, n_jobs=1)) == 4
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert not list(folder.glob("*.part"))


def test_a_person_that_fails_costs_only_itself(tmp_path, monkeypatch):
    def person(seed, mix, device):
        if seed % 2:
            raise ValueError("bad luck")
        arrays = {name: np.zeros((2, 3, 3), np.float32) for name in shards._FIELDS}
        return arrays | {"origin_mm": np.zeros(2)}, {"seed": seed}

    monkeypatch.setattr(shards, "SHARD", 4)
    monkeypatch.setattr(shards, "_person", person)
    cohort = render_shards(tmp_path, 4, seed=1, n_jobs=1)
    assert cohort.people()["seed"].tolist() == [1_000_000, 1_000_002]
    assert len(cohort) == 2


def test_an_empty_folder_says_how_to_fill_it(tmp_path):
    with pytest.raises(InputError, match="--render"):
        ShardedCohort(tmp_path)
