"""Sources to shards: plan, and write every chunk on its own. `data.prepare.finalize` makes one dataset of them.

    source --plan--> chunks --write_chunk, in parallel--> {train,val}/NNNNN.tar + chunks/NNNNN.json
                            --finalize--> manifest.json, sizes.json, dropped.jsonl

A chunk is a range of the source and gives at most one shard per split. What it writes depends on the source and the
options alone, so that chunks may be written in any order, by any number of processes or machines (`engines`), and
again after a crash, with the same bytes. Its record `chunks/NNNNN.json` comes last; a chunk whose record is there and
matches the plan is not written again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from data.pictures.decode import (
    MEMBER_OF_FORMAT,
    SOURCE_FORMATS,
    PictureError,
    check_png,
    encode,
    open_picture,
    short,
    to_rgb,
    upright_size,
)
from data.prepare.quality import Filters, picture_hash
from data.reading.shards import ShardWriter
from data.schema import (
    IMAGE_MEMBERS,
    SCHEMA_VERSION,
    SPLITS,
    DataError,
    Drop,
    Sample,
    Source,
    key_hash,
    split_of,
    write_json,
)
from data.sources.open import SourceConfig

CODECS = ("pillow", "torch", "torchvision")  # packages whose versions may change the bytes of a picture


@dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` makes of a source.

    Args:
        source: where the pairs come from.
        size: side S of the pictures, in pixels.
        resize: a policy of `data.pictures.resize.geometry`.
        format: "jpg", "png" or "webp", or "keep": the bytes of the source, untouched.
        quality: of jpg and webp, 1 to 100.
        val_fraction: share of the keys that go to val, 0 to 1; sources with splits of their own keep them.
        shard_size: items of the source per chunk, so at most that many samples per shard; where the items are tars,
            each becomes one shard per split, whatever its size.
        filters: what is left out.
        score_model, score_weights: an open_clip model by name or json, and its weights; None scores nothing.
        min_score: pairs whose cosine under that model is lower are left out.
    """

    source: SourceConfig
    size: int = 256
    resize: str = "center_crop"
    format: str = "jpg"
    quality: int = 95
    val_fraction: float = 0.05
    shard_size: int = 2000
    filters: Filters = field(default_factory=Filters)
    score_model: str = "ViT-B-32"
    score_weights: str | None = None
    min_score: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1:
            raise DataError(f"val_fraction is {self.val_fraction}, it is a share from 0 to 1")
        if self.shard_size < 1 or self.size < 1:
            raise DataError(f"shard_size {self.shard_size} and size {self.size} must be at least 1")
        if not 1 <= self.quality <= 100:
            raise DataError(f"quality is {self.quality}, wanted 1 to 100")
        if self.format not in ("jpg", "png", "webp", "keep"):
            raise DataError(f"format is {self.format!r}, wanted jpg, png, webp or keep")
        if self.format == "keep" and self.resize != "no":
            raise DataError(f"format keep leaves the bytes untouched, so resize must be no and not {self.resize}")


@dataclass(frozen=True)
class Chunk:
    """Items [start, stop) of the source, and the shard that each split's samples of them go to."""

    number: int
    start: int
    stop: int
    shards: dict[str, str]  # split -> "train/00000.tar"


def plan(source: Source, config: PrepareConfig) -> list[Chunk]:
    """Cut the source into chunks. Shards of a split are numbered without gaps."""
    chunks: list[Chunk] = []
    numbers: Counter[str] = Counter()
    for stretch in source.chunks(config.shard_size):
        shards = {}
        for split in SPLITS if stretch.split is None else (stretch.split,):
            shards[split] = f"{split}/{numbers[split]:05d}.tar"
            numbers[split] += 1
        chunks.append(Chunk(len(chunks), stretch.start, stretch.stop, shards))
    return chunks


