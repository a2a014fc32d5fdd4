"""`python -m tests.benchmarks.bench_scaling_law --data_dir runs/cifar10/data`: held-out loss by FLOPs, both stages.

Three widths of the demo's designs (of every part, the decoder's too) x three numbers of steps, each a run with a
schedule of its own; FLOPs of matrix products, counted. Stage 1: squared error of held-out pictures, no text, and the
Frechet distance of their reconstructions. Stage 2: velocity loss of held-out latents of the tokenizer that was trained
most, and the Frechet distance of drawn pictures; distances in random convolutional features. Through the runs that no
cheaper run beats goes a line in logarithms, figure = a FLOPs^-b; b with its standard error, which is that of so few
runs of one seed. A plot shows all runs and both laws.

With `--paper` alone: what the configs of 256 pixels take on 1, 8 and 64 GPUs. Time of a step from FLOPs at an assumed
rate, and of the gradients' all-reduce (ring: each GPU sends 2 (n - 1) / n of the bytes) over an assumed link, hidden
behind the backward pass at best and after it at worst.
"""

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.curves import SERIES_COLOURS
from stage1_tokenizer.evaluation.frechet import RandomConvFeatures, frechet_distance
from stage1_tokenizer.training.optim import warmup_flat_cosine
from tests.same_numbers import build

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Parameters and GFLOP of a picture in a step: RESULTS, "Cost of the configs"; of priors 6 P for each token of a line.
BIG = {"stage1/imagenet256": (449e6, 985e9), "stage1/cc12m256": (478e6, 994e9)}
BYTES = 4  # of a gradient: weights are float32
CAPTION, FIGURES = "a picture", ("loss", "frechet")
LINKS = {1: math.inf, 8: 450e9, 64: 50e9}  # bytes a second that a GPU sends: NVLink 4 in a node, 400 Gb/s between nodes


@dataclass(frozen=True)
class Run:
    """One training: its FLOPs, and what it reaches on held-out data."""

    stage: str
    width: int
    steps: int
    flops: float
    loss: float
    frechet: float


