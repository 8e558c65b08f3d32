"""Shared fixtures."""

import os
from pathlib import Path

import pytest
import torch

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
