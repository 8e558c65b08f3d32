"""Kernel ridge regression that treats left and right alike, with its training subjects kept in four bits a feature."""

from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

GREYS, UNSEEN_BYTE = 160, 255
"""Levels per unit of brightness, and the mark of what is not seen: features come as bytes."""

_CODES = 15  # levels of four bits; the sixteenth means unseen
_WIDTH = 0.1  # of the Gaussian kernel on features of unit total variance
_PENALTY, _SPREAD_PENALTY = 1e-2, 30.0


class MirrorRidge:
    """Kernel ridge regression with a Gaussian kernel, exactly equivariant under the mirror image.

    For outputs that keep their value under the mirror ('even') the kernel is K(x, x') + K(x, mx'), for those that
    change sign ('odd') K(x, x') - K(x, mx'): two systems of n equations, the same as one of 2n with mirrored twins.
    Outputs are reduced to their principal components. Training subjects are rounded to 15 grey levels a feature;
    what is asked for later is not.

    Parameters
    ----------
    tensors : dict of Tensor
        As `fit` makes them.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    @classmethod
    def fit(
        cls,
        features: UInt8[Tensor, "n d"],
        mirror,
        weights: Float[Tensor, " d"],
        even: Tensor,
        odd: Tensor,
        components: dict[str, int],
    ):
        """Return the fitted machine and, for every subject, the outputs learnt from all others.

        Parameters
        ----------
        mirror : Tensor (d,) of int
            Where each feature comes from in the mirrored image; d is even.
        weights : Tensor (d,)
            Relative weight of each feature.
        even, odd : Tensor (n, p), (n, q)
        components : dict of str to int
            Principal components of 'even' and 'odd' outputs that are kept.

        Returns
        -------
        machine : MirrorRidge
        left_out : dict of Tensor
            'even' and 'odd', as the targets.
        """
        both = torch.cat([features, features[:, mirror]])
        seen = both != UNSEEN_BYTE
        mean = (both * seen).sum(0) / seen.sum(0).clamp(min=1)
        lowest, highest = both.amin(0), (both * seen).amax(0)  # cut closer, the rarest spines would be lost
        step = ((highest.float() - lowest) / (_CODES - 1)).clamp(min=1e-3)
        codes = ((features - lowest) / step).round().clamp(0, _CODES - 1).byte()
        codes = codes.masked_fill(features == UNSEEN_BYTE, _CODES)
        machine = cls({"codes": packed(codes), "lowest": lowest.float(), "step": step, "mean": mean})
        machine.tensors |= {"mirror": mirror.to(features.device), "scale": weights}
        machine.tensors["scale"] = weights / machine._scaled(machine.centres).square().sum(1).mean().sqrt()
        systems = machine._kernels(machine.centres)
        targets = {"even": even, "odd": odd}
        return machine, {k: machine._solve(k, systems[k], y, components[k]) for k, y in targets.items()}

    def fit_spread(self, spread: Float[Tensor, "n r"]) -> None:
        """Learn a positive quantity that varies slowly between subjects, on a logarithmic scale."""
        values = spread.clamp(min=0.05).log().double()
        system = self._kernels(self.centres)["even"].double()
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

    @cached_property
    def centres(self) -> Float[Tensor, "n d"]:
        """Features of the training subjects as they are remembered, UNSEEN_BYTE where nothing was seen."""
        codes = unpacked(self.tensors["codes"])
        values = self.tensors["lowest"] + self.tensors["step"] * codes
        return values.masked_fill(codes == _CODES, UNSEEN_BYTE)

    def _kernels(self, features):
        x = self._scaled(features)
        same = _gaussian(x, self._scaled_centres)
        other = _gaussian(self._scaled(features[:, self.tensors["mirror"]]), self._scaled_centres)
        return {"even": same + other, "odd": same - other}

    @cached_property
    def _scaled_centres(self):
        return self._scaled(self.centres)

    def _scaled(self, features):
        values = (features - self.tensors["mean"]) / GREYS * self.tensors["scale"]
        return values.masked_fill(features == UNSEEN_BYTE, 0.0)  # what is not seen counts as average

    def _solve(self, name, system, targets, components):
        mean = targets.mean(0) if name == "even" else torch.zeros_like(targets[0])
        count = min(components, *targets.shape)
        basis = torch.linalg.svd(targets - mean, full_matrices=False).Vh[:count].T.contiguous()
        system = system.double()
        system.diagonal().add_(_PENALTY)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
        coefficients = inverse @ ((targets - mean) @ basis).double()
        self.tensors |= {f"{name}_mean": mean, f"{name}_basis": basis, f"{name}_coefficients": coefficients.float()}
        return targets - (coefficients / inverse.diagonal()[:, None]).float() @ basis.T


def packed(codes: UInt8[Tensor, "n d"]) -> UInt8[Tensor, "n d/2"]:
    """Return numbers below 16, two to a byte; d is even."""
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def unpacked(pairs: UInt8[Tensor, "n h"]) -> UInt8[Tensor, "n 2*h"]:
    """Return the numbers that `packed` has put together."""
    return torch.stack([pairs >> 4, pairs & 15], 2).flatten(1)


def _gaussian(a, b):
    squared = a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * (a @ b.T)
    return torch.exp(-_WIDTH * squared.clamp(min=0))
