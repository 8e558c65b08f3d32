"""CPU seconds of one prediction: curves, tube, intervals and novelty of a DXA, weights loaded before.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/benchmark_predict.py``; writes tests/benchmarks/predict.csv.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd

from spinelib.models.predictor import CurvePredictor
from spinelib.phantom.cohort import render_dxa
from spinelib.phantom.population import sample_subject

SCANS = 12


def main() -> None:
    """Time each stage on scans of synthetic people."""
    predictor = CurvePredictor.load()
    images = [render_dxa(sample_subject(9_000_000 + i))[0] for i in range(SCANS)]
    windows = [predictor.window(image) for image in images]
    predictor.estimate(images[0])
    stages = {
        "locate": predictor.window,
        "curves": lambda image: predictor.predict(image, windows[0]),
        "everything": predictor.estimate,
    }
    rows = []
    for name, work in stages.items():
        seconds = []
        for image in images:
            start = time.process_time()
            work(image)
            seconds.append(time.process_time() - start)
        rows.append({"stage": name, "median_cpu_s": np.median(seconds), "max_cpu_s": max(seconds), "n": SCANS})
    table = pd.DataFrame(rows).round(4)
    table.to_csv(Path(__file__).with_name("predict.csv"), index=False)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
