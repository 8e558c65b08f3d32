"""Labelled CT scans and the files of the VerSe challenge (Sekuboyina 2021, Med Image Anal 73:102166).

Images lie on disk in any orientation and are turned to the nearest RAS axes when read; points are world RAS mm
in memory. VerSe writes points as numbers along the axes of an image, in three conventions, see `CONVENTIONS`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.readers import read_volume, write_volume
from spinelib.levels import LEVEL_OF_LABEL, VERSE_LABELS
from spinelib.record import write_json_atomic

SPLIT_FOLDERS = {"training": "dataset-01training", "validation": "dataset-02validation", "test": "dataset-03test"}
"""Official splits and their folders in the release of VerSe 2020."""

CONVENTIONS = {"complete": "", "miccai2020": "PIR", "miccai2019": "IPL"}
"""How a centroid file counts. 'complete' (`_seg-subreg_ctd.json`): voxels along the array axes of the image, whose
codes stand in a "direction" record. 'miccai2020' (`_iso-ctd.json`) and 'miccai2019' (`_ctd.json`): voxels of the image
resampled to 1 mm and turned to the axes named here."""

LARGEST_LABEL = max(LEVEL_OF_LABEL)

BODY_SHARE, ATLAS_SHARE = 0.7, 0.4
"""A voxel belongs to the core of a bone if its depth is at least this share of the largest; for C1, a ring, less."""

_SACRAL = (VERSE_LABELS["S1"], VERSE_LABELS["Co"])  # numbered by VerSe, never annotated, and without one body
_COARSEST_MM = 1.0  # finer masks are thinned before their body is sought
_GRID_TOLERANCE = 0.5  # of a voxel
_STRAY_MM = 10.0
_KEY = re.compile(r"[A-Za-z0-9-]+(_[a-z]+-[A-Za-z0-9]+)*")


@dataclass(frozen=True)
class LabelledCT:
    """A CT with its vertebrae.

    Attributes
    ----------
    key : str
    ct : Volume
        Hounsfield units, axes (right, anterior, superior).
    labels : Volume
        VerSe labels on the grid of `ct`, uint8.
    centroids_mm : dict of int to ndarray (3,)
        Centres of the vertebral bodies in world RAS mm.
    cut : frozenset of int
        Labels of vertebrae that the border of the volume cuts. Files of VerSe leave them out.
    """

    key: str
    ct: Volume
    labels: Volume
    centroids_mm: dict[int, np.ndarray]
    cut: frozenset[int] = frozenset()


def read_labelled_ct(ct_path, mask_path, centroids_path=None, key: str = "", convention: str = "complete"):
    """Read a CT, its vertebra mask and the centres of the bodies.

    Parameters
    ----------
    ct_path, mask_path : path
        NIfTI in any orientation and spacing, both on the same voxels.
    centroids_path : path, optional
        JSON of points along the axes of the mask. Without it the centres come from `body_centroids_mm`. Labels may
        miss on either side: the result has the centroids of this file.
    key : str
        Name of the series; by default that of the CT file without its ending.
    convention : str
        One of `CONVENTIONS`.

    Returns
    -------
    LabelledCT
        With an empty `cut`: VerSe annotates vertebrae that lie whole in the volume, and only those.

    Raises
    ------
    InputError
        Files that cannot be read or do not lie on one grid, or points far from the bone of their label.
    """
    ct, labels = read_volume(ct_path), read_mask(mask_path)
    _check_same_grid(ct, labels, ct_path, mask_path)
    if centroids_path is None:
        centroids = body_centroids_mm(labels)
    else:
        centroids = read_centroids(centroids_path, mask_path, convention)
        _check_points_near_bone(centroids, labels, centroids_path)
    name = key or Path(ct_path).name.removesuffix(".gz").removesuffix(".nii")
    values = ct.values.astype(np.float32, copy=False)
    return LabelledCT(name, Volume(values, ct.affine), Volume(labels.values, ct.affine), centroids)


def read_mask(path) -> Volume:
    """Read a mask of VerSe labels, uint8 or whole floating-point numbers on disk, as uint8 on RAS axes.

    Raises
    ------
    InputError
        If `read_volume` refuses the file, or a value is no whole number from 0 to 28.
    """
    mask = read_volume(path)
    low, high = mask.values.min(), mask.values.max()
    if low < 0 or high > LARGEST_LABEL or np.any(np.rint(mask.values) != mask.values):
        message = (
            f"{path}: expected VerSe labels, whole numbers from 0 to {LARGEST_LABEL}, given values from {low:g} to "
            f"{high:g}{'' if high > LARGEST_LABEL or low < 0 else ' with fractions'}. Fix: pass the vertebra mask "
            "(_seg-vert_msk), resampled by nearest neighbour if at all, and with the label numbers of VerSe."
        )
        raise InputError(message)
    return Volume(mask.values.astype(np.uint8), mask.affine)


def read_centroids(path, image, convention: str = "complete") -> dict[int, np.ndarray]:
    """Read the points of a VerSe centroid file; inverse of `write_centroids` for the complete release.

    Parameters
    ----------
    path : path
        JSON.
    image : path
        NIfTI file of the same series and release, whose axes on disk the file counts along.
    convention : str
        One of `CONVENTIONS`. The two older ones do not say where in the first voxel they start; the grid of
        nibabel's `rescale_affine` is taken, as by the utilities of the challenge, so allow for about 1 mm.

    Returns
    -------
    dict of int to ndarray (3,)
        World RAS mm. Entries without a number (NaN) are left out.

    Raises
    ------
    InputError
        Unknown convention, unreadable file, other axes than the image's, a label outside 1-28 or twice.
    """
    if convention not in CONVENTIONS:
        message = f"unknown convention {convention!r}. Expected one of: {', '.join(CONVENTIONS)}."
        raise InputError(message)
    header = _image_header(image)
    records = _json_records(path)
    directions = [tuple(r["direction"]) for r in records if "direction" in r]
    if convention == "complete":
        _check_direction(directions, nib.aff2axcodes(header.affine), path, image)
        affine = header.affine
    else:
        affine = _isotropic_affine(header, CONVENTIONS[convention])
    points = {}
    for record in records:
        if "direction" not in record:
            label, place = _checked_point(record, path)
            if label in points:
                message = f"{path}: label {label} stands there twice. Fix: keep one entry a vertebra."
                raise InputError(message)
            points[label] = nib.affines.apply_affine(affine, place)
    return {label: point for label, point in points.items() if np.isfinite(point).all()}


def write_centroids(path, centroids_mm: dict[int, np.ndarray], affine_of_file: np.ndarray) -> Path:
    """Write points as the complete release of VerSe does; returns the path.

    Parameters
    ----------
    path : path
        JSON.
    centroids_mm : dict of int to array (3,)
        World RAS mm.
    affine_of_file : ndarray (4, 4)
        Affine of the NIfTI file that lies beside it, as stored.
    """
    to_voxel = np.linalg.inv(affine_of_file)
    records = [{"direction": list(nib.aff2axcodes(affine_of_file))}]
    for label, point in sorted(centroids_mm.items()):
        voxel = nib.affines.apply_affine(to_voxel, np.asarray(point, float))
        records.append({"label": int(label)} | {axis: float(v) for axis, v in zip("XYZ", voxel, strict=True)})
    write_json_atomic(Path(path), records)
    return Path(path)


def body_centroids_mm(labels: Volume) -> dict[int, np.ndarray]:
    """Return the centre of the body of every vertebra in a mask, for masks without a centroid file.

    The body is the thickest part in front of a vertebra's middle: among voxels deeper below the surface than
    `BODY_SHARE` of the largest depth there, the piece that holds the deepest one; its mean is the centre. Being a
    share, the depth suits cervical bodies and lumbar ones. C1 has no body: its centre is the mean of all that is
    deeper than `ATLAS_SHARE`, the two lateral masses, which lies where the dens of C2 goes through the ring.
    Measured against VerSe's own points: 1.3 mm on average (largest 1.8) over T9-L5 of one scan. Against synthetic
    truth: C1 2.5, C2 2.8, C3-C7 0.5, T 1.0, L 1.0 mm.

    Parameters
    ----------
    labels : Volume
        VerSe labels, integers; axes and spacing may be anything that the affine describes.

    Returns
    -------
    dict of int to ndarray (3,)
        World RAS mm, for all labels that occur but the sacrum and the coccyx.
    """
    values = np.asarray(labels.values).astype(np.uint8, copy=False)
    boxes = {label: box for label, box in enumerate(ndimage.find_objects(values), 1) if box is not None}
    return {
        label: _body_centre(values[box] == label, labels.affine, [side.start for side in box], label)
        for label, box in boxes.items()
        if label not in _SACRAL
    }


def write_labelled_ct(root, scan: LabelledCT, split: str, orientation: str = "RAS") -> tuple[Path, Path, Path]:
    """Write a scan under the names of VerSe's complete release; returns the paths of CT, mask and centroids.

    Vertebrae that the border cuts are left out of mask and centroids, as in VerSe. Hounsfield units are rounded to
    whole numbers. The centroid file comes last: where it is, the series is complete.

    Parameters
    ----------
    root : path
        Holds `SPLIT_FOLDERS`.
    scan : LabelledCT
        The key may have BIDS entities, as 'verse500_dir-ax'.
    split : str
        'training', 'validation' or 'test'.
    orientation : str
        Axis codes of the files, three letters such as 'PIR' or 'LPS'.

    Raises
    ------
    InputError
        For an unknown split, a bad key or orientation, or a scan without one whole vertebra.
    """
    paths = release_paths(root, scan.key, split)
    kept = {label: point for label, point in scan.centroids_mm.items() if label not in scan.cut}
    values = np.where(np.isin(scan.labels.values, list(scan.cut)), 0, scan.labels.values).astype(np.uint8)
    if not values.any():
        message = f"{scan.key}: no vertebra lies whole in the volume, so there is nothing to annotate."
        raise InputError(message)
    hounsfield = np.clip(np.rint(scan.ct.values), -32768, 32767).astype(np.int16)
    turned = [_turned(Volume(array, scan.ct.affine), orientation) for array in (hounsfield, values)]
    write_volume(paths[0], turned[0])
    write_volume(paths[1], turned[1])
    write_centroids(paths[2], kept, turned[1].affine)
    return paths


def release_paths(root, key: str, split: str) -> tuple[Path, Path, Path]:
    """Return where the complete release keeps CT, mask and centroids of a series.

    Raises
    ------
    InputError
        For an unknown split or a key that does not fit the names.
    """
    if split not in SPLIT_FOLDERS:
        message = f"unknown split {split!r}. Expected one of: {', '.join(SPLIT_FOLDERS)}."
        raise InputError(message)
    if not _KEY.fullmatch(key):
        message = f"key {key!r}: expected letters, digits and '-', then entities as '_dir-ax'. Fix: rename the series."
        raise InputError(message)
    folder, subject = Path(root) / SPLIT_FOLDERS[split], f"sub-{key.split('_')[0]}"
    raw, derived = folder / "rawdata" / subject, folder / "derivatives" / subject
    return (
        raw / f"sub-{key}_ct.nii.gz",
        derived / f"sub-{key}_seg-vert_msk.nii.gz",
        derived / f"sub-{key}_seg-subreg_ctd.json",
    )


def _body_centre(mask, affine, start, label):
    step = np.maximum(1, _COARSEST_MM // np.linalg.norm(affine[:3, :3], axis=0)).astype(int)
    coarse = mask[:: step[0], :: step[1], :: step[2]]
    if not coarse.any():
        step, coarse = np.ones(3, int), mask
    solid = np.pad(ndimage.binary_fill_holes(coarse), 1)
    depth = ndimage.distance_transform_edt(solid, sampling=step * np.linalg.norm(affine[:3, :3], axis=0))
    if label == VERSE_LABELS["C1"]:
        core = depth >= ATLAS_SHARE * depth.max()
    else:
        front = np.where(_anterior_mm(solid, affine, step) >= 0, depth, 0)
        pieces, _ = ndimage.label(depth >= BODY_SHARE * front.max())
        core = pieces == pieces.flat[front.argmax()]
    voxel = (np.argwhere(core).mean(0) - 1) * step + start
    return nib.affines.apply_affine(affine, voxel)


def _anterior_mm(mask, affine, step):
    """Anterior coordinate of every voxel from the mean of the mask's."""
    axes = [affine[1, axis] * step[axis] * np.arange(n) for axis, n in enumerate(mask.shape)]
    anterior = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :]
    return anterior - anterior[mask].mean()


