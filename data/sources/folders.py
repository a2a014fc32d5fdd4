"""Folders of pictures: with a captions file, or sorted into folders by class.

Both are lists of files known before anything is read, so any range of them can be read by anyone. The list is kept in a
temporary SQLite database and not in memory, so that it may have millions of rows. A name that leads out of the picture
folder is refused, a picture that is named and not there is a counted drop.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.schema import SOURCE_MEMBERS, DataError, Drop, Sample, Stretch, clean_key, cut, split_named
from data.sources.captions import find_captions_files, read_captions
from data.sources.class_names import class_names_of

IMAGE_FOLDERS = (
    "Images",
    "images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "flickr30k_images",
    "flickr30k-images",
    "",
)


@dataclass(frozen=True)
class Picture:
    """One file of a folder source."""

    key: str
    folder: Path
    name: str  # below `folder`
    captions: tuple[str, ...]
    split: str | None = None
    label: int = -1
    label_name: str | None = None


_TABLE = """
PRAGMA journal_mode = OFF;
PRAGMA cache_size = -4000;
CREATE TABLE pictures (number INTEGER PRIMARY KEY, key TEXT, file TEXT, captions TEXT, split TEXT);
CREATE UNIQUE INDEX files ON pictures (file);
CREATE INDEX keys ON pictures (key);
"""


class Pictures:
    """Picture files with captions; a source (`chunks`, `read`, `fingerprint`). The functions below make one.

    A picture that is given several times is one picture with all the captions, in the place and the split of its first
    time. A row holds what identifies the file and the captions as json, whose escapes keep names that are not UTF-8.
    """

    unit = "img"

    def __init__(self, pictures: Iterable[Picture]) -> None:
        self._rows = sqlite3.connect("")  # a file of its own that vanishes with the connection; 4 MB stay in memory
        self._rows.executescript(_TABLE)
        for p in pictures:
            file = json.dumps([str(p.folder), p.name, p.label, p.label_name])
            captions = "".join(json.dumps(caption) + "\n" for caption in p.captions)
            more = "UPDATE pictures SET captions = captions || ?, split = coalesce(split, ?) WHERE file = ?"
            if self._rows.execute(more, (captions, p.split, file)).rowcount:
                continue
            # Names that differ in their ending only would share a key.
            taken = self._rows.execute("SELECT 1 FROM pictures WHERE key = ?", (p.key,)).fetchone()
            key = clean_key(f"{p.folder.name}/{p.name}") if taken else p.key
            new = "INSERT INTO pictures (key, file, captions, split) VALUES (?, ?, ?, ?)"
            self._rows.execute(new, (key, file, captions, p.split))
        self._count: int = self._rows.execute("SELECT count(*) FROM pictures").fetchone()[0]

    def chunks(self, longest: int) -> list[Stretch]:
        """Cut into equal stretches; pictures of both splits may share one."""
        return cut(0, self._count, longest)

    def fingerprint(self) -> str:
        """A hash of names, captions, splits, and the size of every file, so that a changed file is noticed."""
        digest = hashlib.sha256()
        for p in self._pictures(0, self._count):
            path = p.folder / p.name
            size = path.stat().st_size if path.is_file() else -1
            digest.update(json.dumps([p.key, p.name, p.captions, p.split, p.label, size]).encode())
        return f"folder {digest.hexdigest()[:24]}"

    def _pictures(self, start: int, stop: int) -> Iterator[Picture]:
        """Yield pictures [start, stop); SQLite numbers rows from 1."""
        rows = "SELECT key, file, captions, split FROM pictures WHERE number > ? AND number <= ? ORDER BY number"
        for key, file, captions, split in self._rows.execute(rows, (start, stop)):
            folder, name, label, label_name = json.loads(file)
            texts = tuple(json.loads(line) for line in captions.splitlines())
            yield Picture(key, Path(folder), name, texts, split, label, label_name)

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """Yield pictures [start, stop) in the order of the captions file or of their names."""
        for p in self._pictures(start, stop):
            path = (p.folder / p.name).resolve()
            if not path.is_relative_to(p.folder.resolve()):
                yield Drop(p.key, "outside", f"{p.name} leads out of {p.folder.name}")
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                yield Drop(p.key, "missing", f"{p.name} is named and not in {p.folder.name}")
                continue
            except (OSError, ValueError) as error:
                yield Drop(p.key, "unreadable", f"{p.name}: {error}"[:200])
                continue
            metadata = {"source_name": p.name}
            yield Sample(p.key, list(p.captions), data, None, p.label, p.label_name, split=p.split, metadata=metadata)


def folder_with_captions(path: Path, images: Path | None) -> Pictures:
    """Return the pictures named by a captions file.

    Args:
        path: the dataset folder, or the captions file itself.
        images: the picture folder; None looks for one of the usual names beside the captions file.

    Raises:
        DataError: no captions file, no picture folder, or a captions file that cannot be read.
    """
    if not path.exists():
        raise DataError(f"no file or folder at {path}; --source folder wants pictures and a captions file")
    files = find_captions_files(path) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no captions file (captions.txt, .csv, .tsv, .jsonl or .json)")
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images} is not a folder")
    return Pictures(itertools.chain.from_iterable(_named_pictures(file, images) for file in files))


def _named_pictures(file: Path, images: Path | None) -> Iterator[Picture]:
    items = read_captions(file)
    first = list(itertools.islice(items, 20))
    folder = images or _picture_folder(file, [item.name for item in first])
    for item in itertools.chain(first, items):
        yield Picture(clean_key(item.name.rsplit(".", 1)[0]), folder, item.name, tuple(item.captions), item.split)


def class_folders(path: Path, templates: tuple[str, ...], class_names: tuple[str, ...] = ()) -> Pictures:
    """Return the pictures of folders named by class, below folders named by split if there are such.

    Args:
        path: the root, e.g. of `root/dog/1.png` or `root/train/dog/1.png`.
        templates: captions with `{label}` in them, which the class's name replaces.
        class_names: names of the folders' classes, see `class_names.class_names_of`.

    Raises:
        DataError: no pictures in folders.
    """
    if not path.is_dir():
        raise DataError(f"no folder at {path}; --source classes wants a folder with one folder per class")
    below = [p for p in sorted(path.iterdir()) if p.is_dir()]
    splits = {p: split_named(p.name) for p in below if split_named(p.name)}
    roots: dict[Path, str | None] = {**splits} if splits else {path: None}
    names = sorted({p.name for root in roots for p in root.iterdir() if p.is_dir()})
    name_of = class_names_of(names, class_names)
    pictures = []
    for root, split in roots.items():
        for file in sorted(root.rglob("*")):
            name = file.relative_to(root).as_posix()
            if file.suffix.lower().lstrip(".") not in SOURCE_MEMBERS or "/" not in name or not file.is_file():
                continue
            label = name.split("/")[0]
            captions = tuple(template.format(label=name_of[label]) for template in templates)
            key = clean_key(f"{split}/{name}".rsplit(".", 1)[0] if split else name.rsplit(".", 1)[0])
            pictures.append(
                Picture(key, root, name, captions, split, names.index(label), name_of[label] if class_names else label)
            )
    if not pictures:
        raise DataError(f"{path} has no pictures in folders; --source classes wants e.g. {path.name}/dog/1.jpg")
    return Pictures(pictures)


def _picture_folder(file: Path, names: list[str]) -> Path:
    """Return the folder in which the first named pictures are, else the first usual one that exists."""
    stem = file.stem.removeprefix("captions_")  # COCO: annotations/captions_val2017.json and val2017/
    roots = [file.parent, file.parent.parent]
    candidates = [root / name for root in roots for name in (*IMAGE_FOLDERS, stem)]
    existing = [folder for folder in candidates if folder.is_dir()]
    return max(existing, key=lambda folder: sum((folder / name).is_file() for name in names))


def looks_like_classes(path: Path) -> bool:
    """Whether a folder holds folders (below `train/` and the like, or directly) with pictures in them."""
    below = [p for p in path.iterdir() if p.is_dir()]
    roots = [p for p in below if split_named(p.name)] or [path]
    folders = [p for root in roots for p in root.iterdir() if p.is_dir()]
    return any(f.suffix.lower().lstrip(".") in SOURCE_MEMBERS for p in folders[:10] for f in p.iterdir())
