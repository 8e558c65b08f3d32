"""Signed-distance solids in subject space, each with the box outside which it need not be evaluated.

Points travel as a tuple (right_mm, anterior_mm, superior_mm) of tensors that broadcast against each other:
on an axis-aligned lattice three short axes stand for a whole block. Distances are millimetres, negative
inside, exact for round capsules and first-order accurate near the surface for elliptic ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spinelib.phantom.sdf import smooth_max

Points = tuple[Tensor, Tensor, Tensor]
Distance = Callable[[Points], Tensor]


@dataclass(frozen=True)
class Piece:
    """One solid: `distance` is needed only in the box from `lower_mm` to `upper_mm`, subject mm."""

    lower_mm: tuple[float, float, float]
    upper_mm: tuple[float, float, float]
    distance: Distance


@dataclass(frozen=True)
class Structure:
    """Union of pieces made of one material.

    Attributes
    ----------
    name : str
    pieces : tuple of Piece
    tissue : str
        Tissue that fills the non-mineral part: 'marrow' for bones, 'disc' for cartilage, 'canal'.
    cortex_mm : float
        Thickness of the cortical shell.
    cortical, trabecular : float
        Hydroxyapatite density of shell and core, g/cm3; both 0 for soft structures.
    label : int
        VerSe label of a vertebra or sacrum, else 0.
    """

    name: str
    pieces: tuple[Piece, ...]
    tissue: str = "marrow"
    cortex_mm: float = 1.1
    cortical: float = 0.85
    trabecular: float = 0.15
    label: int = 0


@dataclass(frozen=True)
class HeightTable:
    """Values tabulated at even heights, read by linear interpolation with the ends held."""

    start_mm: float
    step_mm: float
    values: Tensor

    @classmethod
    def sample(cls, heights_mm: np.ndarray, values: np.ndarray) -> "HeightTable":
        """Tabulate `values` (n,) given at evenly rising `heights_mm` (n,)."""
        step = float(heights_mm[1] - heights_mm[0])
        return cls(float(heights_mm[0]), step, torch.as_tensor(np.asarray(values), dtype=torch.float32))

    def __call__(self, superior_mm: Tensor) -> Tensor:
        """Interpolate at heights of any shape."""
        position = ((superior_mm - self.start_mm) / self.step_mm).clamp(0, len(self.values) - 1.001)
        index = position.long()
        values = self.values.to(superior_mm.device)
        low = values[index]
        return low + (position - index) * (values[index + 1] - low)

    def at(self, superior_mm: float) -> float:
        """Interpolate at one height."""
        return float(self(torch.tensor([float(superior_mm)]))[0])


def capsule(start_mm, end_mm, start_radius_mm: float, end_radius_mm: float | None = None) -> Piece:
    """Return a round capsule, its radius tapering linearly from start to end."""
    start, end = np.asarray(start_mm, float), np.asarray(end_mm, float)
    r0, r1 = start_radius_mm, start_radius_mm if end_radius_mm is None else end_radius_mm
    (a0, a1, a2), (b0, b1, b2) = start.tolist(), (end - start).tolist()
    length2 = max(b0 * b0 + b1 * b1 + b2 * b2, 1e-6)

    def distance(points: Points) -> Tensor:
        right, anterior, superior = points[0] - a0, points[1] - a1, points[2] - a2
        along = ((right * (b0 / length2) + anterior * (b1 / length2)) + superior * (b2 / length2)).clamp(0, 1)
        squared = (right - along * b0) ** 2 + (anterior - along * b1) ** 2 + (superior - along * b2) ** 2
        return squared.sqrt() - (r0 + (r1 - r0) * along)

    reach = max(r0, r1)
    return Piece(_triple(np.minimum(start, end) - reach), _triple(np.maximum(start, end) + reach), distance)


def blade(start_mm, end_mm, up, start_radii_mm, end_radii_mm=None) -> Piece:
    """Return a capsule of elliptic section: radii (along `up`, across) taper from start to end."""
    start, end, up = (np.asarray(v, float) for v in (start_mm, end_mm, up))
    u0, v0 = start_radii_mm
    u1, v1 = start_radii_mm if end_radii_mm is None else end_radii_mm
    length = float(np.linalg.norm(end - start))
    axis = (end - start) / length
    up = _unit(up - axis * (up @ axis))
    across = np.cross(axis, up)

    def distance(points: Points) -> Tensor:
        along = _dot(points, axis, start)
        t = (along / length).clamp(0, 1)
        half_u, half_v = u0 + (u1 - u0) * t, v0 + (v1 - v0) * t
        a, b = _dot(points, up, start) / half_u, _dot(points, across, start) / half_v
        cap = torch.minimum(half_u, half_v)
        c = (along - t * length) / cap
        return _ellipse_distance((a, b, c), (half_u, half_v, cap))

    reach = max(u0, u1, v0, v1)
    return Piece(_triple(np.minimum(start, end) - reach), _triple(np.maximum(start, end) + reach), distance)


def chain(points_mm, radii_mm) -> tuple[Piece, ...]:
    """Return capsules along a poly-line (n, 3) with a radius at each of its points."""
    points = np.asarray(points_mm, float)
    radii = np.broadcast_to(radii_mm, len(points)).tolist()
    return tuple(capsule(points[i], points[i + 1], radii[i], radii[i + 1]) for i in range(len(points) - 1))


def ellipsoid(centre_mm, radii_mm, axes: np.ndarray | None = None) -> Piece:
    """Return an ellipsoid; columns of `axes` (3, 3) are the directions of its radii (default: world axes)."""
    centre, radii = np.asarray(centre_mm, float), np.asarray(radii_mm, float)
    axes = np.eye(3) if axes is None else np.asarray(axes, float)

    def distance(points: Points) -> Tensor:
        local = [_dot(points, axes[:, i], centre) / radii[i] for i in range(3)]
        return _ellipse_distance(local, radii.tolist())

    half = np.sqrt(((axes * radii) ** 2).sum(axis=1))
    return Piece(_triple(centre - half), _triple(centre + half), distance)


def plate(origin_mm, axes: np.ndarray, outline_mm: np.ndarray, half_thickness_mm: float, bow_per_mm=0.0) -> Piece:
    """Return a plate with a polygonal outline.

    Parameters
    ----------
    origin_mm : (3,)
    axes : (3, 3)
        Columns: the two in-plane directions and the normal.
    outline_mm : (n, 2)
        Corners in the in-plane coordinates.
    half_thickness_mm : float
    bow_per_mm : float
        The middle surface leaves the plane along the normal by bow * (second coordinate)^2.
    """
    origin, outline = np.asarray(origin_mm, float), np.asarray(outline_mm, float)

    def distance(points: Points) -> Tensor:
        first, second = _dot(points, axes[:, 0], origin), _dot(points, axes[:, 1], origin)
        height = _dot(points, axes[:, 2], origin) - bow_per_mm * second * second
        return smooth_max(polygon_distance(first, second, outline), height.abs() - half_thickness_mm, 2.0)

    bowed = np.column_stack([outline, bow_per_mm * outline[:, 1] ** 2]) @ axes.T + origin
    flat = outline @ axes[:, :2].T + origin
    corners, reach = np.concatenate([bowed, flat]), half_thickness_mm
    return Piece(_triple(corners.min(0) - reach), _triple(corners.max(0) + reach), distance)


def polygon_distance(first: Tensor, second: Tensor, outline: np.ndarray) -> Tensor:
    """Signed distance to a simple polygon with corners `outline` (n, 2), even-odd rule."""
    squared, inside = None, None
    for (p0, p1), (q0, q1) in zip(outline.tolist(), np.roll(outline, 1, axis=0).tolist(), strict=True):
        e0, e1 = q0 - p0, q1 - p1
        w0, w1 = first - p0, second - p1
        t = ((w0 * e0 + w1 * e1) / (e0 * e0 + e1 * e1)).clamp(0, 1)
        candidate = (w0 - t * e0) ** 2 + (w1 - t * e1) ** 2
        crosses = ((second >= p1) != (second >= q1)) & ((e0 * w1 > e1 * w0) == (e1 > 0))
        squared = candidate if squared is None else torch.minimum(squared, candidate)
        inside = crosses if inside is None else inside ^ crosses
    return squared.sqrt() * torch.where(inside, -1.0, 1.0)


def hollow(piece: Piece, half_wall_mm: float) -> Piece:
    """Return the shell of thickness 2 `half_wall_mm` centred on the surface of a piece."""
    lower = tuple(v - half_wall_mm for v in piece.lower_mm)
    upper = tuple(v + half_wall_mm for v in piece.upper_mm)
    return Piece(lower, upper, lambda points: piece.distance(points).abs() - half_wall_mm)


def _ellipse_distance(scaled, radii) -> Tensor:
    """First-order distance k0 (k0 - 1) / k1 (Quilez) from coordinates already divided by the radii."""
    k0 = (scaled[0] ** 2 + scaled[1] ** 2 + scaled[2] ** 2 + 1e-6).sqrt()
    k1 = ((scaled[0] / radii[0]) ** 2 + (scaled[1] / radii[1]) ** 2 + (scaled[2] / radii[2]) ** 2 + 1e-9).sqrt()
    return k0 * (k0 - 1) / k1


def _dot(points: Points, direction, origin) -> Tensor:
    d0, d1, d2 = (float(v) for v in direction)
    shift = d0 * float(origin[0]) + d1 * float(origin[1]) + d2 * float(origin[2])
    return (points[0] * d0 - shift) + points[1] * d1 + points[2] * d2


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _triple(vector: np.ndarray) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])
