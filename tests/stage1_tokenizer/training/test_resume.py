"""Resuming: exact wherever a fit stopped, never silent, never at the price of an earlier fit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from stage1_tokenizer.training.optim import warmup_flat_cosine
from tests.tiny_run import TinyLit, checkpoint, fresh, run

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
    steps = [json.loads(line)["step"] for line in (tmp_path / "stage1" / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 0


def test_a_checkpoint_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--trainer.max_steps=1")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--trainer.max_steps=2", "--resume=auto", "--model.width=12")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "does not fit this configuration" in error and "size mismatch" in error


def two_ranks(tmp_path: Path, *words: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """A fit of two processes; `first`: a line of Python that each runs before, with os, TinyLit and `rank` at hand."""
    script = tmp_path / "two_ranks.py"
    script.write_text(
        "import os\nfrom stage1_tokenizer.training.cli import run_cli\n"
        "from tests.tiny_run import NumbersModule, TinyLit\n"
        f"rank = int(os.environ.get('LOCAL_RANK', 0))\n{first}\n"
        "if __name__ == '__main__':\n    run_cli('stage1', TinyLit, NumbersModule, 'two_ranks')\n"
    )
    root = Path(__file__).resolve().parents[3]
    ranks = ["accelerator=cpu", "devices=2", "strategy=auto", "max_epochs=-1", "use_distributed_sampler=false"]
    fit = ["fit", f"--run_dir={tmp_path / 'run'}", "--precision=32-true", *(f"--trainer.{word}" for word in ranks)]
    return subprocess.run(
        [sys.executable, str(script), *fit, *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,  # where ranks do not agree, one waits for the other for half an hour
    )


@pytest.mark.slow
def test_two_ranks_fit_and_resume(tmp_path: Path) -> None:
    for words in (["--trainer.max_steps=3"], ["--trainer.max_steps=6", "--resume=auto"]):
        done = two_ranks(tmp_path, *words)
        assert done.returncode == 0, done.stderr[-2000:]
    stored = checkpoint(tmp_path / "run")
    assert stored["global_step"] == 6
    first, second = (states["torch"] for states in stored["random_states"])
    assert not torch.equal(first, second)  # ranks draw different noise
    assert (tmp_path / "run" / "tokenizer" / "weights.pt").is_file()


@pytest.mark.slow
def test_ranks_stop_together_when_one_is_interrupted(tmp_path: Path) -> None:
    interrupt = "TinyLit.on_step = lambda step: os.kill(os.getpid(), 2) if (step, rank) == (3, 1) else None"
    done = two_ranks(tmp_path, "--trainer.max_steps=100000", first=interrupt)
    assert done.returncode != 0 and "interrupted: finishing this step" in done.stdout
    stored = checkpoint(tmp_path / "run")
    assert 4 <= stored["global_step"] <= 20 and len(stored["random_states"]) == 2


@pytest.mark.slow
def test_ranks_stop_together_when_the_loss_of_one_is_not_finite(tmp_path: Path) -> None:
    broken = (
        "step = TinyLit.training_step\n"
        "nan = lambda self: {'loss': self.net[0].weight.sum() * float('nan') ** rank}\n"
        "TinyLit.training_step = lambda self, *a: nan(self) if self.global_step == 3 else step(self, *a)"
    )
    done = two_ranks(tmp_path, "--trainer.max_steps=100000", "--nan_guard.every_n_steps=5", first=broken)
    assert done.returncode != 0 and "not finite" in done.stderr
    assert not (tmp_path / "run" / "stage1" / "checkpoints" / "last.ckpt").exists()
