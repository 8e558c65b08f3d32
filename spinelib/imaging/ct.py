"""Computed tomography of known anatomy, in Hounsfield units."""

import numpy as np
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.physics import MINERAL_CM2_G, TISSUES, WATER_CM2_G, lookup

AIR_HU = -1000.0
_PAD_HU, _SHELL_HU = -970.0, -300.0


def ct_volume(tissue, rng, noise_hu=15.0, blur_fwhm_mm=1.0, table=True, tissues=TISSUES) -> Volume:
    """Simulate a CT at 120 kVp.

    Tissues and mineral mix by volume; 150 mg/cm3 of mineral raise the marrow that they displace by 197 HU.

    Parameters
    ----------
    tissue : object
        With `fractions` (T, R, A, S) in the order of `tissues`, `mineral` (R, A, S) in g/cm3, and `affine`
        (4, 4). What fractions and mineral (3.156 g/cm3) leave free is air.
    rng : numpy.random.Generator or None
        None leaves out the noise.
    noise_hu : float
        Standard deviation of a voxel.
    blur_fwhm_mm : float
        Width of the reconstruction kernel; 0 for none.
    table : bool
        Put the body on a padded table.
    tissues : tuple of str
        Names of the fractions.

    Returns
    -------
    Volume
        HU, float32, within -1024 to 3071.
    """
    fractions = np.asarray(tissue.fractions)
    if fractions.ndim != 4 or len(fractions) != len(tissues):
        message = f"fractions must have shape ({len(tissues)}, right, anterior, superior), given {fractions.shape}."
        raise InputError(message)
    above_air = np.array([lookup(t).hounsfield - AIR_HU for t in tissues], dtype=np.float32)
    values = AIR_HU + np.einsum("t,tras->ras", above_air, fractions)
    values += 1000 * MINERAL_CM2_G[1] / WATER_CM2_G[1] * np.asarray(tissue.mineral)
    spacing = np.linalg.norm(np.asarray(tissue.affine)[:3, :3], axis=0)
    if table:
        _add_table(values, spacing[1])
    if blur_fwhm_mm > 0:
        values = ndimage.gaussian_filter(values, blur_fwhm_mm / 2.355 / spacing)
    if rng is not None:
        values = values + noise_hu * rng.standard_normal(values.shape, dtype=np.float32)
    return Volume(np.clip(values, -1024, 3071).astype(np.float32), np.asarray(tissue.affine))


def _add_table(values, pitch_mm):
    """Put two thin shells and a foam core 8 mm behind the body, where the grid has room."""
    behind = np.flatnonzero((values > -300).any(axis=(0, 2)))
    top = int(behind[0] - round(8 / pitch_mm)) if len(behind) else -1
    bottom = max(0, top - round(45 / pitch_mm))
    shell = max(1, round(3 / pitch_mm))
    if top <= shell:
        return
    margin = values.shape[0] // 8
    plate = values[margin : values.shape[0] - margin]
    plate[:, bottom:top] = _PAD_HU
    plate[:, top - shell : top] = _SHELL_HU
    plate[:, bottom : bottom + shell] = _SHELL_HU
