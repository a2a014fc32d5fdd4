"""What every fit of both stages does besides training: save, guard, measure, and leave an export.

Each callback does one of these things and can be read alone:

    RunCheckpoint   checkpoints/last.ckpt every N steps, at the end, and on Ctrl-C after the step in flight
    RandomStates    the random states of torch, numpy and python travel in the checkpoint
    ConfiguredRates a resumed fit has the learning rates of its configuration, not those of the checkpoint
    NaNGuard        stops at the first non-finite loss, naming step, batch keys and loss parts; no NaN is ever saved
    SharedCores     says once that threads wait for cores that other programs keep busy, and what to do
    CollapseWatch   says where a loss has gone back to where it began; SpikeSkip: leaves out steps whose loss jumps
    ExportAtEnd     the lit module's export, with averaged weights, replacing the old one only when complete
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.training.checkpoint import on_any_rank
from stage1_tokenizer.training.optim import configured_options, restore_options


class NonFiniteLossError(ValueError):
    """A loss or a weight became infinite or not a number."""


class ConfiguredRates(pl.Callback):
    """After a checkpoint was loaded, puts the configured learning rates and weight decays back into the optimizers."""

    def __init__(self) -> None:
        self._options: list[list[dict[str, Any]]] = []
        self._schedules: dict[int, Any] = {}  # by optimizer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._options = [configured_options(optimizer) for optimizer in trainer.optimizers]  # before they are restored
        self._schedules = {id(s.scheduler.optimizer): s.scheduler for s in trainer.lr_scheduler_configs}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer, options in zip(trainer.optimizers, self._options, strict=True):
            restore_options(optimizer, options, self._schedules.get(id(optimizer)))


class NaNGuard(pl.Callback):
    """Stops a fit whose loss is no finite number, with the step, the keys of its batch, and the parts of the loss.

    The parts are the 0-d tensors that `training_step` returns with "loss". Nothing waits for the device at a step:
    losses are kept where they are and looked at every `every_n_steps` batches, and before a checkpoint is written. Then
    the weights are looked at, too: a finite loss can have a gradient that is not, and it would take the place of the
    last good checkpoint. All ranks stop if one has to.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"got every_n_steps={every_n_steps}; expected at least 1")
        self.every_n_steps = every_n_steps
        self._seen: list[tuple[int, list[str], dict[str, Tensor]]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        named = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
        parts = {k: v.detach() for k, v in named.items() if isinstance(v, Tensor) and v.ndim == 0}
        if parts:
            keys = batch.get("keys", []) if isinstance(batch, Mapping) else []
            self._seen.append((trainer.global_step, list(keys), parts))
        if len(self._seen) >= self.every_n_steps:
            self.check(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.check(trainer)
        self.check_weights(trainer, pl_module)

    def check(self, trainer: pl.Trainer) -> None:
        """Look at the losses kept since the last look. Raises NonFiniteLossError at the first that is not finite."""
        seen, self._seen = self._seen, []
        if not on_any_rank(trainer, not all_finite([v for _, _, parts in seen for v in parts.values()])):
            return
        for step, keys, parts in seen:
            values = {k: v.item() for k, v in parts.items()}
            if not all(np.isfinite(list(values.values()))):
                listed = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
                shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
                raise NonFiniteLossError(
                    f"the loss is not finite at step {step} ({listed}); its batch holds the keys {shown or 'unknown'}; "
                    "the last checkpoint is from before: resume it with a lower learning rate, or look at these samples"
                )
        raise NonFiniteLossError(
            f"the loss of another rank is not finite, at or before step {trainer.global_step}; see its message"
        )

    def check_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raises NonFiniteLossError if any parameter holds a value that is not finite, naming the first."""
        named = dict(pl_module.named_parameters())
        if not on_any_rank(trainer, not all_finite(list(named.values()))):
            return
        broken = [name for name, parameter in named.items() if not bool(parameter.isfinite().all())]
        raise NonFiniteLossError(
            f"{len(broken)} of {len(named)} parameters are not finite at step {trainer.global_step}, "
            f"first {broken[0] if broken else 'on another rank'}, though no loss was: a gradient overflowed; nothing "
            "was saved, the last checkpoint is from before: resume it with a lower learning rate"
        )


def all_finite(tensors: list[Tensor]) -> bool:
    """True if no value of any tensor is infinite or not a number; waits for the device once."""
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


class SharedCores(pl.Callback):
    """Says once in a fit on a CPU that its threads wait for cores that other programs keep busy, and what to do.

    The kernel counts how long each thread was ready to run and did not. Looked at every `window` steps; one thread that
    waited for more than `share` of that time holds up all the others.
    """

    def __init__(self, window: int = 50, share: float = 0.3) -> None:
        self.window, self.share = window, share

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        watched = pl_module.device.type == "cpu" and trainer.is_global_zero
        self._steps = 0 if watched else -1  # -1: no longer
        self._since, self._waits = time.perf_counter(), seconds_waited()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps < 0:
            return
        self._steps += 1
        if self._steps % self.window:
            return
        now, waits = time.perf_counter(), seconds_waited()
        share = max((waits[t] - self._waits.get(t, 0.0) for t in waits), default=0.0) / max(now - self._since, 1e-9)
        self._since, self._waits = now, waits
        if share > self.share:
            self._steps = -1
            say = trainer.progress_bar_callback.print if trainer.progress_bar_callback else print
            say(busy_sentence(share, torch.get_num_threads()))


def seconds_waited() -> dict[str, float]:
    """Seconds that each thread of this process has waited for a core since it began; empty where no kernel tells."""
    waits = {}
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waits[task.parent.name] = int(task.read_text().split()[1]) / 1e9
        except (OSError, IndexError):  # the thread has ended
            continue
    return waits


def busy_sentence(share: float, threads: int) -> str:
    """What `SharedCores` says to a run of so many threads, one of which waited for `share` of the time."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    advice = (
        f"OMP_NUM_THREADS=1 loses least (now {threads})"
        if threads > 1
        else "it has one thread already, and is as fast as the others let it"
    )
    return (
        f"this run waits {share:.0%} of its time for a core: {load:.1f} threads want {cores} (load average); {advice}"
    )
