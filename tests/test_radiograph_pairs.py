"""Pairs of radiographs of a labelled CT: analytic boxes, strips, masks in bits, files."""

import numpy as np
import pytest
from drawn_pairs import BODIES_MM, BOXES_MM, drawn_ct
from hypothesis import given
from hypothesis import strategies as st

from spinelib.errors import InputError
from spinelib.geometry import Volume
from spinelib.imaging.drr import attenuation_per_mm
from spinelib.imaging.radiograph_pairs import (
    BEHIND_MM,
    CUBE,
    CUBE_MM,
    LABELS,
    PATCH,
    REACH_MM,
    BiplanarSubject,
    PackedMasks,
    cube_affine,
    make_pair,
    patch_corner,
)
from spinelib.imaging.verse import LabelledCT


@pytest.fixture(scope="module")
def pair():
    return make_pair(drawn_ct())


def indexed(affine, points):
    inverse = np.linalg.inv(affine)
    return points @ inverse[:3, :3].T + inverse[:3, 3]


def cube_of(pair, label):
    number = pair.labels.index(label)
    return pair.masks.cut(number, (0, 0, 0), CUBE), cube_affine(pair.bodies_mm[number])


def test_levels_and_the_middle_of_the_cube():
    assert LABELS == tuple(range(8, 25))
    middle = cube_affine([1.0, 2.0, 3.0]) @ [*[(CUBE - 1) / 2] * 3, 1]
    assert np.allclose(middle[:3], [1.0, 2.0 - BEHIND_MM, 3.0])


def test_vertebrae_at_the_border_are_left_out(pair):
    assert pair.labels == (20, 21)
    scan = drawn_ct()
    scan = LabelledCT("cut", scan.ct, scan.labels, scan.centroids_mm, frozenset({20}))
    assert make_pair(scan).labels == (21,)


def test_water_attenuates_by_its_depth(pair):
    beam, image = pair.beams[0], pair.radiographs[0].astype(float)
    row, col = np.rint(beam.project(np.array([-45.0, 0.0, 10.0]))).astype(int)
    away = beam.pixels_mm()[row, col] - beam.source_mm
    depth = 160 * np.linalg.norm(away) / abs(away[1])
    assert image[row, col] == pytest.approx(depth * float(attenuation_per_mm(np.zeros(1))), rel=2e-3)


def test_bone_is_bright_where_it_is_projected(pair):
    for view, beam in enumerate(pair.beams):
        (row, col), _ = np.rint(beam.project(pair.bodies_mm)).astype(int)
        beside = beam.project(pair.bodies_mm[0] + [-50.0, 45.0, 0.0])
        assert pair.radiographs[view][row, col] > pair.radiographs[view][tuple(np.rint(beside).astype(int))] + 0.5


@pytest.mark.parametrize("label", [20, 21])
def test_mask_has_the_volume_and_place_of_the_boxes(pair, label):
    mask, affine = cube_of(pair, label)
    assert mask.sum() * CUBE_MM**3 == pytest.approx((drawn_ct().labels.values == label).sum() * 2.0**3, rel=0.08)
    for centre, _ in BOXES_MM[label]:
        assert mask[tuple(np.rint(indexed(affine, BODIES_MM[label] + centre)).astype(int))]
    centre, size = BOXES_MM[label][2]
    mirrored = BODIES_MM[label] + centre * [-1, 1, 1]
    assert not mask[tuple(np.rint(indexed(affine, mirrored)).astype(int))]


def test_orientation_of_the_array_does_not_matter(pair):
    scan = drawn_ct(affine=np.diag([-2.0, 2.0, -2.0, 1.0]))
    assert np.array_equal(cube_of(make_pair(scan), 21)[0], cube_of(pair, 21)[0])


