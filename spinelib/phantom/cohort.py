"""One synthetic person seen twice: a DXA scan, a coronal MRI projection in another pose, and the truth."""

from dataclasses import dataclass, field, replace

import numpy as np

from spinelib.geometry import PlanarGrid, PlanarTransform, Projection, Volume, move_projection
from spinelib.imaging.dxa import DOSE_PHOTONS_MM2, dxa_image
from spinelib.imaging.mri import dixon_projection
from spinelib.imaging.physics import CERIUM, SAMARIUM, Beam
from spinelib.phantom.column import column_curves, column_volume, spine_mask
from spinelib.phantom.implants import titanium
from spinelib.phantom.population import Subject, sample_subject
from spinelib.phantom.render import path_lengths
from spinelib.phantom.vertebra import subject_shapes
from spinelib.spine import Curves

DXA_SHAPE, DXA_SPACING_MM = (333, 250), (3.0, 2.4)
MRI_SHAPE, MRI_SPACING_MM = (300, 224), (3.0, 2.232)
"""Pixels of an iDXA total-body scan (head to mid-thigh kept) and of UK Biobank's Dixon MRI (neck to mid-thigh)."""

SCAN_CENTRE_SUPERIOR_MM = 200.0
"""Middle of the scan above the S1 end-plate."""


@dataclass(frozen=True)
class Scanner:
    """A DXA scanner; by default an iDXA total-body scan.

    Attributes
    ----------
    shape : tuple of int
        Rows, columns.
    spacing_mm : tuple of float
        Row and column pitch.
    beam : Beam
    dose_photons_mm2 : float
        Per energy, in air.
    line_gain : float
        Standard deviation of the gain from raster line to raster line.
    blur_mm : float
        Standard deviation of the point spread.
    """

    shape: tuple[int, int] = DXA_SHAPE
    spacing_mm: tuple[float, float] = DXA_SPACING_MM
    beam: Beam = field(default=CERIUM, repr=False)
    dose_photons_mm2: float = DOSE_PHOTONS_MM2
    line_gain: float = 0.01
    blur_mm: float = 0.0


STANDARD_SCANNER = Scanner()
OTHER_SCANNER = Scanner((250, 240), (4.0, 2.5), SAMARIUM, 0.7 * DOSE_PHOTONS_MM2, line_gain=0.008, blur_mm=1.5)
"""Another maker's: a harder beam, longer pixels, less dose, steadier lines and a wider focus (values assumed)."""


@dataclass(frozen=True)
class Case:
    """A rendered subject.

    Attributes
    ----------
    subject : Subject
    dxa : Projection
        Channels bone (g/cm2) and tissue; world frame of the subject.
    mri : Projection
        Coronal mean-intensity projections of the Dixon channels, in the MRI's own frame.
    dxa_mask, mri_mask : Projection
        Coronal silhouette of the column C7-L5, channel 'spine'.
    mri_to_dxa : PlanarTransform
        True motion that alignment has to recover.
    curves : Curves
        T1-L5 in the DXA frame, 209 rows.
    extended_curves : Curves
        The same with C6 and S1 included.
    column_mask : Volume
        Bodies and discs T1-L5 on a 2 mm grid, 0/1, in the DXA frame.
    """

    subject: Subject
    dxa: Projection
    mri: Projection
    dxa_mask: Projection
    mri_mask: Projection
    mri_to_dxa: PlanarTransform
    curves: Curves
    extended_curves: Curves
    column_mask: Volume


def render_case(seed: int, *, curves="enriched", posture="supine", degenerative=False, sex=None) -> Case:
    """Return the person of a seed with both scans; the same seed gives the same bytes.

    Parameters
    ----------
    seed : int
    curves : str
        'natural' (a population's mix of scoliosis) or 'enriched' (60/20/10/7/3% in the severity bands).
    """
    return render_subject(sample_subject(seed, curves=curves, posture=posture, degenerative=degenerative, sex=sex))


