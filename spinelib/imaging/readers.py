"""Image files in and out: projections (DICOM, PNG, TIFF, NIfTI) and volumes (NIfTI, DICOM folder).

Conventions
-----------
Volumes come back with axes (right, anterior, superior), turned once to the nearest RAS axes. An image without
a world position (DICOM, PNG, TIFF) is centred on (0, 0) mm. Column 0 is the patient's right unless a DICOM
PatientOrientation says otherwise. Intensities of an external image keep their own scale, only the sign is
settled: dense tissue is bright. The channel of a single image is called 'bone'; a pair is (bone, tissue) in
this order. Scaling by percentiles belongs to the model's crop. Our own projections are float32 NIfTI with a
size-1 axis (right, 1, superior[, channel]) whose header description lists the channel names.
"""

import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection, Volume, VolumeGrid
from spinelib.imaging.dicom import dicom_image, dicom_series
from spinelib.record import written_atomically

SPACING_LIMITS_MM = (0.05, 10.0)
_PICTURES = (".png", ".tif", ".tiff")
_NIFTI = (".nii.gz", ".nii")


def read_projection(path, spacing_mm: tuple[float, float] | None = None) -> Projection:
    """Read a coronal projection image.

    Parameters
    ----------
    path : path or sequence of two paths
        DICOM, PNG, TIFF, or NIfTI written by `write_projection`; or a pair of files (bone, tissue).
    spacing_mm : tuple of float, optional
        (row pitch, column pitch) in mm. Needed for PNG and TIFF; overrides what a DICOM says.

    Returns
    -------
    Projection
        Channels ('bone',), ('bone', 'tissue'), or those named in the NIfTI header.

    Raises
    ------
    InputError
        Missing, broken, empty or three-dimensional file; unknown or absurd pixel spacing; unlike pair.
    """
    if isinstance(path, Sequence) and not isinstance(path, str):
        return _read_pair(path, spacing_mm)
    path = _existing_file(path)
    if _suffix(path) in _NIFTI:
        if spacing_mm is not None:
            message = f"{path}: a NIfTI image carries its own spacing. Fix: leave out spacing_mm."
            raise InputError(message)
        return _projection_from_nifti(path)
    if _suffix(path) in _PICTURES:
        values, spacing, view = _picture(path), spacing_mm, "coronal"
        if spacing is None:
            message = (
                f"{path.name} does not say how large its pixels are. Expected spacing_mm=(row, column) in "
                "mm, given none. Fix: pass the pixel size, for example --spacing 3.0 2.4 on the command line or "
                "spacing_mm=(3.0, 2.4) in Python."
            )
            raise InputError(message)
    else:
        values, spacing, view = dicom_image(path, spacing_mm)
    _check_values(values, path)
    grid = PlanarGrid.centred(view, values.shape, _checked_spacing(spacing, path), (0.0, 0.0))
    return Projection(("bone",), values[None].astype(np.float32), grid)


def write_projection(path, projection: Projection) -> Path:
    """Write a projection as float32 NIfTI with its grid and channel names; returns the path."""
    array = np.moveaxis(projection.values[:, ::-1, ::-1], 0, -1).swapaxes(0, 1)  # (lateral, superior, C), rising
    missing = 1 if projection.grid.view == "coronal" else 0
    image = nib.Nifti1Image(np.expand_dims(array, missing).astype(np.float32), projection.grid.affine())
    names = "channels:" + ",".join(projection.channels)
    if len(names) > 79:
        message = f"channel names must fit 70 characters in all, given {','.join(projection.channels)}."
        raise InputError(message)
    image.header["descrip"] = names.encode()
    return _save_nifti(path, image)


def read_volume(path) -> Volume:
    """Read a CT, MR or label volume and turn it to the nearest RAS axes.

    Parameters
    ----------
    path : path
        NIfTI file, or folder holding one DICOM series.

    Returns
    -------
    Volume
        float32 (uint8 stays uint8). A rotated grid keeps its rotation in the affine (see `straightened`).

    Raises
    ------
    InputError
        Missing or broken file, not 3D, no orientation, sheared affine, several series, uneven or missing
        slices, not-a-number or constant values.
    """
    volume, _ = read_scan(path)
    plain = volume.values.dtype in (np.uint8, np.float32)
    return volume if plain else Volume(volume.values.astype(np.float32), volume.affine)


def read_scan(path) -> tuple[Volume, nib.Nifti1Header]:
    """Read a scan that may be large, as `read_volume` does, for a result to be written with `write_like`.

    Returns
    -------
    volume : Volume
        Whole numbers of 8 or 16 bits stay as they are stored, unless the file scales them; else float32.
    header : Nifti1Header
        Grid of the file and order of its axes. A folder of DICOM slices gets one too: columns, rows, slices.
    """
    path = Path(path)
    if path.is_dir():
        image = dicom_series(path)
    else:
        path = _existing_file(path)
        if _suffix(path) not in _NIFTI:
            message = f"{path}: a volume is a .nii or .nii.gz file or a folder of DICOM slices. Fix: pass one of these."
            raise InputError(message)
        image = _load_nifti(path)
    _check_affine(image.affine, path)
    shape = image.shape[:3]
    if len(shape) < 3 or min(shape) < 2 or np.prod(image.shape) != np.prod(shape):
        message = (
            f"{path}: expected a 3D volume, given shape {image.shape}. Fix: pass one 3D volume; read flat images "
            "with read_projection."
        )
        raise InputError(message)
    values, affine = _ras_values(image, path)
    values = values.reshape(values.shape[:3])
    _check_values(values, path)
    return Volume(values, affine), image.header


