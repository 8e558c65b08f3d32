"""`spinelib predict --register CT MR --labels CT_MASK`: a CT laid on an MR, every vertebra moved as a rigid body.

Images are written on the voxels of the MR's file. Motions take a point of the MR to its point in the CT, RAS+ mm.
"""

import json
import warnings
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from time import perf_counter

import nibabel as nib
import numpy as np
import pandas as pd

from spinelib import __version__
from spinelib.deformation import DisplacementField, warp_labels, warp_volume, write_field, write_itk_transform
from spinelib.errors import InputError
from spinelib.figures import use_house_style
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.ct import AIR_HU
from spinelib.imaging.pairs import RegistrationPair, read_pair
from spinelib.imaging.readers import read_scan, write_volume
from spinelib.models.ctmr import SHIPPED_WEIGHTS, held_variants, load_variant, read_card
from spinelib.polyrigid import register_polyrigid
from spinelib.record import package_versions
from spinelib.registration_evaluation import Method, network_method
from spinelib.registration_figures import checkerboard, overlay, vertebrae_before_after
from spinelib.registration_metrics import DIRECTIONS, pose_table, registration_errors
from spinelib.report import page, result_folder, written_together

FILES = (
    "ct_in_mr.nii.gz",
    "labels_in_mr.nii.gz",
    "displacement.nii.gz",
    "displacement.h5",
    "vertebrae.csv",
    "overlay.png",
    "checkerboard.png",
    "registration.json",
    "index.html",
)

RESIDUAL_FLAG_MM = 0.1
"""Root mean square distance of the field from a rigid motion over a vertebra; more is flagged."""

COARSE_MM, LEAST_SIDE_MM = 5.0, 20.0
"""MR slices thicker than this are flagged; an MR thinner than this along an axis is refused."""

_HU_LIKE, _HU_LIKE_SHARE = -150.0, 0.05  # an MR with values below, and below this share of its largest, is a CT
_PACKAGES = ("numpy", "scipy", "torch", "simpleitk", "nibabel")


@dataclass(frozen=True)
class RegisteredPair:
    """Result for a CT and an MR.

    Attributes
    ----------
    field : DisplacementField
        MR to CT, on the MR's grid.
    transforms : dict of int to ndarray (4, 4)
        Rigid motion of each vertebra, MR world mm to CT world mm.
    table : DataFrame
        One row a vertebra, top to bottom: the columns of `registration_metrics.pose_table`, procrustes_residual_mm
        (distance of the field from the rigid motion, root mean square over the vertebra), those of `polyrigid.refine`,
        and the motion as matrix_00 to matrix_33, rows first.
    flags : list of str
        What a user should look at.
    """

    field: DisplacementField
    transforms: dict[int, np.ndarray]
    table: pd.DataFrame
    flags: list[str]


def register_command(args) -> int:
    """Serve `spinelib predict --register CT MR --labels CT_MASK`; returns the exit code.

    Raises
    ------
    InputError
        If an input is missing or does not fit, or the two images cannot be registered; then nothing is written.
    """
    others = (args.inputs, args.ct, args.segment, args.ap, args.lat, args.centroids, args.spacing)
    if not args.register or not args.labels or any(others):
        given = "another input besides" if args.register and args.labels else "one of the two alone"
        message = f"a registration needs --register CT MR and --labels CT_MASK and nothing else, given {given}."
        raise InputError(message)
    method, soft = soft_tissue(args.weights)
    start = perf_counter()
    pair, header = read_images(*args.register, args.labels)
    out = result_folder(args.output, FILES, args.force)
    read = perf_counter()
    found = register_pair(pair, method)
    seconds = {"read": read - start, "register": perf_counter() - read}
    names = [Path(path).name for path in (*args.register, args.labels)]
    about = {
        "source": f"CT {names[0]} and MR {names[1]}, CT labels {names[2]}",
        "inputs": dict(zip(("ct", "mr", "labels"), names, strict=True)),
        "soft_tissue": soft,
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
    }
    write_registration(pair, header, found, out, about)
    for flag in found.flags:
        warnings.warn(flag, stacklevel=1)
    print(f"{out / 'index.html'}: {_summary(found)}, {len(found.flags)} warnings, {sum(seconds.values()):.0f} s")
    return 0


