"""Samples of shards as batches: image sets and latent sets, held in memory where they fit, else read on demand.

A dataset takes a whole `Batch` and returns a whole batch. In memory the pictures are one uint8 tensor and a batch is
one gather. On demand every member is one `pread` and one decode, and the batch keeps the colours of a pixel side by
side, as the decoders give them: parting them is left to the step that makes floats, which touches every pixel anyway.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.pictures.decode import PictureError, open_picture
from data.pictures.resize import decode_plain_jpeg, pixels_of, resize
from data.pictures.transforms import flip_some, to_unit_range
from data.reading.order import Batch
from data.reading.shards import ShardReader
from data.schema import IMAGE_MEMBERS, LATENT_MEMBER, DataError

MEMORY_LIMIT = 2_000_000_000  # bytes of decoded samples that are held in memory unless `in_memory` says otherwise
_PIECE = 512  # samples that are decoded together on the way there


class ShardDataset(Dataset[dict[str, Any]]):
    """The samples of some shards; the two kinds below say what a sample's tensors are.

    Args:
        reader: the shards.
        in_memory: hold every sample decoded; None: where they fit into `MEMORY_LIMIT`.
    """

    def __init__(self, reader: ShardReader, in_memory: bool | None) -> None:
        self.reader = reader
        self._held: dict[str, Any] | None = None
        if in_memory is None:
            in_memory = len(self.reader) * self.sample_bytes() <= MEMORY_LIMIT
        if in_memory:
            self._held = self.hold()

    def __len__(self) -> int:
        return len(self.reader)

    def sample_bytes(self) -> int:
        """Return the size of one decoded sample, in bytes."""
        raise NotImplementedError

    def arrays_of(self, sample: int) -> dict[str, np.ndarray]:
        """Return the decoded arrays of one sample, by field name."""
        raise NotImplementedError

    def finish(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Turn stored tensors into those of the contract, on `device`. Runs in the process that uses the batch."""
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def load(self, samples: Iterable[int]) -> dict[str, Any]:
        """Return the stored fields of `samples` as one batch, decoded by several threads where that helps.

        Raises:
            DataError: a sample does not decode; the sentence names it.
        """

        def read(sample: int) -> dict[str, Any]:
            record = self.reader.read_json(sample)
            text = None if "captions" in record else self.reader.read(sample, "txt")
            described = described_by(record, text, self.reader.read(sample, "cls"))
            return {**described, "keys": self.reader.key(sample), **self.arrays_of(sample)}

        made = run_all(read, list(samples), self.sample_bytes())
        if not made:
            raise DataError("no samples to load; the split is empty or the limit is 0")
        return collate(made)

    def hold(self) -> dict[str, Any]:
        """Return all samples as one batch of contiguous tensors, made in pieces so that they are never there twice."""
        held: dict[str, Any] = {}
        for start in range(0, max(len(self), 1), _PIECE):
            for name, value in self.load(range(start, min(start + _PIECE, len(self)))).items():
                if isinstance(value, Tensor):
                    whole = held.setdefault(name, torch.empty((len(self), *value.shape[1:]), dtype=value.dtype))
                    whole[start : start + len(value)] = value
                else:
                    held.setdefault(name, []).extend(value)
        return held

    def captions(self) -> Iterator[list[str]]:
        """Yield the captions of every sample, in stored order, without decoding a picture."""
        if self._held is not None:
            yield from self._held["captions"]
            return
        for sample in range(len(self.reader)):
            yield captions_of(self.reader.read_json(sample), self.reader.read(sample, "txt"))

    def __getitem__(self, plan: Batch) -> dict[str, Any]:
        """Return a batch as it is stored, uint8 pictures: a fourth of the bytes to hand from process to process."""
        return self.stored(list(plan.samples))

    def stored(self, samples: list[int]) -> dict[str, Any]:
        """Return samples as they are stored, gathered from memory or read and decoded."""
        held = self._held
        if held is None:
            return self.load(samples)
        rows = torch.tensor(samples)
        return {n: v[rows] if isinstance(v, Tensor) else [v[i] for i in samples] for n, v in held.items()}


