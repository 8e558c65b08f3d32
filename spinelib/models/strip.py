"""A small network that mends curves, looking at a strip straightened along them.

How far a vertebra is tilted out of the image plane shows in its neighbourhood: the rims of its end plates open, its
arch moves against its body. The same rule holds at every level, so that a convolution learns it from thousands of
levels where a regression on whole images has thousands of people.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from spinelib.models.mirror import GREYS, UNSEEN_BYTE

STRIP_SHAPE = (216, 32)
"""Rows and columns of the strip: about 2.3 x 2.8 mm."""

_COLUMNS = 6  # half width, anterior, centre, posterior; coronal centre, middle of the edges (odd)
_EVEN = 4
_ROWS = STRIP_SHAPE[0] // 4
_FEATURES, _WIDTHS, _DILATIONS = 64, (16, 32, 48), (1, 2, 4, 8)
_ANSWER_SCALE, _OUTPUT_SCALE = 20.0, 2e-3  # curves come and go in T1-L5 lengths
_END_ROW = 2  # the ends lie 4% inside the strip
_STEPS, _BATCH, _RATE, _DECAY = 5000, 32, 2e-3, 0.05  # steps at most; the first thousand learn little
_LEAST_STEPS = 1600
_GAIN_JITTER = 0.1
_CHUNK = 128


class StripNetwork(nn.Module):
    """Corrections of curves, their depth as the running sum of slopes.

    Parameters
    ----------
    rows : int
        Rows of the curves.
    ends_weight : float
        What the two end outputs are multiplied with, see `spinelib.models.kernel`.
    channels : int
        Channels of the strip.
    """

    def __init__(self, rows: int, ends_weight: float, channels: int = 2):
        super().__init__()
        self.rows, self.ends_weight = rows, ends_weight
        first, second, third = _WIDTHS
        self.image = nn.Sequential(
            _block_2d(channels, first, (1, 2)), _block_2d(first, second, 2), _block_2d(second, third, 2)
        )
        self.across = nn.Conv1d(third * STRIP_SHAPE[1] // 8, _FEATURES, 1)
        sizes = (_FEATURES + _COLUMNS, *[_FEATURES] * (len(_DILATIONS) - 1))
        self.along = nn.ModuleList(_block_1d(n, _FEATURES, d) for n, d in zip(sizes, _DILATIONS, strict=True))
        self.out = nn.Conv1d(_FEATURES, _COLUMNS + 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, strip: Float[Tensor, "n c 216 32"], answer: Float[Tensor, "n 6 54"]) -> dict[str, Tensor]:
        """Return what to add to the 'even' and 'odd' outputs of `spinelib.models.kernel`."""
        features = self.across(self.image(strip).permute(0, 1, 3, 2).flatten(1, 2))
        features = self.along[0](torch.cat([features, answer], 1))
        for block in self.along[1:]:
            features = features + block(features)
        slope, half, front, back, centre, middle, end = (self.out(features) * _OUTPUT_SCALE).unbind(1)
        depth = slope.cumsum(1)
        depth = depth - depth.mean(1, keepdim=True)
        columns = torch.stack([half, depth + front, depth, depth + back, centre, middle], 1)
        columns = functional.interpolate(columns, self.rows, mode="linear", align_corners=False)
        ends = end[:, [_END_ROW, -1 - _END_ROW]] * self.ends_weight
        sagittal = columns[:, 1:_EVEN].transpose(1, 2).flatten(1)
        return {"even": torch.cat([columns[:, 0], sagittal, ends], 1), "odd": columns[:, _EVEN:].flatten(1)}

    @torch.no_grad()
    def mended(self, strips, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs with corrections, exactly mirrored for a mirrored strip.

        Parameters
        ----------
        strips : Tensor (n, c, 216, 32) of bytes
        outputs : dict of Tensor
            'even' (n, 4 rows + 2) and 'odd' (n, 2 rows).
        """
        self.eval()
        answers, found = self._answers(outputs), []
        for start in range(0, len(strips), _CHUNK):
            strip, answer = _brightness(strips[start : start + _CHUNK]), answers[start : start + _CHUNK]
            one, other = self(strip, answer), self(strip.flip(3), _mirrored(answer, -torch.ones(len(answer))))
            found.append(((one["even"] + other["even"]) / 2, (one["odd"] - other["odd"]) / 2))
        even, odd = (torch.cat(part) for part in zip(*found, strict=True))
        return outputs | {"even": outputs["even"] + even, "odd": outputs["odd"] + odd}

    def fit(self, strips, outputs: dict[str, Tensor], targets: dict[str, Tensor], length: Tensor, seed: int) -> None:
        """Learn what outputs lack to the targets: mean absolute error in mm, by AdamW.

        Parameters
        ----------
        strips, outputs
            As in `mended`; the outputs are left-out ones, as wrong as those of new subjects.
        targets : dict of Tensor
        length : Tensor (n,)
            T1-L5 lengths in mm, the unit of outputs and targets.
        """
        generator = torch.Generator().manual_seed(seed)
        answers = self._answers(outputs)
        lacking = {name: (targets[name] - outputs[name]) * length[:, None] for name in ("even", "odd")}
        steps = min(_STEPS, _LEAST_STEPS + len(strips) // 2)
        optimiser = torch.optim.AdamW(self.parameters(), _RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps, pct_start=0.2)
        self.train()
        for places in _batches(len(strips), steps, generator):
            sign = torch.where(torch.rand(len(places), generator=generator) < 0.5, -1.0, 1.0)
            gain = 1 + _GAIN_JITTER * torch.randn(len(places), strips.shape[1], 1, 1, generator=generator)
            sign, gain = sign.to(strips.device), gain.to(strips.device)
            strip = _brightness(strips[places])
            strip = torch.where(sign[:, None, None, None] < 0, strip.flip(3), strip) * gain
            found = self(strip, _mirrored(answers[places], sign))
            even = found["even"] * length[places, None] - lacking["even"][places]
            odd = found["odd"] * length[places, None] - lacking["odd"][places] * sign[:, None]
            optimiser.zero_grad()
            torch.cat([even, odd], 1).abs().mean().backward()
            optimiser.step()
            schedule.step()
        self.eval()

    def _answers(self, outputs):
        """Return curves as columns (n, 6, 54), without their mean depth."""
        half, sagittal, _ = outputs["even"].split([self.rows, 3 * self.rows, 2], 1)
        sagittal = sagittal.unflatten(1, (self.rows, 3)).transpose(1, 2)
        sagittal = sagittal - sagittal[:, 1:2].mean(2, keepdim=True)
        columns = torch.cat([half[:, None], sagittal, outputs["odd"].unflatten(1, (2, self.rows))], 1)
        return functional.interpolate(columns, _ROWS, mode="linear", align_corners=False) * _ANSWER_SCALE


def _block_2d(inputs, outputs, stride):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


def _block_1d(inputs, outputs, dilation):
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, 3, 1, dilation, dilation), nn.BatchNorm1d(outputs), nn.SiLU(inplace=True)
    )


def _brightness(strips):
    return ((strips.float() / GREYS - 0.5) * 2).masked_fill(strips == UNSEEN_BYTE, 0.0)


def _mirrored(answers, sign):
    """Change the sign of odd columns where `sign` (n,) is -1."""
    sign = sign.to(answers.device)[:, None, None]
    return torch.cat([answers[:, :_EVEN], answers[:, _EVEN:] * sign], 1)


def _batches(count, steps, generator):
    """Yield the places of batches, every subject as often as any other."""
    size, places = min(_BATCH, count), []
    for _ in range(steps):
        if len(places) < size:
            places = torch.randperm(count, generator=generator)
        yield places[:size]
        places = places[size:]
