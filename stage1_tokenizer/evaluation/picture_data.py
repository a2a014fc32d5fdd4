"""What a report asks of a data module, and how it goes through pictures that do not fit into memory.

The lit modules hand over Lightning data modules; a report needs three members of them, and a test gives it a fake of
twenty lines.
"""

import ctypes
import platform
from collections.abc import Iterator, Sequence, Sized
from typing import Any, Protocol

import torch
from torch import Tensor

from stage1_tokenizer.text.ranks import rank, world_size

DESCRIBED = ("captions", "attributes", "labels")  # fields of a sample beside its picture


class PictureData(Protocol):
    """What a report asks of a data module: the samples of a split, and where they lie on disk."""

    data_dir: str
    val_batch_size: int

    def split(self, split: str) -> Sized: ...

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]: ...


class Samples(Protocol):
    """The samples of a split, and nothing else of a data module."""

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]: ...


def training_rows(datamodule: PictureData, limit: int, seed: int) -> list[int]:
    """Numbers of `limit` training samples (all, if there are no more), drawn and ordered at random by `seed`.

    Stored order would not do, neither for a part of the split nor for a part of the batch: pictures from class folders
    lie class by class, and the first of them are of a few classes only.
    """
    total = len(datamodule.split("train"))
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit].tolist()


def draw_training(datamodule: PictureData, limit: int, seed: int) -> dict[str, Any]:
    """The samples of `training_rows` as one batch, pictures and all: for as many as fit into memory."""
    return datamodule.samples("train", training_rows(datamodule, limit, seed))


def batches(datamodule: Samples, split: str, rows: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    """The samples of these rows in their order, `size` at a time."""
    for at in range(0, len(rows), size):
        yield datamodule.samples(split, list(rows[at : at + size]))


def own_batches(
    datamodule: Samples, split: str, rows: Sequence[int], size: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `batches`, each with the number of its first sample; of several ranks every one gets its share of them."""
    for at in range(rank() * size, len(rows), world_size() * size):
        give_back_freed()
        yield at, datamodule.samples(split, list(rows[at : at + size]))


def give_back_freed() -> None:
    """Hand freed memory back to the system.

    glibc keeps it for the next request, and the few numbers that are kept of every batch lie between the blocks of the
    last: over many batches the holes add up to gigabytes. Other C libraries have no such call, and are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def described(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches as one, without their pictures: the fields of `DESCRIBED` that they have."""
    return {
        name: torch.cat([part[name].cpu() for part in parts])
        if isinstance(parts[0][name], Tensor)
        else [item for part in parts for item in part[name]]
        for name in DESCRIBED
        if name in parts[0]
    }


def chosen(samples: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some samples of a batch, by their numbers in it."""
    return {n: v[list(rows)] if isinstance(v, Tensor) else [v[i] for i in rows] for n, v in samples.items()}
