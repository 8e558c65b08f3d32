"""Ribs, sternum, shoulder girdle, arms, pelvis, femora and skull as unions of capsules and plates.

Only the outline that a projection shows is modelled; mineral comes from cortex thickness and core density.
Local coordinates are (right, anterior, superior) mm of a man of 176 cm, drawn for the right side.
"""

import numpy as np

from spinelib.phantom.landmarks import SIDES, Landmarks, RibRing
from spinelib.phantom.solids import Piece, Structure, blade, capsule, chain, ellipsoid, hollow, plate

_RIB_END = (0.80, 0.80, 0.79, 0.77, 0.75, 0.73, 0.71, 0.66, 0.61, 0.55, 0.40, 0.29)
"""Angle at which the bony rib ends, in half turns from the spine."""

_ILIUM_OUTLINE_MM = np.array([
    [46, -74, 95], [70, -58, 124], [98, -38, 139], [120, -14, 142], [131, 18, 122],
    [124, 42, 82], [107, 40, 42], [100, 28, 12], [82, -28, 8], [62, -50, 42], [45, -72, 68],
])  # fmt: skip
"""Posterior spine, crest, anterior spines, acetabular roof, sciatic notch of the right hip bone."""


def bones(marks: Landmarks) -> tuple[Structure, ...]:
    """Return every bone of the trunk but vertebrae and sacrum, and the costal cartilages."""
    parts = [*_thorax(marks), *_skull(marks)]
    for side, index in zip(SIDES, (0, 1), strict=True):
        arm = _arm(marks, side, index) if marks.subject.arms[index] else []
        parts += [*_shoulder(marks, side, index), *arm, *_hip(marks, side, index)]
    return tuple(parts)


def rib_path(ring: RibRing, side: int, scale: float, count: int = 11) -> np.ndarray:
    """Return points (count, 3) along a rib, from behind the tubercle to the costochondral end, world mm."""
    sign, start = SIDES[side], ring.start_mm[side]
    begin = 0.10 + 0.02 * (ring.number < 3)
    end = _RIB_END[min(ring.number, 12) - 1]
    angle = np.pi * np.linspace(begin, end, count)
    along = (angle / np.pi - begin) / (1 - begin)
    right = sign * ring.half_width_mm * np.sin(angle) ** 0.85
    forward = -ring.half_depth_mm * np.sign(np.cos(angle)) * np.abs(np.cos(angle)) ** 0.9
    yaw = np.radians(ring.yaw_deg)
    fall = ring.drop_mm * (0.55 * along + 0.45 * along**2 * (3 - 2 * along)) + 4.0 * scale
    return np.stack(
        [
            ring.centre_mm[0] + np.cos(yaw) * right - np.sin(yaw) * forward,
            ring.centre_mm[1] + np.sin(yaw) * right + np.cos(yaw) * forward,
            start[2] - fall + ring.slope * right * (1 - along) * 0.5,
        ],
        axis=1,
    )


def arm_joints(marks: Landmarks, index: int) -> np.ndarray:
    """Return shoulder, elbow, wrist and knuckles (4, 3) of the right (0) or left (1) arm, world mm."""
    k, side, hull = marks.scale, SIDES[index], marks.hull
    shoulder = marks.shoulders_mm[index]
    swing = marks.rng(1).normal(0.0, [[9.0], [9.0]], (2, 3))[index]
    joints = [shoulder]
    for length, radius, turn in ((318.0, 44.0, 0), (258.0, 34.0, 1), (92.0, 22.0, 2)):
        height = joints[-1][2] - length * k
        clear = (
            hull.half_width.at(max(height, float(marks.hips_mm[:, 2].mean()))) + (radius + 4.0) * k + 0.5 * marks.fat_mm
        )
        offset = max(clear + abs(swing[turn]), (160.0 + 12.0 * (turn == 0)) * k)
        middle = hull.middle.at(height)
        anterior = shoulder[1] + (-22.0, -14.0, 4.0)[turn] * k + 0.6 * swing[turn]
        joints.append(np.array([middle + side * offset, anterior, height]))
    return np.array(joints)


