"""Sources to shards: plan, write every chunk on its own, finalize.

    source --plan--> chunks [start, stop) --write_chunk, in parallel--> {train,val}/NNNNN.tar + chunks/NNNNN.json
                                          --finalize--> manifest.json, sizes.json, dropped.jsonl

A chunk is a range of the source and gives at most one shard per split. What it writes depends on the source and the
options alone, so that chunks may be written in any order, by any number of processes, and again after a crash. Its
record `chunks/NNNNN.json` comes last; a chunk whose record is there and matches the plan is not written again.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from data.pictures import SOURCE_FORMATS, PictureError, decode, encode
from data.resize import resize
from data.schema import SCHEMA_VERSION, SPLITS, DataError, Drop, Sample, Source, split_of, write_bytes, write_json
from data.shards import ShardWriter
from data.sources import SourceConfig, open_source


@dataclass(frozen=True)
class PrepareConfig:
    """What `prepare` makes of a source.

    Args:
        source: where the pairs come from.
        size: side S of the pictures, in pixels.
        resize: a policy of `data.resize`.
        format: "jpg", "png" or "webp".
        quality: of jpg and webp, 1 to 100.
        val_fraction: share of the keys that go to val, 0 to 1; sources with splits of their own keep them.
        shard_size: items of the source per chunk, so at most that many samples per shard.
        max_caption: longest caption in characters; longer ones are cut there.
    """

    source: SourceConfig
    size: int = 256
    resize: str = "center_crop"
    format: str = "jpg"
    quality: int = 95
    val_fraction: float = 0.05
    shard_size: int = 2000
    max_caption: int = 10_000

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1:
            raise DataError(f"--val-fraction is {self.val_fraction}, it is a share from 0 to 1")
        if self.shard_size < 1:
            raise DataError(f"--shard-size is {self.shard_size}, wanted at least 1")
        if not 1 <= self.quality <= 100:
            raise DataError(f"--quality is {self.quality}, wanted 1 to 100")


@dataclass(frozen=True)
class Chunk:
    """Items [start, stop) of the source, and the shard that each split's samples of them go to."""

    number: int
    start: int
    stop: int
    shards: dict[str, str]  # split -> "train/00000.tar"


