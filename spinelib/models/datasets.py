"""In-memory training sets for the locator and the curve regressor, with augmentation of image AND curves."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import Dataset

from spinelib.geometry import PlanarTransform, Projection
from spinelib.models.crop import CANVAS_PIXELS, PITCH_MM, Window, curves_to_rows, standardised
from spinelib.models.locator import LOCATOR_PITCH_MM, landmarks_mm, overview
from spinelib.spine import Curves

_MARGIN_PIXELS = 288
"""Side of the cached image: room for shift and rotation around the 224 pixel window."""


@dataclass(frozen=True)
class CurveExample:
    """What training needs of a subject.

    Attributes
    ----------
    key : str
    dxa : Projection
        Channels bone and tissue.
    curves : Curves
        T1-L5, the depth as measured.
    extended : Curves
        The same column with more height at both ends (may equal `curves`).
    """

    key: str
    dxa: Projection
    curves: Curves
    extended: Curves


class CurveDataset(Dataset):
    """Windows and their target rows.

    Parameters
    ----------
    examples : iterable of CurveExample
    windows : sequence of Window
        One per example, from the locator (or from the truth for training, where `augment` jitters it).
    augment : bool
        Left-right flip; rotation, shift and scale with standard deviations of 1.5 degrees, 3 mm and 1.5% (the
        locator is off by about a millimetre); short fields of view, missing arms, contrast and noise. The curves
        move with the image.
    """

    def __init__(self, examples, windows, augment: bool, seed: int = 0):
        self.windows, self.augment, self.seed, self.epoch = list(windows), augment, seed, 0
        self.images, self.curves = [], []
        for example, window in zip(examples, self.windows, strict=True):
            image = standardised(example.dxa).resampled(window.grid(_MARGIN_PIXELS)).values
            self.images.append(torch.from_numpy(image).half())
            depth = float(example.curves.sagittal_mm[1].mean())
            self.curves.append(example.extended.shifted(anterior_mm=-depth))

    def __len__(self):
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random numbers."""
        self.epoch = epoch

    def __getitem__(self, index):
        window, curves, image = self.windows[index], self.curves[index], self.images[index].float()
        if not self.augment:
            return _item(_centre_crop(image), *curves_to_rows(curves, window))
        rng = np.random.default_rng([self.seed, self.epoch, index])
        image, curves = _flip(image, curves, window) if rng.random() < 0.5 else (image, curves)
        motion, scale = _random_motion(rng, window)
        image = _contrast(_field_of_view(_sample(image, motion, scale, window), rng), rng)
        rows, valid = curves_to_rows(_scaled(curves.moved(motion), scale, window), window)
        return _item(image, rows, valid)

    def plain(self) -> dict[str, torch.Tensor]:
        """Return every window and its mirror image without other augmentation, stacked."""
        items = []
        for image, curves, window in zip(self.images, self.curves, self.windows, strict=True):
            for pixels, lines in ((image.float(), curves), _flip(image.float(), curves, window)):
                items.append(_item(_centre_crop(pixels), *curves_to_rows(lines, window)))
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    def rows(self) -> np.ndarray:
        """Return all targets without augmentation, shape (n, 209, 6) mm."""
        return np.stack([curves_to_rows(c, w)[0] for c, w in zip(self.curves, self.windows, strict=False)])


