"""WebDataset tars as a source, local or behind a URL: img2dataset's, ours, or anyone's.

A tar is read from front to back, one sample in memory at a time, so that it may be remote and of any size; a whole tar
is the unit of work and becomes one shard per split. URLs are opened by fsspec (`s3://`, `gs://`, `https://`, ...);
nothing is ever handed to a shell, and members are read by an allow-list of kinds: a pickle in a tar stays unread.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec

from data.forms import parse_json
from data.reading.tar_index import split_member
from data.reading.urls import is_remote, tar_urls
from data.schema import SOURCE_MEMBERS, DataError, Drop, Sample, Stretch, clean_key, split_named
from data.sources.captions import texts

_TEXT_MEMBERS = ("txt", "json", "cls", "caption")
_LARGEST_MEMBER = 1 << 28
# Fields of the json that the shards state themselves.
_OWN_FIELDS = (
    *("key", "caption", "captions", "status", "width", "height", "original_width", "original_height"),
    *("label", "label_name", "attributes", "sha256"),
)


class Tars:
    """Tars in order; a source (`chunks`, `read`, `fingerprint`) whose items are whole tars."""

    unit = "tar"

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.urls = tar_urls(paths)
        if not self.urls:
            raise DataError(f"no tar at {', '.join(paths)}; --source tars wants .tar files, a folder of them, or URLs")
        for url in self.urls:
            if not is_remote(url) and not Path(url).is_file():
                raise DataError(f"no tar at {url}; check --path")

    def chunks(self, longest: int) -> list[Stretch]:
        """One stretch per tar, whatever its number of samples.

        How many it has is only known when it is read. Shards of a size of our own would mean to read every tar, perhaps
        from far away, before the first shard could get its number, or a chunk that waits for the one before it.
        """
        return [Stretch(i, i + 1, split_named(PurePosixPath(u).parent.name)) for i, u in enumerate(self.urls)]

    def fingerprint(self) -> str:
        """Names and sizes of the tars; for remote ones as the store reports them."""
        return f"tars {[(PurePosixPath(url).name, _size(url)) for url in self.urls]}"

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """Yield the samples of tars [start, stop)."""
        for url in self.urls[start:stop]:
            try:
                with fsspec.open(url, "rb") as file:
                    yield from _samples(file, PurePosixPath(url))
            except FileNotFoundError as error:
                raise DataError(f"{url} is gone; it was there when the run began: {error}") from error


def _samples(file: BinaryIO, path: PurePosixPath) -> Iterator[Sample | Drop]:
    """Group adjacent members by key. A tar that breaks off gives a drop for what was begun and ends there."""
    key: str | None = None
    members: dict[str, bytes] = {}
    odd: list[str] = []
    split = split_named(path.parent.name)
    try:
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                name, member = split_member(info.name)
                if name != key:
                    if key is not None:
                        yield _sample(key, members, odd, split)
                    key, members, odd = name, {}, []
                if member in members:
                    odd.append(f"{info.name} comes twice")
                elif member not in SOURCE_MEMBERS and member not in _TEXT_MEMBERS:
                    odd.append(f"{member or 'a member without an ending'} is not a kind that is read")
                elif info.size > _LARGEST_MEMBER:
                    odd.append(f"{info.name} has {info.size} bytes")
                else:
                    content = tar.extractfile(info)
                    members[member] = content.read() if content is not None else b""
        if key is not None:
            yield _sample(key, members, odd, split)
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Drop(clean_key(key or path.stem), "truncated tar", f"{path.name} breaks off here: {error}")


def _sample(key: str, members: dict[str, bytes], odd: list[str], split: str | None) -> Sample | Drop:
    clean = clean_key(key)
    if key.startswith("/") or ".." in PurePosixPath(key).parts:
        return Drop(clean, "outside", f"the name {key[:120]!r} leads out of the tar")
    pictures = [name for name in SOURCE_MEMBERS if name in members]
    if not pictures:
        return Drop(clean, "no picture", "; ".join(odd)[:300] or f"members {sorted(members)}")
    try:
        record = parse_json(members.get("json", b"{}"))
    except ValueError:
        record = {}
    record = record if isinstance(record, dict) else {}
    captions = texts(record.get("captions")) or texts(record.get("caption"))
    if not captions:
        raw = members.get("txt", members.get("caption"))
        captions = [raw.decode("utf-8", "replace")] if raw is not None else []
    attributes = record.get("attributes")
    name = record.get("label_name")
    return Sample(
        clean,
        captions,
        image=members[pictures[0]],
        label=_label(record.get("label", members.get("cls", b"-1"))),
        label_name=name if isinstance(name, str) else None,
        attributes=attributes if isinstance(attributes, dict) else {},
        split=split,
        metadata={field: value for field, value in record.items() if field not in _OWN_FIELDS},
    )


def _label(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return -1


def _size(url: str) -> int:
    if not is_remote(url):
        return Path(url).stat().st_size
    file_system, path = fsspec.core.url_to_fs(url)
    return int(file_system.info(path).get("size") or -1)