def _thorax(marks: Landmarks) -> list[Structure]:
    k, ends, parts = marks.scale, {}, []
    for ring in marks.rings:
        for index in (0, 1):
            path = rib_path(ring, index, k)
            stem = [ring.head_mm[index], ring.start_mm[index]]
            pieces = [*_rib_blades(path, ring, k), *chain([*stem, path[0]], [4.6 * k, 5.0 * k, 5.2 * k])]
            parts.append(Structure(f"rib_{ring.number}_{index}", tuple(pieces), cortex_mm=0.8, trabecular=0.1))
            ends[ring.number, index] = path[-1]
    axis = marks.xiphoid_mm - marks.notch_mm
    for index in (0, 1):
        parts.append(Structure(f"cartilage_{index}", _cartilages(marks, ends, axis, index), "disc", 0, 0, 0))
    sternum = (
        blade(marks.notch_mm + 0.03 * axis, marks.notch_mm + 0.31 * axis, [1, 0, 0], (29 * k, 6.5), (17 * k, 6)),
        blade(marks.notch_mm + 0.33 * axis, marks.xiphoid_mm, [1, 0, 0], (14 * k, 5.5), (18 * k, 5)),
        blade(marks.xiphoid_mm, marks.xiphoid_mm + 0.2 * axis, [1, 0, 0], (10 * k, 4), (5 * k, 3)),
    )
    return [*parts, Structure("sternum", sternum, cortex_mm=0.8, trabecular=0.1)]


def _rib_blades(path: np.ndarray, ring: RibRing, k: float) -> list[Piece]:
    outward = path - np.array([*ring.centre_mm, 0.0])
    height = (5.0 if ring.number < 12 else 4.0) * k
    pieces = []
    for i in range(len(path) - 1):
        normal = outward[i] * [1, 1, 0]
        up = np.cross(path[i + 1] - path[i], normal)
        last = 1.12 if i == len(path) - 2 and ring.number < 11 else 1.0
        pieces.append(blade(path[i], path[i + 1], up, (height, 3.6 * k), (height * last, 3.6 * k)))
    return pieces


def _cartilages(marks: Landmarks, ends: dict, axis: np.ndarray, index: int) -> tuple[Piece, ...]:
    k, side, pieces = marks.scale, SIDES[index], []
    joints = dict(zip(range(1, 8), (0.12, 0.32, 0.48, 0.62, 0.75, 0.87, 0.97), strict=True))
    middles = {}
    for number in range(1, 11):
        if (number, index) not in ends:
            continue
        start = ends[number, index]
        if number < 8:
            target = marks.notch_mm + joints[number] * axis + side * np.array([16.0 * k, 0.0, 0.0])
        else:
            target = middles[number - 1]
        middle = 0.5 * (start + target) + [0, 4.0, -0.12 * abs(target[2] - start[2]) - 2.0]
        middles[number] = middle
        pieces += chain([start, middle, target], [5.0 * k, 5.0 * k, 4.5 * k])
    return tuple(pieces)


