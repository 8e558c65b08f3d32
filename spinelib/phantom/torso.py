"""Soft tissue of the trunk, neck, head and arms, and the assembly of a subject's whole anatomy.

Soft tissue is a stack of layers from the innermost (gas, blood) to the skin. Each takes its share of what the
layers above it left, so the tissue fractions of a point never add to more than one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spinelib.levels import VERSE_LABELS
from spinelib.phantom.column import column_elements
from spinelib.phantom.landmarks import SIDES, Landmarks, find_landmarks
from spinelib.phantom.organs import Layer, hull_distance, organs, solid
from spinelib.phantom.population import Subject, mirrored
from spinelib.phantom.sacrum import subject_sacrum
from spinelib.phantom.skeleton import arm_joints, bones
from spinelib.phantom.solids import Piece, Points, Structure, chain, ellipsoid
from spinelib.phantom.vertebra import VertebraShape, vertebra_sdf

TISSUES = ("lung", "adipose", "muscle", "organ", "blood", "disc", "marrow", "canal")
"""Tissues whose path lengths and fractions the renderer returns, in the order of their channels."""

_CORTEX_MM = {"C": 0.85, "T": 0.85, "L": 1.1, "S": 1.0}
"""Shell thickness of vertebrae by region."""
_CHUNK = 16384
"""Points per call of the vertebra distance: its temporaries (parts x points) stay in the processor cache."""


@dataclass(frozen=True)
class Anatomy:
    """A subject ready to be sampled, in the frame of the unmirrored person.

    Attributes
    ----------
    layers : tuple of Layer
        Innermost first.
    bones : tuple of Structure
        Mineralised structures: vertebrae, sacrum and the rest of the skeleton.
    inlays : tuple of Structure
        Soft structures rendered as finely as bone: discs, spinal canal, costal cartilage.
    bone_density : float
        Factor on all mineral.
    is_mirrored : bool
        Whether the right-left coordinate must be negated before sampling.
    """

    layers: tuple[Layer, ...]
    bones: tuple[Structure, ...]
    inlays: tuple[Structure, ...]
    bone_density: float
    is_mirrored: bool


def build_anatomy(subject: Subject, shapes: tuple[VertebraShape, ...]) -> Anatomy:
    """Assemble spine, skeleton and soft tissue of a subject whose vertebrae are `shapes`.

    A mirrored subject is assembled as the person before mirroring, so that heart, liver and gas change side.
    """
    is_mirrored = subject.is_mirrored
    if is_mirrored:
        subject, shapes = mirrored(subject), tuple(shape.mirrored() for shape in shapes)
    marks = find_landmarks(subject)
    skeleton = bones(marks)
    spine = [_vertebra(shape, pose) for shape, pose in zip(shapes, subject.poses, strict=True)]
    hard = [part for part in skeleton if part.tissue == "marrow"]
    soft = [part for part in skeleton if part.tissue != "marrow"]
    spine.append(_vertebra(subject_sacrum(subject), subject.sacrum_pose))
    layers = (*organs(marks), *_limbs(marks), *_body(marks))
    inlays = (*_discs(subject, shapes), *soft, _canal(marks))
    return Anatomy(layers, (*spine, *hard), inlays, subject.bone_density, is_mirrored)


def _limbs(marks: Landmarks) -> list[Layer]:
    """Arms: muscle core, then fat to the skin. Both reach the shoulder."""
    k, fat, inner, outer = marks.scale, 0.45 * marks.fat_mm, [], []
    bulk = (marks.subject.bmi / 26.0) ** 0.6 * (0.92 if marks.female else 1.0) * k
    for index in (0, 1):
        shoulder, elbow, wrist, knuckles = arm_joints(marks, index)
        present = marks.subject.arms[index]
        base = marks.levels["C7"][:3, 3] + np.array([SIDES[index] * 34.0 * k, 0, -6.0])
        girdle = np.array([34.0, 47.0] if present else [34.0, 36.0, 24.0]) * bulk
        path = [base, shoulder] if present else [base, *_stump(marks, index)]
        inner += [solid(piece, {"muscle": 1.0}) for piece in chain(path, girdle)]
        outer += [solid(piece, {"adipose": 1.0}) for piece in chain(path, girdle + fat + 1.5)]
        if not present:
            continue
        tip = knuckles + 0.95 * (knuckles - wrist)
        joints = [shoulder, 0.5 * (shoulder + elbow), elbow, 0.7 * elbow + 0.3 * wrist, wrist, knuckles, tip]
        core = np.array([44.0, 37.0, 31.0, 34.0, 21.0, 24.0, 13.0]) * bulk
        skin = core + fat * np.array([1.0, 1.0, 0.8, 0.7, 0.4, 0.3, 0.2]) + 1.5
        inner += [solid(piece, {"muscle": 0.94, "adipose": 0.06}) for piece in chain(joints, core)]
        outer += [solid(piece, {"adipose": 0.9, "muscle": 0.1}) for piece in chain(joints, skin)]
    return [*inner, *outer]


def _stump(marks: Landmarks, index: int) -> list[np.ndarray]:
    """Return the end of the shoulder without its arm and where the skin fold below it meets the chest."""
    k, side, shoulder = marks.scale, SIDES[index], marks.shoulders_mm[index]
    height = shoulder[2] - 110.0 * k
    chest = marks.hull.middle.at(height) + side * (marks.hull.half_width.at(height) - 24.0 * k)
    return [shoulder + np.array([-side * 12.0, 0, 4.0]) * k, np.array([chest, shoulder[1], height])]


def _body(marks: Landmarks) -> list[Layer]:
    """Muscle inside the fat, breasts, then everything to the skin; thighs likewise."""
    hull, fat, k = marks.hull, marks.fat_mm, marks.scale
    reach = float(hull.half_width.values.max()) + float(hull.middle.values.abs().max())
    front = float((hull.centre.values + hull.half_depth.values).max())
    rear = float((hull.centre.values - hull.half_depth.values).min())
    box = (-reach, rear, hull.bottom_mm), (reach, front, hull.top_mm)
    lean = {"muscle": 0.93, "adipose": 0.07} if marks.subject.age_years < 50 else {"muscle": 0.88, "adipose": 0.12}
    thighs, skins = [], []
    for ball, side in zip(marks.hips_mm, SIDES, strict=True):
        girth = (marks.subject.bmi / 26.0) ** 0.6 * k
        path = np.array(
            [
                ball + np.array([side * 4, -6, -30]) * k,
                ball + np.array([side * 2, -2, -200]) * k,
                ball + np.array([-side * 4, 0, -430]) * k,
            ]
        )
        core = np.array([74.0, 69.0, 52.0]) * girth
        thighs += [solid(piece, lean) for piece in chain(path, core)]
        skins += [solid(piece, {"adipose": 1.0}) for piece in chain(path, core + fat * np.array([1.1, 0.9, 0.7]))]
    chest = [solid(piece, {"adipose": 0.85, "organ": 0.15}) for piece in _breasts(marks)]
    return [
        Layer(*box, lambda p: hull_distance(hull, p) + hull.fat(p[2]), lean),
        *thighs, *chest, Layer(*box, lambda p: hull_distance(hull, p), {"adipose": 1.0}), *skins,
    ]  # fmt: skip


def _breasts(marks: Landmarks) -> list[Piece]:
    if not marks.female:
        return []
    k, middle = marks.scale, 0.4 * marks.notch_mm + 0.6 * marks.xiphoid_mm
    size = k * (46.0 + 0.9 * marks.fat_mm) * float(np.clip(marks.rng(6).normal(1.0, 0.12), 0.75, 1.3))
    return [
        ellipsoid(middle + np.array([s * 82 * k, -6.0, -18 * k]), np.array([size, 0.62 * size, 0.95 * size]))
        for s in SIDES
    ]


def _vertebra(shape: VertebraShape, pose: np.ndarray) -> Structure:
    corners = np.stack(np.meshgrid(*shape.bounds_mm, indexing="ij"), -1).reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3]

    def distance(points: Points) -> Tensor:
        local = _local(points, pose)
        rows = local.reshape(-1, 3)
        batch = _CHUNK if rows.device.type == "cpu" else len(rows)
        parts = [vertebra_sdf(shape, part)[1] for part in rows.split(batch)]
        return torch.cat(parts).reshape(local.shape[:-1])

    piece = Piece(tuple(corners.min(0).tolist()), tuple(corners.max(0).tolist()), distance)
    cortex = _CORTEX_MM[shape.level[0]]
    return Structure(
        shape.level,
        (piece,),
        cortex_mm=cortex,
        cortical=0.9,
        trabecular=0.155,
        label=VERSE_LABELS[shape.level],
    )


def _local(points: Points, pose: np.ndarray) -> Tensor:
    """Local coordinates (..., 3), stored as three planes, of world points."""
    rotation, origin = pose[:3, :3], pose[:3, 3]
    planes = []
    for axis in range(3):
        d0, d1, d2 = rotation[:, axis].tolist()
        planes.append((points[0] * d0 + (points[1] * d1 - float(rotation[:, axis] @ origin))) + points[2] * d2)
    return torch.stack(torch.broadcast_tensors(*planes)).movedim(0, -1)


def _discs(subject: Subject, shapes) -> list[Structure]:
    """Discs reach into the plates; bone takes precedence where they overlap."""
    parts = []
    for element in column_elements(subject, shapes):
        if "-" in element.name:
            piece = Piece(*(tuple(side.tolist()) for side in element.box_mm.T), _stacked(element.distance))
            parts.append(Structure(element.name, (piece,), "disc", 0, 0, 0))
    return parts


def _stacked(distance):
    return lambda points: distance(torch.stack(torch.broadcast_tensors(*points), dim=-1))


def _canal(marks: Landmarks) -> Structure:
    """Thecal sac from C1 to the sacrum, 0.4 of the bony canal wide."""
    subject = marks.subject
    points, radii = [], []
    for i, pose in enumerate(subject.poses):
        depth, canal = subject.dims["endplate_depth_mm"][i], subject.dims["canal_depth_mm"][i]
        depth = depth if np.isfinite(depth) and subject.levels[i] != "C1" else 0.0
        points.append((pose @ [0, -depth / 2 - 0.5 * canal, 0, 1])[:3])
        radii.append(0.4 * min(canal, 18.0))
    points.append((subject.sacrum_pose @ [0, -subject.sacrum_dims["endplate_depth_mm"] / 2 - 9.0, -6.0, 1])[:3])
    return Structure("canal", chain(points, [*radii, 5.0]), "canal", 0, 0, 0)
