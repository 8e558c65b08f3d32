"""`spinelib predict --segment`: one CT in, its vertebrae out: mask, centroids, table, meshes, picture, offline page."""

import json
import sys
import warnings
from pathlib import Path
from time import perf_counter

import numpy as np
import pandas as pd
import trimesh

from spinelib.errors import InputError
from spinelib.figures import use_house_style
from spinelib.geometry import Volume
from spinelib.imaging.readers import read_scan, write_like
from spinelib.imaging.surfaces import vertebra_meshes
from spinelib.imaging.verse import write_centroids
from spinelib.levels import COLOURS, LEVEL_OF_LABEL, region
from spinelib.models.vertebrae import Segmentation, VertebraSegmenter
from spinelib.report import page, result_folder, written_together
from spinelib.spine import Spine
from spinelib.vertebra_figures import segmentation_panels, vertebrae_3d

FILES = (
    "mask.nii.gz",
    "centroids.json",
    "vertebrae.csv",
    "meshes",
    "spine.glb",
    "preview.png",
    "prediction.json",
    "index.html",
)

VOLUMES_CM3 = {"cervical": (4, 56), "thoracic": (10, 66), "lumbar": (19, 96)}
STEPS_MM = {"cervical": (10, 38), "thoracic": (13, 41), "lumbar": (17, 50)}
"""Plausible volumes, and distances of a body's centre to the next one below: about a third to half the smallest to 1.5
times the largest of 37 vertebrae in four scans of VerSe. What lies outside is flagged."""

FEWEST_VERTEBRAE = 3
COARSE_MM, COARSEST_MM = 3.0, 6.0
"""Voxels longer than this are flagged, and refused."""

_LEAST_SIDE_MM = 30.0
_FAT_HU, _BONE_HU, _LEAST_BONE_CM3 = -50.0, 150.0, 5.0
_SAMPLES = 128  # along an axis, to judge a scan


def segment_command(args) -> int:
    """Serve `spinelib predict --segment`; returns the exit code.

    Raises
    ------
    InputError
        If the input is no CT of a spine or the results cannot be written; then none is.
    """
    if args.inputs or args.ct or args.spacing:
        message = "--segment CT takes no other input, --ct or --spacing: a volume carries its own voxel size."
        raise InputError(message)
    segmenter = VertebraSegmenter.load(args.weights)
    out = result_folder(args.output, FILES, args.force)
    start = perf_counter()
    ct, header = read_scan(args.segment)
    require_ct(ct, args.segment)
    read = perf_counter()
    found = segmenter.segment(ct)
    seconds = {"read": read - start, "segment": perf_counter() - read}
    flags = write_segmentation(ct, header, found, out, f"CT {Path(args.segment).name}", seconds)
    for flag in flags:
        warnings.warn(flag, stacklevel=1)
    print(f"{out / 'index.html'}: {_summary(found)}, {sum(seconds.values()):.0f} s")
    return 0


