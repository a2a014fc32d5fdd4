"""The tests that SECURITY.md names are there, and each kind of input that it does not trust names one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_test_that_security_names_exists() -> None:
    named = NAMED.findall(TEXT)
    assert len(named) > 20
    for file, name in named:
        functions = [
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        ]
        assert name in functions, f"SECURITY.md names {file}::{name}, which does not exist"


def test_every_kind_of_input_that_is_not_trusted_has_a_test() -> None:
    untrusted = TEXT.split("## Trusted")[0].split("\n- ")[1:]
    assert len(untrusted) > 10
    for entry in untrusted:
        assert NAMED.search(entry), f"no test stands behind: {entry}"
