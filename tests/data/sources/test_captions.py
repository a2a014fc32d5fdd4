"""Captions files of every layout name the same pictures with the same captions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.schema import DataError, Sample
from data.sources.captions import read_captions
from data.sources.open import SourceConfig, find_kind, open_source
from tests.data_samples import encoded, flickr_folder, photo, prepared, records_in, samples_in


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
