"""Block spines: CTs and labels whose truth is known to the voxel, for tests."""

import numpy as np

from spinelib.geometry import Volume
from spinelib.imaging.verse import LabelledCT

BODY_MM = np.array([40.0, 32.0, 24.0])
PITCH_MM = 34.0


def block_spine(labels=(18, 19, 20, 21), spacing_mm=2.0, bend_mm=0.0, cut=()):
    """Return a CT of bodies with a spinous process in a soft ellipse, top to bottom in the order of `labels`.

    Bodies are boxes of BODY_MM every PITCH_MM; `bend_mm` moves the middle ones to the right. Labels in `cut` are named
    as such, nothing else.
    """
    spacing = np.broadcast_to(np.asarray(spacing_mm, float), 3)
    extent = np.array([150.0 + 2 * bend_mm, 130.0, PITCH_MM * len(labels) + 30])
    shape = np.round(extent / spacing).astype(int)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-extent[0] / 2, -71.0, 301.0]  # edges fall between voxels of 2 mm
    right, anterior, superior = (
        (affine[i, 3] + spacing[i] * np.arange(n)).reshape([-1 if i == j else 1 for j in range(3)])
        for i, n in enumerate(shape)
    )
    ellipse = (right / (extent[0] / 2 - 5)) ** 2 + (anterior / 60) ** 2 + 0 * superior
    hounsfield = np.select([ellipse < 0.8, ellipse < 1], [40.0, -100.0], -1000.0)
    mask, centres = np.zeros(shape, np.uint8), {}
    for place, label in enumerate(labels):
        share = place / max(len(labels) - 1, 1)
        centre = np.array([bend_mm * np.sin(np.pi * share), 10.0, 300 + extent[2] - 15 - PITCH_MM * (place + 0.5)])
        body = _box((right, anterior, superior), centre, BODY_MM)
        process = _box((right, anterior, superior), centre - [0, 34, 4], [8.0, 40.0, 12.0])
        mask[body | process] = label
        centres[label] = centre
    hounsfield[mask > 0] = 400.0
    return LabelledCT(
        "block", Volume(hounsfield.astype(np.int16), affine), Volume(mask, affine), centres, frozenset(cut)
    )


def _box(axes, centre, size):
    inside = [np.abs(axis - middle) < side / 2 for axis, middle, side in zip(axes, centre, size, strict=True)]
    return inside[0] & inside[1] & inside[2]
