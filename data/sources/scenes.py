"""Procedural captioned pictures: the embedded default, with exact ground truth.

A scene has a background with a gentle gradient and one object at one of five places, or two objects in a relation, or
(on request) three objects at three of the four corners, and (on request) a short word below them. Everything about
scene i is a pure function of (seed, i): a counter-based hash gives its random numbers, so any range of scenes can be
drawn anywhere, by any process, with the same bytes. Objects are signed distance functions, evaluated for a whole batch
of scenes at once; a pixel's coverage is its distance to the edge clipped to one pixel, which is the antialiasing.

Lengths are given for a picture of 32 pixels and scale with the size. The radii (large 7.0, small 4.9) are the
largest with which two large objects side by side stay apart, and are such that small stars, crosses and triangles
remain distinct.

Letters: B scenes, S side in pixels, J objects per scene.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.schema import DataError, Sample, Stretch, cut

SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = {
    "red": (222, 38, 38),
    "green": (38, 168, 56),
    "blue": (38, 76, 226),
    "yellow": (244, 218, 36),
    "purple": (150, 46, 190),
    "orange": (248, 130, 20),
    "cyan": (40, 208, 222),
}
SIZES = {"small": 4.9, "large": 7.0}
BACKGROUNDS = {"white": (238, 238, 238), "gray": (128, 128, 128), "black": (18, 18, 18), "pink": (240, 180, 196)}
PLACES = {
    "center": (0.0, 0.0),
    "top left": (-7.2, -7.2),
    "top right": (7.2, -7.2),
    "bottom left": (-7.2, 7.2),
    "bottom right": (7.2, 7.2),
}
# Centre of the first and of the second object.
RELATIONS = {
    "above": ((0.0, -8.0), (0.0, 8.0)),
    "below": ((0.0, 8.0), (0.0, -8.0)),
    "left of": ((-8.0, 0.0), (8.0, 0.0)),
    "right of": ((8.0, 0.0), (-8.0, 0.0)),
}
WORDS = (
    *("ant", "ape", "arm", "art", "bag", "bat", "bed", "bee", "box", "boy", "bus", "cap", "car", "cat", "cow", "cup"),
    *("dog", "ear", "egg", "eye", "fan", "fox", "gem", "hat", "hen", "ice", "ink", "jam", "jar", "key", "leg", "map"),
    *("net", "nut", "oak", "owl", "pan", "pen", "pig", "pie", "rat", "sea", "sky", "sun", "toe", "toy", "van", "web"),
    *("bear", "bell", "bird", "boat", "book", "cake", "corn", "desk", "door", "drum", "duck", "fire", "fish", "frog"),
    *("gold", "hand", "iron", "jump", "kite", "lamp", "leaf", "lion", "milk", "moon", "nest", "park", "quiz", "rain"),
    *("ring", "ship", "snow", "star", "tree", "vase", "wind", "wolf", "yarn", "zero", "apple", "beach", "bread"),
    *("chair", "cloud", "eagle", "field", "ghost", "horse", "juice", "knife", "lemon", "mouse", "night", "ocean"),
    *("piano", "queen", "river", "sheep", "tiger", "train", "under", "video", "whale", "youth", "zebra"),
)
_DRAWS = 40  # random numbers per scene; the columns are named in `_describe`
_LIMIT = 1 << 40


@dataclass(frozen=True)
class Scenes:
    """`num` scenes of `size` pixels; a source (`chunks`, `read`, `fingerprint`).

    Args:
        num: how many scenes.
        seed: which ones.
        size: side in pixels, at least 16; words need 64 to be legible.
        max_objects: 1, 2 or 3; every count up to it is as likely as the others.
        words: fraction of the scenes, 0 to 1, that carry a word of three to five letters.
    """

    num: int
    seed: int = 0
    size: int = 32
    max_objects: int = 2
    words: float = 0.0

    def __post_init__(self) -> None:
        if self.num < 1:
            raise DataError(f"--num is {self.num}, a set of scenes needs at least 1")
        if not 16 <= self.size <= 1024:
            raise DataError(f"--size is {self.size}, scenes are drawn at 16 to 1024 pixels")
        if self.max_objects not in (1, 2, 3):
            raise DataError(f"--max-objects is {self.max_objects}, a scene holds 1, 2 or 3")
        if not 0.0 <= self.words <= 1.0:
            raise DataError(f"--words is {self.words}, it is the fraction of scenes with a word, from 0 to 1")
        if self.words and self.size < 48:
            raise DataError(f"--words with --size {self.size} is illegible; use --size 64 or more")

    unit = "img"
    attribution = "Scenes: drawn by Unspool, free for any use (CC0-1.0)."

    def chunks(self, longest: int) -> list[Stretch]:
        """All scenes are split by hash of the key."""
        return cut(0, self.num, longest)

    def fingerprint(self) -> str:
        """The options say everything."""
        return f"scenes num={self.num} seed={self.seed} size={self.size} objects={self.max_objects} words={self.words}"

    def read(self, start: int, stop: int) -> Iterator[Sample]:
        """Yield scenes [start, stop), drawn in batches."""
        for begin in range(start, stop, 256):
            indices = np.arange(begin, min(stop, begin + 256))
            scenes, pixels = self.draw(indices)
            for index, attributes, picture in zip(indices, scenes, pixels, strict=True):
                yield Sample(f"{index:09d}", captions_of(attributes), pixels=picture, attributes=attributes)

    def draw(self, indices: np.ndarray) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Return the attributes of scenes `indices` and their pictures.

        Args:
            indices: (B,) integers.

        Returns:
            B attribute dictionaries (see `captions_of`) and (B, S, S, 3) uint8.
        """
        u = uniforms(self.seed, indices, _DRAWS)  # (B, _DRAWS)
        scenes = [self._describe(row) for row in u]
        return scenes, self._render(u, scenes)

    def _describe(self, u: np.ndarray) -> dict[str, Any]:
        """Choose what is in the scene from its random numbers; boxes are x0, y0, x1, y1 in pixels."""
        count = 1 + int(u[0] * self.max_objects)
        options = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES)}
        objects: list[dict[str, Any]] = [
            {name: _pick(values, u[8 * (j + 1) + i]) for i, (name, values) in enumerate(options.items())}
            for j in range(count)
        ]
        for j in range(1, count):  # no two objects that a caption could not tell apart
            while any(objects[j]["shape"] == o["shape"] and objects[j]["colour"] == o["colour"] for o in objects[:j]):
                objects[j]["shape"] = SHAPES[(SHAPES.index(objects[j]["shape"]) + 1) % len(SHAPES)]
        if count == 1:
            layout = _pick(PLACES, u[1])
            centres = [PLACES[layout]]
        elif count == 2:
            layout = _pick(RELATIONS, u[1])
            centres = list(RELATIONS[layout])
        else:
            layout = "corners"
            places = list(PLACES)[1:]
            del places[int(u[1] * 4)]  # the corner that stays empty
            centres = [PLACES[place] for place in places]
            for item, place in zip(objects, places, strict=True):
                item["place"] = place
        word = _pick(WORDS, u[3]) if u[4] < self.words else None
        shrink = 0.78 if word else 1.0
        for j, (item, (x, y)) in enumerate(zip(objects, centres, strict=True)):
            jitter = 1.2 if count == 1 else 0.6
            x += (2 * u[11 + 8 * j] - 1) * (2.0 if layout in ("above", "below") else jitter)
            y += (2 * u[12 + 8 * j] - 1) * (2.0 if layout in ("left of", "right of") else jitter)
            radius = SIZES[item["size"]] * (1 + 0.06 * (2 * u[13 + 8 * j] - 1)) * shrink * self.size / 32
            x = self.size / 2 + x * shrink * self.size / 32
            y = self.size / 2 * shrink + y * shrink * self.size / 32  # a word keeps the lowest fifth for itself
            item["box"] = [round(float(v), 2) for v in (x - radius, y - radius, x + radius, y + radius)]
        return {"layout": layout, "background": _pick(BACKGROUNDS, u[2]), "objects": objects, "word": word}

    def _render(self, u: np.ndarray, scenes: list[dict[str, Any]]) -> np.ndarray:
        S = self.size
        grid = np.arange(S, dtype=np.float32) + 0.5
        base = np.array([BACKGROUNDS[s["background"]] for s in scenes], np.float32)  # (B, 3)
        base += _colour_jitter(u[:, 32:35])
        angle = (2 * np.pi * u[:, 5]).astype(np.float32)[:, None, None]
        ramp = np.cos(angle) * (grid / S - 0.5)[None, None, :] + np.sin(angle) * (grid / S - 0.5)[None, :, None]
        height = (10 + 14 * u[:, 6]).astype(np.float32)[:, None, None]
        images = base[:, None, None, :] + (height * ramp)[..., None]  # (B, S, S, 3)
        for j in range(self.max_objects):
            for shape in SHAPES:  # one call of a distance function for all scenes whose object j has this shape
                of_shape = [shape in (item["shape"] for item in s["objects"][j : j + 1]) for s in scenes]
                rows = np.flatnonzero(of_shape)
                if not rows.size:
                    continue
                boxes = np.array([scenes[b]["objects"][j]["box"] for b in rows], np.float32)
                radius = ((boxes[:, 2] - boxes[:, 0]) / 2)[:, None, None]
                x = grid[None, None, :] - ((boxes[:, 0] + boxes[:, 2]) / 2)[:, None, None]
                y = grid[None, :, None] - ((boxes[:, 1] + boxes[:, 3]) / 2)[:, None, None]
                cover = np.clip(0.5 - _distance(shape, x, y, radius), 0, 1)[..., None]  # (b, S, S, 1)
                colour = np.array([COLOURS[scenes[b]["objects"][j]["colour"]] for b in rows], np.float32)
                colour += _colour_jitter(u[rows, 14 + 8 * j : 16 + 8 * j])
                images[rows] += cover * (colour[:, None, None, :] - images[rows])
        for b, scene in enumerate(scenes):
            if scene["word"]:
                ink = 20.0 if sum(BACKGROUNDS[scene["background"]]) > 450 else 245.0
                shift = int((u[b, 7] - 0.5) * 0.3 * S)
                cover = np.roll(word_mask(scene["word"], S), shift, axis=1)[..., None]
                images[b] += cover * (ink - images[b])
        return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def captions_of(scene: dict[str, Any]) -> list[str]:
    """Return the short, the medium and the long caption of a scene; the long one names every attribute.

    `scene` has `layout` (a place, a relation, or "corners"), `background`, `objects` (each with `shape`, `colour`,
    `size`, `box` and, in a scene of three, `place`) and `word` (None when there is none).
    """
    objects, layout = scene["objects"], scene["layout"]
    short = _listed([f"{'an' if o['colour'] == 'orange' else 'a'} {o['colour']} {o['shape']}" for o in objects])
    full = [f"a {o['size']} {o['colour']} {o['shape']}" for o in objects]
    where = {place: "in the center" if place == "center" else f"at the {place}" for place in PLACES}
    if len(objects) == 1:
        medium = long = f"{full[0]} {where[layout]}"
    elif len(objects) == 2:
        first, second = short.split(" and ")
        relation = layout if layout in ("above", "below") else f"to the {layout}"
        medium, long = f"{first} {relation} {second}", f"{full[0]} {relation} {full[1]}"
    else:
        medium = _listed(full)
        long = _listed([f"{text} {where[o['place']]}" for text, o in zip(full, objects, strict=True)])
    long = f"{long} on a {scene['background']} background"
    if scene["word"]:
        medium, long = f"{medium}, with a word", f"{long}, with the word {scene['word']}"
    return [short, medium, long]


