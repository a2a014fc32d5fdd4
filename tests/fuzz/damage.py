"""Hostile input as strategies: bytes of real files with edits, and JSON with values that its reader does not expect."""

import copy
import json
import math
import pickle
from typing import Any

from hypothesis import strategies as st

SIZES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
PIECES = (
    b"",
    b"\0",
    b"\0" * 600,
    b"\xff" * 9,
    b"../../x",
    b"{",
    b"[" * 3000,
    b"\n",
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"PAR1",
)


class Program:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('/tmp/unspool-fuzz-was-here').touch()",))


PICKLE = pickle.dumps(Program())

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 64, 2**31, -(2**63), 10**30, 0.5, -0.0, 1e308, math.inf, math.nan),
    *("", " ", "..", "../../x", "/etc/passwd", "a\0b", "\ud800", "\U0001f415" * 40, "x" * 5000, "1", "nan"),
    *("{label}", "{0.__class__}", "%s%n", "train/../../x.tar", "os.system", "pipe:touch x", "val", "__import__('os')"),
)


def values() -> st.SearchStrategy[Any]:
    """Values that a reader of JSON has no reason to expect."""
    scalar = st.sampled_from(SCALARS)
    spec = st.builds(lambda path, args: {"class_path": path, "init_args": args}, scalar, scalar)
    nested: st.SearchStrategy[Any] = st.sampled_from(
        [[], {}, [[]], [None], {"": None}, [[[[[[]]]]]], [1, "a", None], {"a": {"b": []}}]
    )
    return scalar | nested.map(copy.deepcopy) | spec | st.lists(scalar, max_size=4)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries of a document."""
    items = document.items() if isinstance(document, dict) else enumerate(document) if type(document) is list else ()
    return [p for key, value in items for p in ((*path, key), *places(value, (*path, key)))]


@st.composite
def damaged_json(draw: Any, document: Any, edits: int = 3, value: Any = None) -> Any:
    """`document` with entries replaced, taken away, renamed, doubled or exchanged; at times something else entirely."""
    value = value if value is not None else values()
    if draw(st.integers(0, 19)) == 0:
        return draw(value)
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, edits))):
        known = places(document)
        if not known:
            return draw(value)
        path = draw(st.sampled_from(known))
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.integers(0, 9))
        if kind < 6:
            parent[path[-1]] = draw(value)
        elif kind < 8:
            del parent[path[-1]]
        elif kind == 8:
            parent[path[-1]] = [parent[path[-1]]]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "class_path", "init_args", "format", "shards"]))] = draw(value)
    return document


def text_of(document: Any) -> bytes:
    """A document as JSON, half surrogates included."""
    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: Any, samples: list[bytes], edits: int = 5) -> bytes:
    """One of `samples` with a few edits, a piece of another among them."""
    content = bytearray(draw(st.sampled_from(samples)))
    for _ in range(draw(st.integers(1, edits))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.integers(0, 8))
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == 2:
            content[at:at] = draw(st.sampled_from([*PIECES, PICKLE]))
        elif kind == 3:
            content[at:at] = content[at : at + draw(st.integers(1, 512))]
        elif kind == 4:
            size, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            number = draw(st.sampled_from(SIZES)) & ((1 << 8 * size) - 1)
            content[at : at + size] = number.to_bytes(size, order)
        elif kind == 5:
            other = draw(st.sampled_from(samples))
            start = draw(st.integers(0, max(len(other) - 1, 0)))
            content[at : at + 200] = other[start : start + 200]
        elif content:
            content[at] = draw(st.integers(0, 255)) if kind > 6 else content[at] ^ 1 << draw(st.integers(0, 7))
    return bytes(content)
