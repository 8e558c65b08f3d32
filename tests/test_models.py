"""Networks, windows, datasets, baselines, weights files."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from spinelib.clinical import MEASURES
from spinelib.curve_training import train_kernel
from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection
from spinelib.models.baselines import BASELINES, fit_baselines
from spinelib.models.crop import CANVAS_PIXELS, Window, curves_to_rows, network_input, rows_to_curves, standardised
from spinelib.models.curves import (
    PAPER_PARAMETERS,
    BottleneckTransformer,
    CurveRegressor,
    LinearShortcut,
    light_network,
    paper_network,
    parameter_count,
)
from spinelib.models.datasets import CurveDataset, CurveExample, LandmarkDataset, true_window
from spinelib.models.locator import LOCATOR_SHAPE, SpineLocator, landmarks_mm, locate, window_from_landmarks
from spinelib.models.predictor import FORMAT, CurvePredictor
from spinelib.spine import CURVE_COLUMNS, Curves

GRID = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (200.0, 0.0))


def person(bend=20.0, right=0.0):
    """A drawn torso: a bright column of known place in a dim body, with its curves."""
    heights = np.linspace(560, -60, 311)
    centre = right + bend * np.sin((heights - 20) / 450 * np.pi)
    depth = 20 * np.cos(heights / 140)
    extended = Curves(heights, np.stack([centre + 20, centre, centre - 20]), np.stack([depth + 16, depth, depth - 16]))
    superior, lateral = np.meshgrid(GRID.superior_mm(), GRID.lateral_mm(), indexing="ij")
    line = np.interp(-superior, -heights, centre)
    inside = (np.abs(lateral - line) < 20) & (superior < 560) & (superior > -60)
    body = np.abs(lateral) < 170
    values = np.stack([inside * 1.0 + 0.02 * body, 0.5 * body + 0.3 * inside]).astype(np.float32)
    dxa = Projection(("bone", "tissue"), values, GRID)
    return CurveExample("p", dxa, extended.at(np.linspace(470, 5, 209)), extended)


def test_published_network_has_exactly_its_parameters():
    model = paper_network()
    assert parameter_count(model) == PAPER_PARAMETERS == 34_756_646
    assert model(torch.rand(1, 2, 224, 224)).shape == (1, 209, 6)


def test_fresh_attention_block_is_the_identity_on_a_rectified_map():
    block = BottleneckTransformer(64, (7, 7)).eval()
    features = torch.rand(2, 64, 7, 7)
    assert torch.allclose(block(features), features)


def test_light_network_is_small_and_fits_any_backbone():
    assert parameter_count(light_network()) < 5_000_000
    other = CurveRegressor("mobilenetv3_small_100", 2, "rows", 3, 1)
    assert other(torch.rand(1, 2, 224, 224)).shape == (1, 209, 6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CurveRegressor("resnet50", head="tokens"), "'global', 'rows'"),
        (lambda: CurveRegressor("resnet5000"), "timm.list_models"),
        (lambda: light_network()(torch.rand(1, 2, 192, 224)), "224 x 224"),
    ],
)
def test_bad_networks_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_unreachable_pretrained_weights_warn_and_go_on(monkeypatch):
    import timm

    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host")
        return real(name, pretrained=False, **options)

    monkeypatch.setattr("spinelib.models.curves.timm.create_model", offline)
    with pytest.warns(UserWarning, match="starts from random weights"):
        assert parameter_count(light_network(pretrained=True)) > 0


def test_shortcut_finds_a_linear_law_and_takes_what_it_does_not_see_as_average():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(60, 2, 224, 224, generator=generator) * 0.1
    strength = torch.rand(60, generator=generator)
    images[:, 0, 80:120, 100:140] += strength[:, None, None]
    rows = strength[:, None, None] * torch.linspace(-30, 30, 6).expand(209, 6)
    shortcut = LinearShortcut(2)
    shortcut.fit(images, rows)
    assert (shortcut(images) - rows).abs().max() < 1.0
    assert torch.allclose(shortcut(torch.zeros(1, 2, 224, 224))[0], rows.mean(dim=0), atol=1e-3)
    half = images[:1].clone()
    half[:, :, 130:] = 0  # a short field of view that still holds the law's place
    assert (shortcut(half) - rows[:1]).abs().max() < 3.0


def test_a_fresh_light_network_is_its_shortcut():
    network = light_network().eval()
    network.shortcut.intercept.fill_(7.0)
    network.scale_mm.fill_(10.0)
    assert torch.allclose(network(torch.rand(1, 2, 224, 224)), torch.full((1, 209, 6), 7.0))


@pytest.mark.parametrize("make", [SpineLocator, light_network, paper_network])
def test_mixed_precision_rounds_no_place_to_16_bits(make):
    torch.manual_seed(0)
    network = make().eval()
    if isinstance(network, CurveRegressor) and network.shortcut is not None:
        nn.init.normal_(network.shortcut.weight)
    pixels = LOCATOR_SHAPE if isinstance(network, SpineLocator) else (CANVAS_PIXELS, CANVAS_PIXELS)
    image = torch.rand(2, 2, *pixels)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        places = network(image)
    assert places.dtype == torch.float32
    assert (places != places.bfloat16()).float().mean() > 0.9


def test_rows_and_curves_are_inverse_inside_the_window():
    example = person()
    window = true_window(example.curves)
    depthless = example.extended.shifted(anterior_mm=-example.curves.sagittal_mm[1].mean())
    rows, valid = curves_to_rows(depthless, window)
    back = rows_to_curves(rows, window)
    assert valid.all()
    assert np.abs(back.to_array() - example.curves.depth_removed().to_array()).max() < 0.5


def test_a_prediction_with_crossed_edges_still_has_a_solid():
    from spinelib.reconstruct import reconstruct

    rows = np.zeros((209, 6))
    rows[:, 0], rows[:, 2] = -5.0, 5.0  # right and left exchanged
    curves = rows_to_curves(rows, Window(200.0, 0.0, 430.0, -20.0))
    assert (curves.coronal_mm[0] - curves.coronal_mm[2] >= 2.0).all()
    assert reconstruct(curves).column_mesh.is_watertight


def test_standardised_does_not_depend_on_the_scanners_units():
    image = person().dxa
    other = Projection(image.channels, image.values * 187 + 3, image.grid)
    assert np.abs(standardised(image).values - standardised(other).values).max() < 0.02
    single = Projection(("bone",), image.values[:1], image.grid)
    assert standardised(single).channels == ("bone", "tissue")


def test_network_sees_the_same_whatever_the_pixel_size():
    image = person().dxa
    window = true_window(person().curves)
    finer = image.resampled(PlanarGrid.centred("coronal", (666, 500), (1.5, 1.2), GRID.centre_mm))
    # Different sampling of hard-edged drawings: equal on average, not at the edges.
    assert np.abs(network_input(image, window) - network_input(finer, window)).mean() < 0.02


@pytest.mark.parametrize("index", range(6))
def test_augmentation_moves_curves_with_the_image(index):
    example = person(bend=30.0)
    dataset = CurveDataset([example] * 6, [true_window(example.curves)] * 6, augment=True, seed=3)
    item = dataset[index]
    bone, rows, valid = item["image"][0].numpy(), item["rows_mm"].numpy(), item["valid"].numpy() > 0
    misses = []
    for k in np.flatnonzero(valid)[20:-20:8]:
        line = bone[k + 7]
        if line.max() < 0.4:  # blanked by the short field of view
            continue
        bright = np.flatnonzero(line > 0.5 * line.max())
        misses.append(abs((111.5 - bright.mean()) * 2.5 - rows[k, 1]))
    assert misses, "the whole window was blanked"
    assert np.median(misses) < 2.5


def test_augmentation_depends_on_seed_epoch_and_item_alone():
    example = person()
    make = lambda: CurveDataset([example], [true_window(example.curves)], augment=True, seed=1)  # noqa: E731
    one, two = make(), make()
    two.set_epoch(5)
    two.set_epoch(0)
    assert torch.equal(one[0]["image"], two[0]["image"])
    two.set_epoch(1)
    assert not torch.equal(one[0]["image"], two[0]["image"])


def test_landmarks_follow_shift_and_cut():
    dataset = LandmarkDataset([person()] * 20, augment=True, seed=0)
    plain = landmarks_mm(person().curves, person().dxa)
    lengths = {round(float(item["landmarks_mm"][0] - item["landmarks_mm"][1])) for item in dataset}
    assert lengths == {round(float(plain[0] - plain[1]))}
    assert len({float(item["landmarks_mm"][0]) for item in dataset}) > 5


def test_window_length_is_limited():
    window = window_from_landmarks((900.0, -200.0, 3.0))
    assert window.upper_mm - window.lower_mm == 620
    assert window.right_mm == 3.0


def test_baselines_recover_a_population_that_differs_by_place_alone():
    people = [person(bend=b) for b in np.linspace(-30, 30, 13)]
    windows = [true_window(p.curves) for p in people]
    models = fit_baselines(people, windows)
    assert set(models) == set(BASELINES)
    target = person(bend=17.0)
    errors = {
        name: np.abs(
            m.predict(target.dxa, true_window(target.curves)).at(target.curves.heights_mm).coronal_mm[1]
            - target.curves.coronal_mm[1]
        ).mean()
        for name, m in models.items()
    }
    assert errors["ridge"] < errors["nearest"] < errors["mean_curve"]
    assert errors["mean_curve"] > 2


def test_weights_file_round_trip_and_named_columns(tmp_path):
    torch.manual_seed(0)
    predictor = CurvePredictor(SpineLocator(), light_network(), {"command": "test"})
    path = tmp_path / "w.safetensors"
    predictor.save(path, half=False)
    again = CurvePredictor.load(path)
    image = person().dxa
    window = locate(predictor.locator, image)
    assert again.card == {"command": "test"}
    assert again.window(image) == window
    assert np.allclose(again.predict(image, window).to_array(), predictor.predict(image, window).to_array())


def test_a_network_states_no_spread_and_nothing_unknown_is_made_up():
    torch.manual_seed(0)
    example = person()
    found = CurvePredictor(SpineLocator(), light_network()).estimate(example.dxa, true_window(example.curves))
    assert (found.spread_mm == 1).all()
    assert np.isnan(found.tube_mm).all()
    assert np.isnan(found.novelty)
    assert not found.is_unusual
    assert set(found.measures) == set(MEASURES)
    assert all(np.isnan(bounds).all() for _, *bounds in found.measures.values())


def test_a_kernel_regressor_survives_its_file_without_loss(tmp_path):
    regressor = train_kernel([person(bend) for bend in np.linspace(-30, 30, 10)], channels="bone", spoil=False)
    predictor, path = CurvePredictor(SpineLocator(), regressor, {"command": "test"}), tmp_path / "w.safetensors"
    predictor.save(path)
    again, example = CurvePredictor.load(path), person(12.0)
    window = true_window(example.curves)
    one, two = (p.with_spread(example.dxa, window) for p in (predictor, again))
    assert two[0].to_array() == pytest.approx(one[0].to_array(), abs=1e-4)
    assert two[1] == pytest.approx(one[1], abs=1e-4)
    assert again.regressor.channels == "bone"
    assert np.abs(one[0].at(example.curves.heights_mm).coronal_mm - example.curves.coronal_mm).mean() < 1


def test_unusable_weights_are_named(tmp_path):
    from safetensors.torch import save_file

    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(b"\x00" * 100)
    unnamed = tmp_path / "unnamed.safetensors"
    save_file({"a": torch.zeros(1)}, unnamed)
    old = tmp_path / "old.safetensors"
    columns = json.dumps(CURVE_COLUMNS)
    save_file({"a": torch.zeros(1)}, old, metadata={"columns": columns, "format": "spinelib-curves-1"})
    lacking = tmp_path / "lacking.safetensors"
    header = {"columns": columns, "format": FORMAT, "kind": "network", "regressor": "{}"}
    save_file({"locator.a": torch.zeros(1)}, lacking, metadata=header)
    for path, words in (
        (corrupt, "not a readable"),
        (unnamed, "not named"),
        (old, "Train the weights again"),
        (lacking, "do not fit"),
        (tmp_path / "no", "no weights at"),
    ):
        with pytest.raises(InputError, match=words):
            CurvePredictor.load(path)


def test_window_is_a_value():
    assert Window(1.0, 2.0, 3.0, 4.0) == Window(1.0, 2.0, 3.0, 4.0)
    assert np.isclose(np.ptp(Window(0.0, 0.0, 1.0, -1.0).heights_mm()), 208 * 2.5)
