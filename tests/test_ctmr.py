"""The registration network, its integration of velocities, its loss and its weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spinelib.errors import InputError
from spinelib.models.ctmr import (
    RIGIDITY_TERMS,
    VARIANTS,
    CTMRModel,
    RegistrationNet,
    diffusion,
    held_variants,
    index_grid,
    integrate,
    load_variant,
    read_card,
    save_variants,
    warp,
    warped_labels,
)

torch.set_num_threads(1)

HALF = (10, 12, 8)


def smooth(seed, shape=HALF, size=1.0):
    coarse = torch.randn(1, 3, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return size * torch.nn.functional.interpolate(coarse, shape, mode="trilinear", align_corners=True)


def batch(seed=0, shape=(16, 32, 16)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(1, *shape, dtype=torch.uint8)
    labels[:, 4:12, 8:24, 4:12] = 21
    images = torch.rand(2, 1, 1, *shape, generator=generator)
    valid = torch.ones(1, 1, *shape)
    return {"ct": images[0], "mr": images[1], "labels": labels, "valid": valid, "ct_valid": valid.clone()}


def test_network_has_the_published_size():
    net = RegistrationNet()
    assert sum(p.numel() for p in net.parameters()) == 1_000_163
    item = batch()
    velocity = net(item["ct"], item["mr"])
    assert velocity.shape == (1, 3, 8, 16, 8)
    assert 0 < velocity.abs().max() < 1e-3  # starts at the identity


@pytest.mark.parametrize("shapes", [[(16, 16, 20)] * 2, [(16, 16, 16), (16, 32, 16)]])
def test_network_refuses_other_sizes(shapes):
    with pytest.raises(InputError, match="multiples of 16"):
        RegistrationNet()(*(torch.zeros(1, 1, *shape) for shape in shapes))


# --- integration ---


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("rate", [0.1, -0.3])
def test_linear_velocity_grows_exponentially(axis, rate):
    """v = a x leads to u = (e^a - 1) x, in voxels of the full grid about the same point of the world."""
    shape = [8, 8, 8]
    shape[axis] = 24
    velocity = torch.zeros(1, 3, *shape)
    velocity[:, axis] = rate * (index_grid(shape)[axis] - 11.5)
    for u, sign in zip(integrate(velocity), (1, -1), strict=True):
        points = index_grid(u.shape[2:])[axis] - 23.5
        expected = (np.exp(sign * rate) - 1) * points
        inner = points.abs() < 12
        torch.testing.assert_close(u[0, axis][inner], expected[inner], rtol=2e-3, atol=1e-5)
        assert not u[0, [other for other in range(3) if other != axis]].any()


def test_constant_velocity_stays_constant_to_the_border():
    shift = torch.tensor([1.5, -2.0, 0.7])[None, :, None, None, None]
    forward, backward = integrate(shift.expand(1, 3, *HALF))
    torch.testing.assert_close(forward, (2 * shift).expand(1, 3, 20, 24, 16))
    torch.testing.assert_close(backward, -forward)


def test_directions_are_inverses():
    forward, backward = integrate(smooth(1, (16, 16, 16), 0.7))
    back_again = forward + warp(backward, forward)
    inner = back_again[..., 4:-4, 4:-4, 4:-4]
    assert forward.abs().mean() > 0.5
    assert inner.abs().max() < 0.1
    assert inner.abs().mean() < 0.01


def test_displacements_do_not_fold():
    (forward, _) = integrate(smooth(2, size=2.0))
    steps = [forward.movedim(1, -1).diff(dim=axis + 1)[:, :19, :23, :15] for axis in range(3)]
    jacobian = torch.stack(steps, -1) + torch.eye(3)
    assert steps[0].abs().max() > 0.4
    assert torch.linalg.det(jacobian).min() > 0


# --- warping ---


def test_warp_pulls_back():
    image = index_grid((6, 7, 8))[None]
    u = torch.tensor([1.0, -2.0, 0.5])[None, :, None, None, None].expand(1, 3, 6, 7, 8)
    warped = warp(image, u)
    torch.testing.assert_close(warped[..., :-1, 2:, :-1], (image + u)[..., :-1, 2:, :-1])
    torch.testing.assert_close(warped[0, 0, -1], torch.full((7, 8), 5.0))  # goes on beyond the border
    assert warp(image, u, padding="zeros")[0, 0, -1].abs().max() == 0


def test_labels_come_from_where_they_are():
    labels = torch.zeros(1, 6, 6, 6, dtype=torch.uint8)
    labels[0, 3, 2, 5] = 24
    u = torch.tensor([1.0, -2.2, 0.4])[None, :, None, None, None].expand(1, 3, 6, 6, 6).clone().requires_grad_()
    moved = warped_labels(labels, u)
    assert moved.nonzero().tolist() == [[0, 2, 4, 5]]
    assert moved.dtype == torch.uint8
    assert not moved.requires_grad


def test_diffusion_of_a_slope():
    velocity = torch.zeros(1, 3, *HALF)
    velocity[:, 0] = 0.3 * index_grid(HALF)[2]
    torch.testing.assert_close(diffusion(velocity), torch.tensor(2 / 3 * 0.09 / 3))


# --- the loss ---


def test_variants_weigh_their_terms():
    assert list(VARIANTS) == ["baseline", "pc", "oc", "rd", "rf", "pc_oc", "pc_rd", "pc_rf"]
    item = batch()
    losses, terms = {}, None
    for name in VARIANTS:
        torch.manual_seed(0)
        model = CTMRModel(name)
        torch.nn.init.normal_(model.net.head.weight, std=0.05)
        losses[name], terms = model.loss(item).item(), model.terms(item)
        expected = terms["mind"] + 0.01 * terms["diffusion"]
        expected += sum(weight * terms[term] for term, weight in VARIANTS[name].items())
        assert losses[name] == pytest.approx(float(expected), rel=1e-5)
    assert set(terms) == {"mind", "diffusion", *RIGIDITY_TERMS}
    assert losses["pc"] + losses["oc"] == pytest.approx(losses["pc_oc"] + losses["baseline"], rel=1e-5)
    assert losses["baseline"] < min(losses[name] for name in VARIANTS if name != "baseline")


def test_every_weight_learns():
    model = CTMRModel("pc_rd")
    torch.nn.init.normal_(model.net.head.weight, std=0.05)
    model.loss(batch()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("missing", ["valid", "ct_valid"])
def test_what_one_scanner_missed_does_not_count(missing):
    model = CTMRModel()
    item = batch(1, (32, 32, 32))
    item[missing][:, :, 16:] = 0
    other = {name: value.clone() for name, value in item.items()}
    other["mr" if missing == "valid" else "ct"][:, :, 17:] = 0.9
    model.register = None  # nothing but the images decides
    velocity = torch.zeros(1, 3, 16, 16, 16)
    model.net.forward = lambda *images: velocity
    assert model.loss(item).item() == pytest.approx(model.loss(other).item(), abs=1e-7)
    other["mr"][:, :, 5] = 0.9
    assert model.loss(item).item() != pytest.approx(model.loss(other).item(), abs=1e-4)


def test_without_a_common_view_there_is_only_smoothness():
    model, item = CTMRModel(), batch()
    item["valid"] = torch.zeros_like(item["valid"])
    assert model.terms(item)["mind"] == 0


def test_sixteen_bits_touch_neither_fields_nor_terms():
    model, item = CTMRModel("pc_oc"), batch()
    torch.nn.init.normal_(model.net.head.weight, std=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        forward, _ = model.register(item)
        loss = model.loss(item)
    assert forward.dtype == loss.dtype == torch.float32
    exact, _ = model.register(item)
    assert (forward - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("side", [16, 32, 48])
def test_gradients_in_sixteen_bits(side):
    """A side of 32 makes features of 2 voxels, where PyTorch's own gradients are wrong on CPUs with bf16."""
    torch.manual_seed(0)
    net, item = RegistrationNet(), batch(shape=(side, 16, 16))
    torch.nn.init.normal_(net.head.weight, std=0.05)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            velocity = net(item["ct"], item["mr"])
        found.append(torch.autograd.grad(velocity.square().mean(), list(net.parameters())))
    for mine, exact in zip(*found, strict=True):
        assert (mine - exact).norm() < 0.1 * exact.norm()


