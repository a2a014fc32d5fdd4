"""Imports go one way: data <- stage1_tokenizer <- stage2_prior; no drawer for leftovers; data needs no model code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"data": set(), "stage1_tokenizer": {"data"}, "stage2_prior": {"data", "stage1_tokenizer"}}
ROOMS = set(BELOW) | {"tests"}


def imported_rooms(source: str) -> set[str]:
    """The project's packages that a file imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names.append(node.module or "")
    return {name.split(".")[0] for name in names} & ROOMS


@pytest.mark.parametrize("room", list(BELOW))
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room} has no files"
    for file in files:
        wrong = imported_rooms(file.read_text()) - BELOW[room] - {room}
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"
        assert file.stem not in {"utils", "common", "helpers", "misc"}, f"{file} has no name of its own"


def test_the_rule_sees_imports_inside_functions() -> None:
    assert imported_rooms("def f():\n    from stage2_prior.prior import Prior\n") == {"stage2_prior"}
