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
from nibabel import affines
from scipy import ndimage
from scipy.spatial.transform import Rotation

from spinelib.geometry import Volume, VolumeGrid
from spinelib.metrics import bootstrap_ci, dice
from spinelib.models.scan_grid import working_grid
from spinelib.models.vertebrae import VertebraSegmenter
from spinelib.phantom.scan import sample_labels, sample_scan

FIRST_SEED, SPACING_MM = 700, 1.5
AIR_HU = -1024.0
VOXELS_MM, ANGLES_DEG = (1.2, 2.0), (5, 20)
OUT = Path("reports/reference/ct_invariance.csv")


def onto(ct, grid):
    """Return a scan on another grid (linear), air outside."""
    step = np.linalg.inv(ct.affine) @ grid.affine
    values = ndimage.affine_transform(
        ct.values.astype(np.float32), step[:3, :3], step[:3, 3], grid.shape, order=1, mode="grid-constant", cval=AIR_HU
    )
    return Volume(values, grid.affine)


def motion_about_middle(grid, degrees):
    """Return the motion (4, 4) by an angle about the axis from left to right through the middle of a grid."""
    middle = (grid.affine @ [*(np.array(grid.shape) - 1) / 2, 1])[:3]
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("x", degrees, degrees=True).as_matrix()
    motion[:3, 3] = middle - motion[:3, :3] @ middle
    return motion


def holding(grid, motion):
    """Return the grid that still holds all of `grid` when it is turned by `motion`."""
    ends = np.array(np.meshgrid(*[(-0.5, n - 0.5) for n in grid.shape])).reshape(3, -1).T  # faces, not centres
    ends = affines.apply_affine(np.linalg.inv(motion) @ grid.affine, ends)
    return VolumeGrid.from_bounds(ends.min(0), ends.max(0), grid.spacing_mm)


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
        grid = holding(ct.grid, motion)
        turned = onto(ct, VolumeGrid(grid.shape, motion @ grid.affine))
        truth = sample_labels(seed, grid, motion=np.linalg.inv(motion))
        truth[(turned.values <= AIR_HU) | ~np.isin(truth, scan.labels.values)] = 0
        yield f"turned by {angle} degrees", turned, without(truth, cut)


def without(labels, cut):
    """Return labels less those of cut vertebrae."""
    return np.where(np.isin(labels, cut), 0, labels)


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    torch.set_num_threads(1)
    segmenter, rows = VertebraSegmenter.load(), []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        for name, ct, truth in versions(seed):
            found = segmenter.segment(ct).labels.values
            shares = [dice(found == label, truth == label) for label in np.unique(truth[truth > 0])]
            if shares:
                lost = np.sum(np.less(shares, 0.5))
                rows.append({"scan": seed, "version": name, "dice": np.mean(shares), "lost": lost})
    scores = pd.DataFrame(rows).pivot_table(["dice", "lost"], "scan", "version", sort=False)
    table = []
    for name in scores["dice"].columns:
        change = (scores["dice"][name] - scores["dice"]["as it is"]).to_numpy()
        mean, low, high = bootstrap_ci(change)
        worst = change[np.abs(change).argmax()]
        row = {"version": name, "dice": scores["dice"][name].mean(), "change": mean, "change_low": low}
        row |= {"change_high": high, "largest_change": worst, "lost": int(scores["lost"][name].sum())}
        table.append(row | {"n": len(change)})
    table = pd.DataFrame(table).round(4)
    table.to_csv(OUT, index=False)
    print(scores["dice"].round(4).to_string(), table.to_string(index=False), sep="\n")


if __name__ == "__main__":
    main()
