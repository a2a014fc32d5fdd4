"""The order of the samples: a pure function of (seed, epoch, start), cut into batches for any number of ranks.

An epoch is one permutation of all samples. A step takes the next `batch_size * world` samples of it, and rank r gets
every world-th of them from r on; so the samples of a step do not depend on the ranks, as long as the global batch is
the same, and the sequence of samples does not depend on it at all. A restart gives the number of samples already seen
and continues behind them, with as many ranks and workers as it likes. Nothing is drawn from a generator that would have
to be saved.

Training wants equally many batches on all ranks (`BatchOrder`); what is written to shards wants every sample exactly
once, and in shards that are the same for any number of ranks (`ShardOrder`).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DistributedSampler

from data.schema import DataError


def permutation(seed: int, epoch: int, total: int) -> np.ndarray:
    """Return the order of `total` samples in an epoch, (total,) int64: the same numbers on every machine."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(total)


def spread_rows(total: int, limit: int | None) -> list[int]:
    """Return the numbers of `limit` of `total` samples, evenly spread, since a split may be stored class by class.

    All of them, in stored order, if `limit` is None or not below `total`.
    """
    count = total if limit is None else min(limit, total)
    return [i * total // count for i in range(count)]


@dataclass(frozen=True)
class Batch:
    """Which samples a rank reads next; all that a dataset needs, in any process."""

    epoch: int
    first: int  # position of the global batch in the epoch
    samples: tuple[int, ...]
    augmented: bool = True  # False: pictures as they are stored


class BatchOrder(DistributedSampler[Batch]):
    """Yield the batches of one rank; use as `DataLoader(dataset, sampler=order, batch_size=None)`.

    It is a DistributedSampler because Lightning leaves those in place, where it would wrap any other sampler and give
    every rank its own choice of batches. Every rank yields the same number of batches: where the last samples do not
    suffice for all ranks, the first ones of them are given twice.

    Args:
        total: samples in the set.
        batch_size: samples per rank and step.
        seed: of the order.
        shuffle: False keeps the stored order.
        rank, world: this process among how many.
        drop_last: leave out the samples that do not fill a global batch; else the last batch is smaller.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}, wanted at least 1")
        if total < 1:
            raise DataError("the split has no samples; prepare more, or another --val-fraction")
        if drop_last and total < batch_size * world:
            raise DataError(
                f"{total} samples do not fill one batch of {batch_size} x {world} ranks; "
                "use a smaller batch_size or drop_last=False"
            )
        super().__init__(range(total), num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.total, self.batch_size, self.world = total, batch_size, world
        self.drop_last = drop_last
        self.start_epoch, self.start_samples, self.start_batches = 0, 0, 0

    def set_start(self, epoch: int, samples: int, batches: int) -> None:
        """Continue in `epoch` behind the first `samples` samples, which took `batches` steps."""
        self.epoch = epoch
        self.start_epoch, self.start_samples, self.start_batches = epoch, samples, batches

    def samples_after(self, batches: int) -> int:
        """Return how many samples of the current epoch all ranks together have seen after so many steps of it."""
        samples, done = self._start()
        return min(self.total, samples + (batches - done) * self.batch_size * self.world)

    def __len__(self) -> int:
        """Steps of the current epoch, those before a restart included."""
        samples, batches = self._start()
        left, step = self.total - samples, self.batch_size * self.world
        return batches + (left // step if self.drop_last else -(-left // step))

    def __iter__(self) -> Iterator[Batch]:
        order = permutation(self.seed, self.epoch, self.total) if self.shuffle else np.arange(self.total)
        position, batches = self._start()
        epoch, step = self.epoch, self.batch_size * self.world
        for _ in range(len(self) - batches):
            together = order[position : position + step]
            if len(together) < self.world:
                together = np.resize(together, self.world)
            yield Batch(epoch, position, tuple(together[self.rank :: self.world].tolist()))
            position += step

    def _start(self) -> tuple[int, int]:
        return (self.start_samples, self.start_batches) if self.epoch == self.start_epoch else (0, 0)


class ShardOrder(DistributedSampler[Batch]):
    """Yield the batches from which one rank writes its shards; each sample comes once, on one rank.

    Shard n holds samples [n * shard_size, (n + 1) * shard_size) in stored order, and rank r writes every world-th shard
    from r on. Batches end where shards end. So a shard has the same content, from the same batches, whichever rank
    writes it and whatever was written before. What is written is not mirrored.

    Args:
        total: samples in the set.
        batch_size: samples per batch, the last one of a shard may be smaller.
        shard_size: samples per shard, the last shard may be smaller.
        rank, world: this process among how many.
        finished: numbers of shards to leave out; looked into when the iteration comes to a shard.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        shard_size: int,
        rank: int = 0,
        world: int = 1,
        finished: Container[int] = (),
    ) -> None:
        if min(total, batch_size, shard_size) < 1:
            raise DataError(
                f"got {total} samples in batches of {batch_size} and shards of {shard_size}, wanted 1 or more of each"
            )
        super().__init__(range(total), num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.total, self.batch_size, self.shard_size, self.world = total, batch_size, shard_size, world
        self.finished = finished

    def __len__(self) -> int:
        """Batches of the first rank, which has the most, finished shards included: Lightning asks for at least one."""
        return sum(len(self._batches(number)) for number in self._numbers(rank=0))

    def __iter__(self) -> Iterator[Batch]:
        for number in self._numbers(self.rank):
            if number not in self.finished:
                for samples in self._batches(number):
                    yield Batch(0, samples.start, tuple(samples), augmented=False)

    def _numbers(self, rank: int) -> range:
        return range(rank, -(-self.total // self.shard_size), self.world)

    def _batches(self, number: int) -> list[range]:
        start, stop = number * self.shard_size, min((number + 1) * self.shard_size, self.total)
        return [range(first, min(first + self.batch_size, stop)) for first in range(start, stop, self.batch_size)]
