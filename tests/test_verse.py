"""VerSe files: three centroid conventions, any orientation, bodies from masks, files that do not belong together."""

import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.readers import read_volume
from spinelib.imaging.verse import (
    LabelledCT,
    body_centroids_mm,
    read_centroids,
    read_labelled_ct,
    read_mask,
    write_centroids,
    write_labelled_ct,
)
from spinelib.levels import VERSE_LABELS, region

CODES = ("RAS", "PIR", "LPS", "IPL", "SAL", "ARI")


def draw_vertebra(labels, grid, label, centre, size=1.0):
    """A box with an arch: body 24 x 20 x 16 mm, a thinner process behind it, scaled by `size`."""
    right, anterior, superior = np.meshgrid(*grid.axes_mm(), indexing="ij")
    x, y, z = (c - o for c, o in zip((right, anterior, superior), centre, strict=True))
    body = (np.abs(x) <= 12 * size) & (np.abs(y) <= 10 * size) & (np.abs(z) <= 8 * size)
    arch = (np.abs(x) <= 3 * size) & (y < 0) & (y > -35 * size) & (np.abs(z) <= 4 * size)
    labels[body | arch] = label


@pytest.fixture(scope="module")
def scan() -> LabelledCT:
    """T12, T13 and a cut L1, off the axes by a few degrees."""
    grid = VolumeGrid.from_bounds((-30, -50, 0), (28, 24, 70), (1.0, 1.0, 2.0))
    labels = np.zeros(grid.shape, np.uint8)
    centroids = {19: (0.0, 2.0, 56.0), 28: (1.0, 0.0, 32.0), 20: (2.0, 0.0, 4.0)}
    for label, centre in centroids.items():
        draw_vertebra(labels, grid, label, centre)
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", (6, -4, 5), degrees=True).as_matrix()
    affine = turn @ grid.affine
    ct = np.random.default_rng(0).normal(40, 10, grid.shape).round().astype(np.float32)
    ct[labels > 0] += 300
    world = {label: turn[:3, :3] @ np.array(centre) for label, centre in centroids.items()}
    return LabelledCT("toy7_dir-sag", Volume(ct, affine), Volume(labels, affine), world, frozenset({20}))


@pytest.fixture
def files(scan, tmp_path):
    return write_labelled_ct(tmp_path, scan, "training", "PIR")


def rewrite(path, change):
    """Store an image again with another array or affine."""
    image = nib.load(path)
    array, affine = change(np.asarray(image.dataobj), image.affine.copy())
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.mark.parametrize("codes", CODES)
def test_a_written_scan_reads_back_in_every_orientation(scan, tmp_path, codes):
    ct, mask, points = write_labelled_ct(tmp_path, scan, "validation", codes)
    assert "".join(nib.aff2axcodes(nib.load(ct).affine)) == codes
    assert ct.relative_to(tmp_path).as_posix() == "dataset-02validation/rawdata/sub-toy7/sub-toy7_dir-sag_ct.nii.gz"
    assert mask.parent == points.parent == tmp_path / "dataset-02validation" / "derivatives" / "sub-toy7"
    back = read_labelled_ct(ct, mask, points)
    assert back.key == "sub-toy7_dir-sag_ct"
    assert np.abs(back.ct.affine - scan.ct.affine).max() < 1e-4  # float32 of the NIfTI header
    assert np.array_equal(back.ct.values, scan.ct.values)
    assert set(np.unique(back.labels.values)) == {0, 19, 28}
    assert np.array_equal(back.labels.values == 28, scan.labels.values == 28)
    assert set(back.centroids_mm) == {19, 28}
    for label, point in back.centroids_mm.items():
        assert np.abs(point - scan.centroids_mm[label]).max() < 1e-4


def test_an_oblique_affine_stays_oblique(scan, files):
    back = read_volume(files[1])
    off_axis = back.affine[:3, :3] - np.diag(np.diag(back.affine[:3, :3]))
    assert np.abs(off_axis).max() > 0.05
    assert np.allclose(back.affine, scan.labels.affine, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-40, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    codes=st.sampled_from(CODES),
    point=st.tuples(*[st.floats(-400, 400)] * 3),
)
def test_points_come_back_through_any_affine(tmp_path_factory, angles, spacing, codes, point):
    folder = tmp_path_factory.mktemp("points")
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * spacing
    affine[:3, 3] = 13.5, -200.25, 40
    change = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    affine = affine @ nib.orientations.inv_ornt_aff(change, (4, 5, 6))
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.uint8), affine)
    nib.save(image, folder / "image.nii")
    stored = nib.load(folder / "image.nii").affine
    path = write_centroids(folder / "points.json", {3: point, 28: (1, 2, 3)}, stored)
    back = read_centroids(path, folder / "image.nii")
    assert np.abs(back[3] - point).max() < 1e-9
    assert json.loads(path.read_text())[0] == {"direction": list(nib.aff2axcodes(stored))}


