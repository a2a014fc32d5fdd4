"""Geometry of pictures, and the only place where a range changes.

Pictures are uint8 0..255 everywhere up to `to_unit_range`, and float [-1, 1] after it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit_range(pixels: Tensor) -> Tensor:
    """Return uint8 0..255 pixels as float32 in [-1, 1], same shape."""
    return pixels.to(torch.float32).mul_(1 / 127.5).sub_(1.0)


def to_pixels(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8 0..255, clipped and rounded, same shape; the inverse of `to_unit_range`."""
    return images.detach().float().add(1.0).mul(127.5).round().clamp_(0, 255).to(torch.uint8)


def flip_some(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Return `images` (B, 3, H, W) with each one mirrored left to right with `probability`."""
    flip = torch.rand(images.shape[0], generator=generator) < probability
    return torch.where(flip[:, None, None, None].to(images.device), images.flip(-1), images)
