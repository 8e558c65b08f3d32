"""What it costs a displacement to bend vertebrae: four terms, each 0 for any rigid motion of every vertebra.

Displacements u (b, 3, R, A, S) are in voxels of an isotropic grid, phi(x) = x + u(x); labels (b, R, A, S) are integers,
0 = no vertebra. Orthonormality and properness are those of Staring et al. (2007); rigid dice and rigid field are those
of Jian et al. (MICCAI 2022), which compare a vertebra's motion with the closest rigid one.

Labels on the fixed grid are constants here: no term falls because a mask moves or shrinks. Differences are taken
between voxels of one vertebra, so neither the image's border nor what lies around a vertebra counts.
"""

import torch
from torch import Tensor
from torch.nn import functional

FEWEST_VOXELS = 100
"""A vertebra of which fewer voxels are in the image is left out of the terms that fit a rigid motion to it."""

_AROUND = 2  # voxels around a vertebra that rigid dice looks at too
_BATCH_STRIDE = 256  # labels are 8 bits, so this keeps the pairs of a batch apart


def orthonormality_loss(u: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of ||J^T J - I||_F^2 over vertebrae (OC); 0 without any.

    Parameters
    ----------
    u : Tensor (b, 3, R, A, S)
    labels : Tensor (b, R, A, S)
        Vertebrae on the grid of u.
    """
    jacobian = bone_jacobian(u, labels)
    return _mean((jacobian.mT @ jacobian - torch.eye(3, device=u.device)).square().sum((1, 2)))


def properness_loss(u: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of (det J - 1)^2 over vertebrae (PC); 0 without any. Parameters: see `orthonormality_loss`."""
    first, second, third = bone_jacobian(u, labels).unbind(-1)
    return _mean(((torch.linalg.cross(first, second) * third).sum(-1) - 1).square())


def rigid_field_loss(u: Tensor, labels: Tensor) -> Tensor:
    """Return the mean distance, voxels, of phi from the closest rigid motion of each vertebra (RF).

    Parameters: see `orthonormality_loss`.
    """
    places, vertebra, rotation, shift = _motions(u, labels)
    points = _index(places, labels.shape)
    apart = points + _rows(u)[places] - _moved(points, rotation, shift, vertebra)
    softness = 1e-3  # keeps the gradient of the norm finite at 0
    return _mean((apart.square().sum(1) + softness**2).sqrt() - softness)


def rigid_dice_loss(u: Tensor, moving_labels: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over vertebrae of 1 - 2 sum(p q) / (sum p^2 + sum q^2) (RD).

    p is the vertebra at phi(x), interpolated linearly; q is the same at T(x), T the rigid motion closest to phi, and is
    constant. Squares in the denominator make 0 the least value, where the released code's is 0.05 to 0.1.

    Parameters
    ----------
    u : Tensor (b, 3, R, A, S)
    moving_labels : Tensor (b, R, A, S)
        Vertebrae of the CT.
    labels : Tensor (b, R, A, S)
        The same at phi(x).
    """
    with torch.no_grad():
        _, _, rotation, shift = _motions(u, labels)
        places, vertebra = _vertebrae(labels, _dilated(labels))
        name = _flat(_dilated(labels))[places]
    points, item = _index(places, labels.shape), places // labels[0].numel()
    p = _membership(moving_labels, points + _rows(u)[places], item, name)
    q = _membership(moving_labels, _moved(points, rotation, shift, vertebra), item, name)
    sums = u.new_zeros(len(rotation), 2).index_add(0, vertebra, torch.stack([p * q, (p * p + q * q) / 2], 1))
    return _mean(1 - sums[:, 0] / sums[:, 1].clamp(min=1))


def bone_jacobian(u: Tensor, labels: Tensor) -> Tensor:
    """Return J = d phi / dx (n, 3, 3) where a voxel and the next along each axis belong to one vertebra.

    Forward differences: exact for a linear field, and, unlike central ones, not blind to voxels that alternate.
    """
    corner = labels[:, :-1, :-1, :-1]
    same = corner > 0
    for ahead in (labels[:, 1:, :-1, :-1], labels[:, :-1, 1:, :-1], labels[:, :-1, :-1, 1:]):
        same = same & (ahead == corner)
    places = functional.pad(same, (0, 1) * 3).flatten().nonzero()[:, 0]
    rows, (_, _, across, slices) = _rows(u), labels.shape
    steps = [rows[places + step] - rows[places] for step in (across * slices, slices, 1)]
    return torch.stack(steps, -1) + torch.eye(3, device=u.device)


def procrustes(x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return rotation (..., 3, 3) and shift (..., 3) that take points x closest to points y; differentiable.

    Least squares about the pairs' own centroids (Kabsch 1976).

    Parameters
    ----------
    x, y : Tensor (..., n, 3)
    weights : Tensor (..., n), optional
    """
    weights = torch.ones_like(x[..., 0]) if weights is None else weights
    share = (weights / weights.sum(-1, keepdim=True))[..., None]
    x_mean, y_mean = (share * x).sum(-2), (share * y).sum(-2)
    rotation = closest_rotation((share * (y - y_mean[..., None, :])).mT @ (x - x_mean[..., None, :]))
    return rotation, y_mean - (rotation @ x_mean[..., None])[..., 0]


def closest_rotation(matrix: Tensor) -> Tensor:
    """Return the rotation R (..., 3, 3) that maximises trace(R^T M), as a differentiable function of M.

    The gradient of a singular value decomposition is infinite where two values are equal, though that of R is not. So R
    is found without gradient, and one Newton step on the rotations, which changes nothing at the solution, carries
    the gradient.
    """
    with torch.no_grad():
        left, values, right = torch.linalg.svd(matrix)
        signs = torch.ones_like(values)
        signs[..., 2] = torch.linalg.det(left @ right).sign()
        rotation = (left * signs[..., None, :]) @ right
        product = rotation.mT @ matrix
        trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eye = torch.eye(3, dtype=matrix.dtype, device=matrix.device)
        curvature = trace * eye - (product + product.mT) / 2
        curvature = curvature + (1e-7 * trace.abs() + torch.finfo(matrix.dtype).tiny) * eye
    product = rotation.mT @ matrix
    skew = product - product.mT
    slope = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)
    turn = torch.linalg.solve(curvature, slope)
    return rotation + rotation @ torch.linalg.cross(turn[..., None, :], eye.expand(*turn.shape, 3), dim=-1).mT


# --- vertebrae as groups of voxels ---


def _motions(u, labels):
    """Return voxels of vertebrae, flat index and group, and per group the closest rotation and shift."""
    places, vertebra = _vertebrae(labels, labels)
    count = int(vertebra.max()) + 1 if len(vertebra) else 0
    size = torch.bincount(vertebra, minlength=count)[:, None].to(u.dtype)
    x = _index(places, labels.shape)
    y = x + _rows(u)[places]
    x_mean, y_mean = (points.new_zeros(count, 3).index_add(0, vertebra, points) / size for points in (x, y))
    products = (y - y_mean[vertebra])[:, :, None] * (x - x_mean[vertebra])[:, None]
    moments = products.new_zeros(count, 3, 3).index_add(0, vertebra, products)
    rotation = closest_rotation(moments / size[..., None])
    return places, vertebra, rotation, y_mean - (rotation @ x_mean[..., None])[..., 0]


def _vertebrae(labels, wider):
    """Return the voxels of `wider` whose vertebra is large enough in `labels`: flat index and group, both (n,)."""
    names = _flat(labels)
    largest = int(names.max()) + 1
    is_bone = torch.bincount(names, minlength=largest) >= FEWEST_VOXELS
    is_bone[::_BATCH_STRIDE] = False
    group = is_bone.cumsum(0) - 1
    names = _flat(wider)
    places = is_bone[names].nonzero()[:, 0]
    return places, group[names[places]]


def _flat(labels):
    """Return the labels (n,) with 256 added per pair of the batch."""
    offset = _BATCH_STRIDE * torch.arange(len(labels), device=labels.device)
    return (labels.long() + offset[:, None, None, None]).flatten()


def _dilated(labels):
    """Return labels grown into what has none; between two vertebrae the higher number wins."""
    grown = labels[:, None].float()
    for _ in range(_AROUND):
        grown = torch.where(grown > 0, grown, functional.max_pool3d(grown, 3, 1, 1))
    return grown[:, 0].to(labels.dtype)


def _rows(u):
    """Return the displacements as a table (b * R * A * S, 3)."""
    return u.movedim(1, -1).reshape(-1, 3)


def _index(places, shape):
    """Return voxel indices (n, 3) of places in labels of a shape (b, R, A, S)."""
    _, _, across, slices = shape
    rest = places % (shape[1] * across * slices)
    index = [rest // (across * slices), rest // slices % across, rest % slices]
    return torch.stack(index, 1).float()


def _moved(points, rotation, shift, vertebra):
    return (rotation[vertebra] @ points[..., None])[..., 0] + shift[vertebra]


def _membership(labels, points, item, name):
    """Return the share (n,) of a vertebra at points (n, 3), linear between voxels, 0 outside.

    One pass over the eight corners serves all vertebrae, where one image a vertebra would take as many warps.
    """
    names, sides = _flat(labels), labels.shape[1:]
    low = points.detach().floor()
    part, low = points - low, low.long()
    share = points.new_zeros(len(points))
    for corner in torch.cartesian_prod(*[torch.arange(2, device=points.device)] * 3):
        index = low + corner
        inside = torch.ones_like(item, dtype=torch.bool)
        place = item
        for axis, side in enumerate(sides):
            inside &= (index[:, axis] >= 0) & (index[:, axis] < side)
            place = place * side + index[:, axis].clamp(0, side - 1)
        weights = torch.where(corner > 0, part, 1 - part).prod(1)
        share = share + weights * (inside & (names[place] == name))
    return share


def _mean(values):
    return values.sum() / max(len(values), 1)
