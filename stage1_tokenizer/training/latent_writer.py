"""`predict` of stage 1: latent shards, one writer per split, complete shards of an interrupted run kept.

A Lightning prediction writer: `LitTokenizer.predict_step` returns the posterior of a batch, this callback writes it.
"""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from data.reading.latents import LatentShardWriter, Origin, begin_latents, finished_shards, write_latent_manifest


class LatentWriter(BasePredictionWriter):
    """Writes `run_dir/latents` while a fitted `LitTokenizer` predicts; every rank writes shards of its own."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.writers: list[LatentShardWriter] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open a writer for every split; shards that an interrupted predict of the same has finished are kept."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        folder, fingerprint = pl_module.run_dir / "latents", pl_module.tokenizer.fingerprint
        size, origins, finished = data.predict_shard_size, {}, {}
        for split in data.splits_to_predict():
            total = len(data.split(split))
            origin = Origin(fingerprint, data.fingerprint(split), str(trainer.precision), total, size)
            origins[split], finished[split] = origin, finished_shards(folder, split, origin)
        if trainer.is_global_zero:
            kept = sum(sum(counts.values()) for counts in finished.values())
            total = sum(origin.samples for origin in origins.values())
            if kept:
                print(f"latents: kept {kept} of {total} samples, which were encoded before by tokenizer {fingerprint}")
            if kept < total:
                begin_latents(folder, list(origins), fingerprint)
        trainer.strategy.barrier("latents kept")  # all ranks have looked before any of them writes or removes
        rank, world = trainer.global_rank, trainer.world_size
        self.writers = [
            LatentShardWriter(folder, split, size, rank, world, origin, finished[split])
            for split, origin in origins.items()
        ]
        for split, numbers in finished.items():
            data.finished[split].update(numbers)  # the loaders leave them out

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: tuple[Tensor, Tensor],
        batch_indices: Sequence[int] | None,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.writers[dataloader_idx].write_batch(batch, *prediction)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the shards; rank 0 writes the manifest of all."""
        for writer in self.writers:
            writer.__exit__(None, None, None)
        trainer.strategy.barrier("latents")
        if trainer.is_global_zero:
            tokenizer, folder = pl_module.tokenizer, pl_module.run_dir / "latents"
            source = str(trainer.datamodule.data_dir)  # type: ignore[attr-defined]
            counts = write_latent_manifest(
                folder, tokenizer.num_latents, tokenizer.latent_dim, tokenizer.fingerprint, source
            )
            samples = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
            size = f"{tokenizer.num_latents} x {tokenizer.latent_dim}"
            print(f"latents: {folder} ({samples}, {size}, tokenizer {tokenizer.fingerprint})")
