"""CT/MR pairs: folders, round trips, and what cannot be registered."""

from dataclasses import replace

import numpy as np
import pytest
from drawn_registration import LABELS, drawn_pair

from spinelib.deformation import DisplacementField
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.pairs import check_pair, list_pairs, read_pair, vertebra_labels, write_pair
from spinelib.imaging.readers import write_volume


def with_labels(pair, change, which="ct_labels"):
    volume = getattr(pair, which)
    return replace(pair, **{which: Volume(change(volume.values.copy()), volume.affine)})


def flipped(volume, axis):
    """The same array whose header says that an axis runs the other way."""
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, axis] * (volume.values.shape[axis] - 1)
    affine[:3, axis] *= -1
    return Volume(volume.values, affine)


def test_round_trip_with_truth(tmp_path):
    pair = drawn_pair()
    matrix = np.eye(4)
    matrix[:3, 3] = 3, 0, 0
    field = DisplacementField.rigid(matrix, pair.mr.grid)
    pair = replace(pair, field=field, transforms=dict.fromkeys(LABELS, matrix), contrast="t2")
    folder = write_pair(tmp_path / "train" / "001", pair)
    names = {"ct.nii.gz", "ct_mask.nii.gz", "mr_t2.nii.gz", "mr_mask.nii.gz", "field.nii.gz", "transforms.json"}
    assert {path.name for path in folder.iterdir()} == names
    again = read_pair(folder)
    assert again.key == "drawn" and again.contrast == "t2" and again.flags == ()
    assert np.array_equal(again.ct.values, np.rint(pair.ct.values))
    assert np.allclose(again.mr.values, pair.mr.values, atol=np.ptp(pair.mr.values) / 1e5)
    for name in ("ct", "ct_labels", "mr", "mr_labels"):
        assert np.allclose(getattr(again, name).affine, getattr(pair, name).affine)
    assert np.array_equal(again.ct_labels.values, pair.ct_labels.values)
    assert np.array_equal(again.mr_labels.values, pair.mr_labels.values)
    assert np.allclose(again.field.values, field.values, atol=1e-5)
    assert list(again.transforms) == list(LABELS) and np.allclose(again.transforms[LABELS[0]], matrix)


def test_files_of_any_name_without_an_mr_mask(tmp_path):
    folder = write_pair(tmp_path / "001", replace(drawn_pair(), mr_labels=None))
    assert not (folder / "mr_mask.nii.gz").exists()
    assert read_pair(folder).mr_labels is None
    files = {"ct": "ct.nii.gz", "ct_mask": "ct_mask.nii.gz", "mr": "mr_t1.nii.gz"}
    pair = read_pair(None, **{name: folder / file for name, file in files.items()})
    assert pair.key == "ct" and pair.field is None and pair.transforms is None and pair.contrast == "t1"
    assert vertebra_labels(pair.ct_labels) == list(LABELS)


def test_splits_are_listed(tmp_path):
    for key in ("002", "001", ".003"):
        (tmp_path / "val" / key).mkdir(parents=True)
    (tmp_path / "val" / "quarantine.csv").touch()
    assert [path.name for path in list_pairs(tmp_path, "val")] == ["001", "002"]
    with pytest.raises(InputError, match="no pairs in .*train"):
        list_pairs(tmp_path, "train")


def test_missing_and_doubled_files(tmp_path):
    folder = write_pair(tmp_path / "001", drawn_pair())
    (folder / "mr_t1.nii.gz").rename(folder / "mr_t2.nii.gz")
    assert read_pair(folder).contrast == "t2"
    (folder / "mr_t1.nii.gz").write_bytes((folder / "mr_t2.nii.gz").read_bytes())
    with pytest.raises(InputError, match="holds mr_t1.nii.gz and mr_t2.nii.gz"):
        read_pair(folder)
    (folder / "ct_mask.nii.gz").unlink()
    (folder / "mr_t1.nii.gz").unlink()
    with pytest.raises(InputError, match="no ct_mask in"):
        read_pair(folder)
    with pytest.raises(InputError, match="no folder"):
        read_pair(tmp_path / "002")


