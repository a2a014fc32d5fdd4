"""`python -m tests.benchmarks.costs [--tflops 300]`: what every config costs to train, worked out from counted FLOPs.

One training step of two pictures is run, on the CPU, and the FLOPs of its matrix products are counted. GPU hours divide
by a sustained rate that is an assumption and printed as such.
"""

import argparse
from pathlib import Path

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.same_numbers import build

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PICTURES = 2


def training_flops(name: str) -> tuple[float, float]:
    """(parameters, FLOPs per picture of a training step, text included) of configs/stage1/`name`.yaml."""
    tokenizer = build("stage1", [f"stage1/{name}"], []).tokenizer.train()
    images = torch.zeros(PICTURES, 3, tokenizer.image_size, tokenizer.image_size)
    ids = torch.zeros(PICTURES, tokenizer.vocabulary.context_length, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16), counter:
        tokenizer.total(tokenizer.losses(images, ids)[0]).backward()
    return sum(p.numel() for p in tokenizer.parameters()), counter.get_total_flops() / PICTURES


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each stage-1 config; `arguments` as on the command line, None for the process's own."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.costs", description=__doc__)
    parser.add_argument("--tflops", type=float, default=300.0, help="TFLOP/s assumed to be sustained by one GPU")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of the configs for 256 pixels")
    options = parser.parse_args(arguments)
    print(f"GPU hours at an assumed {options.tflops:g} TFLOP/s; a training step, decoder's second length included")
    print(f"{'config':12} {'M params':>9} {'GFLOP/image':>12} {'steps':>8} {'batch':>6} {'EFLOP':>9} {'GPU h':>8}")
    for path in sorted((CONFIGS / "stage1").glob("*.yaml")):
        config = yaml.safe_load(path.read_text())
        large = config["sizes"]["image_size"] >= 256
        batch = config["data"]["batch_size"] * (options.gpus if large else 1)
        steps = config["trainer"]["max_steps"]
        parameters, flops = training_flops(path.stem)
        total = flops * batch * steps
        print(
            f"{path.stem:12} {parameters / 1e6:9.1f} {flops / 1e9:12.2f} {steps:8,} {batch:6,} {total / 1e18:9.3f} "
            f"{total / options.tflops / 1e12 / 3600:8.2f}"
        )


if __name__ == "__main__":
    main()
