"""Hounsfield units of a person: tissue of this patient on this day, texture, contrast agent, calcium, metal.

What only CT shows is laid over the common anatomy here, so that DXA and MRI of the same person stay as they are.
Ranges are those of clinical CT at 100 to 140 kVp (assumed).
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from spinelib.imaging.ct import add_table, hounsfield
from spinelib.imaging.physics import MINERAL_DENSITY_G_CM3
from spinelib.phantom import ct_structures as structures
from spinelib.phantom.ct_bone import patient_mineral
from spinelib.phantom.fields import smooth_field
from spinelib.phantom.implants import implants
from spinelib.phantom.landmarks import Landmarks, find_landmarks
from spinelib.phantom.metal_ct import add_metal
from spinelib.phantom.organs import aorta, cava, kidneys, psoas
from spinelib.phantom.population import Subject
from spinelib.phantom.render import Lattice, TissueVolume
from spinelib.phantom.solids import Piece
from spinelib.phantom.torso import TISSUES
from spinelib.phantom.vertebra import VertebraShape

_TISSUE_HU = {
    "lung": (-900, -700),
    "adipose": (-118, -84),
    "muscle": (30, 68),
    "organ": (25, 65),
    "blood": (32, 52),
    "disc": (55, 110),
    "marrow": (-80, 35),
    "canal": (5, 40),
}
"""Lowest and highest mean of a patient's tissue without contrast agent."""

_PHASES = {
    # share; least and largest gain in HU of arteries, veins, kidneys, other organs
    "none": (0.45, (0, 0), (0, 0), (0, 0), (0, 0)),
    "arterial": (0.15, (150, 380), (0, 120), (40, 130), (0, 40)),
    "venous": (0.30, (70, 150), (60, 140), (100, 180), (30, 80)),
    "late": (0.10, (30, 70), (30, 70), (60, 300), (10, 40)),
}

_FILLINGS_RATE = 0.35
"""Share of people with metal in their teeth."""


@dataclass(frozen=True)
class _Scene:
    """A rendered patient: where soft tissue is, and the points of the grid in the patient's frame."""

    marks: Landmarks
    lattice: Lattice
    soft: np.ndarray
    disc: np.ndarray
    rng: np.random.Generator


def patient_hounsfield(
    tissue: TissueVolume,
    subject: Subject,
    shapes: tuple[VertebraShape, ...],
    pose: np.ndarray,
    rng: np.random.Generator,
    has_table: bool,
) -> np.ndarray:
    """Return the Hounsfield units (R, A, S) of a patient before any scanner touches them.

    Parameters
    ----------
    tissue : TissueVolume
        Rendered from `subject` and `shapes` with `pose`. Its fractions are overwritten.
    subject : Subject
    shapes : tuple of VertebraShape
    pose : ndarray (4, 4)
    rng : numpy.random.Generator
    has_table : bool
    """
    spacing = tissue.grid.spacing_mm
    scene = _scene(tissue, subject, pose, rng)
    phase, mineral = _draw_phase(rng), patient_mineral(tissue, subject, pose, rng)
    _sort_bowel(tissue.fractions, spacing, rng)
    _streak_muscle(tissue.fractions, 1 - scene.soft, spacing, rng)
    tissue_hu = {name: rng.uniform(*limits) for name, limits in _TISSUE_HU.items()}
    tissue_hu["blood"] += 0.5 * (phase["artery"] + phase["vein"])
    tissue_hu["organ"] += phase["organ"]
    values = hounsfield(tissue.fractions, mineral, tissue_hu)
    _add_texture(values, tissue.fractions, spacing, rng)
    _lay_over(values, scene, shapes, phase)
    if has_table:
        add_table(values, spacing[1], rng.choice([0.0, 1 / 900]), rng.uniform(2, 14))
    metal = [*implants(subject), *(structures.teeth(scene.marks, rng) if rng.random() < _FILLINGS_RATE else ())]
    add_metal(values, metal, scene.lattice, rng)
    return values


def _scene(tissue, subject, pose, rng) -> _Scene:
    share = dict(zip(TISSUES, tissue.fractions, strict=True))
    hard = tissue.mineral / MINERAL_DENSITY_G_CM3 + share["marrow"] + share["disc"] + share["canal"]
    lattice = Lattice(tuple(tissue.grid.shape), np.linalg.inv(pose) @ tissue.grid.affine, torch.device("cpu"))
    return _Scene(find_landmarks(subject), lattice, (1 - hard).clip(0, 1), share["disc"].copy(), rng)


def _draw_phase(rng) -> dict[str, float]:
    kind = rng.choice(list(_PHASES), p=[row[0] for row in _PHASES.values()])
    names = ("artery", "vein", "kidney", "organ")
    return {name: float(rng.uniform(*limits)) for name, limits in zip(names, _PHASES[kind][1:], strict=True)}


