"""Re-read a data directory and say what is wrong, down to the member."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from data.forms import parse_json
from data.pictures.decode import PictureError, decode
from data.reading.shards import ShardReader
from data.reading.tar_index import index_tar
from data.schema import IMAGE_MEMBERS, LATENT_MEMBER, DataError, read_manifest


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
            for problem in _sample_problems(reader, sample, manifest):
                yield f"{name}: {reader.key(sample)}{problem}"
    for split in ("train", "val"):
        for path in sorted((data_dir / split).glob("*.tar")):
            if f"{split}/{path.name}" not in manifest["shards"]:
                yield f"{split}/{path.name}: not in the manifest"


def _sample_problems(reader: ShardReader, sample: int, manifest: dict[str, Any]) -> Iterator[str]:
    names = reader.member_names(sample)
    pictures = manifest["kind"] == "images"
    wanted = IMAGE_MEMBERS if pictures else (LATENT_MEMBER,)
    main = [name for name in names if name in wanted]
    if len(main) != 1:
        yield f": members {names}, wanted one of {', '.join(wanted)}"
    try:
        record: dict[str, Any] = parse_json(reader.read(sample, "json") or b"{}")
    except ValueError as error:
        yield f".json: {error}"
        return
    for name in main:
        content = reader.read(sample, name) or b""
        for problem in _picture_problems(content, record) if pictures else _latent_problems(content, manifest):
            yield f".{name}: {problem}"


def _picture_problems(content: bytes, record: dict[str, Any]) -> Iterator[str]:
    try:
        picture = decode(content)
    except PictureError as error:
        yield str(error)
        return
    stated = (record.get("width", picture.width), record.get("height", picture.height))
    if picture.size != stated:
        yield f"{picture.size[0]} x {picture.size[1]}, the json says {stated[0]} x {stated[1]}"


def _latent_problems(content: bytes, manifest: dict[str, Any]) -> Iterator[str]:
    shape = (manifest["latents"]["num_latents"], manifest["latents"]["latent_dim"])
    try:
        tensors = safetensors.numpy.load(content)
    except SafetensorError as error:
        yield f"not a safetensors file ({error})"
        return
    for name in ("mean", "std"):
        if name not in tensors or tensors[name].shape != shape:
            found = tensors[name].shape if name in tensors else "nothing"
            yield f"{name} is {found}, the manifest says {shape}"
        elif not np.isfinite(tensors[name]).all():
            yield f"{name} has values that are not finite"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
