"""Vertebrae C1 to L6 as signed distance functions, calibrated to requested dimensions.

Local frame: origin at the vertebral body centre, axes right, anterior, superior (mm).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import trimesh
from jaxtyping import Float
from skimage.measure import marching_cubes
from torch import Tensor

from spinelib.levels import region
from spinelib.phantom.arches import CONSTANTS, Arch, Part, Plate, build_arch
from spinelib.phantom.calibration import calibrate_drums
from spinelib.phantom.family import STANDARD
from spinelib.phantom.sdf import (
    DRUM_FIELDS,
    Capsules,
    Outline,
    capsule_distances,
    drum_distance,
    drum_faces,
    make_capsules,
    outline_distance,
    smooth_max,
    smooth_min,
)
from spinelib.phantom.warp import Warp, random_warp, warp_points

_JITTER = 0.08  # relative spread of shape constants between people (appendix B of the anatomy facts: 8-10 %)
_CORE_BLEND_MM = 5.0


@dataclass(frozen=True)
class VertebraShape:
    """Everything `vertebra_sdf` needs, in local millimetres.

    Attributes
    ----------
    level : str
    drum : dict of str to float or None
        Body as named in sdf.DRUM_FIELDS; None for C1, whose body is the anterior arch and lateral masses.
    parts : tuple of Part
    capsules : Capsules
        The same parts stacked for evaluation.
    canal : Outline
    plate : Plate or None
    foramen : tuple or None
    body_blend_mm : float
    warp : Warp
        Smooth random displacement; the only left-right asymmetry beside the coronal wedge.
    is_mirrored : bool
        Whether right and left are swapped when evaluating.
    bounds_mm : ndarray, shape (3, 2)
        Box that holds the surface with at least 1 mm to spare.
    """

    level: str
    drum: dict[str, float] | None
    parts: tuple[Part, ...]
    capsules: Capsules
    canal: Outline
    plate: Plate | None
    foramen: tuple | None
    body_blend_mm: float
    warp: Warp
    is_mirrored: bool
    bounds_mm: np.ndarray

    def mirrored(self) -> "VertebraShape":
        """Return the mirrored patient's shape, whose distance at (-r, a, s) is this one's at (r, a, s)."""
        bounds = self.bounds_mm.copy()
        bounds[0] = -bounds[0, ::-1]
        return replace(self, is_mirrored=not self.is_mirrored, bounds_mm=bounds)


def vertebra_shapes(
    levels: Sequence[str],
    dims: Mapping[str, np.ndarray],
    shape_seed: int,
    degeneration: Mapping[str, np.ndarray] | None = None,
    is_mirrored: bool = False,
    relief: float = 1.0,
) -> tuple[VertebraShape, ...]:
    """Build and calibrate the vertebrae of one person.

    Parameters
    ----------
    levels : sequence of str, cranial to caudal
    dims : mapping of str to ndarray (n,)
        As in `Subject.dims`, millimetres; `coronal_wedge_deg` > 0 is taller on the patient's right. Realised
        end-plate width and depth and anterior and posterior height equal the request within 0.2 mm
        (see `calibration.measure_drums` for where they are measured).
    shape_seed : int
        Drives the jitter of the shape constants (8 %) and the smooth warp. Each level has its own stream, so
        a level keeps its shape when others are added.
    degeneration : mapping of str to ndarray (n,), optional
        'osteophyte_mm': outward growth of the rims, on top of the calibrated body. (Disc narrowing and wedge
        fractures are part of `dims`.)
    is_mirrored : bool
        Whether to return the mirror image of the person whose coronal wedges are the negative of `dims`'s.
    relief : float
        Factor on waists, dishes, concavities and lips of the bodies, see `Family`.

    Raises
    ------
    ValueError
        If `dims` lacks a column, has the wrong length or a dimension that is not positive.
    """
    levels = tuple(levels)
    rows = _dim_rows(levels, dims, -1.0 if is_mirrored else 1.0)
    streams = [np.random.default_rng([shape_seed, *level.encode()]) for level in levels]
    warps = [
        random_warp(rng, 0.5 * (row["endplate_width_mm"] + row["endplate_depth_mm"]))
        for rng, row in zip(streams, rows, strict=False)
    ]
    drums = [_drum_constants(level, rng, relief) for level, rng in zip(levels, streams, strict=False)]
    arches = [_jittered(build_arch(level, row), rng) for level, row, rng in zip(levels, rows, streams, strict=False)]
    has_body = [i for i, level in enumerate(levels) if level != "C1"]
    fitted = calibrate_drums([drums[i] for i in has_body], [warps[i] for i in has_body], [rows[i] for i in has_body])
    growth = (degeneration or {}).get("osteophyte_mm", np.zeros(len(levels)))
    bodies = {i: drum | {"lipping": float(growth[i])} for i, drum in zip(has_body, fitted, strict=False)}
    shapes = [assemble(level, bodies.get(i), arches[i], warps[i]) for i, level in enumerate(levels)]
    return tuple(shape.mirrored() if is_mirrored else shape for shape in shapes)


def subject_shapes(subject) -> tuple[VertebraShape, ...]:
    """Return `vertebra_shapes` of a `population.Subject`, mirrored where the subject is."""
    return vertebra_shapes(
        subject.levels,
        subject.dims,
        subject.shape_seed,
        subject.degeneration,
        getattr(subject, "is_mirrored", False),
        getattr(subject, "family", STANDARD).relief,
    )


def vertebra_sdf(
    shape: VertebraShape, points: Float[Tensor, "*batch 3"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return the signed distances (mm, < 0 inside) to the vertebral body and to the whole vertebra.

    Parameters
    ----------
    shape : VertebraShape
    points : tensor (..., 3), local mm, CPU or GPU

    Returns
    -------
    body, whole : tensors (...), float32
        `whole` <= `body`: the body is part of the whole.
    """
    local = warped_points(shape, points)
    folded = _folded_right(local)
    distances = capsule_distances(shape.capsules, folded)
    groups = _fold(shape.parts, distances)
    core = groups.get("core")
    if shape.drum is None:
        body = core
    else:
        body = drum_distance(shape.drum, local)
        body = body if core is None else smooth_min(body, core, _CORE_BLEND_MM)
    arch = groups["arch"] if "facet" not in groups else smooth_min(groups["arch"], groups["facet"], 2.5)
    if shape.plate is not None:
        arch = smooth_min(arch, _plate_distance(shape.plate, folded), 6.0)
    arch = smooth_max(arch, -outline_distance(shape.canal, folded[0], folded[1]), 2.0)
    whole = smooth_min(body, arch, shape.body_blend_mm)
    if shape.foramen is not None:
        right, anterior, radius = shape.foramen
        hole = radius - ((folded[0] - right) ** 2 + (folded[1] - anterior) ** 2 + 1e-9).sqrt()
        # The canal of the vertebral artery runs through the transverse process, never through the body.
        whole = torch.minimum(smooth_max(whole, hole, 0.8), body)
    batch = points.shape[:-1]
    return body.reshape(batch), whole.reshape(batch)


