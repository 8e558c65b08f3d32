"""Digitally reconstructed radiographs: cone-beam line integrals of a CT, and what a detector makes of them.

The volume is walked slice by slice along the axis that the rays cross most steeply (Joseph 1982): one bilinear sample
per slice and ray, times the length of the ray between slices. It is exact for a block aligned with the voxels, works
for any pose, is differentiable in the volume and in its affine, and runs where the volume lives, CPU or GPU. A small
part of the detector visits only the voxels that its own rays cross. Measured on a chest CT, images differ from finely
stepped integrals of the trilinear volume by 2e-5 in standard views, 5e-5 turned by 10 degrees, 7e-4 by 45.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import grid_sample

from spinelib.errors import InputError
from spinelib.imaging import physics
from spinelib.imaging.cone_beam import ConeBeam

_SAMPLES_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}  # on CPU the samples of a few slices stay in the cache


def attenuation_per_mm(hounsfield) -> Tensor:
    """Return linear attenuation at 47 keV, the effective energy of a radiograph at 100 kV behind samarium.

    A voxel is soft tissue, on the line from air to muscle, or marrow with mineral in it, whichever attenuates more; the
    lines cross at 13 HU. As the CT's own energy is higher (70 keV), the line of bone is 1.9 times as steep. Values
    below -1000 HU, as the padding of scanners, are air.

    Parameters
    ----------
    hounsfield : ndarray or Tensor
        At 120 kVp.

    Returns
    -------
    Tensor
        1/mm, same shape, float32 unless float64 is given.
    """
    values = torch.as_tensor(hounsfield)
    values = values if values.dtype == torch.float64 else values.float()
    beam, muscle, marrow = physics.SAMARIUM, physics.lookup("muscle"), physics.lookup("marrow")
    soft_slope = beam.linear_per_cm("muscle")[0] / (muscle.hounsfield + 1000)
    marrow_per_cm = beam.linear_per_cm("marrow")[0]
    mineral_cm2_g = beam.mineral_cm2_g[0] - marrow_per_cm / physics.MINERAL_DENSITY_G_CM3
    bone_slope = mineral_cm2_g / physics.mineral_hounsfield_per_g_cm3()
    soft = soft_slope * (values.clamp(min=-1000) + 1000)
    bone = marrow_per_cm + bone_slope * (values - marrow.hounsfield)
    return torch.maximum(soft, bone) / 10


def line_integrals(mu: Float[Tensor, "r a s"], affine, beam: ConeBeam) -> Float[Tensor, "rows cols"]:
    """Return the integral of `mu` along the ray of each detector pixel.

    Rays run on behind the detector, whose distance only sets the magnification.

    Parameters
    ----------
    mu : Tensor (R, A, S)
        Attenuation, 1/mm; zero outside. With ones in place of `mu` the result is the length inside in mm.
    affine : array-like or Tensor (4, 4)
        Voxel index to RAS mm; any orientation. A tensor that requires a gradient receives that of the pose.
    beam : ConeBeam

    Returns
    -------
    Tensor (rows, cols)
        In the precision and on the device of `mu`.

    Raises
    ------
    InputError
        If `mu` is not a floating-point volume, the source lies inside it, or rays run away from it.
    """
    if not torch.is_tensor(mu) or mu.ndim != 3 or not mu.is_floating_point():
        message = f"attenuation must be a floating-point tensor (R, A, S), given {type(mu).__name__} {np.shape(mu)}."
        raise InputError(message)
    source, ways, lengths = _rays_in_voxels(affine, beam, mu.device)
    axis = _steepest_axis(source.detach(), ways.detach(), mu.shape)
    along, across = ways[..., axis], [i for i in (2, 1, 0) if i != axis]  # last in-plane axis first, for grid_sample
    slope = ways[..., across] / along[..., None]
    slices, start = _crossed(mu.movedim(axis, 0), source[across] - source[axis] * slope, slope)
    return _sum_of_slices(slices, start, slope) * (lengths / along.abs()).to(mu.dtype)


@dataclass(frozen=True)
class Exposure:
    """How a radiograph is taken and shown.

    Attributes
    ----------
    photons_per_mm2 : float
        That reach the detector where nothing is in the way.
    scatter : float
        Scattered over primary photons behind a wide uniform body, per unit of its line integral: about 0.03 with a
        grid and 0.15 without, which behind the mediastinum of a chest CT makes 1 and 6 scattered photons for each
        primary one.
    scatter_mm : float
        Standard deviation of the scatter's spread on the detector.
    latitude : float, optional
        Width of the S-shaped display curve in units of the line integral; its middle lies at the median of the body,
        pixels above a tenth of the largest. None leaves the logarithm.
    """

    photons_per_mm2: float = 5e7
    scatter: float = 0.0
    scatter_mm: float = 60.0
    latitude: float | None = None

    def __post_init__(self):
        positive = (self.photons_per_mm2, self.scatter_mm, 1.0 if self.latitude is None else self.latitude)
        if not min(positive) > 0 or not self.scatter >= 0:
            message = f"an exposure needs photons, scatter_mm, latitude > 0 and scatter >= 0, given {self}."
            raise InputError(message)


def radiograph(
    integrals, rng: np.random.Generator | None = None, exposure: Exposure | None = None, pixel_mm: float = 1.8
) -> Float[np.ndarray, "rows cols"]:
    """Return what a detector shows of line integrals: bone bright, air dark.

    Scatter is the primary image weighted by its own line integral and spread widely (Ohnesorge et al. 1999), so none
    comes from the open beam. Without scatter, noise and display curve the line integrals come back.

    Parameters
    ----------
    integrals : Tensor or ndarray (rows, cols)
        From `line_integrals`.
    rng : numpy.random.Generator, optional
        Draws the number of photons in each pixel; None leaves out the noise.
    exposure : Exposure, optional
    pixel_mm : float
        Detector pitch.

    Returns
    -------
    ndarray (rows, cols), float32
        Logarithm of open over seen photons, or 0 to 1 where a display curve is asked for.
    """
    exposure = exposure or Exposure()
    lengths = np.asarray(integrals.detach().cpu() if torch.is_tensor(integrals) else integrals, float)
    open_beam = exposure.photons_per_mm2 * pixel_mm**2
    seen = primary = open_beam * np.exp(-lengths)
    if exposure.scatter > 0:
        spread = ndimage.gaussian_filter(primary * lengths, exposure.scatter_mm / pixel_mm, mode="nearest")
        seen = primary + exposure.scatter * spread
    if rng is not None:
        seen = np.maximum(rng.poisson(seen), 1)  # a pixel without a photon is as dark as one with a single photon
    image = np.log(open_beam / seen)
    if exposure.latitude is not None:
        body = np.median(image[lengths >= 0.1 * lengths.max()])
        image = 1 / (1 + np.exp((body - image) / exposure.latitude))
    return image.astype(np.float32)


def _rays_in_voxels(affine, beam, device):
    """Source (3,) and ways to the pixels (rows, cols, 3) in voxel indices, and their lengths (rows, cols) in mm."""
    inverse = torch.linalg.inv(torch.as_tensor(affine).to(device, torch.float64))
    source_mm = torch.as_tensor(beam.source_mm, device=device)
    ways_mm = torch.as_tensor(beam.pixels_mm(), device=device) - source_mm
    turn = inverse[:3, :3]
    return turn @ source_mm + inverse[:3, 3], ways_mm @ turn.T, ways_mm.norm(dim=-1)


def _steepest_axis(source, ways, shape):
    """Return the axis that all rays cross most steeply, out of those along which the source lies off the volume."""
    size = torch.tensor(shape, dtype=source.dtype, device=source.device)
    towards = torch.where(source <= -1, ways, torch.where(source >= size, -ways, torch.zeros_like(ways)))
    slowest = towards.amin(dim=(0, 1))
    if not slowest.max() > 0:
        message = (
            "the X-ray source must lie outside the volume and its rays must run towards it: check isocentre and pose."
        )
        raise InputError(message)
    return int(slowest.argmax())


def _crossed(slices, start, slope):
    """Cut slices (K, A, B) to the box that any ray crosses.

    `start` and `slope` (rows, cols, 2) say where rays cross slice 0 and how far they move to the next one. Returns the
    slices and the start within them.
    """
    ends = torch.stack([start, start + slope * (slices.shape[0] - 1)]).detach()
    lower, upper = ends.amin(dim=(0, 1, 2)).floor(), ends.amax(dim=(0, 1, 2)).floor() + 2
    begins = []
    for dim, low, high in zip((2, 1), lower.tolist(), upper.tolist(), strict=True):
        begin = int(np.clip(low, 0, slices.shape[dim] - 1))
        end = int(np.clip(high, begin + 1, slices.shape[dim]))
        slices = slices.narrow(dim, begin, end - begin)
        begins.append(begin)
    return slices, start - torch.tensor(begins, dtype=start.dtype, device=start.device)


def _sum_of_slices(slices, start, slope):
    """Add the bilinear samples of all slices; zero outside."""
    size = torch.tensor(slices.shape[:0:-1], dtype=start.dtype, device=start.device)
    start, slope = ((2 * start + 1) / size - 1).to(slices.dtype), (2 * slope / size).to(slices.dtype)
    at_once = max(1, _SAMPLES_AT_ONCE.get(slices.device.type, 2**18) // start[..., 0].numel())
    depth = torch.arange(slices.shape[0], dtype=slices.dtype, device=slices.device)[:, None, None, None]
    total = 0.0
    for part, where in zip(slices.unsqueeze(1).split(at_once), depth.split(at_once), strict=True):
        places = torch.addcmul(start, slope, where)
        total = total + grid_sample(part, places, padding_mode="zeros", align_corners=False).sum(dim=(0, 1))
    return total
