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
from dataclasses import asdict, dataclass
from pathlib import Path

from data.prepare.members import Made, make_members
from data.prepare.options import PrepareConfig
from data.prepare.records import ChunkRecord, ShardRecord, octaves
from data.reading.shards import ShardWriter
from data.schema import (
    IMAGE_MEMBERS,
    SCHEMA_VERSION,
    SPLITS,
    Drop,
    Source,
    key_hash,
)

CODECS = ("pillow", "torch", "torchvision")  # packages whose versions may change the bytes of a picture


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
        chunk.shards[split]: ShardRecord(
            writer.count, writer.bytes, writer.sha256, b"".join(keys[split]).hex(), b"".join(hashes[split]).hex()
        )
        for split, writer in writers.items()
        if writer.count
    }
    bins = {name: octaves(values) for name, values in histograms.items()}
    record = ChunkRecord(fingerprint, [chunk.start, chunk.stop], shards, drops, dict(captions), **bins)
    record.write(out, chunk.number)


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
    from data.prepare.score import ImageTextScore  # open_clip, only with --score-weights

    return ImageTextScore(model, weights)