def _turned(volume, orientation):
    """Return the same voxels stored along other axes."""
    pairs = ("RL", "AP", "SI")
    if len(orientation) != 3 or any(sum(code in pair for code in orientation) != 1 for pair in pairs):
        message = f"orientation {orientation!r}: expected one letter each of RL, AP and SI, for example 'PIR'."
        raise InputError(message)
    change = nib.orientations.ornt_transform(
        nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt(orientation)
    )
    values = nib.orientations.apply_orientation(volume.values, change)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(change, volume.values.shape)
    return Volume(np.ascontiguousarray(values), affine)


def _isotropic_affine(image, codes):
    """Affine of an image resampled to 1 mm along its own axes, then turned to `codes`."""
    shape = np.array(image.shape[:3])
    fine_shape = np.rint(shape * nib.affines.voxel_sizes(image.affine)).astype(int)
    fine = nib.affines.rescale_affine(image.affine, shape, (1.0, 1.0, 1.0), fine_shape)
    change = nib.orientations.ornt_transform(nib.io_orientation(fine), nib.orientations.axcodes2ornt(codes))
    return fine @ nib.orientations.inv_ornt_aff(change, fine_shape)


def _image_header(path):
    try:
        return nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        message = f"{path} is not a readable NIfTI file ({error}). Fix: pass the mask that the points belong to."
        raise InputError(message) from error


