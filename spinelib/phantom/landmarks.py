"""Where the trunk goes: frames, heights and outlines shared by skeleton and soft tissue of a subject.

Everything hangs on the posed spine: ribs on their vertebrae, the pelvis on the sacrum and the pelvic tilt,
the skull on C1, and the skin on all of them. Sizes are adult means scaled by stature (appendix D of the
anatomy facts; proportions after Drillis and Contini 1966), with seeded differences between subjects.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d, minimum_filter1d

from spinelib.phantom.population import Subject
from spinelib.phantom.solids import HeightTable

SIDES = (1.0, -1.0)
"""Right, left: factors of the right-left coordinate."""

_HEIGHTS_MM = np.arange(-700.0, 1000.0, 3.0)
_RIB_HALF_WIDTH_MM = (52, 80, 99, 111, 120, 127, 132, 135, 133, 128, 124, 116)
_RIB_DROP_MM = (40, 58, 76, 92, 104, 114, 122, 122, 116, 112, 108, 104)
_PELVIS_REFERENCE_TILT_DEG = 13.0
"""Pelvic tilt at which the local pelvis coordinates are drawn."""


@dataclass(frozen=True)
class RibRing:
    """Horizontal ellipse that carries one pair of ribs, before it is turned with its vertebra.

    Attributes
    ----------
    number : int
        1..13.
    pose : ndarray (4, 4)
        Pose of the rib's vertebra.
    centre_mm : ndarray (2,)
        (right, anterior) middle of the ellipse.
    half_width_mm, half_depth_mm : float
    yaw_deg : float
        Axial turn taken over from the vertebra.
    slope : float
        Rise per millimetre to the right, taken over from the vertebra's lateral tilt.
    start_mm : ndarray (2, 3)
        Tubercle of the right and the left rib, world.
    head_mm : ndarray (2, 3)
        Costovertebral joint of the right and the left rib, world.
    drop_mm : float
        Fall from the tubercle to the front.
    """

    number: int
    pose: np.ndarray
    centre_mm: np.ndarray
    half_width_mm: float
    half_depth_mm: float
    yaw_deg: float
    slope: float
    start_mm: np.ndarray
    head_mm: np.ndarray
    drop_mm: float


@dataclass(frozen=True)
class Hull:
    """Outline of trunk and neck by height: superelliptic sections; see `torso` for the distance."""

    middle: HeightTable
    centre: HeightTable
    half_width: HeightTable
    half_depth: HeightTable
    fat: HeightTable
    top_mm: float
    bottom_mm: float
    table_mm: float
    """Anterior coordinate of the table that flattens the back; -inf when standing."""


@dataclass(frozen=True)
class Landmarks:
    """Frames and sizes of one subject's trunk, world mm."""

    subject: Subject
    scale: float
    female: bool
    fat_mm: float
    levels: dict[str, np.ndarray]
    pelvis: np.ndarray
    hips_mm: np.ndarray
    rings: tuple[RibRing, ...]
    notch_mm: np.ndarray
    xiphoid_mm: np.ndarray
    shoulders_mm: np.ndarray
    spine_right: HeightTable
    spine_anterior: HeightTable
    hull: Hull

    def rng(self, stream: int) -> np.random.Generator:
        """Return the subject's own generator for one group of details."""
        return np.random.default_rng([abs(self.subject.seed), 7919, stream])


def find_landmarks(subject: Subject) -> Landmarks:
    """Derive the trunk's landmarks from an (unmirrored) subject."""
    female = subject.sex == "F"
    scale = subject.stature_mm / 1760.0
    levels = dict(zip(subject.levels, subject.poses, strict=True))
    rng = np.random.default_rng([abs(subject.seed), 7919, 0])
    fat = 7.0 + 68.0 * (subject.fat_fraction - 0.2) if female else 6.0 + 66.0 * (subject.fat_fraction - 0.15)
    fat = float(np.clip(fat, 4.0, 45.0))
    spine_right, spine_anterior = _spine_lines(subject)
    pelvis = _pelvis_pose(subject, scale)
    hips = np.array([pelvis @ [side * 88.0 * scale, 0, 0, 1] for side in SIDES])[:, :3]
    notch, xiphoid = _sternum_line(levels, spine_right, scale, subject.family.chest_depth)
    width = subject.family.chest_width * scale * rng.normal(1.0, 0.03)
    rings = tuple(
        _rib_ring(subject, index, int(level[1:]), width, scale, notch, xiphoid)
        for index, level in enumerate(subject.levels)
        if level.startswith("T")
    )
    shoulders = _shoulders(levels, spine_right, scale * rng.normal(1.0, 0.03))
    table, back = _back_line(subject, fat)
    hull = _hull(subject, scale, fat, rings, hips, notch, xiphoid, spine_right, spine_anterior, table, back)
    return Landmarks(
        subject, scale, female, fat, levels, pelvis, hips, rings, notch, xiphoid, shoulders,
        _table(spine_right), _table(spine_anterior), hull,
    )  # fmt: skip


def _table(values: np.ndarray) -> HeightTable:
    return HeightTable.sample(_HEIGHTS_MM, values)


