"""Who writes the chunks: processes of this machine, one task of an array of machines, or a Ray cluster.

All of them call `chunks.write_chunk` with the same arguments, so that the bytes do not depend on who did it.
Chunks are independent: an array of tasks needs nothing but a shared file system, and `python -m data finalize` when all
have ended. Ray is an optional dependency; it adds that tasks move to whichever node is free and are tried again.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.prepare.chunks import Chunk, fingerprint_of, plan, write_chunk
from data.prepare.finalize import finalize, is_finished, write_plan
from data.prepare.options import PrepareConfig
from data.prepare.records import read_record
from data.schema import DataError, Source
from data.sources.open import SourceConfig, find_kind, open_source

_POLL = 0.3  # seconds between two reports


@dataclass(frozen=True)
class Progress:
    """How far a run is. `total` is None where a source cannot tell how many samples it has."""

    samples: int
    total: int | None
    chunks: int
    total_chunks: int


@dataclass(frozen=True)
class Job:
    """What a process needs to write chunks."""

    config: PrepareConfig
    out: Path
    fingerprint: str


Engine = Callable[[Job, list[Chunk]], Iterator[tuple[int, int]]]  # yields (samples, chunks) done so far


def run(
    config: PrepareConfig,
    out: Path,
    engine: Engine,
    report: Callable[[Progress], None],
    num_tasks: int = 1,
    task_id: int = 0,
) -> dict[str, Any] | None:
    """Prepare a dataset, or one task's share of it.

    Args:
        config: what to make.
        out: the data directory, created where needed. A finished one with the same options is left as it is.
        engine: `processes(n)` or `ray`.
        report: called now and then.
        num_tasks, task_id: with more than one task, this one writes every num_tasks-th chunk and does not finalize.

    Returns:
        The manifest; None where other tasks still have to write their share.

    Raises:
        DataError: the source is wrong or changed while it was read, or `out` cannot be written.
    """
    if not 0 <= task_id < num_tasks:
        raise DataError(f"task {task_id} of {num_tasks}: wanted --task-id from 0 to --num-tasks - 1")
    if config.source.kind == "auto":  # once, since the output may come to lie within the path
        config = replace(config, source=replace(config.source, kind=find_kind(config.source.path)))
    if config.source.kind == "tars" and any(
        out.resolve().is_relative_to(Path(p).resolve()) for p in config.source.path
    ):
        raise DataError(f"--out {out} is below --path, so that its shards would become part of the source; move it")
    source = open_source(config.source)
    fingerprint = fingerprint_of(source, config)
    finished = is_finished(out, fingerprint)
    if finished is not None:
        return finished
    chunks = plan(source, config)
    write_plan(out, config, chunks, fingerprint, getattr(source, "attribution", ""))
    mine = [chunk for chunk in chunks if chunk.number % num_tasks == task_id]
    todo = [chunk for chunk in mine if read_record(out, chunk.number, fingerprint) is None]
    total = sum(chunk.stop - chunk.start for chunk in mine) if source.unit == "img" else None
    before = sum(chunk.stop - chunk.start for chunk in mine) - sum(chunk.stop - chunk.start for chunk in todo)
    before = before if source.unit == "img" else 0
    report(Progress(before, total, len(mine) - len(todo), len(mine)))
    for samples, done in engine(Job(config, out, fingerprint), todo):
        report(Progress(before + samples, total, len(mine) - len(todo) + done, len(mine)))
    if fingerprint_of(open_source(config.source), config) != fingerprint:
        raise DataError(f"the source changed while it was read, so {out} is a mixture; delete it and prepare again")
    return finalize(out) if num_tasks == 1 else None


def processes(workers: int) -> Engine:
    """Return an engine of `workers` processes; with one, the work is done in this process."""
    if workers < 1:
        raise DataError(f"--workers is {workers}, wanted at least 1")

    def engine(job: Job, chunks: list[Chunk]) -> Iterator[tuple[int, int]]:
        if workers == 1 or len(chunks) <= 1:
            yield from _in_this_process(job, chunks)
            return
        counter = multiprocessing.Value("q", 0)
        pool = ProcessPoolExecutor(min(workers, len(chunks)), initializer=_start, initargs=(job, counter, os.getpid()))
        try:
            waiting = {pool.submit(_work, chunk) for chunk in chunks}
            while waiting:
                ready, waiting = wait(waiting, _POLL, FIRST_COMPLETED)
                for future in ready:
                    future.result()
                yield counter.value, len(chunks) - len(waiting)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed (out of memory?); run again to continue, perhaps with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return engine


def _in_this_process(job: Job, chunks: list[Chunk]) -> Iterator[tuple[int, int]]:
    source, samples = open_source(job.config.source), 0

    def tick() -> None:
        nonlocal samples
        samples += 1

    for done, chunk in enumerate(chunks, 1):
        write_chunk(source, job.config, chunk, job.out, job.fingerprint, tick)
        yield samples, done


_process: tuple[Source, Job, Callable[[], None]] | None = None  # of a worker: the source is opened once


def _start(job: Job, counter: Any, parent: int) -> None:
    """Set up a worker process, which ends itself when its parent was killed."""
    global _process

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    _process = (open_source(job.config.source), job, tick)


def _work(chunk: Chunk) -> None:
    assert _process is not None, "the pool starts its processes with _start"
    source, job, tick = _process
    write_chunk(source, job.config, chunk, job.out, job.fingerprint, tick)


@functools.lru_cache(maxsize=1)
def _opened(config: SourceConfig) -> Source:
    """Open a source once per process: a captions file may take longer than a chunk."""
    return open_source(config)


def ray(job: Job, chunks: list[Chunk]) -> Iterator[tuple[int, int]]:
    """Write the chunks as tasks of a Ray cluster: the one that `RAY_ADDRESS` names, else one on this machine.

    Raises:
        DataError: Ray is not installed, or a task failed three times.
    """
    try:
        import ray as cluster
    except ImportError as error:
        raise DataError("--engine ray needs Ray; install it with: pip install 'unspool[ray]'") from error
    if not cluster.is_initialized():
        cluster.init(include_dashboard=False, log_to_driver=False)

    @cluster.remote(max_retries=3)
    def work(job: Job, chunk: Chunk) -> int:
        samples = [0]

        def tick() -> None:
            samples[0] += 1

        write_chunk(_opened(job.config.source), job.config, chunk, job.out, job.fingerprint, tick)
        return samples[0]

    absolute = Job(job.config, job.out.absolute(), job.fingerprint)  # workers have another working directory
    waiting = [work.remote(absolute, chunk) for chunk in chunks]
    samples = done = 0
    while waiting:
        ready, waiting = cluster.wait(waiting, timeout=_POLL)
        for reference in ready:
            try:
                samples += cluster.get(reference)
            except cluster.exceptions.RayError as error:
                raise DataError(f"a Ray task failed: {error}"[:500]) from error
            done += 1
        yield samples, done


ENGINES: dict[str, Callable[[int], Engine]] = {"processes": processes, "ray": lambda workers: ray}
