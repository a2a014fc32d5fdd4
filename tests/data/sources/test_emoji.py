"""Emoji: names and pictures belong together, combinations are held out by rule, other packages are refused."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare.engines import processes, run
from data.prepare.options import PrepareConfig
from data.schema import DataError, Sample
from data.sources.emoji import BACKGROUNDS, HELD_OUT, TONES, Emoji, compose, without_tone
from data.sources.open import SourceConfig

FIREFIGHTER = (0x1F469, 0x1F3FF, 0x200D, 0x1F692)  # woman firefighter: dark skin tone
APPLE = (0x1F34E,)


def package(folder: Path, name: str, pictures: dict[str, tuple[int, int, int, int]], pattern: str = "") -> str:
    """A small npm package with plain pictures."""
    (folder / "package.json").parent.mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": name, "version": "1.2.3"}))
    for file, colour in pictures.items():
        path = folder / pattern / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (64, 48), colour).save(path)
    return str(folder)


@pytest.fixture
def twemoji(tmp_path: Path) -> str:
    names = {"1f469-1f3ff-200d-1f692.png": (255, 0, 0, 255), "1f34e.png": (0, 0, 255, 0), "e08c.png": (0, 0, 0, 255)}
    return package(tmp_path / "twemoji", "emoji-datasource-twitter", names, "img/twitter/64")


@pytest.fixture
def details(tmp_path: Path) -> str:
    folder = tmp_path / "emojibase"
    package(folder, "emojibase-data", {})
    skin = {"hexcode": "1F469-1F3FF-200D-1F692", "group": 1, "subgroup": 25}
    entry = {"hexcode": "1F469-200D-1F692", "tags": ["fire", "truck"], "group": 1, "subgroup": 25, "skins": [skin]}
    (folder / "en").mkdir()
    (folder / "en" / "data.json").write_text(json.dumps([entry, {"hexcode": "1F1E6"}]))
    (folder / "meta").mkdir()
    (folder / "meta" / "groups.json").write_text(json.dumps({"groups": {"1": "people"}, "subgroups": {"25": "role"}}))
    return str(folder)


def one(source: Emoji, style: str, symbol: tuple[int, ...]) -> Sample:
    index = next(i for i, (s, x) in enumerate(source.items) if s.name == style and x == symbol)
    (sample,) = source.read(index, index + 1)
    assert isinstance(sample, Sample)
    return sample


def test_a_name_is_split_into_what_it_is_made_of(twemoji: str, details: str) -> None:
    source = Emoji((twemoji, details), size=32, languages=("en", "zh"))
    sample = one(source, "twemoji", FIREFIGHTER)
    assert sample.captions == [
        "woman firefighter",
        "woman firefighter with dark skin tone",
        "woman firefighter with dark skin tone, twemoji style: fire, truck",
        *sample.captions[3:],
    ]
    assert sample.captions[3].startswith("女") and len(sample.captions) == 5  # 女消防员, and with its tone
    expected = {"style": "twemoji", "tone": "dark", "gender": "woman", "group": "people", "subgroup": "role"}
    assert sample.attributes == expected
    assert one(source, "openmoji", (0x1F1EB, 0x1F1EF)).captions[0] == "flag of Fiji"
    pair = (0x1F9D1, 0x1F3FF, 0x200D, 0x1F91D, 0x200D, 0x1F9D1, 0x1F3FB)
    assert one(source, "openmoji", pair).captions[1] == "people holding hands with dark and light skin tone"
    assert not any(symbol == (0xE08C,) for _, symbol in source.items), "a private character has no name"


def test_pictures_are_composed_on_their_background(twemoji: str) -> None:
    source = Emoji((twemoji,), size=32, background="random", seed=1)
    apple = one(source, "twemoji", APPLE)  # wholly transparent here
    assert apple.pixels is not None and apple.pixels.shape == (32, 32, 3)
    assert (apple.pixels == BACKGROUNDS[apple.attributes["background"]]).all()
    assert f"on a {apple.attributes['background']} background" in apple.captions[2]
    person = one(source, "twemoji", FIREFIGHTER).pixels  # 64 x 48, red: it fills the width and lies in the middle
    ground = BACKGROUNDS[one(source, "twemoji", FIREFIGHTER).attributes["background"]]
    assert person is not None and (person[8:24] == (255, 0, 0)).all() and (person[:1] == ground).all()
    half = compose(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), 8, (255, 255, 255))
    assert abs(int(half[0, 0, 0]) - 127) <= 1, "alpha mixes"


def test_openmoji_needs_no_path_and_is_drawn_at_any_size() -> None:
    small, large = Emoji(size=24), Emoji(size=96)
    a, b = one(small, "openmoji", APPLE).pixels, one(large, "openmoji", APPLE).pixels
    assert a is not None and b is not None and a.shape == (24, 24, 3) and b.shape == (96, 96, 3)
    means = b.reshape(24, 4, 24, 4, 3).mean((1, 3))
    assert np.abs(means - a).mean() < 8, "the same drawing"
    red = a.reshape(-1, 3).astype(int)
    assert ((red[:, 0] > 180) & (red[:, 1] < 100)).mean() > 0.2, "an apple is red"


def test_combinations_are_held_out_by_rule_and_their_parts_are_trained() -> None:
    source = Emoji(size=16)
    seen: dict[str, set[str]] = defaultdict(set)
    held: dict[str, set[str]] = defaultdict(set)
    toned = 0
    for _, symbol in source.items:
        tones = [TONES[p] for p in symbol if p in TONES]
        sample = {"label": source._label(symbol, "en"), "tone": " ".join(tones)}
        out = source.held_out(symbol, "openmoji")
        if tones:
            toned += 1
            (held if out else seen)[sample["label"]].add(sample["tone"])
        assert out in ("", "label x tone" if tones else "label")
    counts = sum(map(len, held.values()))
    assert 0.05 < counts / toned < 2 * HELD_OUT
    for label, tones_held in held.items():
        assert not tones_held & seen[label], "a combination is on one side only"
    alone = [label for label in held if not seen[label]]
    assert len(alone) < 0.1 * len(held), "nearly every label that is asked for with a new tone was seen with others"
    assert without_tone(FIREFIGHTER) == (0x1F469, 0x200D, 0x1F692)


def test_styles_of_one_combination_are_held_out_together(twemoji: str) -> None:
    both = Emoji((twemoji,), size=16)
    assert both.held_out(FIREFIGHTER, "openmoji") == both.held_out(FIREFIGHTER, "twemoji")
    rules = [both.held_out(symbol, "twemoji") for style, symbol in both.items if style.name == "openmoji"]
    others = [both.held_out(symbol, "openmoji") for style, symbol in both.items if style.name == "openmoji"]
    untoned = [(a, b) for a, b in zip(rules, others, strict=True) if "tone" not in a + b]
    assert any(a != b for a, b in untoned), "labels without tone are held out in one style and trained in another"


def test_shards_carry_the_attribution(twemoji: str, tmp_path: Path) -> None:
    config = SourceConfig(kind="emoji", path=(twemoji,), size=16, num=200)
    manifest = run(PrepareConfig(config, size=16, format="png"), tmp_path / "out", processes(1), lambda _: None)
    assert manifest is not None
    assert "OpenMoji" in manifest["attribution"] and "CC-BY-4.0" in manifest["attribution"]
    assert 5 < manifest["counts"]["val"] < 40 and sum(manifest["counts"].values()) == 200
    assert not manifest["dropped"] and not manifest["captions"].get("caption empty")


def test_bad_input_is_one_sentence(tmp_path: Path, twemoji: str) -> None:
    with pytest.raises(DataError, match="--languages has .*xx.*the package emoji has"):
        Emoji(languages=("en", "xx"))
    with pytest.raises(DataError, match="no readable package.json, wanted an unpacked npm package"):
        Emoji((str(tmp_path),))
    other = package(tmp_path / "other", "left-pad", {})
    with pytest.raises(DataError, match="holds the npm package 'left-pad', wanted one of"):
        Emoji((other,))
    packed = package(tmp_path / "packed" / "package", "left-pad", {})
    with pytest.raises(DataError, match="packed/package holds the npm package"):
        Emoji((str(Path(packed).parent),))
    moved = package(tmp_path / "moved", "emoji-datasource-twitter", {"1f34e.png": (0, 0, 0, 255)}, "png")
    with pytest.raises(DataError, match="no pictures img/twitter/64.* is it another version"):
        Emoji((moved,))
    (Path(twemoji) / "img/twitter/64/1f34e.png").write_bytes(b"no picture")
    source = Emoji((twemoji,), size=16)
    index = next(i for i, (s, x) in enumerate(source.items) if s.name == "twemoji" and x == APPLE)
    (drop,) = source.read(index, index + 1)
    assert not isinstance(drop, Sample) and drop.reason == "unreadable"
    broken = package(tmp_path / "base", "emojibase-data", {})
    with pytest.raises(DataError, match="does not read as emojibase-data"):
        Emoji((broken,))
