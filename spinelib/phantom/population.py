"""Subjects of a synthetic cohort: who they are, the size of every vertebra and where it lies.

World frame RAS+ mm with the origin at the centre of the S1 end-plate; arrays run cranial to caudal. Per-level
means come from `morphometry.csv` (male means, spreads, female factors, sources).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pandas as pd

from spinelib.errors import InputError
from spinelib.levels import VERTEBRAE
from spinelib.phantom import posture as sagittal
from spinelib.phantom import scoliosis
from spinelib.phantom.family import STANDARD, Family, morphometry
from spinelib.phantom.posture import Anatomy, Pelvis, Sagittal
from spinelib.phantom.scoliosis import ScoliosisCurve

SEXES = ("F", "M")
DIM_NAMES = (
    "height_anterior_mm",
    "height_posterior_mm",
    "endplate_width_mm",
    "endplate_depth_mm",
    "canal_width_mm",
    "canal_depth_mm",
    "pedicle_width_mm",
    "pedicle_height_mm",
    "tp_span_mm",
    "spinous_length_mm",
    "spinous_drop_mm",
    "disc_below_mm",
    "coronal_wedge_deg",
)

_ALL_LEVELS = (*VERTEBRAE[:19], "T13", *VERTEBRAE[19:], "L6")
_POSITIONS = np.array([{"T13": 18.5, "L6": 24.0}.get(v) or VERTEBRAE.index(v) for v in _ALL_LEVELS])
_VARIANT_RATES = {"L6": 0.04, "sacralised": 0.04, "T13": 0.03}
_SACRUM_COLUMNS = {"width": "endplate_w_sup_mm", "depth": "endplate_d_mm"}
_STREAMS = ("person", "size", "variant", "pelvis", "curves", "balance", "degeneration", "shape")
_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Subject:
    """One synthetic person; n is the number of levels.

    Attributes
    ----------
    levels : tuple of str
        C1 to L5; variants hold 'T13' or 'L6', or lack 'L5' (fused to the sacrum).
    dims : dict of ndarray, shape (n,)
        One entry per `DIM_NAMES`. Disc narrowing and wedge fractures are already in the heights;
        `coronal_wedge_deg` is positive when the body is taller on the patient's right. Body plates are
        tilted by half the wedge each. C1 has no body: its height is that of the ring, `disc_below_mm` the
        joint gap to C2.
    poses : ndarray, shape (n, 4, 4)
        Body-centre frames (right, anterior, superior) -> world RAS mm.
    sacrum_pose, sacrum_dims : ndarray, shape (4, 4), and dict of float
        S1 end-plate: origin at its centre, superior axis along its normal; its width and depth.
    angles : dict of float, see `sample_subject`
    curves, apex : tuple of ScoliosisCurve, and str
        Requested curves, and the apical vertebra of the largest ('' without one).
    degeneration : dict of ndarray, shape (n,)
        `osteophyte_mm` and `fracture_fraction` (anterior height lost), or empty.
    is_mirrored : bool
        Whether asymmetric shape details must be mirrored too.
    family : Family
    arms : tuple of bool
        Whether the right and the left arm are there (or in the field of view).
    fused : tuple of str
        Levels that carry pedicle screws on two rods.
    """

    seed: int
    sex: str
    age_years: float
    stature_mm: float
    bmi: float
    fat_fraction: float
    bone_density: float
    posture: str
    levels: tuple[str, ...]
    dims: dict[str, np.ndarray]
    poses: np.ndarray
    sacrum_pose: np.ndarray
    sacrum_dims: dict[str, float]
    angles: dict[str, float]
    curves: tuple[ScoliosisCurve, ...]
    apex: str
    shape_seed: int
    degeneration: dict[str, np.ndarray] = field(default_factory=dict)
    is_mirrored: bool = False
    family: Family = STANDARD
    arms: tuple[bool, bool] = (True, True)
    fused: tuple[str, ...] = ()

    def index(self, level: str) -> int:
        """Position of `level` in every per-level array."""
        if level not in self.levels:
            message = f"this subject has no level {level!r}. Expected one of: {', '.join(self.levels)}."
            raise InputError(message)
        return self.levels.index(level)


def sample_subject(
    seed: int,
    *,
    sex: str | None = None,
    age_years: float | None = None,
    posture: str = "supine",
    curves: str | Sequence[ScoliosisCurve] | None = None,
    degenerative: bool = False,
    variants: bool = True,
    family: Family = STANDARD,
) -> Subject:
    """Draw one person; the same arguments give the same person to the last bit.

    Each step has its own child seed, so another posture or another curve leaves the anatomy draws alone.
    Bodies do not change with posture: lying down is taken up by the discs.

    Parameters
    ----------
    seed : int
        Not negative.
    sex, age_years : optional
        'F' or 'M', and 18 to 100; drawn (52 % F, 64 +- 7.7 years) when missing.
    posture : {'supine', 'standing'}
        Scanners see people supine, radiographs standing.
    curves : None, 'natural', 'enriched' or tuple of ScoliosisCurve
        None is straight; the names are severity mixes (`scoliosis.sample_curves`); a tuple is realised as
        given, in the posture given.
    degenerative : bool
        Disc narrowing, osteophytes and wedge fractures, at rates that rise with age (assumed).
    variants : bool
        Six or four lumbar vertebrae (8 %), or 13 thoracic (3 %). A variant without a level that `curves`
        names is passed over.
    family : Family
        The population drawn from.

    Returns
    -------
    Subject
        `angles`: pelvic_incidence_deg = pelvic_tilt_deg + sacral_slope_deg, thoracic_kyphosis_deg (T4 upper
        to T12 lower plate), lumbar_lordosis_deg (L1 upper plate to S1), t1_slope_deg, sva_mm, cobb_deg
        (largest, curve-based, 0 without curve), cobb_endplate_deg (largest, plate normals on the coronal
        plane), apical_rotation_deg (positive to the convex side).

    Raises
    ------
    InputError
        For a value outside those listed.
    """
    _check_request(seed, sex, age_years, posture, curves)
    streams = dict(zip(_STREAMS, np.random.SeedSequence(seed).spawn(len(_STREAMS)), strict=True))
    rng = {name: np.random.default_rng(stream) for name, stream in streams.items()}
    person, size = _draw_person(rng["person"], sex, age_years, family)
    levels = _draw_levels(rng["variant"], variants, curves)
    by_posture = _resolve_curves(rng["curves"], curves, levels)
    anatomy = _draw_anatomy(rng["size"], person, size, levels)
    degeneration = _degenerate(rng["degeneration"], anatomy, person) if degenerative else {}
    pelvis = sagittal.sample_pelvis(rng["pelvis"], by_posture[0], anatomy, family)
    profiles = sagittal.solve_postures(pelvis, anatomy, by_posture[0])
    poses = sagittal.place(rng["balance"], anatomy, profiles, pelvis, by_posture)
    which = sagittal.POSTURES.index(posture)
    requested = by_posture[which]
    angles, apex = _measure(poses[which], anatomy, profiles[which], pelvis[which], requested)
    return Subject(
        seed=seed,
        posture=posture,
        levels=levels,
        dims={name: anatomy.dims[name] for name in DIM_NAMES},
        poses=poses[which],
        sacrum_pose=sagittal.frames_of_plate(pelvis[which].slope_deg),
        sacrum_dims=anatomy.sacrum,
        angles=angles,
        curves=requested,
        apex=apex,
        shape_seed=int(streams["shape"].generate_state(1)[0]),
        degeneration=degeneration,
        **person,
    )


def mirrored(subject: Subject) -> Subject:
    """Reflect a subject across the sagittal plane; doing it twice gives the subject back."""
    wedge = -subject.dims["coronal_wedge_deg"]
    return replace(
        subject,
        poses=_MIRROR @ subject.poses @ _MIRROR,
        sacrum_pose=_MIRROR @ subject.sacrum_pose @ _MIRROR,
        dims=subject.dims | {"coronal_wedge_deg": wedge},
        curves=tuple(curve.mirrored() for curve in subject.curves),
        is_mirrored=not subject.is_mirrored,
        arms=subject.arms[::-1],
    )


def describe(subjects: Iterable[Subject]) -> pd.DataFrame:
    """Tabulate subjects, one row each: who they are, their angles, and the T1-L5 arc length."""
    keys = ("seed", "sex", "age_years", "stature_mm", "bmi", "fat_fraction", "bone_density", "posture")
    rows = []
    for subject in subjects:
        row = {key: getattr(subject, key) for key in keys} | subject.angles
        row |= {"n_curves": len(subject.curves), "apex": subject.apex, "levels": len(subject.levels)}
        rows.append(row | {"arc_t1_l5_mm": _arc_length(subject)})
    return pd.DataFrame(rows)


def _check_request(seed: int, sex: str | None, age_years: float | None, posture: str, curves: object) -> None:
    if not isinstance(seed, int | np.integer) or seed < 0:
        message = f"seed is {seed!r}. Expected an integer of 0 or more."
        raise InputError(message)
    if sex is not None and sex not in SEXES:
        message = f"unknown sex {sex!r}. Expected one of: 'F', 'M', or None to draw it."
        raise InputError(message)
    if age_years is not None and not 18 <= age_years <= 100:
        message = f"age_years is {age_years!r}. Expected 18 to 100, or None to draw it."
        raise InputError(message)
    if posture not in sagittal.POSTURES:
        message = f"unknown posture {posture!r}. Expected one of: 'supine', 'standing'."
        raise InputError(message)
    if not (curves is None or isinstance(curves, str | tuple | list)):
        allowed = "Expected None, 'natural', 'enriched' or a tuple of ScoliosisCurve"
        message = f"curves is a {type(curves).__name__}. {allowed}."
        raise InputError(message)


def _draw_person(rng: np.random.Generator, sex: str | None, age_years: float | None, family: Family) -> tuple:
    """Person-level fields and the common size factor (ln SD 0.042, r 0.7 with stature)."""
    is_female, z = rng.random() < 0.52, rng.standard_normal(6)
    sex = sex or ("F" if is_female else "M")
    female = sex == "F"
    age = float(np.clip(64 + 7.7 * z[0], 45, 82)) if age_years is None else float(age_years)
    mean, sd = (1630.0, 62.0) if female else (1760.0, 66.0)
    stature = mean + sd * (0.7 * z[1] + np.sqrt(1 - 0.49) * z[2])
    bmi = np.clip(family.bmi + (26 + 4.8 * z[3] if female else 27 + 4.0 * z[3]), 18, 42)
    fat = np.clip((0.38 if female else 0.29) + 0.06 * (0.7 * z[3] + np.sqrt(1 - 0.49) * z[4]), 0.12, 0.52)
    density = np.clip(1 + 0.13 * z[5] - (0.006 if female else 0.003) * (age - 64), 0.5, 1.6)
    person = {"sex": sex, "age_years": age, "stature_mm": float(np.clip(stature, 1450, 2000)), "family": family}
    person |= {"bmi": float(bmi), "fat_fraction": float(fat), "bone_density": float(density)}
    return person, float(np.exp(0.042 * np.clip(z[1], -2.9, 2.9)))


def _draw_levels(rng: np.random.Generator, variants: bool, curves: object) -> tuple[str, ...]:
    place = rng.random()
    edges = np.cumsum(list(_VARIANT_RATES.values()))
    if not variants or place >= edges[-1]:
        return VERTEBRAE
    kind = list(_VARIANT_RATES)[int(np.searchsorted(edges, place, side="right"))]
    if kind == "sacralised":
        given = [] if isinstance(curves, str) else curves or []
        return VERTEBRAE if any("L5" in _ends(curve) for curve in given) else VERTEBRAE[:-1]
    return tuple(v for v in _ALL_LEVELS if v in VERTEBRAE or v == kind)


def _ends(curve: object) -> tuple[str, ...]:
    return (curve.upper_end, curve.lower_end) if isinstance(curve, ScoliosisCurve) else ()


def _resolve_curves(
    rng: np.random.Generator, curves: object, levels: tuple[str, ...]
) -> tuple[tuple[ScoliosisCurve, ...], tuple[ScoliosisCurve, ...]]:
    """Curves lying down and standing up; given curves are taken as they are in both."""
    if isinstance(curves, str):
        supine = scoliosis.sample_curves(rng, curves, levels)
        return supine, tuple(curve.standing() for curve in supine)
    given = tuple(curves or ())
    scoliosis.check_curves(given, levels)
    return given, given


def _draw_anatomy(rng: np.random.Generator, person: dict, size: float, levels: tuple[str, ...]) -> Anatomy:
    """Table means times sex factors times separate Gaussian processes along the spine, one per quantity."""
    table, female, family = morphometry().loc[list(_ALL_LEVELS)], person["sex"] == "F", person["family"]
    height, width, canal, tp, disc = (
        table[f"fm_{key}"].to_numpy() if female else 1.0 for key in ("height", "width", "canal", "tp", "disc")
    )
    height = family.body_height * height * size * _field(rng, 0.045, 0.02, 5)
    breadth = size**0.8 * _field(rng, 0.055, 0.025, 6)
    canal = family.canal * canal * (canal_field := _field(rng, 0.075, 0.03, 6))
    pedicle, tp_field = _field(rng, 0.15, 0.05, 5), size**0.8 * _field(rng, 0.06, 0.03, 4)
    spinous = family.spinous_length * tp_field**0.5 * _field(rng, 0.05, 0.03, 4)
    disc = family.disc_height * disc * _field(rng, 0.13, 0.05, 4) * np.exp(-0.002 * max(0.0, person["age_years"] - 60))
    mean = {name: table[name].to_numpy(float) for name in table.columns if name.endswith("_mm")}
    plate = (mean["endplate_w_sup_mm"] + mean["endplate_w_inf_mm"]) / 2
    full = {
        "height_anterior_mm": mean["body_h_ant_mm"] * height,
        "height_posterior_mm": mean["body_h_post_mm"] * height,
        "endplate_width_mm": family.endplate_width * plate * width * breadth,
        "endplate_depth_mm": family.endplate_depth
        * mean["endplate_d_mm"]
        * width
        * breadth
        * np.exp(0.03 * rng.standard_normal(len(plate))),
        "canal_width_mm": mean["canal_w_mm"] * canal,
        "canal_depth_mm": mean["canal_d_mm"] * canal / canal_field**0.1,
        "pedicle_width_mm": np.maximum(family.pedicle_width * mean["pedicle_w_mm"] * width * pedicle, 3.2),
        "tp_span_mm": family.transverse_span * mean["tp_span_mm"] * tp * tp_field,
        "spinous_length_mm": mean["spinous_len_from_post_wall_mm"] * width * spinous,
        "spinous_drop_mm": mean["spinous_tip_drop_mm"] * height,
        "disc_below_mm": mean["disc_below_h_mm"] * disc,
    }
    full["body_mm"] = (full["height_anterior_mm"] + full["height_posterior_mm"]) / 2
    full["pedicle_height_mm"] = np.minimum(mean["pedicle_h_mm"] * height, 0.62 * full["body_mm"] + 2)
    wedge = _mean_wedges(table, female) + 0.8 * rng.standard_normal(len(plate))
    wedge[:2] = 0.0
    s1 = morphometry().loc["S1"]
    factor = (s1["fm_width"] if female else 1.0) * breadth[-2]
    plates = {"width": factor * family.endplate_width, "depth": factor * family.endplate_depth}
    sacrum = {f"endplate_{k}_mm": float(s1[c] * plates[k]) for k, c in _SACRUM_COLUMNS.items()}
    keep = [_ALL_LEVELS.index(level) for level in levels]
    return Anatomy(levels, {k: v[keep] for k, v in full.items()}, wedge[keep], np.zeros(len(keep)), sacrum)


def _mean_wedges(table: pd.DataFrame, female: bool) -> np.ndarray:
    """Mean body wedge, degrees, lordotic positive; women's lumbar bodies are more so (Masharawi 2008)."""
    rise = (table["body_h_ant_mm"] - table["body_h_post_mm"]) / table["endplate_d_mm"]
    wedge = 2 * np.degrees(np.arctan(rise / 2))
    sex_shift = (table["wedge_male_deg"] - table["wedge_female_deg"]).where(table.index.str[0] == "L", 0.0)
    return (wedge + sex_shift if female else wedge).to_numpy(float)


