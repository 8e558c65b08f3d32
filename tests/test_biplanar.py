"""Names of the networks and their file of weights."""

import json

import pytest
import torch
from drawn_ellipsoids import random_batch
from safetensors.torch import load_file, save_file

from spinelib.errors import InputError
from spinelib.models.biplanar import FORMAT, VARIANTS, load_variant, new_variant, read_card, save_variants
from spinelib.models.lifting import LiftingNet

CARD = {"command": "spinelib train transvert --render 2", "seconds": 3}


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return {name: new_variant(name).eval() for name in ("outer_product", "attention_adv", "ours")}


@pytest.fixture(scope="module")
def path(networks, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "biplanar.safetensors"
    save_variants(networks, path, CARD)
    return path


def test_the_names_are_those_of_the_table():
    assert list(VARIANTS) == ["sagittal_only", "outer_product", "transvert", "attention", "attention_adv", "ours"]
    made = {name: make() for name, make in VARIANTS.items()}
    assert isinstance(made.pop("ours"), LiftingNet)
    assert [net.fusion for net in made.values()] == ["sagittal", "outer", "anisotropic", "anisotropic", "anisotropic"]
    assert [net.discriminator is not None for net in made.values()] == [False, False, False, False, True]
    sizes = [sum(p.numel() for n, p in net.named_parameters() if "disc" not in n) for net in made.values()]
    assert sizes[0] < sizes[1] < sizes[2] < sizes[3] == sizes[4]


@pytest.mark.parametrize("name", ["outer_product", "attention_adv", "ours"])
def test_weights_survive_in_sixteen_bits(networks, path, name):
    batch = random_batch()
    share, level = networks[name].predict(batch)
    again = load_variant(name, path)
    assert not again.training
    other, number = again.predict(batch)
    assert (other - share).abs().max() < 0.02
    assert torch.equal(level, number)


def test_the_file_is_half_as_large_as_the_networks(networks, path):
    numbers = sum(value.numel() for net in networks.values() for value in net.state_dict().values())
    assert path.stat().st_size < 2.2 * numbers


def test_a_network_knows_its_annotation(networks, tmp_path):
    assert new_variant("ours").annotation == new_variant("transvert").annotation == "c2v"
    for card, expected in (({}, "c2v"), ({"annotation": "n2v"}, "n2v")):
        save_variants({"ours": networks["ours"]}, tmp_path / "w.safetensors", card)
        assert load_variant("ours", tmp_path / "w.safetensors").annotation == expected


def test_the_card_comes_back(path):
    assert read_card(path) == CARD


def test_unknown_name(path):
    for ask in (new_variant, lambda name: load_variant(name, path)):
        with pytest.raises(InputError, match="unknown variant 'unet'. Expected one of: 'sagittal_only'"):
            ask("unet")


def test_a_variant_that_the_file_lacks(path):
    with pytest.raises(
        InputError, match="holds 'outer_product', 'attention_adv', 'ours', not 'transvert'.*--variant tra"
    ):
        load_variant("transvert", path)


def test_files_that_are_no_weights(tmp_path, path):
    with pytest.raises(InputError, match="no weights at .*spinelib train transvert"):
        load_variant("ours", tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_variant("ours", broken)
    save_file({"a": torch.zeros(1)}, broken, {"format": "else"})
    for read in (read_card, lambda file: load_variant("ours", file)):
        with pytest.raises(InputError, match=f"format 'else', expected '{FORMAT}'"):
            read(broken)


def test_weights_of_another_network(tmp_path, path):
    tensors = {key.replace("outer_product", "ours"): value for key, value in load_file(path).items() if "outer" in key}
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, {"format": FORMAT, "variants": json.dumps(["ours"]), "card": "{}"})
    with pytest.raises(InputError, match="weights of 'ours' in .* do not fit"):
        load_variant("ours", other)