def _skull(marks: Landmarks) -> list[Structure]:
    pose, k = marks.levels["C1"], 0.5 + 0.5 * marks.scale
    level = np.eye(4)
    level[:3, 3] = pose[:3, 3]

    def at(right, anterior, superior):
        return (level @ [right * k, anterior * k, superior * k, 1])[:3]

    vault = hollow(ellipsoid(at(0, -4, 74), np.array([73.0, 91.0, 70.0]) * k), 3.0)
    base = [capsule(at(s * 14, 2, 22), at(s * 45, -16, 28), 7 * k, 8 * k) for s in SIDES]
    base += [ellipsoid(at(0, -45, 18), np.array([34.0, 36.0, 5.0]) * k)]
    face = [
        ellipsoid(at(0, 58, 6), np.array([36.0, 22.0, 24.0]) * k),
        ellipsoid(at(0, 70, 32), np.array([11.0, 16.0, 22.0]) * k),
    ]
    for s in SIDES:
        face += chain([at(s * 60, 8, 28), at(s * 60, 45, 20), at(s * 48, 72, 18), at(s * 20, 84, 28)], 4.5 * k)
        face += chain([at(s * 14, 86, 50), at(s * 36, 86, 60), at(s * 56, 72, 50), at(s * 54, 68, 28)], 4.2 * k)
    jaw = []
    for s in SIDES:
        jaw += chain([at(s * 52, 10, 22), at(s * 45, 14, -22), at(s * 27, 62, -38), at(0, 80, -42)], 5.5 * k)
    teeth = [chain([at(s * 22, 48, -18), at(s * 17, 66, -18), at(0, 76, -18)], 5.2 * k) for s in SIDES]
    return [
        Structure("skull_vault", (vault,), cortex_mm=1.2, trabecular=0.2),
        Structure("skull_base", tuple(base), cortex_mm=1.8, trabecular=0.18),
        Structure("face", tuple(face), cortex_mm=1.0, trabecular=0.12),
        Structure("mandible", tuple(jaw), cortex_mm=2.2, trabecular=0.25),
        Structure("teeth", tuple(p for row in teeth for p in row), cortex_mm=1.5, cortical=0.8, trabecular=0.45),
    ]


def _shoulder(marks: Landmarks, side: float, index: int) -> list[Structure]:
    k, joint = marks.scale, marks.shoulders_mm[index]
    notch = marks.notch_mm + [side * 25.0 * k, -4.0, -2.0]
    tip = joint + np.array([side * 4.0, -14.0, 34.0]) * k
    run = tip - notch
    clavicle = [notch, notch + 0.3 * run + [0, 8 * k, 5 * k], notch + 0.7 * run + [0, -8 * k, 3 * k], tip]
    rib = [ring for ring in marks.rings if ring.number in (2, 7)]
    back = np.array([ring.centre_mm[1] - ring.half_depth_mm - 6.0 for ring in rib])
    glenoid = joint + np.array([-side * 24.0, -6.0, -2.0]) * k
    upper = np.array([joint[0] - side * 98.0 * k, back[0] + 6.0, joint[2] + 38.0 * k])
    lower = np.array([joint[0] - side * 84.0 * k, back[1] + 4.0, joint[2] - 112.0 * k])
    spine = np.array([upper[0] - side * 3.0, upper[1] - 4.0, joint[2] + 8.0 * k])
    first = (upper - lower) / np.linalg.norm(upper - lower)
    normal = np.cross(first, glenoid - lower)
    normal /= np.linalg.norm(normal)
    axes = np.stack([first, np.cross(normal, first), normal], axis=1)
    outline = (np.array([upper, upper + 0.45 * (glenoid - upper) + [0, 0, 6.0], glenoid, lower]) - lower) @ axes[:, :2]
    ridge = [spine, 0.5 * (spine + tip) + [0, -14 * k, 2], tip + [0, -12 * k, 2]]
    hook = glenoid + np.array([[0, 8, 16], [-2 * side, 26, 24], [8 * side, 36, 14]]) * k
    scapula = [
        plate(lower, axes, outline, 2.1),
        *chain([lower, 0.5 * (lower + glenoid), glenoid], [4.0 * k, 4.5 * k, 7.0 * k]),
        capsule(glenoid + [0, 0, 12 * k], glenoid - [0, 0, 10 * k], 9.0 * k, 9.0 * k),
        *chain(ridge, [3.0 * k, 4.5 * k, 6.0 * k]),
        capsule(tip + [0, -14 * k, 0], tip + [0, 4 * k, 0], 7.0 * k, 6.0 * k),
        *chain(hook, 5.0 * k),
    ]
    return [
        Structure(f"clavicle_{index}", chain(clavicle, np.array([9.0, 6.0, 5.5, 7.0]) * k), cortex_mm=1.5),
        Structure(f"scapula_{index}", tuple(scapula), cortex_mm=1.0),
    ]


