"""Body centres marked on a frontal and a lateral radiograph: their files, and signs that the views are mixed up.

A CSV has one row a point, a header and any order of rows::

    level,view,row,col
    T12,ap,412.0,300.5
    T12,lat,414.5,355.0

A JSON holds records like VerSe's for each view, with a level or its VerSe label::

    {"ap": [{"label": 19, "row": 412.0, "col": 300.5}], "lat": [{"label": 19, "row": 414.5, "col": 355.0}]}

Rows and columns count pixels from 0 at the centre of the upper left one, with the patient's right (ap) or anterior
(lat) on the left. DICOM images that are stored the other way round are turned first.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from spinelib.errors import InputError
from spinelib.imaging.cone_beam import ConeBeam, triangulate
from spinelib.levels import LEVEL_OF_LABEL, T1_TO_L5

VIEWS = ("ap", "lat")
COLUMNS = ("level", "view", "row", "col")

SCALE_TOLERANCE = 0.03
"""Views that differ by more in scale are doubted."""

_PROFILE_MM = np.array([0, -9, -17, -24, -30, -35, -37, -38, -38, -35, -30, -22, -12, -2, 6, 8, 0], float)
# How far bodies T1 to L5 lie before the line through the two ends: mean of 40 standing phantoms, of which each
# resembles it with a slope above 0.5 in the lateral view.
_LIKE, _UNLIKE = 0.5, 0.35
_FEWEST = 8  # points that a profile or a scale takes


@dataclass(frozen=True)
class PointPairs:
    """The same body centres in two views.

    Attributes
    ----------
    levels : tuple of str
        Cranial to caudal.
    points_rc : ndarray (2, n, 2)
        Row and column in the frontal and in the lateral view.
    """

    levels: tuple[str, ...]
    points_rc: np.ndarray


def read_point_pairs(path) -> PointPairs:
    """Read a CSV or JSON file of marked points, see the module's text.

    Raises
    ------
    InputError
        Unreadable file, missing columns, an unknown view or level, a point twice or in one view only, or a place that
        is no number.
    """
    path = Path(path)
    if not path.is_file():
        message = f"no file {path}. Fix: write one with the columns {','.join(COLUMNS)}; view is 'ap' or 'lat'."
        raise InputError(message)
    try:
        table = _json_table(path) if path.suffix.lower() == ".json" else pd.read_csv(path, dtype={"level": str})
    except (ValueError, AttributeError, TypeError) as error:
        message = f"{path} is not a readable {'JSON' if path.suffix.lower() == '.json' else 'CSV'} file ({error})."
        raise InputError(message) from error
    return _pairs(_checked(table, path), path)


def require_inside(pairs: PointPairs, beams: Sequence[ConeBeam]) -> None:
    """Refuse points outside the images of two beams."""
    outside = [
        f"{level} ({view})"
        for view, beam, points in zip(VIEWS, beams, pairs.points_rc, strict=True)
        for level, point in zip(pairs.levels, points, strict=True)
        if np.any(point < -0.5) or np.any(point > np.array(beam.shape) - 0.5)
    ]
    if outside:
        sizes = " and ".join(f"{rows} x {cols}" for rows, cols in (beam.shape for beam in beams))
        message = f"points outside the images of {sizes} pixels: {', '.join(outside)}. Fix: row and col count pixels."
        raise InputError(message)


def view_doubts(levels: Sequence[str], beams: Sequence[ConeBeam], points_rc: np.ndarray) -> list[str]:
    """Return signs that views are swapped, flipped, or not of one person at one scale.

    A lateral view shows kyphosis and lordosis: bodies off the line through the two ends, by a known profile. A frontal
    view does not tell left from right by its points; only perspective does, if the points are exact.

    Parameters
    ----------
    levels : sequence of str
    beams : two of ConeBeam
        Frontal, lateral.
    points_rc : ndarray (2, n, 2)
    """
    if len(levels) < _FEWEST:
        return []
    centres, residual = triangulate(beams, points_rc)
    frontal, lateral = (_likeness(levels, centres[:, axis], centres[:, 2]) for axis in (0, 1))
    doubts = []
    if lateral < _UNLIKE and abs(frontal) > _LIKE:
        doubts.append("the frontal view shows kyphosis and lordosis, the lateral one does not: are the views swapped?")
    elif lateral < -_UNLIKE:
        doubts.append("the thoracic spine bulges forwards in the lateral view: is it flipped? Anterior must be left")
    flipped = points_rc.copy()
    flipped[0, :, 1] = beams[0].shape[1] - 1 - flipped[0, :, 1]
    if np.mean(triangulate(beams, flipped)[1]) < 0.5 * residual.mean():
        doubts.append("perspective fits better with the frontal view flipped: the patient's right must be left")
    scale = _relative_scale(beams, points_rc, centres)
    if abs(scale - 1) > SCALE_TOLERANCE:
        doubts.append(
            f"the spine is {scale:.2f} times as long in the frontal view as in the lateral one: are both of one "
            "person, and are pixel size and distances right?"
        )
    return doubts


def _json_table(path):
    views = json.loads(path.read_text())
    rows = [record | {"view": view} for view, records in views.items() for record in records]
    table = pd.DataFrame(rows)
    if "level" not in table and "label" in table:
        table["level"] = [LEVEL_OF_LABEL.get(label, str(label)) for label in table["label"]]
    return table


def _checked(table, path):
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        message = f"{path} lacks {', '.join(missing)}; it has {', '.join(map(str, table.columns)) or 'nothing'}. "
        raise InputError(message + f"Expected {','.join(COLUMNS)}.")
    for name, allowed in (("view", VIEWS), ("level", T1_TO_L5)):
        unknown = sorted(set(table[name].astype(str)) - set(allowed))
        if unknown:
            message = f"{path}: unknown {name} {', '.join(unknown)}. Expected some of: {', '.join(allowed)}."
            raise InputError(message)
    places = table[["row", "col"]].apply(pd.to_numeric, errors="coerce").astype(float)
    if table.empty or not np.isfinite(places.to_numpy()).all():
        bad = table[~np.isfinite(places).all(axis=1)]
        where = ", ".join(f"{row.level} ({row.view})" for row in bad.itertuples()) or "no point at all"
        message = f"{path}: expected numbers for row and col, given {where}."
        raise InputError(message)
    return table.assign(row=places["row"], col=places["col"])


def _pairs(table, path):
    twice = table[table.duplicated(["level", "view"])]
    seen = {view: set(table.loc[table["view"] == view, "level"]) for view in VIEWS}
    alone = [
        f"{level} (no {view})"
        for view in VIEWS
        for level in T1_TO_L5
        if level in set.union(*seen.values()) - seen[view]
    ]
    if len(twice) or alone:
        named = [f"{row.level} in {row.view} twice" for row in twice.itertuples()] + alone
        message = (
            f"{path}: expected each level once in each view, given {', '.join(named)}. Fix: mark it, or leave it out."
        )
        raise InputError(message)
    levels = tuple(level for level in T1_TO_L5 if level in seen["ap"])
    places = table.set_index(["view", "level"])[["row", "col"]].astype(float)
    return PointPairs(levels, np.stack([places.loc[view].loc[list(levels)].to_numpy() for view in VIEWS]))


def _likeness(levels, lateral_mm, superior_mm) -> float:
    """Return the slope of the bodies' distances from the line through both ends against the typical profile."""
    places = [T1_TO_L5.index(level) for level in levels]
    ends = [places[0], places[-1]]
    typical = _PROFILE_MM[places] - np.interp(places, ends, _PROFILE_MM[ends])
    order = np.argsort(superior_mm)[[0, -1]]
    found = lateral_mm - np.interp(superior_mm, superior_mm[order], lateral_mm[order])
    return float(typical @ found / (typical @ typical))


def _relative_scale(beams, points_rc, centres) -> float:
    """Return the height of the spine in the frontal view over that in the lateral view, perspective taken out."""
    heights = []
    for beam, points in zip(beams, points_rc, strict=True):
        ray = beam.detector_mm(points) - beam.source_mm
        share = np.linalg.norm((centres - beam.source_mm)[:, :2], axis=1) / np.linalg.norm(ray[:, :2], axis=1)
        heights.append(beam.source_mm[2] + share * ray[:, 2])
    return float(np.polyfit(heights[1], heights[0], 1)[0])
