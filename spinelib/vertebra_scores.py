"""Scores of labelled vertebrae: the challenge's definitions, and shape apart from numbering.

A segmentation that finds every vertebra but numbers them one level off has perfect shapes and no correct label.
Two families of columns tell this from a bad shape.

* `shape_...` : the true vertebra against the predicted instance that overlaps it best, whatever its label. The
  matching is one to one with the largest sum of Dice; pairs of Dice below 0.1 are no match.
* `dice`, `hd_mm`, `identified`, `distance_mm` : the VerSe challenge (Sekuboyina 2021), which compares equal labels.

Conventions: surfaces are voxels that touch the outside by a face, distances those between voxel centres. HD and HD95
are the larger directed maximum and 95th percentile; ASSD is the mean of the two directed means; NSD is the share of
both surfaces' voxels within 1 mm. The challenge scored at 1 mm; nothing is resampled here.

Identified means that the predicted centroid lies within 20.0 mm of the true one of its label and nearer to it than
to any other true centroid. The challenge's code looks for the nearest among labels found in both lists only, which
is more lenient where vertebrae are missing.

What is missing: a true vertebra without a match is `missed` and has shape_dice and shape_nsd 0; one whose label was
not predicted has dice 0 and is not identified. Their distances do not exist and are NaN, never a penalty: read them
beside the number missed. A predicted instance without a match is `extra`. Sacrum and coccyx (26, 27) are not scored.
"""

import numpy as np
import pandas as pd
from jaxtyping import Int
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from spinelib.errors import InputError
from spinelib.levels import LEVEL_OF_LABEL, VERSE_LABELS, region
from spinelib.metrics import bootstrap_ci, surface_errors

NSD_TOLERANCE_MM = 1.0
IDENTIFICATION_MM = 20.0
REGIONS = ("cervical", "thoracic", "lumbar")

Labels = Int[np.ndarray, "*grid"]

_LEAST_DICE = 0.1  # an instance that overlaps less is another thing
_UNSCORED = (VERSE_LABELS["S1"], VERSE_LABELS["Co"])
_HIGHEST = max(VERSE_LABELS.values())
_T13_POSITION = VERSE_LABELS["T12"] + 0.5
_DISTANCES = ("shape_hd_mm", "shape_hd95_mm", "shape_assd_mm")
_COLUMNS = {
    "outcome": str,
    "level": str,
    "region": str,
    "label": "Int64",
    "predicted_label": "Int64",
    "shape_dice": float,
    **dict.fromkeys(_DISTANCES, float),
    "shape_nsd": float,
    "label_correct": "boolean",
    "label_shift": "Int64",
    "dice": float,
    "hd_mm": float,
    "identified": "boolean",
    "distance_mm": float,
}
_BY_SCAN = ("fov", "anatomy")  # columns that say what a scan shows
_MEASURES = {
    "id_rate": "identified",
    "loc_mm": "distance_mm",
    "dice": "dice",
    "hd_mm": "hd_mm",
    **{name: name for name in ("shape_dice", *_DISTANCES, "shape_nsd")},
}


def score_scan(
    predicted: Labels, truth: Labels, spacing_mm, predicted_centroids_mm: dict, true_centroids_mm: dict
) -> pd.DataFrame:
    """Return one row per true vertebra, top to bottom, then one per extra predicted instance.

    Parameters
    ----------
    predicted, truth : ndarray of int, one shape
        VerSe labels, 0 outside. Vertebrae that the border cuts are to be left out of both.
    spacing_mm : float or sequence of float
        Voxel size along each axis.
    predicted_centroids_mm, true_centroids_mm : dict of int to array_like (3,)
        Centres of vertebral bodies by label, in one world frame. Points of labels that the masks lack are
        ignored; a true vertebra without a point has no `identified`.

    Returns
    -------
    DataFrame
        outcome : 'matched', 'missed' or 'extra';
        level, region, label : of the true vertebra; extra rows have the level of the prediction and no label;
        predicted_label : of the matched or extra instance;
        shape_dice, shape_hd_mm, shape_hd95_mm, shape_assd_mm, shape_nsd : of the matched instance;
        label_correct, label_shift : of matched ones; the shift counts levels downwards, see `label_shift`;
        dice, hd_mm, identified, distance_mm : of equal labels.

    Raises
    ------
    InputError
        If shapes or labels do not fit or the truth holds no vertebra.
    """
    predicted, truth = _checked(predicted, truth)
    overlap = _dice_table(predicted, truth)
    matches = _matches(overlap)
    identification = _identification(
        {label: point for label, point in predicted_centroids_mm.items() if label in overlap.columns},
        {label: point for label, point in true_centroids_mm.items() if label in overlap.index},
    )
    surfaces = _Surfaces(predicted, truth, spacing_mm)
    rows = [
        _label_scores(label, matches.get(label))
        | _shape_scores(label, matches.get(label), overlap, surfaces)
        | _challenge_scores(label, overlap, surfaces)
        | identification.get(label, {})
        for label in overlap.index
    ]
    rows += [_extra(label) for label in overlap.columns if label not in matches.values()]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)


