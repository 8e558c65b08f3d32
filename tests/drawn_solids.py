"""A ball and a box in 1 mm voxels about the origin, and the analytic lengths of rays within them."""

from functools import cache

import numpy as np
import torch

BALL_MM, HALF_BOX_MM = 50.0, np.array([30.0, 20.0, 40.0])
SIDE = 110
AFFINE = np.block([[np.eye(3), np.full((3, 1), -(SIDE - 1) / 2)], [np.zeros((1, 3)), 1]])


@cache
def ball() -> torch.Tensor:
    """A ball, antialiased by 64 samples in each voxel."""
    square = torch.from_numpy(_subvoxels_mm().astype(np.float32) ** 2)
    inside = (square[:, None, None] + square[None, :, None] + square) <= BALL_MM**2
    return torch.nn.functional.avg_pool3d(inside[None].float(), 4)[0]


def box() -> torch.Tensor:
    """A box aligned with the voxels."""
    shares = [(abs(_subvoxels_mm()) <= half).reshape(SIDE, 4).mean(axis=1) for half in HALF_BOX_MM]
    return torch.from_numpy(np.einsum("r,a,s->ras", *shares).astype(np.float32))


def ball_chords_mm(beam) -> np.ndarray:
    """Lengths in the ball of the rays to all pixels."""
    rays = beam.pixels_mm() - beam.source_mm
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    distance_2 = beam.source_mm @ beam.source_mm - (rays @ beam.source_mm) ** 2
    return 2 * np.sqrt(np.clip(BALL_MM**2 - distance_2, 0, None))


def box_chords_mm(beam) -> np.ndarray:
    """Lengths in the box of the rays to all pixels."""
    rays = beam.pixels_mm() - beam.source_mm
    ends = np.stack([(side * HALF_BOX_MM - beam.source_mm) / rays for side in (-1, 1)])
    inside = ends.max(axis=0).min(axis=-1) - ends.min(axis=0).max(axis=-1)
    return np.clip(inside, 0, None) * np.linalg.norm(rays, axis=-1)


def median_error(image, truth) -> float:
    """Median relative error where the truth is above a tenth of its maximum."""
    inside = truth > 0.1 * truth.max()
    return float(np.median(abs(np.asarray(image) - truth)[inside] / truth[inside]))


def _subvoxels_mm():
    return (np.arange(4 * SIDE) + 0.5) / 4 - SIDE / 2
