"""Line integrals against analytic chords, nanodrr and invariances; the detector's image against its physics."""

import numpy as np
import pytest
import torch
from drawn_solids import AFFINE, SIDE, ball, ball_chords_mm, box, box_chords_mm, median_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from spinelib.errors import InputError
from spinelib.imaging import physics
from spinelib.imaging.cone_beam import ConeBeam
from spinelib.imaging.drr import Exposure, attenuation_per_mm, line_integrals, radiograph

FRONTAL = ConeBeam.frontal((0, 0, 0), (64, 64), 2.4)
LATERAL = ConeBeam.lateral((0, 0, 0), (64, 64), 2.4)


def smooth(shape=(30, 26, 34)) -> torch.Tensor:
    """Random blobs without symmetry, up to 0.04 per mm, that fade towards the border."""
    noise = torch.from_numpy(np.random.default_rng(0).random((1, 1, *(n // 4 for n in shape)), np.float32))
    blobs = torch.nn.functional.interpolate(noise, size=shape, mode="trilinear")[0, 0]
    r, a, s = (torch.hann_window(n, periodic=False) for n in shape)
    return 0.04 * blobs * r[:, None, None] * a[:, None] * s


def turned(beam, angles_deg) -> ConeBeam:
    """The beam turned about the origin."""
    turn = Rotation.from_euler("xyz", angles_deg, degrees=True).as_matrix()
    vectors = (beam.source_mm, beam.corner_mm, beam.col_step_mm, beam.row_step_mm)
    return ConeBeam(*(turn @ vector for vector in vectors), beam.shape)


@pytest.mark.parametrize(
    ("angles_deg", "ball_limit", "box_limit"),
    [((0, 0, 0), 5e-4, 1e-6), ((0, 0, 90), 5e-4, 1e-6), ((10, 5, 0), 5e-4, 1e-6), ((30, 45, 10), 1.5e-3, 5e-4)],
)
def test_chords_of_ball_and_box(angles_deg, ball_limit, box_limit):
    beam = turned(FRONTAL, angles_deg)
    for volume, chords, limit in ((ball(), ball_chords_mm(beam), ball_limit), (box(), box_chords_mm(beam), box_limit)):
        image = line_integrals(volume, AFFINE, beam)
        assert median_error(image, chords) <= limit
        assert float(image.sum()) == pytest.approx(chords.sum(), rel=2e-3)


# Far from the standard views the renderers differ by their steps; both are as near to the chords.
@pytest.mark.parametrize(("yaw_deg", "limit"), [(0.0, 1e-4), (90.0, 1e-4), (10.0, 1e-4), (33.0, 1e-3)])
def test_equals_nanodrr(yaw_deg, limit):
    pytest.importorskip("nanodrr")
    from nanodrr.camera import make_rt_inv
    from nanodrr.data import Subject
    from nanodrr.drr import DRR
    from torchio import ScalarImage

    volume, affine = smooth((60, 52, 68)), np.diag([1.5, 1.5, 1.2, 1])
    affine[:3, 3] = -affine[:3, :3] @ (np.array(volume.shape) - 1) / 2
    subject = Subject.from_images(ScalarImage(tensor=volume[None], affine=affine), convert_to_mu=False)
    pose = make_rt_inv(torch.tensor([[yaw_deg, 0, 0]]), torch.tensor([[0.0, 1500, 0]]), "AP", subject.isocenter)
    theirs = DRR.from_carm_intrinsics(1800.0, 2.4, 2.4, 0.0, 0.0, 64, 64)(subject, pose, n_samples=1500)[0, 0]
    ours = line_integrals(volume, affine, turned(FRONTAL, (0, 0, yaw_deg)))
    assert float((ours - theirs).norm() / theirs.norm()) < limit


@pytest.mark.parametrize("beam", [FRONTAL, LATERAL, turned(LATERAL, (20, -10, 30))])
def test_a_marker_appears_where_the_beam_projects_it(beam):
    volume = torch.zeros(SIDE, SIDE, SIDE)
    volume[76:85, 36:45, 71:80] = 1
    place = np.array([80, 40, 75]) - (SIDE - 1) / 2  # right, posterior and superior of the middle
    image = line_integrals(volume, AFFINE, beam).numpy()
    centre = [np.average(index, weights=image) for index in np.indices(image.shape)]
    np.testing.assert_allclose(centre, beam.project(place), atol=0.1)


def test_images_are_shown_as_radiologists_look_at_them():
    volume = torch.zeros(SIDE, SIDE, SIDE)
    volume[75:90, 70:80, 80:90] = 1  # right, anterior, superior
    for beam in (FRONTAL, LATERAL):
        image = line_integrals(volume, AFFINE, beam)
        assert float(image[:32, :32].sum()) == pytest.approx(float(image.sum()), rel=1e-3)  # top left in both


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_storage_orientation_does_not_matter(axes):
    volume, affine = smooth(), np.diag([1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = [-15, -26, -50]
    stored, stored_affine = volume.permute(axes).flip(0), affine.copy()
    stored_affine[:3, :3] = affine[:3, axes]
    stored_affine[:3, 3] += stored_affine[:3, 0] * (stored.shape[0] - 1)
    stored_affine[:3, 0] *= -1
    beam = turned(FRONTAL, (5, 3, -8))
    again = line_integrals(stored, stored_affine, beam)
    np.testing.assert_allclose(again, line_integrals(volume, affine, beam), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.floats(-20, 80), st.floats(-20, 80)), st.tuples(*[st.floats(-60, 60)] * 3))
def test_a_patch_is_a_part_of_the_whole_image(centre_rc, angles_deg):
    volume, beam = smooth(), turned(FRONTAL, angles_deg)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = -30
    patch = line_integrals(volume, affine, beam.cropped(centre_rc, (9, 6)))
    whole = line_integrals(volume, affine, beam.cropped(centre_rc, (33, 40)))
    np.testing.assert_allclose(patch, whole[12:21, 17:23], atol=2e-5)


def test_rays_beside_the_volume_are_zero():
    assert line_integrals(smooth(), np.eye(4), FRONTAL.cropped((-500, 900), (8, 8))).abs().max() == 0


def test_gradients_of_volume_and_pose():
    volume = smooth((8, 12, 16)).double().requires_grad_()
    affine = torch.diag(torch.tensor([3.0, 4.0, 5.0, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-10.0, -20.0, -40.0])
    beam = turned(ConeBeam.frontal((0, 0, 0), (5, 4), 9.1), (7, 4, 12))
    assert torch.autograd.gradcheck(lambda mu: line_integrals(mu, affine, beam), volume)
    pose = affine.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda place: line_integrals(volume.detach(), place, beam), pose)


def test_gradient_finds_a_lost_pose():
    volume, affine = smooth(), torch.eye(4, dtype=torch.float64)
    affine[:3, 3] = -15
    wanted = [line_integrals(volume, affine, beam) for beam in (FRONTAL, LATERAL)]
    shift = torch.tensor([2.0, -1.5, 1.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([shift], max_iter=30, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        pose = affine + torch.nn.functional.pad(shift[:, None], (3, 0, 0, 1))
        difference = sum(
            (line_integrals(volume, pose, b) - w).square().sum()
            for b, w in zip((FRONTAL, LATERAL), wanted, strict=True)
        )
        difference.backward()
        return difference

    optimiser.step(loss)
    assert shift.detach().abs().max() < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_equals_cpu():
    beam = turned(LATERAL, (5, 10, 15))
    on_gpu = line_integrals(ball().cuda(), AFFINE, beam)
    assert on_gpu.is_cuda
    np.testing.assert_allclose(on_gpu.cpu(), line_integrals(ball(), AFFINE, beam), atol=1e-3)


def test_a_source_within_or_beside_the_volume_is_refused():
    near = ConeBeam.frontal((0, 0, 0), (8, 8), 10.0, source_detector_mm=400, source_object_mm=40)
    with pytest.raises(InputError, match="source must lie outside the volume"):
        line_integrals(ball(), AFFINE, near)
    with pytest.raises(InputError, match="run towards it"):
        line_integrals(ball(), AFFINE + [[0] * 4, [0] * 3 + [1600], [0] * 4, [0] * 4], FRONTAL)
    for wrong in (ball().numpy(), ball()[0], ball().int()):
        with pytest.raises(InputError, match="floating-point tensor"):
            line_integrals(wrong, AFFINE, FRONTAL)


def test_attenuation_of_tissues_follows_the_table():
    for name in ("muscle", "organ", "adipose", "lung", "disc", "marrow"):
        truth = physics.SAMARIUM.linear_per_cm(name)[0] / 10
        ours = float(attenuation_per_mm(np.array(physics.lookup(name).hounsfield)))
        assert ours == pytest.approx(truth, rel=0.07), name
    # 300 mg of mineral in a cubic centimetre of marrow
    hounsfield = physics.lookup("marrow").hounsfield + 0.3 * physics.mineral_hounsfield_per_g_cm3()
    marrow = physics.SAMARIUM.linear_per_cm("marrow")[0]
    truth = marrow * (1 - 0.3 / physics.MINERAL_DENSITY_G_CM3) + 0.3 * physics.SAMARIUM.mineral_cm2_g[0]
    assert float(attenuation_per_mm(np.array(hounsfield))) == pytest.approx(truth / 10, rel=1e-6)


def test_attenuation_of_air_padding_and_order():
    values = attenuation_per_mm(torch.linspace(-2048, 3071, 5000))
    assert values[0] == 0 and attenuation_per_mm(np.array([-1000], np.int16)) == 0
    assert (values.diff() >= 0).all() and values.dtype == torch.float32


def test_without_options_the_radiograph_is_the_line_integral():
    lengths = torch.rand(9, 7) * 8
    np.testing.assert_allclose(radiograph(lengths), lengths, atol=1e-5)


def test_quantum_noise_has_the_spread_of_counting():
    exposure = Exposure(photons_per_mm2=1e6)
    for length in (2.0, 6.0):
        image = radiograph(np.full((300, 300), length), np.random.default_rng(0), exposure, pixel_mm=1.5)
        assert image.std() == pytest.approx(1 / np.sqrt(1e6 * 1.5**2 * np.exp(-length)), rel=0.02)
        assert image.mean() == pytest.approx(length, abs=1e-3)
    assert np.isfinite(radiograph(np.full((4, 4), 60.0), np.random.default_rng(0))).all()


def test_scatter_behind_a_slab_and_its_loss_of_contrast():
    slab = np.full((60, 60), 5.0)
    np.testing.assert_allclose(radiograph(slab, exposure=Exposure(scatter=0.1)), 5 - np.log(1.5), rtol=1e-5)
    slab[20:40, 20:40] += 0.5
    contrast = [np.ptp(radiograph(slab, exposure=Exposure(scatter=s))) for s in (0.0, 0.1, 0.5)]
    assert contrast[0] == pytest.approx(0.5, rel=1e-4) and contrast[0] > contrast[1] > contrast[2] > 0
    assert np.abs(radiograph(np.zeros((9, 9)), exposure=Exposure(scatter=0.5))).max() == 0  # open beam


def test_display_curve_keeps_order_within_zero_and_one():
    lengths = np.linspace(0, 12, 101)[None]
    shown = radiograph(lengths, exposure=Exposure(latitude=2.0))
    assert shown.min() > 0 and shown.max() < 1 and (np.diff(shown) > 0).all()
    assert shown[0, 55] == pytest.approx(0.5, abs=0.01)  # the median of what lies above a tenth of the largest
    steeper = radiograph(lengths, exposure=Exposure(latitude=1.0))
    assert np.ptp(steeper[0, 50:61]) > np.ptp(shown[0, 50:61])


@pytest.mark.parametrize("wrong", [{"photons_per_mm2": 0}, {"scatter": -1}, {"scatter_mm": 0}, {"latitude": 0}])
def test_impossible_exposures_are_refused(wrong):
    with pytest.raises(InputError, match="an exposure needs"):
        Exposure(**wrong)
