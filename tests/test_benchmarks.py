"""The benchmark's own measure: FLOPs against counts by hand, medians, and a table with every row."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from data.__main__ import main as data_main
from tests.benchmarks import bench_tokenizers
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


@pytest.mark.slow
def test_tokenizers_are_compared_on_their_own_clocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prepare", "--source", "scenes", "--num", "120", "--val-fraction", "0.2", "--workers", "1"]
    assert data_main([*arguments, "--out", str(tmp_path / "data")]) == 0
    configs = Path(__file__).resolve().parent.parent / "configs"
    files = [str(configs / "stage1" / "demo.yaml"), str(configs / "variants" / "no_text.yaml")]
    options = [f"--data.data_dir={tmp_path / 'data'}", "--data.batch_size=4"]
    one, two = (bench_tokenizers.Contender(files[: i + 1], options, 3.0, seed=0) for i in (0, 1))
    assert one.tokenizer.text is not None and two.tokenizer.text is None
    for contender in (one, two):
        contender.data.setup("fit")
    data = one.data.arrays("train")
    captions = [c[-1] for c in data["captions"]]
    order = torch.randperm(len(captions))
    for contender in (one, two):
        contender.prepare(data["images"], captions)
    one.train(data["images"], captions, order, until=0.3)
    assert one.spent >= 0.3 and one.steps > 0 and (two.spent, two.steps) == (0.0, 0)
    assert one.optimizer.param_groups[0]["lr"] < one.rates[0], "still warming up"
    before = [p.detach().clone() for p in one.tokenizer.parameters()]
    values = one.measure(data["images"][:8], [1, 16])
    assert len(values) == 2 and one.found == [(one.spent, values)]
    assert all(torch.equal(a, b) for a, b in zip(before, one.tokenizer.parameters(), strict=True)), "its own again"
    one.found = [(10.0, [0.0, 20.0]), (20.0, [0.0, 24.0])]
    assert one.seconds_to(22.0) == 15.0 and one.seconds_to(25.0) is None and one.seconds_to(19.0) == 10.0
    shorter = ["--seconds", "1", "--turn", "0.5", "--val_images", "8", *(f"--option={option}" for option in options)]
    bench_tokenizers.main([*shorter, "--contender", files[0], "--contender", *files])
    lines = capsys.readouterr().out
    assert "demo+no_text" in lines and "PCA, [1, 2, 4, 8, 16] latents of 16" in lines and "dB, seconds: " in lines
