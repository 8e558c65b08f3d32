"""One frontal image to six curves: the network of Bourigault 2024 and its lighter, row-resolving kin."""

import warnings

import numpy as np
import timm
import torch
from jaxtyping import Float
from sklearn.linear_model import RidgeCV
from timm.layers.bottleneck_attn import BottleneckAttn
from torch import Tensor, nn

from spinelib.errors import InputError
from spinelib.models.crop import CANVAS_PIXELS, PITCH_MM
from spinelib.spine import CURVE_COLUMNS, K_DEFAULT

HEADS = ("global", "rows")
PAPER_PARAMETERS = 34_756_646
"""Trainable numbers of the published network at 224 x 224."""


class BottleneckTransformer(nn.Module):
    """One residual block: 1x1 convolution, attention with relative positions, 1x1 convolution.

    Bourigault 2024 stacks three after ResNet50 (2048 -> 512 -> 2048, 4 heads of 128). The last normalisation
    starts at zero, so that a fresh block is the identity on a rectified map.
    """

    def __init__(self, dim: int, feature_size: tuple[int, int], heads: int = 4):
        super().__init__()
        inner = dim // 4
        self.body = nn.Sequential(
            nn.Conv2d(dim, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            BottleneckAttn(inner, inner, feat_size=feature_size, num_heads=heads, dim_head=inner // heads),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the attended map, same shape."""
        return torch.relu(features + self.body(features))


class LinearShortcut(nn.Module):
    """Curves from the pooled window by ridge regression; fixed once fitted.

    A thousand subjects teach a linear map more of the sagittal shape than a convolutional network learns from them
    in minutes, so the network starts from it and learns the rest. Blocks outside the field of view count as
    average: rows and columns of the window that are zero throughout.
    """

    BLOCK = 8

    def __init__(self, channels: int, pixels: int = CANVAS_PIXELS):
        super().__init__()
        inputs, outputs = channels * (pixels // self.BLOCK) ** 2, K_DEFAULT * len(CURVE_COLUMNS)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("weight", torch.zeros(inputs, outputs))
        self.register_buffer("intercept", torch.zeros(outputs))

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 209 6"]:
        """Return curves in mm."""
        rows = (self.filled(image) - self.mean) @ self.weight + self.intercept
        return rows.unflatten(1, (K_DEFAULT, len(CURVE_COLUMNS)))

    def filled(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
        """Return the pooled window with the mean where there is no image."""
        pooled = nn.functional.avg_pool2d(image.float(), self.BLOCK)
        something = (pooled > 0).any(dim=1, keepdim=True)
        seen = something.any(dim=3, keepdim=True) & something.any(dim=2, keepdim=True)
        return torch.where(seen, pooled, self.mean.view(1, *pooled.shape[1:])).flatten(1)

    def fit(self, images: Float[Tensor, "n c h w"], rows_mm: Float[Tensor, "n 209 6"]) -> None:
        """Learn from windows and their true rows; the penalty is chosen by leave-one-out."""
        self.mean.copy_(nn.functional.avg_pool2d(images, self.BLOCK).flatten(1).mean(dim=0))
        pixels = (self.filled(images) - self.mean).numpy()
        ridge = RidgeCV(alphas=np.logspace(-2, 4, 13)).fit(pixels, rows_mm.flatten(1).numpy())
        self.weight.copy_(torch.from_numpy(ridge.coef_.T))
        self.intercept.copy_(torch.from_numpy(ridge.intercept_))


class CurveRegressor(nn.Module):
    """Window of a DXA -> 209 rows x 6 named curves in millimetres.

    Parameters
    ----------
    backbone : str
        Any timm model that offers `features_only`.
    in_channels : int
        2 for bone and tissue; 3 for the paper's replicated bone image.
    head : str
        'global' (paper): global average pool and one linear layer. 'rows': height stays resolved; per row a
        soft-argmax over the columns gives the lateral place, a small 1-D network the rest.
    stage : int
        Which feature stage of the backbone feeds the head (-1 = last).
    blocks : int
        Number of Bottleneck-Transformer blocks.
    shortcut : bool
        Whether the network adds to a `LinearShortcut`.
    pretrained : bool
        Start from timm's ImageNet weights; without a network connection a warning says so and random weights serve.

    Notes
    -----
    `forward` returns millimetres: coronal columns relative to the window's middle, sagittal columns relative to
    the mean of the sagittal centre curve. The affine from network units to millimetres (`offset_mm`,
    `scale_mm`) is part of the weights; `set_output_scale` fits it to the training targets.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        in_channels: int = 3,
        head: str = "global",
        stage: int = -1,
        blocks: int = 3,
        shortcut: bool = False,
        pretrained: bool = False,
        pixels: int = CANVAS_PIXELS,
    ):
        super().__init__()
        if head not in HEADS:
            message = f"unknown head {head!r}. Expected one of: {', '.join(map(repr, HEADS))}."
            raise InputError(message)
        self.config = {
            "backbone": backbone,
            "in_channels": in_channels,
            "head": head,
            "stage": stage,
            "blocks": blocks,
            "shortcut": shortcut,
            "pixels": pixels,
        }
        self.backbone = _create_backbone(backbone, in_channels, stage, pretrained)
        dim, reduction = self.backbone.feature_info.channels()[-1], self.backbone.feature_info.reduction()[-1]
        size = -(-pixels // reduction)
        self.attention = nn.Sequential(*(BottleneckTransformer(dim, (size, size)) for _ in range(blocks)))
        self.head = _GlobalHead(dim) if head == "global" else _RowHead(dim, size)
        self.shortcut = LinearShortcut(in_channels, pixels) if shortcut else None
        # The paper's unit: fraction of the window counted from its right or anterior border.
        span = pixels * PITCH_MM
        self.register_buffer("offset_mm", torch.full((K_DEFAULT, 6), span / 2))
        self.register_buffer("scale_mm", torch.full((6,), -span))

    def set_output_scale(self, offset_mm: Float[Tensor, "209 6"], scale_mm: Float[Tensor, "6"]) -> None:
        """Let the network predict (curve - offset) / scale instead of the paper's window fractions."""
        self.offset_mm.copy_(offset_mm)
        self.scale_mm.copy_(scale_mm)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 209 6"]:
        """Return the curves of each window, mm, columns in CURVE_COLUMNS order."""
        size = self.config["pixels"]
        if image.shape[-2:] != (size, size):
            message = f"this network takes windows of {size} x {size} pixels, given {tuple(image.shape[-2:])}."
            raise InputError(message)
        channels = self.config["in_channels"]
        if channels == 3:
            image = image[:, :1].expand(-1, 3, -1, -1)
        features = self.attention(self.backbone(image.contiguous(memory_format=torch.channels_last))[-1])
        with torch.autocast(image.device.type, enabled=False):  # 16 bits would round to a millimetre or two
            base = self.offset_mm if self.shortcut is None else self.shortcut(image)
            return self.head(features.float()) * self.scale_mm + base

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean absolute error over the valid rows, mm (L1, as the released code of the paper)."""
        error = (self(batch["image"]) - batch["rows_mm"]).abs().mean(dim=2)
        return (error * batch["valid"]).sum() / batch["valid"].sum().clamp(min=1)


def paper_network(pretrained: bool = False) -> CurveRegressor:
    """Return the network of Bourigault 2024 exactly: ResNet50, three BoT blocks, pool, linear; 34,756,646 numbers."""
    return CurveRegressor("resnet50", 3, "global", -1, 3, False, pretrained)


def light_network(
    pretrained: bool = False, backbone: str = "resnet18", head: str = "rows", shortcut: bool = True
) -> CurveRegressor:
    """Return a network for two CPU cores: a linear shortcut, stride-16 features, one BoT block, a head by rows."""
    return CurveRegressor(backbone, 2, head, 3, 1, shortcut, pretrained)


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters())


class _GlobalHead(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, K_DEFAULT * len(CURVE_COLUMNS))

    def forward(self, features):
        return self.linear(features.mean(dim=(2, 3))).unflatten(1, (K_DEFAULT, len(CURVE_COLUMNS)))


class _RowHead(nn.Module):
    """Soft-argmax over the columns of each row and a 1-D network along height, plus a code of the whole map.

    Coronal curves lie where the rows say. Sagittal shape shows in the arrangement of the whole trunk (how ribs and
    bodies foreshorten), so a linear code that keeps every place of the map adds to all rows at once.
    """

    def __init__(self, dim, size, width=128, maps=8, code=192):
        super().__init__()
        self.places = nn.Sequential(
            nn.Conv2d(dim, 24, 1), nn.Flatten(), nn.Linear(24 * size * size, code), nn.ReLU(), nn.Dropout(0.3)
        )
        self.whole = nn.Linear(code, K_DEFAULT * len(CURVE_COLUMNS))
        nn.init.zeros_(self.whole.weight)
        self.logits = nn.Conv2d(dim, maps, 1)
        self.row_features = nn.Conv1d(dim + maps, width, 1)
        self.context = nn.Linear(dim, width)
        self.refine = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv1d(width, width, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, width, 9, padding=4),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, len(CURVE_COLUMNS), 9, padding=4),
        )
        # With a shortcut, a fresh head adds nothing.
        nn.init.zeros_(self.refine[-1].weight)
        nn.init.zeros_(self.refine[-1].bias)
        nn.init.zeros_(self.whole.bias)

    def forward(self, features):
        weights = self.logits(features).softmax(dim=3)
        columns = torch.linspace(-1, 1, features.shape[3], device=features.device)
        places = torch.einsum("bmrc,c->bmr", weights, columns)
        pooled = torch.einsum("bdrc,brc->bdr", features, weights.mean(dim=1))
        rows = self.row_features(torch.cat([pooled, places], dim=1))
        rows = rows + self.context(features.mean(dim=(2, 3)))[:, :, None]
        # Curve rows lie on the window's central 209 of 224 pixel rows.
        tall = nn.functional.interpolate(rows, size=CANVAS_PIXELS, mode="linear", align_corners=False)
        margin = (CANVAS_PIXELS - K_DEFAULT) // 2
        by_row = self.refine(tall[:, :, margin : margin + K_DEFAULT]).transpose(1, 2)
        return by_row + self.whole(self.places(features)).unflatten(1, (K_DEFAULT, len(CURVE_COLUMNS)))


def _create_backbone(name, in_channels, stage, pretrained):
    options = {"features_only": True, "in_chans": in_channels, "out_indices": (stage,)}
    if pretrained:
        try:
            return timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # any of a dozen network and hub errors: all mean "not reachable"
            warnings.warn(
                f"ImageNet weights of {name!r} cannot be loaded ({type(error).__name__}: {error}). Training starts "
                "from random weights. To use them, connect once so that timm can cache them, or set HF_HOME to a "
                "folder that holds them.",
                stacklevel=3,
            )
    try:
        return timm.create_model(name, pretrained=False, **options)
    except RuntimeError as error:
        message = f"unknown backbone {name!r}: {error}. See timm.list_models() for the allowed names."
        raise InputError(message) from error
