"""Write the README's tables from the committed CSV files.

``python tests/readme_tables.py`` fills the README; ``python tests/readme_tables.py reports/laptop`` first makes a run
or sweep the committed reference: its metrics, tables and PNG figures (of synthetic data only).
"""

import re
import shutil
import sys
from pathlib import Path

import pandas as pd

from spinelib.evaluate import PUBLISHED
from spinelib.radiograph_evaluation import published_rows

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "reports" / "reference"
TABLES = {
    "headline": REFERENCE / "laptop" / "tables" / "headline.csv",
    "agreement": REFERENCE / "laptop" / "tables" / "agreement.csv",
    "coverage": REFERENCE / "laptop" / "tables" / "coverage.csv",
    "stress": REFERENCE / "laptop" / "tables" / "stress.csv",
    "ablation": REFERENCE / "ablation_curves" / "tables" / "sweep.csv",
    "learning": REFERENCE / "learning_curve" / "tables" / "sweep.csv",
    "alignment": REFERENCE / "laptop" / "tables" / "alignment.csv",
    "real_ct": REFERENCE / "real_ct.csv",
    "vertebrae": REFERENCE / "laptop" / "tables" / "scores.csv",
    "real_vertebrae": REFERENCE / "laptop" / "tables" / "real_scans.csv",
    "ct_invariance": REFERENCE / "ct_invariance.csv",
    "radiographs": REFERENCE / "laptop" / "tables" / "radiograph_scores.csv",
    "real_radiographs": REFERENCE / "laptop" / "tables" / "real_radiographs.csv",
    "ablation_transvert": REFERENCE / "ablation_transvert.csv",
    "fusion_seeds": REFERENCE / "ablation_transvert_seeds.csv",
    "registration": REFERENCE / "laptop" / "tables" / "registration_scores.csv",
    "same_pairs": REFERENCE / "laptop" / "tables" / "registration_same_pairs.csv",
    "hard_registration": REFERENCE / "laptop" / "tables" / "registration_difficulty.csv",
    "real_registration": REFERENCE / "laptop" / "tables" / "real_registration_scores.csv",
}
COLUMNS = {
    "headline": {
        "method": "method",
        "weights": "weights",
        "centreline_3d_mm": "3D centre line (mm)",
        "centreline_95ci_mm": "95% CI",
        "coronal_mm": "coronal (mm)",
        "sagittal_mm": "sagittal (mm)",
        "iou_3d": "IoU 3D",
        "hd95_mm": "HD95 (mm)",
        "n": "n",
    },
    "agreement": {
        "measure": "measure",
        "method": "method",
        "mae": "mean absolute error",
        "bias": "bias",
        "loa_low": "limits: from",
        "loa_high": "to",
        "icc": "ICC",
        "n": "n",
    },
    "coverage": {
        "region": "region",
        "coverage": "inside",
        "ci_low": "95% CI from",
        "ci_high": "to",
        "mean_radius_mm": "mean radius (mm)",
        "n": "n",
    },
    "stress": {
        "stress": "condition",
        "level": "level",
        "unit": "unit",
        "mean": "error ratio",
        "ci_low": "95% CI from",
        "ci_high": "to",
        "coverage": "inside tube",
        "unusual": "called unusual",
        "n": "n",
    },
    "ablation": {
        "variant": "variant",
        "training.ours.validation_mm": "3D centre line (mm)",
        "training.ours.validation_ci_low_mm": "95% CI from",
        "training.ours.validation_ci_high_mm": "to",
        "training.ours.seconds": "fitted in (s)",
    },
    "learning": {
        "training.subjects": "training subjects",
        "training.ours.validation_mm": "3D centre line (mm)",
        "training.ours.validation_ci_low_mm": "95% CI from",
        "training.ours.validation_ci_high_mm": "to",
    },
    "alignment": {
        "method": "method",
        "rotation_deg_median": "rotation, median (deg)",
        "rotation_deg_max": "max",
        "shift_mm_median": "shift, median (mm)",
        "shift_mm_max": "max (mm)",
        "n": "n",
    },
    "vertebrae": {
        "method": "method",
        "dice": "Dice",
        "shape_dice": "shape Dice",
        "shape_hd_mm": "HD (mm)",
        "shape_assd_mm": "ASSD (mm)",
        "id_rate": "identified",
        "loc_mm": "distance (mm)",
        "label_shift_rate": "scans with a wrong name",
    },
    "real_vertebrae": {
        "scan": "scan",
        "shape_dice": "shape Dice",
        "dice": "Dice",
        "identified": "identified",
        "shape_hd_mm": "HD (mm)",
        "vertebrae": "vertebrae",
    },
    "ct_invariance": {
        "version": "the same scan",
        "dice": "Dice",
        "change": "change",
        "largest_change": "largest change of a scan",
        "lost": "vertebrae lost",
        "n": "scans",
    },
    "radiographs": {
        "name": "method",
        "data": "data",
        "dice": "Dice",
        "dice_low": "95% CI from",
        "dice_high": "to",
        "hd_mm": "HD (mm)",
        "asd_mm": "ASD (mm)",
        "level_accuracy": "level right",
        "vertebrae": "vertebrae",
    },
    "real_radiographs": {
        "subject": "scan",
        "method": "method",
        "dice": "Dice",
        "hd_mm": "HD (mm)",
        "asd_mm": "ASD (mm)",
    },
    "ablation_transvert": {
        "name": "network",
        "dice": "Dice",
        "hd_mm": "HD (mm)",
        "asd_mm": "ASD (mm)",
        "level_accuracy": "level right",
        "step": "Dice, change",
        "beside": "from",
        "published_dice": "*published Dice*",
    },
    "fusion_seeds": {"name": "network", "0": "Dice, seed 0", "1": "seed 1", "2": "seed 2"},
    "registration": {
        "name": "method",
        "dice": "Dice",
        "bone_tre_mm": "bone (mm)",
        "rotation_error_deg": "rotation (deg)",
        "soft_tre_mm": "soft tissue (mm)",
        "nonrigidity": "bending of bone",
        "failed": "failed",
        "folding_pct": "folded (%)",
        "seconds": "seconds",
        "pairs": "pairs",
    },
    "same_pairs": {
        "name": "method",
        "dice": "Dice",
        "bone_tre_mm": "bone (mm)",
        "soft_tre_mm": "soft tissue (mm)",
        "nonrigidity": "bending of bone",
        "volume_change_pct": "volume change (%)",
        "seconds": "seconds",
        "pairs": "pairs",
        "published_dice": "*published Dice*",
        "published_volume_change_pct": "*published volume change (%)*",
    },
    "hard_registration": {
        "group": "vertebrae",
        "name": "method",
        "dice": "Dice",
        "bone_tre_mm": "bone (mm)",
        "failed": "failed",
        "vertebrae": "n",
    },
    "real_registration": {
        "name": "method",
        "dice": "Dice",
        "bone_tre_mm": "bone (mm)",
        "rotation_error_deg": "rotation (deg)",
        "failed": "failed",
        "pairs": "pairs",
    },
    "real_ct": {
        "scan": "scan",
        "levels": "levels",
        "method": "method",
        "centreline_3d_mm": "3D centre line (mm)",
        "coronal_mm": "coronal (mm)",
        "sagittal_mm": "sagittal (mm)",
    },
}


