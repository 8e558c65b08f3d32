"""Posterior elements of vertebrae: pedicles, laminae, processes, facets, dens, atlas ring.

Everything is symmetric about right = 0 here; left-right differences come from the warp of a VertebraShape.
Shape constants follow appendix B of the anatomy fact sheet (Panjabi 1991/1992 proportions). The lumbar
templates were fitted to the mean mesh of the morphable lumbar model of Clouthier et al. (2023, MIT licence).
"""

from typing import NamedTuple

import numpy as np

from spinelib.phantom.sdf import Outline, directions, ellipse_support, polygon_support


class Part(NamedTuple):
    """One capsule of a bone (right side; the left follows by symmetry), mm.

    `group` is 'core' (fused with the body in front of the canal), 'facet' or 'arch' (behind it); parts are
    joined in order with fillet `blend_mm`, or carved out of their group.
    """

    start: tuple
    end: tuple
    radii: tuple
    up: tuple = (0.0, 0.0, 1.0)
    group: str = "arch"
    blend_mm: float = 4.0
    carve: bool = False
    bulge: float = 0.0


class Plate(NamedTuple):
    """Spinous process as a sagittal plate.

    `outline` lies over (anterior, superior), mm; `thickness` is (anterior positions rising (3,),
    half-thicknesses (3,)), mm.
    """

    outline: Outline
    thickness: tuple


class Arch(NamedTuple):
    """All posterior elements of one vertebra, mm.

    `canal` lies over (|right|, anterior); `foramen` is (right, anterior, radius) of the canal of the
    vertebral artery or None.
    """

    parts: tuple[Part, ...]
    canal: Outline
    plate: Plate | None = None
    foramen: tuple | None = None
    body_blend_mm: float = 3.0


CONSTANTS = {
    "cervical": {
        "exponent": 2.6, "waist_width": 0.05, "waist_depth": 0.03, "taper": -0.02, "wall_concavity": 0.4,
        "dish_top": 0.4, "dish_bottom": 1.0, "edge": 1.2, "uncinate": 2.9, "lip": 1.3,
    },
    "thoracic": {
        "exponent": 2.15, "waist_width": 0.12, "waist_depth": 0.08, "taper": -0.02, "wall_concavity": 1.8,
        "heart": 0.10, "dish_top": 1.0, "dish_bottom": 1.6, "edge": 1.8,
    },
    "lumbar": {
        "exponent": 2.25, "waist_width": 0.14, "waist_depth": 0.06, "taper": -0.015, "wall_concavity": 2.2,
        "dish_top": 1.3, "dish_bottom": 1.7, "edge": 2.3,
    },
}  # fmt: skip
"""Constants of the vertebral body by region; names as in sdf.DRUM_FIELDS, absent ones are 0."""

_CANAL_NORMALS = directions(24)[np.abs(np.arange(24) - 12) >= 6]  # half circle: the canal is mirrored


def build_arch(level: str, d: dict[str, float]) -> Arch | None:
    """Return the posterior elements of `level` for dimensions `d` (mm; names of Subject.dims).

    'T13' is built like T12 and 'L6' like L5.
    """
    number = int(level[1:])
    if level == "C1":
        return _atlas(d)
    if level[0] == "C":
        return _cervical(number, d)
    if level[0] == "T":
        return _thoracic(min(number, 12), d)
    return _lumbar(min(number, 5), d)


def _canal(wall, width, depth, triangular) -> Outline:
    """Canal behind the posterior wall at anterior = wall; a blend of an ellipse and a rounded triangle."""
    ellipse = ellipse_support(_CANAL_NORMALS, width / 2, depth / 2) + _CANAL_NORMALS[:, 1] * (wall - depth / 2)
    r = 2.6
    corners = [
        (width / 2 - r, wall - r),
        (width / 2 - 1.1 * r, wall - 0.42 * depth),
        (0.8, wall - depth + r),
        (0, wall - r),
    ]
    triangle = polygon_support(_CANAL_NORMALS, corners) + r
    return Outline(_CANAL_NORMALS, triangular * triangle + (1 - triangular) * ellipse)


def _facet_up(angle_deg):
    return (np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg)), 0.0)


