"""The cohort against published anatomy, and the promises of one subject."""

import hashlib
from functools import cache

import numpy as np
import pandas as pd
import pytest

from spinelib.errors import InputError
from spinelib.levels import VERTEBRAE
from spinelib.phantom.population import DIM_NAMES, describe, mirrored, sample_subject
from spinelib.phantom.scoliosis import ScoliosisCurve

CURVE = ScoliosisCurve(45.0, "T5", "T12", "right", 0.3)


@cache
def cohort(posture="standing", sex=None, n=240):
    return tuple(sample_subject(s, sex=sex, posture=posture, variants=False) for s in range(n))


def mean_of(subjects, name):
    values = np.mean([subject.dims[name] for subject in subjects], axis=0)
    return pd.Series(values, index=list(subjects[0].levels))


def digest(subject):
    arrays = [subject.poses, subject.sacrum_pose, *(subject.dims[name] for name in DIM_NAMES)]
    arrays.append(np.array(list(subject.angles.values())))
    return hashlib.sha256(b"".join(np.asarray(a, np.float32).tobytes() for a in arrays)).hexdigest()


def smallest_rim_mm(subject):
    """Least distance of 48 rim points of each lower plate from the plate below, C3 down: no library code."""
    d, gaps = subject.dims, []
    height = (d["height_anterior_mm"] + d["height_posterior_mm"]) / 2
    rise = (d["height_anterior_mm"] - d["height_posterior_mm"]) / 2 / d["endplate_depth_mm"]
    side = np.tan(np.radians(d["coronal_wedge_deg"]) / 2)
    around = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    for i in range(2, len(subject.levels)):
        right, front = (f(around) * d[f"endplate_{k}_mm"][i] / 2 for f, k in ((np.cos, "width"), (np.sin, "depth")))
        local = np.stack([right, front, -height[i] / 2 - side[i] * right - rise[i] * front], axis=1)
        rim = local @ subject.poses[i, :3, :3].T + subject.poses[i, :3, 3]
        if i + 1 < len(subject.levels):
            below = subject.poses[i + 1]
            normal = below[:3, :3] @ np.array([-side[i + 1], -rise[i + 1], 1.0])
            centre = below[:3, 3] + below[:3, 2] * height[i + 1] / 2
        else:
            normal, centre = subject.sacrum_pose[:3, 2], np.zeros(3)
        gaps.append(((rim - centre) @ normal / np.linalg.norm(normal)).min())
    return min(gaps)


@pytest.mark.parametrize(("sex", "low", "high"), [("M", 440, 505), ("F", 400, 470)])
def test_arc_length_t1_to_l5(sex, low, high):
    arc = describe(cohort(sex=sex))["arc_t1_l5_mm"]
    assert low < arc.mean() < high
    assert 12 < arc.std() < 30


def test_pelvic_incidence_is_tilt_plus_slope_in_both_postures():
    for posture in ("supine", "standing"):
        table = describe(cohort(posture))
        total = table["pelvic_tilt_deg"] + table["sacral_slope_deg"]
        np.testing.assert_allclose(table["pelvic_incidence_deg"], total, atol=1e-9)
    assert np.all(describe(cohort("supine"))["pelvic_tilt_deg"] >= describe(cohort())["pelvic_tilt_deg"])


def test_sagittal_means_and_ranges():
    standing, supine = describe(cohort()), describe(cohort("supine"))
    for table in (standing, supine):
        assert table["thoracic_kyphosis_deg"].between(15 - 1e-6, 65 + 1e-6).all()
        assert table["sva_mm"].std() < 30
        assert 20 < table["t1_slope_deg"].mean() < 30
    assert 36 < standing["thoracic_kyphosis_deg"].mean() < 42
    assert 30 < supine["thoracic_kyphosis_deg"].mean() < 37
    assert 56 < standing["lumbar_lordosis_deg"].mean() < 65
    assert 48 < supine["lumbar_lordosis_deg"].mean() < 57
    assert 50 < standing["pelvic_incidence_deg"].mean() < 56


@pytest.mark.parametrize("posture", ["standing", "supine"])
def test_sagittal_correlations(posture):
    r = describe(cohort(posture)).corr(numeric_only=True)
    assert 0.6 < r.loc["pelvic_incidence_deg", "sacral_slope_deg"] < 0.9
    assert 0.5 < r.loc["pelvic_incidence_deg", "lumbar_lordosis_deg"] < 0.85
    assert 0.7 < r.loc["sacral_slope_deg", "lumbar_lordosis_deg"] < 0.97
    assert 0.2 < r.loc["lumbar_lordosis_deg", "thoracic_kyphosis_deg"] < 0.7


