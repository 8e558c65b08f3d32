"""Dixon MRI and CT of tissue volumes."""

from types import SimpleNamespace

import numpy as np
import pytest

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Volume
from spinelib.imaging.ct import Protocol, acquire, add_table, grain, hounsfield, slice_weights
from spinelib.imaging.mri import CHANNELS, coronal_projection, dixon_projection, dixon_volume, ukb_grid
from spinelib.imaging.physics import MINERAL_DENSITY_G_CM3, TISSUES, mineral_hounsfield_per_g_cm3


def body(shape=(44, 40, 50), spacing_mm=4.0):
    """Fat around muscle around marrow with 150 mg/cm3 mineral, in air; fractions, mineral, affine."""
    axes = [(np.arange(n) - (n - 1) / 2) * spacing_mm for n in shape]
    right, anterior, _ = np.meshgrid(*axes, indexing="ij")
    radius = np.hypot(right, anterior)
    fractions = np.zeros((len(TISSUES), *shape), dtype=np.float32)
    fractions[TISSUES.index("adipose")] = (radius < 65) & (radius >= 52)
    fractions[TISSUES.index("muscle")] = (radius < 52) & (radius >= 18)
    mineral = np.where(radius < 18, 0.15, 0.0).astype(np.float32)
    fractions[TISSUES.index("marrow")] = (radius < 18) - mineral / MINERAL_DENSITY_G_CM3
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    return SimpleNamespace(labels=(radius < 18).astype(np.uint8), fractions=fractions, mineral=mineral, affine=affine)


def paths(tissue):
    """Path lengths (mm) and mineral (g/cm2) of a tissue volume along the anterior axis, with their grid."""
    step = tissue.affine[1, 1]
    images = {t: f.sum(axis=1).T[::-1, ::-1] * step for t, f in zip(TISSUES, tissue.fractions, strict=True)}
    images["mineral"] = tissue.mineral.sum(axis=1).T[::-1, ::-1] * step / 10
    shape = images["mineral"].shape
    return images, PlanarGrid.centred("coronal", shape, (tissue.affine[2, 2], tissue.affine[0, 0]), (0.0, 0.0))


