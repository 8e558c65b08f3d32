"""Curves in three steps, coarse to fine: two kernel regressions, and a small network that mends their depth.

Step one looks at the whole trunk in a frame that spans T1-L5 and gives a first centre line and better ends. Step two
looks again in the improved frame, now also at a strip straightened along that centre line, in which every pedicle
and end plate lies where it lay in the other subjects. Both are kernel ridge regressions, quick to fit and strong on
cohorts of hundreds. Step three needs more people: a network looks at a finer strip, see `spinelib.models.strip`.

All steps treat left and right alike: a mirrored image gives the mirrored curves exactly. Each is fitted on what the
one before says of subjects it has not seen (leave-one-out, in closed form), so that it learns to mend errors of the
size it will meet. The errors that remain on the training subjects teach the spread.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from spinelib.errors import InputError
from spinelib.models.crop import PITCH_MM
from spinelib.models.mirror import GREYS, UNSEEN_BYTE, MirrorRidge
from spinelib.models.strip import STRIP_SHAPE, StripNetwork
from spinelib.models.windows import UNSEEN, WINDOW_PIXELS, WindowSet
from spinelib.spine import K_DEFAULT

ROWS = 109
"""Heights at which curves are regressed; they reach 4% of the T1-L5 length beyond either end."""

_KEPT = {"both": slice(None), "bone": slice(0, 1), "tissue": slice(1, 2)}
STEPS = 3
CHANNEL_CHOICES = tuple(_KEPT)

_REACH = 0.54
_FRAME = 1.25  # side of the frame that step one sees, in T1-L5 lengths
_STRIP = 0.20  # width of the strips, likewise
_SPREAD_ROWS = 17
_ENDS_WEIGHT = 3.0  # two numbers among hundreds
_ENDS_JITTER_MM = 2.5  # training frames are as wrong as a locator is
_CHUNK = 256
_COARSE_COMPONENTS, _FINE_COMPONENTS = {"even": 24, "odd": 16}, {"even": 48, "odd": 24}
_LEAST_SUBJECTS = 8
_NETWORK_SUBJECTS = 500  # step three was tried with 849 and more


@dataclass(frozen=True)
class Frames:
    """Upright frames of b subjects in their windows: middle and T1-L5 length (b,), centre line (b, 109), all mm."""

    middle: Tensor
    length: Tensor
    centre: Tensor

    @classmethod
    def from_ends(cls, ends_mm: Float[Tensor, "b 2"]) -> "Frames":
        """Return frames around the middle of the window."""
        middle, length = ends_mm.mean(1), ends_mm[:, 0] - ends_mm[:, 1]
        return cls(middle, length, torch.zeros(len(middle), ROWS, device=middle.device))

    def heights(self, shares: Tensor) -> Tensor:
        """Return heights (b, k) above the window's middle at shares (k,) of the length, 0.5 at the upper end."""
        return self.middle[:, None] + self.length[:, None] * shares

    def ends(self) -> Float[Tensor, "b 2"]:
        """Return the upper and the lower end."""
        return self.heights(torch.tensor([0.5, -0.5], device=self.middle.device))

    def __getitem__(self, places) -> "Frames":
        return Frames(self.middle[places], self.length[places], self.centre[places])