def soft_tissue(weights=None) -> tuple[Method | None, dict | str]:
    """Return what moves tissue far from bone, and its description; None is the rigid alignment of the spine.

    Parameters
    ----------
    weights : path, optional
        Of a network of `spinelib train ctmr`; by default those shipped, if there are any.

    Raises
    ------
    InputError
        If weights are given, or shipped, and cannot be read.
    """
    if weights is None and not files("spinelib").joinpath("weights", SHIPPED_WEIGHTS).is_file():
        return None, "no network: no weights are shipped; tissue far from bone follows the rigid alignment of the spine"
    variant = held_variants(weights)[0]
    return network_method(load_variant(variant, weights)), {"network": variant} | read_card(weights)


def read_images(ct, mr, labels) -> tuple[RegistrationPair, nib.Nifti1Header]:
    """Read and check the files of a registration.

    Parameters
    ----------
    ct, mr : path
        NIfTI files or folders of a DICOM series.
    labels : path
        VerSe labels on the grid of the CT.

    Returns
    -------
    pair : RegistrationPair
    header : Nifti1Header
        Grid and order of axes of the MR's file, see `read_scan`.

    Raises
    ------
    InputError
        As `imaging.pairs.read_pair`; also for an MR that is too thin, or swapped with the CT.
    """
    image, header = read_scan(mr)
    size = np.array(image.values.shape) * image.spacing_mm
    if size.min() < LEAST_SIDE_MM:
        message = (
            f"{Path(mr).name} covers {' x '.join(f'{side:.0f}' for side in size)} mm; expected at least "
            f"{LEAST_SIDE_MM:.0f} mm along every axis. Fix: pass all slices of the MR as one volume."
        )
        raise InputError(message)
    low, high = float(image.values.min()), float(image.values.max())
    if low < min(_HU_LIKE, -_HU_LIKE_SHARE * high):
        message = (
            f"{Path(mr).name} is given as the MR, but falls to {low:.0f} like a CT; a signal is not negative. Are CT "
            "and MR swapped? Fix: spinelib predict --register CT MR --labels CT_MASK, in this order."
        )
        raise InputError(message)
    return read_pair(None, ct=ct, ct_mask=labels, mr=mr), header


def register_pair(pair: RegistrationPair, soft_method: Method | None = None) -> RegisteredPair:
    """Register a pair; soft tissue and the starts of the vertebrae follow the field of `soft_method`, if given.

    Raises
    ------
    InputError
        If the images do not show the same part of the spine.
    """
    soft = None if soft_method is None else soft_method(pair)[0]
    found = register_polyrigid(pair.ct, pair.ct_labels, pair.mr, soft)
    warped = warp_labels(pair.ct_labels, found.field)
    fit = registration_errors(found.field, warped, pair.ct_labels)[["label", "procrustes_residual_mm"]]
    table = pose_table(found.transforms, pair.ct_labels).merge(fit, how="left", on="label")
    scores = found.flags.drop(columns="level").astype({"score_start": float, "score": float, "in_view": float})
    table = table.merge(scores, how="left", on="label")
    entries = np.stack([found.transforms[label] for label in table["label"]]).reshape(-1, 16)
    names = [f"matrix_{row}{column}" for row in range(4) for column in range(4)]
    table = table.join(pd.DataFrame(entries, columns=names))
    flags = [*pair.flags, *quality_flags(table, found.field)]
    return RegisteredPair(found.field, found.transforms, table, flags)


def quality_flags(table: pd.DataFrame, field: DisplacementField) -> list[str]:
    """Return what makes a table of `RegisteredPair` and its field doubtful."""
    flags = [f"{row.level}: {row.reason}" for row in table.itertuples() if row.reason]
    flags += [
        f"{row.level} is not moved as a rigid body: the field is {row.procrustes_residual_mm:.2f} mm off"
        for row in table.itertuples()
        if row.procrustes_residual_mm > RESIDUAL_FLAG_MM
    ]
    folded = 100 * float((np.linalg.det(field.jacobian()) <= 0).mean())
    if folded:
        flags.append(f"the field folds in {folded:.2g}% of the voxels")
    if field.grid.spacing_mm.max() > COARSE_MM:
        flags.append(f"MR slices are {field.grid.spacing_mm.max():.1f} mm apart: expect less certain positions")
    return flags


