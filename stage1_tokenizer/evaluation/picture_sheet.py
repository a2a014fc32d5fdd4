"""Pictures side by side as one image: strips, grids of strips, and their PNG bytes.

Gaps and missing cells are transparent, so that a sheet sits on a light and on a dark page alike. Pixels are enlarged by
whole numbers and never smoothed: what a sheet shows is what a model made.
"""

import base64
import io
import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from data.pictures.transforms import to_pixels

GAP = 2  # pixels between pictures, before scaling


def image_strip(images: Tensor, columns: int | None = None, scale: int = 1) -> Image.Image:
    """Pictures (N, 3, H, W) in [-1, 1] side by side (rows of `columns`), each pixel `scale` x `scale`; RGBA.

    Raises ValueError for another shape, or no picture.
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[1] != 3:
        raise ValueError(
            f"got pictures of shape {tuple(images.shape)}, wanted (N, 3, H, W) with N of 1 or more; stack them"
        )
    columns = columns or len(images)
    rows = math.ceil(len(images) / columns)
    h, w = images.shape[-2:]
    pixels = to_pixels(images).cpu().permute(0, 2, 3, 1).contiguous()
    sheet = Image.new("RGBA", (columns * (w + GAP) - GAP, rows * (h + GAP) - GAP), (0, 0, 0, 0))
    for index, picture in enumerate(pixels.numpy()):
        sheet.paste(Image.fromarray(picture), (index % columns * (w + GAP), index // columns * (h + GAP)))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def image_grid(rows: Sequence[Tensor], scale: int = 1) -> Image.Image:
    """Strips of pictures (N, 3, H, W) below one another, one strip for each entry of `rows`."""
    strips = [image_strip(images, scale=scale) for images in rows]
    gap = GAP * scale
    sheet = Image.new("RGBA", (max(s.width for s in strips), sum(s.height + gap for s in strips) - gap), (0, 0, 0, 0))
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + gap
    return sheet


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_uri(content: bytes) -> str:
    """The bytes of a PNG file as an address that holds them, for pages that refer to nothing outside themselves."""
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
