"""`python -m tests.benchmarks.scaling`: time and memory of a picture against latents, image side, batch and width.

One of the four varies at a time, the others stay at a middle size; both tokenizer designs, turn by turn. Times are
given in units of the time that the matrix products of one picture of ours would take at the peak of the same turns, at
the middle size, so that they can be compared between machines. Writes a plot and JSON.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from stage1_tokenizer.evaluation.curves import SERIES_COLOURS
from stage1_tokenizer.evaluation.provenance import describe_process
from tests.benchmarks.designs import Size
from tests.benchmarks.measure import Row, compete
from tests.benchmarks.models import OURS, TITOK, Bench

MIDDLE = {"latents": 32, "side": 128, "batch": 8, "width": 256}
VARIED = {"latents": [8, 32, 128], "side": [64, 128, 256], "batch": [1, 8, 32], "width": [128, 256, 512]}
VERBS = ("encode", "decode", "training step")


def point(bench: Bench, turns: int, **sizes: int) -> list[Row]:
    """Rows of both designs at one size; contests are named by their verb."""
    at = MIDDLE | sizes
    size = Size(at["side"], 16, at["latents"], 16, at["width"], at["width"] // 64, (2, 1, 3), (4, 4))
    rows = []
    for contest, contenders in bench.designs("", size, at["batch"]):
        two = {who: contender for who, contender in contenders.items() if who in (TITOK, OURS)}
        rows += compete(contest.split(",")[0], two, bench.dtype, bench.device, turns)
    return rows


def plot(found: dict[str, dict[int, list[Row]]], unit: float, path: Path) -> None:
    """Time (above) and memory (below) of a picture against each of the four."""
    canvas = Figure(figsize=(14, 6.5), dpi=110, layout="constrained")
    axes = canvas.subplots(2, len(found), squeeze=False)
    for column, (what, points) in enumerate(found.items()):
        for place, verb in enumerate(VERBS):
            for who, dashes in ((OURS, "-"), (TITOK, "--")):
                rows = [next(r for r in rows if r.contest == verb and r.name == who) for rows in points.values()]
                style = {"linestyle": dashes, "marker": "o", "color": SERIES_COLOURS[place], "label": f"{verb}, {who}"}
                axes[0, column].plot(list(points), [1 / r.images_per_second / unit for r in rows], **style)
                axes[1, column].plot(list(points), [r.peak_bytes / r.batch / 1e6 for r in rows], **style)
        for row, label in enumerate(("time of a picture", "memory of a picture, MB")):
            axes[row, column].set(xscale="log", yscale="log", xlabel=what, ylabel=label)
            axes[row, column].set_xticks(list(points), [str(value) for value in points])
            axes[row, column].minorticks_off()
    axes[0, 0].legend(fontsize=7)
    canvas.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the exponents between the ends of each line, and write OUT.png and OUT.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling", description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(VARIED), default=list(VARIED))
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"), help="path of both files without its ending")
    options = parser.parse_args(arguments)
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found: dict[str, dict[int, list[Row]]] = {}
    for what in options.only:
        found[what] = {value: point(bench, options.turns, **{what: value}) for value in VARIED[what]}
        ends = list(found[what].values())
        for first, last in zip(ends[0], ends[-1], strict=True):
            growth = first.images_per_second / last.images_per_second
            memory = (last.peak_bytes / last.batch) / max(first.peak_bytes / first.batch, 1)
            print(
                f"{what} x {VARIED[what][-1] / VARIED[what][0]:g}, {first.contest}, {first.name}: time of a picture x "
                f"{growth:.2f}, memory x {memory:.2f}, products x {last.flops_per_image / first.flops_per_image:.2f}",
                flush=True,
            )
    middle = next(r for r in found[options.only[0]][MIDDLE[options.only[0]]] if r.name == OURS)
    unit = middle.share_of_peak / middle.images_per_second
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot(found, unit, options.out.with_suffix(".png"))
    content = {
        "process": describe_process(),
        "middle": MIDDLE,
        "seconds_of_a_unit": unit,
        "points": {
            what: {str(value): [asdict(row) for row in rows] for value, rows in points.items()}
            for what, points in found.items()
        },
    }
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {options.out}.png and .json")


if __name__ == "__main__":
    main()
