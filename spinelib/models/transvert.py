"""TransVert: a vertebra in 3D from two radiographs and an annotation of it (Bayat et al., MICCAI 2020).

Two 2D encoders read the views, anisotropic 3D convolutions stretch each view's features along the axis that it does
not see, both are joined, and a 3D decoder gives a cube whose foreground holds the VerSe number of the vertebra.

The paper leaves much open. What is chosen here, and why:

- Encoders: convolutions of 7 x 7 pixels, two of them with stride 2, batch normalisation, ReLU, 32 features at 16 x 16
  pixels: the layer table of the only public benchmark of this network (Shakya and Khanal, NeurIPS 2023).
- Batch, not instance normalisation: an instance norm takes away a sample's amplitude, which here carries the level.
- Map and fuse: four transposed convolutions 3 x 3 x 3, stride 2 along the missing axis alone (same table).
- Decoder: four layers of 64 features at 16^3, then two transposed ones (same table), but 3 x 3 x 3 voxels in the last
  layer instead of 7 x 7 x 7, which alone would cost more than all the others.
- Self-attention: that of SAGAN (Zhang 2019), right where image and annotation meet; its weight starts at 0. Keys are
  max-pooled to 16 x 16, so that a disc of 5 pixels survives. Without it, the annotation is a second input channel.
- Outer product: at every height, each feature of the frontal row times that of the lateral row, channel by channel.
- Geometry: rows and columns stand for axes of the cube, as in the paper; magnification and obliquity are left to the
  network to learn. The middle of the cube lies behind the point that the patches are cut around, so the lateral
  patch is moved by as much.
- L1 is a mean over voxels. Its optimum is 0 wherever foreground is the less probable half, whatever the level, and the
  target spans 0 to 24; so the network predicts units of 16 (the mid-range number) from a bias of 0 and sees errors
  of order 1 from the first step. The loss is counted in the same unit; Adam does not notice a constant factor.
- L1 is rounded in training, a parabola where an error is below half a unit. The empty answer is a flat floor of plain
  L1, as foreground is the rarer half everywhere at first: after 4,800 vertebrae the network with attention still gave
  nothing at all (Dice 0). Rounded, the loss falls from the first steps. Validation is by plain L1.
- Discriminator: an unconditional patch discriminator as the paper's equation has no condition, 4^3 kernels of
  stride 2, instance norm, as the nearest published sibling (X2CT-GAN), with a quarter of its features.
- Level: the median of what exceeds half of the lowest number; the mask is what exceeds half of that median.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import BEHIND_MM, CUBE_MM, LABELS

FUSIONS = ("anisotropic", "outer", "sagittal")

L1_WEIGHT, ADVERSARIAL_WEIGHT = 10.0, 0.1

_LOWEST, _HIGHEST = LABELS[0], LABELS[-1]
_UNIT = 16.0  # VerSe numbers per unit of the last layer
_ROUNDED = 0.5  # units; at a voxel that is bone in half of all cases the best answer is then half a unit, the surface
_BEHIND = round(BEHIND_MM / CUBE_MM)
_FEATURES, _DEPTH, _WIDTH = 32, 16, 64
_MERGED, _POOL = 16, 4


class TransVert(nn.Module):
    """Index-valued cube of one vertebra from a frontal and a lateral patch.

    Parameters
    ----------
    fusion : {'anisotropic', 'outer', 'sagittal'}
        How the views meet; 'sagittal' reads the lateral view alone.
    attention : bool
        Self-attention where image and annotation meet.
    adversarial : bool
        Train with a discriminator.

    Raises
    ------
    InputError
        If the fusion is unknown.
    """

    def __init__(self, fusion: str = "anisotropic", attention: bool = False, adversarial: bool = False):
        super().__init__()
        if fusion not in FUSIONS:
            message = f"unknown fusion {fusion!r}. Expected one of: {', '.join(map(repr, FUSIONS))}."
            raise InputError(message)
        self.annotation = "c2v"  # until it is trained with another
        self.fusion = fusion
        self.lateral = _encoder(attention)
        self.frontal = None if fusion == "sagittal" else _encoder(attention)
        self.stretch_lateral = None if fusion == "outer" else _stretch(axis=0)
        self.stretch_frontal = _stretch(axis=1) if fusion == "anisotropic" else None
        self.decoder = _decoder(2 * _FEATURES if fusion == "anisotropic" else _FEATURES)
        self.discriminator = PatchDiscriminator() if adversarial else None
        for part in (self.stretch_lateral, self.stretch_frontal, self.decoder, self.discriminator):
            if part is not None:
                part.to(memory_format=torch.channels_last_3d)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return cubes (b, 64, 64, 64), axes (right, anterior, superior), in VerSe numbers."""
        return _UNIT * self.decoder(self._fused(batch).contiguous(memory_format=torch.channels_last_3d))[:, 0].float()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the paper's loss over 160, with L1 rounded in training; in evaluation the mean absolute error over 16.

        Generator and discriminator share one sum: each sees the other as a constant, so that the gradients are
        those of two separate losses. In evaluation mode the loss is that of the generator's L1 alone, by which
        the variants can be compared and the best weights chosen.
        """
        cube, truth = self(batch), _numbered(batch)
        rounded = _ROUNDED * _UNIT if self.training else 0.0
        loss = L1_WEIGHT * functional.smooth_l1_loss(cube, truth, beta=rounded)
        if self.discriminator is not None and self.training:
            constant = {name: value.detach() for name, value in self.discriminator.named_parameters()}
            fooled = (functional_call(self.discriminator, constant, (cube,)) - 1).square().mean()
            loss = loss + ADVERSARIAL_WEIGHT * fooled + self._discriminator_loss(cube.detach(), truth)
        return loss / (L1_WEIGHT * _UNIT)

    @torch.no_grad()
    def predict(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mask's share (b, 64, 64, 64) in 0..1, mask where > 0.5, and the level index (b,), 0 = T1."""
        cubes = self(batch)
        numbers = torch.stack([_number(cube) for cube in cubes])
        return (cubes / numbers[:, None, None, None]).clamp(0, 1), numbers.long() - _LOWEST

    def _discriminator_loss(self, cube, truth):
        return (self.discriminator(truth) - 1).square().mean() + self.discriminator(cube).square().mean()

    def _fused(self, batch):
        """Return features (b, c, 16, 16, 16) of both views."""
        lateral = functional.pad(_upright(batch["lateral"]), (0, 0, _BEHIND, -_BEHIND))
        lateral = self.lateral(lateral)  # (b, c, A, S)
        if self.fusion == "sagittal":
            return self.stretch_lateral(lateral[:, :, None])
        frontal = self.frontal(_upright(batch["frontal"]))  # (b, c, R, S)
        if self.fusion == "outer":
            return frontal[:, :, :, None] * lateral[:, :, None]
        views = self.stretch_frontal(frontal[:, :, :, None]), self.stretch_lateral(lateral[:, :, None])
        return torch.cat(views, 1)


