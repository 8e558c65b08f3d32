"""Working pairs, their cache, crops and augmentation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_registration import LABELS, drawn_pair
from nibabel.affines import apply_affine
from safetensors.torch import save_file
from scipy.stats import skew

from spinelib.deformation import grid_points_mm
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.models.ctmr_data import (
    JITTER_DEG,
    JITTER_MM,
    MARGIN_MM,
    WORKING_MM,
    PairDataset,
    cache_pair,
    load_pair,
    working_pair,
)
from spinelib.models.rigidity import procrustes

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return [cache_pair(drawn_pair(seed=seed), folder / f"{seed}.safetensors") for seed in range(3)]


def test_working_grid_holds_what_both_have_seen():
    pair = drawn_pair()
    tensors, grid = working_pair(pair)
    assert np.allclose(grid.affine[:3, :3], WORKING_MM * np.eye(3))
    assert all(n % 16 == 0 for n in grid.shape)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        **dict.fromkeys(("ct", "mr", "valid", "ct_valid"), (1, *grid.shape)),
        "labels": grid.shape,
    }
    points = grid_points_mm(grid)
    bone = apply_affine(pair.ct.affine, np.argwhere(pair.ct_labels.values > 0))
    low, high = points.min((0, 1, 2)) - WORKING_MM / 2, points.max((0, 1, 2)) + WORKING_MM / 2
    assert (low <= np.maximum(bone.min(0) - MARGIN_MM, 0)).all()
    assert (high >= np.minimum(bone.max(0) + MARGIN_MM, [46.5, 47, 58.5])).all()
    inside = ((points > -0.7) & (points < np.array([47.2, 47.2, 59.2]))).all(-1)
    assert np.array_equal(tensors["ct_valid"][0].numpy() > 0, inside)


def test_values_are_normalised():
    tensors, grid = working_pair(drawn_pair())
    inside = tensors["labels"] == LABELS[0]
    assert tensors["ct"][0][inside].mean() == pytest.approx(1600 / 3000, abs=0.02)
    assert tensors["ct"][tensors["ct_valid"] == 0].max() == 0
    assert tensors["mr"][tensors["valid"] == 0].max() == 0
    assert (tensors["mr"].min(), tensors["mr"].max()) == (0, 1)
    world = grid_points_mm(grid)[inside.numpy()]
    np.testing.assert_allclose(world[:, 2].mean(), 42, atol=1.5)


def test_worlds_are_kept():
    """Another affine for the same anatomy gives the same working pair."""
    pair = drawn_pair()
    flipped = pair.ct.affine @ np.array([[-1, 0, 0, 31], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    other = replace(
        pair, ct=Volume(pair.ct.values[::-1], flipped), ct_labels=Volume(pair.ct_labels.values[::-1], flipped)
    )
    for (name, value), again in zip(working_pair(pair)[0].items(), working_pair(other)[0].values(), strict=True):
        torch.testing.assert_close(value, again, msg=name)


def test_only_what_the_mr_covers():
    pair = drawn_pair()
    upper = pair.mr.values[:, :, 30:]
    affine = pair.mr.affine.copy()
    affine[2, 3] = 30
    _, grid = working_pair(replace(pair, mr=Volume(upper, affine), mr_labels=None))
    assert grid_points_mm(grid)[..., 2].min() > 12
    affine[2, 3] = 300
    with pytest.raises(InputError, match="no labelled vertebra lies inside the MR"):
        working_pair(replace(pair, mr=Volume(upper, affine), mr_labels=None))


def test_cache_comes_back(cached, tmp_path):
    tensors, grid = working_pair(drawn_pair(seed=0))
    again, same = load_pair(cached[0])
    assert same.shape == grid.shape
    np.testing.assert_allclose(same.affine, grid.affine)
    for name, value in tensors.items():
        torch.testing.assert_close(again[name], value, atol=5e-4, rtol=0, msg=name)
    with pytest.raises(InputError, match="cannot be read"):
        load_pair(tmp_path / "none.safetensors")
    save_file({"labels": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="expected the format"):
        load_pair(tmp_path / "other.safetensors")


def test_items_without_augmentation_are_the_pair(cached):
    tensors, grid = load_pair(cached[0])
    item = PairDataset(cached, grid.shape)[0]
    for name, value in tensors.items():
        torch.testing.assert_close(item[name], value, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(16, 16, 16), (64, 48, 80)])
def test_crops(cached, shape):
    for augment in (False, True):
        item = PairDataset(cached, shape, augment)[1]
        assert item["ct"].shape == item["valid"].shape == (1, *shape)
        assert item["labels"].shape == shape
        assert item["labels"].any()
        assert set(item["labels"].unique().tolist()) <= {0, *LABELS}


def test_items_depend_on_seed_epoch_and_index_alone(cached):
    first, second = (PairDataset(cached, (32, 32, 32), True, seed=4, parts=8) for _ in range(2))
    assert len(first) == 8
    second.set_epoch(3)
    assert not torch.equal(first[5]["ct"], second[5]["ct"])
    first.set_epoch(3)
    for name, value in first[5].items():
        assert torch.equal(value, second[5][name]), name
    assert not torch.equal(first[5]["ct"], first[2]["ct"])  # the same pair, cut and turned differently


def test_jitter_is_rigid_and_small(cached):
    """Where labels lie tells the motion: box centres stay rigid and move by a few mm."""
    from spinelib.models.ctmr_data import _jittered

    points = torch.stack(torch.meshgrid(*[torch.arange(9.0)] * 3, indexing="ij"))
    for seed in range(5):
        moved = _jittered(points, np.random.default_rng(seed))
        x, y = points.flatten(1).T.double(), moved.flatten(1).T.double()
        rotation, shift = procrustes(x, y)
        torch.testing.assert_close(x @ rotation.T + shift, y, atol=1e-5, rtol=0)
        angle = np.degrees(np.arccos((np.trace(rotation.numpy()) - 1) / 2))
        assert 0 < angle < JITTER_DEG * np.sqrt(3)
        assert (y.mean(0) - x.mean(0)).abs().max() * WORKING_MM <= JITTER_MM


def test_mirroring_takes_everything_along(cached):
    """Left and right change in about half of the items, in images and labels alike."""
    _, grid = load_pair(cached[0])
    plain, mirrored = PairDataset(cached[:1], grid.shape)[0], []
    data = PairDataset(cached[:1], grid.shape, True, parts=12)
    for index in range(12):
        item = data[index]
        rows = torch.stack([item["mr"].flatten(), plain["mr"].flatten(), plain["mr"].flip(-3).flatten()])
        mirrored.append(bool(torch.corrcoef(rows)[0].argsort()[1] == 2))
        assert (_leaning(item["labels"]) * _leaning(plain["labels"]) < 0) == mirrored[-1]
        bone = item["labels"] > 0
        assert (item["ct"][0][bone] > 0.4).float().mean() > 0.8
    assert 2 <= sum(mirrored) <= 10


def _leaning(labels):
    """Skewness of the vertebrae along the first axis: whatever their position, it changes sign in a mirror."""
    return float(skew(labels.nonzero()[:, 0].numpy()))


@pytest.mark.parametrize(("count", "shape"), [(0, (16, 16, 16)), (1, (16, 24, 16)), (1, (0, 16, 16))])
def test_bad_data_sets(cached, count, shape):
    with pytest.raises(InputError, match="multiples of 16"):
        PairDataset(cached[:count], shape)
