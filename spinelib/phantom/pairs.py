"""Synthetic pairs of CT and MR of one spine, with the true motion between them."""

from dataclasses import dataclass, replace

import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

from spinelib.deformation import DisplacementField, grid_points_mm
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.ct import acquire
from spinelib.imaging.mr_contrast import rician_noise, sample_sequence, slice_average
from spinelib.imaging.pairs import RegistrationPair
from spinelib.levels import VERSE_LABELS
from spinelib.phantom.ct_tissue import patient_hounsfield
from spinelib.phantom.fields import smooth_field
from spinelib.phantom.mr_tissue import patient_signal
from spinelib.phantom.pair_motion import Bones, Motion, sample_transforms, solve_motion
from spinelib.phantom.population import Subject
from spinelib.phantom.render import tissue_volume
from spinelib.phantom.sacrum import subject_sacrum
from spinelib.phantom.scan import ScanMix, sample_patient, sample_protocol
from spinelib.phantom.scan_truth import visible_fraction, with_all_parts
from spinelib.phantom.vertebra import subject_shapes

CT_MM = 1.5
BOX_MM = (96.0, 120.0, 120.0)
LABELLED_SHARE = 0.5
"""Share of a vertebra inside the CT from which on it is labelled."""

SLIVER_SHARE = 0.1
"""Share of a vertebra's mask below which it is not labelled in the MR, whose border cuts it."""

FOLDED = 0.1
"""Joints are stiffened where the Jacobian determinant falls to this, or where two bones meet."""

_LYING = ScanMix(fused=0.0, arms=0.0)
_MARGIN_MM = 18.0
_MIDDLES = ("T6", "L4")  # the vertebra in the middle of the box lies between these
_BEHIND_MM = 16.0  # from the body centre back to the middle of the box
_ATTEMPTS = 8
SHEETS = 3
_SNR = (12.0, 45.0)
_STREAMS = ("person", "tissue", "ct", "motion", "mr", "errors")


@dataclass(frozen=True)
class PairMix:
    """How difficult pairs are.

    Attributes
    ----------
    t2 : float
        Share of T2-weighted MRs; the rest is T1-weighted.
    motion : float
        Factor on all motion. At 1 the mean Dice before registration is 0.69, the median of Jian et al. (2022).
    partial : float
        Share of MRs whose field of view cuts off a part of the vertebrae.
    distorted : float
        Share of MRs with a smooth geometric distortion of up to about 2 mm, in which vertebrae are no longer rigid.
    label_errors : float
        Share of CTs in which each mask is a voxel too small, too large, or has a part of its neighbour.
    """

    t2: float = 0.5
    motion: float = 1.0
    partial: float = 0.2
    distorted: float = 0.0
    label_errors: float = 0.0


STANDARD_MIX = PairMix()


def sample_pair(seed: int, shape_mm=BOX_MM, mix: PairMix = STANDARD_MIX) -> RegistrationPair:
    """Return CT and MR of a seed with their vertebrae and the motion; the same arguments give the same bytes.

    Parameters
    ----------
    seed : int
        Not negative.
    shape_mm : (3,) of float
        Size of the CT along right, anterior, superior; its voxels have 1.5 mm. 3 to 5 thoracic or lumbar vertebrae
        fit into 120 mm.
    mix : PairMix

    Returns
    -------
    RegistrationPair
        The MR has sagittal slices of 3 to 4 mm and pixels of 0.9 to 1.1 mm. Vertebrae of which the CT holds at least
        half are labelled, in the MR only what the CT shows of them.

    Raises
    ------
    InputError
        For a negative seed or a box of less than 60 mm a side.
    """
    _check_request(seed, shape_mm)
    streams = dict(zip(_STREAMS, np.random.SeedSequence([seed, 61]).spawn(len(_STREAMS)), strict=True))
    rng = {name: np.random.default_rng(stream) for name, stream in streams.items()}
    subject = sample_patient(seed, rng["person"], _LYING)
    shapes = subject_shapes(subject)
    middle = subject.poses[rng["person"].integers(*(subject.index(level) for level in _MIDDLES)), :3, 3]
    box, scene = pair_boxes(middle + rng["person"].uniform(-8, 8, 3) * [1, 1, 1.5] - [0, _BEHIND_MM, 0], shape_mm)
    bones = _bones_near(subject, shapes, scene)
    motion, mr_grid = sample_motion(streams["motion"], bones, box, mix)
    tissue = tissue_volume(subject, shapes, scene)
    hounsfield = patient_hounsfield(tissue, subject, shapes, np.eye(4), rng["tissue"], has_table=False)
    contrast = "t2" if rng["mr"].random() < mix.t2 else "t1"
    signal = patient_signal(tissue, hounsfield, subject, sample_sequence(contrast, rng["mr"]), rng["mr"])
    ct, ct_labels = _ct(hounsfield, tissue, subject, shapes, bones, box, rng["ct"])
    known = [label for label in bones.labels if np.any(ct_labels.values == label)]
    transforms = {label: motion.transforms[bones.labels.index(label)] for label in known}
    signal = Volume(signal, scene.affine)
    mr, mr_labels, field = scan_moved(signal, ct_labels, transforms, motion, mr_grid, mix, rng["mr"])
    if rng["errors"].random() < mix.label_errors:
        ct_labels = Volume(with_errors(ct_labels.values, rng["errors"]), ct_labels.affine)
    return RegistrationPair(f"pair-{seed:06d}", ct, ct_labels, mr, mr_labels, field, transforms, contrast)


