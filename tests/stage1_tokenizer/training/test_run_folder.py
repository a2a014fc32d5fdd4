"""What a fit leaves in its folder: metrics that append, its story, checkpoints, exports."""

import json
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from stage1_tokenizer.training import callbacks
from stage1_tokenizer.training.callbacks import NaNGuard, NonFiniteLossError, SharedCores, busy_sentence, seconds_waited
from stage1_tokenizer.training.ema import EMAWeights
from stage1_tokenizer.training.metrics_file import read_metrics
from tests.tiny_run import TinyLit, checkpoint, fresh, run

__all__ = ["fresh"]  # a fixture that every test here uses


def test_metrics_append_and_the_folder_tells_its_story(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=2")
    run(tmp_path, "--trainer.max_steps=4", "--resume=auto")
    lines = read_metrics(tmp_path / "stage1" / "metrics.csv")
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


def test_checkpoints_come_in_steps_and_hold_plain_objects(tmp_path: Path) -> None:
    run(tmp_path, "--trainer.max_steps=5", "--checkpoint.every_n_steps=2", "--checkpoint.keep_every=2")
    names = sorted(file.name for file in (tmp_path / "stage1" / "checkpoints").iterdir())
    assert names == ["last.ckpt", "previous.ckpt", "step=2.ckpt", "step=4.ckpt"]
    stored = checkpoint(tmp_path)
    assert stored["hyper_parameters"]["width"] == 8
    assert len(stored["random_states"]) == 1
    assert all("_orig_mod" not in name for name in stored["state_dict"])


def test_a_non_finite_loss_stops_with_step_keys_and_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--trainer.max_steps=6", "--model.lr=1e7", "--nan_guard.every_n_steps=3")
    error = capsys.readouterr().err
    assert "not finite at step 1 (loss nan, pixel nan)" in error
    assert f"key{TinyLit.seen[0][0]}" in error
    assert len(TinyLit.seen) == 3  # looked at every third step, not at every one
    assert not (tmp_path / "stage1" / "checkpoints" / "last.ckpt").exists()


def test_checkpoints_do_not_come_with_every_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    hook = lambda self, checkpoint: saved.append(checkpoint["global_step"])  # noqa: E731
    monkeypatch.setattr(TinyLit, "on_save_checkpoint", hook)
    run(tmp_path / "steps", "--trainer.max_steps=12")  # epochs of 5 batches
    assert set(saved) == {12}
    saved.clear()
    run(tmp_path / "epochs", "--trainer.max_epochs=2")
    assert set(saved) == {10}


def test_weights_that_are_not_finite_never_replace_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(self: Any, optimizer: Any) -> None:  # the loss of this step is finite, its gradient is not
        if self.global_step == 3:
            self.net[2].bias.grad.fill_(float("inf"))

    monkeypatch.setattr(TinyLit, "on_before_optimizer_step", overflow)
    with pytest.raises(SystemExit):
        run(tmp_path, "--trainer.max_steps=8", "--checkpoint.every_n_steps=2")
    error = capsys.readouterr().err
    assert "parameters are not finite at step 4, first net." in error and "lower learning rate" in error
    stored = checkpoint(tmp_path)
    assert stored["global_step"] == 2
    assert all(value.isfinite().all() for value in stored["state_dict"].values())
    assert [file.name for file in (tmp_path / "stage1" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_rank_stops_with_the_others(elsewhere: bool) -> None:
    asked: list[bool] = []

    def decide(found: bool, all: bool) -> bool:
        asked.append(found)
        return found or elsewhere

    trainer: Any = SimpleNamespace(
        world_size=2, global_step=7, strategy=SimpleNamespace(reduce_boolean_decision=decide)
    )
    guard = NaNGuard(every_n_steps=1)
    with pytest.raises(NonFiniteLossError, match="another rank") if elsewhere else nullcontext():
        guard.on_train_batch_end(trainer, None, {"loss": torch.zeros(())}, {}, 0)  # type: ignore[arg-type]
    assert asked == [False]
    with pytest.raises(NonFiniteLossError, match="at step 7"):
        guard.on_train_batch_end(trainer, None, {"loss": torch.tensor(torch.nan)}, {}, 0)  # type: ignore[arg-type]

    trainer.world_size = 1  # alone, nobody is asked
    guard.on_train_batch_end(trainer, None, {"loss": torch.zeros(())}, {}, 0)  # type: ignore[arg-type]
    assert asked == [False, True]


@pytest.mark.parametrize(("share", "lines"), [(0.6, 1), (0.1, 0)])
def test_a_run_that_waits_for_cores_says_so_once(
    share: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    waits = {"idle": lambda: 5.0, "worker": lambda: 3 + share * (time.perf_counter() - start)}
    monkeypatch.setattr(callbacks, "seconds_waited", lambda: {name: wait() for name, wait in waits.items()})
    trainer: Any = SimpleNamespace(is_global_zero=True, progress_bar_callback=None)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    watching = SharedCores(window=2)
    watching.on_train_start(trainer, module)
    for batch in range(8):
        time.sleep(0.01)
        watching.on_train_batch_end(trainer, module, None, None, batch)
    said = capsys.readouterr().out
    assert said.count("waits 60% of its time for a core") == lines and len(said.splitlines()) == lines
    assert "OMP_NUM_THREADS=1" in busy_sentence(0.5, 2) and "one thread already" in busy_sentence(0.5, 1)


def test_the_kernel_counts_what_each_thread_waited() -> None:
    if not (waited := seconds_waited()):
        pytest.skip("this kernel does not tell")
    assert str(threading.get_native_id()) in waited and min(waited.values()) >= 0