def _sort_bowel(fractions, spacing, rng) -> None:
    """Part the evenly mixed abdominal cavity into loops and fat, in place; some loops hold gas or oral contrast."""
    organ, adipose = fractions[TISSUES.index("organ")], fractions[TISSUES.index("adipose")]
    both = organ + adipose
    mixed = (organ > 0.02) & (adipose > 0.02) & (both > 0.3)
    if not mixed.any():
        return
    field = smooth_field(rng, organ.shape, spacing, rng.uniform(10, 20))[mixed]
    share = organ[mixed] / both[mixed]
    # the logistic of 1.7 z is near the normal distribution function: `share` of the voxels end up as loops
    loops = _logistic((1.7 * field - np.log(share / (1 - share))) * -6)
    gas = _logistic((field + rng.uniform(1.4, 3.0)) * -12)
    organ[mixed] = both[mixed] * loops * (1 - gas)
    adipose[mixed] = both[mixed] * (1 - loops)


def _streak_muscle(fractions, hard, spacing, rng) -> None:
    """Put fat between muscles, as sheets, between their bundles, as strands, and along bones, in place."""
    muscle, adipose = fractions[TISSUES.index("muscle")], fractions[TISSUES.index("adipose")]
    sheets = smooth_field(rng, muscle.shape, spacing, (14.0, 14.0, 50.0))
    strands = smooth_field(rng, muscle.shape, spacing, (5.0, 4.0, 14.0))
    width = rng.uniform(0.06, 0.3) * np.exp(0.8 * smooth_field(rng, muscle.shape, spacing, 40.0))
    fat = rng.uniform(0.3, 1.0) * np.exp(-((sheets / width) ** 2))
    fat = np.maximum(fat, _logistic(6 * (strands - rng.uniform(1.0, 2.2))))
    along_bone = rng.uniform(0, 1.2) * ndimage.gaussian_filter(hard, 2.5 / spacing, truncate=2.5)
    moved = muscle * np.maximum(fat, along_bone.clip(0, 0.9))
    muscle -= moved
    adipose += moved


def _logistic(values):
    return 1 / (1 + np.exp(-values.clip(-30, 30)))


def _add_texture(values, fractions, spacing, rng) -> None:
    """Make tissue uneven, in place: fine grain in marrow, patches in organs and muscle, vessels in the lung."""
    share = dict(zip(TISSUES, fractions, strict=True))
    fine = smooth_field(rng, values.shape, spacing, rng.uniform(2.0, 4.0))
    coarse = smooth_field(rng, values.shape, spacing, rng.uniform(8.0, 16.0))
    values += share["marrow"] * (rng.uniform(10, 45) * fine + rng.uniform(2, 15) * coarse)
    soft = share["muscle"] + share["organ"] + share["blood"] + share["adipose"]
    values += soft * (rng.uniform(2, 8) * fine + rng.uniform(3, 12) * coarse)
    values += share["lung"] * (30 * fine + 900 * _logistic(8 * (fine - rng.uniform(1.8, 2.4))))


def _lay_over(values, scene: _Scene, shapes, phase) -> None:
    """Add what the common anatomy leaves out, in place, outermost last."""
    marks, rng, soft = scene.marks, scene.rng, scene.soft
    wet, blood = rng.uniform(20, 60), rng.uniform(32, 50)
    artery, vein = blood + phase["artery"], blood + phase["vein"]
    _fill(values, scene, structures.canal_fat(marks), rng.uniform(-100, -40), rng.uniform(0.1, 0.8) * soft)
    lung = structures.lung_beside_spine(marks, rng.uniform(1, 9), rng.uniform(2, 17))
    _fill(values, scene, (lung,), rng.uniform(-900, -750), soft * (rng.random() < 0.8))
    _fill(values, scene, structures.fat_around_kidneys(marks, rng), rng.uniform(-110, -85), soft * rng.uniform(0, 1))
    _fill(values, scene, psoas(marks), wet, 0.8 * soft)
    _fill(values, scene, structures.azygos(marks), vein, soft)
    _fill(values, scene, structures.oesophagus(marks, 8.0), wet, soft)
    if rng.random() < 0.4:
        _fill(values, scene, structures.oesophagus(marks, 3.0), rng.choice([-900.0, -500.0, 20.0]), soft)
    _fill(values, scene, structures.airway(marks), -990.0, soft)
    _fill(values, scene, structures.iliac_vessels(marks), artery, soft)
    _fill(values, scene, structures.neck_vessels(marks), 0.5 * (artery + vein), soft)
    _fill(values, scene, structures.vertebral_arteries(marks, shapes), artery, soft)
    _fill(values, scene, aorta(marks), artery, soft)
    _fill(values, scene, cava(marks), vein, soft)
    _fill(values, scene, kidneys(marks), rng.uniform(25, 45) + phase["kidney"], soft)
    if rng.random() < (marks.subject.age_years - 40) / 45:
        _fill(values, scene, structures.plaques(marks, rng), rng.uniform(250, 1100), soft)
    if rng.random() < (marks.subject.age_years - 40) / 120:
        _fill(values, scene, structures.disc_gas(marks, rng), rng.uniform(-900, -300), scene.disc)


def _fill(values, scene: _Scene, pieces: tuple[Piece, ...], hounsfield_units: float, where: np.ndarray) -> None:
    """Replace what is inside the pieces, in place, by the share `where` of every voxel."""
    edge = scene.lattice.edge_mm(0.35)
    for piece in pieces:
        window = scene.lattice.window(piece.lower_mm, piece.upper_mm, 3 * edge)
        if window is None:
            continue
        inside = torch.sigmoid(piece.distance(scene.lattice.points(window)) * (-1 / edge)).numpy()
        values[window] += where[window] * inside * (hounsfield_units - values[window])
