"""Spin-echo contrast: the signal equation, the order of tissues, slices and noise."""

import numpy as np
import pytest

from spinelib.errors import InputError
from spinelib.imaging.mr_contrast import (
    RELAXATION,
    Relaxation,
    SpinEcho,
    rician_noise,
    sample_sequence,
    sample_signals,
    slice_average,
    spin_echo_signal,
)


def test_limits_of_the_signal_equation():
    tissue = Relaxation(0.8, 1000.0, 50.0)
    assert spin_echo_signal(tissue, SpinEcho(1e6, 0.0)) == pytest.approx(0.8)
    assert spin_echo_signal(tissue, SpinEcho(0.0, 0.0)) == 0.0
    assert spin_echo_signal(tissue, SpinEcho(1e6, 50.0)) == pytest.approx(0.8 / np.e)
    assert spin_echo_signal(tissue, SpinEcho(1000.0, 0.0)) == pytest.approx(0.8 * (1 - 1 / np.e))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("contrast", "order"),
    [
        ("t1", ("fat", "marrow_water", "csf")),
        ("t1", ("cord", "csf")),
        ("t1", ("fat", "muscle", "annulus")),
        ("t2", ("csf", "fat", "muscle", "annulus")),
        ("t2", ("csf", "cord")),
        ("t2", ("nucleus", "annulus")),
    ],
)
def test_bright_and_dark_tissues(contrast, order, seed):
    rng = np.random.default_rng(seed)
    signals = sample_signals(sample_sequence(contrast, rng), rng)
    assert set(signals) == set(RELAXATION)
    values = [signals[name] for name in order]
    assert all(a > b for a, b in zip(values, values[1:], strict=False)), signals


def test_unknown_contrast():
    with pytest.raises(InputError, match="unknown contrast 'flair'. Expected one of: 't1', 't2'"):
        sample_sequence("flair", np.random.default_rng(0))


def test_slices_average_their_sheets():
    values = np.arange(6.0)[:, None, None] + np.zeros((6, 2, 3))
    assert np.array_equal(slice_average(values, 3)[:, 0, 0], [1.0, 4.0])
    assert np.array_equal(slice_average(values, 1), values)


def test_noise_is_rician():
    rng = np.random.default_rng(0)
    nothing = rician_noise(np.zeros(100_000, np.float32), 2.0, rng)
    assert nothing.mean() == pytest.approx(2 * np.sqrt(np.pi / 2), rel=0.01)  # Rayleigh
    strong = rician_noise(np.full(100_000, 100.0, np.float32), 2.0, rng)
    assert strong.mean() == pytest.approx(100.02, abs=0.03) and strong.std() == pytest.approx(2.0, rel=0.01)
    assert np.array_equal(rician_noise(np.ones(3, np.float32), 0.0, rng), np.ones(3))
