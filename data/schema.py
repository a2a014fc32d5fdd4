"""The contract of the shards: what a sample is, which members a tar may hold, how keys and splits are formed.

A data directory holds `{train,val}/NNNNN.tar` in the layout img2dataset writes. Each sample is three members that
share a key, written side by side:

    KEY.jpg|png|webp   the picture
    KEY.txt            the first caption, UTF-8
    KEY.json           key, caption, captions (all of them), width, height, label, label_name, attributes, ...

Latent shards replace the picture by `KEY.safetensors` with the tensors `mean` and `std`, both (K, C) float32.
Beside the shards: `manifest.json` (everything known about the set), `sizes.json` in every split (samples per shard, as
open_clip reads) and `dropped.jsonl` (key, reason and detail of every sample that was left out).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.forms import SHARD_NAME, Named, misformed, parse_json

SCHEMA_VERSION = 1
SPLITS = ("train", "val")
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
LATENT_MEMBER = "safetensors"
# Only these member kinds are ever decoded. Anything else in a tar (pickles, code, arrays) is left as bytes.
DECODED_MEMBERS = (*IMAGE_MEMBERS, LATENT_MEMBER, "txt", "json", "cls")

# Member kinds of a source that hold a picture; those of `IMAGE_MEMBERS` can also be passed through untouched.
SOURCE_MEMBERS = (*IMAGE_MEMBERS, "gif", "bmp", "tif", "tiff", "ppm")
_MANIFEST = {
    "kind": str,
    "counts": Named(int, "train|val"),
    "shards": Named({"count": int, "bytes": int, "sha256": str}, SHARD_NAME),
}
_LATENTS = {"num_latents": int, "latent_dim": int, "tokenizer_fingerprint": str}
_COUNTS = ("dropped", "captions", "caption_length", "short_side")  # of pictures, by reason or by lower edge
_BINS = Named(int)
_SPLIT_NAME = re.compile(r"^(train|val|valid|validation|dev|test|restval)(?![a-z])")
LONGEST_KEY = 100 - len(f".{LATENT_MEMBER}")  # a plain tar has room for names of 100 bytes
_UNSAFE = re.compile(r"[^A-Za-z0-9_\-]+")


class DataError(ValueError):
    """A sentence for the user: what was found, what was wanted, what to do."""


@dataclass
class Sample:
    """One picture with its captions, as a source gives it: encoded bytes, or pixels when nothing was encoded yet."""

    key: str
    captions: list[str]
    image: bytes | None = None
    pixels: np.ndarray | None = None  # (H, W, 3) uint8
    label: int = -1
    label_name: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    split: str | None = None  # None: by hash of the key
    metadata: dict[str, Any] = field(default_factory=dict)  # further columns, kept in the json


@dataclass
class Drop:
    """A sample that was left out, and why. `reason` is one of a few words that are counted; `detail` is free text."""

    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Stretch:
    """Items [start, stop) of a source; `split` names the only split they can fall into, None where it may be either."""

    start: int
    stop: int
    split: str | None = None


def cut(start: int, stop: int, longest: int, split: str | None = None) -> list[Stretch]:
    """Return [start, stop) as stretches of at most `longest` items, all about equally long."""
    pieces = -(-(stop - start) // longest)
    bounds = [start + (stop - start) * i // pieces for i in range(pieces + 1)] if pieces else []
    return [Stretch(a, b, split) for a, b in itertools.pairwise(bounds)]


class Source(Protocol):
    """An indexed iterator of samples. Reading a range twice gives the same samples, so that shards are independent.

    `unit` is what an item is ("img", or "tar" where only whole tars can be addressed). A source may have an
    `attribution`: whose pictures they are and their licence, kept in the manifest and shown with the pictures.
    """

    unit: str

    def chunks(self, longest: int) -> list[Stretch]:
        """All items in order, in stretches of at most `longest`, cut also where the split changes."""

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """The samples of items [start, stop); unreadable ones as `Drop`."""

    def fingerprint(self) -> str:
        """A short string that differs when the source differs (paths, sizes, options)."""


def clean_key(name: str) -> str:
    """Return `name` reduced to `LONGEST_KEY` of `[A-Za-z0-9_-]`, so that a reader that splits at the first dot gets it.

    A name that loses characters gets a short hash of the original, so that two names never meet in one key.
    """
    clean = _UNSAFE.sub("_", name).strip("_")
    if clean == name and 0 < len(clean) <= LONGEST_KEY:
        return clean
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{clean[: LONGEST_KEY - 9]}_{digest}" if clean else digest


def key_hash(key: str) -> bytes:
    """Return 8 bytes by which keys of a whole set are compared."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def split_named(name: str) -> str | None:
    """Return the split that a folder, file or column states ("train", "val2017", "test-00000"), or None.

    Test pictures are held out, so they count as val; Karpathy's "restval" is trained on.
    """
    match = _SPLIT_NAME.match(name.lower())
    return None if match is None else "train" if match[1] in ("train", "restval") else "val"


def split_of(key: str, val_fraction: float) -> str:
    """Return "val" for a `val_fraction` of all keys, "train" for the others: a pure function of the key."""
    position = int.from_bytes(key_hash(key), "big") / 2**64
    return "val" if position < val_fraction else "train"


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that `path` either holds all of it or what it held before, also across a crash.

    Raises DataError for text that no UTF-8 can hold: half of a surrogate pair, as JSON may spell it.
    """
    try:
        written = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end].encode("unicode_escape").decode()
        raise DataError(f"{path} cannot hold {half}, which is no character; take it out of what was read") from error
    write_bytes(path, written)


def write_bytes(path: Path, content: bytes) -> None:
    """Write, sync and rename into place; `path` never holds a part of `content`."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> DataError:
    """Return the sentence for a file that cannot be written, for want of space as a rule."""
    return DataError(f"cannot write {path}: {error.strerror or error}; make room, and run the same command again")


def read_manifest(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return `manifest.json` of a prepared directory.

    Raises:
        DataError: the directory is missing, not prepared, or written by another schema version.
    """
    directory = Path(data_dir)
    path = directory / "manifest.json"
    if not directory.is_dir():
        raise DataError(f"no data directory at {directory}; write one with: python -m data prepare --out {directory}")
    if not path.is_file():
        raise DataError(
            f"{directory} has no manifest.json, so it is not (or not yet completely) prepared; "
            f"run `python -m data prepare --out {directory} ...` until it ends"
        )
    try:
        manifest = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); delete it and run prepare again") from error
    found = manifest.get("schema") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION:
        raise DataError(f"{path} has schema {found!r:.40}, this program reads {SCHEMA_VERSION}; prepare again")
    assert isinstance(manifest, dict)
    wrong = misformed(manifest, _MANIFEST) or misformed(
        {n: manifest[n] for n in _COUNTS if n in manifest}, Named(_BINS)
    )
    if manifest.get("kind") == "latents":
        wrong = wrong or misformed(manifest, {"latents": _LATENTS})
    if wrong is not None:
        raise DataError(f"{path} is not as it was written ({wrong}); delete it and prepare again")
    return manifest
