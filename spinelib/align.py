"""Planar alignment of an MRI projection to a DXA image: one rotation and two shifts, no scale.

Two stages (Bourigault 2024, Fig. 2): whole images first, spine masks second, the latter in a small range
around the former. All shifts of all angles are scored at once by masked normalised cross-correlation in
the Fourier domain (Padfield 2012), from 8 mm pixels to 2 mm, and the winner is refined continuously, so
the result is not quantised to pixels or to the angle step.

DXA and MRI do not share intensities, and even the sign of an edge differs (bone is bright in one and dark
in the other). Images are therefore compared by the orientation of their edges with the angle doubled
(`correlate.edge_field`): one linear field for any number of channels, so no pairing of channels has to be
guessed and one Fourier search serves any two contrasts.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from scipy.ndimage import binary_erosion, distance_transform_edt
from tqdm.auto import tqdm

from spinelib.correlate import Level, climb, edge_field, mask_field, scan
from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, PlanarTransform, Projection, move_projection

MIN_SCORE = 0.3
MIN_MARGIN = 0.06
MAX_SCALE_MM = 4.0
MIN_MASK_SCORE = 0.7
MAX_OUTLINE_MM = 1.8
MAX_STAGES_MM = 3.0
"""Limits of the failure flags, set on drawn torsos and phantom subjects with noise, motion out of range and
swapped subjects; tests/benchmarks/benchmark_align.py counts what they let through."""

MIN_PIXELS = 16

# From the whole range in large pixels to the last half degree in small ones: spacing_mm, sigma_mm, step_deg,
# reach_deg, reach_mm. The first reach is the caller's.
IMAGE_LEVELS = (
    Level(8.0, 6.0, 2.0, 10.0, 80.0),
    Level(4.0, 4.0, 1.0, 2.0, 16.0),
    Level(2.0, 3.0, 0.5, 0.5, 6.0),
)
MASK_LEVELS = (Level(4.0, 3.0, 1.0, 3.0, 16.0), Level(2.0, 2.0, 0.5, 0.5, 4.0))

_TRANSFORM = ("rotation_deg", "shift_right_mm", "shift_superior_mm", "centre_right_mm", "centre_superior_mm")
_EVIDENCE = ("score", "score_margin", "residual_mm", "failed", "reason")

Loader = Callable[[], tuple[Projection, Projection, Projection | None, Projection | None]]


@dataclass(frozen=True)
class Alignment:
    """Result of an alignment and the evidence for or against it.

    Attributes
    ----------
    transform : PlanarTransform
        Carries MRI millimetres to DXA millimetres.
    score : float
        Masked normalised correlation at the result, at most 1.
    score_margin : float
        Winner minus best rival outside its neighbourhood in the coarse image scan; NaN without one.
    residual_mm : float
        After masks: mean distance between the two mask outlines. After images: mean displacement between
        the estimates at two smoothing scales.
    failed : bool
        Do not use the transform.
    reason : str
        Why it failed; empty if it did not.
    stage1 : PlanarTransform
        Result of the image stage.
    """

    transform: PlanarTransform
    score: float
    score_margin: float
    residual_mm: float
    failed: bool
    reason: str
    stage1: PlanarTransform


def align_images(
    fixed: Projection,
    moving: Projection,
    *,
    max_rotation_deg: float = 10.0,
    max_shift_mm: float = 80.0,
    fixed_channels: Sequence[str] | None = None,
    moving_channels: Sequence[str] | None = None,
) -> Alignment:
    """Align two coronal images of different contrast (stage 1).

    Parameters
    ----------
    fixed, moving : Projection
        DXA image and MRI projection.
    max_rotation_deg, max_shift_mm : float
        Range of the search about the identity in mm; the rotation is about the middle of `moving`.
    fixed_channels, moving_channels : sequence of str, optional
        Channels to use; all by default.

    Raises
    ------
    InputError
        If an image is not coronal, lacks a channel or holds non-finite values, or the range is not positive.
    """
    first = _with_reach(IMAGE_LEVELS[0], max_rotation_deg, max_shift_mm)
    images = [_checked(fixed, fixed_channels), _checked(moving, moving_channels)]
    start = PlanarTransform(0.0, 0.0, 0.0, *moving.grid.centre_mm[::-1])
    if min(float(np.ptp(image.values)) for image in images) == 0:
        return _failure(start, "an image is constant")
    found = _coarse_to_fine(edge_field, images, (first, *IMAGE_LEVELS[1:]), start)
    reason = _image_fault(found) or _edge_of_range(found.transform, start, first)
    return replace(found, failed=bool(reason), reason=reason)


def align_masks(
    fixed_mask: Projection,
    moving_mask: Projection,
    initial: PlanarTransform,
    *,
    max_rotation_deg: float = 3.0,
    max_shift_mm: float = 16.0,
) -> Alignment:
    """Align two coronal spine masks in a small range around `initial` (stage 2).

    The first channel of each mask counts, above 0.5. Softened masks are correlated where both images look,
    so a mask that leaves the MRI view costs nothing, and short of the masks' own ends (`correlate.END_MM`):
    where a segmentation stops is its own choice, and 6 mm missing there would shift the result by 2 mm.

    Raises
    ------
    InputError
        If a mask is not coronal or holds non-finite values, or the range is not positive.
    """
    first = _with_reach(MASK_LEVELS[0], max_rotation_deg, max_shift_mm)
    masks = [_checked(mask, mask.channels[:1]) for mask in (fixed_mask, moving_mask)]
    for name, mask in zip(("fixed", "moving"), masks, strict=True):
        if not (mask.values > 0.5).any():
            return _failure(initial, f"the {name} mask is empty")
    found = _coarse_to_fine(mask_field, masks, (first, *MASK_LEVELS[1:]), initial)
    residual = _outline_distance_mm(*masks, found.transform)
    reason = _mask_fault(found.score, residual) or _edge_of_range(found.transform, initial, first)
    return replace(found, residual_mm=residual, failed=bool(reason), reason=reason, stage1=initial)


def align_pair(
    dxa: Projection,
    mri: Projection,
    dxa_mask: Projection | None = None,
    mri_mask: Projection | None = None,
    **options,
) -> Alignment:
    """Run both stages; without two masks the image stage alone.

    `options` go to `align_images`. A failed image stage ends the work, since the mask stage starts from it.
    """
    images = align_images(dxa, mri, **options)
    if images.failed or dxa_mask is None or mri_mask is None:
        return images
    masks = align_masks(dxa_mask, mri_mask, images.transform)
    apart = _displacement_mm(images.transform, masks.transform, mri.grid)
    reason = masks.reason
    if not reason and apart > MAX_STAGES_MM:
        reason = f"the two stages lie {apart:.1f} mm apart (at most {MAX_STAGES_MM})"
    return replace(masks, score_margin=images.score_margin, failed=bool(reason), reason=reason)


def align_cohort(pairs: Iterable[tuple[str, Loader]], n_jobs: int = 2, **options) -> pd.DataFrame:
    """Align many pairs in parallel; a subject that fails in any way becomes a row with its reason.

    Parameters
    ----------
    pairs : iterable of (key, loader)
        `loader()` returns (dxa, mri, dxa_mask or None, mri_mask or None); it runs in the worker.
    n_jobs : int
        Worker processes, one thread each.
    **options
        Handed to `align_pair`.

    Returns
    -------
    DataFrame
        In the order given: key, rotation_deg, shift_right_mm, shift_superior_mm, centre_right_mm,
        centre_superior_mm, score, score_margin, residual_mm, failed, reason.
    """
    pairs = list(pairs)
    jobs = (delayed(_row)(key, load, options) for key, load in pairs)
    rows = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
    table = list(tqdm(rows, total=len(pairs), desc="aligning", unit="pair", disable=not sys.stderr.isatty()))
    return pd.DataFrame(table, columns=["key", *_TRANSFORM, *_EVIDENCE, *(f"stage1_{name}" for name in _TRANSFORM)])


def _coarse_to_fine(make_field, images, levels, start) -> Alignment:
    pyramid = [[make_field(image, level.sigma_mm) for image in images] for level in levels]
    best, margin = start, np.nan
    for number, (level, fields) in enumerate(zip(levels, pyramid, strict=True)):
        found = scan(*fields, best, level)
        best = found.best(start)
        margin = found.margin() if number == 0 else margin
    smooth, _ = climb(*pyramid[-2], best, levels[-2].spacing_mm)
    sharp, score = climb(*pyramid[-1], smooth, levels[-1].spacing_mm)
    spread = _displacement_mm(smooth, sharp, images[1].grid)
    return Alignment(sharp, score, margin, spread, False, "", sharp)


def _image_fault(found: Alignment) -> str:
    if found.score < MIN_SCORE:
        return f"the image score {found.score:.2f} is below {MIN_SCORE}"
    if found.score_margin < MIN_MARGIN:
        return f"a rival comes within {found.score_margin:.3f} of the best score (least margin {MIN_MARGIN})"
    if found.residual_mm > MAX_SCALE_MM:
        return f"the estimates at two scales lie {found.residual_mm:.1f} mm apart (at most {MAX_SCALE_MM})"
    return ""


def _mask_fault(score: float, residual_mm: float) -> str:
    if np.isnan(residual_mm):
        return "the masks do not meet in the common view"
    if score < MIN_MASK_SCORE:
        return f"the mask score {score:.2f} is below {MIN_MASK_SCORE}"
    if residual_mm > MAX_OUTLINE_MM:
        return f"the mask outlines lie {residual_mm:.1f} mm apart (at most {MAX_OUTLINE_MM})"
    return ""


def _edge_of_range(found: PlanarTransform, start: PlanarTransform, level: Level) -> str:
    turn = abs(found.rotation_deg - start.rotation_deg)
    right = abs(found.shift_right_mm - start.shift_right_mm)
    superior = abs(found.shift_superior_mm - start.shift_superior_mm)
    if turn > level.reach_deg - level.step_deg / 4:
        return f"the rotation ran to the edge of its range of {level.reach_deg} deg"
    if max(right, superior) > level.reach_mm - level.spacing_mm / 4:
        return f"the shift ran to the edge of its range of {level.reach_mm} mm"
    return ""


def _outline_distance_mm(fixed: Projection, moving: Projection, transform: PlanarTransform) -> float:
    """Mean symmetric distance between mask outlines inside the common view; NaN if one is not there."""
    view = Projection(("view",), np.ones((1, *moving.grid.shape), np.float32), moving.grid)
    seen = move_projection(view, transform, fixed.grid).values[0] > 0.5
    moved = move_projection(moving, transform, fixed.grid)
    outlines = [_outline(mask.values[0] > 0.5, seen) for mask in (fixed, moved)]
    if not all(outline.any() for outline in outlines):
        return np.nan
    far = [distance_transform_edt(~outline, sampling=fixed.grid.spacing_mm) for outline in outlines]
    return float((far[0][outlines[1]].mean() + far[1][outlines[0]].mean()) / 2)


def _outline(mask, seen):
    """Edge pixels of a mask; an edge that the limit of the view cuts is none."""
    return mask & ~binary_erosion(mask, border_value=1) & binary_erosion(seen)


def _displacement_mm(one: PlanarTransform, other: PlanarTransform, grid: PlanarGrid) -> float:
    right, superior = np.meshgrid(grid.lateral_mm()[::8], grid.superior_mm()[::8])
    return float(np.hypot(*np.subtract(one.apply(right, superior), other.apply(right, superior))).mean())


def _checked(image: Projection, channels: Sequence[str] | None) -> Projection:
    names = tuple(image.channels if channels is None else channels)
    fault = ""
    if image.grid.view != "coronal":
        fault = f"coronal images, given a {image.grid.view} one"
    elif min(image.grid.shape) < MIN_PIXELS:
        fault = f"images of at least {MIN_PIXELS} x {MIN_PIXELS} pixels, given {image.grid.shape}"
    elif not names:
        fault = "at least one channel, given none"
    elif not np.isfinite(values := np.stack([image.channel(name) for name in names])).all():
        fault = f"finite values, given NaN or infinity in {', '.join(names)}"
    if fault:
        message = f"alignment needs {fault}."
        raise InputError(message)
    return Projection(names, values, image.grid)


def _with_reach(level: Level, rotation_deg: float, shift_mm: float) -> Level:
    if not (0 < rotation_deg <= 45 and 0 < shift_mm < np.inf):
        message = f"the range must be 0..45 deg and above 0 mm, given {rotation_deg} deg and {shift_mm} mm."
        raise InputError(message)
    return replace(level, reach_deg=rotation_deg, reach_mm=shift_mm)


def _failure(transform: PlanarTransform, reason: str) -> Alignment:
    return Alignment(transform, np.nan, np.nan, np.nan, True, reason, transform)


def _row(key: str, load: Loader, options: dict) -> dict:
    torch.set_num_threads(1)
    try:
        result = align_pair(*load(), **options)
    except Exception as error:  # any fault of one subject is that subject's row, never the cohort's end
        return {"key": key, "failed": True, "reason": f"{type(error).__name__}: {error}"}
    evidence = {name: getattr(result, name) for name in _EVIDENCE}
    first = {f"stage1_{name}": getattr(result.stage1, name) for name in _TRANSFORM}
    return {"key": key} | {name: getattr(result.transform, name) for name in _TRANSFORM} | evidence | first
