"""What `python -m` of a stage answers before it loads torch and Lightning: its commands, and to a word that is none."""

import difflib
import sys
from collections.abc import Mapping


def answered(prog: str, word: str, purposes: Mapping[str, str]) -> int | None:
    """Answer --help, no word at all, and unknown commands: the exit status, or None for a command to be run.

    purposes: what each command does.
    """
    if word in ("", "-h", "--help"):
        width = max(map(len, purposes))
        lines = [f"  {command:{width}}  {purpose}" for command, purpose in purposes.items()]
        head, tail = [f"usage: {prog} COMMAND ...", "", "commands:"], ["", f"Options: {prog} COMMAND --help"]
        print(*head, *lines, *tail, sep="\n")
        return 0 if word else 2
    if word in purposes or word.startswith("-"):
        return None
    near = difflib.get_close_matches(word, purposes, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(purposes)}"
    sys.stderr.write(f"error: {prog} has no command {word}; {hint}\n")
    return 2
