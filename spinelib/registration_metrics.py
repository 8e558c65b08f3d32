"""Errors of a CT/MR registration: overlap, pose, rigidity of each vertebra, and the field as a whole.

Rigidity is measured so that a rigid motion scores exactly 0: derivatives only where the whole stencil lies in bone, at
the image's border one-sided, everything in world mm. The measures that compare labels have a ceiling, since voxels
are coarse: pass the true field as the field to know it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool
from nibabel.affines import apply_affine
from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation

from spinelib.deformation import DisplacementField, covers, rigid_fit, rotation_deg, warp_labels
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.levels import LEVEL_OF_LABEL, LEVEL_ORDER
from spinelib.metrics import hd95_mm

COLUMNS = (
    "label",
    "level",
    "dice",
    "hd95_mm",
    "rotation_error_deg",
    "translation_error_mm",
    "procrustes_residual_mm",
    "nonrigidity",
    "volume_change_pct",
    "local_volume_change_pct",
    "bone_tre_mm",
)

DIRECTIONS = ("right", "anterior", "superior")

_LEAST_DETERMINANT = 1e-9  # folds have no logarithm

Mask = Bool[np.ndarray, "right anterior superior"]


def pose_table(transforms: Mapping[int, np.ndarray], ct_labels: Volume) -> pd.DataFrame:
    """Return what rigid motions from MR to CT do to each vertebra, in the order given.

    Returns
    -------
    DataFrame
        label, level; rotation_<direction>_deg: components of the rotation vector (its direction is the axis, its length
        the angle; for small angles the turns about the axes in any order) along right, anterior and superior;
        translation_<direction>_mm: way of the point that goes to the centroid of the CT label.
    """
    rows = []
    for label, matrix in transforms.items():
        centre = apply_affine(ct_labels.affine, np.argwhere(ct_labels.values == label).mean(axis=0))
        turn = Rotation.from_matrix(np.asarray(matrix)[:3, :3]).as_rotvec(degrees=True)
        way = centre - apply_affine(np.linalg.inv(matrix), centre)
        row = {"label": label, "level": LEVEL_OF_LABEL[label]}
        row |= {f"rotation_{name}_deg": value for name, value in zip(DIRECTIONS, turn, strict=True)}
        rows.append(row | {f"translation_{name}_mm": value for name, value in zip(DIRECTIONS, way, strict=True)})
    return pd.DataFrame(rows)


def registration_errors(
    field: DisplacementField,
    mr_labels: Volume,
    ct_labels: Volume,
    truth: DisplacementField | None = None,
    transforms: dict[int, np.ndarray] | None = None,
) -> pd.DataFrame:
    """Return one row per vertebra, C1 to L6, that both label images show, cranial to caudal.

    Parameters
    ----------
    field : DisplacementField
        MR to CT, on the grid of `mr_labels`.
    mr_labels, ct_labels : Volume
        VerSe labels, each on the grid of its image; sacrum, coccyx and other labels are not scored.
    truth : DisplacementField, optional
        True field, on any grid that covers the MR image.
    transforms : dict of int to ndarray (4, 4), optional
        True rigid motion MR -> CT of each label. A label without one takes the rigid fit of `truth`.

    Returns
    -------
    DataFrame
        label, level;
        dice, hd95_mm : of the warped CT label (`warp_labels`) against the MR label. A vertebra that the field
        carries out of sight has dice 0 and no distance;
        rotation_error_deg : angle between the true rotation and that of the rigid fit of the field over the vertebra;
        translation_error_mm : between true and fitted position of the vertebra's centroid;
        procrustes_residual_mm : root mean square distance of the field from its rigid fit, over the vertebra;
        nonrigidity : mean |J^T J - I| per entry, over the eroded vertebra;
        volume_change_pct : 100 |1 / mean det J - 1| over the eroded vertebra, the change of the volume of the warped
        vertebra against the CT's, which is what comparing the volumes of labels estimates;
        local_volume_change_pct : 100 mean |det J - 1| over the eroded vertebra: swelling here and shrinking there do
        not cancel;
        bone_tre_mm : mean distance between found and true CT point, over the vertebra.
        NaN where the truth is not given or a vertebra is too small for a measure.

    Raises
    ------
    InputError
        If the field does not live on the grid of `mr_labels`.
    """
    _check_grid(field, mr_labels.grid)
    warped, jacobian = warp_labels(ct_labels, field).values, field.jacobian()
    shown = set(np.unique(mr_labels.values)) & set(np.unique(ct_labels.values))
    rows = []
    for label in (label for label in LEVEL_ORDER if label in shown):
        mask = mr_labels.values == label
        motion = _Motion.of(field, mask)
        known = _known(motion.x_mm, truth, (transforms or {}).get(label))
        rows.append(
            {"label": label, "level": LEVEL_OF_LABEL[label]}
            | _overlap(warped == label, mask, mr_labels.spacing_mm)
            | _pose_errors(motion, known)
            | _rigidity(jacobian[eroded(mask)])
            | {"bone_tre_mm": _mean(np.linalg.norm(motion.y_mm - known.field_mm, axis=-1))}
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def field_errors(
    field: DisplacementField,
    valid: Mask | None = None,
    soft: Mask | None = None,
    truth: DisplacementField | None = None,
    backward: DisplacementField | None = None,
) -> dict[str, float]:
    """Return the measures of the field as a whole; NaN for what the arguments do not allow.

    Parameters
    ----------
    field : DisplacementField
        MR to CT.
    valid : ndarray of bool, shape of the field's grid, optional
        Where the MR image was acquired; everywhere by default.
    soft : ndarray of bool, same shape, optional
        Body without bone.
    truth : DisplacementField, optional
        True field, on any grid that covers the MR image.
    backward : DisplacementField, optional
        CT to MR as the method itself gives it, on the CT's grid.

    Returns
    -------
    dict of str to float
        soft_tre_mm : mean distance between found and true CT point, over `soft`;
        folding_pct : share of the valid voxels with det J <= 0;
        sd_log_jacobian : standard deviation of log det J over the valid voxels;
        inverse_consistency_mm : mean |psi(phi(x)) - x| over the valid voxels that phi keeps within the backward grid.
    """
    for name, mask in (("valid", valid), ("soft", soft)):
        if mask is not None and (np.shape(mask) != field.grid.shape or np.asarray(mask).dtype != bool):
            message = f"{name} must be a mask of bool of the field's shape {field.grid.shape}, given {np.shape(mask)}."
            raise InputError(message)
    valid = np.ones(field.grid.shape, bool) if valid is None else valid
    determinant = np.linalg.det(field.jacobian()[valid])
    logarithm = np.log(np.maximum(determinant, _LEAST_DETERMINANT))
    return {
        "soft_tre_mm": float("nan") if soft is None or truth is None else _tre_mm(field, truth, soft),
        "folding_pct": 100 * _mean(determinant <= 0),
        "sd_log_jacobian": float(logarithm.std()) if logarithm.size else float("nan"),
        "inverse_consistency_mm": float("nan") if backward is None else _inconsistency_mm(field, backward, valid),
    }


def eroded(mask: Mask) -> Mask:
    """Return the voxels whose face neighbours within the image all belong to the mask.

    There every stencil of `DisplacementField.jacobian` lies in the mask, also the one-sided stencil at the border.
    """
    return binary_erosion(mask, border_value=1)


# --- one vertebra ---


@dataclass(frozen=True)
class _Motion:
    """Voxels of a vertebra in the MR (n, 3), where the field takes them, and the rigid fit; None if undetermined."""

    x_mm: np.ndarray
    y_mm: np.ndarray
    matrix: np.ndarray | None

    @classmethod
    def of(cls, field, mask):
        x = _points(field, mask)
        y = x + field.values[mask]
        return cls(x, y, _fit(x, y))


@dataclass(frozen=True)
class _Known:
    """True CT points (n, 3) of a vertebra's voxels, NaN where unknown, and the true motion or None."""

    field_mm: np.ndarray
    matrix: np.ndarray | None


