"""`python -m tests.benchmarks.bench_threads`: training steps with threads that spin and that sleep while they wait.

One process each for two threads under OpenMP's default (they spin for a while, then sleep), two that sleep at once (the
default of the commands, `stage1_tokenizer.commands`), and one. They take turns on the demo's tokenizer, first on a
machine that is left alone and then beside a loop that keeps one core busy. Wall-clock time: that is what waiting costs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

WAYS = {
    "two threads, OpenMP's default": {"OMP_NUM_THREADS": "2"},
    "two threads, sleeping": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def child() -> None:
    """Make a step, then two for every line of standard input; print seconds a step."""
    import torch

    from stage1_tokenizer.training.launch import keep_freed_memory
    from tests.benchmarks.designs import SIZES, our_design, pictures
    from tests.benchmarks.machine import Machine

    keep_freed_memory()
    machine = Machine(torch.device("cpu"))
    tokenizer, images = our_design(SIZES["demo"]).train(), pictures(48, 32, machine.device)
    step = machine.trained(tokenizer, lambda: tokenizer.total(tokenizer.losses(images)[0]))
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        step()
        print((time.perf_counter() - start) / 2, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Print medians, ratios to the first way, and what the neighbour costs each."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_threads", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child()
        return
    command = [sys.executable, "-m", "tests.benchmarks.bench_threads", "--child"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = {name: subprocess.Popen(command, env=os.environ | way, **pipes) for name, way in WAYS.items()}  # type: ignore[call-overload]
    for process in running.values():
        process.stdout.readline()
    alone: dict[str, float] = {}
    for busy in (False, True):
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        taken: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(options.turns):
            for name, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                taken[name].append(float(process.stdout.readline()))
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
        print("beside one busy process" if busy else "alone")
        first = taken[next(iter(WAYS))]
        for name, times in taken.items():
            ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
            middle = statistics.median(times)
            slower = f", {middle / alone[name]:.2f} times its time alone" if busy else ""
            alone.setdefault(name, middle)
            print(f"  {name:30} {1e3 * middle:6.0f} ms a step, ratio {ratio:.2f}{slower}", flush=True)
    for process in running.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
