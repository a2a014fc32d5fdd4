"""The closing lines of a run: five with everything measured, fewer without, one sentence where a report is missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from stage2_prior.evaluation import summary


def metrics() -> dict[str, dict[str, Any]]:
    read = {"1": {"all": 0.5}, "16": {"all": 0.94}}
    recall = {"1": {"1": 0.6, "5": 0.9}, "16": {"1": 0.7, "5": 0.9}}
    reconstruction = {
        "prefix_lengths": [1, 16],
        "psnr": {"1": 28.3, "16": 35.5},
        "pca": {"psnr": {"1": 22.6, "16": 31.2}},
        "classifier": {"reconstruction": read, "pca": read, "real": {"all": 0.999}},
        "retrieval": {"n": 1000, "long": {"chance": {"1": 0.002}, "recall": recall}},
    }
    generation = {
        "cost": {"guidance": 2.0, "images_per_second": 431.0},
        "faithfulness": {"2.0": {"all": 0.91, "1 object": 0.97, "all, without shapes": 0.99}},
        "distances": {
            "features": "attributes", "n": 1000, "real_real": 16.2, "reconstruction_real": 7.5,
            "generated_real": {"2.0": 8.0},
        },
        "latents": {"2.0": {"lowest": 0.96, "highest": 1.04}},
    }  # fmt: skip
    return {"reconstruction": reconstruction, "generation": generation}


def write(run_dir: Path, content: dict[str, dict[str, Any]]) -> None:
    for report, values in content.items():
        (run_dir / report).mkdir()
        (run_dir / report / "metrics.json").write_text(json.dumps(values))


def test_both_pages_and_five_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, metrics())
    assert summary.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("report.html") == 2 and out.count("\n* ") == 5
    for figure in ("1: 28.3 (+5.7)", "94.0%", "60.0% among 1000 (300 times chance)", "1 object 0.970", "431 images/s"):
        assert figure in out
    assert "without shapes" not in out and "on 624 captions" not in out


def test_figures_of_the_same_captions_stand_beside_each_other(tmp_path: Path) -> None:
    generation = metrics()["generation"]
    same = {"n": 624, "generated_real": {"2.0": 16.4}, "reconstruction_real": 10.1, "real_real": 9.7}
    generation["distances"]["same_captions"] = same
    line = summary.generation_lines(generation)[-1]
    assert "on 624 captions of training pictures 16.4, of other pictures with these captions 10.1 reconstructed" in line


def test_what_was_not_measured_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = metrics()
    del content["reconstruction"]["classifier"], content["reconstruction"]["retrieval"]
    del content["generation"]["faithfulness"]
    write(tmp_path, content)
    assert summary.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n* ") == 2


def test_a_missing_report_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main([str(tmp_path)]) == 1
    assert "python -m stage1_tokenizer test" in capsys.readouterr().err
