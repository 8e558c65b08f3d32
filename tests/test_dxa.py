"""Dual-energy decomposition, DXA images, and DXA from CT."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Volume
from spinelib.imaging import dxa
from spinelib.imaging.physics import TISSUE_TABLE, mineral_hounsfield_per_g_cm3
from spinelib.imaging.readers import read_volume

GRID = PlanarGrid.centred("coronal", (120, 110), (3.0, 2.4), (0.0, 0.0))


def torso(fat_left=0.2, fat_right=0.3, thickness_mm=210.0):
    """Paths through an elliptic torso; the fat share changes linearly across it, bone runs down it."""
    right, superior = np.meshgrid(GRID.lateral_mm(), GRID.superior_mm())
    depth = thickness_mm * np.sqrt(np.clip(1 - (right / 125) ** 2, 0, 1))
    share = np.interp(right, [-125, 125], [fat_left, fat_right])
    mineral = np.where((np.abs(right - 5) < 22) & (depth > 0), 1.0 + 0.3 * np.sin(superior / 12), 0.0)
    return {"adipose": depth * share, "muscle": depth * (1 - share), "mineral": mineral}


@given(st.floats(0.05, 0.6), st.floats(0.05, 0.6), st.floats(0.2, 2.5), st.floats(0, 80), st.floats(0, 60))
@settings(max_examples=40, deadline=None)
def test_known_composition_inverts_exactly(fat_left, fat_right, factor, lung_mm, marrow_mm):
    path = torso(fat_left, fat_right)
    path["mineral"] = path["mineral"] * factor
    path["lung"] = np.where(path["muscle"] > 0, lung_mm, 0.0)
    path["marrow"] = np.where(path["mineral"] > 0, marrow_mm, 0.0)
    bone, _ = dxa.decompose(*dxa.dual_energy(path), ratio=dxa.soft_ratio(path))
    np.testing.assert_allclose(bone, path["mineral"], atol=1e-9)


@pytest.mark.parametrize(("fat_left", "fat_right"), [(0.25, 0.25), (0.15, 0.30), (0.45, 0.20)])
def test_estimated_ratio_recovers_mineral_within_one_per_cent(fat_left, fat_right):
    path = torso(fat_left, fat_right)
    bone, _ = dxa.decompose(*dxa.dual_energy(path))
    strip = path["mineral"] > 0
    strip[:8] = strip[-8:] = False
    assert abs(bone[strip].mean() / path["mineral"][strip].mean() - 1) < 0.01
    assert np.abs(bone[strip] - path["mineral"][strip]).max() < 0.02
    beside = (path["mineral"] == 0) & (path["muscle"] > 60)
    assert np.abs(bone[beside]).max() < 0.02


def test_two_parts_explain_the_high_energy():
    path = torso()
    low, high = dxa.dual_energy(path)
    _, soft = dxa.decompose(low, high, ratio=dxa.soft_ratio(path))
    _, without_bone = dxa.dual_energy(path, mineral_g_cm2=np.zeros(GRID.shape))
    np.testing.assert_allclose(soft, without_bone, atol=1e-9)


def test_mirrored_body_gives_mirrored_bone():
    low, high = dxa.dual_energy(torso(0.15, 0.4))
    bone, _ = dxa.decompose(low, high)
    mirrored, _ = dxa.decompose(low[:, ::-1], high[:, ::-1])
    np.testing.assert_allclose(mirrored[:, ::-1], bone, atol=1e-6)


def test_image_is_reproducible_and_its_noise_follows_the_dose():
    path = torso()
    clean = dxa.dxa_image(path, GRID, None)
    noisy = dxa.dxa_image(path, GRID, np.random.default_rng(3))
    again = dxa.dxa_image(path, GRID, np.random.default_rng(3))
    assert noisy.values.tobytes() == again.values.tobytes()
    assert noisy.channels == ("bone", "tissue")
    assert noisy.values.dtype == np.float32
    middle = np.s_[20:100, 45:65]
    spread = [
        np.std(
            dxa.dxa_image(path, GRID, np.random.default_rng(1), dose=dose, line_gain=0).channel("bone")[middle]
            - clean.channel("bone")[middle]
        )
        for dose in (1e4, 4e4)
    ]
    assert 1.7 < spread[0] / spread[1] < 2.3
    assert 0.02 < np.std((noisy.channel("bone") - clean.channel("bone"))[middle]) < 0.20
    assert abs(np.mean((noisy.channel("bone") - clean.channel("bone"))[middle])) < 0.03


def test_line_gain_moves_whole_lines():
    path = torso()
    clean = dxa.dxa_image(path, GRID, None).channel("tissue")
    steps = dxa.dxa_image(path, GRID, np.random.default_rng(0), dose=1e9, line_gain=0.01).channel("tissue") - clean
    assert 0.007 < steps.mean(axis=1).std() < 0.013
    assert (steps - steps.mean(axis=1, keepdims=True))[:, 40:70].std() < 0.001


def test_metal_is_dense_where_it_is():
    metal = np.zeros(GRID.shape)
    metal[50:55, 30:34] = 2.0
    image = dxa.dxa_image(torso(), GRID, None, metal_g_cm2=metal)
    rise = image.channel("tissue") - dxa.dxa_image(torso(), GRID, None).channel("tissue")
    np.testing.assert_allclose(rise[metal > 0], 2 * 0.5361, atol=1e-5)
    assert image.channel("bone")[metal > 0].min() > 2
    assert np.abs(rise[metal == 0]).max() == 0


def test_empty_table_gives_no_bone():
    image = dxa.dxa_image({"muscle": np.zeros(GRID.shape)}, GRID, None)
    assert np.all(image.values == 0)


def box_ct(spacing_mm=(2.0, 2.0, 3.0)):
    """CT of a muscle cylinder; right of the middle a bone: rim 4 mm of 600, core of 150 mg/cm3."""
    axes = [np.arange(n) * s - n * s / 2 for n, s in zip((166, 124, 60), spacing_mm, strict=True)]
    right, anterior, superior = np.meshgrid(*axes, indexing="ij")
    values = np.full(right.shape, -1000.0, dtype=np.float32)
    values[(right / 140) ** 2 + (anterior / 95) ** 2 < 1] = TISSUE_TABLE["muscle"].hounsfield
    radius = np.hypot(right - 30, anterior + 40)
    for limit_mm, mineral in ((20, 0.6), (16, 0.15)):
        bone = (radius < limit_mm) & (superior > 0)
        values[bone] = TISSUE_TABLE["marrow"].hounsfield + mineral * mineral_hounsfield_per_g_cm3()
    values[(anterior > -115) & (anterior < -109) & (np.abs(right) < 160)] = 300.0  # table
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    return Volume(values, affine)


def test_dxa_from_ct_keeps_mineral_place_and_drops_the_table():
    image = dxa.dxa_from_ct(box_ct())
    bone, grid = image.channel("bone"), image.grid
    assert grid.spacing_mm == (3.0, 2.4)
    right, superior = np.meshgrid(grid.lateral_mm(), grid.superior_mm())
    inside = (np.abs(right - 30) < 30) & (superior > 6) & (superior < 80)
    mass_g_cm = (bone * inside).sum() * 0.24 * 0.30 / (inside.any(axis=1).sum() * 0.30)
    true_g_cm = np.pi * (0.6 * 2.0**2 - 0.45 * 1.6**2)
    assert 0.88 < mass_g_cm / true_g_cm < 1.0  # fatty marrow within bone hides part of the mineral, as in a scanner
    assert (bone * inside * right).sum() / (bone * inside).sum() == pytest.approx(30, abs=1.5)
    assert np.abs(bone[superior < -10]).max() < 0.05
    assert image.channel("tissue")[:, np.abs(grid.lateral_mm()) > 150].max() < 0.01


def test_dxa_from_ct_of_the_mirrored_patient_is_the_mirrored_image():
    volume = box_ct()
    affine = volume.affine.copy()
    affine[0, 3] = -(volume.affine[0, 3] + volume.affine[0, 0] * (volume.values.shape[0] - 1))
    mirrored = dxa.dxa_from_ct(Volume(np.ascontiguousarray(volume.values[::-1]), affine))
    expected = dxa.dxa_from_ct(volume).mirrored()
    np.testing.assert_allclose(mirrored.values, expected.values, atol=2e-3)
    np.testing.assert_allclose(mirrored.grid.origin_mm, expected.grid.origin_mm, atol=1e-9)


def test_dxa_from_ct_ignores_smooth_contrast_agent():
    plain, filled = box_ct(), box_ct()
    axes = [plain.affine[i, 3] + 2.0 * np.arange(n) for i, n in ((0, 166), (1, 124))]
    right, anterior = np.meshgrid(*axes, indexing="ij")
    aorta = (right + 30) ** 2 + (anterior - 10) ** 2 < 14**2
    filled.values[aorta] = 380
    difference = dxa.dxa_from_ct(filled).channel("bone") - dxa.dxa_from_ct(plain).channel("bone")
    assert np.abs(difference).max() < 0.1  # 28 mm of agent taken for mineral would be 0.85 g/cm2


@pytest.mark.parametrize(
    "values", [np.zeros((8, 8, 8)), np.full((8, 8, 8), 400.0), np.linspace(-1000, 50, 512).reshape(8, 8, 8)]
)
def test_what_is_not_a_ct_is_refused(values):
    with pytest.raises(InputError, match="Hounsfield"):
        dxa.dxa_from_ct(Volume(values.astype(np.float32), np.eye(4)))


def test_speck_without_body_is_refused():
    values = np.full((40, 40, 40), -1000, dtype=np.float32)
    values[20, 20, 20] = 500
    with pytest.raises(InputError, match="no body"):
        dxa.dxa_from_ct(Volume(values, np.diag([2.0, 2, 2, 1])))


def test_unlike_images_are_refused():
    with pytest.raises(InputError, match="one shape"):
        dxa.decompose(np.zeros((3, 3)), np.zeros((3, 4)))


@pytest.mark.realdata
def test_real_abdomen_shows_the_labelled_vertebrae(realdata):
    folder = realdata / "totalsegmentator_tests"
    image = dxa.dxa_from_ct(read_volume(folder / "example_ct.nii.gz"))
    labels = read_volume(folder / "example_ct_totalseg_vertebrae.nii.gz")
    lumbar = np.isin(labels.values, (27, 28, 29, 30, 31)).any(axis=1)
    right, _, superior = np.nonzero(lumbar[:, None])
    row, col = image.grid.mm_to_pixel(labels.affine[2, 3] + 3 * superior, labels.affine[0, 3] + 3 * right)
    inside = np.zeros(image.grid.shape, bool)
    inside[np.clip(np.round(row).astype(int), 0, 111), np.clip(np.round(col).astype(int), 0, 151)] = True
    lateral = np.abs(image.grid.lateral_mm() - (labels.affine[0, 3] + 3 * right.mean()))
    beside = inside.any(axis=1)[:, None] & (lateral[None] > 60) & (lateral[None] < 80)
    assert 0.35 < image.channel("bone")[inside].mean() < 1.4
    assert np.abs(np.median(image.channel("bone")[beside])) < 0.08
