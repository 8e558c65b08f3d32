"""Rigid alignment of a CT with an MR image by mutual information (SimpleITK).

The whole spine first (`affine_prealign`), which every deformable method needs; then, as a classical peer, every
vertebra alone (`per_vertebra_rigid`). The CT is SimpleITK's fixed image in both: its labels say where to look, and a
mask of the moving image would let the optimiser shed difficult points (measured: it diverges, Dice 0.21).
"""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk
from nibabel.affines import apply_affine
from scipy import ndimage

from spinelib.deformation import framed
from spinelib.errors import InputError
from spinelib.geometry import Volume

SPINE_MM, VERTEBRA_MM = 10.0, 3.0
"""How far around bone mutual information is taken: of the spine, and of one vertebra."""

_SPINE_SHRINKS, _VERTEBRA_SHRINKS = (4, 2), (2, 1)
_SPINE_STEP_MM, _VERTEBRA_STEP_MM = 2.0, 0.5
_LEAST_STEP_MM, _STEPS, _RELAXATION = 0.01, 100, 0.7
_LEAST_GRADIENT = 1e-8  # SimpleITK's own, 1e-4, ends the search early: mutual information is flat
_BINS, _SEED = 32, 1
_LEAST_OVERLAP = 0.1
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def placements(ct: Volume, ct_labels: Volume, mr: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Return a rough and a refined rigid motion of the whole spine, MR to CT, each (4, 4), world mm.

    The rough one has the larger mutual information of two: the images as their headers place them, and the middle of
    the CT's vertebrae laid on the middle of the MR. The refined one is found from there, and is the rough one if the
    search leaves the MR.

    Parameters
    ----------
    ct, ct_labels : Volume
        HU and VerSe labels on one grid.
    mr : Volume

    Raises
    ------
    InputError
        Without a label.
    """
    bone = ct_labels.values > 0
    if not bone.any():
        message = "the CT labels hold no vertebra. Expected VerSe labels, 1 to 28. Fix: check the file of the labels."
        raise InputError(message)
    bone_mm = apply_affine(ct.affine, np.argwhere(bone)[::7])
    centre = (bone_mm.min(axis=0) + bone_mm.max(axis=0)) / 2
    spine = _Matcher.of(ct, bone, SPINE_MM, mr, _SPINE_SHRINKS, _SPINE_STEP_MM)
    starts = [_shift(apply_affine(mr.affine, (np.array(mr.values.shape) - 1) / 2) - centre)]
    if _share_inside(bone_mm, mr) > _LEAST_OVERLAP:
        starts.append(np.eye(4))
    rough = min(starts, key=lambda start: spine.cost(start, centre))
    refined = spine.run(rough, centre)
    if _share_inside(apply_affine(refined, bone_mm), mr) < _LEAST_OVERLAP:
        refined = rough
    return np.linalg.inv(rough), np.linalg.inv(refined)


def affine_prealign(ct: Volume, ct_labels: Volume, mr: Volume) -> np.ndarray:
    """Return the refined one of `placements`: MR to CT, (4, 4), world mm; parameters and errors are the same."""
    return placements(ct, ct_labels, mr)[1]


def per_vertebra_rigid(ct: Volume, ct_labels: Volume, mr: Volume, start: np.ndarray) -> dict[int, np.ndarray]:
    """Return the rigid motion of each vertebra, MR to CT, by mutual information around that vertebra alone.

    Parameters
    ----------
    ct, ct_labels, mr : Volume
    start : ndarray (4, 4)
        Of all vertebrae, MR to CT.

    Returns
    -------
    dict of int to ndarray (4, 4)
        A vertebra that the MR does not show keeps the start.
    """
    back, transforms = np.linalg.inv(start), {}
    for label in (int(value) for value in np.unique(ct_labels.values) if value):
        bone = ct_labels.values == label
        centre = apply_affine(ct.affine, np.argwhere(bone).mean(axis=0))
        vertebra = _Matcher.of(ct, bone, VERTEBRA_MM, mr, _VERTEBRA_SHRINKS, _VERTEBRA_STEP_MM)
        try:
            transforms[label] = np.linalg.inv(vertebra.run(back, centre))
        except RuntimeError:  # of SimpleITK: too few samples lie in the moving image
            transforms[label] = np.array(start, float)
    return transforms


@dataclass(frozen=True)
class _Matcher:
    """Mutual information of a part of the CT with the MR; poses are CT to MR."""

    fixed: sitk.Image
    mask: sitk.Image
    moving: sitk.Image
    shrinks: tuple[int, ...]
    step_mm: float

    @classmethod
    def of(cls, ct, bone, margin_mm, mr, shrinks, step_mm):
        """Look at bone and `margin_mm` around it."""
        part, inside = (framed(Volume(values, ct.affine), bone, 2 * margin_mm) for values in (ct.values, bone))
        near = ndimage.distance_transform_edt(~inside.values, sampling=ct.spacing_mm) <= margin_mm
        images = (Volume(part.values.astype(np.float32), part.affine), Volume(near.astype(np.uint8), part.affine))
        moving = _image(Volume(mr.values.astype(np.float32), mr.affine))
        return cls(*map(_image, images), moving, shrinks, step_mm)

    def cost(self, start, centre) -> float:
        """Return the negative mutual information of a pose."""
        method = self._method(start, centre)
        return method.MetricEvaluate(self.fixed, self.moving)

    def run(self, start, centre) -> np.ndarray:
        """Return the pose that is found from a start."""
        method = self._method(start, centre)
        steps = (self.step_mm, _LEAST_STEP_MM, _STEPS, _RELAXATION, _LEAST_GRADIENT)
        method.SetOptimizerAsRegularStepGradientDescent(*steps)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel(self.shrinks)
        method.SetSmoothingSigmasPerLevel([shrink / 2 if shrink > 1 else 0 for shrink in self.shrinks])
        return _matrix(method.Execute(self.fixed, self.moving))

    def _method(self, start, centre):
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(_BINS)
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(1.0, _SEED)
        method.SetMetricFixedMask(self.mask)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetInitialTransform(_euler(start, centre), inPlace=False)
        return method


def _image(volume) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.values.transpose(2, 1, 0)))
    affine = _LPS @ volume.affine
    image.SetSpacing(volume.spacing_mm.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / volume.spacing_mm).ravel().tolist())
    return image


def _euler(matrix, centre) -> sitk.Euler3DTransform:
    """Return a matrix of RAS mm as a transform of LPS mm that turns about a centre."""
    matrix, centre = _LPS @ matrix @ _LPS, _LPS[:3, :3] @ centre
    transform = sitk.Euler3DTransform()
    transform.SetCenter(centre.tolist())
    transform.SetMatrix(matrix[:3, :3].ravel().tolist(), 1e-6)
    transform.SetTranslation((apply_affine(matrix, centre) - centre).tolist())
    return transform


def _matrix(transform) -> np.ndarray:
    """Return a rigid transform of LPS mm as a matrix (4, 4) of RAS mm."""
    corner = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix = np.eye(4)
    matrix[:3, :3] = np.column_stack([transform.TransformPoint(axis) for axis in np.eye(3).tolist()]) - corner[:, None]
    matrix[:3, 3] = corner
    return _LPS @ matrix @ _LPS


def _shift(offset) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = offset
    return matrix


def _share_inside(points, volume) -> float:
    index = apply_affine(np.linalg.inv(volume.affine), points)
    return float(((index >= 0) & (index <= np.array(volume.values.shape) - 1)).all(axis=-1).mean())
