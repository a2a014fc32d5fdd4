"""Chunks to one dataset: remove what occurs twice, collect the statistics, write the manifest last.

Keys and near-duplicates can be compared only when everything is written. A shard that holds one is rewritten without
it, under the same name and atomically. Its record is removed before that and written anew after it: were the program
killed in between, the chunk would be written again from the source. So this too ends in the same bytes.
"""

from __future__ import annotations

import bisect
import json
import platform
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data.forms import Named, misformed, parse_json
from data.prepare.chunks import CODECS, Chunk
from data.prepare.options import PrepareConfig
from data.prepare.quality import near_duplicates
from data.prepare.records import read_record, record_path
from data.reading.shards import ShardReader, ShardWriter
from data.schema import SCHEMA_VERSION, SPLITS, DataError, Drop, read_manifest, write_bytes, write_json

_PLAN = {"fingerprint": str, "config": dict, "chunks": [list]}
_CHUNK = {"start": int, "stop": int, "shards": Named(str, "train|val")}


def write_plan(out: Path, config: PrepareConfig, chunks: list[Chunk], fingerprint: str, attribution: str = "") -> None:
    """Write `plan.json`: what `finalize` needs to know, wherever the chunks were written.

    Raises:
        DataError: `out` holds shards of another source or of other options, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out} is a file, wanted a directory")
    path = out / "plan.json"
    if path.is_file():
        if read_plan(out)[2] != fingerprint:
            raise DataError(
                f"{out} holds shards of another source, other options or other library versions; "
                "choose another --out, or delete it"
            )
        return
    begun = ("chunks", "plan.json.")  # what a run that was killed at its very start leaves behind
    if out.is_dir() and any(not path.name.startswith(begun) for path in out.iterdir()):
        raise DataError(f"--out {out} is not empty and no plan of an earlier run is in it; choose another --out")
    try:
        (out / "chunks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create {out}: {error}") from error
    content = {
        "fingerprint": fingerprint,
        "near_duplicates": config.filters.near_duplicates,
        "config": asdict(config),
        "attribution": attribution,
        "chunks": [[chunk.start, chunk.stop, chunk.shards] for chunk in chunks],
    }
    write_json(path, content)


def read_plan(out: Path) -> tuple[dict[str, Any], list[Chunk], str]:
    """Return the plan's content, its chunks and its fingerprint.

    Raises:
        DataError: there is none.
    """
    try:
        content = parse_json((out / "plan.json").read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{out} has no readable plan.json ({error}); start with: python -m data prepare") from error
    wrong = misformed(content, _PLAN)
    for fields in [] if wrong else content["chunks"]:
        named = dict(zip(("start", "stop", "shards"), fields, strict=False))
        wrong = wrong or (f"a chunk has {len(fields)} entries" if len(fields) != 3 else misformed(named, _CHUNK))
    if wrong is not None:
        raise DataError(f"{out}/plan.json is not as it was written ({wrong}); delete {out} and prepare again")
    chunks = [Chunk(number, *fields) for number, fields in enumerate(content["chunks"])]
    return content, chunks, content["fingerprint"]


def is_finished(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the manifest where `out` is finished under this fingerprint and its shards have their sizes."""
    try:
        manifest = read_manifest(out)
    except (OSError, ValueError):
        return None
    shards = manifest["shards"].items()
    whole = all((out / n).is_file() and (out / n).stat().st_size == s["bytes"] for n, s in shards)
    return manifest if whole and manifest.get("fingerprint") == fingerprint else None


def finalize(out: Path) -> dict[str, Any]:
    """Make one dataset of all chunks and return its manifest.

    Raises:
        DataError: chunks are missing, or nothing was readable.
    """
    content, chunks, fingerprint = read_plan(out)
    missing = [chunk.number for chunk in chunks if read_record(out, chunk.number, fingerprint) is None]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(chunks)} chunks are not written yet (the first is {missing[0]}); "
            "run prepare again, for every task, and finalize then"
        )
    for folder in (*SPLITS, "chunks", "."):
        for part in (out / folder).glob("*.part"):  # of killed processes
            part.unlink(missing_ok=True)
    _remove_duplicates(out, chunks, fingerprint, content["near_duplicates"])
    return _write_manifest(out, content, chunks, fingerprint)