@pytest.mark.parametrize(
    ("convention", "place"),
    [("complete", (79.1, 40.9, 32.3)), ("miccai2020", (79.1, 40.9, 64.601)), ("miccai2019", (40.9, 79.1, 56.399))],
)
def test_three_conventions_mean_the_same_point(tmp_path, convention, place):
    """T9 of sub-verse004 (161 x 338 x 61 voxels of 1 x 1 x 2.000296 mm, axes P, I, R) in each of them."""
    affine = np.array([[0, 0, 2.000296, -77], [-1, 0, 0, 218], [0, -1, 0, -808], [0, 0, 0, 1]], float)
    nib.save(nib.Nifti1Image(np.zeros((161, 338, 61), np.uint8), affine), tmp_path / "image.nii.gz")
    records = [{"label": 16} | dict(zip("XYZ", place, strict=True)), {"label": 17, "X": float("nan"), "Y": 1, "Z": 2}]
    if convention == "complete":
        records.insert(0, {"direction": ["P", "I", "R"]})
    (tmp_path / "points.json").write_text(json.dumps(records))
    found = read_centroids(tmp_path / "points.json", tmp_path / "image.nii.gz", convention)
    assert set(found) == {16}  # NaN is left out
    assert np.abs(found[16] - [32.3 * 2.000296 - 77, 218 - 79.1, -808 - 40.9]).max() < 0.01


def test_masks_of_floats_are_read_as_labels(files):
    rewrite(files[1], lambda array, affine: (array.astype(np.float64), affine))
    mask = read_mask(files[1])
    assert mask.values.dtype == np.uint8
    assert set(np.unique(mask.values)) == {0, 19, 28}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, m: (np.where(a == 19, 29, a), m), "from 0 to 28"),
        (lambda a, m: (np.where(a == 19, 18.5, a), m), "with fractions"),
        (lambda a, m: (-a.astype(np.int16), m), "from -28"),
    ],
)
def test_values_that_are_no_labels_are_refused(files, change, words):
    with pytest.raises(InputError, match=words):
        read_mask(rewrite(files[1], change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, m: (a[:-1], m), "does not fit"),
        (lambda a, m: (a, m + np.outer([1, 0, 0, 0], [0, 0, 0, 3.0])), "3.00 mm"),
    ],
)
def test_a_mask_on_other_voxels_is_refused(files, change, words):
    rewrite(files[1], change)
    with pytest.raises(InputError, match=words):
        read_labelled_ct(*files)


def test_points_of_another_scan_are_refused(scan, files):
    affine = nib.load(files[1]).affine
    swapped = {19: scan.centroids_mm[28] - [0, 0, 20], 28: scan.centroids_mm[19]}
    write_centroids(files[2], swapped, affine)
    with pytest.raises(InputError, match="point of T1[23] lies more than 10 mm"):
        read_labelled_ct(*files)


def test_labels_may_miss_on_either_side(scan, files):
    write_centroids(files[2], {19: scan.centroids_mm[19], 21: np.zeros(3)}, nib.load(files[1]).affine)
    assert set(read_labelled_ct(*files).centroids_mm) == {19, 21}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"direction": ["R", "A", "S"]}]', "expected the axes of .*P I R, given R A S"),
        ('[{"label": 3, "X": 1, "Y": 1, "Z": 1}]', "no direction record"),
        ('[{"direction": ["P", "I", "R"]}, {"label": 3, "X": 1, "Y": 1}]', "label, X, Y, Z"),
        ('[{"direction": ["P", "I", "R"]}, {"label": 41, "X": 1, "Y": 1, "Z": 1}]', "given 41"),
        ('[{"direction": ["P", "I", "R"]}' + ', {"label": 3, "X": 1, "Y": 1, "Z": 1}' * 2 + "]", "twice"),
        ('{"label": 3}', "list of records"),
        ("not json", "readable JSON"),
    ],
)
def test_bad_centroid_files_are_named(files, text, words):
    files[2].write_text(text)
    with pytest.raises(InputError, match=words):
        read_centroids(files[2], files[1])