def label_shift(predicted: int, true: int) -> int:
    """Return by how many levels a predicted label lies below (positive) or above the true one.

    T13 counts as a level only where it is one of the two: from T12 to L1 is one step, and so is T12 to T13.
    """
    difference = _position(predicted) - _position(true)
    return int(np.copysign(np.ceil(abs(difference)), difference))


def summarise_scans(frames, n: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Return means over many scans with 95 % bootstrap intervals over scans.

    Parameters
    ----------
    frames : iterable of DataFrame
        One per scan, from `score_scan`. If all have a column 'fov' (field of view) or 'anatomy', the scores are given
        for each of its values too.
    n, seed
        See `spinelib.metrics.bootstrap_ci`.

    Returns
    -------
    DataFrame
        by ('all', 'region', 'fov' or 'anatomy'), group, metric, n, mean, ci_low, ci_high.

        id_rate, loc_mm, dice, hd_mm and the shape scores are means over the vertebrae (n) of all scans that have
        the value; scans are drawn whole, since vertebrae of one scan are not independent. label_shift_rate is the
        share of scans (n: those with a matched vertebra) in which any matched vertebra has a wrong label;
        missed and extra are means per scan (n), so that n times the mean is the count.
    """
    frames = list(frames)
    if not frames:
        message = "no scans to summarise. Give at least one table made by score_scan."
        raise InputError(message)
    table = pd.concat([frame.assign(scan=i) for i, frame in enumerate(frames)], ignore_index=True)
    groups = [("all", "all", table)]
    groups += [("region", name, part) for name in REGIONS if len(part := table[table["region"] == name])]
    for column in _BY_SCAN:
        if all(column in frame for frame in frames):
            groups += [(column, name, part) for name, part in table.groupby(column)]
    rows = [{"by": by, "group": name} | row for by, name, part in groups for row in _group_rows(part, n, seed)]
    return pd.DataFrame(rows)


class _Surfaces:
    """Surface errors of pairs of labels, in their joint bounding box, each computed once."""

    def __init__(self, predicted, truth, spacing_mm):
        self.volumes = predicted, truth
        self.boxes = [ndimage.find_objects(volume, _HIGHEST) for volume in self.volumes]
        self.spacing_mm, self.known = spacing_mm, {}

    def errors(self, predicted_label, true_label):
        pair = predicted_label, true_label
        if pair not in self.known:
            boxes = [boxes[label - 1] for boxes, label in zip(self.boxes, pair, strict=True)]
            joint = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*boxes, strict=True))
            masks = [volume[joint] == label for volume, label in zip(self.volumes, pair, strict=True)]
            self.known[pair] = surface_errors(*masks, self.spacing_mm, NSD_TOLERANCE_MM)
        return self.known[pair]


def _dice_table(predicted, truth):
    """Return Dice of every true (rows) and predicted label (columns), both in the order of the column."""
    inside, base = (truth > 0) | (predicted > 0), _HIGHEST + 1
    pairs = truth[inside] * np.intp(base) + predicted[inside]
    counts = np.bincount(pairs, minlength=base**2).reshape(base, base)
    true_sizes, predicted_sizes = counts.sum(axis=1), counts.sum(axis=0)
    true_labels, predicted_labels = (_scored(sizes) for sizes in (true_sizes, predicted_sizes))
    shared = counts[np.ix_(true_labels, predicted_labels)]
    sizes = true_sizes[true_labels][:, None] + predicted_sizes[predicted_labels]
    return pd.DataFrame(2 * shared / sizes, index=true_labels, columns=predicted_labels)


def _scored(sizes):
    return sorted((int(label) for label in np.flatnonzero(sizes) if label != 0), key=_position)


def _matches(overlap):
    """Return the predicted label of each matched true label."""
    dice = np.where(overlap >= _LEAST_DICE, overlap, 0.0)
    pairs = zip(*linear_sum_assignment(dice, maximize=True), strict=True)
    return {overlap.index[i]: overlap.columns[j] for i, j in pairs if dice[i, j] > 0}


def _label_scores(label, match):
    row = {"level": LEVEL_OF_LABEL[label], "region": region(LEVEL_OF_LABEL[label]), "label": label}
    if match is None:
        return row | {"outcome": "missed"}
    shift = label_shift(match, label)
    return row | {"outcome": "matched", "predicted_label": match, "label_correct": shift == 0, "label_shift": shift}


def _shape_scores(label, match, overlap, surfaces):
    if match is None:
        return {"shape_dice": 0.0, "shape_nsd": 0.0}
    errors = surfaces.errors(match, label)
    return {
        "shape_dice": overlap.loc[label, match],
        "shape_hd_mm": errors["hd_mm"],
        "shape_hd95_mm": errors["hd95_mm"],
        "shape_assd_mm": errors["assd_of_means_mm"],
        "shape_nsd": errors["nsd"],
    }


def _challenge_scores(label, overlap, surfaces):
    if label not in overlap.columns:
        return {"dice": 0.0}
    return {"dice": overlap.loc[label, label], "hd_mm": surfaces.errors(label, label)["hd_mm"]}


def _identification(predicted, truth):
    """Return identified and distance_mm of every true label."""
    labels = list(truth)
    points = np.array([truth[label] for label in labels], float).reshape(-1, 3)
    found = {}
    for i, label in enumerate(labels):
        distances = np.linalg.norm(points - np.asarray(predicted.get(label, np.full(3, np.nan)), float), axis=1)
        near = distances[i] <= min(IDENTIFICATION_MM, distances.min())
        found[label] = {"identified": bool(near), "distance_mm": float(distances[i])}
    return found


def _extra(label):
    level = LEVEL_OF_LABEL[label]
    return {"outcome": "extra", "level": level, "region": region(level), "predicted_label": label}


def _position(label):
    return _T13_POSITION if label == VERSE_LABELS["T13"] else label


def _group_rows(table, n, seed):
    """Yield one row per metric of a group of vertebrae."""
    for metric, column in _MEASURES.items():
        values = table[column].astype(float).dropna().groupby(table["scan"])
        yield {"metric": metric} | _pooled(values.sum().to_numpy(), values.count().to_numpy(), n, seed)
    matched = table[table["outcome"] == "matched"]
    per_scan = {
        "label_shift_rate": (matched["label_shift"] != 0).groupby(matched["scan"]).any(),
        "missed": (table["outcome"] == "missed").groupby(table["scan"]).sum(),
        "extra": (table["outcome"] == "extra").groupby(table["scan"]).sum(),
    }
    for metric, values in per_scan.items():
        interval = bootstrap_ci(values.astype(float), n, seed) if len(values) else (np.nan,) * 3
        yield {"metric": metric, "n": len(values)} | dict(zip(("mean", "ci_low", "ci_high"), interval, strict=True))


def _pooled(sums, counts, n, seed):
    """Return the mean over vertebrae and its percentile interval when whole scans are drawn."""
    if not counts.size:
        return {"n": 0} | dict.fromkeys(("mean", "ci_low", "ci_high"), np.nan)
    low, high = np.nan, np.nan
    if counts.size > 1:
        draws = np.random.default_rng(seed).integers(0, counts.size, (n, counts.size))
        low, high = np.quantile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [0.025, 0.975])
    return {"n": int(counts.sum()), "mean": sums.sum() / counts.sum(), "ci_low": low, "ci_high": high}


def _checked(predicted, truth):
    """Return both as uint8 without sacrum and coccyx, cut to the box that holds any label."""
    predicted, truth = (_as_labels(volume, name) for volume, name in ((predicted, "predicted"), (truth, "true")))
    if predicted.shape != truth.shape:
        message = f"expected two masks of one shape, given {predicted.shape} and {truth.shape}. Resample one first."
        raise InputError(message)
    if not truth.any():
        message = "the true mask holds no vertebra (labels 1-25 or 28), so there is nothing to score."
        raise InputError(message)
    (box,) = ndimage.find_objects(((predicted > 0) | (truth > 0)).view(np.uint8))
    return predicted[box], truth[box]


def _as_labels(volume, name):
    volume = np.asarray(volume)
    if not np.issubdtype(volume.dtype, np.integer) or volume.min() < 0 or volume.max() > _HIGHEST:
        message = (
            f"expected whole VerSe labels 0-{_HIGHEST} in the {name} mask, given {volume.dtype} from "
            f"{volume.min()} to {volume.max()}."
        )
        raise InputError(message)
    return np.where(np.isin(volume, _UNSCORED), 0, volume).astype(np.uint8)
