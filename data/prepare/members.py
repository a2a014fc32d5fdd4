"""One sample as it is written: decoded, checked, resized, encoded, with its record; or why it is left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from data.pictures.decode import (
    MEMBER_OF_FORMAT,
    SOURCE_FORMATS,
    PictureError,
    check_png,
    encode,
    open_picture,
    short,
    to_rgb,
    upright_size,
)
from data.prepare.options import PrepareConfig
from data.prepare.quality import picture_hash
from data.schema import (
    DataError,
    Drop,
    Sample,
    split_of,
)


@dataclass
class Made:
    """A sample as it is written: its tar members, its size before resizing, and its hash (b"" where none is wanted)."""

    key: str
    split: str
    captions: list[str]
    members: dict[str, bytes]
    original: tuple[int, int]
    hash: bytes


def make_members(sample: Sample, captions: list[str], config: PrepareConfig) -> Made | Drop:
    """Return what is written of a sample, or why nothing is."""
    try:
        member, content, size, original, code = _make_picture(sample, config)
    except PictureError as error:
        return Drop(sample.key, error.reason, str(error))
    record = {
        **sample.metadata,
        "key": sample.key,
        "caption": captions[0],
        "captions": captions,
        "status": "success",
        "width": size[0],
        "height": size[1],
        "original_width": original[0],
        "original_height": original[1],
        "label": sample.label,
        "label_name": sample.label_name,
        "attributes": sample.attributes,
    }
    if sample.image is not None:
        record["sha256"] = hashlib.sha256(sample.image).hexdigest()
    members = {
        member: content,
        "txt": captions[0].encode("utf-8", "replace"),
        "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),
    }
    split = sample.split or split_of(sample.key, config.val_fraction)
    return Made(sample.key, split, captions, members, original, code)


def _make_picture(sample: Sample, config: PrepareConfig) -> tuple[str, bytes, tuple[int, int], tuple[int, int], bytes]:
    """Return member, bytes, size, size before resizing, and hash. Raises PictureError."""
    hashed: Callable[[Image.Image], bytes] = picture_hash if config.filters.near_duplicates is not None else _no_hash
    drawn = "png" if config.format == "keep" else config.format  # where there are no bytes to keep
    if sample.pixels is not None:
        picture = Image.fromarray(sample.pixels)
        return drawn, encode(picture, drawn, config.quality), picture.size, picture.size, hashed(picture)
    data = sample.image or b""
    header = open_picture(data, SOURCE_FORMATS, config.filters.max_pixels)
    try:
        if getattr(header, "is_animated", False):
            raise PictureError("animated", f"{getattr(header, 'n_frames', 'several')} frames; one picture is wanted")
        if header.format == "PNG":
            check_png(data)
        original = upright_size(header)
        refused = config.filters.size_reason(*original)
        if refused is not None:
            raise PictureError(*refused)
        if config.format == "keep" and header.format in MEMBER_OF_FORMAT:
            return MEMBER_OF_FORMAT[header.format], data, original, original, hashed(to_rgb(header))
        if config.resize == "no" or (config.resize == "center_crop" and original == (config.size, config.size)):
            picture = to_rgb(header)
            return drawn, encode(picture, drawn, config.quality), original, original, hashed(picture)
        from data.pictures.resize import as_picture, encode_pixels, pixels_of, resize  # torch, only where it is needed

        pixels = resize(pixels_of(data, header, config.size, config.resize), config.size, config.resize)
        content = encode_pixels(pixels, drawn, config.quality)
        code = hashed(as_picture(pixels)) if hashed is picture_hash else b""
        return drawn, content, (pixels.shape[2], pixels.shape[1]), original, code
    except DataError:
        raise
    except Exception as error:  # decoders raise many kinds on hostile bytes; all mean the same here
        raise PictureError("unreadable", f"the picture does not decode: {short(error)}") from error


def _no_hash(picture: Image.Image) -> bytes:
    return b""
