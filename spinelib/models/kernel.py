"""Curves by kernel regression in two steps, coarse to fine: quick to fit, and strong on cohorts of thousands.

Step one looks at the whole trunk in a frame that spans T1-L5 and gives a first centre line and better ends. Step two
looks again in the improved frame, now also at a strip straightened along that centre line, in which every pedicle
and end plate lies where it lay in the other subjects: how far the arches have moved against the bodies tells how a
vertebra is tilted out of the image plane.

Both steps are kernel ridge regressions that treat left and right alike: a mirrored image gives the mirrored curves
exactly. Step two is fitted on what step one says of subjects it has not seen (leave-one-out, in closed form), so
that it learns to mend errors of the size it will meet. The same left-out errors teach the spread.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from spinelib.errors import InputError
from spinelib.models.crop import PITCH_MM
from spinelib.models.windows import UNSEEN, WINDOW_PIXELS, WindowSet
from spinelib.spine import K_DEFAULT

ROWS = 109
"""Heights at which curves are regressed; they reach 4% of the T1-L5 length beyond either end."""

CHANNEL_CHOICES = ("both", "bone", "tissue")

_REACH = 0.54
_FRAME = 1.25  # side of the frame that step one sees, in T1-L5 lengths
_STRIP = 0.30  # width of the strip, likewise
_SPREAD_ROWS = 17
_ENDS_WEIGHT = 3.0  # two numbers among hundreds
_ENDS_JITTER_MM = 2.5  # training frames are as wrong as a locator is
_GREYS, _UNSEEN = 160, 255  # levels per unit of brightness: features are kept as bytes
_CHUNK = 256
_WIDTH = 0.05  # of the Gaussian kernel on features of unit total variance
_PENALTY, _SPREAD_PENALTY = 1e-3, 30.0
_COMPONENTS = {"even": 56, "odd": 24}
_LEAST_SUBJECTS = 8


class MirrorRidge:
    """Kernel ridge regression with a Gaussian kernel, exactly equivariant under the mirror image.

    For outputs that keep their value under the mirror ('even') the kernel is K(x, x') + K(x, mx'), for those that
    change sign ('odd') K(x, x') - K(x, mx'): two systems of n equations, the same as one of 2n with mirrored twins.
    Outputs are reduced to their principal components.

    Parameters
    ----------
    tensors : dict of Tensor
        As `fit` makes them.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @classmethod
    def fit(cls, features: UInt8[Tensor, "n d"], mirror, weights: Float[Tensor, " d"], even: Tensor, odd: Tensor):
        """Return the fitted machine and, for every subject, the outputs learnt from all others.

        Parameters
        ----------
        mirror : Tensor (d,) of int
            Where each feature comes from in the mirrored image.
        weights : Tensor (d,)
            Relative weight of each feature.
        even, odd : Tensor (n, p), (n, q)

        Returns
        -------
        machine : MirrorRidge
        left_out : dict of Tensor
            'even' and 'odd', as the targets.
        """
        both = torch.cat([features, features[:, mirror]])
        seen = both != _UNSEEN
        mean = (both * seen).sum(0) / seen.sum(0).clamp(min=1) / _GREYS
        machine = cls({"centres": features, "mirror": mirror.to(features.device), "mean": mean, "scale": weights})
        machine.tensors["scale"] = weights / machine._scaled(features).square().sum(1).mean().sqrt()
        systems = machine._kernels(features)
        left_out = {name: machine._solve(name, systems[name], y) for name, y in (("even", even), ("odd", odd))}
        return machine, left_out

    def fit_spread(self, spread: Float[Tensor, "n r"]) -> None:
        """Learn a positive quantity that varies slowly between subjects, on a logarithmic scale."""
        values = spread.clamp(min=0.05).log().double()
        system = self._kernels(self.tensors["centres"])["even"].double()
        system.diagonal().add_(_SPREAD_PENALTY)
        self.tensors["spread_mean"] = values.mean(0).float()
        self.tensors["spread"] = torch.linalg.solve(system, values - values.mean(0)).float().contiguous()

    def __call__(self, features: UInt8[Tensor, "b d"]) -> dict[str, Tensor]:
        """Return 'even' (b, p), 'odd' (b, q) and, once fitted, 'spread' (b, r)."""
        t, kernels = self.tensors, self._kernels(features)
        found = {}
        for name in ("even", "odd"):
            codes = kernels[name].double() @ t[f"{name}_coefficients"].double()
            found[name] = codes.float() @ t[f"{name}_basis"].T + t[f"{name}_mean"]
        if "spread" in t:
            found["spread"] = (kernels["even"] @ t["spread"] + t["spread_mean"]).exp()
        return found

    def _kernels(self, features):
        x, centres = self._scaled(features), self._centres
        same = _gaussian(x, centres)
        other = _gaussian(self._scaled(features[:, self.tensors["mirror"]]), centres)
        return {"even": same + other, "odd": same - other}

    @cached_property
    def _centres(self):
        return self._scaled(self.tensors["centres"])

    def _scaled(self, features):
        values = (features.float() / _GREYS - self.tensors["mean"]) * self.tensors["scale"]
        return values.masked_fill(features == _UNSEEN, 0.0)  # what is not seen counts as average

    def _solve(self, name, system, targets):
        mean = targets.mean(0) if name == "even" else torch.zeros_like(targets[0])
        count = min(_COMPONENTS[name], *targets.shape)
        basis = torch.linalg.svd(targets - mean, full_matrices=False).Vh[:count].T.contiguous()
        system = system.double()
        system.diagonal().add_(_PENALTY)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
        coefficients = inverse @ ((targets - mean) @ basis).double()
        self.tensors |= {f"{name}_mean": mean, f"{name}_basis": basis, f"{name}_coefficients": coefficients.float()}
        return targets - (coefficients / inverse.diagonal()[:, None]).float() @ basis.T


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
        Step two; None leaves it out (for ablation).
    channels : str
        'both', 'bone' or 'tissue': what is looked at.
    """

    def __init__(self, coarse: MirrorRidge, fine: MirrorRidge | None, channels: str = "both"):
        self.coarse, self.fine, self.channels = coarse, fine, channels

    @classmethod
    def fit(
        cls,
        windows: WindowSet,
        rows_mm: Float[Tensor, "n 288 6"],
        ends_mm: Float[Tensor, "n 2"],
        *,
        channels: str = "both",
        refine: bool = True,
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
        channels, refine
            See the attributes.

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
        machines = []
        for with_strip in (False, True) if refine else (False,):
            if with_strip:
                frames = _improved(frames, left_out)
            parts = _looked_at(windows, frames, channels, with_strip)
            targets = _targets(rows_mm, ends_mm, frames)
            machine, left_out = MirrorRidge.fit(_flat(parts), _mirror(parts), _weights(parts), *targets)
            machines.append(machine)
        errors = _centre_errors(_curves(frames, left_out)[1], rows_mm, frames)
        machines[-1].fit_spread(functional.adaptive_avg_pool1d(errors[:, None], _SPREAD_ROWS)[:, 0])
        return cls(machines[0], machines[1] if refine else None, channels)

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
        return {f"{name}.{k}": v for name, machine in machines.items() for k, v in machine.tensors.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], channels: str) -> "KernelRegressor":
        """Return the regressor of `state`."""
        coarse, fine = (
            {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            for name in ("coarse", "fine")
        )
        return cls(MirrorRidge(coarse), MirrorRidge(fine) if fine else None, channels)

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
        ends, curves = _curves(frames, found)
        spread = functional.interpolate(found["spread"][:, None], ROWS, mode="linear", align_corners=False)[:, 0]
        steps = torch.linspace(0, 1, K_DEFAULT, device=ends.device)
        heights = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * steps
        rows = _at_heights(torch.cat([curves, spread[:, :, None]], 2), frames, heights)
        return heights, rows[..., :6], rows[..., 6]


def _shares(device):
    return torch.linspace(_REACH, -_REACH, ROWS, device=device)


def _looked_at(windows, frames, channels, with_strip):
    """Return the trunk and, for step two, the strip: images (n, c, rows, cols) of bytes."""
    parts = [_sampled(windows, frames, (112, 112), _FRAME, False, 8)]
    if with_strip:
        parts.append(_sampled(windows, frames, (112, 32), _STRIP, True, 2))
    kept = {"both": slice(None), "bone": slice(0, 1), "tissue": slice(1, 2)}[channels]
    return [part[:, kept] for part in parts]


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
    greys = [part.float().masked_fill(part == _UNSEEN, 0).flatten(1) for part in parts]
    spread = [grey.var(0, correction=0).sum().sqrt().clamp(min=1e-6) for grey in greys]
    return torch.cat([(1 / s).expand(grey.shape[1]) for s, grey in zip(spread, greys, strict=True)])


def _sampled(windows, frames, shape, width, straightened, pool):
    """Return images (n, 2, rows, cols) of the frames in bytes, averaged over blocks, _UNSEEN where nothing is seen."""
    rows, cols = shape
    device = frames.middle.device
    down = (0.5 - (torch.arange(rows, device=device) + 0.5) / rows) * _FRAME
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
        grey = (means.clamp(0, 1.5) * _GREYS).round().byte()
        blocks.append(grey.masked_fill(means < 0.1 * UNSEEN, _UNSEEN))
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


def _gaussian(a, b):
    squared = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * (a @ b.T)
    return torch.exp(-_WIDTH * squared.clamp(min=0))
