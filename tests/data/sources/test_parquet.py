"""Parquet as a source: rows across groups and files, names of labels, paths beside bytes, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.schema import DataError
from data.sources.open import SourceConfig, find_kind, open_source
from tests.data_samples import encoded, photo, prepared, records_in

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


def source(kind: str, path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(kind, (str(path),), **options)


def parquet(path: Path, rows: int, columns: dict[str, Any], names: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = [{"bytes": encoded(photo(i), "PNG"), "path": None} for i in range(rows)]
    table = pyarrow.table({"image": image, **columns})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=4)
    return path


def test_parquet_text_across_row_groups_and_files(tmp_path: Path) -> None:
    parquet(tmp_path / "hub" / "train-00000-of-00001.parquet", 11, {"text": [f"row {i}" for i in range(11)]})
    parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", 3, {"text": [["x", "y"]] * 3})
    with pytest.raises(Exception, match=r"."):
        pq.read_table(tmp_path / "hub" / "nothing.parquet")
    assert find_kind((str(tmp_path / "hub"),)) == "parquet"
    manifest = prepared(source("auto", tmp_path / "hub"), tmp_path / "out", shard_size=3)
    records = records_in(tmp_path / "out")
    assert manifest["counts"] == {"train": 11, "val": 3}
    assert [r["caption"] for k, r in sorted(records.items()) if r["split"] == "train"] == [
        f"row {i}" for i in range(11)
    ]
    assert all(r["captions"] == ["x", "y"] for r in records.values() if r["split"] == "val")


@pytest.mark.parametrize("given", ["metadata", "option", "neither"])
def test_parquet_labels_get_their_names(tmp_path: Path, given: str) -> None:
    path = parquet(tmp_path / "a.parquet", 3, {"label": [1, 0, 1]}, ["cat", "dog"] if given == "metadata" else None)
    config = source("parquet", path, class_names=("cat", "dog") if given == "option" else ())
    prepared(config, tmp_path / "out")
    records = [record for _, record in sorted(records_in(tmp_path / "out").items())]
    names = ("0", "1") if given == "neither" else ("cat", "dog")
    assert [r["label"] for r in records] == [1, 0, 1]
    assert [r["caption"] for r in records] == [f"a photo of a {names[i]}" for i in (1, 0, 1)]


def test_parquet_with_paths_and_a_split_column(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(encoded(photo(1), "PNG"))
    image = [{"bytes": None, "path": p} for p in ("pictures/a.png", "../a.png", "b.png")]
    pq.write_table(
        pyarrow.table({"image": image, "caption": ["one", "two", "three"], "split": ["val"] * 3}),
        tmp_path / "x.parquet",
    )
    manifest = prepared(source("parquet", tmp_path / "x.parquet"), tmp_path / "out")
    assert manifest["counts"] == {"train": 0, "val": 1} and manifest["dropped"] == {"missing": 2}


def test_parquet_that_is_broken_or_lacks_columns_gets_a_sentence(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", 3, {"other": [1, 2, 3]})
    with pytest.raises(DataError, match="wanted a caption column"):
        open_source(source("parquet", path))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="truncated"):
        open_source(source("parquet", path))