def trained(module: torch.nn.Module, optimizer: Any, losses: Iterator[Any], steps: int) -> float:
    """Take `steps` steps on what `losses` yields, functions of nothing; FLOPs of all of them."""
    rates, total = [group["lr"] for group in optimizer.param_groups], 0.0
    module.train()
    for step in range(steps):
        factor = warmup_flat_cosine(step, steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        loss = next(losses)
        if step == 0:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                loss().backward()
            total = float(counter.get_total_flops()) * steps
        else:
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    module.eval()
    return total


def drawn(*tensors: Tensor, batch: int) -> Iterator[list[Tensor]]:
    """Batches of the same rows of tensors, without end, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = torch.randint(len(tensors[0]), (batch,), generator=generator)
        yield [x[rows] for x in tensors]


def tokenizer_run(width: int, steps: int, images: Tensor, held: Tensor, batch: int) -> tuple[Run, Any]:
    """Stage 1 at a width; also returns the tokenizer."""
    wide = [f"--sizes.width={width}", f"--model.tokenizer.init_args.decoder.init_args.width={width}"]
    lit = build("stage1", ["stage1/demo", "variants/no_text"], wide)
    tokenizer = lit.tokenizer
    losses = (lambda x=x: tokenizer.total(tokenizer.losses(x, None)[0]) for (x,) in drawn(images, batch=batch))
    flops = trained(tokenizer, lit.tokenizer_optimizer(), losses, steps)
    with torch.no_grad():
        made = torch.cat([tokenizer.decode(tokenizer.encode(x)) for x in held.split(250)])
    return Run("stage 1", width, steps, flops, (made - held).square().mean().item(), frechet(made, held)), tokenizer


def frechet(made: Tensor, held: Tensor) -> float:
    """Distance of two sets of pictures in random convolutional features."""
    features = RandomConvFeatures()
    return frechet_distance(features.features(made), features.features(held))


def prior_run(
    width: int,
    steps: int,
    tokenizer: Any,
    lines: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    pictures: Tensor,
    batch: int,
) -> Run:
    """Stage 2 at a width, over lines (N,K,C), mean and standard deviation, with one caption for all."""
    lit = build("stage2", ["stage2/demo"], [f"--sizes.width={width}"])
    prior = lit.prior
    prior.vocabulary.fit([CAPTION])

    def loss(mean: Tensor, std: Tensor) -> Tensor:
        text = prior.encode_text([CAPTION] * len(mean))
        parts = prior.objective(mean + std * torch.randn_like(mean), text, weights=lit.position_weights)
        return torch.stack(list(parts.values())).sum()

    losses = (lambda x=x: loss(*x) for x in drawn(*lines, batch=batch))
    flops = trained(prior, lit.optimizer_options.build(prior), losses, steps)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        z = held[0] + held[1] * torch.randn(held[0].shape, generator=noise)
        found = [prior.losses(part, prior.encode_text([CAPTION] * len(part)), noise) for part in z.split(250)]
        made = [tokenizer.decode(prior.sample([CAPTION] * 250, 1.0, generator=noise)) for _ in range(2)]
    return Run("stage 2", width, steps, flops, torch.cat(found).mean().item(), frechet(torch.cat(made), pictures))


@torch.no_grad()
def posteriors(tokenizer: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (N,K,C) of pictures, mean and standard deviation."""
    mean, std = zip(*(tokenizer.posterior(part) for part in images.split(250)), strict=True)
    return torch.cat(mean), torch.cat(std)


def frontier(runs: list[Run], figure: str) -> list[Run]:
    """Those that no cheaper run beats in a figure, cheapest first."""
    kept: list[Run] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if not kept or getattr(run, figure) < getattr(kept[-1], figure):
            kept.append(run)
    return kept


def power_law(flops: list[float], losses: list[float]) -> tuple[float, float, float, float]:
    """loss = a flops^-b by least squares in logarithms: a, b, the standard error of b, residual (of log loss)."""
    x, y = (torch.tensor(values, dtype=torch.float64).log() for values in (flops, losses))
    dx = x - x.mean()
    b = -(dx * (y - y.mean())).sum() / dx.square().sum()
    left = y - y.mean() + b * dx
    spread = (left.square().sum() / max(len(x) - 2, 1)).sqrt()
    a = (y.mean() + b * x.mean()).exp()
    return a.item(), b.item(), (spread / dx.square().sum().sqrt()).item(), spread.item()


def on_paper(rate: float) -> Iterator[str]:
    """A table of each config of 256 pixels and number of GPUs, at `rate` FLOP/s of each."""
    yield "| config | GPUs x batch | step, ms | all-reduce, ms | hours, hidden to added |\n|---|---|---|---|---|"
    for name in ("stage1/imagenet256", "stage1/cc12m256", "stage2/imagenet256", "stage2/cc12m256"):
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        parameters, flops = BIG.get(name, (0.0, 0.0))
        if not parameters:
            prior = build("stage2", [name], []).prior
            tokens = (
                config["sizes"]["num_latents"]
                + config["model"]["prior"]["init_args"]["vocabulary"]["init_args"]["context_length"]
            )
            parameters = float(sum(p.numel() for p in prior.parameters()))
            flops = 6 * parameters * tokens
        steps, batch = config["trainer"]["max_steps"], 8 * config["data"]["batch_size"]
        for gpus, link in LINKS.items():
            compute = flops * batch / gpus / rate
            sent = 2 * (gpus - 1) / gpus * parameters * BYTES / link
            backward = 2 / 3 * compute
            hidden, added = max(0.0, sent - backward), sent
            hours = [steps * (compute + extra) / 3600 for extra in (hidden, added)]
            yield (
                f"| {name} | {gpus} x {batch // gpus} | {1e3 * compute:,.0f} | {1e3 * sent:.1f} |"
                f" {hours[0]:,.1f} to {hours[1]:,.1f} |"
            )


def plot(runs: list[Run], path: Path) -> None:
    """Loss and Frechet distance against FLOPs, a colour for each width, with the laws through the frontier."""
    canvas = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    for row, stage in zip(canvas.subplots(2, 2), ("stage 1", "stage 2"), strict=True):
        for axes, figure in zip(row, FIGURES, strict=True):
            own = [run for run in runs if run.stage == stage]
            for width, colour in zip(sorted({run.width for run in own}), SERIES_COLOURS, strict=False):
                points = [(run.flops, getattr(run, figure)) for run in own if run.width == width]
                axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=f"width {width}")
            best = frontier(own, figure)
            x = [run.flops for run in best]
            a, b, *_ = power_law(x, [getattr(run, figure) for run in best])
            axes.plot(x, [a * value**-b for value in x], "--", color="grey", label=f"FLOPs^{-b:.2f}")
            axes.set(xscale="log", yscale="log", xlabel="FLOPs of the training", ylabel=f"{stage}, {figure}")
            axes.legend(fontsize=7)
    canvas.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Train the grid, print every run and both laws; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_scaling_law", description=__doc__)
    parser.add_argument("--data_dir", help="image shards of 32 pixels")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--steps", nargs="+", type=int, default=[120, 240, 480])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=8000, help="training pictures")
    parser.add_argument("--out", type=Path, default=Path("runs/scaling_law.png"), help="of the plot")
    parser.add_argument("--paper", action="store_true", help="the table of GPUs, and no run")
    parser.add_argument("--tflops", type=float, default=300.0, help="TFLOP/s that one GPU sustains, assumed")
    options = parser.parse_args(arguments)
    if options.paper:
        for line in on_paper(1e12 * options.tflops):
            print(line, flush=True)
        return
    if options.data_dir is None:
        parser.error("give --data_dir, or --paper")
    data = ImageDataModule(options.data_dir, image_size=32)
    images, held = data.arrays("train", options.images)["images"], data.arrays("val", 1000)["images"]
    runs, tokenizer = [], None
    for width in sorted(options.widths):
        for steps in sorted(options.steps):
            run, tokenizer = tokenizer_run(width, steps, images, held, options.batch)
            runs.append(run)
            print(run, flush=True)
    assert tokenizer is not None
    tokenizer.fit_statistics(images[:2000].split(250))
    lines, others = posteriors(tokenizer, images), posteriors(tokenizer, held)
    for width in sorted(options.widths):
        for steps in sorted(options.steps):
            runs.append(prior_run(width, steps, tokenizer, lines, others, held, options.batch))
            print(runs[-1], flush=True)
    for stage, figure in itertools.product(("stage 1", "stage 2"), FIGURES):
        best = frontier([run for run in runs if run.stage == stage], figure)
        a, b, error, left = power_law([run.flops for run in best], [getattr(run, figure) for run in best])
        where = ", ".join(f"{run.width} x {run.steps}" for run in best)
        law = f"{figure} = {a:.4g} FLOPs^-{b:.3f} (standard error {error:.3f}, residual {left:.3f})"
        print(f"{stage}: {law}; {where}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot(runs, options.out)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
