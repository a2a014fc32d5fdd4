"""The parser of both command lines: errors of two lines, with the option that was probably meant."""

import difflib
import re
import sys
from typing import Any, ClassVar, NoReturn

from jsonargparse._common import lenient_check
from jsonargparse._typehints import is_subclass_spec, sub_defaults
from lightning.pytorch.cli import LightningArgumentParser

# what jsonargparse says of an option that it does not know; a group's name, if it names one, and the option's
UNKNOWN = re.compile(
    r"(?:unrecognized arguments: --|Option '|(?:Group '([\w.]+)'|Subcommand '\w+') does not accept option ')([\w.]+)"
)


class ShortErrorParser(LightningArgumentParser):
    """A parser whose errors are two lines: what is wrong, and where the options are listed."""

    command: ClassVar[str] = ""  # as typed; the parsers of nested classes do not know it
    options: ClassVar[frozenset[str]] = frozenset()  # of the command
    complete: ClassVar[set[tuple[str, bool, str]]] = set()  # of the command that is read: see `_check_value_key`

    @classmethod
    def begin(cls, command: str) -> None:
        """Before the options of `command`, as it was typed, are read."""
        cls.command, cls.complete = command, set()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = " ".join(message.split())
        if sentence.startswith("Call to compute_fn of link"):  # a size that is contradicted: see sizes.py
            sentence = sentence.partition(" failed: ")[2]
        sentence += self.suggestion(sentence)
        sys.stderr.write(f"error: {sentence}\nAll options: {self.command} --help\n")
        raise SystemExit(2)

    def suggestion(self, sentence: str) -> str:
        """The options nearest to the one that an error says is unknown."""
        unknown = UNKNOWN.search(sentence)
        if unknown is None:
            return ""
        wrong = ".".join(part for part in unknown.groups() if part)
        known = self.options | {action.dest for action in self._actions if not action.dest.endswith(".help")}
        near = difflib.get_close_matches(wrong, known, n=2, cutoff=0.75)
        return f"; did you mean {' or '.join(near)}?" if near else ""

    def _check_value_key(self, action: Any, value: Any, key: str, cfg: Any, **append: Any) -> Any:
        """As jsonargparse has it, but nothing is checked twice.

        A link of a size does not check the whole model: that is done once, afterwards. With twenty links it was two
        thirds of the time that a command takes to read its options. And a class below a class below a class is checked
        three times by each of them, which was half of the rest: one that was checked, with its defaults, is known.
        """
        if cfg is None and not append and key in ("model", "data"):
            return value
        if append.get("append") or not is_subclass_spec(value) or not hasattr(action, "_typehint"):
            return super()._check_value_key(action, value, key, cfg, **append)
        kind = str(action._typehint), bool(lenient_check.get())  # a lenient check lets what is required be missing
        if (*kind, repr(value)) in self.complete:
            return value
        value = super()._check_value_key(action, value, key, cfg, **append)
        if sub_defaults.get():
            self.complete.add((*kind, repr(value)))
        return value
