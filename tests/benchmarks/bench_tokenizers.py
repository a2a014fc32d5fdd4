"""`python -m tests.benchmarks.bench_tokenizers`: which tokenizer design learns faster, in one run on one data set.

    python -m tests.benchmarks.bench_tokenizers --seconds 300 \\
        --contender configs/stage1/cifar10.yaml configs/variants/no_text.yaml \\
        --contender configs/stage1/cifar10.yaml configs/variants/no_text.yaml configs/variants/titok.yaml

Each contender is a config and its overlays, as `fit` takes them. They train in turns of `--turn` processor seconds of
this process, on the same pictures in the same order, so that a busy machine slows all of them alike; each has its own
clock, which stands still while the others train and while it is measured. The learning rate follows the config's
schedule along the clock, not along steps: every contender ends with a finished cosine when its seconds are spent.

Printed at eighths of the time, with the averaged weights: PSNR on held-out pictures by prefix, and its distance to PCA
with the same number of floats. The last lines say how many of its seconds each contender took to the first one's PSNR
of each of its measurements at full length (interpolated; "-": never).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.reading.datamodule import ImageDataModule
from stage1_tokenizer.pca import PCA
from stage1_tokenizer.precision import matmul_dtype
from stage1_tokenizer.similarity import psnr
from stage1_tokenizer.training.cli import UnspoolCLI
from stage1_tokenizer.training.ema import EMA
from stage1_tokenizer.training.lit_tokenizer import LitTokenizer
from stage1_tokenizer.training.optim import warmup_flat_cosine

CHECKS = 8  # measurements along a contender's time
FINE = 100_000  # steps that the time is divided into for the schedule


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

    def __init__(self, files: list[str], options: list[str], seconds: float, seed: int):
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
        self.optimizer = model.tokenizer_optimizer()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.found: list[tuple[float, list[float]]] = []  # (seconds, PSNR by prefix)
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
    def measure(self, images: Tensor, prefixes: list[int]) -> list[float]:
        """PSNR by prefix with the averaged weights, kept in `found`."""
        self.tokenizer.eval()
        with self.ema.averaged(), torch.autocast("cpu", matmul_dtype(torch.device("cpu"))):
            sums = torch.zeros(len(prefixes))
            for x in images.split(250):
                z, noise = self.tokenizer.encode(x), torch.Generator().manual_seed(0)
                sums += torch.stack([psnr(self.tokenizer.decode(z[:, :k], noise), x).sum() for k in prefixes])
        values: list[float] = (sums / len(images)).tolist()
        self.found.append((self.spent, values))
        return values

    def seconds_to(self, target: float) -> float | None:
        """Seconds to a PSNR at full length, interpolated between measurements; None: never reached."""
        before = (0.0, float("-inf"))
        for spent, values in self.found:
            if values[-1] >= target:
                share = 1.0 if before[1] == float("-inf") else (target - before[1]) / (values[-1] - before[1])
                return before[0] + share * (spent - before[0])
            before = (spent, values[-1])
        return None


def compare(contenders: list[Contender], turn: float, val_images: int, seed: int) -> None:
    """Train all in turns and print what they reach."""
    data: Any = contenders[0].data
    arrays = data.arrays("train")
    images, captions = arrays["images"], [max([*c, ""], key=len) for c in arrays["captions"]]
    held = data.arrays("val", val_images)["images"]
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
                values = contender.measure(held, prefixes)
                text = " ".join(f"{v:.2f} ({v - base:+.2f})" for v, base in zip(values, linear, strict=True))
                print(f"{contender.name:40s} {contender.spent:6.0f} s {contender.steps:6d} steps  {text}", flush=True)
    for _, values in contenders[0].found:
        times = [c.seconds_to(values[-1]) for c in contenders]
        print(f"to {values[-1]:.2f} dB, seconds: " + " / ".join("-" if t is None else f"{t:.0f}" for t in times))


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
    options = parser.parse_args(arguments)
    contenders = [Contender(files, options.option, options.seconds, options.seed) for files in options.contender]
    compare(contenders, options.turn, options.val_images, options.seed)


if __name__ == "__main__":
    main()
