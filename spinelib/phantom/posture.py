"""Sagittal alignment: pelvis, kyphosis and lordosis solved together, and the chain of vertebral frames.

Inclination of a vertebra: angle in degrees between its axis and the vertical on the sagittal plane, positive
when the axis leans forward going up. Wedges are positive when taller in front (lordotic). Arrays run cranial
to caudal, like `Subject.levels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from spinelib.errors import InputError
from spinelib.phantom import scoliosis
from spinelib.phantom.family import STANDARD, Family
from spinelib.phantom.scoliosis import ScoliosisCurve

POSTURES = ("supine", "standing")
MIN_RIM_MM = 0.8
"""Least gap between two facing end-plates at the rim."""

_LORDOSIS_RANGE_DEG = (15.0, 95.0)
_DISC_LORDOSIS = np.array([0.26, 0.21, 0.14, 0.11, 0.09, 0.07])  # L5/S1 upwards
_BODY_LORDOSIS = np.array([0.10, 0.05, 0.02, 0.0, 0.02, 0.0])  # L5 upwards
_MEAN_LORDOSIS_DEG = 60.0
_DISC_KYPHOSIS = {"T4": 6, "T5": 6, "T6": 6, "T7": 6, "T8": 5, "T9": 4, "T10": 5, "T11": 4}
_BODY_KYPHOSIS_SHARE = 0.65
_BASE_ROTATION_DEG = {
    "C6": 0.0,
    "T3": -2.0,
    "T8": 2.5,
    "L3": 0.0,
}  # Kouwenhoven 2006: left above, right below
_RIM_PASSES = 8
_JUNCTION_WEDGE_DEG = {"C7": 2.0, "T1": -0.5, "T2": -0.5, "T3": -0.5, "T12": -1.0, "T13": -1.0}


@dataclass
class Anatomy:
    """Bones and discs of one person while they are put together; arrays (n,), cranial to caudal.

    `dims` holds the entries of `Subject.dims` and `body_mm`, the mid height. `mean_wedge_deg` is the
    sagittal wedge of each body before it follows lordosis and kyphosis, `fracture_deg` what fractures add to
    it.
    """

    levels: tuple[str, ...]
    dims: dict[str, np.ndarray]
    mean_wedge_deg: np.ndarray
    fracture_deg: np.ndarray
    sacrum: dict[str, float]

    @property
    def arc_mm(self) -> np.ndarray:
        """Arc length of the body centres above S1."""
        body = self.dims["body_mm"]
        return np.cumsum((body + self.dims["disc_below_mm"])[::-1])[::-1] - body / 2


@dataclass(frozen=True)
class Pelvis:
    """Sagittal targets of one person in one posture, degrees and mm.

    `incidence_deg` = `tilt_deg` + `slope_deg` exactly. `kyphosis_deg` is T4 upper to T12 lower plate,
    `sva_mm` the C7 offset in front of the posterior corner of S1, `cervical_deg` what C2-C7 lordosis adds to
    0.6 times the T1 slope.
    """

    incidence_deg: float
    tilt_deg: float
    kyphosis_deg: float
    sva_mm: float
    cervical_deg: float

    @property
    def slope_deg(self) -> float:
        """Sacral slope: inclination of the S1 end-plate."""
        return self.incidence_deg - self.tilt_deg


@dataclass(frozen=True)
class Sagittal:
    """Solved profile, degrees: wedges of bodies and discs below (n,), body inclinations (n,), T1 slope."""

    body_deg: np.ndarray
    disc_deg: np.ndarray
    inclination_deg: np.ndarray
    t1_slope_deg: float

    def plates_deg(self) -> tuple[np.ndarray, np.ndarray]:
        """Inclination of the upper and lower end-plate normals, each (n,) degrees."""
        return self.inclination_deg - self.body_deg / 2, self.inclination_deg + self.body_deg / 2

    def between_deg(self, levels: Sequence[str], upper: str, lower: str) -> float:
        """Upper plate of `upper` to lower plate of `lower`, degrees, positive for kyphosis."""
        top, bottom = self.plates_deg()
        return float(top[levels.index(upper)] - bottom[levels.index(lower)])


def sample_pelvis(
    rng: np.random.Generator, curves: Sequence[ScoliosisCurve], anatomy: Anatomy, family: Family = STANDARD
) -> tuple[Pelvis, Pelvis]:
    """Draw one person's supine and standing targets from the same numbers.

    PI 53 +- 10.5 (Mac-Thiong 2011, n = 709), PT = 0.37 PI - 7 +- 5 (PI classes of PMC4303780), TK from the
    lordosis expected for that PI (Vialle 2005 mean). Supine: PT +4.5 +- 2.5, TK -6 +- 3, C7 23 mm further
    forward of S1 (supine CT, CTSpinoPelvic1K; PMC5320720). Thoracic curves flatten the kyphosis by 0.2 +-
    0.08 degree per degree of Cobb above 10, down to 10 degrees; wedge fractures add their own angle.

    Returns
    -------
    supine, standing : Pelvis
    """
    draw = rng.standard_normal(9)
    incidence = float(np.clip(53 + 10.5 * draw[0] + family.incidence_deg, 30, 85))
    tilt = float(np.clip(0.37 * incidence - 7 + 5 * draw[1], -5, 35))
    lordosis = np.clip(0.62 * incidence + 27 + 7.5 * draw[2], 25, 85)
    kyphosis = np.clip(0.45 * lordosis + 13 + 8 * draw[3] + family.kyphosis_deg, 18, 65)
    sva, cervical = float(np.clip(5 + 20 * draw[4], -55, 65)), float(4 + 6 * draw[5])
    supine_tilt = float(tilt + max(0.0, 4.5 + 2.5 * draw[6]))
    supine_kyphosis = max(15.0, kyphosis - max(0.0, 6 + 3 * draw[7]))
    loss = float(np.clip(0.2 + 0.08 * draw[8], 0.05, 0.4)) * _thoracic_excess_deg(curves, anatomy.levels)
    gain = -anatomy.fracture_deg[_kyphotic(anatomy.levels)].sum()
    upright, lying = (float(max(10.0, angle - loss) + gain) for angle in (kyphosis, supine_kyphosis))
    standing = Pelvis(incidence, tilt, upright, sva, cervical)
    return Pelvis(incidence, supine_tilt, lying, sva + 23, cervical), standing


def solve_postures(
    pelvis: tuple[Pelvis, Pelvis], anatomy: Anatomy, curves: Sequence[ScoliosisCurve]
) -> tuple[Sagittal, Sagittal]:
    """Solve (supine, standing) and set, in place, body walls that suit standing and the supine curves."""
    dims, levels = anatomy.dims, anatomy.levels
    standing = solve_sagittal(pelvis[1], anatomy)
    supine = solve_sagittal(pelvis[0], anatomy, standing.body_deg)
    depth = dims["endplate_depth_mm"]
    lean = depth * np.tan(np.radians(standing.body_deg) / 2)
    has_plates = ~np.isin(levels, ("C1", "C2"))
    dims["height_anterior_mm"] = np.where(has_plates, dims["body_mm"] + lean, dims["height_anterior_mm"])
    dims["height_posterior_mm"] = np.where(has_plates, dims["body_mm"] - lean, dims["height_posterior_mm"])
    dims["coronal_wedge_deg"] = np.zeros(len(levels))
    if curves:
        sunk = depth * np.tan(np.radians(np.maximum(np.abs(supine.disc_deg), np.abs(standing.disc_deg))) / 2)
        room = np.sqrt(np.maximum((dims["disc_below_mm"] - MIN_RIM_MM) ** 2 - sunk**2, 0.0))
        limit = 2 * np.degrees(np.arctan(room / dims["endplate_width_mm"]))
        ordered = scoliosis.check_curves(curves, levels)
        wedges = scoliosis.coronal_wedges_deg(ordered, levels, anatomy.arc_mm, dims["body_mm"], limit)
        dims["coronal_wedge_deg"] = wedges
    return supine, standing


def place(
    rng: np.random.Generator,
    anatomy: Anatomy,
    profiles: tuple[Sagittal, Sagittal],
    pelvis: tuple[Pelvis, Pelvis],
    curves: tuple[Sequence[ScoliosisCurve], Sequence[ScoliosisCurve]],
) -> list[np.ndarray]:
    """Place every body (supine, standing), each (n, 4, 4); thicken discs, in place, where a rim closes.

    C7 stands 8 mm (SD) to one side in curves of 15 degrees and more, less in smaller ones. InputError if a
    rim cannot be kept 0.8 mm open.
    """
    dims, levels = anatomy.dims, anatomy.levels
    lean, strength = np.clip(rng.standard_normal(2), -3, 3)
    anchors = [levels.index(level) for level in _BASE_ROTATION_DEG]
    turn = np.interp(np.arange(len(levels)), anchors, list(_BASE_ROTATION_DEG.values())) * (1 + 0.5 * strength)
    for _ in range(_RIM_PASSES):
        poses, gaps = [], []
        for profile, hips, bends in zip(profiles, pelvis, curves, strict=True):
            shift = 8 * lean * min(max((curve.cobb_deg for curve in bends), default=0.0) / 15, 1.0)
            poses.append(assemble(anatomy, profile, hips.slope_deg, bends, shift, turn))
            gaps.append(rim_gaps_mm(poses[-1], hips.slope_deg, dims, profile.body_deg))
        missing = MIN_RIM_MM - np.min(gaps, axis=0)
        if missing.max() <= 0:
            return poses
        dims["disc_below_mm"] = dims["disc_below_mm"] + np.where(missing > 0, missing + 0.05, 0.0)
    message = f"discs cannot be kept {MIN_RIM_MM} mm open. Use smaller angles or longer curves."
    raise InputError(message)


def solve_sagittal(pelvis: Pelvis, anatomy: Anatomy, body_deg: np.ndarray | None = None) -> Sagittal:
    """Find the lumbar lordosis that carries C7 to its target, and the wedge of every body and disc.

    Lordosis is never drawn on its own: C7 moves backwards as it grows, so the target has one solution
    between 15 and 95 degrees (the nearer end is taken when the target lies outside). With `body_deg` (n,)
    the bodies keep the wedges found for another posture and only the discs adapt.
    """
    dims, levels = anatomy.dims, anatomy.levels
    target = pelvis.sva_mm - anatomy.sacrum["endplate_depth_mm"] / 2 * np.cos(np.radians(pelvis.slope_deg))
    room = 2 * np.degrees(np.arctan(np.maximum(dims["disc_below_mm"] - 1.4, 0.2) / dims["endplate_depth_mm"]))
    base, c7 = plate_axis(pelvis.slope_deg), levels.index("C7")

    def profile(lordosis_deg: float) -> Sagittal:
        body = _body_wedges(anatomy, lordosis_deg, pelvis.kyphosis_deg) if body_deg is None else body_deg
        return _profile(pelvis, levels, lordosis_deg, body, room)

    def error(lordosis_deg: float) -> float:
        tangents = tangents_from_angles(np.zeros(len(levels)), profile(lordosis_deg).inclination_deg)
        return chain_centres(tangents, base, dims["body_mm"], dims["disc_below_mm"])[c7, 1] - target

    ends = [error(lordosis) for lordosis in _LORDOSIS_RANGE_DEG]
    if ends[0] * ends[1] >= 0:
        return profile(_LORDOSIS_RANGE_DEG[int(np.argmin(np.abs(ends)))])
    return profile(brentq(error, *_LORDOSIS_RANGE_DEG, xtol=1e-3))


def assemble(
    anatomy: Anatomy,
    profile: Sagittal,
    slope_deg: float,
    curves: Sequence[ScoliosisCurve],
    shift_mm: float,
    base_rotation_deg: np.ndarray,
) -> np.ndarray:
    """Tilt and turn every body so as to realise `curves` with C7 `shift_mm` to the right of S1.

    Returns
    -------
    ndarray, shape (n, 4, 4)
        Body frames -> RAS mm.

    Raises
    ------
    InputError
        If no spine realises the curves.
    """
    dims, levels, base = anatomy.dims, anatomy.levels, plate_axis(slope_deg)

    def chain(tilts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axes = tangents_from_angles(tilts, profile.inclination_deg)
        return chain_centres(axes, base, dims["body_mm"], dims["disc_below_mm"]), axes

    ordered, arc = scoliosis.check_curves(curves, levels), anatomy.arc_mm
    tilts = np.zeros(len(levels))
    if ordered:
        tilts = scoliosis.realise_tilts(ordered, levels, arc, dims["body_mm"], chain, shift_mm)
    centres, axes = chain(tilts)
    return frames(axes, centres, scoliosis.axial_rotation_deg(ordered, levels, arc, base_rotation_deg))


def rim_gaps_mm(poses: np.ndarray, slope_deg: float, dims: dict[str, np.ndarray], body_deg: np.ndarray) -> np.ndarray:
    """Measure the least distance (n,) between each lower end-plate rim and the plate below; infinite for C1.

    End-plates are flat ellipses tilted by half the body's sagittal (`body_deg`) and coronal wedge.
    """
    tilts = np.tan(np.radians(np.stack([dims["coronal_wedge_deg"], body_deg], axis=1)) / 2)
    radii = np.stack([dims["endplate_width_mm"], dims["endplate_depth_mm"]], axis=1) / 2
    axes, half = poses[:, :3, 2], dims["body_mm"][:, None] / 2
    plane = np.einsum("nij,njk->nik", poses[:, :3, :3], np.tile(np.eye(3, 2), (len(poses), 1, 1)))
    lower = plane - axes[:, :, None] * tilts[:, None, :]
    upper = np.append(plane + axes[:, :, None] * tilts[:, None, :], frames_of_plate(slope_deg)[None, :3, :2], axis=0)
    lower_centre = poses[:, :3, 3] - axes * half
    upper_centre = np.append(poses[:, :3, 3] + axes * half, np.zeros((1, 3)), axis=0)[1:]
    upper, below = upper[1:], np.append(radii[1:], radii[-1:], axis=0)
    between = lower_centre - upper_centre
    gaps = np.minimum(_clearance(between, upper, lower, radii), _clearance(between, lower, upper, below))
    gaps[0] = np.inf
    return gaps


def tangents_from_angles(tilt_deg: np.ndarray, inclination_deg: np.ndarray) -> np.ndarray:
    """Return unit superior axes (n, 3), RAS, whose coronal and sagittal projections show the given angles."""
    axes = np.stack([np.tan(np.radians(tilt_deg)), np.tan(np.radians(inclination_deg)), np.ones(len(tilt_deg))], axis=1)
    return axes / np.linalg.norm(axes, axis=1, keepdims=True)


def plate_axis(slope_deg: float) -> np.ndarray:
    """Return the normal (3,) of the S1 end-plate, RAS."""
    return tangents_from_angles(np.zeros(1), np.array([slope_deg]))[0]


def frames_of_plate(slope_deg: float) -> np.ndarray:
    """Return the frame (4, 4) of the S1 end-plate: origin at its centre, superior axis along its normal."""
    return frames(plate_axis(slope_deg)[None], np.zeros((1, 3)), np.zeros(1))[0]


def chain_centres(tangents: np.ndarray, base: np.ndarray, body_mm: np.ndarray, disc_mm: np.ndarray) -> np.ndarray:
    """Stack bodies and discs upwards from S1 at the origin.

    Parameters
    ----------
    tangents : ndarray, shape (n, 3)
        Unit superior axis of each body, cranial to caudal.
    base : ndarray, shape (3,)
        Normal of the S1 end-plate.
    body_mm, disc_mm : ndarray, shape (n,)
        Mid heights of the bodies and of the discs below them.

    Returns
    -------
    ndarray, shape (n, 3)
        Body centres, RAS mm.
    """
    below = np.vstack([tangents[1:], base])
    across = tangents + below
    across *= (disc_mm / np.linalg.norm(across, axis=1))[:, None]
    along = tangents * body_mm[:, None]
    tops = np.cumsum((across + along)[::-1], axis=0)[::-1]
    return tops - along / 2


def frames(tangents: np.ndarray, centres_mm: np.ndarray, rotation_deg: np.ndarray) -> np.ndarray:
    """Build body frames (n, 4, 4), local -> RAS mm: right axis nearest to world right, then axial rotation.

    `rotation_deg` (n,) is positive when the body faces the patient's right.
    """
    right = np.array([1.0, 0.0, 0.0]) - tangents[:, :1] * tangents
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    forward = np.cross(tangents, right)
    cosine, sine = np.cos(np.radians(rotation_deg))[:, None], np.sin(np.radians(rotation_deg))[:, None]
    poses = np.tile(np.eye(4), (len(tangents), 1, 1))
    poses[:, :3, 0] = cosine * right - sine * forward
    poses[:, :3, 1] = sine * right + cosine * forward
    poses[:, :3, 2] = tangents
    poses[:, :3, 3] = centres_mm
    return poses


def _clearance(between: np.ndarray, plate: np.ndarray, rim: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Least distance of an elliptic rim (in-plane axes (n, 3, 2)) from a plate a vector `between` away."""
    normal = np.cross(plate[:, :, 0], plate[:, :, 1])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    sink = np.einsum("ni,nik->nk", normal, rim) * radii
    return np.einsum("ni,ni->n", normal, between) - np.linalg.norm(sink, axis=1)


