"""Training batches straight from tars that are too many or too far away to index, through WebDataset.

    URLs --resampled--> shards --fsspec, cache--> members --group--> samples --shuffle buffer--> decoded --> batches

Shards are drawn with replacement, every worker of every rank from a stream of its own, so nothing has to be divided and
no rank runs short. What this gives up against `datamodule`: a sample may come twice in an epoch or not at all, the
shuffle is as good as its buffer, and a resumed run draws a new stream instead of continuing the old one. The streams
are a pure function of (seed, epoch, rank, worker).

WebDataset's own decoders are not used: they unpickle what a tar brings along. Nor its URL openers: they start shells.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NoReturn

import fsspec
import torch
import webdataset
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from data.forms import parse_json
from data.pictures.transforms import to_unit_range
from data.reading.datamodule import ImageDataModule
from data.reading.datasets import as_is, collate, decode_image, described_by
from data.reading.order import spread_rows
from data.reading.shard_cache import ShardCache
from data.reading.urls import is_remote, tar_urls
from data.schema import DECODED_MEMBERS, IMAGE_MEMBERS, DataError


class Stream(IterableDataset[dict[str, Any]]):
    """Batches of one rank; its workers share the steps of an epoch among them.

    Args:
        urls: tars, local or remote.
        image_size: side S of the pictures.
        batch_size: samples per step.
        steps: per epoch, of this rank.
        buffer: samples among which the next one is drawn; the only memory of the shuffle.
        seed: of shards and buffer.
        rank: of this process.
        most_errors: unreadable samples and shards after which the run ends with the last one's sentence.
        cache: of remote shards.
    """

    def __init__(
        self,
        urls: list[str],
        image_size: int,
        batch_size: int,
        steps: int,
        buffer: int,
        seed: int,
        rank: int,
        most_errors: int,
        cache: ShardCache | None = None,
    ) -> None:
        self.urls, self.image_size, self.batch_size, self.steps = urls, image_size, batch_size, steps
        self.buffer, self.seed, self.rank, self.most_errors, self.cache = buffer, seed, rank, most_errors, cache
        self.epoch = -1
        self.errors = self.read = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        seed = f"{self.seed} {self.epoch} {self.rank} {worker}"
        shuffle = webdataset.filters.shuffle(self.buffer, initial=self.buffer, rng=random.Random(seed))
        pipeline = self._pipeline(seed, shuffle, self._decode)
        batch: list[dict[str, Any]] = []
        left = (self.steps + workers - 1 - worker) // workers
        for sample in pipeline if left else ():
            batch.append(sample)
            if len(batch) == self.batch_size:
                yield collate(batch)
                batch = []
                left -= 1
                if not left:
                    return

    def captions(self) -> Iterator[list[str]]:
        """Captions of one epoch's worth of samples, the same on every rank, without decoding pictures."""
        for sample in itertools.islice(self._pipeline(str(self.seed)), self.steps * self.batch_size):
            yield described_by(_record(sample), sample.get("txt"), None)["captions"]

    def _pipeline(self, seed: str, *stages: Any) -> webdataset.DataPipeline:
        return webdataset.DataPipeline(
            webdataset.ResampledShards(self.urls, seed=seed, worker_seed=lambda: 0, deterministic=True),
            self._open,
            functools.partial(tar_file_expander, handler=self._note, select_files=_is_read),
            functools.partial(group_by_keys, handler=self._note),
            self._count,
            *stages,
        )

    def _open(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            before = self.read
            try:
                with self._stream_of(shard["url"]) as stream:
                    yield {**shard, "stream": stream}
                if self.read == before:  # an endless stream of nothing would never end
                    self._note(DataError(f"{shard['url']} holds no sample"))
            except OSError as error:
                self._note(error)

    def _stream_of(self, url: str) -> Any:
        if self.cache is not None and is_remote(url):
            return self.cache.open(url)
        return fsspec.open(url, "rb")

    def _count(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            self.read += 1
            yield sample

    def _decode(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for sample in samples:
            member = next((name for name in IMAGE_MEMBERS if name in sample), None)
            try:
                if member is None:
                    raise DataError(f"sample {sample['__key__']} of {sample['__url__']} has no picture")
                yield {
                    "images": decode_image(sample["__key__"], sample[member], self.image_size),
                    "keys": sample["__key__"],
                    **described_by(_record(sample), sample.get("txt"), sample.get("cls")),
                }
            except ValueError as error:
                self._note(error)

    def _note(self, error: Exception) -> bool:
        """Count an error and go on, or end the run where there are too many; WebDataset's handler would sleep."""
        self.errors += 1
        if self.errors > self.most_errors:
            raise DataError(f"more than {self.most_errors} unreadable samples or shards; the last: {error}") from error
        return True


class StreamLoader(DataLoader[dict[str, Any]]):
    """Gives every pass over a `Stream` its own epoch, also in workers, which start anew each time; finishes batches."""

    def __iter__(self) -> Any:
        assert isinstance(self.dataset, Stream), "a StreamLoader is made by StreamDataModule"
        self.dataset.epoch += 1
        for batch in super().__iter__():
            yield {**batch, "images": to_unit_range(batch["images"])}


class StreamDataModule(LightningDataModule):
    """Training pictures streamed from tars; batches as those of `datamodule`.

    Args:
        train_urls: paths, globs, brace ranges, or URLs that fsspec opens.
        val_dir: an indexed data directory whose val split validates, or None.
        batch_size: samples per rank and step.
        image_size: side S of the pictures.
        steps_per_epoch: steps of an epoch, since a stream has no end.
        shuffle_buffer: samples among which the next one is drawn, per worker.
        num_workers: processes.
        seed: of the streams.
        most_errors: unreadable samples and shards per worker and epoch after which the run ends.
        first_pictures: of the stream, read once and held in memory (3 S^2 bytes each), the same ones on every rank and
            after every resume: what a linear path, the PCA of a report and its classifier know of training pictures.
        cache_dir: folder that keeps remote shards for the next time they are drawn; None: they are fetched every time.
        cache_gigabytes: 10^9 bytes that it may hold; the shard that was longest not read is dropped first.
    """

    def __init__(
        self,
        train_urls: list[str],
        val_dir: str | None = None,
        batch_size: int = 64,
        image_size: int = 32,
        steps_per_epoch: int = 1000,
        shuffle_buffer: int = 2000,
        num_workers: int = 0,
        seed: int = 0,
        most_errors: int = 100,
        first_pictures: int = 20_000,
        cache_dir: str | None = None,
        cache_gigabytes: float = 50.0,
    ) -> None:
        super().__init__()
        if min(batch_size, steps_per_epoch, shuffle_buffer, first_pictures) < 1:
            raise DataError("batch_size, steps_per_epoch, shuffle_buffer and first_pictures must be at least 1")
        self.urls = tar_urls(tuple(train_urls))
        if not self.urls:
            raise DataError(f"no tar at {', '.join(train_urls)}; check train_urls")
        self.batch_size, self.image_size, self.steps_per_epoch = batch_size, image_size, steps_per_epoch
        self.shuffle_buffer, self.num_workers, self.seed = shuffle_buffer, num_workers, seed
        self.most_errors, self.first_pictures = most_errors, first_pictures
        self.cache = ShardCache(cache_dir, int(cache_gigabytes * 1e9)) if cache_dir is not None else None
        self._first: dict[str, Any] | None = None
        self._val = ImageDataModule(val_dir, batch_size, image_size=image_size) if val_dir is not None else None
        self.data_dir, self.val_batch_size = val_dir or "", batch_size

    def train_dataloader(self) -> StreamLoader:
        """An endless stream, cut into epochs of `steps_per_epoch`."""
        rank = self.trainer.global_rank if self.trainer is not None else 0
        return StreamLoader(self._stream(rank), batch_size=None, collate_fn=as_is, num_workers=self.num_workers)

    def captions(self, split: str) -> Iterator[list[str]]:
        """Captions for a vocabulary: of an epoch's worth of the training stream. Raises DataError for another split."""
        if split != "train":
            raise DataError(f"a stream has no split {split}, only train")
        yield from self._stream(0).captions()

    def split(self, split: str) -> Sized:
        """Samples that can be looked up: those of `val_dir`, and of training the first ones of a stream."""
        return self._held_out().split(split) if split != "train" else range(self.first_pictures)

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]:
        """As `ImageDataModule.samples`; of train, of its first pictures. Raises DataError for val without `val_dir`."""
        if split != "train":
            return self._held_out().samples(split, rows)
        if self._first is None:
            self._first = self._read_first()
        chosen: dict[str, Any] = {
            n: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for n, v in self._first.items()
        }
        return {**chosen, "images": to_unit_range(chosen["images"])}

    def arrays(self, split: str, limit: int | None = None) -> dict[str, Any]:
        """As `ImageDataModule.arrays`; of train, of its first pictures."""
        return self.samples(split, spread_rows(len(self.split(split)), limit))

    def _read_first(self) -> dict[str, Any]:
        """The first pictures of a stream of their own, as stored: uint8."""
        steps = -(-self.first_pictures // self.batch_size)
        batches = list(self._stream(0, steps))
        fields = {name: [batch[name] for batch in batches] for name in batches[0]}
        first = {n: torch.cat(v) if isinstance(v[0], Tensor) else list(itertools.chain(*v)) for n, v in fields.items()}
        return {name: value[: self.first_pictures] for name, value in first.items()}

    def _held_out(self) -> ImageDataModule:
        if self._val is None:
            raise DataError("a stream holds nothing out; set data.val_dir, or live.every_n_steps=0")
        return self._val

    def _stream(self, rank: int, steps: int | None = None) -> Stream:
        sizes = (self.image_size, self.batch_size, steps or self.steps_per_epoch, self.shuffle_buffer)
        return Stream(self.urls, *sizes, self.seed, rank, self.most_errors, self.cache)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The val split of `val_dir` in stored order; nothing where there is none."""
        if self._val is None:
            return []
        self._val.trainer = self.trainer
        return self._val.val_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """The val split, whole on every rank: reports read what they need by `samples`."""
        return self._held_out().test_dataloader()

    def predict_dataloader(self) -> NoReturn:
        """Raises DataError: latents are made of every picture once, and a stream draws."""
        raise DataError(
            "a stream draws its pictures, and predict wants each of them once; name the folder of the tars instead: "
            "--data.class_path data.reading.datamodule.ImageDataModule --data.data_dir DIR"
        )

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move the tensors; texts and attributes are not walked through."""
        return {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in batch.items()}


def _record(sample: dict[str, Any]) -> dict[str, Any]:
    try:
        record = parse_json(sample.get("json", b"{}"))
    except ValueError as error:
        raise DataError(f"{sample['__key__']}.json of {sample['__url__']} is not JSON ({error})") from error
    return record if isinstance(record, dict) else {}


def _is_read(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in DECODED_MEMBERS
