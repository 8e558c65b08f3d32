"""Tissue table: attenuation, Hounsfield units and Dixon signals, frozen as data.

Sources
-------
Mass attenuation: Elam total cross sections (xraydb 4.5.8, agrees with NIST XAAMDI) of the ICRU-44 elemental
compositions; the tests compute them again. 40 and 70 keV are the two effective energies behind a cerium
filter. Hounsfield units: 120 kVp (70 keV effective) values of the ICRU-44 tissues and of clinical CT. Dixon
signals: spoiled gradient echo at 1.5 T, TR 6.69 ms, flip angle 10 degrees, in percent of the largest
possible.
"""

from dataclasses import dataclass

import numpy as np

from spinelib.errors import InputError

TISSUES = ("lung", "adipose", "muscle", "organ", "blood", "disc", "marrow", "canal")
ENERGIES_KEV = (40, 70)


@dataclass(frozen=True)
class Tissue:
    """One row of the table.

    Attributes
    ----------
    density_g_cm3 : float
    attenuation_cm2_g : tuple of float
        Mass attenuation at 40 and 70 keV.
    hounsfield : float
        At 120 kVp.
    water_signal, fat_signal : float
        Relative Dixon signals.
    """

    density_g_cm3: float
    attenuation_cm2_g: tuple[float, float]
    hounsfield: float
    water_signal: float
    fat_signal: float

    @property
    def linear_per_cm(self) -> np.ndarray:
        """Linear attenuation at 40 and 70 keV, shape (2,), 1/cm."""
        return self.density_g_cm3 * np.array(self.attenuation_cm2_g)


TISSUE_TABLE = {
    #                 g/cm3   40 keV  70 keV    HU    water fat     composition
    "lung": Tissue(0.26, (0.2699, 0.1920), -741, 0.4, 0.0),  # ICRU-44 lung, half inflated
    "adipose": Tissue(0.95, (0.2396, 0.1875), -90, 5.0, 82.0),  # ICRU-44 adipose; between -76 and -110 HU
    "muscle": Tissue(1.05, (0.2685, 0.1916), 50, 39.0, 7.0),  # ICRU-44 skeletal muscle
    "organ": Tissue(1.05, (0.2691, 0.1917), 45, 52.0, 4.0),  # liver stands for liver, spleen, kidney, bowel wall
    "blood": Tissue(1.06, (0.2715, 0.1921), 40, 40.0, 0.0),  # ICRU-44 whole blood, no contrast agent
    "disc": Tissue(1.10, (0.2831, 0.1935), 85, 32.0, 0.0),  # ICRU-44 cartilage; nucleus and annulus averaged
    "marrow": Tissue(1.005, (0.2463, 0.1883), -20, 18.0, 33.0),  # half red, half yellow by mass; 45 % fat
    "canal": Tissue(1.02, (0.2713, 0.1929), 20, 30.0, 0.0),  # half cerebrospinal fluid, half cord
}
WATER_CM2_G = (0.2683, 0.1929)
MINERAL_CM2_G = (0.9876, 0.3131)  # hydroxyapatite Ca5(PO4)3OH
MINERAL_DENSITY_G_CM3 = 3.156
CORTICAL_MINERAL_G_CM3 = 0.85  # where no marrow signal is left (Dixon)
TITANIUM_CM2_G = (2.2126, 0.5361)
MARROW_FAT_OF_TABLE = 0.45  # proton-density fat fraction behind the marrow row, about 60 years


@dataclass(frozen=True)
class Beam:
    """Mass attenuation, cm2/g, at the two effective energies of a dual-energy scanner.

    Attributes
    ----------
    energies_kev : tuple of float
        Low and high.
    tissue_cm2_g : dict of str to tuple of float
        One entry per tissue of `TISSUES`.
    mineral_cm2_g, titanium_cm2_g : tuple of float
    soft_ratios : tuple of float
        Least and largest ratio low / high that soft tissue can show: a tenth under pure fat, just over cartilage.
    """

    energies_kev: tuple[float, float]
    tissue_cm2_g: dict[str, tuple[float, float]]
    mineral_cm2_g: tuple[float, float]
    titanium_cm2_g: tuple[float, float]
    soft_ratios: tuple[float, float]

    def linear_per_cm(self, tissue: str) -> np.ndarray:
        """Linear attenuation at the two energies, shape (2,), 1/cm."""
        return lookup(tissue).density_g_cm3 * np.array(self.tissue_cm2_g[tissue])


