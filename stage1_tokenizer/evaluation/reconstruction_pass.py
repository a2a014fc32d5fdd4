"""One pass over the held-out pictures: their latents, and what the tokenizer and PCA make of them at every length.

Both codes are decoded from the same number of floats and go through the same meters, batch by batch; what is kept are
numbers, latents and features, and a few pictures to look at.

Letters: N pictures, K latents, C channels, k prefix length, D features, F floats of PCA.
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
from stage1_tokenizer.evaluation.picture_data import PictureData
from stage1_tokenizer.pca import PCA
from stage1_tokenizer.tokenizer import Tokenizer

GRID_PICTURES = 8


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

    values: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)  # metric -> k -> parts (B,)
    features: dict[str, dict[int, list[Tensor]]] = field(default_factory=dict)  # extractor -> k -> parts (B, D)
    pictures: dict[int, Tensor] = field(default_factory=dict)  # the first few, for the grid

    def add(self, k: int, decoded: Tensor, images: Tensor, meters: Meters) -> None:
        """Measure pictures (B, 3, H, W) decoded from k latents' worth of floats against `images`."""
        for name, metric in meters.pair_metrics.items():
            self.values.setdefault(name, {}).setdefault(k, []).append(metric(decoded, images).cpu())
        for extractor in meters.extractors:
            parts = self.features.setdefault(extractor.feature_name, {}).setdefault(k, [])
            parts.append(extractor.features(decoded).cpu())
        self.pictures.setdefault(k, decoded[:GRID_PICTURES].cpu())

    def means(self) -> dict[str, dict[int, float]]:
        """The mean over pictures of every metric at every k."""
        return {n: {k: torch.cat(p).mean().item() for k, p in by_k.items()} for n, by_k in self.values.items()}

    def features_by_k(self, name: str) -> dict[int, Tensor]:
        """k -> features (N, D) of one extractor."""
        return {k: torch.cat(parts) for k, parts in self.features[name].items()}


@dataclass
class HeldOut:
    """The held-out pictures themselves, without their pixels but for a few."""

    z: Tensor  # (N, K, C) posterior means, standardised
    std: Tensor  # (N, K, C) posterior standard deviations
    codes: Tensor  # (N, F) PCA coefficients
    features: dict[str, Tensor]  # extractor -> (N, D)
    samples: dict[str, Any]  # captions, attributes and labels, as the data module gives them
    pictures: Tensor  # (n, 3, H, W) the first few, for the grid


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

    Raises ValueError for fewer than 2 held-out pictures.
    """
    device = tokenizer.latent_mean.device
    generator = torch.Generator(device).manual_seed(seed)
    rows, size = spread_rows(len(datamodule.split("val")), limit), datamodule.val_batch_size
    if len(rows) < 2:
        raise ValueError(f"got {len(rows)} held-out pictures for the report, wanted 2 or more; prepare more of them")
    learned, linear, parts = Measured(), Measured(), []
    for at in tqdm(range(0, len(rows), size), desc="reconstruct", disable=None, leave=False):
        batch = datamodule.samples("val", rows[at : at + size])
        images = batch["images"].to(device)
        mean, std = tokenizer.posterior(images)
        codes = pca.encode(images)
        for k in lengths:
            learned.add(k, tokenizer.decode(mean[:, :k], generator=generator), images, meters)
            linear.add(k, pca.decode(codes[:, : k * tokenizer.latent_dim]), images, meters)
        features = {extractor.feature_name: extractor.features(images).cpu() for extractor in meters.extractors}
        samples = {name: batch[name] for name in ("captions", "attributes", "labels")}
        parts.append(HeldOut(mean.cpu(), std.cpu(), codes.cpu(), features, samples, images[:GRID_PICTURES].cpu()))
    return _joined(parts), learned, linear


def _joined(parts: Sequence[HeldOut]) -> HeldOut:
    """The batches as one, with the pictures of the first."""
    first = parts[0]
    return HeldOut(
        z=torch.cat([part.z for part in parts]),
        std=torch.cat([part.std for part in parts]),
        codes=torch.cat([part.codes for part in parts]),
        features={name: torch.cat([part.features[name] for part in parts]) for name in first.features},
        samples={
            "captions": [captions for part in parts for captions in part.samples["captions"]],
            "attributes": [attributes for part in parts for attributes in part.samples["attributes"]],
            "labels": torch.cat([part.samples["labels"].cpu() for part in parts]),
        },
        pictures=first.pictures,
    )
