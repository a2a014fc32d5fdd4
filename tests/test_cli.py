"""The command line, in-process on a tiny model: resume is exact and never silent, overrides hold, errors are short."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stage1_tokenizer import cli as cli_module
from stage1_tokenizer.cli import UnspoolCLI, UsageError, compile_networks, resolve_precision, run_cli
from stage1_tokenizer.ema import EMAWeights
from stage1_tokenizer.optim import MuonAdamW, parameter_groups, warmup_flat_cosine


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
        self.start = state_dict["done"]

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
            raise cli_module.UsageError(f"found no export at {file.parent}; run fit first")
        self.net.load_state_dict(torch.load(file, weights_only=True))


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    TinyLit.seen, TinyLit.on_step = [], None
    yield
    TinyLit.on_step = None


def run(run_dir: Path, *words: str, command: str = "fit") -> UnspoolCLI:
    trainer = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_epochs=-1"]
    if command == "fit":
        trainer += ["--trainer.log_every_n_steps=1", "--trainer.reload_dataloaders_every_n_epochs=1"]
    args = [command, f"--run_dir={run_dir}", "--precision=32-true", *trainer, *words]
    return run_cli("stage1", TinyLit, NumbersModule, "python -m stage1_tokenizer", args)


def checkpoint(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)  # plain objects only


@pytest.mark.parametrize("stop", [3, 5, 7])  # mid-epoch, at the end of an epoch, in the second epoch
def test_a_resumed_fit_equals_one_in_one_piece(tmp_path: Path, stop: int) -> None:
    run(tmp_path / "whole", "--trainer.max_steps=12")
    whole = TinyLit.seen
    TinyLit.seen = []
    run(tmp_path / "parts", f"--trainer.max_steps={stop}")
    run(tmp_path / "parts", "--trainer.max_steps=12", "--resume=auto")
    assert TinyLit.seen == whole

    one, two = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert one["global_step"] == two["global_step"] == 12
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    averages = [c["callbacks"]["EMAWeights"]["averages"] for c in (one, two)]
    for name, value in averages[0].items():
        assert torch.equal(value, averages[1][name]), name


def test_an_interrupted_fit_saves_and_resumes_exactly(tmp_path: Path) -> None:
    run(tmp_path / "whole", "--trainer.max_steps=9")
    whole = TinyLit.seen
    TinyLit.seen = []
    TinyLit.on_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "parts", "--trainer.max_steps=9")
    signal.signal(signal.SIGINT, handler)
    assert stopped.value.code != 0
    assert checkpoint(tmp_path / "parts")["global_step"] == 4  # the step in flight was finished
    assert not (tmp_path / "parts" / "tokenizer").exists()  # nothing half trained is handed on
    TinyLit.on_step = None
    run(tmp_path / "parts", "--trainer.max_steps=9", "--resume=auto")
    assert TinyLit.seen == whole
    for name, value in checkpoint(tmp_path / "whole")["state_dict"].items():
        assert torch.equal(value, checkpoint(tmp_path / "parts")["state_dict"][name]), name


def test_overrides_hold_on_resume(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=2", "--model.lr=0.01")
    resumed = run(tmp_path, "--trainer.max_steps=3", "--resume=auto", "--model.lr=0.5")
    assert resumed.model.lr == 0.5
    assert yaml.safe_load((tmp_path / "stage1" / "config.yaml").read_text())["model"]["init_args"]["lr"] == 0.5


def test_resume_auto_fails_where_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--trainer.max_steps=2", "--resume=auto")
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert "found no checkpoint at" in error and "Traceback" not in error and error.count("\n") == 1
    assert TinyLit.seen == [] and list(tmp_path.iterdir()) == []


def test_a_fit_from_scratch_does_not_lose_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--trainer.max_steps=2")
    with pytest.raises(SystemExit):
        run(tmp_path, "--trainer.max_steps=1")
    assert "--resume auto" in capsys.readouterr().err
    assert checkpoint(tmp_path)["global_step"] == 2
    run(tmp_path, "--trainer.max_steps=1", "--overwrite=true")
    assert checkpoint(tmp_path)["global_step"] == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 0


def test_metrics_append_and_the_folder_tells_its_story(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=2")
    run(tmp_path, "--trainer.max_steps=4", "--resume=auto")
    lines = [json.loads(line) for line in (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3]
    assert any(line.get("throughput/samples_per_s", 0) > 0 for line in lines)
    fits = json.loads((tmp_path / "stage1" / "run.json").read_text())["fits"]
    assert [fit["resumed_from"] is None for fit in fits] == [True, False]
    assert fits[0]["seed"] == 0 and fits[0]["versions"]["torch"] and fits[0]["torch_threads"] >= 1
    config = yaml.safe_load((tmp_path / "stage1" / "config.yaml").read_text())
    assert config["resume"] is None and config["trainer"]["max_steps"] == 4
    before = (tmp_path / "stage1" / "config.yaml").read_text()
    run(tmp_path, command="test")
    assert (tmp_path / "stage1" / "config.yaml").read_text() == before


def test_averaged_weights_are_validated_exported_and_loaded(tmp_path: Path) -> None:
    fitted = run(tmp_path, "--trainer.max_steps=4", "--trainer.val_check_interval=4", "--ema.decay=0.5")
    ema = next(c for c in fitted.trainer.callbacks if isinstance(c, EMAWeights)).ema
    assert ema is not None
    average = dict(zip(ema.names, ema.averages, strict=True))["0.weight"]
    own = fitted.model.net[0].weight
    assert not torch.equal(average, own)
    assert torch.equal(fitted.model.val_weight, average)
    exported = torch.load(tmp_path / "tokenizer" / "weights.pt", weights_only=True)
    assert torch.equal(exported["0.weight"], average) and exported["count"] == 4  # a buffer is never averaged
    assert torch.equal(checkpoint(tmp_path)["state_dict"]["net.0.weight"], own)

    for command in ("validate", "test", "predict"):
        again = run(tmp_path, command=command)
        assert torch.equal(again.model.net[0].weight, average), command
    assert not (tmp_path / ".export").exists()


def test_evaluating_without_an_export_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, command="test")
    assert stopped.value.code == 1
    assert "run fit first" in capsys.readouterr().err


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, "--trainer.max_steps=1")
    old = (tmp_path / "tokenizer" / "weights.pt").read_bytes()

    def broken(self: Any, folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(TinyLit, "export", broken)
    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, "--trainer.max_steps=2", "--resume=auto")
    assert (tmp_path / "tokenizer" / "weights.pt").read_bytes() == old


def test_a_finished_fit_that_resumes_still_leaves_its_export(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=2")
    (tmp_path / "tokenizer" / "weights.pt").unlink()
    run(tmp_path, "--trainer.max_steps=2", "--resume=auto")
    assert (tmp_path / "tokenizer" / "weights.pt").is_file()


def test_a_non_finite_loss_stops_with_step_keys_and_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--trainer.max_steps=6", "--model.lr=1e7", "--nan_guard.every_n_steps=3")
    error = capsys.readouterr().err
    assert "not finite at step 1 (loss nan, pixel nan)" in error
    assert f"key{TinyLit.seen[0][0]}" in error
    assert len(TinyLit.seen) == 3  # looked at every third step, not at every one
    assert not (tmp_path / "stage1" / "checkpoints" / "last.ckpt").exists()


def test_checkpoints_come_in_steps_and_hold_plain_objects(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=5", "--checkpoint.every_n_steps=2", "--checkpoint.keep_every=2")
    names = sorted(file.name for file in (tmp_path / "stage1" / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    stored = checkpoint(tmp_path)
    assert stored["hyper_parameters"]["width"] == 8
    assert len(stored["random_states"]) == 1
    assert all("_orig_mod" not in name for name in stored["state_dict"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.widht=3"], "widht"),
        (["--model.width=abc"], "abc"),
        (["--trainer.precision=32-true"], "top-level option precision"),
        (["--resume=nowhere.ckpt"], "nowhere.ckpt, which is no file"),
        (["--resume=auto", "--overwrite=true"], "choose one"),
    ],
)
def test_wrong_options_get_a_short_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *words)
    error = capsys.readouterr().err
    assert stopped.value.code in (1, 2) and expected in error
    assert "All options" not in error or "python -m stage1_tokenizer fit --help" in error
    assert error.count("\n") <= 2 and "usage:" not in error


class OtherLit(TinyLit):
    """A variant that trains differently: chosen by its class path in an overlay."""

    def __init__(self, width: int = 8, lr: float = 1e-2, layer: dict[str, Any] | None = None, extra: int = 1) -> None:
        super().__init__(width, lr, layer)
        self.extra = extra


def test_an_overlay_changes_the_class_and_keeps_the_arguments(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base.yaml", tmp_path / "overlay.yaml"
    base.write_text(yaml.safe_dump({"model": {"width": 6, "lr": 0.1}}))
    overlay.write_text(yaml.safe_dump({"model": {"class_path": f"{__name__}.OtherLit", "init_args": {"extra": 7}}}))
    words = [f"--config={base}", "--trainer.max_steps=1"]
    plain = run(tmp_path / "plain", *words)
    other = run(tmp_path / "other", *words, f"--config={overlay}", "--model.lr=0.3")
    assert type(plain.model) is TinyLit and (plain.model.hparams["width"], plain.model.lr) == (6, 0.1)
    assert isinstance(other.model, OtherLit)
    assert (other.model.extra, other.model.lr, other.model.net[0].out_features) == (7, 0.3, 6)
    saved = tmp_path / "other" / "stage1" / "config.yaml"
    again = run(tmp_path, f"--config={saved}", f"--run_dir={tmp_path / 'again'}")
    assert isinstance(again.model, OtherLit) and again.model.extra == 7  # a saved config is a config


def test_unknown_keys_of_a_config_file_and_overlays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, overlay, wrong = (tmp_path / name for name in ("base.yaml", "overlay.yaml", "wrong.yaml"))
    base.write_text(yaml.safe_dump({"run_dir": str(tmp_path / "run"), "model": {"width": 6, "lr": 0.1}}))
    overlay.write_text(yaml.safe_dump({"model": {"lr": 0.2}}))
    wrong.write_text(yaml.safe_dump({"model": {"codebook": 3}}))
    both = run(tmp_path / "run", f"--config={base}", f"--config={overlay}", "--trainer.max_steps=1")
    assert (both.model.hparams["width"], both.model.lr) == (6, 0.2)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", f"--config={base}", f"--config={wrong}")
    assert "codebook" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--trainer.max_steps=1")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--trainer.max_steps=2", "--resume=auto", "--model.width=12")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "does not fit this configuration" in error and "size mismatch" in error


@pytest.mark.slow
def test_two_ranks_fit_and_resume(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(
        "from stage1_tokenizer.cli import run_cli\nfrom tests.test_cli import NumbersModule, TinyLit\n"
        "if __name__ == '__main__':\n    run_cli('stage1', TinyLit, NumbersModule, 'two_ranks')\n"
    )
    root = Path(__file__).resolve().parent.parent
    ranks = ["accelerator=cpu", "devices=2", "strategy=ddp", "max_epochs=-1", "use_distributed_sampler=false"]
    fit = ["fit", f"--run_dir={tmp_path / 'run'}", "--precision=32-true", *(f"--trainer.{word}" for word in ranks)]
    for words in (["--trainer.max_steps=3"], ["--trainer.max_steps=6", "--resume=auto"]):
        command = [sys.executable, str(script), *fit, *words]
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    stored = checkpoint(tmp_path / "run")
    assert stored["global_step"] == 6
    first, second = (states["torch"] for states in stored["random_states"])
    assert not torch.equal(first, second)  # ranks draw different noise
    assert (tmp_path / "run" / "tokenizer" / "weights.pt").is_file()


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_module, "has_fast_bfloat16", lambda device: True)
    assert resolve_precision("auto", "cpu") == "bf16-mixed"
    monkeypatch.setattr(cli_module, "has_fast_bfloat16", lambda device: False)
    assert resolve_precision("auto", "cpu") == "32-true"
    assert resolve_precision("bf16-true", "cpu") == "bf16-true"
    with pytest.raises(UsageError, match="16-mixed on a CPU"):
        resolve_precision("16-mixed", "cpu")


def test_compiling_keeps_names_and_results_and_does_compile() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu()

    torch.manual_seed(0)
    networks = nn.ModuleDict({"body": Body(), "head": nn.Linear(4, 2)})
    x, keys = torch.randn(3, 4), list(networks.state_dict())
    plain = networks["head"](networks["body"](x))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert compile_networks(networks, backend="eager") == 2  # the container has no forward: its two children
    compiled = networks["head"](networks["body"](x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.testing.assert_close(compiled, plain)
    assert list(networks.state_dict()) == keys


def test_help_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli("stage1", TinyLit, NumbersModule, "python -m stage1_tokenizer", ["fit", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--run_dir" in text and "python -m stage1_tokenizer" in text
