"""CPU seconds of whole radiographs, ours and those of nanodrr where it is installed, in turns in one run."""

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from spinelib.imaging.cone_beam import SOURCE_DETECTOR_MM, SOURCE_OBJECT_MM, ConeBeam
from spinelib.imaging.drr import line_integrals

SIZE, PIXEL_MM = 256, 1.8


def renderer_seconds(mu: Float[Tensor, "R A S"], affine, turns: int = 3) -> dict[str, float]:
    """Return the CPU seconds of a frontal image of 256 x 256 pixels by the names of metrics.json.

    Parameters
    ----------
    mu : Tensor
        Attenuation per mm.
    affine : ndarray (4, 4)
        Voxel index to world RAS mm.
    turns : int

    Returns
    -------
    dict of str to float
        'drr.cpu_s_256', and 'drr.cpu_s_256_nanodrr' (as many samples on a ray, 256) if nanodrr is there.
    """
    centre = affine[:3, :3] @ ((torch.tensor(mu.shape).numpy() - 1) / 2) + affine[:3, 3]
    beam = ConeBeam.frontal(centre, (SIZE, SIZE), PIXEL_MM)
    works = {"drr.cpu_s_256": lambda: line_integrals(mu, affine, beam)}
    if find_spec("nanodrr"):
        subject = nanodrr_subject(mu, affine)
        works["drr.cpu_s_256_nanodrr"] = lambda: nanodrr_image(subject)
    with torch.no_grad():
        return cpu_seconds(works, turns)


def cpu_seconds(works: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Return the least process CPU seconds of each work; they take turns."""
    seconds = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return {name: min(values) for name, values in seconds.items()}


def nanodrr_subject(mu: Float[Tensor, "R A S"], affine):
    """Return the volume as nanodrr holds it."""
    from nanodrr.data import Subject
    from torchio import ScalarImage

    return Subject.from_images(ScalarImage(tensor=mu[None], affine=affine), convert_to_mu=False)


def nanodrr_image(subject, yaw_deg: float = 0.0, samples: int = 256) -> Tensor:
    """Return nanodrr's image (256, 256) in the geometry of `ConeBeam.frontal`, or with yaw -90 `ConeBeam.lateral`."""
    from nanodrr.camera import make_rt_inv
    from nanodrr.drr import DRR

    camera = DRR.from_carm_intrinsics(SOURCE_DETECTOR_MM, PIXEL_MM, PIXEL_MM, 0.0, 0.0, SIZE, SIZE)
    shift = torch.tensor([[0.0, SOURCE_OBJECT_MM, 0.0]])
    pose = make_rt_inv(torch.tensor([[yaw_deg, 0.0, 0.0]]), shift, "AP", subject.isocenter)
    image = camera(subject, pose, n_samples=samples)[0, 0]
    return image.flip(1) if yaw_deg else image  # from the right side it shows anterior on the right
