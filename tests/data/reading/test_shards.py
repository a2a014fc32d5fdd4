"""Shards: an index of offsets, readers that travel, bytes as other programs write them."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import pytest
import webdataset

from data.reading.shards import ShardReader, ShardWriter
from data.reading.tar_index import index_tar, member_places
from data.schema import DataError, clean_key
from data.sources.open import SourceConfig
from tests.data_samples import encoded, photo, prepared, tar_of


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    prepared(SourceConfig("scenes", num=80, size=16, seed=4), out, shard_size=15)
    return out


def test_a_reader_goes_through_pickle_and_reads_on(scenes: Path) -> None:
    reader = ShardReader(sorted((scenes / "train").glob("*.tar")))
    first = reader.read(3, "json")
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(3, "json") == first and copy.read(3, "nothing") is None


def test_the_index_of_a_tar_equals_that_of_tarfile(tmp_path: Path) -> None:
    """Also with names of over a hundred letters, folders, and what GNU and POSIX tars put between the members."""
    import tarfile

    members = [(f"{'deep/' * n}{'x' * 40}{n}.jpg", bytes(n)) for n in range(30)]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            folder = tarfile.TarInfo("deep")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        with tarfile.open(path) as tar:
            wanted = [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
        assert [(name, place.offset, place.size) for name, place in member_places(path)] == wanted


@pytest.mark.parametrize("cut", [100, 700, 1100, -1024, -9000])
def test_a_truncated_tar_gets_a_sentence(tmp_path: Path, cut: int) -> None:
    path = tar_of(tmp_path / "a.tar", [(f"{i}.jpg", encoded(photo(i))) for i in range(3)])
    content = path.read_bytes().rstrip(b"\0") + b"\0" * 1024
    path.write_bytes(content[:cut])
    with pytest.raises(DataError, match=r"truncated|not a readable tar"):
        index_tar(path)


def test_keys_that_come_back_are_refused(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3")])
    with pytest.raises(DataError, match="in two places"):
        index_tar(path)
    path = tar_of(tmp_path / "b.tar", [("a.jpg", b"1"), ("a.jpg", b"2")])
    with pytest.raises(DataError, match="twice"):
        index_tar(path)
    writer = ShardWriter(tmp_path / "c.tar")
    writer.write("a", {"txt": b""})
    with pytest.raises(AssertionError, match="key a comes twice"):
        writer.write("a", {"txt": b""})
    writer.__exit__(AssertionError, None, None)
    assert not list(tmp_path.glob("c.tar*"))


def test_a_shard_has_the_bytes_that_webdataset_writes(tmp_path: Path) -> None:
    names = ("a", clean_key("b" * 200), "c" * 30)
    samples = [(name, {"jpg": bytes(700 * i), "json": b"{}", "safetensors": b"x"}) for i, name in enumerate(names)]
    theirs = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    with ShardWriter(tmp_path / "a.tar") as ours, webdataset.TarWriter(str(tmp_path / "b.tar"), **theirs) as other:
        for key, members in samples:
            ours.write(key, members)
            other.write({"__key__": key, **members})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert ours.sha256 == hashlib.sha256((tmp_path / "b.tar").read_bytes()).hexdigest()
