"""What `python -m` of a stage answers before it loads torch and Lightning: its commands, and to a word that is none."""

import difflib
import os
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
        let_threads_sleep()
        return None
    near = difflib.get_close_matches(word, purposes, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(purposes)}"
    sys.stderr.write(f"error: {prog} has no command {word}; {hint}\n")
    return 2


def let_threads_sleep() -> None:
    """Threads of a product that have nothing to do sleep, instead of spinning on the core that another one waits for.

    Beside one busy process steps take .45 of the time, alone 1.1 times as long (tests/benchmarks/bench_threads.py, two
    cores). OpenMP reads it when torch is imported; what the environment says already is kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
