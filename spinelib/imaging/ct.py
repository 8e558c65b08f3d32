"""Computed tomography: from tissue to Hounsfield units, and from those to what a scanner makes of them."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.imaging.physics import MINERAL_CM2_G, TISSUES, WATER_CM2_G, lookup

AIR_HU = -1000.0
LOWEST_HU, HIGHEST_HU = -1024.0, 3071.0
"""Range of the 12-bit values that scanners store."""

MINERAL_HU_CM3_G = 1000 * MINERAL_CM2_G[1] / WATER_CM2_G[1]
"""Hounsfield units per g/cm3 of mineral, before the tissue that it displaces."""

_PAD_HU, _SHELL_HU = -970.0, -300.0
_FWHM = 2.355


@dataclass(frozen=True)
class Protocol:
    """How a volume is scanned and reconstructed.

    Attributes
    ----------
    kernel_fwhm_mm : float
        In-plane width of the reconstruction kernel.
    sharpening : float
        Share of the detail that is added once more: 0 for soft kernels, about 1 for bone kernels, which overshoot
        at edges.
    slice_mm, pitch_mm : float
        Thickness and distance of the slices. Slices farther apart than the voxels are interpolated linearly.
    noise_hu : float
        Standard deviation in a voxel of a slice.
    gain, offset_hu : float
        Calibration: HU = gain * (HU + 1000) - 1000 + offset.
    streak_hu : float
        Standard deviation of streaks from side to side, which rays through shoulders and hips leave.
    """

    kernel_fwhm_mm: float = 1.0
    sharpening: float = 0.0
    slice_mm: float = 1.0
    pitch_mm: float = 1.0
    noise_hu: float = 15.0
    gain: float = 1.0
    offset_hu: float = 0.0
    streak_hu: float = 0.0


def hounsfield(fractions, mineral, tissue_hu=None, tissues=TISSUES) -> np.ndarray:
    """Return Hounsfield units at 120 kVp of mixed tissue.

    Tissues and mineral mix by volume; 150 mg/cm3 of mineral raise the marrow that they displace by 197 HU.

    Parameters
    ----------
    fractions : ndarray (T, R, A, S)
        Volume fractions in the order of `tissues`; what they and the mineral (3.156 g/cm3) leave free is air.
    mineral : ndarray (R, A, S)
        Hydroxyapatite, g/cm3.
    tissue_hu : dict of str to float, optional
        Replaces values of the tissue table.
    tissues : tuple of str

    Returns
    -------
    ndarray (R, A, S), float32

    Raises
    ------
    InputError
        If the fractions do not match the tissues.
    """
    fractions = np.asarray(fractions, dtype=np.float32)
    if fractions.ndim != 4 or len(fractions) != len(tissues):
        message = f"fractions must have shape ({len(tissues)}, right, anterior, superior), given {fractions.shape}."
        raise InputError(message)
    given = tissue_hu or {}
    above_air = [given.get(name, lookup(name).hounsfield) - AIR_HU for name in tissues]
    values = np.tensordot(np.array(above_air, np.float32), fractions, 1)
    values += np.float32(MINERAL_HU_CM3_G) * np.asarray(mineral, np.float32)
    return values + np.float32(AIR_HU)


def acquire(values, spacing_mm, protocol: Protocol, rng: np.random.Generator | None) -> np.ndarray:
    """Return what a scanner shows of Hounsfield units on an axis-aligned grid.

    In-plane blur or sharpening, slices of finite thickness, noise with the grain of the kernel, calibration.

    Parameters
    ----------
    values : ndarray (R, A, S)
    spacing_mm : (3,) array-like
    protocol : Protocol
    rng : numpy.random.Generator or None
        None leaves out the noise.

    Returns
    -------
    ndarray (R, A, S), float32
        Within `LOWEST_HU` to `HIGHEST_HU`.
    """
    spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3)
    to_slices, from_slices = slice_weights(values.shape[2], spacing[2], protocol.slice_mm, protocol.pitch_mm)
    values = _kernel(np.asarray(values, np.float32), spacing, protocol)
    if to_slices is not None:
        values = values @ to_slices
    if rng is not None and protocol.noise_hu > 0:
        values = values + protocol.noise_hu * grain(rng, values.shape, spacing, protocol)
    if rng is not None and protocol.streak_hu > 0:
        values = values + protocol.streak_hu * _streaks(rng, values.shape, spacing)
    if from_slices is not None:
        values = values @ from_slices
    values = protocol.gain * (values - AIR_HU) + (AIR_HU + protocol.offset_hu)
    return np.clip(values, LOWEST_HU, HIGHEST_HU).astype(np.float32)


def slice_weights(count, spacing_mm, slice_mm, pitch_mm) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the matrices that average `count` samples into slices (count, n) and interpolate back (n, count).

    Each is None where it would change nothing: slices as thin, or as near, as the samples.
    """
    place = spacing_mm * np.arange(count)
    near = pitch_mm <= 1.05 * spacing_mm
    if near and slice_mm <= 1.05 * spacing_mm:
        return None, None
    centres = place if near else np.arange(0, place[-1] + 0.5 * pitch_mm, pitch_mm)
    sigma = max(slice_mm, 0.5 * spacing_mm) / _FWHM
    weights = np.exp(-0.5 * ((place[:, None] - centres) / sigma) ** 2)
    weights = (weights / weights.sum(axis=0)).astype(np.float32)
    if near:
        return weights, None
    back = np.clip(1 - np.abs(centres[:, None] - np.clip(place, None, centres[-1])) / pitch_mm, 0, None)
    return weights, back.astype(np.float32)


