"""Fit vertebral bodies to requested dimensions: all bodies of a spine at once, by a fixed point."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spinelib.phantom.sdf import DRUM_FIELDS, drum_distance
from spinelib.phantom.warp import Warp

RIM_FRACTION = 0.15
"""Width and depth are measured this fraction of the smaller height inside each end plate (4 mm in L3)."""

WALL_FRACTION = 0.43
"""Heights are measured at this fraction of the depth (or the width, right and left) off the centre."""

_ROUNDS = 12
_STEPS = 3  # root-finding steps per ray between two updates

# Rays, their axis and sense: four ends of the width, four of the depth, eight on the plates.
_AXIS = torch.tensor([0] * 4 + [1] * 4 + [2] * 8)
_SENSE = torch.tensor([1.0, -1, 1, -1] * 2 + [1.0, -1] * 4)


class BodySize(NamedTuple):
    """Measured sizes of n bodies, arrays (n,): mm and degrees (coronal wedge > 0: taller on the right)."""

    endplate_width_mm: np.ndarray
    endplate_depth_mm: np.ndarray
    height_anterior_mm: np.ndarray
    height_posterior_mm: np.ndarray
    coronal_wedge_deg: np.ndarray


def calibrate_drums(drums, warps: list[Warp], requests) -> list[dict[str, float]]:
    """Return drums whose measured sizes equal the requests, centred on the local origin.

    Parameters
    ----------
    drums : list of dict
        Shape constants (sdf.DRUM_FIELDS); outline, offsets and slopes are set here.
    warps : list of Warp
    requests : list of dict
        endplate_width_mm, endplate_depth_mm, height_anterior_mm, height_posterior_mm, coronal_wedge_deg.
    """
    want, params = _columns(requests, BodySize._fields), _columns(drums, DRUM_FIELDS)
    bend = _stacked(warps)
    ends, targets = _start(params, want)
    for _ in range(_ROUNDS):
        for _ in range(_STEPS):
            ends = ends - _ray_values(params, bend, ends, want)
        _update(params, targets - ends, want)
    columns = {name: values[:, 0].tolist() for name, values in params.items()}
    return [{name: columns[name][i] for name in DRUM_FIELDS} for i in range(len(drums))]


def measure_drums(drums, warps: list[Warp], requests) -> BodySize:
    """Measure bodies along the calibration's rays, which start from the nominal sizes `requests`.

    Width and depth: mean of the extents through the middle, RIM_FRACTION of the smaller height inside
    both plates.
    Heights: of the anterior and posterior wall, from the mid-sagittal heights WALL_FRACTION of the depth
    before and behind the centre. Coronal wedge: from the
    heights at WALL_FRACTION of the width right and left.
    """
    want, params = _columns(requests, BodySize._fields), _columns(drums, DRUM_FIELDS)
    ends, _ = _start(params, want, seed_params=False)
    for _ in range(12):
        ends = ends - _ray_values(params, _stacked(warps), ends, want)
    w1, w2, w3, w4, d1, d2, d3, d4, fa, fb, pa, pb, ra, rb, la, lb = ends.double().numpy().T
    span = 2 * WALL_FRACTION * want["endplate_width_mm"][:, 0].double().numpy()
    wedge = 2 * np.degrees(np.arctan(((ra + rb) - (la + lb)) / 2 / span))
    return BodySize((w1 + w2 + w3 + w4) / 2, (d1 + d2 + d3 + d4) / 2, *_plate_heights(fa + fb, pa + pb), wedge)


def _plate_heights(front, back):
    """Extrapolate heights at WALL_FRACTION to the walls: plates are planes between the measured points."""
    mean, half_difference = (front + back) / 2, (front - back) / 2 / (2 * WALL_FRACTION)
    return mean + half_difference, mean - half_difference


def _start(params, want, seed_params=True):
    """Return ray ends (n, 16) at the nominal surface and the target of each end."""
    half_w, half_d = want["endplate_width_mm"] / 2, want["endplate_depth_mm"] / 2
    ha, hp = want["height_anterior_mm"], want["height_posterior_mm"]
    mean, tilt = (ha + hp) / 2, (ha - hp) / 2 * 2 * WALL_FRACTION
    roll = torch.tan(torch.deg2rad(want["coronal_wedge_deg"] / 2)) * half_w * 2 * WALL_FRACTION
    heights = [mean + tilt, mean - tilt, mean + 2 * roll, mean - 2 * roll]
    targets = torch.cat([half_w.expand(-1, 4), half_d.expand(-1, 4), *((h / 2).expand(-1, 2) for h in heights)], 1)
    if seed_params:
        params["half_width"], params["half_depth"] = half_w * 1.04, half_d * 1.06
        params["top_offset"], params["bottom_offset"] = mean / 2, -mean / 2
        for name in ("centre_right", "centre_anterior"):
            params[name] = torch.zeros_like(mean)
        for axis, slope in (
            ("right", roll / half_w / 2 / WALL_FRACTION),
            ("anterior", (ha - hp) / half_d / 4),
        ):
            params[f"top_{axis}_slope"], params[f"bottom_{axis}_slope"] = slope, -slope
    return targets.clone(), targets


def _ray_values(params, bend, ends, want) -> Tensor:
    """Return the body's distance (n, 16) at the ray ends."""
    half_w, half_d = want["endplate_width_mm"], want["endplate_depth_mm"]
    level = torch.minimum(want["height_anterior_mm"], want["height_posterior_mm"]) * (0.5 - RIM_FRACTION)
    rim = torch.cat([level, level, -level, -level], 1)
    points = torch.zeros(3, *ends.shape)
    points[2, :, :8] = torch.cat([rim, rim], 1)
    points[1, :, 8:12] = half_d * WALL_FRACTION * torch.tensor([1.0, 1, -1, -1])
    points[0, :, 12:] = half_w * WALL_FRACTION * torch.tensor([1.0, 1, -1, -1])
    points.scatter_(0, _AXIS.expand(1, *ends.shape), (ends * _SENSE)[None])
    frequencies, phases, amplitudes = bend
    waves = torch.einsum("njc,cnm->njm", frequencies, points) + phases[:, :, None]
    points = points + torch.einsum("ncj,njm->cnm", amplitudes, waves.sin())
    return drum_distance(params, points)


