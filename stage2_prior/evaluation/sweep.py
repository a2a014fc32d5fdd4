"""Guidance x evaluations x solvers in one command: what each buys, with the settings kept beside every figure.

    python -m stage2_prior.evaluation.sweep --run_dir runs/demo --guidances 1 1.5 2 3 --steps 4 8 16
    python -m stage2_prior.evaluation.sweep --run_dir runs/demo --steps 8 128 --seeds 0 1 2 \
        --solvers stage2_prior.Midpoint stage2_prior.AdamsBashforth

Writes run_dir/sweep/ (report.html with tables and plots, metrics.json). Every cell samples the same held-out captions
from the same seeds; what is said of a cell is the mean over the seeds, beside the standard deviation between them.
The last table compares every cell with the one of most evaluations of the same solver, seed by seed.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.classifier_fit import report_classifier
from stage1_tokenizer.evaluation.frechet import RandomConvFeatures, frechet_distance
from stage1_tokenizer.evaluation.provenance import provenance
from stage1_tokenizer.evaluation.report import Report
from stage1_tokenizer.precision import default_device
from stage1_tokenizer.spec import build
from stage2_prior.base import Prior, load_space
from stage2_prior.captions import askable
from stage2_prior.evaluation.generation import GenerationReport, caption_groups, faithfulness
from stage2_prior.guidance import ALWAYS, Guidance, GuidanceError
from stage2_prior.heads.base import SolverHead
from stage2_prior.heads.solvers import SamplerError, Solver, check_solver
from stage2_prior.training.latent_data import PriorDataModule, same_samples


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
    prior, tokenizer = Prior.from_pretrained(run_dir / "prior").to(device), load_space(run_dir / "tokenizer", device)
    prior.check(tokenizer)
    schedules = {w: schedule_of(schedule, w, interval) for w in guidances}
    methods = solvers_of(prior, solvers)
    for solver in methods.values():
        use(prior, solver)
        for n in steps:
            prior.num_evaluations(n)  # refuses what its solver cannot do before anything is sampled
    latents = PriorDataModule(str(run_dir / "latents"))
    images = ImageDataModule(str(run_dir / "data"), image_size=tokenizer.image_size)
    held = latents.arrays("val", num_captions)
    real, _ = askable(prior.words.ask, same_samples(latents, images, held, num_captions))
    captions = askable(prior.words.ask, held)[1]
    classifier = report_classifier(images, run_dir)
    extractor = RandomConvFeatures() if classifier is None else classifier
    groups = None if classifier is None else caption_groups(classifier, images, real)
    reference = torch.cat([extractor.features(part) for part in real["images"].split(batch_size)])
    cells: list[dict[str, Any]] = []
    for (name, solver), n, w in itertools.product(methods.items(), steps, guidances):
        use(prior, solver)
        by_seed: list[dict[str, float]] = []
        for seed in seeds:
            sampler = GenerationReport(steps=n, num_captions=max(8, num_captions), batch_size=batch_size, seed=seed)
            with torch.inference_mode():
                drawn = sampler.sample(prior, tokenizer, captions, schedules[w])
                features = torch.cat([extractor.features(part) for part in drawn.images.split(batch_size)])
                found = {"frechet": frechet_distance(reference, features)}
                if classifier is not None and groups is not None:
                    found["right"] = faithfulness(classifier, drawn.images, real, groups)["all"]
            by_seed.append(found | {"images_per_second": len(captions) / drawn.seconds})
        cell: dict[str, Any] = {"solver": name, "steps": n, "guidance": w, "by_seed": by_seed}
        for figure in by_seed[0]:
            values = torch.tensor([found[figure] for found in by_seed], dtype=torch.float64)
            cell[figure] = float(values.mean())
            cell[f"{figure}_std"] = float(values.std()) if len(seeds) > 1 else None
        cells.append(cell)
        print(f"{name}  steps {n:3d}  guidance {w:4.2f}  Frechet {spread_text(cell, 'frechet', '.2f')}", flush=True)
    compare(cells)
    metrics = {"captions": len(captions), "features": extractor.feature_name, "seeds": seeds, "cells": cells}
    metrics |= {"schedule": schedule, "interval": list(interval)}
    return page(cells, extractor.feature_name, len(captions), seeds).write(run_dir / "sweep", metrics)


def schedule_of(path: str, scale: float, interval: Sequence[float]) -> Guidance:
    """The guidance of a class path. Raises SpecError or GuidanceError for what is none."""
    low, high = interval
    schedule = build({"class_path": path, "init_args": {"scale": scale, "low": low, "high": high}})
    if not isinstance(schedule, Guidance):
        raise GuidanceError(f"{path} is not a guidance; name a class of stage2_prior.guidance.")
    return schedule


def solvers_of(prior: Prior, paths: list[str]) -> dict[str, Solver | None]:
    """Name -> solver with the defaults of its class; without paths the prior's own (None: it is left as it is).

    Raises SpecError or SamplerError for a path that is not a solver's.
    """
    if not paths:
        return {"own": None}
    head = getattr(prior, "head", None)
    if not isinstance(head, SolverHead):
        raise SamplerError(f"got --solvers for a {type(prior).__name__} without a head that solves; leave them out.")
    found: dict[str, Solver | None] = {}
    for path in paths:
        solver = build({"class_path": path, "init_args": {}})
        if not isinstance(solver, Solver):
            raise SamplerError(f"{path} is not a solver of a flow; name a class of stage2_prior.heads.solvers.")
        check_solver(solver, head.answers_with, type(head).__name__)
        found[type(solver).__name__] = solver
    return found


def use(prior: Prior, solver: Solver | None) -> None:
    """Let the prior's head sample with `solver` from now on."""
    if solver is not None:
        head: Any = prior.head
        head.solver = solver


