"""What breaks from outside loses nothing and says so: kills, damaged files, signals, a full disk, a jumping clock."""

import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from stage1_tokenizer.training.checkpoint_file import UnwritableError, is_whole, writing
from tests import tiny_run
from tests.killed_run import differing
from tests.tiny_run import TinyLit, checkpoint, fresh, run

__all__ = ["fresh"]  # a fixture that every test here uses
EACH = "--checkpoint.every_n_steps=1"


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, Any]:
    """The last checkpoint of an undisturbed fit of seven steps."""
    run(tmp_path / "whole", "--trainer.max_steps=7", EACH)
    TinyLit.seen = []
    return checkpoint(tmp_path / "whole")


def goes_on(folder: Path, whole: dict[str, Any]) -> None:
    """Resume what is in `folder` to the end; it must be the undisturbed fit, to the last bit."""
    TinyLit.on_step = None
    run(folder, "--trainer.max_steps=7", EACH, "--resume=auto")
    assert differing(whole, checkpoint(folder)) == []


@pytest.mark.slow
def test_a_fit_that_is_killed_ends_with_the_weights_of_an_undisturbed_one() -> None:
    root = Path(__file__).resolve().parents[3]
    words = ["-m", "tests.killed_run", "--kills", "3", "--steps", "8", "--seed", str(time.time_ns() % 1000)]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["stage"] for result in results] == ["stage1", "stage2"]
    for result in results:
        assert result["kills"] == 3 and result["differing"] == [] and result["left_over"] == [], result


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path) -> None:
    """One bit of a tensor."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"].numpy().tobytes()
    content[content.index(weight) + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, whole: dict[str, Any], damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "parts", "--trainer.max_steps=4", EACH)
    folder = tmp_path / "parts" / "stage1" / "checkpoints"
    damage(folder / "last.ckpt")
    if damage is flip:
        torch.load(folder / "last.ckpt", weights_only=True)  # torch does not notice it
    capsys.readouterr()
    goes_on(tmp_path / "parts", whole)
    assert f"damaged: last.ckpt; going on from {folder / 'previous.ckpt'}" in capsys.readouterr().out
    for name in ("last.ckpt", "previous.ckpt"):
        damage(folder / name)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", "--resume=auto")
    assert "all 2 checkpoints" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", f"--resume={folder / 'last.ckpt'}")
    assert "which is damaged" in capsys.readouterr().err


def test_any_flipped_bit_of_the_tensors_is_noticed(tmp_path: Path) -> None:
    path, values = tmp_path / "a.ckpt", torch.randn(1000)
    torch.save({"values": values, "other": torch.arange(9)}, path)
    content = path.read_bytes()
    assert is_whole(path)
    start = content.index(values.numpy().tobytes())
    for _ in range(50):
        broken = bytearray(content)
        broken[start + random.randrange(4000)] ^= 1 << random.randrange(8)
        path.write_bytes(broken)
        assert not is_whole(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_terminated_fit_saves_exits_with_0_and_goes_on_exactly(
    tmp_path: Path, whole: dict[str, Any], number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    TinyLit.on_step = lambda step: os.kill(os.getpid(), number) if step == 3 else None
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "parts", "--trainer.max_steps=7")
    assert stopped.value.code == 0 and "saved at step 4" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert not (tmp_path / "parts" / "tokenizer").exists()
    goes_on(tmp_path / "parts", whole)


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, whole: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "parts" / "stage1" / "checkpoints"
    TinyLit.on_step = lambda step: os.symlink("/dev/full", folder / "last.part") if step == 3 else None
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "parts", "--trainer.max_steps=7", EACH)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "No space left on device" in error and error.count("\n") == 1
    assert not (folder / "last.part").exists() and checkpoint(tmp_path / "parts")["global_step"] == 3
    goes_on(tmp_path / "parts", whole)


def test_every_file_of_a_run_says_which_it_is_when_the_disk_is_full(tmp_path: Path) -> None:
    with pytest.raises(UnwritableError, match="cannot write .*a.csv .No space left"), writing(tmp_path / "a.csv"):
        Path("/dev/full").write_text("1")
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path / "a.csv"):
        raise RuntimeError("another")


def test_a_killed_worker_of_a_loader_is_one_sentence(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    item = tiny_run.Numbers.__getitem__

    def deadly(self: Any, i: int) -> dict[str, Any]:
        if get_worker_info() is not None and i == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(tiny_run.Numbers, "__getitem__", deadly)
        patch.setattr(tiny_run, "DataLoader", functools.partial(DataLoader, num_workers=1))
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path / "parts", "--trainer.max_steps=7", EACH)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "worker process was killed" in error and error.strip().count("\n") == 0


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = itertools.cycle([0.0, -1e9, 4e9])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    run(tmp_path / "parts", "--trainer.max_steps=7", EACH)
    assert differing(whole, checkpoint(tmp_path / "parts")) == []
