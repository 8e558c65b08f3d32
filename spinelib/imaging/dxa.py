"""Dual-energy X-ray absorptiometry: attenuation, two-material decomposition, noise, and DXA from CT.

Model: J_E = -ln(I / I0) = sum over materials of (mass attenuation at E) x (areal density). With R the ratio
J_low / J_high of the soft tissue in a pixel, bone = (J_low - R J_high) / (b_low - R b_high), where b is the
mass attenuation of mineral.
"""

from functools import cache

import numpy as np
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection, Volume
from spinelib.imaging.physics import (
    CERIUM,
    MINERAL_DENSITY_G_CM3,
    TISSUE_TABLE,
    WATER_CM2_G,
    Beam,
    mineral_hounsfield_per_g_cm3,
    mineral_net_cm2_g,
    path_array,
)
from spinelib.imaging.readers import straightened

PIXEL_MM = (3.0, 2.4)  # total-body raster: row pitch, column pitch
DOSE_PHOTONS_MM2 = 2.2e4  # per energy in air; leaves about 40 (low) and 300 (high) behind 22 cm of soft tissue
_BODY_J_HIGH = 0.3  # about 15 mm of tissue
_BLIND_PHOTONS = 10  # fewer, at the low energy, cannot be decomposed


def dual_energy(path_mm, mineral_g_cm2=None, metal_g_cm2=None, beam: Beam = CERIUM) -> tuple[np.ndarray, np.ndarray]:
    """Line integrals of attenuation at the two energies of a beam, 40 and 70 keV by default.

    Parameters
    ----------
    path_mm : dict of ndarray, shape (rows, cols)
        Tissue name -> path length in mm; mineral takes its own share of the way, not counted here.
    mineral_g_cm2 : ndarray, shape (rows, cols), optional
        Areal mineral (hydroxyapatite) density; the 'mineral' entry of `path_mm` when not given, else none.
    metal_g_cm2 : ndarray, shape (rows, cols), optional
        Areal density of titanium.
    beam : Beam

    Returns
    -------
    j_low, j_high : ndarray, shape (rows, cols), dimensionless
    """
    tissues, lengths = path_array(path_mm)
    linear = np.stack([beam.linear_per_cm(t) for t in tissues], axis=1)
    attenuation = np.tensordot(linear, lengths / 10, axes=1)
    mineral = path_mm.get("mineral", 0.0) if mineral_g_cm2 is None else mineral_g_cm2
    attenuation += np.array(beam.mineral_cm2_g)[:, None, None] * np.asarray(mineral, float)
    if metal_g_cm2 is not None:
        attenuation += np.array(beam.titanium_cm2_g)[:, None, None] * metal_g_cm2
    return attenuation[0], attenuation[1]


def soft_ratio(path_mm, beam: Beam = CERIUM) -> np.ndarray:
    """Return the true soft-tissue ratio R = J_low / J_high of known path lengths, shape (rows, cols).

    Pixels without tissue get muscle's ratio.
    """
    low, high = dual_energy(path_mm, mineral_g_cm2=0.0, beam=beam)
    low_muscle, high_muscle = beam.linear_per_cm("muscle")
    return np.where(high > 0, low / np.maximum(high, 1e-12), low_muscle / high_muscle)


