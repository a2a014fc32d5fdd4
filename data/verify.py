"""Re-read a data directory and say what is wrong, down to the member."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.pictures import PictureError, decode
from data.schema import IMAGE_MEMBERS, LATENT_MEMBER, DataError, read_manifest
from data.shards import ShardReader, index_tar


def verify(data_dir: Path) -> Iterator[str]:
    """Yield one line per problem: missing or changed shards, wrong counts, members that do not decode.

    Raises:
        DataError: there is no manifest to compare with.
    """
    manifest = read_manifest(data_dir)
    for name, shard in manifest["shards"].items():
        path = data_dir / name
        if not path.is_file():
            yield f"{name}: missing, {shard['count']} samples lost"
            continue
        if _sha256(path) != shard["sha256"]:
            yield f"{name}: {path.stat().st_size} bytes, the manifest says {shard['bytes']} and another sha256"
        try:
            entries = index_tar(path)
        except DataError as error:
            yield f"{name}: {error}"
            continue
        if len(entries) != shard["count"]:
            yield f"{name}: {len(entries)} samples, the manifest says {shard['count']}"
        reader = ShardReader([path])
        for sample in range(len(reader)):
            for problem in _sample_problems(reader, sample, manifest["kind"]):
                yield f"{name}: {reader.key(sample)}{problem}"
    for split in ("train", "val"):
        for path in sorted((data_dir / split).glob("*.tar")):
            if f"{split}/{path.name}" not in manifest["shards"]:
                yield f"{split}/{path.name}: not in the manifest"


def _sample_problems(reader: ShardReader, sample: int, kind: str) -> Iterator[str]:
    names = reader.member_names(sample)
    wanted = IMAGE_MEMBERS if kind == "images" else (LATENT_MEMBER,)
    main = [name for name in names if name in wanted]
    if len(main) != 1:
        yield f": members {names}, wanted one of {', '.join(wanted)}"
    try:
        record: dict[str, Any] = json.loads(reader.read(sample, "json") or b"{}")
    except ValueError as error:
        yield f".json: {error}"
        return
    for name in main:
        if kind != "images":
            continue
        try:
            picture = decode(reader.read(sample, name) or b"")
        except PictureError as error:
            yield f".{name}: {error}"
            continue
        stated = (record.get("width", picture.width), record.get("height", picture.height))
        if picture.size != stated:
            yield f".{name}: {picture.size[0]} x {picture.size[1]}, the json says {stated[0]} x {stated[1]}"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
