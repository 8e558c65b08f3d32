"""Scoliotic curves: what is asked for, the coronal tilts that realise it exactly, rotation and wedging.

Tilt of a vertebra: angle in degrees between its axis and the vertical on the coronal plane, positive when the
axis leans to the patient's right going up. Arrays run cranial to caudal, like `Subject.levels`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.interpolate import CubicSpline

from spinelib.errors import InputError

SIDES = ("right", "left")
MAX_COBB_DEG = 90.0
SUPINE_COBB_FACTOR = 0.82
"""Supine over standing Cobb angle (62 adolescents, upright and supine, PMC5320720)."""

_LARGEST_LONE_LUMBAR_DEG = 25.0
_LARGEST_WEDGE_DEG = 45.0
_SUPINE_ROTATION_FACTOR = 0.75
_CLASS_EDGES_DEG = (10.0, 20.0, 30.0, 45.0, 70.0)
_CLASS_SHARES = {"natural": (0.915, 0.063, 0.015, 0.005, 0.002), "enriched": (0.60, 0.20, 0.10, 0.07, 0.03)}
_PATTERN_SHARES = {"thoracic": 0.38, "thoracolumbar": 0.24, "lumbar": 0.18, "double": 0.20}
_ENDS = {
    "thoracic": (("T4", "T5", "T6"), ("T11", "T12", "L1")),
    "thoracolumbar": (("T9", "T10"), ("L2", "L3")),
    "lumbar": (("T11", "T12"), ("L4", "L5")),
}
_ROTATION_RATIO = {"thoracic": 0.30, "thoracolumbar": 0.26, "lumbar": 0.22}
_RIGHT_THORACIC_SHARE = 0.85
_NOISE_COBB_SD_DEG = 3.5
_MAX_ITERATIONS = 80


@dataclass(frozen=True)
class ScoliosisCurve:
    """One coronal curve between two end vertebrae.

    Attributes
    ----------
    cobb_deg : float
        Curve-based Cobb angle, above 0 and at most 90 degrees.
    upper_end, lower_end : str
        End vertebrae, T1 or below; at least two levels apart.
    convex : str
        Side of the bulge, 'right' or 'left' of the patient.
    rotation_ratio : float
        Apical axial rotation over Cobb angle, 0 to 1; positive turns the body to the convex side.
    """

    cobb_deg: float
    upper_end: str
    lower_end: str
    convex: str
    rotation_ratio: float = 0.25

    def __post_init__(self):
        if not 0 < self.cobb_deg <= MAX_COBB_DEG:
            message = f"cobb_deg is {self.cobb_deg!r}. Expected above 0 and at most {MAX_COBB_DEG:g} degrees."
            raise InputError(message)
        if self.convex not in SIDES:
            message = f"unknown convex side {self.convex!r}. Expected one of: 'right', 'left'."
            raise InputError(message)
        if not 0 <= self.rotation_ratio <= 1:
            message = f"rotation_ratio is {self.rotation_ratio!r}. Expected 0 to 1 (degrees per degree of Cobb)."
            raise InputError(message)

    @property
    def direction(self) -> int:
        """+1 when convex to the right, -1 to the left."""
        return 1 if self.convex == "right" else -1

    def mirrored(self) -> "ScoliosisCurve":
        """Return the same curve, convex to the other side."""
        return replace(self, convex="left" if self.convex == "right" else "right")

    def standing(self) -> "ScoliosisCurve":
        """Return a supine curve as it stands: Cobb / 0.82, rotation ratio / 0.75 (PMC5320720)."""
        cobb = min(self.cobb_deg / SUPINE_COBB_FACTOR, MAX_COBB_DEG)
        return replace(self, cobb_deg=cobb, rotation_ratio=min(self.rotation_ratio / _SUPINE_ROTATION_FACTOR, 1.0))


def check_curves(curves: Sequence[ScoliosisCurve], levels: Sequence[str]) -> tuple[ScoliosisCurve, ...]:
    """Return `curves` ordered caudal to cranial, or say what is wrong with them.

    Raises
    ------
    InputError
        If an end vertebra is not between T1 and the last level, if the ends are less than two levels apart or
        swapped, if curves overlap, or if neighbours bulge to the same side.
    """
    allowed = list(levels[levels.index("T1") :])
    for curve in curves:
        if not isinstance(curve, ScoliosisCurve):
            message = f"expected ScoliosisCurve entries, given {type(curve).__name__}."
            raise InputError(message)
        for end in (curve.upper_end, curve.lower_end):
            if end not in allowed:
                message = f"unknown end vertebra {end!r}. Expected one of: {', '.join(allowed)}."
                raise InputError(message)
        if levels.index(curve.lower_end) - levels.index(curve.upper_end) < 2:
            ends = f"{curve.upper_end}-{curve.lower_end}"
            message = f"curve {ends}: lower_end must lie at least 2 levels below upper_end."
            raise InputError(message)
    ordered = tuple(sorted(curves, key=lambda curve: -levels.index(curve.lower_end)))
    for below, above in zip(ordered, ordered[1:], strict=False):
        _check_neighbours(below, above, levels)
    return ordered


def sample_curves(rng: np.random.Generator, mix: str, levels: Sequence[str]) -> tuple[ScoliosisCurve, ...]:
    """Draw the supine curves of one person from a severity mix.

    Severity classes (< 10, 10-20, 20-30, 30-45, 45-70 degrees) hold 91.5/6.3/1.5/0.5/0.2 % in 'natural'
    (assumed for a middle-aged population) and 60/20/10/7/3 % in 'enriched' (training). The lowest class is
    half-normal noise of 3.5 degrees.

    Raises
    ------
    InputError
        If `mix` is not 'natural' or 'enriched'.
    """
    if mix not in _CLASS_SHARES:
        message = f"unknown curves {mix!r}. Expected None, 'natural', 'enriched' or a tuple of ScoliosisCurve."
        raise InputError(message)
    cobb = _draw_cobb(rng, _CLASS_SHARES[mix])
    pattern = rng.choice(list(_PATTERN_SHARES), p=list(_PATTERN_SHARES.values()))
    if cobb > _LARGEST_LONE_LUMBAR_DEG and pattern != "thoracic":
        # Alone above a level sacrum it would need a wedged L5; people grow a counter-curve instead.
        pattern = "double"
    right_thoracic = rng.random() < _RIGHT_THORACIC_SHARE
    sides = ("right", "left") if right_thoracic else ("left", "right")
    if pattern == "double":
        junction = str(rng.choice(_ENDS["thoracic"][1]))
        upper = _draw_curve(rng, "thoracic", cobb, sides[0], (("T5", "T6"), (junction,)))
        lower = _draw_curve(rng, "lumbar", cobb * rng.uniform(0.6, 1.0), sides[1], ((junction,), ("L4",)))
        return (upper, lower)
    side = sides[0] if pattern == "thoracic" else sides[1]
    ends = tuple(tuple(level for level in options if level in levels) for options in _ENDS[pattern])
    return (_draw_curve(rng, pattern, cobb, side, ends),)


@dataclass(frozen=True)
class TiltPattern:
    """Half-cosine tilt between end vertebrae, linear in one balance offset and in the Cobb angles.

    Attributes
    ----------
    knots_mm : ndarray, shape (m,)
        Arc length above S1 of the knots: S1, the end vertebrae, C7.
    offset_gain : ndarray, shape (m,)
        Knot tilt per degree of balance offset.
    cobb_gain : ndarray, shape (m, n_curves)
        Knot tilt per degree of each curve's Cobb angle.
    """

    knots_mm: np.ndarray
    offset_gain: np.ndarray
    cobb_gain: np.ndarray

    @classmethod
    def from_curves(cls, curves: Sequence[ScoliosisCurve], levels: Sequence[str], arc_mm: np.ndarray) -> "TiltPattern":
        """Lay out knots for `curves` ordered caudal to cranial; `arc_mm` (n,) rises from S1."""
        knots, gains = [0.0], [np.zeros(len(curves))]
        for k, curve in enumerate(curves):
            if arc_mm[levels.index(curve.lower_end)] > knots[-1]:
                knots.append(arc_mm[levels.index(curve.lower_end)])
                gains.append(gains[-1])
            knots.append(arc_mm[levels.index(curve.upper_end)])
            gains.append(gains[-1] - curve.direction * np.eye(len(curves))[k])
        knots.append(arc_mm[levels.index("C7")])
        gains.append(np.zeros(len(curves)))
        offset_gain = np.ones(len(knots))
        offset_gain[[0, -1]] = 0.0
        return cls(np.array(knots), offset_gain, np.array(gains))

    def tilts_deg(self, arc_mm: np.ndarray, offset_deg: float, cobb_deg: np.ndarray) -> np.ndarray:
        """Tilt at arc lengths (n,), degrees; 0 below S1 and above C7."""
        values = offset_deg * self.offset_gain + self.cobb_gain @ cobb_deg
        segment = np.clip(np.searchsorted(self.knots_mm, arc_mm, side="right") - 1, 0, len(values) - 2)
        along = (arc_mm - self.knots_mm[segment]) / np.diff(self.knots_mm)[segment]
        rise = (1 - np.cos(np.pi * np.clip(along, 0, 1))) / 2
        return values[segment] + np.diff(values)[segment] * rise

    def balance_deg(self, cobb_deg: np.ndarray, shift_mm: float) -> float:
        """Offset that puts C7 `shift_mm` to the right of S1 for small tilts (closed form)."""
        drift = np.trapezoid(self.cobb_gain @ cobb_deg, self.knots_mm)
        return float((np.degrees(shift_mm) - drift) / np.trapezoid(self.offset_gain, self.knots_mm))


def realise_tilts(
    curves: Sequence[ScoliosisCurve],
    levels: Sequence[str],
    arc_mm: np.ndarray,
    body_mm: np.ndarray,
    chain: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    shift_mm: float,
) -> np.ndarray:
    """Find tilts (n,) whose measured Cobb angles equal the requested ones, with C7 balanced.

    The tilt pattern alone measures about 1 degree low on a spline through the body centres; a fixed point on
    the measured value removes that.

    Parameters
    ----------
    curves : sequence of ScoliosisCurve
        Ordered caudal to cranial (`check_curves`).
    arc_mm, body_mm : ndarray, shape (n,)
        Arc length of the body centres above S1 and mid body heights.
    chain : callable
        Tilts (n,) degrees -> body centres (n, 3) RAS mm and unit body axes (n, 3).
    shift_mm : float
        right_mm of the C7 centre relative to S1.

    Raises
    ------
    InputError
        If no such spine exists, as for a slight curve squeezed between strong ones.
    """
    pattern = TiltPattern.from_curves(curves, levels, arc_mm)
    target = np.array([curve.cobb_deg for curve in curves])
    cobb, c7 = target.copy(), levels.index("C7")
    offset = pattern.balance_deg(cobb, shift_mm)
    slope = np.radians(np.trapezoid(pattern.offset_gain, pattern.knots_mm))
    for _ in range(_MAX_ITERATIONS):
        tilts = pattern.tilts_deg(arc_mm, offset, cobb)
        centres, axes = chain(tilts)
        error = target - _spline_cobbs(centres, axes[:, 2] * body_mm / 2, levels, curves)
        lean = centres[c7, 0] - shift_mm
        if np.abs(error).max() < 1e-4 and abs(lean) < 1e-2:
            return tilts
        cobb = np.clip(cobb + error, 0.0, 1.5 * MAX_COBB_DEG)
        offset -= lean / slope
    asked = ", ".join(f"{c.upper_end}-{c.lower_end} {c.cobb_deg:g} deg {c.convex}" for c in curves)
    message = (
        f"no spine realises the curves {asked} (off by {np.abs(error).max():.2f} deg). "
        "Use smaller angles, longer curves or less unequal neighbours."
    )
    raise InputError(message)


def spline_cobb_deg(poses: np.ndarray, body_mm: np.ndarray, levels: Sequence[str], curve: ScoliosisCurve) -> float:
    """Measure a Cobb angle on the coronal curve through S1 and the body centres C2 to the last level.

    Largest minus smallest tangent angle of the cubic spline right(superior), from the lower plate of the
    lower end vertebra to the upper plate of the upper end vertebra.

    Parameters
    ----------
    poses : ndarray, shape (n, 4, 4)
        Body frames, RAS mm, cranial to caudal, with S1 at the origin.
    body_mm : ndarray, shape (n,)
        Mid body heights.

    Returns
    -------
    float
        Degrees, at least 0.
    """
    return float(_spline_cobbs(poses[:, :3, 3], poses[:, 2, 2] * body_mm / 2, levels, (curve,))[0])


def endplate_cobb_deg(
    poses: np.ndarray,
    dims: dict[str, np.ndarray],
    body_deg: np.ndarray,
    levels: Sequence[str],
    curve: ScoliosisCurve,
) -> float:
    """Measure the coronal angle from the upper plate of the upper to the lower plate of the lower end.

    `dims` holds `coronal_wedge_deg` (n,), `body_deg` (n,) the sagittal wedge of the bodies. Flexion, rotation
    and end-vertebra wedging set it a few per cent apart from the curve-based angle.
    """
    tilts = []
    for end, side in ((curve.upper_end, 1), (curve.lower_end, -1)):
        i = levels.index(end)
        slopes = np.tan(np.radians([dims["coronal_wedge_deg"][i], body_deg[i]]) / 2)
        normal = poses[i, :3, :3] @ np.array([-side * slopes[0], -side * slopes[1], 1.0])
        tilts.append(np.degrees(np.arctan2(normal[0], normal[2])))
    return float(abs(tilts[1] - tilts[0]))


def body_rotation_deg(pose: np.ndarray) -> float:
    """Measure how far a body frame (4, 4) is turned about its axis, positive towards the patient's right."""
    right = np.array([1.0, 0.0, 0.0]) - pose[0, 2] * pose[:3, 2]
    return float(np.degrees(np.arctan2(pose[:3, 1] @ right, pose[:3, 0] @ right)))