def decompose(j_low, j_high, ratio=None, pixel_mm=PIXEL_MM, beam: Beam = CERIUM) -> tuple[np.ndarray, np.ndarray]:
    """Split two line integrals into bone and soft tissue (R-value method).

    With the true `ratio` the noise-free inversion is exact. Without it the ratio is estimated as a scanner
    does it, from the bone-free pixels nearby: exact where the fat share beside and before the bone changes
    linearly. The marrow of a vertebra holds more fat than muscle, so the estimate reads 5 to 10 per cent low
    over the spine.

    Parameters
    ----------
    j_low, j_high : ndarray, shape (rows, cols)
    ratio : float or ndarray, shape (rows, cols), optional
        Soft-tissue ratio R; estimated when not given.
    pixel_mm : tuple of float
        Row and column pitch, used by the estimate.
    beam : Beam

    Returns
    -------
    bone_g_cm2 : ndarray, shape (rows, cols)
        Areal mineral density.
    soft : ndarray, shape (rows, cols)
        High-energy attenuation left when the bone is taken away.
    """
    j_low, j_high = np.asarray(j_low, float), np.asarray(j_high, float)
    if j_low.shape != j_high.shape or j_low.ndim != 2:
        message = f"decompose needs two images of one shape (rows, cols), given {j_low.shape} and {j_high.shape}."
        raise InputError(message)
    ratio = _local_ratio(j_low, j_high, pixel_mm, beam) if ratio is None else ratio
    bone = _bone(j_low, j_high, ratio, beam)
    return bone, j_high - beam.mineral_cm2_g[1] * bone


def dxa_image(
    path_mm,
    grid: PlanarGrid,
    rng,
    dose=DOSE_PHOTONS_MM2,
    line_gain=0.01,
    metal_g_cm2=None,
    beam: Beam = CERIUM,
    blur_mm=0.0,
) -> Projection:
    """Total-body DXA image of known anatomy.

    Parameters
    ----------
    path_mm : dict of ndarray, shape (rows, cols)
        Path lengths in mm and 'mineral' in g/cm2, on `grid`.
    grid : PlanarGrid
    rng : numpy.random.Generator or None
        None leaves out photon noise and line gain.
    dose : float
        Photons per mm2 and energy in air.
    line_gain : float
        Standard deviation of the gain from raster line to raster line.
    metal_g_cm2 : ndarray, shape (rows, cols), optional
        Titanium implants. Where they let through next to no photons, bone is shown as the densest of the image.
    beam : Beam
    blur_mm : float
        Standard deviation of the Gaussian that stands for focus, detector and motion; it acts on the intensity.

    Returns
    -------
    Projection
        Channels 'bone' (areal mineral, g/cm2) and 'tissue' (high-energy attenuation, dimensionless).
    """
    attenuation = dual_energy(path_mm, metal_g_cm2=metal_g_cm2, beam=beam)
    if blur_mm > 0:
        sigma = [blur_mm / pitch for pitch in grid.spacing_mm]
        attenuation = [-np.log(ndimage.gaussian_filter(np.exp(-j), sigma)) for j in attenuation]
    image = _as_projection(attenuation, grid, rng, dose, line_gain, beam)
    if metal_g_cm2 is not None and rng is not None:
        photons = dose * np.prod(grid.spacing_mm) * np.exp(-attenuation[0])
        bone = image.values[0]
        bone[(photons < _BLIND_PHOTONS) & (metal_g_cm2 > 0)] = bone.max()
    return image


def dxa_from_ct(volume: Volume, rng=None, pixel_mm=PIXEL_MM) -> Projection:
    """DXA-like anteroposterior image of a CT in Hounsfield units (parallel rays, table removed).

    Outside bone the attenuation at 70 keV follows the HU and its ratio to 40 keV runs from adipose to muscle;
    inside bone the HU above marrow is mineral. Limits: contrast agent denser than 120 HU is set to 120 HU
    where it is smooth and wide or very dense (aorta, heart chambers, caval vein; metal goes with it); thin
    contrast-filled vessels, bowel contrast, streaks and calcifications may stay as bone. Arms beside the
    chest and a body cut by the field of view are taken as they are.

    Parameters
    ----------
    volume : Volume
        HU, indexed (right, anterior, superior).
    rng : numpy.random.Generator, optional
        Adds photon noise and line gain as in `dxa_image`.
    pixel_mm : tuple of float

    Returns
    -------
    Projection
        Channels 'bone' and 'tissue' as in `dxa_image`, world millimetres of the CT.
    """
    if volume.values.ndim != 3 or np.nanmin(volume.values) > -200 or np.nanmax(volume.values) < 150:
        message = (
            "dxa_from_ct needs a 3D CT in Hounsfield units (air about -1000, bone above 150), given "
            f"{volume.values.ndim}D values from {np.nanmin(volume.values):.0f} to "
            f"{np.nanmax(volume.values):.0f}. "
            "Fix: apply the rescale slope and intercept, or pass the CT rather than a mask or MR volume."
        )
        raise InputError(message)
    coarse = _block_mean(straightened(volume, fill=-1000.0), 1.4)
    body = _body_mask(coarse)
    hounsfield = np.where(body, np.clip(coarse.values, -1000, 3000), -1000).astype(np.float32)
    low, high = _ct_attenuation(hounsfield, coarse.spacing_mm)
    images = [_anteroposterior(per_cm, coarse, pixel_mm) for per_cm in (low, high)]
    grid = _covering_grid(coarse, pixel_mm)
    return _as_projection((images[0], images[1]), grid, rng, DOSE_PHOTONS_MM2, 0.01)


