"""What shipped configs compute is what was recorded, up to another machine's rounding: see same_numbers.py."""

import json
from collections.abc import Iterator

import pytest
import torch

from tests.same_numbers import RECORD, numbers

KNOWN = json.loads(RECORD.read_text())
SMALL = ("demo", "demo+captioning", "demo+fsq", "demo+narrow_latents", "demo+titok", "demo+text_sigmoid", "imagenet256")
PRIORS = ("demo", "demo+captioning", "demo+diffusion_head", "demo+masked", "demo+mse_head", "demo+noise_extended")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order; the tests behind have their threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [*SMALL, *(f"prior {prior}" for prior in PRIORS)])
def test_numbers_are_those_that_were_recorded(name: str) -> None:
    known, got = KNOWN[name], numbers(name)
    assert got.keys() == known.keys()
    torch.testing.assert_close(got["losses"], known["losses"], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(got["losses"][0], known["losses"][0], rtol=1e-4, atol=1e-5)
    for what in set(known) - {"losses"}:  # five steps multiply rounding errors: mean and spread, not each value
        torch.testing.assert_close(got[what]["values"][:2], known[what]["values"][:2], rtol=5e-2, atol=2e-2)
