"""Networks for vertebrae in CT: where the spine is, which bone is whose, its surface, and which level a vertebra is.

The scheme follows Serrador 2024 (two 3D U-Nets, memory of what is segmented, top to bottom). Differences, with
reasons: instance instead of batch normalisation (trainings are short, running statistics lag); strided residual
U-Nets of MONAI (eight times faster on a CPU than pooling ones of the same width); heat maps in fixed millimetres
instead of a grid stretched to every field of view; the heat map says where to look and the patch marks its
middle, while in the paper the memory alone tells the next vertebra from the others (that took several times as many
steps to learn); a network that names levels, which the paper leaves out. Votes and a refinement of the surface stand
beside the published outlines.
"""

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from spinelib.levels import LEVEL_ORDER

OUTLINER = (16, 32, 64, 128)
"""Channels of the network that outlines one vertebra after another."""

VOTER, STUDENT = (24, 48, 96, 160), (12, 24, 36, 60)
"""Channels of the voting network: shipped, and a student with a sixth of the weights that it can teach."""

VOTE_VOXELS = 10.0
"""Voxels that one unit of a vote stands for."""

_CUE_VOXELS = 6.0
_LOGIT_SCALE = 4.0
_FULL = 8  # features at full resolution


class SpineFinder(nn.Module):
    """Heat map of the line of vertebral bodies: CT (b, 1, R, A, S) -> logits (b, 1, R, A, S), 4 mm voxels."""

    def __init__(self):
        super().__init__()
        self.net = _residual_unet(1, (8, 16, 32, 64))
        self.head = nn.Sequential(_block(_FULL + 1, 12, 1), _logit(12))

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of the heat map."""
        image = _last(image)
        return self.head(torch.cat([self.net(image), image], 1))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return binary cross-entropy with soft targets; a voxel at a body centre weighs ten times one away from it."""
        heat = batch["heat"]
        each = functional.binary_cross_entropy_with_logits(self(batch["image"]), heat, reduction="none")
        return (each * (1 + 9 * heat)).mean()


class VertebraUNet(nn.Module):
    """The vertebra in the middle of a patch: (b, 2, 64, 64, 64) -> logits (b, 1, 64, 64, 64), 2 mm voxels.

    Input channels are the CT and the memory, the union of all vertebrae above. A third, constant channel marks the
    middle, since convolutions do not know where they are.

    Parameters
    ----------
    channels : tuple of int
        Features per level.
    """

    def __init__(self, channels: tuple[int, ...] = OUTLINER):
        super().__init__()
        self.channels = tuple(channels)
        self.net = _residual_unet(3, self.channels)
        self.head = nn.Sequential(_block(_FULL + 3, 12, 1), _logit(12))
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits."""
        middle = _middle(image.shape[-1], image.device).expand(len(image), 1, -1, -1, -1)
        image = _last(torch.cat([image, middle], 1))
        return self.head(torch.cat([self.net(image), image], 1))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return cross-entropy plus soft Dice loss; an empty target asks for an empty answer."""
        return outline_loss(self(batch["image"]), batch["target"].float())