@cache
def _kernel_root(length: float) -> np.ndarray:
    kernel = np.exp(-np.abs(_POSITIONS[:, None] - _POSITIONS) / length)
    return np.linalg.cholesky(kernel + 1e-9 * np.eye(len(_POSITIONS)))


def _field(rng: np.random.Generator, smooth_sd: float, level_sd: float, length: float) -> np.ndarray:
    """Log-normal factor per level: correlated along the spine plus independent."""
    smooth = _kernel_root(length) @ rng.standard_normal(len(_POSITIONS))
    return np.exp(smooth_sd * smooth + level_sd * rng.standard_normal(len(_POSITIONS)))


def _degenerate(rng: np.random.Generator, anatomy: Anatomy, person: dict) -> dict[str, np.ndarray]:
    """Narrow discs, grow osteophytes and wedge-fracture bodies in place; rates rise with age (assumed)."""
    levels, age = anatomy.levels, person["age_years"]
    n = len(levels)
    worn = rng.random(n) < np.clip((age - 35) / 90, 0.02, 0.6)
    narrowing, spur, spread = rng.uniform(0.6, 0.9, n), rng.exponential(1.5, n), rng.random(n)
    anatomy.dims["disc_below_mm"] = anatomy.dims["disc_below_mm"] * np.where(worn, narrowing, 1.0)
    osteophyte = np.where(worn | (spread < np.clip((age - 45) / 120, 0, 0.4)), np.clip(spur, 0, 6), 0.0)
    osteophyte[[levels.index("C1"), levels.index("C2")]] = 0.0
    risk = np.clip(0.02 + 0.004 * (age - 55) + 0.3 * (0.9 - person["bone_density"]), 0.0, 0.5)
    prone = [i for i, level in enumerate(levels) if levels.index("T7") <= i <= levels.index("L1")]
    broken, lost, site = (
        rng.random(2) < (risk, risk / 3),
        rng.uniform(0.2, 0.4, 2),
        rng.permutation(prone)[:2],
    )
    fraction = np.zeros(n)
    fraction[site] = np.where(broken, lost, 0.0)
    drop = fraction * anatomy.dims["height_anterior_mm"]
    anatomy.fracture_deg = -2 * np.degrees(np.arctan(drop / 2 / anatomy.dims["endplate_depth_mm"]))
    anatomy.dims["body_mm"] = anatomy.dims["body_mm"] - drop / 2
    return {"osteophyte_mm": osteophyte, "fracture_fraction": fraction}


