"""Scores of vertebrae from two radiographs, beside baselines, the ceiling and published results.

Masks are compared on the cube of `imaging.radiograph_pairs`, 64^3 voxels of 1.5 mm. Means are over subjects (of the
mean over their vertebrae) with 95 % bootstrap intervals over subjects: vertebrae of one person are not independent.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from nibabel.affines import apply_affine
from scipy import ndimage
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.radiograph_pairs import CUBE, CUBE_MM, LABELS, BiplanarSubject, cube_affine
from spinelib.levels import LEVEL_OF_LABEL
from spinelib.metrics import dice, interval_columns, surface_errors
from spinelib.models.biplanar_data import BiplanarDataset
from spinelib.models.lifting import LiftingNet
from spinelib.stacking import FOREGROUND, joined
from spinelib.standing_errors import Masks, stacked_vertebrae, true_masks

NSD_TOLERANCE_MM = 1.5
MEASURES = ("dice", "hd_mm", "hd95_mm", "asd_mm", "nsd", "body_dice", "process_dice", "level_accuracy")

NAMES = {
    "sagittal_only": "sagittal view only",
    "outer_product": "outer-product fusion",
    "transvert": "TransVert",
    "attention": "TransVert + self-attention",
    "attention_adv": "TransVert + self-attention + adversarial",
    "ours": "ours, lifting along the rays",
    "this_run": "trained in this run",
    "fine_tuned": "ours, fine-tuned on the other scans",
    "voi_none": "no annotation",
    "voi_c2v": "centroid",
    "voi_b2v": "body mask",
    "voi_v2v": "vertebra mask",
    "baseline_mean_shape": "mean shape of the level",
    "baseline_adjacent": "adjacent vertebra",
    "baseline_dilated": "truth, one voxel thicker",
    "ceiling": "truth, stacked and cut out again",
}
"""Rows of the tables: names in metrics.json, and for people."""

_AT_ONCE = 4  # vertebrae a network sees at once

Answer = tuple[Masks, Masks, Int[np.ndarray, " n"] | None]
"""Predicted and true masks of the vertebrae of a subject, on the same cubes, and level indices in `LABELS`, if any."""

Method = Callable[[BiplanarSubject], Answer]


def evaluate_subjects(methods: Mapping[str, Method], subjects: Iterable[BiplanarSubject]) -> pd.DataFrame:
    """Return one row per method and vertebra: method, subject, level, then the columns of `score_vertebra`.

    Raises
    ------
    InputError
        Without a subject.
    """
    rows = []
    for subject in tqdm(subjects, desc="subjects", disable=None):
        bodies = [body_region(subject, number) for number in range(len(subject.labels))]
        for name, method in methods.items():
            predicted, truth, levels = method(subject)
            for number, label in enumerate(subject.labels):
                row = {"method": name, "subject": subject.key, "level": LEVEL_OF_LABEL[label]}
                row |= score_vertebra(predicted[number], truth[number], bodies[number])
                known = levels is not None
                rows.append(row | {"level_accuracy": float(LABELS[levels[number]] == label) if known else np.nan})
    if not rows:
        message = "no subject to evaluate; expected at least one BiplanarSubject."
        raise InputError(message)
    return pd.DataFrame(rows)


def score_vertebra(
    predicted: Bool[np.ndarray, "64 64 64"], truth: Bool[np.ndarray, "64 64 64"], body: Bool[np.ndarray, "64 64 64"]
) -> dict[str, float]:
    """Return the scores of one vertebra.

    Parameters
    ----------
    predicted, truth : ndarray of bool
        On voxels of `CUBE_MM`.
    body : ndarray of bool
        Where the vertebral body is, see `body_region`.

    Returns
    -------
    dict of str to float
        dice; hd_mm, hd95_mm, asd_mm (mean over both surfaces), nsd (share of both surfaces within 1.5 mm);
        body_dice and process_dice, inside and outside `body`. If nothing was predicted the distances do not exist and
        are NaN, never a penalty, while dice and nsd are 0; so are the parts that the truth lacks.
    """
    surface = surface_errors(predicted, truth, CUBE_MM, NSD_TOLERANCE_MM)
    distances = {name: surface[f"{'assd' if name == 'asd' else name}_mm"] for name in ("hd", "hd95", "asd")}
    parts = {"body": body, "process": ~body}
    return (
        {"dice": dice(predicted, truth), "nsd": surface["nsd"]}
        | {f"{name}_mm": value if np.isfinite(value) else np.nan for name, value in distances.items()}
        | {f"{n}_dice": dice(predicted & p, truth & p) if (truth & p).any() else np.nan for n, p in parts.items()}
    )


def body_region(subject: BiplanarSubject, number: int) -> Bool[np.ndarray, "64 64 64"]:
    """Return the voxels of a vertebra's cube that the lateral view shows in front of or behind its body's shadow.

    Pedicles and processes lie behind the body there, whatever its tilt; tips of transverse processes may be seen
    through it.
    """
    places = apply_affine(cube_affine(subject.bodies_mm[number]), np.moveaxis(np.indices((CUBE,) * 3), 0, -1))
    rows, cols = np.moveaxis(np.rint(subject.beams[1].project(places)).astype(int), -1, 0)
    shape, first = subject.beams[1].shape, (min(0, rows.min()), min(0, cols.min()))
    size = 1 + max(*shape, rows.max() - first[0], cols.max() - first[1])
    return subject.shadows["body"][1].cut(number, first, size)[rows - first[0], cols - first[1]]


# --- methods ---


def network_method(network: nn.Module, click_mm: float = 0.0, crop_mm: float = 0.0, seed: int = 0) -> Method:
    """Return a network as a method.

    Parameters
    ----------
    network : Module
        With `annotation` and `predict(batch) -> (mask share, level index)`, see `models.biplanar`.
    click_mm, crop_mm, seed
        See `models.biplanar_data.BiplanarDataset`; the clicks are as far off as `click_mm` says.
    """

    def method(subject):
        dataset = BiplanarDataset([subject], network.annotation, seed=seed, click_mm=click_mm, crop_mm=crop_mm)
        shares, levels, targets = [], [], []
        network.eval()
        device = next(network.parameters()).device
        for batch in DataLoader(dataset, _AT_ONCE):
            share, level = network.predict({key: value.to(device) for key, value in batch.items()})
            shares.append(share.float().cpu().numpy() >= FOREGROUND)
            levels.append(level.cpu().numpy())
            targets.append(batch["target"][:, 0].numpy() > 0)
        return np.concatenate(shares), np.concatenate(targets), np.concatenate(levels)

    return method


def mean_shape_method(train: Sequence[BiplanarSubject]) -> Method:
    """Return the baseline that answers with the mean shape of the true level among other people.

    A voxel belongs to it if it does in half of them. A level that none of them has gets the mean of all vertebrae.
    """
    sums, counts = {}, {}
    for subject in train:
        for label, mask in zip(subject.labels, true_masks(subject), strict=True):
            sums[label] = sums.get(label, 0) + mask.astype(np.float32)
            counts[label] = counts.get(label, 0) + 1
    means = {label: total / counts[label] >= FOREGROUND for label, total in sums.items()}
    overall = sum(sums.values()) / sum(counts.values()) >= FOREGROUND

    def method(subject):
        return np.stack([means.get(label, overall) for label in subject.labels]), true_masks(subject), None

    return method


def adjacent_method(subject: BiplanarSubject) -> Answer:
    """Return the baseline that answers with the same person's next vertebra below, above at the lower end."""
    truth = true_masks(subject)
    if len(truth) < 2:
        return np.zeros_like(truth), truth, None
    return np.concatenate([truth[1:], truth[-2:-1]]), truth, None


