"""Stresses change what they should and keep the rest; person and truth move together."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from spinelib import stress
from spinelib.angles import cobb_deg
from spinelib.data import Record, assign_split
from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid
from spinelib.imaging.dxa import decompose, dual_energy, dxa_image, soft_ratio
from spinelib.imaging.physics import CERIUM, SAMARIUM, TISSUES
from spinelib.phantom.cohort import OTHER_SCANNER, STANDARD_SCANNER, Scanner, render_dxa, turned
from spinelib.phantom.column import column_curves, column_volume
from spinelib.phantom.family import OTHER, STANDARD, Family
from spinelib.phantom.implants import ALLOY_G_CM3, implants, titanium
from spinelib.phantom.population import mirrored, sample_subject
from spinelib.phantom.render import path_lengths
from spinelib.phantom.vertebra import subject_shapes
from spinelib.shift import anatomy_shift_table, shift_table
from spinelib.stress import STRESSES, stressed, stressed_records, stressed_subject

KEY, SEED = "synthetic-0-00012", 12
COARSE = PlanarGrid.centred("coronal", (80, 71), (12.0, 9.0), (200.0, 0.0))
QUICK_SCANNER = Scanner((84, 75), (12.0, 8.0))
IMAGE = [name for name, s in STRESSES.items() if s.kind == "image"]
PERSON = [name for name, s in STRESSES.items() if s.kind == "person"]
NEUTRAL = {"dose": 1, "missing_arms": 0, "metal": 0, "axial_rotation": 0, "anatomy": 0}


@pytest.fixture(scope="module")
def subject():
    return sample_subject(SEED, curves="enriched")


@pytest.fixture(scope="module")
def shapes(subject):
    return subject_shapes(subject)


@pytest.fixture(scope="module")
def paths(subject, shapes):
    return path_lengths(subject, shapes, COARSE)


@pytest.fixture(scope="module")
def oblique(subject, shapes):
    """Paths through the person turned by 30 degrees."""
    angle, pose = np.radians(30), np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return path_lengths(subject, shapes, COARSE, pose=pose)


@pytest.fixture(scope="module")
def record():
    return stressed(KEY, "axial_rotation", 0)


@pytest.fixture(scope="module")
def turned_record():
    return stressed(KEY, "axial_rotation", 5)


def same_truth(a, b):
    return all(
        np.array_equal(getattr(a, name).to_array(), getattr(b, name).to_array())
        and np.array_equal(getattr(a, name).heights_mm, getattr(b, name).heights_mm)
        for name in ("curves", "extended_curves")
    ) and np.array_equal(a.column_mask.values, b.column_mask.values)


# --- the standard person ---


def test_a_neutral_stress_is_the_standard_person_made_step_by_step(record, subject, shapes):
    rng = np.random.default_rng([SEED, 77])
    centre = (200.0 + rng.normal(0, 12), rng.normal(0, 10))
    grid = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), centre)
    rng.normal(0, 3), rng.normal(0, 25, 2)  # the pose of the MRI comes before the photons
    image = dxa_image(path_lengths(subject, shapes, grid), grid, rng)
    curves, _ = column_curves(subject, shapes)
    assert record.dxa.grid == grid
    assert record.dxa.values.tobytes() == image.values.tobytes()
    assert record.curves.to_array().tobytes() == curves.to_array().tobytes()
    assert np.array_equal(record.column_mask.values, column_volume(subject, shapes).values)
    assert (record.key, record.split) == (KEY, assign_split(KEY))


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_levels_change_nobody(name, subject):
    session = STRESSES[name].make(SEED, NEUTRAL[name])
    assert session.scanner == STANDARD_SCANNER and session.turn_deg == 0
    assert session.subject.poses.tobytes() == subject.poses.tobytes()
    assert (session.subject.arms, session.subject.fused, session.subject.family) == ((True, True), (), STANDARD)
    for key, values in subject.dims.items():
        np.testing.assert_array_equal(session.subject.dims[key], values)


@pytest.mark.parametrize("name", STRESSES)
def test_every_stress_is_described_and_its_levels_lie_within_its_limits(name):
    s = STRESSES[name]
    assert s.description and s.unit and s.kind in ("image", "person")
    assert s.levels and all(s.limits[0] <= level <= s.limits[1] for level in s.levels)
    assert len(set(s.levels)) == len(s.levels)


# --- images ---


@pytest.mark.parametrize("name", IMAGE)
def test_image_stresses_keep_the_truth_and_repeat_themselves(name, record):
    for level in STRESSES[name].levels:
        once, again = stressed(record, name, level), stressed(record, name, level)
        assert same_truth(once, record) and once.key == record.key
        assert once.dxa.values.tobytes() == again.dxa.values.tobytes() and once.dxa.grid == again.dxa.grid
        assert once.dxa.values.dtype == np.float32
        assert (
            once.dxa.values.shape != record.dxa.values.shape
            or not np.array_equal(once.dxa.values, record.dxa.values)
            or once.dxa.grid != record.dxa.grid
        )


def test_noise_has_the_strength_asked_for_and_one_pattern(record):
    weak, strong = (stressed(record, "noise", level).dxa.values - record.dxa.values for level in (2, 10))
    top = np.percentile(record.dxa.values, 99.5, axis=(1, 2))
    np.testing.assert_allclose(weak.std(axis=(1, 2)), 0.02 * top, rtol=0.02)
    np.testing.assert_allclose(strong, 5 * weak, atol=1e-5)
    assert abs(np.corrcoef(weak[0].ravel(), weak[1].ravel())[0, 1]) < 0.02


def test_blur_keeps_the_mass_and_spreads_a_point_by_its_standard_deviation(record):
    point = replace(record, dxa=replace(record.dxa, values=np.zeros_like(record.dxa.values)))
    point.dxa.values[:, 100, 120] = 1
    bone, grid = stressed(point, "blur", 6).dxa.channel("bone"), record.dxa.grid
    assert bone.sum() == pytest.approx(1, abs=1e-4)
    for axis, at in ((1, grid.superior_mm()), (0, grid.lateral_mm())):
        profile = bone.sum(axis=axis)
        centre = (profile * at).sum()
        assert np.sqrt((profile * (at - centre) ** 2).sum()) == pytest.approx(6, rel=0.02)


@pytest.mark.parametrize(("name", "level"), [("crop_top", -40), ("crop_bottom", 40), ("crop_sides", 270)])
def test_a_short_field_of_view_loses_pixels_and_moves_none(name, level, record):
    cut, grid = stressed(record, name, level).dxa, record.dxa.grid
    rows = grid.mm_to_pixel(cut.grid.superior_mm(), 0.0)[0]
    cols = grid.mm_to_pixel(0.0, cut.grid.lateral_mm())[1]
    assert np.abs(rows - np.round(rows)).max() < 1e-6 and np.abs(cols - np.round(cols)).max() < 1e-6
    np.testing.assert_array_equal(
        cut.values, record.dxa.values[:, np.round(rows).astype(int)][..., np.round(cols).astype(int)]
    )
    assert cut.values.size < 0.9 * record.dxa.values.size
    edge = {
        "crop_top": record.curves.heights_mm[0] - 40 - cut.grid.superior_mm()[0],
        "crop_bottom": cut.grid.superior_mm()[-1] - (record.curves.heights_mm[-1] - 40),
        "crop_sides": 270 - np.ptp(cut.grid.lateral_mm()),
    }[name]
    assert 0 <= edge < 2 * max(grid.spacing_mm)


@pytest.mark.parametrize("level", [-5, 2])
def test_a_wrong_pixel_size_scales_the_image_about_its_middle(level, record):
    image, factor = stressed(record, "pixel_size", level).dxa, 1 + level / 100
    assert image.values is record.dxa.values
    np.testing.assert_allclose(image.grid.spacing_mm, np.multiply(record.dxa.grid.spacing_mm, factor))
    np.testing.assert_allclose(image.grid.centre_mm, record.dxa.grid.centre_mm, atol=1e-9)
    assert np.ptp(image.grid.superior_mm()) == pytest.approx(factor * np.ptp(record.dxa.grid.superior_mm()))


# --- people ---


def test_the_truth_turns_like_the_centre_line_of_the_column(record, turned_record):
    before, after = record.curves.centreline(), turned_record.curves.centreline()
    angle = np.radians(5)
    right = np.cos(angle) * before[:, 0] - np.sin(angle) * before[:, 1]
    anterior = np.sin(angle) * before[:, 0] + np.cos(angle) * before[:, 1]
    np.testing.assert_allclose(after[:, 2], before[:, 2], atol=0.01)
    assert np.abs(after[:, 0] - right).mean() < 0.3 and np.abs(after[:, 0] - right).max() < 1.5
    assert np.abs(after[:, 1] - anterior).mean() < 0.3 and np.abs(after[:, 1] - anterior).max() < 1.5
    assert np.abs(after[:, 0] - before[:, 0]).max() > 2.5
    assert cobb_deg(turned_record.curves) > cobb_deg(record.curves)  # kyphosis and lordosis show as a side bend


def test_mask_and_image_turn_with_the_curves(record, turned_record):
    for r in (record, turned_record):
        assert r.dxa.grid == record.dxa.grid
        mask, affine = r.column_mask.values, r.column_mask.affine
        right = affine[0, 3] + affine[0, 0] * np.arange(mask.shape[0])
        superior = affine[2, 3] + affine[2, 2] * np.arange(mask.shape[2])
        area = mask.any(axis=1)
        inside = area.sum(axis=0) > 0
        middle = (area * right[:, None]).sum(axis=0)[inside] / area.sum(axis=0)[inside]
        truth = np.interp(superior[inside], r.curves.heights_mm[::-1], r.curves.coronal_mm[1][::-1])
        assert np.median(np.abs(middle - truth)) < 1.0
    assert not same_truth(record, turned_record)


def test_the_spinal_canal_in_the_image_turns_with_the_vertebrae(subject, paths, oblique):
    heights = COARSE.superior_mm()[(COARSE.superior_mm() > 30) & (COARSE.superior_mm() < 420)]
    rows = np.isin(COARSE.superior_mm(), heights)

    def seen_mm(maps):
        return (maps["canal"][rows] * COARSE.lateral_mm()).sum(axis=1) / maps["canal"][rows].sum(axis=1)

    def true_mm(person):
        behind = -person.dims["endplate_depth_mm"] / 2 - 0.5 * person.dims["canal_depth_mm"]
        centres = person.poses[:, :3, 3] + person.poses[:, :3, 1] * behind[:, None]
        return np.interp(heights, centres[::-1, 2], centres[::-1, 0])

    for maps, person in ((paths, subject), (oblique, turned(subject, 30))):
        assert np.abs(seen_mm(maps) - true_mm(person)).mean() < 1
    assert np.abs(true_mm(turned(subject, 30)) - true_mm(subject)).mean() > 5


def test_turning_is_undone_by_turning_back(subject):
    there = turned(turned(subject, 5), -5)
    np.testing.assert_allclose(there.poses, subject.poses, atol=1e-9)
    np.testing.assert_allclose(there.sacrum_pose, subject.sacrum_pose, atol=1e-9)


def test_seen_from_behind_the_image_is_flipped(subject, shapes, paths):
    pose = np.diag([-1.0, -1.0, 1.0, 1.0])
    behind = path_lengths(subject, shapes, COARSE, pose=pose)
    for name in paths:
        np.testing.assert_allclose(behind[name][:, ::-1].sum(), paths[name].sum(), rtol=0.01, err_msg=name)
    assert np.corrcoef(behind["mineral"][:, ::-1].ravel(), paths["mineral"].ravel())[0, 1] > 0.999


def test_a_turn_keeps_the_mass(paths, oblique):
    for name in ("mineral", "muscle", "lung", "disc"):
        assert oblique[name].sum() == pytest.approx(paths[name].sum(), rel=0.02), name
    assert np.corrcoef(oblique["mineral"].ravel(), paths["mineral"].ravel())[0, 1] < 0.95


def test_a_pose_that_is_not_rigid_is_refused(subject, shapes):
    with pytest.raises(InputError, match="rigid"):
        path_lengths(subject, shapes, COARSE, pose=2 * np.eye(4))


def test_missing_arms_take_nothing_else_away(subject, shapes, paths):
    armless = path_lengths(replace(subject, arms=(False, True)), shapes, COARSE)
    right = COARSE.lateral_mm()
    lost = paths["mineral"] - armless["mineral"]
    assert lost[:, right > 170].sum() > 0.6 * paths["mineral"][:, right > 170].sum()
    assert np.abs(lost[:, np.abs(right) < 120]).max() < 1e-6
    assert np.abs(lost[:, right < 0]).max() < 1e-6
    low = COARSE.superior_mm() < 200
    assert armless["muscle"][low][:, right > 230].sum() < 0.1 * paths["muscle"][low][:, right > 230].sum()
    other = mirrored(replace(subject, arms=(False, True)))
    assert other.arms == (True, False)


def test_arms_are_lost_right_first():
    assert [STRESSES["missing_arms"].make(SEED, n).subject.arms for n in (0, 1, 2)] == [
        (True, True), (False, True), (False, False),
    ]  # fmt: skip


def test_metal_weighs_what_its_solids_hold(subject):
    fused = STRESSES["metal"].make(SEED, 6).subject
    assert fused.fused == ("T11", "T12", "L1", "L2", "L3", "L4")
    grid = PlanarGrid.centred("coronal", (200, 80), (2.0, 1.5), (150.0, 0.0))
    pieces = implants(fused)
    lower, upper = (np.array([getattr(p, f"{e}_mm") for p in pieces]) for e in ("lower", "upper"))
    lower, upper = lower.min(axis=0), upper.max(axis=0)
    points = torch.from_numpy(np.random.default_rng(0).uniform(lower, upper, (200_000, 3)).T.astype(np.float32))
    inside = torch.stack([p.distance(tuple(points)) < 0 for p in pieces]).any(dim=0).float().mean()
    mass_g = float(inside) * np.prod(upper - lower) / 1000 * ALLOY_G_CM3
    assert titanium(fused, grid).sum() * 0.03 == pytest.approx(mass_g, rel=0.06)
    assert titanium(subject, grid).max() == 0


def test_metal_only_adds_attenuation_and_keeps_the_truth(subject):
    fused = stressed_subject(KEY, "metal", 6)
    (bare, curves, _), (plated, same, _) = (render_dxa(s, scanner=QUICK_SCANNER) for s in (subject, fused))
    assert same.to_array().tobytes() == curves.to_array().tobytes()
    metal = titanium(fused, bare.grid)
    rise = plated.channel("tissue") - bare.channel("tissue")
    assert rise[metal > 1].min() > 0.2
    assert abs(rise[metal == 0].mean()) < 0.005
    # where too few photons come through, bone is shown as dense, never as a hole
    assert plated.channel("bone")[metal > 2].min() > 1


def test_low_bone_density_takes_mineral_alone(subject, shapes, paths):
    frail = STRESSES["low_bmd"].make(SEED, -2.5).subject
    assert frail.bone_density == pytest.approx(0.88 / 1.09)
    thin = path_lengths(frail, shapes, COARSE)
    np.testing.assert_allclose(
        thin["mineral"], paths["mineral"] * frail.bone_density / subject.bone_density, rtol=1e-3, atol=1e-5
    )
    np.testing.assert_array_equal(frail.poses, subject.poses)


# --- other populations and scanners ---


def test_families_scale_and_return():
    assert OTHER.times(0) == STANDARD == Family()
    assert OTHER.times(1) == OTHER
    assert OTHER.times(2).disc_height == pytest.approx(OTHER.disc_height**2)
    assert OTHER.times(2).incidence_deg == 2 * OTHER.incidence_deg
    assert [k for k, v in asdict(OTHER).items() if v == asdict(STANDARD)[k]] == []


def test_each_constant_of_a_family_moves_its_own_size(subject):
    def ratio(name, **family):
        other = sample_subject(SEED, curves="enriched", family=Family(**family))
        return other.dims[name][8:] / subject.dims[name][8:]

    assert ratio("endplate_width_mm", endplate_width=1.1) == pytest.approx(1.1)
    assert ratio("endplate_depth_mm", endplate_depth=0.9) == pytest.approx(0.9)
    assert ratio("canal_width_mm", canal=1.1) == pytest.approx(1.1)
    assert ratio("tp_span_mm", transverse_span=0.9) == pytest.approx(0.9)
    assert ratio("endplate_width_mm", disc_height=1.2) == pytest.approx(1.0)
    assert np.median(ratio("disc_below_mm", disc_height=1.2)) == pytest.approx(1.2, abs=0.02)
    rounder = sample_subject(SEED, curves="enriched", family=Family(kyphosis_deg=6.0, incidence_deg=-5.0, bmi=2.0))
    change = {k: rounder.angles[k] - subject.angles[k] for k in ("thoracic_kyphosis_deg", "pelvic_incidence_deg")}
    assert change["pelvic_incidence_deg"] == pytest.approx(-5)
    assert 3 < change["thoracic_kyphosis_deg"] < 7
    assert rounder.bmi == pytest.approx(subject.bmi + 2)


def test_another_chest_changes_the_ribs_alone(subject, shapes, paths):
    wide = path_lengths(replace(subject, family=Family(chest_width=1.1, chest_depth=0.9, rib_drop=1.1)), shapes, COARSE)
    change, superior = np.abs(wide["mineral"] - paths["mineral"]), COARSE.superior_mm()
    assert change[superior < -40][:, np.abs(COARSE.lateral_mm()) < 150].max() < 0.03
    assert change[(superior > 250) & (superior < 400)].max() > 0.1


def test_the_other_beam_reads_the_same_mineral(paths):
    assert set(SAMARIUM.tissue_cm2_g) == set(CERIUM.tissue_cm2_g) == set(TISSUES)
    for beam in (CERIUM, SAMARIUM):
        low, high = dual_energy(paths, beam=beam)
        bone, _ = decompose(low, high, ratio=soft_ratio(paths, beam), beam=beam)
        np.testing.assert_allclose(bone, paths["mineral"], atol=1e-6)
    assert np.all(dual_energy(paths, beam=SAMARIUM)[0] <= dual_energy(paths)[0])


def test_the_other_scanner_sees_the_same_field_with_other_pixels(subject):
    assert OTHER_SCANNER.spacing_mm != STANDARD_SCANNER.spacing_mm
    for axis in (0, 1):
        extent = [s.shape[axis] * s.spacing_mm[axis] for s in (OTHER_SCANNER, STANDARD_SCANNER)]
        assert extent[0] == pytest.approx(extent[1], rel=0.01)
    image, curves, _ = render_dxa(subject, scanner=replace(OTHER_SCANNER, shape=(84, 75), spacing_mm=(12.0, 8.0)))
    assert image.grid.spacing_mm == (12.0, 8.0)
    rows = (image.grid.superior_mm() < 150) & (image.grid.superior_mm() > 50)
    cols = np.abs(image.grid.lateral_mm() - curves.coronal_mm[1].mean()) < 15
    assert 0.5 < image.channel("bone")[rows][:, cols].mean() < 1.6


def test_a_blurred_beam_loses_edges_and_keeps_the_air(paths):
    sharp, soft = (dxa_image(paths, COARSE, None, blur_mm=mm).channel("tissue") for mm in (0, 8))
    assert np.abs(np.diff(soft, axis=1)).max() < 0.9 * np.abs(np.diff(sharp, axis=1)).max()
    assert soft.min() >= -1e-6


# --- many people, kept on disk ---


@pytest.fixture
def quick(monkeypatch, record):
    """Stand in for rendering; returns the keys rendered so far."""
    made = []

    def rendered(key, split, session):
        if key.endswith("13"):
            message = "unlucky"
            raise ValueError(message)
        made.append(key)
        return replace(record, key=key, split=split)

    monkeypatch.setattr(stress, "_rendered", rendered)
    return made


def test_people_are_rendered_once_and_found_again(quick, tmp_path, record):
    keys = ["synthetic-0-00012", "synthetic-3-00004"]
    first = stressed_records("dose", 0.5, keys, n_jobs=1, cache_dir=tmp_path)
    second = stressed_records("dose", 0.5, [Record(k, "test") for k in keys], n_jobs=1, cache_dir=tmp_path)
    assert quick == keys == [r.key for r in first] == [r.key for r in second]
    assert [r.split for r in second] == ["test", "test"]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.dxa.values, b.dxa.values) and same_truth(a, b)
    assert np.abs(first[0].dxa.values - record.dxa.values).max() < 1e-5
    assert np.abs(first[0].curves.to_array() - record.curves.to_array()).max() < 6e-4
    stressed_records("dose", 0.25, keys, n_jobs=1, cache_dir=tmp_path)
    assert len(quick) == 4


def test_an_interrupted_person_is_made_again(quick, tmp_path):
    (tmp_path / "metal_2" / f"{KEY}.part").mkdir(parents=True)
    (tmp_path / "metal_2" / f"{KEY}.part" / "dxa.nii.gz").write_bytes(b"half")
    assert len(stressed_records("metal", 2, [KEY], n_jobs=1, cache_dir=tmp_path)) == 1
    assert sorted(p.name for p in (tmp_path / "metal_2").iterdir()) == [KEY]


def test_one_failure_costs_one_person_and_is_told(quick):
    with pytest.warns(UserWarning, match="synthetic-0-00013: ValueError: unlucky"):
        records = stressed_records("dose", 0.5, ["synthetic-0-00012", "synthetic-0-00013"], n_jobs=1)
    assert [r.key for r in records] == ["synthetic-0-00012"]


def test_image_stresses_serve_records_of_any_origin(record):
    own = replace(record, key="visit-7")
    (blurred,) = stressed_records("blur", 3, [own])
    assert blurred.key == "visit-7" and same_truth(blurred, own)


# --- how far from the standard ---


def test_shift_is_counted_in_standard_deviations(record):
    wide = replace(record, curves=record.curves.shifted(superior_mm=0.0))
    wide = replace(wide, curves=replace(wide.curves, coronal_mm=1.2 * wide.curves.coronal_mm))
    table = shift_table([record, wide], [wide, wide]).set_index("measure")
    row = table.loc["column_width_mm"]
    assert row["shifted_mean"] == pytest.approx(row["standard_mean"] * 1.2 / 1.1)
    assert row["shift_sd"] == pytest.approx(np.sqrt(0.5))
    assert table.loc["column_depth_mm", "shifted_mean"] == table.loc["column_depth_mm", "standard_mean"]


def test_the_other_population_lies_one_to_two_deviations_away():
    keys = [f"synthetic-0-{i:05d}" for i in range(24)]
    standard = [stressed_subject(k, "noise", 2) for k in keys]
    table = anatomy_shift_table(standard, [stressed_subject(k, "anatomy", 2) for k in keys]).set_index("measure")
    moved = table.loc[["endplate_width_mm", "disc_below_mm", "pedicle_width_mm", "canal_width_mm", "tp_span_mm"]]
    assert (moved["shift_sd"].abs() > 0.7).all() and (table["shift_sd"].abs() < 5).all()


def test_a_shift_needs_people(record):
    with pytest.raises(InputError, match="two people"):
        shift_table([record], [record, record])


# --- bad input ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda r: stressed(r, "fog", 1), "unknown stress 'fog'. Expected one of: noise, blur"),
        (lambda r: stressed(r, "noise", -1), "noise at level -1 makes no sense. Expected 0 to 100 %"),
        (lambda r: stressed_records("all", float("nan"), [r]), "makes no sense"),
        (lambda r: stressed(replace(r, key="visit-7"), "dose", 0.5), "'visit-7' is no person of the synthetic cohort"),
        (lambda r: stressed("shard-0-1", "blur", 3), "choose an image stress"),
        (lambda r: stressed(replace(r, curves=None), "blur", 3), "lacks its curves"),
        (lambda r: stressed(replace(r, curves=r.curves.shifted(right_mm=900)), "crop_sides", 270), "nothing of"),
    ],
)
def test_bad_input_is_named(call, words, record):
    with pytest.raises(InputError, match=words):
        call(record)
