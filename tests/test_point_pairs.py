"""Marked points are read as they were written; mixed-up views are noticed."""

import json
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinelib.errors import InputError
from spinelib.imaging.cone_beam import ConeBeam, triangulate
from spinelib.imaging.point_pairs import PointPairs, read_point_pairs, require_inside, view_doubts
from spinelib.levels import T1_TO_L5, VERSE_LABELS
from spinelib.phantom.population import sample_subject

BEAMS = (ConeBeam.frontal((0, 0, 0), (900, 400), 1.0), ConeBeam.lateral((0, 0, 0), (900, 500), 1.0))
ROWS = [("L1", "lat", 40.5, 10.0), ("T12", "ap", 10.0, 20.25), ("L1", "ap", 41.0, 21.0), ("T12", "lat", 9.5, 8.0)]


def written(path, rows=ROWS, columns=("level", "view", "row", "col")):
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def points_of(seed, noise_px=0.0, levels=T1_TO_L5):
    """Points of a standing person, off the central ray by a few centimetres."""
    subject = sample_subject(seed, age_years=30 + seed % 50, posture="standing", curves="enriched", variants=False)
    centres = np.array([subject.poses[subject.index(level), :3, 3] for level in levels])
    rng = np.random.default_rng(seed)
    centres += rng.uniform([-15, -30, -60], [15, 30, 60]) - centres.mean(axis=0)
    points = np.stack([beam.project(centres) for beam in BEAMS])
    return points + noise_px * rng.standard_normal(points.shape)


# --- files ---


def test_a_table_and_a_json_say_the_same(tmp_path):
    pairs = read_point_pairs(written(tmp_path / "points.csv"))
    assert pairs.levels == ("T12", "L1")
    np.testing.assert_array_equal(pairs.points_rc, [[[10, 20.25], [41, 21]], [[9.5, 8], [40.5, 10]]])
    for name in ("label", "level"):
        views = {"ap": [], "lat": []}
        for level, view, row, col in ROWS:
            views[view].append({name: VERSE_LABELS[level] if name == "label" else level, "row": row, "col": col})
        (tmp_path / f"{name}.json").write_text(json.dumps(views))
        same = read_point_pairs(tmp_path / f"{name}.json")
        assert same.levels == pairs.levels
        np.testing.assert_array_equal(same.points_rc, pairs.points_rc)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from(T1_TO_L5), min_size=1), st.randoms())
def test_the_order_of_rows_does_not_matter(levels, random):
    rows = [(level, view, float(VERSE_LABELS[level]), 1.0) for level in levels for view in ("ap", "lat")]
    random.shuffle(rows)
    with TemporaryDirectory() as folder:
        pairs = read_point_pairs(written(f"{folder}/points.csv", rows))
    assert pairs.levels == tuple(level for level in T1_TO_L5 if level in levels)
    assert (pairs.points_rc[:, :, 0] == [VERSE_LABELS[level] for level in pairs.levels]).all()


def bad_tables():
    yield ROWS[:3], "expected each level once in each view, given T12 (no lat)"
    yield [*ROWS, ROWS[0]], "L1 in lat twice"
    yield [("C7", *ROWS[0][1:]), *ROWS], "unknown level C7"
    yield [("L1", "PA", 1, 1), *ROWS], "unknown view PA. Expected some of: ap, lat"
    yield [*ROWS[:3], ("T12", "lat", "top", 8.0)], "expected numbers for row and col, given T12 (lat)"
    yield [*ROWS[:3], ("T12", "lat", None, 8.0)], "given T12 (lat)"
    yield [], "no point at all"


@pytest.mark.parametrize(("rows", "words"), list(bad_tables()))
def test_a_bad_table_is_refused(rows, words, tmp_path):
    with pytest.raises(InputError) as error:
        read_point_pairs(written(tmp_path / "points.csv", rows))
    assert words in str(error.value)


def test_an_unreadable_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="lacks level, col; it has vertebra, view, row, x"):
        read_point_pairs(written(tmp_path / "points.csv", ROWS, ("vertebra", "view", "row", "x")))
    for name, text in {"a.json": "{", "b.json": "[1]", "c.json": '{"ap": [3]}', "d.csv": ""}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="not a readable"):
            read_point_pairs(tmp_path / name)
    with pytest.raises(InputError, match="lacks level, view, row, col; it has nothing"):
        (tmp_path / "e.json").write_text("{}")
        read_point_pairs(tmp_path / "e.json")
    with pytest.raises(InputError, match="no file"):
        read_point_pairs(tmp_path / "absent.csv")


def test_points_outside_the_images_are_refused():
    inside = np.array([[[0.0, 399.4]], [[899.4, 0.0]]])
    require_inside(PointPairs(("T1",), inside), BEAMS)
    with pytest.raises(InputError, match=r"900 x 400 and 900 x 500 pixels: T1 \(ap\), T1 \(lat\)"):
        require_inside(PointPairs(("T1",), inside + [[[0, 1]], [[1, 0]]]), BEAMS)


# --- doubts ---


@pytest.mark.parametrize("seed", range(6))
def test_views_as_they_should_be_raise_no_doubt(seed):
    assert view_doubts(T1_TO_L5, BEAMS, points_of(seed, noise_px=2.0)) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_flipped_lateral_view_is_noticed(seed):
    points = points_of(seed, noise_px=2.0)
    points[1, :, 1] = 499 - points[1, :, 1]
    assert any("bulges forwards" in doubt for doubt in view_doubts(T1_TO_L5, BEAMS, points))


def test_a_flipped_frontal_view_is_noticed_if_points_are_exact():
    points = points_of(0)
    points[0, :, 1] = 399 - points[0, :, 1]
    assert any("frontal view flipped" in doubt for doubt in view_doubts(T1_TO_L5, BEAMS, points))


def test_swapped_views_of_a_straight_person_are_noticed():
    subject = sample_subject(4, posture="standing", variants=False)
    centres = np.array([subject.poses[subject.index(level), :3, 3] for level in T1_TO_L5]) - [0, 0, 250]
    points = np.stack([beam.project(centres) for beam in BEAMS])
    assert view_doubts(T1_TO_L5, BEAMS, points) == []
    columns = points[::-1, :, 1] + np.array([[200 - 250], [250 - 200]])  # from the middle of one image to the other's
    swapped = np.stack([points[::-1, :, 0], columns], axis=-1)
    assert any("swapped" in doubt for doubt in view_doubts(T1_TO_L5, BEAMS, swapped))


@pytest.mark.parametrize("factor", [0.93, 1.06])
def test_people_of_different_height_are_noticed(factor):
    points = points_of(1, noise_px=1.0)
    points[0] = (points[0] - [449.5, 199.5]) * factor + [449.5, 199.5]
    (doubt,) = view_doubts(T1_TO_L5, BEAMS, points)
    assert f"{factor:.2f} times as long" in doubt
    assert triangulate(BEAMS, points)[1].max() > 4


def test_few_points_raise_no_doubt():
    points = points_of(2)
    points[1, :, 1] = 499 - points[1, :, 1]
    assert view_doubts(T1_TO_L5[:7], BEAMS, points[:, :7]) == []