def _measure(
    poses: np.ndarray,
    anatomy: Anatomy,
    profile: Sagittal,
    pelvis: Pelvis,
    curves: tuple[ScoliosisCurve, ...],
) -> tuple[dict[str, float], str]:
    levels, depth = anatomy.levels, anatomy.sacrum["endplate_depth_mm"]
    corner = -depth / 2 * np.cos(np.radians(pelvis.slope_deg))
    angles = {
        "pelvic_incidence_deg": pelvis.incidence_deg,
        "pelvic_tilt_deg": pelvis.tilt_deg,
        "sacral_slope_deg": pelvis.slope_deg,
        "thoracic_kyphosis_deg": profile.between_deg(levels, "T4", "T12"),
        "lumbar_lordosis_deg": float(pelvis.slope_deg - profile.plates_deg()[0][levels.index("L1")]),
        "t1_slope_deg": profile.t1_slope_deg,
        "sva_mm": float(poses[levels.index("C7"), 1, 3] - corner),
        "cobb_deg": 0.0,
        "cobb_endplate_deg": 0.0,
        "apical_rotation_deg": 0.0,
    }
    if not curves:
        return angles, ""
    cobbs = [scoliosis.spline_cobb_deg(poses, anatomy.dims["body_mm"], levels, curve) for curve in curves]
    plates = [scoliosis.endplate_cobb_deg(poses, anatomy.dims, profile.body_deg, levels, curve) for curve in curves]
    largest = curves[int(np.argmax(cobbs))]
    apex = scoliosis.apex_level(poses[:, :3, 3], levels, largest)
    angles |= {"cobb_deg": max(cobbs), "cobb_endplate_deg": max(plates)}
    angles["apical_rotation_deg"] = largest.direction * scoliosis.body_rotation_deg(poses[levels.index(apex)])
    return angles, apex


def _arc_length(subject: Subject) -> float:
    body = (subject.dims["height_anterior_mm"] + subject.dims["height_posterior_mm"]) / 2
    first = subject.index("T1")
    return float(body[first:].sum() + subject.dims["disc_below_mm"][first:-1].sum())