def _ellipsoid(centre, radii, **how) -> Part:
    """Return a part with semi-axes (right, anterior, superior), as a short capsule along superior."""
    right, anterior, superior = radii
    # The caps have radius sqrt(up * across); superior is met by stretching the core segment.
    core = max(superior - np.sqrt(right * anterior), 0.01)
    lower, upper = (tuple(np.add(centre, (0, 0, s * core))) for s in (-1, 1))
    return Part(lower, upper, (right, anterior, right, anterior), up=(1.0, 0.0, 0.0), **how)


def _pedicle(d, wall, right, anterior_end, superior, convergence, start=4.5) -> Part:
    height, width = min(d["pedicle_height_mm"], 0.62 * _height(d) + 2) / 2, d["pedicle_width_mm"] / 2
    radii = (height, width * 1.05, height * 0.95, width)
    return Part((right - convergence, wall + start, superior), (right, anterior_end, superior), radii)


def _height(d):
    return (d["height_anterior_mm"] + d["height_posterior_mm"]) / 2


def _thoracic(number, d) -> Arch:
    h, wall = _height(d), -d["endplate_depth_mm"] / 2
    px, py = (d["canal_width_mm"] + d["pedicle_width_mm"]) / 2, wall - 6.5
    yl, tip, width = wall - d["canal_depth_mm"] - 2.7, wall - d["spinous_length_mm"], d["endplate_width_mm"]
    pz, last = 0.2 * h, number >= 11
    back = {1: 6.0, 2: 8.0, 3: 10.0, 10: 11.0, 11: 9.0, 12: 6.0}.get(number, 13.0)
    rise, big = {11: 0.02, 12: -0.05}.get(number, 0.2) * h, 0.8 if last else 1.0
    end = (d["tp_span_mm"] / 2 - 4.4 * big, py - back, rise + 0.12 * h)
    facet_end = (0.235 * width, yl - 1.0, -0.80 * h) if number == 12 else (0.235 * width, yl + 0.2, -0.66 * h)
    parts = [
        _pedicle(d, wall, px, py, pz, 0.3 if number > 3 else 2.5),
        Part((px + 0.5, py - 0.5, pz + rise - 0.5), end, tuple(big * r for r in (5.6, 4.4, 4.2, 3.6))),
        _ellipsoid(np.subtract(end, (0.4, -0.5, 0)), tuple(big * r for r in (4.3, 4.1, 4.9)), blend_mm=3.0),
        Part((px - 0.8, py - 1, -0.02 * h), (0.3, yl - 0.8, -0.16 * h),
             ((0.31 if last else 0.4) * h, 2.5, (0.33 if last else 0.43) * h, 2.5), up=(0.0, 0.09, 1.0)),
        Part((px - 0.8, py - 2.2, pz), (px - 1.2, py - 4.6, 0.66 * h), (4.9, 2.4, 5.4, 2.1),
             _facet_up(-12), "facet", 2.5),
        Part((0.23 * width, yl + 1.6, -0.15 * h), facet_end, (5.4, 2.6, 5.0, 3.0 if number == 12 else 2.2),
             _facet_up(40 if number == 12 else -12), bulge=0.05),
    ]  # fmt: skip
    if number == 12:
        parts.insert(5, _ellipsoid((px + 2.5, py - 5, 0.3 * h), (3.4, 3.7, 4.4), group="facet", blend_mm=2.5))
    plate = None
    if last:
        plate = _spinous_plate(yl + 1, tip, -0.1 * h - 1, -0.1 * h - 17, 5.0, (4.0, 2.8, 5.0))
    else:
        drop = -0.22 * h - d["spinous_drop_mm"]
        parts.append(
            Part((0, yl - 1.5, -0.22 * h), (0, tip + 3.2, drop), (7.2, 4.2, 4.0, 2.5), (0, 0.2, 1), "arch", 6.0)
        )
        parts.append(_ellipsoid((0, tip + 3.8, drop), (3.4, 3.6, 4.4), blend_mm=2.0))
    return Arch(tuple(parts), _canal(wall - 0.4, d["canal_width_mm"], d["canal_depth_mm"], 0.0), plate)


