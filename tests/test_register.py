"""`spinelib predict --register` as a user meets it, with a method that knows the truth, and once with the real one."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import SimpleITK as sitk
import torch
from matplotlib import pyplot as plt
from nibabel.affines import apply_affine
from registration_cases import LOWER, UPPER, two_vertebrae
from scipy.spatial.transform import Rotation

import spinelib
from spinelib import register
from spinelib.cli import main
from spinelib.deformation import DisplacementField, covers, read_field, rotation_deg, warp_volume
from spinelib.geometry import Volume
from spinelib.imaging.readers import read_volume
from spinelib.models.ctmr import CTMRModel, save_variants
from spinelib.polyrigid import Registration, register_polyrigid
from spinelib.register import FILES, quality_flags
from spinelib.registration_metrics import DIRECTIONS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LEVELS = {UPPER: "L3", LOWER: "L4"}
ENTRIES = [f"matrix_{i}{j}" for i in range(4) for j in range(4)]


@pytest.fixture(scope="module")
def case():
    return two_vertebrae(slice_mm=3.0, scale=0.7)


@pytest.fixture(scope="module")
def knowing(case):
    """A method that knows the truth; `seen` says what it was given."""
    seen = []

    def method(ct, ct_labels, mr, soft=None):
        seen.append((ct, ct_labels, mr, soft))
        reasons = ["", "the MR shows 12 % of it (at least 50 %)"]
        flags = pd.DataFrame({"label": list(LEVELS), "level": list(LEVELS.values()), "reason": reasons})
        flags = flags.assign(score_start=0.2, score=0.8, in_view=1.0, moved_mm=2.0, apart_mm=1.0)
        return Registration(case.field, DisplacementField.zero(ct.grid), case.transforms, flags, 1.0)

    return SimpleNamespace(method=method, seen=seen)


@pytest.fixture(autouse=True)
def truth(knowing, monkeypatch):
    knowing.seen.clear()
    monkeypatch.setattr(register, "register_polyrigid", knowing.method)
    yield knowing
    plt.close("all")


@pytest.fixture
def quick(monkeypatch):
    """Leave out the drawing."""
    for name in ("overlay", "checkerboard"):
        monkeypatch.setattr(register, name, lambda *_, **__: plt.figure(figsize=(1, 1)))
    monkeypatch.setattr(register, "vertebrae_before_after", lambda *_, **__: go.Figure())


def save(path, volume, codes="RAS"):
    image = nib.Nifti1Image(volume.values, volume.affine)
    axes = nib.orientations.axcodes2ornt(tuple(codes))
    nib.save(image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), axes)), path)
    return path


@pytest.fixture(scope="module")
def files(case, tmp_path_factory):
    """CT, MR stored as scanners store sagittal slices, CT labels."""
    folder = tmp_path_factory.mktemp("files")
    return (
        save(folder / "ct.nii.gz", case.ct, "LPS"),
        save(folder / "mr.nii.gz", case.mr, "PIR"),
        save(folder / "ct_mask.nii.gz", case.ct_labels, "LPS"),
    )


@pytest.fixture(scope="module")
def result(knowing, files):
    """Folder of one result with all its pictures."""
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="L4: the MR shows"):
        patch.setattr(register, "register_polyrigid", knowing.method)
        patch.setattr(register, "SHIPPED_WEIGHTS", "absent.safetensors")
        assert run(*files, "-o", files[0].parent / "out") == 0
    return files[0].parent / "out"


def run(ct, mr, labels, *words):
    return main(["predict", "--register", str(ct), str(mr), "--labels", str(labels), *[str(word) for word in words]])


def refused(capsys, *arguments):
    code = run(*arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    return said


def strict_json(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


# --- what is written ---


@pytest.mark.parametrize("codes", ["PIR", "LSA"])
def test_images_lie_on_the_voxels_of_the_mr_file(case, quick, tmp_path, codes):
    ct, labels = (save(tmp_path / name, v) for name, v in (("ct.nii", case.ct), ("m.nii", case.ct_labels)))
    mr, out = save(tmp_path / "mr.nii", case.mr, codes), tmp_path / "out"
    assert run(ct, mr, labels, "-o", out) == 0
    source = nib.load(mr)
    for name in ("ct_in_mr.nii.gz", "labels_in_mr.nii.gz", "displacement.nii.gz"):
        image = nib.load(out / name)
        assert image.shape[:3] == source.shape
        np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
    labels = read_volume(out / "labels_in_mr.nii.gz").values
    assert np.mean(labels[case.mr_labels.values > 0] == case.mr_labels.values[case.mr_labels.values > 0]) > 0.99
    assert set(np.unique(labels)) == set(np.unique(case.mr_labels.values))
    hounsfield = read_volume(out / "ct_in_mr.nii.gz").values
    np.testing.assert_allclose(hounsfield, warp_volume(case.ct, case.field, fill=-1000).values, atol=0.51)


def test_itk_reads_the_same_field(case, files, result):
    ct, mr = (sitk.ReadImage(str(path), sitk.sitkFloat32) for path in files[:2])
    transform = sitk.ReadTransform(str(result / "displacement.h5"))
    theirs = sitk.GetArrayFromImage(sitk.Resample(ct, mr, transform, sitk.sitkLinear, -1000.0))
    ours = sitk.GetArrayFromImage(sitk.ReadImage(str(result / "ct_in_mr.nii.gz"), sitk.sitkFloat32))
    inside = covers(case.ct.grid, case.field.moved(case.field.points_mm()))
    assert 0.8 < inside.mean() < 1
    # Apart where the border of the CT is counted to the middle or to the face of its last voxels.
    assert np.mean(np.abs(theirs - ours) > 1) < 0.02
    field = read_field(result / "displacement.nii.gz")
    points = case.field.points_mm()[4:-4:3, 4:-4:7, 4:-4:7]
    np.testing.assert_allclose(field.at(points), case.field.at(points), atol=1e-4)


def test_the_table_holds_the_motion_of_each_vertebra(case, result):
    table = pd.read_csv(result / "vertebrae.csv").set_index("label")
    assert table["level"].to_dict() == LEVELS
    for label, row in table.iterrows():
        matrix = row[ENTRIES].to_numpy(float).reshape(4, 4)
        np.testing.assert_allclose(matrix, case.transforms[label], atol=1e-5)
        turn = row[[f"rotation_{name}_deg" for name in DIRECTIONS]].to_numpy(float)
        np.testing.assert_allclose(
            Rotation.from_rotvec(turn, degrees=True).as_matrix(), case.transforms[label][:3, :3], atol=1e-5
        )
        centre = apply_affine(case.ct.affine, np.argwhere(case.ct_labels.values == label).mean(axis=0))
        way = row[[f"translation_{name}_mm" for name in DIRECTIONS]].to_numpy(float)
        np.testing.assert_allclose(apply_affine(matrix, centre - way), centre, atol=1e-3)
    assert table["procrustes_residual_mm"].max() < 0.01
    assert table["flag"].isna().tolist() == [True, False]


def test_the_record_and_the_page_say_what_was_done(result):
    assert sorted(path.name for path in result.iterdir()) == sorted(FILES)
    record = strict_json(result / "registration.json")
    assert record["inputs"] == {"ct": "ct.nii.gz", "mr": "mr.nii.gz", "labels": "ct_mask.nii.gz"}
    assert record["flags"] == ["L4: the MR shows 12 % of it (at least 50 %)"]
    assert [row["level"] for row in record["vertebrae"]] == ["L3", "L4"]
    assert record["seconds"].keys() == {"read", "register"}
    assert record["versions"]["spinelib"] == spinelib.__version__
    assert record["soft_tissue"].startswith("no network")
    page = (result / "index.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert 'role="alert">L4: the MR shows' in page
    assert page.count("<figure><img") == 2
    assert f"rotation {record['vertebrae'][0]['rotation_right_deg']:.1f}, " in page


def test_earlier_results_are_replaced_only_when_asked(files, quick, truth, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "vertebrae.csv").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert "--force" in refused(capsys, *files, "-o", out)
    assert not truth.seen
    assert (out / "vertebrae.csv").read_text() == "old"
    assert run(*files, "-o", out, "--force") == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "notes.txt"])


def test_a_full_disk_leaves_no_half_result(files, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(register, "overlay", full)
    assert "No space left" in refused(capsys, *files, "-o", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


# --- soft tissue ---


def test_weights_give_the_soft_field(case, files, quick, truth, tmp_path, capsys):
    torch.manual_seed(0)
    save_variants({"pc_rf": CTMRModel("pc_rf")}, tmp_path / "w.safetensors", {"data": "none"})
    assert run(*files, "-o", tmp_path / "out", "--weights", tmp_path / "w.safetensors") == 0
    assert truth.seen[0][3].grid.shape == case.mr.grid.shape
    told = strict_json(tmp_path / "out" / "registration.json")["soft_tissue"]
    assert told == {"network": "pc_rf", "data": "none"}
    (tmp_path / "bad.safetensors").write_text("x")
    said = refused(capsys, *files, "-o", tmp_path / "new", "--weights", tmp_path / "bad.safetensors")
    assert "not a readable safetensors" in said
    assert not (tmp_path / "new").exists()


# --- bad input ---


def moved(volume, shift_mm):
    affine = volume.affine.copy()
    affine[:3, 3] += shift_mm
    return Volume(volume.values, affine)


def mirrored(volume, axis):
    """The same voxels, said to lie the other way round."""
    turn = np.eye(4)
    turn[axis, axis] = -1
    return Volume(volume.values, turn @ volume.affine)


def bad_inputs(case, files, tmp_path):
    """Yield the three files and words of the message."""
    ct, mr, labels = files
    cut = Volume(case.ct_labels.values[:, :, :-1], case.ct_labels.affine)
    other = tmp_path / "other.nii.gz"
    yield (mr, ct, labels), "swapped"
    yield (mr, mr, save(tmp_path / "mr_mask.nii.gz", case.mr_labels, "PIR")), "Hounsfield"
    yield (ct, ct, labels), "swapped"
    yield (ct, mr, save(tmp_path / "cut.nii.gz", cut, "LPS")), "voxels"
    yield (ct, mr, save(tmp_path / "off.nii.gz", moved(case.ct_labels, 8), "LPS")), "within half a voxel"
    yield (ct, mr, ct), "whole numbers from 0 to 28"
    yield (
        (ct, mr, save(tmp_path / "none.nii.gz", Volume(case.ct_labels.values % 2 * 26, case.ct.affine), "LPS")),
        "no v",
    )
    yield (ct, save(tmp_path / "away.nii.gz", moved(case.mr, [0, 0, 500])), labels), "inside the MR"
    yield (ct, save(tmp_path / "above.nii.gz", moved(case.mr, [0, 0, 56])), labels), "inside the MR"
    volumes = {"ct": case.ct, "mask": case.ct_labels}
    for axis in (1, 2):
        paths = {name: save(tmp_path / f"{name}{axis}.nii.gz", mirrored(v, axis)) for name, v in volumes.items()}
        yield (paths["ct"], mr, paths["mask"]), "wrong orientation in the header of the CT"
    yield (ct, save(tmp_path / "slice.nii.gz", Volume(case.mr.values[10:11], case.mr.affine)), labels), "3D volume"
    yield (ct, save(tmp_path / "few.nii.gz", Volume(case.mr.values[8:12], case.mr.affine)), labels), "at least 20 mm"
    yield (tmp_path / "absent.nii.gz", mr, labels), "no file"
    yield (ct, tmp_path / "absent.nii.gz", labels), "no file"
    other.write_bytes(ct.read_bytes()[:2000])
    yield (other, mr, labels), "cut short"
    yield (ct, other, labels), "cut short"


def test_what_cannot_be_registered_is_named_and_nothing_is_written(case, files, truth, tmp_path, capsys):
    out = tmp_path / "out"
    for paths, words in bad_inputs(case, files, tmp_path):
        said = refused(capsys, *paths, "-o", out)
        assert words in said, (words, said)
        assert "Fix:" in said, said
        assert not out.exists(), words
    assert not truth.seen


def test_both_options_are_needed_and_nothing_else(files, tmp_path, capsys):
    ct, mr, labels = map(str, files)
    out = str(tmp_path / "out")
    wrong = (
        ["--register", ct, mr],
        ["--labels", labels],
        ["--register", ct, mr, "--labels", labels, "--segment", ct],
        ["--register", ct, mr, "--labels", labels, "--ap", ct],
        ["--register", ct, mr, "--labels", labels, "--spacing", "1", "1"],
    )
    for words in wrong:
        assert main(["predict", *words, "-o", out]) == 2
        assert "needs --register CT MR and --labels CT_MASK" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(files, truth, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    assert "expects a folder" in refused(capsys, *files, "-o", tmp_path / "taken")
    assert not truth.seen


# --- doubts ---


def test_doubts_have_their_reasons():
    table = pd.DataFrame(
        {"level": ["L1", "L2", "S1"], "reason": ["odd", "", ""], "procrustes_residual_mm": [0.0, 0.4, np.nan]}
    )
    volume = Volume(np.zeros((6, 8, 8)), np.diag([6.0, 1, 1, 1]))
    still = DisplacementField.zero(volume.grid)
    assert quality_flags(table, still) == [
        "L1: odd",
        "L2 is not moved as a rigid body: the field is 0.40 mm off",
        "MR slices are 6.0 mm apart: expect less certain positions",
    ]
    fine = Volume(np.zeros((8, 8, 8)), np.eye(4)).grid
    fold = -2 * np.indices(fine.shape)[0]
    folded = DisplacementField(np.stack([fold, 0 * fold, 0 * fold], -1), fine)
    assert quality_flags(table.iloc[:0], folded) == ["the field folds in 1e+02% of the voxels"]
    assert quality_flags(table.iloc[:0], DisplacementField.zero(fine)) == []


# --- the method itself ---


def test_vertebrae_are_found_and_stay_rigid(case, files, quick, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "register_polyrigid", register_polyrigid)
    before = [rotation_deg(matrix) for matrix in case.transforms.values()]
    assert min(before) > 4
    assert run(*files, "-o", tmp_path / "out") == 0
    table = pd.read_csv(tmp_path / "out" / "vertebrae.csv").set_index("label")
    for label, true in case.transforms.items():
        found = table.loc[label, ENTRIES].to_numpy(float).reshape(4, 4)
        assert rotation_deg(found[:3, :3] @ true[:3, :3].T) < 1.5
        centre = apply_affine(np.linalg.inv(true), table.loc[label, ENTRIES[3:12:4]].to_numpy(float))
        np.testing.assert_allclose(apply_affine(found, centre), apply_affine(true, centre), atol=0.6)
    assert table["procrustes_residual_mm"].max() < 0.01
    labels = read_volume(tmp_path / "out" / "labels_in_mr.nii.gz").values
    for label in LEVELS:
        both = ((labels == label) & (case.mr_labels.values == label)).sum()
        assert 2 * both / ((labels == label).sum() + (case.mr_labels.values == label).sum()) > 0.95
