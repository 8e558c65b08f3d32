"""CT to individual vertebrae: one file of weights, one call."""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import ndimage
from torch.nn import functional

from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.labels import label_share
from spinelib.imaging.readers import straightened
from spinelib.imaging.verse import body_centroids_mm
from spinelib.levels import LEVEL_ORDER
from spinelib.models.enumeration import gap_ratios, name_levels
from spinelib.models.scan_cache import WORKING_MM
from spinelib.models.scan_grid import OUTSIDE, crop, normalised, overlap, resampled, sample_separably
from spinelib.models.traversal import Outline, spine_heat, traverse
from spinelib.models.vertebra_datasets import LEVEL_CUBE, PATCH, SPINE_STEP
from spinelib.models.vertebra_networks import LevelNet, SpineFinder, SurfaceRefiner, VertebraUNet, VoteUNet
from spinelib.models.voting import gather, vote
from spinelib.record import written_atomically

FORMAT = "spinelib-vertebrae-3"
SHIPPED_WEIGHTS = "vertebrae.safetensors"
ORDINARY = tuple(range(1, 25))
"""VerSe labels of C1 to L5."""

_LEAST_COMPLETE = 0.2
"""Probability from which a vertebra is given out: one left out costs more than a cut one too many.

Of 228 whole vertebrae of 24 scans that no training has seen none is lost (1 at one half), 5 of 36 cut ones are given
out (1).
"""

_MOST_TURNED_DEG = 10.0  # of the axes of a file; training knows patients who lie turned by 15
_AIR_HU = -1024.0


@dataclass(frozen=True)
class Found:
    """One vertebra of a segmentation.

    Attributes
    ----------
    label : int
        VerSe label.
    centroid_mm : ndarray (3,)
        Centre of the body, world RAS mm.
    complete : bool
        False if the border of the scan cuts it; such vertebrae are left out of the mask.
    level_probability : float
        How sure its level is, given all vertebrae of the scan.
    """

    label: int
    centroid_mm: np.ndarray
    complete: bool
    level_probability: float


@dataclass(frozen=True)
class Segmentation:
    """Vertebrae of a CT.

    Attributes
    ----------
    labels : Volume
        VerSe labels of complete vertebrae on the grid of the CT, uint8.
    found : tuple of Found
        All vertebrae, top to bottom.
    flags : tuple of str
        What a user should look at.
    """

    labels: Volume
    found: tuple[Found, ...]
    flags: tuple[str, ...]