def as_markdown(name: str) -> str:
    """Return one committed table as Markdown."""
    table = pd.read_csv(TABLES[name], keep_default_na=False)
    if name in ("ablation", "learning"):
        table = table[table["state"] == "done"].astype({column: float for column in list(COLUMNS[name])[1:]})
    if name == "real_vertebrae":  # no distance where nothing was found
        table["shape_hd_mm"] = pd.to_numeric(table["shape_hd_mm"]).map("{:.2f}".format).replace("nan", "-")
    if name == "agreement":
        table = _angles_of_ours_and_ridge(table)
    if name == "hard_registration":
        hard = table["group"].isin(["large motion", "cut by the MR's border"])
        table = table[hard & table["method"].isin(["affine", "sitk_pervertebra", "ours"])]
        table = _with_intervals(table, ["dice", "bone_tre_mm"])
    if name in ("registration", "real_registration", "same_pairs"):
        table = _with_intervals(table, ["dice", "bone_tre_mm", "rotation_error_deg", "soft_tre_mm"])
        table["nonrigidity"] = table["nonrigidity"].map("{:.4f}".format)
    if name == "registration":
        table = table[table["pairs"] == table["pairs"].max()]
    if name == "same_pairs":
        table = _with_published_registration(table)
    if name == "ct_invariance":
        table = _with_intervals(table, ["change"])
        table[["dice", "largest_change"]] = table[["dice", "largest_change"]].map("{:.3f}".format)
    if name == "ablation_transvert":
        table = _with_steps(table)
    if name == "radiographs":
        table = _with_published_radiographs(table)
    if name == "fusion_seeds":
        names, texts = table["name"].unique(), _with_intervals(table.astype({"seed": str}), ["dice"])
        table = texts.pivot_table("dice", "name", "seed", aggfunc="first").loc[names].reset_index()
    if name == "vertebrae":
        table = _with_published_vertebrae(table)
    table = table[list(COLUMNS[name])].rename(columns=COLUMNS[name])
    shown = table.map(lambda v: f"{v:.2f}" if isinstance(v, float) else str(v).replace("_", " "))
    rows = [list(shown.columns), ["---"] * shown.shape[1], *shown.to_numpy().tolist()]
    if name == "headline":
        rows.append(_published_row(list(COLUMNS[name])))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _angles_of_ours_and_ridge(everybody: pd.DataFrame) -> pd.DataFrame:
    """Return the angles of two methods; those of the main curve come from the table of people with scoliosis."""
    bent = pd.read_csv(TABLES["agreement"].with_name("agreement_scoliosis.csv"), keep_default_na=False)
    both = pd.concat([bent, everybody])
    measures = ["cobb_deg", "modified_ferguson_deg", "thoracic_kyphosis_deg", "lumbar_lordosis_deg"]
    both = both[both["measure"].isin(measures) & both["method"].isin(["ridge", "ours"])]
    return both.sort_values("measure", key=lambda m: m.map(measures.index), kind="stable")


