"""Where a sample goes and which bytes it has."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.schema import split_of
from data.sources.open import SourceConfig
from tests.data_samples import (
    SCENES,
    encoded,
    flickr_folder,
    photo,
    prepared,
    records_in,
    samples_in,
)


def test_splits_follow_the_key_and_not_the_order(tmp_path: Path) -> None:
    prepared(SCENES, tmp_path / "a", shard_size=60)
    prepared(SCENES, tmp_path / "b", shard_size=9)
    for out in (tmp_path / "a", tmp_path / "b"):
        assert all(split == split_of(key, 0.25) for split, key, _ in samples_in(out))
    share = np.mean([split_of(f"{i:09d}", 0.25) == "val" for i in range(20_000)])
    assert share == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_everything_may_go_to_one_split(tmp_path: Path, fraction: float) -> None:
    manifest = prepared(SCENES, tmp_path, val_fraction=fraction)
    assert manifest["counts"] == {"train": 60 * (1 - fraction), "val": 60 * fraction}


def test_keep_passes_the_bytes_through(tmp_path: Path) -> None:
    folder = flickr_folder(tmp_path / "flickr", count=4, captions=1)
    (folder / "Images" / "003_ab.jpg").write_bytes(encoded(photo(1), "BMP"))  # not a member kind: becomes png
    prepared(SourceConfig("folder", (str(folder),)), tmp_path / "out", format="keep", resize="no")
    for _, key, members in samples_in(tmp_path / "out"):
        original = (folder / "Images" / f"{key}.jpg").read_bytes()
        if key == "003_ab":
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(members["png"]))), np.asarray(photo(1)))
        else:
            assert members["jpg"] == original
            assert json.loads(members["json"])["sha256"] == hashlib.sha256(original).hexdigest()


def test_a_split_column_holds_also_where_no_share_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "Images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "Images" / f"{name}.jpg").write_bytes(encoded(photo(ord(name))))
    (tmp_path / "captions.csv").write_text("image,caption,split\na.jpg,x,val\nb.jpg,y,train\n")
    prepared(SourceConfig("folder", (str(tmp_path),)), tmp_path / "out", val_fraction=0.0)
    assert {key: record["split"] for key, record in records_in(tmp_path / "out").items()} == {"a": "val", "b": "train"}