def _json_records(path):
    try:
        records = json.loads(Path(path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        message = f"{path} is not a readable JSON file ({error}). Fix: copy or download the file again."
        raise InputError(message) from error
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        message = f"{path}: expected a list of records as in VerSe's centroid files, given {type(records).__name__}."
        raise InputError(message)
    return records


def _check_direction(directions, codes, path, image):
    if directions != [codes]:
        given = " and ".join(" ".join(d) for d in directions) or "no direction record"
        message = (
            f"{path}: expected the axes of {Path(image).name}, {' '.join(codes)}, given {given}. Fix: pass the image "
            "that the file came with; for MICCAI files pass convention='miccai2019' or 'miccai2020'."
        )
        raise InputError(message)


def _checked_point(record, path):
    try:
        label, place = int(record["label"]), np.array([record[axis] for axis in "XYZ"], float)
    except (KeyError, TypeError, ValueError) as error:
        message = f"{path}: expected records with label, X, Y, Z, given {record}. Fix: download the file again."
        raise InputError(message) from error
    if label not in LEVEL_OF_LABEL:
        message = f"{path}: expected labels from 1 to {LARGEST_LABEL}, given {label}. Fix: use VerSe's label numbers."
        raise InputError(message)
    return label, place


def _check_same_grid(ct, labels, ct_path, mask_path):
    """Refuse grids whose corners differ by more than half a voxel."""
    fix = "Fix: pass the mask of this CT, or resample it to the CT by nearest neighbour."
    if ct.values.shape != labels.values.shape:
        message = (
            f"{Path(mask_path).name} does not fit {Path(ct_path).name}: expected {ct.values.shape} voxels (right, "
            f"anterior, superior), given {labels.values.shape}. {fix}"
        )
        raise InputError(message)
    offsets = ct.grid.corners_mm() - labels.grid.corners_mm()
    apart, allowed = np.linalg.norm(offsets, axis=1).max(), _GRID_TOLERANCE * ct.spacing_mm.min()
    if apart > allowed:
        message = (
            f"{Path(mask_path).name} does not lie where {Path(ct_path).name} does: expected corners within "
            f"{allowed:.2f} mm, given {apart:.2f} mm. {fix}"
        )
        raise InputError(message)


def _check_points_near_bone(centroids, labels, path):
    """Refuse a point outside the box around its label: the files of two series were mixed, or the convention."""
    to_voxel, margin = np.linalg.inv(labels.affine), _STRAY_MM / labels.spacing_mm
    boxes = dict(enumerate(ndimage.find_objects(labels.values), 1))
    for label, point in centroids.items():
        box = boxes.get(label)
        if box is not None:
            voxel = nib.affines.apply_affine(to_voxel, point)
            low, high = np.array([[side.start, side.stop - 1] for side in box]).T
            if np.any(voxel < low - margin) or np.any(voxel > high + margin):
                message = (
                    f"{path}: the point of {LEVEL_OF_LABEL[label]} lies more than {_STRAY_MM:g} mm outside its bone. "
                    "Fix: pass the centroid file of this mask, and its convention."
                )
                raise InputError(message)
