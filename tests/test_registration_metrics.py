"""Registration errors: zero for rigid motion, known values for analytic motion, and an independent implementation."""

import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.spatial.transform import Rotation

from spinelib.deformation import DisplacementField, grid_points_mm
from spinelib.errors import InputError
from spinelib.geometry import Volume, VolumeGrid
from spinelib.registration_metrics import COLUMNS, eroded, field_errors, registration_errors

L1, L2 = 20, 21
RIGIDITY = ["nonrigidity", "volume_change_pct", "local_volume_change_pct", "procrustes_residual_mm"]
TRUTH = ["rotation_error_deg", "translation_error_mm", "bone_tre_mm"]


def rigid_matrix(degrees=(4.0, -7.0, 5.0), shift_mm=(2.0, -3.0, 1.5)):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def affine_field(motion, grid):
    points = grid_points_mm(grid)
    return DisplacementField(apply_affine(motion, points) - points, grid)


def boxes(grid, **corners):
    """Labels of index boxes: boxes(grid, L1=((2, 2, 2), (6, 6, 6)))."""
    values = np.zeros(grid.shape, np.uint8)
    for level, (low, high) in corners.items():
        values[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = {"L1": L1, "L2": L2, "S1": 26}[level]
    return Volume(values, grid.affine)


def everywhere(label, grid):
    """A CT of one label that covers all that the tests' motions reach."""
    affine = np.diag([20.0, 20.0, 20.0, 1.0])
    affine[:3, 3] = grid.affine[:3, 3] - 200
    return Volume(np.full((20, 20, 20), label, np.uint8), affine)


@pytest.fixture
def thick_slices():
    """Sagittal MR: 4 mm slices, turned by some degrees, far from the world's origin."""
    affine = rigid_matrix((6.0, -3.0, 9.0), (-60.0, 80.0, -400.0))
    affine[:3, :3] *= (4.0, 0.8, 1.1)
    return VolumeGrid((12, 30, 24), affine)


# --- rigid motion scores zero ---


@pytest.mark.parametrize("box", [((3, 6, 5), (9, 24, 18)), ((0, 0, 0), (5, 12, 9))], ids=["whole", "cut by the border"])
def test_a_rigid_motion_is_exactly_rigid_on_anisotropic_voxels(thick_slices, box):
    field = affine_field(rigid_matrix(), thick_slices)
    table = registration_errors(
        field, boxes(thick_slices, L1=box), everywhere(L1, thick_slices), None, {L1: rigid_matrix()}
    )
    (row,) = table.to_dict("records")
    assert (row["label"], row["level"]) == (L1, "L1")
    assert max(row[name] for name in ("nonrigidity", "procrustes_residual_mm")) < 1e-5
    assert max(row[name] for name in ("volume_change_pct", "local_volume_change_pct")) < 1e-3
    assert max(row[name] for name in TRUTH) < 1e-4


def test_bone_moves_rigidly_whatever_the_soft_tissue_does(thick_slices):
    labels = boxes(thick_slices, L1=((2, 5, 4), (9, 25, 19)))
    field = affine_field(rigid_matrix(), thick_slices)
    values = field.values + np.random.default_rng(0).normal(0, 3, field.values.shape) * (labels.values == 0)[..., None]
    table = registration_errors(DisplacementField(values, field.grid), labels, everywhere(L1, thick_slices))
    assert (table[["nonrigidity", "procrustes_residual_mm"]] < 1e-5).all(axis=None)
    assert table[TRUTH].isna().all(axis=None)


@pytest.mark.parametrize("degrees", [0.05, 2.0, 40.0])
def test_a_known_rotation_error_is_read_back(thick_slices, degrees):
    labels = boxes(thick_slices, L1=((3, 6, 5), (9, 24, 18)))
    centroid = apply_affine(thick_slices.affine, np.argwhere(labels.values)).mean(axis=0)
    extra = rigid_matrix((0.0, degrees, 0.0), (0.0, 0.0, 0.0))
    extra[:3, 3] = centroid - extra[:3, :3] @ centroid + [0.0, 0.3, 0.4]  # about the centroid, then 0.5 mm
    field = affine_field(rigid_matrix() @ extra, thick_slices)
    truth = affine_field(rigid_matrix(), thick_slices)
    ct = everywhere(L1, thick_slices)
    by_matrix = registration_errors(field, labels, ct, transforms={L1: rigid_matrix()}).iloc[0]
    by_field = registration_errors(field, labels, ct, truth).iloc[0]
    for row in (by_matrix, by_field):
        assert row["rotation_error_deg"] == pytest.approx(degrees, abs=1e-3)
        assert row["translation_error_mm"] == pytest.approx(0.5, abs=1e-4)
    assert by_matrix["bone_tre_mm"] == pytest.approx(by_field["bone_tre_mm"], abs=1e-4)
    assert by_field["bone_tre_mm"] > 0.4


# --- analytic values ---


def test_uniform_scaling_has_its_known_values(thick_slices):
    scale = 1.1
    field = affine_field(np.diag([scale, scale, scale, 1.0]), thick_slices)
    row = registration_errors(
        field, boxes(thick_slices, L1=((0, 6, 5), (9, 24, 18))), everywhere(L1, thick_slices)
    ).iloc[0]
    assert row["nonrigidity"] == pytest.approx((scale**2 - 1) / 3, abs=1e-5)  # 3 of 9 entries
    assert row["local_volume_change_pct"] == pytest.approx(100 * (scale**3 - 1), abs=1e-2)
    assert row["volume_change_pct"] == pytest.approx(100 * (1 - scale**-3), abs=1e-2)


def test_shear_has_its_known_values(thick_slices):
    motion, shear = np.eye(4), 0.2
    motion[0, 2] = shear
    row = registration_errors(
        affine_field(motion, thick_slices),
        boxes(thick_slices, L1=((1, 6, 0), (9, 24, 18))),
        everywhere(L1, thick_slices),
    ).iloc[0]
    assert row["nonrigidity"] == pytest.approx((2 * shear + shear**2) / 9, abs=1e-5)
    assert row["volume_change_pct"] == pytest.approx(0, abs=1e-3)
    assert row["procrustes_residual_mm"] > 0.5


def test_swelling_and_shrinking_cancel_in_the_whole_volume_only():
    grid = VolumeGrid((40, 6, 6), np.eye(4))
    values = np.zeros((40, 6, 6, 3))
    values[..., 0] = 0.2 * np.abs(np.arange(40) - 19.5)[:, None, None]  # stretched on one side, compressed on the other
    row = registration_errors(
        DisplacementField(values, grid), boxes(grid, L1=((0, 0, 0), (40, 6, 6))), everywhere(L1, grid)
    )
    assert row["volume_change_pct"].iloc[0] == pytest.approx(0, abs=1e-3)
    # 38 layers with a slope of 0.2 and the middle two, whose stencil reaches over the kink, with 0.1
    assert row["local_volume_change_pct"].iloc[0] == pytest.approx((38 * 20 + 2 * 10) / 40, abs=1e-3)


def test_overlap_of_a_shifted_box_has_its_known_values():
    grid = VolumeGrid((20, 20, 20), np.diag([2.0, 1.0, 1.0, 1.0]))
    labels = boxes(grid, L1=((5, 5, 5), (13, 13, 13)))
    shifted = DisplacementField(np.broadcast_to([4.0, 0.0, 0.0], (20, 20, 20, 3)), grid)
    row = registration_errors(shifted, labels, labels, DisplacementField.zero(grid)).iloc[0]
    assert row["dice"] == pytest.approx(6 / 8)
    assert row["hd95_mm"] == pytest.approx(4.0)
    assert row["bone_tre_mm"] == row["translation_error_mm"] == pytest.approx(4.0)
    assert row["rotation_error_deg"] == pytest.approx(0, abs=1e-6)


# --- an independent implementation, on a pair of two vertebrae whose motion is known in closed form ---


class TwoVertebrae:
    """Bodies with an arm behind, turned apart; rigid in bone, blended by inverse squared distance around it."""

    side = 64
    centres = np.array([[32.0, 28.0, 18.0], [32.0, 28.0, 45.0]])
    turns = Rotation.from_euler("xyz", [[5, -2, 3], [-6, 3, -2]], degrees=True).as_matrix()
    shifts = np.array([[1.5, -2.0, 1.5], [-1.5, 2.0, -1.0]])
    corners = (
        (((19.5, 13.5, 8.5), (43.5, 35.5, 26.5)), ((27.5, 35.5, 12.5), (35.5, 51.5, 20.5))),
        (((19.5, 13.5, 35.5), (43.5, 35.5, 53.5)), ((27.5, 35.5, 39.5), (35.5, 51.5, 47.5))),
    )

    def __init__(self):
        self.grid = VolumeGrid((self.side,) * 3, np.eye(4))
        self.points = grid_points_mm(self.grid)
        inverse = [1 / (self.distance(k, self.carried(k)) + 1e-9) ** 2 for k in (0, 1)]
        total = sum(inverse) + 1 / 18**2
        self.displacement = sum((inverse[k] / total)[..., None] * (self.carried(k) - self.points) for k in (0, 1))

    def carried(self, k):
        return (self.points - self.centres[k]) @ self.turns[k].T + self.centres[k] + self.shifts[k]

    def distance(self, k, points):
        outside = [np.maximum(np.maximum(low - points, points - high), 0) for low, high in np.array(self.corners[k])]
        return np.minimum.reduce([np.linalg.norm(part, axis=-1) for part in outside])

    def labels(self, points):
        values = np.zeros(points.shape[:-1], np.uint8)
        for k, label in enumerate((L1, L2)):
            values[self.distance(k, points) <= 0] = label
        return Volume(values, np.eye(4))

    def transforms(self):
        matrices = {}
        for k, label in enumerate((L1, L2)):
            matrices[label] = np.eye(4)
            matrices[label][:3, :3] = self.turns[k]
            matrices[label][:3, 3] = self.centres[k] + self.shifts[k] - self.turns[k] @ self.centres[k]
        return matrices

    def disturbed(self):
        """The true displacement, the lower vertebra turned a little, and waves over all."""
        offset = self.points - [32.0, 28.0, 40.0]
        near = np.exp(-(offset**2).sum(axis=-1) / 800)[..., None]
        turn = Rotation.from_euler("xyz", [1, -0.5, 0.7], degrees=True).as_matrix()
        right, anterior, superior = np.moveaxis(self.points, -1, 0)
        waves = np.stack([np.sin(anterior / 5), np.sin(superior / 6), np.sin(right / 7)], axis=-1)
        return self.displacement + near * (offset @ (turn - np.eye(3)).T + [0.3, -0.2, 0.4]) + 0.2 * waves


@pytest.fixture(scope="module")
def pair():
    return TwoVertebrae()


@pytest.fixture(scope="module")
def scored(pair):
    """Tables of the truth, of the disturbed truth and of no motion."""
    truth = DisplacementField(pair.displacement, pair.grid)
    mr, ct = pair.labels(pair.points + pair.displacement), pair.labels(pair.points)
    fields = {"truth": truth, "disturbed": DisplacementField(pair.disturbed(), pair.grid)}
    fields["identity"] = DisplacementField.zero(pair.grid)
    return {name: registration_errors(field, mr, ct, truth, pair.transforms()) for name, field in fields.items()}


# Means over both vertebrae by our earlier, separate implementation (voxel units, 1 mm isotropic).
GOLDEN = {
    "disturbed": {
        "dice": 0.9784734789697705,
        "rotation_error_deg": 0.7355650575661528,
        "translation_error_mm": 0.24045124188478326,
        "procrustes_residual_mm": 0.16140931910443454,
        "nonrigidity": 0.016020766282031473,
        "local_volume_change_pct": 1.1668541034709455,
        "bone_tre_mm": 0.3046936918627226,
    },
    "identity": {
        "dice": 0.7883039378164801,
        "rotation_error_deg": 6.5800277310823105,
        "translation_error_mm": 2.7586833286998855,
        "procrustes_residual_mm": 0.0,
        "nonrigidity": 0.0,
        "local_volume_change_pct": 0.0,
        "bone_tre_mm": 2.958467193077696,
    },
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_scores_equal_those_of_a_separate_implementation(scored, name):
    means, golden = scored[name].mean(numeric_only=True), GOLDEN[name]
    assert means["dice"] == pytest.approx(golden["dice"], abs=1e-3)  # theirs warps labels by the nearest neighbour
    assert {key: means[key] for key in golden if key != "dice"} == pytest.approx(
        {key: golden[key] for key in golden if key != "dice"}, abs=1e-4
    )


def test_the_truth_scores_perfectly(scored):
    truth = scored["truth"]
    assert (truth["dice"] > 0.997).all() and (truth["hd95_mm"] == 0).all()  # interpolation rounds the boxes' corners
    assert (truth[RIGIDITY + TRUTH] < 1e-5).all(axis=None)


def test_field_errors_equal_those_of_a_separate_implementation(pair):
    truth, field = (DisplacementField(values, pair.grid) for values in (pair.displacement, pair.disturbed()))
    away_from_border = np.zeros(pair.grid.shape, bool)
    away_from_border[2:-2, 2:-2, 2:-2] = True
    axis_distance = np.hypot(pair.points[..., 0] - 32, pair.points[..., 1] - 33)
    soft = (pair.labels(pair.points + pair.displacement).values == 0) & (axis_distance < 26)
    errors = field_errors(field, away_from_border, soft, truth)
    assert errors["soft_tre_mm"] == pytest.approx(0.386760233761426, abs=1e-4)
    assert errors["sd_log_jacobian"] == pytest.approx(0.12993311784139852, abs=1e-4)
    assert errors["folding_pct"] == 0
    assert np.isnan(errors["inverse_consistency_mm"])


# --- the field as a whole ---


def test_folds_and_log_jacobians_are_counted_where_valid():
    grid = VolumeGrid((30, 8, 8), np.diag([1.0, 1.0, 3.0, 1.0]))
    values = np.zeros((30, 8, 8, 3))
    values[:10, ..., 0] = -1.5 * np.arange(10)[:, None, None]  # phi' = -0.5: folded
    values[10:, ..., 0] = -13.5 + 0.5 * (np.arange(10, 30) - 9)[:, None, None]  # phi' = 1.5
    field = DisplacementField(values, grid)
    valid = np.zeros(grid.shape, bool)
    valid[5:15] = True
    assert field_errors(field, valid)["folding_pct"] == pytest.approx(40.0)  # 5 to 8; at 9 the slopes cancel to 0.5
    valid[:12] = False
    assert field_errors(field, valid)["folding_pct"] == 0
    assert field_errors(field, valid)["sd_log_jacobian"] == pytest.approx(0, abs=1e-6)
    valid[12:15] = False
    assert all(np.isnan(value) for value in field_errors(field, valid).values())


def test_inverse_consistency_is_the_distance_from_where_one_started(thick_slices):
    forward = affine_field(rigid_matrix(), thick_slices)
    backward = DisplacementField.rigid(np.linalg.inv(rigid_matrix()), everywhere(L1, thick_slices).grid)
    assert field_errors(forward, backward=backward)["inverse_consistency_mm"] < 1e-4
    off = DisplacementField(backward.values + np.float32([0.0, 0.6, 0.8]), backward.grid)
    assert field_errors(forward, backward=off)["inverse_consistency_mm"] == pytest.approx(1.0, abs=1e-4)


def test_points_that_leave_the_backward_field_are_not_judged():
    grid = VolumeGrid((10, 4, 4), np.eye(4))
    forward = DisplacementField(np.broadcast_to([4.0, 0, 0], (10, 4, 4, 3)), grid)
    backward = np.zeros((10, 4, 4, 3))
    backward[4:, ..., 0] = -4.0
    assert field_errors(forward, backward=DisplacementField(backward, grid))["inverse_consistency_mm"] == 0


# --- labels that do not match, and bad input ---


def test_only_vertebrae_that_both_sides_show_are_scored():
    grid = VolumeGrid((20, 20, 20), np.eye(4))
    mr = boxes(grid, L1=((2, 2, 2), (8, 8, 8)), S1=((12, 12, 12), (18, 18, 18)))
    ct = boxes(grid, L1=((2, 2, 2), (8, 8, 8)), L2=((2, 2, 10), (8, 8, 18)), S1=((12, 12, 12), (18, 18, 18)))
    assert registration_errors(DisplacementField.zero(grid), mr, ct)["level"].tolist() == ["L1"]
    nothing = registration_errors(DisplacementField.zero(grid), mr, boxes(grid))
    assert nothing.empty and tuple(nothing.columns) == COLUMNS


def test_a_vertebra_carried_out_of_sight_has_no_overlap_and_no_distance():
    grid = VolumeGrid((12, 12, 12), np.eye(4))
    labels = boxes(grid, L1=((2, 2, 2), (8, 8, 8)))
    row = registration_errors(DisplacementField(np.full((12, 12, 12, 3), 300.0), grid), labels, labels).iloc[0]
    assert row["dice"] == 0 and np.isnan(row["hd95_mm"]) and row["nonrigidity"] == 0


def test_a_vertebra_of_a_few_voxels_has_only_what_they_allow():
    grid = VolumeGrid((12, 12, 12), np.eye(4))
    labels = boxes(grid, L1=((2, 2, 2), (3, 3, 4)))
    row = registration_errors(DisplacementField.zero(grid), labels, labels, DisplacementField.zero(grid)).iloc[0]
    assert row["dice"] == 1 and row["bone_tre_mm"] == 0
    assert row[["nonrigidity", "volume_change_pct", "rotation_error_deg", "procrustes_residual_mm"]].isna().all()


def test_erosion_keeps_the_border_that_cuts_a_vertebra():
    mask = np.zeros((6, 6, 6), bool)
    mask[:4, 1:5, 1:5] = True
    kept = eroded(mask)
    assert kept[:3, 2:4, 2:4].all() and kept.sum() == 3 * 2 * 2


def test_a_field_on_another_grid_is_refused():
    grid = VolumeGrid((12, 12, 12), np.eye(4))
    labels = boxes(grid, L1=((2, 2, 2), (8, 8, 8)))
    for other in (VolumeGrid((12, 12, 13), np.eye(4)), VolumeGrid((12, 12, 12), np.diag([1.0, 1.0, 1.1, 1.0]))):
        with pytest.raises(InputError, match="resampled"):
            registration_errors(DisplacementField.zero(other), labels, labels)


@pytest.mark.parametrize("mask", [np.ones((4, 4, 5), bool), np.ones((4, 4, 4), np.uint8)])
def test_a_mask_that_does_not_fit_is_refused(mask):
    field = DisplacementField.zero(VolumeGrid((4, 4, 4), np.eye(4)))
    for name in ("valid", "soft"):
        with pytest.raises(InputError, match=name):
            field_errors(field, **{name: mask})
