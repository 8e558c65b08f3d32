"""Small structures near the spine that only CT needs: vessels, airway, fat of the canal, lung beside the bodies.

Places and sizes are textbook anatomy (assumed), scaled by stature. All return pieces in the subject's frame.
"""

import numpy as np
import torch

from spinelib.phantom.landmarks import SIDES, Landmarks
from spinelib.phantom.organs import Cage, aorta, kidneys
from spinelib.phantom.sdf import smooth_max
from spinelib.phantom.solids import Piece, chain, ellipsoid
from spinelib.phantom.vertebra import VertebraShape

_AZYGOS_LEVELS = tuple(f"T{i}" for i in range(4, 13))


def canal_fat(marks: Landmarks) -> tuple[Piece, ...]:
    """Return the space between the thecal sac and the bone, foramina included."""
    subject = marks.subject
    depth = np.nan_to_num(subject.dims["endplate_depth_mm"], nan=0.0)
    behind = -(depth / 2 + 0.55 * subject.dims["canal_depth_mm"])
    local = np.stack([0 * behind, behind, 0 * behind, 0 * behind + 1], axis=1)
    return chain(np.einsum("nij,nj->ni", subject.poses, local)[1:, :3], 0.62 * subject.dims["canal_width_mm"][1:])


def azygos(marks: Landmarks) -> tuple[Piece, ...]:
    """Return the vein that climbs in front of the right half of the thoracic bodies."""
    subject = marks.subject
    path = _line(marks, (6.0, 0.0, 0.0), _AZYGOS_LEVELS)
    path[:, 1] += subject.dims["endplate_depth_mm"][[subject.index(v) for v in _AZYGOS_LEVELS]] / 2 + 4
    return chain(path, 3.6 * marks.scale)


def oesophagus(marks: Landmarks, radius_mm: float) -> tuple[Piece, ...]:
    """Return the gullet, or its lumen, from C6 to T10."""
    path = _line(marks, (-8.0, 26.0, 0.0), ("C6", "T1", "T3", "T5", "T7", "T9", "T10"))
    return chain(path, radius_mm * marks.scale)


def airway(marks: Landmarks) -> tuple[Piece, ...]:
    """Return the gas of the throat from the nose to C5, where the windpipe begins."""
    k = marks.scale
    top = marks.levels["C1"][:3, 3] + np.array([[0, 62, 28], [0, 30, 22]]) * k
    path = np.concatenate([top, _line(marks, (0.0, 25.0, 0.0), ("C1", "C2", "C3", "C4", "C5"))])
    return chain(path, np.array([8.0, 9.0, 7.0, 6.0, 7.0, 6.0, 6.5]) * k)


def iliac_vessels(marks: Landmarks) -> tuple[Piece, ...]:
    """Return the arteries from the end of the aorta to the groins; the veins lie in the same course here."""
    k, start = marks.scale, marks.levels["L4"][:3, 3] + np.array([-4.0, 30.0, 0.0]) * marks.scale
    pieces = []
    for side, hip in zip(SIDES, marks.hips_mm, strict=True):
        middle = 0.55 * start + 0.45 * hip + np.array([side * 6.0, 8.0, 6.0]) * k
        pieces += chain([start, middle, hip + np.array([-side * 8.0, 34.0, 22.0]) * k], np.array([7.5, 6.5, 5.5]) * k)
    return tuple(pieces)


def fat_around_kidneys(marks: Landmarks, rng: np.random.Generator) -> tuple[Piece, ...]:
    """Return the fat behind the abdominal cavity, 5 to 25 mm around each kidney and down beside the psoas."""
    pieces = []
    for side, kidney in zip(SIDES, kidneys(marks), strict=True):
        centre = (np.array(kidney.lower_mm) + kidney.upper_mm) / 2 + np.array([-side * 8.0, -2.0, -20.0]) * marks.scale
        radii = (np.array(kidney.upper_mm) - kidney.lower_mm) / 2 + rng.uniform(5, 25)
        pieces.append(ellipsoid(centre, radii + np.array([6.0, 0.0, 40.0]) * marks.scale))
    return tuple(pieces)


def neck_vessels(marks: Landmarks) -> tuple[Piece, ...]:
    """Return carotid arteries and jugular veins."""
    pieces = []
    for side in SIDES:
        for right, anterior, radius in ((22.0, 22.0, 3.6), (31.0, 19.0, 5.5)):
            levels = ("C1", "C2", "C3", "C5", "C7", "T2")
            pieces += chain(_line(marks, (side * right, anterior, 0.0), levels), radius * marks.scale)
    return tuple(pieces)


