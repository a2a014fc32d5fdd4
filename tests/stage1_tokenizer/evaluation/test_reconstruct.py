"""Pictures through a tokenizer from the shell: the grid shows what the API gives, and bad input gets one sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.pictures.transforms import to_pixels
from stage1_tokenizer.__main__ import main
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.tokenizer import Tokenizer
from tests.tiny import SIZE, K, tiny_tokenizer

SCALE, GAP = 128 // SIZE, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 16 pixels, and two pictures: one of its size, one larger and of another aspect."""
    folder = tmp_path_factory.mktemp("reconstruct")
    tokenizer = tiny_tokenizer()
    tokenizer.fit_statistics([torch.rand(8, 3, SIZE, SIZE) * 2 - 1])
    tokenizer.save_pretrained(folder / "tokenizer")
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "small.png")
    Image.new("RGB", (90, 40), "orange").save(folder / "wide.jpg")
    (folder / "text.png").write_text("not a picture")
    (folder / "cut.png").write_bytes((folder / "small.png").read_bytes()[:200])
    return folder


def cell(grid: Image.Image, row: int, column: int) -> Tensor:
    """One picture of the grid, (3, SIZE, SIZE) uint8."""
    step = (SIZE + GAP) * SCALE
    box = (column * step, row * step, column * step + SIZE * SCALE, row * step + SIZE * SCALE)
    pixels = np.asarray(grid.convert("RGB").crop(box))[::SCALE, ::SCALE]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def run(folder: Path, *words: str) -> int:
    return main(["reconstruct", "--tokenizer", str(folder / "tokenizer"), "--device", "cpu", *words])


def test_the_grid_and_the_table_are_those_of_the_api(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "grid.png"
    pictures = [str(folder / "small.png"), str(folder / "wide.jpg")]
    assert run(folder, *pictures, "--latents", "1", "4", "--out", str(out)) == 0
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    small = torch.from_numpy(np.asarray(Image.open(folder / "small.png")).copy()).permute(2, 0, 1)
    images = (small.float() / 127.5 - 1)[None]
    grid = Image.open(out)
    assert grid.size == ((3 * SIZE + 2 * GAP) * SCALE, (2 * SIZE + GAP) * SCALE)
    assert torch.equal(cell(grid, 0, 0), small)
    lines = capsys.readouterr().out.splitlines()
    for column, k in enumerate((1, 4), start=1):
        with torch.inference_mode():
            decoded = tokenizer.decode(tokenizer.encode(images)[:, :k])
        assert (cell(grid, 0, column).int() - to_pixels(decoded)[0].int()).abs().max() <= 1
        assert float(lines[1].split()[column]) == pytest.approx(psnr(decoded, images).item(), abs=0.02)
    orange = cell(grid, 1, 0).float().mean(dim=(1, 2))
    assert torch.allclose(orange, torch.tensor([255.0, 165.0, 0.0]), atol=3)
    assert lines[0].split()[2:] == ["k", "=", "1", "k", "=", "4"] and lines[3].startswith("mean")


def test_all_prefix_lengths_without_a_choice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, str(folder / "small.png"), "--out", str(folder / "all.png")) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[4::3] == ["1", "2", "4", str(K)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text.png"], "text.png is no usable picture (unreadable), wanted JPEG, PNG"),
        (["cut.png"], "cut.png does not decode"),
        (["missing.jpg"], "missing.jpg; give the path of a picture"),
        (["small.png", "--latents", "0"], f"got --latents 0, wanted 1 to {K}"),
        (["small.png", "--latents", "2", str(K + 1)], f"got --latents {K + 1}, wanted 1 to {K}"),
        (["small.png", "--out", "grid.jpg"], "ends in .png"),
        (["small.png", "--tokenizer", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, *options = words
    with pytest.raises(SystemExit) as stop:
        run(folder, str(folder / picture), *options)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1
