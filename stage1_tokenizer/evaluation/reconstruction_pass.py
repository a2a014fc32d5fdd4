"""One pass over the held-out pictures, and one over training pictures: what a reconstruction report is made of.

Both codes, the tokenizer's and PCA's, are decoded from the same number of floats and go through the same meters, batch
by batch. What is kept: numbers of every picture, moments of features (`picture_set`), latents of a sample of at most
5,000, and the pixels of the few pictures that are shown.

Letters: N pictures, M of them in the sample, K latents, C channels, k prefix length, F floats of PCA.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.reading.order import spread_rows
from stage1_tokenizer.evaluation.frechet import FeatureExtractor
from stage1_tokenizer.evaluation.image_metrics import PairMetric
from stage1_tokenizer.evaluation.picture_data import PictureData, chosen, described, own_batches
from stage1_tokenizer.evaluation.picture_set import PictureSet
from stage1_tokenizer.evaluation.reconstruction_text import NUM_CAPTIONS
from stage1_tokenizer.pca import PCA
from stage1_tokenizer.text.ranks import in_order, of_others, world_size
from stage1_tokenizer.tokenizer import Tokenizer

GRID_PICTURES = 8
NEIGHBOUR_PICTURES = 2000  # precision and recall compare all pairs
LINES = 5000  # pictures whose latents are kept: for probes, captions and what a position carries


def prefix_lengths(num_latents: int) -> list[int]:
    """1, 2, 4, ... and K."""
    return [2**i for i in range(num_latents.bit_length()) if 2**i < num_latents] + [num_latents]


@dataclass
class Meters:
    """What is measured of every picture: metrics against its original by name, and features for distances of sets."""

    pair_metrics: dict[str, PairMetric]
    extractors: list[FeatureExtractor]


@dataclass
class Measured:
    """What is kept of the pictures of one code (a tokenizer, or PCA) at each length k."""

    sets: dict[int, PictureSet]
    values: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)  # metric -> k -> parts (B,)

    def add(self, k: int, decoded: Tensor, images: Tensor, meters: Meters, at: int) -> None:
        """Measure pictures (B, 3, H, W) decoded from k latents' worth of floats against `images`; at: the first's."""
        for name, metric in meters.pair_metrics.items():
            self.values.setdefault(name, {}).setdefault(k, []).append(metric(decoded, images).cpu())
        self.sets[k].add(decoded, at)

    def over_ranks(self) -> None:
        """Take in what the other ranks have measured; all of them have to call it."""
        for values in of_others(self.values):
            for name, by_k in values.items():
                for k, parts in by_k.items():
                    self.values.setdefault(name, {}).setdefault(k, []).extend(parts)
        for pictures in self.sets.values():
            pictures.over_ranks()

    def means(self) -> dict[str, dict[int, float]]:
        """The mean over pictures of every metric at every k."""
        return {n: {k: torch.cat(p).double().mean().item() for k, p in by_k.items()} for n, by_k in self.values.items()}

    def pictures(self) -> dict[int, Tensor]:
        """k -> the pictures (n, 3, H, W) that are shown."""
        return {k: torch.stack(list(pictures.pictures.values())) for k, pictures in self.sets.items()}


@dataclass
class Lines:
    """Latents of a sample of pictures, and what is said about these."""

    z: Tensor  # (M, K, C) posterior means, standardised
    std: Tensor  # (M, K, C) posterior standard deviations
    codes: Tensor  # (M, F) PCA coefficients
    samples: dict[str, Any]  # captions, attributes and labels


@dataclass
class HeldOut:
    """The held-out pictures themselves, without their pixels but for those that are shown."""

    set: PictureSet
    samples: dict[str, Any]  # captions, attributes and labels of all N
    lines: Lines

    def pictures(self) -> Tensor:
        """Those that are shown, (n, 3, H, W)."""
        return torch.stack(list(self.set.pictures.values()))


@torch.inference_mode()
def measure(
    tokenizer: Tokenizer,
    pca: PCA,
    datamodule: PictureData,
    lengths: Sequence[int],
    limit: int,
    meters: Meters,
    seed: int,
) -> tuple[HeldOut, Measured, Measured]:
    """Held-out pictures, and what the tokenizer and PCA make of them. seed: of a stochastic decoder's noise.

    Of several ranks each goes through its share of the batches, and all return all.

    Raises ValueError for fewer than 2 held-out pictures.
    """
    device = tokenizer.latent_mean.device
    generator = torch.Generator(device)
    rows = spread_rows(len(datamodule.split("val")), limit)
    if len(rows) < 2:
        raise ValueError(f"got {len(rows)} held-out pictures for the report, wanted 2 or more; prepare more of them")
    kept = spread_rows(len(rows), LINES)
    shown = [kept[i] for i in spread_rows(len(kept), NUM_CAPTIONS)[:GRID_PICTURES]]  # their captions are shown, too
    sample = spread_rows(len(rows), NEIGHBOUR_PICTURES)

    def pictures() -> PictureSet:
        return PictureSet(meters.extractors, sample, shown)

    real, (learned, linear) = pictures(), (Measured({k: pictures() for k in lengths}) for _ in range(2))
    parts, codes, in_lines = {}, {}, set(kept)
    for at, batch in tqdm(
        own_batches(datamodule, "val", rows, datamodule.val_batch_size),
        total=-(-len(rows) // (datamodule.val_batch_size * world_size())),
        desc="reconstruct",
        disable=None,
        leave=False,
    ):
        images = batch["images"].to(device)
        own = [i for i in range(len(images)) if at + i in in_lines]
        generator.manual_seed(seed + at)  # the same noise on any number of ranks
        mean, std = tokenizer.posterior(images)
        code = pca.encode(images)
        for k in lengths:
            learned.add(k, tokenizer.decode(mean[:, :k], generator=generator), images, meters, at)
            linear.add(k, pca.decode(code[:, : k * tokenizer.latent_dim]), images, meters, at)
        real.add(images, at)
        parts[at] = described([batch])
        codes[at] = (mean[own].cpu(), std[own].cpu(), code[own].cpu())
    for each in (real, learned, linear):
        each.over_ranks()
    samples = described(in_order(parts))
    z, deviation, coefficients = (torch.cat(x) for x in zip(*in_order(codes), strict=True))
    return HeldOut(real, samples, Lines(z, deviation, coefficients, chosen(samples, kept))), learned, linear


@dataclass
class Training:
    """Training pictures: the set that stands beside the held-out one, and what probes and prompts are made of."""

    set: PictureSet
    samples: dict[str, Any]  # captions, attributes and labels of all
    lines: Lines | None


@torch.inference_mode()
def training_pass(
    tokenizer: Tokenizer,
    pca: PCA,
    datamodule: PictureData,
    rows: Sequence[int],
    in_set: int,
    in_lines: int,
    extractors: Sequence[FeatureExtractor],
) -> Training:
    """Of the training pictures `rows`: features of the first `in_set`, latents of the first `in_lines`, if any."""
    device = tokenizer.latent_mean.device
    pictures, parts, codes = PictureSet(extractors), {}, {}
    for at, batch in own_batches(datamodule, "train", rows, datamodule.val_batch_size):
        images = batch["images"].to(device)
        if at < in_set:
            pictures.add(images[: in_set - at], at)
        if at < in_lines:
            mean, std = tokenizer.posterior(images[: in_lines - at])
            codes[at] = (mean.cpu(), std.cpu(), pca.encode(images[: in_lines - at]).cpu())
        parts[at] = described([batch])
    pictures.over_ranks()
    samples, every, lines = described(in_order(parts)), in_order(codes), None
    if every:
        z, std, coefficients = (torch.cat(x) for x in zip(*every, strict=True))
        lines = Lines(z, std, coefficients, chosen(samples, range(len(z))))
    return Training(pictures, samples, lines)
