"""Scores of CT/MR registrations, beside simple methods, classical peers, the ceiling and published results.

Means are over pairs (of the mean over their vertebrae) with 95 % bootstrap intervals over pairs. Soft tissue is what
is neither bone nor air where the true motion is known.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from time import perf_counter

import numpy as np
import pandas as pd
import torch
from nibabel.affines import apply_affine
from tqdm.auto import tqdm

from spinelib.deformation import DisplacementField, covers, warp_volume
from spinelib.errors import InputError
from spinelib.geometry import VolumeGrid
from spinelib.imaging.pairs import RegistrationPair
from spinelib.metrics import interval_columns
from spinelib.models.ctmr import VARIANTS, CTMRModel, integrate
from spinelib.models.ctmr_data import working_pair
from spinelib.models.ctmr_pair import solve_velocity
from spinelib.polyrigid import blend, register_polyrigid
from spinelib.prealign import affine_prealign, per_vertebra_rigid
from spinelib.registration_metrics import field_errors, registration_errors
from spinelib.train import fastest_device

NAMES = {
    "identity": "no registration",
    "affine": "one rigid motion for all",
    "sitk_pervertebra": "rigid motion of each vertebra, SimpleITK",
    "elastix": "B-spline with a rigidity penalty, elastix",
    "baseline": "published objective, no rigidity",
    "pc": "published objective, volume",
    "oc": "published objective, orthonormality",
    "rd": "published objective, rigid Dice",
    "rf": "published objective, rigid field",
    "pc_oc": "published objective, volume + orthonormality",
    "pc_rd": "published objective, volume + rigid Dice",
    "pc_rf": "published objective, volume + rigid field",
    "this_run": "network trained in this run",
    "ours": "ours, rigid by construction",
    "ours_soft": "ours, soft tissue by volume + rigid Dice",
    "ceiling": "true motion",
}
"""Rows of the tables: names in metrics.json, and for people."""

VERTEBRA_MEASURES = {
    "dice": "dice.mean",
    "hd95_mm": "hd95_mm",
    "bone_tre_mm": "bone_tre_mm",
    "rotation_error_deg": "rotation_error_deg",
    "translation_error_mm": "translation_error_mm",
    "nonrigidity": "nonrigidity",
    "volume_change_pct": "volume_change_pct",
}
FIELD_MEASURES = ("soft_tre_mm", "folding_pct", "inverse_consistency_mm", "seconds")
MEASURES = (*VERTEBRA_MEASURES, "failed", *FIELD_MEASURES)

FAILURE_MM = 3.0
"""A vertebra whose bone is off by more has failed."""

LARGE_MM, WHOLE_SHARE = 4.0, 0.95
"""What `difficulty_rows` calls a large motion, and a vertebra that is whole in the MR."""

_AIR_HU = -300.0
_SAME = 0.005  # of the labelled voxels of a pair: rounding differs between machines

Answer = tuple[DisplacementField, DisplacementField | None]
"""MR to CT on the MR's grid, and CT to MR on the CT's grid where the method gives it."""

Method = Callable[[RegistrationPair], Answer]


def evaluate_pairs(
    methods: Mapping[str, Method], pairs: Iterable[RegistrationPair]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per method and vertebra, and one row per method and pair.

    Parameters
    ----------
    methods : mapping of str to callable
    pairs : iterable of RegistrationPair
        With MR labels. What needs the true motion is NaN without it.

    Returns
    -------
    vertebrae : DataFrame
        method, pair, the columns of `registration_errors`, failed (bone off by more than `FAILURE_MM`).
    fields : DataFrame
        method, pair, seconds of wall time, the numbers of `field_errors`.

    Raises
    ------
    InputError
        Without a pair, or if a pair has no MR labels.
    """
    vertebrae, fields = [], []
    for pair in tqdm(pairs, desc="pairs", disable=None):
        if pair.mr_labels is None:
            message = f"{pair.key} has no MR labels to score with. Fix: add mr_mask.nii.gz, or leave the pair out."
            raise InputError(message)
        valid, soft = _regions(pair)
        for name, method in methods.items():
            start = perf_counter()
            forward, backward = method(pair)
            about = {"method": name, "pair": pair.key, "seconds": perf_counter() - start}
            table = registration_errors(forward, pair.mr_labels, pair.ct_labels, pair.field, pair.transforms)
            off = table["bone_tre_mm"]
            table["failed"] = (off > FAILURE_MM).astype(float).where(off.notna())
            vertebrae.append(table.assign(method=name, pair=pair.key))
            fields.append(about | field_errors(forward, valid, soft, pair.field, backward))
    if not vertebrae:
        message = "no pair to evaluate; expected at least one RegistrationPair."
        raise InputError(message)
    return pd.concat(vertebrae, ignore_index=True), pd.DataFrame(fields)


