"""Vertebrae from votes: piles of votes, touching neighbours, crumbs, and the targets the network learns."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from spinelib.geometry import Volume
from spinelib.imaging.verse import LabelledCT
from spinelib.levels import LEVEL_ORDER
from spinelib.models.scan_cache import WORKING_MM, cache_scan
from spinelib.models.scan_grid import OUTSIDE, normalised
from spinelib.models.vertebra_datasets import VoteDataset
from spinelib.models.vertebra_networks import (
    VOTE_VOXELS,
    DistilledUNet,
    RefinedVotes,
    SurfaceRefiner,
    VoteUNet,
    outline_loss,
)
from spinelib.models.vertebrae import _pasted
from spinelib.models.voting import gather, vote

SHAPE, HEIGHT, COUNT = (64, 64, 96), 16, 5


def stack_of_blocks():
    """Labels 20 to 24, top to bottom, blocks that touch their neighbours, each with a process behind."""
    labels = np.zeros(SHAPE, np.uint8)
    for place in range(COUNT):
        top = 88 - place * HEIGHT
        labels[22:42, 28:48, top - HEIGHT : top] = 20 + place
        labels[30:34, 12:28, top - HEIGHT - 4 : top - HEIGHT + 2] = 20 + place  # overhangs the next one, as they do
    return labels


def perfect_votes(labels, noise=0.0):
    grid = np.indices(labels.shape).astype(np.float32)
    aims = grid.copy()
    rng = np.random.default_rng(0)
    for label in np.unique(labels[labels > 0]):
        mask = labels == label
        aims[:, mask] = np.argwhere(mask).mean(0)[:, None] + noise * rng.standard_normal((3, mask.sum()))
    return torch.from_numpy((labels > 0).astype(np.float32)), torch.from_numpy(aims.astype(np.float32))


def as_labels(outlines, shape):
    out = np.zeros(shape, int)
    for number, outline in enumerate(outlines, start=1):
        places = np.argwhere(outline.probability.numpy() > 0.5) + outline.corner
        assert (out[tuple(places.T)] == 0).all(), "no voxel belongs to two vertebrae"
        out[tuple(places.T)] = number
    return out


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_touching_vertebrae_come_apart(noise):
    labels = stack_of_blocks()
    outlines, flags = gather(*perfect_votes(labels, noise))
    found = as_labels(outlines, SHAPE)
    wanted = np.where(labels > 0, labels.astype(int) - 19, 0)
    assert not flags
    assert len(outlines) == COUNT
    assert (found == wanted)[wanted > 0].mean() > (0.999 if noise == 0 else 0.97)


def test_the_surface_between_voxels_is_where_probability_is_one_half():
    middle, radius = np.array([30.0, 30.0, 40.0]), 9.3
    off = np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - middle, axis=-1)
    probability = torch.from_numpy(1 / (1 + np.exp((off - radius) / 0.4))).float()
    aims = torch.from_numpy(middle).float()[:, None, None, None].expand(3, *SHAPE)
    (outline,), _ = gather(probability, aims)
    fine = Volume(np.zeros([2 * n for n in SHAPE], np.int16), np.diag([WORKING_MM / 2] * 3 + [1.0]))
    found = (_pasted([outline], [20], fine).values == 20).sum() / 8
    assert found == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)


def test_they_come_from_top_to_bottom():
    outlines, _ = gather(*perfect_votes(stack_of_blocks()))
    assert np.all(np.diff([outline.centre[2] for outline in outlines]) < 0)


def test_without_bone_there_is_no_spine():
    nothing = torch.zeros(SHAPE)
    assert gather(nothing, torch.zeros(3, *SHAPE)) == ([], ("no spine found",))


def test_a_crumb_is_no_vertebra():
    labels = np.zeros(SHAPE, np.uint8)
    labels[30:33, 30:33, 40:43] = 20
    assert gather(*perfect_votes(labels))[0] == []


def test_what_lies_beside_the_spine_is_left_out():
    labels = stack_of_blocks()
    labels[2:10, 50:58, 40:52] = 30
    outlines, _ = gather(*perfect_votes(labels))
    assert len(outlines) == COUNT
    assert (as_labels(outlines, SHAPE)[labels == 30] == 0).all()


@pytest.mark.parametrize("top", [False, True])
def test_scattered_votes_beyond_the_last_slice_are_a_cut_vertebra(top):
    """Nearer to the next centre than to a peak of their own, they would spoil the whole vertebra beside it."""
    labels = np.zeros(SHAPE, np.uint8)
    for place in range(COUNT):
        labels[22:42, 28:48, 5 + 10 * place : 15 + 10 * place] = 24 - place
    labels[22:42, 28:48, :5] = 25
    probability, aims = perfect_votes(labels)
    cut = torch.from_numpy(labels == 25)
    scattered = np.random.default_rng(0).uniform(-7, 7, (3, int(cut.sum()))) + [[31.5], [37.5], [-5.0]]
    aims[:, cut] = torch.from_numpy(scattered).float()
    if top:
        probability, aims = probability.flip(2), aims.flip(3)
        aims[2] = SHAPE[2] - 1 - aims[2]
    found = [outline.probability.numpy() > 0.5 for outline in gather(probability, aims)[0]]
    whole = found[1:] if top else found[:-1]
    assert len(found) == COUNT + 1
    assert [int(mask.sum()) for mask in whole] == pytest.approx([20 * 20 * 10] * COUNT, rel=0.005)


def test_a_small_vertebra_close_to_a_large_one_is_found():
    """Their bodies are 8 voxels apart, and the flank of the higher pile is higher than the lower pile's peak."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[20:44, 24:48, 40:46] = 21
    labels[25:40, 32:50, 46:52] = 20
    outlines, _ = gather(*perfect_votes(labels, noise=1.6))
    sizes = [int((outline.probability > 0.5).sum()) for outline in outlines]
    assert sizes == pytest.approx([(labels == 20).sum(), (labels == 21).sum()], rel=0.03)


