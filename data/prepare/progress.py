"""How far `prepare` is: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
from typing import IO, Any, cast

from tqdm import tqdm

from data.prepare.engines import Progress


class _Lines:
    """Standard error with every state of the bar on a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar() -> tqdm[Any]:
    """An empty bar for `show`, as a context."""
    terminal = sys.stderr.isatty()
    file = cast(IO[str], sys.stderr if terminal else _Lines())
    return tqdm(desc="prepare", unit=" img", miniters=1, mininterval=0.1 if terminal else 5.0, file=file)


def show(bar: tqdm[Any], progress: Progress) -> None:
    """Bring a bar up to date."""
    if bar.total is None and progress.total is not None:
        bar.total, bar.initial, bar.n = progress.total, progress.samples, progress.samples
    bar.set_postfix_str(f"shard {progress.chunks}/{progress.total_chunks}", refresh=False)
    bar.update(progress.samples - bar.n)
