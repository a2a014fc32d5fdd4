"""Bad input: each ends as a counted, listed drop or one clear error; what was readable is kept, and no code runs."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data.__main__ import main
from data.prepare.quality import clean_caption
from data.sources.open import SourceConfig
from tests.data_samples import dropped_in, encoded, flickr_folder, photo, prepared, records_in, tar_of


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


@pytest.mark.parametrize("resize", ["center_crop", "no"])
def test_bad_pictures_are_counted_and_listed_and_good_ones_kept(tmp_path: Path, resize: str) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=4, captions=1)
    for name, (content, _) in BAD_PICTURES.items():
        (folder / "Images" / name).write_bytes(content)
    with open(folder / "captions.txt", "a") as file:
        file.writelines(f"{name},bad {name}\n" for name in BAD_PICTURES)
    assert len(BAD_PICTURES["bomb.png"][0]) < 2048
    manifest = prepared(SourceConfig("folder", (str(folder),)), tmp_path / "out", resize=resize)
    assert sorted(records_in(tmp_path / "out")) == ["000_ab", "001_ab", "002_ab", "003_ab"]
    listed = sorted(reason for _, reason in dropped_in(tmp_path / "out"))
    assert listed == sorted(reason for _, reason in BAD_PICTURES.values())
    assert sum(manifest["dropped"].values()) == len(BAD_PICTURES)


def test_keep_lets_no_bad_picture_through(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=2, captions=1)
    (folder / "Images" / "000_ab.jpg").write_bytes(GOOD[: len(GOOD) // 2])
    manifest = prepared(SourceConfig("folder", (str(folder),)), tmp_path / "out", format="keep", resize="no")
    assert manifest["dropped"] == {"unreadable": 1} and list(records_in(tmp_path / "out")) == ["001_ab"]


BAD_CAPTIONS: dict[str, tuple[bytes, str | None]] = {
    "nul": (b"a dog\x00 runs", "a dog runs"),
    "utf8": (b"a caf\xe9 and \xff\xfe dogs", "a caf and dogs"),
    "megabyte": (b"dog " * 262_144, None),
    "spaces": (b" \t  ", None),
    "lines": (b"one\ttwo  three\r", "one two three"),
    "controls": (b"a\x1b[31m red\x07 dog", "a [31m red dog"),
    "wide": ("une image \u200bd\u2019été 🐕".encode(), "une image d\u2019été 🐕"),
}


@pytest.mark.parametrize("layout", ["csv", "tar"])
def test_bad_captions_are_repaired_or_counted(tmp_path: Path, layout: str) -> None:
    source = tmp_path / "source"
    if layout == "csv":
        (source / "Images").mkdir(parents=True)
        lines = [b"image,caption"]
        for i, (name, (caption, _)) in enumerate(BAD_CAPTIONS.items()):
            (source / "Images" / f"{name}.jpg").write_bytes(encoded(photo(i)))
            lines.append(f"{name}.jpg,".encode() + caption)
        (source / "captions.csv").write_bytes(b"\n".join(lines) + b"\n")
    else:
        members = [
            member
            for i, (name, (caption, _)) in enumerate(BAD_CAPTIONS.items())
            for member in ((f"{name}.jpg", encoded(photo(i))), (f"{name}.txt", caption))
        ]
        tar_of(source / "0.tar", members)
    manifest = prepared(SourceConfig("auto", (str(source),)), tmp_path / "out")
    got = {key: record["caption"] for key, record in records_in(tmp_path / "out").items()}
    assert got == {name: wanted for name, (_, wanted) in BAD_CAPTIONS.items() if wanted is not None}
    assert manifest["dropped"] == {"no caption": 2}
    assert manifest["captions"]["caption too long"] == 1 == manifest["captions"]["caption empty"]
    assert manifest["captions"]["repaired"] == 3
    assert {("megabyte", "caption too long"), ("spaces", "caption empty")} <= set(dropped_in(tmp_path / "out"))


def test_clean_caption_leaves_good_ones_alone() -> None:
    for caption in ("A dog .", "Ein Hund läuft über die Straße.", "犬が走る", "50 % – “quoted”", "x"):
        assert clean_caption(caption) == caption


def test_nothing_readable_is_an_error_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images" / "a.jpg").write_bytes(b"no")
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,x\nb.jpg,y\n")
    status = main(["prepare", "--path", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"])
    said = capsys.readouterr().err
    assert status == 1 and "nothing was readable" in said and "'missing': 1" in said and "'unreadable': 1" in said


def test_a_picture_of_one_colour_and_of_one_pixel_is_a_picture(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    for name, size in (("dot", (1, 1)), ("flat", (50, 50)), ("tall", (3, 40))):
        (tmp_path / "Images" / f"{name}.png").write_bytes(encoded(Image.new("RGB", size, "red"), "PNG"))
    (tmp_path / "captions.txt").write_text("image,caption\ndot.png,x\nflat.png,y\ntall.png,z\n")
    manifest = prepared(SourceConfig("folder", (str(tmp_path),)), tmp_path / "out")
    assert manifest["dropped"] == {} and len(records_in(tmp_path / "out")) == 3
