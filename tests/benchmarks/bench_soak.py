"""`python -m tests.benchmarks.bench_soak`: both trainings, sampling and the page for an hour: what grows, what stays.

Four programs, each a process of its own with one thread that computes:

    stage1    `fit` of the demo's tokenizer, small, with a loader's worker, validation, checkpoints and the live page
    stage2    `fit` of its prior
    sample    `Prior.sample` and `Tokenizer.decode` in a loop
    page      the playground, asked by a client: uploads, sliders, drawings, edits, likelihoods; sessions come and go

Every few seconds the memory (proportional set size: what processes share is counted once), open files, threads,
processes and shared memory of each program and its children are noted. In the end each program alone is killed, and
what is left of it is listed. Trainings and sampling rest between steps, so that other work is not pushed aside.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image

from data.__main__ import main as data_main
from stage1_tokenizer import Tokenizer
from stage2_prior.base import Prior
from stage2_prior.play.command import free_port, main as play
from tests.killed_run import command

PARTS = ("stage1", "stage2", "sample", "page")
COUNTS = ("megabytes", "files", "threads", "processes", "shared")
CAPTIONS = ("a red circle", "a blue square above a green star", "a small yellow star")
ENDLESS = ["--trainer.max_steps=100000000", "--trainer.val_check_interval=100", "--checkpoint.every_n_steps=50"]
ENDLESS += ["--live.every_n_steps=100", "--data.num_workers=1", "--data.in_memory=false"]


class Rest(pl.Callback):
    """Sleeps `times` the time of every step. The clock is the wall's."""

    def __init__(self, times: float) -> None:
        self.times, self.began = times, 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(self.times * (time.monotonic() - self.began))


# -- the four programs ------------------------------------------------------------------------------------------------


def work(part: str, folder: Path, rest: float, port: int) -> None:
    """Run a program until it is killed."""
    run, data = folder / "run", folder / "data"
    pause = (
        f'--trainer.callbacks+={{"class_path": "tests.benchmarks.bench_soak.Rest", "init_args": {{"times": {rest}}}}}'
    )
    if part == "stage1":
        command("stage1", "fit", folder / "again1", data, *ENDLESS, pause)
    elif part == "stage2":
        command("stage2", "fit", folder / "again2", run / "latents", *ENDLESS, pause)
    elif part == "page":
        play(["--run_dir", str(run), "--data", str(data), "--port", str(port), "--device", "cpu"])
    else:
        draw(run, rest)


def draw(run: Path, rest: float) -> None:
    """Sample and decode for ever, other lengths, guidances and solvers' steps in turn."""
    tokenizer, prior = Tokenizer.from_pretrained(run / "tokenizer"), Prior.from_pretrained(run / "prior")
    generator = torch.Generator().manual_seed(0)
    for number, guidance, steps in zip(
        itertools.cycle((1, 3, 8)), itertools.cycle((1.0, 2.0)), itertools.cycle((2, 4, 6))
    ):
        began = time.monotonic()
        with torch.inference_mode():
            captions = list(itertools.islice(itertools.cycle(CAPTIONS), number))
            tokenizer.decode(prior.sample(captions, guidance, steps, generator=generator))
        time.sleep(rest * (time.monotonic() - began))


def visits(port: int, upload: Path) -> Iterator[None]:
    """What a visitor of the page does, one request at a time; a new session for every round."""
    from gradio_client import Client, handle_file

    for seed in itertools.count():
        visitor = Client(f"http://127.0.0.1:{port}", verbose=False, analytics_enabled=False)
        visitor.predict(handle_file(upload), api_name="/of_file")
        yield
        for k in (1, 4, 16, 2):
            visitor.predict(k, api_name="/unspool")
            yield
        how = (2.0, 4, "", 1.0, seed, "")  # the arguments of `Drawing`
        visitor.predict(CAPTIONS[seed % 3], *how, api_name="/write")
        yield
        visitor.predict(3, CAPTIONS[seed % 3], *how, api_name="/keep")
        yield
        visitor.predict(4, api_name="/swapped")
        visitor.predict(api_name="/walked")
        yield
        visitor.predict("a red circle", "", api_name="/scored")
        yield
        visitor.close()


