"""`spinelib predict --ap A --lat B --centroids C`: two radiographs and marked body centres in, one standing spine out.

The frame is that of the X-ray room: RAS+ mm from the point where the two central rays meet, which go through the
middles of the two images. Pixels are counted as in `spinelib.imaging.point_pairs`.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import torch
import trimesh
from scipy import ndimage
from torch import nn

from spinelib.errors import InputError
from spinelib.figures import use_house_style
from spinelib.geometry import Projection
from spinelib.imaging.cone_beam import ConeBeam, triangulate
from spinelib.imaging.point_pairs import PointPairs, read_point_pairs, require_inside, view_doubts
from spinelib.imaging.radiograph_pairs import PATCH, PIXEL_MM, VIEWS, cube_affine, cut_out, patch_corner
from spinelib.imaging.readers import read_projection, write_volume
from spinelib.levels import COLOURS, T1_TO_L5
from spinelib.models.biplanar import load_variant, read_card
from spinelib.models.biplanar_data import MARKED, cube_to_patch, discs, next_bodies, normalised
from spinelib.radiograph_figures import radiograph_pair
from spinelib.report import page, result_folder, written_together
from spinelib.spine import Spine
from spinelib.stacking import FOREGROUND, PredictedVertebra, Stack, stack
from spinelib.vertebra_figures import vertebrae_3d

FILES = (
    "spine.npz",
    "spine.glb",
    "spine.stl",
    "meshes",
    "mask.nii.gz",
    "vertebrae.csv",
    "angles.csv",
    "preview.png",
    "prediction.json",
    "index.html",
)

VARIANT = "ours"
GAP_FLAG_MM, GAP_REFUSED_MM = 6.0, 15.0
"""Distance between the two rays of a vertebra that is flagged; and, as the median of all, that is refused."""

OVERLAP_FLAG_MM3 = 1000.0
"""Volume that two neighbours both claim; true ones, sampled at 1 mm, reach 600 where their facets meet."""

_OPTIONS = ("--ap", "--lat")
_SQUARE, _SAME_HEIGHT = 0.01, 0.01
_OUTSIDE_SHARE = 0.05  # of a patch
_SPAN = 6.0  # line integrals that the greys of an image are spread over; patches are normalised later
_AT_ONCE = 4  # vertebrae


@dataclass(frozen=True)
class StandingSpine:
    """Result for two radiographs.

    Attributes
    ----------
    stack : Stack
    table : DataFrame
        One row a vertebra, top to bottom: level, right_mm, anterior_mm, superior_mm (body centre), ray_gap_mm (distance
        between its two rays), network_level (what the network takes it for), volume_cm3, rotation_deg.
    flags : list of str
        What a user should look at.
    """

    stack: Stack
    table: pd.DataFrame
    flags: list[str]


def radiographs_command(args) -> int:
    """Serve `spinelib predict --ap --lat --centroids`; returns the exit code.

    Raises
    ------
    InputError
        If an input is missing or does not fit; then nothing is written.
    """
    given = {"--ap": args.ap, "--lat": args.lat, "--centroids": args.centroids}
    missing = [name for name, value in given.items() if not value]
    if missing or args.inputs or args.ct or args.segment:
        wrong = f"{', '.join(missing)} missing" if missing else "another input besides"
        message = f"two radiographs need --ap IMAGE --lat IMAGE --centroids POINTS and nothing else, given {wrong}."
        raise InputError(message)
    network = load_variant(VARIANT, args.weights)
    pairs = read_point_pairs(args.centroids)
    spacing = tuple(args.spacing) if args.spacing else None
    images = tuple(read_projection(path, spacing_mm=spacing) for path in (args.ap, args.lat))
    beams = beams_of(images, args.source_detector, args.source_object)
    out = result_folder(args.output, FILES, args.force)
    start = perf_counter()
    values = tuple(image.values[0] for image in images)
    result = predict_pair(values, beams, pairs, network)
    about = {
        "source": f"radiographs {Path(args.ap).name} and {Path(args.lat).name}, points {Path(args.centroids).name}",
        "seconds": round(perf_counter() - start, 2),
        "beams": dict(zip(VIEWS, (beam.to_dict() for beam in beams), strict=True)),
        "weights": read_card(args.weights),
    }
    write_standing_spine(result, values, beams, out, about)
    for flag in result.flags:
        warnings.warn(flag, stacklevel=1)
    cobb = result.stack.spine.angles["vertebral_cobb_deg"]
    print(f"{out / 'index.html'}: {_summary(result)}, Cobb {cobb:.1f}°, {len(result.flags)} warnings")
    return 0


def beams_of(images: Sequence[Projection], source_detector_mm: float, source_object_mm: float) -> tuple:
    """Return the beams of a frontal and a lateral image, whose central rays meet in the world's origin.

    Raises
    ------
    InputError
        If the frontal image says that it is lateral, pixels are not square, or the images differ in height.
    """
    if images[0].grid.view == "sagittal":
        message = "the image given as --ap says that it is a lateral view. Fix: swap the files of --ap and --lat."
        raise InputError(message)
    for option, image in zip(_OPTIONS, images, strict=True):
        row, col = image.grid.spacing_mm
        if abs(row / col - 1) > _SQUARE:
            message = f"{option}: expected square pixels, given {row} x {col} mm. Fix: resample the image."
            raise InputError(message)
    heights = [image.grid.shape[0] * image.grid.spacing_mm[0] for image in images]
    if abs(heights[0] / heights[1] - 1) > _SAME_HEIGHT:
        message = (
            f"expected images of one height, as the central ray meets the middle row of each, given {heights[0]:.0f} "
            f"and {heights[1]:.0f} mm. Fix: cut or pad them alike, or check --spacing."
        )
        raise InputError(message)
    makers = (ConeBeam.frontal, ConeBeam.lateral)
    return tuple(
        make((0, 0, 0), image.grid.shape, image.grid.spacing_mm[0], source_detector_mm, source_object_mm)
        for make, image in zip(makers, images, strict=True)
    )


def predict_pair(
    images: Sequence[np.ndarray], beams: Sequence[ConeBeam], pairs: PointPairs, network: nn.Module
) -> StandingSpine:
    """Return the spine that two radiographs show.

    Parameters
    ----------
    images : two of ndarray (rows, cols)
        Frontal, lateral; bone bright, any scale.
    beams : two of ConeBeam
        Of these images.
    pairs : PointPairs
    network : Module
        With `predict(batch)`, see `spinelib.models.biplanar`.

    Raises
    ------
    InputError
        For points outside the images, views whose rays miss each other, or if the network finds nothing.
    """
    require_inside(pairs, beams)
    centres, residual = triangulate(beams, pairs.points_rc)
    gaps = 2 * residual  # the point found lies midway between its two rays
    if np.median(gaps) > GAP_REFUSED_MM:
        message = (
            f"the two views do not fit together: rays of the same vertebra pass {np.median(gaps):.0f} mm apart "
            f"(median), expected less than {GAP_FLAG_MM:.0f}. Fix: check that both are of one person and posture, that "
            "levels match, and --spacing, --source-detector and --source-object."
        )
        raise InputError(message)
    flags = view_doubts(pairs.levels, beams, pairs.points_rc)
    fine = [_on_patch_pixels(image, beam) for image, beam in zip(images, beams, strict=True)]
    shares, found = _predicted(network, fine, centres)
    shaped = (shares >= FOREGROUND).any(axis=(1, 2, 3))
    if not shaped.any():
        message = "the network finds no vertebra at any point. Fix: check the points and that bone is bright."
        raise InputError(message)
    vertebrae = [PredictedVertebra(*one) for one in zip(pairs.levels, centres, shares, strict=True)]
    together = stack([v for v, there in zip(vertebrae, shaped, strict=True) if there], "two radiographs")
    table = _table(pairs.levels, centres, gaps, found, together.spine)
    flags += quality_flags(table, together.contacts)
    flags += _beyond([beam for _, beam in fine], pairs.levels, centres)
    return StandingSpine(together, table, flags)


def quality_flags(table: pd.DataFrame, contacts: pd.DataFrame) -> list[str]:
    """Return what makes a table of `StandingSpine` and the contacts of its `Stack` doubtful."""
    flags = [
        f"{row.level}: its rays pass {row.ray_gap_mm:.0f} mm apart"
        for row in table.itertuples()
        if row.ray_gap_mm > GAP_FLAG_MM
    ]
    rises = [f"{a.level} below {b.level}" for a, b in _neighbours(table) if a.superior_mm <= b.superior_mm]
    if rises:
        flags.append(f"levels are out of order: {', '.join(rises)}")
    lost = table.loc[table["volume_cm3"].isna(), "level"]
    if len(lost):
        flags.append(f"nothing was found at {', '.join(lost)}")
    steps = table["network_level"].map(T1_TO_L5.index) - table["level"].map(T1_TO_L5.index)
    if (steps != 0).mean() > 0.5:
        flags.append(
            f"the network takes {int((steps != 0).sum())} of {len(steps)} vertebrae for another level, by "
            f"{steps.median():+.0f}: check the numbering"
        )
    return flags + [
        f"{row.upper} and {row.lower} overlap by {row.overlap_mm3 / 1000:.1f} cm³, given to the more probable one"
        for row in contacts.itertuples()
        if row.overlap_mm3 > OVERLAP_FLAG_MM3
    ]


def write_standing_spine(result: StandingSpine, images, beams, out: Path, about: dict) -> None:
    """Write all FILES into an existing folder; they appear together once all are made.

    Parameters
    ----------
    result : StandingSpine
    images, beams
        As for `predict_pair`, for the picture.
    out : Path
    about : dict
        Goes to prediction.json; 'source' also to the page.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    use_house_style()
    with written_together(out, FILES) as folder:
        _write_files(folder, result, images, beams, about)