def _remove_duplicates(out: Path, chunks: list[Chunk], fingerprint: str, bits: int | None) -> None:
    """Rewrite the shards that hold a key or a picture of an earlier shard."""
    names: list[tuple[int, str]] = []
    starts = [0]
    keys: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    for chunk in chunks:
        record = read_record(out, chunk.number, fingerprint)
        assert record is not None, "finalize has looked at every record"
        for name, shard in record.shards.items():
            names.append((chunk.number, name))
            keys.append(shard.key_hashes())
            hashes.append(shard.picture_hashes())
            starts.append(starts[-1] + len(keys[-1]))
    if not names:
        return
    gone: dict[int, tuple[str, int]] = {}
    _, first, group = np.unique(np.concatenate(keys), return_index=True, return_inverse=True)
    for later in np.flatnonzero(first[group] != np.arange(starts[-1])).tolist():
        gone[later] = ("duplicate key", int(first[group[later]]))
    if bits is not None:
        remaining = np.array([i for i in range(starts[-1]) if i not in gone])
        for later, earlier in near_duplicates(np.concatenate(hashes)[remaining], bits).items():
            gone[int(remaining[later])] = ("near duplicate", int(remaining[earlier]))
    by_shard: dict[int, dict[int, tuple[str, int]]] = {}
    for sample, why in gone.items():
        number = bisect.bisect_right(starts, sample) - 1
        by_shard.setdefault(number, {})[sample - starts[number]] = why
    for number, removed in sorted(by_shard.items()):
        details: dict[int, tuple[str, str]] = {}
        for position, (reason, earlier) in removed.items():
            holder = bisect.bisect_right(starts, earlier) - 1
            details[position] = (reason, f"of sample {earlier - starts[holder]} in {names[holder][1]}")
        _rewrite(out, *names[number], fingerprint, details)


def _rewrite(out: Path, chunk: int, name: str, fingerprint: str, removed: dict[int, tuple[str, str]]) -> None:
    """Write a shard again without the samples at positions `removed`, then its record; done already, do nothing."""
    record = read_record(out, chunk, fingerprint)
    assert record is not None, "finalize has looked at every record"
    shard = record.shards[name]
    if shard.removed == sorted(removed):
        return
    reader = ShardReader([out / name])
    # A chunk without a record counts as not written. Sizes could not tell it: tars are padded to whole records.
    record_path(out, chunk).unlink()
    with ShardWriter(out / name) as writer:
        for sample in range(len(reader)):
            if sample in removed:
                record.dropped.append(Drop(reader.key(sample), *removed[sample]))
                continue
            writer.write(reader.key(sample), {m: reader.read(sample, m) or b"" for m in reader.member_names(sample)})
    if not writer.count:
        (out / name).unlink()
    shard.count, shard.bytes, shard.sha256, shard.removed = writer.count, writer.bytes, writer.sha256, sorted(removed)
    record.write(out, chunk)


def _write_manifest(out: Path, content: dict[str, Any], chunks: list[Chunk], fingerprint: str) -> dict[str, Any]:
    """Write `dropped.jsonl`, `sizes.json` of the splits, and `manifest.json`, the mark of a finished set."""
    shards: dict[str, Any] = {}
    sums = {name: Counter[str]() for name in ("dropped", "captions", "caption_length", "short_side")}
    lines: list[str] = []
    for chunk in chunks:
        record = read_record(out, chunk.number, fingerprint)
        assert record is not None, "finalize has looked at every record"
        for name, shard in record.shards.items():
            if shard.count:
                entry = {"count": shard.count, "bytes": shard.bytes, "sha256": shard.sha256}
                shards[name] = entry | {"source": record.source}
        lines += [json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in record.dropped]
        # A caption that is left out is listed among the drops and counted among the captions.
        sums["dropped"].update(d.reason for d in record.dropped if not d.reason.startswith("caption "))
        for name in ("captions", "caption_length", "short_side"):
            sums[name].update(getattr(record, name))
    counts = {s: sum(shard["count"] for name, shard in shards.items() if name.startswith(s + "/")) for s in SPLITS}
    write_bytes(out / "dropped.jsonl", "".join(lines).encode("utf-8", "replace"))
    if not sum(counts.values()):
        raise DataError(f"nothing was readable: {dict(sums['dropped'])}; the details are in {out}/dropped.jsonl")
    for split in SPLITS:
        if counts[split]:
            sizes = {name.split("/")[1]: s["count"] for name, s in shards.items() if name.startswith(split + "/")}
            write_json(out / split / "sizes.json", sizes)
    manifest = {
        "schema": SCHEMA_VERSION,
        "kind": "images",
        "counts": counts,
        "dropped": dict(sorted(sums["dropped"].items())),
        "captions": dict(sorted(sums["captions"].items())),
        **{name: {k: sums[name][k] for k in sorted(sums[name], key=int)} for name in ("caption_length", "short_side")},
        "config": content["config"],
        **({"attribution": content["attribution"]} if content.get("attribution") else {}),
        "fingerprint": fingerprint,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in CODECS},
        "shards": dict(sorted(shards.items())),
    }
    write_json(out / "manifest.json", manifest)
    return manifest
