"""What is noted of each chunk, in `chunks/NNNNN.json`: written with its shards, read when all are made one dataset."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data.forms import SHARD_NAME, Named, misformed, parse_json
from data.schema import Drop, write_json

_HASH_BYTES = 16
_SHARD = {"count": int, "bytes": int, "sha256": str, "keys": str, "hashes": str}
_RECORD = {
    "fingerprint": str,
    "source": [int],
    "shards": Named(_SHARD, SHARD_NAME),
    "dropped": [{"key": str, "reason": str, "detail": str}],
    **{name: Named(int) for name in ("captions", "caption_length", "short_side")},
}


@dataclass
class ShardRecord:
    """One shard: number of samples, bytes, and in hexadecimal its sha256 and the samples' key and picture hashes.

    removed: places of samples that were left out when it was written again, None before that.
    """

    count: int
    bytes: int
    sha256: str
    keys: str
    hashes: str
    removed: list[int] | None = None

    def key_hashes(self) -> np.ndarray:
        """(n,) hashes of the keys."""
        return np.frombuffer(bytes.fromhex(self.keys), ">u8")

    def picture_hashes(self) -> np.ndarray:
        """(n,16) hashes of the pictures, n = 0 where none were wanted."""
        return np.frombuffer(bytes.fromhex(self.hashes), np.uint8).reshape(-1, _HASH_BYTES)


@dataclass
class ChunkRecord:
    """A chunk that is written under a plan.

    Args:
        fingerprint: of the plan.
        source: first item and the one behind the last.
        shards: by name, "train/00000.tar".
        dropped: samples and captions that were left out.
        captions: how many were kept, repaired or left out, by reason.
        caption_length, short_side: counts in bins of powers of two, named by the lower edge.
    """

    fingerprint: str
    source: list[int]
    shards: dict[str, ShardRecord]
    dropped: list[Drop] = field(default_factory=list)
    captions: dict[str, int] = field(default_factory=dict)
    caption_length: dict[str, int] = field(default_factory=dict)
    short_side: dict[str, int] = field(default_factory=dict)

    def write(self, out: Path, number: int) -> None:
        """Write the record of chunk `number`, atomically."""
        write_json(record_path(out, number), asdict(self))


def record_path(out: Path, number: int) -> Path:
    """Where the record of a chunk is."""
    return out / "chunks" / f"{number:05d}.json"


def read_record(out: Path, number: int, fingerprint: str) -> ChunkRecord | None:
    """Return the record of a chunk that is completely written under this plan, else None."""
    try:
        content = parse_json(record_path(out, number).read_bytes())
    except (OSError, ValueError):
        return None
    if misformed(content, _RECORD) is not None or content["fingerprint"] != fingerprint:
        return None
    try:
        shards = {name: ShardRecord(**shard) for name, shard in content["shards"].items()}
        record = ChunkRecord(**content | {"shards": shards, "dropped": [Drop(**drop) for drop in content["dropped"]]})
        written = [shard.count + len(shard.removed or []) for shard in shards.values()]
        hashes = [(len(shard.key_hashes()), len(shard.picture_hashes())) for shard in shards.values()]
    except (TypeError, ValueError):
        return None
    if any(
        keys != count or pictures not in (0, count) for count, (keys, pictures) in zip(written, hashes, strict=True)
    ):
        return None
    for name, shard in shards.items():
        path = out / name
        if shard.count and (not path.is_file() or path.stat().st_size != shard.bytes):
            return None
    return record


def octaves(values: Counter[int]) -> dict[str, int]:
    """Count values in bins whose edges are powers of two; a bin is named by its lower edge."""
    bins: Counter[int] = Counter()
    for value, count in values.items():
        bins[1 << (value.bit_length() - 1) if value else 0] += count
    return {str(edge): bins[edge] for edge in sorted(bins)}
