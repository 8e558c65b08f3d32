"""CT/MR registration of unseen phantom pairs without a network: nothing, pre-alignment, SimpleITK's peer, ours.

Run: ``OMP_NUM_THREADS=1 python tests/benchmarks/registration_peers.py [out.csv]``   (one thread, about a minute)

All start from the same pre-alignment (`affine`); the two that move each vertebra alone share one blending, so that
what differs is how the motions are found. Rows are methods; numbers are means over pairs of the mean over vertebrae,
`failed` is the share of the vertebrae that are off by more than 3 mm, cpu_s the process CPU seconds of a pair with
pre-alignment, blending and inverse. With a file name the table is also written there.
"""

import sys
import time

import SimpleITK as sitk
import torch

from spinelib.phantom.pairs import sample_pair
from spinelib.registration_evaluation import (
    affine_method,
    ceiling_method,
    evaluate_pairs,
    identity_method,
    polyrigid_method,
    sitk_method,
)

SEEDS = range(300, 306)
VERTEBRA = ["dice", "bone_tre_mm", "rotation_error_deg", "translation_error_mm", "nonrigidity", "failed"]
FIELD = ["soft_tre_mm", "folding_pct", "sd_log_jacobian", "inverse_consistency_mm", "cpu_s"]


def timed(method, spent):
    """Return the method with its CPU seconds appended to a list."""

    def run(pair):
        start = time.process_time()
        answer = method(pair)
        spent.append(time.process_time() - start)
        return answer

    return run


def main():
    """Print the table; write it if a name is given."""
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    methods = {
        "identity": identity_method,
        "affine": affine_method,
        "sitk_pervertebra": sitk_method,
        "ours": polyrigid_method(),
        "ceiling": ceiling_method,
    }
    spent = {name: [] for name in methods}
    timers = {name: timed(method, spent[name]) for name, method in methods.items()}
    vertebrae, fields = evaluate_pairs(timers, (sample_pair(seed) for seed in SEEDS))
    fields["cpu_s"] = [spent[name].pop(0) for name in fields["method"]]
    by_pair = vertebrae.groupby(["method", "pair"], sort=False)[VERTEBRA].mean()
    table = by_pair.groupby("method", sort=False).mean()
    table["failed"] = vertebrae.groupby("method")["failed"].mean()
    table = table.join(fields.groupby("method")[FIELD].mean())
    table["pairs"], table["vertebrae"] = len(SEEDS), vertebrae.groupby("method").size()
    table = table.reset_index()
    sys.stdout.write(f"{table.round(4).to_string()}\n")
    if len(sys.argv) > 1:
        table.to_csv(sys.argv[1], index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
