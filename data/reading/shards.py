"""Shards on disk: write a tar atomically, index its members, read any of them by offset.

A tar is appended sample by sample under a temporary name, synced, and renamed: under its final name it is complete.
Headers carry no time and no user, so that equal samples give equal bytes. They are the bytes of `webdataset.TarWriter`,
which takes 2.6 to 5.2 times the processor time (2,000 samples of 30 to 0.2 kB) and imports torch.

A reader finds every member's offset by walking the headers once (512 bytes per member), and then reads a member with
one `pread`, in any order.
"""

from __future__ import annotations

import array
import contextlib
import functools
import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.forms import parse_json
from data.reading.tar_index import BLOCK, index_tar
from data.schema import DataError, unwritable

_OPEN_FILES = 400
_RECORD = 20 * BLOCK  # tar pads its files to whole records


class ShardWriter:
    """Write one tar. `with ShardWriter(path) as shard: shard.write(key, {"jpg": ..., "txt": ..., "json": ...})`.

    The file appears at `path` when the block ends without an error, complete and synced. A shard without samples is not
    written at all. Afterwards `count`, `bytes` and `sha256` describe it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.bytes = 0
        self.sha256 = ""
        self._keys: set[str] = set()
        self._part = path.with_name(f"{path.name}.{os.getpid()}.part")
        self._hash = hashlib.sha256()
        self._file: Any = None

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append the members of one sample side by side. A key may come once, since readers group members by key."""
        assert key not in self._keys, f"key {key} comes twice in {self.path}"
        self._keys.add(key)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "wb")  # noqa: SIM115 - closed by __exit__
        for member, content in members.items():
            self._append(tar_header(f"{key}.{member}", len(content)))
            self._append(content)
            self._append(b"\0" * (-len(content) % BLOCK))
        self.count += 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._file is None:
            return
        if kind is not None:
            self._abandon()
            return
        self._append(b"\0" * (2 * BLOCK))  # the end of the archive
        self._append(b"\0" * (-self.bytes % _RECORD))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self.path)
        except OSError as failure:
            self._abandon()
            raise unwritable(self.path, failure) from failure
        self.sha256 = self._hash.hexdigest()

    def _append(self, content: bytes) -> None:
        try:
            self._file.write(content)
        except OSError as failure:
            self._abandon()
            raise unwritable(self.path, failure) from failure
        self._hash.update(content)
        self.bytes += len(content)

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is buffered, and there may be no room for it
            self._file.close()
        self._part.unlink(missing_ok=True)


def tar_header(name: str, size: int) -> bytes:
    """Return `tarfile`'s header of a plain file without time and owner: only name, size and checksum are its own."""
    encoded = name.encode()
    if len(encoded) > 99 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        return info.tobuf(tarfile.USTAR_FORMAT)
    header = bytearray(_header_template())
    header[: len(encoded)] = encoded
    header[124:136] = b"%011o\0" % size
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    return bytes(header)


@functools.cache
def _header_template() -> bytes:
    info = tarfile.TarInfo("")
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


class ShardReader:
    """The samples of several shards under one running number, read by offset; safe to use from many threads.

    A sample takes about a hundred bytes and its key: numbers live in arrays, and samples with the same members share
    the list of them. The index is read anew at every start, in 0.1 s of processor time for 10,000 samples of three
    members (`tests.benchmarks.bench_data --only index`): too little for a copy on disk, which could go stale. Files are
    opened on first use in every process, so that a reader may be sent to workers.

    Args:
        paths: the shards, in order.
        keep: of the keys, those that are wanted; None: all.
    """

    def __init__(self, paths: list[Path], keep: Callable[[str], bool] | None = None) -> None:
        self.paths = paths
        self._keys: list[str] = []
        self._shards = array.array("l")  # of every sample: its shard,
        self._kinds = array.array("l")  # which members it has,
        self._firsts = array.array("q")  # and where their offsets and sizes begin in `_places`
        self._places = array.array("q")
        self._members: list[tuple[str, ...]] = []
        numbers: dict[tuple[str, ...], int] = {}
        for shard, path in enumerate(paths):
            for entry in index_tar(path):
                if keep is not None and not keep(entry.key):
                    continue
                members = tuple(entry.members)
                if members not in numbers:
                    numbers[members] = len(numbers)
                    self._members.append(members)
                self._keys.append(entry.key)
                self._shards.append(shard)
                self._kinds.append(numbers[members])
                self._firsts.append(len(self._places))
                for place in entry.members.values():
                    self._places.extend(place)
        self._files: dict[int, int] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        return self._keys[sample]

    def shard(self, sample: int) -> int:
        """Return the number of the shard that a sample is in."""
        return self._shards[sample]

    def member_names(self, sample: int) -> tuple[str, ...]:
        """Return the extensions that a sample has."""
        return self._members[self._kinds[sample]]

    def read(self, sample: int, member: str) -> bytes | None:
        """Return the bytes of a member, or None where the sample has no such member.

        Raises:
            DataError: the shard became shorter than its index says.
        """
        members = self.member_names(sample)
        if member not in members:
            return None
        at = self._firsts[sample] + 2 * members.index(member)
        offset, size = self._places[at], self._places[at + 1]
        content = self._pread(self._shards[sample], size, offset)
        if len(content) != size:
            path = self.paths[self._shards[sample]]
            raise DataError(f"{path} ends inside {self._keys[sample]}.{member}; it changed while it was read")
        return content

    def read_json(self, sample: int) -> dict[str, Any]:
        """Return the sample's json, or {} where it has none.

        Raises:
            DataError: the json does not parse.
        """
        content = self.read(sample, "json")
        if content is None:
            return {}
        try:
            parsed = parse_json(content)
        except ValueError as error:
            raise DataError(f"{self.key(sample)}.json is not JSON ({error}); run: python -m data verify") from error
        return parsed if isinstance(parsed, dict) else {}

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        if self._process != os.getpid():  # inherited through a fork: the parent keeps its own descriptors
            self._files, self._process = {}, os.getpid()
        if shard in self._files:
            return os.pread(self._files[shard], size, offset)
        file = os.open(self.paths[shard], os.O_RDONLY)
        if len(self._files) < _OPEN_FILES:
            self._files[shard] = file
            return os.pread(file, size, offset)
        try:  # there are more shards than a process may have files open
            return os.pread(file, size, offset)
        finally:
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}
