"""A CT of two drawn vertebrae in water that no mirror leaves alone."""

import numpy as np

from spinelib.geometry import Volume
from spinelib.imaging.verse import LabelledCT

BOXES_MM = {
    # label: (centre, size) of body, spinous process, right transverse process, mm from the body centre
    20: np.array([[[0, 0, 0], [40, 30, 24]], [[0, -34, -8], [6, 38, 8]], [[30, -20, 2], [24, 8, 10]]], float),
    21: np.array([[[0, 0, 0], [44, 32, 26]], [[0, -36, -8], [6, 40, 8]], [[32, -20, 2], [24, 8, 10]]], float),
}
BODIES_MM = {20: np.array([14.0, 20.0, 24.0]), 21: np.array([6.0, 24.0, -16.0])}


def drawn_ct(key: str = "drawn", affine=None) -> LabelledCT:
    """Two vertebrae of 700 HU in a block of water, 140 x 160 x 200 mm, voxels of 2 mm; and a cut one below."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    affine[:3, 3] = -affine[:3, :3] @ [34.5, 49.5, 49.5]
    index = np.stack(np.indices((70, 80, 100)), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    labels = np.zeros(index.shape[:3], np.uint8)
    for label, boxes in BOXES_MM.items():
        for centre, size in boxes:
            labels[(np.abs(world - BODIES_MM[label] - centre) < size / 2).all(-1)] = label
    labels[:20, :20, 0] = 22
    ct = np.where(labels > 0, 700.0, 0.0).astype(np.float32)
    centroids = {label: place.copy() for label, place in BODIES_MM.items()} | {22: world[10, 10, 0]}
    return LabelledCT(key, Volume(ct, affine), Volume(labels, affine), centroids)
