"""Two-point Dixon MRI of the trunk: water, fat, in-phase and opposed-phase images.

Signals are relative (percent of the largest possible), see `physics`. In every voxel before noise
in_phase = water + fat and opposed_phase = |water - fat|; receive bias and station gain touch all channels
alike.
"""

import numpy as np
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection, Volume, VolumeGrid
from spinelib.imaging.mr_contrast import rician_noise
from spinelib.imaging.physics import CORTICAL_MINERAL_G_CM3, TISSUES, dixon_signals, path_array
from spinelib.imaging.readers import straightened

CHANNELS = ("water", "fat", "in_phase", "opposed_phase")
UKB_SPACING_MM = (2.232, 2.232, 3.0)
UKB_SHAPE = (224, 174, 370)
FIELD_DEPTH_MM = 174 * 2.232
_MARROW_FAT = 0.40


def ukb_grid(top_superior_mm=560.0, centre_right_mm=0.0, centre_anterior_mm=40.0, slices=370) -> VolumeGrid:
    """Grid of UK Biobank's stitched Dixon MRI: 224 x 174 x 370 voxels of 2.232 x 2.232 x 3.0 mm.

    Parameters
    ----------
    top_superior_mm : float
        Height of the uppermost slice centre.
    centre_right_mm, centre_anterior_mm : float
        Middle of the field of view.
    slices : int
        Fewer slices keep the top and give up the legs.
    """
    shape = (*UKB_SHAPE[:2], slices)
    spacing = np.array(UKB_SPACING_MM)
    affine = np.diag([*spacing, 1.0])
    affine[:2, 3] = np.array([centre_right_mm, centre_anterior_mm]) - (np.array(shape[:2]) - 1) / 2 * spacing[:2]
    affine[2, 3] = top_superior_mm - (slices - 1) * spacing[2]
    return VolumeGrid(shape, affine)


def dixon_projection(path_mm, grid: PlanarGrid, rng, bias=0.3, snr=60.0, marrow_fat=_MARROW_FAT) -> Projection:
    """Coronal mean-intensity projection over the depth of the MRI field (388 mm).

    Parameters
    ----------
    path_mm : dict of ndarray, shape (rows, cols)
        Path lengths in mm and 'mineral' in g/cm2, on `grid`.
    grid : PlanarGrid
    rng : numpy.random.Generator or None
        None leaves out bias field and noise.
    bias : float
        Largest relative departure of the low-order receive field.
    snr : float
        Mean in-phase signal of the body over the noise SD of one channel (after averaging along the rays).
    marrow_fat : float
        Proton-density fat fraction of the marrow.

    Returns
    -------
    Projection
        Channels water, fat, in_phase, opposed_phase; opposed_phase is |water - fat| of the projected signals,
        which is less than the projection of an opposed-phase volume where water and fat lie one behind the
        other.
    """
    tissues, lengths = path_array(path_mm)
    signals = dixon_signals(tissues, marrow_fat)
    water, fat = np.tensordot(signals, lengths, axes=1)
    if "marrow" in tissues:
        displaced_mm = 10 * np.asarray(path_mm.get("mineral", 0.0), float) / CORTICAL_MINERAL_G_CM3
        displaced_mm = np.minimum(displaced_mm, lengths[tissues.index("marrow")])
        water = water - signals[0, tissues.index("marrow")] * displaced_mm
        fat = fat - signals[1, tissues.index("marrow")] * displaced_mm
    images = _finished(water / FIELD_DEPTH_MM, fat / FIELD_DEPTH_MM, rng, bias, snr)
    return Projection(CHANNELS, np.stack(images).astype(np.float32), grid)


