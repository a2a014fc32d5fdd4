"""Two ways in which a loss goes wrong while it stays finite: it goes back to where it began, or it jumps.

A network that dies stays finite. Beside a linear path (`linear_path.py`) it begins silent, so that the first losses are
those of principal components, and when its branches die it is back at them: residual convolutions without weight decay
did that after some 3,000 steps, and nothing but the figures of the end said so.
"""

from collections import deque
from collections.abc import Mapping
from statistics import mean, median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from stage1_tokenizer.training.launch import UsageError

BEGINNING = 5  # losses that tell where a fit began: a few steps later it has learned
WINDOW = 50  # losses that are averaged before they are compared
LEARNED, BACK, STAYS = 0.9, 0.97, 4  # parts of the first loss: learned below, back above; and for how many windows


class CollapseWatch(pl.Callback):
    """Says once where the loss of pixels (else the loss) fell, went back to where it began, and stays there.

    The fit goes on: a kept checkpoint (`checkpoint.keep_every`) is from before. Losses stay on the device until a
    window is full. What was seen travels in the checkpoint.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.best: float | None = None  # of the windows below `LEARNED`
        self.back = 0  # windows, one after another
        self._seen: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        named = outputs if isinstance(outputs, Mapping) else {"loss": outputs}
        loss = named.get("pixel", named.get("loss"))
        if isinstance(loss, Tensor):
            self._seen.append(loss.detach())
        if len(self._seen) >= WINDOW:
            message = self.look(torch.stack(self._seen).tolist(), trainer.global_step)
            self._seen = []
            if message and trainer.is_global_zero:
                print(message, flush=True)

    def look(self, losses: list[float], step: int) -> str:
        """What to say of one more window of losses, of the steps up to `step`; mostly nothing."""
        self.first += losses[: BEGINNING - len(self.first)]
        start, now = mean(self.first), mean(losses)
        if now < LEARNED * start:
            self.best = now if self.best is None else min(now, self.best)
        self.back = self.back + 1 if self.best is not None and now > BACK * start else 0
        if self.back != STAYS:
            return ""
        return (
            f"collapsed: the loss fell from {start:.3g} to {self.best:.3g} and has been back at {now:.3g} since step "
            f"{step - STAYS * WINDOW}; the networks add nothing any more. Go on from a kept checkpoint "
            "(checkpoint.keep_every) with lower rates or with weight decay on the matrices"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "best": self.best, "back": self.back, "seen": [x.item() for x in self._seen]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.first, self.best, self.back = state_dict["first"], state_dict["best"], state_dict["back"]
        self._seen = [torch.tensor(x) for x in state_dict["seen"]]


class SpikeSkip(pl.Callback):
    """Leaves out the optimiser's step where the loss jumps: weights, momenta and moments stay as they are.

    A batch that cannot be learned (a broken file, a word in all pictures) costs one step instead of hundreds. The loss
    of all ranks decides, so that they all skip; reading it waits for the device in every step.

    Args:
        factor: skip a step whose loss is more than so many times the median of the last ones; None skips nothing.
        window: losses of which the median is taken; nothing is skipped before there are so many.
    Raises UsageError for a factor of 1 or less, a window below 2, and with a discriminator, whose loss has no level.
    """

    def __init__(self, factor: float | None = None, window: int = 100) -> None:
        if (factor is not None and not factor > 1) or window < 2:
            raise UsageError(
                f"got spike.factor={factor}, spike.window={window}; wanted above 1 (or null), and at least 2"
            )
        self.factor, self.window = factor, window
        self.losses: deque[float] = deque(maxlen=window)
        self.skipped = 0
        self._loss: Tensor | None = None  # of the step in flight, of all its batches

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.factor is not None and not pl_module.automatic_optimization:
            raise UsageError("got spike.factor with a discriminator, whose losses have no level; set it to null")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self.factor is not None:
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.factor is None or self._loss is None:
            return
        loss = float(trainer.strategy.reduce(self._loss, reduce_op="mean"))
        self._loss = None
        usual = median(self.losses) if len(self.losses) == self.window else float("inf")
        self.losses.append(loss)  # also where it is skipped: if the level has changed for good, the median follows
        if loss > self.factor * usual:
            optimizer.zero_grad(set_to_none=True)  # MuonAdamW leaves parameters without a gradient alone
            self.skipped += 1
            if trainer.is_global_zero:
                print(
                    f"skipped step {trainer.global_step}: the loss is {loss:.3g}, the median of the {self.window} "
                    f"before {usual:.3g}; {self.skipped} skipped so far",
                    flush=True,
                )

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.skipped = deque(state_dict["losses"], maxlen=self.window), state_dict["skipped"]
