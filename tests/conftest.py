"""What holds for every test: no network and a fixed seed; long files begin first."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing file then fails at once, not after half a minute of retries
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many threads as workers, or they wait for each other

import pytest
import torch

LONG = ("test_end_to_end", "test_ranks", "test_faults", "test_overlays", "test_readme", "test_engines", "test_models")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first: two workers take a file each, and end together."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state; what a test asserts must hold for others too."""
    torch.manual_seed(0)