def body_faces(shape: VertebraShape, points: Float[Tensor, "*batch 3"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances (...) to the side wall, above the upper and below the lower plate of a body, mm.

    Raises
    ------
    ValueError
        For C1, which has no body.
    """
    if shape.drum is None:
        message = f"{shape.level} has no vertebral body."
        raise ValueError(message)
    return tuple(face.reshape(points.shape[:-1]) for face in drum_faces(shape.drum, warped_points(shape, points)))


def body_sdf(shape: VertebraShape, points: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch"]:
    """Return the first distance of `vertebra_sdf` alone, without the cost of the arch."""
    local = warped_points(shape, points)
    rows = [i for i, part in enumerate(shape.parts) if part.group == "core"]
    body = None if shape.drum is None else drum_distance(shape.drum, local)
    if rows:
        c = shape.capsules
        some = Capsules(c.frames[:, rows], c.starts[rows], c.ends[rows], c.radii[rows], c.bulge[rows])
        core = _fold([shape.parts[i] for i in rows], capsule_distances(some, _folded_right(local)))["core"]
        body = core if body is None else smooth_min(body, core, _CORE_BLEND_MM)
    return body.reshape(points.shape[:-1])


def vertebra_mesh(shape: VertebraShape, spacing_mm: float = 1.0) -> trimesh.Trimesh:
    """Return the closed surface of a vertebra in local mm (marching cubes, largest component)."""
    return sdf_mesh(lambda points: vertebra_sdf(shape, points)[1], shape.bounds_mm, spacing_mm)


def sdf_mesh(distance, bounds_mm, spacing_mm: float) -> trimesh.Trimesh:
    """Return the largest closed zero surface of `distance` (points (..., 3) -> (...)) inside a box (3, 2)."""
    axes = [torch.arange(lower, upper + spacing_mm, spacing_mm, dtype=torch.float32) for lower, upper in bounds_mm]
    values = distance(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)).numpy()
    return surface_mesh(values, [float(axis[0]) for axis in axes], spacing_mm)


def surface_mesh(values: np.ndarray, origin_mm, spacing_mm: float) -> trimesh.Trimesh:
    """Return the largest closed zero surface of sampled distances (right, anterior, superior)."""
    padded = np.pad(values, 1, constant_values=float(spacing_mm))
    vertices, faces, _, _ = marching_cubes(padded, 0.0, spacing=(spacing_mm,) * 3)
    mesh = trimesh.Trimesh(vertices - spacing_mm + np.asarray(origin_mm), faces[:, ::-1], process=True)
    pieces = mesh.split(only_watertight=False)
    mesh = max(pieces, key=lambda piece: len(piece.faces)) if len(pieces) > 1 else mesh
    if mesh.volume < 0:
        mesh.invert()
    return mesh


def warped_points(shape: VertebraShape, points: Tensor) -> Tensor:
    """Return the points as rows (3, N) of the symmetric, unwarped template frame."""
    rows = points.reshape(-1, 3).T.to(torch.float32)
    if shape.is_mirrored:
        rows = torch.stack([-rows[0], rows[1], rows[2]])
    return warp_points(shape.warp, rows.contiguous())


def _folded_right(local: Tensor) -> Tensor:
    """Replace right by |right|, rounded so that the midline keeps a normal."""
    return torch.cat([(local[:1] ** 2 + 1e-4).sqrt(), local[1:]])


def _fold(parts, distances) -> dict[str, Tensor]:
    groups: dict[str, Tensor] = {}
    for part, distance in zip(parts, distances, strict=False):
        if part.group not in groups:
            groups[part.group] = distance
        elif part.carve:
            groups[part.group] = smooth_max(groups[part.group], -distance, part.blend_mm)
        else:
            groups[part.group] = smooth_min(groups[part.group], distance, part.blend_mm)
    return groups


def _plate_distance(plate: Plate, folded: Tensor) -> Tensor:
    (tip, mid, root), (at_tip, at_mid, at_root) = plate.thickness
    anterior = folded[1]
    toward_tip, toward_root = (
        ((mid - anterior) / (mid - tip)).clamp(0, 1),
        ((anterior - mid) / (root - mid)).clamp(0, 1),
    )
    half = at_mid + (at_tip - at_mid) * toward_tip**2 + (at_root - at_mid) * toward_root**2
    return smooth_max(outline_distance(plate.outline, anterior, folded[2]), folded[0] - half, 4.0)


def _dim_rows(levels, dims, wedge_sign) -> list[dict[str, float]]:
    """Return one dict of floats per level, checked."""
    needed = (
        "height_anterior_mm", "height_posterior_mm", "endplate_width_mm", "endplate_depth_mm",
        "canal_width_mm", "canal_depth_mm", "pedicle_width_mm", "pedicle_height_mm", "tp_span_mm",
        "spinous_length_mm", "spinous_drop_mm",
    )  # fmt: skip
    missing = [name for name in needed if name not in dims]
    wrong = [name for name in needed if name in dims and np.shape(dims[name]) != (len(levels),)]
    if missing or wrong:
        message = f"dims needs one value per level ({len(levels)}); missing: {missing}, wrong length: {wrong}."
        raise ValueError(message)
    rows = []
    for i, level in enumerate(levels):
        row = {name: float(dims[name][i]) for name in needed}
        bad = [
            k
            for k, v in row.items()
            if not (v > 0 or k == "spinous_drop_mm") and not (level == "C1" and k not in _ATLAS_DIMS)
        ]
        if bad:
            message = f"dimensions of {level} must be positive, given { ({name: row[name] for name in bad}) }."
            raise ValueError(message)
        wedge = np.asarray(dims.get("coronal_wedge_deg", np.zeros(len(levels))), float)[i]
        row["coronal_wedge_deg"] = wedge_sign * float(np.nan_to_num(wedge))
        if level == "C1":
            row["endplate_width_mm"] = row["endplate_depth_mm"] = 17.0  # sets the scale of the warp only
        rows.append(row)
    return rows


_ATLAS_DIMS = ("canal_width_mm", "canal_depth_mm", "tp_span_mm")


def _drum_constants(level, rng, relief) -> dict[str, float]:
    """Return the jittered body constants of a level; the geometry fields are filled by the calibration."""
    constants = dict.fromkeys(DRUM_FIELDS, 0.0) | CONSTANTS[region(level)]
    number = int(level[1:])
    if level[0] == "T":
        constants["heart"] += 0.16 * max(0.0, 1 - abs(number - 7) / 5)
    if level == "C2":
        constants |= {"uncinate": 0.0, "lip": 0.8}
    factors = np.exp(_JITTER * np.clip(rng.standard_normal(len(DRUM_FIELDS)), -2.2, 2.2))
    exponent = 2 + (constants["exponent"] - 2) * factors[DRUM_FIELDS.index("exponent")]
    return {name: relief * constants[name] * factor for name, factor in zip(DRUM_FIELDS, factors, strict=False)} | {
        "exponent": exponent
    }


def _jittered(arch: Arch, rng) -> Arch:
    """Vary the thickness of all processes by 8 % and their ends by 0.6 mm; pedicles keep their dimensions."""
    parts = []
    for i, part in enumerate(arch.parts):
        factors = np.exp(_JITTER * np.clip(rng.standard_normal(4), -2.2, 2.2))
        shift = 0.6 * np.clip(rng.standard_normal(3), -2.2, 2.2)
        if i > 0 and not part.carve:
            # Ellipsoids move as a whole; midline ends stay on the midline.
            shift[0] *= part.end[0] > 1.0
            start = np.add(part.start, shift) if np.allclose(part.start[:2], part.end[:2]) else part.start
            part = part._replace(
                start=tuple(start), end=tuple(np.add(part.end, shift)), radii=tuple(factors * part.radii)
            )
        parts.append(part)
    return arch._replace(parts=tuple(parts))


def assemble(level: str, drum: dict[str, float] | None, arch: Arch, warp: Warp) -> VertebraShape:
    """Stack body, arch and warp into a shape."""
    parts = arch.parts
    capsules = make_capsules(*([getattr(p, k) for p in parts] for k in ("start", "end", "radii", "up", "bulge")))
    bounds = _bounds(drum, arch)
    return VertebraShape(
        level,
        drum,
        parts,
        capsules,
        arch.canal,
        arch.plate,
        arch.foramen,
        arch.body_blend_mm,
        warp,
        False,
        bounds,
    )


def _bounds(drum, arch: Arch) -> np.ndarray:
    """Box around drum, parts and plate with 3.5 mm for fillets, warp and margin."""
    boxes = []
    for part in arch.parts:
        if not part.carve:
            ends, reach = np.array([part.start, part.end]), max(part.radii)
            boxes.append(np.stack([ends.min(0) - reach, ends.max(0) + reach], 1))
    if drum is not None:
        a, b = drum["half_width"] * 1.05 + drum["lipping"], drum["half_depth"] * 1.05 + drum["lipping"]
        tilt = max(
            abs(drum[f"{p}_{s}_slope"]) * r for p in ("top", "bottom") for s, r in (("right", a), ("anterior", b))
        )
        boxes.append(
            [
                [-a, a],
                [-b, b],
                [drum["bottom_offset"] - tilt - drum["lip"], drum["top_offset"] + tilt + drum["uncinate"]],
            ]
        )
    if arch.plate is not None:
        normals, offsets = arch.plate.outline
        span = [[-offsets[np.argmin(normals[:, i])], offsets[np.argmax(normals[:, i])]] for i in (0, 1)]
        boxes.append([[-5, 5], *span])
    boxes = np.array(boxes)
    bounds = np.stack([boxes[:, :, 0].min(0) - 3.5, boxes[:, :, 1].max(0) + 3.5], 1)
    bounds[0] = np.abs(bounds[0]).max() * np.array([-1, 1])
    return bounds
