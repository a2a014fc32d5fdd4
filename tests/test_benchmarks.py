"""The benchmark's own measure: FLOPs against counts by hand, ratios of turns, and a table with every row."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from data.__main__ import main as data_main
from stage1_tokenizer import FSQBottleneck, LinearPath, RateBottleneck, Tokenizer
from stage1_tokenizer.evaluation.attributes import Slots
from stage1_tokenizer.evaluation.classifier import AttributeClassifier
from tests.benchmarks import (
    bench_codes,
    bench_rate,
    bench_scaling_law,
    bench_soak,
    bench_tokenizers,
    gpu,
    sampling,
    scaling,
)
from tests.benchmarks.__main__ import main
from tests.benchmarks.designs import SIZES, millions, our_design, titok_design
from tests.benchmarks.machine import Machine
from tests.benchmarks.measure import Contender, Row, compete, count_flops, matmul_peak, peak_memory, table
from tests.benchmarks.models import OURS, TITOK, Bench
from tests.tiny import WIDTH, C, K, tiny_tokenizer

CPU = torch.device("cpu")


def test_flops_of_a_product_and_of_attention_with_its_backward() -> None:
    a, b = torch.randn(8, 16), torch.randn(16, 32)
    assert count_flops(lambda: a @ b) == 2 * 8 * 16 * 32
    q = torch.randn(2, 3, 10, 4, requires_grad=True)
    forward = 2 * (2 * 2 * 3 * 10 * 10 * 4)  # two products
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == 3 * forward


def test_rows_are_consistent_with_themselves_and_with_each_other() -> None:
    a = torch.randn(128, 128)
    calls: list[int] = []

    def products(n: int) -> None:
        calls.append(n)
        for _ in range(n):
            a @ a

    contenders = {"one": Contender(lambda: products(400), 4), "four": Contender(lambda: products(100), 4)}
    one, four = compete("x", contenders, torch.float32, torch.device("cpu"), turns=3)
    assert calls == [400, 100] * 5, "counted, weighed, then in turns"
    assert one.flops_per_image == 400 * 2 * 128**3 / 4 and four.flops_per_image == one.flops_per_image / 4
    assert one.ratio == 1.0 and 2 < four.ratio < 8 and four.baseline == "one"
    assert abs(one.images_per_second * one.milliseconds - 4000) < 1e-6
    many = compete("x", {"one": Contender(lambda: products(400), 4, scale=10.0)}, torch.float32, CPU, turns=1)[0]
    assert many.flops_per_image == 10 * one.flops_per_image and many.milliseconds > 3 * one.milliseconds


def test_memory_is_what_a_call_needs_at_once() -> None:
    n = 8_000_000  # 32 MB a tensor
    one, two = (peak_memory(call, CPU) for call in (lambda: torch.ones(n), lambda: torch.ones(n) + torch.ones(n)))
    if one == two == 0:
        pytest.skip("this system does not tell")
    assert abs(one - 4 * n) < 4e6 and abs(two - 12 * n) < 8e6


def test_growth_is_told_from_jumps_and_from_what_warms_up() -> None:
    minutes = [i / 6 for i in range(120)]
    flat = [100.0 + 30 * (i % 7 == 0) for i in range(120)]  # a collection of garbage now and then
    assert abs(bench_soak.slope(minutes, flat)) < 1e-9
    assert bench_soak.slope(minutes, [x + 2 * t for x, t in zip(flat, minutes, strict=True)]) == pytest.approx(
        2, abs=0.1
    )
    counts = dict.fromkeys(bench_soak.COUNTS, 1.0)
    notes = [counts | {"part": "page", "minutes": t, "megabytes": 50 + min(t, 5) * 10} for t in minutes]
    found = bench_soak.summary(notes, "page", warm=6)
    assert found["megabytes_a_minute"] == 0 and found["files"] == [[1, 1], [1, 1]]
    assert bench_soak.summary(notes, "page", warm=0)["megabytes_a_minute"] > 1


def test_a_power_law_is_found_through_the_runs_that_no_cheaper_one_beats() -> None:
    runs = [bench_scaling_law.Run("stage 1", 64, n, 1e9 * n, 3 * n**-0.2, 9 / n) for n in (1, 2, 4, 8)]
    worse = [bench_scaling_law.Run("stage 1", 96, n, 3e9 * n, 3 * n**-0.2, 9 / n) for n in (1, 2)]
    assert bench_scaling_law.frontier([*worse, *runs], "loss") == runs
    a, b, error, left = bench_scaling_law.power_law([run.flops for run in runs], [run.loss for run in runs])
    assert b == pytest.approx(0.2) and a == pytest.approx(3 * 1e9**0.2) and max(error, left) < 1e-6


def test_peak_is_positive_and_the_table_has_every_row() -> None:
    assert matmul_peak(torch.float32, CPU, repeats=2) > 1e8
    rows = [
        Row("encode", name, 1, 1.0, 1000.0, 2e6, share, 0, ratio, "a")
        for name, share, ratio in (("a", 0.5, 1.0), ("b", 0.25, 1.5))
    ]
    text = table(rows)
    assert "encode" in text and "baseline" in text and "25%" in text and "1.50" in text and len(text.splitlines()) == 4


def test_designs_have_as_many_parameters_and_ours_fewer_products() -> None:
    for name, size in SIZES.items():
        with torch.device("meta"):
            titok, ours = titok_design(size), our_design(size)
        assert abs(millions(ours) / millions(titok) - 1) < 0.1, name
    small = SIZES["demo"]
    bench = Bench(CPU)
    for contest, contenders in bench.designs("demo", small, 2):
        flops = {name: count_flops(contender.function) for name, contender in contenders.items()}
        assert flops[OURS] < flops[TITOK], contest


def test_the_bench_measures_in_ratios_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--only", "tokenizer", "--turns", "1", "--sizes", "demo", "--demo_batch", "2"]
    main([*options, "--out", str(tmp_path / "bench.json")])
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [row["contest"].split(",")[0] for row in content["rows"]] == ["encode"] * 4 + ["decode"] * 3 + [
        "training step"
    ] * 3
    assert {row["baseline"] for row in content["rows"]} == {TITOK}
    assert content["setting"]["matmul_peak_flops"] > 0 and "baseline" in capsys.readouterr().out


def test_prior_contests_begin_with_mars_way() -> None:
    (sample, samplers), (step, _) = Bench(CPU).priors(2, 2)
    assert next(iter(samplers)) == "MAR-style head, 100 steps" and OURS in samplers and "training" in step
    assert samplers[OURS].function().shape == (2, 16, 16), sample


def test_scaling_is_drawn(tmp_path: Path) -> None:
    def rows(value: int) -> list[Row]:
        names = [(verb, name) for verb in scaling.VERBS for name in (OURS, TITOK)]
        return [Row(verb, name, 2, 1.0, 1000.0 / value, 2e6, 0.5, 10**6, 1.0, TITOK) for verb, name in names]

    scaling.plot({"latents": {8: rows(8), 32: rows(32)}}, 1e-3, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_codes_are_compared_at_the_bits_that_they_cost() -> None:
    train, images = bench_rate.pictures(None, 600, 100)
    path = LinearPath(bench_rate.SIDE, bench_rate.K, bench_rate.C)
    path.fit(train)
    rate = RateBottleneck(bench_rate.WIDTH, bench_rate.K, bench_rate.C, bits=594)
    bits, ours = bench_rate.code(path, rate, images)
    symbols, theirs = bench_rate.code(path, FSQBottleneck(bench_rate.WIDTH, bench_rate.K, (5,) * bench_rate.C), images)
    assert abs(bits / symbols - 1) < 0.1 and symbols == pytest.approx(256 * 2.3219, rel=1e-3)
    assert ours > theirs + 2


def test_trained_codes_are_read_as_their_receiver_gets_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["prepare", "--source", "scenes", "--num", "60", "--size", "16", "--val-fraction", "0.4", "--workers", "1"]
    assert data_main([*words, "--out", str(tmp_path / "data")]) == 0
    for name in ("noisy", "symbols"):
        tokenizer = tiny_tokenizer()
        if name == "symbols":
            tokenizer.bottleneck = FSQBottleneck(WIDTH, K, (5,) * C)
        parts = (tokenizer.image_size, tokenizer.encoder, tokenizer.bottleneck, tokenizer.decoder, tokenizer.lengths)
        Tokenizer(*parts).save_pretrained(tmp_path / name / "tokenizer")
    nats = {"nats_per_latent": 2.0, "by_position": [2.0] * K}
    generated = {"cost": {"seconds_per_image": 1.0, "evaluations_per_latent": 8}, "faithfulness": {}, "nll": nats}
    (tmp_path / "symbols" / "generation").mkdir()
    report = generated | {"distances": {"generated_real": {}, "real_real": 1.0}}
    (tmp_path / "symbols" / "generation" / "metrics.json").write_text(json.dumps(report))
    runs = [word for name in ("noisy", "symbols") for word in (name, str(tmp_path / name))]
    slots = Slots({"layout": ["one", "two"]})  # an untrained reader: what it reads is not asked here
    reader = AttributeClassifier(slots, 16).eval()
    monkeypatch.setattr(bench_codes, "report_classifier", lambda data, folder: reader)
    monkeypatch.setattr(reader, "targets", lambda samples: torch.zeros(len(samples["images"]), 1))
    bench_codes.main(["--data", str(tmp_path / "data"), "--runs", *runs, "--held_out", "20"])
    noisy, symbols = (json.loads(line) for line in capsys.readouterr().out.splitlines() if '"name"' in line)
    assert symbols["psnr"] == symbols["psnr_of_means"] and noisy["psnr"] != noisy["psnr_of_means"]
    assert symbols["bits"] == pytest.approx(K * C * math.log2(5)) and noisy["bits"] > 0
    assert symbols["prior_bits"] == pytest.approx(2 * K / math.log(2)) and "prior_bits" not in noisy
    std = torch.tensor([1.0, 2.0]).expand(3, 5, 2)
    wanted = 5 * (math.log(2 * math.pi * math.e) + math.log(2))  # of two normals, five times
    assert bench_codes.nats_of_noise(std) == pytest.approx(wanted)


def test_shares_of_a_sample_are_those_of_its_parts() -> None:
    one, sets = (sampling.split(Machine(CPU), order, 2, 1) for order in sampling.ORDERS.values())
    for taken in (one, sets):
        parts = [taken[part] for part in sampling.PARTS]
        assert min(parts) > 0 and sum(parts) < taken["all"]
    assert sets["transformer"] < one["transformer"]


@pytest.mark.slow
def test_the_gpu_script_runs_with_torch_alone(tmp_path: Path) -> None:
    names = ["lightning", "jsonargparse", "webdataset", "open_clip", "timm", "torchvision", "matplotlib", "PIL"]
    names += ["safetensors", "huggingface_hub", "yaml", "scipy"]
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.json")]
    program = f"import sys; sys.modules |= dict.fromkeys({names}); from tests.benchmarks.gpu import main; "
    done = subprocess.run(
        [sys.executable, "-c", f"{program} sys.exit(main({arguments}))"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert len(content["agreement"]) == 6 and all(finding["right"] for finding in content["agreement"])
    assert [len(content[section]) for section in ("machine", "step", "sample")] == [3, 3, 2]


def test_a_path_that_is_wrong_or_fails_is_found() -> None:
    wanted = torch.ones(3)
    assert gpu.agrees("right", lambda: wanted + 1e-4, wanted, 1e-3)["right"]
    assert not gpu.agrees("wrong", lambda: 1.1 * wanted, wanted, 1e-3)["right"]
    assert "no kernel" in gpu.agrees("fails", no_kernel, wanted, 1e-3)["failed"]


def no_kernel() -> torch.Tensor:
    raise RuntimeError("no kernel image")


def test_an_option_that_measures_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--turns", "0"])
    assert "give 1 or more" in capsys.readouterr().err


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
    got = one.measure(data["images"][:8], captions[:8], [1, 16])
    assert len(got.psnr) == len(got.found) == 2 and one.found == [got] and got.seconds == one.spent
    assert two.measure(data["images"][:8], captions[:8], [1, 16]).found == [], "knows no captions"
    assert all(torch.equal(a, b) for a, b in zip(before, one.tokenizer.parameters(), strict=True)), "its own again"
    one.found = [bench_tokenizers.Measured(10.0, [0.0, 20.0], []), bench_tokenizers.Measured(20.0, [0.0, 24.0], [])]
    times = [one.seconds_to(level, lambda measured: measured.psnr[-1]) for level in (22.0, 25.0, 19.0)]
    assert times == [15.0, None, 10.0]
    shorter = ["--seconds", "1", "--turn", "0.5", "--val_images", "8", *(f"--option={option}" for option in options)]
    kept = tmp_path / "out" / "times.json"
    again = ["--contender", files[0], "--adamw", "2", "--out", str(kept)]
    bench_tokenizers.main([*shorter, "--contender", files[0], *again])
    lines = capsys.readouterr().out
    assert "demo+AdamW" in lines and "PCA, [1, 2, 4, 8, 16] latents of 16" in lines
    assert "to PSNR " in lines and "to R@1 " in lines
    assert set(json.loads(kept.read_text())) == {"demo", "demo+AdamW"}
    assert {path.name for path in kept.parent.iterdir()} == {"times.json", "times_PSNR.png", "times_R1.png"}