# -- what is noted ----------------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def measured(pid: int, seen: set[str]) -> dict[str, float]:
    """`COUNTS` of a program; adds to `seen` the segments of shared memory that have a name."""
    counts = dict.fromkeys(COUNTS, 0.0)
    for one in family(pid):
        with contextlib.suppress(OSError, StopIteration):  # a loader's worker that ends meanwhile
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            counts["megabytes"] += next(int(x.split()[1]) for x in lines if x.startswith("Pss:")) / 1024
            files = [os.readlink(f) for f in Path(f"/proc/{one}/fd").iterdir()]
            maps = {
                x.split(maxsplit=5)[5] for x in Path(f"/proc/{one}/maps").read_text().splitlines() if "/dev/shm/" in x
            }
            counts["shared"] += len(maps | {f for f in files if f.startswith("/dev/shm/")})
            seen |= {name for name in maps if not name.endswith("(deleted)")}
            counts["files"] += len(files)
            counts["threads"] += len(list(Path(f"/proc/{one}/task").iterdir()))
            counts["processes"] += 1
    return counts


def slope(minutes: list[float], values: list[float]) -> float:
    """Growth a minute: the median of the slopes between any two notes that are half of the time or more apart.

    Theil 1950; a median, since a collection of garbage or a validation makes a jump that is no growth.
    """
    apart = (minutes[-1] - minutes[0]) / 2
    pairs = itertools.combinations(zip(minutes, values, strict=True), 2)
    return statistics.median([(b - a) / (t - s) for (s, a), (t, b) in pairs if t - s >= apart])


def summary(notes: list[dict[str, Any]], part: str, warm: float) -> dict[str, Any]:
    """Of the notes after `warm` minutes: growth of memory, and the range of every count in both halves."""
    own = [note for note in notes if note["part"] == part and note["minutes"] >= warm]
    half = len(own) // 2
    out: dict[str, Any] = {"part": part, "notes": len(own)}
    out["megabytes_a_minute"] = slope([n["minutes"] for n in own], [n["megabytes"] for n in own])
    for name in COUNTS:
        out[name] = [[min(x), max(x)] for x in ([n[name] for n in own[:half]], [n[name] for n in own[half:]])]
    return out


def left_over(families: dict[str, list[int]], seen: set[str], temporary: Path, port: int) -> dict[str, Any]:
    """What is still there of programs that were killed, 20 s later: processes, shared memory, files, the port."""
    end = time.monotonic() + 20
    while any(map(alive, itertools.chain(*families.values()))) and time.monotonic() < end:
        time.sleep(0.2)
    try:
        free = free_port("127.0.0.1", port) == port
    except ValueError:
        free = False
    return {
        "processes": {part: [p for p in pids if alive(p)] for part, pids in families.items()},
        "shared": sorted(name for name in seen if Path(name).exists()),
        "temporary files": sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file()),
        "port is free": free,
    }


