"""Guidance x evaluations x solvers in one command: what each buys, with the settings kept beside every figure.

    python -m stage2_prior sweep --run_dir runs/demo --guidances 1 1.5 2 3 --steps 4 8 16
    python -m stage2_prior sweep --run_dir runs/demo --steps 8 128 --seeds 0 1 2 \
        --solvers stage2_prior.Midpoint stage2_prior.AdamsBashforth

Writes run_dir/sweep/ (report.html with tables and plots, metrics.json). Every cell samples the same held-out captions
from the same seeds; its figure is the mean over the seeds, beside the standard deviation between them. The last table
compares every cell with the one of most evaluations of the same solver, seed by seed.
"""

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule, LatentDataModule
from data.reading.order import spread_rows
from stage1_tokenizer.evaluation.classifier import Classifier
from stage1_tokenizer.evaluation.classifier_fit import report_classifier
from stage1_tokenizer.evaluation.frechet import FeatureExtractor, RandomConvFeatures, frechet_distance
from stage1_tokenizer.evaluation.picture_set import features_of
from stage1_tokenizer.evaluation.provenance import provenance
from stage1_tokenizer.evaluation.report import Report
from stage1_tokenizer.precision import default_device
from stage1_tokenizer.spec import build
from stage2_prior.base import Prior
from stage2_prior.captions import askable
from stage2_prior.evaluation.faithfulness import caption_groups, faithfulness
from stage2_prior.evaluation.held_out import same_samples
from stage2_prior.evaluation.sampling import Sampler, Samples
from stage2_prior.guidance import ALWAYS, Guidance, GuidanceError
from stage2_prior.heads.solvers import SamplerError, Solver
from stage2_prior.latent_space import load_space


@dataclass
class Cell:
    """One setting and its figures: frechet, images_per_second, right (with a classifier), against_most."""

    solver: str
    steps: int
    guidance: float
    by_seed: list[dict[str, float]]

    def values(self, figure: str) -> list[float]:
        return [figures[figure] for figures in self.by_seed]

    def std(self, figure: str) -> float | None:
        """Between seeds; None for one."""
        values = self.values(figure)
        return statistics.stdev(values) if len(values) > 1 else None

    def text(self, figure: str, form: str) -> str:
        """Mean and, with several seeds, the standard deviation between them."""
        spread = self.std(figure)
        mean = f"{statistics.fmean(self.values(figure)):{form}}"
        return mean if spread is None else f"{mean} ± {spread:{form.lstrip('+')}}"

    def metrics(self) -> dict[str, Any]:
        """The cell as metrics.json keeps it."""
        out = asdict(self)
        for figure in self.by_seed[0]:
            out[figure] = statistics.fmean(self.values(figure))
            out[f"{figure}_std"] = self.std(figure)
        return out


class Judge:
    """Held-out captions with their pictures, and the figures of pictures that are made for them."""

    def __init__(self, prior: Prior, image_size: int, run_dir: Path, num_captions: int) -> None:
        latents = LatentDataModule(str(run_dir / "latents"))
        images = ImageDataModule(str(run_dir / "data"), image_size=image_size)
        rows = spread_rows(len(latents.split("val")), num_captions)
        held = latents.samples("val", rows)
        self.real, _ = askable(prior.words.ask, same_samples(latents, images, rows, held["keys"]))
        self.captions = askable(prior.words.ask, held)[1]
        self.classifier: Classifier | None = report_classifier(images, run_dir)
        self.groups = {} if self.classifier is None else caption_groups(self.classifier, images, self.real)
        self.extractor: FeatureExtractor = self.classifier or RandomConvFeatures()
        self.reference: Tensor = features_of(self.extractor, self.real["images"])

    def figures(self, samples: Samples) -> dict[str, float]:
        """frechet, images_per_second and, with a classifier, the share with everything right."""
        features = features_of(self.extractor, samples.images)
        figures = {"frechet": frechet_distance(self.reference, features)}
        if self.classifier is not None:
            figures["right"] = faithfulness(self.classifier, self.classifier.read(features), self.real, self.groups)[
                "all"
            ]
        return figures | {"images_per_second": len(self.captions) / samples.seconds}


@torch.inference_mode(False)
def sweep(
    run_dir: Path,
    guidances: list[float],
    steps: list[int],
    num_captions: int,
    batch_size: int,
    seeds: list[int],
    solvers: list[str],
    schedule: str = "stage2_prior.Guidance",
    interval: Sequence[float] = ALWAYS,
    device: str = "cpu",
) -> Path:
    """Sample every combination and write run_dir/sweep; returns the page's path. Errors as `Prior.sample`."""
    prior = Prior.from_pretrained(run_dir / "prior", device=device)
    tokenizer = load_space(run_dir / "tokenizer", device)
    prior.check(tokenizer)
    schedules = {w: schedule_of(schedule, w, interval) for w in guidances}
    methods = solvers_of(solvers)
    for solver, n in itertools.product(methods.values(), steps):
        prior.num_evaluations(n, solver)  # refuses what a solver or a head cannot do before anything is sampled
    judge = Judge(prior, tokenizer.image_size, run_dir, num_captions)
    cells = []
    for (name, solver), n, w in itertools.product(methods.items(), steps, guidances):
        by_seed = []
        for seed in seeds:
            sampler = Sampler(n, batch_size, seed, solver)
            by_seed.append(judge.figures(sampler(prior, tokenizer, judge.captions, schedules[w])))
        cells.append(Cell(name, n, w, by_seed))
        print(f"{name}  steps {n:3d}  guidance {w:4.2f}  Frechet {cells[-1].text('frechet', '.2f')}", flush=True)
    compare(cells)
    metrics = {
        "captions": len(judge.captions),
        "features": judge.extractor.feature_name,
        "seeds": seeds,
        "cells": [cell.metrics() for cell in cells],
        "schedule": schedule,
        "interval": list(interval),
    }
    return page(cells, judge.extractor.feature_name, len(judge.captions), seeds).write(run_dir / "sweep", metrics)


