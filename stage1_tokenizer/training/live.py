"""Watch it learn: `live.html` of a run, renewed while it trains.

The same few held-out pictures (or captions) at every look, brought back (or drawn) with the averaged weights, and a
curve over the steps. The page reloads itself; the first one is there after the first step. Pictures also go to every
logger that takes them: TensorBoard's and Weights & Biases'. A look changes nothing: random states and weights are put
back.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.evaluation.picture_sheet import image_grid, png
from stage1_tokenizer.export import PICTURE
from stage1_tokenizer.training.ema import EMAWeights
from stage1_tokenizer.training.launch import UsageError

RELOAD = 5  # seconds between two looks of the browser


@dataclass
class Look:
    """What a lit module shows of itself: strips of pictures (N, 3, H, W) in [-1, 1], figures of one unit, by name."""

    pictures: dict[str, Tensor]
    figures: dict[str, float]
    unit: str


@runtime_checkable
class Watched(Protocol):
    """A lit module that can be watched."""

    run_dir: Path

    def look(self, pictures: int) -> Look:
        """At so many held-out samples, the same every time."""


class LivePage(pl.Callback):
    """Renews `live.html` and `live.png` of the run.

    Args:
        every_n_steps: optimiser steps between two looks; 0 for none.
        pictures: held-out pictures, or captions, that are looked at.
    """

    def __init__(self, every_n_steps: int = 0, pictures: int = 8) -> None:
        if every_n_steps < 0 or pictures < 1:
            raise UsageError(
                f"got live.every_n_steps={every_n_steps}, live.pictures={pictures}; wanted 0 (none) or more, and 1 or"
                " more"
            )
        self.every_n_steps, self.pictures = every_n_steps, pictures
        self._looked = -1  # the step of the last look
        self._curves: dict[str, tuple[list[float], list[float]]] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not self.every_n_steps or not trainer.is_global_zero:
            return
        if self._looked < 0 or step // self.every_n_steps > self._looked // self.every_n_steps:
            self.show(trainer, pl_module, reload=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.every_n_steps and trainer.is_global_zero and self._looked >= 0:
            self.show(trainer, pl_module, reload=False)

    def show(self, trainer: pl.Trainer, module: Any, reload: bool) -> None:
        """Look, and write page and picture; the page of a fit that has ended does not reload."""
        if not isinstance(module, Watched):
            raise UsageError(f"{type(module).__name__} has no method look(pictures); set live.every_n_steps to 0")
        from stage1_tokenizer.evaluation.report import Report  # plotting: only where there is a page

        step = self._looked = trainer.global_step
        look = looked(trainer, module, self.pictures)
        for name, value in look.figures.items():
            steps, values = self._curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
        strips = list(look.pictures.values())
        sheet = image_grid(strips, scale=max(1, 64 // strips[0].shape[-1]))
        report = Report(f"{type(module).__name__} after {step} steps", f"{module.run_dir}, averaged weights")
        report.grid("The same held-out ones at every look", [""], [(k, [v]) for k, v in look.pictures.items()])
        if self._curves:
            report.curve("Over the steps", "step", look.unit, self._curves, log=False)
        folder = Path(module.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "live.png", png(sheet))
        write_whole(folder / "live.html", report.html(RELOAD if reload else 0).encode())
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image("pictures", [sheet.convert("RGB")], step)
            elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
                pixels = np.asarray(sheet.convert("RGB"))  # (H, W, 3)
                logger.experiment.add_image("pictures", pixels, step, dataformats="HWC")


@torch.no_grad()
def looked(trainer: pl.Trainer, module: Any, pictures: int) -> Look:
    """`module.look` with averaged weights and in eval mode; modes, weights and random states are put back."""
    averages = (callback for callback in trainer.callbacks if isinstance(callback, EMAWeights))  # type: ignore[attr-defined]
    ema = next(averages, EMAWeights())
    modes = {part: part.training for part in module.modules()}
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context(), ema.averaged():
        module.eval()
        look: Look = module.look(pictures)
    for part, mode in modes.items():
        part.training = mode
    return look


def card_picture(module: Watched, credit: str, folder: Path) -> bool:
    """Write `folder`/pictures.png for the model card: what the module shows of itself, a row for each prefix length.

    credit: whose pictures they are. Without it nothing is written: no one has said that they may be shown.
    Returns whether there is one.
    """
    if credit:
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            strips = list(module.look(8).pictures.values())
        (folder / PICTURE).write_bytes(png(image_grid(strips, scale=max(1, 64 // strips[0].shape[-1]))))
    return bool(credit)


def write_whole(path: Path, content: bytes) -> None:
    """Write so that a browser sees the old or the new content, never a part of it."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
