"""What the shipped network for two radiographs does for a person it has not seen."""

import json
from importlib.resources import files

import numpy as np
import pytest

from spinelib.models.biplanar import load_variant, read_card
from spinelib.radiograph_cohort import phantom_pair
from spinelib.radiograph_evaluation import evaluate_subjects, network_method
from spinelib.record import file_sha256

SEED = 1  # training used seeds from 200,000
LEAST_DICE = 0.76


def test_the_card_belongs_to_the_weights():
    folder = files("spinelib") / "weights"
    card = json.loads((folder / "biplanar.json").read_text())
    assert card["sha256"] == file_sha256(folder / "biplanar.safetensors")
    assert card["command"] == read_card()["command"]
    assert card["bytes"] == (folder / "biplanar.safetensors").stat().st_size


@pytest.mark.slow
def test_an_unseen_person_is_seen_in_three_dimensions():
    person = phantom_pair(SEED)
    scores = evaluate_subjects({"ours": network_method(load_variant("ours"))}, [person])
    print(scores[["level", "dice", "hd_mm", "level_accuracy"]])
    assert scores["dice"].mean() > LEAST_DICE
    assert scores["level_accuracy"].mean() >= 0.8
    assert np.isfinite(scores["hd_mm"]).all()