# --- decomposition ---


def _bone(j_low, j_high, ratio, beam):
    low, high = beam.mineral_cm2_g
    return (j_low - ratio * j_high) / (low - ratio * high)


def _as_projection(attenuation, grid, rng, dose, line_gain, beam=CERIUM):
    """Add noise, decompose, and wrap."""
    if rng is not None:
        attenuation = [_counted(j, grid, rng, dose, line_gain) for j in attenuation]
    bone, _ = decompose(*attenuation, pixel_mm=grid.spacing_mm, beam=beam)
    values = np.stack([bone, attenuation[1]]).astype(np.float32)
    return Projection(("bone", "tissue"), values, grid)


def _counted(j, grid, rng, dose, line_gain):
    """Attenuation measured with Poisson photons and a gain that changes from raster line to raster line."""
    in_air = dose * grid.spacing_mm[0] * grid.spacing_mm[1]
    gain = np.exp(line_gain * rng.standard_normal((grid.shape[0], 1)))
    counts = rng.poisson(in_air * gain * np.exp(-j))
    return -np.log(np.maximum(counts, 1) / in_air)


def _local_ratio(j_low, j_high, pixel_mm, beam):
    """Soft-tissue ratio in every pixel from the bone-free pixels around it."""
    body = j_high > _BODY_J_HIGH
    if not body.any():
        return np.full(j_high.shape, soft_ratio({"muscle": np.ones((1, 1))}, beam)[0, 0])
    smooth = [_masked_mean(j, body, 4.0, pixel_mm) for j in (j_low, j_high)]
    ratio = smooth[0] / smooth[1]
    nearest = ndimage.distance_transform_edt(~body, sampling=pixel_mm, return_distances=False, return_indices=True)
    window = [int(110 / p) | 1 for p in pixel_mm]  # wider than a spine with its transverse processes
    estimate = ndimage.grey_opening(ratio[tuple(nearest)], window)
    for limit in (0.15, 0.08, 0.08):
        soft = body & (_bone(*smooth, estimate, beam) < limit)
        if not soft.any():
            break
        estimate = _local_plane(j_low / np.maximum(j_high, 1e-6), soft, pixel_mm)
    return np.clip(estimate, *beam.soft_ratios)


def _masked_mean(values, mask, sigma_mm, pixel_mm):
    sigma = [sigma_mm / p for p in pixel_mm]
    weight = ndimage.gaussian_filter(mask.astype(float), sigma)
    mean = ndimage.gaussian_filter(np.where(mask, values, 0.0), sigma) / np.maximum(weight, 1e-9)
    return np.where(mask, mean, 1.0)