def require_ct(ct: Volume, name) -> None:
    """Refuse a volume that plainly is not a CT of a piece of spine in Hounsfield units.

    Raises
    ------
    InputError
        Too small a field of view, too thick slices, no value of fat or air (MR, mask, offset units), or no bone.
    """
    size, spacing = np.array(ct.values.shape) * ct.spacing_mm, ct.spacing_mm
    if size.min() < _LEAST_SIDE_MM or spacing.max() > COARSEST_MM:
        message = (
            f"{name} covers {_millimetres(size)} in voxels of {_millimetres(spacing, 2)}; expected at least "
            f"{_LEAST_SIDE_MM:.0f} mm along every axis and voxels of at most {COARSEST_MM:.0f} mm. "
            "Fix: pass the series with thin slices and a whole vertebra in it."
        )
        raise InputError(message)
    sparse = ct.values[tuple(slice(None, None, max(1, n // _SAMPLES)) for n in ct.values.shape)]
    low, high = np.percentile(sparse, (1, 99.9))
    if low > _FAT_HU:
        message = (
            f"{name} is not a CT in Hounsfield units: its values run from {low:.0f} to {high:.0f}, where fat would be "
            "-100 and air -1000. Is it an MR, a mask, or a CT stored without its offset? "
            "Fix: convert it again from DICOM, or add the rescale intercept (often -1024)."
        )
        raise InputError(message)
    bone_cm3 = float((sparse >= _BONE_HU).mean()) * size.prod() / 1000
    if bone_cm3 < _LEAST_BONE_CM3:
        message = (
            f"{name} shows no bone: {bone_cm3:.1f} cm³ reach {_BONE_HU:.0f} HU, a vertebra has more than "
            f"{_LEAST_BONE_CM3:.0f} cm³. Fix: pass a CT of the spine in Hounsfield units."
        )
        raise InputError(message)


def write_segmentation(ct: Volume, header, found: Segmentation, out: Path, source: str, seconds: dict) -> list[str]:
    """Write all FILES of a segmentation into an existing folder; returns what a user should look at.

    Files appear together once all are made; those of an earlier result are replaced.

    Parameters
    ----------
    ct : Volume
    header : Nifti1Header
        Of the file that the CT came from, see `read_scan`.
    found : Segmentation
    out : Path
    source : str
        What was segmented, for the page.
    seconds : dict of str to float
        Time by step.

    Raises
    ------
    InputError
        If there is no complete vertebra, or the folder cannot be written.
    """
    if not any(vertebra.complete for vertebra in found.found):
        message = (
            f"no complete vertebra found in the {source} ({len(found.found)} cut by its border). Expected a CT with "
            "at least one whole vertebra. Fix: check that it shows a spine and that its header is right."
        )
        raise InputError(message)
    use_house_style()
    table = vertebra_table(found)
    flags = [*found.flags, *quality_flags(table, ct.spacing_mm)]
    with written_together(out, FILES) as folder:
        _write_files(folder, ct, header, found, table, flags, source, seconds)
    return flags


def vertebra_table(found: Segmentation) -> pd.DataFrame:
    """Return one row per vertebra, top to bottom.

    Returns
    -------
    DataFrame
        level, label, state ('complete' or 'cut'), right_mm, anterior_mm, superior_mm of the body's centre, volume_cm3
        (of complete ones), to_next_mm (to the centre below), level_probability.
    """
    voxel_cm3 = np.prod(found.labels.spacing_mm) / 1000
    # Slice by slice: bincount works on 8 bytes a voxel.
    voxels = sum(np.bincount(plane.ravel(), minlength=256) for plane in np.moveaxis(found.labels.values, 2, 0))
    centres = np.array([vertebra.centroid_mm for vertebra in found.found], float).reshape(-1, 3)
    return pd.DataFrame(
        {
            "level": [LEVEL_OF_LABEL[vertebra.label] for vertebra in found.found],
            "label": [vertebra.label for vertebra in found.found],
            "state": ["complete" if vertebra.complete else "cut" for vertebra in found.found],
            "right_mm": centres[:, 0],
            "anterior_mm": centres[:, 1],
            "superior_mm": centres[:, 2],
            "volume_cm3": [voxels[v.label] * voxel_cm3 if v.complete else np.nan for v in found.found],
            "to_next_mm": [*np.linalg.norm(np.diff(centres, axis=0), axis=1), np.nan][: len(centres)],
            "level_probability": [vertebra.level_probability for vertebra in found.found],
        }
    )


def quality_flags(table: pd.DataFrame, spacing_mm) -> list[str]:
    """Return what makes a `vertebra_table` doubtful, given the voxel size of its scan."""
    flags = []
    whole = int((table["state"] == "complete").sum())
    if whole < FEWEST_VERTEBRAE:
        flags.append(f"only {whole} complete vertebra{'e' if whole > 1 else ''}: the levels rest on little")
    if np.max(spacing_mm) > COARSE_MM:
        flags.append(f"voxels are {np.max(spacing_mm):.1f} mm long: expect coarse surfaces and missed vertebrae")
    regions = table["level"].map(region)
    for name, limits, unit in (("volume_cm3", VOLUMES_CM3, "cm³"), ("to_next_mm", STEPS_MM, "mm")):
        low, high = (regions.map({key: ends[side] for key, ends in limits.items()}) for side in (0, 1))
        odd = table[(table[name] < low) | (table[name] > high)]
        what = "implausible volume" if unit == "cm³" else "implausible distance to the next vertebra"
        flags += [f"{what}: {row.level} {getattr(row, name):.0f} {unit}" for row in odd.itertuples()]
    return flags


def _write_files(folder, ct, header, found, table, flags, source, seconds):
    write_like(folder / "mask.nii.gz", found.labels, header)
    centroids = {vertebra.label: vertebra.centroid_mm for vertebra in found.found if vertebra.complete}
    write_centroids(folder / "centroids.json", centroids, header.get_best_affine())
    table.to_csv(folder / "vertebrae.csv", index=False, float_format="%.3f")
    meshes = vertebra_meshes(found.labels)
    _write_meshes(folder, meshes)
    segmentation_panels(ct, found.labels, title=f"{_summary(found)}").savefig(folder / "preview.png")
    record = _record(found, table, flags, source, seconds)
    (folder / "prediction.json").write_text(json.dumps(record, indent=1))
    html = page(
        "Vertebrae from one CT",
        [vertebrae_3d(meshes)],
        tables={"Vertebrae": {row.level: _described(row) for row in table.itertuples()}},
        images=[folder / "preview.png"],
        notes=[f"Source: {source}.", "Level colours are the same in the picture, the 3D scene and spine.glb."],
        warnings=flags,
    )
    (folder / "index.html").write_text(html, encoding="utf-8")


def _write_meshes(folder, meshes):
    (folder / "meshes").mkdir()
    for level, mesh in meshes.items():
        (folder / "meshes" / f"{level}.stl").write_bytes(mesh.export(file_type="stl"))
        colour = trimesh.visual.color.hex_to_rgba(COLOURS[level])
        mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=np.tile(colour, (len(mesh.vertices), 1)))
    Spine(levels=tuple(meshes), meshes=tuple(meshes.values())).export_glb(folder / "spine.glb")


def _record(found, table, flags, source, seconds):
    measures = {
        row.level: {
            "volume_cm3": _number(row.volume_cm3),
            "to_next_mm": _number(row.to_next_mm),
            "level_probability": _number(row.level_probability),
        }
        for row in table.itertuples()
    }
    return {
        "source": source,
        "vertebrae": {state: table.loc[table["state"] == state, "level"].tolist() for state in ("complete", "cut")},
        "flags": flags,
        "measures": measures,
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
        "peak_gb": _peak_gb(),
        "frame": "centres in RAS+ mm; mask and centroids.json on the voxels of the input file",
        "notice": "Research software, not a medical device.",
    }


def _number(value):
    """Return a rounded number, or None for what is not known: JSON has no NaN."""
    return round(float(value), 3) if np.isfinite(value) else None


def _peak_gb():
    """Return the largest memory of this process in GB (1e9 bytes), None on Windows, which does not count it so."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)


def _summary(found):
    levels = [LEVEL_OF_LABEL[vertebra.label] for vertebra in found.found if vertebra.complete]
    return f"{len(levels)} vertebrae, {levels[0]} to {levels[-1]}" if len(levels) > 1 else f"1 vertebra, {levels[0]}"


def _described(row):
    volume = f"{row.volume_cm3:.1f} cm³" if np.isfinite(row.volume_cm3) else "cut by the border of the scan"
    return f"{volume}; level probability {row.level_probability:.2f}"


def _millimetres(sizes, digits=0):
    return " x ".join(f"{size:.{digits}f}" for size in sizes) + " mm"
