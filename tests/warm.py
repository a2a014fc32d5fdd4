"""Commands in processes of their own that start warm: forked from a process that has imported torch and Lightning.

A cold start of a command costs seconds of imports; tests that need another process, or two ranks, take one from here.
"""

import atexit
import io
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

IMPORTS = ("tests.tiny_run", "tests.tiny", "stage1_tokenizer.__main__", "stage2_prior.training.lit_prior")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(IMPORTS))
atexit.register(lambda: multiprocessing.forkserver._forkserver._stop())  # type: ignore[attr-defined]


@dataclass
class Done:
    """What a process left: its exit status and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


def ranks(number: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Done]:
    """`function(*arguments)` in so many processes that find each other as a launcher's ranks do (LOCAL_RANK, ...)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(number), "NODE_RANK": "0"}
    return _run([(shared | {"LOCAL_RANK": str(rank)}, function, arguments) for rank in range(number)], timeout)


def command(module: str, *words: str, timeout: float = 120.0) -> Done:
    """`python -m module words`."""
    return _run([({}, _as_main, (module, words))], timeout)[0]


def _as_main(module: str, words: Sequence[str]) -> None:
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run(calls: list[tuple[dict[str, str], Callable[..., Any], Sequence[Any]]], timeout: float) -> list[Done]:
    with TemporaryDirectory() as folder:
        outputs = [Path(folder) / str(i) for i in range(len(calls))]
        processes = [
            _context.Process(target=_child, args=(str(output), *call))
            for output, call in zip(outputs, calls, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)  # ranks that do not agree would wait for each other for half an hour
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        return [
            Done(process.exitcode or 0, *(output.with_suffix(end).read_text() for end in (".out", ".err")))
            for process, output in zip(processes, outputs, strict=True)
        ]


def _child(output: str, environment: dict[str, str], function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Run with these variables, standard output and error in files; the exit status is that of the function."""
    for number, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + end, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0, closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0, closefd=False), write_through=True)
    os.environ |= environment
    function(*arguments)
