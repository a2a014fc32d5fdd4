"""Pixels to [-1, 1] and back."""

from __future__ import annotations

import pytest
import torch

from data.pictures.transforms import to_pixels, to_unit_range


def test_range_changes_and_back_lose_nothing() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit_range(pixels)), pixels)
    assert to_unit_range(pixels)[[0, -1]].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("side", [16, 300])
def test_the_range_changes_alike_in_any_layout_and_block(side: int) -> None:
    pixels = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    images = to_unit_range(pixels)
    assert images.is_contiguous() and torch.equal(images, pixels.float() * (1 / 127.5) - 1)