def scan_moved(
    signal: Volume, ct_labels: Volume, transforms: dict[int, np.ndarray], motion: Motion, grid: VolumeGrid, mix, rng
) -> tuple[Volume, Volume, DisplacementField]:
    """Return MR image, its labels and the field MR to CT of a person who lies otherwise than in the CT.

    Parameters
    ----------
    signal : Volume
        Of the person as in the CT, wider than what the MR shows.
    ct_labels : Volume
    transforms : dict of int to ndarray (4, 4)
        Of the labelled vertebrae, MR to CT.
    motion : Motion
    grid : VolumeGrid
        Of the MR image.
    mix : PairMix
    rng : numpy.random.Generator
    """
    points = grid_points_mm(_sheets(grid))
    if rng.random() < mix.distorted:
        points = points + _distortion(rng, _sheets(grid))
    source, _ = motion.at(points)
    source += points
    mr = Volume(_mr_values(signal, source, grid, rng), grid.affine)
    middle = slice(SHEETS // 2, None, SHEETS)
    field = DisplacementField(source[middle] - grid_points_mm(grid), grid)
    return mr, Volume(_moved_labels(ct_labels, transforms, points[middle], grid.spacing_mm), grid.affine), field


def with_errors(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return labels (R, A, S) as careless readers or networks draw them.

    Every vertebra loses its outermost voxels, gains a layer, or stays; one takes a ball of 8 mm from its neighbour.
    """
    result, cross = labels.copy(), ndimage.generate_binary_structure(3, 1)
    present = [int(label) for label in np.unique(labels) if label]
    for label in present:
        kind = rng.choice(["eroded", "dilated", "right"])
        mask = labels == label
        if kind == "eroded":
            result[mask & ~ndimage.binary_erosion(mask, cross, border_value=1)] = 0
        elif kind == "dilated":
            result[ndimage.binary_dilation(mask, cross) & (result == 0)] = label
    if len(present) > 1:
        first = int(rng.integers(len(present) - 1))
        taker, giver = present[first], present[first + 1]
        apart = ndimage.distance_transform_edt(labels != taker)
        nearest = np.unravel_index(np.where(labels == giver, apart, np.inf).argmin(), labels.shape)
        ball = sum((axis - place) ** 2 for axis, place in zip(np.indices(labels.shape), nearest, strict=True))
        result[(ball <= (8.0 / CT_MM) ** 2) & (result == giver)] = taker
    return result


# --- geometry ---


def pair_boxes(centre_mm, shape_mm) -> tuple[VolumeGrid, VolumeGrid]:
    """Return the CT's grid, and a wider one on the same voxels that holds what may move into view.

    Parameters
    ----------
    centre_mm, shape_mm : (3,) array_like
        Middle and sides of the CT, world mm.
    """
    shape = np.rint(np.asarray(shape_mm, float) / CT_MM).astype(int)
    extra = int(np.ceil(_MARGIN_MM / CT_MM))
    inner, outer = np.diag([CT_MM, CT_MM, CT_MM, 1.0]), np.diag([CT_MM, CT_MM, CT_MM, 1.0])
    inner[:3, 3] = np.rint(np.asarray(centre_mm) - (shape - 1) / 2 * CT_MM)
    outer[:3, 3] = inner[:3, 3] - extra * CT_MM
    return VolumeGrid(tuple(shape.tolist()), inner), VolumeGrid(tuple((shape + 2 * extra).tolist()), outer)


def inner_box(scene: VolumeGrid, box: VolumeGrid) -> tuple[slice, slice, slice]:
    """Return where the CT's grid, `box`, lies in the wider one of `pair_boxes`, `scene`."""
    extra = (np.array(scene.shape) - box.shape) // 2
    return tuple(slice(int(e), int(e) + n) for e, n in zip(extra, box.shape, strict=True))


def _bones_near(subject: Subject, shapes, scene: VolumeGrid) -> Bones:
    """Return the vertebrae, and the sacrum, of which a part lies in the scene."""
    labels = [VERSE_LABELS[level] for level in (*subject.levels, "S1")]
    poses = np.concatenate([subject.poses, subject.sacrum_pose[None]])
    solids = (*shapes, subject_sacrum(subject))
    depth = np.nan_to_num(subject.dims["endplate_depth_mm"], nan=0.0)
    below = 0.5 * (subject.dims["height_posterior_mm"] + subject.dims["disc_below_mm"])
    pivots = np.stack([0 * depth, -0.25 * depth, -below], axis=1)  # behind the middle of the disc
    joints = np.array([apply_affine(pose, pivot) for pose, pivot in zip(subject.poses, pivots, strict=True)])
    seen = [i for i in range(len(labels)) if visible_fraction(solids[i], poses[i], scene) > 0]
    first, last = seen[0], seen[-1] + 1
    return Bones(tuple(labels[first:last]), solids[first:last], poses[first:last], joints[first : last - 1])


def sample_motion(stream, bones: Bones, box: VolumeGrid, mix: PairMix) -> tuple[Motion, VolumeGrid]:
    """Draw the motion and the MR's grid; where it folds, joints and soft tissue move less in the next attempt.

    Parameters
    ----------
    stream : int, sequence of int or SeedSequence
        Seed of the random numbers, the same in every attempt.
    bones : Bones
        Or what offers the same, in CT world mm.
    box : VolumeGrid
        Of the CT.
    mix : PairMix

    Raises
    ------
    InputError
        If every attempt folds.
    """
    centre = box.affine[:3, 3] + (np.array(box.shape) - 1) / 2 * CT_MM
    joints, soft = np.ones(len(bones.labels) - 1), 1.0
    for _ in range(_ATTEMPTS):
        rng = np.random.default_rng(stream)
        transforms = sample_transforms(rng, bones, centre, mix.motion, joints)
        grid = _mr_grid(rng, bones, transforms, box, centre, mix)
        motion = solve_motion(rng, bones, transforms, grid, mix.motion * soft)
        shift, claims = motion.at(grid_points_mm(grid))
        folded = np.argwhere((np.linalg.det(DisplacementField(shift, grid).jacobian()) <= FOLDED) | (claims > 1))
        if not len(folded):
            return motion, grid
        joints[_nearest_joints(bones, transforms, apply_affine(grid.affine, folded))] *= 0.75
        soft *= 0.9
    message = "no motion without folds was found. Fix: pass a smaller motion in PairMix, or another seed."
    raise InputError(message)


def _nearest_joints(bones, transforms, points_mm) -> np.ndarray:
    """Return the joints nearest to MR points, and those beside them, in height."""
    heights = [apply_affine(np.linalg.inv(t), j)[2] for t, j in zip(transforms, bones.joints_mm, strict=False)]
    nearest = np.abs(points_mm[:, 2, None] - np.array(heights)).argmin(axis=1)
    return np.unique(np.clip(nearest[:, None] + [-1, 0, 1], 0, len(heights) - 1))


def _mr_grid(rng, bones, transforms, box, centre_mm, mix) -> VolumeGrid:
    """Draw sagittal slices around the place of the CT's box; the field of view may be cut from one side."""
    nearest = int(np.argmin(np.linalg.norm(bones.poses[:, :3, 3] - centre_mm, axis=1)))
    centre = apply_affine(np.linalg.inv(transforms[nearest]), centre_mm) + rng.uniform(-4, 4, 3)
    pixel, pitch = rng.uniform(0.9, 1.1), rng.uniform(3.0, 4.0)
    size = CT_MM * np.array(box.shape) * rng.uniform([0.75, 0.94, 0.94], [0.95, 1.06, 1.06])
    low, high = centre - size / 2, centre + size / 2
    if rng.random() < mix.partial:
        cut = rng.uniform(0.2, 0.45) * size[2]
        if rng.random() < 0.5:
            low[2] += cut
        else:
            high[2] -= cut
    steps = np.array([pitch, pixel, pixel])
    affine = np.diag([*steps, 1.0])
    affine[:3, 3] = low
    return VolumeGrid(tuple(np.rint((high - low) / steps).astype(int).tolist()), affine)


# --- images ---


def _ct(hounsfield, tissue, subject, shapes, bones, box, rng) -> tuple[Volume, Volume]:
    """Scan the scene; return what lies in the box, and its labels."""
    protocol = sample_protocol(rng)
    slice_mm = min(protocol.slice_mm, 2.5)
    values = acquire(hounsfield, tissue.grid.spacing_mm, replace(protocol, slice_mm=slice_mm, pitch_mm=CT_MM), rng)
    inner = inner_box(tissue.grid, box)
    labels = with_all_parts(tissue, subject, shapes, np.eye(4))[inner]
    labels[~np.isin(labels, _labelled(bones, box))] = 0
    return Volume(values[inner].copy(), box.affine), Volume(labels, box.affine)


def _mr_values(signal: Volume, source_mm, grid: VolumeGrid, rng) -> np.ndarray:
    """Scan the moved person: signal at the CT points `source_mm` of all sheets, slices, coil and noise."""
    index = apply_affine(np.linalg.inv(signal.affine), source_mm)
    values = ndimage.map_coordinates(signal.values, np.moveaxis(index, -1, 0), order=1, mode="nearest")
    values = slice_average(values, SHEETS) * _sensitivity(rng, grid)
    body = values > 0.1 * np.percentile(values, 99)
    sigma = values[body].mean() / np.exp(rng.uniform(*np.log(_SNR)))
    return rician_noise(values, float(sigma), rng).astype(np.float32)


def _moved_labels(labels: Volume, transforms, points_mm, spacing_mm) -> np.ndarray:
    """Return the CT's labels at MR points (R, A, S, 3), uint8: each mask, moved as its own vertebra.

    A mask stands for the solid where its linear interpolation is over a half, so that it is the same solid in both
    images and the border has no steps of a voxel. What the CT does not show is not labelled in the MR either.
    """
    result, best = np.zeros(points_mm.shape[:3], np.uint8), np.full(points_mm.shape[:3], 0.5, np.float32)
    for label, transform in transforms.items():
        index = apply_affine(np.linalg.inv(labels.affine) @ transform, points_mm)
        mask = (labels.values == label).astype(np.float32)
        box = ndimage.find_objects((labels.values == label).astype(np.uint8))[0]
        near = np.all(
            [(i > b.start - 1) & (i < b.stop) for i, b in zip(np.moveaxis(index, -1, 0), box, strict=True)], 0
        )
        share = ndimage.map_coordinates(mask, index[near].T, order=1)
        larger = share > best[near]
        best[near], result[near] = np.where(larger, share, best[near]), np.where(larger, label, result[near])
    for label in transforms:
        shares = [
            np.sum(v == label) * np.prod(mm) for v, mm in ((result, spacing_mm), (labels.values, labels.spacing_mm))
        ]
        if shares[0] < SLIVER_SHARE * shares[1]:
            result[result == label] = 0
    return result


def _labelled(bones, grid) -> list[int]:
    """Return the vertebrae of which at least half lies in the CT's grid; the sacrum is never labelled."""
    return [
        label
        for label, shape, pose in zip(bones.labels, bones.shapes, bones.poses, strict=True)
        if label != VERSE_LABELS["S1"] and visible_fraction(shape, pose, grid) >= LABELLED_SHARE
    ]


def _sheets(grid: VolumeGrid) -> VolumeGrid:
    """Return a grid with thin sheets in every slice, the middle one at its centre."""
    affine = grid.affine.copy()
    affine[0, 0] /= SHEETS
    affine[0, 3] -= (SHEETS // 2) * affine[0, 0]
    return VolumeGrid((grid.shape[0] * SHEETS, *grid.shape[1:]), affine)


def _distortion(rng, grid) -> np.ndarray:
    """Return a smooth displacement (R, A, S, 3) in the sagittal plane, SD 0.4 to 1 mm."""
    warp = np.zeros((*grid.shape, 3))
    warp[..., rng.integers(1, 3)] = rng.uniform(0.4, 1.0) * smooth_field(rng, grid.shape, grid.spacing_mm, 60.0)
    return warp


def _sensitivity(rng, grid) -> np.ndarray:
    """Return the gain of a coil behind the back, and of what else makes signal uneven, (R, A, S)."""
    depth = grid.axes_mm()[1] - grid.axes_mm()[1][0]
    uneven = rng.uniform(0.05, 0.2) * smooth_field(rng, grid.shape, grid.spacing_mm, 70.0)
    return np.exp(uneven - (depth / rng.uniform(90, 400))[:, None])


def _check_request(seed, shape_mm) -> None:
    if not isinstance(seed, int | np.integer) or seed < 0:
        message = f"seed is {seed!r}. Expected an integer of 0 or more."
        raise InputError(message)
    if np.shape(shape_mm) != (3,) or np.min(shape_mm) < 60 or np.max(shape_mm) > 300:
        message = f"shape_mm is {shape_mm!r}. Expected three lengths of 60 to 300 mm: right, anterior, superior."
        raise InputError(message)
