"""Random crops of training pictures, another one in every epoch: for shards of `prepare --resize keep_ratio`.

The short side of a stored picture becomes S, and the crop slides along the long one. Where it lies is a function of
(seed, epoch, sample) alone, so that any number of ranks and workers, and any restart, see the same crops. Pictures are
decoded anew in every epoch: they have sizes of their own, and so are not held in memory.
"""

from __future__ import annotations

import numpy as np
import torch

from data.pictures.decode import open_picture
from data.pictures.resize import pixels_of, resize
from data.reading.datasets import ImageSet, named_decoding
from data.reading.order import Batch
from data.reading.shards import ShardReader


class CroppedImageSet(ImageSet):
    """`ImageSet` whose augmented batches are random crops; arguments as there."""

    def __init__(self, reader: ShardReader, image_size: int, flip: float = 0.0, seed: int = 0) -> None:
        super().__init__(reader, image_size, in_memory=False, flip=flip, seed=seed)
        self.epoch: int | None = None  # of the batch that is being made; None: as stored, centre-cropped

    def __getitem__(self, plan: Batch) -> dict[str, object]:
        self.epoch = plan.epoch if plan.augmented else None
        try:
            return super().__getitem__(plan)
        finally:
            self.epoch = None  # what reports read is not cropped at random

    def arrays_of(self, sample: int) -> dict[str, np.ndarray]:
        """As `ImageSet.arrays_of`; raises DataError where that does."""
        if self.epoch is None:
            return super().arrays_of(sample)
        key, data, size = self.reader.key(sample), self.encoded(sample), self.image_size
        with named_decoding(key):
            pixels = resize(pixels_of(data, open_picture(data), size, "keep_ratio"), size, "keep_ratio")  # (3,H,W)
        height, width = pixels.shape[1:]
        if min(height, width) < size:  # keep_ratio never enlarges
            return {"images": resize(pixels, size).numpy()}
        stream = ((self.seed * 1_000_003 + self.epoch) * 1_000_003 + sample + 1_000_000_007) % 2**63
        u = torch.rand(2, generator=torch.Generator().manual_seed(stream))
        top, left = (int(x * (side - size + 1)) for x, side in zip(u.tolist(), (height, width), strict=True))
        return {"images": pixels[:, top : top + size, left : left + size].numpy()}
