"""Lightning datamodules over image shards and over latent shards.

The order of the training samples is that of `order`; the place in it is saved with every checkpoint, as the
number of samples seen in the epoch, so that a resumed run sees exactly the samples it would have seen, also with other
ranks or workers. What is measured or written does not depend on it: statistics, reports and predictions have orders of
their own. A batch is a dictionary:

    images (B, 3, S, S) float32 in [-1, 1]    or    latents, latents_std (B, K, C) float32
    captions    list of lists of str, per sample and as stored (scenes: short, medium, long)
    keys        list of str
    labels      (B,) int64, -1: none
    attributes  list of dict, to be read and not written to (scenes: what is in the picture; else empty)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.reading.crops import CroppedImageSet
from data.reading.datasets import ImageSet, LatentSet, ShardDataset
from data.reading.shard_module import ShardDataModule
from data.reading.shards import ShardReader
from data.schema import SPLITS, DataError, split_of


class ImageDataModule(ShardDataModule):
    """Image shards; see `ShardDataModule` for the other arguments.

    Args:
        image_size: side S of the batches; stored pictures of another size are centre-cropped and resized.
        flip: probability of mirroring a training picture; leave it 0 where captions say left and right.
        random_crop: training pictures are random crops, another one in every epoch, of shards that keep their aspect
            (`prepare --resize keep_ratio`); such pictures are not held in memory.
        val_fraction: share of the keys that are held out where the directory is not of `prepare` and has no splits.
    """

    kind = "images"

    def __init__(
        self,
        data_dir: str,
        batch_size: int = 64,
        val_batch_size: int | None = None,
        image_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        in_memory: bool | None = None,
        drop_last: bool = False,
        predict_splits: Sequence[str] = SPLITS,
        flip: float = 0.0,
        val_fraction: float = 0.05,
        random_crop: bool = False,
    ) -> None:
        super().__init__(data_dir, batch_size, val_batch_size, num_workers, seed, in_memory, drop_last, predict_splits)
        if not 0.0 <= flip <= 1.0:
            raise DataError(f"flip is {flip}, it is a probability from 0 to 1")
        if random_crop and in_memory:
            raise DataError("random_crop decodes every picture anew, so in_memory cannot be true; leave it out")
        self.image_size, self.flip, self.val_fraction = image_size, flip, val_fraction
        self.random_crop = random_crop

    def manifest(self) -> dict[str, Any]:
        """Return the manifest; of tars that another program wrote, one that says only that they are pictures."""
        if self._foreign():
            return {"kind": "images", "counts": {split: len(self.split(split)) for split in SPLITS}}
        return super().manifest()

    def fingerprint(self, split: str) -> str:
        """Return the identity of the pictures of a split: a hash of its shards and of what is done to the pictures."""
        shards: dict[str, Any] = self.manifest().get("shards", {})
        names = {name: stats for name, stats in shards.items() if name.startswith(f"{split}/")}
        if self._foreign():  # of tars without a manifest their names and sizes are known
            paths = self.split(split).reader.paths
            names = {str(path.relative_to(self.data_dir)): path.stat().st_size for path in paths}
        facts = [names, self.image_size, self.val_fraction]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def open_split(self, split: str) -> ShardDataset:
        """Return the pictures of a split; only training pictures are mirrored."""
        flip = self.flip if split == "train" else 0.0
        if not self._foreign():
            reader = ShardReader(self.listed_shards(split))
        elif list((Path(self.data_dir) / split).glob("*.tar")):
            reader = ShardReader(sorted((Path(self.data_dir) / split).glob("*.tar")))
        else:
            paths = sorted(Path(self.data_dir).glob("*.tar"))
            reader = ShardReader(paths, lambda key: split_of(key, self.val_fraction) == split)
        if self.random_crop and split == "train":
            return CroppedImageSet(reader, self.image_size, flip, self.seed)
        return ImageSet(reader, self.image_size, self.in_memory, flip, self.seed)

    def _foreign(self) -> bool:
        """Whether the directory holds tars that `prepare` has not written: img2dataset's, as a rule."""
        directory = Path(self.data_dir)
        ours = any((directory / name).exists() for name in ("manifest.json", "plan.json"))
        return not ours and any(any(directory.glob(pattern)) for pattern in ("*.tar", "train/*.tar"))


class LatentDataModule(ShardDataModule):
    """Latent shards, as `python -m stage1_tokenizer predict` writes them; see `ShardDataModule` for the arguments."""

    kind = "latents"

    def manifest(self) -> dict[str, Any]:
        """Return the manifest. Raises DataError where there are no latents, saying which command writes them."""
        if not (Path(self.data_dir) / "manifest.json").is_file():
            raise DataError(f"no latents at {self.data_dir}; write them with: python -m stage1_tokenizer predict")
        return super().manifest()

    @property
    def latent_info(self) -> dict[str, Any]:
        """`num_latents` K, `latent_dim` C and `tokenizer_fingerprint` of the tokenizer that wrote the shards."""
        info: dict[str, Any] = self.manifest()["latents"]
        return info

    def open_split(self, split: str) -> ShardDataset:
        """Return the latents of a split."""
        return LatentSet(ShardReader(self.listed_shards(split)), self.in_memory)