def _spinous_plate(root, tip, top, bottom, rounding, half_thickness) -> Plate:
    """Return a hatchet from anterior = root to tip; half-thickness at the tip, the middle and the root."""
    r = rounding
    mid = 0.45 * tip + 0.55 * root
    corners = [(root, top - r), (root, 0.5 * (top + bottom)), (tip + r + 1, bottom + r - 4),
               (tip + r, bottom + r - 1), (tip + r, top - 2 * r), (mid, top - r)]  # fmt: skip
    normals = directions(20)
    outline = Outline(normals, polygon_support(normals, corners) + r)
    return Plate(outline, ((tip + 1, tip + 0.33 * (root - tip), root), half_thickness))


def _cervical(number, d) -> Arch:
    h, wall = _height(d), -d["endplate_depth_mm"] / 2
    px, py = (d["canal_width_mm"] + d["pedicle_width_mm"]) / 2 - 1, wall - 6.0
    yl, tip, axis = wall - d["canal_depth_mm"] - 2.4, wall - d["spinous_length_mm"], number == 2
    hp = 13.0 if axis else h  # the posterior elements of the axis hang on its lower half
    low = -(h - hp) / 2
    reach = d["tp_span_mm"] / 2 - 3.6
    parts = [
        _pedicle(d, wall, px, py, low + 0.02 * hp, 5.5),
        Part((px + 0.5, py - 0.5, low), (reach, wall + 1.5, low - 1.2), (4.0, 4.2, 3.2, 4.0)),
        Part((px - 0.8, py - 1, low - 0.5), (0.4, yl - 0.3, low - 0.18 * hp),
             (0.35 * hp, 2.2, 0.37 * hp, 2.2), (0, 0.1, 1)),
        Part((px + 2.0, py - 1.0, low), (px + 2.4, py - 1.0, low + 0.38 * hp), (4.5, 4.1, 4.9, 3.7),
             (1.0, 0, 0), "facet", 2.5),
        Part((px + 1.8, py - 2, low - 1), (px + 1.6, py - 5.6, low - 0.48 * hp), (4.6, 4.2, 4.8, 3.8),
             (1.0, 0, 0), blend_mm=4.5),
        *_cervical_spinous(number, yl, tip, low - 0.25 * hp, low - d["spinous_drop_mm"] * 0.8 - 2.5),
    ]  # fmt: skip
    foramen = (px + 1.6, wall + 2.2, 1.6 if number == 7 else 2.7)
    if axis:
        parts += [*_axis_lamina(d, wall, px, py, low), *_axis_core(h, px)]
        foramen = (px + 2.4, wall + 1.0, 2.4)
    return Arch(tuple(parts), _canal(wall, d["canal_width_mm"], d["canal_depth_mm"], 0.55), None, foramen, 1.8)


def _cervical_spinous(number, root, tip, start_superior, end_superior) -> list[Part]:
    start = (0, root, start_superior)
    if number == 7:
        end = (0, tip + 3.6, end_superior)
        return [Part(start, end, (5.0, 3.4, 4.2, 3.4), blend_mm=6.0)]
    big = 1.25 if number == 2 else 1.0
    end = (0, tip + 5.5, end_superior)
    fork = Part(
        (0, tip + 6.5, end_superior),
        (3.6 * big, tip + 2.4, end_superior - 2),
        (2.6, 2.2, 2.6, 2.4),
        blend_mm=2.0,
    )
    return [Part(start, end, (4.2 * big, 2.8 * big, 3.2 * big, 2.2), blend_mm=6.0), fork]


def _axis_lamina(d, wall, px, py, low) -> list[Part]:
    """Two segments around the deep canal of the axis, which a straight lamina would cut."""
    half, depth = d["canal_width_mm"] / 2, d["canal_depth_mm"]
    knee = (0.85 * half + 1.6, wall - 0.77 * depth - 1.6, low - 1.0)
    back = (0.4, wall - depth - 2.6, low - 2.2)
    radii = (5.0, 2.5, 5.0, 2.4)
    return [
        Part((px, py - 1, low - 0.5), knee, radii, (0, 0.1, 1)),
        Part(knee, back, radii, (0, 0.1, 1), blend_mm=1.0),
    ]


def _axis_core(h, px) -> list[Part]:
    """Dens (17 mm above the body) and the sloping shoulders that carry the atlas."""
    r, top = 5.0, h / 2
    dens = Part(
        (0, 0.5, top - 5),
        (0, -0.7, top + 17 - r),
        (r * 1.05, r * 1.05, r, r * 0.95),
        (1.0, 0, 0),
        "core",
        5.0,
    )
    shoulder = Part((5.5, -1, top - 6.0), (px + 1.0, -2.5, top - 8.0), (4.2, 6.5, 3.6, 6.5), (0.35, 0, 1), "core", 4.0)
    return [dens, shoulder]


