"""metrics.csv: rows are there at once, a later fit continues them, columns grow, other readers understand it."""

from pathlib import Path

import pandas

from stage1_tokenizer.training.metrics_file import MetricsFile, read_metrics


def test_a_later_fit_and_a_later_metric_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "stage1" / "metrics.csv"
    first = MetricsFile(path)
    first.log_metrics({"loss": 2.5, "epoch": 0}, 1)
    assert [row["loss"] for row in read_metrics(path)] == [2.5], "on disk when it is logged"
    first.log_metrics({"val/psnr_1": 20.0}, 1)
    first.log_metrics({"loss": float("nan")}, 2)
    second = MetricsFile(path)
    second.log_metrics({"loss": 1.0, "new, with a comma": 7.0}, 3)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 1, 2, 3]
    assert "loss" not in rows[1] and rows[2]["loss"] != rows[2]["loss"]
    assert rows[3]["new, with a comma"] == 7.0 and "new, with a comma" not in rows[0]
    table = pandas.read_csv(path)
    assert list(table.columns)[:4] == ["step", "time", "loss", "epoch"] and table["loss"].iloc[-1] == 1.0


def test_a_row_that_a_killed_process_left_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    MetricsFile(path).log_metrics({"loss": 1.0}, 1)
    with path.open("a") as file:
        file.write("2,17642")
    assert len(read_metrics(path)) == 1
    MetricsFile(path).log_metrics({"loss": 3.0}, 2)
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 3.0]