def _arm(marks: Landmarks, side: float, index: int) -> list[Structure]:
    k = marks.scale
    shoulder, elbow, wrist, knuckles = arm_joints(marks, index)
    out = np.array([side, 0.0, 0.0])
    neck = shoulder + out * 8 * k - [0, 0, 26 * k]
    humerus = [
        ellipsoid(shoulder, np.full(3, 23.5 * k)),
        capsule(shoulder + out * 14 * k, neck + out * 2, 14 * k, 13 * k),
        *chain([neck, 0.6 * neck + 0.4 * elbow, elbow + [0, 0, 34 * k]], [13 * k, 10.5 * k, 10.5 * k]),
        *chain([elbow + [0, 0, 34 * k], elbow], [11 * k, 12 * k]),
        blade(
            elbow - out * 17 * k + [0, 0, 3 * k],
            elbow + out * 15 * k + [0, 0, 3 * k],
            [0, 0, 1],
            (13 * k, 8.5 * k),
        ),
    ]
    radius_top, ulna_top = elbow + out * 12 * k - [0, 0, 16 * k], elbow - out * 9 * k - [0, 0, 6 * k]
    radius_end, ulna_end = wrist + out * 10 * k, wrist - out * 16 * k
    fore = [
        *chain([radius_top, 0.5 * (radius_top + radius_end) + out * 8 * k, radius_end], [9 * k, 6.5 * k, 11 * k]),
        *chain([ulna_top, 0.5 * (ulna_top + ulna_end) - out * 3 * k, ulna_end], [11 * k, 6.5 * k, 7 * k]),
    ]
    hand = [blade(wrist - [0, 0, 12 * k], wrist - [0, 0, 30 * k], [1, 0, 0], (20 * k, 8 * k))]
    palm = knuckles - wrist
    for finger in range(5):
        spread = out * (18.0 - 9.0 * finger) * k
        start, thumb = wrist - [0, 0, 30 * k] + 0.7 * spread, finger == 0
        middle = knuckles + 1.15 * spread if not thumb else wrist + 0.66 * palm + out * 22 * k
        length = (0.55, 0.85, 0.95, 0.9, 0.7)[finger]
        end = middle + length * palm + out * (3.0 if thumb else 0.0) * k
        hand += chain([start, middle, end], [4.6 * k, 4.2 * k, 3.4 * k])
    return [
        Structure(f"humerus_{index}", tuple(humerus), cortex_mm=3.2, cortical=0.95, trabecular=0.12),
        Structure(f"forearm_{index}", tuple(fore), cortex_mm=2.4, cortical=0.95, trabecular=0.12),
        Structure(f"hand_{index}", tuple(hand), cortex_mm=1.2, trabecular=0.15),
    ]


def _hip(marks: Landmarks, side: float, index: int) -> list[Structure]:
    k = marks.scale

    def at(right, anterior, superior):
        return (marks.pelvis @ [side * right * k, anterior * k, superior * k, 1])[:3]

    socket = ellipsoid(at(92, -2, 3), np.full(3, 29.5 * k))
    ball = marks.hips_mm[index]
    joint, mouth = ellipsoid(ball, np.full(3, 26.0 * k)), _below(at(70, 0, -18), at(110, 0, -2))
    cup = Piece(socket.lower_mm, socket.upper_mm, _difference(socket.distance, joint.distance, mouth))
    pubis = chain([at(78, 18, -2), at(44, 38, -16), at(12, 46, -28)], np.array([10.0, 7.5, 9.0]) * k)
    arch = chain([at(12, 44, -54), at(30, 26, -72), at(52, -10, -90)], np.array([7.5, 6.0, 9.0]) * k)
    ischium = chain([at(82, -22, -14), at(66, -32, -52), at(56, -26, -84)], np.array([14.0, 12.0, 14.0]) * k)
    brim = chain([at(80, 4, 24), at(66, -22, 58), at(52, -48, 88)], np.array([12.0, 8.0, 10.0]) * k)
    rear = chain([at(54, -50, 84), at(62, -62, 108), at(72, -58, 123)], np.array([11.0, 10.0, 7.0]) * k)
    symphysis = capsule(at(12, 45, -30), at(11, 43, -56), 10.0 * k, 9.0 * k)
    ilium = _ilium(at)
    pelvis = (cup, *pubis, *arch, *ischium, *brim, *rear, symphysis, *ilium)
    return [
        Structure(f"pelvis_{index}", pelvis, cortex_mm=1.25, trabecular=0.11),
        Structure(f"femur_{index}", _femur(ball, side, k), cortex_mm=1.7, trabecular=0.13),
        *_shaft(ball, side, k, index),
    ]


