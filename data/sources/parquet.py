"""Parquet as the Hugging Face hub ships it: an `image` struct of bytes and path, a text or a label column.

Class names come from the schema's `huggingface` metadata where it is there, else from the caller. A `split` column, or
a file or folder named train, val, validation or test, keeps that split; other rows are split by hash. Rows are read
in small batches, so that memory does not grow with the file. pyarrow is an optional dependency.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.forms import parse_json
from data.schema import DataError, Drop, Sample, Stretch, cut, split_named
from data.sources.captions import TEXT_COLUMNS, texts

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp", "picture", "image_path", "file_name", "path")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")


def parquet_files(paths: tuple[str, ...]) -> list[Path]:
    """Return all parquet files named by `paths` or below them, sorted."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    return files


class Parquet:
    """Rows of parquet files; a source (`chunks`, `read`, `fingerprint`)."""

    unit = "img"

    def __init__(self, paths: tuple[str, ...], class_names: tuple[str, ...], templates: tuple[str, ...]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DataError("reading parquet needs pyarrow; install it with: pip install 'unspool[parquet]'") from error
        self.parquet, self.templates = parquet, templates
        self.broken = (OSError, pyarrow.ArrowException)
        self.paths = parquet_files(paths)
        if not self.paths:
            raise DataError(f"no .parquet file at {', '.join(paths)}; check --path")
        self.rows: list[int] = []
        for path in self.paths:
            try:
                metadata = parquet.read_metadata(path)
            except self.broken as error:
                raise DataError(
                    f"{path} is not a readable parquet file: {one_line(error)}; is it truncated?"
                ) from error
            schema = metadata.schema.to_arrow_schema()
            self._find_columns(path, schema.names)
            self.rows.append(metadata.num_rows)
            self.class_names = class_names or self._names_in(schema.metadata or {})
        self.starts = list(itertools.accumulate(self.rows, initial=0))

    def chunks(self, longest: int) -> list[Stretch]:
        """Cut every file on its own; a file with a `split` column may hold both splits."""
        stretches = []
        for (start, stop), path in zip(itertools.pairwise(self.starts), self.paths, strict=True):
            stretches += cut(start, stop, longest, None if self.split else self._split_of(path))
        return stretches

    def fingerprint(self) -> str:
        """Names, sizes and row counts of the files, and what decides the captions."""
        files = [(path.name, path.stat().st_size, rows) for path, rows in zip(self.paths, self.rows, strict=True)]
        return f"parquet {files} names={list(self.class_names)} templates={list(self.templates)}"

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """Yield rows [start, stop), counted over all files.

        Raises:
            DataError: a file does not decompress.
        """
        columns = [c for c in (self.image, self.text, self.label, self.split) if c is not None]
        file = bisect.bisect_right(self.starts, start) - 1
        while file < len(self.paths) and self.starts[file] < stop:
            row, path = self.starts[file], self.paths[file]
            try:
                with self.parquet.ParquetFile(path) as reader:
                    for group in range(reader.num_row_groups):
                        count = reader.metadata.row_group(group).num_rows
                        if row + count > start and row < stop:
                            at = row
                            for batch in reader.iter_batches(64, [group], columns):
                                for i in range(max(start - at, 0), min(stop - at, len(batch))):
                                    yield self._read_row(file, at + i - self.starts[file], batch.slice(i, 1))
                                at += len(batch)
                        row += count
            except self.broken as error:
                raise DataError(f"{path} does not read beyond row {row}: {one_line(error)}; fetch it again") from error
            file += 1

    def _read_row(self, file: int, row: int, batch: Any) -> Sample | Drop:
        """Read the one row of `batch`; text that is no UTF-8 and dates that Python does not have make it a drop."""
        key = f"{file:03d}{row:07d}"
        try:
            return self._sample(file, row, key, batch.to_pylist()[0])
        except (ValueError, OverflowError, RecursionError) as error:
            return Drop(key, "unreadable", f"row {row} of {self.paths[file].name}: {one_line(error)}"[:200])

    def _sample(self, file: int, row: int, key: str, values: dict[str, Any]) -> Sample | Drop:
        path = self.paths[file]
        data = self._bytes_of(values[self.image], path)
        if isinstance(data, str):
            return Drop(key, "missing", f"row {row} of {path.name}: {data}")
        label = values[self.label] if self.label else None
        number = label if isinstance(label, int) and not isinstance(label, bool) else -1
        name = label if isinstance(label, str) else None
        if number >= 0:
            name = self.class_names[number] if number < len(self.class_names) else str(number)
        captions = texts(values[self.text]) if self.text else []
        if not self.text and name is not None:
            captions = [template.format(label=name) for template in self.templates]
        split = split_named(str(values[self.split])) if self.split else None
        return Sample(key, captions, image=data, label=number, label_name=name, split=split or self._split_of(path))

    @staticmethod
    def _bytes_of(image: Any, path: Path) -> bytes | str:
        """Return the picture's bytes, read from its path where the row holds only that, or what is wrong."""
        data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if isinstance(data, bytes):
            return data
        name = name or data
        if not isinstance(name, str):
            return "no picture bytes and no path"
        file = (path.parent / name).resolve()
        if not file.is_relative_to(path.parent.resolve()):
            return f"the path {name[:120]!r} leads out of {path.parent.name}"
        try:
            return file.read_bytes()
        except (OSError, ValueError):
            return f"no picture at {name[:120]!r}"

    def _find_columns(self, path: Path, names: list[str]) -> None:
        def first(wanted: tuple[str, ...]) -> str | None:
            return next((name for name in wanted if name in names), None)

        image, self.text, self.label = first(_IMAGE_COLUMNS), first(TEXT_COLUMNS), first(_LABEL_COLUMNS)
        self.split = first(("split",))
        if image is None:
            raise DataError(f"{path} has columns {names}, wanted a picture column ({', '.join(_IMAGE_COLUMNS)})")
        self.image = image
        if self.text is None and self.label is None:
            raise DataError(
                f"{path} has columns {names}, wanted a caption column ({', '.join(TEXT_COLUMNS)}) "
                f"or a label column ({', '.join(_LABEL_COLUMNS)})"
            )

    @staticmethod
    def _split_of(path: Path) -> str | None:
        return split_named(path.stem) or split_named(path.parent.name)

    def _names_in(self, metadata: dict[bytes, bytes]) -> tuple[str, ...]:
        """Return the class names that the hub's schema metadata carries for the label column, or none."""
        try:
            features = parse_json(metadata[b"huggingface"])["info"]["features"]
            return tuple(map(str, features[self.label]["names"]))
        except (KeyError, TypeError, ValueError):
            return ()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