def plan(source: Source, config: PrepareConfig) -> list[Chunk]:
    """Cut the source into chunks of about equal size. Shards of a split are numbered without gaps."""
    chunks: list[Chunk] = []
    numbers: Counter[str] = Counter()
    for stretch in source.stretches():
        total = stretch.stop - stretch.start
        pieces = -(-total // config.shard_size)
        bounds = [stretch.start + total * i // pieces for i in range(pieces + 1)]
        if stretch.split is not None:
            splits: tuple[str, ...] = (stretch.split,)
        else:
            splits = tuple(s for s, share in zip(SPLITS, (1 - config.val_fraction, config.val_fraction), strict=True) if share)
        for start, stop in zip(bounds, bounds[1:], strict=False):
            shards = {}
            for split in splits:
                shards[split] = f"{split}/{numbers[split]:05d}.tar"
                numbers[split] += 1
            chunks.append(Chunk(len(chunks), start, stop, shards))
    return chunks


def fingerprint_of(source: Source, config: PrepareConfig) -> str:
    """Return a hash of everything that decides the bytes of the shards."""
    options = {k: v for k, v in asdict(config).items() if k != "source"}
    text = json.dumps([SCHEMA_VERSION, source.fingerprint(), options, PIL.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_chunk(source: Source, config: PrepareConfig, chunk: Chunk, out: Path, fingerprint: str) -> dict[str, Any]:
    """Write the shards of one chunk, then its record, and return the record."""
    drops: list[Drop] = []
    caption_lengths: Counter[int] = Counter()
    widths: Counter[int] = Counter()
    writers = {split: ShardWriter(out / name) for split, name in chunk.shards.items()}
    seen: set[str] = set()
    try:
        for sample in source.read(chunk.start, chunk.stop):
            made = sample if isinstance(sample, Drop) else make_members(sample, config)
            if not isinstance(made, Drop) and sample.key in seen:
                made = Drop(sample.key, "duplicate key")
            if isinstance(made, Drop):
                drops.append(made)
                continue
            assert isinstance(sample, Sample)
            seen.add(sample.key)
            members, record = made
            writers[sample.split or split_of(sample.key, config.val_fraction)].write(sample.key, members)
            caption_lengths.update(len(caption) for caption in record["captions"])
            widths[min(record["original_width"], record["original_height"])] += 1
    except BaseException as error:
        for writer in writers.values():
            writer.__exit__(type(error), error, None)
        raise
    for writer in writers.values():
        writer.__exit__(None, None, None)
    result = {
        "fingerprint": fingerprint,
        "source": [chunk.start, chunk.stop],
        "shards": {
            chunk.shards[split]: {"count": w.count, "bytes": w.bytes, "sha256": w.sha256}
            for split, w in writers.items()
            if w.count
        },
        "dropped": [asdict(drop) for drop in drops],
        "caption_length": _histogram(caption_lengths),
        "short_side": _histogram(widths),
    }
    write_json(out / "chunks" / f"{chunk.number:05d}.json", result)
    return result


def make_members(sample: Sample, config: PrepareConfig) -> tuple[dict[str, bytes], dict[str, Any]] | Drop:
    """Return the tar members of a sample and its json, or why there are none."""
    captions = [clean_caption(caption, config.max_caption) for caption in sample.captions]
    captions = [caption for caption in captions if caption]
    if not captions:
        return Drop(sample.key, "no caption")
    try:
        if sample.pixels is not None:
            picture, original = Image.fromarray(sample.pixels), (sample.pixels.shape[1], sample.pixels.shape[0])
        else:
            picture = decode(sample.image or b"", SOURCE_FORMATS)
            original = picture.size
    except PictureError as error:
        return Drop(sample.key, error.reason, str(error))
    picture = resize(picture, config.size, config.resize)
    record = {
        "key": sample.key,
        "caption": captions[0],
        "captions": captions,
        "status": "success",
        "width": picture.width,
        "height": picture.height,
        "original_width": original[0],
        "original_height": original[1],
        "label": sample.label,
        "label_name": sample.label_name,
        "attributes": sample.attributes,
        **sample.metadata,
    }
    members = {
        config.format: encode(picture, config.format, config.quality),
        "txt": captions[0].encode(),
        "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(),
    }
    return members, record


def clean_caption(caption: str, longest: int) -> str:
    """Return `caption` on one line without control characters, cut to `longest` characters."""
    printable = "".join(c if c.isprintable() else " " for c in caption[: 4 * longest])
    return " ".join(printable.split())[:longest]


def run(config: PrepareConfig, out: Path, workers: int, report: Callable[[int, int], None]) -> dict[str, Any]:
    """Prepare everything on this machine; return the manifest.

    Args:
        config: what to make.
        out: the data directory, created where needed. A finished one with the same options is left as it is.
        workers: processes.
        report: called with (samples done, samples in all) after every chunk.
    """
    source = open_source(config.source)
    chunks, fingerprint = plan(source, config), fingerprint_of(source, config)
    refuse_other_data(out, fingerprint)
    (out / "chunks").mkdir(parents=True, exist_ok=True)
    todo = [chunk for chunk in chunks if read_record(out, chunk.number, fingerprint) is None]
    total = sum(chunk.stop - chunk.start for chunk in chunks)
    done = total - sum(chunk.stop - chunk.start for chunk in todo)
    report(done, total)
    for chunk in _written(config, source, todo, out, fingerprint, workers):
        done += chunk.stop - chunk.start
        report(done, total)
    return finalize(config, chunks, out, fingerprint)


def _written(
    config: PrepareConfig, source: Source, todo: list[Chunk], out: Path, fingerprint: str, workers: int
) -> Iterator[Chunk]:
    if workers <= 1 or len(todo) <= 1:
        for chunk in todo:
            write_chunk(source, config, chunk, out, fingerprint)
            yield chunk
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(config, out, fingerprint)) as pool:
        futures = {pool.submit(_work, chunk): chunk for chunk in todo}
        for future in as_completed(futures):
            future.result()
            yield futures[future]


_worker: tuple[Source, PrepareConfig, Path, str] | None = None  # per process: the source is opened once


def _start_worker(config: PrepareConfig, out: Path, fingerprint: str) -> None:
    global _worker
    _worker = (open_source(config.source), config, out, fingerprint)


def _work(chunk: Chunk) -> None:
    assert _worker is not None, "the pool starts its processes with _start_worker"
    source, config, out, fingerprint = _worker
    write_chunk(source, config, chunk, out, fingerprint)


def refuse_other_data(out: Path, fingerprint: str) -> None:
    """Raise DataError where `out` holds shards made from another source or with other options."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file, wanted a directory")
    for path in sorted((out / "chunks").glob("*.json"))[:1]:
        if json.loads(path.read_text())["fingerprint"] != fingerprint:
            raise DataError(f"{out} holds shards of another source or other options; choose another --out or delete it")


def read_record(out: Path, number: int, fingerprint: str) -> dict[str, Any] | None:
    """Return the record of a chunk that is completely written under this plan, else None."""
    try:
        record: dict[str, Any] = json.loads((out / "chunks" / f"{number:05d}.json").read_text())
    except (OSError, ValueError):
        return None
    if record["fingerprint"] != fingerprint:
        return None
    complete = all(
        (out / name).is_file() and (out / name).stat().st_size == shard["bytes"] for name, shard in record["shards"].items()
    )
    return record if complete else None


def finalize(config: PrepareConfig, chunks: list[Chunk], out: Path, fingerprint: str) -> dict[str, Any]:
    """Write `dropped.jsonl`, `sizes.json` and, last, `manifest.json` from the records of all chunks."""
    shards: dict[str, Any] = {}
    reasons: Counter[str] = Counter()
    caption_length: Counter[str] = Counter()
    short_side: Counter[str] = Counter()
    dropped: list[str] = []
    for chunk in chunks:
        record = read_record(out, chunk.number, fingerprint)
        if record is None:
            raise DataError(f"chunk {chunk.number} of {len(chunks)} is not written yet; run prepare again to continue")
        for name, shard in record["shards"].items():
            shards[name] = {**shard, "source": record["source"]}
        reasons.update(drop["reason"] for drop in record["dropped"])
        dropped += [json.dumps(drop, ensure_ascii=False) for drop in record["dropped"]]
        caption_length.update(record["caption_length"])
        short_side.update(record["short_side"])
    counts = {split: sum(s["count"] for n, s in shards.items() if n.startswith(split + "/")) for split in SPLITS}
    if not sum(counts.values()):
        raise DataError(f"nothing was readable: {dict(reasons)}; the first is {dropped[:1]}")
    write_bytes(out / "dropped.jsonl", "".join(line + "\n" for line in dropped).encode())
    for split in SPLITS:
        if counts[split]:
            sizes = {name.split("/")[1]: s["count"] for name, s in shards.items() if name.startswith(split + "/")}
            write_json(out / split / "sizes.json", sizes)
    manifest = {
        "schema": SCHEMA_VERSION,
        "kind": "images",
        "counts": counts,
        "dropped": dict(sorted(reasons.items())),
        "caption_length": _sorted(caption_length),
        "short_side": _sorted(short_side),
        "config": asdict(config),
        "fingerprint": fingerprint,
        "versions": {"python": platform.python_version(), "pillow": PIL.__version__},
        "shards": dict(sorted(shards.items())),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _histogram(values: Counter[int]) -> dict[str, int]:
    """Count values in bins whose edges are powers of two; a bin is named by its lower edge."""
    bins: Counter[str] = Counter()
    for value, count in values.items():
        bins[str(1 << (value.bit_length() - 1) if value else 0)] += count
    return _sorted(bins)


def _sorted(bins: Counter[str]) -> dict[str, int]:
    return {name: bins[name] for name in sorted(bins, key=int)}