def apex_level(centres_mm: np.ndarray, levels: Sequence[str], curve: ScoliosisCurve) -> str:
    """Return the vertebra farthest to the convex side of the chord between the end vertebrae."""
    upper, lower = levels.index(curve.upper_end), levels.index(curve.lower_end)
    span = slice(upper, lower + 1)
    ends = centres_mm[[lower, upper]]
    chord = np.interp(centres_mm[span, 2], ends[:, 2], ends[:, 0])
    return levels[upper + int(np.argmax(curve.direction * (centres_mm[span, 0] - chord)))]


def axial_rotation_deg(
    curves: Sequence[ScoliosisCurve], levels: Sequence[str], arc_mm: np.ndarray, base_deg: np.ndarray
) -> np.ndarray:
    """Return the turn (n,) about each body's axis, degrees, positive when it faces the patient's right.

    Inside a curve: ratio * Cobb * sin(pi u), zero at the end vertebrae, towards the convex side. The pattern
    of a straight spine, `base_deg`, fades out at the apex as the curve grows to 20 degrees.
    """
    rotation = base_deg.copy()
    for curve in curves:
        bottom, top = (arc_mm[levels.index(end)] for end in (curve.lower_end, curve.upper_end))
        bump = np.sin(np.pi * np.clip((arc_mm - bottom) / (top - bottom), 0, 1))
        rotation -= base_deg * bump * min(1.0, curve.cobb_deg / 20.0)
        rotation += curve.direction * curve.rotation_ratio * curve.cobb_deg * bump
    return rotation


