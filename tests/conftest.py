"""What holds for every test: no network, a fixed seed, and threads that do not fight each other on a small machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file then fails at once, not after half a minute of retries
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state; what a test asserts must hold for others too."""
    torch.manual_seed(0)
    yield