def _atlas(d) -> Arch:
    """Ring around the dens: anterior arch, lateral masses, transverse processes, posterior arch.

    The origin lies where the dens passes; the ring's inner faces follow canal width and depth.
    """
    front, half = 8.0, d["canal_width_mm"] / 2
    back = front - d["canal_depth_mm"]
    mass, reach = half + 3.5, d["tp_span_mm"] / 2 - 4.2
    knee, heel = (0.95 * half + 2.0, 0.35 * front + 0.65 * back, 0.5), (0.58 * half + 1.1, back + 0.5, 0)
    facet_cut = dict(group="core", blend_mm=1.5, carve=True)
    parts = [
        Part((0, front + 2.8, 0), (0.62 * half, front + 1.2, 0), (5.0, 2.8, 4.6, 2.7), group="core"),
        Part((0.62 * half, front + 1.2, 0), (mass, front - 5, 0), (4.6, 2.7, 5.2, 3.4),
             group="core", blend_mm=0.8),
        _ellipsoid((mass, -3.0, 0), (7.2, 9.5, 9.0), group="core", blend_mm=3.0),
        _ellipsoid((mass - 1.5, -3.0, 15.5), (8.0, 11.0, 10.0), **facet_cut),
        _ellipsoid((mass - 3.0, -3.0, -17.0), (9.5, 12.0, 9.8), **facet_cut),
        _ellipsoid((0, front + 4.2, -0.5), (3.4, 2.6, 4.2), group="core", blend_mm=2.0),
        Part((mass + 3.5, -4.5, 0), (reach, -6.5, -1.0), (4.4, 6.0, 3.8, 4.2), blend_mm=3.0),
        Part((mass + 1.0, -9.5, 0.5), knee, (3.0, 3.4, 2.9, 2.7), blend_mm=3.0),
        Part(knee, heel,
             (2.9, 2.7, 3.4, 2.6), blend_mm=0.8),
        Part(heel, (0, back - 2.8, -0.5), (3.4, 2.6, 4.0, 2.8), blend_mm=0.8),
        _ellipsoid((0, back - 4.4, -0.5), (3.4, 2.8, 4.2), blend_mm=2.0),
    ]  # fmt: skip
    normals = directions(24)
    nothing = Outline(normals, np.full(24, -100.0))
    return Arch(tuple(parts), nothing, None, (mass + 8.3, -5.5, 2.8), 2.0)


class _Template(NamedTuple):
    """A lumbar arch in its own millimetres with the landmarks that morphometry moves."""

    height: float
    depth: float
    pedicle_right: float
    pedicle_superior: float
    pedicle_end: float
    convergence: float
    canal_depth: float
    tp_tip: float
    spinous_length: float
    parts: tuple[Part, ...]
    corners: tuple
    rounding: float
    thickness: tuple
    blend: float


