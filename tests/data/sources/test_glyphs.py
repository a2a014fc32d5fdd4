"""Pictures of random characters: which they are, where they stand, what a font must have."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from data.__main__ import main
from data.reading.datamodule import ImageDataModule
from data.schema import DataError, Sample
from data.sources.glyphs import Glyphs, glyph_mask, missing_characters, parse_alphabet
from data.sources.open import SourceConfig, open_source

FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def pixels_of(sample: Sample) -> np.ndarray:
    assert sample.pixels is not None
    return sample.pixels


def test_pictures_are_a_function_of_seed_and_index() -> None:
    source = Glyphs(FONT, "abcdef", num=40, seed=3)
    whole = list(source.read(0, 40))
    part = list(source.read(17, 21))
    assert [s.key for s in part] == [s.key for s in whole[17:21]]
    assert all(np.array_equal(pixels_of(a), pixels_of(b)) for a, b in zip(part, whole[17:21], strict=True))
    assert len({s.captions[0] for s in whole}) > 30 and all(len(s.captions[0]) == 4 for s in whole)
    assert whole[0].attributes == {f"glyph{i}": c for i, c in enumerate(whole[0].captions[0], start=1)}
    other = next(Glyphs(FONT, "abcdef", num=40, seed=4).read(0, 1))
    assert not np.array_equal(pixels_of(other), pixels_of(whole[0]))
    assert source.fingerprint() != Glyphs(FONT, "abcdeg", num=40, seed=3).fingerprint()


def test_characters_are_drawn_alike_often_and_independently() -> None:
    texts = [s.captions[0] for s in Glyphs(FONT, "ab", num=2000, size=16, characters=4).read(0, 2000)]
    bits = np.array([[c == "a" for c in text] for text in texts])
    assert abs(bits.mean(0) - 0.5).max() < 0.05
    assert abs(np.corrcoef(bits.T) - np.eye(4)).max() < 0.1


@pytest.mark.parametrize("characters", [1, 4, 5, 32])
def test_a_reader_that_knows_the_font_reads_every_cell(characters: int) -> None:
    """Each cell is nearest to the rendering of its own character; that of another cell is not."""
    alphabet = "HOXTEW"
    source = Glyphs(FONT, alphabet, num=6, size=96, characters=characters)
    side = round(source.cell)

    def template(character: str) -> np.ndarray:
        cell, mask = np.zeros((side, side)), glyph_mask(FONT, character, source.cell * 0.82)
        top, left = (side - mask.shape[0]) // 2, (side - mask.shape[1]) // 2
        cell[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        return cell

    templates = np.stack([template(c) for c in alphabet])
    for sample in source.read(0, 6):
        assert sample.pixels is not None and sample.pixels.shape == (96, 96, 3)
        ink = 1 - sample.pixels.mean(-1) / 255
        for i, character in enumerate(sample.captions[0]):
            x, y = round(i % source.columns * source.cell), round(i // source.columns * source.cell)
            cell = np.zeros((side, side))
            found = ink[y : y + side, x : x + side]
            cell[: found.shape[0], : found.shape[1]] = found
            shifts = [np.roll(templates, (a, b), (1, 2)) for a in range(-3, 4) for b in range(-3, 4)]
            errors = np.min([((t - cell) ** 2).sum((1, 2)) for t in shifts], axis=0)
            assert alphabet[int(errors.argmin())] == character


def test_an_alphabet_is_a_text_a_range_or_a_file(tmp_path: Path) -> None:
    assert parse_alphabet("abca b") == "abc"
    assert parse_alphabet("U+0041..U+0044") == "ABCD" and len(parse_alphabet("U+4E00..U+9FA5")) == 20902
    (tmp_path / "some.txt").write_text("天地\n玄黄天", encoding="utf-8")
    assert parse_alphabet(str(tmp_path / "some.txt")) == "天地玄黄"
    with pytest.raises(DataError, match="no UTF-8 text"):
        parse_alphabet(FONT)
    for empty in ("", "  ", "U+0044..U+0041"):
        with pytest.raises(DataError, match="holds no characters"):
            parse_alphabet(empty)


def test_a_font_without_a_character_is_refused_by_its_name(tmp_path: Path) -> None:
    assert missing_characters(FONT, "aé天z") == ["天"]
    with pytest.raises(DataError, match=r"has no '天' \(U\+5929\), and 2 of the 4 characters in all"):
        Glyphs(FONT, "ab天地", num=1)
    (tmp_path / "no.ttf").write_bytes(b"not a font")
    with pytest.raises(DataError, match="no font that can be read"):
        Glyphs(str(tmp_path / "no.ttf"), "ab", num=1)
    for font in ("", str(tmp_path / "nowhere.ttf")):
        with pytest.raises(DataError, match="wants --font"):
            Glyphs(font, "ab", num=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "at least 1 picture"),
        ({"num": 1, "characters": 0}, "at least 1"),
        ({"num": 1, "size": 40, "characters": 32}, "48 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Glyphs(FONT, "ab", **options)  # type: ignore[arg-type]


def test_prepare_writes_shards_with_the_characters_as_attributes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "--source", "glyphs", "--font", FONT, "--num", "30", "--val-fraction", "0.3", "--workers", "1"]
    for characters in (1, 4):
        out = tmp_path / str(characters)
        assert main([*words, "--alphabet", "abcdefgh", "--characters", str(characters), "--out", str(out)]) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        assert sum(manifest["counts"].values()) == 30, "captions of one character are captions"
        held = ImageDataModule(str(out), image_size=64).arrays("val")
        texts = ["".join(a.values()) for a in held["attributes"]]
        assert texts == [c[0] for c in held["captions"]] and len(texts[0]) == characters
    assert main([*words, "--alphabet", "ab天", "--out", str(tmp_path / "none")]) == 1
    assert "'天' (U+5929)" in capsys.readouterr().err
    config = SourceConfig(kind="glyphs", font=FONT, alphabet="ab", num=2)
    assert isinstance(open_source(config), Glyphs)
