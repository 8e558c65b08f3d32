"""Two radiographs of a CT and the vertebrae in it: what a network learns from to see a spine in three dimensions.

Both radiographs are digitally reconstructed from one volume as in Bayat et al. (2020): cone beams from the front and
from the patient's right, source to detector 1800 mm, source to isocentre 1500 mm. Only the strip around the spine is
rendered: patches of 64 x 64 pixels around 17 vertebrae overlap and would take more rays. Every vertebra is sampled on
a lattice of `CUBE_MM` through its body centre, along the world's axes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import ndimage
from torch.nn.functional import pad

from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.cone_beam import ConeBeam
from spinelib.imaging.drr import attenuation_per_mm, line_integrals
from spinelib.imaging.labels import label_share
from spinelib.imaging.verse import BODY_SHARE, LabelledCT
from spinelib.levels import T1_TO_L5, VERSE_LABELS
from spinelib.record import written_atomically

LABELS = tuple(VERSE_LABELS[level] for level in T1_TO_L5)
"""VerSe labels of T1 to L5, 8 to 24: the levels of Bayat et al."""

CUBE, CUBE_MM = 64, 1.5
"""Voxels a side of the cube that holds a vertebra (96 mm, which 97 to 100 % of a vertebra fit into), and their size."""

PATCH, PIXEL_MM = 64, 1.8
"""Pixels a side of a radiograph's patch, and their size on the detector: 1.5 mm at the isocentre."""

BEHIND_MM = 12.0
"""How far the middle of the cube lies behind the body centre, so that the spinous process is inside."""

REACH_MM = 24.0
"""Patches may be cut around points up to this far from a body centre, along each axis."""

VIEWS = ("frontal", "lateral")
_FORMAT = "spinelib biplanar 1"
_GOES_ON_MM = 90.0  # a CT ends above and below where rays still cross the patient: its last slices are repeated
_MARGIN = 20  # pixels around the patches that `REACH_MM` needs, even for a vertebra 250 mm before the isocentre


@dataclass(frozen=True, eq=False)
class BiplanarSubject:
    """Two radiographs of one person and n vertebrae.

    Attributes
    ----------
    key : str
    beams : tuple of ConeBeam
        Frontal and lateral; their detectors are the strips that were rendered.
    radiographs : tuple of ndarray (rows, cols), float16
        Line integrals of attenuation, frontal and lateral.
    labels : tuple of int
        VerSe labels, cranial to caudal.
    bodies_mm : ndarray (n, 3)
        Body centres, world RAS mm.
    masks : PackedMasks
        Vertebrae on the voxels of `cube_affine(bodies_mm[i])`.
    shadows : dict of str to tuple of PackedMasks
        'body' and 'whole': projected masks on the pixels of the frontal and lateral strip.
    frames : ndarray (n, 3, 3), optional
        Where poses are known: columns are the right, anterior and superior axes of a vertebra in the world.
    """

    key: str
    beams: tuple[ConeBeam, ConeBeam]
    radiographs: tuple[np.ndarray, np.ndarray]
    labels: tuple[int, ...]
    bodies_mm: np.ndarray
    masks: "PackedMasks"
    shadows: dict[str, tuple["PackedMasks", "PackedMasks"]]
    frames: np.ndarray | None = None

    def save(self, path) -> Path:
        """Write one safetensors file, whole or not at all; returns its path."""
        tables = {"bodies_mm": self.bodies_mm, **dict(zip(VIEWS, self.radiographs, strict=True))}
        tables |= {} if self.frames is None else {"frames": self.frames}
        for name, masks in self._packed().items():
            tables |= {f"{name}.bits": masks.bits, f"{name}.boxes": masks.boxes}
        header = {"key": self.key, "labels": self.labels, "beams": [beam.to_dict() for beam in self.beams]}
        about = {"format": _FORMAT, "header": json.dumps(header)}
        return written_atomically(path, [".safetensors"], partial(save_file, tables, metadata=about))

    @classmethod
    def load(cls, path) -> "BiplanarSubject":
        """Read a file of `save`.

        Raises
        ------
        InputError
            If it is not one.
        """
        try:
            with safe_open(path, "np") as file:
                about, tables = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:  # safetensors has no public class of its own for a broken file
            message = f"{path} cannot be read ({error}). Fix: delete it and render it again."
            raise InputError(message) from error
        if about.get("format") != _FORMAT:
            message = (
                f"{path}: expected the format {_FORMAT!r}, given {about.get('format')!r}. "
                "Fix: make it with render_biplanar_cohort."
            )
            raise InputError(message)
        header = json.loads(about["header"])
        packed = {
            name.removesuffix(".bits"): PackedMasks(bits, tables[name.replace(".bits", ".boxes")])
            for name, bits in tables.items()
            if name.endswith(".bits")
        }
        return cls(
            header["key"],
            tuple(ConeBeam.from_dict(beam) for beam in header["beams"]),
            (tables["frontal"], tables["lateral"]),
            tuple(header["labels"]),
            tables["bodies_mm"],
            packed["masks"],
            {kind: (packed[f"{kind}.frontal"], packed[f"{kind}.lateral"]) for kind in ("body", "whole")},
            tables.get("frames"),
        )

    def _packed(self):
        named = {"masks": self.masks}
        for kind, views in self.shadows.items():
            named |= {f"{kind}.{view}": masks for view, masks in zip(VIEWS, views, strict=True)}
        return named