def alive(pid: int) -> bool:
    """Whether there is such a process that is not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


# -- the run ----------------------------------------------------------------------------------------------------------


def prepared(folder: Path) -> None:
    """Scenes, and a tokenizer, latents and a prior that are hardly trained, in `folder`."""
    scenes = ["--source", "scenes", "--num", "400", "--val-fraction", "0.2", "--workers", "1"]
    run, data = folder / "run", folder / "data"
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    assert not data_main(["prepare", *scenes, "--out", str(data)]), "no scenes"
    command("stage1", "fit", run, data, *short)
    command("stage1", "predict", run, data)
    command("stage2", "fit", run, run / "latents", *short)


def soak(
    folder: Path, minutes: float, every: float, rest: float, note: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Run all parts for so many minutes; what is left over in the end. note: takes each note."""
    temporary, port = folder / "tmp", free_port("127.0.0.1", None)
    temporary.mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(buffer, "PNG")
    (folder / "upload.png").write_bytes(buffer.getvalue())
    environment = {**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    programs: dict[str, subprocess.Popen[bytes]] = {}
    seen: set[str] = set()

    def start(part: str) -> None:
        words = ["--part", part, "--folder", str(folder), "--rest", str(rest), "--port", str(port)]
        with (folder / f"{part}.log").open("w") as log:
            line = [sys.executable, "-m", "tests.benchmarks.bench_soak", *words]
            programs[part] = subprocess.Popen(line, stdout=log, stderr=log, env=environment)

    try:
        start("page")
        wait_for(port, programs["page"], folder / "page.log")
        for part in PARTS[:-1]:
            start(part)
        asked, began, next_note, requests = visits(port, folder / "upload.png"), time.monotonic(), 0.0, 0
        while (passed := (time.monotonic() - began) / 60) < minutes:
            ended = [part for part, program in programs.items() if program.poll() is not None]
            assert not ended, (ended, (folder / f"{ended[0]}.log").read_text()[-3000:])
            next(asked)
            requests += 1
            if passed * 60 >= next_note:
                next_note += every
                for part, program in programs.items():
                    note({"minutes": passed, "part": part, **measured(program.pid, seen)})
            time.sleep(0.5 + rest / 10)
        families = {part: family(program.pid) for part, program in programs.items()}
    finally:
        for program in programs.values():
            program.send_signal(signal.SIGKILL)
        for program in programs.values():
            program.wait()
    steps = {stage: steps_of(folder / f"again{stage[-1]}" / stage) for stage in PARTS[:2]}
    left = left_over(families, seen, temporary, port)
    left["uploads, until a page starts again"] = sum(p.is_file() for p in (folder / "run/page_uploads").rglob("*"))
    return {"requests": requests, "steps": steps, "left": left}


def steps_of(stage_dir: Path) -> int:
    """Steps in the last checkpoint of a stage; 0 without one."""
    if not (stage_dir / "checkpoints" / "last.ckpt").is_file():
        return 0
    return int(torch.load(stage_dir / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


def wait_for(port: int, page: subprocess.Popen[bytes], log: Path) -> None:
    """Until the page can be asked. Raises AssertionError where it ends, or is not there after ten minutes."""
    end = time.monotonic() + 600
    while time.monotonic() < end and page.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=30):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:] or "the page does not answer")


def main(arguments: list[str] | None = None) -> None:
    """Print the growth of each part and what is left, and write all notes; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--warm", type=float, help="minutes that are not counted (a quarter of them, ten at most)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two notes")
    parser.add_argument("--rest", type=float, default=3.0, help="sleep after each step, in times of the step")
    parser.add_argument("--out", type=Path, default=Path("runs/soak.json"))
    for internal in ("--part", "--folder", "--port"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.part:
        work(options.part, Path(options.folder), options.rest, int(options.port))
        return
    warm = min(options.minutes / 4, 10) if options.warm is None else options.warm
    notes: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared(folder)
        result = soak(folder, options.minutes, options.every, options.rest, notes.append)
    result["parts"] = [summary(notes, part, warm) for part in PARTS]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**result, "minutes": options.minutes, "warm": warm, "notes": notes}, indent=1))
    for row in result["parts"]:
        ranges = ", ".join(f"{name} {row[name][0]} then {row[name][1]}" for name in COUNTS)
        print(f"{row['part']}: {row['megabytes_a_minute']:+.3f} MB a minute; {ranges}")
    print(f"{result['requests']} requests, steps {result['steps']}; left after SIGKILL: {json.dumps(result['left'])}")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
