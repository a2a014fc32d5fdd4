"""Resuming: exact wherever a fit stopped, never silent, never at the price of an earlier fit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.metrics_file import read_metrics
from stage1_tokenizer.training.optim import warmup_flat_cosine
from tests.tiny_run import NumbersModule, TinyLit, checkpoint, fresh, run
from tests.warm import Done, ranks

__all__ = ["fresh"]  # a fixture that every test here uses


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


def test_an_interrupt_waits_until_the_gradients_of_a_step_are_together(tmp_path: Path) -> None:
    words = ["--trainer.max_steps=7", "--trainer.accumulate_grad_batches=2"]  # epochs of 5 batches: 2 + 2 + 1
    run(tmp_path / "whole", *words)
    whole = TinyLit.seen
    TinyLit.seen = []
    TinyLit.on_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if len(TinyLit.seen) == 3 else None
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", *words)
    signal.signal(signal.SIGINT, handler)
    assert len(TinyLit.seen) == 4 and checkpoint(tmp_path / "parts")["global_step"] == 2
    TinyLit.on_step = None
    run(tmp_path / "parts", *words, "--resume=auto")
    assert TinyLit.seen == whole
    for name, value in checkpoint(tmp_path / "whole")["state_dict"].items():
        assert torch.equal(value, checkpoint(tmp_path / "parts")["state_dict"][name]), name


def test_overrides_hold_on_resume(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=2", "--model.lr=0.01")
    before = checkpoint(tmp_path)["state_dict"]["net.0.weight"]
    resumed = run(tmp_path, "--trainer.max_steps=3", "--resume=auto", "--model.lr=0.5")
    assert resumed.model.lr == 0.5
    assert (checkpoint(tmp_path)["state_dict"]["net.0.weight"] - before).abs().max() > 0.02  # 0.01 could not do that
    (group,) = resumed.trainer.optimizers[0].param_groups
    assert group["lr"] == 0.5 * warmup_flat_cosine(3, 100) and group["initial_lr"] == 0.5  # the schedule goes on
    assert resumed.trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.5]
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
    steps = [row["step"] for row in read_metrics(tmp_path / "stage1" / "metrics.csv")]
    assert max(steps) == 0


def test_a_checkpoint_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--trainer.max_steps=1")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--trainer.max_steps=2", "--resume=auto", "--model.width=12")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "does not fit this configuration" in error and "size mismatch" in error


def fit_of_rank(words: list[str], prepare: Callable[[int], None] | None) -> None:
    if prepare is not None:
        prepare(int(os.environ["LOCAL_RANK"]))
    run_cli("stage1", TinyLit, NumbersModule, "two_ranks", ["fit", *words])


def two_ranks(run_dir: Path, *words: str, prepare: Callable[[int], None] | None = None) -> list[Done]:
    """A fit of two processes; `prepare` is called with the rank before."""
    trainer = ["accelerator=cpu", "devices=2", "strategy=auto", "max_epochs=-1", "use_distributed_sampler=false"]
    common = [f"--run_dir={run_dir}", "--precision=32-true", *(f"--trainer.{word}" for word in trainer)]
    return ranks(2, fit_of_rank, [*common, *words], prepare)


@pytest.mark.slow
def test_two_ranks_fit_and_resume(tmp_path: Path) -> None:
    for words in (["--trainer.max_steps=3"], ["--trainer.max_steps=6", "--resume=auto"]):
        for done in two_ranks(tmp_path, *words):
            assert done.returncode == 0, done.stderr[-2000:]
    stored = checkpoint(tmp_path)
    assert stored["global_step"] == 6
    first, second = (states["torch"] for states in stored["random_states"])
    assert not torch.equal(first, second)  # ranks draw different noise
    assert (tmp_path / "tokenizer" / "weights.pt").is_file()


def interrupt_second_rank(rank: int) -> None:
    TinyLit.on_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if (step, rank) == (3, 1) else None


@pytest.mark.slow
def test_ranks_stop_together_when_one_is_interrupted(tmp_path: Path) -> None:
    first, second = two_ranks(tmp_path, "--trainer.max_steps=100000", prepare=interrupt_second_rank)
    assert first.returncode != 0 and second.returncode != 0
    assert "interrupted: finishing this step" in first.stdout + second.stdout
    stored = checkpoint(tmp_path)
    assert 4 <= stored["global_step"] <= 20 and len(stored["random_states"]) == 2


def break_second_rank(rank: int) -> None:
    step = TinyLit.training_step

    def broken(self: TinyLit, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        if self.global_step == 3:
            return {"loss": self.net.get_parameter("0.weight").sum() * float("nan") ** rank}
        return step(self, batch, batch_idx)

    TinyLit.training_step = broken  # type: ignore[method-assign]


@pytest.mark.slow
def test_ranks_stop_together_when_the_loss_of_one_is_not_finite(tmp_path: Path) -> None:
    words = ["--trainer.max_steps=100000", "--nan_guard.every_n_steps=5"]
    for done in two_ranks(tmp_path, *words, prepare=break_second_rank):
        assert done.returncode != 0 and "not finite" in done.stderr
    assert not (tmp_path / "stage1" / "checkpoints" / "last.ckpt").exists()
