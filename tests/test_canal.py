"""The spinal canal from labels: a ring's hole, straight between rings, nothing without a closed arch."""

import numpy as np

from spinelib.geometry import Volume
from spinelib.imaging.canal import spinal_canal

UPPER, LOWER = 20, 21
SPACING = np.array([1.0, 1.0, 2.0])


def ring(values, label, centre, levels, inner=8.0, outer=12.0, gap=False):
    rows, columns = np.indices(values.shape[:2])
    off = np.hypot(rows - centre[0], columns - centre[1])
    wall = (off >= inner) & (off < outer) & ~(gap & (columns < centre[1]) & (np.abs(rows - centre[0]) < 3))
    values[:, :, levels] = np.where(wall[..., None], label, values[:, :, levels])


def labels_of(*rings):
    values = np.zeros((60, 60, 40), np.uint8)
    for arguments, options in rings:
        ring(values, *arguments, **options)
    return Volume(values, np.diag([*SPACING, 1.0]))


def test_a_ring_holds_its_hole():
    labels = labels_of(((UPPER, (30, 25), slice(10, 16)), {}))
    canal = spinal_canal(labels)
    assert canal.any(axis=(0, 1)).nonzero()[0].tolist() == list(range(10, 16))
    np.testing.assert_allclose(np.argwhere(canal[:, :, 12]).mean(axis=0), [30, 25], atol=0.1)
    assert abs(canal[:, :, 12].sum() / (np.pi * 8**2) - 1) < 0.05


def test_the_canal_runs_straight_from_ring_to_ring():
    labels = labels_of(((UPPER, (30, 25), slice(30, 36)), {}), ((LOWER, (34, 31), slice(4, 10)), {}))
    canal = spinal_canal(labels)
    middle = np.argwhere(canal[:, :, 20]).mean(axis=0)  # halfway between 32.5 and 6.5, as near as slices are
    np.testing.assert_allclose(middle, [32, 28], atol=0.3)
    assert canal.any(axis=(0, 1)).nonzero()[0].tolist() == list(range(4, 36))


def test_without_a_closed_arch_there_is_no_canal():
    assert not spinal_canal(labels_of(((UPPER, (30, 25), slice(10, 16)), {"gap": True}))).any()
    assert not spinal_canal(labels_of(((UPPER, (30, 25), slice(10, 16)), {"inner": 3.0}))).any()  # a hole for a vessel
    assert not spinal_canal(labels_of()).any()
