"""What stage 2 reads: latent or image shards to train on, and a text file of captions to make pictures from.

A captions file has one caption per line; blank lines and lines that start with # are skipped. Each caption becomes a
batch entry like those of the latent shards (`captions`, `keys`), so that `predict` needs to know only one kind.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.reading.shard_module import ShardDataModule
from data.schema import DataError
from stage2_prior.captions import longest

MAX_CAPTION_BYTES = 64_000_000  # 30,000 captions of COCO are 1.7 million


class CaptionBatches(Dataset[dict[str, Any]]):
    """Batches {"captions": list of one-caption lists, "keys": list of names} over a list of captions."""

    def __init__(self, captions: list[str], batch_size: int):
        self.captions, self.batch_size = captions, batch_size

    def __len__(self) -> int:
        return -(-len(self.captions) // self.batch_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.batch_size
        chosen = self.captions[start : start + self.batch_size]
        return {"captions": [[c] for c in chosen], "keys": [f"{start + i:05d}" for i in range(len(chosen))]}


class CaptionSource(ShardDataModule):
    """Mixin of the modules below: captions to learn words from, and a file of captions to predict from."""

    captions_file: str | None

    def setup(self, stage: str | None = None) -> None:
        """Check what the stage needs: captions alone are enough to predict from a file."""
        if stage == "predict" and self.captions_file is not None:
            read_captions(self.captions_file)
        else:
            super().setup(stage)

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """The captions file, or the captions of `predict_splits`."""
        if self.captions_file is not None:
            captions = read_captions(self.captions_file)
        else:
            captions = [longest(c) for split in self.predict_splits for c in self.captions(split) if c]
        return [DataLoader(CaptionBatches(captions, self.val_batch_size), batch_size=None)]

    def train_captions(self) -> Iterator[str]:
        """Every caption of the training split, one after another."""
        for captions in self.captions("train"):
            yield from captions


class PriorDataModule(CaptionSource, LatentDataModule):
    """Latent shards (see `LatentDataModule`), and for `predict` a file of captions.

    Args:
        captions_file: text file with one caption per line; None predicts from the captions of
            `predict_splits`, the longest of each sample.
    """

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 80,
        val_batch_size: int | None = 250,
        num_workers: int = 0,
        seed: int = 0,
        in_memory: bool | None = None,
        drop_last: bool = True,
        predict_splits: Sequence[str] = ("val",),
        captions_file: str | None = None,
    ) -> None:
        super().__init__(data_dir, batch_size, val_batch_size, num_workers, seed, in_memory, drop_last, predict_splits)
        self.captions_file = captions_file


class PriorImageModule(CaptionSource, ImageDataModule):
    """Image shards, which the lit module encodes in the step (see `ImageDataModule`); the rest as `PriorDataModule`.

    For pictures that are seen flipped, or too many to be kept as latents: it costs the encoder in every step.
    """

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 80,
        val_batch_size: int | None = 250,
        image_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        in_memory: bool | None = None,
        drop_last: bool = True,
        predict_splits: Sequence[str] = ("val",),
        flip: float = 0.0,
        val_fraction: float = 0.05,
        captions_file: str | None = None,
    ) -> None:
        shared = (num_workers, seed, in_memory, drop_last, predict_splits)
        super().__init__(data_dir, batch_size, val_batch_size, image_size, *shared, flip, val_fraction)
        self.captions_file = captions_file


def read_captions(path: str) -> list[str]:
    """The captions of a file, read line by line.

    Raises DataError for a missing file, one that is not text, is too large to be a list of captions, or holds none.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"no captions file at {path}; write one caption per line into it, or name another")
    if file.stat().st_size > MAX_CAPTION_BYTES:
        raise DataError(
            f"{path} has {file.stat().st_size} bytes, wanted at most {MAX_CAPTION_BYTES} (about a million captions);"
            " name a text file with one caption per line"
        )
    try:
        with file.open(encoding="utf-8") as lines:
            captions = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if not captions:
        raise DataError(f"{path} holds no caption; write one per line (lines with # are comments)")
    return captions