def test_dixon_identities_hold_before_noise():
    volumes = dixon_volume(body(), None)
    water, fat, in_phase, opposed = (volumes[name].values for name in CHANNELS)
    np.testing.assert_allclose(in_phase, water + fat, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(opposed, np.abs(water - fat), rtol=1e-5, atol=1e-4)
    image = dixon_projection(*paths(body()), None)
    water, fat, in_phase, opposed = image.values
    np.testing.assert_allclose(in_phase, water + fat, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(opposed, np.abs(water - fat), rtol=1e-5, atol=1e-4)


def test_marrow_is_fat_rich_and_fat_shines_in_the_fat_image():
    tissue = body()
    volumes = dixon_volume(tissue, None)
    water, fat = volumes["water"].values, volumes["fat"].values
    marrow, adipose, muscle = (tissue.fractions[TISSUES.index(t)] > 0.9 for t in ("marrow", "adipose", "muscle"))
    share = fat[marrow] / (water + fat)[marrow]
    assert np.all((share > 0.25) & (share < 0.65))
    assert fat[adipose].min() > fat[marrow].max() > fat[muscle].max()
    assert water[muscle].min() > water[marrow].max()
    assert volumes["in_phase"].values[0, 0, 0] == 0


def test_cortical_bone_is_dark():
    tissue = body()
    tissue.mineral[tissue.mineral > 0] = 0.9
    in_phase = dixon_volume(tissue, None)["in_phase"].values
    assert in_phase[tissue.labels == 1].max() < 1e-4


def test_projection_of_the_volume_is_the_projection_of_the_paths():
    tissue = body(shape=(44, 97, 50))  # 97 x 4 mm: the depth that projections average over
    volume = coronal_projection(dixon_volume(tissue, None))
    image = dixon_projection(*paths(tissue), None)
    for name in ("water", "fat", "in_phase"):
        np.testing.assert_allclose(volume.channel(name), image.channel(name), rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(volume.grid.origin_mm, image.grid.origin_mm)
    assert volume.grid.spacing_mm == image.grid.spacing_mm


def test_coronal_projection_puts_the_patients_right_first():
    values = np.zeros((5, 4, 6), dtype=np.float32)
    values[4, :, 5] = 8.0  # most right, most superior
    image = coronal_projection(Volume(values, np.diag([2.0, 2.0, 3.0, 1.0])))
    assert image.channel("mean")[0, 0] == 8.0
    assert image.channel("mean").sum() == 8.0
    assert image.grid.origin_mm == (15.0, 8.0)


def test_noise_is_reproducible_rician_and_follows_the_snr():
    tissue = body()
    quiet, loud = (dixon_volume(tissue, np.random.default_rng(1), bias=0, station_gain=0, snr=s) for s in (40, 10))
    air = tissue.fractions.sum(axis=0) == 0
    ratio = loud["water"].values[air].mean() / quiet["water"].values[air].mean()
    assert 3.8 < ratio < 4.2
    spread = quiet["water"].values[air]
    assert spread.mean() / spread.std() == pytest.approx(1.91, abs=0.05)  # Rayleigh
    first, second = (dixon_volume(tissue, np.random.default_rng(7)) for _ in range(2))
    assert all(first[name].values.tobytes() == second[name].values.tobytes() for name in CHANNELS)


def test_bias_field_is_smooth_bounded_and_common_to_the_channels():
    tissue = body()
    clean = dixon_volume(tissue, None)
    biased = dixon_volume(tissue, np.random.default_rng(2), bias=0.3, station_gain=0, snr=1e9)
    inside = tissue.fractions.sum(axis=0) > 0
    gain = [biased[n].values[inside] / clean[n].values[inside] for n in ("water", "in_phase")]
    np.testing.assert_allclose(gain[0], gain[1], rtol=1e-4)
    assert 0.69 < gain[0].min() < gain[0].max() < 1.31
    assert gain[0].std() > 0.02


def test_stations_differ_in_gain():
    tissue = body(shape=(16, 16, 120))
    options = {"bias": 0, "snr": 1e9}
    seams = dixon_volume(tissue, np.random.default_rng(0), station_gain=0.05, **options)["in_phase"].values
    even = dixon_volume(tissue, np.random.default_rng(0), station_gain=0, **options)["in_phase"].values
    ratio = seams[8, 8] / even[8, 8]
    np.testing.assert_allclose(ratio[10:40], ratio[20], rtol=1e-4)
    assert abs(ratio[20] / ratio[70] - 1) > 0.003


def test_ukb_grid_has_the_published_size():
    grid = ukb_grid(top_superior_mm=500, centre_right_mm=3, centre_anterior_mm=20)
    assert grid.shape == (224, 174, 370)
    np.testing.assert_allclose(grid.spacing_mm, (2.232, 2.232, 3.0))
    right, anterior, superior = grid.axes_mm()
    assert right.mean() == pytest.approx(3)
    assert anterior.mean() == pytest.approx(20)
    assert superior[-1] == pytest.approx(500)
    assert ukb_grid(500, slices=100).axes_mm()[2][-1] == pytest.approx(500)


def test_hounsfield_bands():
    tissue = body()
    tissue.fractions[:, :4] = 0
    values = hounsfield(tissue.fractions, tissue.mineral)
    marrow, adipose, muscle = (tissue.fractions[TISSUES.index(t)] > 0.9 for t in ("marrow", "adipose", "muscle"))
    assert 80 < values[marrow].mean() < 240
    assert values[marrow].mean() == pytest.approx(-20 + 0.15 * mineral_hounsfield_per_g_cm3(), abs=4)
    assert -120 < values[adipose].mean() < -60
    assert 30 < values[muscle].mean() < 70
    assert abs(values[:, :4].mean() + 1000) < 1
    other = hounsfield(tissue.fractions, tissue.mineral, {"muscle": 200.0})
    np.testing.assert_allclose((other - values)[muscle], 150.0, atol=0.01)
    np.testing.assert_array_equal(other[adipose], values[adipose])


def test_table_lies_behind_the_body_and_is_thin():
    tissue = body(shape=(60, 60, 8))
    without = hounsfield(tissue.fractions, tissue.mineral)
    with_table = without.copy()
    add_table(with_table, 4.0)
    changed = with_table != without
    inside = tissue.fractions.sum(axis=0) > 0
    assert changed.any()
    assert not changed[inside].any()
    assert np.flatnonzero(changed.any(axis=(0, 2))).max() < np.flatnonzero(inside.any(axis=(0, 2))).min()
    assert with_table[changed].max() <= -300


def test_kernels_keep_the_mean_and_sharp_ones_overshoot():
    tissue = body()
    values = hounsfield(tissue.fractions, tissue.mineral)
    sharp, soft = (
        acquire(values, (4.0, 4.0, 4.0), Protocol(kernel_fwhm_mm=w, sharpening=s, noise_hu=0.0), None)
        for w, s in ((4.0, 1.2), (8.0, 0.0))
    )
    assert soft.mean() == pytest.approx(values.mean(), rel=1e-3)
    assert soft.max() <= values.max() + 1e-3
    assert sharp.max() > values.max() + 10
    assert np.abs(np.diff(soft, axis=0)).max() < np.abs(np.diff(sharp, axis=0)).max()


def test_calibration_and_range():
    values = np.array([-1000.0, 0.0, 1000.0, 9000.0]).reshape(4, 1, 1).repeat(3, 1).repeat(3, 2)
    protocol = Protocol(kernel_fwhm_mm=0.0, noise_hu=0.0, gain=1.02, offset_hu=10.0)
    shown = acquire(values, 2.0, protocol, np.random.default_rng(0))[:, 1, 1]
    np.testing.assert_allclose(shown, [-990.0, 30.0, 1050.0, 3071.0], atol=0.01)


def test_noise_has_the_asked_size_and_the_grain_of_the_kernel():
    water = np.zeros((40, 40, 30), np.float32)
    shown = acquire(water, 2.0, Protocol(kernel_fwhm_mm=4.0, noise_hu=20.0), np.random.default_rng(0))
    assert shown.std() == pytest.approx(20, rel=0.01)
    neighbours = (grain(np.random.default_rng(1), (40, 40, 30), (2.0, 2.0, 2.0), Protocol(w)) for w in (0.5, 4.0))
    fine, coarse = (float((g[1:] * g[:-1]).mean()) for g in neighbours)
    assert abs(fine) < 0.05
    assert coarse > 0.5


def test_streaks_run_from_side_to_side():
    shown = acquire(np.zeros((60, 40, 30)), 2.0, Protocol(noise_hu=0.0, streak_hu=25.0), np.random.default_rng(0))
    assert shown.std() == pytest.approx(25, rel=0.01)
    across, ahead = ((shown * np.roll(shown, 3, axis=axis)).mean() / 625 for axis in (0, 1))
    assert across > 0.7
    assert abs(ahead) < 0.1


def test_thick_slices_blur_and_distant_slices_are_interpolated():
    assert slice_weights(20, 2.0, 1.0, 1.0) == (None, None)
    weights, back = slice_weights(20, 2.0, 5.0, 2.0)
    assert back is None
    np.testing.assert_allclose(weights.sum(axis=0), 1, atol=1e-5)
    weights, back = slice_weights(31, 1.0, 1.0, 5.0)
    assert weights.shape == (31, 7)
    np.testing.assert_allclose(back.sum(axis=0), 1, atol=1e-5)
    ramp = np.arange(31, dtype=np.float32)
    np.testing.assert_allclose((ramp @ weights @ back)[5:26], ramp[5:26], atol=1e-3)
    odd = slice_weights(33, 1.0, 1.0, 5.0)
    np.testing.assert_allclose(np.ones(33) @ odd[0] @ odd[1], 1, atol=1e-5)


@pytest.mark.parametrize("make", [lambda t: hounsfield(t.fractions, t.mineral), lambda t: dixon_volume(t, None)])
def test_wrong_number_of_tissues_is_refused(make):
    tissue = body()
    tissue.fractions = tissue.fractions[:3]
    with pytest.raises(InputError, match="fractions must have shape"):
        make(tissue)


def test_unlike_volumes_are_refused():
    volumes = {"a": Volume(np.ones((3, 3, 3)), np.eye(4)), "b": Volume(np.ones((3, 3, 4)), np.eye(4))}
    with pytest.raises(InputError, match="share one grid"):
        coronal_projection(volumes)
