"""What the data modules of images and of latents share: splits, loaders, and the place in the epoch.

The place is saved with every checkpoint as the number of samples seen in the epoch, so that a resumed run sees exactly
the samples that it would have seen, also with other ranks or workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from data.reading.datasets import FinishingLoader, ShardDataset, as_is
from data.reading.latents import SHARD_SIZE
from data.reading.order import BatchOrder, ShardOrder, spread_rows
from data.schema import SPLITS, DataError, read_manifest


class ShardDataModule(LightningDataModule):
    """What image and latent shards share: splits, loaders, and the place in the epoch.

    Args:
        data_dir: a directory that `python -m data prepare` or `python -m stage1_tokenizer predict` has written.
        batch_size: training samples per rank and step.
        val_batch_size: of validation, test and predict; None: as `batch_size`.
        num_workers: processes per loader; 0 reads in the training process, which is right for sets held in memory.
        seed: of the order.
        in_memory: hold the decoded samples; None: where they fit into 2 GB.
        drop_last: leave out the last training samples of an epoch where they do not fill a batch.
        predict_splits: the splits that `predict` goes over, one loader each.
    """

    kind: str
    predict_shard_size = SHARD_SIZE  # samples; predict's batches end where the shards that it writes end

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        in_memory: bool | None = None,
        drop_last: bool = False,
        predict_splits: Sequence[str] = SPLITS,
    ) -> None:
        super().__init__()
        unknown = [split for split in predict_splits if split not in SPLITS]
        if unknown or not predict_splits:
            raise DataError(f"predict_splits is {list(predict_splits)!r}, wanted some of {', '.join(SPLITS)}")
        if num_workers < 0:
            raise DataError(f"num_workers is {num_workers}, wanted 0 or more")
        self.data_dir = data_dir
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.num_workers, self.seed, self.in_memory, self.drop_last = num_workers, seed, in_memory, drop_last
        self.predict_splits = tuple(predict_splits)
        self.finished: dict[str, set[int]] = {}
        self._sets: dict[str, ShardDataset] = {}
        self._order: BatchOrder | None = None
        self._resume: dict[str, int] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Check the directory. The splits themselves are opened when a loader first asks for them."""
        self.manifest()

    def manifest(self) -> dict[str, Any]:
        """Return the manifest of the directory. Raises DataError where it is missing or of another kind."""
        manifest = read_manifest(self.data_dir)
        if manifest["kind"] != self.kind:
            raise DataError(f"{self.data_dir} holds {manifest['kind']}, wanted {self.kind}; check data_dir")
        return manifest

    def open_split(self, split: str) -> ShardDataset:
        """Return the dataset of a split."""
        raise NotImplementedError

    def split(self, split: str) -> ShardDataset:
        """Return the dataset of "train" or "val", opened once.

        Raises:
            DataError: another name, or no shards.
        """
        if split not in SPLITS:
            raise DataError(f"split {split!r} is unknown, choose one of {', '.join(SPLITS)}")
        if split not in self._sets:
            self._sets[split] = self.open_split(split)
        return self._sets[split]

    def listed_shards(self, split: str) -> list[Path]:
        """Return the shards of a split that the manifest lists.

        Raises:
            DataError: it lists none, or some are not there.
        """
        names = [name for name in self.manifest()["shards"] if name.startswith(f"{split}/")]
        if not names:
            raise DataError(f"{self.data_dir} has no {split} samples; prepare it with another --val-fraction")
        missing = [name for name in names if not (Path(self.data_dir) / name).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} shards of {self.data_dir} are gone, the first is {missing[0]}; prepare again"
            )
        return [Path(self.data_dir) / name for name in names]

    def captions(self, split: str) -> Iterator[list[str]]:
        """Yield the captions of every sample of a split, in stored order, without decoding pictures."""
        yield from self.split(split).captions()

    def arrays(self, split: str, limit: int | None = None) -> dict[str, Any]:
        """Return a whole split, or `limit` samples of it (`spread_rows`), as one batch."""
        return self.samples(split, spread_rows(len(self.split(split)), limit))

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]:
        """Return samples of a split by their numbers in stored order, as one batch."""
        chosen = self.split(split)
        return chosen.finish(chosen.stored(rows), torch.device("cpu"))

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches, from the place of a resumed checkpoint on."""
        self._order = self._make_order("train", self.batch_size, shuffle=True, drop_last=self.drop_last)
        if self._resume is not None:
            self._order.set_start(self._resume["epoch"], self._resume["samples"], self._resume["batches"])
        if self.trainer is not None:
            self._order.set_epoch(self.trainer.current_epoch)
        return self._loader("train", self._order)

    def statistics_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches, the same on any rank and after any resume: those of the first epoch."""
        return self._loader("train", BatchOrder(len(self.split("train")), self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader[Any]:
        """The val split in stored order."""
        return self._loader("val", self._make_order("val", self.val_batch_size))

    def test_dataloader(self) -> DataLoader[Any]:
        """The val split, whole on every rank."""
        return self._loader("val", BatchOrder(len(self.split("val")), self.val_batch_size, shuffle=False))

    def splits_to_predict(self) -> list[str]:
        """Return the `predict_splits` that have samples, in the order of the loaders of `predict_dataloader`."""
        counts = self.manifest()["counts"]
        return [split for split in self.predict_splits if counts.get(split)]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """The `splits_to_predict` in stored order, each sample on one rank, in batches that end where shards end.

        Numbers of shards that are put into `finished[split]` before the first batch is read are left out.
        """
        rank, world = self._ranks()
        self.finished = {split: set() for split in self.splits_to_predict()}
        loaders = []
        for split, finished in self.finished.items():
            total = len(self.split(split))
            order = ShardOrder(total, self.val_batch_size, self.predict_shard_size, rank, world, finished)
            loaders.append(self._loader(split, order))
        return loaders

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move the tensors; texts and attributes are not walked through."""
        return {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in batch.items()}

    def state_dict(self) -> dict[str, int]:
        """Return the place in the order: epoch, its steps and samples done by all ranks, and samples per step."""
        if self.trainer is None or self._order is None:
            return {}
        # `processed` and not `completed`: the latter is one behind while the callbacks of a step run.
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
        samples = self._order.samples_after(batches)
        return {"epoch": self._order.epoch, "batches": batches, "samples": samples, "step": self._global_batch()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Remember the place; it takes effect when the training loader is made."""
        self._resume = {name: int(state_dict[name]) for name in ("epoch", "batches", "samples", "step")}
        if self.trainer is not None and self._resume["step"] != self._global_batch():
            # The resumed epoch has another number of steps than the next ones, and Lightning asks for it only once.
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        # Lightning cannot see that the order, and not the loader, keeps the position.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")

    def _global_batch(self) -> int:
        return self.batch_size * (self.trainer.world_size if self.trainer is not None else 1)

    def _make_order(self, split: str, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> BatchOrder:
        rank, world = self._ranks()
        return BatchOrder(len(self.split(split)), batch_size, self.seed, shuffle, rank, world, drop_last)

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, split: str, order: BatchOrder | ShardOrder) -> DataLoader[Any]:
        loader = FinishingLoader(
            self.split(split),
            batch_size=None,  # the order yields whole batches
            sampler=order,
            collate_fn=as_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        if self.trainer is not None:
            loader.device = self.trainer.strategy.root_device
        return loader
