"""The working grid keeps millimetres, averages honestly, and comes back where it came from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinelib.geometry import Volume, VolumeGrid
from spinelib.models import scan_grid
from spinelib.models.scan_grid import crop, labels_on, normalised, overlap, resampled, sample_separably, working_grid

AFFINE = np.array([[0.8, 0.1, 0, -50], [-0.1, 0.8, 0, 20], [0, 0, 1.25, 7], [0, 0, 0, 1.0]])


def corners(grid):
    ends = np.array(np.meshgrid(*[[-0.5, n - 0.5] for n in grid.shape], indexing="ij")).reshape(3, -1).T
    return ends @ grid.affine[:3, :3].T + grid.affine[:3, 3]


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 90)] * 3), spacing=st.floats(0.5, 5))
def test_working_grid_covers_the_same_box(shape, spacing):
    grid = VolumeGrid(shape, AFFINE)
    assert np.allclose(corners(working_grid(grid, spacing)), corners(grid), atol=1e-6)


def ramp(shape=(60, 50, 40)):
    index = np.indices(shape)
    world = np.einsum("ij,jras->iras", AFFINE[:3, :3], index) + AFFINE[:3, 3][:, None, None, None]
    return Volume((3 * world[0] - world[1] + 2 * world[2]).astype(np.float32), AFFINE)


def test_a_linear_field_stays_what_it_is_in_world_millimetres():
    coarse = resampled(ramp(), 2.0)
    index = np.indices(coarse.values.shape)
    world = np.einsum("ij,jras->iras", coarse.affine[:3, :3], index) + coarse.affine[:3, 3][:, None, None, None]
    inner = (slice(3, -3),) * 3
    assert np.allclose(coarse.values[inner], (3 * world[0] - world[1] + 2 * world[2])[inner], atol=0.3)


def test_larger_voxels_are_means():
    noise = np.random.default_rng(0).normal(0, 100, (80, 80, 80)).astype(np.float32)
    coarse = resampled(Volume(noise, np.diag([0.5, 0.5, 0.5, 1])), 2.0).values
    assert coarse.shape == (20, 20, 20)
    assert coarse.std() < 0.25 * noise.std()
    assert abs(coarse.mean() - noise.mean()) < 1


def test_slabs_change_nothing(monkeypatch):
    whole = resampled(ramp(), 2.0).values
    monkeypatch.setattr(scan_grid, "_SLAB_VOXELS", 7000)
    assert np.array_equal(resampled(ramp(), 2.0).values, whole)


def test_labels_keep_their_places():
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[10:20, 12:30, 4:36] = 20
    volume = Volume(labels, np.diag([1.0, 1.0, 1.0, 1.0]))
    coarse = labels_on(volume, working_grid(volume.grid, 2.0))
    assert np.array_equal(np.argwhere(coarse).min(0), [5, 6, 2])
    assert np.array_equal(np.argwhere(coarse).max(0), [9, 14, 17])


def test_a_voxel_belongs_to_what_fills_most_of_it():
    fine = np.zeros((30, 30, 30), np.uint8)
    fine[9:21, 6:24, 3:27], fine[21:27, 6:24, 3:27] = 7, 8
    volume = Volume(fine, np.eye(4))
    coarse = labels_on(volume, working_grid(volume.grid, 2.5))
    first, second = (np.argwhere(coarse == label) for label in (7, 8))
    assert (first[:, 0].min(), first[:, 0].max()) == (4, 7)  # 10 to 20 mm: voxel 3 is two fifths full
    assert (second[:, 0].min(), second[:, 0].max()) == (8, 10)  # 20 to 27.5 mm
    assert (first[:, 2].min(), first[:, 2].max()) == (1, 10)
    assert np.array_equal(labels_on(volume, volume.grid), fine)


@pytest.mark.parametrize("spacing", [1.5, 2.0])
def test_labels_of_a_tilted_block_come_back_truer_than_those_of_nearest_voxels(spacing):
    index = np.indices((60, 60, 60)).reshape(3, -1).T - 29.5
    turned = index @ Rotation.from_rotvec([0.4, 0.3, 0.2]).as_matrix()
    fine = (np.abs(turned) < [12, 9, 15]).all(1).reshape(60, 60, 60).astype(np.uint8)
    count = working_grid(VolumeGrid(fine.shape, np.eye(4)), spacing).shape[0]
    coarse = labels_on(Volume(fine, np.eye(4)), working_grid(VolumeGrid(fine.shape, np.eye(4)), spacing))
    middles, places = ((np.arange(n) + 0.5) * m / n for n, m in ((count, 60), (60, count)))
    nearest = fine[np.ix_(*[middles.astype(int)] * 3)]
    back = [sample_separably(torch.from_numpy(g).float(), [places - 0.5] * 3) > 0.5 for g in (coarse, nearest)]
    wrong = [int((mask.numpy() != fine).sum()) for mask in back]
    assert wrong[0] < 0.9 * wrong[1], wrong


def test_crop_beyond_the_border_is_filled():
    values = torch.arange(27.0).reshape(3, 3, 3)
    part = crop(values, (-1, 1, 2), 2, -2.0)
    assert part[0].eq(-2).all()
    assert part[1, 0, 0] == values[0, 1, 2]
    assert part[1, 0, 1] == -2
    assert crop(values, (5, 0, 0), 2, 9.0).eq(9).all()
    assert overlap((3, 3, 3), (3, 0, 0), 2) == (None, None)


def test_separable_samples_of_a_linear_field_are_exact():
    r, a, s = torch.meshgrid(*[torch.arange(8.0)] * 3, indexing="ij")
    places = ([0.5, 3.25], [1.0, 6.75, 2.0], [4.4])
    got = sample_separably(2 * r - a + 0.5 * s, places)
    for i, x in enumerate(places[0]):
        for j, y in enumerate(places[1]):
            assert got[i, j, 0] == pytest.approx(2 * x - y + 0.5 * 4.4, abs=1e-5)
    assert sample_separably(torch.ones(4, 4, 4), ([-1.0, 4.0], [1], [1])).eq(0).all()


def test_network_values():
    assert normalised(np.array([-3000.0, -1000, 0, 1000, 5000])).tolist() == [-1, -1, 0, 1, 2]