def schedule_of(path: str, scale: float, interval: Sequence[float]) -> Guidance:
    """The guidance of a class path. Raises SpecError or GuidanceError for what is none."""
    low, high = interval
    schedule = build({"class_path": path, "init_args": {"scale": scale, "low": low, "high": high}})
    if not isinstance(schedule, Guidance):
        raise GuidanceError(f"got --schedule {path}, wanted a class of stage2_prior.guidance; name one.")
    return schedule


def solvers_of(paths: Sequence[str]) -> dict[str, Solver | None]:
    """Name -> solver with the defaults of its class; without paths the prior's own (None: it is left as it is).

    Raises SpecError or SamplerError for a path that is not a solver's.
    """
    solvers: dict[str, Solver | None] = {}
    for path in paths:
        solver = build({"class_path": path, "init_args": {}})
        if not isinstance(solver, Solver):
            raise SamplerError(f"got --solvers {path}, wanted a class of stage2_prior.heads.solvers; name one.")
        solvers[type(solver).__name__] = solver
    return solvers or {"own": None}


def compare(cells: Sequence[Cell]) -> None:
    """Give each cell `against_most`: its Frechet distance over that of the most evaluations, minus 1, seed by seed."""
    most = {(cell.solver, cell.guidance): cell for cell in sorted(cells, key=lambda cell: cell.steps)}
    for cell in cells:
        best = most[cell.solver, cell.guidance].values("frechet")
        for figures, reference in zip(cell.by_seed, best, strict=True):
            figures["against_most"] = figures["frechet"] / reference - 1


def page(cells: Sequence[Cell], features: str, n: int, seeds: Sequence[int]) -> Report:
    """Tables and plots of the cells. features: of the Frechet distance. n: captions."""
    report = Report("Guidance and evaluations", f"{n} held-out captions, Fréchet distance in {features} features")
    scales = sorted({cell.guidance for cell in cells})
    lines = sorted({(cell.solver, cell.steps) for cell in cells})
    by_setting = {(cell.solver, cell.steps, cell.guidance): cell for cell in cells}

    def table(heading: str, figure: str, form: str, note: str = "") -> None:
        rows = [
            [f"{solver}, {k} evaluations", *(by_setting[solver, k, w].text(figure, form) for w in scales)]
            for solver, k in lines
        ]
        report.table(heading, ["", *(f"guidance {w:g}" for w in scales)], rows, note)

    def curve(heading: str, figure: str, axis: str) -> None:
        curves = {}
        for solver, w in itertools.product(sorted({cell.solver for cell in cells}), scales):
            steps = [k for s, k in lines if s == solver]
            means = [statistics.fmean(by_setting[solver, k, w].values(figure)) for k in steps]
            curves[f"{solver}, guidance {w:g}"] = (steps, means)
        report.curve(heading, "evaluations per latent", axis, curves)

    has_right = "right" in cells[0].by_seed[0]
    table("Fréchet distance", "frechet", ".2f", "Mean ± standard deviation between seeds." if len(seeds) > 1 else "")
    if has_right:
        table("Everything right", "right", ".3f", f"Read by the {features}.")
    table("Pictures per second", "images_per_second", ".0f")
    heading = "Fréchet distance against that of the most evaluations"
    table(heading, "against_most", "+.1%", "Of the same solver and seed.")
    curve("Fréchet distance by evaluations", "frechet", "Fréchet distance")
    if has_right:
        curve("Everything right by evaluations", "right", "share")
    return report.provenance(provenance(seeds[0]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_prior sweep",
        description="Sample held-out captions at every guidance, number of evaluations and solver, and compare.",
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="run with prior/, tokenizer/, latents/ and data/")
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0], help="1: conditional only")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16], help="evaluations of the head per latent")
    parser.add_argument("--num_captions", type=int, default=500, help="held-out captions sampled in each cell")
    parser.add_argument("--batch_size", type=int, default=250, help="captions per call of sample")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="samples of each cell")
    parser.add_argument(
        "--solvers", nargs="+", default=[], metavar="CLASS", help="class paths of flow solvers (default: the prior's)"
    )
    parser.add_argument(
        "--schedule",
        default="stage2_prior.Guidance",
        metavar="CLASS",
        help="how guidance runs along the line; the guidances are its largest scale",
    )
    parser.add_argument(
        "--interval", type=float, nargs=2, default=list(ALWAYS), metavar=("LOW", "HIGH"), help="times at which it acts"
    )
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    options = parser.parse_args(arguments)
    try:
        written = sweep(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"sweep: {written}")
    return 0
