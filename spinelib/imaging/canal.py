"""The spinal canal, from labels of vertebrae."""

import numpy as np
from scipy import ndimage

from spinelib.geometry import Volume
from spinelib.imaging.pairs import vertebra_labels

_RING_MM2 = 80.0  # what an arch encloses, at least


def spinal_canal(labels: Volume) -> np.ndarray:
    """Return a round canal through what the arches of labelled vertebrae enclose, (R, A, S) bool.

    What axial slices of a vertebra enclose gives its centre; centres are joined by straight lines, from the lowest
    voxel of these vertebrae to the highest, and the radius is that of the median area. Bone is not cut out. Without a
    closed arch there is no canal.

    Parameters
    ----------
    labels : Volume
        VerSe labels.
    """
    middles, areas, ends = [], [], []
    for label in vertebra_labels(labels):
        box = ndimage.find_objects(labels.values == label, max_label=1)[0]
        mask = labels.values[box] == label
        rings = np.stack([ndimage.binary_fill_holes(level) for level in np.moveaxis(mask, 2, 0)], axis=2) & ~mask
        sizes = rings.sum(axis=(0, 1)) * np.prod(labels.spacing_mm[:2])
        closed = sizes >= _RING_MM2
        if closed.any():
            middles.append(np.median(np.argwhere(rings & closed), axis=0) + [s.start for s in box])
            areas.append(np.median(sizes[closed]))
            ends += [box[2].start, box[2].stop]
    canal = np.zeros(labels.values.shape, bool)
    if middles:
        right, anterior, levels = np.array(middles)[np.argsort([middle[2] for middle in middles])].T
        radius_mm = np.sqrt(np.median(areas) / np.pi)
        rows, columns = np.ogrid[: canal.shape[0], : canal.shape[1]]
        for level in range(min(ends), max(ends)):
            off_right = (rows - np.interp(level, levels, right)) * labels.spacing_mm[0]
            off_anterior = (columns - np.interp(level, levels, anterior)) * labels.spacing_mm[1]
            canal[:, :, level] = np.hypot(off_right, off_anterior) < radius_mm
    return canal
