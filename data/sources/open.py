"""Where image-text pairs come from: one indexed iterator of samples per kind. `KINDS` is the table of them.

    scenes     procedural pictures (`data.sources.scenes`), no path
    emoji      emoji with their names (`data.sources.emoji`), no path needed
    glyphs     random characters of a font of yours (`data.sources.glyphs`), no path
    tars       WebDataset tars, as img2dataset writes them, also behind URLs
    parquet    the layout of the Hugging Face hub: an `image` struct with bytes or paths, a text or a label column
    folder     pictures and a captions file: csv, tsv, jsonl, COCO or Karpathy json (`data.sources.captions`)
    classes    folders named by class, captions by template

A source is described by `SourceConfig`, which any process can open again, and reads any range of its items, so that
shards can be made independently and in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.reading.urls import is_remote, refuse_pipe, tar_urls
from data.schema import DataError, Source
from data.sources.captions import find_captions_files
from data.sources.emoji import Emoji
from data.sources.folders import class_folders, folder_with_captions, looks_like_classes
from data.sources.glyphs import Glyphs
from data.sources.parquet import Parquet, parquet_files
from data.sources.scenes import Scenes
from data.sources.tars import Tars

TEMPLATES = ("a photo of a {label}",)


@dataclass(frozen=True)
class SourceConfig:
    """Everything needed to open a source, in any process.

    Args:
        kind: one of `KINDS`, or "auto" to look at the path.
        path: a folder, file or several of them, or URLs; unused by scenes.
        images: the picture folder of a captions file, where it is another folder.
        num, seed, size, max_objects, words: see `data.sources.scenes.Scenes`.
        class_names: names of the labels, in order, where the files do not carry them; of classes also a file of names.
        languages, background: see `data.sources.emoji.Emoji`.
        font, alphabet, characters: see `data.sources.glyphs.Glyphs`.
        templates: captions of a labelled picture without text; the name replaces `{label}`.
    """

    kind: str = "auto"
    path: tuple[str, ...] = ()
    images: str | None = None
    num: int = 0
    seed: int = 0
    size: int = 32
    max_objects: int = 2
    words: float = 0.0
    class_names: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    languages: tuple[str, ...] = ("en",)
    background: str = "white"
    font: str = ""
    alphabet: str = ""
    characters: int = 4

    def __post_init__(self) -> None:
        for template in self.templates:
            if "{label}" not in template or template.replace("{label}", "").count("{"):
                raise DataError(f"the template {template!r} wants {{label}} in it, and no other braces")


@dataclass(frozen=True)
class Kind:
    """One kind of source.

    Args:
        open: the source that a config describes.
        paths: how many of --path it needs.
        matches: whether these paths hold it, for --source auto; in the table's order. None: never.
        size: side of the pictures where --size is not given.
    """

    open: Callable[[SourceConfig], Source]
    paths: Literal["none", "one", "many"] = "one"
    matches: Callable[[tuple[str, ...]], bool] | None = None
    size: int = 256


KINDS = {
    "scenes": Kind(lambda c: Scenes(c.num, c.seed, c.size, c.max_objects, c.words), "none", size=32),
    "emoji": Kind(lambda c: Emoji(c.path, c.size, c.languages, c.background, c.seed, c.num), "none", size=64),
    "glyphs": Kind(lambda c: Glyphs(c.font, c.alphabet, c.num, c.seed, c.size, c.characters), "none", size=64),
    # Before parquet: img2dataset leaves both in one folder.
    "tars": Kind(lambda c: Tars(c.path), "many", lambda paths: is_remote(paths[0]) or bool(tar_urls(paths))),
    "parquet": Kind(
        lambda c: Parquet(c.path, c.class_names, c.templates), "many", lambda paths: bool(parquet_files(paths))
    ),
    "folder": Kind(
        lambda c: folder_with_captions(Path(c.path[0]), Path(c.images) if c.images else None),
        matches=lambda paths: Path(paths[0]).is_file() or bool(find_captions_files(Path(paths[0]))),
    ),
    "classes": Kind(
        lambda c: class_folders(Path(c.path[0]), c.templates, c.class_names),
        matches=lambda paths: looks_like_classes(Path(paths[0])),
    ),
}


def find_kind(paths: tuple[str, ...]) -> str:
    """Return the kind of source at `paths`.

    Raises:
        DataError: nothing there, or nothing known there.
    """
    if not paths:
        without = " or ".join(name for name, kind in KINDS.items() if kind.paths == "none")
        raise DataError(f"no --path given; only --source {without} needs none")
    for given in paths:
        refuse_pipe(given)
        if not is_remote(given) and not any(c in given for c in "*?[{") and not Path(given).exists():
            raise DataError(f"no file or folder at {given}; check --path")
    first = Path(paths[0])
    if first.is_dir() and not any(first.iterdir()):
        raise DataError(f"{first} is empty; --path wants pictures with captions, parquet files, or tars")
    for name, kind in KINDS.items():
        if kind.matches is not None and kind.matches(paths):
            return name
    raise DataError(
        f"cannot tell what {first} holds: wanted pictures and a captions file, folders named by class, parquet files "
        f"or tars; force one with --source {'|'.join(KINDS)}"
    )


def open_source(config: SourceConfig) -> Source:
    """Return the source that `config` describes.

    Raises:
        DataError: a path that is missing or holds something else.
    """
    name = find_kind(config.path) if config.kind == "auto" else config.kind
    if name not in KINDS:
        raise DataError(f"--source {name} is unknown, choose one of {', '.join(KINDS)}")
    kind = KINDS[name]
    if kind.paths != "none" and not config.path:
        raise DataError(f"--source {name} wants a --path")
    if kind.paths == "one" and len(config.path) != 1:
        raise DataError(f"--source {name} wants one --path, got {len(config.path)}")
    return kind.open(config)
