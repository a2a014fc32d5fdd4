"""Names of classes whose folders have ids: ImageNet's n01440764 is a tench.

A file of names is one of ImageNet's usual three, distinguished by its content:

    words.txt                   n01440764<tab>tench, Tinca tinca
    LOC_synset_mapping.txt      n01440764 tench, Tinca tinca
    imagenet_class_index.json   {"0": ["n01440764", "tench"], ...}

Of several synonyms the first is the name; underscores are spaces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data.schema import DataError


def class_names_of(folders: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """The name of every class folder.

    Args:
        folders: names of the folders, sorted.
        given: nothing (a folder's own name is the class's), the path of one file of names, or one name per folder in
            the folders' order.

    Raises:
        DataError: a folder that the file does not name, another number of names, or a file without names.
    """
    if not given:
        return {folder: folder.replace("_", " ") for folder in folders}
    if len(given) == 1 and Path(given[0]).is_file():
        known = read_class_names(Path(given[0]))
        unknown = [folder for folder in folders if folder not in known]
        if unknown:
            raise DataError(
                f"{given[0]} has no name for {len(unknown)} of {len(folders)} class folders, the first is {unknown[0]}"
                "; add it, or give the file that belongs to these folders"
            )
        return {folder: known[folder] for folder in folders}
    if len(given) != len(folders):
        raise DataError(
            f"got {len(given)} --class-names for {len(folders)} class folders, wanted one each in the order of the "
            "folders, or the path of a file such as words.txt"
        )
    return dict(zip(folders, given, strict=True))


def read_class_names(path: Path) -> dict[str, str]:
    """Names by id. Raises DataError where the file has none."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            pairs = [(str(entry[0]), str(entry[1])) for entry in json.loads(text).values()]
        else:
            lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
            pairs = [(words[0], words[1]) for words in lines]
    except (OSError, UnicodeDecodeError, ValueError, IndexError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not hold lines of an id and a name ({error}); wanted words.txt or the like"
        ) from error
    names = {wnid: name.split(",")[0].strip().replace("_", " ") for wnid, name in pairs}
    if not names:
        raise DataError(f"{path} holds no class names; wanted lines of an id and a name, as in words.txt")
    return names
