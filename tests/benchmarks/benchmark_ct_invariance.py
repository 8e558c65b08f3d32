"""How much the same CT stored in another way changes the vertebrae found in it.

    OMP_NUM_THREADS=1 python tests/benchmarks/benchmark_ct_invariance.py [scans]

Every scan is segmented as it is, mirrored, with other voxels, and turned; the truth of each comes from the anatomy on
that very grid, since a mask that is carried from grid to grid loses more than the networks do. Takes 45 seconds a scan
on one core. Writes reports/reference/ct_invariance.csv.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from spinelib.geometry import Volume
from spinelib.metrics import bootstrap_ci, dice
from spinelib.models.scan_grid import working_grid
from spinelib.models.vertebrae import VertebraSegmenter
from spinelib.phantom.scan import sample_labels, sample_scan

FIRST_SEED, SPACING_MM = 700, 1.5
VOXELS_MM, ANGLES_DEG = (1.2, 2.0), (5, 20)
OUT = Path("reports/reference/ct_invariance.csv")


def onto(ct, grid):
    """Return a scan on another grid (linear)."""
    step = np.linalg.inv(ct.affine) @ grid.affine
    values = ndimage.affine_transform(
        ct.values.astype(np.float32), step[:3, :3], step[:3, 3], grid.shape, order=1, mode="nearest"
    )
    return Volume(values, grid.affine)


def motion_about_middle(grid, degrees):
    """Return the motion (4, 4) by an angle about the axis from left to right through the middle of a grid."""
    middle = (grid.affine @ [*(np.array(grid.shape) - 1) / 2, 1])[:3]
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("x", degrees, degrees=True).as_matrix()
    motion[:3, 3] = middle - motion[:3, :3] @ middle
    return motion


def versions(seed):
    """Yield name, scan and true labels of whole vertebrae."""
    scan = sample_scan(seed, SPACING_MM)
    ct, cut = scan.ct, list(scan.cut)
    yield "as it is", ct, without(scan.labels.values, cut)
    yield "mirrored", Volume(np.ascontiguousarray(ct.values[::-1]), ct.affine), without(scan.labels.values[::-1], cut)
    for voxel in VOXELS_MM:
        grid = working_grid(ct.grid, voxel)
        yield f"voxels of {voxel} mm", onto(ct, grid), without(sample_labels(seed, grid), cut)
    for angle in ANGLES_DEG:
        motion = motion_about_middle(ct.grid, angle)
        turned = onto(ct, type(ct.grid)(ct.grid.shape, motion @ ct.affine))
        truth = sample_labels(seed, ct.grid, motion=np.linalg.inv(motion))
        yield f"turned by {angle} degrees", turned, without(truth, cut)


def without(labels, cut):
    """Return labels less those of cut vertebrae."""
    return np.where(np.isin(labels, cut), 0, labels)


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    torch.set_num_threads(1)
    segmenter, rows = VertebraSegmenter.load(), []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        for name, ct, truth in versions(seed):
            found = segmenter.segment(ct).labels.values
            shares = [dice(found == label, truth == label) for label in np.unique(truth[truth > 0])]
            if shares:
                rows.append({"scan": seed, "version": name, "dice": np.mean(shares), "lost": np.sum(np.less(shares, 0.5))})
    scores = pd.DataFrame(rows).pivot(index="scan", columns="version")
    table = []
    for name in scores["dice"].columns:
        change = (scores["dice"][name] - scores["dice"]["as it is"]).to_numpy()
        mean, low, high = bootstrap_ci(change)
        worst = change[np.abs(change).argmax()]
        row = {"version": name, "dice": scores["dice"][name].mean(), "change": mean, "ci_low": low, "ci_high": high}
        table.append(row | {"largest_change": worst, "lost": int(scores["lost"][name].sum()), "n": len(change)})
    table = pd.DataFrame(table).sort_values("change", key=abs).round(4)
    table.to_csv(OUT, index=False)
    print(scores["dice"].round(4).to_string(), table.to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()