def vertebral_arteries(marks: Landmarks, shapes: tuple[VertebraShape, ...]) -> tuple[Piece, ...]:
    """Return the arteries through the transverse foramina of C6 to C1."""
    pieces = []
    for side in SIDES:
        path = []
        for shape, pose in zip(shapes[:6], marks.subject.poses[:6], strict=True):
            if shape.foramen is not None:
                right, anterior, _ = shape.foramen
                path.append((pose @ [side * right, anterior, 0.0, 1.0])[:3])
        pieces += chain(path, 1.9)
    return tuple(pieces)


def plaques(marks: Landmarks, rng: np.random.Generator) -> tuple[Piece, ...]:
    """Return 2 to 24 flat patches on the wall of the aorta."""
    vessel, spots = aorta(marks), []
    for _ in range(rng.integers(2, 25)):
        piece = vessel[rng.integers(len(vessel))]
        lower, upper = np.array(piece.lower_mm), np.array(piece.upper_mm)
        angle, height = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5) * (upper - lower)[2]
        out = np.array([np.cos(angle), np.sin(angle), 0.0])
        axes = np.stack([out, [-out[1], out[0], 0.0], [0.0, 0.0, 1.0]], axis=1)
        size = [rng.uniform(0.6, 1.6), rng.uniform(1.5, 5.0), rng.uniform(1.5, 7.0)]
        spots.append(ellipsoid((lower + upper) / 2 + 0.5 * (upper - lower).min() * out + [0, 0, height], size, axes))
    return tuple(spots)


def teeth(marks: Landmarks, rng: np.random.Generator) -> tuple[Piece, ...]:
    """Return 2 to 8 fillings and crowns of metal."""
    mouth = marks.levels["C2"][:3, 3] + np.array([0.0, 62.0, 10.0]) * marks.scale
    spots = []
    for _ in range(rng.integers(2, 9)):
        angle = rng.uniform(-1.2, 1.2)
        place = np.array([24 * np.sin(angle), 24 * np.cos(angle), rng.choice([-4.0, 5.0])]) * marks.scale
        spots.append(ellipsoid(mouth + place, rng.uniform(1.5, 4.0, 3)))
    return tuple(spots)


def disc_gas(marks: Landmarks, rng: np.random.Generator) -> tuple[Piece, ...]:
    """Return gas clefts in one to four worn discs."""
    subject, spots = marks.subject, []
    for i in rng.integers(subject.index("T8"), len(subject.levels), rng.integers(1, 5)):
        wide, deep = subject.dims["endplate_width_mm"][i], subject.dims["endplate_depth_mm"][i]
        below = -0.5 * (subject.dims["height_posterior_mm"][i] + subject.dims["disc_below_mm"][i])
        place = [rng.uniform(-0.25, 0.25) * wide, rng.uniform(-0.25, 0.25) * deep, below, 1.0]
        radii = [rng.uniform(0.1, 0.35) * wide, rng.uniform(0.1, 0.35) * deep, rng.uniform(0.8, 2.0)]
        spots.append(ellipsoid((subject.poses[i] @ place)[:3], radii, subject.poses[i][:3, :3]))
    return tuple(spots)


def lung_beside_spine(marks: Landmarks, pleura_mm: float, recess_mm: float) -> Piece:
    """Return lung up to `pleura_mm` from the sides of the bodies and, behind the heart, `recess_mm` from the midline.

    The common anatomy leaves 24 mm of soft tissue on both sides of the midline.
    """
    cage, subject = Cage(marks), marks.subject
    half_body = 0.5 * float(subject.dims["endplate_width_mm"][subject.index("T8")])
    ring = next(r for r in marks.rings if r.number == 8)
    aside_mm, front_mm = half_body + pleura_mm, marks.spine_anterior.at(float(ring.pose[2, 3])) + 60.0

    def distance(points):
        aside = (points[0] - marks.spine_right(points[2])).abs()
        ahead = points[1] - marks.spine_anterior(points[2])
        beside = torch.where(ahead < 14, aside_mm - aside, recess_mm - aside + 0.25 * ahead.clamp(min=0))
        inside = torch.maximum(cage.distance(points), points[2] - cage.top)
        behind = torch.maximum(-0.7 * (ahead + 4.0) - 0.7 * (aside - aside_mm), ahead - 60.0)
        walls = torch.maximum(torch.maximum(inside, behind), cage.dome_mm(points) - points[2] + 4.0)
        return smooth_max(walls, beside, 6.0)

    wide = aside_mm + 40.0
    middle = float(marks.spine_right.values.mean())
    lower = (middle - wide - 40, front_mm - 140.0, cage.sulcus - 20.0)
    return Piece(lower, (middle + wide + 40, front_mm + 40.0, cage.top), distance)


def _line(marks: Landmarks, offset_mm, levels) -> np.ndarray:
    """Points beside the body centres of levels, (n, 3)."""
    return np.array([marks.levels[name][:3, 3] for name in levels]) + np.asarray(offset_mm) * marks.scale