class PatchDiscriminator(nn.Module):
    """Says of each of 8^3 overlapping parts whether a cube (b, 64, 64, 64) of VerSe numbers looks true (1) or not."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            *_sharper(width, 2 * width),
            *_sharper(2 * width, 4 * width),
            nn.Conv3d(4 * width, 1, 3, 1, 1),
        )

    def forward(self, cube: Tensor) -> Tensor:
        """Return scores (b, 1, 8, 8, 8)."""
        return self.layers(cube[:, None] / _HIGHEST).float()


class MergingAttention(nn.Module):
    """Self-attention over a patch and its annotation: (b, 2, rows, cols) -> (b, 16, rows, cols)."""

    def __init__(self):
        super().__init__()
        self.merge = nn.Conv2d(2, _MERGED, 3, padding=1)
        self.query = nn.Conv2d(_MERGED, _MERGED // 2, 1)
        self.key = nn.Conv2d(_MERGED, _MERGED // 2, 1)
        self.value = nn.Conv2d(_MERGED, _MERGED, 1)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        """Return merged features plus what they attend to."""
        merged = self.merge(image)
        coarse = functional.max_pool2d(merged, _POOL)
        query, key, value = (
            layer(source).flatten(2).transpose(1, 2)
            for layer, source in ((self.query, merged), (self.key, coarse), (self.value, coarse))
        )
        attended = functional.scaled_dot_product_attention(query, key, value)
        return merged + self.weight * attended.transpose(1, 2).reshape(merged.shape)


def _numbered(batch):
    """Return the true cubes (b, 64, 64, 64) in VerSe numbers."""
    return batch["target"][:, 0].float() * (batch["level"] + _LOWEST)[:, None, None, None]


def _number(cube):
    """Return the VerSe number that a cube speaks of, of T1 to L5."""
    inside = cube[cube > _LOWEST / 2]
    number = inside.median() if len(inside) else cube.max()
    return number.round().clamp(_LOWEST, _HIGHEST)


def _upright(patch):
    """Turn a patch so that its axes run as those of the cube: (b, c, right or anterior, superior)."""
    return patch.flip(2, 3).transpose(2, 3)


def _encoder(attention):
    layers = [MergingAttention()] if attention else []
    layers += _layer2d(_MERGED if attention else 2, _FEATURES // 2, 2) + _layer2d(_FEATURES // 2, _FEATURES, 2)
    for _ in range(4):
        layers += _layer2d(_FEATURES, _FEATURES, 1)
    return nn.Sequential(*layers)


def _stretch(axis):
    stride = tuple(2 if i == axis else 1 for i in range(3))
    layers = [_growing(_FEATURES, _FEATURES, stride) for _ in range(_DEPTH.bit_length() - 1)]
    return nn.Sequential(*(layer for block in layers for layer in block))


def _decoder(inputs):
    half, quarter = _FEATURES, _FEATURES // 2
    layers = _layer3d(inputs, _WIDTH)
    for _ in range(3):
        layers += _layer3d(_WIDTH, _WIDTH)
    layers += _growing(_WIDTH, half, (2, 2, 2)) + _growing(half, quarter, (2, 2, 2))
    last = nn.Conv3d(quarter, 1, 3, padding=1)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def _layer2d(inputs, outputs, stride):
    return [nn.Conv2d(inputs, outputs, 7, stride, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _layer3d(inputs, outputs):
    return [nn.Conv3d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]


def _growing(inputs, outputs, stride):
    more = tuple(step - 1 for step in stride)
    grow = nn.ConvTranspose3d(inputs, outputs, 3, stride, 1, more, bias=False)
    return [grow, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)]


def _sharper(inputs, outputs):
    return nn.Conv3d(inputs, outputs, 4, 2, 1), nn.InstanceNorm3d(outputs), nn.LeakyReLU(0.2)