def test_unknown_names_are_refused(scan, files, tmp_path):
    with pytest.raises(InputError, match="convention 'verse21'"):
        read_centroids(files[2], files[1], "verse21")
    with pytest.raises(InputError, match="split 'train'"):
        write_labelled_ct(tmp_path, scan, "train")
    for codes in ("RRS", "XYZ", "RA"):
        with pytest.raises(InputError, match="one letter each"):
            write_labelled_ct(tmp_path, scan, "test", codes)
    alone = LabelledCT("toy", scan.ct, scan.labels, scan.centroids_mm, frozenset({19, 20, 28}))
    with pytest.raises(InputError, match="no vertebra lies whole"):
        write_labelled_ct(tmp_path, alone, "test")
    with pytest.raises(InputError, match="rename the series"):
        write_labelled_ct(tmp_path, LabelledCT("a/b", scan.ct, scan.labels, {}), "test")


@pytest.mark.parametrize("spacing", [(0.4, 0.4, 1.25), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(("label", "size"), [(4, 0.6), (21, 1.7)])
def test_the_body_of_a_drawn_vertebra_is_found(spacing, label, size):
    grid = VolumeGrid.from_bounds((-25, -65, 0), (25, 20, 40), spacing)
    labels = np.zeros(grid.shape, np.uint8)
    draw_vertebra(labels, grid, label, (1.0, -2.0, 20.0), size)
    assert np.abs(body_centroids_mm(Volume(labels, grid.affine))[label] - [1.0, -2.0, 20.0]).max() <= 1.2


def test_a_mask_riddled_with_holes_keeps_its_body(scan):
    labels = scan.labels.values.copy()
    labels[np.random.default_rng(1).random(labels.shape) < 0.02] = 0
    found = body_centroids_mm(Volume(labels, scan.labels.affine))
    assert np.linalg.norm(found[28] - scan.centroids_mm[28]) < 2


def test_a_massive_process_is_no_body():
    grid = VolumeGrid.from_bounds((-40, -50, -20), (40, 30, 20), 1.0)
    labels = np.zeros(grid.shape, np.uint8)
    draw_vertebra(labels, grid, 24, (0, 0, 0))
    right, anterior, superior = np.meshgrid(*grid.axes_mm(), indexing="ij")
    labels[(right - 22) ** 2 + (anterior + 30) ** 2 + superior**2 < 15**2] = 24
    assert np.abs(body_centroids_mm(Volume(labels, grid.affine))[24]).max() < 1


def test_one_voxel_and_the_sacrum():
    labels = np.zeros((5, 5, 5), np.uint8)
    labels[1, 2, 3], labels[4] = 7, 26
    found = body_centroids_mm(Volume(labels, np.eye(4)))
    assert found.keys() == {7}
    assert found[7].tolist() == [1, 2, 3]


def test_bodies_of_the_phantom_are_found():
    from spinelib.phantom.population import sample_subject
    from spinelib.phantom.render import tissue_volume
    from spinelib.phantom.vertebra import subject_shapes

    subject = sample_subject(2, curves="enriched", degenerative=True)
    centres = subject.poses[:, :3, 3]
    grid = VolumeGrid.from_bounds(centres.min(0) - [45, 75, 20], centres.max(0) + [45, 25, 20], 2.0)
    labels = tissue_volume(subject, subject_shapes(subject), grid).labels
    found = body_centroids_mm(Volume(labels, grid.affine))
    errors = {}
    for level, centre in zip(subject.levels, centres, strict=True):
        part = level if level in ("C1", "C2") else region(level)
        errors.setdefault(part, []).append(np.linalg.norm(found[VERSE_LABELS[level]] - centre))
    means = {part: np.mean(values) for part, values in errors.items()}
    limits = {"C1": 4, "C2": 4, "cervical": 1.2, "thoracic": 1.6, "lumbar": 1.8}
    assert {part: mean for part, mean in means.items() if mean > limits[part]} == {}
    assert means.keys() == limits.keys()


@pytest.mark.realdata
def test_bodies_of_a_real_mask_match_its_annotation(realdata):
    folder = realdata / "verse_sample"
    mask = folder / "sub-verse004_seg-vert_msk.nii.gz"
    truth = read_centroids(folder / "sub-verse004_seg-subreg_ctd.json", mask)
    labels = read_mask(mask)
    assert list(truth) == list(range(16, 25))
    assert np.count_nonzero(labels.values == 16) == 14110
    steps = np.linalg.norm(np.diff(np.array(list(truth.values())), axis=0), axis=1)
    assert np.abs(steps - [22.5, 25.9, 29.0, 24.8, 28.7, 35.0, 33.1, 33.0]).max() < 1  # of another annotation
    found = body_centroids_mm(labels)
    errors = [np.linalg.norm(found[label] - truth[label]) for label in truth]
    assert np.mean(errors) < 1.6
    assert max(errors) < 2.2