def grain(rng: np.random.Generator, shape, spacing_mm, protocol: Protocol) -> np.ndarray:
    """Return noise of unit variance with the in-plane spectrum of the kernel."""
    noise = _kernel(rng.standard_normal(shape, dtype=np.float32), spacing_mm, protocol)
    return noise / max(float(noise.std()), 1e-6)


def add_table(values: np.ndarray, pitch_mm: float, curve_per_mm: float = 0.0, gap_mm: float = 8.0) -> None:
    """Put two thin shells and a foam core behind the body, in place, where the grid has room.

    Parameters
    ----------
    values : ndarray (R, A, S)
        Hounsfield units.
    pitch_mm : float
        In-plane voxel size.
    curve_per_mm : float
        The table rises by this times the square of the distance from its middle.
    gap_mm : float
        Between back and table.
    """
    behind = np.flatnonzero((values > -300).any(axis=(0, 2)))
    level = behind[0] * pitch_mm - gap_mm if len(behind) else -1.0
    margin = values.shape[0] // 8
    right = np.arange(margin, values.shape[0] - margin)
    rise = curve_per_mm * ((right - values.shape[0] / 2) * pitch_mm) ** 2
    depth = level + rise[:, None] - pitch_mm * np.arange(values.shape[1])
    inside = (depth >= 0) & (depth < 45) & (level > 3)
    shell = inside & ((depth < 3) | (depth >= 42))
    plate = values[margin : values.shape[0] - margin]
    free = plate < -500
    plate[inside[..., None] & free] = _PAD_HU
    plate[shell[..., None] & free] = _SHELL_HU


def _kernel(values, spacing_mm, protocol):
    sigma = protocol.kernel_fwhm_mm / _FWHM / np.asarray(spacing_mm)[:2]
    if protocol.kernel_fwhm_mm > 0:
        values = ndimage.gaussian_filter(values, (*sigma, 0), truncate=3)
    if protocol.sharpening > 0:
        wide = ndimage.gaussian_filter(values, (*(1.6 * np.maximum(sigma, 0.5)), 0), truncate=3)
        values = values + protocol.sharpening * (values - wide)
    return values


def _streaks(rng, shape, spacing_mm):
    """Noise of unit variance, 40 mm long from side to side, in some heights more than in others."""
    noise = ndimage.gaussian_filter1d(rng.standard_normal(shape, dtype=np.float32), 17 / spacing_mm[0], axis=0)
    noise *= 1 + np.sin(2 * np.pi * (rng.random() + np.arange(shape[2]) / max(shape[2], 8) * rng.uniform(0.5, 3)))
    return noise / max(float(noise.std()), 1e-6)
