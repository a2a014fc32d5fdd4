"""`python -m tests.benchmarks`: speed of both models; prints a table, writes JSON with where it was measured."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from stage1_tokenizer.evaluation.provenance import describe_process
from tests.benchmarks.measure import table
from tests.benchmarks.models import model_rows

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> None:
    """Measure the configs' models; `arguments` as on the command line, None for the process's own."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--name", default="demo", help="configs/stage1/NAME.yaml and configs/stage2/NAME.yaml")
    parser.add_argument("--seconds", type=float, default=4.0, help="time spent on each row")
    parser.add_argument("--batch", type=int, help="pictures per call (default: the configs')")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"), help="JSON file to write")
    options = parser.parse_args(arguments)
    stage1, stage2 = (ROOT / "configs" / stage / f"{options.name}.yaml" for stage in ("stage1", "stage2"))
    for path in (stage1, stage2):
        if not path.is_file():
            parser.error(f"there is no config {path}; give --name one that both stages have")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    setting, rows = model_rows(stage1, stage2, device, options.seconds, options.batch)
    setting["configs"] = [path.relative_to(ROOT).as_posix() for path in (stage1, stage2)]
    threads, peak = setting["threads"], setting["matmul_peak_flops"] / 1e9
    print(f"{options.name}, {device}, {threads} threads, {setting['format']}: matmul peak {peak:,.0f} GFLOP/s")
    print(table(rows))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    content = {"setting": setting, "process": describe_process(), "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
