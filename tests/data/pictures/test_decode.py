"""Pictures become upright RGB, and what is no picture is refused with a reason."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.pictures.decode import SOURCE_FORMATS, PictureError, check_png, decode, open_picture, plain_jpeg_size
from data.pictures.resize import pixels_of, resize
from data.reading.datasets import decode_image
from data.schema import DataError
from data.sources.open import SourceConfig
from tests.data_samples import encoded, photo, prepared, samples_in


def source(kind: str, path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(kind, (str(path),), **options)


def test_picture_modes_become_upright_opaque_rgb(tmp_path: Path) -> None:
    """Alpha over white, palettes, greys, CMYK and EXIF orientation, each against the colour it must show."""
    red = Image.new("RGB", (20, 20), (200, 30, 30))
    half = Image.new("RGBA", (20, 20), (200, 30, 30, 0))
    half.paste((200, 30, 30, 255), (0, 0, 20, 10))
    turned = Image.new("RGB", (20, 20), (200, 30, 30))
    turned.paste((255, 255, 255), (0, 10, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    grey16 = Image.new("I;16", (20, 20), 128 * 257)
    files = {
        "palette.png": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG", quality=100),
        "alpha.png": encoded(half, "PNG"),
        "turned.jpg": encoded(turned.rotate(180), "JPEG", quality=100, exif=exif),
        "grey.png": encoded(Image.new("L", (20, 20), 128), "PNG"),
        "grey16.png": encoded(grey16, "PNG"),
        "still.gif": encoded(red, "GIF"),
    }
    (tmp_path / "Images").mkdir()
    for name, content in files.items():
        (tmp_path / "Images" / name).write_bytes(content)
    (tmp_path / "captions.txt").write_text("image,caption\n" + "".join(f"{name},x\n" for name in files))
    manifest = prepared(source("folder", tmp_path), tmp_path / "out")
    assert manifest["dropped"] == {}
    for _, key, members in samples_in(tmp_path / "out"):
        picture = Image.open(io.BytesIO(members["png"]))
        assert picture.mode == "RGB" and picture.size == (16, 16)
        top, bottom = np.asarray(picture, np.int16)[[2, 13], 8]
        wanted = (128, 128, 128) if key.startswith("grey") else (200, 30, 30)
        assert max(abs(a - b) for a, b in zip(top, wanted, strict=True)) < 12, key
        below = (255, 255, 255) if key in ("alpha", "turned") else wanted
        assert max(abs(a - b) for a, b in zip(bottom, below, strict=True)) < 12, key


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_that_claims(width: int, height: int, rows: int = 1) -> bytes:
    """A PNG of a few hundred bytes whose header states any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes((1 + 3 * min(width, 1000)) * rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    buffer = io.BytesIO()
    frames = [photo(i) for i in range(3)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=50)
    return buffer.getvalue()


GOOD = encoded(photo(0), quality=95)
BAD_PICTURES = {
    "truncated.jpg": (GOOD[: len(GOOD) // 2], "unreadable"),
    "headless.jpg": (GOOD[20:], "unreadable"),
    "truncated.png": (encoded(photo(0), "PNG")[:-300], "unreadable"),
    "truncated.webp": (encoded(photo(0), "WEBP")[:-200], "unreadable"),
    "zero.jpg": (b"", "empty"),
    "noise.jpg": (bytes(range(256)) * 8, "unreadable"),
    "text.png": (b"<html>404</html>", "unreadable"),
    "bomb.png": (png_that_claims(30_000, 30_000), "too many pixels"),
    "lying.png": (png_that_claims(200, 200, rows=3), "unreadable"),
    "moving.gif": (animation("GIF"), "animated"),
    "moving.webp": (animation("WEBP"), "animated"),
    "moving.png": (animation("PNG"), "animated"),
    "program.jpg": (pickle.dumps({"a": 1}), "unreadable"),
    "vector.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "unreadable"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_decode_refuses_with_a_reason(name: str) -> None:
    content, reason = BAD_PICTURES[name]
    if reason == "animated" or name == "lying.png":  # `prepare` refuses these; a reader takes what is there
        assert decode(content, SOURCE_FORMATS).mode == "RGB"
        return
    with pytest.raises(PictureError) as caught:
        decode(content)
    assert caught.value.reason == reason


def test_only_lying_pngs_are_called_so() -> None:
    """Every depth and colour type that PIL writes, and an interlaced one, has the rows that its header says."""
    picture = photo(1, 37, 23)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        check_png(encoded(picture.convert("L" if mode == "I;16" else mode).convert(mode), "PNG"))
    header = struct.pack(">IIBBBBB", 5, 3, 8, 0, 0, 0, 1)  # Adam7: 1x1, 1x1, 2x1 + 1x... rows of each pass
    sizes = [(1, 1), (1, 1), (2, 0), (1, 1), (3, 1), (2, 2), (5, 1)]
    rows = sum(height * (1 + width) for width, height in sizes)
    for missing in (0, 1):
        body = zlib.compress(bytes(rows - missing))
        content = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
        if missing:
            with pytest.raises(PictureError, match="needs"):
                check_png(content)
        else:
            check_png(content)
            assert Image.open(io.BytesIO(content)).size == (5, 3)


def test_plain_jpegs_decode_as_any_and_others_are_left_to_pil() -> None:
    whole, grey = encoded(photo(1)), encoded(photo(1).convert("L"))
    for data in (whole, grey, encoded(photo(1), progressive=True)):
        assert plain_jpeg_size(data) == (60, 40)
        wanted = resize(pixels_of(data, open_picture(data), 40, "center_crop"), 40).numpy()
        assert np.array_equal(decode_image("", data, 40), wanted)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(photo(1), exif=exif)
    for data in (turned, encoded(photo(1).convert("CMYK")), encoded(photo(1), "PNG"), whole[:-9], whole[:30], b""):
        assert plain_jpeg_size(data) is None
    upright = np.asarray(photo(1).rotate(-90, expand=True).crop((0, 10, 40, 50)), np.int16)
    assert np.abs(decode_image("", turned, 40).transpose(1, 2, 0) - upright).mean() < 6
    at = whole.index(b"\xff\xc0")
    claims = whole[: at + 5] + (1000).to_bytes(2, "big") + b"\xff\xff" + whole[at + 9 :]  # 65,535 x 1,000
    assert plain_jpeg_size(claims) == (65535, 1000)
    with pytest.raises(DataError, match="over 64000000 pixels"):
        decode_image("", claims, 300)
