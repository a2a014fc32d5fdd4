"""Where every member of a tar lies, from its headers alone: shards are read at random without unpacking."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.schema import DataError

BLOCK = 512  # bytes: a tar is made of these
PLAIN = ord("0")  # the type of a plain file


class Place(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One sample of a shard: its key and its members by extension (lower case)."""

    key: str
    members: dict[str, Place]


def index_tar(path: Path) -> list[Entry]:
    """Return the samples of a tar, in order.

    Raises:
        DataError: the tar is truncated or not a tar, or a key comes back after another one's members.
    """
    entries: list[Entry] = []
    seen: set[str] = set()
    for name, place in member_places(path):
        key, member = split_member(name)
        if entries and entries[-1].key == key:
            if member in entries[-1].members:
                raise DataError(f"{path} holds {name} twice; write it again")
            entries[-1].members[member] = place
            continue
        if key in seen:
            raise DataError(f"{path} holds the members of key {key} in two places; write it again")
        seen.add(key)
        entries.append(Entry(key, {member: place}))
    return entries


def member_places(path: Path) -> Iterator[tuple[str, Place]]:
    """Yield (name, place) of every file in a tar, in order.

    Plain headers, those that this program and WebDataset write, are read directly, which is ten times faster than
    `tarfile`; from the first header of another kind on (long names, links, extensions), `tarfile` reads the rest.

    Raises:
        DataError: the tar is truncated, or not a tar.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            header = file.read(BLOCK)
            offset = 0
            while header[:1] not in (b"", b"\0"):
                # A plain file's octal size, type "0", and no prefix to its name.
                if len(header) < BLOCK or header[156] != PLAIN or header[345] or header[124] & 0x80:
                    break
                length = int(header[124:136].rstrip(b"\0 "), 8)
                # The sum of all bytes, its own digits as spaces; Adler's lower half is that sum + 1, modulo 65521.
                stated = header[148:156]
                if (int(stated.rstrip(b"\0 "), 8) - 256 + sum(stated) + 1) % 65521 != zlib.adler32(header) & 0xFFFF:
                    break
                offset += BLOCK
                if offset + length > size:
                    raise DataError(f"{path} is truncated inside member {_name(header)}; write or fetch it again")
                yield _name(header), Place(offset, length)
                offset += -(-length // BLOCK) * BLOCK
                file.seek(offset)
                header = file.read(BLOCK)
            else:
                if not header:
                    raise DataError(f"{path} ends without the end of a tar; it is truncated, write or fetch it again")
                return
            if len(header) < BLOCK:
                raise DataError(f"{path} is truncated inside a header; write or fetch it again")
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if not info.isfile():
                        continue
                    if info.offset_data + info.size > size:
                        raise DataError(f"{path} is truncated inside member {info.name}; write or fetch it again")
                    yield info.name, Place(info.offset_data, info.size)
                file.seek(tar.offset)
                if file.read(1) != b"\0":
                    raise DataError(f"{path} ends without the end of a tar; it is truncated, write or fetch it again")
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable tar ({error}); write or fetch it again") from error


def _name(header: bytes) -> str:
    return header[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def split_member(name: str) -> tuple[str, str]:
    """Return (key, extension) of a member's name, cut at the first dot of its last part, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
