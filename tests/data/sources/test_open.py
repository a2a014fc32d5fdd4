"""What a path holds is told by looking at it, and a path that holds nothing known gets a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.schema import DataError
from data.sources.open import SourceConfig, open_source


def source(kind: str, path: Path | str, **options: Any) -> SourceConfig:
    return SourceConfig(kind, (str(path),), **options)


@pytest.mark.parametrize("kind", ["auto", "tars"])
def test_pipes_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="would run a command"):
        open_source(source(kind, "pipe:touch /tmp/never"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: p / "nowhere", "no file or folder"),
        (lambda p: (p / "empty").mkdir() or p / "empty", "is empty"),
        (lambda p: [(p / "x").mkdir(), (p / "x" / "notes.md").write_text("hi")] and p / "x", "cannot tell"),
    ],
)
def test_a_path_without_pairs_gets_a_sentence(tmp_path: Path, make: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        open_source(source("auto", make(tmp_path)))
