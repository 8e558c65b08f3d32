"""Sacrum and coccyx in the frame of the S1 end plate.

Frame: origin at the centre of the S1 end plate, superior axis along its normal (mm). Sizes: ala width 121 mm
(M), 119 mm (F) and length with coccyx 150 mm (M), 139 mm (F), CT medians (CTSpinoPelvic1K, n = 345/392); the
five segments are fused drums that turn forwards by 62 degrees (kyphosis 60-70).
"""

import numpy as np
from jaxtyping import Float
from torch import Tensor

from spinelib.phantom.arches import Arch, Part
from spinelib.phantom.sdf import DRUM_FIELDS, Outline, directions
from spinelib.phantom.vertebra import VertebraShape, assemble, vertebra_sdf
from spinelib.phantom.warp import random_warp

ALA_WIDTH_MM = {"M": 121.0, "F": 119.0}
LENGTH_MM = {"M": 150.0, "F": 139.0}

_HEIGHTS = np.array([0.20, 0.175, 0.15, 0.125, 0.105, 0.115, 0.13])  # S1..S5 and two coccygeal pieces, of LENGTH
_TURN_DEG = np.array([0.0, 6.0, 21.0, 41.0, 62.0, 70.0, 74.0])  # forward turn of each segment's axis
_WIDTHS = np.array([1.0, 0.72, 0.58, 0.48, 0.42, 0.27, 0.16])  # of the S1 end plate
_DEPTHS = np.array([1.0, 0.70, 0.50, 0.39, 0.31, 0.25, 0.2])


def sacrum_shape(endplate_width_mm: float, endplate_depth_mm: float, sex: str, shape_seed: int) -> VertebraShape:
    """Build a sacrum whose upper plate has the given size; evaluate it with `sacrum_sdf`.

    Raises
    ------
    ValueError
        If `sex` is not 'F' or 'M' or a size is not positive.
    """
    if sex not in ALA_WIDTH_MM or min(endplate_width_mm, endplate_depth_mm) <= 0:
        plate = f"{endplate_width_mm} x {endplate_depth_mm} mm"
        message = f"a sacrum needs sex 'F' or 'M' and an end plate > 0 mm, given {sex!r}, {plate}."
        raise ValueError(message)
    rng = np.random.default_rng([shape_seed, *b"S1"])
    factor = float(np.exp(0.05 * np.clip(rng.standard_normal(), -2, 2)))
    segments = _segments(endplate_width_mm, endplate_depth_mm, LENGTH_MM[sex] * factor)
    parts = [*_bodies(segments), *_wings(segments, ALA_WIDTH_MM[sex] * factor), *_roof(segments)]
    normals = directions(8)
    arch = Arch(tuple(parts), Outline(normals, np.full(8, -200.0)), None, None, 5.0)
    drum = _s1_body(endplate_width_mm, endplate_depth_mm, segments)
    return assemble("S1", drum, arch, random_warp(rng, 45.0))


def subject_sacrum(subject) -> VertebraShape:
    """Return the sacrum of a `population.Subject`, mirrored where the subject is."""
    last = {name: float(subject.dims[name][-1]) for name in ("endplate_width_mm", "endplate_depth_mm")}
    plate = getattr(subject, "sacrum_dims", last)
    shape = sacrum_shape(plate["endplate_width_mm"], plate["endplate_depth_mm"], subject.sex, subject.shape_seed)
    return shape.mirrored() if getattr(subject, "is_mirrored", False) else shape


