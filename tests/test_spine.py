"""Curves and Spine: round trips, mirror, motion, bad input."""

import numpy as np
import pytest
import trimesh

from spinelib.errors import InputError
from spinelib.geometry import PlanarTransform
from spinelib.levels import COLOURS, VERSE_LABELS, VERTEBRAE, region
from spinelib.spine import CURVE_COLUMNS, Curves, Spine


@pytest.fixture
def curves():
    heights = np.linspace(450, 0, 120)
    centre = 20 * np.sin(heights / 80)
    depth = 15 * np.cos(heights / 120)
    return Curves(heights, np.stack([centre + 18, centre, centre - 16]), np.stack([depth + 14, depth, depth - 15]))


def test_array_frame_and_csv_round_trips(curves, tmp_path):
    assert np.allclose(Curves.from_array(curves.heights_mm, curves.to_array()).to_array(), curves.to_array())
    assert np.allclose(Curves.from_frame(curves.to_frame()).to_array(), curves.to_array())
    curves.save_csv(tmp_path / "c.csv")
    assert np.allclose(Curves.load_csv(tmp_path / "c.csv").to_array(), curves.to_array(), atol=6e-4)


def test_unnamed_columns_are_refused(curves):
    with pytest.raises(InputError, match="must be"):
        Curves.from_array(curves.heights_mm, curves.to_array(), CURVE_COLUMNS[::-1])


def test_mirror_swaps_the_edges_and_undoes_itself(curves):
    mirror = curves.mirrored()
    assert np.allclose(mirror.coronal_mm[0], -curves.coronal_mm[2])
    assert np.allclose(mirror.mirrored().to_array(), curves.to_array())


def test_motion_and_its_inverse_cancel(curves):
    motion = PlanarTransform(5.0, 12.0, -20.0, 3.0, 200.0)
    back = curves.moved(motion).moved(motion.inverse())
    inner = curves.heights_mm[5:-5]
    assert np.abs(back.at(inner).to_array() - curves.at(inner).to_array()).max() < 0.15


def test_a_pure_shift_moves_everything_by_it(curves):
    moved = curves.moved(PlanarTransform(0.0, 7.0, 11.0))
    assert np.allclose(moved.heights_mm, curves.heights_mm + 11)
    assert np.allclose(moved.coronal_mm, curves.coronal_mm + 7)
    assert np.allclose(moved.sagittal_mm, curves.sagittal_mm)


def test_a_folding_rotation_is_refused(curves):
    with pytest.raises(InputError, match="runs upwards"):
        curves.moved(PlanarTransform(85.0))


def test_depth_removed_has_zero_mean(curves):
    assert abs(curves.depth_removed().sagittal_mm[1].mean()) < 1e-9


@pytest.mark.parametrize(
    ("heights", "words"),
    [([0.0, 1.0, 2.0], "fall strictly"), ([2.0, np.nan, 0.0], "finite"), ([2.0], "K >= 2")],
)
def test_bad_heights_are_named(heights, words):
    with pytest.raises(InputError, match=words):
        Curves(np.array(heights), np.zeros((3, len(heights))), np.zeros((3, len(heights))))


def test_spine_file_round_trip(curves, tmp_path):
    box = trimesh.creation.box((30, 20, 10))
    spine = Spine(("L1",), np.eye(4)[None], (box,), curves, box, {"cobb_deg": 12.5}, "test")
    spine.save(tmp_path / "s.npz")
    again = Spine.load(tmp_path / "s.npz")
    assert again.levels == ("L1",)
    assert again.angles == {"cobb_deg": 12.5}
    assert np.allclose(again.curves.to_array(), curves.to_array())
    assert np.isclose(again.meshes[0].volume, 6000)


def test_exported_meshes_keep_size_and_axes(tmp_path):
    box = trimesh.creation.box((30, 20, 10))
    box.apply_translation((100, 0, 0))
    spine = Spine(column_mesh=box)
    spine.export_stl(tmp_path / "s.stl")
    spine.export_glb(tmp_path / "s.glb")
    stl = trimesh.load(tmp_path / "s.stl")
    glb = trimesh.load(tmp_path / "s.glb").to_geometry()
    assert np.allclose(stl.extents, (30, 20, 10))
    assert np.allclose(glb.extents, (0.03, 0.01, 0.02), atol=1e-6)  # metres; superior is glTF's Y
    assert np.isclose(glb.volume, 6e-6)
    assert glb.centroid[0] < 0  # the patient's right is glTF's -X when she faces the viewer


def test_unusable_spine_files_are_named(tmp_path):
    bad = tmp_path / "s.npz"
    bad.write_bytes(b"not a zip")
    for path in (bad, tmp_path / "absent.npz"):
        with pytest.raises(InputError, match="is not a spine file"):
            Spine.load(path)
    with pytest.raises(InputError, match="no surface"):
        Spine().surfaces()


def test_levels_follow_verse():
    assert [VERSE_LABELS[v] for v in ("C1", "T1", "L1", "L5", "L6", "S1", "T13")] == [
        1,
        8,
        20,
        24,
        25,
        26,
        28,
    ]
    assert len(VERTEBRAE) == 24 <= len(COLOURS)
    assert region("T13") == "thoracic"
    with pytest.raises(ValueError, match="unknown level 'X1'"):
        region("X1")
