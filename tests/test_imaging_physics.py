"""The frozen tissue table against elemental compositions, and the rules built on it."""

import numpy as np
import pytest
import xraydb

from spinelib.errors import InputError
from spinelib.imaging import physics

# ICRU-44 compositions, per cent by mass.
MUSCLE = {"H": 10.2, "C": 14.3, "N": 3.4, "O": 71.0, "Na": 0.1, "P": 0.2, "S": 0.3, "Cl": 0.1, "K": 0.4}
ADIPOSE = {"H": 11.4, "C": 59.8, "N": 0.7, "O": 27.8, "Na": 0.1, "S": 0.1, "Cl": 0.1}
LUNG = {"H": 10.3, "C": 10.5, "N": 3.1, "O": 74.9, "Na": 0.2, "P": 0.2, "S": 0.3, "Cl": 0.3, "K": 0.2}
BLOOD = {
    "H": 10.2,
    "C": 11.0,
    "N": 3.3,
    "O": 74.5,
    "Na": 0.1,
    "P": 0.1,
    "S": 0.2,
    "Cl": 0.3,
    "K": 0.2,
    "Fe": 0.1,
}
LIVER = {"H": 10.2, "C": 13.9, "N": 3.0, "O": 71.6, "Na": 0.2, "P": 0.3, "S": 0.3, "Cl": 0.2, "K": 0.3}
CARTILAGE = {"H": 9.6, "C": 9.9, "N": 2.2, "O": 74.4, "Na": 0.5, "P": 2.2, "S": 0.9, "Cl": 0.3}
RED = {"H": 10.5, "C": 41.4, "N": 3.4, "O": 43.9, "P": 0.1, "S": 0.2, "Cl": 0.2, "K": 0.2, "Fe": 0.1}
YELLOW = {"H": 11.5, "C": 64.4, "N": 0.7, "O": 23.1, "Na": 0.1, "S": 0.1, "Cl": 0.1}
FLUID = {"H": 11.1, "O": 88.0, "Na": 0.5, "Cl": 0.4}
CORD = {"H": 10.7, "C": 14.5, "N": 2.2, "O": 71.2, "Na": 0.2, "P": 0.4, "S": 0.2, "Cl": 0.3, "K": 0.3}
MINERAL = {"Ca": 5 * 40.078, "P": 3 * 30.974, "O": 13 * 15.999, "H": 1.008}

TISSUE_PARTS = {
    "lung": [LUNG],
    "adipose": [ADIPOSE],
    "muscle": [MUSCLE],
    "organ": [LIVER],
    "blood": [BLOOD],
    "disc": [CARTILAGE],
    "marrow": [RED, YELLOW],
    "canal": [FLUID, CORD],
}


def oracle(composition, energies_kev=physics.ENERGIES_KEV):
    """Mass attenuation (cm2/g) at 40 and 70 keV from the elements."""
    total = sum(composition.values())
    return np.array(
        [
            sum(share / total * xraydb.mu_elam(element, 1000.0 * kev) for element, share in composition.items())
            for kev in energies_kev
        ]
    )


@pytest.mark.parametrize("tissue", physics.TISSUES)
def test_attenuation_follows_from_the_elements(tissue):
    truth = np.mean([oracle(part) for part in TISSUE_PARTS[tissue]], axis=0)
    np.testing.assert_allclose(physics.TISSUE_TABLE[tissue].attenuation_cm2_g, truth, rtol=0.005)


@pytest.mark.parametrize(
    ("frozen", "composition"),
    [
        (physics.MINERAL_CM2_G, MINERAL),
        (physics.WATER_CM2_G, {"H": 11.19, "O": 88.81}),
        (physics.TITANIUM_CM2_G, {"Ti": 1.0}),
    ],
)
def test_mineral_water_and_titanium_follow_from_the_elements(frozen, composition):
    np.testing.assert_allclose(frozen, oracle(composition), rtol=0.005)


@pytest.mark.parametrize("beam", [physics.CERIUM, physics.SAMARIUM])
def test_every_beam_follows_from_the_elements(beam):
    for tissue, parts in TISSUE_PARTS.items():
        truth = np.mean([oracle(part, beam.energies_kev) for part in parts], axis=0)
        np.testing.assert_allclose(beam.tissue_cm2_g[tissue], truth, rtol=0.005, err_msg=tissue)
    np.testing.assert_allclose(beam.mineral_cm2_g, oracle(MINERAL, beam.energies_kev), rtol=0.005)
    np.testing.assert_allclose(beam.titanium_cm2_g, oracle({"Ti": 1.0}, beam.energies_kev), rtol=0.005)
    ratios = [np.divide(*beam.linear_per_cm(tissue)) for tissue in physics.TISSUES]
    assert beam.soft_ratios[0] < min(ratios) and max(ratios) < beam.soft_ratios[1] < 1.05 * max(ratios)


@pytest.mark.parametrize("tissue", physics.TISSUES)
def test_hounsfield_agrees_with_attenuation_at_70_kev(tissue):
    row = physics.TISSUE_TABLE[tissue]
    from_attenuation = 1000 * (row.linear_per_cm[1] / physics.WATER_CM2_G[1] - 1)
    assert abs(row.hounsfield - from_attenuation) < 20


def test_mineral_loaded_marrow_reaches_the_reference_hounsfield():
    # 80 .. 850 mg/cm3 in marrow at 70 keV, computed by volume displacement from the same cross sections
    for mineral, expected in ((0.08, 89), (0.15, 181), (0.40, 509), (0.85, 1099)):
        computed = physics.TISSUE_TABLE["marrow"].hounsfield + mineral * physics.mineral_hounsfield_per_g_cm3()
        assert abs(computed - expected) < 12


def test_marrow_fat_moves_signal_from_water_to_fat():
    lean, fatty = (physics.dixon_signals(marrow_fat=f)[:, physics.TISSUES.index("marrow")] for f in (0.25, 0.60))
    assert lean[0] > fatty[0]
    assert lean[1] < fatty[1]
    assert np.array_equal(physics.dixon_signals(("muscle",), 0.2), physics.dixon_signals(("muscle",), 0.6))


def test_table_covers_the_named_tissues_once():
    assert tuple(physics.TISSUE_TABLE) == physics.TISSUES


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: physics.lookup("bone"), "unknown tissue 'bone'"),
        (lambda: physics.dixon_signals(marrow_fat=40), "between 0 and 1"),
        (lambda: physics.path_array({"mineral": np.zeros((2, 2))}), "at least one tissue"),
        (lambda: physics.path_array({"muscle": np.zeros((2, 2)), "lung": np.zeros((3, 2))}), "common shape"),
        (lambda: physics.path_array({"muscle": np.full((2, 2), -1.0)}), "not negative"),
        (lambda: physics.path_array({"muscle": np.full((2, 2), np.nan)}), "finite"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()