def _body_wedges(anatomy: Anatomy, lordosis_deg: float, kyphosis_deg: float) -> np.ndarray:
    """Lumbar bodies follow lordosis a little; thoracic ones make up 65 % of the kyphosis."""
    levels, wedges = anatomy.levels, anatomy.mean_wedge_deg.copy()
    lumbar, thoracic = _indices(levels, "L")[::-1], _indices(levels, "T")
    measured = _kyphotic(levels)
    sound_kyphosis = kyphosis_deg + anatomy.fracture_deg[measured].sum()
    wedges[thoracic] *= -_BODY_KYPHOSIS_SHARE * sound_kyphosis / min(wedges[measured].sum(), -5.0)
    wedges[lumbar] += _BODY_LORDOSIS[: len(lumbar)] * (lordosis_deg - _MEAN_LORDOSIS_DEG)
    return wedges + anatomy.fracture_deg


def _profile(
    pelvis: Pelvis, levels: Sequence[str], lordosis_deg: float, body_deg: np.ndarray, room_deg: np.ndarray
) -> Sagittal:
    disc = np.array([_JUNCTION_WEDGE_DEG.get(level, 0.0) for level in levels])
    lumbar = _indices(levels, "L")[::-1]
    left = lordosis_deg - body_deg[lumbar].sum()
    disc[lumbar] = _spread(left, _DISC_LORDOSIS[: len(lumbar)], room_deg[lumbar])
    curved = _kyphotic(levels)
    mobile = [levels.index(level) for level in _DISC_KYPHOSIS]
    left = -pelvis.kyphosis_deg - body_deg[curved].sum()
    disc[mobile] = _spread(left, np.array(list(_DISC_KYPHOSIS.values())), room_deg[mobile])
    below_c7 = pelvis.slope_deg - (body_deg + disc)[levels.index("T1") :].sum()
    neck = [levels.index(f"C{i}") for i in range(2, 7)]
    cervical = np.clip(0.6 * below_c7 + pelvis.cervical_deg, -5, 35)
    disc[neck] = _spread(cervical - body_deg[neck[1:]].sum() - body_deg[levels.index("C7")], np.ones(5), room_deg[neck])
    lower = pelvis.slope_deg - np.cumsum((body_deg + disc)[::-1])[::-1] + body_deg
    return Sagittal(body_deg, disc, lower - body_deg / 2, float(below_c7))


