"""Geometry of pictures, and the only place where a range changes.

Pictures are uint8 0..255 everywhere up to `to_unit_range`, and float [-1, 1] after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 18  # floats: a megabyte


def to_unit_range(pixels: Tensor) -> Tensor:
    """Return uint8 0..255 pixels as contiguous float32 in [-1, 1], same shape."""
    out = torch.empty(pixels.shape, device=pixels.device)
    # On a CPU in blocks that stay in its cache for all three operations; small pictures are one block.
    block = max(1, _BLOCK * len(pixels) // pixels.numel()) if pixels.device.type == "cpu" else len(pixels)
    for part, floats in zip(pixels.split(block), out.split(block), strict=True):
        floats.copy_(part).mul_(1 / 127.5).sub_(1.0)
    return out


def to_pixels(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8 0..255, clipped and rounded, same shape; the inverse of `to_unit_range`."""
    return images.detach().float().add(1.0).mul(127.5).round().clamp_(0, 255).to(torch.uint8)


def flip_some(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return `images` (B, 3, H, W) with each one mirrored left to right with `probability`."""
    flip = torch.rand(images.shape[0], generator=generator) < probability
    return torch.where(flip[:, None, None, None].to(images.device), images.flip(-1), images)