def test_it_learns_one_pair():
    """Blobs, dark in one image and bright in the other, 3 voxels apart along the last axis."""
    coarse = torch.rand(1, 1, 8, 8, 16, generator=torch.Generator().manual_seed(3))
    blobs = torch.nn.functional.interpolate(coarse, (16, 16, 35), mode="trilinear")
    item = batch(shape=(16, 16, 32)) | {"ct": blobs[..., 3:], "mr": 1 - blobs[..., :32]}
    torch.manual_seed(0)
    model = CTMRModel("pc_rf")
    optimiser = torch.optim.Adam(model.parameters(), 3e-4)
    losses = []
    for step in range(30):
        optimiser.param_groups[0]["lr"] = 3e-4 * (1 - step / 30)
        loss = model.loss(item)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        forward, backward = model.register(item)
    inner = (0, slice(None), slice(4, 12), slice(4, 12), slice(8, 24))
    assert forward[inner].mean((1, 2, 3)).sub(torch.tensor([0, 0, -3.0])).abs().max() < 0.7
    assert (forward + backward)[inner].abs().mean() < 0.7


def test_unknown_variant():
    with pytest.raises(InputError, match="unknown variant 'ours'"):
        CTMRModel("ours")


# --- weights ---


def test_weights_come_back(tmp_path):
    models = {name: CTMRModel(name) for name in ("baseline", "rd")}
    path, card = tmp_path / "w.safetensors", {"seed": 3}
    save_variants(models, path, card)
    assert path.stat().st_size < 2 * 2_100_000
    assert read_card(path) == card
    assert held_variants(path) == ("baseline", "rd")
    loaded = load_variant("rd", path)
    assert not loaded.training
    for mine, theirs in zip(loaded.parameters(), models["rd"].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.half().float(), rtol=0, atol=0)


def test_bad_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(InputError, match="spinelib train ctmr"):
        load_variant("rd", path)
    save_variants({"rd": CTMRModel("rd")}, path, {})
    with pytest.raises(InputError, match="holds 'rd', not 'pc'"):
        load_variant("pc", path)
    save_file({"a": torch.zeros(1)}, path, {"format": "other"})
    with pytest.raises(InputError, match="expected 'spinelib-ctmr-1'"):
        read_card(path)
    save_file({"rd.net.a": torch.zeros(1)}, path, {"format": "spinelib-ctmr-1", "variants": '["rd"]', "card": "{}"})
    with pytest.raises(InputError, match="do not fit"):
        load_variant("rd", path)
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="not a readable"):
        held_variants(path)
