"""From a DXA image to the network's window: the same code for training and inference, and never the truth.

The window is a square of fixed size in millimetres, so that a pixel means the same for every patient. Its place
comes from `spinelib.models.locator`, which sees the image alone.
"""

from dataclasses import dataclass

import numpy as np

from spinelib.geometry import PlanarGrid, Projection
from spinelib.spine import K_DEFAULT, Curves

CANVAS_PIXELS = 224
"""Side of the window in pixels (Bourigault 2024)."""

PITCH_MM = 2.5
"""Pixel pitch of the window and row pitch of the curves: 209 rows span 520 mm, longer than any T1-L5."""

CHANNELS = ("bone", "tissue")

_LEAST_HALF_WIDTH_MM = 1.0


@dataclass(frozen=True)
class Window:
    """Where the network looks.

    Attributes
    ----------
    superior_mm, right_mm : float
        Middle of the window.
    upper_mm, lower_mm : float
        Estimated heights of the upper end of T1 and the lower end of L5.
    """

    superior_mm: float
    right_mm: float
    upper_mm: float
    lower_mm: float

    def grid(self, pixels: int = CANVAS_PIXELS) -> PlanarGrid:
        """Return the pixel grid of the window."""
        return PlanarGrid.centred("coronal", (pixels, pixels), (PITCH_MM, PITCH_MM), (self.superior_mm, self.right_mm))

    def heights_mm(self) -> np.ndarray:
        """Return the world height of each curve row, shape (209,), falling."""
        return self.superior_mm + row_offsets_mm()


def row_offsets_mm() -> np.ndarray:
    """Height of each curve row above the window's middle, shape (209,), falling."""
    return ((K_DEFAULT - 1) / 2 - np.arange(K_DEFAULT)) * PITCH_MM


def standardised(image: Projection) -> Projection:
    """Return the bone and tissue channels scaled to about [0, 1], whatever the scanner's units.

    Each channel is divided by its 99.5th percentile over the pixels inside the body, after its background level
    has been removed. An image with a single channel serves as both.
    """
    names = [name if name in image.channels else image.channels[0] for name in CHANNELS]
    values = np.stack([_unit_range(image.channel(name)) for name in names])
    return Projection(CHANNELS, values.astype(np.float32), image.grid)


def network_input(image: Projection, window: Window, pixels: int = CANVAS_PIXELS) -> np.ndarray:
    """Return the standardised window of an image, shape (2, pixels, pixels), float32."""
    return standardised(image).resampled(window.grid(pixels)).values


def curves_to_rows(curves: Curves, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets of a window; inverse of `rows_to_curves`.

    Parameters
    ----------
    curves : Curves
        Truth, ideally reaching beyond T1-L5. Its depth must have been removed.

    Returns
    -------
    rows_mm : ndarray, shape (209, 6)
        Coronal columns relative to the window's middle, in CURVE_COLUMNS order.
    valid : ndarray of bool, shape (209,)
        Rows at which the truth exists.
    """
    heights = window.heights_mm()
    rows = curves.at(heights).to_array()
    rows[:, :3] -= window.right_mm
    return rows, (heights <= curves.heights_mm[0]) & (heights >= curves.heights_mm[-1])


def rows_to_curves(rows_mm: np.ndarray, window: Window) -> Curves:
    """Return world curves (T1-L5 as estimated, 209 heights) from network rows (209, 6) of a window."""
    rows = edges_apart(rows_mm)
    rows[:, :3] += window.right_mm
    everything = Curves.from_array(window.heights_mm(), rows)
    return everything.at(np.linspace(window.upper_mm, window.lower_mm, K_DEFAULT)).depth_removed()


def edges_apart(rows_mm: np.ndarray) -> np.ndarray:
    """Return rows (n, 6) with edges at least 1 mm off the centre: a poor prediction may cross them."""
    rows = np.array(rows_mm, float)
    for first in (0, 3):
        rows[:, first] = np.maximum(rows[:, first], rows[:, first + 1] + _LEAST_HALF_WIDTH_MM)
        rows[:, first + 2] = np.minimum(rows[:, first + 2], rows[:, first + 1] - _LEAST_HALF_WIDTH_MM)
    return rows


def _unit_range(channel):
    values = channel - np.percentile(channel, 1)
    inside = values[values > 0.02 * values.max()] if values.max() > 0 else values
    top = np.percentile(inside, 99.5) if inside.size else 1.0
    return np.clip(values / max(top, 1e-6), 0, 1.5)