_L3 = _Template(
    29.5, 39.1, 16.5, 5.1, -23.8, 0.7, 13.0, 46.2, 49.2,
    (
        Part((17.0, -24.3, 3.3), (42.7, -33.4, 5.0), (6.7, 4.4, 5.2, 2.4)),
        Part((15.7, -24.8, -0.3), (0.3, -29.2, 3.9), (9.5, 2.0, 10.2, 2.0), (0, 6.9, 7.3)),
        Part((15.1, -25.8, 3.8), (8.5, -37.0, -15.4), (2.0, 3.0, 7.1, 3.7), (0, 0.35, 1)),
        Part((16.8, -28.5, 5.1), (15.2, -32.8, 14.8), (5.3, 9.5, 5.9, 8.6), _facet_up(33), "facet"),
        Part((9.4, -36.4, 9.3), (8.9, -36.9, 26.8), (5.9, 6.8, 5.9, 6.8),
             group="facet", blend_mm=1.2, carve=True),
        _ellipsoid((19.4, -40.1, 11.2), (4.2, 4.6, 5.4), group="facet", blend_mm=2.5),
        Part((6.5, -30.1, -2.4), (13.5, -35.9, -22.6), (6.0, 2.0, 3.4, 6.5),
             _facet_up(39), blend_mm=4.5, bulge=0.14),
    ),
    ((-60.8, -4.6), (-61.4, -8.6), (-60.9, -11.8), (-56.5, -15.6), (-39.4, -5.7), (-35.9, -1.4)),
    7.25, (4.9, 3.0, 6.0), 5.0,
)  # fmt: skip
_L5 = _Template(
    28.3, 37.2, 24.2, 4.3, -17.3, 6.0, 14.5, 51.0, 41.6,
    (
        Part((24.7, -17.8, 0.4), (47.5, -27.2, 4.1), (5.6, 9.5, 5.3, 2.6)),
        Part((23.4, -18.3, 4.0), (0.3, -30.3, -1.2), (9.0, 2.6, 8.7, 2.6), (0, 7.7, 6.4)),
        Part((21.4, -26.2, -0.1), (13.9, -34.8, -13.3), (2.5, 6.0, 7.6, 3.2), (0, 0.35, 1)),
        Part((20.9, -24.0, 4.3), (20.0, -29.5, 14.1), (4.0, 8.6, 4.4, 7.8), _facet_up(56), "facet"),
        Part((14.2, -31.4, 10.5), (13.7, -31.9, 26.1), (5.1, 5.9, 5.1, 5.9),
             group="facet", blend_mm=1.2, carve=True),
        _ellipsoid((24.4, -34.8, 7.4), (4.7, 5.1, 6.1), group="facet", blend_mm=2.5),
        Part((10.2, -27.9, -5.1), (21.8, -34.4, -17.5), (4.2, 2.2, 2.9, 6.8),
             _facet_up(46), blend_mm=4.5, bulge=0.18),
    ),
    ((-51.4, -9.9), (-54.5, -12.2), (-53.1, -16.8), (-41.5, -9.9), (-36.1, -3.5)),
    5.7, (4.5, 3.1, 6.5), 5.0,
)  # fmt: skip


def _lumbar(number, d) -> Arch:
    template = _L5 if number == 5 else _L3
    move, scale = _landmark_map(template, d)
    wall = -d["endplate_depth_mm"] / 2
    px = (d["canal_width_mm"] + d["pedicle_width_mm"]) / 2
    end = move((0, template.pedicle_end, template.pedicle_superior))
    # A slope of the start keeps wide L5 pedicles on the body.
    pedicle = _pedicle(d, wall, px, end[1], end[2], template.convergence)
    parts = [
        pedicle,
        *(
            p._replace(start=move(p.start), end=move(p.end), radii=tuple(scale * r for r in p.radii))
            for p in template.parts
        ),
    ]
    normals = directions(20)
    corners = [move((0, *c))[1:] for c in template.corners]
    outline = Outline(normals, polygon_support(normals, corners) + template.rounding * scale)
    tip, root = wall - d["spinous_length_mm"], move((0, -30.0, 0))[1]
    plate = Plate(outline, ((tip + 1, tip + 0.33 * (root - tip), root), template.thickness))
    triangular = {1: 0.45, 2: 0.7, 3: 0.9}.get(number, 1.0)
    canal = _canal(wall - 0.4, d["canal_width_mm"], d["canal_depth_mm"], triangular)
    return Arch(tuple(parts), canal, plate, None, template.blend)


def _landmark_map(t: _Template, d):
    """Return (move, scale): piecewise-linear motion of template points through the anatomical landmarks.

    Landmarks are pedicle and transverse tip (right), wall, canal rear, spinous tip (anterior), body height.
    """
    height, depth = _height(d), d["endplate_depth_mm"]
    px, wall0, wall = (d["canal_width_mm"] + d["pedicle_width_mm"]) / 2, -t.depth / 2, -depth / 2
    rights = [0, t.pedicle_right, t.tp_tip], [0, px, d["tp_span_mm"] / 2]
    backs = (
        [-100, 0, t.canal_depth, t.spinous_length],
        [-100 * depth / t.depth, 0, d["canal_depth_mm"], d["spinous_length_mm"]],
    )

    def move(point):
        right, anterior, superior = point
        moved = (
            np.interp(right, *rights),
            wall - np.interp(wall0 - anterior, *backs),
            superior * height / t.height,
        )
        return tuple(float(value) for value in moved)

    return move, float(np.sqrt(height / t.height * depth / t.depth))
