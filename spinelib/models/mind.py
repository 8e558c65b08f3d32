"""MIND-SSC: an image as what a voxel's neighbours have in common, which CT and MR share (Heinrich et al., MICCAI 2013).

Of the six voxels at `DILATION` along the axes, twelve pairs (a, b) are neighbours of each other. With D the mean of
(I(x + a) - I(x + b))^2 over a box of 2 `RADIUS` + 1 voxels a side, less its least value over the pairs, and V the mean
of D over the pairs, held between 0.001 and 1000 times its mean over the image, the descriptor is exp(-D / V).

D of the pair (a, b) at x is a box mean at x + a of the squared difference to the voxel b - a further on. There are six
such ways up to sign, so six box means serve the twelve pairs.
"""

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional

RADIUS, DILATION = 2, 2

REACH = RADIUS + DILATION
"""Voxels along an axis that a descriptor sees to each side."""

_LIMITS = (1e-3, 1e3)
_FLOOR = 1e-8  # of V, so that an image without any structure has the descriptor 1


def mind_ssc(image: Tensor, valid: Tensor | None = None, step: int = 1) -> Tensor:
    """Return the descriptors of an image.

    Parameters
    ----------
    image : Tensor (b, 1, R, A, S)
        Goes on with its last voxel beyond the border.
    valid : Tensor (b, 1, R, A, S), optional
        Above 0 where a descriptor's `support` is inside what was seen: the mean of V is of these voxels. Default: all.
    step : int
        1, or 2 for every second voxel along each axis.

    Returns
    -------
    Tensor (b, 12, R / step, A / step, S / step)
        Rounded up.
    """
    padded = functional.pad(image, (REACH,) * 6, mode="replicate")
    distances = torch.cat(list(_pair_distances(padded, image.shape[2:], step)), 1)
    distances = distances - distances.amin(1, keepdim=True)
    scale = distances.mean(1, keepdim=True)
    with torch.no_grad():
        seen = torch.ones_like(scale) if valid is None else (valid[..., ::step, ::step, ::step] > 0).float()
        mean = (scale * seen).sum((2, 3, 4), keepdim=True) / seen.sum((2, 3, 4), keepdim=True).clamp(min=1)
    scale = scale.maximum(_LIMITS[0] * mean + _FLOOR).minimum(_LIMITS[1] * mean + _FLOOR)
    return torch.exp(-distances / scale)


def mind_loss(a: Tensor, b: Tensor, valid: Tensor | None = None, step: int = 1) -> Tensor:
    """Return the mean squared difference of the descriptors of two images (b, 1, R, A, S), 0 to 1.

    Parameters
    ----------
    a, b : Tensor (b, 1, R, A, S)
    valid : Tensor (b, 1, R, A, S), optional
        Above 0.5 where both images were acquired; a voxel counts if all that its descriptor sees is there, and 0 is
        returned if there is none. Default: everywhere.
    step : int
        As in `mind_ssc`.
    """
    seen = torch.ones_like(a) if valid is None else support(valid)
    apart = (mind_ssc(a, seen, step) - mind_ssc(b, seen, step)).square().mean(1, keepdim=True)
    seen = seen[..., ::step, ::step, ::step]
    return (apart * seen).sum() / seen.sum().clamp(min=1)


def support(valid: Tensor) -> Tensor:
    """Return 1 where the box that a descriptor sees is valid, 0 elsewhere; beyond the border goes on as at it."""
    missing = (valid <= 0.5).float()
    for axis in range(3):
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[axis], padding[axis] = 2 * REACH + 1, REACH
        missing = functional.max_pool3d(missing, kernel, 1, padding)
    return 1 - missing


def _pair_distances(padded, shape, step):
    """Yield D of the twelve pairs, two at a time, (b, 2, ...)."""
    for axes in combinations(range(3), 2):
        for sign in (1, -1):
            yield _two_distances(padded, shape, axes, sign, step)


def _two_distances(padded, shape, axes, sign, step):
    """Return D of the pairs (a, b) and (-b, -a), a along the first axis, b, turned by `sign`, along the second.

    E, the box mean of the squared difference between x and x + b - a, gives the first at x + a, the second at x - b.
    """
    a, b = [0, 0, 0], [0, 0, 0]
    a[axes[0]], b[axes[1]] = DILATION, sign * DILATION
    starts = [min(p, -q) for p, q in zip(a, b, strict=True)]
    sizes = [n + abs(p + q) for n, p, q in zip(shape, a, b, strict=True)]
    way = [q - p for p, q in zip(a, b, strict=True)]
    squares = _box(padded, starts, sizes).sub(_box(padded, starts, sizes, way)).square()
    means = _box_mean(squares, step)
    corners = [[(p - s) // step for p, s in zip(point, starts, strict=True)] for point in (a, [-q for q in b])]
    counts = [-(-n // step) for n in shape]
    return torch.cat([_cut(means, corner, counts) for corner in corners], 1)


def _box(padded, starts, sizes, way=(0, 0, 0)):
    """Return what box means of `sizes` voxels from `starts` of the image need, moved by `way`."""
    corner = [REACH + s + w - RADIUS for s, w in zip(starts, way, strict=True)]
    return _cut(padded, corner, [n + 2 * RADIUS for n in sizes])


def _cut(values, corner, sizes):
    return values[(..., *(slice(c, c + n) for c, n in zip(corner, sizes, strict=True)))]


def _box_mean(values, step):
    """Return means over boxes, every `step` voxels: one axis after another."""
    for axis in range(3):
        kernel, stride = [1, 1, 1], [1, 1, 1]
        kernel[axis], stride[axis] = 2 * RADIUS + 1, step
        values = functional.avg_pool3d(values, kernel, stride)
    return values
