"""What holds for every test: no network and a fixed seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file then fails at once, not after half a minute of retries
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state; what a test asserts must hold for others too."""
    torch.manual_seed(0)