def write_registration(
    pair: RegistrationPair, header: nib.Nifti1Header, found: RegisteredPair, out: Path, about: dict
) -> None:
    """Write all FILES into an existing folder; they appear together once all are made.

    Parameters
    ----------
    pair : RegistrationPair
    header : Nifti1Header
        Of the MR's file, see `read_images`.
    found : RegisteredPair
    out : Path
    about : dict
        Goes to registration.json; 'source' also to the page.

    Raises
    ------
    InputError
        If the folder cannot be written.
    """
    use_house_style()
    with written_together(out, FILES) as folder:
        _write_volumes(folder, pair, header, found.field)
        found.table.rename(columns={"reason": "flag"}).to_csv(
            folder / "vertebrae.csv", index=False, float_format="%.6f"
        )
        overlay(pair.mr, pair.ct_labels, found.field, title=_summary(found)).savefig(folder / "overlay.png")
        checkerboard(pair.ct, pair.ct_labels, pair.mr, found.field).savefig(folder / "checkerboard.png")
        record = about | _record(found)
        (folder / "registration.json").write_text(json.dumps(record, indent=1))
        html = page(
            "CT registered to MR",
            [
                vertebrae_before_after(
                    pair.ct_labels, found.transforms, title="Vertebrae as in the CT, and carried to the MR"
                )
            ],
            tables={
                "Vertebrae, from MR to CT": {row["level"]: _described(row) for row in found.table.to_dict("records")}
            },
            images=[folder / "overlay.png", folder / "checkerboard.png"],
            notes=[
                f"Source: {about['source']}.",
                "Before is where the headers place the CT; grey in the 3D scene, dashed in the picture.",
            ],
            warnings=found.flags,
        )
        (folder / "index.html").write_text(html, encoding="utf-8")


# --- writing ---


def _write_volumes(folder, pair, header, field):
    """Write warped images and the field on the voxels of the MR's file."""
    warped = warp_volume(pair.ct, field, fill=AIR_HU)
    hounsfield = np.clip(np.rint(warped.values), -32768, 32767).astype(np.int16)
    labels = warp_labels(pair.ct_labels, field)
    affine = header.get_best_affine()
    write_volume(folder / "ct_in_mr.nii.gz", Volume(_as_stored(hounsfield, affine), affine))
    write_volume(folder / "labels_in_mr.nii.gz", Volume(_as_stored(labels.values, affine), affine))
    values = _as_stored(field.values, affine)
    stored = DisplacementField(values, VolumeGrid(values.shape[:3], affine))
    write_field(folder / "displacement.nii.gz", stored)
    write_itk_transform(folder / "displacement.h5", stored)


def _as_stored(values, affine):
    """Return values on RAS axes (R, A, S, ...) in the order of a file's axes."""
    ras, stored = nib.io_orientation(np.eye(4)), nib.io_orientation(affine)
    return nib.apply_orientation(values, nib.orientations.ornt_transform(ras, stored))


def _record(found):
    versions = package_versions()
    return {
        "method": "one rigid motion a vertebra, found in the images, and a field that is exactly these in bone",
        "vertebrae": found.table.replace({np.nan: None}).round(6).to_dict("records"),
        "flags": found.flags,
        "versions": {"spinelib": __version__} | {name: versions[name] for name in _PACKAGES},
        "frame": "RAS+ mm; matrices and the field take MR to CT, files of the field hold LPS mm as ITK reads them",
        "notice": "Research software, not a medical device.",
    }


def _summary(found):
    levels = found.table["level"].tolist()
    return f"{len(levels)} vertebrae, {levels[0]} to {levels[-1]}" if len(levels) > 1 else f"1 vertebra, {levels[0]}"


def _described(row):
    turn = ", ".join(f"{row[f'rotation_{name}_deg']:+.1f}" for name in DIRECTIONS)
    way = ", ".join(f"{row[f'translation_{name}_mm']:+.1f}" for name in DIRECTIONS)
    explained = f"the CT explains {100 * row['score']:.0f}% of the MR"
    return f"rotation {turn}°, translation {way} mm (right, anterior, superior); {explained}"