class ImageSet(ShardDataset):
    """Pictures as `images` (B, 3, S, S) float32 in [-1, 1].

    Args:
        reader: the shards.
        image_size: S; stored pictures of another size are centre-cropped and resized.
        in_memory: see `ShardDataset`.
        flip: probability of mirroring a picture, drawn anew in every epoch.
        seed: of the mirroring.
    """

    def __init__(
        self, reader: ShardReader, image_size: int, in_memory: bool | None, flip: float = 0.0, seed: int = 0
    ) -> None:
        self.image_size, self.flip, self.seed = image_size, flip, seed
        super().__init__(reader, in_memory)

    def sample_bytes(self) -> int:
        return 3 * self.image_size**2

    def encoded(self, sample: int) -> bytes:
        """Return the bytes of a sample's picture. Raises DataError where it has none."""
        names = self.reader.member_names(sample)
        member = next((name for name in IMAGE_MEMBERS if name in names), None)
        if member is None:
            raise DataError(f"sample {self.reader.key(sample)} has {names}, wanted one of {', '.join(IMAGE_MEMBERS)}")
        return self.reader.read(sample, member) or b""

    def arrays_of(self, sample: int) -> dict[str, np.ndarray]:
        return {"images": decode_image(self.reader.key(sample), self.encoded(sample), self.image_size)}

    def __getitem__(self, plan: Batch) -> dict[str, Any]:
        batch = super().__getitem__(plan)
        if not (self.flip and plan.augmented):
            return batch
        images, generator = batch["images"], torch.Generator()
        for i, sample in enumerate(plan.samples):
            # A stream per sample and epoch, so that any rank and any restart mirrors the same pictures.
            generator.manual_seed(((self.seed * 1_000_003 + plan.epoch) * 1_000_003 + sample) % 2**63)
            images[i : i + 1] = flip_some(images[i : i + 1], self.flip, generator)
        return batch

    def finish(self, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
        batch = super().finish(batch, device)
        return {**batch, "images": to_unit_range(batch["images"])}


class LatentSet(ShardDataset):
    """Latents as `latents` (posterior mean) and `latents_std`, both (B, K, C) float32."""

    def sample_bytes(self) -> int:
        return sum(a.nbytes for a in self.arrays_of(0).values())

    def arrays_of(self, sample: int) -> dict[str, np.ndarray]:
        content = self.reader.read(sample, LATENT_MEMBER)
        if content is None:
            raise DataError(
                f"sample {self.reader.key(sample)} has {self.reader.member_names(sample)}, wanted {LATENT_MEMBER}; "
                "latent shards are written by: python -m stage1_tokenizer predict"
            )
        try:
            arrays = safetensors.numpy.load(content)
            return {"latents": arrays["mean"].astype(np.float32), "latents_std": arrays["std"].astype(np.float32)}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"sample {self.reader.key(sample)} has no readable mean and std ({error})") from error


@contextlib.contextmanager
def named_decoding(key: str) -> Iterator[None]:
    """What a decoder raises inside becomes a DataError that names the sample."""
    try:
        yield
    except (PictureError, OSError, SyntaxError, RuntimeError, ValueError) as error:
        raise DataError(f"sample {key}: the picture does not decode ({error}); run: python -m data verify") from error


def decode_image(key: str, data: bytes, image_size: int) -> np.ndarray:
    """Return an encoded picture as (3, S, S) uint8, centre-cropped and resized where it has another size.

    Raises:
        DataError: it does not decode; the sentence names the sample.
    """
    with named_decoding(key):
        pixels = decode_plain_jpeg(data, image_size)
        if pixels is None:
            pixels = pixels_of(data, open_picture(data), image_size, "center_crop")
    return resize(pixels, image_size).numpy()


def described_by(record: dict[str, Any], text: bytes | None, label: bytes | None) -> dict[str, Any]:
    """Return what a sample's json, txt and cls state of it: captions, label and attributes."""
    attributes = record.get("attributes")
    return {
        "captions": captions_of(record, text),
        "labels": label_of(record, label),
        "attributes": attributes if isinstance(attributes, dict) else {},
    }


def captions_of(record: dict[str, Any], text: bytes | None) -> list[str]:
    """Return all captions of a sample: those of its json, else the json's one caption, else its txt, else none."""
    captions = record.get("captions") or record.get("caption")
    if captions:
        given = captions if isinstance(captions, list) else [captions]
        return [caption.encode("utf-8", "replace").decode() for caption in given if isinstance(caption, str)]
    return [text.decode("utf-8", "replace")] if text else []


def label_of(record: dict[str, Any], text: bytes | None) -> int:
    """Return the class of a sample from its json or its `.cls`, -1 where it has none."""
    label = record.get("label", text.decode("ascii", "replace") if text else None)
    try:
        number = int(label) if label is not None else -1
    except (TypeError, ValueError, OverflowError):
        return -1
    return number if -1 <= number < 2**63 else -1


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return samples as one batch: arrays stacked to tensors, labels as a tensor, everything else as lists."""
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name, values in batch.items():
        if isinstance(values[0], np.ndarray):
            other = next((i for i, value in enumerate(values) if value.shape != values[0].shape), None)
            if other is not None:
                raise DataError(
                    f"{name} of sample {batch['keys'][other]} have shape {values[other].shape}, those of "
                    f"{batch['keys'][0]} {values[0].shape}; run: python -m data verify"
                )
            batch[name] = torch.from_numpy(np.stack(values))
    return batch | {"labels": torch.tensor(batch["labels"])}


def run_all(work: Callable[[int], Any], samples: list[int], sample_bytes: int) -> list[Any]:
    """Return [work(sample) for sample in samples], made by threads where that helps.

    PIL and pread release the interpreter lock, but below some ten thousand bytes the threads wait for it longer than
    they decode: 38,000 pictures of 32 pixels took 9 s with two threads and 4 s without. Workers of a loader are as many
    processes as the user wants to be busy, so they start no threads.
    """
    if len(samples) < 64 or sample_bytes < 20_000 or get_worker_info() is not None:
        return [work(sample) for sample in samples]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, samples))


def as_is(batch: Any) -> Any:
    """Return `batch`: a dataset's batches are complete, and torch's default would walk through every attribute."""
    return batch


class FinishingLoader(DataLoader[dict[str, Any]]):
    """Yields finished batches: pictures travel as uint8, from workers and to the device, and become floats there."""

    device = torch.device("cpu")

    def __iter__(self) -> Any:
        assert isinstance(self.dataset, ShardDataset), "it is made by a ShardDataModule"
        for batch in super().__iter__():
            yield self.dataset.finish(batch, self.device)
