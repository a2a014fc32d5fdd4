"""Imports go one way: between packages, and between the floors of a package; no circle, no drawer for leftovers.

    data <- stage1_tokenizer <- stage2_prior
    data:              schema <- pictures <- reading <- sources <- prepare
    stage1_tokenizer:  the model (files at the root) <- text, variants <- evaluation <- training
    stage2_prior:      the model <- heads <- variants <- evaluation <- training, play

An `__init__` hands names on and a `__main__` starts commands: they stand above all floors.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"data": set(), "stage1_tokenizer": {"data"}, "stage2_prior": {"data", "stage1_tokenizer"}}
ROOMS = set(BELOW) | {"tests"}
# floor -> the floors of its package that it may import besides itself; "" is the package's root
FLOORS: dict[str, dict[str, set[str]]] = {
    "data": {
        "": set(),
        "pictures": {""},
        "reading": {"", "pictures"},
        "sources": {"", "pictures", "reading"},
        "prepare": {"", "pictures", "reading", "sources"},
    },
    "stage1_tokenizer": {
        "": set(),
        "text": {""},
        "variants": {"", "text"},
        "evaluation": {"", "text", "variants"},
        "training": {"", "text", "variants", "evaluation"},
    },
    "stage2_prior": {
        "": {"heads"},  # a prior has a head: the model and its heads are one floor, without circles
        "heads": {""},
        "variants": {"", "heads"},
        "evaluation": {"", "heads", "variants"},
        "training": {"", "heads", "variants", "evaluation"},
        "play": {"", "heads", "variants", "evaluation"},
    },
}
LONGEST = 300  # lines of a source file


def imported(source: str) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def sources(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py"))


def floor_of(name: str) -> str:
    """The floor that a dotted name of a package is on: package.floor.file... or package.file."""
    package, *rest = name.split(".")
    return rest[0] if rest and rest[0] in FLOORS[package] else ""


@pytest.mark.parametrize("room", list(BELOW))
def test_a_package_imports_only_packages_below_it(room: str) -> None:
    assert sources(room), f"{room} has no files"
    for file in sources(room):
        wrong = {name.split(".")[0] for name in imported(file.read_text())} & ROOMS - BELOW[room] - {room}
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("room", list(FLOORS))
def test_a_floor_imports_only_floors_below_it(room: str) -> None:
    for file in sources(room):
        if file.stem in ("__init__", "__main__"):
            continue
        own = floor_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        inside = [name for name in imported(file.read_text()) if name.split(".")[0] == room]
        wrong = [name for name in inside if floor_of(name) not in FLOORS[room][own] | {own}]
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_no_files_import_each_other_in_a_circle() -> None:
    files = [file for room in BELOW for file in sources(room) if file.stem not in ("__init__", "__main__")]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    edges = {
        module: {known for name in imported(file.read_text()) for known in (name, name.rpartition(".")[0])} & {*modules}
        for module, file in modules.items()
    }
    left = set(edges)
    while left:  # take away what imports nothing that is left
        free = {module for module in left if not (edges[module] - {module}) & left}
        assert free, f"these import each other in a circle, or stand above one: {', '.join(sorted(left))}"
        left -= free


@pytest.mark.parametrize("room", list(BELOW))
def test_files_are_short_and_have_names_of_their_own(room: str) -> None:
    for file in sources(room):
        assert file.stem not in {"utils", "common", "helpers", "misc"}, f"{file} has no name of its own"
        assert len(file.read_text().splitlines()) <= LONGEST, f"{file.relative_to(ROOT)} is longer than {LONGEST} lines"


def test_the_rule_sees_imports_inside_functions() -> None:
    assert imported("def f():\n    from stage2_prior.prior import Prior\n") == {"stage2_prior.prior.Prior"}
    assert floor_of("stage1_tokenizer.text.towers.TextTower") == "text" and floor_of("data.schema.DataError") == ""