def test_shadows_are_the_silhouettes_of_the_boxes(pair):
    for number, label in enumerate(pair.labels):
        boxes = BOXES_MM[label] + [BODIES_MM[label], [0, 0, 0]]
        for view, beam in enumerate(pair.beams):
            corner = patch_corner(beam, pair.bodies_mm[number])
            whole = pair.shadows["whole"][view].cut(number, corner, PATCH)
            body = pair.shadows["body"][view].cut(number, corner, PATCH)
            assert not (body & ~whole).any()
            rows, cols = np.nonzero(body)
            ends = np.array(
                [boxes[0, 0] + boxes[0, 1] / 2 * [a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]
            )
            seen = beam.project(ends) - corner
            assert np.allclose([rows.min(), cols.min()], seen.min(axis=0), atol=3.2)
            assert np.allclose([rows.max(), cols.max()], seen.max(axis=0), atol=3.2)
            for centre, _ in boxes:
                assert whole[tuple(np.rint(beam.project(centre) - corner).astype(int))]


def test_body_leaves_out_the_processes(pair):
    body = pair.shadows["body"][1].cut(0, patch_corner(pair.beams[1], pair.bodies_mm[0]), PATCH)
    assert body.sum() * 1.5**2 == pytest.approx(30 * 24, rel=0.3)


@given(st.lists(st.floats(-REACH_MM, REACH_MM), min_size=3, max_size=3))
def test_strips_hold_every_patch_within_reach(pair, shift):
    for beam in pair.beams:
        for body in pair.bodies_mm:
            corner = patch_corner(beam, body + shift)
            assert (corner >= 0).all() and (corner + PATCH <= beam.shape).all()


def test_a_ct_that_ends_is_continued():
    water = Volume(np.zeros((40, 40, 40), np.float32), np.diag([3.0, 3.0, 3.0, 1.0]))
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[18:22, 18:22, 34:38] = 20
    scan = LabelledCT("short", water, Volume(labels, water.affine), {20: np.array([58.5, 58.5, 106.5])})
    pair = make_pair(scan)
    row, col = np.rint(pair.beams[0].project(np.array([58.5, 58.5, 145.0]))).astype(int)
    middle = np.rint(pair.beams[0].project(np.array([58.5, 58.5, 106.5]))).astype(int)
    assert pair.radiographs[0][row, col] == pytest.approx(float(pair.radiographs[0][tuple(middle)]), rel=0.01)


@given(st.integers(0, 2**32 - 1), st.integers(2, 3))
def test_packed_masks_come_back(seed, dims):
    rng = np.random.default_rng(seed)
    masks, places = [], []
    for _ in range(3):
        masks.append(rng.random(rng.integers(1, 8, dims)) < rng.choice([0.0, 0.2, 1.0]))
        places.append(rng.integers(-5, 6, dims))
    packed = PackedMasks.pack(list(zip(masks, places, strict=True)))
    for number, (mask, place) in enumerate(zip(masks, places, strict=True)):
        expected = np.zeros((30,) * dims, bool)
        expected[tuple(slice(p + 10, p + 10 + n) for p, n in zip(place, mask.shape, strict=True))] = mask
        assert np.array_equal(packed.cut(number, (-10,) * dims, 30), expected)
        assert np.array_equal(packed.cut(number, (-3,) * dims, 5), expected[(slice(7, 12),) * dims])


def test_file_round_trip(pair, tmp_path):
    back = BiplanarSubject.load(pair.save(tmp_path / "one.safetensors"))
    assert (back.key, back.labels, back.frames) == (pair.key, pair.labels, None)
    assert all(np.array_equal(a, b) for a, b in zip(back.radiographs, pair.radiographs, strict=True))
    assert np.array_equal(back.bodies_mm, pair.bodies_mm)
    assert np.array_equal(cube_of(back, 21)[0], cube_of(pair, 21)[0])
    for view in (0, 1):
        assert np.allclose(back.beams[view].matrix, pair.beams[view].matrix)
        for kind in ("body", "whole"):
            a, b = back.shadows[kind][view], pair.shadows[kind][view]
            assert np.array_equal(a.bits, b.bits) and np.array_equal(a.boxes, b.boxes)
    assert [p.name for p in tmp_path.iterdir()] == ["one.safetensors"]


def test_bad_input(tmp_path):
    scan = drawn_ct()
    empty = Volume(np.zeros_like(scan.labels.values), scan.labels.affine)
    with pytest.raises(InputError, match="no vertebra T1 to L5 lies whole"):
        make_pair(LabelledCT("empty", scan.ct, empty, {}))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file")
    with pytest.raises(InputError, match="cannot be read"):
        BiplanarSubject.load(broken)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1)}, broken)
    with pytest.raises(InputError, match="expected the format"):
        BiplanarSubject.load(broken)
