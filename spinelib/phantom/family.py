"""What one population is made of: the per-level table and the constants that set it apart from another.

A predictor that was only tried on the population it was trained on has been tested on its own assumptions. Another
`Family` moves those assumptions together, by amounts that published series differ by.
"""

from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import pandas as pd

_MODEL_OF = {"T13": "T12", "L6": "L5"}
"""Supernumerary levels and those they copy."""


@dataclass(frozen=True)
class Family:
    """Constants of a population relative to the standard one: factors, and in the last three fields shifts.

    Attributes
    ----------
    body_height, endplate_width, endplate_depth, disc_height : float
        Of all vertebrae and discs; the S1 end-plate takes part.
    canal, pedicle_width, transverse_span, spinous_length : float
        Of the posterior elements.
    relief : float
        Waist, dishing of the plates, concavity of the walls and lips of the bodies.
    chest_width, chest_depth, rib_drop : float
        Of the rib cage: half-width of the ribs, distance of the sternum from the spine, fall of the ribs to the front.
    incidence_deg, kyphosis_deg : float
        Added to pelvic incidence and to T4-T12 kyphosis; the lordosis follows from both.
    bmi : float
        Added to the body-mass index, kg/m2.
    """

    body_height: float = 1.0
    endplate_width: float = 1.0
    endplate_depth: float = 1.0
    disc_height: float = 1.0
    canal: float = 1.0
    pedicle_width: float = 1.0
    transverse_span: float = 1.0
    spinous_length: float = 1.0
    relief: float = 1.0
    chest_width: float = 1.0
    chest_depth: float = 1.0
    rib_drop: float = 1.0
    incidence_deg: float = 0.0
    kyphosis_deg: float = 0.0
    bmi: float = 0.0

    def times(self, amount: float) -> "Family":
        """Return the family that lies `amount` times as far from the standard one; 0 is the standard."""
        moved = asdict(self)
        return Family(
            **{f.name: moved[f.name] ** amount if f.default else moved[f.name] * amount for f in fields(self)}
        )


STANDARD = Family()

OTHER = Family(
    body_height=0.97,
    endplate_width=1.04,
    endplate_depth=0.96,
    disc_height=1.12,
    canal=1.06,
    pedicle_width=1.12,
    transverse_span=0.95,
    spinous_length=1.05,
    relief=1.12,
    chest_width=1.04,
    chest_depth=0.95,
    rib_drop=1.06,
    incidence_deg=-6.0,
    kyphosis_deg=5.0,
    bmi=2.5,
)
"""Broad, shallow bodies between tall discs, a wide flat chest, a flatter pelvis and a rounder back.

Each constant is moved by 0.5 to 1 of its standard deviation within a sex; published means of different series lie that
far apart (Gilad 1985, Panjabi 1992, Busscher 2010, Yadav 2020, Bonczar 2024 for bodies; Mac-Thiong 2011 against
supine CT for incidence). Twice as far is a population at the edge of what is seen.
"""


@cache
def morphometry() -> pd.DataFrame:
    """Return the per-level table, rows C1 to L5, S1 and the copies that stand for 'T13' and 'L6'."""
    table = pd.read_csv(Path(__file__).with_name("morphometry.csv")).set_index("level")
    copies = table.loc[list(_MODEL_OF.values())].set_axis(list(_MODEL_OF))
    return pd.concat([table, copies])
