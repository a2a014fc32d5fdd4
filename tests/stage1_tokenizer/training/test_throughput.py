"""The share of the peak: operations of a step over those of a product of matrices; counting changes no weight."""

from pathlib import Path

import pytest
import torch

from stage1_tokenizer.training import throughput
from stage1_tokenizer.training.metrics_file import read_metrics
from tests.tiny_run import checkpoint, fresh, run

__all__ = ["fresh"]
OPERATIONS = 5 * 2 * 4 * 4 * 8  # two layers, forward and backward, but no gradient of the input; AdamW has no products
EVERY = ["--trainer.max_steps=20", "--trainer.log_every_n_steps=4"]


def test_operations_a_second_over_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "matmul_peak", lambda device: 1e12)
    run(tmp_path / "counted", *EVERY, "--throughput.share_of_peak=true")
    lines = read_metrics(tmp_path / "counted" / "stage1" / "metrics.csv")
    told = [line for line in lines if "throughput/steps_per_s" in line]
    operations = [1e12 * line["throughput/share_of_peak"] / line["throughput/steps_per_s"] for line in told]
    assert len(told) == 3, "eight steps were counted and not timed"
    assert operations == pytest.approx([OPERATIONS] * 3, rel=1e-3)

    run(tmp_path / "alone", *EVERY)
    lines = read_metrics(tmp_path / "alone" / "stage1" / "metrics.csv")
    assert sum("throughput/steps_per_s" in line for line in lines) == 5
    assert not any("throughput/share_of_peak" in line for line in lines)
    counted, alone = (checkpoint(tmp_path / name)["state_dict"] for name in ("counted", "alone"))
    assert all(torch.equal(counted[name], alone[name]) for name in alone)


def test_what_cannot_be_counted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, *EVERY, "--throughput.share_of_peak=true", "--compile=true")
    assert "cannot be counted" in capsys.readouterr().err


def test_the_peak_is_that_of_products() -> None:
    assert 1e8 < throughput.matmul_peak(torch.device("cpu"), seconds=0.0) < 1e15
