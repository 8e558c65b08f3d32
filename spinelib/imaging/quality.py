"""Is this image an upright coronal view of a torso? Heuristics without learning.

Everything is measured in millimetres and relative to the image's own contrast, so the intensity scale of the
scanner does not matter.
"""

import numpy as np
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import Projection

MIN_HEIGHT_MM, MIN_WIDTH_MM = 250.0, 150.0
_BLOCK_MM = 80.0
_ROTATED = 1.3  # horizontal band over vertical band from which an image counts as lying on its side
_FAINT_BAND, _ASYMMETRIC = 0.25, 0.30


def image_quality(projection: Projection) -> dict:
    """Judge a projection.

    Parameters
    ----------
    projection : Projection
        Any channels; 'bone' shows the band of the spine, 'tissue' the outline, else the first channel does
        both.

    Returns
    -------
    dict
        score : float, 0 (useless) to 1; reasons : list of str, empty when nothing is wrong; height_mm,
        width_mm : extent of the body; spine_band, lying_band : how far a vertical or horizontal dense band
        stands out (contrast over spread); symmetry : correlation of the two sides.
    """
    bone, tissue = _scaled(projection, "bone"), _scaled(projection, "tissue")
    if bone is None or tissue is None:
        return {"score": 0.0, "reasons": ["the image is blank"], **dict.fromkeys(_MEASURES, 0.0)}
    spacing = projection.grid.spacing_mm
    body = _body(tissue, spacing)
    height, width = _extent(body, spacing)
    band = _band(bone, body, spacing)
    lying = _band(bone.T, body.T, spacing[::-1])
    symmetry = _symmetry(tissue, body, spacing)
    reasons = []
    if height < MIN_HEIGHT_MM or width < MIN_WIDTH_MM:
        reasons.append(f"the body measures only {height:.0f} x {width:.0f} mm (height x width)")
    if lying > _ROTATED * band:
        reasons.append("the dense band runs across the image: it seems to be turned by 90 degrees")
    elif band < _FAINT_BAND:
        reasons.append("no vertical dense band (spine) stands out")
    if symmetry < _ASYMMETRIC:
        reasons.append("left and right do not look alike")
    if _upside_down(tissue, body, spacing):
        reasons.append("the upper part is denser or wider than the lower one: it seems to be upside down")
    parts = [min(1, height / MIN_HEIGHT_MM), min(1, width / MIN_WIDTH_MM), _share(band, lying)]
    parts += [np.clip(band / (2 * _FAINT_BAND), 0, 1), np.clip(symmetry / (2 * _ASYMMETRIC), 0, 1)]
    score = float(np.prod(parts) ** (1 / len(parts))) * 0.6 ** len(reasons)
    return {"score": score, "reasons": reasons} | dict(
        zip(_MEASURES, map(float, (height, width, band, lying, symmetry)), strict=True)
    )


def require_torso(projection: Projection) -> dict:
    """Refuse an image that plainly is not an upright coronal torso; returns `image_quality` otherwise.

    Raises
    ------
    InputError
        Blank image, sagittal view, a field of view or body too small for a torso, or a spine lying across the
        image.
    """
    if projection.grid.view != "coronal":
        message = f"expected a coronal (front) image, given a {projection.grid.view} one. Fix: pass the front view."
        raise InputError(message)
    shape, spacing = projection.grid.shape, projection.grid.spacing_mm
    field = (shape[0] * spacing[0], shape[1] * spacing[1])
    if field[0] < MIN_HEIGHT_MM or field[1] < MIN_WIDTH_MM:
        message = (
            f"the image covers {field[0]:.0f} x {field[1]:.0f} mm (height x width), expected at least "
            f"{MIN_HEIGHT_MM:.0f} x {MIN_WIDTH_MM:.0f} mm of a torso: a hand, a knee, or a wrong pixel size? "
            f"Fix: pass a whole-body or torso scan and check the spacing (now {spacing[0]} x {spacing[1]} "
            "mm)."
        )
        raise InputError(message)
    quality = image_quality(projection)
    if quality["height_mm"] == 0:
        message = "the image is blank. Fix: export it again with the anatomy visible."
        raise InputError(message)
    if quality["lying_band"] > _ROTATED * quality["spine_band"] and quality["lying_band"] > _FAINT_BAND:
        message = (
            "the spine seems to run across the image (turned by 90 degrees?). Expected head up, patient's "
            "right on "
            "the left side. Fix: rotate the image and swap the two spacings."
        )
        raise InputError(message)
    if quality["height_mm"] < MIN_HEIGHT_MM * 0.8 or quality["width_mm"] < MIN_WIDTH_MM * 0.8:
        message = (
            f"the body in the image measures {quality['height_mm']:.0f} x {quality['width_mm']:.0f} mm "
            "(height x "
            f"width), expected a torso of at least {MIN_HEIGHT_MM:.0f} x {MIN_WIDTH_MM:.0f} mm: a hand, a "
            "knee, or "
            "a wrong pixel size? Fix: pass a whole-body or torso scan and check the spacing."
        )
        raise InputError(message)
    return quality


