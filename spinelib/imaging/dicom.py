"""DICOM in: a single projection image, or one series of slices."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from spinelib.errors import InputError


def dicom_image(path: Path, spacing_mm=None) -> tuple[np.ndarray, tuple[float, float], str]:
    """Read a single DICOM image.

    Dense tissue comes out bright (MONOCHROME1 is inverted), row 0 towards the head, column 0 towards the
    patient's right or anterior. Pixel spacing: `spacing_mm`, else PixelSpacing, ImagerPixelSpacing, or
    ExposedArea / size.

    Returns
    -------
    values : ndarray, shape (rows, cols), float32
    spacing_mm : tuple of float
        Row and column pitch, unchecked.
    view : str
        'coronal' or 'sagittal'.
    """
    try:
        data = pydicom.dcmread(path)
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError) as error:
        message = (
            f"{path} is not an image this package reads. Expected DICOM, PNG, TIFF or NIfTI (.nii, .nii.gz); "
            f"reading it as DICOM failed ({error}). Fix: export it in one of these formats."
        )
        raise InputError(message) from error
    if int(getattr(data, "NumberOfFrames", None) or 1) > 1:
        message = f"{path}: expected one 2D image, given {data.NumberOfFrames} frames. Fix: export a single image."
        raise InputError(message)
    try:
        values = data.pixel_array.astype(np.float32)
    except (AttributeError, ValueError, RuntimeError, EOFError, IndexError) as error:
        message = f"{path}: the DICOM pixels are missing, cut short or packed in an unknown way ({error})."
        raise InputError(message + " Fix: copy the file again, or export it uncompressed.") from error
    if values.ndim == 3:
        values = values @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    values = values * float(getattr(data, "RescaleSlope", 1.0)) + float(getattr(data, "RescaleIntercept", 0.0))
    if getattr(data, "PhotometricInterpretation", "") == "MONOCHROME1":
        values = values.max() + values.min() - values
    orientation = tuple(getattr(data, "PatientOrientation", None) or ("L", "F"))
    values, view = _oriented(values, orientation, path)
    return values, spacing_mm or _dicom_spacing(data, path), view


def dicom_series(folder: Path) -> nib.Nifti1Image:
    """Read the one DICOM series of a folder; the image's affine maps its voxels to RAS mm."""
    import SimpleITK as sitk  # heavy: only a DICOM folder needs it

    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        message = f"{folder}: expected a folder with one DICOM series, found {len(series)}."
        raise InputError(message + " Fix: pass the folder of a single series.")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    _check_slices(files, folder)
    try:
        image = sitk.ReadImage(files)
    except RuntimeError as error:
        message = f"{folder}: the DICOM slices could not be read ({str(error).splitlines()[-1]}). Fix: copy them again."
        raise InputError(message) from error
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM grows to the patient's left and posterior
    return nib.Nifti1Image(sitk.GetArrayFromImage(image).T.astype(np.float32), to_ras @ affine)


def _dicom_spacing(data, path):
    """Row and column pitch; ExposedArea lists the side along the columns' count first."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing"):
        if getattr(data, tag, None):
            return tuple(float(s) for s in getattr(data, tag))
    area = getattr(data, "ExposedArea", None)
    if area is not None and np.size(area) == 2:
        return float(area[1]) / data.Rows, float(area[0]) / data.Columns
    message = (
        f"{path}: the DICOM has no PixelSpacing, ImagerPixelSpacing or ExposedArea. "
        "Fix: pass spacing_mm=(row, column) in mm."
    )
    raise InputError(message)


def _oriented(values, orientation, path):
    """Turn columns towards the patient's left (or posterior), rows towards the feet; also return the view."""
    across, down = (str(o)[:1] for o in orientation[:2])
    if across not in "LRAP" or down not in "FH":
        message = (
            f"{path}: expected rows from head to feet, given PatientOrientation {across}\\{down}. "
            "Fix: turn the image upright before export."
        )
        raise InputError(message)
    values = values[:, ::-1] if across in "RA" else values
    values = values[::-1] if down == "H" else values
    return np.ascontiguousarray(values), "coronal" if across in "LR" else "sagittal"


def _check_slices(files, folder):
    """Refuse a series with missing or unevenly spaced slices."""
    heads = [pydicom.dcmread(f, stop_before_pixels=True) for f in files]
    if len(heads) < 2 or not all("ImagePositionPatient" in h and "ImageOrientationPatient" in h for h in heads):
        message = f"{folder}: expected at least 2 slices with a position and an orientation, given {len(heads)} files."
        raise InputError(message)
    row, column = np.array(heads[0].ImageOrientationPatient, float).reshape(2, 3)
    positions = np.array([h.ImagePositionPatient for h in heads], float)
    gaps = np.diff(positions @ np.cross(row, column))
    steps = np.diff(positions, axis=0)
    if np.ptp(gaps) > 0.05 * np.abs(gaps).max() + 0.01:
        message = (
            f"{folder}: slices are missing or unevenly spaced ({np.abs(gaps).min():.2f} to "
            f"{np.abs(gaps).max():.2f} mm)."
        )
        raise InputError(message + " Fix: export the whole series again.")
    tilt = np.linalg.norm(steps - gaps[:, None] * np.cross(row, column), axis=1).max()
    if tilt > 0.01 * np.abs(gaps).max() + 0.01:
        message = f"{folder}: the slices are sheared (tilted gantry). Fix: resample to a rectangular grid first."
        raise InputError(message)
