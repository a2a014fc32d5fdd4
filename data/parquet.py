"""Parquet as the Hugging Face hub ships it: an `image` struct of bytes and path, a text or a label column.

Class names come from the schema's `huggingface` metadata where it is there, else from the caller. Files whose name or
folder begins with train, val, valid, validation or test keep that split (test counts as val); others are split by hash.
Row groups are read one at a time, so that memory does not grow with the file. pyarrow is an optional dependency.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.schema import DataError, Drop, Sample, Stretch

_SPLIT_NAME = re.compile(r"^(train|val|valid|validation|test)(?![a-z])")
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture")
_TEXT_COLUMNS = ("caption", "captions", "text", "texts", "sentences", "sentence", "txt", "raw", "description")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")


def parquet_files(paths: tuple[str, ...]) -> list[Path]:
    """Return all parquet files named by `paths` or below them, sorted."""
    found: list[Path] = []
    for path in map(Path, paths):
        found += sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    return found


def split_of_file(path: Path) -> str | None:
    """Return the split that a file's name or its folder's name states, or None."""
    for name in (path.stem, path.parent.name):
        match = _SPLIT_NAME.match(name.lower())
        if match:
            return "train" if match[1] == "train" else "val"
    return None


class Parquet:
    """Rows of parquet files; a source (`stretches`, `read`, `fingerprint`)."""

    def __init__(self, paths: tuple[str, ...], class_names: tuple[str, ...], template: str) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError("reading parquet needs pyarrow; install it with: pip install 'unspool[parquet]'") from error
        if "{label}" not in template:
            raise DataError(f"the caption template {template!r} has no {{label}} in it")
        self.parquet, self.template = parquet, template
        self.paths = parquet_files(paths)
        if not self.paths:
            raise DataError(f"no .parquet file at {', '.join(paths)}; check --path")
        try:
            self.metadata = [parquet.read_metadata(path) for path in self.paths]
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read the parquet metadata of {self.paths}: {error}; is a file truncated?") from error
        self.starts = [0]
        for metadata in self.metadata:
            self.starts.append(self.starts[-1] + metadata.num_rows)
        schema = self.metadata[0].schema.to_arrow_schema()
        self.image = self._column(schema.names, _IMAGE_COLUMNS)
        self.text = self._column(schema.names, _TEXT_COLUMNS)
        self.label = self._column(schema.names, _LABEL_COLUMNS)
        if self.image is None:
            raise DataError(f"{self.paths[0]} has columns {schema.names}, wanted one of {', '.join(_IMAGE_COLUMNS)}")
        if self.text is None and self.label is None:
            raise DataError(
                f"{self.paths[0]} has columns {schema.names}, wanted a caption ({', '.join(_TEXT_COLUMNS)}) "
                f"or a label ({', '.join(_LABEL_COLUMNS)})"
            )
        self.class_names = class_names or self._names_in(schema.metadata or {})

    def stretches(self) -> list[Stretch]:
        """One stretch per file."""
        ends = zip(self.starts, self.starts[1:], self.paths, strict=False)
        return [Stretch(start, stop, split_of_file(path)) for start, stop, path in ends if stop > start]

    def fingerprint(self) -> str:
        """Names, sizes and row counts of the files, and what decides the captions."""
        files = [(path.name, path.stat().st_size, m.num_rows) for path, m in zip(self.paths, self.metadata, strict=True)]
        return f"parquet {files} names={list(self.class_names)} template={self.template}"

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """Yield rows [start, stop), counted over all files."""
        columns = [c for c in (self.image, self.text, self.label) if c is not None]
        file = bisect.bisect_right(self.starts, start) - 1
        row = self.starts[file]
        while file < len(self.paths) and row < stop:
            reader = self.parquet.ParquetFile(self.paths[file])
            for group in range(reader.num_row_groups):
                count = reader.metadata.row_group(group).num_rows
                if row + count > start and row < stop:
                    skip = max(0, start - row)
                    table = reader.read_row_group(group, columns).slice(skip, min(stop, row + count) - row - skip)
                    for i, values in enumerate(_rows(table)):
                        yield self._sample(file, row + skip + i - self.starts[file], values)
                row += count
            file += 1

    def _sample(self, file: int, row: int, values: dict[str, Any]) -> Sample | Drop:
        key = f"{file:03d}{row:07d}"
        image = values[self.image or ""]
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            return Drop(key, "missing", f"row {row} of {self.paths[file].name} has no picture bytes")
        label = values[self.label] if self.label else None
        label = int(label) if label is not None and not isinstance(label, str) else -1
        name = None
        if label >= 0:
            name = self.class_names[label] if label < len(self.class_names) else str(label)
        text = values[self.text] if self.text else None
        if text is None:
            captions = [self.template.format(label=name)] if name is not None else []
        else:
            captions = [str(t) for t in text] if isinstance(text, list) else [str(text)]
        return Sample(key, captions, image=data, label=label, label_name=name, split=split_of_file(self.paths[file]))

    @staticmethod
    def _column(names: list[str], wanted: tuple[str, ...]) -> str | None:
        return next((name for name in wanted if name in names), None)

    def _names_in(self, metadata: dict[bytes, bytes]) -> tuple[str, ...]:
        """Return the class names that the hub's schema metadata carries for the label column, or none."""
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            return tuple(map(str, features[self.label]["names"]))
        except (KeyError, TypeError, ValueError):
            return ()


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    """Yield rows of a slice in small pieces: converting a whole row group at once doubles the memory it takes."""
    for batch in table.to_batches(max_chunksize=64):
        yield from batch.to_pylist()
