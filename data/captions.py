"""A folder of pictures with a captions file: the Flickr8k layout, `Images/` and `captions.txt`.

The captions file is a CSV with a header (`image,caption`); a picture may have any number of lines. The order of the
samples is the order in which the file first names the pictures. A name that leads outside the folder is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

from data.schema import DataError, Drop, Sample, Stretch, clean_key

CAPTION_FILES = ("captions.txt", "captions.csv")
IMAGE_FOLDERS = ("Images", "images", "Flicker8k_Dataset", "")


def find_captions_file(folder: Path) -> Path | None:
    """Return the captions file directly in `folder`, or None."""
    return next((folder / name for name in CAPTION_FILES if (folder / name).is_file()), None)


class FolderWithCaptions:
    """Pictures named by a captions file; a source (`stretches`, `read`, `fingerprint`)."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"no folder at {folder}; --source folder wants a folder with Images/ and captions.txt")
        captions_file = find_captions_file(folder)
        if captions_file is None:
            raise DataError(f"{folder} holds none of {', '.join(CAPTION_FILES)}; put the captions file beside Images/")
        self.folder = next(folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir())
        raw = captions_file.read_bytes()
        self.items = list(read_captions_csv(raw.decode("utf-8", "replace"), captions_file).items())
        self._fingerprint = f"folder {hashlib.sha256(raw).hexdigest()[:16]} {len(self.items)} pictures"

    def stretches(self) -> list[Stretch]:
        """All pictures are split by hash of the key."""
        return [Stretch(0, len(self.items))]

    def fingerprint(self) -> str:
        """The content of the captions file."""
        return self._fingerprint

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """Yield pictures [start, stop) in the order of the captions file."""
        for name, captions in self.items[start:stop]:
            key = clean_key(name.rsplit(".", 1)[0])
            path = (self.folder / name).resolve()
            if not path.is_relative_to(self.folder.resolve()):
                yield Drop(key, "outside", f"{name} leads out of {self.folder.name}")
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                yield Drop(key, "missing", f"{name} is in the captions file and not in {self.folder.name}")
                continue
            except OSError as error:
                yield Drop(key, "unreadable", f"{name}: {error}"[:200])
                continue
            yield Sample(key, captions, image=data, metadata={"source_name": name})


def read_captions_csv(text: str, path: Path) -> dict[str, list[str]]:
    """Return {picture name: captions} of a CSV with a header that has `image` and `caption`, in order of appearance.

    Raises:
        DataError: no such header, or no line below it.
    """
    reader = csv.DictReader(io.StringIO(text.lstrip("\ufeff").replace("\0", "\ufffd")))
    if not reader.fieldnames or not {"image", "caption"} <= set(reader.fieldnames):
        raise DataError(f"the first line of {path} is {reader.fieldnames}, wanted a header with image,caption")
    captions: dict[str, list[str]] = {}
    for row in reader:
        name, caption = (row["image"] or "").strip(), (row["caption"] or "").strip()
        if name:
            captions.setdefault(name, []).append(caption)
    if not captions:
        raise DataError(f"{path} has a header and no line below it; nothing to prepare")
    return captions