def coronal_wedges_deg(
    curves: Sequence[ScoliosisCurve],
    levels: Sequence[str],
    arc_mm: np.ndarray,
    body_mm: np.ndarray,
    disc_limit_deg: np.ndarray,
) -> np.ndarray:
    """Coronal wedge (n,) of the bodies, degrees, positive when taller on the patient's right.

    Bodies take 62 % of the tilt change in the thoracic spine, 30 % at T12-L1, 25 % below (Ding 2011). A disc
    that would exceed `disc_limit_deg` (n,) passes the excess to the bodies above and below.

    Raises
    ------
    InputError
        If a body would need more than 45 degrees: no vertebra, and beyond what the shapes can follow.
    """
    pattern = TiltPattern.from_curves(curves, levels, arc_mm)
    cobb = np.array([curve.cobb_deg for curve in curves])
    arc = np.append(arc_mm, 0.0)
    tilts = pattern.tilts_deg(arc, pattern.balance_deg(cobb, 0.0), cobb)
    middles = (arc[:-1] - body_mm / 2 + np.append(arc_mm[1:] + body_mm[1:] / 2, 0.0)) / 2
    edges = pattern.tilts_deg(middles, pattern.balance_deg(cobb, 0.0), cobb)
    body = np.array([_wedge_share(level) for level in levels]) * np.diff(edges, prepend=tilts[0])
    for _ in range(20):
        disc = np.diff(tilts) - (body + np.append(body[1:], 0.0)) / 2
        excess = np.sign(disc) * np.maximum(np.abs(disc) - disc_limit_deg, 0.0)
        body = body + excess / 2 + np.append(0.0, excess[:-1]) / 2
    if abs(body[worst := int(np.abs(body).argmax())]) > _LARGEST_WEDGE_DEG:
        message = (
            f"these curves would wedge {levels[worst]} by {abs(body[worst]):.0f} degrees; expected at most "
            f"{_LARGEST_WEDGE_DEG:.0f}. Lower cobb_deg, spread it over more levels or add a counter-curve."
        )
        raise InputError(message)
    return body