def fingerprint_of(source: Source, config: PrepareConfig) -> str:
    """Return a hash of everything that decides the bytes of the shards, the codecs' versions included."""
    options = {name: value for name, value in asdict(config).items() if name != "source"}
    versions = [importlib.metadata.version(name) for name in CODECS]
    text = json.dumps([SCHEMA_VERSION, source.fingerprint(), options, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_chunk(
    source: Source, config: PrepareConfig, chunk: Chunk, out: Path, fingerprint: str, tick: Callable[[], None]
) -> None:
    """Write the shards of one chunk, then its record. `tick` is called after every sample."""
    drops: list[Drop] = []
    histograms = {name: Counter[int]() for name in ("caption_length", "short_side")}
    captions: Counter[str] = Counter()
    hashes: dict[str, list[bytes]] = {split: [] for split in chunk.shards}
    keys: dict[str, list[bytes]] = {split: [] for split in chunk.shards}
    with contextlib.ExitStack() as stack:
        writers = {split: ShardWriter(out / name) for split, name in chunk.shards.items()}
        # Entered in turn and left together: an error in the middle removes what was begun.
        for writer in writers.values():
            stack.enter_context(writer)
        stream = _made(source, config, chunk, drops, captions, tick)
        if config.score_weights is not None:
            stream = _scored(stream, config, drops)
        for made in stream:
            writers[made.split].write(made.key, made.members)
            keys[made.split].append(key_hash(made.key))
            hashes[made.split].append(made.hash)
            histograms["caption_length"].update(len(caption) for caption in made.captions)
            histograms["short_side"][min(made.original)] += 1
    shards = {
        chunk.shards[split]: {
            "count": writer.count,
            "bytes": writer.bytes,
            "sha256": writer.sha256,
            "keys": b"".join(keys[split]).hex(),
            "hashes": b"".join(hashes[split]).hex(),
        }
        for split, writer in writers.items()
        if writer.count
    }
    record = {
        "fingerprint": fingerprint,
        "source": [chunk.start, chunk.stop],
        "shards": shards,
        "dropped": [asdict(drop) for drop in drops],
        "captions": dict(captions),
        **{name: octaves(values) for name, values in histograms.items()},
    }
    write_json(out / "chunks" / f"{chunk.number:05d}.json", record)


@dataclass
class Made:
    """A sample as it is written: its tar members, its size before resizing, and its hash (b"" where none is asked)."""

    key: str
    split: str
    captions: list[str]
    members: dict[str, bytes]
    original: tuple[int, int]
    hash: bytes


def _made(
    source: Source,
    config: PrepareConfig,
    chunk: Chunk,
    drops: list[Drop],
    captions: Counter[str],
    tick: Callable[[], None],
) -> Iterator[Made]:
    """Yield the samples of a chunk that stay; add the others to `drops` and count captions."""
    seen: set[str] = set()
    for sample in source.read(chunk.start, chunk.stop):
        tick()
        if isinstance(sample, Drop):
            drops.append(sample)
            continue
        kept, left_out = config.filters.choose_captions(sample.key, sample.captions, captions)
        drops += left_out
        made = make_members(sample, kept, config) if kept else Drop(sample.key, "no caption")
        if not isinstance(made, Drop) and made.key in seen:
            made = Drop(sample.key, "duplicate key", "an earlier sample of the same source range has it")
        if isinstance(made, Drop):
            drops.append(made)
            continue
        seen.add(made.key)
        yield made


def _scored(stream: Iterator[Made], config: PrepareConfig, drops: list[Drop]) -> Iterator[Made]:
    """Yield the samples whose first caption fits their picture, the score in their json; drop the others."""
    score = _load_score(config.score_model, config.score_weights or "")
    while batch := list(itertools.islice(stream, 32)):
        pictures = [next(content for name, content in made.members.items() if name in IMAGE_MEMBERS) for made in batch]
        for made, value in zip(batch, score(pictures, [made.captions[0] for made in batch]), strict=True):
            if value < config.min_score:
                drops.append(Drop(made.key, "image-text score", f"{value:.4f} is under {config.min_score}"))
                continue
            record = {**json.loads(made.members["json"]), "image_text_score": round(value, 4)}
            made.members["json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
            yield made


@functools.cache
def _load_score(model: str, weights: str) -> Callable[[list[bytes], list[str]], list[float]]:
    from data.prepare.score import ImageTextScore  # open_clip, only where it is asked for

    return ImageTextScore(model, weights)


def make_members(sample: Sample, captions: list[str], config: PrepareConfig) -> Made | Drop:
    """Return what is written of a sample, or why nothing is."""
    try:
        member, content, size, original, code = _make_picture(sample, config)
    except PictureError as error:
        return Drop(sample.key, error.reason, str(error))
    record = {
        **sample.metadata,
        "key": sample.key,
        "caption": captions[0],
        "captions": captions,
        "status": "success",
        "width": size[0],
        "height": size[1],
        "original_width": original[0],
        "original_height": original[1],
        "label": sample.label,
        "label_name": sample.label_name,
        "attributes": sample.attributes,
    }
    if sample.image is not None:
        record["sha256"] = hashlib.sha256(sample.image).hexdigest()
    members = {
        member: content,
        "txt": captions[0].encode("utf-8", "replace"),
        "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace"),
    }
    split = sample.split or split_of(sample.key, config.val_fraction)
    return Made(sample.key, split, captions, members, original, code)


def _make_picture(sample: Sample, config: PrepareConfig) -> tuple[str, bytes, tuple[int, int], tuple[int, int], bytes]:
    """Return member, bytes, size, size before resizing, and hash. Raises PictureError."""
    hashed: Callable[[Image.Image], bytes] = picture_hash if config.filters.near_duplicates is not None else _no_hash
    drawn = "png" if config.format == "keep" else config.format  # where there are no bytes to keep
    if sample.pixels is not None:
        picture = Image.fromarray(sample.pixels)
        return drawn, encode(picture, drawn, config.quality), picture.size, picture.size, hashed(picture)
    data = sample.image or b""
    header = open_picture(data, SOURCE_FORMATS, config.filters.max_pixels)
    try:
        if getattr(header, "is_animated", False):
            raise PictureError("animated", f"{getattr(header, 'n_frames', 'several')} frames; one picture is wanted")
        if header.format == "PNG":
            check_png(data)
        original = upright_size(header)
        refused = config.filters.size_reason(*original)
        if refused is not None:
            raise PictureError(*refused)
        if config.format == "keep" and header.format in MEMBER_OF_FORMAT:
            return MEMBER_OF_FORMAT[header.format], data, original, original, hashed(to_rgb(header))
        if config.resize == "no" or (config.resize == "center_crop" and original == (config.size, config.size)):
            picture = to_rgb(header)
            return drawn, encode(picture, drawn, config.quality), original, original, hashed(picture)
        from data.pictures.resize import as_picture, encode_pixels, pixels_of, resize  # torch, only where it is needed

        pixels = resize(pixels_of(data, header, config.size, config.resize), config.size, config.resize)
        content = encode_pixels(pixels, drawn, config.quality)
        code = hashed(as_picture(pixels)) if hashed is picture_hash else b""
        return drawn, content, (pixels.shape[2], pixels.shape[1]), original, code
    except DataError:
        raise
    except Exception as error:  # decoders raise many kinds on hostile bytes; all mean the same here
        raise PictureError("unreadable", f"the picture does not decode: {short(error)}") from error


def _no_hash(picture: Image.Image) -> bytes:
    return b""


def octaves(values: Counter[int]) -> dict[str, int]:
    """Count values in bins whose edges are powers of two; a bin is named by its lower edge."""
    bins: Counter[int] = Counter()
    for value, count in values.items():
        bins[1 << (value.bit_length() - 1) if value else 0] += count
    return {str(edge): bins[edge] for edge in sorted(bins)}
