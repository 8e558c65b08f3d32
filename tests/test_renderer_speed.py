"""The timing of the renderer beside its peer."""

import time
from importlib.util import find_spec

import numpy as np
import torch

from spinelib.renderer_speed import cpu_seconds, renderer_seconds


def test_seconds_of_both_renderers():
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    seconds = renderer_seconds(torch.full((16, 16, 16), 0.02), affine, turns=1)
    names = {"drr.cpu_s_256"} | ({"drr.cpu_s_256_nanodrr"} if find_spec("nanodrr") else set())
    assert set(seconds) == names
    assert all(value > 0 for value in seconds.values())


def test_the_least_of_several_turns_counts():
    waits = iter([0.06, 0.0, 0.03])

    def work():
        end = time.process_time() + next(waits)
        while time.process_time() < end:
            pass

    assert cpu_seconds({"work": work}, 3)["work"] < 0.03