def _ilium(at) -> list[Piece]:
    corners = np.array([at(*corner) for corner in _ILIUM_OUTLINE_MM])
    back, front, roof = at(48, -72, 92), at(122, 42, 76), at(92, 5, 22)
    first = (front - back) / np.linalg.norm(front - back)
    second = corners[3] - back
    normal = np.cross(first, roof - back)
    normal /= np.linalg.norm(normal)
    second = np.cross(normal, first)
    if second @ (corners[3] - back) < 0:
        second = -second
    if normal @ (corners[3] - back) < 0:
        normal = -normal
    axes = np.stack([first, second, normal], axis=1)
    outline = (corners - back) @ axes[:, :2]
    top = outline[:6]
    bow = float(((corners[3] - back) @ normal) / outline[3, 1] ** 2)
    rim = back + top @ axes[:, :2].T + np.outer(bow * top[:, 1] ** 2, normal)
    return [plate(back, axes, outline, 3.6, bow), *chain(rim, 6.0)]


def _femur(ball: np.ndarray, side: float, k: float) -> tuple[Piece, ...]:
    def at(right, anterior, superior):
        return ball + np.array([side * right, anterior, superior]) * k

    return (
        ellipsoid(ball, np.full(3, 23.8 * k)),
        capsule(at(8, -1, -6), at(42, -8, -34), 17.5 * k, 18.0 * k),
        capsule(at(52, -16, -16), at(50, -12, -44), 14.0 * k, 15.0 * k),
        capsule(at(24, -22, -64), at(38, -10, -74), 9.0 * k, 14.0 * k),
        capsule(at(46, -10, -46), at(44, -6, -78), 18.5 * k, 15.5 * k),
    )


def _shaft(ball: np.ndarray, side: float, k: float, index: int) -> list[Structure]:
    """Tube of cortical bone whose wall thickens from 2 to 5 mm down the thigh, and the marrow inside."""
    outer = np.array([[45, -8, -62], [42, -2, -105], [38, 4, -200], [24, 2, -420]]) * [side, 1, 1] * k + ball
    inner = np.array([[46, -9, -46], [42, -2, -105], [38, 4, -200], [24, 2, -420]]) * [side, 1, 1] * k + ball
    cavity = chain(inner, np.array([14.0, 11.5, 8.8, 9.2]) * k)
    wall = []
    for piece in chain(outer, np.array([16.0, 14.8, 13.8, 14.5]) * k):
        wall.append(Piece(piece.lower_mm, piece.upper_mm, _difference(piece.distance, _union(cavity))))
    density = {"cortex_mm": 1.0, "cortical": 0.95, "trabecular": 0.95}
    return [
        Structure(f"shaft_{index}", tuple(wall), **density),
        Structure(f"marrow_cavity_{index}", cavity[1:], cortex_mm=1.0, cortical=0.03, trabecular=0.03),
    ]


def _below(low: np.ndarray, high: np.ndarray):
    """Half space under the line from `low` to `high` (right-superior plane), negative inside."""
    run = high - low
    normal = np.array([-run[2], 0.0, run[0]]) * np.sign(run[0])
    normal /= np.linalg.norm(normal)
    shift = float(normal @ low)
    return lambda points: points[0] * float(normal[0]) + points[2] * float(normal[2]) - shift


def _union(pieces):
    def distance(points):
        result = pieces[0].distance(points)
        for piece in pieces[1:]:
            result = result.minimum(piece.distance(points))
        return result

    return distance


def _difference(solid, *holes):
    def distance(points):
        result = solid(points)
        for hole in holes:
            result = result.maximum(-hole(points))
        return result

    return distance