def _centre(levels: dict[str, np.ndarray], *names: str) -> np.ndarray:
    return np.mean([levels[name][:3, 3] for name in names], axis=0)


def _spine_lines(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Right and anterior coordinate of the body centres by height, ends held."""
    centres = np.concatenate([subject.poses[:, :3, 3], subject.sacrum_pose[None, :3, 3]])[::-1]
    heights = np.maximum.accumulate(centres[:, 2] + 1e-3 * np.arange(len(centres)))
    inside = np.clip(_HEIGHTS_MM, heights[0], heights[-1])
    lines = PchipInterpolator(heights, centres[:, :2])(inside)
    return lines[:, 0], lines[:, 1]


def _pelvis_pose(subject: Subject, scale: float) -> np.ndarray:
    """Frame at the middle of the hip axis, 118 mm from the S1 plate, turned by the pelvic tilt."""
    origin, right = subject.sacrum_pose[:3, 3], subject.sacrum_pose[:3, 0]
    right = right / np.linalg.norm(right)
    forward = np.array([0.0, 1.0, 0.0]) - right[1] * right
    forward /= np.linalg.norm(forward)
    up = np.cross(right, forward)
    tilt = np.radians(subject.angles["pelvic_tilt_deg"])
    lean = tilt - np.radians(_PELVIS_REFERENCE_TILT_DEG)
    pose = np.eye(4)
    pose[:3, 0] = right
    pose[:3, 1] = np.cos(lean) * forward + np.sin(lean) * up
    pose[:3, 2] = np.cos(lean) * up - np.sin(lean) * forward
    pose[:3, 3] = origin + 118.0 * scale * (np.sin(tilt) * forward - np.cos(tilt) * up)
    return pose


def _sternum_line(levels, spine_right, scale, depth) -> tuple[np.ndarray, np.ndarray]:
    """Jugular notch (T2/T3) and xiphisternal joint, 150 mm of bone apart."""
    upper, lower = _centre(levels, "T2", "T3"), _centre(levels, "T8", "T9")
    top, bottom = upper[2] - 4.0 * scale, upper[2] - 152.0 * scale
    middle = gaussian_filter1d(spine_right, 20)
    right = 0.5 * np.interp([top, bottom], _HEIGHTS_MM, middle)
    notch = np.array([right[0], upper[1] + 66.0 * depth * scale, top])
    xiphoid = np.array([right[1], max(lower[1] + 128.0 * depth * scale, notch[1] + 12.0 * scale), bottom])
    return notch, xiphoid


def _rib_ring(subject, index, number, width, scale, notch, xiphoid) -> RibRing:
    pose, dims = subject.poses[index], {key: float(value[index]) for key, value in subject.dims.items()}
    row = min(number, 12) - 1
    depth, height = dims["endplate_depth_mm"], dims["height_posterior_mm"]
    demi = 0.42 if 2 <= number <= 9 else 0.22
    half_body, half_span = dims["endplate_width_mm"] / 2, dims["tp_span_mm"] / 2
    reach = half_span - 3.0 if number < 11 else half_body + 14.0
    heads = [pose @ [s * (half_body - 0.5), 5.0 - depth / 2, demi * height, 1] for s in SIDES]
    tubercles = [pose @ [s * reach, -depth / 2 - 10.0, 0.12 * height, 1] for s in SIDES]
    heads, tubercles = np.array(heads)[:, :3], np.array(tubercles)[:, :3]
    back = tubercles[:, 1].mean() - (2.0 if number == 1 else 11.0) * scale
    half_width, drop = _RIB_HALF_WIDTH_MM[row] * width, subject.family.rib_drop * _RIB_DROP_MM[row] * scale
    reached = np.clip((notch[2] - tubercles[:, 2].mean() + drop) / (notch[2] - xiphoid[2]), 0.0, 1.0)
    front = notch[1] + reached * (xiphoid[1] - notch[1]) - 4.0
    yaw = 0.6 * np.degrees(np.arctan2(pose[1, 0], pose[0, 0]))
    middle = 0.65 * pose[0, 3] + 0.35 * (notch[0] + reached * (xiphoid[0] - notch[0]))
    centre = np.array([middle, (front + back) / 2])
    slope = 0.5 * pose[2, 0]
    return RibRing(number, pose, centre, half_width, (front - back) / 2, yaw, slope, tubercles, heads, drop)


def _shoulders(levels, spine_right, scale) -> np.ndarray:
    """Centres of the humeral heads, right and left, (2, 3)."""
    upper, chest = _centre(levels, "T3"), _centre(levels, "T4")
    middle = 0.7 * np.interp(upper[2], _HEIGHTS_MM, spine_right)
    return np.array([[middle + s * 176.0 * scale, chest[1] - 2.0, upper[2] + 2.0] for s in SIDES])


def _back_line(subject: Subject, fat: float) -> tuple[float, np.ndarray]:
    """Table plane and the backmost bone by height: spinous tips, sacrum, occiput."""
    depth = subject.dims["endplate_depth_mm"] / 2 + subject.dims["spinous_length_mm"]
    zero = np.zeros_like(depth)
    local = np.stack([zero, -depth, -subject.dims["spinous_drop_mm"], zero + 1], axis=1)
    tips = np.einsum("nij,nj->ni", subject.poses, local)[:, 1:3]
    sacrum = [(subject.sacrum_pose @ [0, -38.0, -back, 1])[1:3] for back in (20.0, 60.0)]
    points = np.concatenate([tips, sacrum])
    points = points[np.argsort(points[:, 1])]
    back = np.interp(_HEIGHTS_MM, points[:, 1], points[:, 0])
    envelope = gaussian_filter1d(minimum_filter1d(back, 9), 5)
    trunk = [level[0] in "TL" for level in subject.levels] + [True, True]
    lowest = float(np.concatenate([tips, sacrum])[trunk, 0].min())
    return (lowest - 13.0 - 0.3 * fat if subject.posture == "supine" else -np.inf), envelope


def _hull(subject, k, fat, rings, hips, notch, xiphoid, spine_right, spine_anterior, table, back) -> Hull:
    """Interpolate sections between landmarks; the cage sets the chest, BMI the waist, the pelvis the hips."""
    girth = np.sqrt(subject.bmi / 26.0)
    female = subject.sex == "F"
    hip, neck = float(hips[:, 2].mean()), float(subject.poses[subject.levels.index("C6"), 2, 3])
    cage = np.array(sorted((r.start_mm[:, 2].mean() - 0.4 * r.drop_mm, r.half_width_mm) for r in rings[1:]))
    cage_low = cage[0]
    hips_half = (169.0 if female else 163.0) * k + 0.6 * fat + 120 * k * (girth - 1)
    waist = max((146.0 if female else 154.0) * k * girth**1.2, 108 * k + fat)
    padding = 0.8 * fat + 50 * k * (girth - 1)
    shoulder = notch[2] - 6.0
    knots = {
        hip - 125: 0.15 * hips_half,
        hip - 60: 0.84 * hips_half,
        hip - 5: hips_half,
        hip + 105: 0.6 * hips_half + 0.4 * max(waist, 135 * k),
        cage_low[0] - 30: waist,
        cage_low[0] + 60: cage[len(cage) // 3, 1] + 9 + padding,
        shoulder - 90: cage[-4, 1] + 23 + padding,
        shoulder - 25: 165 * k + 0.4 * fat,
        shoulder + 22: 112 * k + 0.4 * fat,
        neck - 12: 72 * k + 0.4 * fat,
        neck + 30: 58 * k + 0.3 * fat,
        neck + 90: 44 * k + 0.2 * fat,
    }
    half_width = _profile(knots)
    belly = 95 * k * girth**3.2 + 12
    spine_front = np.interp([cage_low[0] - 40, hip + 40], _HEIGHTS_MM, spine_anterior)
    fronts = {
        hip - 125: hips[:, 1].mean() + 15 * k * girth,
        hip - 40: hips[:, 1].mean() + 64 * k * girth,
        hip: hips[:, 1].mean() + 74 * k * girth,
        hip + 110: spine_front[1] + 1.02 * belly,
        cage_low[0] - 40: spine_front[0] + 1.0 * belly,
        xiphoid[2] - 30: max(xiphoid[1] + 8 + 0.6 * fat, spine_front[0] + 0.9 * belly),
        xiphoid[2] + 50: xiphoid[1] + 9 + 0.6 * fat + 20 * k * (girth - 1),
        notch[2] - 20: notch[1] + 12 + 0.4 * fat,
        neck + 10: np.interp(neck, _HEIGHTS_MM, spine_anterior) + 56 * k + 0.3 * fat,
        neck + 130: np.interp(neck + 90, _HEIGHTS_MM, spine_anterior) + 62 * k,
    }
    front = _profile(fronts)
    behind = np.maximum(back - 16 - 0.7 * fat, table - 7) if np.isfinite(table) else back - 16 - 0.7 * fat
    behind = np.minimum(behind, front - 90)
    follow = np.interp(_HEIGHTS_MM, [hip, hip + 150, shoulder - 60, neck], [0.0, 0.55, 0.55, 1.0])
    middle = follow * gaussian_filter1d(spine_right, 12) + (1 - follow) * hips[:, 0].mean()
    skin = _profile({hip - 100: 1.3 if female else 0.9, hip + 60: 1.25, cage_low[0]: 1.1, shoulder: 0.7, neck: 0.45})
    tables = (middle, (front + behind) / 2, half_width, (front - behind) / 2, np.maximum(skin * fat, 2.5))
    return Hull(*(_table(t) for t in tables), neck + 100.0, hip - 120.0, table)


def _profile(knots: dict[float, float]) -> np.ndarray:
    """Monotone cubic through (height, value) knots, ends held."""
    heights = np.array(sorted(knots))
    values = np.array([knots[h] for h in heights])
    if np.any(np.diff(heights) <= 0):
        heights = np.maximum.accumulate(heights + 1e-3 * np.arange(len(heights)))
    return PchipInterpolator(heights, values)(np.clip(_HEIGHTS_MM, heights[0], heights[-1]))
