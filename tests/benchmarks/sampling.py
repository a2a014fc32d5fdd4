"""`python -m tests.benchmarks.sampling`: where the time of a drawn picture goes, at several batches.

The demo's prior, guided, one latent after another and in sets (`SetOrder`): latency of a batch, pictures a second, and
the shares of transformer, head and decoder; "rest" is what lies between them (words, masks, the loop). The networks are
not trained: speed does not depend on the weights. On a GPU every part is waited for, so that shares are right and
latencies a little too long.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from stage1_tokenizer.training.launch import keep_freed_memory
from tests.benchmarks.machine import Machine
from tests.benchmarks.measure import seconds
from tests.same_numbers import build

CAPTION = "a small red circle above a large blue star on a white background"
ORDERS = {"one by one": [], "sets of 1, 1, 2, 4, 8": ["variants/prior_sets"]}
PARTS = ("transformer", "head", "decode")


class Parts:
    """Seconds that the parts of one sampler took since `clear`."""

    def __init__(self, device: torch.device):
        self.device, self.taken = device, defaultdict[str, float](float)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            answers = []
            self.taken[part] += seconds(lambda: answers.append(function(*arguments, **options)), self.device)
            return answers[0]

        return call


def split(machine: Machine, order: list[str], batch: int, turns: int) -> dict[str, float]:
    """Seconds of a batch ("all") and of its parts, medians over the turns after one that warms up."""
    tokenizer = build("stage1", ["stage1/demo"], []).tokenizer.to(machine.device).eval()
    prior = build("stage2", ["stage2/demo", *order], []).prior.to(machine.device).eval()
    prior.vocabulary.fit([CAPTION])
    prior.hold(machine.dtype)
    parts = Parts(machine.device)
    prior.backbone.forward = parts.timed("transformer", prior.backbone.forward)
    prior.head.sample = parts.timed("head", prior.head.sample)
    decode = parts.timed("decode", tokenizer.decode)
    draw = machine.used(lambda: decode(prior.sample([CAPTION] * batch, 2.0)))
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(turns + 1):
        parts.taken.clear()
        found["all"].append(seconds(draw, machine.device))
        for part in PARTS:
            found[part].append(parts.taken[part])
    return {part: statistics.median(times[1:]) for part, times in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sampling", description=__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    machine = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{'batch':>5}  {'order':22}{'ms':>9}{'pictures/s':>12}" + "".join(f"{p:>13}" for p in (*PARTS, "rest")))
    for batch in options.batch:
        for name, order in ORDERS.items():
            taken = split(machine, order, batch, options.turns)
            whole = taken["all"]
            shares = [taken[part] / whole for part in PARTS]
            shares.append(1 - sum(shares))
            cells = f"{1e3 * whole:9.1f}{batch / whole:12.3g}" + "".join(f"{share:13.0%}" for share in shares)
            print(f"{batch:5}  {name:22}{cells}", flush=True)


if __name__ == "__main__":
    main()