_MEASURES = ("height_mm", "width_mm", "spine_band", "lying_band", "symmetry")


def _scaled(projection, name):
    """Channel between its 1st and 99th percentile as 0 to 1, or None when blank."""
    values = projection.channel(name if name in projection.channels else projection.channels[0])
    low, high = np.percentile(values, [1, 99])
    return np.clip((values - low) / (high - low), 0, 1) if high > low else None


def _body(tissue, spacing):
    """Largest connected region above the background, holes filled."""
    smooth = ndimage.gaussian_filter(tissue, [3 / s for s in spacing])
    labels, count = ndimage.label(smooth > 0.12)
    if count == 0:
        return np.zeros(tissue.shape, bool)
    return ndimage.binary_fill_holes(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]))


def _extent(body, spacing):
    """Height and width of the body in mm; stray pixels do not count."""
    return tuple(
        float(np.count_nonzero(body.sum(axis=1 - axis) * spacing[1 - axis] > 15) * spacing[axis]) for axis in (0, 1)
    )


def _band(bone, body, spacing):
    """How far a vertical dense band stands out.

    In every block of 80 mm height: the peak of the block's mean profile in the middle of the body, over its
    surroundings, divided by the spread of the image in the body. The upper quartile over the blocks forgives
    head, pelvis and legs; peaks that jump from block to block count less.
    """
    spread = bone[body].std() if body.any() else 0.0
    rows = max(4, round(_BLOCK_MM / spacing[0]))
    heights, columns = [], []
    for start in range(0, max(1, body.shape[0] - rows // 2), rows):
        block = slice(start, start + rows)
        inside = body[block].sum(axis=0)
        present = np.flatnonzero(inside > rows // 4)
        if len(present) * spacing[1] < 60:
            continue
        profile = (bone[block] * body[block]).sum(axis=0) / np.maximum(inside, 1)
        fine = ndimage.gaussian_filter1d(profile, 6 / spacing[1])
        excess = fine - ndimage.gaussian_filter1d(profile, 45 / spacing[1])
        quarter = len(present) // 4
        middle = present[quarter : len(present) - quarter]
        columns.append(middle[np.argmax(excess[middle])])
        heights.append(excess[columns[-1]])
    if not heights or spread == 0:
        return 0.0
    jump_mm = np.percentile(np.abs(np.diff(columns)), 30) * spacing[1] if len(columns) > 1 else 0.0
    return float(max(0.0, np.percentile(heights, 75)) / spread / (1 + (jump_mm / 30) ** 2))


def _symmetry(tissue, body, spacing):
    """Best correlation of the smooth image with its mirror about a column near the body's middle."""
    smooth = ndimage.gaussian_filter(tissue, [4 / s for s in spacing])
    middle = _middle(body)
    reach = max(1, round(24 / spacing[1]))
    return max(_mirror_correlation(smooth, body, middle + d) for d in range(-reach, reach + 1, max(1, reach // 4)))


def _mirror_correlation(smooth, body, middle):
    half = min(middle, smooth.shape[1] - 1 - middle)
    if half < 4:
        return 0.0
    strip = slice(middle - half, middle + half + 1)
    either = body[:, strip] | body[:, strip][:, ::-1]
    left, right = smooth[:, strip][either], smooth[:, strip][:, ::-1][either]
    return float(np.corrcoef(left, right)[0, 1]) if left.size > 10 and left.std() > 0 else 0.0


def _middle(body):
    return round(float(np.nonzero(body)[1].mean())) if body.any() else body.shape[1] // 2


def _share(band, lying):
    return float(band / (band + lying)) if band > 0 else 0.0


def _upside_down(tissue, body, spacing):
    """Whether the flanks (40 to 110 mm beside the spine) say that lungs and head are at the bottom."""
    offset = np.abs(np.arange(tissue.shape[1]) - _middle(body)) * spacing[1]
    flank = (offset > 40) & (offset < 110)
    rows = np.flatnonzero(body.any(axis=1))
    if len(rows) < 8:
        return False
    filled = tissue[rows][:, flank].mean(axis=1)
    third = len(rows) // 3
    return bool(filled[:third].mean() > 1.15 * filled[-third:].mean())