def _spread(total_deg: float, weights: np.ndarray, room_deg: np.ndarray) -> np.ndarray:
    """Split a total by weights without closing any rim; what one disc cannot take goes to the others."""
    wedges, free = np.zeros(len(weights)), np.ones(len(weights), bool)
    for _ in range(len(weights)):
        rest = total_deg - wedges[~free].sum()
        wedges[free] = rest * weights[free] / weights[free].sum()
        over = free & (np.abs(wedges) > room_deg)
        if not over.any():
            break
        wedges[over] = np.sign(rest) * room_deg[over]
        free &= ~over
        if not free.any():
            break
    return wedges


def _indices(levels: Sequence[str], letter: str) -> list[int]:
    return [i for i, level in enumerate(levels) if level[0] == letter]


def _kyphotic(levels: Sequence[str]) -> slice:
    return slice(levels.index("T4"), levels.index("T12") + 1)


def _thoracic_excess_deg(curves: Sequence[ScoliosisCurve], levels: Sequence[str]) -> float:
    """Cobb beyond 10 degrees, summed over curves centred in the thoracic spine."""
    middles = [(levels.index(curve.upper_end) + levels.index(curve.lower_end)) // 2 for curve in curves]
    return sum(max(0.0, c.cobb_deg - 10) for c, i in zip(curves, middles, strict=True) if levels[i][0] == "T")
