"""Drawn torsos whose curves can be read from the image: quick to make, and easy to learn from."""

import numpy as np

from spinelib.geometry import PlanarGrid, Projection
from spinelib.models.datasets import CurveExample
from spinelib.spine import Curves

GRID = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (200.0, 0.0))


def person(bend, lordosis=20.0):
    """A drawn torso: the coronal curve is a bright column; the lordosis is its brightness."""
    heights = np.linspace(560, -60, 311)
    centre = bend * np.sin((heights - 20) / 450 * np.pi)
    depth = lordosis * np.cos(heights / 140)
    extended = Curves(heights, np.stack([centre + 20, centre, centre - 20]), np.stack([depth + 16, depth, depth - 16]))
    superior, lateral = np.meshgrid(GRID.superior_mm(), GRID.lateral_mm(), indexing="ij")
    off = np.abs(lateral - np.interp(-superior, -heights, centre))
    inside = np.clip((22 - off) / 4, 0, 1) * ((superior < 480) & (superior > 0))
    body = (np.abs(lateral) < 170) * 1.0
    marked = body * (superior < 60)  # below the spine: a mark that tells the lordosis
    bone = inside + 0.02 * body
    tissue = 0.5 * body + 0.02 * lordosis * marked * (off > 60)
    return CurveExample(
        f"{bend}",
        Projection(("bone", "tissue"), np.stack([bone, tissue]), GRID),
        *(extended.at(np.linspace(470, 5, 209)), extended),
    )