class LandmarkDataset(Dataset):
    """Overviews and landmarks for `SpineLocator`; augmentation flips, shifts and cuts the field of view."""

    def __init__(self, examples, augment: bool, seed: int = 0):
        self.augment, self.seed, self.epoch = augment, seed, 0
        pairs = [(overview(e.dxa), landmarks_mm(e.curves, e.dxa)) for e in examples]
        self.images = [torch.from_numpy(image).half() for image, _ in pairs]
        self.landmarks = [torch.from_numpy(target) for _, target in pairs]

    def __len__(self):
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random numbers."""
        self.epoch = epoch

    def __getitem__(self, index):
        image, target = self.images[index].float(), self.landmarks[index]
        if self.augment:
            image, target = _shift_and_cut(image, target, np.random.default_rng([self.seed, self.epoch, index]))
        return {"image": image, "landmarks_mm": target}


def true_window(curves: Curves) -> Window:
    """Return the window that the truth would choose; for training only, where it is jittered."""
    upper, lower = (float(v) for v in curves.heights_mm[[0, -1]])
    middle = (upper + lower) / 2
    return Window(middle, float(np.interp(-middle, -curves.heights_mm, curves.coronal_mm[1])), upper, lower)


def _item(image, rows, valid):
    return {
        "image": image.contiguous(),
        "rows_mm": torch.from_numpy(rows.astype(np.float32)),
        "valid": torch.from_numpy(valid.astype(np.float32)),
    }


def _centre_crop(image):
    margin = (_MARGIN_PIXELS - CANVAS_PIXELS) // 2
    return image[:, margin : margin + CANVAS_PIXELS, margin : margin + CANVAS_PIXELS]


def _flip(image, curves, window):
    about = curves.shifted(right_mm=-window.right_mm).mirrored().shifted(right_mm=window.right_mm)
    return image.flip(2), about


def _random_motion(rng, window):
    motion = PlanarTransform(
        rng.normal(0, 1.5), rng.normal(0, 3), rng.normal(0, 3), window.right_mm, window.superior_mm
    )
    return motion, float(np.exp(rng.normal(0, 0.015)))


def _scaled(curves, scale, window):
    heights = window.superior_mm + (curves.heights_mm - window.superior_mm) * scale
    coronal = window.right_mm + (curves.coronal_mm - window.right_mm) * scale
    return Curves(heights, coronal, curves.sagittal_mm * scale)


def _sample(image, motion, scale, window):
    """Return the 224 window of the cached image after motion, then scaling, about the window's middle."""
    grid = window.grid()
    right, superior = np.meshgrid(grid.lateral_mm(), grid.superior_mm())
    right = window.right_mm + (right - window.right_mm) / scale
    superior = window.superior_mm + (superior - window.superior_mm) / scale
    right, superior = motion.inverse().apply(right, superior)
    half = _MARGIN_PIXELS * PITCH_MM / 2
    places = np.stack([(window.right_mm - right) / half, (window.superior_mm - superior) / half], axis=-1)
    places = torch.from_numpy(places.astype(np.float32))[None]
    return functional.grid_sample(image[None], places, align_corners=False)[0]


def _field_of_view(image, rng):
    size = image.shape[-1]
    if rng.random() < 0.06:
        image[:, : int(rng.uniform(0, 0.35) * size)] = 0
    if rng.random() < 0.06:
        image[:, size - int(rng.uniform(0, 0.35) * size) :] = 0
    if rng.random() < 0.06:
        side = int(rng.uniform(0.1, 0.28) * size)
        image[:, :, :side] = 0
        image[:, :, size - side :] = 0
    return image


def _contrast(image, rng):
    gains = torch.from_numpy(np.exp(rng.normal(0, 0.03, (2, 1, 1))).astype(np.float32))
    power = float(np.exp(rng.normal(0, 0.05)))
    noise = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.03), image.shape).astype(np.float32))
    if rng.random() < 0.05:
        image = image[[0, 0]]
    return (image.clamp(min=0).pow(power) * gains + noise) * (image > 0)


def _shift_and_cut(image, target, rng):
    if rng.random() < 0.5:
        image, target = image.flip(2), target * torch.tensor([1.0, 1.0, -1.0])
    down, across = rng.integers(-14, 15), rng.integers(-6, 7)
    image = torch.roll(image, (int(down), int(across)), (1, 2))
    image = _blank_wrapped(image, down, across)
    target = target - torch.tensor([down, down, across], dtype=torch.float32) * LOCATOR_PITCH_MM
    if rng.random() < 0.5:
        image, target = _short_view(image, target, rng)
    gains = torch.from_numpy(rng.uniform(0.8, 1.25, (2, 1, 1)).astype(np.float32))
    return image * gains, target


def _blank_wrapped(image, down, across):
    image = image.clone()
    if down > 0:
        image[:, :down] = 0
    elif down < 0:
        image[:, down:] = 0
    if across > 0:
        image[:, :, :across] = 0
    elif across < 0:
        image[:, :, across:] = 0
    return image


def _short_view(image, target, rng):
    """Keep a band of rows that holds at least half of T1-L5, and maybe no arms; then centre it."""
    middle = image.shape[1] / 2
    upper, lower = (middle - float(t) / LOCATOR_PITCH_MM for t in target[:2])
    length = lower - upper
    first = int(np.clip(upper + rng.uniform(-0.6, 0.45) * length, 0, image.shape[1] - 2))
    last = int(np.clip(lower - rng.uniform(-0.6, 0.45) * length, first + 8, image.shape[1]))
    kept = torch.zeros_like(image)
    kept[:, first:last] = image[:, first:last]
    if rng.random() < 0.5:
        spine = image.shape[2] / 2 - float(target[2]) / LOCATOR_PITCH_MM
        half = rng.uniform(16, 26)
        columns = torch.arange(image.shape[2], dtype=torch.float32)
        kept = kept * ((columns - spine).abs() < half)
    shift = round(middle - (first + last) / 2)
    kept = torch.roll(kept, shift, 1)
    return kept, target - torch.tensor([shift, shift, 0.0]) * LOCATOR_PITCH_MM
