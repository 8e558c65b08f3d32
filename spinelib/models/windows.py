"""Windows of many subjects as tensors: what kernel regression works on, and how training spoils some of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from spinelib.geometry import Projection
from spinelib.models.crop import PITCH_MM, Window, standardised
from spinelib.spine import Curves

WINDOW_PIXELS = 288
"""Side of the stored square, 720 mm: room for frames longer than the networks' 560 mm."""

UNSEEN = -1.0
"""Brightness outside the field of view."""

_SPOILT_SHARE = 0.25


@dataclass(frozen=True)
class WindowSet:
    """Windows of n subjects; lengths are relative to the middle of each window.

    Attributes
    ----------
    images : Tensor (n, 2, 288, 288), half
        Standardised bone and tissue, 2.5 mm pixels, `UNSEEN` outside the field of view.
    ends_mm : Tensor (n, 2)
        Height of T1's upper and L5's lower end above the middle, as estimated.
    """

    images: Float[Tensor, "n 2 288 288"]
    ends_mm: Float[Tensor, "n 2"]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, places) -> "WindowSet":
        return WindowSet(self.images[places], self.ends_mm[places])

    def to(self, device) -> "WindowSet":
        """Return the set on a device."""
        return WindowSet(self.images.to(device), self.ends_mm.to(device))

    @classmethod
    def of(cls, images: Iterable[Projection], windows: Iterable[Window]) -> "WindowSet":
        """Return the windows of images (which may be read one by one)."""
        pixels, ends = [], []
        for image, window in zip(images, windows, strict=True):
            grid = window.grid(WINDOW_PIXELS)
            pixels.append(torch.from_numpy(standardised(image).resampled(grid, fill=UNSEEN).values).half())
            ends.append([window.upper_mm - window.superior_mm, window.lower_mm - window.superior_mm])
        return cls(torch.stack(pixels), torch.tensor(ends, dtype=torch.float32))

    def spoilt(self, seed: int) -> "WindowSet":
        """Return the set with a quarter of the images cut short, blurred, noisy or without arms.

        Scans of patients are: a network that has never seen a short field of view reads it as a short spine.
        """
        rng = np.random.default_rng(seed)
        images = self.images.clone()
        for place in np.flatnonzero(rng.random(len(self)) < _SPOILT_SHARE):
            spoil = _SPOILERS[rng.integers(len(_SPOILERS))]
            images[place] = spoil(images[place].float(), self.ends_mm[place].tolist(), rng).half()
        return WindowSet(images, self.ends_mm)


def row_heights_mm() -> np.ndarray:
    """Height of each pixel row above the window's middle, shape (288,), falling."""
    return ((WINDOW_PIXELS - 1) / 2 - np.arange(WINDOW_PIXELS)) * PITCH_MM


def window_truth(curves: Curves, extended: Curves, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the true rows (288, 6), depth removed, and the true ends (2,) of a window, relative to its middle."""
    aligned = extended.shifted(anterior_mm=-float(curves.sagittal_mm[1].mean()))
    rows = aligned.at(window.superior_mm + row_heights_mm()).to_array()
    rows[:, :3] -= window.right_mm
    return rows.astype(np.float32), (curves.heights_mm[[0, -1]] - window.superior_mm).astype(np.float32)


def _cut_above(image, ends, rng):
    image[:, : _row(ends[0] + rng.uniform(-80, 60))] = UNSEEN
    return image


def _cut_below(image, ends, rng):
    image[:, _row(ends[1] - rng.uniform(-80, 60)) :] = UNSEEN
    return image


def _cut_sides(image, ends, rng):
    reach = int(rng.uniform(80, 200) / PITCH_MM)
    middle = WINDOW_PIXELS // 2
    image[:, :, : middle - reach], image[:, :, middle + reach :] = UNSEEN, UNSEEN
    return image


def _without_arm(image, ends, rng):
    reach = WINDOW_PIXELS // 2 - int(rng.uniform(140, 200) / PITCH_MM)
    sides = [slice(0, reach), slice(WINDOW_PIXELS - reach, None)]
    for side in sides if rng.random() < 0.5 else sides[:1]:
        image[:, :, side] = image[:, :, side].clamp(max=0)  # air, not unseen
    return image


def _blurred(image, ends, rng):
    return torch.where(image == UNSEEN, image, gaussian_blur(image.clamp(min=0), 7, rng.uniform(0.5, 2.0)))


def _noisy(image, ends, rng):
    noise = torch.from_numpy(rng.normal(0, rng.uniform(0.01, 0.08), image.shape).astype(np.float32))
    return torch.where(image > 0, (image + noise).clamp(min=0), image)


_SPOILERS = (_cut_above, _cut_below, _cut_sides, _without_arm, _blurred, _noisy)


def _row(height_mm):
    return int(np.clip((WINDOW_PIXELS - 1) / 2 - height_mm / PITCH_MM, 0, WINDOW_PIXELS))
