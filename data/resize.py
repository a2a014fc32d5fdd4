"""Resize and crop policies: pure functions from a picture and a side to a picture.

Names follow img2dataset where the meaning is the same. Cropping is done by the resampler itself (`box=`), which skips
the part of the picture that would be thrown away.
"""

from __future__ import annotations

import math

from PIL import Image

from data.schema import DataError

RESIZE_MODES = ("center_crop", "keep_ratio", "budget", "no")


def resize(picture: Image.Image, size: int, mode: str = "center_crop") -> Image.Image:
    """Return `picture` (RGB) resized by a policy.

    Args:
        picture: any size.
        size: S, in pixels.
        mode: "center_crop": S x S from the largest centred square. "keep_ratio": the short side becomes S, nothing is
            cropped, so that random crops stay possible. "budget": the aspect is kept and the area is at most S x S.
            "no": as it is. The last three never enlarge.

    Raises:
        DataError: an unknown mode.
    """
    width, height = picture.size
    if mode == "no":
        return picture
    if mode == "center_crop":
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        if (width, height) == (size, size):
            return picture
        return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))
    if mode == "keep_ratio":
        scale = size / min(width, height)
    elif mode == "budget":
        scale = math.sqrt(size * size / (width * height))
    else:
        raise DataError(f"resize mode {mode!r} is unknown, choose one of {', '.join(RESIZE_MODES)}")
    if scale >= 1:
        return picture
    rounding = math.floor if mode == "budget" else round
    target = (max(1, rounding(width * scale)), max(1, rounding(height * scale)))
    return picture.resize(target, Image.Resampling.BICUBIC)
