"""Which samples and captions are left out, and why: every rule gives a reason that is counted and listed.

Near-duplicates are found by a difference hash of 128 bits: the picture is shrunk to 9 x 8 and 8 x 9 grey values, and a
bit is set where a value is below its neighbour. Two pictures whose hashes differ in at most `bits` places count as the
same; of each such group the first in the order of the source stays. Pairs are found by cutting the hash into bits + 1
bands: if at most `bits` places differ, one band is equal, so only pictures that share a band are compared.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.schema import DataError, Drop

_BLOCK = 1024


@dataclass(frozen=True)
class Filters:
    """Rules for pictures and captions; the defaults refuse next to nothing.

    Args:
        min_side: shortest side in pixels, before resizing.
        max_aspect: longest side over shortest side, before resizing.
        max_pixels: width times height in the header; larger ones are never decoded.
        min_caption, max_caption: length of a caption in characters. A caption outside is left out; a sample whose
            captions are all left out is dropped.
        near_duplicates: places in which the hashes of two pictures may differ and they still count as the same;
            None keeps all.
    """

    min_side: int = 1
    max_aspect: float = 20.0
    max_pixels: int = 64_000_000
    min_caption: int = 1
    max_caption: int = 5000
    near_duplicates: int | None = None

    def __post_init__(self) -> None:
        if self.min_side < 1 or self.max_pixels < 1:
            raise DataError(f"min_side {self.min_side} and max_pixels {self.max_pixels} must be at least 1")
        if self.max_aspect < 1:
            raise DataError(f"max_aspect is {self.max_aspect}, it is longest over shortest side, so at least 1")
        if not 1 <= self.min_caption <= self.max_caption:
            raise DataError(f"captions of {self.min_caption} to {self.max_caption} characters: wanted 1 <= min <= max")
        if self.near_duplicates is not None and not 0 <= self.near_duplicates <= 16:
            raise DataError(f"near_duplicates is {self.near_duplicates}, wanted 0 to 16 of the hash's 128 bits")

    def size_reason(self, width: int, height: int) -> tuple[str, str] | None:
        """Return (reason, detail) where a picture of this size is left out."""
        shortest, longest = min(width, height), max(width, height)
        if shortest < self.min_side:
            return "too small", f"{width} x {height}, the shortest side is under {self.min_side}"
        if longest > self.max_aspect * shortest:
            return "aspect", f"{width} x {height} is more than {self.max_aspect} to 1"
        return None

    def choose_captions(self, key: str, captions: list[str], counts: Counter[str]) -> tuple[list[str], list[Drop]]:
        """Return the captions that stay, cleaned, and a drop for each other one; `counts` is added to."""
        kept: list[str] = []
        left_out: list[Drop] = []
        for number, caption in enumerate(captions):
            if len(caption) > self.max_caption:
                reason, detail = "caption too long", f"{len(caption)} characters, at most {self.max_caption} are kept"
            else:
                clean = clean_caption(caption)
                if len(clean) >= self.min_caption:
                    counts["kept"] += 1
                    if "\ufffd" in caption or any(ord(c) < 32 and c not in "\t\r\n" for c in caption):
                        counts["repaired"] += 1
                    kept.append(clean)
                    continue
                reason = "caption empty" if not clean else "caption too short"
                detail = f"{len(clean)} characters, at least {self.min_caption} are wanted"
            counts[reason] += 1
            left_out.append(Drop(key, reason, f"caption {number}: {detail}"))
        return kept, left_out


def clean_caption(caption: str) -> str:
    """Return `caption` on one line, without control characters, broken UTF-8 or runs of spaces."""
    printable = "".join(c if c.isprintable() and c != "\ufffd" else " " for c in caption)
    return " ".join(printable.split())


def picture_hash(picture: Image.Image) -> bytes:
    """Return the difference hash of an RGB picture: 16 bytes, equal for equal pictures, close for close ones."""
    grey = picture.convert("L")
    wide = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    tall = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), np.int16)
    bits = np.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (tall[1:] > tall[:-1]).ravel()])
    return np.packbits(bits).tobytes()


def near_duplicates(hashes: np.ndarray, bits: int) -> dict[int, int]:
    """Return {picture: earlier picture that stays} of all pictures that are near-duplicates.

    Args:
        hashes: (N, 16) uint8, of `picture_hash`, in the order in which the first one stays.
        bits: places that may differ.
    """
    _, first, group = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    first_of = first[group.ravel()]  # (N,) equal hashes
    unique = np.sort(first)  # (M,) one of each
    near: dict[int, list[int]] = {}
    for earlier, later in _close_pairs(hashes[unique], bits) if bits else ():
        near.setdefault(int(unique[later]), []).append(int(unique[earlier]))
    gone: dict[int, int] = {}
    for picture in map(int, unique):
        standing = [other for other in sorted(near.get(picture, ())) if other not in gone]
        if standing:
            gone[picture] = standing[0]
    for picture, original in enumerate(map(int, first_of)):
        if picture != original:
            gone[picture] = gone.get(original, original)
    return gone


def _close_pairs(hashes: np.ndarray, bits: int) -> set[tuple[int, int]]:
    """Return all pairs (i < j) of different hashes (M, 16) that differ in at most `bits` places."""
    spread = np.unpackbits(hashes, axis=1)  # (M, 128)
    pairs: set[tuple[int, int]] = set()
    for band in np.array_split(np.arange(128), bits + 1):
        values = np.packbits(spread[:, band], axis=1)
        order = np.lexsort(values.T)
        same = (values[order[1:]] == values[order[:-1]]).all(1)
        edges = np.flatnonzero(~same) + 1
        for members in np.split(order, edges):
            for start in range(0, len(members) if len(members) > 1 else 0, _BLOCK):
                rows = members[start : start + _BLOCK]
                for begin in range(start, len(members), _BLOCK):
                    columns = members[begin : begin + _BLOCK]
                    distance = np.bitwise_count(hashes[rows][:, None] ^ hashes[columns][None]).sum(2, dtype=np.int64)
                    for a, b in zip(*np.nonzero(distance <= bits), strict=True):
                        if rows[a] != columns[b]:
                            i, j = int(rows[a]), int(columns[b])
                            pairs.add((min(i, j), max(i, j)))
    return pairs
