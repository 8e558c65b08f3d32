"""Spinal fusion: titanium pedicle screws and rods, as areal density on a frontal image.

Sizes of common constructs (assumed): screws of 4.5 to 6.5 mm that follow the pedicles through most of the body,
heads of 12 mm, and two rods of 5.5 mm through the heads, bent along the spine as it is.
"""

import numpy as np
import torch

from spinelib.geometry import PlanarGrid
from spinelib.phantom.population import Subject
from spinelib.phantom.render import Lattice
from spinelib.phantom.solids import Piece, capsule, chain

ALLOY_G_CM3 = 4.43
"""Ti-6Al-4V."""

ROD_RADIUS_MM, HEAD_RADIUS_MM = 2.75, 6.0
_DEPTH_STEP_MM = 1.0
_EDGE_MM = 0.2
_REACH_BEHIND_MM = 17.0  # from the root of the pedicle back to the rod, past facet and lamina
_DEPTH_IN_BODY = 0.7  # of the end-plate depth that a screw reaches forward
_CONVERGENCE = 0.35  # of its distance from the midline that a screw loses on its way forward


def titanium(subject: Subject, grid: PlanarGrid) -> np.ndarray:
    """Return the areal density, g/cm2 on a coronal grid, of the implants at `subject.fused`; zero without.

    The tissue that metal displaces is left in place: 3 to 8 per cent of the metal's own attenuation.
    """
    pieces = implants(subject)
    if not pieces:
        return np.zeros(grid.shape, np.float32)
    rear = min(piece.lower_mm[1] for piece in pieces) - 2
    front = max(piece.upper_mm[1] for piece in pieces) + 2
    matrix = np.diag([-grid.spacing_mm[1], _DEPTH_STEP_MM, -grid.spacing_mm[0], 1.0])
    matrix[:3, 3] = grid.origin_mm[1], rear, grid.origin_mm[0]
    depth = int(np.ceil((front - rear) / _DEPTH_STEP_MM)) + 1
    lattice = Lattice((grid.shape[1], depth, grid.shape[0]), matrix, torch.device("cpu"))
    edge, share = lattice.edge_mm(_EDGE_MM), torch.zeros(grid.shape[1], depth, grid.shape[0])
    for piece in pieces:
        window = lattice.window(piece.lower_mm, piece.upper_mm, 5 * edge)
        if window is not None:
            inside = torch.sigmoid(piece.distance(lattice.points(window)) * (-1 / edge))
            share[window] = torch.maximum(share[window], inside)
    return (share.sum(1).T * (_DEPTH_STEP_MM / 10 * ALLOY_G_CM3)).numpy()


def implants(subject: Subject) -> list[Piece]:
    """Return screws, screw heads and the two rods of the fused levels, world mm."""
    pieces = []
    for side in (1.0, -1.0):
        screws = [_screw(subject, level, side) for level in subject.fused]
        for tip, head, radius in screws:
            pieces += [capsule(tip, head, 0.8 * radius, radius), capsule(head, head, HEAD_RADIUS_MM)]
        heads = np.array([head for _, head, _ in screws])
        if len(heads) > 1:
            ends = [heads[0] + 0.3 * (heads[0] - heads[1]), heads[-1] + 0.3 * (heads[-1] - heads[-2])]
            pieces += chain([ends[0], *_smoothed(heads), ends[1]], ROD_RADIUS_MM)
    return pieces


def _screw(subject, level, side):
    """Tip, head (world mm) and radius of the screw through one pedicle."""
    i = subject.index(level)
    size = {name: float(values[i]) for name, values in subject.dims.items()}
    wall = -size["endplate_depth_mm"] / 2
    right = (size["canal_width_mm"] + size["pedicle_width_mm"]) / 2
    up = 0.2 * (size["height_anterior_mm"] + size["height_posterior_mm"]) / 2
    tip = [side * right * (1 - _CONVERGENCE), wall + _DEPTH_IN_BODY * size["endplate_depth_mm"], 0.5 * up]
    head = [side * (right + 2.0), wall - _REACH_BEHIND_MM, up]
    radius = float(np.clip(0.4 * size["pedicle_width_mm"], 2.25, 3.25))
    pose = subject.poses[i]
    return tuple((pose @ [*place, 1.0])[:3] for place in (tip, head)) + (radius,)


def _smoothed(heads):
    """Give way by a quarter towards the neighbours: a rod bends smoothly."""
    line = heads.copy()
    line[1:-1] = 0.5 * heads[1:-1] + 0.25 * (heads[:-2] + heads[2:])
    return line
