"""Rows of both tables of Bayat 2020, from a sweep of notebook 07, beside what was published.

    spinelib run --sweep ablation_transvert
    python tests/benchmarks/ablation_radiographs.py reports/ablation_transvert

Every row is a network trained with the same people, steps and seed; `step` is its mean Dice minus that of the row
named in `against`, over the same people. Writes reports/reference/ablation_transvert.csv, or the CSV that is named
second: ablation_transvert_longer.csv is of `--only outer_product` and `--only attention` of that sweep with 18 epochs.
"""

import sys
from pathlib import Path

import pandas as pd

from spinelib.metrics import interval_columns
from spinelib.radiograph_evaluation import NAMES, published_rows, table_rows

TO = Path(__file__).resolve().parents[2] / "reports" / "reference" / "ablation_transvert.csv"
AGAINST = {
    "outer_product": "sagittal_only",
    "transvert": "outer_product",
    "attention": "transvert",
    "attention_adv": "attention",
    "ours": "attention_adv",
    "voi_c2v": "voi_none",
    "voi_b2v": "voi_c2v",
    "voi_v2v": "voi_b2v",
}
"""The row above in the published tables; ours against the best of the first."""


def rows_of(sweep: Path) -> pd.DataFrame:
    """Return one row a variant of a sweep that has been run."""
    scores = {name: _scores(sweep / name) for name in NAMES if (sweep / name / "metrics.json").is_file()}
    published = published_rows().drop_duplicates("method").set_index("method")["dice"]
    rows = []
    for name, part in scores.items():
        row = table_rows(part)[["subjects", "vertebrae", "empty", "dice", "dice_low", "dice_high", "hd_mm", "asd_mm"]]
        row = {"variant": name, "name": NAMES[name]} | row.iloc[0].to_dict()
        row["level_accuracy"] = part.groupby("subject")["level_accuracy"].mean().mean()
        above = _row_above(name, scores)
        if above:
            row |= {"against": above} | interval_columns("step", _by_person(part) - _by_person(scores[above]))
        rows.append(row | {"published_dice": published.get(name)})
    return pd.DataFrame(rows)


def _row_above(name, scores):
    """Return the nearest row above that has been run, if any."""
    name = AGAINST.get(name)
    while name and name not in scores:
        name = AGAINST.get(name)
    return name


def _scores(folder):
    table = pd.read_csv(folder / "tables" / "radiograph_vertebrae.csv")
    return table[table["method"] == "this_run"]


def _by_person(part):
    return part.groupby("subject")["dice"].mean()


if __name__ == "__main__":
    table = rows_of(Path(sys.argv[1]))
    table.to_csv(sys.argv[2] if len(sys.argv) > 2 else TO, index=False, float_format="%.4f")
    print(table.to_string(index=False))
