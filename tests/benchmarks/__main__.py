"""`python -m tests.benchmarks`: speed as ratios to a named baseline, turn by turn in one process; a table and JSON.

    encode, decode, training step   ours against TiTok's design at equal parameters (demo, S and B sizes)
    sample, prior's training step   the demo's prior against a MAR-style head and a MAR-style masked prior
    prepare                         against a loop over PIL

Beside it: `bench_prior` (heads at 100 M parameters), `bench_tokenizers` (loss against time), `bench_data` (the data
room), `scaling` (time and memory against sizes, as a plot), `costs` (what a config costs), `gpu` (one CUDA machine).
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from stage1_tokenizer.evaluation.provenance import describe_process
from tests.benchmarks.designs import SIZES
from tests.benchmarks.measure import Row, clock_name, compete, matmul_peak, table
from tests.benchmarks.models import Bench, data_rows

CONTESTS = ("tokenizer", "prior", "data")


def contests(options: argparse.Namespace, device: torch.device) -> Iterator[list[Row]]:
    """The rows of each contest that was asked for."""
    bench, turns = Bench(device, options.compile), options.turns
    if "tokenizer" in options.only:
        for size in options.sizes:
            for batch in [options.demo_batch] if size == "demo" else options.batch:
                for contest, contenders in bench.tokenizers(size, batch):
                    yield compete(f"{contest}, batch {batch}", contenders, bench.dtype, device, turns)
    if "prior" in options.only:
        for contest, contenders in bench.priors(options.demo_batch, options.demo_batch):
            yield compete(f"{contest}, batch {options.demo_batch}", contenders, bench.dtype, device, turns)
    if "data" in options.only:
        yield data_rows(device, turns)


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for; `arguments` as on the command line, None for the process's own."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["demo", "S"], help="of the tokenizers")
    parser.add_argument("--batch", nargs="+", type=int, default=[8], help="pictures per call at 256 pixels")
    parser.add_argument("--demo_batch", type=int, default=48, help="pictures per call at the demo's size")
    parser.add_argument("--turns", type=int, default=5, help="timed calls of each contender")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.turns < 1 or min([options.demo_batch, *options.batch]) < 1:
        parser.error("got a number below 1 among --turns, --batch and --demo_batch; give 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    dtype = Bench(device).dtype
    setting = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "format": str(dtype).removeprefix("torch."),
        "clock": clock_name(device),
        "matmul_peak_flops": matmul_peak(dtype, device, 5),
    }
    print(", ".join(f"{name} {value:.3g}" if name.endswith("flops") else f"{value}" for name, value in setting.items()))
    rows: list[Row] = []
    for found in contests(options, device):
        print(table(found, header=not rows), flush=True)
        rows += found
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"setting": setting, "process": describe_process(), "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
