"""Scores of elastix on the test pairs of notebook 08, which reads them from `spinelib/registration_elastix.json`.

itk-elastix is no dependency of this package: it takes 1.6 GB. Give it an environment of its own with this package:

    python -m venv elastix && elastix/bin/pip install . itk-elastix
    OMP_NUM_THREADS=1 elastix/bin/python tests/benchmarks/registration_elastix.py 8

A B-spline with knots every 8 mm, mutual information, and the penalty on what is not orthonormal and volume-preserving
in the vertebrae of the moving image (TransformRigidityPenalty, Staring 2007), which the paper compares with. It starts
from the same rigid pre-alignment as the other peers and sees the images as the networks do, on voxels of 1.5 mm.
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import itk
import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import distance_transform_edt

from spinelib.deformation import DisplacementField, grid_points_mm, warp_volume
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.models.ctmr_data import working_pair
from spinelib.phantom.pairs import sample_pair
from spinelib.prealign import affine_prealign
from spinelib.registration_evaluation import evaluate_pairs

OUTPUT = Path(__file__).resolve().parents[2] / "spinelib" / "registration_elastix.json"
FIRST_SEED = 410_000
KNOTS_MM, RESOLUTIONS, STEPS, SAMPLES, NEAR_MM = 8.0, 3, 300, 5000, 20.0
WEIGHT, STEP_MM = 1.0, 0.3  # a penalty of 10, or the default step, the voxel, leaves some pairs without finite numbers
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def itk_image(volume: Volume):
    """Return an image of ITK in its own world (LPS)."""
    image = itk.image_from_array(np.ascontiguousarray(volume.values.transpose(2, 1, 0), np.float32))
    affine = LPS @ volume.affine
    image.SetSpacing(volume.spacing_mm.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(affine[:3, :3] / volume.spacing_mm)))
    return image


def parameters(stiff: str):
    """Return elastix's default B-spline with a penalty where the file `stiff` is 1."""
    chosen = itk.ParameterObject.New().GetDefaultParameterMap("bspline", RESOLUTIONS, KNOTS_MM)
    settings = {
        "Registration": "MultiMetricMultiResolutionRegistration",
        "Metric": ["AdvancedMattesMutualInformation", "TransformRigidityPenalty"],
        "Metric0Weight": 1.0,
        "Metric1Weight": WEIGHT,
        "MaximumStepLength": STEP_MM,
        "AutomaticTransformInitialization": "false",
        "MaximumNumberOfIterations": STEPS,
        "NumberOfSpatialSamples": SAMPLES,
        "RequiredRatioOfValidSamples": 0.05,
        "RandomSeed": 1,
        "WriteResultImage": "false",
        "UseFixedRigidityImage": "false",
        "UseMovingRigidityImage": "true",
        "MovingRigidityImageName": stiff,
        "DilateRigidityImages": "false",
        "CalculateLinearityCondition": "true",
        "CalculateOrthonormalityCondition": "true",
        "CalculatePropernessCondition": "true",
        "UseLinearityCondition": "false",
        "UseOrthonormalityCondition": "true",
        "UsePropernessCondition": "true",
        "OrthonormalityConditionWeight": 1.0,
        "PropernessConditionWeight": 1.0,
    }
    for name, value in settings.items():
        chosen[name] = [str(item) for item in (value if isinstance(value, list) else [value])]
    return chosen


def elastix(pair):
    """Register a pair; returns the field MR to CT and no inverse. What it gives up stays as pre-aligned."""
    start = affine_prealign(pair.ct, pair.ct_labels, pair.mr)
    try:
        return refined(pair, start), None
    except (RuntimeError, InputError) as error:  # of ITK; of a field that is not finite
        print(f"{pair.key}: {error}")
        return DisplacementField.rigid(start, pair.mr.grid), None


def refined(pair, start):
    """Return the field that elastix finds from a rigid motion."""
    tensors, grid = working_pair(pair)
    laid = DisplacementField.rigid(start, grid)
    ct, bone, valid = (
        Volume(tensors[name].numpy().squeeze().astype(np.float32), grid.affine) for name in ("ct", "labels", "ct_valid")
    )
    ct, valid = warp_volume(ct, laid), warp_volume(valid, laid, order=0)
    bone = warp_volume(Volume((bone.values > 0).astype(np.float32), grid.affine), laid, order=0)
    near = distance_transform_edt(bone.values == 0, sampling=grid.spacing_mm) <= NEAR_MM
    near &= (valid.values > 0) & (tensors["valid"][0].numpy() > 0)
    mask = itk_image(Volume(near.astype(np.float32), grid.affine))
    mr = itk_image(Volume(tensors["mr"][0].numpy(), grid.affine))
    with tempfile.TemporaryDirectory() as folder:
        stiff = Path(folder) / "stiff.nii"
        itk.imwrite(itk_image(bone), str(stiff))
        chosen = itk.ParameterObject.New()
        chosen.AddParameterMap(parameters(str(stiff)))
        _, found = itk.elastix_registration_method(
            mr,
            itk_image(ct),
            fixed_mask=itk.cast_image_filter(mask, ttype=[type(mask), itk.Image[itk.UC, 3]]),
            parameter_object=chosen,
            log_to_console=False,
            output_directory=folder,
            number_of_threads=1,
        )
        values = np.asarray(itk.transformix_deformation_field(itk_image(ct), found, output_directory=folder))
    points = grid_points_mm(grid)
    moved = points + values.transpose(2, 1, 0, 3) * np.diag(LPS)[:3]
    field = DisplacementField((apply_affine(start, moved) - points).astype(np.float32), grid)
    return field.resampled(pair.mr.grid)


def main(count):
    """Score the pairs and write the file."""
    begun = time.process_time()
    pairs = [sample_pair(FIRST_SEED + number) for number in range(count)]
    vertebrae, fields = evaluate_pairs({"elastix": elastix}, pairs)
    content = {
        "command": f"python tests/benchmarks/registration_elastix.py {count}",
        "itk_elastix": version("itk-elastix"),
        "label_voxels": {pair.key: int((pair.ct_labels.values > 0).sum()) for pair in pairs},
        "cpu_seconds": round(time.process_time() - begun),
        "vertebrae": json.loads(vertebrae.round(5).to_json(orient="records")),
        "fields": json.loads(fields.round(5).to_json(orient="records")),
    }
    OUTPUT.write_text(json.dumps(content, indent=0) + "\n")
    print(vertebrae[["dice", "bone_tre_mm", "rotation_error_deg", "nonrigidity", "volume_change_pct", "failed"]].mean())
    print(fields[["soft_tre_mm", "folding_pct", "seconds"]].mean())


if __name__ == "__main__":
    main(int(sys.argv[1]))