def test_labels_not_on_the_grid(tmp_path):
    pair = drawn_pair()
    folder = write_pair(tmp_path / "001", pair)
    write_volume(folder / "ct_mask.nii.gz", Volume(pair.ct_labels.values[:-2], pair.ct.affine))
    with pytest.raises(InputError, match=r"ct_mask.nii.gz does not fit ct.nii.gz: expected \(32, 32, 40\)"):
        read_pair(folder)
    moved = pair.ct.affine.copy()
    moved[2, 3] += 1.0
    write_volume(folder / "ct_mask.nii.gz", Volume(pair.ct_labels.values, moved))
    with pytest.raises(InputError, match="does not lie where .* given 1.00 mm"):
        read_pair(folder)
    write_volume(folder / "ct_mask.nii.gz", pair.ct_labels)
    write_volume(folder / "mr_mask.nii.gz", pair.ct_labels)
    with pytest.raises(InputError, match="mr_mask.nii.gz does not fit mr_t1.nii.gz"):
        read_pair(folder)


def test_swapped_or_wrong_units():
    pair = drawn_pair()
    positive = Volume(np.abs(pair.ct.values), pair.ct.affine)
    with pytest.raises(InputError, match="swapped"):
        check_pair(replace(pair, ct=positive, mr=Volume(pair.mr.values * 3 - 500, pair.mr.affine)))
    with pytest.raises(InputError, match="expected a CT in Hounsfield units"):
        check_pair(replace(pair, ct=positive))
    with pytest.raises(InputError, match="not a second CT"):
        check_pair(replace(pair, mr=pair.ct, mr_labels=None))


def test_a_little_negative_signal_from_resampling_is_fine():
    pair = drawn_pair()
    values = pair.mr.values * 100
    values[0, 0, 0] = -200.0  # ringing, a hundredth of the signal
    assert check_pair(replace(pair, mr=Volume(values, pair.mr.affine))) == ()


@pytest.mark.parametrize(("axis", "words"), [(1, "bodies lie .* behind"), (2, "numbered upwards")])
@pytest.mark.parametrize("modality", ["ct", "mr"])
def test_wrong_orientation_in_the_header(axis, words, modality):
    pair = drawn_pair()
    changed = {name: flipped(getattr(pair, name), axis) for name in (modality, f"{modality}_labels")}
    with pytest.raises(InputError, match=f"wrong orientation in the header of the {modality.upper()}.*{words}"):
        check_pair(replace(pair, **changed))


def test_left_and_right_cannot_be_told():
    pair = drawn_pair()
    assert check_pair(replace(pair, ct=flipped(pair.ct, 0), ct_labels=flipped(pair.ct_labels, 0))) == ()


def test_no_vertebra_and_no_overlap():
    pair = drawn_pair()
    with pytest.raises(InputError, match="no vertebra"):
        check_pair(with_labels(pair, lambda v: np.where(v > 0, 26, 0).astype(np.uint8)))
    far = pair.mr.affine.copy()
    far[2, 3] += 300.0
    with pytest.raises(InputError, match="no labelled vertebra of the CT lies inside the MR"):
        check_pair(replace(pair, mr=Volume(pair.mr.values, far), mr_labels=None))


def test_different_label_sets_are_flagged_unless_nothing_is_common():
    pair = drawn_pair()
    assert check_pair(pair) == ()
    fewer = with_labels(pair, lambda v: np.where(v == 21, 0, v).astype(np.uint8), "mr_labels")
    assert check_pair(fewer) == ("labelled in the CT only: L2",)
    other = with_labels(pair, lambda v: np.where(v > 0, v + 2, 0).astype(np.uint8), "mr_labels")
    with pytest.raises(InputError, match="no vertebra is labelled in both masks: CT L1 L2; MR L3 L4"):
        check_pair(other)
    other = with_labels(pair, lambda v: np.where(v > 0, v + 1, 0).astype(np.uint8), "mr_labels")
    assert check_pair(other) == ("labelled in the CT only: L1", "labelled in the MR only: L3")


def test_vertebrae_beyond_the_mr_are_flagged():
    pair = drawn_pair()
    upper = pair.mr.affine.copy()
    upper[2, 3] += 30.0
    cut = replace(pair, mr=Volume(pair.mr.values[..., :20], upper), mr_labels=None)
    assert check_pair(cut) == ("outside the MR: L2",)
