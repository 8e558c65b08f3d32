"""What the shipped vertebra networks do on scans they have not seen."""

import json

import nibabel as nib
import numpy as np
import pytest
from nibabel import affines
from scipy import ndimage
from scipy.spatial.transform import Rotation

from spinelib.cli import main
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.readers import read_volume
from spinelib.imaging.verse import body_centroids_mm, read_centroids, read_mask, write_labelled_ct
from spinelib.levels import LEVEL_OF_LABEL
from spinelib.metrics import dice
from spinelib.models.vertebrae import VertebraSegmenter, _carried
from spinelib.phantom.scan import sample_scan
from spinelib.record import file_sha256
from spinelib.vertebra_evaluation import evaluate_scans, network_method, whole_vertebrae

SEED = 0  # of a lumbar scan, T12 cut; training used seeds from 100,000
LEAST_DICE = 0.85


@pytest.fixture(scope="module")
def segmenter():
    return VertebraSegmenter.load()


@pytest.fixture(scope="module")
def scan():
    return sample_scan(SEED, spacing_mm=2.0)


def overlap(a, b):
    """Mean Dice of the labels of `a`."""
    labels = np.unique(a[a > 0])
    return np.mean([dice(b == label, a == label) for label in labels])


def test_the_card_belongs_to_the_weights(segmenter):
    from importlib.resources import files

    folder = files("spinelib") / "weights"
    card = json.loads((folder / "vertebrae.json").read_text())
    assert card["sha256"] == file_sha256(folder / "vertebrae.safetensors")
    assert card["command"] == segmenter.card["command"]
    assert (folder / "vertebrae.safetensors").stat().st_size < 15_000_000


def test_an_unseen_scan_is_outlined_and_named(segmenter, scan):
    scores = evaluate_scans({"ours": network_method(segmenter)}, [scan])
    annotated = scores[scores["outcome"] != "extra"]
    print(annotated[["level", "predicted_label", "shape_dice", "distance_mm"]])
    assert annotated["shape_dice"].mean() > LEAST_DICE
    assert annotated["identified"].astype(float).mean() == 1


@pytest.mark.parametrize("codes", ["LPS", "PIR"])
def test_the_orientation_of_the_file_changes_nothing(segmenter, scan, tmp_path, codes):
    paths = write_labelled_ct(tmp_path, scan, "test", codes)
    straight = segmenter.segment(Volume(np.rint(scan.ct.values), scan.ct.affine)).labels.values
    assert "".join(nib.aff2axcodes(nib.load(paths[0]).affine)) == codes
    assert np.array_equal(segmenter.segment(read_volume(paths[0])).labels.values, straight)


def test_other_voxels_change_little(segmenter, scan):
    """The scan on a grid of half the voxel size along one axis is outlined about as well."""
    doubled = Volume(np.repeat(scan.ct.values, 2, axis=2), scan.ct.affine @ np.diag([1, 1, 0.5, 1]))
    doubled.affine[:3, 3] -= scan.ct.affine[:3, 2] / 4
    truth = whole_vertebrae(scan)
    once, again = segmenter.segment(scan.ct).labels.values, segmenter.segment(doubled).labels.values
    print(overlap(truth, once), overlap(truth, again[:, :, ::2]))
    assert abs(overlap(truth, once) - overlap(truth, again[:, :, ::2])) < 0.01


def test_a_file_turned_against_the_world_holds_the_same_vertebrae(segmenter, scan):
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xz", [20, 8], degrees=True).as_matrix()
    ends = affines.apply_affine(np.linalg.inv(motion), scan.ct.grid.corners_mm())
    straight = VolumeGrid.from_bounds(ends.min(0), ends.max(0), 2.0)
    turned = VolumeGrid(straight.shape, motion @ straight.affine)
    there, back = (np.linalg.inv(a) @ b for a, b in ((scan.ct.affine, turned.affine), (turned.affine, scan.ct.affine)))
    values = ndimage.affine_transform(scan.ct.values, there, output_shape=turned.shape, order=1, cval=-1024)
    found = segmenter.segment(Volume(values, turned.affine)).labels
    assert found.values.shape == turned.shape and np.array_equal(found.affine, turned.affine)
    once = segmenter.segment(scan.ct).labels.values
    again = ndimage.affine_transform(found.values, back, output_shape=once.shape, order=0)
    assert set(np.unique(again)) == set(np.unique(once))
    assert overlap(once, again) > 0.88  # carried between grids of 2 mm three times, once to the nearest voxel


def test_labels_carried_to_their_own_grid_stay():
    labels = np.zeros((12, 14, 16), np.uint8)
    labels[2:7, 3:9, 4:12], labels[7:11, 3:9, 0:9] = 20, 21
    volume = Volume(labels, np.diag([1.5, 1.5, 2.0, 1.0]))
    np.testing.assert_array_equal(_carried(volume, volume).values, labels)


def test_air_holds_no_spine(segmenter):
    empty = Volume(np.full((60, 60, 60), -1000, np.int16), np.diag([2.0, 2, 2, 1]))
    result = segmenter.segment(empty)
    assert result.found == ()
    assert result.flags == ("no spine found",)


def test_command_writes_mask_and_centroids_on_the_grid_of_the_file(scan, tmp_path, capsys):
    source, _, _ = write_labelled_ct(tmp_path, scan, "test", "PIR")
    out = tmp_path / "out"
    assert main(["predict", "--segment", str(source), "-o", str(out)]) == 0
    image, mask = nib.load(source), nib.load(out / "mask.nii.gz")
    assert mask.shape == image.shape
    assert np.allclose(mask.affine, image.affine)
    truth, found = whole_vertebrae(scan), read_mask(out / "mask.nii.gz")
    assert dice(found.values > 0, truth > 0) > LEAST_DICE
    points = read_centroids(out / "centroids.json", source)
    for label, centre in body_centroids_mm(found).items():
        assert np.linalg.norm(points[label] - centre) < 2
        assert (out / "meshes" / f"{LEVEL_OF_LABEL[label]}.stl").is_file()


@pytest.mark.realdata
def test_a_real_lumbar_vertebra_is_found(segmenter, realdata):
    folder = realdata / "tptbox_tests"
    ct = read_volume(folder / "sub-ct_label-22_ct.nii.gz")
    truth = read_mask(folder / "sub-ct_seg-vert_label-22_msk.nii.gz").values == 22
    found = segmenter.segment(ct).labels.values
    assert max(dice(found == label, truth) for label in np.unique(found[truth])) > 0.75
