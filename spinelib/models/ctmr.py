"""Deformable registration of CT to MR by a network (Jian et al., MICCAI 2022); its variants and their file of weights.

A U-Net after VoxelMorph sees both images and gives a stationary velocity on a grid of half the resolution; scaling and
squaring integrates it in both directions (Dalca et al. 2019). The similarity is MIND-SSC in both directions, and four
terms ask that vertebrae move rigidly, see `spinelib.models.rigidity`.

CT is moving, MR is fixed. Displacements u (b, 3, R, A, S) are in voxels, with channels in the order of the axes: the
point x of the MR's grid is at phi(x) = x + u(x) in the CT, and the warped CT is CT(phi(x)). Voxel j of the half grid
covers voxels 2j and 2j + 1, so its centre is at 2j + 0.5 of the full grid: what pooling by two and interpolation
without aligned corners assume too. Twice the value in half voxels is then exactly the value in voxels.

Differences from the released code, with reasons: fields go on as constants beyond the border, where zeros shear it;
aligned corners made amplitudes 1 to 2 % too small; only what both scanners have seen is compared; descriptors are
compared on every second voxel per axis, which changes their mean little and takes an eighth of the time.
"""

from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from spinelib.errors import InputError
from spinelib.models.mind import mind_loss
from spinelib.models.rigidity import orthonormality_loss, properness_loss, rigid_dice_loss, rigid_field_loss
from spinelib.models.weights import WeightsFile

DIVISOR = 16
"""Sides of the images are multiples of this."""

_OC, _PC, _RD, _RF = {"oc": 0.005}, {"pc": 0.01}, {"rd": 0.1}, {"rf": 0.01}
VARIANTS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "baseline": {},
        "pc": _PC,
        "oc": _OC,
        "rd": _RD,
        "rf": _RF,
        "pc_oc": _PC | _OC,
        "pc_rd": _PC | _RD,
        "pc_rf": _PC | _RF,
    }
)
"""Weights of the rigidity terms, beside `MIND_WEIGHT` and `DIFFUSION_WEIGHT`: the rows of the published figure."""

MIND_WEIGHT, DIFFUSION_WEIGHT = 1.0, 0.01

RIGIDITY_TERMS = ("oc", "pc", "rd", "rf")

_SQUARINGS = 7
_MIND_STEP = 2
_SLOPE = 0.2  # of the activation, below 0