@dataclass(frozen=True, eq=False)
class PackedMasks:
    """Masks of any size on a common lattice, eight voxels a byte.

    Attributes
    ----------
    bits : ndarray of uint8
        The boxes one after another, each from a byte of its own.
    boxes : ndarray (n, 2, d), int32
        First index and size of every mask's box.
    """

    bits: np.ndarray
    boxes: np.ndarray

    @classmethod
    def pack(cls, masks: Sequence[tuple[np.ndarray, np.ndarray]]) -> "PackedMasks":
        """Pack pairs of a boolean array and the index of its first element."""
        bits, boxes = [], []
        for mask, first in masks:
            box = tuple(ndimage.find_objects(mask.astype(np.uint8))[0] if mask.any() else [slice(0)] * mask.ndim)
            boxes.append([np.add(first, [side.start or 0 for side in box]), mask[box].shape])
            bits.append(np.packbits(mask[box]))
        return cls(np.concatenate(bits), np.array(boxes, np.int32))

    def cut(self, number: int, first, size: int) -> np.ndarray:
        """Return the cube or square of `size` elements from index `first` (d,) of a mask, boolean."""
        counts = self.boxes[:, 1].prod(axis=1)
        start = int((-(-counts[:number] // 8)).sum())
        box = np.unpackbits(self.bits[start : start + -(-counts[number] // 8)], count=counts[number])
        box = box.reshape(self.boxes[number, 1]).astype(bool)
        return cut_out(box, np.asarray(first) - self.boxes[number, 0], size)


def cut_out(values: np.ndarray, first, size: int) -> np.ndarray:
    """Return the part of `size` elements a side from index `first`, which may be negative; zero outside."""
    out = np.zeros((size,) * values.ndim, values.dtype)
    spans = [(max(0, f), min(n, f + size)) for f, n in zip(first, values.shape, strict=True)]
    if all(low < high for low, high in spans):
        there = tuple(slice(low - f, high - f) for (low, high), f in zip(spans, first, strict=True))
        out[there] = values[tuple(slice(*span) for span in spans)]
    return out


def cube_affine(body_mm) -> np.ndarray:
    """Return the affine (4, 4) of the cube of a vertebra, voxel index (right, anterior, superior) to world mm."""
    affine = np.diag([CUBE_MM, CUBE_MM, CUBE_MM, 1.0])
    affine[:3, 3] = np.asarray(body_mm, float) - [0.0, BEHIND_MM, 0.0] - CUBE_MM * (CUBE - 1) / 2
    return affine


def patch_corner(beam: ConeBeam, point_mm) -> np.ndarray:
    """Return the detector pixel (row, col), int, of the first pixel of the patch around a projected point."""
    return np.rint(beam.project(np.asarray(point_mm, float)) - (PATCH - 1) / 2).astype(int)


def make_pair(scan: LabelledCT) -> BiplanarSubject:
    """Return the radiographs of a CT with a vertebra mask.

    Vertebrae that a border of the volume cuts are left out. The body of a vertebra is its mask opened by a ball of
    `BODY_SHARE` of the greatest depth in front, the piece that holds the deepest voxel, as in `body_centroids_mm`.

    Raises
    ------
    InputError
        If no vertebra T1 to L5 lies whole in the volume.
    """
    values = np.asarray(scan.labels.values)
    faces = [np.unique(values.take([0, -1], axis)) for axis in range(3)]
    outside = scan.cut | set(np.concatenate(faces).tolist())
    boxes = dict(enumerate(ndimage.find_objects(values), start=1))
    bodies = {
        label: scan.centroids_mm[label]
        for label in LABELS
        if label in scan.centroids_mm and label not in outside and boxes.get(label) is not None
    }
    return project_pair(
        scan.key, scan.ct, bodies, lambda label, affine: _resampled(scan.labels, label, boxes[label], affine)
    )


# --- projecting ---


def project_pair(key, ct: Volume, bodies_mm: dict, vertebra_on: Callable, frames=None) -> BiplanarSubject:
    """Return the radiographs of a CT whose vertebrae are known in another way than by a mask.

    Parameters
    ----------
    key : str
    ct : Volume
        Hounsfield units.
    bodies_mm : dict of int to ndarray (3,)
        Body centres by label, cranial to caudal; the isocentre is the middle of their box.
    vertebra_on : callable
        `vertebra_on(label, affine)` returns the vertebra and its body, boolean, in a box of the lattice whose indices
        `affine` takes to the world, and the index of the box's first voxel.
    frames : ndarray (n, 3, 3), optional
        See `BiplanarSubject`.

    Raises
    ------
    InputError
        If there is no vertebra.
    """
    if not bodies_mm:
        message = f"{key}: no vertebra T1 to L5 lies whole in the volume, so there is nothing to learn from."
        raise InputError(message)
    bodies = np.array(list(bodies_mm.values()))
    isocentre = (bodies.min(axis=0) + bodies.max(axis=0)) / 2
    beams = tuple(_strip(make(isocentre, (1, 1), PIXEL_MM), bodies) for make in (ConeBeam.frontal, ConeBeam.lateral))
    attenuation, affine = _continued(attenuation_per_mm(ct.values), ct)
    images = tuple(line_integrals(attenuation, affine, beam).numpy().astype(np.float16) for beam in beams)
    masks, shadows = [], {kind: ([], []) for kind in ("body", "whole")}
    for label, centre in bodies_mm.items():
        affine = cube_affine(centre)
        whole, body, first = vertebra_on(label, affine)
        masks.append((whole, first))
        for kind, part in (("body", body), ("whole", whole)):
            for beam, views in zip(beams, shadows[kind], strict=True):
                views.append(_shadow(part, first, affine, beam))
    packed = {kind: tuple(map(PackedMasks.pack, views)) for kind, views in shadows.items()}
    return BiplanarSubject(key, beams, images, tuple(bodies_mm), bodies, PackedMasks.pack(masks), packed, frames)


def _strip(beam, bodies):
    """Return the beam on the detector that holds the patches around all points near the bodies."""
    corners = np.array([patch_corner(beam, body) for body in bodies])
    first, last = corners.min(axis=0) - _MARGIN, corners.max(axis=0) + PATCH + _MARGIN
    return beam.cropped((first + last - 1) / 2, tuple(int(n) for n in last - first))


def _continued(attenuation, ct: Volume):
    """Return attenuation and affine with the lowest and the highest slice repeated."""
    slices = int(np.ceil(_GOES_ON_MM / ct.spacing_mm[2]))
    affine = ct.affine.copy()
    affine[:3, 3] -= slices * affine[:3, 2]
    return pad(attenuation, (slices, slices), mode="replicate"), affine


def _shadow(mask, first, affine, beam):
    """Return the pixels that rays through a mask meet, and the first of them; eight points a voxel leave no gap."""
    index = np.argwhere(mask) + first
    octants = np.stack(np.meshgrid(*[(-0.25, 0.25)] * 3), axis=-1).reshape(-1, 1, 3)
    pixels = np.rint(beam.project(nib.affines.apply_affine(affine, (index + octants).reshape(-1, 3)))).astype(int)
    corner = pixels.min(axis=0)
    shadow = np.zeros(pixels.max(axis=0) - corner + 1, bool)
    shadow[tuple((pixels - corner).T)] = True
    return shadow, corner


def _resampled(labels: Volume, label: int, box, affine):
    """Return a label on the lattice of `affine`: the whole vertebra, its body, and the first index."""
    share, first = label_share(labels, label, box, affine)
    whole = share >= 0.5
    return whole, _body(whole), first


def _body(whole):
    if not whole.any():
        return whole
    solid = np.pad(ndimage.binary_fill_holes(whole), 1)
    depth = ndimage.distance_transform_edt(solid)
    middle = np.argwhere(solid)[:, 1].mean()
    front = np.where(np.arange(solid.shape[1])[:, None] >= middle, depth, 0)
    radius = BODY_SHARE * front.max()
    pieces, _ = ndimage.label(depth >= radius)
    core = pieces == pieces.flat[front.argmax()]
    opened = ndimage.distance_transform_edt(~core) <= radius
    return opened[1:-1, 1:-1, 1:-1] & whole
