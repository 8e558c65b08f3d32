"""Spin-echo signal of the phantom's tissue."""

import numpy as np
import pytest

from spinelib.geometry import VolumeGrid
from spinelib.imaging.mr_contrast import SpinEcho
from spinelib.phantom.ct_tissue import patient_hounsfield
from spinelib.phantom.mr_tissue import patient_signal
from spinelib.phantom.population import sample_subject
from spinelib.phantom.render import tissue_volume
from spinelib.phantom.vertebra import subject_shapes

SEQUENCES = {"t1": SpinEcho(550.0, 12.0), "t2": SpinEcho(3500.0, 100.0)}


@pytest.fixture(scope="module")
def scene():
    """A young person's T11 to L1 with cord, discs, muscle and fat: tissue, CT, subject."""
    subject = sample_subject(5, age_years=25.0)
    shapes = subject_shapes(subject)
    middle = subject.poses[subject.index("T12"), :3, 3]
    grid = VolumeGrid.from_bounds(middle - [40, 90, 36], middle + [40, 20, 36], 1.5)
    tissue = tissue_volume(subject, shapes, grid)
    values = patient_hounsfield(tissue, subject, shapes, np.eye(4), np.random.default_rng(0), has_table=False)
    return tissue, values, subject


@pytest.fixture(scope="module")
def medians(scene):
    tissue, values, subject = scene
    share = dict(zip(tissue.tissues, tissue.fractions, strict=True))
    bone, pulp = np.isin(tissue.labels, (18, 19, 20)), share["disc"] > 0.95
    places = {
        "cortex": bone & (tissue.mineral > 0.6),
        "marrow": (share["marrow"] > 0.9) & (tissue.mineral < 0.3) & bone,
        "disc": pulp,
        "canal": share["canal"] > 0.95,
        "fat": (values < -85) & (share["adipose"] > 0.9),
        "muscle": (share["muscle"] > 0.9) & (values > 15) & (values < 60),
    }
    found = {}
    for name, sequence in SEQUENCES.items():
        signal = patient_signal(tissue, values, subject, sequence, np.random.default_rng(1))
        assert signal.dtype == np.float32 and signal.min() >= 0 and signal.max() < 1.5
        found[name] = {key: np.percentile(signal[where], [5, 50, 95]) for key, where in places.items()}
    return found


@pytest.mark.parametrize("contrast", ["t1", "t2"])
def test_bone_has_a_dark_rim_and_brighter_marrow(medians, contrast):
    found = medians[contrast]
    assert found["cortex"][1] < 0.5 * found["marrow"][1]
    assert found["fat"][1] > found["marrow"][1] > found["muscle"][1]


def test_t1_has_dark_discs_and_fluid_darker_than_cord(medians):
    found = medians["t1"]
    assert found["disc"][1] < found["marrow"][1] < found["fat"][1]
    assert found["canal"][2] > 1.5 * found["canal"][0]  # cord and fluid


def test_t2_has_bright_fluid_and_moist_nuclei(medians):
    found = medians["t2"]
    assert found["canal"][2] > 1.2 * found["fat"][1]
    assert found["canal"][0] < 0.7 * found["canal"][2]  # the cord is darker
    assert found["disc"][2] > 3 * found["disc"][0]  # nucleus and annulus


def test_fat_is_where_the_ct_shows_it(scene):
    tissue, values, subject = scene
    soft = tissue.fractions[:5].sum(0) > 0.95
    signal = patient_signal(tissue, values, subject, SEQUENCES["t1"], np.random.default_rng(1))
    inside = soft & (values > -110) & (values < 60)
    assert np.corrcoef(signal[inside], values[inside])[0, 1] < -0.8


def test_cement_has_no_signal(scene):
    tissue, values, subject = scene
    filled = values.copy()
    place = tuple(np.argwhere(tissue.labels == 19).mean(0).astype(int))
    filled[place] = 2000.0
    signals = [patient_signal(tissue, v, subject, SEQUENCES["t1"], np.random.default_rng(1)) for v in (values, filled)]
    assert signals[0][place] > 0 and signals[1][place] == 0