class RegistrationNet(nn.Module):
    """Stationary velocity of a pair: two images (b, 1, R, A, S) -> (b, 3, R/2, A/2, S/2), in half-grid voxels.

    One convolution a level, no normalisation; 1,000,163 weights. The last convolution starts near zero, so that
    training starts at the identity, and runs in 32 bits: steps of 16-bit numbers would look like strain.
    """

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(_convolution(i, o) for i, o in pairwise((2, 32, 32, 64, 64, 64)))
        self.decoder = nn.ModuleList(_convolution(i, 64) for i in (128, 128, 96))
        self.remaining = nn.ModuleList([_convolution(64, 32), _convolution(32, 32)])
        self.head = _convolution(32, 3)
        nn.init.normal_(self.head.weight, std=1e-5)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Return the velocity.

        Raises
        ------
        InputError
            If the shapes differ, or a side is no multiple of 16.
        """
        _check_images(moving, fixed)
        images = torch.cat([moving, fixed], 1).to(memory_format=torch.channels_last_3d)
        features = _leaky(functional.max_pool3d(self.encoder[0](images), 2))  # the same as pooling what is activated
        skips = []
        for convolution in self.encoder[1:]:
            features = functional.max_pool3d(features, 2) if skips else features
            features = _leaky(convolution(features))
            skips.append(features)
        for convolution, skip in zip(self.decoder, skips[-2::-1], strict=True):
            features = functional.interpolate(features, scale_factor=2, mode="nearest")
            features = _leaky(convolution(torch.cat([features, skip], 1)))
        for convolution in self.remaining:
            features = _leaky(convolution(features))
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


class CTMRModel(nn.Module):
    """The published method by the name of a variant, for `spinelib.train.fit`.

    Batches are those of `spinelib.models.ctmr_data.PairDataset`. In training as in validation, `loss` is the variant's
    own objective: it compares epochs of one training. Variants are compared by `terms`, the same for all.

    Parameters
    ----------
    variant : str
        One of `VARIANTS`.

    Raises
    ------
    InputError
        If the name is unknown.
    """

    def __init__(self, variant: str = "baseline"):
        super().__init__()
        _check_variant(variant)
        self.variant, self.net = variant, RegistrationNet()

    def register(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return u of phi and of its inverse, each (b, 3, R, A, S), voxels; see `integrate`."""
        return integrate(self.net(batch["ct"], batch["mr"]))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the variant's terms."""
        return objective(self.net(batch["ct"], batch["mr"]), batch, self.variant)

    @torch.no_grad()
    def terms(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all terms before weighting: 'mind', 'diffusion' and `RIGIDITY_TERMS`; scalars."""
        return _terms(self.net(batch["ct"], batch["mr"]), batch, RIGIDITY_TERMS)


def objective(velocity: Tensor, batch: dict[str, Tensor], variant: str) -> Tensor:
    """Return what a variant asks of a velocity (b, 3, R/2, A/2, S/2), half-grid voxels: the weighted sum of its terms.

    Raises
    ------
    InputError
        If the variant is unknown.
    """
    _check_variant(variant)
    weights = {"mind": MIND_WEIGHT, "diffusion": DIFFUSION_WEIGHT, **VARIANTS[variant]}
    terms = _terms(velocity, batch, VARIANTS[variant])
    return sum(weight * terms[name] for name, weight in weights.items())


def integrate(velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Return the displacements that a velocity (b, 3, r, a, s) and its negative lead to in unit time.

    Scaling and squaring in 7 steps (Arsigny et al. 2006), constant beyond the border.

    Parameters
    ----------
    velocity : Tensor
        On the half grid, in its voxels.

    Returns
    -------
    forward, backward : Tensor (b, 3, 2r, 2a, 2s)
        u of phi and of its inverse, in voxels of the full grid.
    """
    with torch.autocast(velocity.device.type, enabled=False):
        u = torch.cat([velocity, -velocity]).float() / 2**_SQUARINGS
        for _ in range(_SQUARINGS):
            u = u + warp(u, u)
        full = 2 * functional.interpolate(u, scale_factor=2, mode="trilinear", align_corners=False)
    return full.chunk(2)


def warp(image: Tensor, u: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Return the image (b, c, R, A, S) at x + u(x); u (b, 3, R, A, S) in voxels.

    Parameters
    ----------
    image, u : Tensor
    mode : str
        'bilinear' (linear along all three axes) or 'nearest'.
    padding : str
        What lies outside: 'border' goes on with the last voxel, 'zeros'.
    """
    return sample(image, u + index_grid(u.shape[2:], u.device), mode, padding)


def sample(image: Tensor, points: Tensor, mode: str = "bilinear", padding: str = "border") -> Tensor:
    """Return the image (b, c, R, A, S) at points (b, 3, ...), voxel index; other parameters as in `warp`."""
    last = torch.tensor(image.shape[2:], device=points.device).sub(1).clamp(min=1)
    places = (points.movedim(1, -1) * (2 / last) - 1).flip(-1)
    return functional.grid_sample(image, places, mode=mode, padding_mode=padding, align_corners=True)


def index_grid(shape, device=None) -> Tensor:
    """Return the index of every voxel, (3, R, A, S) float32."""
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def warped_labels(labels: Tensor, u: Tensor) -> Tensor:
    """Return labels (b, R, A, S) at x + u(x), nearest voxel, 0 outside; no gradient."""
    return warp(labels[:, None].float(), u.detach(), "nearest", "zeros")[:, 0].to(labels.dtype)


def diffusion(velocity: Tensor) -> Tensor:
    """Return 2/3 of the sum over axes of the mean squared difference between neighbours, as in the released code."""
    return 2 / 3 * sum(velocity.diff(dim=axis).square().mean() for axis in (2, 3, 4))


# --- terms of the loss ---


def _terms(velocity, batch, rigidity):
    with torch.autocast(velocity.device.type, enabled=False):
        forward, backward = integrate(velocity)
        terms = {"mind": _similarity(batch, forward, backward), "diffusion": diffusion(velocity)}
        return terms | _rigidity_terms(batch["labels"], forward, rigidity)


def _similarity(batch, forward, backward):
    """Return MIND both ways, where both scanners have seen the point and its counterpart."""
    ct, mr = batch["ct"].float(), batch["mr"].float()
    in_ct, in_mr = batch["ct_valid"].float(), batch["valid"].float()
    there = in_mr * warp(in_ct, forward.detach(), "nearest", "zeros")
    back = in_ct * warp(in_mr, backward.detach(), "nearest", "zeros")
    return mind_loss(warp(ct, forward), mr, there, _MIND_STEP) + mind_loss(warp(mr, backward), ct, back, _MIND_STEP)


def _rigidity_terms(labels, u, names):
    if not names:
        return {}
    fixed = warped_labels(labels, u)
    terms = {
        "oc": lambda: orthonormality_loss(u, fixed),
        "pc": lambda: properness_loss(u, fixed),
        "rd": lambda: rigid_dice_loss(u, labels, fixed),
        "rf": lambda: rigid_field_loss(u, fixed),
    }
    return {name: terms[name]() for name in names}


class _Convolution(nn.Conv3d):
    """In 32 bits where the first side is 2: there, gradients of 16-bit weights are wrong on CPUs (torch 2.15)."""

    def forward(self, features):
        if features.shape[2] != 2:
            return super().forward(features)
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


def _convolution(inputs, outputs):
    """Return a convolution that keeps the size of what passes: PyTorch's own start loses 40 % in each of 11 layers."""
    convolution = _Convolution(inputs, outputs, 3, padding=1)
    nn.init.kaiming_normal_(convolution.weight, a=_SLOPE)
    nn.init.zeros_(convolution.bias)
    return convolution


def _leaky(features):
    return functional.leaky_relu(features, _SLOPE)


def _check_variant(name):
    if name not in VARIANTS:
        message = f"unknown variant {name!r}. Expected one of: {', '.join(map(repr, VARIANTS))}."
        raise InputError(message)


def _check_images(moving, fixed):
    if moving.shape != fixed.shape or any(n % DIVISOR for n in moving.shape[2:]):
        message = (
            f"expected two images of one shape (b, 1, R, A, S) with sides that are multiples of {DIVISOR}, given "
            f"{tuple(moving.shape)} and {tuple(fixed.shape)}. Fix: make them with ctmr_data.working_pair."
        )
        raise InputError(message)


WEIGHTS = WeightsFile(
    format="spinelib-ctmr-1",
    shipped="ctmr.safetensors",
    new=CTMRModel,
    train="spinelib train ctmr --render 100 --variant",
    usual="baseline",
)
"""Files of trained models by the names of `VARIANTS`."""

SHIPPED_WEIGHTS = WEIGHTS.shipped
save_variants, load_variant, read_card, held_variants = WEIGHTS.save, WEIGHTS.load, WEIGHTS.card, WEIGHTS.held
