"""JSON that someone else may have written: parsed, and looked at before its entries are used.

A form is a type (`int` is no bool), a dictionary of forms by name (further entries may be there), a list of one form,
or `Named`: a dictionary with any names of a pattern and values of one form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SHARD_NAME = r"(train|val)/[A-Za-z0-9_-]+\.tar"  # never a path that leads out of its directory


@dataclass(frozen=True)
class Named:
    """A dictionary whose names all match `pattern` and whose values all have the form `value`."""

    value: Any
    pattern: str = r"[\s\S]*"


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, with a ValueError for what is nested too deeply and for numbers of thousands of digits, too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def misformed(content: Any, form: Any, place: str = "it") -> str | None:
    """Where `content` is not of `form`, in words; None where it is."""
    entries: Iterable[tuple[Any, Any, str]] = ()
    wanted: Any = list if isinstance(form, list) else dict if isinstance(form, (dict, Named)) else object
    if not isinstance(content, wanted):
        return f"{place} is a {type(content).__name__}"
    if isinstance(form, Named):
        wrong = next((name for name in content if not re.fullmatch(form.pattern, name)), None)
        if wrong is not None:
            return f"{place} has an entry {wrong[:40]!r}"
        entries = ((value, form.value, f"{place}.{name}"[:80]) for name, value in content.items())
    elif isinstance(form, dict):
        missing = next((name for name in form if name not in content), None)
        if missing is not None:
            return f"{place} has no {missing}"
        entries = ((content[name], value, f"{place}.{name}") for name, value in form.items())
    elif isinstance(form, list):
        entries = ((value, form[0], f"an entry of {place}") for value in content)
    elif not isinstance(content, form) or (form is int and (isinstance(content, bool) or abs(content) >= 2**63)):
        return f"{place} is {content!r:.40}"
    return next(filter(None, (misformed(*entry) for entry in entries)), None)
