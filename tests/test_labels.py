"""Curves from label volumes: against the phantom's exact silhouettes, a drawn cylinder, and bad input."""

import numpy as np
import pytest
from scipy.ndimage import find_objects

from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.imaging.labels import curves_from_labels, label_share, signed_distance
from spinelib.levels import VERSE_LABELS


def test_a_cylinder_gives_its_own_edges():
    grid = VolumeGrid.from_bounds((-40, -40, 0), (40, 40, 120), 1.0)
    right, anterior, _ = np.meshgrid(*grid.axes_mm(), indexing="ij")
    body = (right - 5) ** 2 + (anterior + 3) ** 2 <= 20**2
    arch = (np.abs(right - 5) < 3) & (anterior < -20)  # a process: too thin for a body
    labels = np.where(body | arch, 20, 0).astype(np.uint8)
    labels[:, :, 50:56] = 0  # a disc
    curves = curves_from_labels(Volume(labels, grid.affine), [20])
    assert np.abs(curves.coronal_mm - [[25], [5], [-15]]).max() <= 1.0
    assert np.abs(curves.sagittal_mm - [[17], [-3], [-23]]).max() <= 1.0


def test_phantom_labels_give_the_phantoms_true_curves():
    from spinelib.phantom.column import true_curves
    from spinelib.phantom.population import sample_subject
    from spinelib.phantom.render import tissue_volume
    from spinelib.phantom.vertebra import subject_shapes

    subject = sample_subject(4, curves="enriched", variants=False)
    shapes = subject_shapes(subject)
    volume = tissue_volume(subject, shapes, VolumeGrid.from_bounds((-70, -110, -30), (70, 90, 560), (1.5, 1.5, 3.0)))
    levels = [v for v in subject.levels if v[0] in "TL"]
    curves = curves_from_labels(Volume(volume.labels, volume.grid.affine), [VERSE_LABELS[v] for v in levels])
    truth = true_curves(subject, shapes)
    inner = truth.heights_mm[(truth.heights_mm < curves.heights_mm[0]) & (truth.heights_mm > curves.heights_mm[-1])]
    difference = np.abs(curves.at(inner).to_array() - truth.at(inner).to_array()).mean(axis=0)
    assert difference[[1, 4]].max() < 1.2  # centres
    assert difference.max() < 2.0


@pytest.mark.parametrize(
    ("values", "affine", "words"),
    [
        ([99], np.eye(4), "none of the labels"),
        ([1], np.array([[0.9, -0.4, 0, 0], [0.4, 0.9, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "read_volume"),
        ([1], np.eye(4), "is this a vertebra mask"),
    ],
)
def test_bad_labels_are_named(values, affine, words):
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[10:12, 10:12] = 1
    with pytest.raises(InputError, match=words):
        curves_from_labels(Volume(labels, affine), values)


def test_distance_to_the_faces_of_a_mask():
    values = np.zeros((6, 7, 8), np.uint8)
    values[2:5, 3:6, 0:4] = 7  # touches the border: the distance goes on beyond it
    values[0, 0, 0] = 8
    labels = Volume(values, np.array([[2.0, 0, 0, 10], [0, 1, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]]))
    distance = signed_distance(labels, 7, margin_mm=4.0)
    assert distance.values.shape == (3 + 2 * 2, 3 + 2 * 4, 4 + 2 * 2)
    np.testing.assert_allclose(distance.affine[:3, 3], [10 + 2 * 2 - 4, 20 + 3 - 4, 30 - 6])
    np.testing.assert_array_equal(np.argwhere(distance.values < 0).min(0), [2, 4, 2])
    assert np.count_nonzero(distance.values < 0) == np.count_nonzero(values == 7)
    right = distance.values[:, 5, 3]  # a line of 2 mm steps; the finest side is 1 mm, so faces lie half of that off
    np.testing.assert_allclose(right[[0, 1, 2]], [4 - 0.5, 2 - 0.5, 0.5 - 2])


def test_a_label_on_another_lattice():
    values = np.zeros((10, 10, 10), np.uint8)
    values[2:6, 3:7, 4:9] = 5
    values[6:8, 3:7, 4:9] = 6
    labels = Volume(values, np.diag([2.0, 2.0, 2.0, 1.0]))
    box = find_objects(values)[4]
    share, first = label_share(labels, 5, box, labels.affine)
    assert first.tolist() == [1, 2, 3]
    assert np.array_equal(np.pad(share, 1)[2:6, 2:6, 2:7], np.ones((4, 4, 5))) and share.sum() == 4 * 4 * 5
    half = np.diag([2.0, 2.0, 2.0, 1.0])
    half[0, 3] = 1.0  # between voxels
    share, first = label_share(labels, 5, box, half)
    middle = share[:, 3, 3]
    assert np.allclose(middle[np.flatnonzero(middle)], [0.5, 1, 1, 1, 0.5])
    assert first[0] + np.flatnonzero(middle)[0] == 1  # point 1 lies at 3 mm, the label begins at 4
    away = np.eye(4)
    away[:3, 3] = 100
    assert label_share(labels, 5, box, away)[1].max() < 0