@dataclass
class VertebraSegmenter:
    """The networks of `vertebra_networks` and the way through a scan.

    Attributes
    ----------
    finder : SpineFinder
    voter : VoteUNet
    refiner : SurfaceRefiner
    outliner : VertebraUNet
    namer : LevelNet
    card : dict
        What the weights are: command, data, seed, date, figures.
    """

    finder: SpineFinder
    voter: VoteUNet
    refiner: SurfaceRefiner
    outliner: VertebraUNet
    namer: LevelNet
    card: dict = field(default_factory=dict)

    def __post_init__(self):
        for net in self._nets().values():
            net.eval()

    def segment(self, ct: Volume, one_by_one: bool = False) -> Segmentation:
        """Return the vertebrae of a CT.

        Parameters
        ----------
        ct : Volume
            Hounsfield units, any spacing; axes (right, anterior, superior) as `read_volume` returns them. If they are
            turned by more than 10 degrees, the scan is looked at along the axes of the world.
        one_by_one : bool
            Outline one vertebra after another with the memory of those above (Serrador 2024), not all by votes.
        """
        if _turned_deg(ct) > _MOST_TURNED_DEG:
            found = self.segment(straightened(ct, _AIR_HU), one_by_one)
            return replace(found, labels=_carried(found.labels, ct))
        working = resampled(ct, WORKING_MM)
        scan = normalised(torch.from_numpy(working.values))
        heat = spine_heat(self.finder, scan)
        if one_by_one:
            outlines, flags = traverse(self.outliner, scan, heat)
        else:
            outlines, flags = gather(*vote(self.voter, self.refiner, scan, heat))
        if not outlines:
            return Segmentation(Volume(np.zeros(ct.values.shape, np.uint8), ct.affine), (), flags)
        levels, complete = self._read_levels(scan, outlines)
        labels, sure, more = _named(outlines, levels, complete > 0.5)
        whole = complete > _LEAST_COMPLETE
        everything = _pasted(outlines, labels, ct)
        centroids = body_centroids_mm(everything)
        found = tuple(
            Found(int(label), centroids[int(label)], bool(all_there), float(share))
            for label, all_there, share in zip(labels, whole, sure, strict=True)
            if int(label) in centroids
        )
        kept = np.zeros(max(LEVEL_ORDER) + 1, np.uint8)
        kept[labels[whole]] = labels[whole]
        return Segmentation(Volume(kept[everything.values], ct.affine), found, (*flags, *more))

    @torch.inference_mode()
    def _read_levels(self, scan, outlines):
        """Return log-probabilities (n, 26) of levels and probabilities (n,) of completeness."""
        size = LEVEL_CUBE * SPINE_STEP
        levels, complete = [], []
        for outline in outlines:
            corner = np.rint(outline.centre - (size - 1) / 2).astype(int)
            mask = torch.zeros(size, size, size)
            inside, there = overlap(mask.shape, outline.corner - corner, PATCH)
            mask[inside] = (outline.probability[there] > 0.5).float()
            both = torch.stack([crop(scan, corner, size, OUTSIDE), mask])[None]
            both = functional.avg_pool3d(both, SPINE_STEP)
            both[:, 1] = (both[:, 1] > 0.5).float()
            level, whole = self.namer(torch.cat([both, both.flip(2)]))
            levels.append(torch.log_softmax(level.float().mean(0), 0).numpy())
            complete.append(float(torch.sigmoid(whole.float().mean())))
        return np.stack(levels), np.array(complete)

    def save(self, path) -> None:
        """Write one safetensors file in 16 bits; the header names format, channels and card."""
        tensors = {
            f"{name}.{key}": value.detach().cpu().half().contiguous()
            for name, net in self._nets().items()
            for key, value in net.state_dict().items()
        }
        channels = {name: net.channels for name, net in self._nets().items() if hasattr(net, "channels")}
        header = {"format": FORMAT, "channels": json.dumps(channels), "card": json.dumps(self.card)}
        written_atomically(path, [".safetensors"], partial(save_file, tensors, metadata=header))

    def _nets(self):
        names = ("finder", "voter", "refiner", "outliner", "namer")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def load(cls, path=None) -> "VertebraSegmenter":
        """Read weights; without a path, the ones shipped with the package.

        Raises
        ------
        InputError
            If the file is missing, corrupt, or not made by this package.
        """
        path = Path(path) if path else Path(str(files("spinelib") / "weights" / SHIPPED_WEIGHTS))
        if not path.is_file():
            message = f"no weights at {path}. Make them with: spinelib train vertebrae --render 400"
            raise InputError(message)
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            message = f"{path} is not a readable safetensors file ({error}). Fetch or train the weights again."
            raise InputError(message) from error
        if header.get("format") != FORMAT:
            message = f"{path} has the format {header.get('format')!r}, expected {FORMAT!r}. Train the weights again."
            raise InputError(message)
        channels = json.loads(header["channels"])
        nets = {
            "finder": SpineFinder(),
            "voter": VoteUNet(channels["voter"]),
            "refiner": SurfaceRefiner(),
            "outliner": VertebraUNet(channels["outliner"]),
            "namer": LevelNet(),
        }
        try:
            for name, net in nets.items():
                own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
                net.load_state_dict(own)
        except RuntimeError as error:
            message = f"the weights in {path} do not fit the networks they name: {error}"
            raise InputError(message) from error
        return cls(**nets, card=json.loads(header["card"]))


