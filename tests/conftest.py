"""What holds for every test: no network and a fixed seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file then fails at once, not after half a minute of retries
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many threads as workers, or they wait for each other

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state; what a test asserts must hold for others too."""
    torch.manual_seed(0)
