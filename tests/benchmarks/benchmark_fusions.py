"""Fusion of the two views, after Bayat 2020: is the order of four networks that of the seeds they start from?

    OMP_NUM_THREADS=1 python tests/benchmarks/benchmark_fusions.py [seed ...]

The networks, people and passes of `spinelib run --sweep ablation_transvert`; the seed changes weights, order and
augmentation. About ten minutes a network and seed on one core. Writes reports/reference/ablation_transvert_seeds.csv.
"""

import sys
from pathlib import Path

import pandas as pd
import torch

from spinelib.imaging.radiograph_pairs import BiplanarSubject
from spinelib.metrics import interval_columns
from spinelib.models.biplanar_data import BiplanarDataset
from spinelib.radiograph_cohort import render_biplanar_cohort
from spinelib.radiograph_evaluation import NAMES, evaluate_subjects, network_method
from spinelib.radiograph_training import BATCH_SIZE, RATE, DrawnParts, train_variant
from spinelib.train import TrainConfig

TEST, TRAIN, PASSES, PARTS = 10, 48, 6, 600
NETWORKS = "sagittal_only", "outer_product", "transvert", "attention"
OUT = Path("reports/reference/ablation_transvert_seeds.csv")


def trained_scores(name: str, seed: int, train, validation, test) -> pd.DataFrame:
    """Return the scores of the test people's vertebrae by one network, trained from one seed; kept in its folder."""
    folder = Path("data/training/fusions") / f"{name}-{seed}"
    table = folder / "scores.csv"
    if not table.is_file():
        data = DrawnParts(BiplanarDataset(train, augment=True, seed=seed), PARTS, seed)
        config = TrainConfig(PASSES, BATCH_SIZE, RATE, seed=seed)
        network = train_variant(name, data, BiplanarDataset(validation), config, folder)
        evaluate_subjects({name: network_method(network)}, test).to_csv(table, index=False)
    return pd.read_csv(table)


def rows_of(scores: dict) -> pd.DataFrame:
    """Return one row a network and seed; `step` is the mean Dice of the same people minus that of the row above."""
    rows = []
    for (name, seed), part in scores.items():
        row = {"variant": name, "name": NAMES[name], "seed": seed} | interval_columns("dice", by_person(part))
        row |= {"hd_mm": part["hd_mm"].mean(), "asd_mm": part["asd_mm"].mean()}
        place = NETWORKS.index(name)
        if place:
            above = NETWORKS[place - 1]
            row |= {"against": above} | interval_columns("step", by_person(part) - by_person(scores[above, seed]))
        rows.append(row)
    return pd.DataFrame(rows)


def by_person(part):
    return part.groupby("subject")["dice"].mean()


def main():
    torch.set_num_threads(1)
    seeds = [int(word) for word in sys.argv[1:]] or [0, 1, 2]
    people = [BiplanarSubject.load(path) for path in render_biplanar_cohort("data/biplanar-0", TEST + TRAIN)]
    test, train, validation = people[:TEST], people[TEST:-1], people[-1:]
    scores = {(name, seed): trained_scores(name, seed, train, validation, test) for seed in seeds for name in NETWORKS}
    table = rows_of(scores)
    table.to_csv(OUT, index=False, float_format="%.4f")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
