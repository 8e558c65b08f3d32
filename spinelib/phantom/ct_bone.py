"""Mineral of the vertebrae as CT sees it: this patient's density, thin walls, compact arches, lesions, cement."""

from dataclasses import dataclass

import numpy as np

from spinelib.imaging.ct import MINERAL_HU_CM3_G
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.fields import smooth_field
from spinelib.phantom.population import Subject
from spinelib.phantom.render import TissueVolume

TRABECULAR_G_CM3 = 0.155
"""Of the common anatomy, before the factor of the subject; what is denser is cortex."""

_CEMENT_HU = (1200.0, 2600.0)
_LESION_RATE, _CEMENT_RATE = 0.06, 0.03


@dataclass(frozen=True)
class _Bone:
    """Factors on the mineral of one patient.

    Attributes
    ----------
    trabecular : float
        Of all bones. Falls with age by 0.7 % a year, spread 28 % (assumed).
    wall, plate, arch : float
        Of the cortex at the sides of the bodies, at the end-plates, and behind the bodies.
    arch_core : float
        Of the trabecular bone behind the bodies.
    uneven : float
        Relative standard deviation within bones.
    between : float
        The same between vertebrae.
    """

    trabecular: float
    wall: float
    plate: float
    arch: float
    arch_core: float
    uneven: float
    between: float


def patient_mineral(tissue: TissueVolume, subject: Subject, pose: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return hydroxyapatite (R, A, S), g/cm3, of a patient; the common anatomy has the same bone in everyone.

    Parameters
    ----------
    tissue : TissueVolume
        Rendered from `subject` with `pose`.
    subject : Subject
    pose : ndarray (4, 4)
    rng : numpy.random.Generator
    """
    bone = _draw_bone(rng, subject)
    core = np.minimum(tissue.mineral, np.float32(TRABECULAR_G_CM3 * subject.bone_density))
    shell = tissue.mineral - core
    field = smooth_field(rng, core.shape, tissue.grid.spacing_mm, 9.0)
    mineral = core * (bone.trabecular * (1 + bone.uneven * field).clip(0.1, 2.5)) + shell * bone.arch
    sick = rng.random() < _LESION_RATE, rng.random() < _CEMENT_RATE
    for i, level in enumerate(subject.levels):
        label = VERSE_LABELS[level]
        window = label_window(tissue.labels, label)
        own = float(np.exp(bone.between * rng.standard_normal()))
        draws = rng.random(2), rng.uniform(-0.3, 0.3, 3), rng.uniform(0.3, 0.9)
        if window is None or not np.isfinite(subject.dims["endplate_depth_mm"][i]) or level == "C1":
            continue
        size = _body_size(subject, i)
        local = _local_axes(tissue.grid, window, pose @ subject.poses[i])
        part = _vertebra_mineral(core[window], shell[window], local, size, own, bone, field[window])
        part = _diseased(part, local, size, field[window], sick, draws)
        own_voxels = tissue.labels[window] == label
        mineral[window] = np.where(own_voxels, part, mineral[window])
    return mineral.astype(np.float32)


def label_window(labels: np.ndarray, label: int) -> tuple[slice, slice, slice] | None:
    """Return the index box of a label in a volume (R, A, S), one voxel wider; None if it is absent."""
    high = np.flatnonzero((labels == label).any(axis=(0, 1)))
    if not len(high):
        return None
    part = labels[..., high[0] : high[-1] + 1] == label
    places = np.flatnonzero(part.any(axis=(1, 2))), np.flatnonzero(part.any(axis=(0, 2))), high
    return tuple(slice(max(0, int(i[0]) - 1), int(i[-1]) + 2) for i in places)


def _draw_bone(rng, subject) -> _Bone:
    return _Bone(
        trabecular=float(0.9 * np.exp(-0.007 * (subject.age_years - 30) + 0.28 * rng.standard_normal())),
        wall=float(rng.uniform(0.3, 1.0)),
        plate=float(rng.uniform(0.4, 1.2)),
        arch=float(rng.uniform(0.8, 1.8)),
        arch_core=float(rng.uniform(0.2, 1.3)),
        uneven=float(rng.uniform(0.02, 0.12)),
        between=float(rng.uniform(0.02, 0.12)),
    )


def _body_size(subject, i):
    height = 0.5 * (subject.dims["height_anterior_mm"][i] + subject.dims["height_posterior_mm"][i])
    return np.array([subject.dims["endplate_width_mm"][i], subject.dims["endplate_depth_mm"][i], height])


def _local_axes(grid, window, pose) -> list[np.ndarray]:
    """Coordinates (right, anterior, superior) of a window's voxels in a vertebra's frame, mm."""
    axes = [(a[w] - o).astype(np.float32) for a, w, o in zip(grid.axes_mm(), window, pose[:3, 3], strict=True)]
    directions = pose[:3, :3].astype(np.float32)
    return [
        axes[0][:, None, None] * directions[0, k] + axes[1][:, None] * directions[1, k] + axes[2] * directions[2, k]
        for k in range(3)
    ]


def _vertebra_mineral(core, shell, local, size, own, bone, field):
    behind = ((-local[1] - size[1] / 2) / 6.0).clip(0, 1)
    plate = ((np.abs(local[2]) - 0.34 * size[2]) / (0.1 * size[2])).clip(0, 1)
    body_shell = bone.wall + (bone.plate - bone.wall) * plate
    inside = bone.trabecular * own * (1 + (bone.arch_core - 1) * behind) * (1 + bone.uneven * field).clip(0.1, 2.5)
    return core * inside + shell * (body_shell + (bone.arch - body_shell) * behind)


def _diseased(mineral, local, size, field, sick, draws):
    """Replace a part of a body by a lytic or sclerotic lesion, or fill it with cement; some vertebrae only."""
    chance, place, radius = draws
    distance = sum(((axis - p * s) / (radius * s / 2)) ** 2 for axis, p, s in zip(local, place, size, strict=True))
    inside = distance < 1 + 0.5 * field
    if sick[1] and chance[0] < 0.25:
        return np.where(inside, mineral + (_CEMENT_HU[0] + chance[1] * np.diff(_CEMENT_HU)) / MINERAL_HU_CM3_G, mineral)
    if sick[0] and chance[0] < 0.4:
        return np.where(inside, mineral * 0.15 if chance[1] < 0.5 else mineral + 0.35, mineral)
    return mineral