def _check_neighbours(below: ScoliosisCurve, above: ScoliosisCurve, levels: Sequence[str]) -> None:
    pair = f"{above.upper_end}-{above.lower_end} and {below.upper_end}-{below.lower_end}"
    if levels.index(above.lower_end) > levels.index(below.upper_end):
        message = f"curves {pair} overlap. Neighbours may at most share one end vertebra."
        raise InputError(message)
    if above.convex == below.convex:
        message = f"curves {pair} are both convex {above.convex}. Neighbours must alternate 'right' and 'left'."
        raise InputError(message)


def _spline_cobbs(
    centres: np.ndarray, reach_mm: np.ndarray, levels: Sequence[str], curves: Sequence[ScoliosisCurve]
) -> np.ndarray:
    first = levels.index("C2")
    superior, right = (np.concatenate(([0.0], centres[first:, axis][::-1])) for axis in (2, 0))
    slope = CubicSpline(superior, right).derivative()
    angles = []
    for curve in curves:
        upper, lower = levels.index(curve.upper_end), levels.index(curve.lower_end)
        window = np.linspace(centres[lower, 2] - reach_mm[lower], centres[upper, 2] + reach_mm[upper], 241)
        angles.append(np.ptp(np.degrees(np.arctan(slope(window)))))
    return np.array(angles)


def _wedge_share(level: str) -> float:
    return 0.30 if level in ("T12", "T13", "L1") else {"C": 0.4, "T": 0.62, "L": 0.25}[level[0]]


def _draw_cobb(rng: np.random.Generator, shares: Sequence[float]) -> float:
    severity = int(rng.choice(len(shares), p=shares))
    place, noise = rng.random(), abs(rng.normal(0, _NOISE_COBB_SD_DEG))
    if severity == 0:
        return float(np.clip(noise, 0.5, 9.9))
    return float(np.interp(place, (0, 1), _CLASS_EDGES_DEG[severity - 1 : severity + 1]))


def _draw_curve(
    rng: np.random.Generator,
    pattern: str,
    cobb_deg: float,
    convex: str,
    ends: tuple[tuple[str, ...], tuple[str, ...]],
) -> ScoliosisCurve:
    upper, lower = (str(rng.choice(options)) for options in ends)
    ratio = float(np.clip(rng.normal(_ROTATION_RATIO[pattern], 0.08), 0.0, 0.6))
    return ScoliosisCurve(cobb_deg, upper, lower, convex, _SUPINE_ROTATION_FACTOR * ratio)