# --- methods ---


def identity_method(pair: RegistrationPair) -> Answer:
    """Leave everything where it is."""
    return DisplacementField.zero(pair.mr.grid), DisplacementField.zero(pair.ct.grid)


def affine_method(pair: RegistrationPair) -> Answer:
    """Return one rigid motion for the whole image, found by mutual information."""
    matrix = affine_prealign(pair.ct, pair.ct_labels, pair.mr)
    backward = DisplacementField.rigid(np.linalg.inv(matrix), pair.ct.grid)
    return DisplacementField.rigid(matrix, pair.mr.grid), backward


def sitk_method(pair: RegistrationPair) -> Answer:
    """Return the classical peer: mutual information per vertebra by SimpleITK, blended as ours is."""
    start = affine_prealign(pair.ct, pair.ct_labels, pair.mr)
    transforms = per_vertebra_rigid(pair.ct, pair.ct_labels, pair.mr, start)
    field = blend(transforms, pair.ct_labels, DisplacementField.rigid(start, pair.mr.grid), pair.mr.grid)
    return field, field.inverse(pair.ct.grid)


def ceiling_method(pair: RegistrationPair) -> Answer:
    """Return the true motion: what labels on voxels can reach."""
    if pair.field is None:
        message = f"{pair.key} has no true motion; only synthetic pairs do."
        raise InputError(message)
    return pair.field, None


def network_method(model: CTMRModel) -> Method:
    """Return a network of the published scheme as a method."""
    return lambda pair: network_fields(model, pair)


def solved_method(variant: str) -> Method:
    """Return the published objective of a variant, solved for every pair by itself; on a GPU if there is one."""
    device = fastest_device()

    def method(pair):
        tensors, grid = working_pair(pair)
        batch = {name: value[None].to(device) for name, value in tensors.items()}
        return _answer(integrate(solve_velocity(batch, variant)), grid, pair)

    return method


def polyrigid_method(soft_method: Method | None = None) -> Method:
    """Return ours; soft tissue far from bone follows another method's field if one is given."""

    def method(pair):
        soft = None if soft_method is None else soft_method(pair)[0]
        found = register_polyrigid(pair.ct, pair.ct_labels, pair.mr, soft)
        return found.field, found.inverse

    return method


@torch.no_grad()
def network_fields(model: CTMRModel, pair: RegistrationPair) -> Answer:
    """Return the fields of a network: MR to CT on the MR's grid, CT to MR on the CT's."""
    tensors, grid = working_pair(pair)
    device = next(model.parameters()).device
    batch = {name: value[None].to(device) for name, value in tensors.items()}
    return _answer(model.eval().register(batch), grid, pair)


