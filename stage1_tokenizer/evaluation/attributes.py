"""What can be read from a picture, as a row of class labels: the language between captions, pictures and a classifier.

A scene's attributes (data/sources/scenes.py) become *slots*: `layout`, `background`, `object1.shape`, ..., and one slot
per letter of its word. Attributes without objects, as those of emoji (`style`, `tone`, ...), are slots as they are.
A slot that a picture lacks (the second object of a single-object scene, the fourth letter of "cat") has the value ""
like any other, so "all attributes right" also says that nothing was there that should not be.

Two scenes that look the same must have the same row: "a square below a circle" is the picture of "a circle above a
square", so relations are stated from above and from the left, and the objects change places with them.

Letters: N scenes, S slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIRRORED = {"below": "above", "right of": "left of"}
OBJECT_FIELDS = ("shape", "colour", "size", "place")
LETTER = "letter"


def scene_values(scene: Mapping[str, Any]) -> dict[str, str]:
    """The slots of one scene that have a value, by name; equal for scenes that look alike."""
    layout, objects = scene["layout"], list(scene["objects"])
    if layout in MIRRORED:
        layout, objects = MIRRORED[layout], objects[::-1]
    values = {"layout": layout, "background": scene["background"]}
    for index, item in enumerate(objects, start=1):
        values |= {f"object{index}.{name}": item[name] for name in OBJECT_FIELDS if name in item}
    for index, letter in enumerate(scene.get("word") or "", start=1):
        values[f"{LETTER}{index}"] = letter
    return values


def slot_values(attributes: Mapping[str, Any]) -> dict[str, str]:
    """The slots of one picture that have a value, by name."""
    if "objects" in attributes:
        return scene_values(attributes)
    return {name: value for name, value in attributes.items() if isinstance(value, str)}


@dataclass(frozen=True)
class Slots:
    """Names of the slots and the classes of each, "" (nothing) among them where it occurs."""

    classes: Mapping[str, Sequence[str]]

    @classmethod
    def of_scenes(cls, scenes: Sequence[Mapping[str, Any]]) -> "Slots":
        """The slots and classes that occur in `scenes`; letters get the whole alphabet."""
        rows = [slot_values(scene) for scene in scenes]
        names = sorted({name for row in rows for name in row}, key=_reading_order)
        classes = {name: sorted({row.get(name, "") for row in rows}) for name in names}
        alphabet = ["", *map(chr, range(ord("a"), ord("z") + 1))]
        return cls({n: alphabet if n.startswith(LETTER) else values for n, values in classes.items()})

    @property
    def names(self) -> list[str]:
        return list(self.classes)

    @property
    def sizes(self) -> list[int]:
        return [len(values) for values in self.classes.values()]

    def targets(self, scenes: Sequence[Mapping[str, Any]]) -> Tensor:
        """Class index of every slot, (N, S) long; -1 for a value that no class stands for, which is never right."""
        index = {name: {value: i for i, value in enumerate(values)} for name, values in self.classes.items()}
        rows = []
        for values in map(slot_values, scenes):
            known = values.keys() <= self.classes.keys()  # else something is there that no slot can name
            rows.append([index[name].get(values.get(name, ""), -1) if known else -1 for name in self.names])
        return torch.tensor(rows)

    def words(self, predictions: Tensor) -> list[str]:
        """The word spelled by predicted letter slots of (N, S) predictions; "" where there is none."""
        columns = [i for i, name in enumerate(self.names) if name.startswith(LETTER)]
        letters = [list(self.classes[self.names[i]]) for i in columns]
        return ["".join(letters[c][row[i]] for c, i in enumerate(columns)) for row in predictions.tolist()]


def _reading_order(name: str) -> tuple[int, str, int]:
    """Layout, background, objects in order (shape, colour, size, place), letters; others by name before all."""
    if name not in ("layout", "background") and "." not in name and not name.startswith(LETTER):
        return (-1, name, 0)
    if name in ("layout", "background"):
        return (0, "", ("layout", "background").index(name))
    if name.startswith(LETTER):
        return (2, name, 0)
    item, field = name.split(".")
    return (1, item, OBJECT_FIELDS.index(field))