class VoteUNet(nn.Module):
    """All vertebrae of a patch at once: CT (b, 1, R, A, S) -> (b, 4, R, A, S), 2 mm voxels.

    The first channel is the logit of "some vertebra"; the others are the way to the centre of the voxel's own
    vertebral body, in units of `VOTE_VOXELS` voxels. Voxels of one vertebra vote for one place, so that neighbours that
    touch come apart (generalised Hough transform; Neven 2019 for networks). Every vertebra of a patch teaches, not
    the middle one alone. Cubes of 2 x 2 x 2 voxels travel as channels: nothing is lost, and a step takes a third of
    the time of a network at full resolution.

    Parameters
    ----------
    channels : tuple of int
        Features per level.
    """

    def __init__(self, channels: tuple[int, ...] = VOTER):
        super().__init__()
        self.channels = tuple(channels)
        self.net = _residual_unet(8, self.channels, self.channels[0], (1, *_halves(self.channels[1:])))
        width = self.channels[0] + 16
        self.head = nn.Sequential(_block(self.channels[0] + 8, width, 1), nn.Conv3d(width, 4 * 8, 1))
        nn.init.constant_(self.head[1].bias[:8], -3.0)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, image: Tensor) -> Tensor:
        """Return the logit and the way to the body centre; every side of the image is a multiple of 16."""
        from monai.networks.utils import pixelshuffle, pixelunshuffle

        cubes = _last(pixelunshuffle(image, 3, 2))
        return pixelshuffle(self.head(torch.cat([self.net(cubes), cubes], 1)), 3, 2)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return cross-entropy plus soft Dice loss of the mask plus the mean error of the votes inside it."""
        return votes_loss(self(batch["image"]), batch["labels"].long(), batch["bodies"])


class SurfaceRefiner(nn.Module):
    """Where the surface runs: CT and logit of some vertebra, (b, 1, R, A, S) each -> logit of that shape, 2 mm voxels.

    `VoteUNet` sees far with voxels of 4 mm inside. Nine of ten of its wrong voxels touch the surface, where a
    few convolutions at full resolution that know its answer tell better how much of a voxel is bone. They correct the
    logit, from nothing at the start of the training. No normalisation: what a voxel of a given value is must not
    depend on what else is in the patch.

    Parameters
    ----------
    width : int
        Features per layer.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        inputs = (2, width, width)
        layers = [nn.Sequential(nn.Conv3d(n, width, 3, padding=1), nn.ReLU(inplace=True)) for n in inputs]
        self.body, self.head = nn.Sequential(*layers), nn.Conv3d(width, 1, 1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, image: Tensor, logit: Tensor) -> Tensor:
        """Return the corrected logit."""
        known = torch.cat([image, (logit / _LOGIT_SCALE).clamp(-3, 3)], 1)
        return logit + self.head(self.body(_last(known)))


class RefinedVotes(nn.Module):
    """A refiner that learns beside a voter, which stays as it is.

    Parameters
    ----------
    refiner : SurfaceRefiner
    voter : VoteUNet
    """

    def __init__(self, refiner: SurfaceRefiner, voter: VoteUNet):
        super().__init__()
        self.refiner = refiner
        self._voter = [copy.deepcopy(voter).eval()]  # in a list: neither trained nor saved

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return cross-entropy plus soft Dice loss of the refined mask."""
        image = batch["image"]
        with torch.no_grad():
            logit = self._voter[0].to(image.device)(image)[:, :1].float()
        return outline_loss(self.refiner(image, logit), (batch["labels"] > 0)[:, None].float())


class DistilledUNet(nn.Module):
    """A student that learns half from the truth, half from a teacher (Serrador 2024, soft outputs).

    Parameters
    ----------
    student, teacher : VoteUNet
    temperature : float
        Divides both networks' logits.
    """

    def __init__(self, student: VoteUNet, teacher: VoteUNet, temperature: float = 2.0):
        super().__init__()
        self.student, self.temperature = student, temperature
        self._teacher = [copy.deepcopy(teacher).eval()]  # in a list: neither trained nor saved

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean of the loss against the truth and that against the teacher's softened mask and its votes."""
        answer = self.student(batch["image"])
        with torch.no_grad():
            teacher = self._teacher[0].to(answer.device)(batch["image"]).float()
        hard = votes_loss(answer, batch["labels"].long(), batch["bodies"])
        answer = answer.float()
        doubt = torch.sigmoid(teacher[:, :1] / self.temperature)
        soft = functional.binary_cross_entropy_with_logits(answer[:, :1] / self.temperature, doubt)
        own = torch.sigmoid(teacher[:, :1])
        apart = ((answer[:, 1:] - teacher[:, 1:]).abs() * own).sum() / own.sum().clamp(min=1)
        return 0.5 * hard + 0.5 * (5 * soft * self.temperature**2 + apart)