def _local_plane(values, mask, pixel_mm):
    """Fit a weighted plane around every pixel; a wide kernel helps where the narrow one sees little.

    Planes change over tens of millimetres: they are fitted at about every fourth pixel and interpolated.
    """
    rows, cols = np.meshgrid(*[np.linspace(-1, 1, n) for n in values.shape], indexing="ij")
    basis = np.stack([np.ones_like(rows), rows, cols])
    mean = float(values[mask].mean())  # fit the departure from it, so that the ridge pulls towards the mean
    weight = mask.astype(float)
    products = [weight * basis[i] * basis[j] for i, j in _PAIRS]
    products += [weight * np.where(mask, values - mean, 0) * b for b in basis]
    sums = np.zeros((len(products), *(len(_plane_places(n)) for n in values.shape)))
    for sigma_mm, share in ((18.0, 1.0), (60.0, 1e-3)):
        down, across = (_gaussian_rows(n, sigma_mm / p) for n, p in zip(values.shape, pixel_mm, strict=True))
        sums += share * (down @ np.stack(products) @ across.T)
    normal = np.zeros((*sums.shape[1:], 3, 3))
    for (i, j), total in zip(_PAIRS, sums, strict=False):
        normal[..., i, j] = normal[..., j, i] = total
    plane = np.linalg.solve(normal + 1e-9 * np.eye(3), np.moveaxis(sums[len(_PAIRS) :], 0, -1)[..., None])[..., 0]
    down, across = (_linear_rows(n) for n in values.shape)
    return mean + np.sum(down @ np.moveaxis(plane, -1, 0) @ across.T * basis, axis=0)


_PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))


