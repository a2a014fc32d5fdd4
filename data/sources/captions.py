"""Captions files: names of pictures and their captions.

    captions.txt, .csv, .tsv    a header with an image and a caption column, one or many lines per picture
    *.token, *.token.txt        Flickr's `name#0<tab>caption`, without a header
    .jsonl                      one object per line, `caption` a string or a list (also `metadata.jsonl` of the hub)
    .json                       COCO captions (`images`, `annotations`), Karpathy's splits (`images[].sentences`),
                                a list of objects, or {name: caption or list of captions}

Every format gives `Item`s, in the order of the file; a picture with captions in several lines comes several times.
Lines are read one by one; a json is parsed whole, and takes some ten times its size of memory while that lasts.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.forms import parse_json
from data.schema import DataError, split_named

NAME_COLUMNS = ("image", "file_name", "filename", "filepath", "image_path", "image_name", "path", "img", "name")
TEXT_COLUMNS = (
    *("caption", "captions", "text", "texts", "sentence", "sentences", "comment", "title", "raw", "description"),
)
_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json", ".token")
_DEEPEST = 8
_USUAL_NAMES = ("captions", "metadata", "results", "labels")
_PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

csv.field_size_limit(1 << 28)  # the default of 128 kB stops the whole file at one long caption


@dataclass
class Item:
    """A picture as a line of a captions file has it: name below the picture folder, captions, and split if stated."""

    name: str
    captions: list[str] = field(default_factory=list)
    split: str | None = None


def find_captions_files(folder: Path) -> list[Path]:
    """Return the captions files of a dataset folder: one of the usual names, or COCO's one per split."""
    coco = sorted((folder / "annotations").glob("captions_*.json")) if (folder / "annotations").is_dir() else []
    if coco:
        return coco
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in _SUFFIXES]
    for stem in _USUAL_NAMES:
        named = [path for path in files if path.name.split(".")[0].lower() == stem]
        if named:
            return named[:1]
    karpathy = [p for p in files if p.suffix == ".json" and p.name.startswith("dataset")]
    token = [p for p in files if ".token" in p.name]
    return (karpathy or token or [p for p in files if p.name.startswith("captions_")])[:1]


def read_captions(path: Path) -> Iterator[Item]:
    """Yield the pictures that a captions file names, as often as it names them.

    Raises:
        DataError: not a layout listed above, broken beyond a line, or nothing in it.
    """
    try:
        if path.suffix == ".json":
            items = _from_json(_parse("".join(_lines(path)), path), path)
        elif path.suffix == ".jsonl":
            items = _from_objects((_parse(line, path) for line in _lines(path) if line.strip()), path)
        elif ".token" in path.name:
            items = _from_token(path)
        else:
            items = _from_table(path)
        first = next(items, None)
        if first is None:
            raise DataError(f"{path} names no pictures; nothing to prepare")
        yield first
        yield from items
    except OSError as error:
        raise DataError(f"cannot read the captions file {path}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines from the first one that is not blank, broken UTF-8 and NUL bytes replaced by U+FFFD."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = itertools.dropwhile(lambda line: not line.strip(), file)
        first = next(lines, None)
        if first is None:
            raise DataError(f"the captions file {path} is empty, wanted a header with image,caption and lines below it")
        for line in itertools.chain([first], lines):
            yield line.replace("\0", "\ufffd")


def _parse(text: str, path: Path) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}; is it truncated?") from error


def _from_table(path: Path) -> Iterator[Item]:
    lines = _lines(path)
    header = next(lines)
    delimiter = max(",\t|;", key=header.count)
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter)
    columns = [name.strip().lower() for name in next(reader)]
    name = next((columns.index(c) for c in NAME_COLUMNS if c in columns), None)
    caption = next((columns.index(c) for c in TEXT_COLUMNS if c in columns), None)
    if name is None or caption is None:
        raise DataError(
            f"the first line of {path} is {header.rstrip()[:120]!r}, wanted a header with an image column "
            f"({', '.join(NAME_COLUMNS)}) and a caption column ({', '.join(TEXT_COLUMNS)})"
        )
    split = columns.index("split") if "split" in columns else None
    for row in reader:
        if len(row) <= name or not row[name].strip():
            continue
        if caption == len(columns) - 1:  # a caption with unquoted delimiters
            row[caption:] = [delimiter.join(row[caption:])]
        text_of_row = row[caption] if len(row) > caption else ""
        for line in text_of_row.split("\n")[1:]:
            if line.split(delimiter, 1)[0].strip().lower().endswith(_PICTURE_ENDINGS):
                raise DataError(f"{path}, before line {reader.line_num}: a quote is opened and not closed, lines merge")
        stated = split_named(row[split].strip()) if split is not None and len(row) > split else None
        yield Item(row[name].strip(), [text_of_row.strip()], stated)


def _from_token(path: Path) -> Iterator[Item]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            raise DataError(f"{path}, line {number} is {line[:80]!r}, wanted name#0, a tab, and the caption")
        yield Item(name.rsplit("#", 1)[0].strip(), [caption.strip()])


def _from_objects(objects: Iterable[Any], path: Path) -> Iterator[Item]:
    for number, entry in enumerate(objects, 1):
        name = next((entry[c] for c in NAME_COLUMNS if c in entry), None) if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise DataError(f"{path}, object {number} has no picture name, wanted one of {', '.join(NAME_COLUMNS)}")
        captions = texts(next((entry[c] for c in TEXT_COLUMNS if c in entry), []))
        yield Item(name, captions, split_named(entry["split"]) if isinstance(entry.get("split"), str) else None)


def _from_json(content: Any, path: Path) -> Iterator[Item]:
    if isinstance(content, list):
        yield from _from_objects(content, path)
        return
    try:
        if "annotations" in content:  # COCO
            split = split_named(path.stem.removeprefix("captions_"))
            by_id = {image["id"]: Item("" + image["file_name"], split=split) for image in content["images"]}
            for annotation in content["annotations"]:
                if annotation["image_id"] in by_id:
                    by_id[annotation["image_id"]].captions.append(str(annotation["caption"]).strip())
            yield from by_id.values()
            return
        if "images" in content:  # Karpathy
            for image in content["images"]:
                name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
                captions = [str(sentence["raw"]).strip() for sentence in image["sentences"]]
                yield Item(name, captions, split_named(image.get("split", "")))
            return
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} looks like COCO or Karpathy json, but an entry lacks {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, wanted COCO, Karpathy, a list of objects or a mapping")
    for name, captions in content.items():
        yield Item(name, texts(captions))


def texts(value: Any, depth: int = 0) -> list[str]:
    """Return captions given as a string, a list of strings, or a list of objects with a `raw` text, as a list.

    What is nested deeper than any format nests it is no caption.
    """
    if value is None or depth > _DEEPEST:
        return []
    if isinstance(value, list | tuple):
        return [text for entry in value for text in texts(entry, depth + 1)]
    if isinstance(value, dict):
        return texts(value.get("raw", value.get("caption")), depth + 1)
    return [str(value).strip()]
