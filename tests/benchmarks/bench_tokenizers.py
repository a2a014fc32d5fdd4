"""`python -m tests.benchmarks.bench_tokenizers`: which tokenizer design learns faster, in one run on one data set.

    python -m tests.benchmarks.bench_tokenizers --seconds 300 \\
        --contender configs/stage1/cifar10.yaml configs/variants/no_text.yaml \\
        --contender configs/stage1/cifar10.yaml configs/variants/no_text.yaml configs/variants/titok.yaml

Each contender is a config and its overlays, as `fit` takes them. They train in turns of `--turn` processor seconds of
this process, on the same pictures in the same order, so that a busy machine slows all of them alike; each has its own
clock, which stands still while the others train and while it is measured. The learning rate follows the config's
schedule along the clock, not along steps: every contender ends with a finished cosine when its seconds are spent.

Printed at eighths of the time, with the averaged weights: PSNR on held-out pictures by prefix, its distance to PCA with
the same number of floats, and with text how often a held-out picture's first latent, and its whole line, find their
caption first. The last lines say how many of its seconds each contender took to the first one's PSNR and R@1 of each of
its measurements at full length (interpolated; "-": never); `--out` keeps all of it as JSON beside a plot.

`--adamw N` trains the N-th contender with torch's AdamW on all of its weights, as TiTok's authors do, at `--adamw_lr`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.evaluation.curves import INK, draw_curve
from stage1_tokenizer.evaluation.retrieval import retrieval
from stage1_tokenizer.pca import PCA
from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.training.cli import UnspoolCLI
from stage1_tokenizer.training.ema import EMA
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage1_tokenizer.training.optim import warmup_flat_cosine

CHECKS = 8  # measurements along a contender's time
FINE = 100_000  # steps that the time is divided into for the schedule
ADAMW: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 1e-4}  # TiTok's, but for the rate


class Measured(NamedTuple):
    """One measurement of a contender."""

    seconds: float
    psnr: list[float]  # by prefix
    found: list[float]  # R@1 of the caption by the first latent and by the whole line; empty without text


class Parsed(UnspoolCLI):
    """Parses and builds as `fit` does; nothing is run or written."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config)
        self.model = self._get(self.config_init, "model")
        self.datamodule = self._get(self.config_init, "data")

    def after_instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


class Contender:
    """One tokenizer in training, with its own clock."""

    def __init__(self, files: list[str], options: list[str], seconds: float, seed: int, adamw: float | None = None):
        torch.manual_seed(seed)
        configs = [f"--config={file}" for file in files]
        parsed = Parsed(
            "stage1", LitTokenizer, ImageDataModule, "bench_tokenizers", ["fit", *configs, "--run_dir=none", *options]
        )
        model: Any = parsed.model
        self.name, self.data, self.model = "+".join(Path(file).stem for file in files), parsed.datamodule, model
        self.tokenizer = model.tokenizer
        self.seconds, self.spent, self.steps = seconds, 0.0, 0
        self.ema = EMA(self.tokenizer, parsed.option("ema.decay"))
        self.optimizer: torch.optim.Optimizer = model.tokenizer_optimizer()
        if adamw is not None:
            self.name += "+AdamW"
            self.optimizer = torch.optim.AdamW(self.tokenizer.parameters(), lr=adamw, **ADAMW)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.found: list[Measured] = []
        self.draws = torch.random.get_rng_state()

    def prepare(self, images: Tensor, captions: list[str]) -> None:
        """What `fit` learns before its first step."""
        if self.tokenizer.linear_path is not None:
            self.tokenizer.linear_path.fit(images[: self.model.passes.linear_path_images])
        if self.tokenizer.text is not None:
            self.tokenizer.vocabulary.fit(captions)

    def train(self, images: Tensor, captions: list[str], order: Tensor, until: float) -> None:
        """Steps until `spent` is `until` processor seconds."""
        size, text = self.data.batch_size, self.tokenizer.text
        torch.random.set_rng_state(self.draws)
        self.tokenizer.train()
        start, before = time.process_time(), self.spent
        while self.spent < until:
            rows = order[torch.arange(self.steps * size, (self.steps + 1) * size) % len(order)]
            x = images[rows]
            if self.data.flip:
                x = torch.where(torch.rand(size, 1, 1, 1) < self.data.flip, x.flip(-1), x)
            ids = None
            if text is not None and self.steps % text.every == 0:
                ids = self.tokenizer.vocabulary.encode([captions[i] for i in rows.tolist()])[0]
            along = warmup_flat_cosine(
                int(FINE * self.spent / self.seconds), FINE, 0, self.model.schedule.flat_fraction
            )
            factor = along * min(1.0, (self.steps + 1) / self.model.schedule.warmup_steps)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            with torch.autocast("cpu", matmul_dtype(torch.device("cpu"))):
                loss = self.tokenizer.total(self.tokenizer.losses(x, ids, self.steps)[0])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update()
            self.steps += 1
            self.spent = before + time.process_time() - start
        self.draws = torch.random.get_rng_state()

    @torch.inference_mode()
    def measure(self, images: Tensor, captions: list[str], prefixes: list[int]) -> Measured:
        """PSNR by prefix and R@1 with the averaged weights, kept in `found`."""
        self.tokenizer.eval()
        with self.ema.averaged(), torch.autocast("cpu", matmul_dtype(torch.device("cpu"))):
            sums, lines = torch.zeros(len(prefixes)), []
            for x in images.split(250):
                z, noise = self.tokenizer.encode(x), torch.Generator().manual_seed(0)
                sums += torch.stack([psnr(self.tokenizer.decode(z[:, :k], noise), x).sum() for k in prefixes])
                lines.append(z)
            recall: list[float] = []
            if self.tokenizer.text is not None:
                words, line = self.tokenizer.embed_text(captions), torch.cat(lines)
                for k in (1, line.shape[1]):
                    pictures = self.tokenizer.embed_latents(line[:, :k])
                    recall.append(retrieval(pictures, words, captions, captions, (1,)).recall[1])
        self.found.append(Measured(self.spent, (sums / len(images)).tolist(), recall))
        return self.found[-1]

    def seconds_to(self, target: float, figure: Callable[[Measured], float]) -> float | None:
        """Seconds until `figure` is `target`, interpolated between measurements; None: never reached."""
        before = (0.0, float("-inf"))
        for measured in self.found:
            value = figure(measured)
            if value >= target:
                share = 1.0 if before[1] == float("-inf") else (target - before[1]) / (value - before[1])
                return before[0] + share * (measured.seconds - before[0])
            before = (measured.seconds, value)
        return None


