"""Level names against brute force on short columns, variants, and resistance to single mistakes."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from spinelib.errors import InputError
from spinelib.levels import LEVEL_OF_LABEL, VERSE_LABELS
from spinelib.models.enumeration import LEVEL_ORDER, PREVALENCE, gap_ratios, level_posteriors, name_levels

COLUMN = {LEVEL_OF_LABEL[label]: i for i, label in enumerate(LEVEL_ORDER)}
ORDINARY = [level for level in COLUMN if level not in ("T13", "L6")]


def scores(*levels, sure=0.9):
    """Rows that put `sure` on a level and spread the rest."""
    rows = np.full((len(levels), 26), (1 - sure) / 25)
    rows[np.arange(len(levels)), [COLUMN[level] for level in levels]] = sure
    with np.errstate(divide="ignore"):
        return np.log(rows)


def between(first, last):
    return ORDINARY[ORDINARY.index(first) : ORDINARY.index(last) + 1]


def names(naming):
    return [LEVEL_OF_LABEL[int(label)] for label in naming.labels]


def step_weight(upper, lower, missed):
    """Weight of a step by cases, written independently of the matrices."""

    def next_one(a, b):
        special = {
            ("T11", "T12"): 1 - PREVALENCE["no T12"],
            ("T11", "L1"): PREVALENCE["no T12"],
            ("T12", "T13"): PREVALENCE["T13"],
            ("T12", "L1"): 1 - PREVALENCE["T13"],
            ("L5", "L6"): PREVALENCE["L6"],
        }
        return special.get((a, b), float(COLUMN[b] == COLUMN[a] + 1))

    over = sum(next_one(upper, level) * next_one(level, lower) for level in COLUMN)
    return (1 - missed) * next_one(upper, lower) + missed * over


def brute_force(table, complete, gaps):
    """All downward sequences with their log weights."""
    n = len(table)
    mixed = np.log(0.95 * np.exp(table) + 0.05 / 26) * np.where(complete, 1.0, 0.5)[:, None]
    missed = np.clip(1 / (1 + np.exp(-13.8 * (np.asarray(gaps) - 1.5))), 0.001, 0.999)
    levels, found = list(COLUMN), {}
    for path in combinations(range(26), n):
        steps = [step_weight(levels[a], levels[b], missed[i]) for i, (a, b) in enumerate(pairwise(path))]
        if all(steps):
            start = PREVALENCE.get(levels[path[0]], 1.0)
            found[path] = np.log(start) + np.log(steps).sum() + mixed[range(n), path].sum()
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6), st.floats(0.3, 6.0))
def test_names_and_confidence_equal_brute_force(n, seed, spread):
    rng = np.random.default_rng(seed)
    table = log_softmax(rng.normal(0, spread, (n, 26)), axis=1)
    complete, gaps = rng.random(n) > 0.3, rng.uniform(0.8, 2.2, n - 1)
    expected = brute_force(table, complete, gaps)
    total = logsumexp(list(expected.values()))
    best = max(expected, key=expected.get)
    naming = name_levels(table, complete, gaps)
    assert naming.labels.tolist() == [LEVEL_ORDER[i] for i in best]
    assert naming.log_probability == pytest.approx(expected[best] - total, abs=1e-9)
    posteriors = np.zeros((n, 26))
    for path, weight in expected.items():
        posteriors[range(n), path] += np.exp(weight - total)
    np.testing.assert_allclose(level_posteriors(table, complete, gaps), posteriors, atol=1e-10)
    np.testing.assert_allclose(naming.level_confidence, posteriors[range(n), best], atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 26), st.integers(0, 10**6))
def test_labels_always_go_down_the_column(n, seed):
    rng = np.random.default_rng(seed)
    naming = name_levels(rng.normal(0, 5, (n, 26)), rng.random(n) > 0.5, rng.uniform(0, 3, n - 1))
    assert (np.diff([LEVEL_ORDER.index(label) for label in naming.labels]) > 0).all()
    assert naming.log_probability <= 0
    assert ((naming.level_confidence > 0) & (naming.level_confidence <= 1 + 1e-12)).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(3, 24), st.sampled_from([0.7, 0.9, 1.0]))
def test_one_wrong_score_shifts_no_other_level(data, n, sure):
    first = data.draw(st.integers(0, 24 - n))
    truth, which = ORDINARY[first : first + n], data.draw(st.integers(0, n - 1))
    table = scores(*truth, sure=sure)
    table[which] = scores(data.draw(st.sampled_from(list(COLUMN))), sure=sure)[0]
    found = names(name_levels(table))
    assert [*found[:which], *found[which + 1 :]] == [*truth[:which], *truth[which + 1 :]]
    if found != truth:  # at an end a mistake may read as a variant, and nothing below or above it speaks against
        assert which in (0, n - 1)
        assert {truth[which], found[which]} in ({"T11", "T12"}, {"T12", "T13"}, {"T12", "L1"}, {"T13", "L1"})


def test_whole_ordinary_spine_passes_over_t13():
    naming = name_levels(scores(*ORDINARY))
    assert naming.labels.tolist() == list(range(1, 25))
    assert naming.flags == ()
    assert naming.level_confidence.min() > 0.999


@pytest.mark.parametrize(
    ("levels", "flags"),
    [
        ([*between("T8", "T12"), "T13", "L1", "L2"], ("T13 present",)),
        ([*between("T12", "L5"), "L6"], ("L6 present",)),
        ([*between("T8", "T11"), *between("L1", "L4")], ("T12 absent",)),
        (between("T8", "L4"), ()),
        (list(COLUMN), ("T13 present", "L6 present")),
    ],
)
def test_variants_are_named_and_told(levels, flags):
    naming = name_levels(scores(*levels))
    assert (names(naming), naming.flags) == (levels, flags)


def test_a_weak_hint_does_not_make_a_variant():
    levels = between("T9", "L3")
    table = scores(*levels)
    table[4] = scores("T13", sure=0.5)[0]  # the vertebra below T12
    table[4, COLUMN["L1"]] = np.log(0.3)
    assert names(name_levels(table)) == levels


def test_a_long_gap_makes_a_missed_vertebra():
    levels = ["T5", "T6", "T8", "T9"]
    unclear = scores(*levels, sure=0.1)
    assert names(name_levels(unclear)) != levels
    naming = name_levels(unclear, gaps=[1.0, 2.0, 1.0])
    assert names(naming) == levels
    assert naming.flags[0] == "a vertebra between T6 and T8 was not found"


def test_between_t11_and_l1_the_gap_tells_absent_from_missed():
    table = scores("T10", "T11", "L1", "L2")
    assert name_levels(table, gaps=[1, 1, 1]).flags == ("T12 absent",)
    assert name_levels(table, gaps=[1, 2, 1]).flags == ("a vertebra between T11 and L1 was not found",)


def test_one_vertebra_keeps_its_best_level():
    naming = name_levels(scores("L3"))
    assert names(naming) == ["L3"]
    assert naming.level_confidence[0] == pytest.approx(np.exp(naming.log_probability))


def test_a_cut_vertebra_has_half_a_say():
    table = np.concatenate([scores("T4", sure=0.99), scores("T6", sure=0.95)])
    assert names(name_levels(table, complete=[True, False])) == ["T4", "T5"]
    assert names(name_levels(table, complete=[False, True])) == ["T5", "T6"]


def test_ties_go_to_the_upper_levels_and_are_told():
    naming = name_levels(np.zeros((5, 26)))
    assert names(naming) == ["C1", "C2", "C3", "C4", "C5"]
    assert naming.flags[0].startswith("numbering uncertain: C")


def test_scores_need_no_normalising_and_may_rule_levels_out():
    table = scores(*between("C3", "T2"))
    moved = name_levels(table + np.linspace(-50, 700, len(table))[:, None])
    np.testing.assert_allclose(moved.level_confidence, name_levels(table).level_confidence)
    table[table < table.max(axis=1, keepdims=True)] = -np.inf
    assert names(name_levels(table)) == between("C3", "T2")


def test_gap_ratios_find_the_double_step():
    steps = np.array([22.5, 25.9, 29.0, 24.8 + 28.7, 35.0, 33.1, 33.0])  # sub-verse004 without T12
    centroids = np.zeros((8, 3))
    centroids[1:, 2] = -np.cumsum(steps)
    ratios = gap_ratios(centroids)
    assert ratios[3] == pytest.approx(53.5 / 31.0, abs=0.1)
    assert np.delete(ratios, 3).max() < 1.3
    assert gap_ratios(centroids[:3]).tolist() == [1.0, 1.0]
    assert gap_ratios(centroids[:1]).shape == (0,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"log_probabilities": np.zeros((27, 26))},
        {"log_probabilities": np.zeros((0, 26))},
        {"log_probabilities": np.zeros((3, 25))},
        {"log_probabilities": np.zeros(26)},
        {"log_probabilities": np.full((2, 26), np.nan)},
        {"log_probabilities": np.full((2, 26), -np.inf)},
        {"log_probabilities": np.zeros((3, 26)), "gaps": [1.0]},
        {"log_probabilities": np.zeros((3, 26)), "gaps": [1.0, np.nan]},
        {"log_probabilities": np.zeros((3, 26)), "complete": [True]},
    ],
)
def test_unusable_scores_are_refused(arguments):
    with pytest.raises(InputError):
        name_levels(**arguments)


def test_order_is_that_of_the_column():
    assert len(LEVEL_ORDER) == 26 and len(set(LEVEL_ORDER)) == 26
    assert set(LEVEL_ORDER) == set(VERSE_LABELS.values()) - {26, 27}
    assert LEVEL_ORDER.index(28) == LEVEL_ORDER.index(19) + 1 == LEVEL_ORDER.index(20) - 1
    assert LEVEL_ORDER[-1] == 25
