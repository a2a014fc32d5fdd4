"""Write latent shards: what stage 1's `predict` leaves for stage 2, readable by the same code as image shards.

Every rank writes its own shards and a record for each; `write_latent_manifest` collects the records at the end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from data.schema import LATENT_MEMBER, SCHEMA_VERSION, SPLITS, DataError, write_json
from data.shards import ShardWriter


class LatentShardWriter:
    """Write the latents of one split.

    `with LatentShardWriter(directory, "train") as writer: writer.write_batch(batch, mean, std)`, then, once for all
    splits and on one rank, `write_latent_manifest`. Shards of an earlier run of the same split are removed first.

    Args:
        data_dir: the directory, created where needed.
        split: "train" or "val".
        shard_size: samples per shard.
        rank, world: this process among how many; each writes every world-th shard number.
    """

    def __init__(self, data_dir: str | Path, split: str, shard_size: int = 4000, rank: int = 0, world: int = 1) -> None:
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown, choose one of {', '.join(SPLITS)}")
        self.directory = Path(data_dir) / split
        self.shard_size, self.world = shard_size, world
        self._number = rank
        self._shard: ShardWriter | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            stem = path.name.split(".")[0]
            if stem.isdigit() and int(stem) % world == rank:
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
            self._shard = ShardWriter(self.directory / f"{self._number:05d}.tar")
        caption = captions[0] if captions else ""
        record = {"key": key, "caption": caption, "captions": captions, "label": label, "attributes": attributes}
        tensors = {"mean": mean.float().cpu().contiguous(), "std": std.float().cpu().contiguous()}
        members = {
            LATENT_MEMBER: safetensors.torch.save(tensors),
            "txt": caption.encode(),
            "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(),
        }
        self._shard.write(key, members)
        if self._shard.count == self.shard_size:
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
            stats = {"count": shard.count, "bytes": shard.bytes, "sha256": shard.sha256}
            write_json(shard.path.with_suffix(".stats"), stats)
            self._number += self.world


def write_latent_manifest(
    data_dir: str | Path, num_latents: int, latent_dim: int, tokenizer_fingerprint: str, source: str = ""
) -> None:
    """Write `manifest.json` and `sizes.json` from the records of all ranks; call it once, when all have finished.

    Args:
        data_dir: where the shards are.
        num_latents, latent_dim: K and C.
        tokenizer_fingerprint: of the tokenizer that made them; a prior refuses another one.
        source: fingerprint or path of the image shards, for the record.
    """
    directory = Path(data_dir)
    shards: dict[str, Any] = {}
    for split in SPLITS:
        records = sorted((directory / split).glob("*.stats"))
        names = {path.with_suffix(".tar").name: json.loads(path.read_text()) for path in records}
        shards |= {f"{split}/{name}": stats for name, stats in names.items()}
        if names:
            write_json(directory / split / "sizes.json", {name: stats["count"] for name, stats in names.items()})
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