def dixon_volume(
    tissue, rng, bias=0.3, snr=20.0, station_gain=0.05, marrow_fat=_MARROW_FAT, tissues=TISSUES
) -> dict[str, Volume]:
    """Dixon volumes on the grid of a tissue volume.

    Parameters
    ----------
    tissue : object
        With `fractions` (T, R, A, S) in the order of `tissues`, `mineral` (R, A, S) in g/cm3, and `affine`
        (4, 4).
    rng : numpy.random.Generator or None
        None leaves out bias field, station seams and noise.
    bias : float
        Largest relative departure of the low-order receive field.
    snr : float
        Mean in-phase signal of the body over the noise SD of one channel.
    station_gain : float
        Standard deviation of the gain from one 200 mm station to the next; 0 for seamless volumes.
    marrow_fat : float
        Proton-density fat fraction of the marrow.
    tissues : tuple of str
        Names of the fractions.

    Returns
    -------
    dict of Volume
        water, fat, in_phase, opposed_phase; float32.
    """
    fractions = np.asarray(tissue.fractions)
    if fractions.ndim != 4 or len(fractions) != len(tissues):
        message = f"fractions must have shape ({len(tissues)}, right, anterior, superior), given {fractions.shape}."
        raise InputError(message)
    signals = dixon_signals(tissues, marrow_fat).astype(np.float32)
    water, fat = (np.einsum("t,tras->ras", s, fractions) for s in signals)
    if "marrow" in tissues:
        index = tissues.index("marrow")
        lost = np.minimum(np.asarray(tissue.mineral) / CORTICAL_MINERAL_G_CM3, fractions[index])
        water, fat = water - signals[0, index] * lost, fat - signals[1, index] * lost
    if rng is not None and station_gain > 0:
        gain = _station_gain(water.shape[2], float(tissue.affine[2, 2]), station_gain, rng)
        water, fat = water * gain, fat * gain
    images = _finished(water, fat, rng, bias, snr)
    return {name: Volume(v.astype(np.float32), tissue.affine) for name, v in zip(CHANNELS, images, strict=True)}


def coronal_projection(volumes: Volume | dict[str, Volume]) -> Projection:
    """Mean over the anterior axis, on the volume's own right and superior spacing.

    Parameters
    ----------
    volumes : Volume, or dict of Volume on one grid
        A lone volume becomes the channel 'mean'.
    """
    named = {"mean": volumes} if isinstance(volumes, Volume) else volumes
    straight = [straightened(v) for v in named.values()]
    first = straight[0]
    if any(v.values.shape != first.values.shape or not np.allclose(v.affine, first.affine) for v in straight):
        message = f"volumes to be projected together must share one grid, given {[v.values.shape for v in straight]}."
        raise InputError(message)
    values = np.stack([v.values.mean(axis=1, dtype=float).T[::-1, ::-1] for v in straight])
    far = first.affine[:3, 3] + (np.array(first.values.shape) - 1) * first.spacing_mm
    spacing = (float(first.spacing_mm[2]), float(first.spacing_mm[0]))
    grid = PlanarGrid("coronal", values.shape[1:], spacing, (float(far[2]), float(far[0])))
    return Projection(tuple(named), values.astype(np.float32), grid)


def _finished(water, fat, rng, bias, snr):
    """Bias, four channels, noise."""
    water, fat = np.maximum(water, 0), np.maximum(fat, 0)
    if rng is None:
        return water, fat, water + fat, np.abs(water - fat)
    field = _bias_field(water.shape, bias, rng)
    water, fat = water * field, fat * field
    in_phase = water + fat
    body = in_phase > 0.1 * in_phase.max()
    sigma = in_phase[body].mean() / snr if body.any() else 0.0
    return tuple(rician_noise(v, sigma, rng) for v in (water, fat, in_phase, np.abs(water - fat)))


def _bias_field(shape, bias, rng):
    """Smooth gain 1 - bias .. 1 + bias: a random polynomial of second order over the field of view."""
    axes = [
        np.linspace(-1, 1, n).reshape([-1 if i == k else 1 for i in range(len(shape))]) for k, n in enumerate(shape)
    ]
    field = np.zeros(shape, dtype=np.float32)
    for i, a in enumerate(axes):
        field += rng.normal() * a + rng.normal() * (a**2 - 1 / 3)
        for b in axes[:i]:
            field += rng.normal() * a * b
    return 1 + bias * rng.uniform(0.4, 1.0) * field / max(np.abs(field).max(), 1e-6)


def _station_gain(slices, pitch_mm, sd, rng):
    """Piecewise constant gain of 200 mm stations, blended over 9 mm; shape (slices,)."""
    station = (np.arange(slices) * pitch_mm // 200).astype(int)
    gain = np.exp(sd * rng.standard_normal(station.max() + 1))[station]
    return ndimage.gaussian_filter1d(gain, 9.0 / pitch_mm, mode="nearest").astype(np.float32)