def sacrum_sdf(
    shape: VertebraShape, points: Float[Tensor, "*batch 3"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return signed distances (mm) to the fused bodies and to sacrum with coccyx; see `vertebra_sdf`."""
    return vertebra_sdf(shape, points)


class _Segment:
    """One fused vertebra: `at(right, forward, up)` gives template points from segment coordinates, mm."""

    def __init__(self, centre, turn_deg, height, width, depth):
        self.centre, self.height, self.width, self.depth = centre, height, width, depth
        angle = np.radians(turn_deg)
        # Turning forwards going down: the axis tips so that its lower end moves to anterior.
        self.axis = np.array([0, -np.sin(angle), np.cos(angle)])
        self.forward = np.array([0, np.cos(angle), np.sin(angle)])

    def at(self, right, forward, up):
        return tuple(self.centre + np.array([right, 0, 0]) + self.forward * forward + self.axis * up)


def _segments(width, depth, length) -> list[_Segment]:
    segments, top = [], np.zeros(3)
    for turn, share, w, d in zip(_TURN_DEG, _HEIGHTS, _WIDTHS, _DEPTHS, strict=False):
        height = share * length
        angle = np.radians(turn)
        axis = np.array([0, -np.sin(angle), np.cos(angle)])
        # The bodies are aligned by their posterior walls, which form the front of the canal.
        segments.append(_Segment(top - axis * height / 2, turn, height, w * width, d * depth))
        top = top - axis * height
    return segments


def _back(segment, first) -> float:
    """Forward offset that aligns a segment's posterior wall with S1's, half way."""
    return -(first.depth - segment.depth) * 0.3


def _s1_body(width, depth, segments) -> dict[str, float]:
    height = segments[0].height
    return dict.fromkeys(DRUM_FIELDS, 0.0) | {
        "half_width": width / 2 * 1.01, "half_depth": depth / 2 * 1.03, "top_offset": 0.4,
        "bottom_offset": -height, "exponent": 2.3, "waist_width": 0.05, "waist_depth": 0.05, "taper": 0.1,
        "wall_concavity": 1.5, "heart": 0.05,
        "dish_top": 0.8, "edge": 2.3, "bottom_anterior_slope": 0.06,
    }  # fmt: skip


def _bodies(segments) -> list[Part]:
    first, parts = segments[0], []
    for s in segments[1:]:
        offset, reach = _back(s, first), 0.36 * s.height
        radii = (0.5 * s.depth, 0.5 * s.width, 0.46 * s.depth, 0.46 * s.width)
        parts.append(
            Part(
                s.at(0, offset, reach),
                s.at(0, offset, -reach),
                radii,
                tuple(s.forward),
                "core",
                3.0,
                bulge=-0.04,
            )
        )
    return parts


def _wings(segments, ala_width) -> list[Part]:
    """Ala, lateral masses and the bars between the four foramina of each side."""
    s1, s2, s3, s4, s5 = segments[:5]
    outer = ala_width / 2
    ala = s1.at(outer - 11.0, -10, -0.2 * s1.height)
    side2, side3 = s2.at(outer - 18, -8, 0), s3.at(0.58 * outer, -8, 0)
    side4, side5 = s4.at(0.45 * outer, -5, 0), s5.at(0.30 * outer, -3, 0)
    bars = [
        Part(s1.at(14, -4, 0.02 * s1.height), ala, (12.5, 13.0, 12.0, 12.0), tuple(s1.axis)),
        Part(ala, side2, (13.0, 11.0, 11.5, 9.0), (0, 1, 0), blend_mm=8.0),
        Part(side2, side3, (9.5, 10.0, 7.0, 7.5), tuple(s2.forward), blend_mm=5.0),
        Part(side3, side4, (7.0, 7.5, 5.0, 6.0), tuple(s3.forward)),
        Part(side4, side5, (5.0, 6.0, 4.0, 5.0), tuple(s4.forward)),
    ]
    for s, side in ((s2, side2), (s3, side3), (s4, side4), (s5, side5)):
        offset = _back(s, s1)
        thickness = 0.34 * s.depth
        bars.append(
            Part(
                s.at(0.3 * s.width, offset, 0),
                side,
                (0.28 * s.height, thickness, 0.3 * s.height, thickness),
                tuple(s.axis),
            )
        )
    return bars


def _roof(segments) -> list[Part]:
    """Laminae and crest behind the sacral canal, articular processes for L5, and the canal itself."""
    s1, s4, parts = segments[0], segments[3], []
    for s, canal_depth in zip(segments[:4], (14.0, 11.0, 8.0, 6.0), strict=False):
        back = _back(s, s1) - s.depth / 2
        start, end = (
            s.at(0.36 * s.width + 5, back - 2, -0.05 * s.height),
            s.at(0.5, back - canal_depth - 4.5, -0.15 * s.height),
        )
        parts.append(Part(start, end, (0.54 * s.height, 3.2, 0.56 * s.height, 3.4), tuple(s.axis), blend_mm=8.0))
        crest = s.at(0, back - canal_depth - 8, -0.2 * s.height)
        parts.append(
            Part(
                s.at(0, back - canal_depth - 3, -0.15 * s.height),
                crest,
                (0.5 * s.height, 4.0, 0.4 * s.height, 2.4),
                tuple(s.axis),
                blend_mm=7.0,
            )
        )
    back = -s1.depth / 2
    facet = Part(
        (0.42 * s1.width, back - 4, -9),
        (0.43 * s1.width, back - 11, 7),
        (7.0, 5.5, 6.5, 4.5),
        (0.7, 0.7, 0),
        blend_mm=5.0,
    )
    canal_end = s4.at(0, _back(s4, s1) - s4.depth / 2 - 3, -0.5 * s4.height)
    middle = segments[1]
    knee = middle.at(0, _back(middle, s1) - middle.depth / 2 - 5.5, -0.3 * middle.height)
    canal = [
        Part((0, back - 7.5, 14), knee, (7.0, 14.5, 5.5, 9.0), (0, 1, 0), carve=True, blend_mm=2.0),
        Part(knee, canal_end, (5.5, 9.0, 3.0, 5.0), (0, 1, 0.5), carve=True, blend_mm=2.0),
    ]
    return [*parts, facet, *canal]
