"""The README's picture and table are made from run folders: what is there is shown, what is missing is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.__main__ import main as data_main
from stage1_tokenizer import Tokenizer
from stage2_prior import CausalPrior
from stage2_prior.evaluation.showcase import BEGIN, END, ShowcaseError, doubling, main, results_table
from tests.small_priors import awake, parts
from tests.tiny import SIZE, C, K, tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = ["prepare", "--source", "scenes", "--num", "60", "--size", str(SIZE), "--val-fraction", "0.5"]
    assert data_main([*words, "--workers", "1", "--out", str(folder / "data")]) == 0
    tokenizer: Tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    vocabulary, backbone, head = parts(K, C)
    prior = awake(CausalPrior(K, C, vocabulary, backbone, head))
    prior.bind(K, C, tokenizer.fingerprint)
    prior.save_pretrained(folder / "prior")
    return folder


def test_the_picture_is_the_same_every_time_and_has_ink(run: Path, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        assert main(["--run_dir", str(run), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.convert("L").tobytes()), dtype=torch.uint8)
    assert (pixels < 250).float().mean() > 0.2


def test_a_run_without_a_prior_shows_its_ladder(run: Path, tmp_path: Path) -> None:
    for name in ("data", "tokenizer"):
        (tmp_path / name).symlink_to(run / name)
    assert main(["--run_dir", str(tmp_path), "--out", str(tmp_path / "ladder.png")]) == 0
    main(["--run_dir", str(run), "--out", str(tmp_path / "both.png")])
    with Image.open(tmp_path / "ladder.png") as ladder, Image.open(tmp_path / "both.png") as both:
        assert ladder.width == both.width and ladder.height < 0.7 * both.height
        top = (0, 0, both.width, ladder.height // 2)
        assert ladder.crop(top).getextrema() == both.crop(top).getextrema()
    reconstruction, _ = figures()
    (tmp_path / "reconstruction").mkdir()
    (tmp_path / "reconstruction" / "metrics.json").write_text(json.dumps(reconstruction))
    assert results_table({"emoji": tmp_path}).count("\n") == 3, "two rows of the tokenizer under the head"


def test_prefixes_double_and_end_with_all() -> None:
    assert [doubling(k) for k in (1, 2, 6, 8, 24)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8], [1, 2, 4, 8, 16, 24]]


def figures() -> tuple[dict[str, Any], dict[str, Any]]:
    facts = {"commit": "0123456789abcdef", "date": "2026-11-26T10:00:00"}
    reconstruction = {"psnr": {"1": 20.0, "2": 21.0, "6": 25.5}, "pca": {"psnr": {"1": 18.0, "2": 19.0, "6": 22.0}}}
    distances = {"features": "some-features", "real_real": 5.0, "generated_real": {"1.0": 9.0, "2.0": 11.0}}
    generation = {"distances": distances, "cost": {"images_per_second": 180.4}}
    return reconstruction | {"provenance": facts}, generation


def test_the_table_holds_what_was_measured_and_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ShowcaseError, match="found no .*reconstruction/metrics.json, wanted what `test`"):
        results_table({"scenes": tmp_path})
    for name, content in zip(("reconstruction", "generation"), figures(), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    page = tmp_path / "README.md"
    page.write_text("before\n")
    with pytest.raises(ShowcaseError, match="has no place for the table"):
        main(["--table", str(page), "--runs", "scenes", str(tmp_path)])
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--table", str(page), "--runs", "scenes", str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| scenes: PSNR from 1, 6 latents, dB | 20.00, 25.50 | 01234567, 2026-11-26 |" in text
    assert "[some-features] at guidance 1, 2 (real-real) | 9.0, 11.0 (5.0)" in text and "caption" not in text
