"""Remote shards kept on disk, within a number of bytes: what was longest not read makes room.

    cache = ShardCache("/scratch/shards", 50 * 10**9)
    with cache.open("s3://bucket/00000.tar") as stream: ...

Any number of processes may share a folder. A shard gets its name when it is whole, so that a process that is killed
leaves no half of one behind under it; the bytes of shards that are still being fetched count, too. A shard that is
dropped while it is read stays readable for whoever has it open. fsspec's own caches know no bound, and WebDataset's
fetches by starting programs and knows shards by the last part of their address only.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

import fsspec

from data.schema import DataError

PIECE = 2**22  # bytes that are fetched at once
STALE = 3600  # seconds after which a shard that nobody goes on fetching is dropped like any other


class ShardCache:
    """Shards in `folder`, at most `most_bytes` of them. Raises DataError for less than a byte."""

    def __init__(self, folder: str | Path, most_bytes: int) -> None:
        if most_bytes < 1:
            raise DataError(f"the cache of shards may hold {most_bytes} bytes, wanted 1 or more; raise cache_gigabytes")
        self.folder, self.most_bytes = Path(folder), most_bytes

    def open(self, url: str) -> BinaryIO:
        """The shard at `url`, fetched by fsspec where it is not here.

        Raises:
            OSError: it cannot be fetched.
            DataError: there is no room for it.
        """
        path = self.folder / (hashlib.sha256(url.encode()).hexdigest()[:32] + ".tar")
        try:
            return _opened(path)
        except FileNotFoundError:
            return self._fetched(url, path)

    def _fetched(self, url: str, path: Path) -> BinaryIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        number, part = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=self.folder)
        try:
            with os.fdopen(number, "w+b") as file, fsspec.open(url, "rb") as remote:
                while piece := remote.read(PIECE):
                    self._make_room(len(piece), Path(part), url)
                    file.write(piece)
                    file.flush()  # others count it
            os.replace(part, path)
            return _opened(path)
        finally:
            Path(part).unlink(missing_ok=True)

    def _make_room(self, size: int, own: Path, url: str) -> None:
        """Drop shards, the one first that was longest not read, until `size` bytes more fit in."""
        found, total = [], size
        for path in self.folder.iterdir():
            try:
                facts = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            total += facts.st_size
            fetched = path.suffix == ".tar" or time.time() - facts.st_mtime > STALE
            if fetched and path != own:
                found.append((facts.st_mtime_ns, facts.st_size, path))
        for _, freed, path in sorted(found):
            if total <= self.most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= freed
        if total > self.most_bytes:
            raise DataError(
                f"the cache of shards in {self.folder} may hold {self.most_bytes:,} bytes, and {url} has no room in it"
                " beside what other workers fetch; raise cache_gigabytes to more than a shard for each worker"
            )


def _opened(path: Path) -> BinaryIO:
    """Open a shard, which is now read last and so dropped last."""
    now = time.time_ns()  # a file system's own clock ticks every few milliseconds
    os.utime(path, ns=(now, now))
    return path.open("rb")
