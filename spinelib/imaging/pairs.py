"""CT and MR of one spine, to be registered: what a pair holds, its files, and what must be true of it.

CT is MOVING and MR is FIXED. Vertebra labels of the CT are needed; those of the MR are for scoring only. Folders are
those of Jian et al. (MICCAI 2022): `train/001/ct.nii.gz ct_mask.nii.gz mr_t1.nii.gz mr_mask.nii.gz`. Synthetic pairs
have their truth beside them: `field.nii.gz` and `transforms.json`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from spinelib.deformation import DisplacementField, read_field, write_field
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.readers import read_volume, write_volume
from spinelib.imaging.verse import read_mask
from spinelib.levels import LEVEL_OF_LABEL, LEVEL_ORDER
from spinelib.record import read_json, write_json_atomic

CONTRASTS = ("t1", "t2")
"""Weightings of the MR; the file is `mr_t1.nii.gz` or `mr_t2.nii.gz`."""

CT_NAME, CT_MASK_NAME, MR_MASK_NAME = "ct.nii.gz", "ct_mask.nii.gz", "mr_mask.nii.gz"
_FIELD_NAME, _TRUTH_NAME = "field.nii.gz", "transforms.json"
_LAYOUT = f"{CT_NAME}, {CT_MASK_NAME}, mr_t1.nii.gz or mr_t2.nii.gz and, for scoring only, {MR_MASK_NAME}"

_FAT_HU = -50.0  # every CT shows fat below it; a magnitude image has no negative values at all
_NEGATIVE_SHARE = 0.05
_LEAST_PITCH_MM = 5.0  # from one vertebra down to the next; 14 mm in the neck of a child, less the slope
_GRID_TOLERANCE = 0.5  # of a voxel
_ENOUGH_MM3 = 2000.0  # smaller pieces of a vertebra do not tell back from front


@dataclass(frozen=True, eq=False)
class RegistrationPair:
    """CT and MR of one person.

    Attributes
    ----------
    key : str
    ct : Volume
        Hounsfield units.
    ct_labels : Volume
        VerSe labels on the grid of `ct`, uint8.
    mr : Volume
        Relative signal on a grid of its own, in the same world as `ct` up to a few mm and degrees.
    mr_labels : Volume, optional
        VerSe labels on the grid of `mr`, uint8.
    field : DisplacementField, optional
        True motion on the grid of `mr`: takes a point of the MR to its point in the CT.
    transforms : dict of int to ndarray (4, 4), optional
        True rigid motion of every vertebra in `ct_labels`, MR world mm to CT world mm.
    contrast : str
        Of `CONTRASTS`.
    flags : tuple of str
        What is unusual about the pair and does not keep it from being registered.
    """

    key: str
    ct: Volume
    ct_labels: Volume
    mr: Volume
    mr_labels: Volume | None = None
    field: DisplacementField | None = None
    transforms: dict[int, np.ndarray] | None = None
    contrast: str = "t1"
    flags: tuple[str, ...] = ()


def read_pair(folder, ct=None, ct_mask=None, mr=None, mr_mask=None) -> RegistrationPair:
    """Read and check a pair, from a folder in the layout of the paper or from files of any name.

    Parameters
    ----------
    folder : path or None
        Folder of one person; None if the files are given.
    ct, ct_mask, mr, mr_mask : path, optional
        Files of any name instead of those in the folder; `mr_mask` may be missing.

    Returns
    -------
    RegistrationPair
        With the truth if it lies in the folder.

    Raises
    ------
    InputError
        For a missing or broken file, and as `check_pair`.
    """
    paths = _folder_paths(folder) if folder is not None else {}
    paths |= {k: Path(v) for k, v in dict(ct=ct, ct_mask=ct_mask, mr=mr, mr_mask=mr_mask).items() if v is not None}
    missing = [name for name in ("ct", "ct_mask", "mr") if name not in paths]
    if missing:
        message = f"no {' and no '.join(missing)} in {folder or 'the given files'}. Expected: {_LAYOUT}."
        raise InputError(message)
    images = {name: read_volume(path) for name, path in paths.items() if name in ("ct", "mr")}
    masks = {name: read_mask(path) for name, path in paths.items() if name in ("ct_mask", "mr_mask")}
    truth = read_json(paths["ct"].parent / _TRUTH_NAME) if folder is not None else None
    pair = RegistrationPair(
        (truth or {}).get("key", Path(folder or paths["ct"]).name.removesuffix(".gz").removesuffix(".nii")),
        _as_float(images["ct"]),
        _on_grid(masks["ct_mask"], images["ct"], paths["ct_mask"], paths["ct"]),
        _as_float(images["mr"]),
        _on_grid(masks["mr_mask"], images["mr"], paths["mr_mask"], paths["mr"]) if "mr_mask" in masks else None,
        read_field(paths["ct"].parent / _FIELD_NAME) if truth else None,
        {int(k): np.array(v) for k, v in truth["transforms"].items()} if truth else None,
        "t2" if "t2" in paths["mr"].name.lower() else "t1",
    )
    return replace(pair, flags=check_pair(pair))


def write_pair(folder, pair: RegistrationPair) -> Path:
    """Write a pair in the layout of the paper, its truth beside it; returns the folder.

    Hounsfield units are rounded to whole numbers. The last file makes the pair complete.
    """
    folder = Path(folder)
    hounsfield = np.clip(np.rint(pair.ct.values), -32768, 32767).astype(np.int16)
    write_volume(folder / CT_MASK_NAME, pair.ct_labels)
    write_volume(folder / f"mr_{pair.contrast}.nii.gz", pair.mr)
    if pair.mr_labels is not None:
        write_volume(folder / MR_MASK_NAME, pair.mr_labels)
    if pair.field is not None and pair.transforms is not None:
        write_field(folder / _FIELD_NAME, pair.field)
        matrices = {str(label): np.asarray(matrix).tolist() for label, matrix in pair.transforms.items()}
        write_json_atomic(folder / _TRUTH_NAME, {"key": pair.key, "transforms": matrices})
    write_volume(folder / CT_NAME, Volume(hounsfield, pair.ct.affine))
    return folder


def list_pairs(root, split: str) -> list[Path]:
    """Return the folders of the pairs of a split, sorted; `read_pair` says what is wrong with one.

    Raises
    ------
    InputError
        If there is none.
    """
    folder = Path(root).expanduser() / split
    found = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []
    if not found:
        message = (
            f"no pairs in {folder}. Expected folders such as {folder / '001'} with {_LAYOUT}. "
            "Fix: check the path, or make synthetic pairs with spinelib.registration_cohort.render_pair_cohort."
        )
        raise InputError(message)
    return found


def check_pair(pair: RegistrationPair) -> tuple[str, ...]:
    """Return what is unusual about a pair; refuse what cannot be registered.

    Raises
    ------
    InputError
        CT and MR swapped or in unknown units; no vertebra; vertebrae upside down or back to front (a wrong
        orientation in the header); MR that does not reach the labelled vertebrae; no label in both masks.
    """
    _check_intensities(pair)
    labels = vertebra_labels(pair.ct_labels)
    if not labels:
        message = (
            f"{pair.key}: the CT mask has no vertebra, labels 1 to 25 or 28. Fix: number the vertebrae as VerSe does, "
            "or label them with `spinelib predict --segment`."
        )
        raise InputError(message)
    _check_orientation(pair.ct_labels, pair.key, "CT")
    _check_overlap(pair)
    flags = []
    outside = [label for label in labels if not _meets(pair.ct_labels, label, pair.mr)]
    if outside:
        flags.append(f"outside the MR: {_names(outside)}")
    if pair.mr_labels is not None:
        flags += _check_mr_labels(pair, labels)
    return tuple(flags)


def vertebra_labels(labels: Volume) -> list[int]:
    """Return the labels of C1 to L6 that occur, cranial to caudal."""
    present = set(np.unique(labels.values).tolist())
    return [label for label in LEVEL_ORDER if label in present]


# --- files ---


def _folder_paths(folder):
    folder = Path(folder)
    if not folder.is_dir():
        message = f"no folder {folder}. Fix: pass the folder of one person with {_LAYOUT}."
        raise InputError(message)
    names = {"ct": CT_NAME, "ct_mask": CT_MASK_NAME, "mr_mask": MR_MASK_NAME}
    paths = {key: folder / name for key, name in names.items() if (folder / name).is_file()}
    found = [folder / f"mr_{c}.nii.gz" for c in CONTRASTS if (folder / f"mr_{c}.nii.gz").is_file()]
    if len(found) > 1:
        message = f"{folder} holds {found[0].name} and {found[1].name}. Fix: pass the one to register as mr=."
        raise InputError(message)
    return paths | ({"mr": found[0]} if found else {})


def _as_float(volume):
    return Volume(volume.values.astype(np.float32, copy=False), volume.affine)


def _on_grid(labels, image, mask_path, image_path) -> Volume:
    """Return the labels with the affine of the image; refuse grids whose corners are over half a voxel apart."""
    fix = f"Fix: pass the mask of {Path(image_path).name}, or resample it to that image by nearest neighbour."
    if labels.values.shape != image.values.shape:
        message = (
            f"{Path(mask_path).name} does not fit {Path(image_path).name}: expected {image.values.shape} voxels "
            f"(right, anterior, superior), given {labels.values.shape}. {fix}"
        )
        raise InputError(message)
    apart = np.abs(labels.grid.corners_mm() - image.grid.corners_mm()).max()
    if apart > _GRID_TOLERANCE * image.spacing_mm.min():
        message = (
            f"{Path(mask_path).name} does not lie where {Path(image_path).name} does: expected corners within half "
            f"a voxel, given {apart:.2f} mm. {fix}"
        )
        raise InputError(message)
    return Volume(labels.values, image.affine)


# --- checks ---


def _check_intensities(pair):
    ct_low, mr_low = float(pair.ct.values.min()), float(pair.mr.values.min())
    mr_like_ct = mr_low < -_NEGATIVE_SHARE * float(np.percentile(pair.mr.values, 99)) and mr_low < _FAT_HU
    if ct_low > _FAT_HU and mr_like_ct:
        message = (
            f"{pair.key}: CT and MR are swapped: the CT has no value below {ct_low:g}, and the MR falls to {mr_low:g} "
            "like Hounsfield units. Fix: pass the CT (with its mask) first and the MR second."
        )
        raise InputError(message)
    if ct_low > _FAT_HU:
        message = (
            f"{pair.key}: expected a CT in Hounsfield units, in which fat lies below {_FAT_HU:g}, given values "
            f"from {ct_low:g}. Fix: pass the CT as it was exported, neither rescaled nor windowed."
        )
        raise InputError(message)
    if mr_like_ct:
        message = (
            f"{pair.key}: expected an MR image, which has no negative signal, given values from {mr_low:g}. "
            "Fix: pass the MR, not a second CT."
        )
        raise InputError(message)


def _check_orientation(labels, key, modality):
    """Refuse vertebrae that do not descend with their number, or whose bodies lie behind their arches."""
    order = vertebra_labels(labels)
    centres = {label: _centre_mm(labels, label) for label in order}
    falls = [centres[a][2] - centres[b][2] for a, b in zip(order, order[1:], strict=False)]
    fix = "Fix: convert the image and its mask again from DICOM, for example with dcm2niix."
    if falls and np.median(falls) < _LEAST_PITCH_MM:
        message = (
            f"{key}: wrong orientation in the header of the {modality}, or vertebrae numbered upwards: from "
            f"{LEVEL_OF_LABEL[order[0]]} to {LEVEL_OF_LABEL[order[-1]]} each should lie at least "
            f"{_LEAST_PITCH_MM:g} mm below the one before, given {np.median(falls):.1f} mm. {fix}"
        )
        raise InputError(message)
    fronts = [front for label in order if (front := _body_in_front_mm(labels, label)) is not None]
    if fronts and np.median(fronts) < 0:
        message = (
            f"{key}: wrong orientation in the header of the {modality}: the vertebral bodies lie "
            f"{-np.median(fronts):.0f} mm behind the middle of their vertebrae, expected before it. {fix}"
        )
        raise InputError(message)


def _centre_mm(labels, label):
    return apply_affine(labels.affine, np.argwhere(labels.values == label).mean(0))


def _body_in_front_mm(labels, label) -> float | None:
    """How far the thickest place of a vertebra lies in front of its centroid; None for C1 and for small pieces."""
    box = ndimage.find_objects((labels.values == label).astype(np.uint8))[0]
    mask = np.pad(labels.values[box] == label, 1)
    if label == 1 or mask.sum() * np.prod(labels.spacing_mm) < _ENOUGH_MM3:
        return None
    depth = ndimage.distance_transform_edt(mask, sampling=labels.spacing_mm)
    thick = np.argwhere(depth >= 0.8 * depth.max()).mean(0)
    return float(labels.affine[1, :3] @ (thick - np.argwhere(mask).mean(0)))


def _check_overlap(pair):
    if not any(_meets(pair.ct_labels, label, pair.mr) for label in vertebra_labels(pair.ct_labels)):
        boxes = [volume.grid.corners_mm() for volume in (pair.ct, pair.mr)]
        given = [f"{np.round(b.min(0)).tolist()} to {np.round(b.max(0)).tolist()} mm" for b in boxes]
        message = (
            f"{pair.key}: no labelled vertebra of the CT lies inside the MR; the CT reaches from {given[0]}, the MR "
            f"from {given[1]}. Fix: check that both show one person and one part of the spine; if their worlds "
            "differ, lay the MR over the CT first (for example SimpleITK.CenteredTransformInitializer)."
        )
        raise InputError(message)


def _meets(labels, label, image) -> bool:
    """Whether a part of a vertebra lies inside an image."""
    points = apply_affine(labels.affine, np.argwhere(labels.values == label))
    index = apply_affine(np.linalg.inv(image.affine), points)
    return bool(np.any(np.all((index >= -0.5) & (index <= np.array(image.values.shape) - 0.5), axis=1)))


def _check_mr_labels(pair, labels) -> list[str]:
    others = vertebra_labels(pair.mr_labels)
    if not set(labels) & set(others):
        message = (
            f"{pair.key}: no vertebra is labelled in both masks: CT {_names(labels)}; MR {_names(others) or 'none'}. "
            "Fix: number both masks as VerSe does, or leave out the MR mask, which is for scoring only."
        )
        raise InputError(message)
    _check_orientation(pair.mr_labels, pair.key, "MR")
    apart = {"CT": [x for x in labels if x not in others], "MR": [x for x in others if x not in labels]}
    return [f"labelled in the {name} only: {_names(some)}" for name, some in apart.items() if some]


def _names(labels):
    return " ".join(LEVEL_OF_LABEL[label] for label in labels)
