"""Shared fixtures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from spinelib.geometry import PlanarGrid, Projection
from spinelib.spine import Curves

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Keep parallel test workers from fighting for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of small real CT/MR data; tests that need it are left out, with the reason, when it is absent."""
    folder = Path(os.environ.get("SPINELIB_REALDATA", ROOT.parent / "shared" / "realdata"))
    if not folder.is_dir():
        pytest.skip(f"REAL DATA ABSENT: no folder {folder}; set SPINELIB_REALDATA to run this test")
    return folder


@pytest.fixture
def house_style():
    """Draw in the house style and close every figure afterwards."""
    from matplotlib import pyplot as plt

    from spinelib.figures import use_house_style

    use_house_style()
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def curves() -> Curves:
    """A column with waves in both views, 38 mm wide and 30 mm deep."""
    heights = np.linspace(470, 5, 209)
    centre, depth = 15 * np.sin(heights / 90), 18 * np.cos(heights / 140)
    return Curves(heights, np.stack([centre + 19, centre, centre - 19]), np.stack([depth + 15, depth, depth - 15]))


@pytest.fixture(scope="session")
def image() -> Projection:
    """A DXA of noise."""
    grid = PlanarGrid.centred("coronal", (333, 250), (3.0, 2.4), (200.0, 0.0))
    values = np.random.default_rng(0).random((2, 333, 250)).astype(np.float32)
    return Projection(("bone", "tissue"), values, grid)