def _named(outlines, levels, complete):
    """Return labels (0: not named), their confidence and flags.

    Vertebrae that the border cuts at either end say little of their level, and below L5 they may be sacrum: the
    others are named, and these are counted on from them, without T13 and L6.
    """
    inner = np.flatnonzero(complete) if complete.any() else np.arange(len(outlines))
    first, last = inner[0], inner[-1] + 1
    centres = np.array([outline.centre for outline in outlines[first:last]]) * WORKING_MM
    naming = name_levels(levels[first:last], complete[first:last], gap_ratios(centres) if len(centres) > 1 else None)
    labels, sure = np.zeros(len(outlines), int), np.zeros(len(outlines))
    labels[first:last], sure[first:last] = naming.labels, naming.level_confidence
    top, bottom = (LEVEL_ORDER.index(labels[i]) for i in (first, last - 1))
    above = [label for label in ORDINARY if LEVEL_ORDER.index(label) < top]
    below = [label for label in ORDINARY if LEVEL_ORDER.index(label) > bottom]
    for i in range(first - 1, -1, -1):
        labels[i], sure[i] = above.pop() if above else 0, sure[first]
    for i in range(last, len(outlines)):
        labels[i], sure[i] = below.pop(0) if below else 0, sure[last - 1]
    return labels, sure, naming.flags


def _pasted(outlines: list[Outline], numbers, ct: Volume) -> Volume:
    """Return the outlines on the grid of the CT, numbered.

    What is interpolated is by how much a vertebra beats its rivals, so that no voxel belongs to two.
    """
    out = np.zeros(ct.values.shape, np.uint8)
    working = np.maximum(np.rint(np.array(ct.values.shape) * ct.spacing_mm / WORKING_MM), 1)
    scale = working / np.array(ct.values.shape)
    for number, outline in zip(numbers, outlines, strict=True):
        if not number:
            continue
        margin = _margin(outline, [other for other in outlines if other is not outline])
        places = np.argwhere((margin > 0).numpy())
        if not len(places):
            continue
        low, high = places.min(0) - 1 + outline.corner, places.max(0) + 1 + outline.corner
        first = np.maximum(np.floor((low + 0.5) / scale - 0.5), 0).astype(int)
        last = np.minimum(np.ceil((high + 0.5) / scale - 0.5) + 1, out.shape).astype(int)
        index = [
            (np.arange(a, b) + 0.5) * s - 0.5 - c for a, b, s, c in zip(first, last, scale, outline.corner, strict=True)
        ]
        inside = (sample_separably(margin, index) > 0).numpy()
        out[tuple(slice(a, b) for a, b in zip(first, last, strict=True))][inside] = number
    return Volume(out, ct.affine)


def _turned_deg(volume):
    """Return the largest angle between an axis of a volume and that of the world."""
    return float(np.degrees(np.arccos(np.clip(np.diag(volume.affine)[:3] / volume.spacing_mm, -1, 1)).max()))


def _carried(labels: Volume, onto: Volume) -> Volume:
    """Return labels on the grid of another volume: where a label, interpolated, passes one half."""
    out = np.zeros(onto.values.shape, np.uint8)
    for label, box in enumerate(ndimage.find_objects(labels.values), start=1):
        if box is None:
            continue
        share, first = label_share(labels, label, box, onto.affine)
        start, stop = np.clip([first, first + share.shape], 0, out.shape)
        inside = share[tuple(map(slice, start - first, stop - first))] > 0.5
        out[tuple(map(slice, start, stop))][inside] = label
    return Volume(out, onto.affine)


def _margin(outline, others):
    """Return min(2 p - 1, p - q) with q the greatest probability of any other vertebra."""
    own = outline.probability.float()
    rival = torch.zeros_like(own)
    for other in others:
        inside, there = overlap(own.shape, other.corner - outline.corner, PATCH)
        if inside is not None:
            rival[inside] = torch.maximum(rival[inside], other.probability.float()[there])
    return torch.minimum(2 * own - 1, own - rival)
