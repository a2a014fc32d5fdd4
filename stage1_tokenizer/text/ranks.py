"""What the ranks of a training share in a text step: each of them computes the losses of the global batch.

A picture is to be told from the captions of *all* ranks (as `open_clip.loss.gather_features` with gradients): eight
ranks that contrast an eighth each would train another loss than one. Rows are gathered in the order that one process
has them in, rank r's i-th sample is the global batch's (i W + r)-th (`data.reading.order`), so that the loss, and what
a memory keeps, is the same for any number of ranks.

Every rank then computes the same loss from the same rows. Its gradient at a rank's own rows, summed over the ranks, is
W times what that rank computes by itself: the backward pass of `Rows.of_all` needs no communication, and the mean over
ranks that DistributedDataParallel takes of the weights' gradients is the gradient of the global loss.

Letters: B rows of this rank, N rows of all ranks, W ranks.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """The number of this rank; 0 without a process group."""
    return torch.distributed.get_rank() if world_size() > 1 else 0


def of_others(x: T) -> list[T]:
    """What every other rank gives, in the order of ranks; all have to call it at the same time. Alone: nothing.

    torch pickles `x` on its way between processes of one run, which trust each other.
    """
    every: list[Any] = [x] * world_size()
    if len(every) > 1:
        torch.distributed.all_gather_object(every, x)
    return [given for number, given in enumerate(every) if number != rank()]


def in_order(parts: dict[int, T]) -> list[T]:
    """Parts of all ranks, each under the number of its first sample, by number; all have to call it."""
    for others in of_others(parts):
        parts = parts | others
    return [parts[at] for at in sorted(parts)]


def world_size() -> int:
    """W; 1 without a process group."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, without a gradient."""
    total = x.detach().clone()
    if world_size() > 1:
        torch.distributed.all_reduce(total)
    return total


class Rows:
    """Which rows the ranks hold: B on this one, in all N. Every rank has to make one at the same time.

    Their numbers differ only where a split ends; exchanging them waits for the device, once in a text step.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.world = world_size()
        if self.world == 1:
            return
        own = torch.distributed.get_rank()
        counts = torch.zeros(self.world, dtype=torch.long, device=device)
        counts[own] = count
        held = sum_over_ranks(counts).tolist()
        self.most = max(held)
        places = [(i, rank) for i in range(self.most) for rank in range(self.world) if i < held[rank]]
        self.filled = torch.tensor([i * self.world + rank for i, rank in places], device=device)  # (N,) of W x most
        self.own = torch.tensor([n for n, (_, rank) in enumerate(places) if rank == own], device=device)  # (B,)

    def of_all(self, x: Tensor) -> Tensor:
        """x (B,...) of this rank -> (N,...) of all ranks, with the gradient that the module's docstring describes."""
        return x if self.world == 1 else _Gathered.apply(x, self)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        padded = x.new_zeros(rows.most, *x.shape[1:])
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in range(rows.world)]
        torch.distributed.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[rows.filled]  # (N,...)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.rows.world * grads[0][ctx.rows.own], None