def render_subject(subject: Subject) -> Case:
    """Return both scans and the truth of a given subject."""
    rng = np.random.default_rng([subject.seed, 77])
    shapes = subject_shapes(subject)
    grid = _scan_grid(rng)
    paths = path_lengths(subject, shapes, grid)
    mask = Projection(("spine",), spine_mask(subject, shapes, grid)[None].astype(np.float32), grid)
    motion = _pose_difference(rng, grid)
    curves, extended = column_curves(subject, shapes)
    return Case(
        subject=subject,
        dxa=_dxa(subject, paths, grid, rng, STANDARD_SCANNER),
        mri=_mri(paths, grid, motion, rng),
        dxa_mask=mask,
        mri_mask=_binary(move_projection(mask, motion.inverse(), _mri_grid(grid))),
        mri_to_dxa=motion,
        curves=curves,
        extended_curves=extended,
        column_mask=column_volume(subject, shapes),
    )


def render_dxa(
    subject: Subject, device: str = "cpu", scanner: Scanner = STANDARD_SCANNER, turn_deg: float = 0.0
) -> tuple[Projection, Curves, Curves]:
    """Return the DXA scan of `render_subject` with `curves` and `extended_curves`, in half its time.

    Parameters
    ----------
    subject : Subject
    device : str
    scanner : Scanner
    turn_deg : float
        The person lies turned about the superior axis, see `turned`; the curves are those of the turned column.
    """
    rng = np.random.default_rng([subject.seed, 77])
    shapes = subject_shapes(subject)
    grid = _scan_grid(rng, scanner)
    paths = path_lengths(subject, shapes, grid, device, _turn(turn_deg))
    _pose_difference(rng, grid)  # its random numbers come before those of the photons
    seen = turned(subject, turn_deg)
    return _dxa(seen, paths, grid, rng, scanner), *column_curves(seen, shapes)


def turned(subject: Subject, degrees: float) -> Subject:
    """Return the spine of a subject turned about the superior axis through S1; positive faces the patient's left.

    Only the column turns with it: ribs, organs and skin follow through the pose that `path_lengths` takes.
    """
    turn = _turn(degrees)
    return replace(subject, poses=turn @ subject.poses, sacrum_pose=turn @ subject.sacrum_pose)


def _turn(degrees):
    turn = np.eye(4)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn[:2, :2] = [[cosine, -sine], [sine, cosine]]
    return turn


def _dxa(subject, paths, grid, rng, scanner):
    return dxa_image(
        paths,
        grid,
        rng,
        dose=scanner.dose_photons_mm2,
        line_gain=scanner.line_gain,
        metal_g_cm2=titanium(subject, grid) if subject.fused else None,
        beam=scanner.beam,
        blur_mm=scanner.blur_mm,
    )


def _scan_grid(rng, scanner=STANDARD_SCANNER):
    centre = (SCAN_CENTRE_SUPERIOR_MM + rng.normal(0, 12), rng.normal(0, 10))
    return PlanarGrid.centred("coronal", scanner.shape, scanner.spacing_mm, centre)


def _pose_difference(rng, grid):
    """Rotation within 8 degrees, shifts within 60 mm: wider than two supine scans show, so that alignment works."""
    rotation = float(np.clip(rng.normal(0, 3), -8, 8))
    shift_right, shift_superior = np.clip(rng.normal(0, 25, 2), -60, 60)
    return PlanarTransform(rotation, float(shift_right), float(shift_superior), grid.centre_mm[1], grid.centre_mm[0])


def _mri_grid(grid):
    return PlanarGrid.centred("coronal", MRI_SHAPE, MRI_SPACING_MM, grid.centre_mm)


def _mri(paths, grid, motion, rng):
    maps = Projection(tuple(paths), np.stack(list(paths.values())).astype(np.float32), grid)
    moved = move_projection(maps, motion.inverse(), _mri_grid(grid))
    return dixon_projection(dict(zip(moved.channels, moved.values, strict=True)), moved.grid, rng)


def _binary(mask):
    return Projection(mask.channels, (mask.values > 0.5).astype(np.float32), mask.grid)
