"""Parts for training, the way down the spine, and the file of weights."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.verse import LabelledCT
from spinelib.levels import LEVEL_ORDER
from spinelib.models import traversal, vertebrae
from spinelib.models.scan_cache import cache_scan, pooled
from spinelib.models.scan_grid import OUTSIDE
from spinelib.models.traversal import spine_heat, traverse
from spinelib.models.vertebra_datasets import LevelDataset, OutlineDataset, SpineDataset
from spinelib.models.vertebra_networks import (
    LevelNet,
    SpineFinder,
    SurfaceRefiner,
    VertebraUNet,
    VoteUNet,
    outline_loss,
)
from spinelib.models.vertebrae import VertebraSegmenter

LEVELS = (18, 19, 28, 20, 21)  # T11, T12, T13, L1, L2
HEIGHT, GAP = 10, 5  # working voxels


def column(cut_top=False):
    """Blocks of bone in water, one per level, from the top; the CT of a very simple person."""
    shape = (80, 80, 100)
    labels = np.zeros(shape, np.uint8)
    for place, label in enumerate(LEVELS):
        top = 98 - place * (HEIGHT + GAP) + (6 if cut_top else 0)
        labels[32:48, 32:50, max(top - HEIGHT, 0) : min(top, 100)] = label
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    centroids = {label: ndimage.center_of_mass(labels == label) * np.full(3, 2.0) for label in LEVELS}
    ct = np.where(labels > 0, 500.0, 20.0).astype(np.float32)
    cut = frozenset(LEVELS[:1] if cut_top else ())
    return LabelledCT("blocks", Volume(ct, affine), Volume(labels, affine), centroids, cut)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    return cache_scan(column(), tmp_path_factory.mktemp("cache"))


class MiddleBlock(nn.Module):
    """Answers as a perfect network would: the block of bone in the middle of the patch that the memory lacks."""

    calls = 0

    def forward(self, image):
        MiddleBlock.calls += 1
        out = torch.full_like(image[:, :1], -9.0)
        middle = (image.shape[-1] - 1) / 2
        for item, answer in zip(image, out, strict=True):
            pieces, _ = ndimage.label(((item[0] > 0.3) & (item[1] < 0.5)).numpy())
            places = np.argwhere(pieces)
            apart = np.linalg.norm(places - middle, axis=1)
            if len(places) and apart.min() < 5:
                nearest = pieces[tuple(places[apart.argmin()])]
                answer[0][torch.from_numpy(pieces == nearest)] = 9.0
        return out


def perfect_heat(scan):
    heat = np.zeros([(n + 1) // 2 for n in scan.ct.values.shape], np.float32)
    at = np.indices(heat.shape) * 2 + 0.5
    for centre in scan.centroids_mm.values():
        apart = sum((axis - c / 2) ** 2 for axis, c in zip(at, centre, strict=True)) * 4
        heat = np.maximum(heat, np.exp(-apart / (2 * 12.0**2)))
    return torch.from_numpy(heat.astype(np.float32))


def test_cache_keeps_the_scan_and_its_tables(scan):
    assert scan.levels == LEVELS
    assert scan.shape == (80, 80, 100)
    assert scan.box("ct", [slice(40, 41), slice(40, 41), slice(33, 34)]).item() == 500
    assert scan.small["profile"][28].sum() == 16 * 18 * HEIGHT
    assert np.allclose(scan.small["centres"][20], column().centroids_mm[20] / 2)
    assert np.allclose(scan.small["bodies"][20], scan.small["centres"][20])
    assert pooled([scan], 2)[0].shape == (40, 40, 50)


def test_cache_refuses_a_scan_without_vertebrae(tmp_path):
    empty = column()
    empty.labels.values[:] = 26
    with pytest.raises(InputError, match="holds no vertebra"):
        cache_scan(empty, tmp_path)


@pytest.mark.parametrize("kind", [OutlineDataset, LevelDataset, SpineDataset])
def test_items_depend_on_seed_epoch_and_index_alone(scan, kind):
    more = {} if kind is OutlineDataset else {"coarse": pooled([scan], 2)}
    first, again = kind([scan], 4, 1, **more), kind([scan], 4, 1, **more)
    for name, value in first[2].items():
        assert torch.equal(value, again[2][name])
    again.set_epoch(1)
    assert not torch.equal(first[2]["image"], again[2]["image"])
    assert not torch.equal(first[2]["image"], first[3]["image"])


def test_an_outline_item_asks_for_the_block_in_the_middle(scan):
    items = [OutlineDataset([scan], 60, 0)[i] for i in range(60)]
    seen, empty = 0, 0
    for item in items:
        image, target = item["image"], item["target"][0].bool()
        assert image.shape == (2, 64, 64, 64)
        assert image[0].min() >= OUTSIDE
        assert not (target & (image[0] == OUTSIDE)).any()
        empty += not target.any()
        if target.any():
            centre = torch.nonzero(target).float().mean(0)
            assert (centre - 31.5).norm() < 16
            assert (target & (image[1] > 0.5)).float().sum() < 0.3 * target.sum()  # memory may be roughened
            seen += 1
    assert seen > 40
    assert 3 <= empty < 20


def test_unmoved_parts_are_cut_out_as_they_are(scan):
    item = OutlineDataset([scan], 1, 0, augment=False)[0]
    assert item["target"].sum() in (16 * 18 * HEIGHT, 0)
    assert item["image"][0].max() == pytest.approx(0.5, abs=1e-4)
    assert item["image"][0][item["image"][0] > OUTSIDE].min() >= 0.0199
    item = LevelDataset([scan], 1, 0, augment=False, coarse=pooled([scan], 2))[0]
    assert item["complete"] == 1
    assert item["image"][1].sum() * 8 == pytest.approx(16 * 18 * HEIGHT, rel=0.1)
    assert LEVEL_ORDER[item["level"]] in LEVELS


def test_a_cut_vertebra_is_never_complete(tmp_path):
    cut = cache_scan(column(cut_top=True), tmp_path)
    items = [LevelDataset([cut], 60, 3, coarse=pooled([cut], 2))[i] for i in range(60)]
    top = [float(i["complete"]) for i in items if LEVEL_ORDER[i["level"]] == LEVELS[0]]
    rest = [float(i["complete"]) for i in items if LEVEL_ORDER[i["level"]] != LEVELS[0]]
    assert top
    assert max(top) == 0
    assert max(rest) == 1


def test_heat_targets_peak_at_the_bodies(scan):
    item = SpineDataset([scan], 1, 0, augment=False, coarse=pooled([scan], 2))[0]
    assert item["heat"].max() <= 1
    bone = item["image"] > 0.4
    assert item["heat"].max() > 0.9
    assert item["heat"][bone].mean() > 5 * item["heat"][~bone].mean()


def test_the_way_down_finds_every_block_once_and_ends():
    scan = column()
    values = torch.from_numpy(scan.ct.values) / 1000
    found, flags = traverse(MiddleBlock(), values, perfect_heat(scan))
    assert flags == ()
    assert len(found) == len(LEVELS)
    for outline, label in zip(found, LEVELS, strict=True):
        assert np.allclose(outline.centre, scan.centroids_mm[label] / 2, atol=0.01)


def test_a_hole_in_the_heat_map_does_not_end_the_search():
    scan = column()
    del scan.centroids_mm[28]
    found, _ = traverse(MiddleBlock(), torch.from_numpy(scan.ct.values) / 1000, perfect_heat(scan))
    assert len(found) >= len(LEVELS) - 1
    heights = [outline.centre[2] for outline in found]
    assert heights == sorted(heights, reverse=True)


def test_a_fragment_between_vertebrae_is_left_out():
    scan = column()
    values = torch.from_numpy(scan.ct.values) / 1000
    values[36:44, 36:46, 85:87] = 0.5  # in the first gap, touching nothing
    found, _ = traverse(MiddleBlock(), values, perfect_heat(scan))
    assert [round(outline.centre[2]) for outline in found] == [round(z / 2) for _, _, z in scan.centroids_mm.values()]


def test_bone_beside_the_line_of_bodies_is_no_vertebra():
    scan = column()
    values = torch.from_numpy(scan.ct.values) / 1000
    values[60:76, 32:50, 20:90] = 0.5  # a plate, 24 mm to the right of the column
    found, _ = traverse(MiddleBlock(), values, perfect_heat(scan))
    assert len(found) == len(LEVELS)
    assert max(outline.centre[0] for outline in found) < 45


def test_a_network_that_answers_everywhere_is_stopped():
    class Everywhere(nn.Module):
        calls = 0

        def forward(self, image):
            Everywhere.calls += 1
            out = torch.full_like(image[:, :1], -9.0)
            out[:, :, 20:40, 20:40, 20 + Everywhere.calls % 7 : 30] = 9.0
            return out

    found, _ = traverse(Everywhere(), torch.zeros(80, 80, 400), torch.ones(40, 40, 200))
    assert len(found) <= traversal.MOST_VERTEBRAE
    assert Everywhere.calls <= 4 * 100


def test_no_spine_is_said():
    assert traverse(MiddleBlock(), torch.zeros(80, 80, 100), torch.zeros(40, 40, 50)) == ([], ("no spine found",))


def test_pasted_vertebrae_fill_their_places_and_never_overlap():
    scan = column()
    found, _ = traverse(MiddleBlock(), torch.from_numpy(scan.ct.values) / 1000, perfect_heat(scan))
    pasted = vertebrae._pasted(found, np.array(LEVELS), scan.ct)
    assert np.array_equal(pasted.values, scan.labels.values)
    fine = Volume(np.zeros((160, 160, 250), np.int16), np.diag([1, 1, 0.8, 1.0]))
    counts = np.bincount(vertebrae._pasted(found, np.array(LEVELS), fine).values.ravel(), minlength=29)
    for label in LEVELS:
        assert counts[label] * 0.8 == pytest.approx(16 * 18 * HEIGHT * 8, rel=0.05)


def test_heat_map_has_the_size_of_the_scan():
    heat = spine_heat(SpineFinder().eval(), torch.zeros(50, 61, 90))
    assert heat.shape == (25, 31, 45)
    assert 0 <= heat.min() <= heat.max() <= 1


def test_loss_of_outlines():
    target = torch.zeros(2, 1, 8, 8, 8)
    target[0, :, 2:6, 2:6, 2:6] = 1
    right, wrong = (target * 2 - 1) * 20, (1 - target * 2) * 20
    assert outline_loss(right, target) < 1e-3
    assert outline_loss(wrong, target) > 1
    half = outline_loss(torch.zeros_like(target), target)
    assert outline_loss(right, target) < half < outline_loss(wrong, target)


@pytest.fixture(scope="module")
def segmenter():
    torch.manual_seed(0)
    return VertebraSegmenter(
        SpineFinder(), VoteUNet(), SurfaceRefiner(), VertebraUNet(), LevelNet(), {"what": "untrained"}
    )


def test_weights_come_back_as_they_were(segmenter, tmp_path):
    segmenter.save(tmp_path / "w.safetensors")
    again = VertebraSegmenter.load(tmp_path / "w.safetensors")
    assert again.card == segmenter.card
    for name in ("finder", "voter", "refiner", "outliner", "namer"):
        for a, b in zip(getattr(segmenter, name).parameters(), getattr(again, name).parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-3)


def test_bad_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match="spinelib train vertebrae"):
        VertebraSegmenter.load(tmp_path / "none.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable"):
        VertebraSegmenter.load(tmp_path / "w.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={"format": "other"})
    with pytest.raises(InputError, match="expected 'spinelib-vertebrae-3'"):
        VertebraSegmenter.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("one_by_one", [False, True])
def test_an_untrained_network_gives_a_valid_answer(segmenter, one_by_one):
    ct = column().ct
    result = segmenter.segment(ct, one_by_one)
    assert result.labels.values.shape == ct.values.shape
    assert result.labels.values.dtype == np.uint8
    assert set(np.unique(result.labels.values)) <= {0, *LEVEL_ORDER}


def test_cut_ends_are_counted_on_from_the_named_vertebrae():
    outlines = [traversal.Outline(np.zeros(3, int), torch.zeros(1), np.array([0, 0, -15.0 * i])) for i in range(6)]
    levels = np.full((6, 26), -9.0)
    for row, label in enumerate((19, 20, 21, 22, 23, 24), start=0):
        levels[row, LEVEL_ORDER.index(label)] = -0.01
    complete = np.array([False, True, True, True, True, False])
    labels, sure, _ = vertebrae._named(outlines, levels, complete)
    assert labels.tolist() == [19, 20, 21, 22, 23, 24]
    assert (sure > 0.5).all()
    labels, _, _ = vertebrae._named(outlines[1:], np.roll(levels, -1, 0)[:5], np.array([1, 1, 1, 1, 1], bool))
    assert labels.tolist() == [20, 21, 22, 23, 24]
    sacrum = np.vstack([levels[1:], levels[5:]])
    labels, _, _ = vertebrae._named(outlines, sacrum, np.array([1, 1, 1, 1, 1, 0], bool))
    assert labels.tolist() == [20, 21, 22, 23, 24, 0]
