"""Smooth random displacement fields that make every vertebra differ from the template and left from right."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_WAVES = 4


class Warp(NamedTuple):
    """Displacement sum_j amplitude_j sin(frequency_j . point + phase_j).

    Attributes
    ----------
    frequencies : (J, 3) rad/mm
    phases : (J,) rad
    amplitudes : (3, J) mm
    """

    frequencies: np.ndarray
    phases: np.ndarray
    amplitudes: np.ndarray


def random_warp(rng: np.random.Generator, size_mm: float) -> Warp:
    """Draw a warp for a body of `size_mm`: wavelengths of 1.3-2.6 body sizes, 0.5-0.9 mm root mean square."""
    headings = rng.standard_normal((_WAVES, 3))
    headings /= np.linalg.norm(headings, axis=1, keepdims=True)
    frequencies = headings * (2 * np.pi / (size_mm * rng.uniform(1.3, 2.6, (_WAVES, 1))))
    rms_mm = 0.75 * np.sqrt(np.clip(size_mm / 38, 0.4, 1.3))
    amplitudes = np.clip(rng.standard_normal((3, _WAVES)), -2, 2) * (rms_mm / np.sqrt(_WAVES))
    return Warp(frequencies, rng.uniform(0, 2 * np.pi, _WAVES), amplitudes)


def warp_points(warp: Warp, points: Tensor) -> Tensor:
    """Return displaced points; `points` and result are (3, N) mm."""
    frequencies, phases, amplitudes = (
        torch.as_tensor(a, dtype=points.dtype, device=points.device)
        for a in (warp.frequencies, warp.phases[:, None], warp.amplitudes)
    )
    return torch.addmm(points, amplitudes, torch.addmm(phases, frequencies, points).sin_())
