"""Folders of pictures, by class or with a captions file: names, splits, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.sources.open import SourceConfig, find_kind
from tests.data_samples import dropped_in, encoded, flickr_folder, photo, prepared, records_in


def source(kind: str, path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(kind, (str(path),), **options)


def test_names_that_are_missing_or_lead_out_are_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=6)
    (tmp_path / "secret.jpg").write_bytes(encoded(photo(99)))
    with open(folder / "captions.txt", "a") as file:
        file.write("gone.jpg,not there\n../../secret.jpg,not ours\n")
    manifest = prepared(source("folder", folder), tmp_path / "out")
    assert manifest["dropped"] == {"missing": 1, "outside": 1} and sum(manifest["counts"].values()) == 6
    assert sorted(reason for _, reason in dropped_in(tmp_path / "out")) == ["missing", "outside"]


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
