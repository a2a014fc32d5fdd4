"""What a report asks of a data module, and how it draws training pictures from it.

The lit modules hand over Lightning data modules; a report needs three members of them, and a test gives it a fake of
twenty lines.
"""

from collections.abc import Sized
from typing import Any, Protocol

import torch


class PictureData(Protocol):
    """What a report asks of a data module: the samples of a split, and where they lie on disk."""

    data_dir: str
    val_batch_size: int

    def split(self, split: str) -> Sized: ...

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]: ...


def draw_training(datamodule: PictureData, limit: int, seed: int) -> dict[str, Any]:
    """`limit` training samples (all, if there are no more) as one batch, drawn and ordered at random by `seed`.

    Stored order would not do, neither for a part of the split nor for a part of the batch: pictures from class folders
    lie class by class, and the first of them are of a few classes only.
    """
    total = len(datamodule.split("train"))
    rows = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:limit]
    return datamodule.samples("train", rows.tolist())
