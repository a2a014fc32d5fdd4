"""A loss that goes back to where it began is said; a step whose loss jumps is left out, wholly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stage1_tokenizer.training import loss_watch
from stage1_tokenizer.training.loss_watch import STAYS, WINDOW, CollapseWatch, SpikeSkip
from tests.killed_run import differing
from tests.tiny_run import TinyLit, checkpoint, fresh, run

__all__ = ["fresh"]


def looks(watch: CollapseWatch, *windows: float) -> list[str]:
    """What is said of windows of losses around these levels."""
    noise = torch.linspace(-0.05, 0.05, WINDOW).tolist()
    return [watch.look([level * (1 + n) for n in noise], WINDOW * (i + 1)) for i, level in enumerate(windows)]


def test_a_loss_that_goes_back_to_where_it_began_and_stays_is_said_once() -> None:
    said = looks(CollapseWatch(), 1.0, 0.8, 0.7, *[1.0] * (STAYS + 3))
    assert [bool(s) for s in said].index(True) == 2 + STAYS and sum(map(bool, said)) == 1
    assert f"back at 1 since step {3 * WINDOW};" in said[2 + STAYS] and "fell from 0.954 to 0.7" in said[2 + STAYS]


@pytest.mark.parametrize(
    "levels",
    [[1.0] * 12, [1.0, 0.8, 0.7, *[0.85] * 9], [1.0, 0.7, 1.0, 1.0, 0.7, 1.0, 1.0, 0.7], [1, 0.96, *[1.0] * 9]],
)
def test_other_courses_are_not(levels: list[float]) -> None:
    """A fit that learns nothing yet, one that gets worse for a while, one that wavers, noise."""
    assert not any(looks(CollapseWatch(), *levels))


def test_networks_that_die_in_a_fit_are_said_also_across_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loss_watch, "WINDOW", 5)
    step = TinyLit.training_step

    def dying(self: Any, batch: Any, batch_idx: int) -> Any:
        level = 1.0 if self.global_step < 5 or self.global_step >= 15 else 0.5
        return {**step(self, batch, batch_idx), "pixel": torch.tensor(level)}

    monkeypatch.setattr(TinyLit, "training_step", dying)
    run(tmp_path / "parts", "--trainer.max_steps=22")
    assert "collapsed" not in capsys.readouterr().out
    run(tmp_path / "parts", "--trainer.max_steps=40", "--resume=auto")
    out = capsys.readouterr().out
    assert out.count("collapsed: the loss fell from 1 to 0.5 and has been back at 1 since step 15;") == 1, out


def spiked(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    step = TinyLit.training_step

    def jumping(self: Any, batch: Any, batch_idx: int) -> Any:
        parts = step(self, batch, batch_idx)
        return {**parts, "loss": parts["loss"] * (1000 if self.global_step == at else 1)}

    monkeypatch.setattr(TinyLit, "training_step", jumping)


def test_a_step_whose_loss_jumps_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spiked(monkeypatch, at=6)
    words = ["--spike.factor=20", "--spike.window=4"]
    run(tmp_path / "six", "--trainer.max_steps=6", *words)
    assert "skipped step" not in capsys.readouterr().out
    run(tmp_path / "seven", "--trainer.max_steps=7", *words)
    assert capsys.readouterr().out.count("skipped step 6:") == 1
    six, seven = checkpoint(tmp_path / "six"), checkpoint(tmp_path / "seven")
    assert seven["global_step"] == 7
    weights = {name: value for name, value in seven["state_dict"].items() if name != "net.count"}
    assert differing({k: six["state_dict"][k] for k in weights}, weights) == []
    assert differing(six["optimizer_states"][0]["state"], seven["optimizer_states"][0]["state"]) == []
    run(tmp_path / "none", "--trainer.max_steps=7")  # a control: without the option the spike is learned from
    assert differing(weights, {k: v for k, v in checkpoint(tmp_path / "none")["state_dict"].items() if k in weights})
    run(tmp_path / "six", "--trainer.max_steps=7", "--resume=auto", *words)
    assert differing(seven["state_dict"], checkpoint(tmp_path / "six")["state_dict"]) == []


def test_a_level_that_stays_is_learned_again() -> None:
    """Half a window of losses later the median is the new level."""
    skip, seen = SpikeSkip(3.0, 10), []
    trainer: Any = type("T", (), {"strategy": type("S", (), {"reduce": lambda s, x, reduce_op: x})()})()
    trainer.is_global_zero, trainer.global_step = False, 0
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight])
    for level in [1.0] * 10 + [10.0] * 10:
        weight.grad = torch.ones(1)
        skip.on_before_backward(trainer, None, torch.tensor(level))  # type: ignore[arg-type]
        skip.on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
        seen.append(weight.grad is None)
    assert seen == [False] * 10 + [True] * 5 + [False] * 5


@pytest.mark.parametrize("words", [["--spike.factor=1"], ["--spike.factor=.nan"], ["--spike.window=1"]])
def test_odd_options_are_refused(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "--trainer.max_steps=1", *words)
    assert "got spike.factor=" in capsys.readouterr().err
