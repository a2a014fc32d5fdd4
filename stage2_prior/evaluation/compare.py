"""Groups of runs beside each other, seeds of one setting being a group: mean, spread and difference of their figures.

    python -m stage2_prior compare --out runs/text_cost \
        --runs text runs/demo runs/demo_seed1 runs/demo_seed2 --runs no_text runs/demo_no_text runs/no_text_seed1

Reads what `test` of both stages wrote (reconstruction/metrics.json and generation/metrics.json, at least one of them in
every run) and writes OUT/report.html and OUT/metrics.json. Figures are named by their path in those files, led by the
report; `--figures` takes other shell patterns of such names. What only some runs of a group measured is the mean over
those, with their number beside it.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from stage1_tokenizer.evaluation.provenance import provenance
from stage1_tokenizer.evaluation.report import Report

REPORTS = ("reconstruction", "generation")
FIGURES = (
    "reconstruction.psnr.*",
    "reconstruction.frechet*.reconstruction.*",
    "reconstruction.classifier.reconstruction.*.all",
    "reconstruction.retrieval.long.recall.*.1",
    "reconstruction.retrieval.caption.recall.*.1",
    "generation.distances.generated_real.*",
    "generation.faithfulness.[0-9]*.all",
    "generation.faithfulness.[0-9]*.[12] object*",
    "generation.latents.*.lowest",
    "generation.latents.*.highest",
    "generation.nll.nats_per_latent",
    "generation.captioning.right",
    "generation.captioning.nats_per_token",
)


class ReportError(ValueError):
    """Runs without reports, or without the figures that are asked for."""


class Summed(NamedTuple):
    """A figure over the runs of a group that measured it."""

    mean: float
    std: float | None  # sample standard deviation, None for one run
    n: int

    def text(self, of: int) -> str:
        spread = "" if self.std is None else f" ± {self.std:.3g}"
        return f"{self.mean:.4g}{spread}" + ("" if self.n == of else f" (n = {self.n} of {of})")


def numbers(tree: Any, name: str) -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every number below `tree`."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from numbers(value, f"{name}.{key}")
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield name, float(tree)


def read_metrics(run_dir: Path, report: str) -> dict[str, Any]:
    """metrics.json of the report "reconstruction" or "generation". Raises ReportError where it is missing."""
    file = run_dir / report / "metrics.json"
    if not file.is_file():
        stage = {"reconstruction": "stage1_tokenizer", "generation": "stage2_prior"}[report]
        raise ReportError(f"there is no {file}; write it with `python -m {stage} test` for this run")
    metrics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return metrics


def figures_of(run_dir: Path) -> dict[str, float]:
    """All numbers of a run's reports by dotted name. Raises ReportError for a run that has neither."""
    reports = [name for name in REPORTS if (run_dir / name / "metrics.json").is_file()] or REPORTS[:1]
    return dict(pair for name in reports for pair in numbers(read_metrics(run_dir, name), name))


def summed(values: Sequence[float]) -> Summed | None:
    """Mean and spread; None of no values."""
    if not values:
        return None
    return Summed(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def compare(groups: dict[str, list[Path]], out: Path, figures: Sequence[str] = FIGURES) -> tuple[Path, list[list[str]]]:
    """Write the page to `out`; returns its path and the table. Raises ReportError, also where no figure matches."""
    read = {name: [figures_of(run) for run in runs] for name, runs in groups.items()}
    known = list(dict.fromkeys(figure for runs in read.values() for run in runs for figure in run))
    names = list(dict.fromkeys(figure for pattern in figures for figure in known if fnmatchcase(figure, pattern)))
    if not names:
        raise ReportError(f"these runs have none of the figures {', '.join(figures)}; give other --figures")
    sums = {
        figure: {name: summed([run[figure] for run in runs if figure in run]) for name, runs in read.items()}
        for figure in names
    }
    first, *others = groups
    header = ["", first, *(heading for name in others for heading in (name, "difference"))]
    sizes = {name: len(runs) for name, runs in groups.items()}
    rows = [[figure, *_cells(by_group, sizes)] for figure, by_group in sums.items()]
    runs = {name: [str(run) for run in runs] for name, runs in groups.items()}
    report = Report("Runs compared", "; ".join(f"{name}: {', '.join(paths)}" for name, paths in runs.items()))
    report.table("Figures", header, rows, f"Mean ± standard deviation between runs; differences to {first}.")
    metrics = {
        figure: {name: None if group is None else group._asdict() for name, group in by_group.items()}
        for figure, by_group in sums.items()
    }
    page = report.provenance(provenance()).write(out, {"runs": runs, "figures": metrics})
    return page, [header, *rows]


def _cells(by_group: dict[str, Summed | None], sizes: dict[str, int]) -> list[str]:
    """The cells of one figure: every group and, but for the first, its difference to the first; – where unmeasured."""
    first, cells = next(iter(by_group.values())), []
    for name, group in by_group.items():
        cells.append("–" if group is None else group.text(sizes[name]))
        cells.append("–" if group is None or first is None else f"{group.mean - first.mean:+.3g}")
    return [cells[0], *cells[2:]]


def aligned(table: list[list[str]]) -> Iterator[str]:
    """The rows of a table as lines of text, columns under each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_prior compare",
        description="Put the figures of groups of runs side by side: mean, spread and difference.",
    )
    parser.add_argument(
        "--runs",
        nargs="+",
        action="append",
        required=True,
        metavar="NAME RUN",
        help="a group and its runs",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the page")
    parser.add_argument("--figures", nargs="+", default=list(FIGURES), metavar="PATTERN", help="names of figures")
    options = parser.parse_args(arguments)
    groups = {name: [Path(run) for run in runs] for name, *runs in options.runs}
    if len(groups) < len(options.runs) or not all(groups.values()):
        parser.error("every --runs needs a name of its own and at least one run folder")
    try:
        page, table = compare(groups, options.out, options.figures)
    except (ReportError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(*aligned(table), f"compare: {page}", sep="\n")
    return 0
