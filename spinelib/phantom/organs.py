"""Soft-tissue layers and the organs of chest, abdomen and head.

Sizes are adult means [assumed, textbook anatomy] scaled by stature with seeded differences of 6-8 %.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spinelib.phantom.landmarks import SIDES, HeightTable, Hull, Landmarks
from spinelib.phantom.sdf import smooth_max
from spinelib.phantom.solids import Distance, Piece, Points, chain, ellipsoid

_HULL_POWER = 2.5
_AORTA_FROM_SPINE_MM = {"T8": (-16, 28, 0), "T12": (-4, 32, 0), "L4": (-4, 30, 0)}
_UNDER_DOME = (
    (0, (62, 0, -62), (92.0, 74.0, 74.0), 0),
    (0, (-6, 28, -48), (78.0, 42.0, 42.0), 0),
    (1, (-104, -68, -52), (22.0, 36.0, 56.0), 1),
)
"""Liver, its left lobe, spleen: dome above (0 right, 1 left), centre from it, radii, size factor."""


@dataclass(frozen=True)
class Layer:
    """Soft-tissue layer: where `distance` < 0, what is left is filled with `mixture` (fractions by tissue).

    An empty mixture is gas. The box bounds the layer in subject mm.
    """

    lower_mm: tuple[float, float, float]
    upper_mm: tuple[float, float, float]
    distance: Distance
    mixture: dict[str, float]


def organs(marks: Landmarks) -> tuple[Layer, ...]:
    """Return gas, vessels, heart, lungs, abdominal organs, psoas, visceral fat and head, innermost first."""
    cage = Cage(marks)
    return (*_gas(marks, cage), *_chest(marks, cage), *_belly(marks, cage), *_head(marks))


def solid(piece: Piece, mixture: dict[str, float]) -> Layer:
    """Return a layer that fills one piece."""
    return Layer(piece.lower_mm, piece.upper_mm, piece.distance, mixture)


def hull_distance(hull: Hull, points: Points) -> Tensor:
    """Signed distance to trunk and neck: superelliptic sections by height, flattened by the table."""
    return _clipped(hull, hull_section(hull, points, 0.0), points)


def _clipped(hull: Hull, distance: Tensor, points: Points) -> Tensor:
    ends = torch.maximum(points[2] - hull.top_mm, hull.bottom_mm - points[2])
    if np.isfinite(hull.table_mm):
        distance = smooth_max(distance, hull.table_mm - points[1], 8.0)
    return smooth_max(distance, ends, 25.0)


def hull_section(hull: Hull, points: Points, inset_mm: float) -> Tensor:
    """Signed distance to the section at each point's height, shrunk by `inset_mm` on all sides."""
    width = hull.half_width(points[2]) - inset_mm
    depth = hull.half_depth(points[2]) - inset_mm
    return _superellipse(points[0] - hull.middle(points[2]), points[1] - hull.centre(points[2]), width, depth)


def _superellipse(right: Tensor, anterior: Tensor, half_width: Tensor, half_depth: Tensor) -> Tensor:
    """(q - 1) / |grad q| of the superelliptic gauge q with exponent 2.5."""
    a, b = right.abs() / half_width + 1e-4, anterior.abs() / half_depth + 1e-4
    a_root, b_root = a.sqrt(), b.sqrt()
    pa, pb = a * a * a_root, b * b * b_root
    total = pa + pb
    q = total ** (1 / _HULL_POWER)
    gradient = ((a * a_root / half_width) ** 2 + (b * b_root / half_depth) ** 2).sqrt() * q / total
    return (q - 1) / gradient


