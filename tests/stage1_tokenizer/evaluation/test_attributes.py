"""Slots of scenes: pictures that look alike have one row, and what is absent or unknown is a value of its own."""

from typing import Any

from stage1_tokenizer.evaluation.attributes import Slots, scene_values


def scene(layout: str, *shapes: str, word: str | None = None) -> dict[str, Any]:
    objects = [{"shape": shape, "colour": "red", "size": "small", "box": [0, 0, 1, 1]} for shape in shapes]
    return {"layout": layout, "background": "white", "objects": objects, "word": word}


def test_pictures_that_look_alike_have_one_row() -> None:
    assert scene_values(scene("below", "star", "circle")) == scene_values(scene("above", "circle", "star"))
    assert scene_values(scene("right of", "star", "circle")) == scene_values(scene("left of", "circle", "star"))
    assert scene_values(scene("above", "star", "circle")) != scene_values(scene("above", "circle", "star"))


def test_slots_say_what_is_absent_and_spell_words() -> None:
    rows = [scene("center", "star"), scene("above", "star", "circle", word="cat")]
    rows.append(scene("center", "cross", word="zebra"))
    slots = Slots.of_scenes(rows)
    assert slots.names[:3] == ["layout", "background", "object1.shape"] and "letter5" in slots.names
    targets = slots.targets(rows)
    assert targets.shape == (3, len(slots.names)) and (targets >= 0).all()
    assert slots.words(targets) == ["", "cat", "zebra"]
    column = slots.names.index("object2.shape")
    assert slots.classes["object2.shape"][int(targets[0, column])] == ""


def test_a_value_never_seen_is_never_right() -> None:
    slots = Slots.of_scenes([scene("center", "star"), scene("top left", "circle")])
    unknown = slots.targets([scene("center", "cross"), scene("above", "star", "circle")])
    assert unknown[0, slots.names.index("object1.shape")] == -1
    assert (unknown[1] == -1).all(), "a second object has no slot here"


def test_attributes_without_objects_are_slots_as_they_are() -> None:
    rows: list[dict[str, Any]] = [{"style": "flat", "tone": "dark"}, {"style": "round"}, {"style": "flat", "number": 3}]
    slots = Slots.of_scenes(rows)
    assert slots.classes == {"style": ["flat", "round"], "tone": ["", "dark"]}
    assert slots.targets(rows).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert slots.targets([{"style": "engraved", "tone": "dark"}]).tolist() == [[-1, 1]], "never right"
    assert slots.targets([{"style": "flat", "hair": "red"}]).tolist() == [[-1, -1]], "something that no slot can name"
