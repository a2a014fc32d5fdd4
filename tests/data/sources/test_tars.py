"""Tars as a source: img2dataset's, our own, behind URLs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data.reading.datamodule import ImageDataModule
from data.reading.streaming import StreamDataModule
from data.reading.urls import tar_urls
from data.schema import DataError
from data.sources.open import SourceConfig, find_kind
from tests.data_samples import dropped_in, encoded, photo, prepared, records_in, tar_of

pyarrow = pytest.importorskip("pyarrow")


def source(kind: str, path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(kind, (str(path),), **options)


def img2dataset_folder(root: Path) -> Path:
    """What img2dataset writes: two tars with their parquet and statistics beside them."""
    for shard in range(2):
        members = []
        for i in range(4):
            key = f"{shard:05d}{i:04d}"
            record = {
                "url": f"https://example.org/{key}",
                "caption": f"caption {key}",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 60,
                "height": 40,
                "original_width": 600,
                "original_height": 400,
                "exif": "{}",
                "sha256": "0" * 64,
            }
            members += [
                (f"{key}.jpg", encoded(photo(10 * shard + i))),
                (f"{key}.json", json.dumps(record, indent=4).encode()),
                (f"{key}.txt", record["caption"].encode()),  # type: ignore[union-attr]
            ]
        tar_of(root / f"{shard:05d}.tar", members)
        (root / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 5, "successes": 4}))
        pq.write_table(pyarrow.table({"url": ["a"], "status": ["success"]}), root / f"{shard:05d}.parquet")
    return root


def test_tars_of_img2dataset_keep_keys_captions_and_columns(tmp_path: Path) -> None:
    folder = img2dataset_folder(tmp_path / "laion")
    assert find_kind((str(folder),)) == "tars"
    manifest = prepared(source("auto", folder), tmp_path / "out")
    records = records_in(tmp_path / "out")
    assert sum(manifest["counts"].values()) == 8 == len(records)
    assert records["000010002"]["caption"] == "caption 000010002"
    assert records["000010002"]["url"] == "https://example.org/000010002"
    assert records["000010002"]["original_width"] == 60  # of the picture that was read


def test_a_tar_becomes_one_shard_whatever_its_size(tmp_path: Path) -> None:
    for number, count in enumerate((7, 1)):
        members = [
            m for i in range(count) for m in ((f"{number}{i}.jpg", encoded(photo(i))), (f"{number}{i}.txt", b"x"))
        ]
        tar_of(tmp_path / "tars" / f"{number}.tar", members)
    manifest = prepared(source("tars", tmp_path / "tars"), tmp_path / "out", shard_size=2, val_fraction=0.0)
    counts = {name: shard["count"] for name, shard in manifest["shards"].items()}
    assert counts == {"train/00000.tar": 7, "train/00001.tar": 1}


def test_tars_behind_a_url_and_in_brace_ranges(tmp_path: Path) -> None:
    import fsspec

    folder = img2dataset_folder(tmp_path / "laion")
    memory = fsspec.filesystem("memory")
    for name in ("00000.tar", "00001.tar"):
        memory.pipe(f"/bucket/{name}", (folder / name).read_bytes())
    prepared(source("auto", "memory://bucket/{00000..00001}.tar"), tmp_path / "out")
    assert len(records_in(tmp_path / "out")) == 8
    assert tar_urls(("memory://bucket",)) == ["memory:///bucket/00000.tar", "memory:///bucket/00001.tar"]
    assert len(tar_urls((str(folder / "*.tar"),))) == 2


def test_our_shards_read_as_a_source_keep_everything(tmp_path: Path) -> None:
    prepared(SourceConfig("scenes", num=20, size=16), tmp_path / "a")
    prepared(source("tars", tmp_path / "a"), tmp_path / "b")
    first, second = records_in(tmp_path / "a"), records_in(tmp_path / "b")
    for record in second.values():
        assert len(record.pop("sha256")) == 64  # the picture has bytes now that a source can hash
    assert first == second


class Explosive:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "boom"))


@pytest.fixture
def trapped(tmp_path: Path) -> tuple[Path, Path]:
    """A tar with pickles under every ending that WebDataset's decoders execute; and the file that must not appear."""
    bomb = tmp_path / "boom"
    payload = pickle.dumps(Explosive(bomb))
    members = []
    for i in range(4):
        members += [(f"k{i}.jpg", encoded(photo(i))), (f"k{i}.txt", b"a caption")]
        members += [(f"k{i}.{kind}", payload) for kind in ("pyd", "pickle", "pkl", "pth", "npy", "json.pyd")]
    members += [("only.pyd", payload), ("only.txt", b"no picture")]
    return tar_of(tmp_path / "tars" / "00000.tar", members).parent, bomb


