"""Speed and reliability of the planar alignment; writes align.csv and align_flags.csv beside this file.

Run: python tests/benchmarks/benchmark_align.py        (one thread, about five minutes)

align.csv compares, on one pair, in one process and one thread, scoring the same lags of the same rotated
templates on the same final grid (2 mm pixels, +-80 mm in 2 mm steps, 0.5 deg steps):

- direct_conv2d: every sum of the masked correlation by torch conv2d, one rotated template at a time. The cost
  is linear in the number of angles; `angles_timed` are measured, `seconds` is scaled to all angles.
- fourier_exhaustive: `masked_ncc` on the same arrays, timed and scaled alike. `difference` is the largest
  difference of its scores from the direct ones.
- coarse_to_fine: what `align_images` does, features and continuous refinement included.
- both_stages: `align_pair`, masks included; median over PAIRS pairs, CPU seconds.

`ratio` is the direct scan's seconds over the row's. align_flags.csv counts, on drawn torsos of rising noise,
results that are wrong (above 1 deg or 2 mm mean displacement) and those of them that are not flagged.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import conv2d, pad

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from test_align import draw_pair, random_motion  # noqa: E402

from spinelib.align import IMAGE_LEVELS, align_images, align_pair  # noqa: E402
from spinelib.correlate import Level, edge_field, masked_ncc, search_angles, search_arrays  # noqa: E402
from spinelib.geometry import PlanarTransform  # noqa: E402

ANGLES_TIMED = 2
PAIRS = 10
NOISES = (0.03, 0.1, 0.3, 0.45, 0.6, 1.0, 2.0, 4.0)


def direct_ncc(fixed, fixed_valid, moving, moving_valid, row_lags, col_lags):
    """`masked_ncc` of one template by direct convolution, all lags in view."""
    shape = moving.shape[-2:]

    def correlate(image, template):
        edges = []
        for lags, size, extent in (
            (col_lags, shape[1], image.shape[-1]),
            (row_lags, shape[0], image.shape[-2]),
        ):
            edges += [-lags[0], lags[-1] + size - extent]
        return conv2d(pad(image, edges)[None, None], template[None, None])[0, 0]

    def channels(images, templates):
        return torch.stack([correlate(a, b) for a, b in zip(images, templates, strict=True)])

    overlap = correlate(fixed_valid, moving_valid).clamp(min=1e-3)
    f_sums = torch.stack([correlate(c * fixed_valid, moving_valid) for c in fixed])
    m_sums = torch.stack([correlate(fixed_valid, c * moving_valid) for c in moving])
    product = channels(fixed * fixed_valid, moving * moving_valid).sum(0) - (f_sums * m_sums).sum(0) / overlap
    f_energy = correlate((fixed**2).sum(0) * fixed_valid, moving_valid) - (f_sums**2).sum(0) / overlap
    m_energy = correlate(fixed_valid, (moving**2).sum(0) * moving_valid) - (m_sums**2).sum(0) / overlap
    return product / (f_energy.clamp(min=1e-6) * m_energy.clamp(min=1e-6)).sqrt()


def seconds(function):
    """Run once; returns (wall seconds, result)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def speed_rows():
    """Time the four methods."""
    motion = random_motion(0)
    pair = draw_pair(0, motion)
    final = Level(2.0, IMAGE_LEVELS[-1].sigma_mm, 0.5, 10.0, 80.0)
    start = PlanarTransform(0.0, 0.0, 0.0, *pair[1].grid.centre_mm[::-1])
    fields = [edge_field(image, final.sigma_mm) for image in pair[:2]]
    fixed, fixed_valid, moving, moving_valid, *lags, _, _ = search_arrays(*fields, start, final)
    angles = len(search_angles(start, final))
    timed = range(0, angles, angles // ANGLES_TIMED)[:ANGLES_TIMED]
    scale = angles / len(timed)

    direct_s, direct = seconds(
        lambda: [direct_ncc(fixed, fixed_valid, moving[i], moving_valid[i], *lags) for i in timed]
    )
    fourier_s, fourier = seconds(
        lambda: [masked_ncc(fixed, fixed_valid, moving[i : i + 1], moving_valid[i : i + 1], *lags)[0] for i in timed]
    )
    seen = [f > -1 for f in fourier]
    difference = max(float((d - f)[s].abs().max()) for d, f, s in zip(direct, fourier, seen, strict=True))
    align_images(*pair[:2])
    image_s = np.median([seconds(lambda: align_images(*pair[:2]))[0] for _ in range(5)])
    shapes = f"fixed {tuple(fixed.shape[1:])}, moving {tuple(moving.shape[2:])} px, 2 channels"
    grid = f"{final.spacing_mm} mm, {shapes}"
    lag_count = len(lags[0]) * len(lags[1])
    common = {"grid": grid, "angles": angles, "shifts": lag_count}
    return [
        {"method": "direct_conv2d", **common, "angles_timed": len(timed), "seconds": direct_s * scale},
        {
            "method": "fourier_exhaustive",
            **common,
            "angles_timed": len(timed),
            "seconds": fourier_s * scale,
            "difference": difference,
        },
        {"method": "coarse_to_fine", **common, "angles_timed": angles, "seconds": image_s},
        {"method": "both_stages", **common, "angles_timed": angles, "seconds": cpu_seconds_a_pair()},
    ]


def cpu_seconds_a_pair() -> float:
    """Median CPU seconds of `align_pair` over PAIRS pairs."""
    spent = []
    for seed in range(PAIRS):
        pair = draw_pair(seed, random_motion(seed))
        start = time.process_time()
        align_pair(*pair)
        spent.append(time.process_time() - start)
    return float(np.median(spent))


def displacement_mm(one, other, grid):
    """Mean distance between the two images of the grid's points."""
    points = np.meshgrid(grid.lateral_mm()[::8], grid.superior_mm()[::8])
    return np.hypot(*np.subtract(one.apply(*points), other.apply(*points))).mean()


def flag_rows():
    """Count wrong and flagged results of the image stage for each noise level."""
    rows = []
    for noise in NOISES:
        errors, failed, turns = [], [], []
        for seed in range(PAIRS):
            true = random_motion(seed)
            dxa, mri, *_ = draw_pair(seed, true, noise)
            found = align_images(dxa, mri)
            errors.append(displacement_mm(found.transform, true, mri.grid))
            turns.append(abs(found.transform.rotation_deg - true.rotation_deg))
            failed.append(found.failed)
        wrong = (np.array(errors) > 2) | (np.array(turns) > 1)
        rows.append(
            {
                "noise_in_image_sd": noise,
                "pairs": PAIRS,
                "median_displacement_mm": np.median(errors),
                "median_rotation_error_deg": np.median(turns),
                "wrong": wrong.sum(),
                "flagged": np.sum(failed),
                "wrong_not_flagged": np.sum(wrong & ~np.array(failed)),
                "right_but_flagged": np.sum(~wrong & failed),
            }
        )
    return rows


def main():
    """Write both tables."""
    torch.set_num_threads(1)
    table = pd.DataFrame(speed_rows())
    table["ratio"] = table["seconds"].iloc[0] / table["seconds"]
    table["per_second"] = 1 / table["seconds"]
    conditions = {"cores": os.cpu_count(), "threads": 1, "torch": torch.__version__}
    table.assign(**conditions).to_csv(HERE / "align.csv", index=False, float_format="%.4g")
    flags = pd.DataFrame(flag_rows())
    flags.to_csv(HERE / "align_flags.csv", index=False, float_format="%.3f")
    sys.stdout.write(f"{table.to_string()}\n{flags.to_string()}\n")


if __name__ == "__main__":
    main()