def write_volume(path, volume: Volume) -> Path:
    """Write a volume as NIfTI: uint8 as it is, everything else as scaled int16; returns the path.

    The rounding error is at most (largest - smallest) / 131070.
    """
    image = nib.Nifti1Image(np.asarray(volume.values), volume.affine)
    image.set_data_dtype(np.uint8 if volume.values.dtype == np.uint8 else np.int16)
    return _save_nifti(path, image)


def straightened(volume: Volume, fill: float = 0.0) -> Volume:
    """Return the volume on axis-aligned voxels of the same size (linear); itself when already aligned."""
    direction = volume.affine[:3, :3] / volume.spacing_mm
    if np.allclose(direction, np.eye(3), atol=1e-4):
        return volume
    corners = volume.grid.corners_mm()
    grid = VolumeGrid.from_bounds(corners.min(axis=0), corners.max(axis=0), volume.spacing_mm)
    to_source = np.linalg.inv(volume.affine) @ grid.affine
    values = ndimage.affine_transform(
        volume.values.astype(np.float32), to_source[:3, :3], to_source[:3, 3], grid.shape, order=1, cval=fill
    )
    return Volume(values, grid.affine)


def write_like(path, volume: Volume, header: nib.Nifti1Header) -> Path:
    """Write labels on the grid and in the axis order of the file that `header` comes from; returns the path.

    Parameters
    ----------
    path : path
    volume : Volume
        uint8 on the RAS grid of `read_scan`.
    header : Nifti1Header
        As `read_scan` returns it. Both its transforms are kept, so that viewers lay the labels over the scan.
    """
    ras, stored = nib.io_orientation(np.eye(4)), nib.io_orientation(header.get_best_affine())
    values = nib.apply_orientation(volume.values, nib.orientations.ornt_transform(ras, stored))
    if values.shape != header.get_data_shape()[:3]:
        message = f"expected the grid of the scan, {header.get_data_shape()[:3]}, given {values.shape}."
        raise InputError(message)
    image = nib.Nifti1Image(values, header.get_best_affine())
    image.set_qform(*header.get_qform(coded=True))
    image.set_sform(*header.get_sform(coded=True))
    image.header.set_xyzt_units("mm")
    image.set_data_dtype(np.uint8)
    return _save_nifti(path, image)


# --- files ---


def _suffix(path):
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else path.suffix.lower()


def _existing_file(path):
    path = Path(path)
    if path.is_dir():
        message = f"expected an image file, given the folder {path}. Fix: pass one file inside it."
        raise InputError(message)
    if not path.is_file():
        message = f"no file {path}. Fix: check the path (working folder: {Path.cwd()})."
        raise InputError(message)
    if path.stat().st_size == 0:
        message = f"{path} is empty (0 bytes). Fix: copy or export the file again."
        raise InputError(message)
    return path


def _save_nifti(path, image):
    return written_atomically(path, _NIFTI, lambda draft: nib.save(image, draft))


# --- checks ---


def _check_values(values, path):
    if values.size == 0 or min(values.shape) < 2:
        message = f"{path}: expected an image of at least 2 pixels a side, given shape {values.shape}."
        raise InputError(message)
    low, high = values.min(), values.max()  # NaN where any value is: no mask as large as the scan
    if not np.isfinite(low) or not np.isfinite(high):
        message = f"{path} holds not-a-number or infinite values. Fix: replace them by the background value."
        raise InputError(message)
    if low == high:
        message = f"{path} is blank: every value is {values.flat[0]}. Fix: export the image again."
        raise InputError(message)


def _checked_spacing(spacing_mm, path):
    low, high = SPACING_LIMITS_MM
    try:
        pair = tuple(float(s) for s in spacing_mm)
    except (TypeError, ValueError):
        pair = ()
    if len(pair) != 2 or not all(low <= s <= high for s in pair):
        message = (
            f"{path}: pixel spacing must be (row, column) in mm, each between {low} and {high}, given "
            f"{spacing_mm}. "
            "Fix: pass spacing_mm=(row, column)."
        )
        raise InputError(message)
    return pair


