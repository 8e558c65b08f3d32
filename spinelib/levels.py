"""Vertebral levels: names, VerSe label numbers, regions, colours."""

CERVICAL = tuple(f"C{i}" for i in range(1, 8))
THORACIC = tuple(f"T{i}" for i in range(1, 13))
LUMBAR = tuple(f"L{i}" for i in range(1, 6))

VERTEBRAE = CERVICAL + THORACIC + LUMBAR
"""The 24 regular presacral levels, cranial to caudal."""

T1_TO_L5 = THORACIC + LUMBAR
"""T1 to L5, the 17 levels of a standing spine in radiographs."""

VERSE_LABELS = {level: i + 1 for i, level in enumerate(VERTEBRAE)} | {"L6": 25, "S1": 26, "Co": 27, "T13": 28}
"""Label numbers of the VerSe challenge (Sekuboyina 2021): C1-C7 1-7, T1-T12 8-19, L1-L5 20-24, L6 25, T13 28."""

LEVEL_ORDER = (*range(1, 20), VERSE_LABELS["T13"], *range(20, 26))
"""VerSe labels of C1 to L6 in anatomical order, cranial to caudal; T13 lies between T12 and L1."""

LEVEL_OF_LABEL = {label: level for level, label in VERSE_LABELS.items()}

_REGIONS = {"C": "cervical", "T": "thoracic", "L": "lumbar", "S": "sacral"}
# Okabe-Ito hues: told apart by readers with the common colour-vision deficiencies.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")

COLOURS = {level: _PALETTE[i % len(_PALETTE)] for i, level in enumerate((*VERTEBRAE, "L6", "S1", "T13"))}
"""One colour per level, the same in tables, meshes, hover text and 2-D overlays."""


def region(level: str) -> str:
    """Return 'cervical', 'thoracic', 'lumbar' or 'sacral'.

    Raises
    ------
    ValueError
        If `level` is not a vertebral level name such as 'T12'.
    """
    if level not in VERSE_LABELS or level == "Co":
        message = f"unknown level {level!r}. Expected one of: {', '.join(VERSE_LABELS)}."
        raise ValueError(message)
    return _REGIONS[level[0]]
