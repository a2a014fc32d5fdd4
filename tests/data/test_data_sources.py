"""Every kind of source gives the pairs that are in it, found by looking at the path."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.reading.urls import tar_urls
from data.schema import DataError, Sample, clean_key, split_named
from data.sources.captions import read_captions
from data.sources.open import SourceConfig, find_kind, open_source
from tests.data_samples import dropped_in, encoded, flickr_folder, photo, prepared, records_in, samples_in, tar_of

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def source(kind: str, path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(kind, (str(path),), **options)


def test_flickr_layout_keeps_all_captions_in_order(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr")
    assert find_kind((str(folder),)) == "folder"
    manifest = prepared(source("auto", folder), tmp_path / "out")
    records = records_in(tmp_path / "out")
    assert sum(manifest["counts"].values()) == 12 and manifest["captions"]["kept"] == 60
    assert records["003_ab"]["captions"] == [f"picture 3, seen {c} times ." for c in range(5)]
    assert records["003_ab"]["caption"] == records["003_ab"]["captions"][0]
    assert (records["003_ab"]["original_width"], records["003_ab"]["width"]) == (60, 16)
    for _, _, members in samples_in(tmp_path / "out"):
        assert members["txt"].decode() == json.loads(members["json"])["caption"]


CAPTIONS_FILES = {
    "captions.csv": 'caption,file_name\n"one, two",a.jpg\nthree,b.jpg\n"four",a.jpg\n',
    "captions.tsv": "image\ttext\na.jpg\tone, two\nb.jpg\tthree\na.jpg\tfour\n",
    "captions.txt": "image,caption\na.jpg,one, two\nb.jpg,three\na.jpg,four\n",
    "results.csv": "image_name| comment_number| comment\na.jpg| 0| one, two\nb.jpg| 0| three\na.jpg| 1| four\n",
    "Flickr8k.token.txt": "a.jpg#0\tone, two\nb.jpg#0\tthree\na.jpg#1\tfour\n",
    "metadata.jsonl": '{"file_name":"a.jpg","text":["one, two","four"]}\n{"file_name":"b.jpg","text":"three"}\n',
    "captions.json": json.dumps({"a.jpg": ["one, two", "four"], "b.jpg": "three"}),
    "list.json": json.dumps(
        [{"image": "a.jpg", "caption": ["one, two", "four"]}, {"image": "b.jpg", "caption": "three"}]
    ),
    "dataset_coco.json": json.dumps(
        {
            "images": [
                {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "one, two"}, {"raw": "four"}]},
                {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "three"}]},
            ]
        }
    ),
    "captions_val2017.json": json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}],
            "annotations": [
                {"image_id": 7, "caption": "one, two"},
                {"image_id": 9, "caption": "three"},
                {"image_id": 7, "caption": "four"},
            ],
        }
    ),
}


@pytest.mark.parametrize("name", CAPTIONS_FILES)
def test_every_captions_file_says_the_same(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(CAPTIONS_FILES[name])
    items = list(read_captions(tmp_path / name))
    got: dict[str, list[str]] = {}
    for item in items:
        got.setdefault(item.name, []).extend(item.captions)
    assert got == {"a.jpg": ["one, two", "four"], "b.jpg": ["three"]}
    stated = {"dataset_coco.json": ("val", "train"), "captions_val2017.json": ("val", "val")}
    splits = {item.name: item.split for item in items}
    assert (splits["a.jpg"], splits["b.jpg"]) == stated.get(name, (None, None))


def test_coco_folder_with_a_file_and_a_folder_per_split(tmp_path: Path) -> None:
    for split, number in (("train2017", 1), ("val2017", 2)):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"{number}.jpg").write_bytes(encoded(photo(number)))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = {
            "images": [{"id": 1, "file_name": f"{number}.jpg"}],
            "annotations": [{"image_id": 1, "caption": split}],
        }
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    prepared(source("auto", tmp_path), tmp_path / "out")
    got = {key: (record["split"], record["caption"]) for key, record in records_in(tmp_path / "out").items()}
    assert got == {"1": ("train", "train2017"), "2": ("val", "val2017")}


def test_names_that_are_missing_or_lead_out_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=6)
    (tmp_path / "secret.jpg").write_bytes(encoded(photo(99)))
    with open(folder / "captions.txt", "a") as file:
        file.write("gone.jpg,not there\n../../secret.jpg,not ours\n")
    manifest = prepared(source("folder", folder), tmp_path / "out")
    assert manifest["dropped"] == {"missing": 1, "outside": 1} and sum(manifest["counts"].values()) == 6
    assert sorted(reason for _, reason in dropped_in(tmp_path / "out")) == ["missing", "outside"]


def test_captions_of_a_picture_may_lie_far_apart_and_keep_its_place(tmp_path: Path) -> None:
    """Also for a name that is not UTF-8 and a caption with half a surrogate pair, as a json may hold it."""
    odd = os.fsdecode(b"n\xff.jpg")
    (tmp_path / "Images").mkdir()
    names = ["b.jpg", "a.jpg", odd, "c.jpg"]
    for number, name in enumerate(names):
        (tmp_path / "Images" / name).write_bytes(encoded(photo(number)))
    rows = [*((name, f"first of {i}") for i, name in enumerate(names)), ("a.jpg", "half \ud83d"), ("b.jpg", "last")]
    with open(tmp_path / "captions.jsonl", "w") as file:
        file.writelines(json.dumps({"image": name, "caption": caption}) + "\n" for name, caption in rows)
    opened = open_source(source("folder", tmp_path))
    read = [s for s in opened.read(0, 4) if isinstance(s, Sample)]
    assert [s.captions for s in read] == [
        ["first of 0", "last"],
        ["first of 1", "half \ud83d"],
        ["first of 2"],
        ["first of 3"],
    ]
    assert [s.key for s in opened.read(1, 2)] == ["a"] and opened.chunks(9)[0].stop == 4
    assert [s.image for s in read] == [encoded(photo(number)) for number in range(4)]


def test_memory_does_not_grow_with_the_captions_file(tmp_path: Path) -> None:
    """Twenty times the rows in less than 12 MB more, where a list of them would take a kilobyte each: 38 MB."""
    (tmp_path / "Images").mkdir()
    peaks = []
    for rows in (2_000, 40_000):
        lines = (
            f"{i:09d}.jpg,picture number {i} with a caption of some eighty letters as photographs have\n"
            for i in range(rows)
        )
        (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(lines))
        code = (
            "import sys; from data.sources.open import *; open_source(SourceConfig('folder', (sys.argv[1],)));"
            "print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 12_000


def test_names_that_differ_in_their_ending_stay_two_samples(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    (tmp_path / "Images" / "a.jpg").write_bytes(encoded(photo(1)))
    (tmp_path / "Images" / "a.png").write_bytes(encoded(photo(2), "PNG"))
    (tmp_path / "Images" / "a.b.png").write_bytes(encoded(photo(3), "PNG"))
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,one\na.png,two\na.b.png,three\n")
    prepared(source("folder", tmp_path), tmp_path / "out")
    records = records_in(tmp_path / "out")
    assert sorted(record["caption"] for record in records.values()) == ["one", "three", "two"]
    assert all("." not in key for key in records)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("captions.txt", "", "is empty"),
        ("captions.txt", "picture,words\na.jpg,one\n", "wanted a header"),
        ("captions.txt", "image,caption\n", "names no pictures"),
        ("captions.txt", 'image,caption\na.jpg,"one\nb.jpg,two\nc.jpg,three\n', "not closed"),
        ("captions.json", '{"images": [', "not valid JSON"),
        ("captions.json", '{"images": [{"id": 1}], "annotations": []}', "lacks 'file_name'"),
        ("captions.jsonl", '{"caption": "one"}\n', "no picture name"),
    ],
)
def test_a_captions_file_that_is_not_one_gets_a_sentence(
    tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        list(read_captions(tmp_path / name))


def test_class_folders_with_splits_and_templates(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label in ("sea_lion", "dog"):
            (tmp_path / "set" / split / label).mkdir(parents=True)
            (tmp_path / "set" / split / label / "1.png").write_bytes(encoded(photo(1), "PNG"))
    config = source("auto", tmp_path / "set", templates=("a {label}", "one {label}"))
    assert find_kind(config.path) == "classes"
    prepared(config, tmp_path / "out")
    got = {(r["split"], r["label"], r["label_name"], *r["captions"]) for r in records_in(tmp_path / "out").values()}
    assert got == {
        (split, label, name, f"a {text}", f"one {text}")
        for split in ("train", "val")
        for label, name, text in ((0, "dog", "dog"), (1, "sea_lion", "sea lion"))
    }


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


@pytest.mark.parametrize("kind", ["auto", "tars"])
def test_pipes_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="would run a command"):
        open_source(source(kind, "pipe:touch /tmp/never"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: p / "nowhere", "no file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "is empty"),
        (lambda p: [(p / "x").mkdir(), (p / "x" / "notes.md").write_text("hi")] and p / "x", "cannot tell"),
    ],
)
def test_a_path_without_pairs_gets_a_sentence(tmp_path: Path, make: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        open_source(source("auto", make(tmp_path)))


def test_keys_are_safe_and_never_meet() -> None:
    assert clean_key("000000123") == "000000123" and clean_key("a_b-C") == "a_b-C"
    names = ["a.b", "a_b", "a b", "../a", "ä", "", "日本", "a/b", "x" * 300, "x" * 301]
    keys = [clean_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert max(map(len, keys)) + len(".safetensors") == 100, "a plain tar has room for names of 100 bytes"
    assert all(
        key and set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for key in keys
    )


def test_split_names() -> None:
    assert [split_named(n) for n in ("train", "train2017", "Training", "val-00001", "test", "trained")] == [
        *("train", "train", None, "val", "val", None)
    ]


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
