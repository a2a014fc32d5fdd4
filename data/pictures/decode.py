"""Encoded bytes to RGB pixels and back: the only place that opens a picture.

Only JPEG, PNG and WebP are opened when shards are read; `prepare` opens a few more formats. Policies, in this order:
the size in the header is checked before anything is decoded, the EXIF orientation is applied, transparency is laid over
white, palettes, greys and CMYK become RGB. An animation is refused by `prepare` and gives its first frame elsewhere.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

from data.schema import DataError

READ_FORMATS = ("JPEG", "PNG", "WEBP")
SOURCE_FORMATS = (*READ_FORMATS, "GIF", "BMP", "TIFF", "PPM")
MEMBER_OF_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
MAX_PIXELS = 64_000_000  # a header that claims more is refused before a byte is decoded
ORIENTATION = 0x0112

_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

# PIL warns of large pictures where `open_picture` refuses them, a few lines on.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(DataError):
    """A picture that cannot be used; `reason` is a word or two of the drop counts."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def open_picture(data: bytes, formats: tuple[str, ...] = READ_FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the picture in `data` with its header read and nothing decoded yet.

    Raises:
        PictureError: reason "empty", "unreadable" or "too many pixels".
    """
    if not data:
        raise PictureError("empty", "the picture has zero bytes")
    try:
        picture = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise PictureError("too many pixels", f"over {max_pixels} pixels: {short(error)}") from error
    except Exception as error:  # PIL raises many kinds on hostile bytes; all mean the same here
        raise PictureError("unreadable", f"not one of {', '.join(formats)}: {short(error)}") from error
    if picture.width * picture.height > max_pixels:
        raise PictureError("too many pixels", f"{picture.width} x {picture.height} is over {max_pixels} pixels")
    return picture


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a JPEG that is whole, grey or of three colours, and without EXIF; None of other bytes.

    Only the markers before the picture are walked over (ITU T.81, annex B): those that our own shards have.
    """
    at = 2
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in (0xC0, 0xC1, 0xC2):  # the frame header: bits, height, width, colours
            bits, height, width, colours = struct.unpack_from(">BHHB", data, at + 4)
            return (width, height) if bits == 8 and colours in (1, 3) and width and height else None
        if not (0xDB <= marker <= 0xDD or marker in (0xC4, 0xE0, 0xFE)):  # tables, JFIF, a comment
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def decode(data: bytes, formats: tuple[str, ...] = READ_FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return `data` as an upright RGB picture (mode "RGB"). Raises PictureError."""
    picture = open_picture(data, formats, max_pixels)
    try:
        return to_rgb(picture)
    except Exception as error:
        raise PictureError("unreadable", f"the picture does not decode: {short(error)}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return the first frame upright, opaque (over white) and in RGB."""
    picture.load()
    if picture.getexif().get(ORIENTATION, 1) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit greys: PIL would clip, not scale
        values = np.asarray(picture, np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        return Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def check_png(data: bytes) -> None:
    """Raise PictureError where a PNG holds fewer rows than its header says, which PIL would fill with black.

    Counts what the data chunks decompress to, never more than the header's size asks for.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    wanted = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if rows > 0 and columns > 0)
    inflate, found, at = zlib.decompressobj(), 0, 8
    while at + 8 <= len(data) and found < wanted and not inflate.eof:
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        pending = data[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        while pending and found < wanted:
            found += len(inflate.decompress(pending, min(wanted - found, 1 << 20)))
            pending = inflate.unconsumed_tail
        at += 12 + length
    if found < wanted:
        raise PictureError("unreadable", f"a PNG of {width} x {height} needs {wanted} bytes of rows, it has {found}")


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Return (width, height) after the EXIF orientation is applied, from the header alone."""
    turned = picture.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return (picture.height, picture.width) if turned else (picture.width, picture.height)


def encode(picture: Image.Image, member: str, quality: int) -> bytes:
    """Return the bytes of `picture` as `member`: "jpg" or "webp" at `quality` (1 to 100), or "png" (lossless)."""
    buffer = io.BytesIO()
    if member == "jpg":
        picture.save(buffer, "JPEG", quality=quality)
    elif member == "webp":
        picture.save(buffer, "WEBP", quality=quality)
    elif member == "png":
        picture.save(buffer, "PNG", compress_level=4)
    else:
        raise DataError(f"pictures are written as jpg, png or webp, not {member!r}")
    return buffer.getvalue()


def short(error: Exception) -> str:
    """Return one line that says what an error of another library was."""
    return f"{type(error).__name__}: {error}"[:160]
