"""Rigid search by correlation: image features, Fourier scoring of all shifts, continuous refinement.

The engine under `spinelib.align`. Positions are millimetres throughout; see `spinelib.geometry` for frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.fft import next_fast_len
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import grid_sample

from spinelib.geometry import PlanarGrid, PlanarTransform, Projection

MIN_OVERLAP = 0.5
"""Least share of the smaller image that a shift must keep in view to be scored."""

NEIGHBOURHOOD_DEG, NEIGHBOURHOOD_MM = 4.5, 20.0
"""A better-than-this distance from the winner is its own peak; farther off stands a rival."""

END_MM = 20.0
"""How much of each end of a mask is left out of the comparison."""

_MM_PER_DEGREE = 4.0  # a degree moves a point 230 mm from the centre by this: one unit for both in the climb
_REACH_OF_CLIMB_MM = 12.0


@dataclass(frozen=True)
class Level:
    """One step of a coarse-to-fine search: pixel, smoothing, angle step, half range of angle and of shift."""

    spacing_mm: float
    sigma_mm: float
    step_deg: float
    reach_deg: float
    reach_mm: float


@dataclass(frozen=True)
class Field:
    """Features on a pixel grid, with validity 0..1; `spin` = turns of the feature per turn of the image."""

    values: Float[Tensor, "channels rows cols"]
    valid: Float[Tensor, "rows cols"]
    grid: PlanarGrid
    spin: int


@dataclass(frozen=True)
class Scan:
    """Scores of a search: axes and array (angles, superior shifts, right shifts)."""

    angles_deg: np.ndarray
    superior_mm: np.ndarray
    right_mm: np.ndarray
    scores: np.ndarray

    def best(self, start: PlanarTransform) -> PlanarTransform:
        """Return the winner, about the centre of `start`."""
        a, s, r = self._peak()
        shifts = {"shift_right_mm": float(self.right_mm[r]), "shift_superior_mm": float(self.superior_mm[s])}
        return replace(start, rotation_deg=float(self.angles_deg[a]), **shifts)

    def margin(self) -> float:
        """Best score minus that of the best rival outside the neighbourhood; NaN if nothing lies outside."""
        a, s, r = self._peak()
        near = (
            (np.abs(self.angles_deg - self.angles_deg[a]) <= NEIGHBOURHOOD_DEG)[:, None, None]
            & (np.abs(self.superior_mm - self.superior_mm[s]) <= NEIGHBOURHOOD_MM)[None, :, None]
            & (np.abs(self.right_mm - self.right_mm[r]) <= NEIGHBOURHOOD_MM)[None, None, :]
        )
        return float(self.scores.max() - self.scores[~near].max()) if not near.all() else np.nan

    def _peak(self):
        return np.unravel_index(int(self.scores.argmax()), self.scores.shape)


def edge_field(image: Projection, sigma_mm: float) -> Field:
    """Return the orientation field of the edges, summed over channels; blind to the sign of contrast.

    The gradient g = g_right + i g_superior of a channel becomes g^2 / (|g|^2 + mean |g|^2). Squaring doubles
    the angle, so a bright and a dark edge agree and crossing edges cancel; the divisor keeps the skin,
    whose steps are far higher than those of the spine, from deciding alone.
    """
    pitch = np.array(image.grid.spacing_mm)
    total = np.zeros(image.grid.shape, complex)
    for channel in image.values:
        down = gaussian_filter(channel, sigma_mm / pitch, order=(1, 0), mode="nearest") / pitch[0]
        across = gaussian_filter(channel, sigma_mm / pitch, order=(0, 1), mode="nearest") / pitch[1]
        # Rows and columns both run against the world axes; the common sign drops out on squaring.
        squared = (across + 1j * down) ** 2
        energy = np.abs(squared)
        total += squared / (energy + energy.mean() + np.finfo(np.float32).tiny)
    values = torch.from_numpy(np.stack([total.real, total.imag]).astype(np.float32))
    return Field(values, _inside(image.grid, sigma_mm), image.grid, spin=2)


def mask_field(mask: Projection, sigma_mm: float) -> Field:
    """Return the first channel of a mask, above 0.5, softened; not valid within END_MM of its two ends."""
    solid = mask.values[0] > 0.5
    soft = gaussian_filter(solid.astype(np.float32), sigma_mm / np.array(mask.grid.spacing_mm))
    rows = np.flatnonzero(solid.any(axis=1))
    valid = torch.zeros(mask.grid.shape)
    if rows.size:
        end = min(int(round(END_MM / mask.grid.spacing_mm[0])), rows.size // 4)
        valid[rows[0] + end : rows[-1] + 1 - end] = 1.0
    return Field(torch.from_numpy(soft)[None], valid, mask.grid, spin=0)


def masked_ncc(
    fixed: Float[Tensor, "channels rows cols"],
    fixed_valid: Float[Tensor, "rows cols"],
    moving: Float[Tensor, "batch channels rows2 cols2"],
    moving_valid: Float[Tensor, "batch rows2 cols2"],
    row_lags: range,
    col_lags: range,
    min_overlap: float = MIN_OVERLAP,
) -> Float[Tensor, "batch row_lags col_lags"]:
    """Masked normalised cross-correlation at a window of integer shifts, all at once in the Fourier domain.

    Padfield 2012 (IEEE TIP 21:2706), numerator and energies summed over channels. Transforms are real and
    padded just enough that no lag of the window wraps round.

    Parameters
    ----------
    row_lags, col_lags : range
        Lag s compares moving pixel p with fixed pixel p + s.
    min_overlap : float
        Lags that keep less than this share of the smaller valid area in view score -1.
    """
    size = [_padded(fixed.shape[a], moving.shape[a], lags) for a, lags in ((-2, row_lags), (-1, col_lags))]
    rows, cols = (torch.tensor(lags) % n for lags, n in zip((row_lags, col_lags), size, strict=True))

    def forward(image):
        return torch.fft.rfft2(image, s=size)

    def window(spectrum):
        return torch.fft.irfft2(spectrum, s=size)[..., rows, :][..., cols]

    f_weighted, m_weighted = fixed * fixed_valid, moving * moving_valid[:, None]
    f, f_area, ff = forward(f_weighted), forward(fixed_valid), forward((fixed * f_weighted).sum(0))
    m, m_area = forward(m_weighted).conj(), forward(moving_valid).conj()
    mm = forward((moving * m_weighted).sum(1)).conj()
    overlap = window(f_area * m_area).clamp(min=1e-3)
    f_sums, m_sums = window(f * m_area[:, None]), window(f_area * m)
    product = window((f * m).sum(1)) - (f_sums * m_sums).sum(1) / overlap
    f_energy = window(ff * m_area) - (f_sums**2).sum(1) / overlap
    m_energy = window(f_area * mm) - (m_sums**2).sum(1) / overlap
    scores = product / (f_energy.clamp(min=1e-6) * m_energy.clamp(min=1e-6)).sqrt()
    possible = min(float(fixed_valid.sum()), float(moving_valid.sum(dim=(1, 2)).max()))
    return torch.where(overlap >= min_overlap * possible, scores, -1.0)


def scan(fixed: Field, moving: Field, around: PlanarTransform, level: Level) -> Scan:
    """Score every shift of every angle of `level` about the motion `around`."""
    angles = search_angles(around, level)
    prepared = search_arrays(fixed, moving, around, level)
    scores = masked_ncc(*prepared[:6])
    superior, right = prepared[6:]
    return Scan(angles, superior, right, scores.numpy())


def search_angles(around: PlanarTransform, level: Level) -> np.ndarray:
    """Return the angles of a scan, degrees, symmetric about that of `around`."""
    steps = int(np.ceil(level.reach_deg / level.step_deg - 1e-9))
    return around.rotation_deg + level.step_deg * np.arange(-steps, steps + 1)


def search_arrays(fixed: Field, moving: Field, around: PlanarTransform, level: Level):
    """Return the six arguments of `masked_ncc`, then superior and right shifts in mm of its two lag axes."""
    angles, pitch = search_angles(around, level), level.spacing_mm
    fixed_grid = lattice(fixed.grid, pitch)
    moving_grid = lattice(moving.grid, pitch, float(np.abs(angles).max()))
    offset = np.subtract(fixed_grid.origin_mm, moving_grid.origin_mm)
    middle = np.round((offset - [around.shift_superior_mm, around.shift_right_mm]) / pitch).astype(int)
    reach = int(np.ceil(level.reach_mm / pitch))
    lags = [range(m - reach, m + reach + 1) for m in middle]
    turns = [replace(around, rotation_deg=a, shift_right_mm=0.0, shift_superior_mm=0.0) for a in angles]
    turned = [sample(moving, moving_grid, turn) for turn in turns]
    moved, moved_valid = (torch.stack(arrays) for arrays in zip(*turned, strict=True))
    shifts = [o - pitch * np.array(lag) for o, lag in zip(offset, lags, strict=True)]
    return *sample(fixed, fixed_grid, PlanarTransform()), moved, moved_valid, *lags, *shifts


def climb(fixed: Field, moving: Field, start: PlanarTransform, pitch_mm: float):
    """Refine all three parameters to the nearest maximum of the score; returns (transform, score).

    L-BFGS on the exact gradient of the masked correlation, at most 12 mm from the start.
    """
    grid = lattice(fixed.grid, pitch_mm)
    values, valid = sample(fixed, grid, PlanarTransform())
    points = _points(grid)
    unit = np.array([1 / _MM_PER_DEGREE, 1.0, 1.0])
    origin = np.array([start.rotation_deg, start.shift_right_mm, start.shift_superior_mm])
    centre = (start.centre_right_mm, start.centre_superior_mm)

    def loss(step):
        motion = torch.tensor(origin + unit * step, dtype=torch.float32, requires_grad=True)
        moved, moved_valid = _carried(moving, points, motion, centre)
        value = -_ncc(values, moved, valid * moved_valid)
        value.backward()
        return float(value.detach()), motion.grad.double().numpy() * unit

    bounds = [(-_REACH_OF_CLIMB_MM, _REACH_OF_CLIMB_MM)] * 3
    result = minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30})
    return PlanarTransform(*(origin + unit * result.x).tolist(), *centre), -float(result.fun)


def sample(field: Field, grid: PlanarGrid, transform: PlanarTransform):
    """Return values (channels, rows, cols) and validity (rows, cols) of a carried field on another grid."""
    motion = torch.tensor([transform.rotation_deg, transform.shift_right_mm, transform.shift_superior_mm])
    centre = (transform.centre_right_mm, transform.centre_superior_mm)
    return _carried(field, _points(grid), motion.float(), centre)


def lattice(grid: PlanarGrid, pitch_mm: float, turn_deg: float = 0.0) -> PlanarGrid:
    """Return a square-pixel grid about the middle of `grid` that holds it after turns of up to `turn_deg`."""
    extent = np.array(grid.shape) * grid.spacing_mm
    extent = extent + np.sin(np.radians(turn_deg)) * extent[::-1]
    shape = tuple(int(n) for n in np.ceil(extent / pitch_mm))
    return PlanarGrid.centred(grid.view, shape, (pitch_mm, pitch_mm), grid.centre_mm)


def _carried(field: Field, points, motion: Float[Tensor, "3"], centre: Sequence[float]):
    """Field moved by (rotation_deg, shift_right_mm, shift_superior_mm), at points (right, superior)."""
    angle = torch.deg2rad(motion[0])
    right, superior = points[0] - motion[1] - centre[0], points[1] - motion[2] - centre[1]
    source_right = torch.cos(angle) * right - torch.sin(angle) * superior + centre[0]
    source_superior = torch.sin(angle) * right + torch.cos(angle) * superior + centre[1]
    half = [(n - 1) * p / 2 for n, p in zip(field.grid.shape, field.grid.spacing_mm, strict=True)]
    middle = field.grid.centre_mm
    where = torch.stack([(middle[1] - source_right) / half[1], (middle[0] - source_superior) / half[0]], -1)
    stack = torch.cat([field.values, field.valid[None]])[None]
    sampled = grid_sample(stack, where[None], align_corners=True)[0]
    # Validity is a weight, not a feature: its gradient would reward sliding out of view.
    return _spun(sampled[:-1], field.spin * angle), sampled[-1].detach()


def _spun(values, turn):
    if len(values) == 1:
        return values
    real, imaginary = values
    cosine, sine = torch.cos(turn), torch.sin(turn)
    return torch.stack([cosine * real + sine * imaginary, cosine * imaginary - sine * real])


def _ncc(a, b, weights):
    area = weights.sum().clamp(min=1e-3)
    a = a - (a * weights).sum(dim=(1, 2), keepdim=True) / area
    b = b - (b * weights).sum(dim=(1, 2), keepdim=True) / area
    energy = (a * a * weights).sum() * (b * b * weights).sum()
    return (a * b * weights).sum() / energy.clamp(min=1e-12).sqrt()


def _points(grid: PlanarGrid):
    right, superior = np.meshgrid(grid.lateral_mm(), grid.superior_mm())
    return torch.from_numpy(right).float(), torch.from_numpy(superior).float()


def _inside(grid: PlanarGrid, margin_mm: float):
    """1 where a filter of that reach sees only pixels of the image."""
    rows, cols = (int(np.ceil(margin_mm / p)) for p in grid.spacing_mm)
    valid = np.zeros(grid.shape, np.float32)
    valid[rows : grid.shape[0] - rows, cols : grid.shape[1] - cols] = 1.0
    return torch.from_numpy(valid)


def _padded(fixed: int, moving: int, lags: range) -> int:
    return next_fast_len(max(lags[-1] + moving, fixed - lags[0], fixed, moving), real=True)