# --- predicting ---


def _on_patch_pixels(image, beam) -> tuple[np.ndarray, ConeBeam]:
    """Return an image on pixels of `PIXEL_MM`, smoothed before it is thinned, and its beam."""
    ratio = PIXEL_MM / np.linalg.norm(beam.row_step_mm)
    low, high = np.percentile(image, [0.5, 99.5])
    values = _SPAN * (image.astype(np.float32) - low) / max(float(high - low), 1e-6)
    values = ndimage.gaussian_filter(values, max(0.0, (ratio - 1) / 2))
    shape = tuple(int(n // ratio) for n in beam.shape)
    first = (ratio - 1) / 2  # of the old pixels, where the new ones begin
    values = ndimage.affine_transform(values, [ratio, ratio], first, shape, order=1, mode="nearest")
    steps = beam.col_step_mm * ratio, beam.row_step_mm * ratio
    return values.clip(min=0), ConeBeam(beam.source_mm, beam.detector_mm((first, first)), *steps, shape)


def _predicted(network, views, centres) -> tuple[np.ndarray, list[str]]:
    """Return probabilities (n, 64, 64, 64) and the levels that the network reads."""
    if network.annotation not in MARKED:
        message = (
            f"these weights were trained with the annotation {network.annotation!r}, expected one of: "
            f"{', '.join(map(repr, MARKED))}. Fix: spinelib train transvert --variant {VARIANT} --annotation n2v"
        )
        raise InputError(message)
    items = [_item(views, centres, number, network.annotation) for number in range(len(centres))]
    shares, levels = [], []
    for start in range(0, len(items), _AT_ONCE):
        some = items[start : start + _AT_ONCE]
        share, level = network.predict({key: torch.stack([item[key] for item in some]) for key in some[0]})
        shares.append(share.numpy())
        levels += [T1_TO_L5[index] for index in level.tolist()]
    return np.concatenate(shares), levels


def _item(views, centres, number, annotation) -> dict[str, torch.Tensor]:
    """Return the input of a vertebra, as `models.biplanar_data.BiplanarDataset` makes it."""
    item, centre = {}, centres[number]
    marks = next_bodies(centres, number) if annotation == "n2v" else ()
    for name, (values, beam) in zip(VIEWS, views, strict=True):
        corner = patch_corner(beam, centre)
        patch = normalised(cut_out(values, corner, PATCH))
        item[name] = np.stack([patch, discs(beam, corner, centre, marks)])
        item[f"cube_to_{name}"] = cube_to_patch(beam, cube_affine(centre), corner)
    return {key: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for key, value in item.items()}


def _beyond(beams, levels, centres) -> list[str]:
    """Return flags for vertebrae whose patches reach beyond an image."""
    flags = []
    for name, beam in zip(VIEWS, beams, strict=True):
        corners = [patch_corner(beam, centre) for centre in centres]
        seen = [
            np.prod(np.clip(np.minimum(corner + PATCH, beam.shape) - np.maximum(corner, 0), 0, None))
            for corner in corners
        ]
        cut = [level for level, pixels in zip(levels, seen, strict=True) if pixels < (1 - _OUTSIDE_SHARE) * PATCH**2]
        if cut:
            flags.append(f"the {name} image ends too near to {', '.join(cut)}")
    return flags


def _table(levels, centres, gaps, found, spine: Spine) -> pd.DataFrame:
    volumes = {level: mesh.volume / 1000 for level, mesh in zip(spine.levels, spine.meshes, strict=True)}
    table = pd.DataFrame(centres, columns=["right_mm", "anterior_mm", "superior_mm"])
    table.insert(0, "level", levels)
    return table.assign(
        ray_gap_mm=gaps,
        network_level=found,
        volume_cm3=[volumes.get(level, np.nan) for level in levels],
        rotation_deg=[spine.angles.get(f"rotation_{level}_deg", np.nan) for level in levels],
    )


def _neighbours(table):
    rows = list(table.itertuples())
    return zip(rows[:-1], rows[1:], strict=True)


# --- writing ---


def _write_files(folder, result, images, beams, about):
    spine, meshes = result.stack.spine, dict(zip(result.stack.spine.levels, result.stack.spine.meshes, strict=True))
    angles = {name: value for name, value in spine.angles.items() if not name.startswith("rotation_")}
    spine.save(folder / "spine.npz")
    spine.export_stl(folder / "spine.stl")
    (folder / "meshes").mkdir()
    for level, mesh in meshes.items():
        (folder / "meshes" / f"{level}.stl").write_bytes(mesh.export(file_type="stl"))
        mesh.visual.vertex_colors = trimesh.visual.color.hex_to_rgba(COLOURS[level])
    spine.export_glb(folder / "spine.glb")
    write_volume(folder / "mask.nii.gz", result.stack.labels)
    result.table.to_csv(folder / "vertebrae.csv", index=False, float_format="%.3f")
    pd.DataFrame(angles.items(), columns=["angle", "value"]).to_csv(
        folder / "angles.csv", index=False, float_format="%.3f"
    )
    radiograph_pair(images, beams, spine, title=_summary(result)).savefig(folder / "preview.png")
    (folder / "prediction.json").write_text(json.dumps(about | _record(result), indent=1))
    html = page(
        "Standing spine from two radiographs",
        [vertebrae_3d(meshes)],
        tables={
            "Angles (degrees unless mm)": {name: f"{value:.1f}" for name, value in angles.items()},
            "Vertebrae": {row.level: _described(row) for row in result.table.itertuples()},
        },
        images=[folder / "preview.png"],
        notes=[f"Source: {about['source']}.", "Contours are those of the predicted surfaces, projected back."],
        warnings=result.flags,
    )
    (folder / "index.html").write_text(html, encoding="utf-8")


def _record(result):
    rows = result.table.replace({np.nan: None}).round(3).to_dict("records")
    return {
        "vertebrae": rows,
        "angles": {name: round(float(value), 3) for name, value in result.stack.spine.angles.items()},
        "contacts": result.stack.contacts.round(3).to_dict("records"),
        "flags": result.flags,
        "frame": "RAS+ mm from the point where the central rays meet; mask.nii.gz holds VerSe labels",
        "notice": "Research software, not a medical device.",
    }


def _summary(result):
    levels = result.stack.spine.levels
    return f"{len(levels)} vertebrae, {levels[0]} to {levels[-1]}" if len(levels) > 1 else f"1 vertebra, {levels[0]}"


def _described(row):
    if not np.isfinite(row.volume_cm3):
        return "not found"
    return f"{row.volume_cm3:.1f} cm³; axial rotation {row.rotation_deg:+.1f}°; rays {row.ray_gap_mm:.1f} mm apart"
