"""Pictures of random characters: content that can be counted, for the question what a code loses.

N characters, drawn from an alphabet with equal chance, stand on a grid, dark on light. A picture then holds exactly
N log2(alphabet) bits that a reader can ask for, and a code of t symbols from a book of V can name no more than V^t
pictures (Su 2024): where N outgrows that, no decoder can be right. Picture i is a function of (seed, i) and the font.

A font is a file of yours, of any script (TrueType, OpenType, the first face of a collection).

Letters: N characters, S side in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.schema import DataError, Sample, Stretch, cut
from data.sources.scenes import uniforms

FILLED = 0.82  # of a cell's side: the size of its character
SHIFT = 0.06  # of a cell's side: how far a character may stand off its centre


class Glyphs:
    """`num` pictures of `characters` characters each; a source (`chunks`, `read`, `fingerprint`).

    Args:
        font: path of the font.
        alphabet: the characters, or a range such as U+4E00..U+9FA5, or a UTF-8 file of characters.
        num: how many pictures. seed: which ones.
        size: S. characters: N, on a grid of ceil(sqrt N) columns.

    Raises:
        DataError: a font that cannot be read or lacks a character, an empty alphabet, cells below 8 pixels.
    """

    unit = "img"

    def __init__(self, font: str, alphabet: str, num: int, seed: int = 0, size: int = 64, characters: int = 4):
        if num < 1 or characters < 1:
            raise DataError(f"--num is {num} and --characters {characters}, wanted at least 1 picture of 1 character")
        self.num, self.seed, self.size, self.characters = num, seed, size, characters
        self.columns, self.cell = grid(size, characters)
        if self.cell < 8:
            raise DataError(
                f"--size {size} leaves {self.cell:.1f} pixels for each of {characters} characters, wanted at least 8;"
                f" use --size {8 * self.columns} or more"
            )
        self.font, self.alphabet = font, parse_alphabet(alphabet)
        missing = missing_characters(font, self.alphabet)
        if missing:
            raise DataError(
                f"the font {font} has no {missing[0]!r} (U+{ord(missing[0]):04X}), and {len(missing)} of the"
                f" {len(self.alphabet)} characters in all; give a font that has them, or another --alphabet"
            )

    def chunks(self, longest: int) -> list[Stretch]:
        """All pictures are split by hash of the key."""
        return cut(0, self.num, longest)

    def fingerprint(self) -> str:
        """Options and the bytes of the font."""
        font = hashlib.sha256(Path(self.font).read_bytes()).hexdigest()[:16]
        alphabet = hashlib.sha256(self.alphabet.encode()).hexdigest()[:16]
        options = f"num={self.num} seed={self.seed} size={self.size} characters={self.characters}"
        return f"glyphs font={font} alphabet={alphabet} {options}"

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """Yield pictures [start, stop); the caption is the text, attributes `glyph1`, `glyph2`, ... its characters."""
        for index in range(start, stop):
            u = uniforms(self.seed, np.array([index]), 3 * self.characters + 4)[0]
            text = "".join(self.alphabet[int(x * len(self.alphabet))] for x in u[: self.characters])
            attributes = {f"glyph{i}": character for i, character in enumerate(text, start=1)}
            yield Sample(f"{index:09d}", [text], pixels=self.draw(text, u[self.characters :]), attributes=attributes)

    def draw(self, text: str, u: np.ndarray) -> np.ndarray:
        """Return (S, S, 3) uint8 of the N characters; u (2 N + 4,) in [0, 1): where they stand, paper and ink."""
        cover = np.zeros((self.size, self.size), np.float32)
        for i, character in enumerate(text):
            x, y = (i % self.columns + 0.5) * self.cell, (i // self.columns + 0.5) * self.cell
            dx, dy = (SHIFT * self.cell * (2 * u[2 * i : 2 * i + 2] - 1)).tolist()
            mask = glyph_mask(self.font, character, self.cell * FILLED)
            left, top = round(x + dx - mask.shape[1] / 2), round(y + dy - mask.shape[0] / 2)
            rows = slice(max(top, 0), min(top + mask.shape[0], self.size))
            columns = slice(max(left, 0), min(left + mask.shape[1], self.size))
            part = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            cover[rows, columns] = np.maximum(cover[rows, columns], part)
        paper, ink = 235 + 20 * u[-1], 60 * u[-4:-1]  # (3,) of a dark colour
        return np.rint(paper + cover[..., None] * (ink - paper)).astype(np.uint8)


def grid(size: int, characters: int) -> tuple[int, float]:
    """Columns of the grid that N characters stand on, row by row, and the side of a cell in pixels."""
    columns = math.ceil(math.sqrt(characters))
    return columns, size / columns


def parse_alphabet(alphabet: str) -> str:
    """Different characters, in order, of a text, a range U+XXXX..U+YYYY, or a file. Raises DataError for none."""
    if found := re.fullmatch(r"U\+([0-9A-Fa-f]{4,6})\.\.U\+([0-9A-Fa-f]{4,6})", alphabet):
        first, last = (int(code, 16) for code in found.groups())
        text = "".join(map(chr, range(first, min(last, 0x10FFFF) + 1)))
    elif len(alphabet) < 4096 and Path(alphabet).is_file():
        try:
            text = Path(alphabet).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{alphabet} is no UTF-8 text; --alphabet wants characters, or a file of them") from None
    else:
        text = alphabet
    characters = "".join(dict.fromkeys(c for c in text if not c.isspace()))
    if not characters:
        raise DataError(f"--alphabet {alphabet!r:.40} holds no characters; give them, U+4E00..U+9FA5, or a file")
    return characters


def missing_characters(font: str, characters: str) -> list[str]:
    """Those of `characters` that the font has no glyph for. Raises DataError for a file that is no font."""
    from matplotlib.ft2font import FT2Font

    if not Path(font).is_file():
        raise DataError(f"no font at {font!r}; --source glyphs wants --font, the path of a TrueType or OpenType file")
    try:
        known = FT2Font(font).get_charmap()
    except RuntimeError as error:
        raise DataError(f"{font} is no font that can be read ({error}); --font wants TrueType or OpenType") from None
    return [c for c in characters if ord(c) not in known]


@functools.lru_cache(maxsize=32768)
def glyph_mask(font: str, character: str, size: float) -> np.ndarray:
    """Return the coverage (height, width) in [0, 1] of the character's ink, and nothing around it."""
    face = _face(font, size)
    left, top, right, bottom = face.getbbox(character)
    canvas = Image.new("L", (max(math.ceil(right - left), 1), max(math.ceil(bottom - top), 1)))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=face)
    return np.asarray(canvas, np.float32) / 255


@functools.lru_cache(maxsize=8)
def _face(font: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font, size)