def test_pickles_in_a_tar_stay_unread(trapped: tuple[Path, Path], tmp_path: Path) -> None:
    folder, bomb = trapped
    manifest = prepared(SourceConfig("tars", (str(folder),)), tmp_path / "out")
    assert sorted(records_in(tmp_path / "out")) == ["k0", "k1", "k2", "k3"]
    assert manifest["dropped"] == {"no picture": 1} and dropped_in(tmp_path / "out") == [("only", "no picture")]
    loader = StreamDataModule(
        [str(folder / "*.tar")], batch_size=2, image_size=16, steps_per_epoch=6
    ).train_dataloader()
    assert len(list(loader)) == 6
    data = ImageDataModule(str(folder), 2, image_size=16, val_fraction=0.0)
    with pytest.raises(DataError, match="sample only has"):
        data.arrays("train")
    assert not bomb.exists()
    pickle.loads(pickle.dumps(Explosive(bomb)))
    assert bomb.exists()  # the trap was live


def test_names_that_lead_out_of_a_tar_are_dropped(tmp_path: Path) -> None:
    jpg = encoded(photo(0))
    names = ["../../evil", "/abs/evil", "good/../../evil", "good/a", "b c", "d.e", "ünï"]
    members = [m for name in names for m in ((f"{name}.jpg", jpg), (f"{name}.txt", name.encode()))]
    tar_of(tmp_path / "tars" / "0.tar", members)
    manifest = prepared(SourceConfig("tars", (str(tmp_path / "tars"),)), tmp_path / "deep" / "out")
    records = records_in(tmp_path / "deep" / "out")
    assert manifest["dropped"] == {"no picture": 1, "outside": 3}  # "d.e.jpg" is the member "e.jpg" of key "d"
    assert {record["caption"] for record in records.values()} == {"good/a", "b c", "ünï"}
    assert not list(tmp_path.rglob("*evil*"))


def test_keys_that_come_twice_are_counted_within_and_across_tars(tmp_path: Path) -> None:
    def pair(key: str, number: int) -> list[tuple[str, bytes]]:
        return [(f"{key}.jpg", encoded(photo(number))), (f"{key}.txt", f"picture {number}".encode())]

    tar_of(tmp_path / "tars" / "0.tar", [*pair("a", 0), *pair("b", 1), *pair("a", 2)])
    tar_of(tmp_path / "tars" / "1.tar", [*pair("b", 3), *pair("c", 4), ("c.jpg", b"again")])
    manifest = prepared(SourceConfig("tars", (str(tmp_path / "tars"),)), tmp_path / "out")
    got = {key: record["caption"] for key, record in records_in(tmp_path / "out").items()}
    assert got == {"a": "picture 0", "b": "picture 1", "c": "picture 4"}
    assert manifest["dropped"] == {"duplicate key": 2}
    assert sorted(dropped_in(tmp_path / "out")) == [("a", "duplicate key"), ("b", "duplicate key")]


def test_a_truncated_tar_gives_what_it_has(tmp_path: Path) -> None:
    members = [m for i in range(6) for m in ((f"k{i}.jpg", encoded(photo(i))), (f"k{i}.txt", b"a caption"))]
    path = tar_of(tmp_path / "tars" / "0.tar", members)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    tar_of(tmp_path / "tars" / "1.tar", [("z.jpg", encoded(photo(9))), ("z.txt", b"whole")])
    manifest = prepared(SourceConfig("tars", (str(tmp_path / "tars"),)), tmp_path / "out")
    keys = sorted(records_in(tmp_path / "out"))
    assert keys[:2] == ["k0", "k1"] and keys[-1] == "z" and len(keys) < 7
    assert manifest["dropped"] == {"truncated tar": 1}
    details = [json.loads(line)["detail"] for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert details[0].startswith("0.tar breaks off here")


def test_json_that_is_none_leaves_the_txt(tmp_path: Path) -> None:
    members = []
    for key, content in {"a": b"{broken", "b": b"[1, 2]", "c": b'{"caption": null}', "d": b"\xff\xfe"}.items():
        members += [(f"{key}.jpg", encoded(photo(ord(key)))), (f"{key}.json", content), (f"{key}.txt", b"from the txt")]
    tar_of(tmp_path / "tars" / "0.tar", members)
    prepared(SourceConfig("tars", (str(tmp_path / "tars"),)), tmp_path / "out")
    assert {r["caption"] for r in records_in(tmp_path / "out").values()} == {"from the txt"}
    assert len(records_in(tmp_path / "out")) == 4
