"""Standing phantoms and scans in VerSe's folders as pairs of radiographs: truth, cache, quarantine."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from drawn_pairs import drawn_ct
from scipy.spatial.transform import Rotation

from spinelib import radiograph_cohort
from spinelib.errors import InputError
from spinelib.imaging.radiograph_pairs import CUBE_MM, LABELS, PATCH, BiplanarSubject, cube_affine, make_pair
from spinelib.imaging.verse import write_labelled_ct
from spinelib.levels import LEVEL_OF_LABEL
from spinelib.phantom.render import tissue_volume
from spinelib.phantom.vertebra import subject_shapes, vertebra_mesh
from spinelib.radiograph_cohort import (
    BEARINGS,
    cache_biplanar_cohort,
    phantom_pair,
    radiographed_person,
    render_biplanar_cohort,
)

T13_SEED = 4
"""Of a person with thirteen thoracic vertebrae."""


@pytest.fixture(scope="module")
def pair():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(radiograph_cohort, "_VOXEL_MM", 6.0)
        return phantom_pair(T13_SEED)


def test_the_person_stands_and_is_the_same_each_time():
    subject, motion = radiographed_person(T13_SEED)
    again, same = radiographed_person(T13_SEED)
    assert subject.posture == "standing" and "T13" in subject.levels
    assert np.array_equal(subject.poses, again.poses) and np.array_equal(motion, same)
    assert np.allclose(motion[:3, :3] @ motion[:3, :3].T, np.eye(3)) and np.linalg.det(motion) == pytest.approx(1)
    assert np.degrees(np.arccos((np.trace(motion[:3, :3]) - 1) / 2)) < 12
    assert not np.array_equal(radiographed_person(5)[1], motion)


def test_who_lies_is_bent_more_than_who_stands():
    bent = {
        bearing: np.array([np.abs(lean_deg(radiographed_person(seed, bearing)[1])) for seed in range(13)])
        for bearing in BEARINGS
    }
    assert bent["standing"].max() < 3.1 and 12 < bent["lying"].max() < 20.1
    assert radiographed_person(0, "lying")[0].posture == "supine"
    with pytest.raises(InputError, match="unknown bearing 'sitting'. Expected one of: 'standing', 'lying'"):
        radiographed_person(0, "sitting")


def lean_deg(motion):
    return Rotation.from_matrix(motion[:3, :3]).as_euler("xyz", degrees=True)[0]


@pytest.mark.parametrize("lean", [-20, 20])
def test_the_box_holds_skin_to_skin_of_whoever_is_bent(lean, monkeypatch):
    monkeypatch.setattr(radiograph_cohort, "_VOXEL_MM", 6.0)
    subject, motion = radiographed_person(T13_SEED)
    motion[:3, :3] = Rotation.from_euler("x", lean, degrees=True).as_matrix()
    grid = radiograph_cohort._trunk_grid(subject, motion)
    tissue = tissue_volume(subject, subject_shapes(subject), grid, motion).fractions.sum(0)
    spine = motion @ subject.poses[subject.index("T2") :]  # before T1 hangs the chin
    rows = [np.searchsorted(grid.axes_mm()[2], height) for height in (spine[-1, 2, 3], spine[0, 2, 3])]
    beside = [np.searchsorted(grid.axes_mm()[0], spine[:, 0, 3].mean() + side) for side in (-60, 60)]
    trunk = tissue[slice(*beside), :, slice(*rows)]
    assert trunk[:, trunk.shape[1] // 2].max() > 0.9
    assert trunk[:, 0].max() < 0.01 and trunk[:, -1].max() < 0.01


def test_t1_to_l5_with_their_frames(pair):
    assert pair.labels == LABELS
    subject, motion = radiographed_person(T13_SEED)
    for number, label in enumerate(pair.labels):
        pose = motion @ subject.poses[subject.index(LEVEL_OF_LABEL[label])]
        assert np.allclose(pair.bodies_mm[number], pose[:3, 3])
        assert np.allclose(pair.frames[number], pose[:3, :3])


@pytest.mark.parametrize("level", ["T1", "T7", "L3"])
def test_masks_are_the_vertebrae_whole(pair, level):
    subject, _ = radiographed_person(T13_SEED)
    number = [LEVEL_OF_LABEL[label] for label in pair.labels].index(level)
    mask = pair.masks.cut(number, (-20, -20, -20), 104)
    mesh = vertebra_mesh(subject_shapes(subject)[subject.index(level)], 1.5)
    assert mask.sum() * CUBE_MM**3 == pytest.approx(mesh.volume, rel=0.04)
    # the corners of the mesh's box, back in the world, enclose the mask
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = pair.frames[number], pair.bodies_mm[number]
    surface = mesh.vertices @ pose[:3, :3].T + pose[:3, 3]
    affine = cube_affine(pair.bodies_mm[number])
    inside = (np.argwhere(mask) - 20) * CUBE_MM + affine[:3, 3]
    assert np.allclose(inside.min(0), surface.min(0), atol=2.6)  # the gap at the facets is not labelled
    assert np.allclose(inside.max(0), surface.max(0), atol=2.6)


def test_vertebrae_do_not_overlap(pair):
    for number in range(len(pair.labels) - 1):
        near = []
        for which in (number, number + 1):
            affine = cube_affine(pair.bodies_mm[which])
            points = (np.argwhere(pair.masks.cut(which, (-20, -20, -20), 104)) - 20) * CUBE_MM + affine[:3, 3]
            near.append({tuple(p) for p in np.rint(points / 0.75).astype(int)})
        assert len(near[0] & near[1]) == 0


def test_radiographs_show_the_body_from_skin_to_skin(pair):
    for beam, image, shadows in zip(pair.beams, pair.radiographs, pair.shadows["whole"], strict=True):
        assert image.shape == beam.shape
        bone = np.zeros(image.shape, bool)
        bone[:PATCH, :PATCH] |= shadows.cut(0, (0, 0), PATCH)
        assert bone.any()
        rows, cols = np.rint(beam.project(pair.bodies_mm)).astype(int).T
        assert (image[rows, cols] > 1.5).all() and np.isfinite(image).all()


def fails_at(bad, seed, bearing):
    if seed == bad:
        raise RuntimeError("this one fails")
    return make_pair(drawn_ct(f"{bearing}-{seed:06d}"))


def test_cohort_keeps_what_is_there_and_quarantines(tmp_path, monkeypatch):
    monkeypatch.setattr(radiograph_cohort, "phantom_pair", partial(fails_at, 8))
    paths = render_biplanar_cohort(tmp_path, 3, seed=7, n_jobs=1)
    assert [p.stem for p in paths] == ["standing-000007", "standing-000009"]
    reasons = pd.read_csv(tmp_path / "quarantine.csv")
    assert reasons.to_numpy().tolist() == [["standing-000008", "RuntimeError: this one fails"]]
    stamps = [p.stat().st_mtime_ns for p in paths]
    monkeypatch.setattr(radiograph_cohort, "phantom_pair", partial(fails_at, -1))
    again = render_biplanar_cohort(tmp_path, 4, seed=7, n_jobs=1)
    assert [p.stem for p in again] == [f"standing-{i:06d}" for i in (7, 8, 9, 10)]
    assert [paths[0].stat().st_mtime_ns, paths[1].stat().st_mtime_ns] == stamps
    assert BiplanarSubject.load(again[1]).key == "standing-000008"


def test_nobody_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(radiograph_cohort, "phantom_pair", partial(fails_at, 0))
    with pytest.raises(InputError, match="none of 1 .* this one fails"):
        render_biplanar_cohort(tmp_path, 1, n_jobs=1)
    with pytest.raises(InputError, match="none of 0"):
        render_biplanar_cohort(tmp_path, 0, n_jobs=1)


def test_scans_in_the_folders_of_verse(tmp_path):
    root = tmp_path / "release"
    write_labelled_ct(root, drawn_ct("verse500"), "training", "PIR")
    (ct, mask, _) = write_labelled_ct(root, drawn_ct("verse501"), "test", "LPS")
    mask.unlink()
    paths = cache_biplanar_cohort(root, tmp_path / "cache")
    assert [p.stem for p in paths] == ["verse500"]
    assert BiplanarSubject.load(paths[0]).labels == (20, 21)
    reasons = pd.read_csv(tmp_path / "cache" / "quarantine.csv")
    assert reasons["key"].tolist() == ["verse501"] and "no mask" in reasons["reason"][0]
    with pytest.raises(InputError, match="none of"):
        cache_biplanar_cohort(root, tmp_path / "cache2", splits=("validation",))