class Cage:
    """Inside of the rib cage by height, and the diaphragm domes."""

    def __init__(self, marks: Landmarks):
        rings = sorted(marks.rings, key=lambda r: r.start_mm[:, 2].mean() - 0.4 * r.drop_mm)
        heights = np.array([r.start_mm[:, 2].mean() - 0.4 * r.drop_mm for r in rings])
        grid = np.arange(heights[0] - 60.0, heights[-1] + 60.0, 3.0)

        def table(values) -> HeightTable:
            return HeightTable.sample(grid, np.interp(grid, heights, values))

        margin = 9.0
        self.middle = table([r.centre_mm[0] for r in rings])
        self.centre = table([r.centre_mm[1] + 4.0 for r in rings])
        self.half_width = table([r.half_width_mm - margin for r in rings])
        self.half_depth = table([r.half_depth_mm - margin - 3.0 for r in rings])
        rng, levels = marks.rng(2), marks.levels
        base = levels["T10"][2, 3] + rng.normal(0, 8.0) * marks.scale
        self.domes = (base + 8.0 * marks.scale, base - 4.0 * marks.scale)
        self.sulcus = levels["T12"][2, 3] - 5.0
        self.top = levels["T1"][2, 3] + 6.0
        centre = marks.spine_anterior.at(base)
        self.reach = (140.0 * marks.scale, 110.0 * marks.scale, centre + 75.0 * marks.scale)
        self.middle_mm = self.middle.at(base)

    def distance(self, points: Points) -> Tensor:
        """Signed distance to the inside of the ribs, by horizontal sections."""
        right, anterior = points[0] - self.middle(points[2]), points[1] - self.centre(points[2])
        return _superellipse(right, anterior, self.half_width(points[2]), self.half_depth(points[2]))

    def dome_mm(self, points: Points) -> Tensor:
        """Height of the diaphragm at (right, anterior): two domes falling to the costal sulcus."""
        wide, deep, centre = self.reach
        right = points[0] - self.middle_mm
        top = self.domes[1] + (self.domes[0] - self.domes[1]) * torch.sigmoid(right / 15.0)
        bulge = ((right.abs() - 0.42 * wide) / (0.62 * wide)) ** 2 + ((points[1] - centre) / deep) ** 2
        return top - (top - self.sulcus) * bulge.clamp(max=1.5)


def _gas(marks: Landmarks, cage: Cage) -> list[Layer]:
    """Windpipe, stomach bubble and 5-10 pockets in the bowel."""
    rng, k = marks.rng(3), marks.scale
    forward = np.array([0, 34.0 * k, 0])
    windpipe = chain([_centre(marks, level) + forward for level in ("C5", "T2", "T5")], 7.5 * k)
    stomach = [cage.middle_mm - 62 * k, cage.reach[2], cage.domes[1] - rng.uniform(24, 34) * k]
    bubbles = [ellipsoid(stomach, rng.uniform(9, 24) * k * np.array([1.4, 1.0, 0.7]))]
    for _ in range(rng.integers(5, 11)):
        side = rng.choice([-1.0, 1.0])
        offset = np.array([side * rng.uniform(45, 100), rng.uniform(45, 85), rng.uniform(-110, 60)])
        radii = rng.uniform(6, 16, 3) * k * [1.1, 1.0, 1.3]
        bubbles.append(ellipsoid(_centre(marks, "L3") + offset * k, radii))
    return [solid(piece, {}) for piece in (*windpipe, *bubbles)]


def _chest(marks: Landmarks, cage: Cage) -> list[Layer]:
    """Great vessels, heart, mediastinum, lungs."""
    k, size, heart_mm = marks.scale, _vessel_size(marks), _heart_mm(marks)
    lean = np.radians(38.0)
    long_axis, across = [-np.cos(lean), 0, -np.sin(lean)], [np.sin(lean), 0, -np.cos(lean)]
    heart = ellipsoid(heart_mm, np.array([62.0, 40.0, 38.0]) * size, np.array([long_axis, across, [0, 1, 0]]).T)
    stem = [_centre(marks, "T2") + [0, 34, 0], _centre(marks, "T4") + [0, 40, 0], heart_mm + [8, 0, 20]]
    mediastinum = chain(stem, np.array([26.0, 30.0, 34.0]) * k)
    return [
        *(solid(piece, {"blood": 1.0}) for piece in (*aorta(marks), *cava(marks))),
        solid(heart, {"blood": 0.7, "muscle": 0.3}),
        *(solid(piece, {"muscle": 0.5, "adipose": 0.4, "blood": 0.1}) for piece in mediastinum),
        _lungs(marks, cage),
    ]