def _with_intervals(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Return a table whose `columns` are texts: mean and interval."""
    table = table.copy()
    for column in columns:
        ends = table[[column, f"{column}_low", f"{column}_high"]].astype(float)
        table[column] = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in ends.to_numpy()]
    return table


def _with_steps(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with intervals, the change from another row of the table, and the published Dice."""
    names = table.set_index("variant")["name"]
    table = _with_intervals(table.replace("", float("nan")), ["dice", "step"])
    table["step"] = table["step"].where(~table["step"].str.contains("nan"), "")
    table["beside"] = table["against"].map(names).fillna("")
    table["published_dice"] = [f"*{value:.3f}*" if value > 0 else "" for value in table["published_dice"].astype(float)]
    for column in ("hd_mm", "asd_mm", "level_accuracy"):
        table[column] = table[column].astype(float)
    return table


def _with_published_radiographs(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all methods, then published ones, whose data were others."""
    published = published_rows().astype(object)
    published = published[published["method"].isin(["attention_adv", "benchmark", "whole_spine"])]
    published["name"] = "*" + published["name"] + "*"
    published["data"] = "*" + published["data"] + "*"
    both = pd.concat([table.astype(object), published], ignore_index=True)
    numbers = ["dice", "dice_low", "dice_high", "hd_mm", "asd_mm", "level_accuracy"]
    for column in numbers:
        both[column] = pd.to_numeric(both[column]).map("{:.3f}".format).replace("nan", "")
    return both.fillna("")


def _with_published_vertebrae(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all methods, then the published ones that give a Dice, whose data were others."""
    published = pd.read_csv(TABLES["vertebrae"].with_name("published.csv"))
    published["method"] = "*" + published["system"] + ": " + published["data"] + "*"
    wide = published.pivot_table(index="method", columns="measure", values="value", aggfunc="first", sort=False)
    wide = wide.dropna(subset="Dice").reset_index()
    added = pd.DataFrame({"method": wide["method"], "dice": wide["Dice"], "shape_assd_mm": wide["ASSD mm"]})
    added[["dice", "shape_assd_mm"]] = added[["dice", "shape_assd_mm"]].map(lambda v: f"*{v}*" if pd.notna(v) else v)
    return pd.concat([table, added], ignore_index=True).fillna("")


def _with_published_registration(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the published means of the same methods, whose data were others."""
    published = pd.read_csv(TABLES["registration"].with_name("registration_published.csv")).set_index("method")
    for column, form in (("dice", "*{:.3f}*"), ("volume_change_pct", "*{:.1f}*")):
        known = published[column].map(form.format)
        table[f"published_{column}"] = table["method"].map(known).fillna("")
    return table


def _published_row(columns: list[str]) -> list[str]:
    """Return the published figures as a row that says they were measured on other data."""
    known = {"method": "*published*", "weights": "*UK Biobank: other data, other truth*"}
    known |= {name: f"*{value:.2f}*" for name, value in PUBLISHED.items()}
    return [known.get(column, "") for column in columns]


def filled(text: str) -> str:
    """Return the README's text with every table block replaced."""
    for name in TABLES:
        block = f"<!-- table: {name} -->\n{as_markdown(name)}\n<!-- end -->"
        text, count = re.subn(
            rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
        if count != 1:
            message = f"README.md has {count} blocks for table {name!r}; expected one."
            raise ValueError(message)
    return text


def publish(run_dir: Path) -> None:
    """Copy what a reader of a run or a sweep needs into reports/reference."""
    target = REFERENCE / run_dir.name
    shutil.rmtree(target, ignore_errors=True)
    for name, kinds in (("tables", "*.csv"), ("figures", "*.png")):
        (target / name).mkdir(parents=True)
        for file in sorted((run_dir / name).glob(kinds)):
            shutil.copy(file, target / name)
    shutil.copy(run_dir / "metrics.json", target)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        publish(Path(folder))
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text(encoding="utf8")), encoding="utf8")
