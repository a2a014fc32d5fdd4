"""Groups of runs beside each other: means, spreads, differences, and what is missing."""

import json
from pathlib import Path

import pytest

from stage2_prior.__main__ import main as command
from stage2_prior.evaluation.compare import figures_of, main

Metrics = dict[str, object]


def run(folder: Path, psnr: float, generation: Metrics | None = None) -> str:
    for name, metrics in (
        ("reconstruction", {"psnr": {"1": psnr, "2": None}, "note": "x"}),
        ("generation", generation),
    ):
        if metrics is not None:
            (folder / name).mkdir(parents=True)
            (folder / name / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_groups_are_summed_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = [run(tmp_path / f"a{i}", psnr) for i, psnr in enumerate((30.0, 31.0, 32.0))]
    plain = [run(tmp_path / "b0", 33.0, {"nll": {"nats_per_latent": 14.5}}), run(tmp_path / "b1", 34.0)]
    out = tmp_path / "out"
    assert command(["compare", "--out", str(out), "--runs", "text", *text, "--runs", "plain", *plain]) == 0
    written = json.loads((out / "metrics.json").read_text())
    assert written["runs"] == {"text": text, "plain": plain}
    psnr = written["figures"]["reconstruction.psnr.1"]
    assert psnr["text"] == {"mean": 31.0, "std": 1.0, "n": 3}
    assert psnr["plain"] == {"mean": 33.5, "std": pytest.approx(0.5**0.5), "n": 2}
    assert written["figures"]["generation.nll.nats_per_latent"] == {
        "text": None,
        "plain": {"mean": 14.5, "std": None, "n": 1},
    }
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert printed[1] == "reconstruction.psnr.1 31 ± 1 33.5 ± 0.707 +2.5"
    assert printed[2] == "generation.nll.nats_per_latent – 14.5 (n = 1 of 2) –"
    page = (out / "report.html").read_text()
    assert "33.5 ± 0.707" in page and "+2.5" in page and text[2] in page
    assert "reconstruction.psnr.2" not in page  # not finite, hence null: not measured


def test_other_figures_can_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = run(tmp_path / "a", 30.0, {"cost": {"images_per_second": 7, "guided": True}})
    assert figures_of(Path(one)) == {"reconstruction.psnr.1": 30.0, "generation.cost.images_per_second": 7.0}
    assert main(["--out", str(tmp_path / "out"), "--runs", "a", one, "--figures", "generation.cost.*"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["generation.cost.images_per_second", "7"]


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, out = run(tmp_path / "a", 30.0), ["--out", str(tmp_path / "out")]
    for wrong, message in (
        (["--runs", "a", str(tmp_path / "nowhere")], "stage1_tokenizer test"),
        (["--runs", "a", one, "--figures", "psnr"], "none of the figures psnr"),
        (["--runs", "a"], "at least one run folder"),
        (["--runs", "a", one, "--runs", "a", one], "a name of its own"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*out, *wrong])
        assert stop.value.code in (1, 2) and message in capsys.readouterr().err
