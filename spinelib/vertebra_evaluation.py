"""Scores of the CT -> vertebrae networks beside a baseline and the ceiling."""

import time
from collections.abc import Callable, Iterable
from importlib.resources import files

import numpy as np
import pandas as pd
import torch
from scipy.spatial import cKDTree
from tqdm.auto import tqdm

from spinelib.geometry import Volume
from spinelib.imaging.verse import LabelledCT, body_centroids_mm
from spinelib.levels import LEVEL_OF_LABEL, LEVEL_ORDER, VERSE_LABELS, region
from spinelib.models.scan_cache import WORKING_MM
from spinelib.models.scan_grid import resampled, sample_separably
from spinelib.models.vertebrae import VertebraSegmenter
from spinelib.vertebra_scores import score_scan, summarise_scans

BONE_HU, NEAREST_MM = 180.0, 45.0
"""The threshold baseline: what counts as bone, and how far from a body centre."""

Answer = tuple[np.ndarray, dict[int, np.ndarray]]
Method = Callable[[LabelledCT], Answer]


def evaluate_scans(methods: dict[str, Method], scans: Iterable[LabelledCT]) -> pd.DataFrame:
    """Return one row per method and vertebra: `vertebra_scores.score_scan` with method, scan, seconds, fov and anatomy.

    Truth is what VerSe would annotate: vertebrae that the border cuts are left out.

    Parameters
    ----------
    methods : dict of callables
        Each takes a scan and returns labels on its grid, and body centres in world mm by label.
    scans : iterable of LabelledCT
        Scans without a whole vertebra are passed over.
    """
    frames = []
    for scan in tqdm(scans, desc="scans", disable=None):
        truth = whole_vertebrae(scan)
        if not truth.any():
            continue
        spacing = scan.ct.spacing_mm
        for name, method in methods.items():
            start = time.perf_counter()
            labels, centroids = method(scan)
            seconds = time.perf_counter() - start
            frame = score_scan(labels, truth, spacing, centroids, scan.centroids_mm)
            shown = {"fov": field_of_view(truth), "anatomy": anatomy(scan.labels.values)}
            frames.append(frame.assign(method=name, scan=scan.key, seconds=seconds, **shown))
    return pd.concat(frames, ignore_index=True)


def whole_vertebrae(scan: LabelledCT) -> np.ndarray:
    """Return the labels of a scan without those of cut vertebrae."""
    return np.where(np.isin(scan.labels.values, list(scan.cut)), 0, scan.labels.values).astype(np.uint8)


def field_of_view(labels: np.ndarray) -> str:
    """Return the regions that a mask shows, such as 'thoracic + lumbar'."""
    present = np.unique(labels)
    return " + ".join(dict.fromkeys(region(LEVEL_OF_LABEL[label]) for label in LEVEL_ORDER if label in present))


def anatomy(labels: np.ndarray) -> str:
    """Return 'T13 or L6' if a mask shows one of them, else 'neither in view'."""
    return "T13 or L6" if np.isin(labels, [VERSE_LABELS["T13"], VERSE_LABELS["L6"]]).any() else "neither in view"


def network_method(segmenter: VertebraSegmenter, one_by_one: bool = False) -> Method:
    """Return the networks as a method; `one_by_one` as in `VertebraSegmenter.segment`."""

    def method(scan):
        result = segmenter.segment(scan.ct, one_by_one)
        return result.labels.values, {found.label: found.centroid_mm for found in result.found if found.complete}

    return method


def ceiling_method(scan: LabelledCT) -> Answer:
    """Return the truth put through the working grid and back: the most that outlines at 2 mm can reach."""
    truth = whole_vertebrae(scan)
    best, out = np.full(truth.shape, 0.5, np.float32), np.zeros_like(truth)
    for label in np.unique(truth[truth > 0]):
        mask = resampled(Volume((truth == label).astype(np.float32), scan.ct.affine), WORKING_MM).values
        places = [(np.arange(n) + 0.5) * m / n - 0.5 for n, m in zip(truth.shape, mask.shape, strict=True)]
        share = sample_separably(torch.from_numpy(mask), places).numpy()
        out[share > best] = label
        np.maximum(best, share, out=best)
    return out, scan.centroids_mm


def threshold_method(scan: LabelledCT) -> Answer:
    """Return a baseline that is given the true body centres: bone by threshold, each voxel to the nearest centre."""
    labels = np.zeros(scan.ct.values.shape, np.uint8)
    bone = np.argwhere(scan.ct.values > BONE_HU)
    world = bone @ scan.ct.affine[:3, :3].T + scan.ct.affine[:3, 3]
    centres = cKDTree(list(scan.centroids_mm.values()))
    _, nearest = centres.query(world, distance_upper_bound=NEAREST_MM)
    names = np.array([0 if label in scan.cut else label for label in scan.centroids_mm] + [0], np.uint8)
    labels[tuple(bone.T)] = names[nearest]
    return labels, body_centroids_mm(Volume(labels, scan.ct.affine))


def score_rows(scores: pd.DataFrame, n: int = 1000) -> pd.DataFrame:
    """Return `vertebra_scores.summarise_scans` of every method, with a column 'text' such as '0.912 [0.90, 0.92]'.

    Parameters
    ----------
    scores : DataFrame
        From `evaluate_scans`.
    n : int
        Bootstrap samples.
    """
    tables = []
    for method, part in scores.groupby("method", sort=False):
        scans = [frame for _, frame in part.groupby("scan", sort=False)]
        tables.append(summarise_scans(scans, n).assign(method=method))
    table = pd.concat(tables, ignore_index=True)
    table["text"] = [_with_interval(row) for row in table.itertuples()]
    return table


def headline_numbers(summary: pd.DataFrame, scores: pd.DataFrame, method: str) -> dict[str, float]:
    """Return a method's numbers by the names of metrics.json, all scans together; what is unknown is left out."""
    names = {"dice": "dice.mean", "hd_mm": "hd_mm.mean", "loc_mm": "loc_mm.mean", "shape_dice": "shape_dice.mean"}
    rows = summary[(summary["method"] == method) & (summary["group"] == "all")].set_index("metric")
    values = {f"vertebrae.{names.get(metric, metric)}": float(row["mean"]) for metric, row in rows.iterrows()}
    seconds = scores[scores["method"] == method].groupby("scan")["seconds"].first()
    values["vertebrae.seconds_per_scan"] = float(seconds.mean())
    return {name: value for name, value in values.items() if np.isfinite(value)}


def published_rows() -> pd.DataFrame:
    """Return published results on real scans with their sources: other data, not comparable with synthetic scans."""
    with files("spinelib").joinpath("published_vertebrae.csv").open() as file:
        return pd.read_csv(file)


def _with_interval(row):
    digits = 2 if row.metric.endswith("_mm") else 3
    if not np.isfinite(row.mean):
        return "-"
    if not np.isfinite(row.ci_low):
        return f"{row.mean:.{digits}f}"
    return f"{row.mean:.{digits}f} [{row.ci_low:.{digits}f}, {row.ci_high:.{digits}f}]"