def _plane_places(count):
    """About every fourth place, evenly from border to border, so that a mirrored image is treated alike."""
    return np.linspace(0, count - 1, -(-count // 4))


@cache
def _gaussian_rows(count, sigma):
    """Gaussian weights of all places around the sampled ones, (n / 4, n); nothing is assumed beyond the border."""
    distance = (np.arange(count) - _plane_places(count)[:, None]) / sigma
    return np.exp(-0.5 * distance**2) / (sigma * np.sqrt(2 * np.pi))


@cache
def _linear_rows(count):
    """Linear interpolation from the sampled places to all of them as a matrix (n, n / 4)."""
    places = _plane_places(count)
    return np.stack([np.interp(np.arange(count), places, unit) for unit in np.eye(len(places))], axis=1)


# --- CT ---


def _block_mean(volume, target_mm):
    """Average whole blocks of voxels so that no voxel is much finer than `target_mm`."""
    block = np.maximum(1, np.floor(target_mm / volume.spacing_mm + 0.1)).astype(int)
    shape = np.array(volume.values.shape) // block
    if shape.min() < 1 or block.max() == 1:
        return volume
    cut = volume.values[tuple(slice(n * b) for n, b in zip(shape, block, strict=True))]
    split = np.stack([shape, block], axis=1).ravel()
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ ((block - 1) / 2)
    affine[:3, :3] *= block
    return Volume(cut.reshape(split).mean(axis=(1, 3, 5), dtype=np.float32), affine)


def _body_mask(volume):
    """Largest connected body with its air pockets; thin table shells are cut off by an opening of 4 mm."""
    dense = volume.values > -300
    core = _shifted(dense, volume.spacing_mm, -4.0)
    labels, count = ndimage.label(core)
    if count == 0:
        message = "no body was found in the CT (nothing thicker than 8 mm above -300 HU). Fix: check the HU scale."
        raise InputError(message)
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    body = _shifted(largest, volume.spacing_mm, 5.5) & dense
    for k in range(body.shape[2]):
        body[:, :, k] = ndimage.binary_fill_holes(body[:, :, k])
    return body


def _ct_attenuation(hounsfield, spacing_mm):
    """Linear attenuation (1/cm) at 40 and 70 keV of a CT without table."""
    bone = _bone_mask(hounsfield, spacing_mm)
    per_g_cm3 = mineral_hounsfield_per_g_cm3()
    mineral = np.where(bone, np.maximum(hounsfield - TISSUE_TABLE["marrow"].hounsfield, 0) / per_g_cm3, 0)
    mineral = np.minimum(mineral, MINERAL_DENSITY_G_CM3)
    soft = np.where(bone & (mineral > 0), TISSUE_TABLE["marrow"].hounsfield, np.minimum(hounsfield, 120))
    net_low, net_high = mineral_net_cm2_g()
    high = WATER_CM2_G[1] * (1 + soft / 1000)
    return high * _ratio_of_hounsfield(soft) + net_low * mineral, high + net_high * mineral


def _ratio_of_hounsfield(hounsfield):
    """R of soft tissue by HU: fat to muscle between -90 and 50 HU; partly air-filled voxels count as lung."""
    fat, lean = (TISSUE_TABLE[t].linear_per_cm for t in ("adipose", "muscle"))
    fat_hu, lean_hu = TISSUE_TABLE["adipose"].hounsfield, TISSUE_TABLE["muscle"].hounsfield
    r_fat, r_lean = fat[0] / fat[1], lean[0] / lean[1]
    return np.interp(hounsfield, [-400, -200, fat_hu, lean_hu], [r_lean, r_fat, r_fat, r_lean])


def _bone_mask(hounsfield, spacing_mm):
    """Cortex above 200 HU, less contrast-filled blood, closed by 4 mm and filled to take in the marrow."""
    bright = (hounsfield > 200) & ~_contrast_mask(hounsfield, spacing_mm)
    labels, _ = ndimage.label(bright)
    size_cm3 = np.bincount(labels.ravel()) * np.prod(spacing_mm) / 1000
    bright &= size_cm3[labels] > 0.5
    closed = _shifted(_shifted(bright, spacing_mm, 4.0), spacing_mm, -4.0) | bright
    for k in range(closed.shape[2]):
        closed[:, :, k] = ndimage.binary_fill_holes(closed[:, :, k])
    return closed


def _contrast_mask(hounsfield, spacing_mm):
    """Find contrast-filled blood and its rim: over 7 mm bright and smooth, or denser than bone so wide.

    Trabecular bone is rougher or darker, cortex is thinner.
    """
    window = np.maximum(3, np.round(7 / np.asarray(spacing_mm)).astype(int) | 1)
    mean = ndimage.uniform_filter(hounsfield, window)
    variance = ndimage.uniform_filter(hounsfield**2, window) - mean**2
    core = (mean > 240) & (variance < np.maximum(60, 0.2 * mean) ** 2) & (ndimage.minimum_filter(hounsfield, 3) > 150)
    core |= mean > 1300
    return _shifted(core, spacing_mm, 6.0) & (hounsfield > 120) if core.any() else core


def _shifted(mask, spacing_mm, by_mm):
    """Grow (positive) or shrink (negative) a mask by a distance in mm, not from the volume border."""
    if by_mm > 0:
        return ndimage.distance_transform_edt(~mask, sampling=spacing_mm) <= by_mm if mask.any() else mask
    return ndimage.distance_transform_edt(mask, sampling=spacing_mm) > -by_mm if not mask.all() else mask


def _covering_grid(volume, pixel_mm):
    extent = np.array(volume.values.shape) * volume.spacing_mm
    shape = (max(1, int(extent[2] / pixel_mm[0])), max(1, int(extent[0] / pixel_mm[1])))
    centre = volume.affine[:3, 3] + (np.array(volume.values.shape) - 1) / 2 * volume.spacing_mm
    return PlanarGrid.centred("coronal", shape, tuple(pixel_mm), (float(centre[2]), float(centre[0])))


def _anteroposterior(per_cm, volume, pixel_mm):
    """Integrate along the anterior axis and average onto DXA pixels (mass is kept)."""
    image = per_cm.sum(axis=1, dtype=float) * volume.spacing_mm[1] / 10
    grid = _covering_grid(volume, pixel_mm)
    for axis, (count, pitch, step) in enumerate(
        [
            (grid.shape[1], pixel_mm[1], volume.spacing_mm[0]),
            (grid.shape[0], pixel_mm[0], volume.spacing_mm[2]),
        ]
    ):
        n = image.shape[axis]
        edges = (n * step - count * pitch) / 2 + pitch * np.arange(count + 1)
        total = np.cumsum(np.insert(image, 0, 0.0, axis=axis), axis=axis) * step
        at_edges = np.apply_along_axis(
            lambda c, n=n, e=edges, s=step: np.interp(e, s * np.arange(n + 1), c), axis, total
        )
        image = np.diff(at_edges, axis=axis) / pitch
    return image.T[::-1, ::-1]
