"""The benchmark's own measure: FLOPs against counts by hand, medians, and a table with every row."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.benchmarks.__main__ import main
from tests.benchmarks.measure import Row, count_flops, matmul_peak, measure, table


def test_flops_of_a_product_and_of_attention_with_its_backward() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 32)
    assert count_flops(lambda: a @ b) == 2 * 8 * 16 * 32
    q = torch.randn(2, 3, 10, 4, requires_grad=True)
    forward = 2 * (2 * 2 * 3 * 10 * 10 * 4)  # two products
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 3 * forward


def test_a_row_is_consistent_with_itself() -> None:
    a = torch.randn(64, 64)
    calls = []
    row = measure("x", lambda: calls.append(a @ a), 4, 1e12, torch.device("cpu"), seconds=0.0)
    assert len(calls) == 5, "one warm-up, one count, three timings"
    assert row.flops_per_image == 2 * 64**3 / 4
    assert abs(row.flops_per_second / 1e12 - row.share_of_peak) < 1e-9 and row.images_per_second > 0
    assert abs(row.images_per_second * row.milliseconds - 4000) < 1e-6


def test_peak_is_positive_and_the_table_has_every_row() -> None:
    assert matmul_peak(torch.float32, torch.device("cpu"), repeats=4) > 1e8
    rows = [Row("encode", 1, 1.0, 1000.0, 2e6, 2e9, 0.5), Row("decode", 1, 1.0, 1000.0, 2e6, 2e9, 0.25)]
    text = table(rows)
    assert "encode" in text and "decode" in text and "25.0%" in text and len(text.splitlines()) == 3


@pytest.mark.slow
def test_the_demo_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seconds", "0", "--batch", "8", "--out", str(tmp_path / "bench.json")])
    content = json.loads((tmp_path / "bench.json").read_text())
    flops = {row["name"]: row["flops_per_image"] for row in content["rows"]}
    assert len(flops) == 5 and content["setting"]["matmul_peak_flops"] > 0
    assert flops["tokenizer step, with text"] > 3 * (flops["encode"] + flops["decode"])
    assert flops["sample and decode, guided"] > flops["decode"]
    assert "of peak" in capsys.readouterr().out


def test_a_config_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--name", "none"])
    assert "there is no config" in capsys.readouterr().err