def test_votes_far_from_every_centre_count_for_none():
    labels = stack_of_blocks()
    probability, aims = perfect_votes(labels)
    stray = torch.zeros(SHAPE, dtype=torch.bool)
    stray[22:26, 28:32, 60:64] = True
    aims[0][stray] += 40
    found = as_labels(gather(probability, aims)[0], SHAPE)
    assert (found[stray.numpy()] == 0).all()
    assert (found > 0).sum() == (labels > 0).sum() - int(stray.sum())


class PerfectVoter(nn.Module):
    """Knows the stack: bone is bright, and the height tells the block."""

    def forward(self, image):
        z = (image - 0.2) * 10
        return torch.cat([z, torch.zeros_like(image), torch.zeros_like(image), image / VOTE_VOXELS], 1)


def test_votes_are_looked_for_around_the_hot_line_only():
    scan = torch.full((200, 64, 64), 0.5)
    heat = torch.zeros(100, 32, 32)
    heat[10, 16, 16] = 1
    probability, aims = vote(PerfectVoter(), SurfaceRefiner(), scan, heat)
    looked = np.flatnonzero(probability.numpy().any((1, 2)))
    assert looked.min() == 0
    assert looked.max() == 2 * 11 + 48 - 1
    assert torch.allclose(aims[2, 30], torch.arange(64.0) + 0.5, atol=1e-4)
    assert not vote(PerfectVoter(), SurfaceRefiner(), scan, torch.zeros_like(heat))[0].any()


