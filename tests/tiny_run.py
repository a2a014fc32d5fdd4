"""A tiny run through the real command line: a model of two layers, twenty numbers as data, and helpers to run it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stage1_tokenizer.training.cli import UnspoolCLI, run_cli
from stage1_tokenizer.training.launch import UsageError
from stage1_tokenizer.training.live import Look
from stage1_tokenizer.training.optim import MuonAdamW, parameter_groups, warmup_flat_cosine


class Numbers(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"images": torch.full((4,), i / 10), "keys": f"key{i}", "number": i}


class Rest:
    """The batches of an epoch from `start` on; its length is that of the whole epoch, by which Lightning counts."""

    def __init__(self, batches: list[list[int]], start: int) -> None:
        self.batches, self.start = batches, start

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        return iter(self.batches[start:])


class NumbersModule(pl.LightningDataModule):
    """Order is a function of (epoch, start); `start` travels in the checkpoint."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size, self.start = batch_size, 0

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return {"done": 0 if progress.is_last_batch else progress.current.processed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = int(state_dict["done"])

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        assert self.trainer is not None
        g = torch.Generator().manual_seed(self.trainer.current_epoch)
        batches = torch.randperm(20, generator=g).view(-1, self.batch_size).tolist()
        start, self.start = self.start, 0
        return DataLoader(Numbers(), batch_sampler=Rest(batches, start))

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return DataLoader(Numbers(), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class TinyLit(pl.LightningModule):
    """Fits noise with dropout, so that order of data and random states both show in the weights."""

    seen: list[list[int]] = []  # the numbers of every training batch of this process, for the tests  # noqa: RUF012
    on_step: Any = None  # called with the step, for the tests

    run_dir: Path
    stage_dir: Path

    def __init__(self, width: int = 8, lr: float = 1e-2, layer: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 4))
        self.net.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.val_weight: Tensor | None = None

    @property
    def networks(self) -> nn.Module:
        return self.net

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        TinyLit.seen.append(batch["number"].tolist())
        if TinyLit.on_step is not None:
            TinyLit.on_step(self.global_step)
        self.net.get_buffer("count").add_(1)
        pixel = (self.networks(batch["images"]) + torch.randn(4, device=self.device)).square().mean()
        if TinyLit.on_step is None and self.lr > 1e6:
            pixel = pixel * float("nan")
        self.log("loss", pixel, prog_bar=True)
        return {"loss": pixel, "pixel": pixel.detach()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.val_weight = self.net.get_parameter("0.weight").detach().clone()
        self.log("val/loss", self.networks(batch["images"]).square().mean())

    def look(self, pictures: int) -> Look:
        """The weights as pictures, with noise that must not be missed by the next step."""
        weight, noise = self.net.get_parameter("0.weight"), torch.rand(())
        image = (weight[:4, :4] + 0 * noise).tanh().expand(pictures, 3, 4, 4)
        return Look({"weight": image.clone()}, {"first": weight[0, 0].item()}, "weight")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None: ...

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[int]:
        return batch["number"].tolist()

    def configure_optimizers(self) -> Any:
        optimizer = MuonAdamW(parameter_groups(self.networks), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_flat_cosine(step, 100))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def export(self, folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        torch.save(self.net.state_dict(), folder / "tokenizer" / "weights.pt")

    def load_export(self, run_dir: Path) -> None:
        file = run_dir / "tokenizer" / "weights.pt"
        if not file.is_file():
            raise UsageError(f"found no export at {file.parent}; run fit first")
        self.net.load_state_dict(torch.load(file, weights_only=True))


@pytest.fixture(autouse=True)
def fresh() -> Any:
    """No batch seen, no hook set; import it to have it in a test file."""
    TinyLit.seen, TinyLit.on_step = [], None
    yield
    TinyLit.on_step = None


def run(run_dir: Path, *words: str, command: str = "fit") -> UnspoolCLI:
    """One command of the tiny run, in this process; `words` are options on top of what every run here needs."""
    trainer = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=-1"]
    if command == "fit":
        trainer += ["--trainer.log_every_n_steps=1", "--trainer.reload_dataloaders_every_n_epochs=1"]
    args = [command, f"--run_dir={run_dir}", "--precision=32-true", *trainer, *words]
    return run_cli("stage1", TinyLit, NumbersModule, "python -m stage1_tokenizer", args)


def checkpoint(run_dir: Path) -> dict[str, Any]:
    """The last checkpoint of a run folder, loaded the safe way."""
    return torch.load(run_dir / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)  # plain objects only