def test_angles_agree_with_the_poses():
    for subject in cohort()[:20]:
        slope = np.degrees(np.arctan2(subject.sacrum_pose[1, 2], subject.sacrum_pose[2, 2]))
        assert subject.angles["sacral_slope_deg"] == pytest.approx(slope)
        lean = np.degrees(np.arctan2(subject.poses[:, 1, 2], subject.poses[:, 2, 2]))
        d = subject.dims
        rise = (d["height_anterior_mm"] - d["height_posterior_mm"]) / 2 / d["endplate_depth_mm"]
        wedge = 2 * np.degrees(np.arctan(rise))
        upper, lower = lean - wedge / 2, lean + wedge / 2
        kyphosis = upper[subject.index("T4")] - lower[subject.index("T12")]
        assert subject.angles["thoracic_kyphosis_deg"] == pytest.approx(kyphosis, abs=1e-6)
        assert subject.angles["lumbar_lordosis_deg"] == pytest.approx(slope - upper[subject.index("L1")], abs=1e-6)


def test_level_trends_of_the_mean_spine():
    people = cohort()
    height = (mean_of(people, "height_anterior_mm") + mean_of(people, "height_posterior_mm")) / 2
    assert np.all(np.diff(height["T3":"L2"]) > 0)
    assert np.all(np.diff(mean_of(people, "endplate_width_mm")["T4":"L5"]) > 0)
    assert mean_of(people, "canal_width_mm")["C2":"L5"].idxmin() in ("T5", "T6", "T7")
    assert mean_of(people, "disc_below_mm")["C2":"L5"].idxmin() in ("T3", "T4", "T5")
    assert mean_of(people, "pedicle_width_mm")["C2":"L5"].idxmin() in ("T4", "T5")


def test_women_are_smaller_and_sizes_spread_as_published():
    women, men = (mean_of(cohort(sex=sex), "endplate_width_mm")["T1":"L5"] for sex in "FM")
    assert np.all((women / men).between(0.83, 0.94))
    widths = np.array([subject.dims["endplate_width_mm"] for subject in cohort(sex="M")])[:, 19:]
    assert np.all((widths.std(axis=0) / widths.mean(axis=0) > 0.05) & (widths.std(axis=0) / widths.mean(axis=0) < 0.1))
    assert np.corrcoef(widths[:, 0], widths[:, 1])[0, 1] > np.corrcoef(widths[:, 0], widths[:, 4])[0, 1]


def test_straight_spine_is_straight_and_stacks_upwards():
    for subject in cohort()[:20]:
        assert np.abs(subject.poses[:, 0, 3]).max() < 1e-9
        assert np.all(np.diff(subject.poses[:, 2, 3]) < 0)
        assert subject.angles["cobb_deg"] == 0.0 and subject.apex == ""


def test_poses_are_rigid_frames():
    subject = sample_subject(4, curves=(CURVE,))
    rotation = subject.poses[:, :3, :3]
    identity = np.tile(np.eye(3), (len(rotation), 1, 1))
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), identity, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation), 1.0)
    np.testing.assert_allclose(subject.sacrum_pose[:3, 3], 0.0)
    assert np.all(rotation[:, 0, 0] > 0.7)  # every right axis points to the right


@pytest.mark.parametrize("posture", ["supine", "standing"])
def test_disc_rims_stay_open(posture):
    mixed = [sample_subject(s, curves="enriched", posture=posture, degenerative=s % 2 == 0) for s in range(80)]
    severe = [sample_subject(s, curves=(ScoliosisCurve(75.0, "T5", "T11", "right"),)) for s in range(5)]
    assert min(smallest_rim_mm(subject) for subject in mixed + severe) >= 0.79


def test_same_seed_same_subject_and_other_seed_another():
    assert digest(sample_subject(11, curves="enriched")) == digest(sample_subject(11, curves="enriched"))
    assert digest(sample_subject(11, curves="enriched")) != digest(sample_subject(12, curves="enriched"))


@pytest.mark.parametrize("curves", [None, "enriched", (CURVE,)])
def test_posture_keeps_the_bones_and_moves_the_joints(curves):
    supine, standing = (sample_subject(9, curves=curves, posture=p) for p in ("supine", "standing"))
    for name in DIM_NAMES:
        np.testing.assert_array_equal(supine.dims[name], standing.dims[name])
    assert supine.shape_seed == standing.shape_seed
    assert supine.angles["lumbar_lordosis_deg"] < standing.angles["lumbar_lordosis_deg"]


def test_curves_leave_the_anatomy_draws_alone():
    straight, bent = sample_subject(9), sample_subject(9, curves=(CURVE,))
    for name in (
        "endplate_width_mm",
        "endplate_depth_mm",
        "canal_width_mm",
        "pedicle_width_mm",
        "tp_span_mm",
    ):
        np.testing.assert_array_equal(straight.dims[name], bent.dims[name])
    assert (straight.age_years, straight.stature_mm) == (bent.age_years, bent.stature_mm)
    assert straight.angles["pelvic_incidence_deg"] == bent.angles["pelvic_incidence_deg"]


def test_given_sex_and_age_leave_the_other_draws_alone():
    drawn = sample_subject(21)
    given = sample_subject(21, sex=drawn.sex, age_years=drawn.age_years)
    assert digest(drawn) == digest(given)


