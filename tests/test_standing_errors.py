"""Whole spines: triangulation against naive stacking, angles, lists of points that are a level off."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import trimesh
from drawn_pairs import BODIES_MM, drawn_ct

from spinelib import standing_errors
from spinelib.imaging.radiograph_pairs import LABELS, make_pair
from spinelib.spine import Spine


@pytest.fixture(scope="module")
def subject():
    return make_pair(drawn_ct())


@pytest.fixture(scope="module")
def truth(subject):
    return standing_errors.true_masks(subject)


def test_triangulation_is_exact_and_naive_stacking_grows(subject):
    tall = replace(
        subject,
        labels=(8, 14, 20),
        bodies_mm=np.mean(list(BODIES_MM.values()), axis=0) + [[30, 0, 240], [30, 0, 120], [30, 0, 0]],
    )
    errors = standing_errors.centre_errors(tall)
    assert errors["triangulated_mm"].max() < 1e-9
    assert errors["naive_mm"].is_monotonic_decreasing
    assert errors["naive_mm"][0] == pytest.approx(abs(240 * 30 / 1500), rel=0.35)
    np.testing.assert_allclose(np.diff(errors["height_mm"]), -120)
    noisy = standing_errors.centre_errors(tall, noise_mm=2.0, seed=1)
    assert 0.5 < noisy["triangulated_mm"].mean() < 6
    assert noisy.equals(standing_errors.centre_errors(tall, noise_mm=2.0, seed=1))


def test_angles_of_the_truth_have_no_error(subject, truth):
    found = standing_errors.angle_errors(subject, truth)
    assert found["n"] == 2
    assert found["cobb_deg"] == found["avr_deg"] == 0
    assert np.isnan(found["kyphosis_deg"])
    half = truth.copy()
    half[0] = False
    assert standing_errors.angle_errors(subject, half)["n"] == 1
    nothing = standing_errors.angle_errors(subject, np.zeros_like(truth))
    assert nothing["n"] == 0
    assert np.isnan(nothing["cobb_deg"])


def test_known_frames_are_the_truth(subject, truth):
    straight = replace(subject, frames=np.tile(np.eye(3), (2, 1, 1)))
    turned = np.stack([np.eye(3), np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1.0]])])
    plain = standing_errors.angle_errors(straight, truth)["avr_deg"]
    askew = standing_errors.angle_errors(replace(subject, frames=turned), truth)["avr_deg"]
    assert askew - plain == pytest.approx(np.degrees(np.arctan2(0.6, 0.8)) / 2, abs=2 * plain)


def test_surface_distances_of_spheres():
    spheres = [trimesh.creation.icosphere(4, radius) for radius in (20, 22)]
    inner, outer = (Spine(("L1",), np.eye(4)[None], (sphere,)) for sphere in spheres)
    np.testing.assert_allclose(standing_errors.surface_distances(inner, outer)["L1"], 2, atol=0.01)
    other = Spine(("L2",), np.eye(4)[None], (spheres[0],))
    assert standing_errors.surface_distances(inner, other) == {}


def test_given_frames_replace_those_of_the_shapes(subject, truth):
    straight = replace(subject, frames=np.tile(np.eye(3), (2, 1, 1)))
    turned = np.stack([np.eye(3), np.array([[0.8, 0.6, 0], [-0.6, 0.8, 0], [0, 0, 1.0]])])
    assert standing_errors.angle_errors(straight, truth, frames=straight.frames)["avr_deg"] == 0
    off = standing_errors.angle_errors(straight, truth, frames=turned)["avr_deg"]
    assert off == pytest.approx(np.degrees(np.arctan2(0.6, 0.8)) / 2)


def test_a_list_that_is_a_level_off_is_told_from_a_right_one(subject):
    levels = np.array([LABELS.index(label) for label in subject.labels])
    found = standing_errors.level_disagreement(subject, levels)
    assert found == {"subject": subject.key, "right_list": 0, "shifted_list": 1}
    assert standing_errors.level_disagreement(subject, levels + 1)["right_list"] == 1
    lowest = replace(subject, labels=LABELS[-2:])  # L5 has no next level: it stays L5
    assert standing_errors.level_disagreement(lowest, np.array([15, 16]))["shifted_list"] == 0.5


def test_numbers_of_spines():
    centres = pd.DataFrame({"naive_mm": [1.0, 3.0], "triangulated_mm": [0.0, 0.2]})
    angles = pd.DataFrame({"cobb_deg": [1.0, 2.0], "avr_deg": [3.0, np.nan]})
    assert standing_errors.spine_numbers(centres, angles) == {
        "spine.stack_naive_mm": 2,
        "spine.stack_triangulated_mm": 0.1,
        "spine.cobb_mae_deg": 1.5,
        "spine.avr_mae_deg": 3,
    }