class LevelNet(nn.Module):
    """Level and completeness of one vertebra: (b, 2, 40, 40, 40) -> (b, 26) level logits, (b,) complete logit.

    Input channels are the CT (160 mm around the vertebra, 4 mm voxels) and the vertebra's mask; levels are in
    the order of `enumeration.LEVEL_ORDER`.
    """

    def __init__(self, width: int = 24):
        super().__init__()
        widths = (width, 2 * width, 4 * width, 6 * width)
        blocks, before = [], 2
        for after in widths:
            blocks += [_block(before, after, 2), _block(after, after, 1)]
            before = after
        self.body = nn.Sequential(*blocks)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2 * before, len(LEVEL_ORDER) + 1)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return level logits and the logit of being complete."""
        features = self.body(_last(image))
        both = torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)
        answer = self.head(self.drop(both))
        return answer[:, :-1], answer[:, -1]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return cross-entropy of the level plus that of completeness."""
        level, complete = self(batch["image"])
        named = functional.cross_entropy(level.float(), batch["level"], label_smoothing=0.05)
        return named + functional.binary_cross_entropy_with_logits(complete.float(), batch["complete"])


def votes_loss(answer: Tensor, labels: Tensor, bodies: Tensor) -> Tensor:
    """Return the loss of `VoteUNet` answers (b, 4, n, n, n) for labels (b, n, n, n) and body centres (b, 29, 3)."""
    answer, own = answer.float(), labels > 0
    parts = torch.arange(len(labels), device=labels.device)[:, None, None, None]
    aim = bodies[parts, labels].movedim(-1, 1) - _index(labels.shape[-1], labels.device)
    error = (answer[:, 1:] - aim / VOTE_VOXELS).abs().sum(1)
    return outline_loss(answer[:, :1], own[:, None].float()) + (error * own).sum() / own.sum().clamp(min=1)


def outline_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return mean over the batch of cross-entropy and soft Dice loss."""
    logits = logits.float()
    entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2, 3, 4))
    share = torch.sigmoid(logits)
    both, total = (share * target).sum((1, 2, 3, 4)), (share + target).sum((1, 2, 3, 4))
    overlap = 1 - (2 * both + 50) / (total + 50)
    return (5 * entropy + overlap).mean()


def _halves(channels):
    return (2,) * (len(channels) - 1)


def _residual_unet(inputs, channels, features=_FULL, strides=None):
    """Return MONAI's strided residual U-Net with `features` at full resolution.

    The step to logits is ours: MONAI would normalise them, and a normalised channel cannot say "nothing here".
    """
    from monai.networks.nets import UNet  # here, as MONAI takes seconds to import

    norm = ("INSTANCE", {"affine": True})
    return UNet(3, inputs, features, channels, strides or _halves(channels), num_res_units=2, norm=norm)


def _logit(inputs):
    layer = nn.Conv3d(inputs, 1, 1)
    nn.init.constant_(layer.bias, -3.0)  # most voxels are background
    return layer


def _block(inputs, outputs, stride):
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False),
        nn.InstanceNorm3d(outputs, affine=True),
        nn.ReLU(inplace=True),
    )


@lru_cache
def _middle(size, device):
    """Return a Gaussian of `_CUE_VOXELS` in the middle of a cube, (1, 1, size, size, size)."""
    apart = (torch.arange(size, device=device) - (size - 1) / 2) ** 2
    apart = apart[:, None, None] + apart[None, :, None] + apart[None, None, :]
    return torch.exp(-apart / (2 * _CUE_VOXELS**2))[None, None]


@lru_cache
def _index(size, device):
    """Return the index of every voxel of a cube, (1, 3, size, size, size)."""
    axis = torch.arange(size, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))[None]


def _last(image):
    return image.contiguous(memory_format=torch.channels_last_3d)