def compare(cells: list[dict[str, Any]]) -> None:
    """Give each cell `against_most`: its Frechet distance over that of the most evaluations, minus 1, seed by seed."""
    most = {(c["solver"], c["guidance"]): c for c in sorted(cells, key=lambda c: c["steps"])}
    for cell in cells:
        other = most[cell["solver"], cell["guidance"]]
        pairs = zip(cell["by_seed"], other["by_seed"], strict=True)
        ratios = torch.tensor([mine["frechet"] / theirs["frechet"] - 1 for mine, theirs in pairs], dtype=torch.float64)
        cell["against_most"] = float(ratios.mean())
        cell["against_most_std"] = float(ratios.std()) if len(ratios) > 1 else None


def spread_text(cell: dict[str, Any], figure: str, form: str) -> str:
    """Mean and, with several seeds, the standard deviation between them."""
    spread = cell[f"{figure}_std"]
    return f"{cell[figure]:{form}}" + ("" if spread is None else f" ± {spread:{form.lstrip('+')}}")


def page(cells: list[dict[str, Any]], features: str, n: int, seeds: list[int]) -> Report:
    """Tables and plots of the cells."""
    report = Report("Guidance and evaluations", f"{n} held-out captions, Frechet distance in {features}")
    scales = sorted({c["guidance"] for c in cells})
    lines = sorted({(c["solver"], c["steps"]) for c in cells})
    found = {(c["solver"], c["steps"], c["guidance"]): c for c in cells}

    def table(heading: str, figure: str, form: str, note: str = "") -> None:
        rows = [
            [f"{solver}, {k} evaluations", *(spread_text(found[solver, k, w], figure, form) for w in scales)]
            for solver, k in lines
        ]
        report.table(heading, ["", *(f"guidance {w:g}" for w in scales)], rows, note)

    between = "Mean ± standard deviation between seeds." if len(seeds) > 1 else ""
    table("Frechet distance", "frechet", ".2f", between)
    if "right" in cells[0]:
        table("Everything right", "right", ".3f", between)
    table("Pictures per second", "images_per_second", ".0f")
    table(
        "Frechet distance against that of the most evaluations", "against_most", "+.1%", "Of the same solver and seed."
    )
    for heading, figure, axis in (
        ("Frechet distance by evaluations", "frechet", "Frechet distance"),
        ("Everything right by evaluations", "right", "share"),
    ):
        if figure in cells[0]:
            curves = {}
            for solver, w in itertools.product(sorted({c["solver"] for c in cells}), scales):
                steps = [k for s, k in lines if s == solver]
                curves[f"{solver}, guidance {w:g}"] = (steps, [found[solver, k, w][figure] for k in steps])
            report.curve(heading, "evaluations per latent", axis, curves)
    return report.provenance(provenance(seeds[0]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m stage2_prior.evaluation.sweep", description="Guidance x evaluations."
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="run with prior/, tokenizer/, latents/ and data/")
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16], help="evaluations of the head per latent")
    parser.add_argument("--num_captions", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
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
        found = sweep(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"sweep: {found}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
