"""One status line for every long step: how far, how fast, how long still, and the losses.

    fit 1240/3600  34%  12.1 steps/s  580 samples/s  loss 0.0123  3:15 left

On a terminal the line is rewritten in place; elsewhere (a pipe, a log file) a plain line is printed every ten seconds.
The time left counts the whole fit, all epochs, and follows whichever limit comes first: steps, epochs or time.
(Lightning's TQDMProgressBar shows one epoch, not the fit, and 1,000 steps write 6,400 lines into a log file where this
writes 2.)
"""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, Timer

from stage1_tokenizer.training.throughput import batch_size


class StatusLine(ProgressBar):
    """Prints the status line of fit, validate, test and predict; rank 0 only.

    seconds: time between two lines where standard output is no terminal.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        super().__init__()
        self._terminal = sys.stdout.isatty()
        self._interval = 0.2 if self._terminal else seconds
        self._enabled = True
        self._open_line = False
        self._begin("", 0.0)

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the status line."""
        self._close_line()
        print(*args, **kwargs)

    def _begin(self, name: str, done: float) -> None:
        self._name, self._done_at_start = name, done
        self._start = self._last_print = time.perf_counter()
        self._steps = self._samples = 0

    def _advance(self, batch: Any, count: str, done: float, metrics: str = "", last: bool = False) -> None:
        """Count one batch; print if it is time. done: the finished fraction, 0 to 1, 0 if unknown."""
        self._steps += 1
        self._samples += batch_size(batch)
        now = time.perf_counter()
        if not self._enabled or (now - self._last_print < self._interval and not last):
            return
        self._last_print = now
        seconds = now - self._start
        parts = [f"{self._name} {count}", f"{done:4.0%}", f"{self._steps / seconds:.3g} steps/s"]
        if self._samples:
            parts.append(f"{self._samples / seconds:.0f} samples/s")
        if metrics:
            parts.append(metrics)
        gained = done - self._done_at_start
        left = seconds * (1 - done) / gained if gained > 0 else float("nan")
        parts.append(f"{clock(seconds)} taken" if last else f"{clock(left)} left")
        self._write("  ".join(parts), last)

    def _write(self, line: str, last: bool) -> None:
        if not self._terminal:
            print(line, flush=True)
            return
        sys.stdout.write("\r\033[K" + line + ("\n" if last else ""))
        sys.stdout.flush()
        self._open_line = not last

    def _close_line(self) -> None:
        if self._open_line:
            sys.stdout.write("\n")
            self._open_line = False

    # fit

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("fit", finished_fraction(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        count = f"{trainer.global_step}/{total}" if total != float("inf") else f"{trainer.global_step}"
        due = time.perf_counter() - self._last_print >= self._interval  # reading a metric waits for the device
        self._advance(batch, count, finished_fraction(trainer), self._metrics(trainer) if due else "")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._enabled and self._steps:
            taken = clock(time.perf_counter() - self._start)
            self._write(f"fit {trainer.global_step} steps done  {self._metrics(trainer)}  {taken} taken", last=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close_line()

    def _metrics(self, trainer: pl.Trainer) -> str:
        values = {k: v for k, v in trainer.progress_bar_metrics.items() if isinstance(v, int | float)}
        if not values and "train/loss" in trainer.callback_metrics:
            values = {"loss": trainer.callback_metrics["train/loss"].item()}
        return "  ".join(f"{name} {value:.4g}" for name, value in values.items())

    # validate, test, predict

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._begin("validate", 0.0)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if trainer.state.fn == "validate":
            self._count(args[1], args[2], trainer.num_val_batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("test", 0.0)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        self._count(args[1], args[2], trainer.num_test_batches)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin("predict", 0.0)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self._count(args[1], args[2], trainer.num_predict_batches)

    def _count(self, batch: Any, batch_idx: int, totals: list[int | float]) -> None:
        total, done = sum(totals), self._steps + 1
        known = total not in (0, float("inf"))
        self._advance(
            batch, f"{done}/{total}" if known else f"{done}", done / total if known else 0.0, "", done == total
        )


def finished_fraction(trainer: pl.Trainer) -> float:
    """How much of the fit is done, 0 to 1, by the limit that comes first; 0 if there is none."""
    fractions = [0.0]
    if trainer.max_steps > 0:
        fractions.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != float("inf"):
        batches = trainer.fit_loop.epoch_progress.current.processed * trainer.num_training_batches
        batches += trainer.fit_loop.epoch_loop.batch_progress.current.processed
        fractions.append(batches / max(trainer.max_epochs * trainer.num_training_batches, 1))
    for timer in trainer.callbacks:
        if isinstance(timer, Timer) and timer.time_remaining() is not None:
            elapsed, left = timer.time_elapsed(), timer.time_remaining()
            fractions.append(elapsed / max(elapsed + (left or 0.0), 1e-9))
    return min(max(fractions), 1.0)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss; "?" if not a number."""
    if seconds != seconds:
        return "?"
    text = str(timedelta(seconds=round(seconds)))
    return text[2:].removeprefix("0") if text.startswith("0:") else text
