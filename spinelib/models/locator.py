"""Find the thoracolumbar spine on a frontal image: the place of the window, without the truth."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from spinelib.geometry import PlanarGrid, Projection
from spinelib.models.crop import Window, standardised

LOCATOR_SHAPE = (128, 80)
LOCATOR_PITCH_MM = 8.0
LANDMARKS = ("upper_mm", "lower_mm", "right_mm")
"""Upper end of T1, lower end of L5, lateral place of the spine half-way between."""


class SpineLocator(nn.Module):
    """Fully convolutional soft-argmax network on an 8 mm overview of the image.

    Input (B, 2, 128, 80); output (B, 3) millimetres relative to the middle of the overview: superior of T1's
    upper end, superior of L5's lower end, right of the mid-spine. Dilations give it the whole body to look at,
    so an end outside a short field of view is still estimated from what is seen.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        layers, channels = [], 2
        for stride, dilation in ((1, 1), (2, 1), (1, 2), (1, 4), (1, 8), (1, 1)):
            layers += [
                nn.Conv2d(channels, width, 3, stride, dilation, dilation, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.maps = nn.Conv2d(width, 3, 1)

    def forward(self, overview: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 3"]:
        """Return landmark millimetres relative to the overview's middle."""
        features = self.features(overview).float()
        with torch.autocast(overview.device.type, enabled=False):  # in 16 bits, places would be rounded to 2 mm
            maps = self.maps(features)
            rows, cols = maps[:, :2].logsumexp(dim=3), maps[:, 2].logsumexp(dim=1)
            heights = torch.einsum("bkr,r->bk", rows.softmax(-1), _falling_mm(rows.shape[-1], maps.device))
            right = torch.einsum("bc,c->b", cols.softmax(-1), _falling_mm(cols.shape[-1], maps.device))
            return torch.cat([heights, right[:, None]], dim=1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean absolute landmark error, mm."""
        return (self(batch["image"]) - batch["landmarks_mm"]).abs().mean()


def overview_grid(image: Projection) -> PlanarGrid:
    """Return the 1024 x 640 mm overview centred on the image."""
    return PlanarGrid.centred("coronal", LOCATOR_SHAPE, (LOCATOR_PITCH_MM,) * 2, image.grid.centre_mm)


def overview(image: Projection) -> np.ndarray:
    """Return the standardised overview of an image, shape (2, 128, 80)."""
    smooth = standardised(image)
    from scipy.ndimage import uniform_filter

    sizes = [max(1, round(LOCATOR_PITCH_MM / s)) for s in image.grid.spacing_mm]
    values = np.stack([uniform_filter(c, sizes, mode="constant") for c in smooth.values])
    return Projection(smooth.channels, values, image.grid).resampled(overview_grid(image)).values


def landmarks_mm(curves_t1_l5, image: Projection) -> np.ndarray:
    """Return the training target (3,) of `SpineLocator` for an image and its true T1-L5 curves."""
    superior, right = image.grid.centre_mm
    upper, lower = curves_t1_l5.heights_mm[[0, -1]]
    middle = float(np.interp(-(upper + lower) / 2, -curves_t1_l5.heights_mm, curves_t1_l5.coronal_mm[1]))
    return np.array([upper - superior, lower - superior, middle - right], np.float32)


@torch.no_grad()
def locate(model: SpineLocator, image: Projection) -> Window:
    """Return the window of an image."""
    found = model.eval()(torch.from_numpy(overview(image))[None])[0].double().numpy()
    superior, right = image.grid.centre_mm
    return window_from_landmarks(found + [superior, superior, right])


def window_from_landmarks(world_mm) -> Window:
    """Return the window for world landmarks (upper, lower, right); a length outside 300-620 mm is limited."""
    upper, lower, right = (float(v) for v in world_mm)
    middle, half = (upper + lower) / 2, float(np.clip((upper - lower) / 2, 150, 310))
    return Window(middle, right, middle + half, middle - half)


def _falling_mm(count, device):
    pitch = LOCATOR_PITCH_MM * 2
    return ((count - 1) / 2 - torch.arange(count, device=device, dtype=torch.float32)) * pitch
