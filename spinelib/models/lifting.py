"""A vertebra in 3D from two radiographs of known geometry, by lifting image features along the true rays.

Each voxel of a cube looks up what both views show where it is projected (Kar 2017, PIFu, PPCNet do so for other
shapes), so that the network need learn neither magnification nor obliquity, as TransVert must. Most weights lie in
2D, where they are cheap: a U-Net per view. Its features, lifted to 32^3 voxels, are joined by a small 3D U-Net; at 64^3
every voxel looks at the finest features of its two rays again. Shape, level and pose have their own heads: a
probability does not vanish where it is below one half, as an L1-regressed index does.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from spinelib.imaging.radiograph_pairs import CUBE, LABELS, PATCH
from spinelib.models.vertebra_networks import outline_loss

LEVEL_WEIGHT, POSE_WEIGHT = 0.1, 0.2

_COARSE = 2  # voxels of the cube per voxel of the 3D U-Net
_WIDTHS = (32, 64, 96, 128)  # of the 2D U-Nets, from 64 x 64 to 8 x 8 pixels
_LIFTED, _FINE = 16, 8  # features per view that are lifted to 32^3 and to 64^3
_SUMMARY, _BRIEF, _TILES = 128, 32, 4  # features of level and pose; per view, in 4 x 4 parts of it


class LiftingNet(nn.Module):
    """Mask, level and orientation of a vertebra from a frontal and a lateral patch with their projections."""

    def __init__(self):
        super().__init__()
        self.annotation = "c2v"  # until it is trained with another
        self.frontal, self.lateral = _View(), _View()
        self.register_buffer("places", _places(*3 * [CUBE // _COARSE]), persistent=False)
        self.place = nn.Conv3d(3, _LIFTED, 1)
        self.volume = _VolumeUNet(_LIFTED)
        self.coarse = nn.Conv3d(_LIFTED, 1, 1)  # a direct way to the mask: without it some random starts hardly learn
        nn.init.constant_(self.coarse.bias, -3.0)  # most voxels are background
        self.widen = nn.ConvTranspose3d(_LIFTED, _FINE, _COARSE, _COARSE)
        self.fine = nn.Sequential(nn.ReLU(inplace=True), _block3d(_FINE, _FINE), nn.Conv3d(_FINE, 1, 1))
        self.summary = nn.Sequential(nn.Linear(2 * _View.summary_size + self.volume.summary_size, _SUMMARY), nn.ReLU())
        self.level = nn.Sequential(nn.Dropout(0.2), nn.Linear(_SUMMARY, len(LABELS)))
        self.pose = nn.Linear(_SUMMARY, 6)
        nn.init.normal_(self.pose.weight, std=1e-3)
        self.pose.bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])  # the axes of the world
        for part in (self.place, self.volume, self.coarse, self.widen, self.fine):
            part.to(memory_format=torch.channels_last_3d)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return mask logits (b, 1, 64, 64, 64), level logits (b, 17) and frames (b, 3, 3).

        Columns of a frame are the right, anterior and superior axes of the vertebra in world RAS.
        """
        lifted, rays, summaries = self.place(self.places), [], []
        for name, net in (("frontal", self.frontal), ("lateral", self.lateral)):
            half, full, summary = net(batch[name])
            lifted = lifted + lift(half, batch[f"cube_to_{name}"], CUBE // _COARSE)
            rays.append(lift(full, batch[f"cube_to_{name}"], CUBE))
            summaries.append(summary)
        volume, summary = self.volume(lifted)
        summary = self.summary(torch.cat([*summaries, summary], 1))
        mask = _twice(self.coarse(volume)) + self.fine(self.widen(volume) + rays[0] + rays[1])
        return mask, self.level(summary), orthonormal(self.pose(summary).float())

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return cross-entropy plus soft Dice of the mask, plus cross-entropy of the level.

        Where the batch has 'frame' (b, 3, 3), the mean distance between true and predicted axes is added.
        """
        mask, level, frame = self(batch)
        loss = outline_loss(mask, batch["target"].float())
        loss = loss + LEVEL_WEIGHT * functional.cross_entropy(level.float(), batch["level"], label_smoothing=0.05)
        if "frame" in batch:
            loss = loss + POSE_WEIGHT * (frame - batch["frame"]).norm(dim=1).mean()
        return loss

    @torch.no_grad()
    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mask's probability (b, 64, 64, 64) and the level index (b,), 0 = T1."""
        mask, level, _ = self(batch)
        return torch.sigmoid(mask[:, 0].float()), level.argmax(1)

    @torch.no_grad()
    def predict_frames(self, batch: dict[str, Tensor]) -> Tensor:
        """Return frames (b, 3, 3), columns right, anterior, superior; meaningful if trained with frames."""
        return self(batch)[2]


def lift(features: Tensor, projection: Tensor, size: int) -> Tensor:
    """Give each voxel of a cube what a view shows where the voxel is projected.

    Parameters
    ----------
    features : Tensor (b, c, rows, cols)
        Over the whole patch, whatever their resolution.
    projection : Tensor (b, 3, 4)
        Takes (i, j, k, 1), voxels of the 64^3 cube along right, anterior, superior, to (row w, col w, w), pixels of the
        64 x 64 patch.
    size : int
        Voxels a side of the result; they fill the same cube.

    Returns
    -------
    Tensor (b, c, size, size, size)
        Bilinear; 0 outside the patch.
    """
    step = CUBE / size
    index = torch.arange(size, dtype=torch.float32, device=features.device) * step + (step - 1) / 2
    # Sums, not a matrix product: mixed precision would round pixels to a quarter.
    right, anterior, superior, constant = projection.float()[..., None, None, None].unbind(2)
    homogeneous = constant + right * index[:, None, None] + anterior * index[:, None] + superior * index
    row, col, weight = homogeneous.unbind(1)
    grid = torch.stack([col / weight, row / weight], -1) * (2 / PATCH) + (1 / PATCH - 1)
    sampled = functional.grid_sample(features.float(), grid.flatten(1, 2), align_corners=False)
    return sampled.to(features.dtype).unflatten(2, (size, size))


def orthonormal(six: Tensor) -> Tensor:
    """Return rotations (b, 3, 3) whose first two columns are the orthonormalised halves of (b, 6) (Zhou 2019)."""
    right = functional.normalize(six[:, :3], dim=1)
    anterior = functional.normalize(six[:, 3:] - (right * six[:, 3:]).sum(1, keepdim=True) * right, dim=1)
    return torch.stack([right, anterior, torch.linalg.cross(right, anterior)], -1)


class _View(nn.Module):
    """2D U-Net: patch (b, 2, 64, 64) -> features at half and at full resolution, and a summary (b, n).

    The summary keeps parts of the patch apart: after an instance norm, means over all of it say little.
    """

    summary_size = _BRIEF * _TILES**2

    def __init__(self):
        super().__init__()
        self.register_buffer("places", _places(PATCH, PATCH), persistent=False)
        widths = (4, *_WIDTHS)  # image, annotation, row, column
        self.down = nn.ModuleList(
            nn.Sequential(_block2d(before, after, 1 if level == 0 else 2), _block2d(after, after))
            for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        )
        pairs = list(zip(_WIDTHS, _WIDTHS[1:], strict=False))
        self.narrow = nn.ModuleList(nn.Conv2d(below, above, 1) for above, below in pairs)
        self.up = nn.ModuleList(_block2d(above, above) for above, _ in pairs)
        self.brief = nn.Sequential(nn.Conv2d(_WIDTHS[-1], _BRIEF, 1), nn.AdaptiveAvgPool2d(_TILES), nn.Flatten())
        self.to_half, self.to_full = nn.Conv2d(_WIDTHS[1], _LIFTED, 1), nn.Conv2d(_WIDTHS[0], _FINE, 1)

    def forward(self, patch):
        features, levels = torch.cat([patch, self.places.expand(len(patch), -1, -1, -1)], 1), []
        for block in self.down:
            features = block(features)
            levels.append(features)
        for level in reversed(range(len(self.up))):
            wide = functional.interpolate(self.narrow[level](levels[level + 1]), scale_factor=2, mode="bilinear")
            levels[level] = self.up[level](levels[level] + wide)
        return self.to_half(levels[1]), self.to_full(levels[0]), self.brief(levels[-1])


class _VolumeUNet(nn.Module):
    """3D U-Net of three levels: (b, c, 32, 32, 32) -> the same shape, and a summary (b, n) of its octants."""

    def __init__(self, width):
        super().__init__()
        middle, deepest = 2 * width, 4 * width
        self.summary_size = 8 * deepest
        self.first = nn.Sequential(nn.InstanceNorm3d(width, affine=True), nn.ReLU(inplace=True))
        self.second = nn.Sequential(_block3d(width, middle, 2), _block3d(middle, middle))
        self.third = nn.Sequential(_block3d(middle, deepest, 2), _block3d(deepest, deepest))
        self.narrow = nn.ModuleList([nn.Conv3d(deepest, middle, 1), nn.Conv3d(middle, width, 1)])
        self.up = nn.ModuleList([_block3d(middle, middle), _block3d(width, width)])

    def forward(self, lifted):
        first = self.first(lifted.contiguous(memory_format=torch.channels_last_3d))
        second = self.second(first)
        third = self.third(second)
        second = self.up[0](second + _twice(self.narrow[0](third)))
        first = self.up[1](first + _twice(self.narrow[1](second)))
        return first, functional.adaptive_avg_pool3d(third, 2).flatten(1)


def _twice(volume):
    return functional.interpolate(volume, scale_factor=2, mode="trilinear")


def _places(*sizes):
    """Return the coordinates of the elements of a grid in -1..1, (1, d, *sizes)."""
    axes = (torch.linspace(-1, 1, size) for size in sizes)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _block2d(inputs, outputs, stride=1):
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.InstanceNorm2d(outputs, affine=True), nn.ReLU(inplace=True))


def _block3d(inputs, outputs, stride=1):
    conv = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.InstanceNorm3d(outputs, affine=True), nn.ReLU(inplace=True))