FIGURES: list[tuple[str, Callable[[Measured], float]]] = [
    ("PSNR", lambda m: m.psnr[-1]),
    ("R@1", lambda m: m.found[-1]),
]


def compare(contenders: list[Contender], turn: float, val_images: int, seed: int) -> None:
    """Train all in turns and print what they reach."""
    data: Any = contenders[0].data
    arrays, shown = data.arrays("train"), data.arrays("val", val_images)
    images, held = arrays["images"], shown["images"]
    captions, held_captions = ([max([*c, ""], key=len) for c in a["captions"]] for a in (arrays, shown))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for contender in contenders:
        contender.prepare(images, captions)
    lengths = {c.tokenizer.num_latents for c in contenders}
    floats = {c.tokenizer.num_latents * c.tokenizer.latent_dim for c in contenders}
    if len(lengths) > 1 or len(floats) > 1:
        raise SystemExit(f"got lines of {sorted(lengths)} latents, {sorted(floats)} floats; compare equal ones.")
    K, C = contenders[0].tokenizer.num_latents, contenders[0].tokenizer.latent_dim
    prefixes = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k < K] + [K]
    pca = PCA.fit(images[:20_000], K * C)
    codes = pca.encode(held)
    linear = [psnr(pca.decode(codes[:, : k * C]), held).mean().item() for k in prefixes]
    print(f"PCA, {prefixes} latents of {C}: " + " ".join(f"{value:.2f}" for value in linear), flush=True)
    seconds, checks = contenders[0].seconds, 0
    clock = 0.0
    while clock < seconds:
        clock = min(seconds, clock + turn)
        for contender in contenders:
            contender.train(images, captions, order, clock)
        if clock >= seconds * (checks + 1) / CHECKS:
            checks += 1
            for contender in contenders:
                got = contender.measure(held, held_captions, prefixes)
                text = " ".join(f"{v:.2f} ({v - base:+.2f})" for v, base in zip(got.psnr, linear, strict=True))
                text += "".join(f"  R@1 {value:.3f}" for value in got.found)
                print(f"{contender.name:40s} {contender.spent:6.0f} s {contender.steps:6d} steps  {text}", flush=True)
    with_text = all(c.tokenizer.text is not None for c in contenders)
    for name, figure in FIGURES[: 1 + with_text]:
        for measured in contenders[0].found:
            times = [c.seconds_to(figure(measured), figure) for c in contenders]
            spent = " / ".join("-" if t is None else f"{t:.0f}" for t in times)
            print(f"to {name} {figure(measured):.3f}, seconds: {spent}")


def keep(contenders: list[Contender], out: Path) -> None:
    """`out` as JSON, and the curves beside it as one PNG a figure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {c.name: [m._asdict() for m in c.found] for c in contenders}
    out.write_text(json.dumps(content, indent=1) + "\n")
    for name, figure in FIGURES[: 1 + all(m.found for c in contenders for m in c.found)]:
        series = {c.name: ([m.seconds for m in c.found], [figure(m) for m in c.found]) for c in contenders}
        plot = draw_curve("processor seconds", f"{name}, full length", series, INK["light"], log=False)
        out.with_name(f"{out.stem}_{name.replace('@', '')}.png").write_bytes(plot)


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison; `arguments` as on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_tokenizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contender", nargs="+", action="append", required=True, metavar="CONFIG")
    parser.add_argument("--seconds", type=float, default=300.0, help="processor seconds of training for each")
    parser.add_argument("--turn", type=float, default=10.0, help="processor seconds of one turn")
    parser.add_argument("--val_images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--option", action="append", default=[], help="an option for all, such as --data.data_dir=runs/x"
    )
    parser.add_argument("--adamw", type=int, action="append", default=[], metavar="N", help="see above; counted from 1")
    parser.add_argument("--adamw_lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="JSON to write; plots go beside it")
    options = parser.parse_args(arguments)
    rates = [options.adamw_lr if i in options.adamw else None for i in range(1, len(options.contender) + 1)]
    contenders = [
        Contender(files, options.option, options.seconds, options.seed, rate)
        for files, rate in zip(options.contender, rates, strict=True)
    ]
    compare(contenders, options.turn, options.val_images, options.seed)
    if options.out:
        keep(contenders, options.out)


if __name__ == "__main__":
    main()
