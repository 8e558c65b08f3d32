"""TransVert: axes, loss, the separation of generator and discriminator, reading a cube of indices."""

import pytest
import torch
from drawn_ellipsoids import BEHIND, TO_FRONTAL, TO_LATERAL, Ellipsoids, random_batch, trained
from torch import nn

from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import CUBE, LABELS
from spinelib.models import transvert
from spinelib.models.lifting import lift
from spinelib.models.transvert import FUSIONS, MergingAttention, PatchDiscriminator, TransVert


class Fixed(TransVert):
    """A TransVert that always answers the cubes it is given."""

    def __init__(self, cubes):
        nn.Module.__init__(self)
        self.cubes, self.discriminator = cubes, None

    def forward(self, batch):
        return self.cubes


@pytest.fixture(scope="module")
def adversarial():
    torch.manual_seed(0)
    return TransVert(attention=True, adversarial=True).train()


def gradients(network, loss):
    network.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_cube_and_a_level_of_each_vertebra(fusion):
    batch = random_batch()
    network = TransVert(fusion).eval()
    share, level = network.predict(batch)
    assert share.shape == (1, CUBE, CUBE, CUBE)
    assert 0 <= share.min() <= share.max() <= 1
    assert level.shape == (1,) and 0 <= level.item() < len(LABELS)
    other = network(batch | {"frontal": batch["frontal"].flip(3)})
    assert torch.equal(other, network(batch)) == (fusion == "sagittal")
    assert not torch.equal(network(batch | {"lateral": batch["lateral"].flip(3)}), network(batch))


def test_the_annotation_is_read():
    batch = random_batch()
    network = TransVert(attention=True).eval()
    bare = batch["lateral"] * torch.tensor([1.0, 0.0])[:, None, None]
    assert not torch.allclose(network(batch), network(batch | {"lateral": bare}))


def test_rows_and_columns_stand_for_axes_of_the_cube():
    """For parallel rays, turning and moving a patch is lifting it."""
    patch = torch.arange(1.0, CUBE * CUBE + 1).reshape(1, 1, CUBE, CUBE)
    frontal, lateral = (lift(patch, matrix[None], CUBE)[0, 0] for matrix in (TO_FRONTAL, TO_LATERAL))
    upright = transvert._upright(patch)[0, 0]
    assert torch.allclose(frontal, upright[:, None].expand_as(frontal), rtol=1e-4)
    behind = torch.nn.functional.pad(upright, (0, 0, BEHIND, -BEHIND))
    assert torch.allclose(lateral, behind[None].expand_as(lateral), rtol=1e-4)
    assert transvert._BEHIND == BEHIND == 8


def test_attention_starts_as_nothing_and_then_mixes_far_places():
    torch.manual_seed(0)
    layer = MergingAttention()
    image = torch.randn(1, 2, CUBE, CUBE)
    assert torch.equal(layer(image), layer.merge(image))
    nn.init.ones_(layer.weight)
    moved = image.clone()
    moved[:, :, 50:, 50:] += 3
    assert not torch.allclose(layer(image)[..., :8, :8], layer(moved)[..., :8, :8], atol=1e-4)


def test_the_loss_is_the_mean_distance_over_sixteen():
    batch = random_batch(2)
    right = batch["target"][:, 0].float() * (batch["level"] + 8)[:, None, None, None]
    assert Fixed(right).eval().loss(batch) == 0
    assert Fixed(right + 4).eval().loss(batch) == pytest.approx(0.25)
    assert Fixed(torch.zeros_like(right)).eval().loss(batch) == pytest.approx(float(right.mean() / 16), rel=1e-5)


def test_in_training_small_distances_are_squared():
    batch = random_batch(2)
    right = batch["target"][:, 0].float() * (batch["level"] + 8)[:, None, None, None]
    assert Fixed(right).loss(batch) == 0
    assert Fixed(right + 4).loss(batch) == pytest.approx(4**2 / (2 * 8) / 16)
    assert Fixed(right - 20).loss(batch) == pytest.approx((20 - 8 / 2) / 16)


def test_generator_and_discriminator_do_not_mix(adversarial):
    """The gradients of the one sum are those of the two losses, each with the other network held."""
    batch = random_batch()
    joint = gradients(adversarial, adversarial.loss(batch))
    cube, truth, judge = adversarial(batch), transvert._numbered(batch), adversarial.discriminator
    generator = 10 * nn.functional.smooth_l1_loss(cube, truth, beta=8.0) + 0.1 * (judge(cube) - 1).square().mean()
    own = gradients(adversarial, generator / 160)
    told = ((judge(truth) - 1).square().mean() + judge(cube.detach()).square().mean()) / 160
    other = gradients(adversarial, told)
    assert set(other) == {f"discriminator.{name}" for name, _ in judge.named_parameters()}
    for name, gradient in joint.items():
        expected = other[name] if name in other else own[name]
        assert torch.allclose(gradient, expected, atol=1e-6 + 1e-3 * float(expected.abs().max())), name
    judged = [name for name in other if not torch.allclose(own[name], other[name], rtol=0.1)]
    assert judged, "the test could not tell the two apart"


def test_evaluation_judges_the_cube_alone(adversarial):
    batch = random_batch()
    adversarial.eval()
    with torch.no_grad():
        expected = (adversarial(batch) - transvert._numbered(batch)).abs().mean() / 16
        assert adversarial.loss(batch) == pytest.approx(float(expected), rel=1e-5)
    adversarial.train()
    assert adversarial.loss(batch) > expected


def test_discriminator_scores_parts():
    assert PatchDiscriminator()(torch.rand(2, CUBE, CUBE, CUBE)).shape == (2, 1, 8, 8, 8)


@pytest.mark.parametrize("level", [0, 5, 16])
def test_a_cube_of_indices_is_read_at_half_its_own_value(level):
    (item,) = Ellipsoids(1).batches(1)
    solid = item["target"][:, 0].float()
    blurred = nn.functional.avg_pool3d(solid, 3, 1, 1) * (level + 8)
    share, found = Fixed(blurred + 0.3 * torch.randn(blurred.shape)).predict(item)
    assert found.tolist() == [level]
    wrong = ((share[0] > 0.5) != (solid[0] > 0.5)).float().mean()
    assert wrong < 0.01


def test_an_empty_cube_has_no_mask():
    share, level = Fixed(torch.zeros(1, CUBE, CUBE, CUBE)).predict({})
    assert share.max() == 0
    assert level.tolist() == [0]


@pytest.mark.parametrize("words", [{"fusion": "outer"}, {"attention": True, "adversarial": True}])
def test_losses_fall(words):
    torch.manual_seed(0)
    losses = trained(TransVert(**words), Ellipsoids(1).batches(1), 10, 2e-3)
    assert losses[-1] < 0.8 * losses[0]


def test_unknown_fusion():
    with pytest.raises(InputError, match="unknown fusion 'sum'. Expected one of: 'anisotropic', 'outer', 'sagittal'"):
        TransVert("sum")
