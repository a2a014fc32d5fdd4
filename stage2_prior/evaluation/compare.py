"""Groups of runs beside each other, seeds of one setting being a group: mean, spread and difference of their figures.

    python -m stage2_prior.evaluation.compare --out runs/text_cost \
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
    found = [name for name in REPORTS if (run_dir / name / "metrics.json").is_file()]
    if not found:
        read_metrics(run_dir, REPORTS[0])  # says what is missing and what writes it
    return dict(pair for name in found for pair in numbers(read_metrics(run_dir, name), name))


def summed(values: Sequence[float]) -> Summed | None:
    if not values:
        return None
    return Summed(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def compare(groups: dict[str, list[Path]], out: Path, figures: Sequence[str] = FIGURES) -> tuple[Path, list[list[str]]]:
    """Write the page to `out`; returns its path and the table. Raises ReportError, also where no figure matches."""
    read = {name: [figures_of(run) for run in runs] for name, runs in groups.items()}
    names = list(dict.fromkeys(figure for runs in read.values() for run in runs for figure in run))
    names = [figure for pattern in figures for figure in names if fnmatchcase(figure, pattern)]
    if not names:
        raise ReportError(f"found none of the figures {', '.join(figures)} in these runs; give other --figures")
    metrics: dict[str, Any] = {}
    rows: list[list[str]] = []
    for figure in dict.fromkeys(names):
        row, first, metrics[figure] = [figure], None, {}
        for name, runs in read.items():
            found = summed([run[figure] for run in runs if figure in run])
            metrics[figure][name] = None if found is None else found._asdict()
            row.append("–" if found is None else found.text(len(runs)))
            if len(row) == 2:
                first = found
            else:
                row.append("–" if found is None or first is None else f"{found.mean - first.mean:+.3g}")
        rows.append(row)
    header = ["", *(h for i, name in enumerate(groups) for h in ([name] if i == 0 else [name, "difference"]))]
    told = "; ".join(f"{name}: {', '.join(map(str, runs))}" for name, runs in groups.items())
    report = Report("Runs compared", told)
    report.table("Figures", header, rows, f"Mean ± standard deviation between runs; differences to {header[1]}.")
    asked = {name: [str(run) for run in runs] for name, runs in groups.items()}
    page = report.provenance(provenance()).write(out, {"runs": asked, "figures": metrics})
    return page, [header, *rows]


def aligned(table: list[list[str]]) -> Iterator[str]:
    """The rows of a table as lines of text, columns under each other."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_prior.evaluation.compare", description="Groups of runs compared."
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


if __name__ == "__main__":
    raise SystemExit(main())
