"""Spin-echo MR of the spine, T1 and T2 weighted: signal of tissues, thick slices, coil, noise.

Signals are relative; 1 is a fully relaxed proton-dense tissue without decay.
"""

from dataclasses import dataclass

import numpy as np

from spinelib.errors import InputError


@dataclass(frozen=True)
class Relaxation:
    """Proton density (relative to water) and relaxation times at 1.5 T, ms."""

    proton_density: float
    t1_ms: float
    t2_ms: float


RELAXATION = {
    "lung": Relaxation(0.15, 1200, 35),
    "fat": Relaxation(0.90, 290, 105),
    "muscle": Relaxation(0.95, 950, 40),
    "organ": Relaxation(0.90, 700, 52),
    "blood": Relaxation(0.12, 1400, 150),
    "annulus": Relaxation(0.50, 1000, 32),
    "nucleus": Relaxation(0.90, 1300, 105),
    "marrow_water": Relaxation(0.85, 800, 48),
    "marrow_fat": Relaxation(0.90, 290, 90),
    "cord": Relaxation(0.75, 760, 76),
    "csf": Relaxation(1.00, 4000, 1200),
}
"""Means at 1.5 T, of the size of published ones (Stanisz 2005, Magn Reson Med 54:507: muscle, liver, kidney, blood,
cord; de Bazelaire 2004, Radiology 230:652: vertebral marrow, fat), from memory; nucleus and annulus are assumed. T2 of
fat is that of trains of echoes, longer than of a single one. The proton density of blood stands for the loss by flow.
What is not in the table, cortical bone and gas, has no signal."""

CONTRAST_RANGES = {"t1": ((450.0, 700.0), (9.0, 15.0)), "t2": ((2800.0, 4500.0), (85.0, 115.0))}
"""Repetition and (effective) echo times of clinical spine protocols, ms: least and largest (assumed)."""

_SPREAD = 0.10


@dataclass(frozen=True)
class SpinEcho:
    """Repetition time and echo time of a spin echo, ms."""

    tr_ms: float
    te_ms: float


def sample_sequence(contrast: str, rng: np.random.Generator) -> SpinEcho:
    """Draw the times of a T1- or T2-weighted protocol.

    Raises
    ------
    InputError
        If the contrast is neither 't1' nor 't2'.
    """
    if contrast not in CONTRAST_RANGES:
        message = f"unknown contrast {contrast!r}. Expected one of: {', '.join(map(repr, CONTRAST_RANGES))}."
        raise InputError(message)
    return SpinEcho(*(float(rng.uniform(*limits)) for limits in CONTRAST_RANGES[contrast]))


def spin_echo_signal(tissue: Relaxation, sequence: SpinEcho) -> float:
    """Return PD (1 - exp(-TR / T1)) exp(-TE / T2), the spin echo for TE much shorter than TR."""
    recovered = 1 - np.exp(-sequence.tr_ms / tissue.t1_ms)
    return float(tissue.proton_density * recovered * np.exp(-sequence.te_ms / tissue.t2_ms))


def sample_signals(sequence: SpinEcho, rng: np.random.Generator) -> dict[str, float]:
    """Return the signal of every tissue of `RELAXATION` in one patient; T1 and T2 vary by 10 % (assumed)."""
    signals = {}
    for name, mean in RELAXATION.items():
        t1, t2 = np.exp(_SPREAD * np.clip(rng.standard_normal(2), -2.5, 2.5)) * [mean.t1_ms, mean.t2_ms]
        signals[name] = spin_echo_signal(Relaxation(mean.proton_density, t1, t2), sequence)
    return signals


def slice_average(values: np.ndarray, samples: int) -> np.ndarray:
    """Return the mean of each `samples` neighbours along the right axis: from thin sheets to thick slices.

    Parameters
    ----------
    values : ndarray (R * samples, A, S)
    samples : int

    Returns
    -------
    ndarray (R, A, S)
    """
    return values.reshape(-1, samples, *values.shape[1:]).mean(axis=1)


def rician_noise(signal: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Return the magnitude of a signal with Gaussian noise of SD `sigma` in its real and its imaginary part.

    Source: Gudbjartsson and Patz 1995, Magn Reson Med 34:910.
    """
    real = signal + sigma * rng.standard_normal(signal.shape, dtype=np.float32)
    return np.hypot(real, sigma * rng.standard_normal(signal.shape, dtype=np.float32))
