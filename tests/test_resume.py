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
        "from stage1_tokenizer.cli import run_cli\nfrom tests.tiny_run import NumbersModule, TinyLit\n"
        "if __name__ == '__main__':\n    run_cli('stage1', TinyLit, NumbersModule, 'two_ranks')\n"
    )
    root = Path(__file__).resolve().parent.parent
    ranks = ["accelerator=cpu", "devices=2", "strategy=ddp", "max_epochs=-1", "use_distributed_sampler=false"]
    fit = ["fit", f"--run_dir={tmp_path / 'run'}", "--precision=32-true", *(f"--trainer.{word}" for word in ranks)]
    for words in (["--trainer.max_steps=3"], ["--trainer.max_steps=6", "--resume=auto"]):
        command = [sys.executable, str(script), *fit, *words]
        done = subprocess.run(
            command,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    stored = checkpoint(tmp_path / "run")
    assert stored["global_step"] == 6
    first, second = (states["torch"] for states in stored["random_states"])
    assert not torch.equal(first, second)  # ranks draw different noise
    assert (tmp_path / "run" / "tokenizer" / "weights.pt").is_file()
