"""Scenes are what their captions say, the same in any order, and as the demo wants them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.schema import DataError, Sample
from data.sources.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    WORDS,
    Scenes,
    captions_of,
    uniforms,
)


def test_a_scene_depends_on_its_number_alone() -> None:
    scenes = Scenes(1000, seed=3)
    whole, pixels = scenes.draw(np.arange(40))
    for order in ([7], [39, 7, 0], range(20, 30)):
        some, drawn = scenes.draw(np.array(order))
        assert some == [whole[i] for i in order]
        assert np.array_equal(drawn, pixels[list(order)])
    other, _ = Scenes(1000, seed=4).draw(np.arange(40))
    assert sum(a == b for a, b in zip(whole, other, strict=True)) == 0


def test_random_numbers_are_uniform_and_unrelated() -> None:
    u = uniforms(0, np.arange(20_000), 8)
    assert u.min() >= 0 and u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01 and np.abs(u.std(0) - 12**-0.5).max() < 0.01
    others = [u[1:], uniforms(1, np.arange(1, 20_000), 8), uniforms(8, np.arange(19_999), 8)]
    correlation = np.corrcoef(np.concatenate([u[:-1], *others], axis=1).T)
    assert np.abs(correlation - np.eye(32)).max() < 0.04
    assert not np.isin(u, np.concatenate([uniforms(seed, np.arange(5000), 8) for seed in (1, 2, 8, 40)])).any()


def test_the_demo_has_every_attribute_equally_often() -> None:
    scenes, _ = Scenes(8000).draw(np.arange(8000))
    count = Counter(len(scene["objects"]) for scene in scenes)
    assert count[1] / 8000 == pytest.approx(0.5, abs=0.02) and count[1] + count[2] == 8000
    for name, options in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES)):
        found = Counter(item[name] for scene in scenes for item in scene["objects"])
        assert set(found) == set(options)
        assert max(found.values()) / min(found.values()) < 1.2
    layouts = Counter(scene["layout"] for scene in scenes)
    assert set(layouts) == {*PLACES, *RELATIONS}
    assert set(Counter(scene["background"] for scene in scenes)) == set(BACKGROUNDS)
    assert (len(SHAPES), len(COLOURS), len(SIZES), len(PLACES), len(RELATIONS), len(BACKGROUNDS)) == (5, 7, 2, 5, 4, 4)


def read_back(caption: str) -> dict[str, object]:
    """The attributes that a long caption of one or two objects states: the inverse of `captions_of`."""
    text, _, word = caption.partition(", with the word ")
    text, _, background = text.removesuffix(" background").rpartition(" on a ")
    words = text.split()
    objects = [
        {"shape": words[i], "colour": words[i - 1], "size": words[i - 2]}
        for i in range(len(words))
        if words[i] in SHAPES
    ]
    between = text.split(str(objects[0]["shape"]), 1)[1].strip()
    layout = next(
        name
        for name in (*RELATIONS, *PLACES)
        if between.startswith((f"at the {name}", f"in the {name}", f"to the {name}", name))
    )
    return {"layout": layout, "background": background, "objects": objects, "word": word or None}


@pytest.mark.parametrize("words", [0.0, 0.5])
def test_the_long_caption_names_every_attribute(words: float) -> None:
    scenes, _ = Scenes(600, size=64, words=words).draw(np.arange(600))
    for scene in scenes:
        short, medium, long = captions_of(scene)
        exact = [{name: item[name] for name in ("shape", "colour", "size")} for item in scene["objects"]]
        assert read_back(long) == {**scene, "objects": exact}
        assert len(short) < len(medium) < len(long)
        for item in scene["objects"]:
            assert f"{item['colour']} {item['shape']}" in short
    assert sum(scene["word"] is not None for scene in scenes) == pytest.approx(600 * words, abs=50)


def test_three_objects_have_a_place_each_and_differ() -> None:
    scenes, _ = Scenes(300, size=64, max_objects=3, words=1.0).draw(np.arange(300))
    assert set(Counter(len(scene["objects"]) for scene in scenes)) == {1, 2, 3}
    for scene in scenes:
        assert len({(item["shape"], item["colour"]) for item in scene["objects"]}) == len(scene["objects"])
        assert scene["word"] in WORDS and 3 <= len(scene["word"]) <= 5
        long = captions_of(scene)[2]
        assert long.endswith(f"background, with the word {scene['word']}")
        if len(scene["objects"]) == 3:
            assert scene["layout"] == "corners" and len({item["place"] for item in scene["objects"]}) == 3
            assert all(f"{item['colour']} {item['shape']} at the {item['place']}" in long for item in scene["objects"])


@pytest.mark.parametrize("size", [32, 64])
def test_objects_are_where_the_attributes_say_and_do_not_touch(size: int) -> None:
    scenes, pixels = Scenes(300, size=size).draw(np.arange(300))
    for scene, picture in zip(scenes, pixels.astype(np.int16), strict=True):
        boxes = [item["box"] for item in scene["objects"]]
        for item, (x0, y0, x1, y1) in zip(scene["objects"], boxes, strict=True):
            assert 0 <= x0 < x1 <= size + 0.5 and 0 <= y0 < y1 <= size + 0.5
            middle = picture[int((y0 + y1) / 2), int((x0 + x1) / 2)]
            assert np.abs(middle - COLOURS[item["colour"]]).max() <= 12, scene
        if len(boxes) == 2:
            (a, b), relation = boxes, scene["layout"]
            apart = {"above": b[1] - a[3], "below": a[1] - b[3], "left of": b[0] - a[2], "right of": a[0] - b[2]}
            assert apart[relation] > -1.5 * size / 32
        corner = picture[[0, 0, -1, -1], [0, -1, 0, -1]].mean(0)
        assert np.abs(corner - BACKGROUNDS[scene["background"]]).max() < 40


def test_pictures_are_antialiased_and_jittered() -> None:
    scenes, pixels = Scenes(4000).draw(np.arange(4000))
    same = [
        picture
        for scene, picture in zip(scenes, pixels, strict=True)
        if scene["layout"] == "center" and scene["background"] == "black" and scene["objects"][0]["colour"] == "green"
    ]
    assert len(same) > 5 and len({picture.tobytes() for picture in same}) == len(same)
    green = same[0][..., 1].astype(int)
    assert len(np.unique(green)) > 10  # edge pixels lie between object and background


def test_words_change_the_lowest_part_only() -> None:
    plain, with_word = Scenes(50, size=64), Scenes(50, size=64, words=1.0)
    scenes, pixels = with_word.draw(np.arange(50))
    for scene, picture in zip(scenes, pixels.astype(np.int16), strict=True):
        strip = picture[50:63].mean(-1)
        assert strip.max() - strip.min() > 60, scene["word"]
        assert all(item["box"][3] < 53 for item in scene["objects"])
    assert plain.draw(np.arange(50))[0][0]["word"] is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num": 0}, "--num is 0"),
        ({"num": 1, "size": 4}, "16 to 1024"),
        ({"num": 1, "max_objects": 4}, "1, 2 or 3"),
        ({"num": 1, "words": 2.0}, "from 0 to 1"),
        ({"num": 1, "words": 0.5, "size": 32}, "illegible"),
    ],
)
def test_options_that_make_no_scene_get_a_sentence(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        Scenes(**options)


def test_a_seed_out_of_range_gets_a_sentence() -> None:
    with pytest.raises(DataError, match="--seed is -1"):
        list(Scenes(1, seed=-1).read(0, 1))


def test_a_source_gives_each_scene_once() -> None:
    scenes = Scenes(700, size=16)
    samples = [sample for part in scenes.chunks(300) for sample in scenes.read(part.start, part.stop)]
    assert all(isinstance(sample, Sample) for sample in samples)
    assert [sample.key for sample in samples] == [f"{i:09d}" for i in range(700)]
