"""Masks of vertebrae: curves of the column, the truth for anyone who has them; distances; other lattices."""

from collections.abc import Iterable

import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import affine_transform, distance_transform_edt
from scipy.ndimage import label as connected_parts

from spinelib.deformation import framed
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.spine import K_DEFAULT, Curves

BODY_RADIUS_MM = 8.0
"""Axial opening that takes away pedicles and processes and leaves the body, which is wider."""

WHOLE_SHARE, NEARBY_MM = 0.75, 30.0

_FEWEST_ROWS = 10


def curves_from_labels(labels: Volume, values: Iterable[int], k: int = K_DEFAULT) -> Curves:
    """Return the six curves of the bodies of some vertebrae, discs bridged linearly.

    In every axial slice the mask is opened by a disc of `BODY_RADIUS_MM`, in which vertebral bodies survive and
    pedicles, laminae and processes do not; the largest piece is kept. Its extreme right and anterior coordinates
    (to half a voxel) are the edges, as in a coronal and a sagittal projection. Slices that cut a plate obliquely show
    a part of a body only: those with less than `WHOLE_SHARE` of the usual area nearby count as disc.

    Parameters
    ----------
    labels : Volume
        Integers, RAS axes (as `imaging.readers.read_volume` returns).
    values : iterable of int
        Labels that belong to the column; take only vertebrae that lie whole in the volume.
    k : int
        Heights between the upper end of the uppermost and the lower end of the lowest body.

    Raises
    ------
    InputError
        If none of the labels occurs, or the grid is oblique.
    """
    mask = np.isin(np.rint(labels.values), list(values))
    if not mask.any():
        present = np.unique(np.rint(labels.values).astype(int))
        message = f"none of the labels {sorted(values)} occurs; this volume has {present.tolist()[:40]}."
        raise InputError(message)
    off_axis = labels.affine[:3, :3] - np.diag(np.diag(labels.affine[:3, :3]))
    if np.abs(off_axis).max() > 1e-3 or np.any(np.diag(labels.affine)[:3] <= 0):
        message = "labels must lie on right, anterior, superior axes; read them with imaging.readers.read_volume."
        raise InputError(message)
    right_mm, anterior_mm, superior_mm = labels.grid.axes_mm()
    rows = [(superior_mm[i], *_edges(mask[:, :, i], right_mm, anterior_mm)) for i in np.flatnonzero(mask.any((0, 1)))]
    table = np.array([row for row in rows if np.isfinite(row[1])]).reshape(-1, 6)
    table = table[_whole_sections(table)]
    if len(table) < _FEWEST_ROWS:
        message = f"only {len(table)} slices hold a body of {2 * BODY_RADIUS_MM:.0f} mm; is this a vertebra mask?"
        raise InputError(message)
    right, left, front, back = (np.interp(superior_mm, table[:, 0], column) for column in table[:, 1:5].T)
    inside = (superior_mm >= table[0, 0]) & (superior_mm <= table[-1, 0])
    heights = superior_mm[inside][::-1]
    coronal, sagittal = ((right, left), (front, back))
    everything = Curves(heights, _with_centre(coronal, inside), _with_centre(sagittal, inside))
    return everything.resample(k)


def signed_distance(labels: Volume, label: int, margin_mm: float) -> Volume:
    """Return the distance (mm) to the faces of a label's voxels, less than 0 inside.

    Parameters
    ----------
    labels : Volume
        Integers; `label` occurs.
    label : int
    margin_mm : float
        How far the box of the result reaches beyond the label, also beyond the volume, where a vertebra is cut.
    """
    mask = labels.values == label
    part = framed(Volume(mask, labels.affine), mask)
    spacing = part.spacing_mm
    margin = np.ceil(margin_mm / spacing).astype(int)
    mask = np.pad(part.values, [(m, m) for m in margin])
    affine = part.affine.copy()
    affine[:3, 3] = apply_affine(affine, -margin)
    outside, inside = (distance_transform_edt(side, sampling=spacing) for side in (~mask, mask))
    half = spacing.min() / 2
    return Volume(np.where(mask, half - inside, outside - half), affine)


def label_share(labels: Volume, label: int, box: tuple[slice, ...], affine) -> tuple[np.ndarray, np.ndarray]:
    """Return how much of a label there is at the points of another lattice, trilinear.

    Parameters
    ----------
    labels : Volume
        Integers.
    label : int
    box : (3,) of slice
        Holds the label, see `scipy.ndimage.find_objects`.
    affine : ndarray (4, 4)
        Takes indices of the lattice to the world.

    Returns
    -------
    share : ndarray (l, m, n), float32
        0 to 1, in a box of the lattice outside which it is 0.
    first : ndarray (3,) of int
        Index of the box's first point; may be negative.
    """
    to_labels = np.linalg.inv(labels.affine) @ affine
    low, high = np.array([[side.start - 1, side.stop] for side in box], float).T
    ends = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(-1, 3)
    ends = apply_affine(np.linalg.inv(to_labels), ends)
    first, last = np.floor(ends.min(axis=0)).astype(int), np.ceil(ends.max(axis=0)).astype(int)
    mask = np.pad(labels.values[box] == label, 1).astype(np.float32)
    shift = apply_affine(to_labels, first) - low
    return affine_transform(mask, to_labels[:3, :3], shift, tuple(last - first + 1), order=1), first


def _edges(section, right_mm, anterior_mm):
    """Return right, left, anterior, posterior edge and area of the body in a section; NaN where there is none."""
    spacing = (right_mm[1] - right_mm[0], anterior_mm[1] - anterior_mm[0])
    core = distance_transform_edt(section, sampling=spacing) > BODY_RADIUS_MM
    if not core.any():
        return (np.nan,) * 5
    body = distance_transform_edt(~_largest(core), sampling=spacing) <= BODY_RADIUS_MM
    rights, anteriors = (np.flatnonzero(body.any(axis)) for axis in (1, 0))
    half = np.multiply(spacing, 0.5)
    return (
        right_mm[rights[-1]] + half[0],
        right_mm[rights[0]] - half[0],
        anterior_mm[anteriors[-1]] + half[1],
        anterior_mm[anteriors[0]] - half[1],
        float(body.sum()),
    )


def _whole_sections(table):
    """Return which rows (superior, edges, area) show a whole body."""
    near = np.abs(table[:, :1] - table[:, 0]) <= NEARBY_MM
    usual = np.array([np.percentile(table[rows, 5], 75) for rows in near])
    return table[:, 5] >= WHOLE_SHARE * usual


def _largest(mask):
    pieces, count = connected_parts(mask)
    return pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:]) if count > 1 else mask


def _with_centre(edges, inside):
    first, last = (edge[inside][::-1] for edge in edges)
    return np.stack([first, (first + last) / 2, last])
