"""Checkpoints of a fit: written whole or not at all, with every random state, and the export at the end.

A resumed fit goes on exactly: order of samples, random states, optimisers, averages. What lies under the name of a
checkpoint or of an export is always complete; an interrupted write leaves the one before.
"""

import os
import random
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

from stage1_tokenizer.training.checkpoint_file import replace_last, writing
from stage1_tokenizer.training.ema import EMAWeights
from stage1_tokenizer.training.run_folder import RunFolder

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")  # of a checkpoint
AGREE_EVERY = 10  # batches between two looks at whether another rank was interrupted: each look waits for the device


def on_any_rank(trainer: pl.Trainer, flag: bool) -> bool:
    """True if `flag` is on any rank, and then on all: what they do next may be a collective. Alone, no wait."""
    if trainer.world_size == 1:
        return flag
    return bool(trainer.strategy.reduce_boolean_decision(flag, all=False))


class RunCheckpoint(Checkpoint):
    """Keeps `checkpoints/last.ckpt` of a run folder, replaced only by a complete newer one.

    Ctrl-C during a fit finishes the step in flight (all of its batches, where gradients accumulate) and saves, so that
    `--resume auto` continues exactly; a second Ctrl-C stops at once. SIGTERM, and SIGUSR1 as Slurm sends it, do the
    same, and the process ends with status 0, to be queued again. Of several ranks all stop after the same step, the
    first that all know of. After an error nothing is saved: the last good checkpoint stays.

    every_n_steps: optimizer steps between two saves. keep_every: additionally keep step=N.ckpt at these multiples.
    """

    def __init__(self, every_n_steps: int = 500, keep_every: int | None = None) -> None:
        if every_n_steps < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"got every_n_steps={every_n_steps}, keep_every={keep_every}; expected steps of at least 1"
            )
        self.every_n_steps, self.keep_every = every_n_steps, keep_every
        self.folder: RunFolder | None = None  # given by the command line before a fit
        self._saved_step = self._seen_step = 0
        self._interrupted = self._agreed = False  # a stop was requested: on this rank, agreed by all ranks
        self._ended = False  # requested by SIGTERM or SIGUSR1
        self._previous_handlers: dict[int, Any] = {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        lacks = [f"no {name}" for name in PARTS if name not in checkpoint]
        if not lacks:
            own = {"fit_loop": trainer.fit_loop.state_dict()}
            lacks = [f"an odd {place}" for place in odd_counters(checkpoint["loops"], own)]
        if lacks:
            raise ValueError(
                f"the checkpoint does not fit this configuration: it has {', '.join(lacks[:3])}; "
                "give one that a fit has written"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step = self._seen_step = trainer.global_step
        self._interrupted = self._agreed = self._ended = False
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_end, signal.SIGUSR1: self._on_end}
            self._previous_handlers = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # The last batch of a fit is saved here and not at its end: by then Lightning has counted its epoch as finished.
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
        last_batch = last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        last = trainer.should_stop or step == trainer.max_steps or last_batch
        due = last or step // self.every_n_steps > self._saved_step // self.every_n_steps
        kept = self.keep_every is not None and step // self.keep_every > self._saved_step // self.keep_every
        if trainer.world_size == 1 or trainer.fit_loop.total_batch_idx % AGREE_EVERY == 0:
            self._agreed = self._agreed or on_any_rank(trainer, self._interrupted)
        stop = self._agreed and step != self._seen_step  # not while gradients accumulate: they are in no checkpoint
        self._seen_step = step
        if due or kept or stop:
            self._save(trainer, keep=kept)
        if stop and on_any_rank(trainer, self._ended):
            if trainer.is_global_zero:
                print(f"saved at step {step}; go on with --resume auto", flush=True)
            raise SystemExit(0)
        if stop:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_handler()
        if trainer.global_step != self._saved_step:
            self._save(trainer, keep=False)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handler()

    def _save(self, trainer: pl.Trainer, keep: bool) -> None:
        self._saved_step = trainer.global_step
        if self.folder is None or trainer.fast_dev_run:
            return
        last = self.folder.last_checkpoint
        part = last.with_suffix(".part")
        trainer.save_checkpoint(part)  # on every rank; rank 0 writes
        if trainer.is_global_zero:
            if keep:
                kept = last.with_name(f"step={trainer.global_step}.ckpt")
                with writing(kept):
                    shutil.copyfile(part, kept.with_suffix(".kept.part"))
                    os.replace(kept.with_suffix(".kept.part"), kept)
            replace_last(part, last)
        trainer.strategy.barrier("checkpoint")  # a rank that stops now must not take rank 0 down amid the two above

    def _on_interrupt(self, signal_number: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        print("\ninterrupted: finishing this step, then saving (press again to stop at once)", flush=True)

    def _on_end(self, signal_number: int, frame: Any) -> None:
        self._interrupted = self._ended = True
        print(f"\n{signal.Signals(signal_number).name}: finishing this step, then saving", flush=True)

    def _restore_handler(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


def odd_counters(stored: Any, own: Any, place: str = "loops") -> list[str]:
    """Places where a stored state of loops has no whole number of at least 0 (or truth value) and the trainer's has."""
    if isinstance(own, dict):
        if not isinstance(stored, dict):
            return [place]
        return [odd for n in own.keys() & stored.keys() for odd in odd_counters(stored[n], own[n], f"{place}.{n}")]
    counts = isinstance(own, (bool, int))
    return [place] if counts and (type(stored) is not type(own) or not 0 <= stored < 2**62) else []


class RandomStates(pl.Callback):
    """Stores the random states of every rank in the checkpoint and restores them before the first resumed batch.

    Without them a resumed run would draw other noise and dropout than the run it continues. For the same reason what
    happens between two training batches leaves no trace: validation, and the seed that a new loader draws at the start
    of an epoch, are undone before the next batch. A fresh fit on several ranks moves each rank to its own stream; if
    the number of ranks changed, states cannot be matched and ranks are seeded from the stored step instead.
    """

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None
        self._after_batch: dict[str, Any] | None = None
        self._disturbed = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = self._after_batch or random_states()
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["random_states"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get("random_states")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._loaded is None and trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._disturbed = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._disturbed = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._loaded is not None and len(self._loaded) == trainer.world_size:
            set_random_states(self._loaded[trainer.global_rank])
        elif self._loaded is not None:
            torch.manual_seed(torch.initial_seed() + trainer.global_step * trainer.world_size + trainer.global_rank)
        elif self._disturbed and self._after_batch is not None:
            set_random_states(self._after_batch)
        self._loaded, self._disturbed = None, False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._after_batch = random_states()


def random_states() -> dict[str, Any]:
    """The random states of this process as tensors, numbers and tuples, loadable with `weights_only`."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (
            str(name),
            torch.from_numpy(np.array(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of `random_states`; states of GPUs that are not there are ignored."""
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))


class ExportAtEnd(pl.Callback):
    """Calls `pl_module.export(folder)` on rank 0 when a fit ends, with averaged weights where an average is kept.

    The lit module writes its export (say `folder / "tokenizer"`) into a folder of its own inside the run folder; what
    it wrote then replaces what lay in the run folder under the same names. An interrupted or failed fit exports
    nothing, and an export that fails leaves the old one.
    """

    def __init__(self) -> None:
        self._exported = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._exported:  # a resumed fit that had nothing left to train never reaches on_train_end
            self._export(trainer, pl_module)

    def _export(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._exported = True
        if trainer.fast_dev_run:
            return
        if trainer.is_global_zero:
            average = next((c for c in trainer.callbacks if isinstance(c, EMAWeights)), None)
            training = pl_module.training
            pl_module.eval()
            with nullcontext() if average is None else average.averaged(), torch.no_grad():
                export_atomically(pl_module, pl_module.run_dir)
            pl_module.train(training)
        trainer.strategy.barrier("export")


def export_atomically(pl_module: Any, run_dir: Path) -> None:
    """Let `pl_module.export` write into a new folder, then move each entry of it over that of `run_dir`."""
    staging = run_dir / ".export"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with writing(run_dir):
            pl_module.export(staging)
        for entry in sorted(staging.iterdir()):
            target, old = run_dir / entry.name, staging / f".old-{entry.name}"
            if target.exists():
                os.replace(target, old)
            os.replace(entry, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
