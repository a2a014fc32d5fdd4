"""`python -m tests.benchmarks.bench_report`: memory and time of both reports by the number of pictures.

A few scenes of 256 pixels (or of --side) are stored and repeated as often as is asked for, and decoded anew every time;
tokenizer, prior and classifier are small and hardly trained, since what a report holds does not depend on what they
have learned. Each number of pictures is a process of its own: what is compared is the most memory that it ever held,
Python and torch included. The line through these says what 50,000 would take: an extrapolation, and printed as one. Up
to 2,000 to 10,000 pictures some rows are kept of every picture, so that the line is steeper than what follows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from data.__main__ import main as data_main
from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.bottleneck import KLBottleneck
from stage1_tokenizer.decoder import ViTDecoder
from stage1_tokenizer.encoder import PatchTrunk, QFormerEncoder
from stage1_tokenizer.evaluation.classifier_fit import Budget, report_classifier
from stage1_tokenizer.evaluation.reconstruction import reconstruction_report
from stage1_tokenizer.prefixes import PrefixLengths
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.evaluation import generation, neighbours
from stage2_prior.evaluation.generation import GenerationReport
from stage2_prior.prior import CausalPrior
from tests.small_priors import awake, parts

REPORTS = ("reconstruction", "generation")
BATCH, WHOLE = 32, 50_000
BANK = 500  # training pictures that drawn ones are compared with: always as many, whatever is measured here


class Repeated:
    """A data module whose few pictures come again and again: `num` held-out ones, as many for training."""

    def __init__(self, data: ImageDataModule, num: int) -> None:
        self.data, self.num, self.data_dir, self.val_batch_size = data, num, data.data_dir, BATCH

    def split(self, split: str) -> range:
        return range(self.num)

    def samples(self, split: str, rows: list[int]) -> dict[str, Any]:
        return self.data.samples(split, [row % len(self.data.split(split)) for row in rows])

    def captions(self, split: str) -> Iterator[list[str]]:
        stored = list(self.data.captions(split))
        return (stored[row % len(stored)] for row in range(self.num))


def models(side: int, num_latents: int, channels: int) -> tuple[Tokenizer, CausalPrior]:
    """A tokenizer of pictures of a side and a prior over its latents, both small."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(
        side,
        QFormerEncoder(PatchTrunk(side, 32, 64, 1, 2), num_latents, 1, 2),
        KLBottleneck(64, num_latents, channels),
        ViTDecoder(side, 32, num_latents, channels, 64, 1, 2, tail_channels=8, tail_depth=1),
        PrefixLengths(num_latents),
    )
    vocabulary, backbone, head = parts(num_latents, channels)
    return tokenizer.eval(), awake(CausalPrior(num_latents, channels, vocabulary, backbone, head))  # type: ignore[return-value]


def one(report: str, folder: Path, num: int, side: int, num_latents: int, channels: int) -> dict[str, float]:
    """Write one report on `num` pictures; its cost."""
    data = Repeated(ImageDataModule(str(folder / "data"), image_size=side, in_memory=False), num)
    tokenizer, prior = models(side, num_latents, channels)
    run = folder / "run"
    report_classifier(data, run, budget=Budget(2, 120))  # the report finds it there
    if report == REPORTS[0]:
        metrics = reconstruction_report(tokenizer, data, run / report, run, limit=num, probe_images=BANK)
        return dict(metrics["cost"])
    measured = GenerationReport(guidances=[1.0], num_captions=num, batch_size=BATCH, nll_lines=2, classify_lines=0)
    here = mock.patch.object(generation, "ImageDataModule", return_value=data)
    with here, mock.patch.object(neighbours, "TRAINING", BANK), torch.no_grad():
        measured.measure(prior, tokenizer, data, run)
    cost: dict[str, float] = json.loads((run / report / "metrics.json").read_text())["report_cost"]
    return cost


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each number of pictures, and the extrapolation; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_report", description=__doc__)
    parser.add_argument("--reports", nargs="+", choices=REPORTS, default=list(REPORTS))
    parser.add_argument("--num", nargs="+", type=int, default=[500, 1000, 2000, 4000], help="pictures of each report")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--num_latents", type=int, default=4)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the scenes: this process writes one report
    options = parser.parse_args(arguments)
    sizes = options.side, options.num_latents, options.channels
    if options.folder is not None:
        print(json.dumps(one(options.reports[0], options.folder, options.num[0], *sizes)))
        return
    with tempfile.TemporaryDirectory() as name:
        scenes = [
            "--source",
            "scenes",
            "--size",
            str(options.side),
            "--num",
            "96",
            "--val-fraction",
            "0.33",
            "--workers",
            "1",
        ]
        assert not data_main(["prepare", *scenes, "--out", f"{name}/data"]), "no scenes"
        for report in options.reports:
            measured: dict[int, float] = {}
            for num in options.num:
                words = ["--reports", report, "--num", str(num), "--folder", name, "--side", str(sizes[0])]
                words += ["--num_latents", str(sizes[1]), "--channels", str(sizes[2])]
                line = [sys.executable, "-m", "tests.benchmarks.bench_report", *words]
                cost = json.loads(
                    subprocess.run(line, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
                )
                measured[num] = cost["gigabytes"]
                each = cost["seconds"] / num
                what = f"{report}, {num:,} pictures of {options.side} pixels"
                print(f"{what}: {cost['gigabytes']:.3f} GB at most, {each:.3f} s each", flush=True)
            if len(measured) > 1:
                slope, start = statistics.linear_regression(list(measured), list(measured.values()))
                at = start + slope * WHOLE
                print(f"{report}: {slope * 1e6:+.1f} KB a picture; extrapolated to {WHOLE:,}: {at:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
