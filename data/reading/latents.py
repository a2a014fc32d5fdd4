"""Write latent shards: what stage 1's `predict` leaves for stage 2, readable by the same code as image shards.

Every rank writes its own shards and a record for each; `write_latent_manifest` collects the records at the end:

    finished_shards --> begin_latents (one rank) --> LatentShardWriter (every rank) --> write_latent_manifest (one rank)

A shard is renamed into place when it is complete, and its record is written after it; so what an interrupted run has
finished is known by its records. They say what the shard was made from (`Origin`), and a run of the same origin keeps
it. Shards from before records held it are read as ever; a run that writes the same split makes them anew.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from data.reading.shards import ShardWriter
from data.schema import LATENT_MEMBER, SCHEMA_VERSION, SPLITS, DataError, read_manifest, write_json

SHARD_SIZE = 4000  # samples: some 20 MB of latents, and what each rank of an interrupted run loses at most


@dataclass(frozen=True)
class Origin:
    """What the latents of a split are made from: the same origin gives the same shards.

    Neither the batch size nor the number of ranks is part of it: both may change what is kept only by rounding.
    """

    tokenizer: str  # its fingerprint
    data: str  # fingerprint of the pictures
    precision: str
    samples: int  # in the split
    shard_size: int

    def count(self, number: int) -> int:
        """Return how many samples shard `number` holds when it is complete."""
        return max(0, min(self.shard_size, self.samples - number * self.shard_size))


def finished_shards(data_dir: str | Path, split: str, origin: Origin) -> dict[int, int]:
    """Return the complete shards of a split that were made from `origin`: samples by number."""
    finished = {}
    for number in range(-(-origin.samples // origin.shard_size)):
        tar = _shard_path(Path(data_dir) / split, number)
        if tar.is_file() and tar.with_suffix(".stats").is_file():
            record = json.loads(tar.with_suffix(".stats").read_text())
            complete = record["count"] == origin.count(number) and record["bytes"] == tar.stat().st_size
            if complete and record.get("origin") == asdict(origin):
                finished[number] = record["count"]
    return finished


def begin_latents(data_dir: str | Path, splits: Sequence[str], tokenizer_fingerprint: str) -> None:
    """Take away the manifest, which would lie about new shards under old names; call it once, before any is written.

    Records that do not name their tokenizer, from before records did, get the name from the manifest first.

    Args:
        data_dir: where the shards are or will be.
        splits: those that will be written.
        tokenizer_fingerprint: of the tokenizer that will make them.

    Raises:
        DataError: another split was made by another tokenizer; nothing has changed then.
    """
    manifest = Path(data_dir) / "manifest.json"
    listed: dict[str, Any] = read_manifest(data_dir) if manifest.is_file() else {"shards": {}}
    named = {}
    for split in SPLITS:
        for path in _record_paths(data_dir, split):
            record = json.loads(path.read_text())
            if "origin" not in record and f"{split}/{path.stem}.tar" in listed["shards"]:
                record["origin"] = {"tokenizer": listed["latents"]["tokenizer_fingerprint"]}
                named[path] = record
            if split not in splits:
                _check_tokenizer(path, record, tokenizer_fingerprint)
    for path, record in named.items():
        write_json(path, record)
    manifest.unlink(missing_ok=True)


class LatentShardWriter:
    """Write the latents of one split.

    `with LatentShardWriter(directory, "train") as writer: writer.write_batch(batch, mean, std)`, then, once for all
    splits and on one rank, `write_latent_manifest`. Shards of an earlier run of the same split are removed first, but
    for those that are `finished`, whose numbers are left out.

    Args:
        data_dir: the directory, created where needed.
        split: "train" or "val".
        shard_size: samples per shard.
        rank, world: this process among how many; each writes every world-th shard number.
        origin: what the latents are made from, for the records; None: a later run cannot keep the shards.
        finished: numbers of shards to keep, see `finished_shards`.
    """

    def __init__(
        self,
        data_dir: str | Path,
        split: str,
        shard_size: int = SHARD_SIZE,
        rank: int = 0,
        world: int = 1,
        origin: Origin | None = None,
        finished: Container[int] = (),
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown, choose one of {', '.join(SPLITS)}")
        self.directory = Path(data_dir) / split
        self.shard_size, self.origin = shard_size, origin
        self._numbers = (number for number in itertools.count(rank, world) if number not in finished)
        self._number = next(self._numbers)
        self._shard: ShardWriter | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            stem = path.name.split(".")[0]
            stale = path.suffix == ".part" or (stem.isdigit() and int(stem) not in finished)
            if stem.isdigit() and int(stem) % world == rank and stale:
                path.unlink()

    def __enter__(self) -> LatentShardWriter:
        return self

    def write_batch(self, batch: dict[str, Any], mean: Tensor, std: Tensor) -> None:
        """Write the latents of a batch of `ImageDataModule`.

        Args:
            batch: its `keys`, `captions`, `labels` and `attributes` are kept.
            mean, std: (B, K, C), of the posterior.
        """
        mean, std = mean.detach().float().cpu(), std.detach().float().cpu()
        labels = batch["labels"].tolist()
        for i, key in enumerate(batch["keys"]):
            self.write(key, mean[i], std[i], batch["captions"][i], batch["attributes"][i], labels[i])

    def write(
        self, key: str, mean: Tensor, std: Tensor, captions: list[str], attributes: dict[str, Any], label: int = -1
    ) -> None:
        """Write one sample; `mean` and `std` are (K, C)."""
        if self._shard is None:
            self._shard = ShardWriter(_shard_path(self.directory, self._number))
        caption = captions[0] if captions else ""
        record = {"key": key, "caption": caption, "captions": captions, "label": label, "attributes": attributes}
        tensors = {"mean": mean.float().cpu().contiguous(), "std": std.float().cpu().contiguous()}
        members = {
            LATENT_MEMBER: safetensors.torch.save(tensors),
            "txt": caption.encode(),
            "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(),
        }
        self._shard.write(key, members)
        # The last shard is finished like the others, and not when the writer ends: that may be a split later.
        if self._shard.count == (self.origin.count(self._number) if self.origin is not None else self.shard_size):
            self._finish()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self._finish()
        elif self._shard is not None:
            self._shard.__exit__(kind, error, trace)

    def _finish(self) -> None:
        shard, self._shard = self._shard, None
        if shard is not None:
            shard.__exit__(None, None, None)
            stats: dict[str, Any] = {"count": shard.count, "bytes": shard.bytes, "sha256": shard.sha256}
            if self.origin is not None:
                stats["origin"] = asdict(self.origin)
            write_json(shard.path.with_suffix(".stats"), stats)
            self._number = next(self._numbers)


def write_latent_manifest(
    data_dir: str | Path, num_latents: int, latent_dim: int, tokenizer_fingerprint: str, source: str = ""
) -> dict[str, int]:
    """Write `manifest.json` and `sizes.json` from the records of all ranks; call it once, when all have finished.

    Args:
        data_dir: where the shards are.
        num_latents, latent_dim: K and C.
        tokenizer_fingerprint: of the tokenizer that made them; a prior refuses another one. Shards whose records name
            no tokenizer are taken to be of this one.
        source: fingerprint or path of the image shards, for the record.

    Returns:
        Samples by split.

    Raises:
        DataError: there are no shards, or some are of another tokenizer.
    """
    directory = Path(data_dir)
    shards: dict[str, Any] = {}
    for split in SPLITS:
        for path in _record_paths(directory, split):
            record = json.loads(path.read_text())
            _check_tokenizer(path, record, tokenizer_fingerprint)
            shards[f"{split}/{path.stem}.tar"] = {name: record[name] for name in ("count", "bytes", "sha256")}
    for split in SPLITS:
        sizes = {Path(name).name: stats["count"] for name, stats in shards.items() if name.startswith(split + "/")}
        if sizes:
            write_json(directory / split / "sizes.json", sizes)
    if not shards:
        raise DataError(f"no latent shards in {directory}; write them with LatentShardWriter first")
    counts = {split: sum(s["count"] for n, s in shards.items() if n.startswith(split + "/")) for split in SPLITS}
    manifest = {
        "schema": SCHEMA_VERSION,
        "kind": "latents",
        "counts": counts,
        "latents": {
            "num_latents": num_latents,
            "latent_dim": latent_dim,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "source": source,
        },
        "shards": shards,
    }
    write_json(directory / "manifest.json", manifest)
    return counts


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"{number:05d}.tar"


def _record_paths(data_dir: str | Path, split: str) -> list[Path]:
    return sorted((Path(data_dir) / split).glob("*.stats"))


def _check_tokenizer(path: Path, record: dict[str, Any], fingerprint: str) -> None:
    found = record.get("origin", {}).get("tokenizer", fingerprint)
    if found != fingerprint:
        raise DataError(
            f"{path.with_suffix('.tar')} is of tokenizer {found}, wanted {fingerprint}; "
            f"predict this split too, or delete {path.parent}"
        )
