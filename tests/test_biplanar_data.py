"""Items of the biplanar dataset: geometry, annotations, mirroring, normalisation, folds."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn_pairs import drawn_ct
from torch.utils.data import DataLoader

from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import CUBE, CUBE_MM, PATCH, VIEWS, make_pair
from spinelib.models.biplanar_data import (
    ANNOTATIONS,
    BiplanarDataset,
    _clutter,
    cross_validation,
    disc,
    next_bodies,
    normalised,
)

MIDDLE = np.array([31.5, 39.5, 31.5, 1.0])  # voxel index of the body centre, 12 mm before the cube's middle


@pytest.fixture(scope="module")
def pair():
    return make_pair(drawn_ct())


def seen(item, view, index):
    """Project voxel indices (n, 4) into a patch, (n, 2)."""
    rows = np.asarray(index, float) @ item[f"cube_to_{view}"].double().numpy().T
    return rows[:, :2] / rows[:, 2:]


def voxels(item):
    index = np.argwhere(item["target"][0].numpy() > 0)
    return np.column_stack([index, np.ones(len(index))])


def share_in_shadow(item, view):
    places = np.rint(seen(item, view, voxels(item))).astype(int)
    places = places[((places >= 0) & (places < PATCH)).all(axis=1)]
    return item[view][1].numpy()[tuple(places.T)].mean()


def is_mirrored(item):
    return float(item["cube_to_lateral"][2, 0]) > 0  # the source lies on the left


def test_item_of_the_contract(pair):
    item = BiplanarDataset([pair])[1]
    assert {key: (tuple(v.shape), v.dtype) for key, v in item.items()} == {
        "target": ((1, CUBE, CUBE, CUBE), torch.uint8),
        "level": ((), torch.int64),
        "frontal": ((2, PATCH, PATCH), torch.float32),
        "lateral": ((2, PATCH, PATCH), torch.float32),
        "cube_to_frontal": ((3, 4), torch.float32),
        "cube_to_lateral": ((3, 4), torch.float32),
    }
    assert item["level"] == 13  # L2 is the 14th of T1 to L5


@pytest.mark.parametrize("settings", [{}, {"crop_mm": 8.0}, {"click_mm": 4.0}])
@pytest.mark.parametrize("augment", [False, True])
def test_target_is_projected_into_its_annotation(pair, augment, settings):
    mirrored = set()
    data = BiplanarDataset([pair], "v2v", augment, **settings)
    for epoch in range(6):
        data.set_epoch(epoch)
        item = data[epoch % 2]
        assert item["target"].sum() > 5000
        assert [share_in_shadow(item, view) for view in VIEWS] == [1, 1]
        mirrored.add(is_mirrored(item))
    assert mirrored == {False, augment}


def test_mirrored_item_is_another_view_of_the_same_numbers(pair):
    """Put the right-sided process left, and the projections still fit the image."""
    plain = BiplanarDataset([pair], "v2v")[0]
    data = BiplanarDataset([pair], "v2v", True, click_mm=0.0)
    turned = next(item for item in map(lambda e: (data.set_epoch(e), data[0])[1], range(20)) if is_mirrored(item))
    assert torch.equal(turned["target"], plain["target"].flip(1))
    assert torch.equal(turned["frontal"][1], plain["frontal"][1].flip(1))
    assert torch.equal(turned["lateral"][1], plain["lateral"][1])
    assert not torch.equal(turned["target"], plain["target"])


def test_frames_are_mirrored_with_the_vertebra(pair):
    frame = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    data = BiplanarDataset([replace(pair, frames=np.stack([frame, frame]))], augment=True)
    for epoch in range(6):
        data.set_epoch(epoch)
        sign = np.diag([-1.0 if is_mirrored(data[0]) else 1.0, 1, 1])
        assert np.allclose(data[0]["frame"].numpy(), sign @ frame @ sign, atol=1e-6)


@pytest.mark.parametrize("crop_mm", [0.0, 3.0])
def test_disc_lies_at_the_body_centre_wherever_the_cut_is(pair, crop_mm):
    item = BiplanarDataset([pair], "c2v", click_mm=0.0, crop_mm=crop_mm, seed=2)[0]
    plain = BiplanarDataset([pair], "c2v")[0]
    moved = np.rint(voxels(item).mean(0) - voxels(plain).mean(0))
    assert (np.abs(moved).max() > 0) == (crop_mm > 0)
    for view in VIEWS:
        image = item[view][1].numpy()
        centre = np.argwhere(image > 0).T @ image[image > 0] / image.sum()
        assert np.allclose(centre, seen(item, view, [MIDDLE + moved])[0], atol=0.1)


def test_a_wrong_click_moves_patch_and_disc_together(pair):
    item = BiplanarDataset([pair], "c2v", click_mm=6.0, seed=3)[0]
    body = voxels(item).mean(0) - voxels(BiplanarDataset([pair])[0]).mean(0) + MIDDLE
    for view in VIEWS:
        image = item[view][1].numpy()
        centre = np.argwhere(image > 0).T @ image[image > 0] / image.sum()
        assert np.allclose(centre, (PATCH - 1) / 2, atol=1.1)
    assert np.abs(body - MIDDLE).max() * CUBE_MM > 2


def test_annotations_differ(pair):
    inked = {a: BiplanarDataset([pair], a)[0]["lateral"][1].sum().item() for a in ANNOTATIONS}
    assert inked["none"] == 0 < inked["c2v"] < inked["n2v"] < 8 < inked["b2v"] < inked["v2v"]


@pytest.mark.parametrize("number", [0, 1])
def test_the_next_body_centres_are_marked_half_as_bright(pair, number):
    item = BiplanarDataset([pair], "n2v")[number]
    away = (pair.bodies_mm[1 - number] - pair.bodies_mm[number]) / CUBE_MM
    for view in VIEWS:
        image = item[view][1].numpy()
        own, other = (seen(item, view, [MIDDLE + [*shift, 0]])[0] for shift in (np.zeros(3), away))
        fainter = np.where(np.hypot(*(np.indices(image.shape) - other[:, None, None])) < 4, image, 0)
        assert image.max() > 0.9 and 0.4 < fainter.max() <= 0.5
        assert np.allclose(np.argwhere(fainter).T @ fainter[fainter > 0] / fainter.sum(), other, atol=0.1)
        assert np.allclose(np.unravel_index(image.argmax(), image.shape), own, atol=0.6)


def test_next_bodies_of_a_list():
    bodies = np.arange(9.0).reshape(3, 3)
    assert [next_bodies(bodies, i)[:, 0].tolist() for i in range(3)] == [[3], [0, 6], [3]]
    assert next_bodies(bodies[:1], 0).shape == (0, 3)


def test_next_marks_are_clicks_too_and_some_are_missing(pair):
    data = BiplanarDataset([pair], "n2v", augment=True, click_mm=0.0)
    plain = BiplanarDataset([pair], "c2v")[0]["lateral"][1].sum()
    inked = []
    for epoch in range(40):
        data.set_epoch(epoch)
        inked.append(float(data[0]["lateral"][1].sum() / plain))
    alone = np.isclose(inked, 1)
    assert 0 < alone.mean() < 0.4 and np.allclose(np.array(inked)[~alone], 1.5, atol=0.15)
    exact, noisy = (BiplanarDataset([pair], "n2v", click_mm=mm, seed=3) for mm in (0.0, 5.0))
    apart = [np.diff(peaks(each[0]["lateral"][1].numpy()), axis=0) for each in (exact, noisy)]
    assert np.abs(apart[0] - apart[1]).max() > 1


def peaks(image):
    """Return the places of the bright disc and of the faint one."""
    faint = np.where(image <= 0.5, image, 0)
    return np.array([np.unravel_index(image.argmax(), image.shape), np.unravel_index(faint.argmax(), image.shape)])


def test_items_depend_on_seed_epoch_and_index_alone(pair):
    one, two, other = (BiplanarDataset([pair], "c2v", True, seed) for seed in (5, 5, 6))
    assert all(torch.equal(one[1][k], two[1][k]) for k in one[1])
    assert not torch.equal(one[1]["frontal"], other[1]["frontal"])
    two.set_epoch(1)
    assert not torch.equal(one[1]["frontal"], two[1]["frontal"])


@pytest.mark.parametrize(("clutter", "least"), [(0.0, 0.2), (1.0, 0.0)])
def test_augmented_images_stay_images_of_the_same_patient(pair, clutter, least):
    data = BiplanarDataset([pair], "none", True, click_mm=0.0, clutter=clutter)
    plain = BiplanarDataset([pair], "none")[0]["lateral"][0].reshape(-1)
    alike = []
    for epoch in range(20):
        data.set_epoch(epoch)
        image = data[0]["lateral"][0].reshape(-1)
        assert torch.isfinite(image).all() and image.abs().max() < 30
        alike.append(torch.corrcoef(torch.stack([plain, image]))[0, 1].item())
    assert np.median(alike) > 0.7 and min(alike) > least and max(alike) < 0.999


def test_clutter_changes_the_image_and_not_the_vertebra(pair):
    usual, without, some = (
        BiplanarDataset([pair], "c2v", True, **share)[0] for share in ({}, {"clutter": 0}, {"clutter": 1})
    )
    assert torch.equal(usual["frontal"], without["frontal"])
    assert not torch.equal(usual["frontal"], some["frontal"])
    assert usual["target"].sum() == some["target"].sum() > 0


def test_clutter_differs_and_is_of_the_size_of_lungs_and_vessels():
    drawn = np.stack([_clutter(np.random.default_rng(seed)) for seed in range(300)])
    assert drawn.shape == (300, PATCH, PATCH)
    deepest = np.abs(drawn).max((1, 2))
    assert 0.3 < np.median(deepest) < 2 and np.quantile(deepest, 0.99) < 15
    assert abs(drawn.mean()) < 0.2, "as often brighter as darker"


def test_normalised_over_what_was_exposed():
    values = np.random.default_rng(0).normal(5, 2, (PATCH, PATCH)).clip(1)
    values[:20] = 0
    out = normalised(values.astype(np.float32))
    assert (out[:20] == 0).all()
    assert abs(out[20:].mean()) < 1e-4 and out[20:].std() == pytest.approx(1, abs=1e-4)
    assert np.array_equal(normalised(np.zeros((PATCH, PATCH))), np.zeros((PATCH, PATCH)))
    assert np.isfinite(normalised(np.full((PATCH, PATCH), 3.0))).all()


@pytest.mark.parametrize("centre", [(31.5, 31.5), (10.0, 50.0), (20.3, 40.8)])
def test_disc(centre):
    image = disc(centre)
    places = np.argwhere(image > 0)
    assert np.hypot(*(places - centre).T).max() < 1.5
    assert np.allclose(places.T @ image[image > 0] / image.sum(), centre, atol=0.06)


def test_batches(pair):
    (batch,) = DataLoader(BiplanarDataset([pair], augment=True), 2)
    assert batch["target"].shape == (2, 1, CUBE, CUBE, CUBE)
    assert batch["level"].tolist() == [12, 13]


def test_folds_part_people(pair):
    people = [replace(pair, key=f"person-{i}") for i in range(90)]
    tested = []
    for fold in range(3):
        train, validation, test = ([p.key for p in part] for part in cross_validation(people, fold))
        assert sorted(train + validation + test) == sorted(p.key for p in people)
        assert 20 <= len(test) <= 40 and 4 <= len(validation) <= 20
        tested += test
    assert sorted(tested) == sorted(p.key for p in people)
    fewer = cross_validation(people[:60], 1)[2]
    assert {p.key for p in fewer} <= {p.key for p in cross_validation(people, 1)[2]}


def test_bad_input(pair):
    with pytest.raises(InputError, match="unknown annotation 'dot'"):
        BiplanarDataset([pair], "dot")
    with pytest.raises(InputError, match="clutter is 70. Expected a share from 0 to 1"):
        BiplanarDataset([pair], augment=True, clutter=70)
    with pytest.raises(InputError, match="render_biplanar_cohort"):
        BiplanarDataset([])
    with pytest.raises(InputError, match="fold 0 of 3"):
        cross_validation([pair], 0)