def dilated_method(subject: BiplanarSubject) -> Answer:
    """Return the truth grown by the voxels that touch it by a face: what a Dice of 0.83 looks like."""
    truth = true_masks(subject)
    return np.stack([ndimage.binary_dilation(mask) for mask in truth]), truth, None


def ceiling_method(subject: BiplanarSubject) -> Answer:
    """Return the truth put together to a spine and cut out again: the most that stacked vertebrae can reach."""
    truth = true_masks(subject)
    together, _ = joined(stacked_vertebrae(subject, truth, subject.bodies_mm))
    return (
        np.stack([_cut(together, *pair) for pair in zip(subject.labels, subject.bodies_mm, strict=True)]),
        truth,
        None,
    )


def predicted_frames(network: LiftingNet, subject: BiplanarSubject) -> Float[np.ndarray, "n 3 3"]:
    """Return the frames that the network's own head reads, columns right, anterior, superior."""
    batches = DataLoader(BiplanarDataset([subject], network.annotation), _AT_ONCE)
    return np.concatenate([network.predict_frames(batch).cpu().numpy() for batch in batches])


# --- tables ---


def table_rows(scores: pd.DataFrame, data: str = "unseen phantoms") -> pd.DataFrame:
    """Return one row a method of `evaluate_subjects`.

    Returns
    -------
    DataFrame
        method, name, kind ('ours' or 'baseline'), data, subjects, vertebrae, empty (vertebrae of which nothing was
        predicted), and of each of `MEASURES` the mean, `<measure>_low` and `<measure>_high`.
    """
    rows = []
    for method, part in scores.groupby("method", sort=False):
        kind = "baseline" if method.startswith("baseline") or method == "ceiling" else "ours"
        row = {"method": method, "name": NAMES.get(method, method), "kind": kind, "data": data}
        row |= {"subjects": part["subject"].nunique(), "vertebrae": len(part), "empty": int(part["hd_mm"].isna().sum())}
        for measure in MEASURES:
            row |= interval_columns(measure, part.groupby("subject")[measure].mean())
        rows.append(row)
    return pd.DataFrame(rows)


def published_rows() -> pd.DataFrame:
    """Return published results with their sources, in the columns of `table_rows`: other data, not comparable."""
    with files("spinelib").joinpath("published_radiographs.csv").open() as file:
        return pd.read_csv(file).assign(kind="published")


def headline_numbers(rows: pd.DataFrame) -> dict[str, float]:
    """Return the numbers of `table_rows` by the names of metrics.json; what is unknown is left out."""
    values = {}
    for row in rows.to_dict("records"):
        stem = f"transvert.{row['method']}"
        values |= {f"{stem}.{name}.mean": float(row[name]) for name in ("dice", "hd_mm", "asd_mm")}
        values[f"{stem}.level_accuracy"] = float(row["level_accuracy"])
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _cut(labels: Volume, label, body_mm) -> Bool[np.ndarray, "64 64 64"]:
    """Return a label of a spine on the cube around a body centre."""
    matrix = np.linalg.inv(labels.affine) @ cube_affine(body_mm)
    share = (labels.values == label).astype(np.float32)
    return ndimage.affine_transform(share, matrix[:3, :3], matrix[:3, 3], (CUBE,) * 3, order=1) >= FOREGROUND