def _known(x_mm, truth, matrix) -> _Known:
    if truth is not None:
        points = truth.moved(x_mm)
        return _Known(points, _fit(x_mm, points) if matrix is None else np.asarray(matrix, float))
    if matrix is not None:
        return _Known(apply_affine(matrix, x_mm), np.asarray(matrix, float))
    return _Known(np.full_like(x_mm, np.nan), None)


def _fit(x_mm, y_mm):
    try:
        return rigid_fit(x_mm, y_mm)
    except InputError:  # a few voxels on one line
        return None


def _overlap(warped, mask, spacing_mm):
    # Not metrics.dice: it imports MONAI, which takes longer than all that is measured here.
    dice = 2 * np.count_nonzero(warped & mask) / (np.count_nonzero(warped) + np.count_nonzero(mask))
    return {"dice": dice, "hd95_mm": hd95_mm(warped, mask, spacing_mm) if warped.any() else float("nan")}


def _pose_errors(motion, known):
    errors = dict.fromkeys(("rotation_error_deg", "translation_error_mm", "procrustes_residual_mm"), float("nan"))
    if motion.matrix is None:
        return errors
    residual = apply_affine(motion.matrix, motion.x_mm) - motion.y_mm
    errors["procrustes_residual_mm"] = float(np.sqrt((residual**2).sum(axis=-1).mean()))
    if known.matrix is not None:
        centroid = motion.x_mm.mean(axis=0)
        offset = apply_affine(motion.matrix, centroid) - apply_affine(known.matrix, centroid)
        errors["rotation_error_deg"] = rotation_deg(motion.matrix[:3, :3] @ known.matrix[:3, :3].T)
        errors["translation_error_mm"] = float(np.linalg.norm(offset))
    return errors


def _rigidity(jacobian):
    """Return the rigidity measures of Jacobians (n, 3, 3)."""
    strain = np.swapaxes(jacobian, -1, -2) @ jacobian - np.eye(3)
    determinant = np.linalg.det(jacobian)
    mean = _mean(determinant)
    return {
        "nonrigidity": _mean(np.abs(strain)),
        "volume_change_pct": 100 * abs(1 / mean - 1) if mean > 0 else float("nan"),
        "local_volume_change_pct": 100 * _mean(np.abs(determinant - 1)),
    }


# --- fields ---


def _tre_mm(field, truth, mask):
    return _mean(np.linalg.norm(field.values[mask] - truth.at(_points(field, mask)), axis=-1))


def _inconsistency_mm(field, backward, valid):
    x = _points(field, valid)
    y = x + field.values[valid]
    kept = covers(backward.grid, y)
    return _mean(np.linalg.norm(backward.moved(y[kept]) - x[kept], axis=-1))


def _points(field, mask):
    return apply_affine(field.grid.affine, np.argwhere(mask))


def _mean(values):
    return float(np.mean(values)) if np.size(values) else float("nan")


def _check_grid(field: DisplacementField, grid: VolumeGrid):
    if field.grid.shape != grid.shape or not np.allclose(field.grid.affine, grid.affine, atol=1e-3):
        message = (
            f"the field must live on the grid of the MR labels, {grid.shape}, given {field.grid.shape} or another "
            "affine. Fix: field.resampled(mr_labels.grid)."
        )
        raise InputError(message)
