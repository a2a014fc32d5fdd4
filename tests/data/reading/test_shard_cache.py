"""The cache of remote shards: never above its bound, the longest unread goes first, and nothing half is served."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from data.reading.shard_cache import ShardCache
from data.reading.streaming import StreamDataModule
from data.schema import DataError
from tests.data_samples import foreign


@pytest.fixture
def remote(tmp_path: Path) -> dict[str, bytes]:
    """Tars in fsspec's memory file system: address -> content."""
    files, memory = {}, fsspec.filesystem("memory")
    foreign(tmp_path / "tars")
    stored = sorted((tmp_path / "tars").glob("*.tar"))
    for i, path in enumerate(stored * 3):
        files[f"memory://bucket{i}/{path.name}"] = path.read_bytes()
        memory.pipe(f"/bucket{i}/{path.name}", path.read_bytes())
    return files


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_the_longest_unread_shard_makes_room(
    remote: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, b, c), size = list(remote)[:3], max(map(len, remote.values()))
    cache, real = ShardCache(tmp_path / "cache", 2 * size + 10), fsspec.open
    fetched: list[str] = []

    def noted(url: str, mode: str) -> Any:
        fetched.append(url)
        return real(url, mode)

    monkeypatch.setattr("data.reading.shard_cache.PIECE", 1000)
    monkeypatch.setattr(fsspec, "open", noted)
    for url in (a, b, a, c, a, b):
        with cache.open(url) as stream:
            assert stream.read() == remote[url]
        assert held(tmp_path / "cache") <= 2 * size + 10
    assert fetched == [a, b, c, b], "b made room for c, since a was read after it"


def test_a_stream_is_the_same_from_the_cache(remote: dict[str, bytes], tmp_path: Path) -> None:
    size = max(map(len, remote.values()))

    def keys(**options: Any) -> list[str]:
        data = StreamDataModule(list(remote), None, 5, 16, 12, shuffle_buffer=10, **options)
        return [key for batch in data.train_dataloader() for key in batch["keys"]]

    cached = {"cache_dir": str(tmp_path / "cache"), "cache_gigabytes": 2.5 * size / 1e9}
    assert keys() == keys(**cached) == keys(**cached, num_workers=0)
    assert 0 < held(tmp_path / "cache") <= 2.5 * size
    with pytest.raises(DataError, match="more than a shard for each worker"):
        keys(cache_dir=str(tmp_path / "small"), cache_gigabytes=0.5 * size / 1e9)
    assert held(tmp_path / "small") == 0
    with pytest.raises(DataError, match="wanted 1 or more"):
        keys(cache_dir=str(tmp_path / "small"), cache_gigabytes=0)


def test_half_a_shard_is_never_served(
    remote: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, url = ShardCache(tmp_path / "cache", 10**9), next(iter(remote))
    monkeypatch.setattr("data.reading.shard_cache.PIECE", 1000)

    class Torn:
        def __enter__(self) -> "Torn":
            self.left = 3
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, size: int) -> bytes:
            self.left -= 1
            if not self.left:
                raise OSError("the line went dead")
            return b"x" * size

    with monkeypatch.context() as patched:
        patched.setattr(fsspec, "open", lambda url, mode: Torn())
        with pytest.raises(OSError, match="the line went dead"):
            cache.open(url)
    assert held(tmp_path / "cache") == 0
    with cache.open(url) as stream:
        assert stream.read() == remote[url]


def test_a_shard_that_is_not_there_is_counted_and_then_said(remote: dict[str, bytes], tmp_path: Path) -> None:
    data = StreamDataModule(["memory://nowhere/1.tar"], image_size=16, most_errors=3, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="more than 3 unreadable samples or shards; the last: .*nowhere"):
        next(iter(data.train_dataloader()))
