"""The live page: there after the first step, renewed, still at the end; loggers get its pictures; training is equal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stage1_tokenizer.training.live import LivePage
from stage1_tokenizer.training.metrics_file import read_metrics
from tests.tiny_run import TinyLit, checkpoint, fresh, run

__all__ = ["fresh"]
LIVE = ["--live.every_n_steps=3", "--live.pictures=2", "--ema.decay=0.5"]


def test_the_page_is_there_after_the_first_step_and_is_renewed(tmp_path: Path) -> None:
    seen: dict[int, str] = {}

    def remember(step: int) -> None:
        page = tmp_path / "live.html"
        seen[step] = page.read_text() if page.is_file() else ""

    TinyLit.on_step = remember
    fitted = run(tmp_path, "--trainer.max_steps=8", *LIVE, "--model.lr=3.0")
    assert seen[0] == "" and [f"after {n} steps" in seen[n] for n in (1, 2, 3, 4, 5, 6, 7)].count(True) == 3
    assert all("after 1 steps" in seen[n] for n in (1, 2)) and "after 3 steps" in seen[3]
    assert 'http-equiv="refresh"' in seen[7]
    last = (tmp_path / "live.html").read_text()
    assert "after 8 steps" in last and 'http-equiv="refresh"' not in last
    average = fitted.trainer.callbacks
    ema = next(c.ema for c in average if getattr(c, "ema", None) is not None)
    weight = dict(zip(ema.names, ema.averages, strict=True))["0.weight"][:4, :4].tanh()
    with Image.open(tmp_path / "live.png") as sheet:
        assert sheet.size == (2 * 4 * 16 + 2 * 16, 4 * 16)
        level = sheet.convert("RGB").getpixel((8, 8))
    assert isinstance(level, tuple) and abs(level[0] - float(weight[0, 0] + 1) * 127.5) <= 1, "averaged weights"
    own = fitted.model.net[0].weight[0, 0].tanh()
    assert abs(float(own - weight[0, 0])) * 127.5 > 3, "which are not the last ones"


def test_training_is_the_same_to_the_last_bit_with_and_without_it(tmp_path: Path) -> None:
    for name, options in (("with", LIVE), ("without", ["--ema.decay=0.5"])):
        run(tmp_path / name, "--trainer.max_steps=7", *options)
    one, other = (checkpoint(tmp_path / name)["state_dict"] for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "without" / "live.html").exists()


def test_tensorboard_gets_figures_and_pictures_beside_the_csv(tmp_path: Path) -> None:
    kind = "--trainer.logger=TensorBoardLogger"
    run(
        tmp_path,
        "--trainer.max_steps=4",
        *LIVE,
        kind,
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.logger.name=tb",
    )
    events = EventAccumulator(str(next((tmp_path / "tb").glob("version_0"))))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2, 3]
    assert [event.step for event in events.Images("pictures")] == [1, 3, 4]
    assert len([row for row in read_metrics(tmp_path / "stage1" / "metrics.csv") if "loss" in row]) == 4


def test_weights_and_biases_gets_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its logger's own method, which a stand-in has here: the package needs an account."""
    logged: list[tuple[str, int, Any]] = []
    monkeypatch.setattr(
        "stage1_tokenizer.training.metrics_file.MetricsFile.log_image",
        lambda self, key, images, step: logged.append((key, step, images[0].size)),
        raising=False,
    )
    run(tmp_path, "--trainer.max_steps=2", *LIVE)
    assert logged == [("pictures", 1, (160, 64)), ("pictures", 2, (160, 64))]


def test_no_logger_and_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--trainer.max_steps=1", "--trainer.logger=false")
    assert not (tmp_path / "stage1" / "metrics.csv").exists()
    with pytest.raises(ValueError, match=r"live.every_n_steps=-1"):
        LivePage(-1)
