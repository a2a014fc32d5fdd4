"""Fits that are killed at random moments and resumed until they are done, against one that no one disturbed.

A process imports everything once and forks a child for every attempt, since starting Python takes longer than a tiny
fit. Kills come in turn in a step (between gradients and weights), while a checkpoint is half written, right before a
file gets its final name, at any time, and while a model is exported. A fit that is done is compared, and a further one
is begun in a folder of its own until the kills are used up; the last ends undisturbed. Run it as a program of its own:
a process that has trained cannot fork.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.__main__ import main as data_main
from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.training import checkpoint_file, optim
from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.latent_writer import LatentWriter
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MOMENTS = ("in a step", "half a checkpoint", "before a name", "any time", "in an export")
# Lightning counts begun epochs and batches of the last validation, also where a kill came between: nothing reads them.
COUNTERS = re.compile(r"\.loops\.fit_loop\.(epoch_progress\.\w+\.(ready|started)|epoch_loop\.val_loop\..*)$")
SMALL = ["accelerator=cpu", "enable_progress_bar=false", "val_check_interval=6", "limit_val_batches=1"]


def command(stage: str, word: str, run: Path, data: Path, *more: str) -> None:
    """One command of a stage on a small version of the demo's config."""
    words = [f"--config={CONFIGS / stage / 'demo.yaml'}", f"--run_dir={run}", "--sizes.width=32", "--precision=32-true"]
    words += [f"--trainer.{option}" for option in SMALL] + ["--data.batch_size=8", "--data.val_batch_size=16"]
    words += [f"--data.data_dir={data}", *(["--model.passes.statistics_images=16"] if stage == "stage1" else [])]
    if stage == "stage1":
        run_cli(stage, LitTokenizer, ImageDataModule, stage, [word, *words, *more], [LatentWriter()])
    else:
        words.append(f"--model.tokenizer_dir={data.parent / 'tokenizer'}")  # the page decodes what it draws
        run_cli(stage, LitPrior, PriorDataModule, stage, [word, *words, *more])


def fork(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a child process, with its output in `log`; returns the child's id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int, seconds: float | None = None) -> int:
    """Wait for a child, kill it after so many seconds; returns its exit status, negative for a signal."""
    end = time.monotonic() + (seconds if seconds is not None else 600)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_within(work: Callable[[], None], moment: str, steps: int, chance: random.Random) -> Callable[[], None]:
    """`work` that kills its own process in its n-th step, checkpoint, `os.replace` or export; `moment` says which."""
    target, name, most = {
        MOMENTS[0]: (optim.MuonAdamW, "step", max(steps // 2, 1)),
        MOMENTS[1]: (checkpoint_file.torch, "save", 4),
        MOMENTS[2]: (os, "replace", 8),
        MOMENTS[4]: (safetensors.torch, "save_file", 1),
    }[moment]
    left, share = [chance.randint(1, most)], chance.random()
    real: Callable[..., Any] = getattr(target, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] > 0:
            return real(*args, **kwargs)
        if moment == MOMENTS[0]:
            kwargs["closure"]()
        elif moment == MOMENTS[1]:
            real(*args, **kwargs)
            args[1].truncate(int(args[1].tell() * share))
        elif moment == MOMENTS[4]:
            real(*args, **kwargs)
            os.truncate(args[1], int(os.stat(args[1]).st_size * share))
        os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with mock.patch.object(target, name, counted):
            work()

    return run


def differing(one: Any, two: Any, place: str = "") -> list[str]:
    """Places where two checkpoints differ in any bit."""
    if isinstance(one, Tensor):
        same = isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        return [] if same else [place]
    if isinstance(one, dict):
        if not isinstance(two, dict) or one.keys() != two.keys():
            return [place]
        return [d for key in one for d in differing(one[key], two[key], f"{place}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [place]
        return [d for i, (a, b) in enumerate(zip(one, two, strict=True)) for d in differing(a, b, f"{place}[{i}]")]
    return [] if one == two else [place]


def disturbed(stage: str, folder: Path, data: Path, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """A fit in one piece, and fits that are killed so many times in all -> what happened and what differs."""
    more = [f"--trainer.max_steps={steps}", "--checkpoint.every_n_steps=2"]
    whole, log, name = folder / f"{stage}_whole", folder / "log", "tokenizer" if stage == "stage1" else "prior"
    start = time.monotonic()
    assert wait(fork(lambda: command(stage, "fit", whole, data, *more), log)) == 0, log.read_text()[-3000:]
    seconds, chance = time.monotonic() - start, random.Random(seed)
    died, attempts, fits = dict.fromkeys(MOMENTS, 0), 0, 0
    differs, left = [], []
    undisturbed = end_of(whole, stage, name)
    while sum(died.values()) < kills:
        fits += 1
        parts = folder / f"{stage}_parts{fits}"

        def attempt(parts: Path = parts) -> None:
            resume = checkpoint_file.newest_first(parts / stage / "checkpoints")
            command(stage, "fit", parts, data, *more, *(["--resume=auto"] if resume else []))

        status = -signal.SIGKILL
        while status:
            moment = None if sum(died.values()) == kills else MOMENTS[sum(died.values()) % len(MOMENTS)]
            attempts += 1
            if moment is None:
                status = wait(fork(attempt, log))
            elif moment == "any time":
                status = wait(fork(attempt, log), chance.uniform(0.1, 0.9) * seconds)
            else:
                status = wait(fork(killed_within(attempt, moment, steps, chance), log))
            assert status in ((0, -signal.SIGKILL) if moment else (0,)), log.read_text()[-3000:]
            if status and moment:
                died[moment] += 1
        differs += differing(undisturbed, end_of(parts, stage, name), str(fits))
        left += [str(path) for path in parts.rglob("*") if ".part" in path.name or path.name == ".export"]
    result = {"stage": stage, "kills": sum(died.values()), "when": died, "attempts": attempts, "fits": fits}
    counted = [place for place in differs if COUNTERS.search(place)]
    result |= {"steps": steps, "seconds_whole": round(seconds, 1), "counters": counted, "left_over": left}
    return {**result, "differing": [place for place in differs if place not in counted]}


def end_of(run: Path, stage: str, name: str) -> dict[str, Any]:
    """What a fit leaves: its last checkpoint and its export."""
    return {
        "checkpoint": torch.load(run / stage / "checkpoints" / "last.ckpt", weights_only=True),
        "export": load_file(run / name / "model.safetensors"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print one line of JSON per stage; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each stage")
    parser.add_argument("--steps", type=int, default=24, help="of each fit")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, log = folder / "data", folder / "log"
        scenes = ["--source", "scenes", "--num", "80", "--val-fraction", "0.2", "--workers", "1", "--out", str(data)]
        assert wait(fork(lambda: sys.exit(data_main(["prepare", *scenes])), log)) == 0, log.read_text()
        several = options.kills, options.steps, options.seed
        print(json.dumps(disturbed("stage1", folder, data, *several)), flush=True)
        whole = folder / "stage1_whole"
        assert wait(fork(lambda: command("stage1", "predict", whole, data), log)) == 0, log.read_text()[-3000:]
        print(json.dumps(disturbed("stage2", folder, whole / "latents", *several)), flush=True)


if __name__ == "__main__":
    main()