class KernelRegressor:
    """From windows to curves, their ends and their spread.

    Attributes
    ----------
    coarse : MirrorRidge
        Step one.
    fine : MirrorRidge or None
        Step two; None leaves it and step three out (for ablation).
    network : StripNetwork or None
        Step three; None where the training subjects were too few for it.
    channels : str
        'both', 'bone' or 'tissue': what is looked at.
    """

    def __init__(
        self,
        coarse: MirrorRidge,
        fine: MirrorRidge | None,
        network: StripNetwork | None = None,
        channels: str = "both",
    ):
        self.coarse, self.fine, self.network, self.channels = coarse, fine, network, channels

    @classmethod
    def fit(
        cls,
        windows: WindowSet,
        rows_mm: Float[Tensor, "n 288 6"],
        ends_mm: Float[Tensor, "n 2"],
        *,
        channels: str = "both",
        steps: int = STEPS,
        seed: int = 0,
    ) -> "KernelRegressor":
        """Return the regressor of training windows.

        Parameters
        ----------
        windows : WindowSet
            Their ends are not used: frames span the true ends, jittered as a locator would.
        rows_mm : Tensor (n, 288, 6)
            True curves by pixel row, see `spinelib.models.windows.window_truth`.
        ends_mm : Tensor (n, 2)
            True ends.
        channels : str
            See the attributes.
        steps : int
            1: the trunk alone; 2: the straightened strip too; 3: the network too, if the subjects suffice.

        Raises
        ------
        InputError
            With fewer than eight subjects, or an unknown `channels`.
        """
        if len(windows) < _LEAST_SUBJECTS:
            message = f"kernel regression needs at least {_LEAST_SUBJECTS} training subjects, given {len(windows)}."
            raise InputError(message)
        if channels not in CHANNEL_CHOICES:
            message = f"unknown channels {channels!r}. Expected one of: {', '.join(map(repr, CHANNEL_CHOICES))}."
            raise InputError(message)
        noise = torch.randn(ends_mm.shape, generator=torch.Generator().manual_seed(seed)).to(ends_mm)
        frames = Frames.from_ends(ends_mm + noise * _ENDS_JITTER_MM)
        coarse, found, _ = _fitted(windows, rows_mm, ends_mm, frames, channels, _COARSE_COMPONENTS)
        fine = network = None
        if steps >= 2:
            frames = _improved(frames, found)
            fine, found, targets = _fitted(windows, rows_mm, ends_mm, frames, channels, _FINE_COMPONENTS, True)
        if steps >= 3 and len(windows) >= _NETWORK_SUBJECTS:
            strips = _fine_strip(windows, frames, channels)
            torch.manual_seed(seed)
            network = StripNetwork(ROWS, _ENDS_WEIGHT, strips.shape[1]).to(strips.device)
            network.fit(strips, found, targets, frames.length, seed)
            found = network.mended(strips, found)
        errors = _centre_errors(_curves(frames, found)[1], rows_mm, frames)
        (fine or coarse).fit_spread(functional.adaptive_avg_pool1d(errors[:, None], _SPREAD_ROWS)[:, 0])
        return cls(coarse, fine, network, channels)

    def to(self, device) -> "KernelRegressor":
        """Return the regressor on a device."""
        return self.from_state({name: tensor.to(device) for name, tensor in self.state().items()}, **self.config)

    @property
    def config(self) -> dict:
        """What `from_state` needs beside the tensors."""
        return {"channels": self.channels}

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        machines = {"coarse": self.coarse} | ({"fine": self.fine} if self.fine else {})
        tensors = {f"{name}.{k}": v for name, machine in machines.items() for k, v in machine.tensors.items()}
        own = self.network.state_dict() if self.network else {}
        return tensors | {f"network.{k}": v for k, v in own.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], channels: str) -> "KernelRegressor":
        """Return the regressor of `state`."""
        coarse, fine, weights = (
            {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            for name in ("coarse", "fine", "network")
        )
        network = None
        if weights:
            network = StripNetwork(ROWS, _ENDS_WEIGHT, 2 if channels == "both" else 1).to(weights["out.bias"].device)
            network.load_state_dict(weights)
        return cls(MirrorRidge(coarse), MirrorRidge(fine) if fine else None, network, channels)

    def __call__(self, windows: WindowSet) -> tuple[Tensor, Tensor, Tensor]:
        """Return heights (n, 209), curves (n, 209, 6) and spread of the centre line (n, 209) of windows, mm.

        Heights run from T1's upper to L5's lower end, as found, above the window's middle; curves are in
        CURVE_COLUMNS order, the coronal ones relative to the window's middle. The spread is a typical 3D error.
        """
        frames = Frames.from_ends(windows.ends_mm)
        found = self.coarse(_flat(_looked_at(windows, frames, self.channels, with_strip=False)))
        if self.fine is not None:
            frames = _improved(frames, found)
            found = self.fine(_flat(_looked_at(windows, frames, self.channels, with_strip=True)))
        if self.network is not None:
            found = self.network.mended(_fine_strip(windows, frames, self.channels), found)
        ends, curves = _curves(frames, found)
        spread = functional.interpolate(found["spread"][:, None], ROWS, mode="linear", align_corners=False)[:, 0]
        steps = torch.linspace(0, 1, K_DEFAULT, device=ends.device)
        heights = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * steps
        rows = _at_heights(torch.cat([curves, spread[:, :, None]], 2), frames, heights)
        return heights, rows[..., :6], rows[..., 6]


def _shares(device):
    return torch.linspace(_REACH, -_REACH, ROWS, device=device)


def _fitted(windows, rows_mm, ends_mm, frames, channels, components, with_strip=False):
    """Return the machine of a step, its left-out outputs and the targets."""
    parts = _looked_at(windows, frames, channels, with_strip)
    even, odd = _targets(rows_mm, ends_mm, frames)
    machine, left_out = MirrorRidge.fit(_flat(parts), _mirror(parts), _weights(parts), even, odd, components)
    return machine, left_out, {"even": even, "odd": odd}


def _looked_at(windows, frames, channels, with_strip):
    """Return the trunk and, for step two, the strip: images (n, c, rows, cols) of bytes."""
    parts = [_sampled(windows, frames, (112, 112), (_FRAME, _FRAME), False, 8)]
    if with_strip:
        parts.append(_sampled(windows, frames, (128, 32), (_FRAME, _STRIP), True, 2))
    return [part[:, _KEPT[channels]] for part in parts]


def _fine_strip(windows, frames, channels):
    """Return the strips of step three: images (n, c, 216, 32) of bytes, from the first to the last row."""
    return _sampled(windows, frames, STRIP_SHAPE, (2 * _REACH, _STRIP), True, 1)[:, _KEPT[channels]]


def _flat(parts):
    """Return features (n, d)."""
    return torch.cat([part.flatten(1) for part in parts], 1)


def _mirror(parts):
    """Return where each feature comes from in the mirrored image, (d,)."""
    count = sum(part[0].numel() for part in parts)
    places = torch.arange(count, device=parts[0].device).split([part[0].numel() for part in parts])
    return torch.cat([p.view(part.shape[1:]).flip(2).flatten() for p, part in zip(places, parts, strict=True)])


def _weights(parts):
    """Return weights (d,) with which the parts count alike, whatever their size."""
    greys = [part.float().masked_fill(part == UNSEEN_BYTE, 0).flatten(1) for part in parts]
    spread = [grey.var(0, correction=0).sum().sqrt().clamp(min=1e-6) for grey in greys]
    return torch.cat([(1 / s).expand(grey.shape[1]) for s, grey in zip(spread, greys, strict=True)])


def _sampled(windows, frames, shape, size, straightened, pool):
    """Return images (n, 2, rows, cols) of the frames in bytes, averaged over blocks, UNSEEN_BYTE where not seen."""
    (rows, cols), (height, width) = shape, size
    device = frames.middle.device
    down = (0.5 - (torch.arange(rows, device=device) + 0.5) / rows) * height
    across = (0.5 - (torch.arange(cols, device=device) + 0.5) / cols) * width
    half = WINDOW_PIXELS * PITCH_MM / 2
    blocks = []
    for start in range(0, len(windows), _CHUNK):
        part, frame = windows[start : start + _CHUNK], frames[start : start + _CHUNK]
        heights = frame.heights(down)
        middle = _at_heights(frame.centre[..., None], frame, heights)[..., 0] * straightened
        rights = middle[:, :, None] + frame.length[:, None, None] * across
        places = torch.stack([-rights / half, (-heights / half)[:, :, None].expand_as(rights)], dim=-1)
        inside = part.images.to(device).float() - UNSEEN  # beyond the stored square nothing is seen either
        pixels = functional.grid_sample(inside, places, align_corners=False) + UNSEEN
        means = functional.avg_pool2d(pixels, pool)
        grey = (means.clamp(0, 1.5) * GREYS).round().byte()
        blocks.append(grey.masked_fill(means < 0.1 * UNSEEN, UNSEEN_BYTE))
    return torch.cat(blocks)


def _truth_at(rows_mm, heights):
    """Interpolate window rows (n, 288, c) at heights (n, k) above the middle."""
    return _interpolated(rows_mm, (WINDOW_PIXELS - 1) / 2 - heights / PITCH_MM)


def _targets(rows_mm, ends_mm, frames):
    """Return even and odd outputs, in lengths: see `_curves` for the way back."""
    truth = _truth_at(rows_mm, frames.heights(_shares(rows_mm.device)))
    right, centre, left = (truth[..., i] - frames.centre for i in range(3))
    ends = (ends_mm - frames.ends()) * _ENDS_WEIGHT
    even = torch.cat([(right - left) / 2, truth[..., 3:].flatten(1), ends], 1)
    odd = torch.cat([centre, (right + left) / 2], 1)
    return even / frames.length[:, None], odd / frames.length[:, None]


def _curves(frames, outputs):
    """Return the heights (n, 109) between the found ends (and 4% beyond) and the curves (n, 109, 6) there."""
    even, odd = (outputs[name] * frames.length[:, None] for name in ("even", "odd"))
    half, sagittal, ends = even.split([ROWS, 3 * ROWS, 2], 1)
    centre, middle = odd.split(ROWS, 1)
    centre, middle = centre + frames.centre, middle + frames.centre
    columns = torch.stack([middle + half, centre, middle - half], 2)
    rows = torch.cat([columns, sagittal.unflatten(1, (ROWS, 3))], 2)
    return ends / _ENDS_WEIGHT + frames.ends(), rows


def _improved(frames, outputs):
    """Return the frames between the found ends with the found centre line."""
    ends, rows = _curves(frames, outputs)
    better = Frames.from_ends(ends)
    centre = _at_heights(rows[..., 1:2], frames, better.heights(_shares(ends.device)))
    return Frames(better.middle, better.length, centre[..., 0])


def _at_heights(rows, frames, heights):
    """Interpolate rows (n, 109, c) of frames at heights (n, k); ends held."""
    shares = (heights - frames.middle[:, None]) / frames.length[:, None]
    return _interpolated(rows, (_REACH - shares) / (2 * _REACH) * (ROWS - 1))


def _interpolated(rows, places):
    """Interpolate rows (n, r, c) at fractional row numbers (n, k); ends held."""
    places = places.clamp(0, rows.shape[1] - 1)
    low = places.floor().long().clamp(max=rows.shape[1] - 2)
    index = low[:, :, None].expand(-1, -1, rows.shape[2])
    first, second = rows.gather(1, index), rows.gather(1, index + 1)
    return first + (places - low)[:, :, None] * (second - first)


def _centre_errors(rows, rows_mm, frames):
    """Return 3D centre-line errors (n, 109), depth matched."""
    truth = _truth_at(rows_mm, frames.heights(_shares(rows.device)))
    difference = rows[..., [1, 4]] - truth[..., [1, 4]]
    difference[..., 1] -= difference[..., 1].mean(1, keepdim=True)
    return difference.norm(dim=2)