def aorta(marks: Landmarks) -> tuple[Piece, ...]:
    """Return the aorta from its root over the arch to the fourth lumbar vertebra."""
    k, heart_mm = marks.scale, _heart_mm(marks)
    path = [heart_mm + np.array([6, -6, 40]) * k]
    path += [_centre(marks, "T4") + np.array(v) * k for v in ((4, 48, 6), (-16, 18, 2))]
    path += [_centre(marks, level) + np.array(v) * k for level, v in _AORTA_FROM_SPINE_MM.items()]
    return chain(path, np.array([14.0, 13.5, 12.5, 11.5, 10.5, 8.5]) * _vessel_size(marks))


def cava(marks: Landmarks) -> tuple[Piece, ...]:
    """Return the upper and the lower vena cava as one line through the right atrium."""
    k, heart_mm = marks.scale, _heart_mm(marks)
    inflow = [heart_mm + np.array(v) * k for v in ((38, -10, 40), (34, -20, -60))]
    return chain([*inflow, _centre(marks, "L4") + np.array([20, 28, 0]) * k], 10.5 * _vessel_size(marks))


def _vessel_size(marks: Landmarks) -> float:
    return marks.scale * marks.rng(4).normal(1.0, 0.06)


def _heart_mm(marks: Landmarks) -> np.ndarray:
    return _centre(marks, "T8") + np.array([-24.0, 72.0, 4.0]) * marks.scale


def _lungs(marks: Landmarks, cage: Cage) -> Layer:
    """Everything inside the cage above the diaphragm, but the spine's surroundings and a midline septum."""

    def distance(points: Points) -> Tensor:
        inside = torch.maximum(cage.distance(points), points[2] - cage.top)
        aside = (points[0] - marks.spine_right(points[2])).abs()
        ahead = points[1] - marks.spine_anterior(points[2])
        beside_spine = torch.maximum(24.0 * marks.scale - aside, 17.0 - aside + 0.25 * ahead)
        septum = 12.0 - (points[0] - cage.middle_mm).abs()
        wall = torch.where(ahead > 60, septum, beside_spine)
        return smooth_max(smooth_max(inside, wall, 12.0), cage.dome_mm(points) - points[2], 6.0)

    rings = marks.rings
    wide = max(r.half_width_mm + abs(r.centre_mm[0]) for r in rings) + 5
    front = max(r.centre_mm[1] + r.half_depth_mm for r in rings)
    rear = min(r.centre_mm[1] - r.half_depth_mm for r in rings)
    lower, upper = (-wide, rear, cage.sulcus - 60), (wide, front, cage.top + 5)
    return Layer(lower, upper, distance, {"lung": 0.97, "blood": 0.03})


def _belly(marks: Landmarks, cage: Cage) -> list[Layer]:
    """Liver, spleen, kidneys, bladder, psoas, then bowel mixed with visceral fat."""
    rng, k = marks.rng(5), marks.scale
    sizes = k * rng.normal(1.0, 0.07, 3)
    pelvis_mm = marks.hips_mm.mean(0)
    below_dome = []
    for dome, offset, radii, size in _UNDER_DOME:
        centre = np.array([cage.middle_mm, cage.reach[2], cage.domes[dome]]) + np.array(offset) * k
        below_dome.append(_beneath(ellipsoid(centre, np.array(radii) * sizes[size]), marks, cage))
    solids = [ellipsoid(pelvis_mm + np.array([0, 22, 18]) * k, rng.uniform(24, 40) * k * np.array([1.2, 0.9, 0.8]))]
    solids += kidneys(marks)
    return [
        *below_dome,
        *(solid(piece, {"organ": 1.0}) for piece in solids),
        *(solid(piece, {"muscle": 1.0}) for piece in psoas(marks)),
        _bowel(marks, cage),
    ]