CERIUM = Beam(
    ENERGIES_KEV,
    {name: tissue.attenuation_cm2_g for name, tissue in TISSUE_TABLE.items()},
    MINERAL_CM2_G,
    TITANIUM_CM2_G,
    (1.15, 1.50),
)
"""The beam of the table above: 80 kV behind cerium."""

SAMARIUM = Beam(
    (47, 80),
    {
        "lung": (0.2367, 0.1826),
        "adipose": (0.2186, 0.1800),
        "muscle": (0.2357, 0.1823),
        "organ": (0.2361, 0.1824),
        "blood": (0.2376, 0.1827),
        "disc": (0.2443, 0.1832),
        "marrow": (0.2225, 0.1804),
        "canal": (0.2378, 0.1836),
    },
    (0.6729, 0.2589),
    (1.4285, 0.4053),
    (1.09, 1.37),
)
"""Another maker's beam: 100 kV behind samarium, the same compositions and cross sections."""


def mineral_net_cm2_g() -> np.ndarray:
    """Mass attenuation of mineral less that of the marrow it displaces, shape (2,), cm2/g.

    A gram of hydroxyapatite fills 1/3.156 cm3. Path lengths and tissue fractions are what is left beside it;
    this net value serves where bone is described as marrow plus an excess, as when a CT is inverted.
    """
    return np.array(MINERAL_CM2_G) - TISSUE_TABLE["marrow"].linear_per_cm / MINERAL_DENSITY_G_CM3


def mineral_hounsfield_per_g_cm3() -> float:
    """Rise of HU for 1 g/cm3 of mineral in the marrow that it displaces (1312; 150 mg/cm3 gives +197 HU)."""
    return float(1000 * mineral_net_cm2_g()[1] / WATER_CM2_G[1])


def dixon_signals(tissues: tuple[str, ...] = TISSUES, marrow_fat: float = MARROW_FAT_OF_TABLE) -> np.ndarray:
    """Water and fat signals of each tissue, shape (2, T).

    Parameters
    ----------
    tissues : tuple of str
        Names out of `TISSUES`.
    marrow_fat : float
        Proton-density fat fraction of the marrow, 0 to 1; T1 weighting makes the signal fraction larger.
    """
    if not 0 <= marrow_fat <= 1:
        message = f"marrow_fat is a fraction between 0 and 1, given {marrow_fat}."
        raise InputError(message)
    table = np.array([[lookup(t).water_signal, lookup(t).fat_signal] for t in tissues]).T
    if "marrow" in tissues:
        scale = [(1 - marrow_fat) / (1 - MARROW_FAT_OF_TABLE), marrow_fat / MARROW_FAT_OF_TABLE]
        table[:, tissues.index("marrow")] *= scale
    return table


def lookup(tissue: str) -> Tissue:
    """Return a row of the table, or name the allowed ones."""
    if tissue not in TISSUE_TABLE:
        message = f"unknown tissue {tissue!r}. Expected one of: {', '.join(TISSUES)}."
        raise InputError(message)
    return TISSUE_TABLE[tissue]


def path_array(path_mm: dict[str, np.ndarray]) -> tuple[tuple[str, ...], np.ndarray]:
    """Stack path lengths (the key 'mineral' is not one of them).

    Parameters
    ----------
    path_mm : dict of ndarray
        Tissue name -> length in mm, shape (rows, cols).

    Returns
    -------
    tissues : tuple of str
    lengths_mm : ndarray, shape (T, rows, cols)

    Raises
    ------
    InputError
        For an unknown tissue, no tissue at all, a negative length, or differing shapes.
    """
    tissues = tuple(t for t in path_mm if t != "mineral")
    shapes = {np.shape(path_mm[t]) for t in path_mm}
    if not tissues or len(shapes) > 1:
        message = f"path lengths need at least one tissue and one common shape, given {list(path_mm)} {shapes}."
        raise InputError(message)
    for tissue in tissues:
        lookup(tissue)
    lengths = np.stack([np.asarray(path_mm[t], float) for t in tissues])
    if not np.all(np.isfinite(lengths)) or lengths.min() < 0:
        message = "path lengths must be finite and not negative (mm)."
        raise InputError(message)
    return tissues, lengths
