"""Where image-text pairs come from: one indexed iterator of samples per kind, found by looking at the path.

    scenes     procedural pictures (`data.sources.scenes`), no path
    folder     pictures and a captions file: csv, tsv, jsonl, COCO or Karpathy json (`data.sources.captions`)
    classes    folders named by class, captions by template
    parquet    the layout of the Hugging Face hub: an `image` struct with bytes or paths, a text or a label column
    tars       WebDataset tars, as img2dataset writes them, also behind URLs

A source is described by `SourceConfig`, which any process can open again, and reads any range of its items, so that
shards can be made independently and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.reading.urls import is_remote, refuse_pipe, tar_urls
from data.schema import DataError, Source
from data.sources.captions import find_captions_files
from data.sources.folders import class_folders, folder_with_captions, looks_like_classes
from data.sources.parquet import Parquet, parquet_files
from data.sources.scenes import Scenes
from data.sources.tars import Tars

KINDS = ("scenes", "folder", "classes", "parquet", "tars")
TEMPLATES = ("a photo of a {label}",)


@dataclass(frozen=True)
class SourceConfig:
    """Everything needed to open a source, in any process.

    Args:
        kind: one of `KINDS`, or "auto" to look at the path.
        path: a folder, file or several of them, or URLs; unused by scenes.
        images: the picture folder of a captions file, where it is not beside it.
        num, seed, size, max_objects, words: see `data.sources.scenes.Scenes`.
        class_names: names of the labels, in order, where the files do not carry them; of classes also a file of names.
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

    def __post_init__(self) -> None:
        for template in self.templates:
            if "{label}" not in template or template.replace("{label}", "").count("{"):
                raise DataError(f"the template {template!r} wants {{label}} in it, and no other braces")


def find_kind(paths: tuple[str, ...]) -> str:
    """Return the kind of source at `paths`.

    Raises:
        DataError: nothing there, or nothing known there.
    """
    if not paths:
        raise DataError("no --path given; only --source scenes needs none")
    for given in paths:
        refuse_pipe(given)
        if not is_remote(given) and not any(c in given for c in "*?[{") and not Path(given).exists():
            raise DataError(f"no file or folder at {given}; check --path")
    first = Path(paths[0])
    if first.is_dir() and not any(first.iterdir()):
        raise DataError(f"{first} is empty; --path wants pictures with captions, parquet files, or tars")
    if is_remote(paths[0]) or tar_urls(paths):
        return "tars"  # before parquet: img2dataset leaves both in one folder
    if parquet_files(paths):
        return "parquet"
    if first.is_file() or find_captions_files(first):
        return "folder"
    if looks_like_classes(first):
        return "classes"
    raise DataError(
        f"cannot tell what {first} holds: wanted pictures and a captions file, folders named by class, parquet files "
        f"or tars; force one with --source {'|'.join(KINDS)}"
    )


def open_source(config: SourceConfig) -> Source:
    """Return the source that `config` describes.

    Raises:
        DataError: a path that is missing or holds something else.
    """
    kind = find_kind(config.path) if config.kind == "auto" else config.kind
    if kind == "scenes":
        return Scenes(config.num, config.seed, config.size, config.max_objects, config.words)
    if not config.path:
        raise DataError(f"--source {kind} wants a --path")
    if kind == "parquet":
        return Parquet(config.path, config.class_names, config.templates)
    if kind == "tars":
        return Tars(config.path)
    if len(config.path) != 1:
        raise DataError(f"--source {kind} wants one --path, got {len(config.path)}")
    if kind == "folder":
        return folder_with_captions(Path(config.path[0]), Path(config.images) if config.images else None)
    if kind == "classes":
        return class_folders(Path(config.path[0]), config.templates, config.class_names)
    raise DataError(f"--source {kind} is unknown, choose one of {', '.join(KINDS)}")