def kidneys(marks: Landmarks) -> tuple[Piece, Piece]:
    """Return the right and the left kidney."""
    k, size = marks.scale, marks.scale * marks.rng(5).normal(1.0, 0.07, 3)[2]
    middle = 0.5 * (_centre(marks, "L2") + _centre(marks, "T12"))
    offsets = [np.array([side * 62, -4, -16 if side > 0 else -4]) * k for side in SIDES]
    return tuple(ellipsoid(middle + offset, np.array([28.0, 24.0, 55.0]) * size) for offset in offsets)


def psoas(marks: Landmarks) -> tuple[Piece, ...]:
    """Return the right and the left psoas from T12 over L4 to the groin."""
    k, pieces = marks.scale, []
    for side, hip in zip(SIDES, marks.hips_mm, strict=True):
        lumbar = _centre(marks, "L4") + [side * 46 * k, 8, 0]
        path = [_centre(marks, "T12") + [side * 24, 0, -20], lumbar, hip + [side * 4, 38 * k, 40 * k]]
        pieces += chain(path, np.array([9.0, 22.0, 19.0]) * k)
    return tuple(pieces)


def _beneath(piece: Piece, marks: Landmarks, cage: Cage) -> Layer:
    """Cut an organ 4 mm under the diaphragm and inside the abdominal wall."""

    def distance(points: Points) -> Tensor:
        inside = torch.maximum(piece.distance(points), points[2] - cage.dome_mm(points) + 4.0)
        return torch.maximum(inside, hull_section(marks.hull, points, 12.0 + marks.fat_mm))

    return Layer(piece.lower_mm, piece.upper_mm, distance, {"organ": 0.95, "blood": 0.05})


def _bowel(marks: Landmarks, cage: Cage) -> Layer:
    """Abdominal cavity: before the spine, inside the wall, between diaphragm and pelvic floor."""
    hull, k, subject = marks.hull, marks.scale, marks.subject
    hip = float(marks.hips_mm[:, 2].mean())
    visceral = 0.12 + 0.9 * (subject.fat_fraction - 0.2) + 0.02 * (subject.bmi - 26)
    visceral = float(np.clip(visceral, 0.08, 0.62))

    def distance(points: Points) -> Tensor:
        inside = hull_section(hull, points, 13.0 + 1.1 * marks.fat_mm)
        aside = (points[0] - marks.spine_right(points[2])) / 30.0
        before_spine = marks.spine_anterior(points[2]) + 2.0 + 18.0 * torch.exp(-(aside**2)) - points[1]
        wings = 96.0 * k + 0.9 * (points[2] - hip).clamp(min=-40)
        between_wings = (points[0] - hull.middle(points[2])).abs() - wings
        limits = torch.maximum(torch.maximum(before_spine, hip - 25.0 - points[2]), between_wings)
        return smooth_max(smooth_max(inside, limits, 15.0), points[2] - cage.dome_mm(points), 8.0)

    lower, upper = (-260.0, -160.0, hip - 30), (260.0, 330.0, max(cage.domes) + 5)
    return Layer(lower, upper, distance, {"organ": 1 - visceral, "adipose": visceral})


def _centre(marks: Landmarks, level: str) -> np.ndarray:
    return marks.levels[level][:3, 3]


def _head(marks: Landmarks) -> list[Layer]:
    k = 0.5 + 0.5 * marks.scale
    top = marks.levels["C1"][:3, 3]
    brain = ellipsoid(top + np.array([0, -4, 78]) * k, np.array([68.0, 87.0, 64.0]) * k)
    scalp = ellipsoid(top + np.array([0, -4, 78]) * k, np.array([81.0, 100.0, 77.0]) * k)
    face = chain(
        top + np.array([[0, 16, 50], [0, 30, 12], [0, 40, -24], [0, 34, -46]]) * k,
        np.array([76.0, 69.0, 57.0, 46.0]) * k,
    )
    skin = {"muscle": 0.75, "adipose": 0.25}
    return [solid(brain, {"organ": 1.0}), solid(scalp, skin), *(solid(piece, skin) for piece in face)]