def stored_elastix(pairs: Iterable[RegistrationPair]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return scores of elastix on synthetic test pairs, as `evaluate_pairs` does; no row for pairs it has not seen.

    They are stored, since itk-elastix takes 1.6 GB: `tests/benchmarks/registration_elastix.py` makes the file.
    """
    stored = json.loads(files("spinelib").joinpath("registration_elastix.json").read_text(encoding="utf8"))
    sizes = {pair.key: int(np.count_nonzero(pair.ct_labels.values)) for pair in pairs}
    known = [key for key, size in stored["label_voxels"].items() if abs(sizes.get(key, 0) - size) <= _SAME * size]
    tables = (pd.DataFrame(stored[name]) for name in ("vertebrae", "fields"))
    return tuple(table[table["pair"].isin(known)] for table in tables)


# --- tables ---


def table_rows(vertebrae: pd.DataFrame, fields: pd.DataFrame, data: str = "unseen phantoms") -> pd.DataFrame:
    """Return one row a method of `evaluate_pairs`.

    Returns
    -------
    DataFrame
        In the order of `NAMES`: method, name, kind ('ours', 'baseline', 'objective' or 'network'), data, pairs,
        vertebrae, and of each of `MEASURES` the mean, `<measure>_low` and `<measure>_high`.
    """
    rows = []
    for method, part in by_method(vertebrae):
        row = {"method": method, "name": NAMES.get(method, method), "kind": _kind(method), "data": data}
        row |= {"pairs": part["pair"].nunique(), "vertebrae": len(part)}
        own = fields[fields["method"] == method]
        for measure in MEASURES:
            values = own[measure] if measure in own else part.groupby("pair")[measure].mean()
            row |= interval_columns(measure, values)
        rows.append(row)
    return pd.DataFrame(rows)


def on_the_same_pairs(vertebrae: pd.DataFrame, fields: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows of both tables of `evaluate_pairs` whose pairs every method has seen: those may be compared."""
    methods = fields.groupby("pair")["method"].nunique()
    shared = methods.index[methods == fields["method"].nunique()]
    return vertebrae[vertebrae["pair"].isin(shared)], fields[fields["pair"].isin(shared)]


def by_method(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the methods in the order of `NAMES`, others last, each with its rows."""
    order = {name: place for place, name in enumerate(NAMES)}
    return sorted(rows.groupby("method", sort=False), key=lambda group: order.get(group[0], len(order)))


def difficulty_rows(vertebrae: pd.DataFrame, pairs: Iterable[RegistrationPair]) -> pd.DataFrame:
    """Return scores where registration is easy and where it is hard, of the methods that have seen every pair.

    Parameters
    ----------
    vertebrae : DataFrame
        Of `evaluate_pairs`, 'identity' among its methods.
    pairs : iterable of RegistrationPair
        Those with a true motion count.

    Returns
    -------
    DataFrame
        group, method, name, pairs, vertebrae, and mean and interval of 'dice', 'bone_tre_mm', 'failed'. A motion is
        large where bone is more than `LARGE_MM` off before registration, a vertebra cut where the MR shows less than
        `WHOLE_SHARE` of it.
    """
    views = [(pair.key, label, share) for pair in pairs for label, share in _shares_in_view(pair).items()]
    table = vertebrae.merge(pd.DataFrame(views, columns=["pair", "label", "in_view"]), on=["pair", "label"])
    start = table[table["method"] == "identity"].set_index(["pair", "label"])["bone_tre_mm"].rename("start_mm")
    table = table.join(start, on=["pair", "label"])
    seen = table.groupby("method")["pair"].transform("nunique") == table["pair"].nunique()
    groups = {
        "small motion": table["start_mm"] <= LARGE_MM,
        "large motion": table["start_mm"] > LARGE_MM,
        "whole in the MR": table["in_view"] >= WHOLE_SHARE,
        "cut by the MR's border": table["in_view"] < WHOLE_SHARE,
    }
    rows = []
    for group, inside in groups.items():
        for method, part in by_method(table[seen & inside]):
            row = {"group": group, "method": method, "name": NAMES.get(method, method)}
            row |= {"pairs": part["pair"].nunique(), "vertebrae": len(part)}
            for measure in ("dice", "bone_tre_mm", "failed"):
                row |= interval_columns(measure, part.groupby("pair")[measure].mean())
            rows.append(row)
    return pd.DataFrame(rows)


def published_rows() -> pd.DataFrame:
    """Return published results with their sources, in the columns of `table_rows`: other data, not comparable."""
    with files("spinelib").joinpath("published_registration.csv").open() as file:
        return pd.read_csv(file).assign(kind="published")


def headline_numbers(rows: pd.DataFrame) -> dict[str, float]:
    """Return the numbers of `table_rows` by the names of metrics.json; what is unknown is left out."""
    names = VERTEBRA_MEASURES | {name: name for name in FIELD_MEASURES}
    values = {
        f"ctmr.{row['method']}.{name}": float(row[measure])
        for row in rows.to_dict("records")
        for measure, name in names.items()
    }
    return {name: value for name, value in values.items() if np.isfinite(value)}


def _kind(method):
    if method in ("ours", "ours_soft"):
        return "ours"
    if method in VARIANTS:
        return "objective"
    return "network" if method == "this_run" else "baseline"


def _shares_in_view(pair) -> dict[int, float]:
    """Return the share of each vertebra of the CT that lies in the MR, by the true motion; nothing without it."""
    shares = {}
    for label, transform in (pair.transforms or {}).items():
        points = apply_affine(pair.ct_labels.affine, np.argwhere(pair.ct_labels.values == label))
        shares[label] = float(covers(pair.mr.grid, apply_affine(np.linalg.inv(transform), points)).mean())
    return shares


def _regions(pair):
    """Return where the CT shows what the MR shows, and where that is soft tissue; None without the true motion."""
    if pair.field is None:
        return None, None
    valid = covers(pair.ct.grid, pair.field.points_mm() + pair.field.values)
    body = warp_volume(pair.ct, pair.field, fill=-1000.0).values > _AIR_HU
    return valid, valid & body & (pair.mr_labels.values == 0)


def _answer(fields, grid: VolumeGrid, pair) -> Answer:
    """Return fields (1, 3, R, A, S) in voxels of the working grid in mm, on the grids of the pair."""
    values = [np.moveaxis(u[0].float().cpu().numpy(), 0, -1) @ grid.affine[:3, :3].T for u in fields]
    forward, backward = (DisplacementField(u.astype(np.float32), grid) for u in values)
    return forward.resampled(pair.mr.grid), backward.resampled(pair.ct.grid)
