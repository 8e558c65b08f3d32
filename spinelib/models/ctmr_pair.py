"""The published objective of CT/MR registration solved for one pair, without a network and without training.

Balakrishnan et al. (2019, IEEE TMI 38:1788) call this instance optimisation: the velocity itself is what is sought. It
shows what the objective of a variant of `spinelib.models.ctmr` asks for, apart from how well a network has learnt it.
"""

import torch
from torch import Tensor
from torch.nn import functional

from spinelib.models.ctmr import objective

STAGES = ((8, 0.3), (4, 0.2), (2, 0.1))
"""Knots of the velocity every so many half-grid voxels, and the rate of each stage, half-grid voxels a step.

Knots at every voxel, or three times the steps, reach a lower objective but a field that is further from the truth:
similarity alone follows noise (two pairs of seeds 400001 and 400002, 'pc_rd': soft tissue 1.8 mm off, and 2.3 or 2.7).
"""

STEPS = 10
"""Of each stage."""


def solve_velocity(batch: dict[str, Tensor], variant: str) -> Tensor:
    """Return the velocity (b, 3, R/2, A/2, S/2) that is best for a pair, half-grid voxels; found from rest by Adam.

    Parameters
    ----------
    batch : dict of str to Tensor
        As of `spinelib.models.ctmr_data.PairDataset`; sides are multiples of 16.
    variant : str
        One of `spinelib.models.ctmr.VARIANTS`.

    Raises
    ------
    InputError
        If the variant is unknown.
    """
    ct = batch["ct"]
    half = [side // 2 for side in ct.shape[2:]]
    knots = torch.zeros(len(ct), 3, 1, 1, 1, device=ct.device)
    with torch.enable_grad():
        for pitch, rate in STAGES:
            knots = _interpolated(knots, [max(2, round(side / pitch)) for side in half]).detach().requires_grad_()
            optimiser = torch.optim.Adam([knots], rate, betas=(0.9, 0.99))
            for _ in range(STEPS):
                optimiser.zero_grad()
                objective(_interpolated(knots, half), batch, variant).backward()
                optimiser.step()
    return _interpolated(knots.detach(), half)


def _interpolated(knots, shape):
    return functional.interpolate(knots, shape, mode="trilinear", align_corners=False)