def test_mirroring_flips_sides_and_twice_is_identity():
    subject = sample_subject(6, curves=(CURVE,))
    once = mirrored(subject)
    np.testing.assert_allclose(once.poses[:, 0, 3], -subject.poses[:, 0, 3])
    np.testing.assert_allclose(np.linalg.det(once.poses[:, :3, :3]), 1.0)
    np.testing.assert_array_equal(once.dims["coronal_wedge_deg"], -subject.dims["coronal_wedge_deg"])
    assert (once.curves[0].convex, once.is_mirrored, once.shape_seed) == ("left", True, subject.shape_seed)
    assert digest(mirrored(once)) == digest(subject) and mirrored(once).curves == subject.curves


def test_mirroring_agrees_with_asking_for_the_mirrored_curve():
    left, right = sample_subject(6, curves=(CURVE.mirrored(),)), mirrored(sample_subject(6, curves=(CURVE,)))
    np.testing.assert_allclose(left.dims["coronal_wedge_deg"], right.dims["coronal_wedge_deg"], atol=1e-9)
    assert left.angles["cobb_deg"] == pytest.approx(right.angles["cobb_deg"], abs=1e-3)


def test_variants_appear_at_published_rates_and_in_order():
    people = [sample_subject(seed) for seed in range(600)]
    counts = pd.Series([("L6" in s.levels, "L5" not in s.levels, "T13" in s.levels) for s in people]).apply(pd.Series)
    l6, sacralised, t13 = counts.mean()
    assert 0.05 <= l6 + sacralised <= 0.12
    assert 0.01 <= t13 <= 0.06
    for subject in people:
        assert np.all(np.diff(subject.poses[:, 2, 3]) < 0)
        assert all(len(values) == len(subject.levels) for values in subject.dims.values())
    with_t13 = next(s for s in people if "T13" in s.levels)
    i = with_t13.index("T13")
    assert with_t13.levels[i - 1 : i + 2] == ("T12", "T13", "L1")
    assert next(s for s in people if "L6" in s.levels).levels[-2:] == ("L5", "L6")


def test_a_named_l5_is_never_sacralised():
    curve = ScoliosisCurve(25.0, "T12", "L5", "left")
    assert all("L5" in sample_subject(seed, curves=(curve,)).levels for seed in range(60))


def test_degeneration_rises_with_age_and_shows_in_the_dims():
    old = [sample_subject(s, age_years=80, degenerative=True, variants=False) for s in range(80)]
    young = [sample_subject(s, age_years=40, degenerative=True, variants=False) for s in range(80)]
    spurs = [np.mean([s.degeneration["osteophyte_mm"].mean() for s in group]) for group in (young, old)]
    assert spurs[1] > 1.5 * spurs[0]
    assert mean_of(old, "disc_below_mm")["T1":].mean() < 0.95 * mean_of(young, "disc_below_mm")["T1":].mean()
    broken = next(s for s in old if s.degeneration["fracture_fraction"].any())
    i = int(np.argmax(broken.degeneration["fracture_fraction"]))
    whole = sample_subject(broken.seed, age_years=80, variants=False)
    lost = 1 - broken.dims["height_anterior_mm"][i] / whole.dims["height_anterior_mm"][i]
    assert 0.15 < lost < 0.45
    assert broken.dims["height_anterior_mm"][i] < 0.85 * broken.dims["height_posterior_mm"][i]
    assert broken.levels[i] in VERTEBRAE[VERTEBRAE.index("T7") : VERTEBRAE.index("L1") + 1]
    assert sample_subject(0).degeneration == {}


def test_person_fields_have_population_means():
    table = describe(cohort())
    stature = table.groupby("sex")["stature_mm"].mean()
    assert 1610 < stature["F"] < 1650 and 1740 < stature["M"] < 1780
    assert 0.4 < (table["sex"] == "F").mean() < 0.64
    assert 24 < table["bmi"].mean() < 29
    old, young = (sample_subject(3, sex="F", age_years=age).bone_density for age in (80, 40))
    assert old < young


def test_describe_has_one_row_per_subject():
    table = describe([sample_subject(seed, curves="natural") for seed in range(3)])
    assert list(table["seed"]) == [0, 1, 2]
    assert {"sex", "age_years", "stature_mm", "bmi", "cobb_deg", "lumbar_lordosis_deg", "apex"} <= set(table.columns)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"sex": "X"}, "'F', 'M'"),
        ({"posture": "sitting"}, "'supine', 'standing'"),
        ({"age_years": 7}, "18 to 100"),
        ({"age_years": float("nan")}, "18 to 100"),
        ({"seed": -1}, "0 or more"),
        ({"seed": 1.5}, "0 or more"),
    ],
)
def test_bad_requests_are_refused_with_what_is_allowed(request_, said):
    arguments = {"seed": 0} | request_
    with pytest.raises(InputError, match=said):
        sample_subject(arguments.pop("seed"), **arguments)


def test_an_absent_level_is_refused():
    with pytest.raises(InputError, match="no level 'L9'"):
        sample_subject(0).index("L9")