def uniforms(seed: int, indices: np.ndarray, draws: int) -> np.ndarray:
    """Return (B, draws) numbers in [0, 1) that depend on (seed, index, draw) alone: splitmix64 of their counter."""
    if not 0 <= seed < _LIMIT:
        raise DataError(f"--seed is {seed}, it must be from 0 to 2**40 - 1")
    counter = np.asarray(indices, np.uint64)[:, None] * np.uint64(draws) + np.arange(draws, dtype=np.uint64)
    z = _mix(_mix(counter) + _mix(_mix(np.full(1, seed, np.uint64))))
    return np.right_shift(z, np.uint64(11)).astype(np.float64) / 2**53


def _mix(z: np.ndarray) -> np.ndarray:
    """Return the splitmix64 hash of 64-bit integers."""
    with np.errstate(over="ignore"):
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ np.right_shift(z, np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ np.right_shift(z, np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ np.right_shift(z, np.uint64(31))


@functools.cache
def word_mask(word: str, size: int) -> np.ndarray:
    """Return the coverage (S, S) in [0, 1] of `word`, centred in the lowest fifth of a picture of `size` pixels."""
    font = ImageFont.load_default(size=size * 13.5 / 64)
    canvas = Image.new("L", (size, size))
    ImageDraw.Draw(canvas).text((size / 2, size - 1 - size / 21), word, fill=255, font=font, anchor="ms")
    return np.asarray(canvas, np.float32) / 255


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the distance to the edge of a shape of radius `r` at the origin, negative inside; y grows downwards."""
    if shape == "circle":
        return np.hypot(x, y) - r * 0.92
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - r * 0.82
    if shape == "cross":  # the union of two bars
        bar = r * 0.3
        return np.minimum(np.maximum(abs(x) - r, abs(y) - bar), np.maximum(abs(y) - r, abs(x) - bar))
    if shape == "triangle":  # pointing up: base and two sides, each a half plane
        return np.maximum(y - r * 0.72, (abs(x) * 0.8944 - (y + r) * 0.4472) - 0.02 * r)
    # A five-pointed star: fold the plane onto one half point, then the half plane of its edge.
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    length = np.hypot(x, y)
    px, py = length * np.cos(angle), length * np.sin(angle)
    tip, inner = r * 1.1, r * 0.46
    ix, iy = inner * np.cos(sector / 2), inner * np.sin(sector / 2)
    nx, ny = iy, tip - ix
    return ((px - tip) * nx + py * ny) / np.hypot(nx, ny)


def _pick(options: Any, u: float) -> str:
    names = list(options)
    return names[int(u * len(names))]


def _colour_jitter(u: np.ndarray) -> np.ndarray:
    """Return up to 10 levels of jitter per channel, (B, 3); two random numbers give the third channel its own."""
    third = u[:, 2:3] if u.shape[1] > 2 else (u[:, 0:1] + 7 * u[:, 1:2]) % 1
    return ((np.concatenate([u[:, :2], third], axis=1) * 2 - 1) * 10).astype(np.float32)


def _listed(items: list[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
