"""Guidance x evaluations in one command: what either buys, with the settings kept beside every figure.

    python -m stage2_prior.sweep --run_dir runs/demo --guidances 1 1.5 2 3 --steps 4 8 16

Writes run_dir/sweep/ (report.html with tables and plots, metrics.json). Every cell samples the same held-out captions
from the same seed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from data.datamodule import ImageDataModule
from data.schema import DataError
from stage1_tokenizer.classifier import report_classifier
from stage1_tokenizer.frechet import RandomConvFeatures, frechet_distance
from stage1_tokenizer.report import Report, provenance
from stage2_prior.contract import Prior, load_space
from stage2_prior.generation import GenerationReport, caption_groups, faithfulness
from stage2_prior.prior_data import PriorDataModule, longest


def sweep(
    run_dir: Path, guidances: list[float], steps: list[int], num_captions: int, batch_size: int, seed: int = 0
) -> Path:
    """Sample every combination and write run_dir/sweep; returns the page's path. Errors as `Prior.sample`."""
    prior, tokenizer = Prior.from_pretrained(run_dir / "prior"), load_space(run_dir / "tokenizer")
    prior.check(tokenizer)
    for n in steps:
        prior.evaluations(n)  # refuses what its solver cannot do before anything is sampled
    held = PriorDataModule(str(run_dir / "latents")).arrays("val", num_captions)
    images = ImageDataModule(str(run_dir / "data"), image_size=tokenizer.image_size)
    real = images.arrays("val", len(held["keys"]))
    if real["keys"] != held["keys"]:
        raise DataError(f"latents and pictures in {run_dir} are of different samples; write the latents again")
    captions = [longest(c) for c in held["captions"]]
    classifier = report_classifier(images, run_dir)
    extractor = RandomConvFeatures() if classifier is None else classifier
    groups = None if classifier is None else caption_groups(classifier, images, real)
    reference = torch.cat([extractor.features(part) for part in real["images"].split(batch_size)])
    cells: list[dict[str, Any]] = []
    for n in steps:
        sampler = GenerationReport(steps=n, num_captions=max(8, num_captions), batch_size=batch_size, seed=seed)
        for w in guidances:
            with torch.inference_mode():
                drawn = sampler.sample(prior, tokenizer, captions, w)
                features = torch.cat([extractor.features(part) for part in drawn.images.split(batch_size)])
                cell: dict[str, Any] = {"steps": n, "guidance": w, "frechet": frechet_distance(reference, features)}
                cell["images_per_second"] = len(captions) / drawn.seconds
                if classifier is not None and groups is not None:
                    cell["faithfulness"] = faithfulness(classifier, drawn.images, real, groups)
            cells.append(cell)
            print(f"steps {n:3d}  guidance {w:4.2f}  Frechet {cell['frechet']:8.2f}", flush=True)
    metrics = {"captions": len(captions), "features": extractor.feature_name, "seed": seed, "cells": cells}
    return page(cells, extractor.feature_name, len(captions), seed).write(run_dir / "sweep", metrics)


def page(cells: list[dict[str, Any]], features: str, n: int, seed: int) -> Report:
    """Tables and plots of the cells."""
    report = Report("Guidance and evaluations", f"{n} held-out captions, Frechet distance in {features}")
    steps = sorted({c["steps"] for c in cells})
    scales = sorted({c["guidance"] for c in cells})
    found = {(c["steps"], c["guidance"]): c for c in cells}

    def table(heading: str, value: Any) -> None:
        rows = [[f"{k} evaluations", *(value(found[k, w]) for w in scales)] for k in steps]
        report.table(heading, ["", *(f"guidance {w:g}" for w in scales)], rows)

    table("Frechet distance", lambda c: f"{c['frechet']:.2f}")
    if "faithfulness" in cells[0]:
        table("Everything right", lambda c: f"{c['faithfulness']['all']:.3f}")
    table("Pictures per second", lambda c: f"{c['images_per_second']:.0f}")
    curves = {f"guidance {w:g}": (steps, [found[k, w]["frechet"] for k in steps]) for w in scales}
    report.curve("Frechet distance by evaluations", "evaluations per latent", "Frechet distance", curves)
    if "faithfulness" in cells[0]:
        right = {f"guidance {w:g}": (steps, [found[k, w]["faithfulness"]["all"] for k in steps]) for w in scales}
        report.curve("Everything right by evaluations", "evaluations per latent", "share", right)
    return report.provenance(provenance(seed))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m stage2_prior.sweep", description="Guidance x evaluations.")
    parser.add_argument("--run_dir", type=Path, required=True, help="run with prior/, tokenizer/, latents/ and data/")
    parser.add_argument("--guidances", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16], help="evaluations of the head per latent")
    parser.add_argument("--num_captions", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        found = sweep(**vars(options))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"sweep: {found}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
