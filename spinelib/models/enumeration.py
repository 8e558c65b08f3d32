"""Names for all vertebrae of a scan at once, from what a network says of each.

A network that names one vertebra at a time confuses neighbours, and one mistake must not shift the numbers of all
others. Here the labels are the most probable path (Viterbi) of a Markov chain that only goes down the column:
from each level to the next, or over one vertebra that was not found. T13 and L6 stand in the order but are passed
over in the ordinary spine; entering them, or leaving out T12, costs the logarithm of their prevalence. The field of
view may begin and end anywhere at no cost, so a sacralised L5 (a column that ends at L4) costs nothing either: an
image cut off below L4 looks the same from here.

Each vertebra's probabilities are mixed with a uniform share first, which bounds the say of any one of them.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, logsumexp

from spinelib.errors import InputError
from spinelib.levels import LEVEL_OF_LABEL, LEVEL_ORDER

PREVALENCE = {"T13": 0.02, "L6": 0.04, "no T12": 0.01}
"""Shares of people with each variant, rounded.

L6 4.0 % and lumbar ribs 1.5 % of 551 whole-spine CTs (doi:10.1007/s00256-025-04952-z); one mobile vertebra more in
4.3 %, one less in 3.3 % of 418 whole-spine MRIs without transitional ones (Tins & Balain 2016,
doi:10.1007/s13244-016-0468-7). Eleven thoracic vertebrae were seen on 5.8 % of 293 radiographs
(doi:10.1186/s13018-018-0835-9); the share depends on which short ribs count, and 1 % is a cautious choice.
"""

_CONFUSION = 0.05  # share of scores that say nothing about the level
_CUT_WEIGHT = 0.5  # the score of a vertebra that the border cuts rests on a part of it
_MISSED_BOUNDS = (0.001, 0.999)  # probability that a step passes over one vertebra; the first if gaps are not known
_MISSED_SLOPE = 13.8  # logit per unit of gap: reaches the bounds at 1 and at 2 times the usual distance
_LEAST_SURE = 0.5


@dataclass(frozen=True, eq=False)
class Naming:
    """Labels of n consecutive vertebrae, top to bottom.

    Attributes
    ----------
    labels : ndarray of int, shape (n,)
        VerSe labels, strictly downwards in LEVEL_ORDER.
    level_confidence : ndarray, shape (n,)
        Posterior probability of each label, see `level_posteriors`.
    log_probability : float
        Logarithm of the posterior probability of this sequence among all sequences.
    flags : tuple of str
        Variants, missed vertebrae and doubtful numbering, for the reader of the result.
    """

    labels: Int[np.ndarray, " n"]
    level_confidence: Float[np.ndarray, " n"]
    log_probability: float
    flags: tuple[str, ...]


def name_levels(log_probabilities, complete=None, gaps=None) -> Naming:
    """Return the most probable labels of consecutive vertebrae.

    Parameters
    ----------
    log_probabilities : array_like, shape (n, 26)
        One row per vertebra from top to bottom, columns as LEVEL_ORDER. Rows need not be normalised; -inf is
        allowed.
    complete : array_like of bool, shape (n,), optional
        False where the border of the image cuts the vertebra: its scores count half. All whole by default.
    gaps : array_like, shape (n - 1,), optional
        Distance of consecutive centroids over the usual one, see `gap_ratios`. About 2 makes a missed vertebra
        likely; without gaps it is unlikely everywhere (0.1 %).

    Returns
    -------
    Naming
        Of equally probable sequences the one that ends, then continues upwards, nearest to C1.

    Raises
    ------
    InputError
        If shapes do not fit, a row holds NaN or nothing but -inf, or there are more than 26 vertebrae.
    """
    evidence, steps = _lattice(log_probabilities, complete, gaps)
    states, score = _best_path(evidence, steps)
    forward, backward = _messages(evidence, steps)
    posteriors = _normalised(forward + backward)
    confidence = np.exp(posteriors[np.arange(len(states)), states])
    log_probability = min(float(score - logsumexp(forward[-1])), 0.0)
    labels = np.array(LEVEL_ORDER)[states]
    flags = (*_variants(states, gaps), *_doubts(labels, confidence))
    return Naming(labels, confidence, log_probability, flags)


def level_posteriors(log_probabilities, complete=None, gaps=None) -> Float[np.ndarray, "n 26"]:
    """Return the probability of every level for each vertebra given all of them (forward-backward).

    Parameters and errors as for `name_levels`; rows sum to one.
    """
    forward, backward = _messages(*_lattice(log_probabilities, complete, gaps))
    return np.exp(_normalised(forward + backward))


def gap_ratios(centroids_mm) -> Float[np.ndarray, " n-1"]:
    """Return each distance of consecutive centroids over the median of its four nearest neighbours.

    Parameters
    ----------
    centroids_mm : array_like, shape (n, 3)
        Top to bottom. With fewer than four centroids no distance is known to be usual and all ratios are one.
    """
    distances = np.linalg.norm(np.diff(np.asarray(centroids_mm, float), axis=0), axis=1)
    if len(distances) < 3:
        return np.ones(len(distances))
    return np.array([distance / np.median(_neighbours(distances, i)) for i, distance in enumerate(distances)])


def _neighbours(distances, i):
    others = np.delete(np.arange(len(distances)), i)
    return distances[others[np.argsort(np.abs(others - i), kind="stable")[:4]]]


def _lattice(log_probabilities, complete, gaps):
    """Return log weights of levels (n, 26), the first with its prior, and of steps (n - 1, 26, 26)."""
    scores = _checked_scores(log_probabilities)
    complete = _checked_row(complete, len(scores), True, bool, "complete")
    missed = _missed_probability(gaps, len(scores))
    evidence = np.log((1 - _CONFUSION) * np.exp(_normalised(scores)) + _CONFUSION / len(LEVEL_ORDER))
    evidence *= np.where(complete, 1.0, _CUT_WEIGHT)[:, None]
    evidence[0] += [np.log(PREVALENCE.get(LEVEL_OF_LABEL[label], 1.0)) for label in LEVEL_ORDER]
    single = _single_steps()
    weights = (1 - missed) * single + missed * (single @ single)
    with np.errstate(divide="ignore"):
        return evidence, np.log(weights)


def _single_steps():
    """Return the weight of each step (from, to) to the next vertebra of the column."""
    at = {LEVEL_OF_LABEL[label]: i for i, label in enumerate(LEVEL_ORDER)}
    weights = np.eye(len(LEVEL_ORDER), k=1)
    weights[at["T11"], [at["T12"], at["L1"]]] = 1 - PREVALENCE["no T12"], PREVALENCE["no T12"]
    weights[at["T12"], [at["T13"], at["L1"]]] = PREVALENCE["T13"], 1 - PREVALENCE["T13"]
    weights[at["L5"], at["L6"]] = PREVALENCE["L6"]
    return weights


def _missed_probability(gaps, n):
    """Return the probability (n - 1, 1, 1) that a step passes over a vertebra."""
    ratios = _checked_row(gaps, n - 1, 1.0, float, "gaps")
    return np.clip(expit(_MISSED_SLOPE * (ratios - 1.5)), *_MISSED_BOUNDS)[:, None, None]


def _best_path(evidence, steps):
    best, sources = evidence[0], []
    for scores, step in zip(evidence[1:], steps, strict=True):
        reached = best[:, None] + step
        sources.append(reached.argmax(axis=0))
        best = reached.max(axis=0) + scores
    path = [int(best.argmax())]
    for source in reversed(sources):
        path.append(int(source[path[-1]]))
    return np.array(path[::-1]), best.max()


def _messages(evidence, steps):
    forward, backward = evidence.copy(), np.zeros_like(evidence)
    for i, step in enumerate(steps):
        forward[i + 1] += logsumexp(forward[i][:, None] + step, axis=0)
    for i in reversed(range(len(steps))):
        backward[i] = logsumexp(steps[i] + evidence[i + 1] + backward[i + 1], axis=1)
    return forward, backward


def _normalised(log_weights):
    return log_weights - logsumexp(log_weights, axis=1, keepdims=True)


def _variants(states, gaps):
    names = [LEVEL_OF_LABEL[LEVEL_ORDER[state]] for state in states]
    single, missed = _single_steps(), _missed_probability(gaps, len(states)).ravel()
    flags = [f"{variant} present" for variant in ("T13", "L6") if variant in names]
    for i, (upper, lower) in enumerate(zip(states[:-1], states[1:], strict=True)):
        # From T11 to L1 either T12 was missed or it does not exist; the more probable cause is told.
        skipped = missed[i] * (single @ single)[upper, lower] > (1 - missed[i]) * single[upper, lower]
        if skipped:
            flags.append(f"a vertebra between {names[i]} and {names[i + 1]} was not found")
        elif (names[i], names[i + 1]) == ("T11", "L1"):
            flags.append("T12 absent")
    return flags


def _doubts(labels, confidence):
    worst = int(np.argmin(confidence))
    if confidence[worst] >= _LEAST_SURE:
        return []
    return [f"numbering uncertain: {LEVEL_OF_LABEL[int(labels[worst])]} has probability {confidence[worst]:.2f}"]


def _checked_scores(log_probabilities):
    scores = np.asarray(log_probabilities, float)
    if scores.ndim != 2 or scores.shape[1] != len(LEVEL_ORDER) or not 1 <= len(scores) <= len(LEVEL_ORDER):
        message = (
            f"expected log-probabilities of 1 to {len(LEVEL_ORDER)} vertebrae by {len(LEVEL_ORDER)} levels "
            f"(LEVEL_ORDER), given shape {scores.shape}. Join or drop instances that are no vertebrae."
        )
        raise InputError(message)
    largest = scores.max(axis=1)
    if not np.isfinite(largest).all():
        message = f"log-probabilities of vertebra {int(np.argmin(np.isfinite(largest)))} hold NaN, +inf or only -inf."
        raise InputError(message)
    return scores


def _checked_row(values, n, default, kind, name):
    row = np.full(n, default) if values is None else np.asarray(values)
    if row.shape != (n,) or not np.isfinite(row).all():
        message = f"expected {n} finite values of '{name}', given shape {row.shape}."
        raise InputError(message)
    return row.astype(kind)
