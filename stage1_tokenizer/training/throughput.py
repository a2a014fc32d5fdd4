"""How fast a fit is: steps and samples a second, and the share of the device's peak that they are."""

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.training.launch import UsageError

COUNTED = 8  # steps whose operations are counted; text losses run at every fourth
SIDE = 2048  # of the square matrices whose product is called the peak


class Throughput(pl.Callback):
    """Logs `throughput/steps_per_s` and `throughput/samples_per_s` (of all ranks) every `log_every_n_steps` batches.

    Validation is left out.

    Args:
        share_of_peak: also `throughput/share_of_peak`: floating-point operations a second, over those of a product of
            two large matrices, measured on this device when the fit begins. Operations are counted as PyTorch's
            operators run in the first eight steps (forward, backward and optimiser), which are slower for it.
    Raises UsageError when a fit begins that is to count the operations of compiled networks, which cannot be seen.
    """

    def __init__(self, share_of_peak: bool = False) -> None:
        self.share_of_peak = share_of_peak
        self._since, self._steps, self._samples = 0.0, 0, 0
        self._counter: FlopCounterMode | None = None
        self._flops, self._counted, self._peak = 0, 0, 0.0

    def _restart(self) -> None:
        self._since, self._steps, self._samples = time.perf_counter(), 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.share_of_peak:
            if any(part._compiled_call_impl is not None for part in pl_module.modules()):
                raise UsageError(
                    "got throughput.share_of_peak and compiled networks, whose operations cannot be counted; leave out"
                    " one of the two"
                )
            self._flops, self._counted, self._peak = 0, 0, matmul_peak(pl_module.device)
        self._restart()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.share_of_peak and self._counted < COUNTED:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counter is not None:
            self._flops += self._stop_counting()
            self._counted += 1
            self._restart()  # steps that are counted are slower
        else:
            self._steps += 1
            self._samples += batch_size(batch)
        if self._steps and (trainer.fit_loop.total_batch_idx + 1) % trainer.log_every_n_steps == 0:
            seconds = max(time.perf_counter() - self._since, 1e-9)
            rates = {"steps_per_s": self._steps, "samples_per_s": self._samples * trainer.world_size}
            figures = {f"throughput/{name}": count / seconds for name, count in rates.items()}
            if self._counted:
                done = self._steps / seconds * self._flops / self._counted
                figures["throughput/share_of_peak"] = done / self._peak
            pl_module.log_dict(figures, batch_size=1)
            self._restart()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _stop_counting(self) -> int:
        """Operations since the counting began, 0 where none are counted."""
        counter, self._counter = self._counter, None
        if counter is None:
            return 0
        counter.__exit__(None, None, None)
        return counter.get_total_flops()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart()


def matmul_peak(device: torch.device, seconds: float = 0.5) -> float:
    """Floating-point operations a second of the best of some products of 2,048 x 2,048 matrices.

    In the format that the device multiplies fast (`precision.matmul_dtype`), whatever the fit is in.
    """
    a = torch.ones(SIDE, SIDE, device=device, dtype=matmul_dtype(device))
    b, best, begin = torch.empty_like(a), float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds or best == float("inf"):
        start = time.perf_counter()
        torch.mm(a, a, out=b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def batch_size(batch: Any) -> int:
    """Number of samples in a batch: the length of its first entry; 0 if it has no length."""
    first = next(iter(batch.values()), None) if isinstance(batch, Mapping) else batch
    first = first[0] if isinstance(first, (tuple, list)) and first and isinstance(first[0], Tensor) else first
    return len(first) if isinstance(first, Tensor | list | tuple) else 0
