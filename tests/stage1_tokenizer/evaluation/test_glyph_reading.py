"""Characters read back: rows of the grid in their places, what a code can hold, the reader that is installed."""

import json
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

from data.__main__ import main as data_main
from data.sources.glyphs import Glyphs
from stage1_tokenizer.__main__ import main
from stage1_tokenizer.evaluation.glyph_reading import rapid_reader, read_glyphs, right_characters
from stage1_tokenizer.evaluation.latent_use import code_bits, received
from stage1_tokenizer.variants.quantised import VQBottleneck
from tests.tiny import SIZE, WIDTH, C, K, tiny_tokenizer

FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def test_rows_are_read_in_their_places() -> None:
    """A reader of gray levels: cell (r, c) of the picture is 20 (3 r + c)."""
    levels = np.arange(9).reshape(3, 3).repeat(10, 0).repeat(10, 1) * 20
    picture = torch.tensor(levels / 127.5 - 1)[None, None].expand(1, 3, -1, -1).float()

    def reader(row: np.ndarray) -> str:
        assert row.shape[0] == 10 and row.dtype == np.uint8
        return "".join(str(row[5, x, 0] // 20) for x in range(5, row.shape[1], 10))

    assert right_characters(reader, picture, ["012345678"]).all()
    assert right_characters(reader, picture, ["01234567"]).all(), "eight stand on the same grid"
    assert right_characters(reader, picture, ["012745678"]).tolist() == [[True] * 3 + [False] + [True] * 5]
    assert right_characters(lambda row: "", picture, ["012345678"]).sum() == 0
    assert right_characters(lambda row: "0 1 2", picture, ["012012012"]).all()  # spaces are the reader's own


def test_bits_are_those_of_the_symbols_or_of_the_noise_and_bound_what_can_be_right() -> None:
    tokenizer = tiny_tokenizer()
    images = torch.rand(8, 3, SIZE, SIZE) * 2 - 1
    rate = code_bits(tokenizer, images)
    assert len(rate) == K and all(b > a > 0 for a, b in pairwise(rate))
    tokenizer.bottleneck = VQBottleneck(WIDTH, K, C, codes=16)
    assert code_bits(tokenizer, images) == [4.0 * k for k in range(1, K + 1)]
    result = read_glyphs(tokenizer, lambda row: "ab", images, ["abab"] * 8, 32, [1, 5, K])
    assert result["wanted_bits"] == 20 and result["bits"] == {1: 4.0, 5: 20.0, 6: 24.0}
    assert result["bound"] == {1: 2.0**-16, 5: 1.0, 6: 1.0}
    assert result["characters"] == {0: 1.0, 1: 1.0, 5: 1.0, 6: 1.0} == result["whole"]


def test_a_receiver_gets_symbols_as_they_are_and_a_noisy_code_with_its_noise() -> None:
    tokenizer = tiny_tokenizer()
    images = torch.rand(64, 3, SIZE, SIZE) * 2 - 1
    mean, std = tokenizer.posterior(images)
    noise = (received(tokenizer, images) - mean) / std
    assert abs(noise.mean().item()) < 0.1 and abs(noise.std().item() - 1) < 0.1
    assert torch.equal(received(tokenizer, images), received(tokenizer, images))
    tokenizer.bottleneck = VQBottleneck(WIDTH, K, C, codes=16)
    assert torch.equal(received(tokenizer, images), tokenizer.encode(images))


def test_the_installed_reader_reads_letters() -> None:
    source = Glyphs(FONT, "ABDEGMRSWZ", num=6, size=96, characters=4)
    samples = list(source.read(0, 6))
    pictures = (
        torch.tensor(np.stack([s.pixels for s in samples if s.pixels is not None])).permute(0, 3, 1, 2) / 127.5 - 1
    )
    texts = [s.captions[0] for s in samples]
    reader = rapid_reader()
    assert right_characters(reader, pictures, texts).double().mean() > 0.7
    assert right_characters(reader, pictures, texts[1:] + texts[:1]).double().mean() < 0.4  # control
    assert right_characters(reader, torch.zeros(1, 3, 96, 96), texts[:1]).sum() == 0


def test_the_command_writes_a_report_and_refuses_other_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--num", "40", "--size", str(SIZE), "--val-fraction", "0.5", "--workers", "1", "--out"]
    glyphs = ["--source", "glyphs", "--font", FONT, "--alphabet", "ABC", "--characters", "1"]
    assert data_main(["prepare", *glyphs, *words, str(tmp_path / "glyphs")]) == 0
    assert data_main(["prepare", "--source", "scenes", *words, str(tmp_path / "scenes")]) == 0
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    run = ["glyphs", "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out"), "--data"]
    assert main([*run, str(tmp_path / "glyphs"), "--limit", "6", "--latents", "1", str(K)]) == 0
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written["wanted_bits"] == pytest.approx(np.log2(3)) and set(written["characters"]) == {"0", "1", str(K)}
    for data, message in (("scenes", "are not of `prepare --source glyphs`"), ("nowhere", "error: ")):
        with pytest.raises(SystemExit):
            main([*run, str(tmp_path / data)])
        assert message in capsys.readouterr().err
