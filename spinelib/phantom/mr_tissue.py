"""Spin-echo signal of a person's tissue, on the voxels that a CT of the same person was rendered on."""

from collections.abc import Sequence

import numpy as np
import torch

from spinelib.imaging.mr_contrast import SpinEcho, sample_signals
from spinelib.imaging.physics import CORTICAL_MINERAL_G_CM3, MINERAL_DENSITY_G_CM3
from spinelib.phantom.fields import smooth_field
from spinelib.phantom.population import Subject
from spinelib.phantom.render import Lattice, TissueVolume
from spinelib.phantom.solids import Piece, chain, ellipsoid

_FAT_HU, _LEAN_HU, _GAS_HU, _LUNG_HU = -100.0, 35.0, -300.0, -700.0
_TEXTURE_HU = 20.0  # lean tissue of a patient varies by so much without being fat
_DENSE_HU = (450.0, 1100.0)  # sclerosis and cement lose their signal between these
_LEAN = ("muscle", "organ", "blood")
_HARD_SHARE = 0.1  # voxels with more bone, disc or canal do not show what soft tissue they hold
_CONUS = "L1"


def patient_signal(
    tissue: TissueVolume, hounsfield: np.ndarray, subject: Subject, sequence: SpinEcho, rng: np.random.Generator
) -> np.ndarray:
    """Return the signal (R, A, S), float32, of a patient before coil, slices and noise.

    Cortical bone has none; discs have a moist nucleus, drier with age, in a dry annulus; the canal holds cord and
    cerebrospinal fluid; marrow is a mixture of red and yellow. Where there is fat, lung or gas is read off the CT, so
    that both images show the same person.

    Parameters
    ----------
    tissue : TissueVolume
        As `patient_hounsfield` left it.
    hounsfield : ndarray (R, A, S)
        Of `patient_hounsfield`.
    subject : Subject
    sequence : SpinEcho
    rng : numpy.random.Generator
    """
    signals = sample_signals(sequence, rng)
    share = dict(zip(tissue.tissues, tissue.fractions, strict=True))
    yellow = np.clip(0.22 + 0.005 * subject.age_years + 0.08 * rng.standard_normal(), 0.15, 0.8)
    signals["marrow"] = yellow * signals["marrow_fat"] + (1 - yellow) * signals["marrow_water"]
    spacing = tissue.grid.spacing_mm
    fine, coarse = (smooth_field(rng, tissue.grid.shape, spacing, length) for length in (3.0, 12.0))
    hard = tissue.mineral / MINERAL_DENSITY_G_CM3 + share["marrow"] + share["disc"] + share["canal"]
    values = _soft_signal(share, hounsfield, signals, hard) * (1 + 0.04 * fine + 0.05 * coarse)
    marrow = share["marrow"] - np.minimum(tissue.mineral / CORTICAL_MINERAL_G_CM3, share["marrow"])
    values += marrow * signals["marrow"] * (1 + 0.07 * fine + 0.05 * coarse)
    values += share["disc"] * signals["annulus"] + share["canal"] * signals["csf"]
    lattice = Lattice(tuple(tissue.grid.shape), tissue.grid.affine, torch.device("cpu"))
    for piece, signal in _nuclei(subject, signals, rng):
        _lay_over(values, lattice, [piece], share["disc"], signal - signals["annulus"])
    _lay_over(values, lattice, _cord(subject), share["canal"], signals["cord"] - signals["csf"])
    dense = (hounsfield - _DENSE_HU[0]) / (_DENSE_HU[1] - _DENSE_HU[0])
    return (values * (1 - dense.clip(0, 1))).astype(np.float32).clip(min=0)


def _soft_signal(share, hounsfield, signals, hard) -> np.ndarray:
    """Signal of soft tissue outside bone, disc and canal."""
    lean = sum(share[name] for name in _LEAN)
    signal, reference = np.full((2, *lean.shape), [[[[signals["muscle"]]]], [[[_LEAN_HU]]]])
    mixed = lean > 0.05
    signal[mixed] = sum(share[name][mixed] * signals[name] for name in _LEAN) / lean[mixed]
    reference[mixed] = sum(share[name][mixed] * _own_hu(share[name], hounsfield) for name in _LEAN) / lean[mixed]
    everything = lean + share["adipose"] + share["lung"]
    reference -= _TEXTURE_HU
    seen = ((reference - hounsfield) / (reference - _FAT_HU)).clip(0, 1)
    fat = np.where(hard < _HARD_SHARE, seen, share["adipose"] / everything.clip(min=1e-3))
    gas = ((_GAS_HU - hounsfield) / (_GAS_HU - _LUNG_HU)).clip(0, 1)
    solid = fat * signals["fat"] + (1 - fat) * signal
    return everything * (solid + gas * (signals["lung"] - solid))


def _own_hu(share, hounsfield) -> float:
    """Return the usual Hounsfield units of a tissue in this patient."""
    pure = hounsfield[share > 0.9]
    return float(np.median(pure)) if len(pure) else _LEAN_HU


def _nuclei(subject, signals, rng) -> list[tuple[Piece, float]]:
    """Return the nuclei of the discs from C2 down and their signals."""
    nuclei = []
    for i in range(1, len(subject.levels)):
        wide, deep = subject.dims["endplate_width_mm"][i], subject.dims["endplate_depth_mm"][i]
        height, disc = subject.dims["height_posterior_mm"][i], subject.dims["disc_below_mm"][i]
        moist = np.clip(1.25 - 0.011 * subject.age_years + 0.2 * rng.standard_normal(), 0.15, 1.1)
        place = (subject.poses[i] @ [0.0, -0.04 * deep, -0.5 * (height + disc), 1.0])[:3]
        radii = np.array([0.33 * wide, 0.33 * deep, 0.5 * disc])
        signal = signals["annulus"] + moist * (signals["nucleus"] - signals["annulus"])
        nuclei.append((ellipsoid(place, radii, subject.poses[i][:3, :3]), signal))
    return nuclei


def _cord(subject) -> tuple[Piece, ...]:
    """Return the cord from C1 to the conus; below it the sac holds fluid only."""
    last = subject.index(_CONUS)
    points, radii = [], []
    for i, pose in enumerate(subject.poses[: last + 1]):
        depth, canal = subject.dims["endplate_depth_mm"][i], subject.dims["canal_depth_mm"][i]
        body = depth if np.isfinite(depth) and subject.levels[i] != "C1" else 0.0
        points.append((pose @ [0, -body / 2 - 0.5 * canal, 0, 1])[:3])
        radii.append(0.27 * min(canal, 18.0))
    radii[-1] = 1.5
    return chain(points, radii)


def _lay_over(values, lattice: Lattice, pieces: Sequence[Piece], where, change: float) -> None:
    """Add a change of signal inside a union of pieces, in place, by the share `where` of every voxel."""
    edge, inside = lattice.edge_mm(0.5), torch.zeros(lattice.shape)
    for piece in pieces:
        window = lattice.window(piece.lower_mm, piece.upper_mm, 3 * edge)
        if window is not None:
            share = torch.sigmoid(piece.distance(lattice.points(window)) * (-1 / edge))
            inside[window] = torch.maximum(inside[window], share)
    values += where * inside.numpy() * change