def test_no_bone_outside_the_field_of_view():
    scan = torch.full((64, 64, 64), 0.5)
    scan[:, :, 40:] = OUTSIDE
    probability, _ = vote(PerfectVoter(), SurfaceRefiner(), scan, torch.ones(32, 32, 32))
    assert not probability[:, :, 40:].any()
    assert (probability[:, :, :40] > 0.5).all()


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    labels = stack_of_blocks()
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    centroids = {n: 2.0 * np.array(ndimage.center_of_mass(labels == n)) for n in range(20, 25)}
    ct = Volume(np.where(labels > 0, 500.0, 20.0).astype(np.float32), affine)
    whole = LabelledCT("stack", ct, Volume(labels, affine), centroids, frozenset())
    return cache_scan(whole, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("augment", [False, True])
def test_targets_point_at_the_centres_however_the_patch_was_moved(scan, augment):
    errors = []
    for item in (VoteDataset([scan], 12, seed=3, augment=augment)[i] for i in range(12)):
        for label in np.unique(item["labels"][item["labels"] > 0]):
            mask = item["labels"].numpy() == label
            places = np.argwhere(mask)
            if places.min() > 0 and places.max() < 63:  # whole in the patch, so its centre is known
                errors.append(np.linalg.norm(places.mean(0) - item["bodies"][label].numpy()))
    assert len(errors) > 5
    assert np.median(errors) < 0.7
    assert scan.levels == tuple(label for label in LEVEL_ORDER if 20 <= label <= 24)


def test_items_are_the_same_every_time(scan):
    first, again = (VoteDataset([scan], 4, seed=1)[2] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_loss_is_small_for_the_truth_and_larger_for_every_kind_of_error(scan):
    item = VoteDataset([scan], 1, augment=False)[0]
    batch = {name: value[None] for name, value in item.items()}
    own = item["labels"] > 0
    grid = torch.stack(torch.meshgrid(*[torch.arange(64.0)] * 3, indexing="ij"))
    ways = (item["bodies"][item["labels"].long()].movedim(-1, 0) - grid) / VOTE_VOXELS

    class Fixed(VoteUNet):
        def forward(self, image):
            return torch.cat([self.logit, self.ways])[None]

    net = Fixed((8, 16))
    net.logit, net.ways = (own.float() * 40 - 20)[None], ways
    best = float(net.loss(batch))
    assert best < 1e-3
    net.ways = ways + 0.1  # one voxel off along three axes
    assert float(net.loss(batch)) == pytest.approx(best + 0.3, abs=1e-3)
    net.ways, net.logit = ways, -net.logit
    assert float(net.loss(batch)) > 1


def test_patches_of_any_multiple_of_sixteen_go_through():
    net = VoteUNet((8, 16))
    assert net(torch.zeros(1, 1, 16, 32, 48)).shape == (1, 4, 16, 32, 48)
    assert torch.isfinite(net(normalised(torch.randn(1, 1, 16, 16, 16) * 500))).all()


def test_a_student_pays_for_the_truth_and_for_the_distance_from_its_teacher(scan):
    torch.manual_seed(0)
    item = VoteDataset([scan], 1, augment=False)[0]
    batch = {name: value[None] for name, value in item.items()}
    teacher, student = VoteUNet((8, 16)), VoteUNet((8, 16))
    alike, other = DistilledUNet(teacher, teacher), DistilledUNet(student, teacher)
    own = torch.sigmoid(teacher(batch["image"])[:, :1] / 2)
    doubt = -(own * own.log() + (1 - own) * (1 - own).log()).mean()
    expected = 0.5 * teacher.loss(batch) + 0.5 * 5 * 4 * doubt
    assert alike.loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert not any(name.startswith("_teacher") for name in other.state_dict())
    other.loss(batch).backward()
    assert all(p.grad is None for p in other._teacher[0].parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_an_untrained_refiner_leaves_the_logit_alone_and_learns_beside_a_voter_that_stays(scan):
    torch.manual_seed(0)
    item = VoteDataset([scan], 1, augment=False)[0]
    batch = {name: value[None] for name, value in item.items()}
    voter, refiner = VoteUNet((8, 16)), SurfaceRefiner(4)
    logit = voter(batch["image"])[:, :1].detach()
    assert torch.equal(refiner(batch["image"], logit), logit)
    school = RefinedVotes(refiner, voter)
    expected = outline_loss(logit, (item["labels"] > 0)[None, None].float())
    assert school.loss(batch).item() == pytest.approx(expected.item())
    assert not any(name.startswith("_voter") for name in school.state_dict())
    optimiser, losses = torch.optim.Adam(school.parameters(), 0.02), []
    for _ in range(12):
        losses.append(school.loss(batch))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in school._voter[0].parameters())


@pytest.mark.parametrize(("moved", "kept"), [(0.0, True), (1.0, False)])
def test_parts_that_are_not_moved_keep_every_voxel_of_a_vertebra(scan, moved, kept):
    whole = np.bincount(stack_of_blocks().ravel())
    parts = VoteDataset([scan], 8, seed=5, moved=moved)
    found = [np.bincount(parts[i]["labels"].ravel(), minlength=25)[20:25] for i in range(8)]
    assert (np.array(found) == whole[20:25]).any() == kept