def _check_affine(affine, path):
    """Refuse flat, absurd and sheared affines."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.all(np.isfinite(affine)) or steps.min() < SPACING_LIMITS_MM[0] or steps.max() > SPACING_LIMITS_MM[1]:
        message = f"{path}: voxel size must lie within {SPACING_LIMITS_MM} mm, given {steps.round(4).tolist()}."
        raise InputError(message + " Fix: check the header's unit (mm, not m).")
    direction = affine[:3, :3] / steps
    if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-3:
        message = (
            f"{path}: the voxel axes are not at right angles (sheared, as with a tilted CT gantry). "
            "Fix: resample the volume to a rectangular grid first."
        )
        raise InputError(message)


# --- NIfTI ---


def _load_nifti(path):
    try:
        image = nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        message = f"{path} is not a readable NIfTI file ({error}). Fix: convert or copy the file again."
        raise InputError(message) from error
    if int(image.header["sform_code"]) == 0 and int(image.header["qform_code"]) == 0:
        message = (
            f"{path} does not say how it lies in the patient (sform_code and qform_code are 0). "
            "Fix: convert it again from DICOM, for example with dcm2niix."
        )
        raise InputError(message)
    return image


def _ras_values(image, path):
    """Return voxel values on the nearest RAS axes and their affine: unscaled whole numbers, else float32."""
    slope, inter = (getattr(image.dataobj, name, one) for name, one in (("slope", 1.0), ("inter", 0.0)))
    try:
        stored = image.dataobj.get_unscaled() if nib.is_proxy(image.dataobj) else image.dataobj
    except (OSError, EOFError, ValueError, zlib.error) as error:
        message = f"{path} is cut short or broken ({error}). Fix: copy the file again."
        raise InputError(message) from error
    if stored.dtype.kind not in "iuf":
        message = f"{path}: expected one number in a voxel, given {stored.dtype}. Fix: export it in shades of grey."
        raise InputError(message)
    turn = nib.io_orientation(image.affine)
    values = nib.apply_orientation(stored, turn)
    if stored.dtype.kind == "f" or stored.itemsize > 2 or (slope, inter) != (1, 0):
        values = values.astype(np.float32)
        values *= slope  # in place: a scan can fill the memory
        values += inter
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    return values, image.affine @ nib.orientations.inv_ornt_aff(turn, image.shape[:3])


def _projection_from_nifti(path):
    image = _load_nifti(path)
    _check_affine(image.affine, path)
    image = nib.as_closest_canonical(image)
    if len(image.shape) not in (3, 4) or 1 not in image.shape[:2]:
        message = (
            f"{path}: expected a projection stored as (right, 1, superior[, channels]), given shape "
            f"{image.shape}. "
            "Fix: read a volume with read_volume and project it with dxa_from_ct or coronal_projection."
        )
        raise InputError(message)
    missing = 1 if image.shape[1] == 1 else 0
    values = np.squeeze(_ras_values(image, path)[0].astype(np.float32), axis=missing)
    values = values[..., None] if values.ndim == 2 else values
    channels = _channel_names(bytes(image.header["descrip"]).decode("ascii", "ignore"), values.shape[-1])
    values = np.ascontiguousarray(np.moveaxis(values, -1, 0).swapaxes(1, 2)[:, ::-1, ::-1])
    for channel in values:
        _check_values(channel, path)
    steps, lateral = nib.affines.voxel_sizes(image.affine), 1 - missing
    far = image.affine @ [*(np.array(image.shape[:3]) - 1), 1]
    grid = PlanarGrid(
        ("coronal", "sagittal")[lateral],
        values.shape[1:],
        (float(steps[2]), float(steps[lateral])),
        (float(far[2]), float(far[lateral])),
    )
    return Projection(channels, values, grid)


def _channel_names(description, count):
    named = re.match(r"channels:([\w,]+)", description)
    names = tuple(named.group(1).split(",")) if named else ()
    if len(names) == count:
        return names
    return ("bone", "tissue")[:count] if count <= 2 else tuple(f"channel_{i}" for i in range(count))


# --- pictures ---


def _picture(path):
    """Grey values of a PNG or TIFF, float32 (rows, cols); colour becomes luminance."""
    try:
        with Image.open(path) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                message = f"{path}: expected one 2D image, given {picture.n_frames} pages. Fix: export a single page."
                raise InputError(message)
            if picture.mode in ("RGB", "RGBA", "P", "CMYK", "LA", "PA", "1"):
                picture = picture.convert("RGB").convert("L")
            return np.array(picture, dtype=np.float32)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        message = f"{path} is not a readable {_suffix(path)} image ({error}). Fix: export the image again."
        raise InputError(message) from error


def _read_pair(paths, spacing_mm):
    if len(paths) != 2:
        message = f"expected one file or a pair (bone, tissue), given {len(paths)} files."
        raise InputError(message)
    bone, tissue = (read_projection(p, spacing_mm) for p in paths)
    if bone.grid != tissue.grid or len(bone.channels) != 1 or len(tissue.channels) != 1:
        message = (
            f"bone and tissue images must be single and match, given {bone.grid.shape} pixels of "
            f"{bone.grid.spacing_mm} mm and {tissue.grid.shape} pixels of {tissue.grid.spacing_mm} mm."
        )
        raise InputError(message)
    return Projection(("bone", "tissue"), np.concatenate([bone.values, tissue.values]), bone.grid)
