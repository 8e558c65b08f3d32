"""Errors of whole standing spines: where vertebrae stand, their angles, and what a wrong list of levels looks like."""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree

from spinelib.imaging.cone_beam import stack_naively, triangulate
from spinelib.imaging.radiograph_pairs import CUBE, CUBE_MM, LABELS, BiplanarSubject
from spinelib.levels import LEVEL_OF_LABEL
from spinelib.spine import Spine
from spinelib.stacking import PredictedVertebra, vertebral_angles, vertebral_pose

Masks = Bool[np.ndarray, "n 64 64 64"]
"""Vertebrae of a subject on their cubes."""


def true_masks(subject: BiplanarSubject) -> Masks:
    """Return the vertebrae of a subject on their cubes."""
    return np.stack([subject.masks.cut(number, (0, 0, 0), CUBE) for number in range(len(subject.labels))])


def stacked_vertebrae(subject: BiplanarSubject, masks, centres_mm) -> list[PredictedVertebra]:
    """Return masks (n, 64, 64, 64) of a subject with their levels at centres (n, 3), world mm, for `stacking.stack`."""
    levels = [LEVEL_OF_LABEL[label] for label in subject.labels]
    return [PredictedVertebra(*one) for one in zip(levels, centres_mm, masks.astype(np.float32), strict=True)]


def centre_errors(subject: BiplanarSubject, noise_mm: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Return how far body centres from their two projections are off.

    Parameters
    ----------
    subject : BiplanarSubject
    noise_mm : float
        Standard deviation of the points in each view along rows and columns, in mm at the isocentre.
    seed : int

    Returns
    -------
    DataFrame
        subject, level, height_mm (from the isocentre), naive_mm, triangulated_mm, residual_mm (of the latter).
    """
    points = np.stack([beam.project(subject.bodies_mm) for beam in subject.beams])
    noise_px = noise_mm / CUBE_MM  # a pixel of the detector is as large as a voxel at the isocentre
    points += noise_px * np.random.default_rng(seed).standard_normal(points.shape)
    naive = stack_naively(*subject.beams, *points)
    found, residual = triangulate(subject.beams, points)
    return pd.DataFrame(
        {
            "subject": subject.key,
            "level": [LEVEL_OF_LABEL[label] for label in subject.labels],
            "height_mm": subject.bodies_mm[:, 2] - subject.beams[0].principal_mm[2],
            "naive_mm": np.linalg.norm(naive - subject.bodies_mm, axis=1),
            "triangulated_mm": np.linalg.norm(found - subject.bodies_mm, axis=1),
            "residual_mm": residual,
        }
    )


def angle_errors(
    subject: BiplanarSubject,
    predicted: Masks,
    bodies_mm: Float[np.ndarray, "n 3"] | None = None,
    frames: Float[np.ndarray, "n 3 3"] | None = None,
) -> dict:
    """Return the absolute errors of angles of a spine put together from predicted vertebrae.

    Parameters
    ----------
    subject : BiplanarSubject
        Its frames are the truth; without frames, those fitted to the true shapes.
    predicted : ndarray of bool (n, 64, 64, 64)
    bodies_mm : ndarray (n, 3), optional
        Body centres that were found; the true ones by default.
    frames : ndarray (n, 3, 3), optional
        Frames that were found, see `predicted_frames`; those fitted to the predicted shapes by default.

    Returns
    -------
    dict
        subject, n (vertebrae with a shape; the others are left out), cobb_deg, avr_deg (mean over levels), kyphosis_deg
        and lordosis_deg (NaN without their levels): see `stacking.vertebral_angles`.
    """
    centres = subject.bodies_mm if bodies_mm is None else bodies_mm
    there = np.flatnonzero(predicted.any(axis=(1, 2, 3)))
    errors = {"subject": subject.key, "n": len(there)}
    names = {"cobb_deg": "cobb", "kyphosis_deg": "kyphosis", "lordosis_deg": "lordosis"}
    if not len(there):
        return errors | dict.fromkeys([*names, "avr_deg"], np.nan)
    levels = [LEVEL_OF_LABEL[subject.labels[i]] for i in there]
    if frames is None:
        poses = _poses(stacked_vertebrae(subject, predicted, centres), there)
    else:
        poses = _framed(frames, centres)[there]
    found = vertebral_angles(levels, poses)
    truth = vertebral_angles(levels, _true_poses(subject)[there])
    off = {name: abs(found[name] - truth[name]) for name in found}
    errors["avr_deg"] = float(np.mean([off[f"rotation_{level}_deg"] for level in levels]))
    return errors | {name: off.get(f"vertebral_{angle}_deg", np.nan) for name, angle in names.items()}


def level_disagreement(subject: BiplanarSubject, levels: Int[np.ndarray, " n"]) -> dict:
    """Return the share of vertebrae that a network takes for another level than a list of points says.

    Parameters
    ----------
    subject : BiplanarSubject
    levels : ndarray of int (n,)
        Indices in `LABELS` that the network reads.

    Returns
    -------
    dict
        subject, right_list (the true levels), shifted_list (each one named a level too low): `spinelib predict` warns
        above one half.
    """
    truth = np.array([LABELS.index(label) for label in subject.labels])
    off = {"right_list": levels != truth, "shifted_list": levels != np.minimum(truth + 1, len(LABELS) - 1)}
    return {"subject": subject.key} | {name: float(wrong.mean()) for name, wrong in off.items()}


def surface_distances(predicted: Spine, truth: Spine) -> dict[str, Float[np.ndarray, " vertices"]]:
    """Return the distance in mm of each vertex of a spine to the nearest vertex of the same level of another.

    Levels that one of them lacks are left out. `vertebra_figures.vertebrae_3d` colours surfaces by it.
    """
    true_meshes = dict(zip(truth.levels, truth.meshes, strict=True))
    return {
        level: cKDTree(true_meshes[level].vertices).query(mesh.vertices)[0]
        for level, mesh in zip(predicted.levels, predicted.meshes, strict=True)
        if level in true_meshes
    }


def spine_numbers(centres: pd.DataFrame, angles: pd.DataFrame) -> dict[str, float]:
    """Return the errors of whole spines by the names of metrics.json.

    Parameters
    ----------
    centres : DataFrame
        Rows of `centre_errors` of all subjects.
    angles : DataFrame
        One row of `angle_errors` a subject.
    """
    return {
        "spine.stack_naive_mm": float(centres["naive_mm"].mean()),
        "spine.stack_triangulated_mm": float(centres["triangulated_mm"].mean()),
        "spine.cobb_mae_deg": float(angles["cobb_deg"].mean()),
        "spine.avr_mae_deg": float(angles["avr_deg"].mean()),
    }


def _poses(vertebrae, places) -> Float[np.ndarray, "n 4 4"]:
    return np.stack([vertebral_pose(vertebrae[place]) for place in places])


def _true_poses(subject) -> Float[np.ndarray, "n 4 4"]:
    if subject.frames is None:
        return _poses(stacked_vertebrae(subject, true_masks(subject), subject.bodies_mm), range(len(subject.labels)))
    return _framed(subject.frames, subject.bodies_mm)


def _framed(frames, places) -> Float[np.ndarray, "n 4 4"]:
    poses = np.tile(np.eye(4), (len(frames), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = frames, places
    return poses
