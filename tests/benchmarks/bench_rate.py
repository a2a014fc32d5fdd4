"""`python -m tests.benchmarks.bench_rate`: what a linear path reads of continuous and of discrete codes, at equal bits.

Before any learning: the encoder is silent, the code is that of principal components, and the linear path alone decodes
it. A continuous code is read as the decoder sees it in training, noise included, and its bits are its KL. Pictures are
scenes, or with --data those of a prepared directory.

Letters: K latents, C channels, N pictures.
"""

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.pictures.transforms import to_unit_range
from data.reading.datamodule import ImageDataModule
from data.sources.scenes import Scenes
from stage1_tokenizer import FSQBottleneck, LinearPath, RateBottleneck
from stage1_tokenizer.bottleneck import Bottleneck
from stage1_tokenizer.prefixes import keep_mask
from stage1_tokenizer.similarity import psnr

K, C, SIDE, WIDTH = 16, 16, 32, 16
RATES = (100, 200, 400, 594, 768, 1600)
LEVELS = (5, 8)


def pictures(data: str | None, train: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Training and held-out pictures (N,3,32,32) in [-1,1]."""
    if data is not None:
        module = ImageDataModule(data, image_size=SIDE)
        return module.arrays("train", train)["images"], module.arrays("val", held_out)["images"]
    pixels = Scenes(train + held_out, seed=0).draw(np.arange(train + held_out))[1]
    drawn = to_unit_range(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return drawn[:train], drawn[train:]


@torch.no_grad()
def code(path: LinearPath, bottleneck: Bottleneck, images: Tensor) -> tuple[float, float]:
    """(bits a picture, PSNR in dB) of pictures through a silent encoder, this bottleneck and the linear path alone."""
    bottleneck.start_silent()
    bottleneck.start_beside(path.variances, images[0].numel())
    coefficients, keep = path.encode(images, K), keep_mask(torch.full((len(images),), K), K)
    torch.manual_seed(0)
    z, parts = bottleneck.eval()(torch.zeros(len(images), K, WIDTH), coefficients)
    each: Any = getattr(bottleneck, "bits_per_latent", None)  # of symbols
    bits = parts["rate_bits"] if each is None else K * each
    return float(bits), psnr(path.decode(bottleneck.linear(z), keep).clamp(-1, 1), images).mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Print one line per code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_rate", description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="prepared directory, 32 pixels (scenes)")
    parser.add_argument("--train", type=int, default=20_000, help="pictures that the components are fitted on")
    parser.add_argument("--held_out", type=int, default=2000)
    options = parser.parse_args(arguments)
    train, images = pictures(options.data, options.train, options.held_out)
    path = LinearPath(SIDE, K, C)
    path.fit(train)
    keep = keep_mask(torch.full((len(images),), K), K)
    exact = psnr(path.decode(path.encode(images, K), keep).clamp(-1, 1), images).mean()
    print(f"principal components, {K * C} floats without noise: {exact:.2f} dB")
    codes: dict[str, Bottleneck] = {f"RateBottleneck, {b} bits": RateBottleneck(WIDTH, K, C, bits=b) for b in RATES}
    codes |= {f"FSQBottleneck, {levels} levels": FSQBottleneck(WIDTH, K, (levels,) * C) for levels in LEVELS}
    for name, bottleneck in codes.items():
        bits, decibels = code(path, bottleneck, images)
        print(f"{name}: {bits:.0f} bits, {decibels:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
