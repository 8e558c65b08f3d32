"""Knowledge distillation: a small voting network taught by the shipped one, against the same one from scratch.

    OMP_NUM_THREADS=1 python tests/benchmarks/benchmark_distillation.py [epochs]

Both see the same parts in the same order. Needs the cached scans of `spinelib train vertebrae --render 320`, and takes
some ten minutes on one core. Writes reports/reference/distillation.csv.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from spinelib.metrics import bootstrap_ci
from spinelib.models.scan_cache import WORKING_MM
from spinelib.models.vertebra_datasets import VoteDataset
from spinelib.models.vertebra_networks import STUDENT, VOTE_VOXELS
from spinelib.models.vertebrae import VertebraSegmenter
from spinelib.train import TrainConfig
from spinelib.vertebra_training import render_scans, train_voter

TRAIN, HELD_OUT = 320, 26
OUT = Path("reports/reference/distillation.csv")


def scored(net, scans):
    """Return Dice of the mask and median error of the votes in mm of one patch a scan."""
    rows = []
    for item in (VoteDataset(scans, len(scans), augment=False)[i] for i in range(len(scans))):
        own = item["labels"] > 0
        if not own.any():
            continue
        with torch.no_grad():
            answer = net(item["image"][None])[0]
        grid = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in own.shape], indexing="ij"))
        aim = item["bodies"][item["labels"].long()].movedim(-1, 0)
        off = (answer[1:] * VOTE_VOXELS + grid - aim).norm(dim=0)[own]
        found = answer[0] > 0
        dice = 2 * float((found & own).sum()) / float(found.sum() + own.sum())
        rows.append({"dice": dice, "vote_error_mm": float(off.median()) * WORKING_MM})
    return pd.DataFrame(rows)


def main():
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    scans = render_scans("data/ct-cache", TRAIN + HELD_OUT, 100_000, n_jobs=1)
    train, held_out = scans[:TRAIN], scans[TRAIN:]
    teacher = VertebraSegmenter.load().voter
    nets = {"teacher": (teacher, np.nan)}
    for name, taught_by in (("student_from_scratch", None), ("student_taught", teacher)):
        config = TrainConfig(epochs, 2, 3e-3)
        folder = Path("data/training/distillation") / name
        net = train_voter(train, held_out, config, folder, STUDENT, taught_by)
        nets[name] = net, pd.read_csv(folder / "log.csv")["seconds"].iloc[-1]
    rows = []
    for name, (net, seconds) in nets.items():
        scores, row = scored(net, held_out), {"network": name}
        row |= {"parameters": sum(p.numel() for p in net.parameters()), "epochs": epochs, "seconds": seconds}
        for metric in scores:
            triple = bootstrap_ci(scores[metric].to_numpy())
            row |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), np.round(triple, 3), strict=True))
        rows.append(row | {"n": len(scores)})
    table = pd.DataFrame(rows)
    table.loc[table["network"] == "teacher", "epochs"] = np.nan
    table.to_csv(OUT, index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
