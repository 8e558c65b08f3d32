"""Signed-distance primitives and operators for bone shapes (mm, negative inside).

Points are rows of a tensor (3, ...): right, anterior, superior. The distances are first-order: zero on the
surface, slope close to one near it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DRUM_FIELDS = (
    "half_width",  # semi-axes of the outline at the rims
    "half_depth",
    "centre_right",
    "centre_anterior",
    "top_offset",  # plate planes: superior = offset + slope * right + slope * anterior
    "top_right_slope",
    "top_anterior_slope",
    "bottom_offset",
    "bottom_right_slope",
    "bottom_anterior_slope",
    "exponent",  # of the superelliptic outline
    "waist_width",  # relative narrowing at mid height
    "waist_depth",
    "taper",  # relative widening of the upper plate (negative: the lower one is wider)
    "wall_concavity",  # of the posterior wall, mm
    "heart",  # narrowing of the front
    "dish_top",  # end-plate concavity, mm
    "dish_bottom",
    "edge",  # blending radius of the rims, mm
    "uncinate",  # height of the lateral hooks of cervical bodies, mm
    "lip",  # drop of the anterior lower rim of cervical bodies, mm
    "lipping",  # osteophytes: outward growth of both rims, mm
)
"""Order of the numbers that describe a vertebral body; lengths in mm, the others without unit."""


class Capsules(NamedTuple):
    """M tapered segments with elliptical sections, as arrays ready for `capsule_distances`.

    Attributes
    ----------
    frames : (3, M, 3) unit vectors along the segment, along `up` and across.
    starts, ends : (M, 3) mm.
    radii : (M, 4) semi-axes at the start (up, across) and the end (up, across), mm.
    bulge : (M,) relative swelling of the middle.
    """

    frames: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    radii: np.ndarray
    bulge: np.ndarray


class Outline(NamedTuple):
    """Convex planar outline given by outward unit normals (E, 2) and their offsets (E,) mm."""

    normals: np.ndarray
    offsets: np.ndarray


def smooth_min(a: Tensor, b: Tensor, blend_mm: float) -> Tensor:
    """Union with a fillet: the quadratic polynomial minimum; equals min(a, b) where |a - b| >= blend_mm."""
    overlap = (blend_mm - (a - b).abs()).clamp(min=0)
    return torch.minimum(a, b) - overlap * overlap * (0.25 / blend_mm)


def smooth_max(a: Tensor, b: Tensor, blend_mm: float) -> Tensor:
    """Intersection with a rounded edge; the mirror image of `smooth_min`."""
    overlap = (blend_mm - (a - b).abs()).clamp(min=0)
    return torch.maximum(a, b) + overlap * overlap * (0.25 / blend_mm)


def make_capsules(starts, ends, radii, ups, bulge) -> Capsules:
    """Stack segments; `ups` (M, 3) is made orthogonal to each segment, which must have a length > 0."""
    starts, ends, ups = (np.asarray(a, float).reshape(-1, 3) for a in (starts, ends, ups))
    along = ends - starts
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    up = ups - along * (ups * along).sum(1, keepdims=True)
    up /= np.linalg.norm(up, axis=1, keepdims=True)
    frames = np.stack([along, up, np.cross(along, up)])
    return Capsules(frames, starts, ends, np.asarray(radii, float).reshape(-1, 4), np.asarray(bulge, float))


def capsule_distances(capsules: Capsules, points: Tensor) -> Tensor:
    """Return the distances (M, N) of points (3, N) to M tapered elliptical capsules.

    The ellipsoid bound k0 (k0 - 1) / k1 of Quilez is used in the frame of the nearest segment point.
    """

    def const(array):
        return torch.as_tensor(np.ascontiguousarray(array), dtype=points.dtype, device=points.device)

    m = len(capsules.starts)
    shift = (capsules.frames * capsules.starts).sum(-1)
    local = torch.addmm(const(-shift.reshape(-1, 1)), const(capsules.frames.reshape(-1, 3)), points)
    along, up, across = local.reshape(3, m, -1)
    length = const(np.linalg.norm(capsules.ends - capsules.starts, axis=1)[:, None])
    u0, v0, u1, v1 = const(capsules.radii.T[..., None])
    t = (along / length).clamp(0, 1)
    inverse_up = 1 / torch.addcmul(u0, u1 - u0, t)
    inverse_across = 1 / torch.addcmul(v0, v1 - v0, t)
    if np.any(capsules.bulge):
        swell = 1 / (1 + 4 * const(capsules.bulge[:, None]) * t * (1 - t))
        inverse_up, inverse_across = inverse_up * swell, inverse_across * swell
    cap0, cap1 = (u0 * v0).sqrt(), (u1 * v1).sqrt()
    inverse_cap = 1 / torch.addcmul(cap0, cap1 - cap0, t)
    a, b, c = up * inverse_up, across * inverse_across, (along - t * length) * inverse_cap
    k0 = (a * a + b * b + c * c + 1e-9).sqrt()
    a, b, c = a * inverse_up, b * inverse_across, c * inverse_cap
    k1 = (a * a + b * b + c * c + 1e-9).rsqrt()
    return k0 * (k0 - 1) * k1


def ellipse_support(normals, half_first: float, half_second: float):
    """Return the support offsets (E,) of an axis-aligned ellipse at the origin."""
    return np.hypot(normals[:, 0] * half_first, normals[:, 1] * half_second)


def polygon_support(normals, corners):
    """Return the support offsets (E,) of the convex hull of corners (n, 2)."""
    return (normals @ np.asarray(corners, float).T).max(1)


def directions(count: int) -> np.ndarray:
    """Return `count` unit normals (count, 2) evenly around the circle."""
    angles = np.arange(count) * (2 * np.pi / count)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def outline_distance(outline: Outline, first: Tensor, second: Tensor) -> Tensor:
    """Return the distance of planar points to a convex outline (a lower bound outside its corners)."""
    result = None
    for (n1, n2), offset in zip(outline.normals.tolist(), outline.offsets.tolist(), strict=False):
        plane = torch.add(first * n1 - offset, second, alpha=n2)
        result = plane if result is None else torch.maximum(result, plane)
    return result


def drum_faces(drum: dict, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances to the side wall, above the upper plate and below the lower plate of a vertebral body.

    Parameters
    ----------
    drum : dict
        The numbers named in DRUM_FIELDS: floats, or tensors that broadcast against the points.
    points : tensor, shape (3, ...)
        Local mm. Beyond the plates the side wall continues as the rim outline.

    Returns
    -------
    side, above, below : tensors (...), mm
    """
    d = drum
    right, anterior, superior = points[0] - d["centre_right"], points[1] - d["centre_anterior"], points[2]
    mid, half_height = (d["top_offset"] + d["bottom_offset"]) / 2, (d["top_offset"] - d["bottom_offset"]) / 2
    level = ((superior - mid) / half_height).clamp(-1, 1)
    narrow = 1 - level * level
    inverse_width = 1 / ((1 - d["waist_width"] * narrow + d["taper"] * level) * d["half_width"])
    inverse_depth = 1 / ((1 - d["waist_depth"] * narrow) * d["half_depth"])
    ax = (right * right + 1e-4).sqrt()
    q, side = _superellipse(ax, anterior, inverse_width, inverse_depth, d["exponent"])
    lateral, forward = ax / d["half_width"], anterior / d["half_depth"]
    if _present(d["heart"]):
        side = side + (d["heart"] * 0.35 * d["half_width"]) * forward.clamp(0, 1) * lateral.clamp(max=1)
    if _present(d["lipping"]):
        # Bridging spurs grow from the front and the sides, not into the canal.
        rim = (1.4 * level * level).clamp(max=1) ** 3
        side = side - d["lipping"] * rim * (1 + forward.clamp(-1, 0))
    hollow = (1 - (lateral / 0.62).clamp(max=1) ** 2) * d["wall_concavity"]
    side = smooth_max(side, hollow - d["half_depth"] - anterior, 2.0)
    dish = 1 - q.clamp(max=1) ** 2
    above = superior - d["top_offset"] - d["top_right_slope"] * right - d["top_anterior_slope"] * anterior
    below = d["bottom_offset"] + d["bottom_right_slope"] * right + d["bottom_anterior_slope"] * anterior - superior
    above, below = above + d["dish_top"] * dish, below + d["dish_bottom"] * dish
    if _present(d["uncinate"]) or _present(d["lip"]):
        hook = ((lateral - 0.55) / 0.4).clamp(0, 1)
        hook = hook * hook * (3 - 2 * hook) * d["uncinate"]
        above = above - hook * (0.75 - 0.6 * forward).clamp(0, 1)
        below = below + 0.35 * hook - d["lip"] * ((forward - 0.3) / 0.7).clamp(0, 1) ** 2
    return side, above, below


def drum_distance(drum: dict, points: Tensor) -> Tensor:
    """Return the distance to a vertebral body: a waisted superelliptic drum with dished, tilted plates."""
    side, above, below = drum_faces(drum, points)
    return smooth_max(smooth_max(side, above, drum["edge"]), below, drum["edge"])


def _superellipse(ax, anterior, inverse_width, inverse_depth, exponent):
    """Return the gauge q (1 on the outline) and (q - 1) / |grad q|."""
    a, b = ax * inverse_width, (anterior * anterior + 1e-4).sqrt() * inverse_depth
    pa, pb = a**exponent, b**exponent
    total = pa + pb
    q = total ** (1 / exponent)
    ga, gb = pa / a * inverse_width, pb / b * inverse_depth
    return q, (q - 1) * total / (q * (ga * ga + gb * gb).sqrt())


def _present(value) -> bool:
    return torch.is_tensor(value) or value != 0
