"""A CT and an MR of two drawn vertebrae, for tests that need no phantom."""

import numpy as np

from spinelib.geometry import Volume
from spinelib.imaging.pairs import RegistrationPair

LABELS = (20, 21)


def drawn_pair(key: str = "drawn", shift_mm=(3.0, 0.0, 0.0), seed: int = 0) -> RegistrationPair:
    """Two boxes with processes behind and on the left in water, 48 x 48 x 60 mm; the MR, of 3 x 1 x 1 mm, is shifted.

    `shift_mm` takes a point of the MR to the CT.
    """
    rng = np.random.default_rng(seed)
    ct_affine, mr_affine = np.diag([1.5, 1.5, 1.5, 1.0]), np.diag([3.0, 1.0, 1.0, 1.0])
    ct_labels = _labels((32, 32, 40), ct_affine, np.zeros(3))
    mr_labels = _labels((16, 48, 50), mr_affine, np.array(shift_mm, float))
    ct = np.where(ct_labels > 0, 600.0, 0.0) + rng.normal(0, 10, ct_labels.shape)
    ct[0] = -1000
    mr = np.where(mr_labels > 0, 80.0, 200.0) + rng.normal(0, 4, mr_labels.shape)
    return RegistrationPair(
        key,
        Volume(ct.astype(np.float32), ct_affine),
        Volume(ct_labels, ct_affine),
        Volume(mr.astype(np.float32), mr_affine),
        Volume(mr_labels, mr_affine),
    )


def _labels(shape, affine, shift_mm):
    world = np.stack(np.indices(shape), -1) * np.diag(affine)[:3] + shift_mm
    labels = np.zeros(shape, np.uint8)
    for label, height in zip(LABELS, (42.0, 18.0), strict=True):
        body, behind = ((24, 28, height), (26, 18, 18)), ((24, 14, height - 3), (8, 12, 8))
        for centre, size in (body, behind, ((8, 24, height), (10, 10, 10))):
            labels[(np.abs(world - np.array(centre)) < np.array(size) / 2).all(-1)] = label
    return labels
