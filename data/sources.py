"""Where image-text pairs come from: one indexed iterator of samples per kind, found by looking at the path.

    scenes     procedural pictures (`data.scenes`), no path
    folder     pictures and a captions file (Flickr8k: `Images/` and `captions.txt`, several captions per picture)
    parquet    the layout of the Hugging Face hub: an `image` struct with bytes, a text or a label column

A source is described by `SourceConfig`, which any process can open again, and reads any range of its items, so that
shards can be made independently and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.captions import FolderWithCaptions, find_captions_file
from data.parquet import Parquet, parquet_files
from data.scenes import Scenes
from data.schema import DataError, Source

KINDS = ("scenes", "folder", "parquet")
LABEL_TEMPLATE = "a photo of a {label}"


@dataclass(frozen=True)
class SourceConfig:
    """Everything needed to open a source, in any process.

    Args:
        kind: one of `KINDS`, or "auto" to look at the path.
        path: a folder, file or several of them; unused by scenes.
        num, seed, size, max_objects, words: see `data.scenes.Scenes`.
        class_names: names of the labels, in order, where the files do not carry them.
        template: caption of a labelled picture without text; `{label}` is replaced by the name.
    """

    kind: str = "auto"
    path: tuple[str, ...] = ()
    num: int = 0
    seed: int = 0
    size: int = 32
    max_objects: int = 2
    words: float = 0.0
    class_names: tuple[str, ...] = ()
    template: str = LABEL_TEMPLATE


def find_kind(paths: tuple[str, ...]) -> str:
    """Return the kind of source at `paths`.

    Raises:
        DataError: nothing there, or nothing known there.
    """
    if not paths:
        raise DataError("no --path given; only --source scenes needs none")
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"no file or folder at {path}; check --path")
    first = Path(paths[0])
    if parquet_files(paths):
        return "parquet"
    if first.is_dir() and find_captions_file(first) is not None:
        return "folder"
    if first.is_dir() and not any(first.iterdir()):
        raise DataError(f"{first} is empty; --path wants a folder with Images/ and captions.txt, or parquet files")
    raise DataError(
        f"cannot tell what {first} holds: wanted a folder with pictures and a captions file, or parquet files; "
        f"force one with --source {'|'.join(KINDS)}"
    )


def open_source(config: SourceConfig) -> Source:
    """Return the source that `config` describes.

    Raises:
        DataError: a path that is missing or holds something else.
    """
    kind = find_kind(config.path) if config.kind == "auto" else config.kind
    if kind == "scenes":
        return Scenes(config.num, config.seed, config.size, config.max_objects, config.words)
    if kind == "folder":
        if len(config.path) != 1:
            raise DataError(f"--source folder wants one --path, got {len(config.path)}")
        return FolderWithCaptions(Path(config.path[0]))
    if kind == "parquet":
        return Parquet(config.path, config.class_names, config.template)
    raise DataError(f"--source {kind} is unknown, choose one of {', '.join(KINDS)}")
