"""Labelled CT scans on the working grid, one file each, of which training reads only the parts it needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy import ndimage

from spinelib.errors import InputError
from spinelib.imaging.verse import LabelledCT
from spinelib.levels import LEVEL_ORDER
from spinelib.models.scan_grid import labels_on, resampled
from spinelib.record import written_atomically

WORKING_MM = 2.0
"""Voxel size on which vertebrae are found and outlined."""

_HIGHEST = max(LEVEL_ORDER)


@dataclass(frozen=True)
class CachedScan:
    """One scan on the working grid; arrays are read when asked for.

    Attributes
    ----------
    path : Path
    """

    path: Path

    @cached_property
    def small(self) -> dict[str, np.ndarray]:
        """Tables: 'profile' (29, S) voxels per slice, 'bodies' and 'centres' (29, 3) voxel index, 'cut' (29,)."""
        with safe_open(self.path, "pt") as file:
            return {name: file.get_tensor(name).numpy() for name in ("profile", "bodies", "centres", "cut")}

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (R, A, S)."""
        with safe_open(self.path, "pt") as file:
            return tuple(file.get_slice("ct").get_shape())

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """Labels present, cranial to caudal."""
        present = self.small["profile"].sum(axis=1) > 0
        return tuple(label for label in LEVEL_ORDER if present[label])

    def box(self, name: str, box) -> torch.Tensor:
        """Return a part of 'ct' (int16 HU) or 'labels' (uint8)."""
        with safe_open(self.path, "pt") as file:
            return file.get_slice(name)[tuple(box)]


def cache_scan(scan: LabelledCT, folder) -> CachedScan:
    """Write a scan to `folder` on the working grid and return it; an existing file is kept.

    Raises
    ------
    InputError
        If the scan holds no vertebra.
    """
    path = Path(folder) / f"{scan.key}.safetensors"
    if not path.is_file():
        written_atomically(path, [".safetensors"], partial(save_file, _tensors(scan)))
    return CachedScan(path)


def pooled(scans: Iterable[CachedScan], factor: int) -> list[torch.Tensor]:
    """Return whole scans averaged over `factor` voxels a side, float16 HU."""
    out = []
    for scan in scans:
        whole = scan.box("ct", [slice(0, n) for n in scan.shape])[None].float()
        out.append(torch.nn.functional.avg_pool3d(whole, factor, ceil_mode=True)[0].half())
    return out


def _tensors(scan):
    ct = resampled(scan.ct, WORKING_MM)
    labels = labels_on(scan.labels, ct.grid)
    labels[~np.isin(labels, LEVEL_ORDER)] = 0
    if not labels.any():
        message = f"scan {scan.key} holds no vertebra C1-L6; nothing can be learnt from it."
        raise InputError(message)
    inverse = np.linalg.inv(ct.affine)
    bodies, centres = np.full((2, _HIGHEST + 1, 3), np.nan, np.float32)
    cut = np.zeros(_HIGHEST + 1, bool)
    cut[[label for label in scan.cut if label <= _HIGHEST]] = True
    for label, centre in scan.centroids_mm.items():
        if label <= _HIGHEST:
            bodies[label] = inverse[:3, :3] @ centre + inverse[:3, 3]
    profile = np.zeros((_HIGHEST + 1, labels.shape[2]), np.int32)
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        if window is not None:
            mask = labels[window] == label
            profile[label, window[2]] = mask.sum(axis=(0, 1))
            centres[label] = np.argwhere(mask).mean(axis=0) + [part.start for part in window]
    arrays = {
        "ct": np.rint(ct.values.clip(-1024, 3071)).astype(np.int16),
        "labels": labels,
        "profile": profile,
        "bodies": bodies,
        "centres": centres,
        "cut": cut,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