def _update(params, miss, want) -> None:
    """Move the parameters by the misses (n, 16), outward positive."""
    half_d, half_w = want["endplate_depth_mm"], want["endplate_width_mm"]
    params["half_width"] = params["half_width"] + miss[:, :4].mean(1, keepdim=True)
    params["half_depth"] = params["half_depth"] + miss[:, 4:8].mean(1, keepdim=True)
    params["centre_right"] = params["centre_right"] + (miss[:, :4] * _SENSE[:4]).mean(1, keepdim=True)
    params["centre_anterior"] = params["centre_anterior"] + (miss[:, 4:8] * _SENSE[4:8]).mean(1, keepdim=True)
    for plate, sign, first in (("top", 1.0, 8), ("bottom", -1.0, 9)):
        front, back, right, left = (miss[:, i, None] * sign for i in range(first, 16, 2))
        params[f"{plate}_offset"] = params[f"{plate}_offset"] + (front + back) / 2
        run = 2 * WALL_FRACTION
        params[f"{plate}_anterior_slope"] = params[f"{plate}_anterior_slope"] + (front - back) / (run * half_d)
        params[f"{plate}_right_slope"] = params[f"{plate}_right_slope"] + (right - left) / (run * half_w)


def _columns(rows, names) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float32)[:, None] for name in names}


def _stacked(warps: list[Warp]):
    return tuple(torch.tensor(np.stack(arrays), dtype=torch.float32) for arrays in zip(*warps, strict=False))
