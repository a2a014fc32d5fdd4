"""Memory of float batches, used again as soon as nobody holds the batch that was in it.

A new tensor of 25 MB is 6,000 pages that the kernel zeroes one fault at a time, which takes as long as filling them. So
a loader lends memory: every batch is a NumPy view whose end hands the memory back, and a tensor made of it keeps that
view for as long as the tensor, a slice of it, or an autograd graph needs its storage. What somebody holds is never
written to.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

_KEPT = 3  # a batch in use, one that is prefetched, and one that is being made


class BatchMemory:
    """Lends memory for float32 tensors; what comes back is lent again, and at most three pieces are kept."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised contiguous float32 tensor of `shape`, on the CPU, that nobody else holds."""
        size = math.prod(shape)
        memory = self._free.pop() if self._free else None
        if memory is None or memory.size < size:
            memory = np.empty(size, np.float32)
        lent = memory[:size].reshape(shape)
        weakref.finalize(lent, self._take_back, memory).atexit = False  # called when the tensor's storage ends
        return torch.from_numpy(lent)

    def _take_back(self, memory: np.ndarray) -> None:
        if len(self._free) < _KEPT:
            self._free.append(memory)
