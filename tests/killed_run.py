"""Fits that are killed at random moments and resumed until they are done, against one that no one disturbed.

A process imports everything once and forks a child for every attempt, since starting Python takes longer than a tiny
fit. A third of the kills comes at any time, a third while a checkpoint is half written, a third right before a file
gets its final name. Run it as a program of its own: a process that has trained cannot fork.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.__main__ import main as data_main
from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.training import checkpoint_file
from stage1_tokenizer.training.cli import run_cli
from stage1_tokenizer.training.latent_writer import LatentWriter
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage2_prior.training.latent_data import PriorDataModule
from stage2_prior.training.lit_prior import LitPrior

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MOMENTS = ("any time", "half a checkpoint", "before a name")
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


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_within(work: Callable[[], None], moment: str, chance: random.Random) -> Callable[[], None]:
    """`work` that kills its own process while it writes the n-th checkpoint, or right before the n-th `os.replace`."""
    left = [chance.randrange(1, 4 if moment == MOMENTS[1] else 9)]
    share = chance.random()
    target, name = (checkpoint_file.torch, "save") if moment == MOMENTS[1] else (os, "replace")
    real: Callable[..., Any] = getattr(target, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] > 0:
            return real(*args, **kwargs)
        if moment == MOMENTS[1]:
            real(*args, **kwargs)
            stream = args[1]
            stream.truncate(int(stream.tell() * share))
        return die()

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
    """A fit in one piece and one that is killed so many times -> what happened and what differs in the end."""
    more = [f"--trainer.max_steps={steps}", "--checkpoint.every_n_steps=2"]
    whole, parts, log = folder / f"{stage}_whole", folder / f"{stage}_parts", folder / "log"
    start = time.monotonic()
    assert wait(fork(lambda: command(stage, "fit", whole, data, *more), log)) == 0, log.read_text()[-3000:]
    seconds, chance = time.monotonic() - start, random.Random(seed)
    died, attempts = 0, 0

    def attempt() -> None:
        resume = checkpoint_file.newest_first(parts / stage / "checkpoints")
        command(stage, "fit", parts, data, *more, *(["--resume=auto"] if resume else []))

    while died < kills:
        moment = MOMENTS[attempts % 3]
        attempts += 1
        assert attempts < 20 * kills, "the fit ends before it can be killed"
        if moment == MOMENTS[0]:
            status = wait(fork(attempt, log), chance.uniform(0.3, 0.9) * seconds)
        else:
            status = wait(fork(killed_within(attempt, moment, chance), log))
        assert status in (0, -signal.SIGKILL), log.read_text()[-3000:]
        died += status != 0
    assert wait(fork(attempt, log)) == 0, log.read_text()[-3000:]
    export = "tokenizer" if stage == "stage1" else "prior"
    ends = [
        {
            "checkpoint": torch.load(run / stage / "checkpoints" / "last.ckpt", weights_only=True),
            "export": load_file(run / export / "model.safetensors"),
        }
        for run in (whole, parts)
    ]
    left = [str(path) for path in parts.rglob("*") if ".part" in path.name or path.name == ".export"]
    result = {"stage": stage, "kills": died, "attempts": attempts, "seconds_whole": round(seconds, 1)}
    return {
        **result,
        "differing": differing(ends[0], ends[1]),
        "left_over": left,
        "steps": ends[1]["checkpoint"]["global_step"],
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
